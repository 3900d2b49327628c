"""What agents act with; on a CPU in numpy where calls are small.

Between two steps of an env the processor's caches lose torch's code, and calling one of its operations costs more than
the arithmetic of 64 units; numpy's cost less (`scripts/bench_acting.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgrl.compiling import compile_step
from pgrl.networks import LOG_STD_RANGE, MLP, Policy
from pgrl.normalisers import RunningNorm
from pgrl.q_networks import DeterministicPolicy

Array = NDArray[Any]

# Beyond so many weights of a layer, and multiplications of a layer in a call, numpy is no faster. With more than one
# thread (`pgrl/__init__.py` asks for one, but may come too late) its BLAS would wake the others from far fewer on.
ONE_THREAD = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
LAYER_LIMIT, CALL_LIMIT = (300_000, 4_000_000) if ONE_THREAD else (9_000, 250_000)


def tanh_(x: Array) -> None:
    np.tanh(x, out=x)


def relu_(x: Array) -> None:
    np.maximum(x, 0.0, out=x)


def clip_(x: Array, low: float, high: float) -> None:
    np.maximum(x, low, out=x)  # np.clip itself takes three times as long
    np.minimum(x, high, out=x)


ACTIVATIONS: dict[str, Callable[[Array], None]] = {"tanh": tanh_, "relu": relu_}


class Actor:
    """Actions of `net` for observations that `obs_norm` normalises, without gradients.

    Samples are made in numpy where a call is small: an MLP of tanh or ReLU units in main memory, whose actions are one
    choice among K, Gaussian, squashed or deterministic. They equal `net.sample` to rounding. The weights are read where
    they lie, and looked up again where those of the last layer were moved, with which all others move. What torch does
    instead, on a GPU everything, is one graph with `compiled`.
    """

    def __init__(
        self, net: Policy | DeterministicPolicy, obs_norm: RunningNorm | None, *, compiled: bool = False
    ) -> None:
        self._net, self._obs_norm = net, obs_norm
        self.apply: Callable[[Tensor, Tensor], Tensor] = compile_step(self.large) if compiled else self.large
        self._rows, self._weight = 0, net.policy_head.weight
        body, discrete = net.body, isinstance(net.action_space, spaces.Discrete)
        known = discrete or net.distribution in ("gaussian", "squashed", "deterministic")
        if isinstance(body, MLP) and self._weight.is_cpu and known and body.activation in ACTIVATIONS:
            self._activate = ACTIVATIONS[body.activation]
            widest = max(layer.weight.numel() for layer in [*body.layers, net.policy_head])
            self._rows = CALL_LIMIT // widest if widest <= LAYER_LIMIT else 0
            self._look_up()

    def mode(self, obs: Tensor) -> Tensor:
        """The most likely actions [B, ...] in the env's units for obs [B, *obs]."""
        return self._net.mode(obs if self._obs_norm is None else self._obs_norm(obs))

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, ...] in the env's units, as `net.sample` gives them."""
        if len(obs) > self._rows or obs.dtype != torch.float32:
            return self.apply(obs, noise)
        if self._place != self._weight.data_ptr():
            self._look_up()

        x: Array = obs.numpy()
        if self._norm is not None:
            scale, shift, clip = self._norm
            x = x * scale + shift
            if clip is not None:
                clip_(x, -clip, clip)
        if x.ndim != 2:
            x = x.reshape(len(x), -1)
        for weight, bias in self._hidden:
            x = x.dot(weight)  # half the price of `@` where x is small
            x += bias
            self._activate(x)
        weight, bias = self._head
        x = x.dot(weight)
        x += bias
        return torch.from_numpy(self._finish(x, noise.numpy()))

    def large(self, obs: Tensor, noise: Tensor) -> Tensor:
        """What `sample` does with torch, in one graph where compiled."""
        return self._net.sample(obs if self._obs_norm is None else self._obs_norm(obs), noise)

    def _finish(self, x: Array, noise: Array) -> Array:
        """Actions of the head's output x [B, outputs], which may be written to."""
        kind = self._net.distribution
        if kind == "discrete":
            x += noise
            choice: Array = x.argmax(-1)
            return choice
        if kind == "deterministic":
            tanh_(x)
            x += noise
            clip_(x, -1.0, 1.0)
        else:
            if self._log_std is None:
                mean, log_std = x[:, : noise.shape[-1]], x[:, noise.shape[-1] :] + self._log_std_init
                clip_(log_std, *LOG_STD_RANGE)
                x = mean + noise * np.exp(log_std)
            else:
                x += noise * np.exp(self._log_std)
            if kind == "squashed":
                tanh_(x)
        if self._affine is not None:
            center, radius = self._affine
            x *= radius
            x += center
        return x

    def _look_up(self) -> None:
        """Views of everything `sample` computes with."""
        net, norm = self._net, self._obs_norm
        layers = [*net.body.layers, net.policy_head]
        *self._hidden, self._head = [(view(layer.weight).T, view(layer.bias)) for layer in layers]
        self._log_std, self._log_std_init = None if net.log_std is None else view(net.log_std), net.log_std_init
        self._affine = (view(net.center), view(net.radius)) if net.affine else None
        self._norm = None if norm is None else (view(norm.scale), view(norm.shift), norm.clip)
        self._place = self._weight.data_ptr()


def view(x: Tensor) -> Array:
    """The tensor's memory as an array."""
    return x.detach().numpy()
