"""Proximal policy optimisation: Schulman et al. 2017, arXiv 1707.06347.

Every code-level detail of Engstrom et al. 2020 (arXiv 2005.12729, "options" below) and of Huang et al. 2022 ("The 37
implementation details of PPO", "details" below) is a key of its own; the keys that other on-policy algorithms
share stand in `AdvantageConfig`.
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
from pgrl.data import NoiseStream, Transition, flatten_time, minibatches, random_order
from pgrl.networks import ActorCritic
from pgrl.optim import Adam, GradientStep


@dataclass
class PPOConfig(AdvantageConfig):
    """`algo=ppo`; the defaults are Schulman et al. 2017, table 3 (MuJoCo), with details 2, 3 and 7 added."""

    num_steps: int = 2048  # T: steps of each env between updates
    update_epochs: int = 10  # passes over a rollout
    num_minibatches: int = 32  # parts of a pass; must divide num_steps * num_envs
    shuffle: bool = True  # a fresh random order each epoch; detail 6
    recompute_advantages: bool = (
        False  # with the newest values before each epoch; Andrychowicz et al. 2020, section 3.5
    )
    norm_adv: str | None = "minibatch"  # advantages to mean 0, std 1 per minibatch, per batch, or not (null); detail 7
    learning_rate: float = 3e-4  # Adam's
    value_learning_rate: float | None = None  # for the value's own parameters; null: learning_rate
    anneal_lr: bool = True  # linearly to 0; option 4
    adaptive_lr_kl: float | None = (
        None  # keep the KL of an epoch near this by the rate; Rudin et al. 2022, appendix A.3
    )
    adam_eps: float = 1e-5  # detail 3
    max_grad_norm: float | None = 0.5  # null: off; option 9, detail 11
    clip_grad_per_network: bool = False  # policy and value gradients each to max_grad_norm; Engstrom's code
    clip_coef: float | None = 0.2  # ratio within 1 +- this; null: no clipping (PPO-NoClip of Engstrom et al. 2020)
    clip_coef_high: float | None = (
        None  # the upper side's own range; null: clip_coef; Yu et al. 2025 (2503.14476), eq. 10
    )
    anneal_clip: bool = False  # the range linearly to 0; Schulman et al. 2017, table 5
    dual_clip: float | None = None  # bound of the objective where A < 0, above 1; Ye et al. 2020, equation 5
    target_kl: float | None = None  # no further epoch once approx_kl exceeds this; null: off; auxiliary detail 3
    kl_coef: float | None = None  # first weight of the adaptive KL penalty; null: off; Schulman et al. 2017, section 4
    kl_coef_target: float = 0.01  # the KL at which that weight stays as it is; Schulman et al. 2017, section 6.1
    ent_coef: float = 0.0  # weight of the entropy bonus; detail 10
    ent_coef_final: float | None = None  # the weight at the end, reached linearly; null: ent_coef
    vf_coef: float = 0.5  # weight of the value loss; detail 9
    vf_clip_coef: float | None = 0.2  # values within +- this of the old ones; null: off; option 1, detail 9


class Batch(NamedTuple):
    """A rollout as the loss takes it; [T, B, ...], then [N, ...]."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    returns: Tensor
    value: Tensor


class Scalars(NamedTuple):
    """What changes over a run without a gradient, [] each: tensors, so that a compiled step is compiled once."""

    clip_low: Tensor
    clip_high: Tensor
    ent_coef: Tensor
    kl_coef: Tensor


