"""What the off-policy algorithms with replay share: their keys, their memory, and how often they learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import gymnasium.spaces as spaces
import torch
from torch import Generator, Tensor, nn

from pgrl import functional
from pgrl.agents.base import Setting, generator
from pgrl.flat import FlatParameters
from pgrl.normalisers import RunningNorm
from pgrl.optim import Adam, GradientStep, Loss
from pgrl.q_networks import OffPolicyNetworkConfig
from pgrl.replay import Priority, ReplayBuffer

NOISE_STEPS = 64  # of the envs, for which noise is drawn at a time


@dataclass
class OffPolicyConfig:
    """Keys of every algorithm that learns from replay; defaults from Haarnoja et al. 2018 (1812.05905), table 1."""

    gamma: float = 0.99  # discount, in [0, 1]
    num_steps: int = 1  # T: steps of each env between updates
    utd_ratio: float = 1.0  # gradient steps for each transition; above 1: Chen et al. 2021 (2101.05982)
    buffer_size: int = 1_000_000  # transitions kept
    batch_size: int = 256  # transitions of a gradient step
    learning_starts: int = 10_000  # transitions by uniformly random actions before; Spinning Up's, for DDPG and SAC
    tau: float = 0.005  # share of the target networks that each step renews
    n_step: int = 1  # rewards before the bootstrap, of the actions that were taken, without correction; Sutton 1988
    per_alpha: float | None = None  # exponent of the priorities; null: uniform replay; 0.6 in Schaul et al. 2016
    per_beta: float = 0.4  # exponent of their importance weights, linearly to 1; Schaul et al. 2016, table 3
    norm_obs: bool = False  # observations to mean 0, std 1 by running statistics
    clip_obs: float | None = 10.0  # normalised observations within +-; null: off
    max_grad_norm: float | None = None  # of the gradients of policy, critics together and temperature; null: off
    network: OffPolicyNetworkConfig = field(default_factory=OffPolicyNetworkConfig)


def make_buffer(config: OffPolicyConfig, setting: Setting) -> ReplayBuffer:
    """The memory of an agent, where its envs are: moving samples is cheaper than moving each step."""
    return ReplayBuffer(
        config.buffer_size,
        setting.num_envs,
        setting.obs_space,
        setting.action_space,
        setting.env_device,
        generator(setting.seed, 3, setting.env_device),
        gamma=config.gamma,
        n_step=config.n_step,
        prioritised=None if config.per_alpha is None else Priority(config.per_alpha),
        to=setting.device,
    )


def make_obs_norm(config: OffPolicyConfig, setting: Setting) -> RunningNorm | None:
    """The normaliser of observations where it is switched on."""
    if not config.norm_obs:
        return None
    return RunningNorm(setting.obs_space.shape, config.clip_obs).to(setting.device)


def updates_due(config: OffPolicyConfig, buffer: ReplayBuffer, new: int) -> int:
    """Gradient steps after the last `new` transitions: `utd_ratio` for each from `learning_starts` on.

    0 while the buffer holds less than a batch, as after a resume without its rows.
    """
    if len(buffer) < config.batch_size:
        return 0
    learning = max(0, buffer.count - config.learning_starts)
    before = max(0, buffer.count - new - config.learning_starts)
    return math.floor(learning * config.utd_ratio) - math.floor(before * config.utd_ratio)


class CriticBatch(NamedTuple):
    """What critics learn from, [N, ...] each; actions in the policy's units, observations normalised."""

    obs: Tensor
    action: Tensor
    reward: Tensor  # of up to n steps
    next_obs: Tensor
    discount: Tensor  # of the value of next_obs; 0 where nothing follows
    weight: Tensor
    noise: Tensor  # for the next actions; [0] where they need none


class Units(Protocol):
    """What a policy knows of its actions."""

    def noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor: ...
    def to_policy_units(self, action: Tensor) -> Tensor: ...


@torch.no_grad()
def draw(
    config: OffPolicyConfig,
    buffer: ReplayBuffer,
    obs_norm: RunningNorm | None,
    policy: Units,
    draws: Generator | None,
    progress: float,
) -> tuple[CriticBatch, Tensor]:
    """A batch of replay, normalised by the present statistics, and its index [N] in the buffer.

    `draws` gives the noise of the next actions; None: they need none.
    """
    sample = buffer.sample(config.batch_size, config.per_beta + (1.0 - config.per_beta) * progress)
    obs, next_obs = sample.obs, sample.next_obs
    if obs_norm is not None:
        obs, next_obs = obs_norm(obs), obs_norm(next_obs)
    action = policy.to_policy_units(sample.action)
    noise = action.new_empty(0) if draws is None else policy.noise((config.batch_size,), draws)
    return CriticBatch(obs, action, sample.reward, next_obs, sample.discount, sample.weight, noise), sample.index


def bellman_error(
    config: OffPolicyConfig, batch: CriticBatch, q: Tensor, target: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss [] of critics that say q [K, N] for target [N], and metrics: itself, mean Q, and TD errors [N].

    These are for priorities; without prioritised replay they are [0].
    """
    if config.per_alpha is None:
        loss = functional.q_loss(q, target)
        return loss, (loss, q.mean(), loss.new_empty(0))
    loss = functional.q_loss(q, target, batch.weight)
    return loss, (loss, q.mean(), (q - target).abs().mean(0))


def gradient_step(config: OffPolicyConfig, loss: Loss, net: nn.Module) -> GradientStep:
    """Adam's step on `loss` for all parameters of `net`; not compiled by itself, for it is a part of a larger graph."""
    return GradientStep(loss, [(list(net.parameters()), 1.0)], Adam, max_grad_norm=config.max_grad_norm)


def random_actions(space: spaces.Space[Any], num_envs: int, generator: Generator) -> Tensor:
    """Uniformly random actions [B, ...] of a bounded Box or a Discrete space, in the env's units."""
    device = generator.device
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (num_envs,), generator=generator, device=device)
    assert isinstance(space, spaces.Box)
    low, high = (torch.from_numpy(x.ravel()).float().to(device) for x in (space.low, space.high))
    return low + (high - low) * torch.rand((num_envs, len(low)), generator=generator, device=device)


class Target(FlatParameters):
    """The parameters [P] of a network that follows `learnt`: Lillicrap et al. 2016 (arXiv 1509.02971), algorithm 1.

    To be made once the network is on its device.
    """

    def __init__(self, net: nn.Module, learnt: FlatParameters) -> None:
        super().__init__(list(net.parameters()))
        self.learnt = learnt
        for p in self.parameters:
            p.requires_grad_(False)

    @torch.no_grad()
    def follow(self, tau: float) -> None:
        """theta' <- (1 - tau) theta' + tau theta; RuntimeError where one of the networks was moved, but if compiled."""
        if torch.compiler.is_compiling():  # as in `Group.step`
            for p, learnt in zip(self.parameters, self.learnt.parameters, strict=True):
                p.lerp_(learnt, tau)
            return
        self.check()
        self.learnt.check()
        self.vector.lerp_(self.learnt.vector, tau)


def means(steps: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the gradient steps that have it."""
    if len(steps) == 1:
        return steps[0]
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: torch.stack([step[name] for step in steps if name in step]).mean() for name in names}
