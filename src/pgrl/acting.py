"""What agents act with; in numpy where envs are on the CPU and calls are small.

Between two steps of an env the processor's caches lose torch's code, and calling one of its operations costs more than
the arithmetic of 64 units; numpy's cost less (`scripts/bench_acting.py`). A GPU's cost more still, and the way there
and back: an agent that learns on one acts in main memory, on a copy of its policy, which each rollout renews.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
DISTRIBUTIONS = ("gaussian", "squashed", "deterministic")


class Surroundings(Protocol):
    """What a run's `Setting` says about acting."""

    obs_space: spaces.Box
    num_envs: int
    device: torch.device
    env_device: torch.device
    compiled: bool


class Actor:
    """Actions of `net` for observations that `obs_norm` normalises, without gradients.

    Samples are made in numpy where a call is small: an MLP of tanh or ReLU units, whose actions are one choice among K,
    Gaussian, squashed or deterministic. They equal `net.sample` to rounding. Weights in main memory are read where they
    lie, and looked up again where those of the last layer were moved, with which all others move; of others numpy has a
    copy, which `take_over` renews. What torch does instead is one graph where the setting says `compiled`.

    `device` is where `sample` takes observations and noise: that of `net`, or main memory, where numpy has a copy.
    """

    def __init__(
        self, net: Policy | DeterministicPolicy, obs_norm: RunningNorm | None, setting: Surroundings | None = None
    ) -> None:
        self._net, self._obs_norm = net, obs_norm
        compiled = setting is not None and setting.compiled
        self.apply: Callable[[Tensor, Tensor], Tensor] = compile_step(self.large) if compiled else self.large
        self._weight = net.policy_head.weight
        self._rows, self._copies = self._small(), False
        self.device = self._weight.device if setting is None else setting.device
        if setting is not None and setting.env_device.type == "cpu" and setting.env_device != self.device:
            if setting.num_envs <= self._rows and setting.obs_space.dtype != "uint8":
                self.device, self._copies = setting.env_device, True
        if self.device.type != "cpu":
            self._rows = 0
        if self._rows:
            self._look_up()

    def _small(self) -> int:
        """How many observations make a small call in numpy; 0 where it does not know the network."""
        net, body = self._net, self._net.body
        known = isinstance(net.action_space, spaces.Discrete) or net.distribution in DISTRIBUTIONS
        if not (known and isinstance(body, MLP) and body.activation in ACTIVATIONS):
            return 0
        self._activate = ACTIVATIONS[body.activation]
        widest = max(layer.weight.numel() for layer in [*body.layers, net.policy_head])
        return CALL_LIMIT // widest if widest <= LAYER_LIMIT else 0

    def take_over(self) -> None:
        """What numpy has a copy of is out of date: the next sample has a new one."""
        if self._copies:
            self._place = -1

    def mode(self, obs: Tensor) -> Tensor:
        """The most likely actions [B, ...] in the env's units for obs [B, *obs]."""
        return self._net.mode(obs if self._obs_norm is None else self._obs_norm(obs))

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, ...] in the env's units, as `net.sample` gives them."""
        if len(obs) > self._rows or obs.dtype != torch.float32:
            where = self._weight.device
            return self.apply(obs.to(where), noise.to(where))
        if self._place != self._weight.data_ptr():  # moved, or taken over
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
        """Views, or copies, of everything `sample` computes with."""
        net, norm = self._net, self._obs_norm
        layers = [x for layer in (*net.body.layers, net.policy_head) for x in (layer.weight, layer.bias)]
        log_std = [] if net.log_std is None else [net.log_std]
        affine = [net.center, net.radius] if net.affine else []
        moments = [] if norm is None else [norm.scale, norm.shift]
        arrays = iter((copies if self._copies else views)([*layers, *log_std, *affine, *moments]))
        *self._hidden, self._head = [(next(arrays).T, next(arrays)) for _ in range(len(layers) // 2)]
        self._log_std, self._log_std_init = next(arrays) if log_std else None, net.log_std_init
        self._affine = (next(arrays), next(arrays)) if affine else None
        self._norm = None if norm is None else (next(arrays), next(arrays), norm.clip)
        self._place = self._weight.data_ptr()


def views(tensors: Sequence[Tensor]) -> list[Array]:
    """The memory of tensors as arrays."""
    return [x.detach().numpy() for x in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Array]:
    """Arrays with what tensors of one type and device hold, by one copy."""
    row: Array = torch.cat([x.detach().reshape(-1) for x in tensors]).cpu().numpy()
    ends = np.cumsum([x.numel() for x in tensors])
    return [part.reshape(x.shape) for x, part in zip(tensors, np.split(row, ends[:-1]), strict=True)]