class Metrics(NamedTuple):
    """What a gradient step tells, then those of many: [K] and, for the log-ratio, [K, N]."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    log_ratio: Tensor
    grad_norm: Tensor


class PPO(Agent):
    name = "ppo"
    actor: Actor

    def __init__(self, config: PPOConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.net.to(setting.device)
        self.obs_norm, self.value_norm, self.reward_scaler = make_normalisers(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, self.actor.device))
        self.order = generator(setting.seed, 1, setting.device)
        self.kl_coef = torch.tensor(config.kl_coef or 0.0, device=setting.device)
        self.lr_factor = torch.ones((), device=setting.device)
        self.updates = torch.zeros((), dtype=torch.int64, device=setting.device)
        value_lr = config.value_learning_rate or config.learning_rate
        self.step = GradientStep(
            self.loss,
            [(self.net.policy_parameters(), 1.0), (self.net.value_parameters(), value_lr / config.learning_rate)],
            partial(Adam, eps=config.adam_eps),
            max_grad_norm=config.max_grad_norm,
            clip_per_group=config.clip_grad_per_network,
            compiled=setting.compiled,
        )
        # statistics of returns are numbers in double precision, which dynamo would make constants of a graph
        whole = setting.compiled and self.value_norm is None
        self.to_batch = compile_step(self.make_batch) if whole else self.make_batch
        self.to_parts = compile_step(self.make_parts) if setting.compiled else self.make_parts

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return self.actor.sample(obs, self.noise.next(obs.shape[0])) if explore else self.actor.mode(obs)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        return self.learn(rollout, *self.schedules(progress))

    def learn(self, rollout: Transition, lr: Tensor, scalars: Scalars) -> dict[str, Tensor]:
        """`update`, given what `schedules` says; without `target_kl` it asks the host nothing."""
        config, raw_obs = self.config, rollout.obs
        rollout = prepare(config, self.net, self.obs_norm, self.reward_scaler, rollout)
        batch = Batch(*self.to_batch(rollout))

        steps: list[Metrics] = []
        for epoch in range(config.update_epochs):
            if epoch and config.recompute_advantages:
                batch = self._with_targets(batch, rollout)
            order = random_order(batch.value.numel(), self.order) if config.shuffle else None
            parts = self.to_parts(batch, order)
            steps += [Metrics(*self.step(Batch(*part), lr, scalars)) for part in zip(*parts, strict=True)]
            if config.adaptive_lr_kl is not None:
                lr = self._adapt_lr(lr, self._kl(steps))
            if config.target_kl is not None and float(self._kl(steps)) > config.target_kl:
                break
        if config.kl_coef is not None:  # Schulman et al. 2017, section 4
            kl = self._kl(steps)
            far, near = kl > 1.5 * config.kl_coef_target, kl < config.kl_coef_target / 1.5
            self.kl_coef.mul_(torch.where(far, 2.0, torch.where(near, 0.5, 1.0)))
        self.updates += len(steps)

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            self.obs_norm.update(raw_obs)
        all_steps = Metrics(*map(torch.stack, zip(*steps, strict=True)))
        metrics = {
            "losses/policy_loss": all_steps.policy_loss.mean(),
            "losses/value_loss": all_steps.value_loss.mean(),
            "losses/entropy": all_steps.entropy.mean(),
            "losses/approx_kl": functional.approx_kl(all_steps.log_ratio),
            "losses/clipfrac": functional.clip_fraction(all_steps.log_ratio, scalars.clip_low, scalars.clip_high),
            "losses/grad_norm": all_steps.grad_norm.mean(),
            "losses/explained_variance": functional.explained_variance(batch.value, batch.returns),
        }
        if config.kl_coef is not None:
            metrics["losses/kl_coef"] = self.kl_coef.clone()
        if config.target_kl is not None:
            metrics["losses/epochs"] = torch.tensor(float(len(steps) // config.num_minibatches))
        return {**metrics, "charts/learning_rate": lr, "charts/updates": self.updates.clone()}

    def loss(self, batch: Batch, scalars: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss [] of a minibatch [N, ...] and its Metrics but the last."""
        config = self.config
        distribution, value = self.net.policy_and_value(batch.obs)
        log_ratio = distribution.log_prob(batch.action) - batch.log_prob

        if config.clip_coef is None:
            policy_loss = functional.ppo_loss(log_ratio, batch.advantage)
        else:
            clip_high = None if config.clip_coef_high is None else scalars.clip_high
            policy_loss = functional.ppo_clip_loss(
                log_ratio, batch.advantage, scalars.clip_low, clip_high, config.dual_clip
            )
        if config.vf_clip_coef is None:
            value_loss = functional.value_loss(value, batch.returns)
        else:
            value_loss = functional.clipped_value_loss(value, batch.value, batch.returns, config.vf_clip_coef)
        entropy = distribution.entropy().mean()
        loss = policy_loss + config.vf_coef * value_loss
        if config.ent_coef or config.ent_coef_final:
            loss = loss - scalars.ent_coef * entropy
        if config.kl_coef is not None:
            loss = loss + scalars.kl_coef * functional.approx_kl(log_ratio)

        return loss, (policy_loss, value_loss, entropy, log_ratio)

    def make_batch(self, rollout: Transition) -> tuple[Tensor, ...]:
        """The fields of a Batch: a prepared rollout, and what the present policy and value function say of it."""
        with torch.no_grad():
            log_prob = self.net.policy(rollout.obs.flatten(0, 1)).log_prob(rollout.action.flatten(0, 1))
        nothing = torch.empty(0)
        batch = Batch(rollout.obs, rollout.action, log_prob.view_as(rollout.reward), nothing, nothing, nothing)
        return tuple(self._with_targets(batch, rollout, first=True))

    def make_parts(self, batch: Batch, order: Tensor | None) -> tuple[Tensor, ...]:
        """The fields of a Batch in minibatches [num_minibatches, n, ...]."""
        parts = minibatches(flatten_time(batch), self.config.num_minibatches, order)
        if self.config.norm_adv == "minibatch":
            parts = parts._replace(advantage=functional.normalise(parts.advantage, dim=1))
        return tuple(parts)

    def _with_targets(self, batch: Batch, rollout: Transition, *, first: bool = False) -> Batch:
        """The batch with values, advantages and returns by the present value function."""
        value, advantage, returns = targets(self.config, self.net, self.value_norm, rollout, first=first)
        if self.config.norm_adv == "batch":
            advantage = functional.normalise(advantage)
        return batch._replace(value=value, advantage=advantage, returns=returns)

    def schedules(self, progress: float) -> tuple[Tensor, Scalars]:
        """The learning rate [] and the scalars of `loss` at `progress`."""
        config, left = self.config, 1.0 - progress
        low = config.clip_coef if config.clip_coef is not None else float("inf")
        high = config.clip_coef_high if config.clip_coef_high is not None else low
        clip = left if config.anneal_clip else 1.0
        last = config.ent_coef if config.ent_coef_final is None else config.ent_coef_final
        entropy = config.ent_coef * left + last * progress
        lr = config.learning_rate * (left if config.anneal_lr else 1.0) * self.lr_factor
        clip_low, clip_high, ent_coef = torch.tensor([low * clip, high * clip, entropy], device=lr.device).unbind()
        return lr, Scalars(clip_low, clip_high, ent_coef, self.kl_coef)

    def _kl(self, steps: list[Metrics]) -> Tensor:
        """The KL divergence [] from the policy of the rollout, in the last epoch."""
        return functional.approx_kl(torch.stack([x.log_ratio for x in steps[-self.config.num_minibatches :]]))

    def _adapt_lr(self, lr: Tensor, kl: Tensor) -> Tensor:
        """A lower rate after an epoch that moved twice too far, a higher one after one that moved half too little."""
        target = self.config.adaptive_lr_kl
        assert target is not None
        factor = torch.where(kl > 2.0 * target, 1 / 1.5, torch.where(kl < 0.5 * target, 1.5, 1.0))
        before = self.lr_factor.clone()
        self.lr_factor.mul_(factor).clamp_(0.01, 30.0)
        return lr * (self.lr_factor / before)
