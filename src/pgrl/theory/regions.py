"""Statements on trust regions: the steps of NPG and TRPO, and the bound behind TRPO."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl import functional
from pgrl.agents import NPGConfig, TRPOConfig
from pgrl.data import Transition
from pgrl.distributions import Categorical
from pgrl.theory.check import LARGE, Check, Statement, at_least, equal
from pgrl.theory.estimators import tabular
from pgrl.theory.learners import Learner, make
from pgrl.theory.mdp import MDP, episodes, random_mdp, stationary


def rollout_of(learner: Learner, seed: int, num_envs: int) -> Transition:
    """Episodes of the learner's policy, drawn by their probabilities."""
    found = episodes(learner.mdp, learner.policy().detach())
    random = Generator().manual_seed(seed)
    return learner.rollout(found, torch.multinomial(found.probability, num_envs, True, generator=random).tolist())


class Surrogate(NamedTuple):
    """What an update of NPG or TRPO is about, written anew: the mean over N steps, [N, ...] each."""

    obs: Tensor
    action: Tensor
    advantage: Tensor

    def log_prob(self, learner: Learner) -> Tensor:
        """log pi of every action [N, A]."""
        weight, bias = learner.parameters()
        return (self.obs @ weight.T + bias).log_softmax(-1)

    def worth(self, learner: Learner, old: Tensor) -> Tensor:
        """E[ratio * A] []."""
        log_ratio = (self.log_prob(learner) - old).gather(1, self.action.unsqueeze(-1)).squeeze(-1)
        return (log_ratio.exp() * self.advantage).mean()

    def kl(self, learner: Learner, old: Tensor) -> Tensor:
        """The mean of KL(old || new) []."""
        return (old.exp() * (old - self.log_prob(learner))).sum(-1).mean()

    def fisher(self, learner: Learner) -> Tensor:
        """E[score score'] [P, P] over the observations and all actions."""
        log_prob = self.log_prob(learner)
        total = torch.zeros(())
        for x in log_prob:
            for y in x:
                s = torch.cat([g.flatten() for g in grad(y, learner.parameters(), retain_graph=True)])
                total = total + y.detach().exp() * torch.outer(s, s) / len(log_prob)
        return total


def surrogate(learner: Learner, rollout: Transition, *, norm_adv: bool) -> Surrogate:
    """That of a rollout of whole episodes [H, B], for a critic that answers 0: the advantage is the return."""
    rows = list(rollout.reward)
    for t in reversed(range(len(rows) - 1)):
        rows[t] = rows[t] + learner.mdp.gamma * rows[t + 1]
    advantage = torch.stack(rows).flatten()
    if norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return Surrogate(rollout.obs.flatten(0, 1), rollout.action.flatten(), advantage)


def without_critic(config: Any, *, seed: int, num_envs: int) -> Learner:
    """NPG or TRPO in an MDP of 2 states, 2 actions and 3 steps, with Monte-Carlo returns and V = 0."""
    config.update_epochs = config.num_minibatches = 1
    config.advantage = "monte_carlo"
    learner = make(config, random_mdp(2, 2, 3, 0.9, seed=91), num_envs=num_envs, seed=seed)
    learner.set_critic(torch.zeros(4, 2, dtype=torch.float64))
    return learner


def vector(learner: Learner) -> Tensor:
    """A copy of the policy's parameters [P]."""
    return torch.cat([p.detach().flatten() for p in learner.parameters()])


def npg_steps_along_the_natural_gradient() -> Check:
    """theta changes by sqrt(2 max_kl / x' (F + damping) x) x with x = (F + damping)^-1 g, or by step_size * x."""
    pairs = []
    for max_kl, damping in ((0.01, 0.0), (0.3, 0.1), (None, 0.1)):
        config = NPGConfig(max_kl=max_kl, damping=damping, step_size=0.5, cg_steps=40, cg_tolerance=1e-13)
        config.norm_adv = False
        learner = without_critic(config, seed=92, num_envs=4)
        rollout = rollout_of(learner, 93, 4)
        world = surrogate(learner, rollout, norm_adv=False)
        before, old = vector(learner), world.log_prob(learner).detach()
        g = learner.gradient(world.worth(learner, old))
        f = world.fisher(learner) + damping * torch.eye(len(g), dtype=g.dtype)
        x = torch.linalg.lstsq(f, g, driver="gelsd").solution
        expected = (0.5 if max_kl is None else (2.0 * max_kl / (g @ x)).sqrt()) * x
        metrics = learner.agent.update(rollout, 0.0)
        pairs += [
            (vector(learner) - before, expected),
            (metrics["losses/kl"], world.kl(learner, old).detach()),
            (metrics["losses/predicted_improvement"], g @ expected),
        ]
    return equal(*pairs)


def npg_has_the_requested_length() -> Check:
    """KL / max_kl = 1 + c sqrt(max_kl) + ...: extrapolated to max_kl = 0 from three radii it is 1."""
    for_radius = []
    for max_kl in (1e-4, 1e-4 / 4, 1e-4 / 16):
        config = NPGConfig(max_kl=max_kl, damping=0.0, cg_steps=40, cg_tolerance=1e-13)
        learner = without_critic(config, seed=92, num_envs=4)
        rollout = rollout_of(learner, 93, 4)
        world = surrogate(learner, rollout, norm_adv=True)
        old = world.log_prob(learner).detach()
        learner.agent.update(rollout, 0.0)
        for_radius.append(world.kl(learner, old).detach() / max_kl)
    whole, half, quarter = for_radius
    first = 2.0 * half - whole, 2.0 * quarter - half  # of the roots of the radii, each half of the one before
    return equal(((4.0 * first[1] - first[0]) / 3.0, torch.ones_like(whole)), tolerance=1e-6)


