"""What the training loop needs of a batch of environments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor

from pgrl.data import Step


@dataclass
class EnvConfig:
    """Which environments a run uses (`env.*`)."""

    id: str = "CartPole-v1"  # a registered Gymnasium id, or package:Id-v0; with envpool, one of its own
    backend: str = "gymnasium"  # who steps them: gymnasium, envpool, or torch: classic control as tensors on `device`
    max_episode_steps: int | None = None  # another time limit than the registered one
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to gymnasium.make or envpool.make
    processes: int = 1  # that step Gymnasium's envs side by side, this one among them; the run is the same


class Episodes(NamedTuple):
    """Finished episodes in order: the sum of the raw rewards of each, its length in steps, and the env that played it.

    Lists, not tuples of each: of thousands of envs thousands end in a rollout.
    """

    env_return: list[float]
    length: list[int]
    env: list[int]

    @classmethod
    def none(cls) -> Episodes:
        return cls([], [], [])

    def extend(self, more: Episodes) -> None:
        self.env_return.extend(more.env_return)
        self.length.extend(more.length)
        self.env.extend(more.env)

    def take(self) -> Episodes:
        """All of them, to be told; none is left here."""
        taken = Episodes(self.env_return.copy(), self.length.copy(), self.env.copy())
        self.clear()
        return taken

    def clear(self) -> None:
        for column in self:
            column.clear()


class VecEnv(Protocol):
    """B environments stepped together, each reset within the step that ends its episode."""

    num_envs: int
    obs_space: spaces.Box  # of the tensors this env gives: float32, or uint8 for images
    action_space: spaces.Space[Any]  # Box, Discrete, MultiDiscrete or MultiBinary
    device: torch.device

    def reset(self) -> Tensor:
        """Begin the first episode of every env: obs [B, *obs]."""

    def obs(self) -> Tensor:
        """The obs [B, *obs] to act on next."""

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        """Act in every env, actions [B, ...] in the env's units, clipped to its bounds; the answer is in `out`."""

    def episodes(self) -> Episodes:
        """The episodes that ended since the last call, in order."""

    def state_dict(self) -> dict[str, Any]:
        """Enough to continue exactly from here; call `episodes` before."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""

    def close(self) -> None: ...


def new_step(obs: Tensor) -> Step:
    """Room for an answer of envs whose observations are like these, [B, *obs]."""
    flags = torch.empty(2, len(obs), dtype=torch.bool, device=obs.device)
    reward = torch.empty(len(obs), device=obs.device)
    return Step(torch.empty_like(obs), reward, flags[0], flags[1], torch.empty_like(obs))


def episode_seed(run_seed: int, env_index: int, episode_index: int) -> int:
    """The seed of one episode, in [0, 2^31): streams of neighbouring seeds are independent, in any vectorisation."""
    return int(np.random.SeedSequence([run_seed, env_index, episode_index]).generate_state(1)[0]) >> 1
