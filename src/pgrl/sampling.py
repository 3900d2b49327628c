"""Samples of small policies, a few observations at a time: in C++, and in numpy."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgrl.native import library
from pgrl.networks import LOG_STD_RANGE, MLP, Policy
from pgrl.normalisers import RunningNorm
from pgrl.q_networks import DeterministicPolicy

Array = NDArray[Any]

# Beyond so many weights of a layer, and multiplications of a layer in a call, numpy is no faster. With more than one
# thread (`pgrl/__init__.py` asks for one, but may come too late) its BLAS would wake the others from far fewer on.
ONE_THREAD = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
LAYER_LIMIT, CALL_LIMIT = (300_000, 4_000_000) if ONE_THREAD else (9_000, 250_000)
# And C++, which multiplies for one observation after another, beyond so many weights, and observations in a call.
CPP_LAYER_LIMIT, CPP_ROWS = 300_000, 8


def tanh_(x: Array) -> None:
    np.tanh(x, out=x)


def relu_(x: Array) -> None:
    np.maximum(x, 0.0, out=x)


def clip_(x: Array, low: float, high: float) -> None:
    np.maximum(x, low, out=x)  # np.clip itself takes three times as long
    np.minimum(x, high, out=x)


ACTIVATIONS: dict[str, Callable[[Array], None]] = {"tanh": tanh_, "relu": relu_}
DISTRIBUTIONS = ("gaussian", "squashed", "deterministic")


def small_calls(net: Policy | DeterministicPolicy) -> tuple[int, int]:
    """How many observations make a small call for C++ and for numpy; 0 where these do not know the network."""
    known = isinstance(net.action_space, spaces.Discrete) or net.distribution in DISTRIBUTIONS
    if not (known and isinstance(net.body, MLP) and net.body.activation in ACTIVATIONS):
        return 0, 0
    widest = max(layer.weight.numel() for layer in [*net.body.layers, net.policy_head])
    in_cpp = CPP_ROWS if widest <= CPP_LAYER_LIMIT else 0
    return in_cpp, CALL_LIMIT // widest if widest <= LAYER_LIMIT else 0


def activation(net: Policy | DeterministicPolicy) -> str:
    """The name of what follows its layers, of an MLP."""
    assert isinstance(net.body, MLP)
    return net.body.activation


class Numbers(NamedTuple):
    """What a small policy computes with; None for what it has not."""

    layers: list[tuple[Array, Array]]  # weights [outputs, inputs] and biases [outputs], the head's last
    log_std: Array | None  # [A]; None also where the head gives them, as its second half
    affine: tuple[Array, Array] | None  # center and radius [A] of the env's units
    norm: tuple[Array, Array, float | None] | None  # scale, shift and clip of observations

    def arrays(self) -> list[Array]:
        """All of them."""
        single = [] if self.log_std is None else [self.log_std]
        return [*(x for pair in self.layers for x in pair), *single, *(self.affine or ()), *(self.norm or ())[:2]]


def look_up(
    net: Policy | DeterministicPolicy, norm: RunningNorm | None, of: Callable[[Sequence[Tensor]], list[Array]]
) -> Numbers:
    """The numbers of a network and its normaliser, as arrays that `of` makes of their tensors."""
    layers = [x for layer in (*net.body.layers, net.policy_head) for x in (layer.weight, layer.bias)]
    log_std = [] if net.log_std is None else [net.log_std]
    affine = [net.center, net.radius] if net.affine else []
    moments = [] if norm is None else [norm.scale, norm.shift]
    arrays = iter(of([*layers, *log_std, *affine, *moments]))
    return Numbers(
        [(next(arrays), next(arrays)) for _ in range(len(layers) // 2)],
        next(arrays) if log_std else None,
        (next(arrays), next(arrays)) if affine else None,
        None if norm is None else (next(arrays), next(arrays), norm.clip),
    )


def views(tensors: Sequence[Tensor]) -> list[Array]:
    """The memory of tensors as arrays."""
    return [x.detach().numpy() for x in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Array]:
    """Arrays with what tensors of one type and device hold, by one copy."""
    row: Array = torch.cat([x.detach().reshape(-1) for x in tensors]).cpu().numpy()
    ends = np.cumsum([x.numel() for x in tensors])
    return [part.reshape(x.shape) for x, part in zip(tensors, np.split(row, ends[:-1]), strict=True)]


class InNumpy:
    """Samples of a small policy in numpy."""

    name = "numpy"

    def __init__(self, net: Policy | DeterministicPolicy, numbers: Numbers) -> None:
        self._distribution, self._log_std_init = net.distribution, net.log_std_init
        self._activate = ACTIVATIONS[activation(net)]
        *self._hidden, self._head = [(weight.T, bias) for weight, bias in numbers.layers]
        _, self._log_std, self._affine, self._norm = numbers

    def __call__(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, ...] for obs [B, *obs] and noise [B, A]."""
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

    def _finish(self, x: Array, noise: Array) -> Array:
        """Actions of the head's output x [B, outputs], which may be written to."""
        kind = self._distribution
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