def trpo_keeps_its_promises() -> Check:
    """KL <= max_kl and the surrogate does not fall, over updates with full, shortened and refused steps.

    Both are recomputed; a refused step leaves every bit of the policy. Infinite unless all three kinds occur.
    """
    pairs, kinds = [], set()
    settings: list[dict[str, Any]] = [
        {},
        {"max_kl": 0.5, "damping": 1e-3},
        {"max_kl": 5.0, "damping": 1e-3, "backtrack_factor": 0.8},
        {"max_kl": 5.0, "damping": 1e-3, "backtrack_steps": 1},
        {"accept_ratio": 3.0},
        {"max_kl": 0.1, "norm_adv": False, "fisher_fraction": 0.5},
    ]
    for seed, keys in enumerate(settings):
        config = TRPOConfig(**keys)
        learner = without_critic(config, seed=94 + seed, num_envs=6)
        for update in range(5):
            rollout = rollout_of(learner, update, 6)
            world = surrogate(learner, rollout, norm_adv=config.norm_adv)
            before, old = vector(learner), world.log_prob(learner).detach()
            worth = world.worth(learner, old).detach()
            metrics = learner.agent.update(rollout, 0.0)
            kl, after = world.kl(learner, old).detach(), world.worth(learner, old).detach()
            fraction = float(metrics["losses/step_fraction"])
            kinds.add("full" if fraction == 1.0 else "shortened" if fraction else "refused")
            moved = (vector(learner) != before).any().double()
            pairs += [
                (kl.clamp(min=config.max_kl), torch.tensor(config.max_kl, dtype=torch.float64)),
                (after.clamp(max=worth), worth),
                (moved, torch.tensor(float(fraction > 0.0), dtype=torch.float64)),
                (metrics["losses/kl"], kl),
                (metrics["losses/actual_improvement"], after - worth),
            ]
    found = equal(*pairs)
    return found if len(kinds) == 3 else found._replace(error=float("inf"))


class Bound(NamedTuple):
    """The terms of Schulman et al. 2015, theorem 1, for two policies."""

    new: Tensor  # eta(new)
    surrogate: Tensor  # L_old(new)
    penalty: Tensor  # 4 epsilon gamma / (1 - gamma)^2 * max_s KL(old || new)


def bound(mdp: MDP, old: Tensor, new: Tensor) -> Bound:
    """With pgrl's unclipped surrogate, weighted by d_gamma and the old policy, and its KL; policies [S, A]."""
    world, gamma = stationary(mdp, old), mdp.gamma
    advantage = world.q - world.v.unsqueeze(-1)
    log_ratio = (new / old).log()
    each = torch.stack(
        [-functional.ppo_loss(x, a) for x, a in zip(log_ratio.view(-1, 1), advantage.view(-1, 1), strict=True)]
    )
    gain = (world.visits.unsqueeze(-1) * old).flatten() @ each
    kl = Categorical(old.log()).kl(Categorical(new.log())).max()
    penalty = 4.0 * advantage.abs().max() * gamma / (1.0 - gamma) ** 2 * kl
    return Bound(mdp.start @ stationary(mdp, new).v, mdp.start @ world.v + gain, penalty)


def surrogate_bounds_from_below() -> Check:
    """eta(new) >= L_old(new) - 4 epsilon gamma / (1 - gamma)^2 max KL on 300 pairs of policies.

    Infinite unless L_old alone exceeds eta somewhere, so that the penalty is needed.
    """
    pairs, needed = [], False
    for seed in range(30):
        mdp = random_mdp(3, 2, 1, (0.1, 0.5, 0.9)[seed % 3], seed=200 + seed)
        logits = torch.randn(2, 3, 2, generator=Generator().manual_seed(300 + seed), dtype=torch.float64)
        for far in (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0):
            new, lower, penalty = bound(mdp, logits[0].softmax(-1), (logits[0] + far * logits[1]).softmax(-1))
            pairs.append((new, lower - penalty))
            needed |= bool(lower > new + LARGE)
    found = at_least(*pairs)
    return found if needed else found._replace(error=float("inf"))


def surrogate_touches() -> Check:
    """At new = old the surrogate has the value and the gradient of eta."""
    mdp, logits = random_mdp(3, 2, 1, 0.9, seed=99), tabular(100, 3, 2).log().requires_grad_()
    new = bound(mdp, logits.softmax(-1).detach(), logits.softmax(-1))
    slopes = [grad(x, logits, retain_graph=True)[0] for x in new[:2]]
    return equal((new.surrogate.detach(), new.new.detach()), (slopes[1], slopes[0]))


STATEMENTS = (
    Statement(
        "NPG's step is the natural gradient's",
        "Rajeswaran et al. 2017, eq. 4",
        "NPG's update and the explicit F, 3 settings",
        npg_steps_along_the_natural_gradient,
    ),
    Statement(
        "NPG's KL is max_kl to second order",
        "Rajeswaran et al. 2017, eq. 4",
        "NPG's updates at 3 radii, extrapolated to radius 0",
        npg_has_the_requested_length,
    ),
    Statement(
        "TRPO keeps its KL and never falls",
        "Schulman et al. 2015, appendix C",
        "30 updates: full, shortened and refused steps",
        trpo_keeps_its_promises,
    ),
    Statement(
        "the surrogate agrees to first order",
        "Schulman et al. 2015, eq. 4",
        "value and slope of ppo_loss under d_gamma, of eta",
        surrogate_touches,
    ),
    Statement(
        "TRPO's lower bound",
        "Schulman et al. 2015, theorem 1",
        "eta >= L - C max KL, 300 pairs of policies",
        surrogate_bounds_from_below,
    ),
)
