"""What agents learn from: transitions, rollouts of them, minibatches, and the noise that makes actions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import gymnasium.spaces as spaces
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor


class Transition(NamedTuple):
    """What happened: [B, ...] in one step, [T, B, ...] in a rollout, [N, ...] in a batch."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor  # what the action led to, before any reset
    terminated: Tensor  # bool: the task ended; nothing follows
    truncated: Tensor  # bool: the clock ran out; more would have followed


class Step(NamedTuple):
    """What an env answers; an env that ends is reset within the same step."""

    obs: Tensor  # [B, *obs] to act on next
    reward: Tensor  # [B] float32
    terminated: Tensor  # [B] bool
    truncated: Tensor  # [B] bool
    next_obs: Tensor  # [B, *obs]; differs from obs only where an episode ended


class Row(Step):
    """A step of a rollout in host memory with its tensors as arrays too: making them costs more than their use."""

    arrays: tuple[NDArray[Any], ...]


class Rollout:
    """Room for T steps of B envs, allocated once; envs write their answers straight into its rows.

    `put(t, action)` takes the action of step t, and `steps[t]` the answer. The obs an agent acts on at t is
    `obs[t]`, which is the `obs` of `steps[t - 1]`: one tensor of T + 1 rows serves both. `transition` is all T steps,
    [T, B, ...]: views of this memory.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        obs_space: spaces.Box,
        action_space: spaces.Space[Any],
        device: torch.device,
    ) -> None:
        shape = (num_steps, num_envs)
        obs_dtype = torch.uint8 if obs_space.dtype == "uint8" else torch.float32
        self._obs = torch.zeros((num_steps + 1, num_envs, *obs_space.shape), dtype=obs_dtype, device=device)
        next_obs = torch.zeros((*shape, *obs_space.shape), dtype=obs_dtype, device=device)
        action_shape, action_dtype = action_rows(action_space)
        self._action = torch.zeros((*shape, *action_shape), dtype=action_dtype, device=device)
        reward = torch.zeros(shape, device=device)
        terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        truncated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.transition = Transition(self._obs[:-1], self._action, reward, next_obs, terminated, truncated)
        self.obs, self._actions = self._obs.unbind(), self._action.unbind()
        columns = (self.obs[1:], *(x.unbind() for x in (reward, terminated, truncated, next_obs)))
        self.steps = [Row(*row) for row in zip(*columns, strict=True)]
        self._action_arrays: list[NDArray[Any]] = []
        self._floats: list[NDArray[Any]] = []
        if device.type == "cpu":
            self._floats = [x.view(-1).numpy() for x in self.transition if x.is_floating_point()]
            for row in self.steps:
                row.arrays = tuple(x.numpy() for x in row)
            self._action_arrays = [x.numpy() for x in self._actions]

    def begin(self, obs: Tensor) -> None:
        """Start a new rollout at obs [B, *obs]."""
        self.obs[0].copy_(obs)

    def looks_finite(self) -> bool:
        """Whether the sum of all squares is a number; False also where they are too large, and on a GPU."""
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(self._floats) and math.isfinite(sum([row.dot(row) for row in self._floats]))

    def put(self, t: int, action: Tensor) -> Tensor:
        """Keep the actions [B, ...] of step t: these, where the envs are."""
        if self._action_arrays and action.is_cpu:
            self._action_arrays[t][:] = action.numpy()  # half the price of torch's copy
            return action
        self._actions[t].copy_(action)
        return self._actions[t]


def action_rows(space: spaces.Space[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one action of `space` in a rollout: flat, float32 for Box and int64 otherwise."""
    if isinstance(space, spaces.Box):
        return (int(torch.Size(space.shape).numel()),), torch.float32
    if isinstance(space, spaces.Discrete):
        return (), torch.int64
    return (int(torch.Size(space.shape or ()).numel()),), torch.int64


BatchT = TypeVar("BatchT", bound=tuple[Tensor, ...])


def flatten_time(batch: BatchT) -> BatchT:
    """The fields [T, B, ...] of a named tuple as [T * B, ...]."""
    return type(batch)(*(x.flatten(0, 1) for x in batch))


def random_order(n: int, generator: Generator) -> Tensor:
    """The numbers from 0 to n - 1, shuffled: [n]."""
    return torch.randperm(n, generator=generator, device=generator.device)


def minibatches(batch: BatchT, num_minibatches: int, order: Tensor | None) -> BatchT:
    """The named tuple of [N, ...] fields in equal parts [num_minibatches, n, ...], in this order [N]; None: as it is.

    The whole batch is permuted once and the parts are slices of it.
    """
    if order is not None:
        batch = type(batch)(*(x.index_select(0, order) for x in batch))
    return type(batch)(*(x.unflatten(0, (num_minibatches, -1)) for x in batch))


def restore_generator(generator: Generator, state: Tensor) -> bool:
    """Give a generator a saved state; one saved on another kind of device is passed over, with False."""
    fits = state.shape == generator.get_state().shape
    if fits:
        generator.set_state(state)
    return fits


class NoiseStream:
    """Noise for acting, drawn for `num_steps` steps at a time; its state is exact between any two steps.

    `draw(shape, generator)` gives noise for `shape` samples.
    """

    def __init__(self, draw: Callable[[tuple[int, ...], Generator], Tensor], num_steps: int, generator: Generator):
        self._draw, self._num_steps, self._generator = draw, num_steps, generator
        self._start = generator.get_state()  # as it was before the present block was drawn
        self._rows: tuple[Tensor, ...] = ()
        self._used, self._num_envs = 0, 0

    def next(self, num_envs: int) -> Tensor:
        """Noise for one step of `num_envs` envs."""
        used = self._used
        if used == len(self._rows) or num_envs != self._num_envs:
            self._fill(num_envs)
            used = 0
        self._used = used + 1
        return self._rows[used]

    def _fill(self, num_envs: int) -> None:
        if not (self._generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._start = self._generator.get_state()  # a captured rollout takes whole blocks, and needs no such state
        self._rows = self._draw((self._num_steps, num_envs), self._generator).unbind()
        self._used, self._num_envs = 0, num_envs

    def state_dict(self) -> dict[str, Any]:
        if self._used == len(self._rows):
            return {"generator": self._generator.get_state(), "used": 0, "num_envs": 0}
        return {"generator": self._start, "used": self._used, "num_envs": self._num_envs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows, self._used, self._num_envs = (), 0, 0
        if restore_generator(self._generator, state["generator"]) and state["used"]:
            self._fill(state["num_envs"])
            self._used = state["used"]