# The structs of sampling.cpp, and its numbers for activations and distributions.
LAYER = np.dtype([("inputs", "i8"), ("outputs", "i8"), ("weight", "u8"), ("bias", "u8")])
POLICY = np.dtype(
    [
        *[(name, "i8") for name in ("count", "layers", "activation", "kind", "actions")],
        *[(name, "u8") for name in ("scale", "shift")],
        *[(name, "f4") for name in ("clip", "log_std_init", "log_std_low", "log_std_high")],
        *[(name, "u8") for name in ("log_std", "center", "radius", "scratch", "other_scratch")],
    ]
)


class InCpp:
    """Samples of a small policy, whose numbers are of float32, by one call of sampling.cpp."""

    def __init__(self, net: Policy | DeterministicPolicy, numbers: Numbers) -> None:
        found = library("sampling")
        assert found is not None
        self.name, self._sample = f"C++ {found.key}", found.functions.pgrl_sample
        self._sample.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._sample.restype = None
        layers, log_std, affine, norm = numbers
        self._choice, self._inputs, self._actions = net.distribution == "discrete", layers[0][0].shape[1], net.actions
        self._layers = np.array([(w.shape[1], w.shape[0], place(w), place(b)) for w, b in layers], LAYER)
        self._scratch = np.empty((2, max(max(w.shape) for w, _ in layers)), np.float32)
        self._numbers = numbers  # kept, for only their places are known to the policy
        scale, shift, clip = norm or (None, None, None)
        center, radius = affine or (None, None)
        self._policy = np.array(
            (
                len(layers),
                place(self._layers),
                list(ACTIVATIONS).index(activation(net)),
                ("discrete", *DISTRIBUTIONS).index(net.distribution),
                net.actions,
                place(scale),
                place(shift),
                math.inf if clip is None else clip,
                net.log_std_init,
                *LOG_STD_RANGE,
                place(log_std),
                place(center),
                place(radius),
                *map(place, self._scratch),
            ),
            POLICY,
        )
        self._at = place(self._policy)

    def __call__(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, ...] for obs [B, *obs] and noise [B, A] in main memory; ValueError for others."""
        rows, obs, noise = obs.shape[0], obs.contiguous(), noise.contiguous()
        fits = obs.numel() == rows * self._inputs and noise.shape == (rows, self._actions)
        if not (fits and obs.is_cpu and noise.is_cpu and noise.dtype == torch.float32):
            raise ValueError(
                f"obs {tuple(obs.shape)} on {obs.device} and noise {tuple(noise.shape)} of {noise.dtype} on "
                f"{noise.device}, where {self._inputs} numbers for each of B observations and float32 noise "
                f"[B, {self._actions}] in main memory are asked for"
            )
        action = torch.from_numpy(np.empty(rows, np.int64) if self._choice else np.empty(noise.shape, np.float32))
        self._sample(self._at, rows, obs.data_ptr(), noise.data_ptr(), action.data_ptr())
        return action


def place(x: Array | None) -> int:
    """Where an array lies in memory; 0 for none."""
    return 0 if x is None else int(x.ctypes.data)
