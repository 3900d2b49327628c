"""What NPG and TRPO share: the surrogate of a rollout, and the natural step along which it grows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from pgrl import functional
from pgrl.distributions import Distribution, detached
from pgrl.flat import FlatParameters, flatten
from pgrl.networks import ActorCritic
from pgrl.trust_region import FisherProduct, NaturalStep, natural_step


class Keys(Protocol):
    """The keys of the configuration that are used here."""

    damping: float
    cg_steps: int
    cg_tolerance: float
    fisher_fraction: float
    ent_coef: float


class Batch(NamedTuple):
    """A rollout as the surrogate takes it; [T, B, ...], then [N, ...]."""

    obs: Tensor
    action: Tensor
    advantage: Tensor


class Surrogate:
    """What an update is to raise: E[ratio * A] and the entropy bonus, as a function of the policy's present weights.

    Schulman et al. 2015 (arXiv 1502.05477), equation 14. The policy of the moment this is made is the old one.
    """

    def __init__(self, net: ActorCritic, batch: Batch, ent_coef: float) -> None:
        self.net, self.batch, self.ent_coef = net, batch, ent_coef
        self.distribution = net.policy(batch.obs)
        self.old = detached(self.distribution)
        self._old_log_prob = self.old.log_prob(batch.action)

    def value(self, distribution: Distribution) -> Tensor:
        """The surrogate [] of the batch's distributions."""
        log_ratio = distribution.log_prob(self.batch.action) - self._old_log_prob
        return self.ent_coef * distribution.entropy().mean() - functional.ppo_loss(log_ratio, self.batch.advantage)

    def natural_step(
        self, policy: FlatParameters, keys: Keys, rows: Generator, *, max_kl: float | None, step_size: float = 1.0
    ) -> tuple[Tensor, NaturalStep]:
        """The surrogate's value [] at the old policy, and the natural step from there.

        With `fisher_fraction` below 1 the Fisher matrix is that of some rows of the batch, drawn from `rows`.
        """
        before = self.value(self.distribution)
        gradient = flatten(torch.autograd.grad(before, policy.parameters, retain_graph=True))
        distribution, obs = self.distribution, self.batch.obs
        if keys.fisher_fraction < 1.0:
            order = torch.randperm(len(obs), generator=rows, device=obs.device)
            distribution = self.net.policy(obs[order[: max(1, round(keys.fisher_fraction * len(obs)))]])
        return before.detach(), natural_step(
            gradient,
            FisherProduct(distribution, policy.parameters),
            max_kl=max_kl,
            step_size=step_size,
            damping=keys.damping,
            iterations=keys.cg_steps,
            tolerance=keys.cg_tolerance,
        )

    @torch.no_grad()
    def now(self) -> tuple[Tensor, Tensor]:
        """The surrogate [] at the present weights, and their mean KL [] from the old policy."""
        new = self.net.policy(self.batch.obs)
        return self.value(new), self.old.kl(new).mean()
