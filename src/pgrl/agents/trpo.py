"""Trust region policy optimisation: Schulman et al. 2015, arXiv 1502.05477.

The step is that of the natural gradient, then shortened until the exact mean KL is within its bound and the surrogate
has grown (appendix C). The advantages are those of Schulman et al. 2016 (GAE), as usual since. The code-level options
of PPO apply here too: "TRPO+" of Engstrom et al. 2020 (arXiv 2005.12729) is `experiment=engstrom_trpo_plus`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgrl import functional
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.critic import Critic, CriticConfig
from pgrl.agents.on_policy import AdvantageConfig, make_normalisers, prepare, targets
from pgrl.data import NoiseStream, Transition, flatten_time
from pgrl.distributions import Distribution, detached
from pgrl.flat import FlatParameters, flatten
from pgrl.networks import ActorCritic
from pgrl.trust_region import FisherProduct, Trial, line_search, natural_step


@dataclass
class TRPOConfig(AdvantageConfig, CriticConfig):
    """`algo=trpo`; the defaults are Schulman et al. 2015, table 2 and appendix C, where they name a value."""

    num_steps: int = 2048  # T: steps of each env between updates; Engstrom et al. 2020, appendix A.1
    max_kl: float = 0.01  # delta, bound of the mean KL of an update; table 2
    anneal_kl: bool = False  # the bound linearly to 0
    damping: float = 0.1  # added to the Fisher matrix's diagonal; Engstrom et al. 2020, appendix A.1
    cg_steps: int = 10  # iterations of conjugate gradients, at most; appendix C.1
    cg_tolerance: float = 1e-10  # they end once the residual is below this share of the gradient
    fisher_fraction: float = 1.0  # share of the rollout that the Fisher matrix is taken on; appendix C.1 takes 0.1
    backtrack_factor: float = 0.5  # each try of the line search shortens the step by this; Engstrom et al. 2020
    backtrack_steps: int = 10  # tries before the step is refused; Engstrom et al. 2020, appendix A.1
    accept_ratio: float = 0.1  # least share of the predicted improvement; Engstrom et al. 2020, appendix A.1
    norm_adv: bool = True  # advantages of a rollout to mean 0, std 1
    ent_coef: float = 0.0  # weight of the entropy bonus in the surrogate


class Batch(NamedTuple):
    """A rollout as the surrogate takes it; [T, B, ...], then [N, ...]."""

    obs: Tensor
    action: Tensor
    advantage: Tensor


class TRPO(Agent):
    name = "trpo"

    def __init__(self, config: TRPOConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.net.to(setting.device)
        self.obs_norm, self.value_norm, self.reward_scaler = make_normalisers(config, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, setting.device))
        self.rows = generator(setting.seed, 2, setting.device)
        self.policy = FlatParameters(self.net.policy_parameters())
        self.critic = Critic(config, self.net, setting)
        self.updates = torch.zeros((), dtype=torch.int64)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        obs = self.obs_norm(obs) if self.obs_norm is not None else obs
        return self.net.sample(obs, self.noise.next(len(obs))) if explore else self.net.mode(obs)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        config, raw_obs = self.config, rollout.obs
        rollout = prepare(config, self.net, self.obs_norm, self.reward_scaler, rollout)
        value, advantage, returns = targets(config, self.net, self.value_norm, rollout)
        if config.norm_adv:
            advantage = functional.normalise(advantage)

        batch = flatten_time(Batch(rollout.obs, rollout.action, advantage))
        metrics = self.improve(batch, config.max_kl * (1.0 - progress if config.anneal_kl else 1.0))
        metrics |= self.critic.fit(rollout.obs, value, returns, progress)
        self.updates += 1

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            self.obs_norm.update(raw_obs)
        return {**metrics, "charts/updates": self.updates + self.critic.updates}

    def improve(self, batch: Batch, max_kl: float) -> dict[str, Tensor]:
        """One step of the policy on a rollout [N, ...]; where none is accepted the policy stays as it is."""
        config, policy = self.config, self.policy
        policy.check()
        distribution = self.net.policy(batch.obs)
        old, start = detached(distribution), policy.vector.clone()
        old_log_prob = old.log_prob(batch.action)
        before = self.surrogate(distribution, batch, old_log_prob)
        gradient = flatten(torch.autograd.grad(before, policy.parameters, retain_graph=True))
        if config.fisher_fraction < 1.0:
            rows = torch.randperm(len(batch.obs), generator=self.rows, device=batch.obs.device)
            distribution = self.net.policy(batch.obs[rows[: max(1, round(config.fisher_fraction * len(rows)))]])
        natural = natural_step(
            gradient,
            FisherProduct(distribution, policy.parameters),
            max_kl=max_kl,
            damping=config.damping,
            iterations=config.cg_steps,
            tolerance=config.cg_tolerance,
        )

        @torch.no_grad()
        def try_step(fraction: float) -> Trial:
            policy.vector.copy_(start).add_(natural.step, alpha=fraction)
            new = self.net.policy(batch.obs)
            return Trial(self.surrogate(new, batch, old_log_prob) - before, old.kl(new).mean())

        search = line_search(
            try_step,
            float(natural.predicted),
            max_kl=max_kl,
            factor=config.backtrack_factor,
            tries=config.backtrack_steps,
            accept_ratio=config.accept_ratio,
        )
        return {
            "losses/policy_loss": -before.detach(),
            "losses/entropy": old.entropy().mean(),
            "losses/predicted_improvement": natural.predicted,
            "losses/actual_improvement": search.last.improvement.detach(),
            "losses/kl_full_step": search.first.kl,
            "losses/kl": search.last.kl,
            "losses/cg_residual": natural.residual,
            "losses/step_fraction": torch.tensor(search.fraction),
        }

    def surrogate(self, distribution: Distribution, batch: Batch, old_log_prob: Tensor) -> Tensor:
        """What an update is to raise, []: E[ratio * A], equation 14, and the entropy bonus."""
        log_ratio = distribution.log_prob(batch.action) - old_log_prob
        return self.config.ent_coef * distribution.entropy().mean() - functional.ppo_loss(log_ratio, batch.advantage)
