"""What agents act with: beside envs on the CPU and where calls are small, C++ or NumPy.

Between two steps of an env the processor's caches lose torch's code, and calling one of its operations costs more than
the arithmetic of 64 units; numpy's cost less, and one call of C++ for all of them less again
(`scripts/bench_acting.py`). A GPU's cost more still, and the way there and back: an agent that learns on one acts in
main memory, on a copy of its policy, which each rollout renews.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor

from pgrl.compiling import compile_step
from pgrl.native import library
from pgrl.networks import Policy
from pgrl.normalisers import RunningNorm
from pgrl.q_networks import DeterministicPolicy
from pgrl.sampling import InCpp, InNumpy, copies, look_up, small_calls, views


class Surroundings(Protocol):
    """What a run's `Setting` says about acting."""

    obs_space: spaces.Box
    num_envs: int
    device: torch.device
    env_device: torch.device
    compiled: bool


class Actor:
    """Actions of `net` for observations that `obs_norm` normalises, without gradients.

    Samples are made by C++, or numpy, where a call is small: an MLP of tanh or ReLU units, whose actions are one choice
    among K, Gaussian, squashed or deterministic. They equal `net.sample` to rounding. Weights in main memory are read
    where they lie, and looked up again where those of the last layer were moved, with which all others move; of others
    there is a copy, which `take_over` renews. What torch does instead is one graph where the setting says `compiled`.
    Numpy is for more envs than C++ is good for, and where there is no compiler.

    `device` is where `sample` takes observations and noise: that of `net`, or main memory, where there is a copy.
    """

    def __init__(
        self, net: Policy | DeterministicPolicy, obs_norm: RunningNorm | None, setting: Surroundings | None = None
    ) -> None:
        self._net, self._obs_norm = net, obs_norm
        compiled = setting is not None and setting.compiled
        self.apply: Callable[[Tensor, Tensor], Tensor] = compile_step(self.large) if compiled else self.large
        self._weight = net.policy_head.weight
        num_envs = 1 if setting is None else setting.num_envs
        in_cpp, in_numpy = small_calls(net)
        self._in_cpp = num_envs <= in_cpp and library("sampling") is not None
        self._rows, self._copies = in_cpp if self._in_cpp else in_numpy, False
        if setting is not None and setting.obs_space.dtype == "uint8":
            self._rows = 0
        self.device = self._weight.device if setting is None else setting.device
        if setting is not None and setting.env_device.type == "cpu" and setting.env_device != self.device:
            if num_envs <= self._rows:
                self.device, self._copies = setting.env_device, True
        if self.device.type != "cpu":
            self._rows = 0
        if self._rows:
            self._look_up()

    @property
    def acts_with(self) -> str:
        """What makes samples of the envs' observations: C++ and of which build, numpy or torch."""
        if self._rows and self._place != self._weight.data_ptr():
            self._look_up()
        return self._small.name if self._rows else "torch"

    def __getstate__(self) -> dict[str, Any]:
        """For copies, of this actor or of its process: they look up where their own numbers lie."""
        return {name: part for name, part in vars(self).items() if name != "_small"} | {"_place": -1}

    def take_over(self) -> None:
        """What there is a copy of is out of date: the next sample has a new one."""
        if self._copies:
            self._place = -1

    def mode(self, obs: Tensor) -> Tensor:
        """The most likely actions [B, ...] in the env's units for obs [B, *obs]."""
        return self._net.mode(obs if self._obs_norm is None else self._obs_norm(obs))

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, ...] in the env's units, as `net.sample` gives them."""
        if obs.shape[0] > self._rows or obs.dtype != torch.float32:
            where = self._weight.device
            return self.apply(obs.to(where), noise.to(where))
        if self._place != self._weight.data_ptr():  # moved, or taken over
            self._look_up()
        return self._small(obs, noise)

    def large(self, obs: Tensor, noise: Tensor) -> Tensor:
        """What `sample` does with torch, in one graph where compiled."""
        return self._net.sample(obs if self._obs_norm is None else self._obs_norm(obs), noise)

    def _look_up(self) -> None:
        numbers = look_up(self._net, self._obs_norm, copies if self._copies else views)
        in_cpp = self._in_cpp and all(x.dtype == np.float32 and x.flags.c_contiguous for x in numbers.arrays())
        self._small: InCpp | InNumpy = (InCpp if in_cpp else InNumpy)(self._net, numbers)
        self._place = self._weight.data_ptr()
