"""Advantage actor-critic, the synchronous form of A3C: Mnih et al. 2016, arXiv 1602.01783.

With `advantage=td0` it is the one-step actor-critic of Sutton & Barto 2018, section 13.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pgrl import functional
from pgrl.acting import Actor
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.on_policy import AdvantageConfig, make_normalisers, prepare, targets
from pgrl.compiling import compile_step
from pgrl.data import NoiseStream, Transition, flatten_time
from pgrl.networks import ActorCritic
from pgrl.optim import Adam, GradientStep, RMSProp


@dataclass
class A2CConfig(AdvantageConfig):
    """`algo=a2c`; the defaults are Mnih et al. 2016, section 8 (t_max, the discount, RMSProp's decay, entropy)."""

    advantage: str = "monte_carlo"  # as far as the rollout reaches, then V; Mnih et al. 2016, algorithm S3
    num_steps: int = 5  # T: steps of each env between updates (t_max)
    norm_adv: bool = False  # advantages of a rollout to mean 0, std 1
    optimizer: str = "rmsprop"  # rmsprop, adam
    learning_rate: float = 7e-4  # the middle of the paper's range 1e-4 to 1e-2 on a log scale
    anneal_lr: bool = True  # linearly to 0
    rms_prop_alpha: float = 0.99  # decay of the mean square
    opt_eps: float = 1e-5  # inside the root for rmsprop, beside it for adam
    max_grad_norm: float | None = 0.5  # null: off
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss


class Batch(NamedTuple):
    """A rollout as the loss takes it; [T, B, ...], then [N, ...]."""

    obs: Tensor
    action: Tensor
    advantage: Tensor
    returns: Tensor


METRICS = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/grad_norm")


class A2C(Agent):
    name = "a2c"
    actor: Actor

    def __init__(self, config: A2CConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.net.to(setting.device)
        self.obs_norm, self.value_norm, self.reward_scaler = make_normalisers(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, self.actor.device))
        self.updates = torch.zeros((), dtype=torch.int64, device=setting.device)
        rmsprop = partial(RMSProp, alpha=config.rms_prop_alpha, eps=config.opt_eps)
        # statistics of returns are numbers in double precision, which dynamo would make constants of a graph
        whole = setting.compiled and self.value_norm is None
        self.step = GradientStep(
            self.loss,
            [(self.net.policy_parameters(), 1.0), (self.net.value_parameters(), 1.0)],
            rmsprop if config.optimizer == "rmsprop" else partial(Adam, eps=config.opt_eps),
            max_grad_norm=config.max_grad_norm,
            compiled=setting.compiled and not whole,
        )
        self.whole_step = compile_step(self.step_with_targets) if whole else self.step_with_targets

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return self.actor.sample(obs, self.noise.next(obs.shape[0])) if explore else self.actor.mode(obs)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        return self.learn(rollout, *self.schedules(progress))

    def schedules(self, progress: float) -> tuple[Tensor]:
        """The learning rate [] at `progress`."""
        config = self.config
        lr = config.learning_rate * (1.0 - progress if config.anneal_lr else 1.0)
        return (torch.tensor(lr, device=self.updates.device),)

    def learn(self, rollout: Transition, lr: Tensor) -> dict[str, Tensor]:
        """`update`, given what `schedules` says; it asks the host nothing."""
        raw_obs = rollout.obs
        rollout = prepare(self.config, self.net, self.obs_norm, self.reward_scaler, rollout)
        metrics = self.whole_step(rollout, lr)
        self.updates += 1

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            self.obs_norm.update(raw_obs)
        return {**metrics, "charts/learning_rate": lr, "charts/updates": self.updates.clone()}

    def step_with_targets(self, rollout: Transition, lr: Tensor) -> dict[str, Tensor]:
        """The gradient step on a prepared rollout, with its targets: metrics."""
        value, advantage, returns = targets(self.config, self.net, self.value_norm, rollout)
        if self.config.norm_adv:
            advantage = functional.normalise(advantage)
        batch = flatten_time(Batch(rollout.obs, rollout.action, advantage, returns))
        metrics = dict(zip(METRICS, self.step(batch, lr, ()), strict=True))
        return {**metrics, "losses/explained_variance": functional.explained_variance(value, returns)}

    def loss(self, batch: Batch, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a rollout [N, ...] and METRICS but the last."""
        distribution, value = self.net.policy_and_value(batch.obs)
        policy_loss = functional.policy_gradient_loss(distribution.log_prob(batch.action), batch.advantage)
        value_loss = functional.value_loss(value, batch.returns)
        entropy = distribution.entropy().mean()
        loss = policy_loss + self.config.vf_coef * value_loss - self.config.ent_coef * entropy
        return loss, (policy_loss, value_loss, entropy)
