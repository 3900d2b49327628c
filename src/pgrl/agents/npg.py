"""Natural policy gradient: Kakade 2001, "A natural policy gradient"; Rajeswaran et al. 2017, arXiv 1703.02660.

One step along F^-1 g for each rollout, by conjugate gradients on Fisher-vector products, as long as a KL radius allows
or of a fixed size. `algo=trpo` searches along the same direction. The code-level options of PPO apply here too.
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


@dataclass
class NPGConfig(AdvantageConfig, CriticConfig):
    """`algo=npg`; the defaults are those of Rajeswaran et al. 2017, section 4, where they name a value."""

    num_steps: int = 2048  # T: steps of each env between updates; as for trpo
    max_kl: float | None = 0.01  # KL radius of an update, to second order; null: steps of step_size; as for trpo
    step_size: float = 0.1  # of the natural gradient, for max_kl=null; Tianshou
    anneal_kl: bool = False  # the radius, or the step size, linearly to 0
    damping: float = 0.1  # added to the Fisher matrix's diagonal; as for trpo
    cg_steps: int = 10  # iterations of conjugate gradients, at most
    cg_tolerance: float = 1e-10  # they end once the residual is below this share of the gradient
    fisher_fraction: float = 1.0  # share of the rollout that the Fisher matrix is taken on
    norm_adv: bool = True  # advantages of a rollout to mean 0, std 1; Rajeswaran et al. 2017, section 4
    ent_coef: float = 0.0  # weight of the entropy bonus


class NPG(Agent):
    name = "npg"
    actor: Actor

    def __init__(self, config: NPGConfig, setting: Setting) -> None:
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
        metrics = self.improve(batch, 1.0 - progress if config.anneal_kl else 1.0)
        metrics |= self.critic.fit(rollout.obs, value, returns, progress)
        self.updates += 1

        # last, so that a whole update sees the statistics under which the actions were taken
        if self.obs_norm is not None:
            self.obs_norm.update(raw_obs)
        return {**metrics, "charts/updates": self.updates + self.critic.updates}

    def improve(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """One step of the policy on a rollout [N, ...], `scale` times the configured radius or size."""
        config, policy = self.config, self.policy
        policy.check()
        surrogate = Surrogate(self.net, batch, config.ent_coef)
        max_kl = None if config.max_kl is None else config.max_kl * scale
        before, natural = surrogate.natural_step(
            policy, config, self.rows, max_kl=max_kl, step_size=config.step_size * scale
        )
        policy.vector.add_(natural.step)
        after, kl = surrogate.now()
        return {
            "losses/policy_loss": -before,
            "losses/entropy": surrogate.old.entropy().mean(),
            "losses/predicted_improvement": natural.predicted,
            "losses/actual_improvement": after - before,
            "losses/kl": kl,
            "losses/cg_residual": natural.residual,
        }
