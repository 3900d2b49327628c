"""Asynchronous advantage actor-critic: Mnih et al. 2016, arXiv 1602.01783, algorithm S3.

Workers act and compute gradients at copies of the parameters, and change the parameters themselves, which all of them
share, without waiting for each other (`asynchronous.py` runs them). One worker alone is A2C with RMSProp.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgrl import functional
from pgrl.acting import Actor
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.on_policy import AdvantageConfig, make_normalisers, prepare, targets
from pgrl.data import NoiseStream, Transition, flatten_time
from pgrl.networks import ActorCritic
from pgrl.normalisers import RunningNorm
from pgrl.optim import GradientStep, RMSProp


@dataclass
class A3CConfig(AdvantageConfig):
    """`algo=a3c`; the defaults are Mnih et al. 2016, section 8 (workers, t_max, the discount, the decay, entropy).

    A worker steps `num_envs` envs of its own, 1 in the paper.
    """

    num_workers: int = 16  # processes that act and learn
    advantage: str = "monte_carlo"  # as far as the rollout reaches, then V; algorithm S3
    num_steps: int = 5  # T: steps of each env between updates (t_max)
    norm_adv: bool = False  # advantages of a rollout to mean 0, std 1
    learning_rate: float = 7e-4  # RMSProp's; the middle of the paper's range 1e-4 to 1e-2 on a log scale
    anneal_lr: bool = True  # linearly to 0
    rms_prop_alpha: float = 0.99  # decay of the mean square
    opt_eps: float = 1e-5  # inside the root
    max_grad_norm: float | None = 0.5  # null: off
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss


class Batch(NamedTuple):
    """A rollout as the loss takes it; [T, B, ...], then [N, ...]."""

    obs: Tensor
    action: Tensor
    advantage: Tensor
    returns: Tensor


class Shared(NamedTuple):
    """What the workers of a run change together, in memory that their processes share; P parameters."""

    vector: Tensor  # [P]: the parameters
    square: Tensor  # [P]: RMSProp's mean square
    obs_norm: RunningNorm | None
    returns: RunningNorm | None  # the reward scaler's statistics


METRICS = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/grad_norm")


class SharedRMSProp(RMSProp):
    """RMSProp on the parameters that an agent shares, if it does; its own then become a copy of those.

    Parameters and mean square are read and changed without locks, as others do at the same time: Mnih et al. 2016,
    equations S2 and S3, "Shared RMSProp".
    """

    def __init__(self, vector: Tensor, *, shared: Callable[[], Shared | None], alpha: float, eps: float) -> None:
        super().__init__(vector, alpha=alpha, eps=eps)
        self._shared = shared

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        shared = self._shared()
        super().__call__(vector if shared is None else shared.vector, gradient, lr, divisor)
        if shared is not None:
            vector.copy_(shared.vector)


class A3C(Agent):
    name = "a3c"
    actor: Actor

    def __init__(self, config: A3CConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.obs_norm, _, self.reward_scaler = make_normalisers(config, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, setting.device))
        self.updates = torch.zeros((), dtype=torch.int64)
        self.shared: Shared | None = None
        self.step = GradientStep(
            self.loss,
            [(self._weights(), 1.0)],
            partial(SharedRMSProp, shared=lambda: self.shared, alpha=config.rms_prop_alpha, eps=config.opt_eps),
            max_grad_norm=config.max_grad_norm,
        )
        self.actor = Actor(self.net, self.obs_norm, setting)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return self.actor.sample(obs, self.noise.next(obs.shape[0])) if explore else self.actor.mode(obs)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        config, raw_obs = self.config, rollout.obs
        rollout = prepare(config, self.net, self.obs_norm, self.reward_scaler, rollout)
        value, advantage, returns = targets(config, self.net, None, rollout)
        if config.norm_adv:
            advantage = functional.normalise(advantage)

        batch = flatten_time(Batch(rollout.obs, rollout.action, advantage, returns))
        lr = torch.tensor(config.learning_rate * (1.0 - progress if config.anneal_lr else 1.0))
        steps = self.step(batch, lr, ())
        self.updates += 1

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            shared = None if self.shared is None else self.shared.obs_norm
            (shared or self.obs_norm).update(raw_obs)
            if shared is not None:
                self.obs_norm.load_state_dict(shared.state_dict())
        return {
            **dict(zip(METRICS, steps, strict=True)),
            "losses/explained_variance": functional.explained_variance(value, returns),
            "charts/learning_rate": lr,
            "charts/updates": self.updates.clone(),
        }

    def loss(self, batch: Batch, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a rollout [N, ...] and METRICS but the last."""
        distribution, value = self.net.policy_and_value(batch.obs)
        policy_loss = functional.policy_gradient_loss(distribution.log_prob(batch.action), batch.advantage)
        value_loss = functional.value_loss(value, batch.returns)
        entropy = distribution.entropy().mean()
        loss = policy_loss + self.config.vf_coef * value_loss - self.config.ent_coef * entropy
        return loss, (policy_loss, value_loss, entropy)

    def share(self) -> Shared:
        """Copies, in memory of all processes, of what workers share."""
        returns = None if self.reward_scaler is None else self.reward_scaler.returns
        norms = [None if norm is None else copy.deepcopy(norm).share_memory() for norm in (self.obs_norm, returns)]
        vector = torch.cat([p.detach().flatten() for p in self._weights()])
        return Shared(vector.share_memory_(), self._square().clone().share_memory_(), *norms)

    def join(self, shared: Shared) -> None:
        """Learn from here on by changing `shared`, as other workers do."""
        self.read(shared)
        self.shared = shared
        self._square().set_(shared.square)  # type: ignore[call-overload]
        if self.reward_scaler is not None and shared.returns is not None:
            self.reward_scaler.returns = shared.returns

    @torch.no_grad()
    def read(self, shared: Shared) -> None:
        """Become what `shared` is now."""
        sizes = [p.numel() for p in self._weights()]
        for p, part in zip(self._weights(), shared.vector.split(sizes), strict=True):
            p.copy_(part.view_as(p))
        self._square().copy_(shared.square)
        if self.obs_norm is not None and shared.obs_norm is not None:
            self.obs_norm.load_state_dict(shared.obs_norm.state_dict())
        if self.reward_scaler is not None and shared.returns is not None:
            self.reward_scaler.returns.load_state_dict(shared.returns.state_dict())

    def _weights(self) -> list[nn.Parameter]:
        """The parameters in the order in which the gradient step has them."""
        return [*self.net.policy_parameters(), *self.net.value_parameters()]

    def _square(self) -> Tensor:
        """RMSProp's mean square [P], live."""
        square: Tensor = self.step.state_dict()["0"]["v"]
        return square
