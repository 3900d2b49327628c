"""What every algorithm is to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium.spaces as spaces
import torch
from torch import Tensor, nn

from pgrl.acting import Actor
from pgrl.data import Transition, restore_generator

CPU = torch.device("cpu")


@dataclass
class Setting:
    """What a run gives its agent: everything that is not the algorithm's own choice."""

    obs_space: spaces.Box
    action_space: spaces.Space[Any]
    num_envs: int
    seed: int
    device: torch.device
    compiled: bool = False
    env_device: torch.device = CPU  # where the envs give their answers


class Agent(ABC):
    """An algorithm: acts, learns from rollouts, and can be saved.

    Whatever changes during training is an attribute with a `state_dict`, listed by `state_dict` below; an agent has
    no other mutable attribute.
    """

    name: ClassVar[str]
    num_steps: int  # T: steps of every env between two updates
    actor: Actor | None = None  # what `act` samples with, where it is not the network itself

    @abstractmethod
    def __init__(self, config: Any, setting: Setting) -> None: ...

    @abstractmethod
    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        """Actions [B, ...] in the env's units for obs [B, *obs]; the most likely ones unless exploring.

        obs are on `act_device` where it explores, and after `begin_rollout` alone with what was learnt since; otherwise
        on `device`. Called under `torch.no_grad()`, once for a rollout: entering it here would cost as much as a layer.
        """

    @abstractmethod
    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        """Learn from a rollout [T, B, ...]; `progress` in [0, 1) is the share of training done.

        Returns metrics as detached 0-d tensors.
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """The numbers that are learnt."""
        return (p for part in vars(self).values() if isinstance(part, nn.Module) for p in part.parameters())

    @property
    def device(self) -> torch.device:
        """Where the agent's parameters live."""
        return next(self.parameters()).device

    @property
    def act_device(self) -> torch.device:
        """Where `act` takes observations while it explores: beside the envs, if it is faster there."""
        return self.device if self.actor is None else self.actor.device

    def begin_rollout(self) -> None:
        """Called ahead of each rollout where the envs are not on `device`: what acts takes over what was learnt."""
        if self.actor is not None:
            self.actor.take_over()

    @property
    def update_device(self) -> torch.device | None:
        """Where `update` takes rollouts: where the replay buffer is, or None, where the parameters are."""
        buffer = vars(self).get("buffer")
        return None if buffer is None else buffer.device

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, by attribute name; the tensors are the live ones."""
        return {name: stateful(part) for name, part in sorted(vars(self).items()) if has_state(part)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in place."""
        for name, part in vars(self).items():
            if isinstance(part, torch.Generator):
                restore_generator(part, state[name])
            elif isinstance(part, Tensor):
                part.copy_(state[name])
            elif has_state(part):
                part.load_state_dict(state[name])


def has_state(part: object) -> bool:
    """Whether an attribute is part of an agent's state."""
    return isinstance(part, Tensor | torch.Generator) or hasattr(part, "state_dict")


def stateful(part: Any) -> Any:
    """The state of an attribute that has one."""
    if isinstance(part, Tensor):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    """An own random generator; streams of one seed, and equal streams of two seeds, are independent."""
    import numpy as np

    entropy = np.random.SeedSequence([seed, 1_000_000 + stream]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed((int(entropy[0]) << 31) ^ int(entropy[1]))
