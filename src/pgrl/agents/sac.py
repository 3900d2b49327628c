"""Soft actor-critic: Haarnoja et al. 2018, arXiv 1812.05905 ("Soft Actor-Critic Algorithms and Applications").

The policy is a squashed Gaussian with the exact log-determinant; two critics, the smaller of which counts (Fujimoto et
al. 2018), and a temperature that is learnt. Where one action is chosen among K, expectations over actions are sums:
Christodoulou 2019, arXiv 1910.07207.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import torch
from torch import Tensor, nn

from pgrl import functional
from pgrl.acting import Actor
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.off_policy import (
    NOISE_STEPS,
    CriticBatch,
    OffPolicyConfig,
    Target,
    bellman_error,
    draw,
    gradient_step,
    make_buffer,
    make_obs_norm,
    means,
    random_actions,
    updates_due,
)
from pgrl.compiling import compile_step
from pgrl.data import NoiseStream, Transition
from pgrl.distributions import Categorical, SquashedGaussian
from pgrl.errors import UserError
from pgrl.networks import Policy, PolicyConfig
from pgrl.q_networks import Critics


@dataclass
class SACConfig(OffPolicyConfig):
    """`algo=sac`; the defaults are Haarnoja et al. 2018 (1812.05905), table 1, where they name a value."""

    actor_lr: float = 3e-4  # Adam's
    critic_lr: float = 3e-4
    noise_correlation: float = 0.0  # between successive actions' noise, in [0, 1); far-reaching exploration above 0
    policy_delay: int = 1  # the policy and the temperature learn at every n-th gradient step; Fujimoto et al. 2018
    alpha: float | None = None  # temperature; null: learnt, so that the entropy is target_entropy; equation 18
    alpha_init: float = 1.0  # where learning it begins
    alpha_lr: float = 3e-4
    target_entropy: float | None = (
        None  # nats; null: -(number of actions), or 0.98 ln K of K choices (Christodoulou 2019)
    )


class ActorBatch(NamedTuple):
    """What the policy learns from, [N, ...] each."""

    obs: Tensor
    noise: Tensor | None  # None where expectations over actions are sums


class Temperature(nn.Module):
    """alpha > 0: what a nat of entropy is worth."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        return self.log.exp()


