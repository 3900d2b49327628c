"""Trust region policy optimisation: Schulman et al. 2015, arXiv 1502.05477.

The step is that of the natural gradient, then shortened until the exact mean KL is within its bound and the surrogate
has grown (appendix C). The advantages are those of Schulman et al. 2016 (GAE), as usual since. The code-level options
of PPO apply here too: "TRPO+" of Engstrom et al. 2020 (arXiv 2005.12729) is `experiment=engstrom_trpo_plus`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgrl import functional
from pgrl.acting import Actor
from pgrl.agents.base import Agent, Setting, generator
from pgrl.agents.critic import Critic, CriticConfig
from pgrl.agents.natural import Batch, Surrogate
from pgrl.agents.on_policy import AdvantageConfig, make_normalisers, prepare, targets
from pgrl.data import NoiseStream, Transition, flatten_time
from pgrl.flat import FlatParameters
from pgrl.networks import ActorCritic
from pgrl.trust_region import Trial, line_search


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


class TRPO(Agent):
    name = "trpo"
    actor: Actor

    def __init__(self, config: TRPOConfig, setting: Setting) -> None:
        self.config, self.num_steps = config, config.num_steps
        self.net = ActorCritic(setting.obs_space, setting.action_space, config.network, config.policy)
        self.net.to(setting.device)
        self.obs_norm, self.value_norm, self.reward_scaler = make_normalisers(config, setting)
        self.actor = Actor(self.net, self.obs_norm, setting)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, self.actor.device))
        self.rows = generator(setting.seed, 2, setting.device)
        self.policy = FlatParameters(self.net.policy_parameters())
        self.critic = Critic(config, self.net, setting)
        self.updates = torch.zeros((), dtype=torch.int64)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return self.actor.sample(obs, self.noise.next(obs.shape[0])) if explore else self.actor.mode(obs)

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
        surrogate, start = Surrogate(self.net, batch, config.ent_coef), policy.vector.clone()
        before, natural = surrogate.natural_step(policy, config, self.rows, max_kl=max_kl)

        def try_step(fraction: float) -> Trial:
            policy.vector.copy_(start)
            if fraction:  # nothing of a step that is not finite stays
                policy.vector.add_(natural.step, alpha=fraction)
            after, kl = surrogate.now()
            return Trial(after - before, kl)

        search = line_search(
            try_step,
            float(natural.predicted),
            max_kl=max_kl,
            factor=config.backtrack_factor,
            tries=config.backtrack_steps,
            accept_ratio=config.accept_ratio,
        )
        return {
            "losses/policy_loss": -before,
            "losses/entropy": surrogate.old.entropy().mean(),
            "losses/predicted_improvement": natural.predicted,
            "losses/actual_improvement": search.last.improvement,
            "losses/kl_full_step": search.first.kl,
            "losses/kl": search.last.kl,
            "losses/cg_residual": natural.residual,
            "losses/step_fraction": torch.tensor(search.fraction),
        }
