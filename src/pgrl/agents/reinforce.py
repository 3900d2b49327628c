"""REINFORCE: Williams 1992, "Simple statistical gradient-following algorithms", with the baselines since.

The gradient of E[sum_t gamma^t r_t] is E[sum_t gamma^t grad log pi(a_t|s_t) (G_t - b)] for the return G_t from step t
on and any baseline b that does not depend on the action a_t. `baseline` chooses b; `discount_states` keeps the factor
gamma^t of the theorem, which is usually dropped (Thomas 2014, "Bias in natural actor-critic algorithms"; Nota & Thomas
2020, arXiv 1906.07073). Steps after an env's last end in a rollout have no return yet, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pgrl import functional
from pgrl.acting import Actor
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.critic import Critic, CriticConfig
from pgrl.agents.on_policy import OnPolicyConfig, ends, make_normalisers, normalised, prepare, values
from pgrl.data import NoiseStream, Transition
from pgrl.errors import UserError
from pgrl.flat import flatten, gradients_of_rows
from pgrl.networks import ActorCritic
from pgrl.optim import Adam, GradientStep


@dataclass
class REINFORCEConfig(OnPolicyConfig, CriticConfig):
    """`algo=reinforce`."""

    num_steps: int = 1024  # T: steps of each env between updates; at least an episode
    baseline: str | None = (
        "value"  # mean, leave_one_out, time, value, min_variance, min_variance_per_parameter; or null
    )
    discount_states: bool = False  # weigh step t of an episode by gamma^t; Sutton & Barto 2018, section 13.3
    learning_rate: float = 1e-3  # Adam's, of the policy; Tianshou
    ent_coef: float = 0.0  # weight of the entropy bonus


class Batch(NamedTuple):
    """A rollout as the loss takes it, [N, ...]."""

    obs: Tensor
    action: Tensor
    weight: Tensor  # of log pi(a|s) in the estimate
    share: Tensor  # 1 / episodes for steps of complete episodes, 0 for others
    correction: Tensor | None  # [P], what a baseline of its own for each parameter takes from the gradient


METRICS = ("losses/policy_loss", "losses/entropy", "losses/grad_norm")
ROWS = 32  # whose gradients are taken together


class REINFORCE(Agent):
    name = "reinforce"
    actor: Actor

    def __init__(self, config: REINFORCEConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.net.to(setting.device)
        self.obs_norm, self.value_norm, self.reward_scaler = make_normalisers(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, self.actor.device))
        self.step = GradientStep(
            self.loss,
            [(self.net.policy_parameters(), 1.0)],
            partial(Adam, eps=config.adam_eps),
            max_grad_norm=config.max_grad_norm,
            compiled=setting.compiled,
        )
        self.critic = Critic(config, self.net, setting) if config.baseline == "value" else None
        self.age = torch.zeros(setting.num_envs, dtype=torch.int64, device=setting.device)  # of the running episodes
        self.updates = torch.zeros((), dtype=torch.int64)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return self.actor.sample(obs, self.noise.next(obs.shape[0])) if explore else self.actor.mode(obs)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        config, raw_obs = self.config, rollout.obs
        rollout = prepare(config, self.net, self.obs_norm, self.reward_scaler, rollout)
        age, share = self.episodes(rollout)
        factor = share * config.gamma ** age.to(share.dtype) if config.discount_states else share

        metrics: dict[str, Tensor] = {}
        correction = None
        if self.critic is not None:
            terminated = ends(config, rollout)
            value, next_value = values(self.net, self.value_norm, rollout, terminated)
            returns = self.returns(rollout, next_value, terminated)
            advantage = returns - value
            value, returns = normalised(self.value_norm, self.net, value, returns)
            metrics = self.critic.fit(rollout.obs, value, returns, progress)
        else:
            returns = self.returns(rollout, torch.zeros_like(rollout.reward), rollout.terminated)
            if config.baseline == "min_variance_per_parameter":
                advantage, correction = returns, self.correction(rollout, returns, factor)
            else:
                advantage = returns - self.baseline(rollout, returns, age, share, factor)

        obs, action, weight, share = (x.flatten(0, 1) for x in (rollout.obs, rollout.action, factor * advantage, share))
        lr = torch.tensor(config.learning_rate * (1.0 - progress if config.anneal_lr else 1.0), device=share.device)
        steps = self.step(Batch(obs, action, weight, share, correction), lr, ())
        self.updates += 1

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            self.obs_norm.update(raw_obs)
        return {
            **metrics,
            **dict(zip(METRICS, steps, strict=True)),
            "losses/complete_share": (share > 0).to(share.dtype).mean(),
            "charts/learning_rate": lr,
            "charts/updates": self.updates + (0 if self.critic is None else self.critic.updates),
        }

    def loss(self, batch: Batch, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a rollout [N, ...] and METRICS but the last."""
        distribution = self.net.policy(batch.obs)
        policy_loss = -(distribution.log_prob(batch.action) * batch.weight).sum()
        entropy = distribution.entropy()
        loss = policy_loss - self.config.ent_coef * (entropy * batch.share).sum()
        if batch.correction is not None:
            loss = loss + flatten(self.net.policy_parameters()) @ batch.correction
        return loss, (policy_loss, entropy.mean())

    def episodes(self, rollout: Transition) -> tuple[Tensor, Tensor]:
        """The age of each step's episode, and 1 / episodes for steps of complete ones and 0 for others; [T, B]."""
        age = functional.episode_age(rollout.terminated, rollout.truncated, self.age)
        self.age.copy_(age[-1])
        complete, episodes = functional.complete_episodes(rollout.terminated, rollout.truncated)
        if not episodes:
            raise UserError(
                f"no episode ended in a rollout of algo.num_steps={self.num_steps}, and REINFORCE learns from whole "
                f"ones.\nUse: algo.num_steps={10 * self.num_steps} or env.max_episode_steps={self.num_steps}"
            )
        return age[:-1], complete.to(rollout.reward.dtype) / episodes

    def returns(self, rollout: Transition, next_value: Tensor, terminated: Tensor) -> Tensor:
        """Monte-Carlo returns [T, B]."""
        return functional.monte_carlo(rollout.reward, next_value, terminated, rollout.truncated, self.config.gamma)

    def baseline(self, rollout: Transition, returns: Tensor, age: Tensor, share: Tensor, factor: Tensor) -> Tensor:
        """The baseline [T, B] that the returns of this rollout give."""
        match self.config.baseline:
            case None:
                return torch.zeros_like(returns)
            case "mean":
                return functional.weighted_mean(returns, share)
            case "leave_one_out":
                return functional.leave_one_out_mean(returns, share)
            case "time":
                return functional.mean_by_age(returns, share, age)
            case "min_variance":
                scores = (score.square().sum(-1) for score, _ in self.scores(rollout))
                weight = torch.cat(list(scores)).view_as(returns) * factor.square()
                return functional.leave_one_out_mean(returns, weight)
        raise ValueError(f"baseline={self.config.baseline!r}")

    def correction(self, rollout: Transition, returns: Tensor, factor: Tensor) -> Tensor:
        """What the minimum-variance baselines of the single parameters add to the gradient of the loss, [P].

        That of parameter k is sum_i (d_k log pi)^2 G / sum_i (d_k log pi)^2 over the other envs' steps i.
        """
        num_envs, size = returns.shape[1], sum(p.numel() for p in self.net.policy_parameters())
        sums = returns.new_zeros(3, num_envs, size)  # of the scores, their squares, and those times the return
        for score, rows in self.scores(rollout):
            score = score * factor.view(-1, 1)[rows]
            square = score.square()
            sums.index_add_(1, rows % num_envs, torch.stack([score, square, square * returns.view(-1, 1)[rows]]))
        return (sums[0] * functional.others_ratio(sums[2], sums[1])).sum(0)

    def scores(self, rollout: Transition) -> Iterator[tuple[Tensor, Tensor]]:
        """The gradients of log pi(a|s) [n, P] of some rows of the flat rollout at a time, and their numbers [n]."""
        obs, action = rollout.obs.flatten(0, 1), rollout.action.flatten(0, 1)
        for rows in torch.arange(len(obs), device=obs.device).split(ROWS):
            log_prob = self.net.policy(obs[rows]).log_prob(action[rows])
            yield gradients_of_rows(log_prob, self.net.policy_parameters()), rows
