"""Deep deterministic policy gradient: Lillicrap et al. 2016, arXiv 1509.02971.

The three changes of TD3 (Fujimoto et al. 2018, arXiv 1802.09477) are keys: `twin`, `target_noise` and `policy_delay`;
together they are `experiment=td3`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import gymnasium.spaces as spaces
import torch
from torch import Generator, Tensor

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
from pgrl.errors import UserError
from pgrl.q_networks import Critics, DeterministicPolicy


@dataclass
class DDPGConfig(OffPolicyConfig):
    """`algo=ddpg`; rates, noise and targets are those of Fujimoto et al. 2018, table 3, the rest is as for SAC."""

    actor_lr: float = 1e-3  # Adam's
    critic_lr: float = 1e-3
    noise: str = "gaussian"  # gaussian, or ou: Ornstein-Uhlenbeck, as Lillicrap et al. 2016, section 7
    noise_std: float = 0.1  # of the actions' noise, whose range is [-1, 1]
    ou_theta: float = 0.15  # for noise=ou: the share of it that a step takes away; Lillicrap et al. 2016, section 7
    twin: bool = False  # two critics, the smaller of which counts; Fujimoto et al. 2018, equation 10
    target_noise: float | None = None  # std of noise on the targets' actions; null: off; 0.2 in equation 14
    target_noise_clip: float = 0.5  # that noise within +-
    policy_delay: int = 1  # the policy and the targets change at every n-th gradient step; Fujimoto et al. 2018


class DDPG(Agent):
    name = "ddpg"
    actor: Actor

    def __init__(self, config: DDPGConfig, setting: Setting) -> None:
        action_space, device = setting.action_space, setting.device
        if not isinstance(action_space, spaces.Box):
            raise UserError(
                f"algo=ddpg needs continuous actions, a Box, but this env's are {action_space}.\nUse: algo=sac"
                if isinstance(action_space, spaces.Discrete)
                else f"algo=ddpg needs continuous actions, a Box, but this env's are {action_space}.\nUse: algo=ppo"
            )
        self.config, self.num_steps, self.action_space = config, config.num_steps, action_space
        self.net = DeterministicPolicy(setting.obs_space, action_space, config.network).to(device)
        self.critics = Critics(1 + config.twin, setting.obs_space, action_space, config.network).to(device)
        self.target_net, self.target_critics = copy.deepcopy(self.net), copy.deepcopy(self.critics)
        self.obs_norm = make_obs_norm(config, setting)
        self.buffer = make_buffer(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.draw_noise, NOISE_STEPS, generator(setting.seed, 0, self.actor.device))
        self.random = generator(setting.seed, 1, self.actor.device)  # the first actions
        self.draws = generator(setting.seed, 2, device)  # the noise inside updates
        self.drift: Tensor | None = None  # the state of noise=ou
        if config.noise == "ou":
            self.drift = torch.zeros(setting.num_envs, self.net.actions, device=self.actor.device)
        self.updates = torch.zeros((), dtype=torch.int64)

        self.lr = torch.tensor([config.critic_lr, config.actor_lr], device=device).unbind()
        self.critic_step = gradient_step(config, self.critic_loss, self.critics)
        self.actor_step = gradient_step(config, self.actor_loss, self.net)
        self.step = compile_step(self.steps) if setting.compiled else self.steps
        self.target_policy = Target(self.target_net, self.actor_step.whole)
        self.target_q = Target(self.target_critics, self.critic_step.whole)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        if explore and self.buffer.count < self.config.learning_starts:
            return random_actions(self.action_space, len(obs), self.random)
        return self.actor.sample(obs, self.next_noise(obs.shape[0])) if explore else self.actor.mode(obs)

    def draw_noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Normal noise of `noise_std` for `shape` actions."""
        return self.net.noise(shape, generator).mul_(self.config.noise_std)

    def next_noise(self, num_envs: int) -> Tensor:
        """Noise for actions in [-1, 1]: normal, or with `noise=ou` an Ornstein-Uhlenbeck process."""
        noise = self.noise.next(num_envs)
        if self.drift is None:
            return noise
        if num_envs != len(self.drift):  # other envs than those of training
            self.drift = torch.zeros_like(noise)
        return self.drift.mul_(1.0 - self.config.ou_theta).add_(noise)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        self.buffer.add(rollout)
        if self.drift is not None:
            goes_on = ~(rollout.terminated[-1] | rollout.truncated[-1])
            self.drift *= goes_on.to(self.drift.device).unsqueeze(-1)  # a new episode's is 0
        due = updates_due(self.config, self.buffer, rollout.reward.numel())
        metrics = means([self.learn(progress) for _ in range(due)]) if due else {}
        if self.obs_norm is not None:
            self.obs_norm.update(rollout.obs.to(self.device))
        return {**metrics, "charts/updates": self.updates.clone()}

    def learn(self, progress: float) -> dict[str, Tensor]:
        """One gradient step of the critics, and of the policy and the targets when it is their turn."""
        config = self.config
        draws = None if config.target_noise is None else self.draws
        batch, index = draw(config, self.buffer, self.obs_norm, self.net, draws, progress)
        self.updates += 1
        turn = config.policy_delay == 1 or int(self.updates) % config.policy_delay == 0
        metrics, td_error = self.step(batch, turn)
        if config.per_alpha is not None:
            self.buffer.update_priorities(index, td_error)
        return metrics

    def steps(self, batch: CriticBatch, policy: bool) -> tuple[dict[str, Tensor], Tensor]:
        """All steps on a batch, with the policy's and the targets' or without: metrics, and TD errors [N] or [0]."""
        critic_lr, actor_lr = self.lr
        qf_loss, qf_values, td_error, grad_norm = self.critic_step(batch, critic_lr, ())
        metrics = {"losses/qf_loss": qf_loss, "losses/qf_values": qf_values, "losses/qf_grad_norm": grad_norm}
        if policy:
            actor_loss, grad_norm = self.actor_step(batch.obs, actor_lr, ())
            metrics |= {"losses/actor_loss": actor_loss, "losses/actor_grad_norm": grad_norm}
            self.target_policy.follow(self.config.tau)
            self.target_q.follow(self.config.tau)
        return metrics, td_error

    def critic_loss(self, batch: CriticBatch, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The Bellman error of the critics, algorithm 1, summed, with the metrics of `bellman_error`."""
        with torch.no_grad():
            action = self.target_net.forward(batch.next_obs)
            if self.config.target_noise is not None:  # Fujimoto et al. 2018, equation 14
                bound = self.config.target_noise_clip
                action = (action + (self.config.target_noise * batch.noise).clamp(-bound, bound)).clamp(-1.0, 1.0)
            target = batch.reward + batch.discount * self.target_critics.forward(batch.next_obs, action).amin(0)
        q = self.critics.forward(batch.obs, batch.action)
        return bellman_error(self.config, batch, q, target)

    def actor_loss(self, obs: Tensor, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """-E[Q(s, mu(s))], equation 6, by the first critic."""
        loss = -self.critics.first(obs, self.net.forward(obs)).mean()
        return loss, (loss,)