class SAC(Agent):
    name = "sac"
    actor: Actor

    def __init__(self, config: SACConfig, setting: Setting) -> None:
        obs_space, action_space, device = setting.obs_space, setting.action_space, setting.device
        check_actions(action_space, config)
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.config, self.num_steps, self.action_space = config, config.num_steps, action_space
        kind = PolicyConfig(distribution="squashed", state_dependent_std=True)
        self.net = Policy(obs_space, action_space, config.network, kind).to(device)
        self.critics = Critics(2, obs_space, action_space, config.network).to(device)
        self.target_critics = copy.deepcopy(self.critics)
        self.temperature = Temperature(config.alpha_init if config.alpha is None else config.alpha).to(device)
        self.target_entropy = config.target_entropy if config.target_entropy is not None else usual(action_space)
        self.obs_norm = make_obs_norm(config, setting)
        self.buffer = make_buffer(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.net.noise, NOISE_STEPS, generator(setting.seed, 0, self.actor.device))
        self.random = generator(setting.seed, 1, self.actor.device)  # the first actions
        self.draws = generator(setting.seed, 2, device)  # the actions inside updates
        self.drift: Tensor | None = None  # the last noise, with noise_correlation; it begins as if it had always been
        if config.noise_correlation:
            self.drift = self.net.noise((setting.num_envs,), generator(setting.seed, 4, self.actor.device))
        self.updates = torch.zeros((), dtype=torch.int64)

        self.lr = torch.tensor([config.critic_lr, config.actor_lr, config.alpha_lr], device=device).unbind()
        self.critic_step = gradient_step(config, self.critic_loss, self.critics)
        self.actor_step = gradient_step(config, self.actor_loss, self.net)
        self.temperature_step = gradient_step(config, self.temperature_loss, self.temperature)
        self.step = compile_step(self.steps) if setting.compiled else self.steps
        self.target = Target(self.target_critics, self.critic_step.whole)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        if explore and self.buffer.count < self.config.learning_starts:
            return random_actions(self.action_space, len(obs), self.random)
        return self.actor.sample(obs, self.next_noise(obs.shape[0])) if explore else self.actor.mode(obs)

    def next_noise(self, num_envs: int) -> Tensor:
        """Noise for actions: standard normal; with `noise_correlation` an autoregressive process of that variance."""
        noise, correlation = self.noise.next(num_envs), self.config.noise_correlation
        if self.drift is None:
            return noise
        if num_envs != len(self.drift):  # other envs than those of training
            self.drift = noise.clone()
            return noise
        return self.drift.mul_(correlation).add_(noise, alpha=math.sqrt(1.0 - correlation**2))

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        self.buffer.add(rollout)
        due = updates_due(self.config, self.buffer, rollout.reward.numel())
        metrics = means([self.learn(progress) for _ in range(due)]) if due else {}
        if self.obs_norm is not None:
            self.obs_norm.update(rollout.obs.to(self.device))
        return {**metrics, "charts/updates": self.updates.clone()}

    def learn(self, progress: float) -> dict[str, Tensor]:
        """One gradient step of the critics, and of the policy and the temperature when it is their turn."""
        config = self.config
        draws = None if self.discrete else self.draws  # expectations over choices are exact
        batch, index = draw(config, self.buffer, self.obs_norm, self.net, draws, progress)
        self.updates += 1
        turn = config.policy_delay == 1 or int(self.updates) % config.policy_delay == 0
        noise = self.net.noise((config.batch_size,), self.draws) if turn and not self.discrete else None
        metrics, td_error = self.step(batch, noise, turn)
        if config.per_alpha is not None:
            self.buffer.update_priorities(index, td_error)
        return metrics

    def steps(self, batch: CriticBatch, noise: Tensor | None, policy: bool) -> tuple[dict[str, Tensor], Tensor]:
        """All steps on a batch, the policy's for actions of `noise` or none: metrics, and TD errors [N] or [0]."""
        critic_lr, actor_lr, alpha_lr = self.lr
        with torch.no_grad():
            alpha = self.temperature.forward()
        qf_loss, qf_values, td_error, grad_norm = self.critic_step(batch, critic_lr, alpha)
        metrics = {"losses/qf_loss": qf_loss, "losses/qf_values": qf_values, "losses/qf_grad_norm": grad_norm}
        if policy:
            actor_loss, entropy, grad_norm = self.actor_step(ActorBatch(batch.obs, noise), actor_lr, alpha)
            metrics |= {"losses/actor_loss": actor_loss, "losses/entropy": entropy, "losses/alpha": alpha}
            metrics["losses/actor_grad_norm"] = grad_norm
            if self.config.alpha is None:
                metrics["losses/alpha_loss"], _ = self.temperature_step(entropy, alpha_lr, ())
        self.target.follow(self.config.tau)
        return metrics, td_error

    def critic_loss(self, batch: CriticBatch, alpha: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The soft Bellman error of both critics, equations 5 and 6, summed, with the metrics of `bellman_error`.

        With n steps the entropies of the states between are left out.
        """
        with torch.no_grad():
            target = batch.reward + batch.discount * self.next_value(batch, alpha)
        q = self.critics.forward(batch.obs, batch.action)
        return bellman_error(self.config, batch, q, target)

    def next_value(self, batch: CriticBatch, alpha: Tensor) -> Tensor:
        """V(s') [N] of the present policy and the target critics: equation 3."""
        policy = self.net.policy(batch.next_obs)
        if isinstance(policy, Categorical):
            q = self.target_critics.forward(batch.next_obs).amin(0)
            return functional.soft_value(q, policy.logits.log_softmax(-1), alpha)
        assert isinstance(policy, SquashedGaussian)
        action, log_prob = policy.sample_with_log_prob(batch.noise)
        return self.target_critics.forward(batch.next_obs, action).amin(0) - alpha * log_prob

    def actor_loss(self, batch: ActorBatch, alpha: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """E[alpha log pi - Q] under the policy, equations 7 and 9; metrics: itself, and the entropy []."""
        policy = self.net.policy(batch.obs)
        if isinstance(policy, Categorical):
            log_pi = policy.logits.log_softmax(-1)
            with torch.no_grad():
                q = self.critics.forward(batch.obs).amin(0)
            loss = -functional.soft_value(q, log_pi, alpha).mean()
            return loss, (loss, -(log_pi.exp() * log_pi).sum(-1).mean())
        assert isinstance(policy, SquashedGaussian) and batch.noise is not None
        action, log_prob = policy.sample_with_log_prob(batch.noise)
        loss = (alpha * log_prob - self.critics.forward(batch.obs, action).amin(0)).mean()
        return loss, (loss, -log_prob.mean())

    def temperature_loss(self, entropy: Tensor, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """E[-alpha log pi - alpha * target entropy], equation 18."""
        loss = self.temperature.forward() * (entropy - self.target_entropy)
        return loss, (loss,)


def largest_entropy(space: spaces.Space[Any]) -> float:
    """That of uniformly random actions in the policy's units, nats."""
    if isinstance(space, spaces.Discrete):
        return math.log(int(space.n))
    return math.prod(space.shape or ()) * math.log(2.0)


def usual(space: spaces.Space[Any]) -> float:
    """The target entropy in nats: Haarnoja et al. 2018, table 1; Christodoulou 2019, section 5."""
    if isinstance(space, spaces.Discrete):
        return 0.98 * math.log(int(space.n))
    return -float(math.prod(space.shape or ()))


def check_actions(space: spaces.Space[Any], config: SACConfig) -> None:
    """UserError unless the policy can be uniform over the actions, a bounded Box or Discrete, and reach its entropy."""
    if isinstance(space, spaces.Box | spaces.Discrete):
        target, largest = config.target_entropy, largest_entropy(space)
        least = 0.0 if isinstance(space, spaces.Discrete) else -math.inf
        if config.alpha is None and target is not None and not least < target < largest:
            that = (
                "a choice has one above 0" if target <= least else f"uniformly random actions have {largest:.3g} nats"
            )
            raise UserError(
                f"algo.target_entropy={target:g} is never reached: {that}.\nUse: algo.target_entropy={usual(space):.3g}"
            )
    if isinstance(space, spaces.Discrete):
        if config.noise_correlation:
            raise UserError(
                f"algo.noise_correlation={config.noise_correlation:g} is for continuous actions, but this env's are "
                f"{space}.\nUse: algo.noise_correlation=0"
            )
        return
    if not isinstance(space, spaces.Box):
        raise UserError(f"algo=sac needs Box or Discrete actions, but this env's are {space}.\nUse: algo=ppo")
    if not space.is_bounded("both"):
        raise UserError(
            f"algo=sac needs finite action bounds, but this env's are [{space.low.min()}, {space.high.max()}]."
            "\nUse: algo=ppo"
        )
