"""Statements on trust regions: the Fisher matrix, natural steps, NPG, TRPO, and the bound behind TRPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl import functional, trust_region
from pgrl.agents import NPGConfig, TRPOConfig
from pgrl.data import Transition
from pgrl.distributions import Bernoulli, Categorical, DiagGaussian
from pgrl.networks import ActorCritic, PolicyConfig
from pgrl.theory.check import LARGE, Check, Statement, at_least, differs, equal
from pgrl.theory.estimators import tabular
from pgrl.theory.learners import Learner, make
from pgrl.theory.mdp import MDP, episodes, random_mdp, stationary
from pgrl.theory.scores import CHOICES, every_action, hermite, legendre, network, observations, score

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)


class Case(NamedTuple):
    """A policy network, some observations, and a quadrature of its actions at each of them."""

    net: ActorCritic
    obs: Tensor  # [N, 3]
    actions: Tensor  # [N, K, ...]
    weight: Tensor  # [N, K], probabilities


def cases() -> list[Case]:
    """A policy of each kind, at 3 random observations."""
    found = []
    for seed, space in enumerate(CHOICES):
        net, obs, actions = network(space, 60 + seed), observations(3, 70 + seed), every_action(space)
        actions = actions.expand(3, *actions.shape)
        with torch.no_grad():
            weight = torch.stack([net.policy(obs).log_prob(actions[:, k]).exp() for k in range(actions.shape[1])], 1)
        found.append(Case(net, obs, actions, weight))
    for seed, (kind, own_std) in enumerate([("gaussian", False), ("gaussian", True), ("squashed", False)]):
        net = network(BOX, 63 + seed, PolicyConfig(distribution=kind, state_dependent_std=own_std))
        obs, (z, weight) = observations(3, 73 + seed), hermite(1, 6)
        with torch.no_grad():
            actions = torch.stack([net.policy(obs).sample(x.expand(3, 1)) for x in z], 1)
        found.append(Case(net, obs, actions, weight.expand(3, -1)))
    net, obs, (x, w) = network(BOX, 66, PolicyConfig(distribution="beta")), observations(3, 76), legendre(1, 40)
    net.policy_head.bias.data.add_(5.0)  # smooth up to the bounds
    with torch.no_grad():
        weight = torch.stack([net.policy(obs).log_prob(a.expand(3, 1)).exp() for a in x], 1) * w
    return [*found, Case(net, obs, x.expand(3, -1, -1), weight)]


def product_of(case: Case) -> tuple[trust_region.FisherProduct, Tensor]:
    """pgrl's Fisher-vector product of a case, and the matrix [P, P] it stands for, column by column."""
    parameters = case.net.policy_parameters()
    fisher = trust_region.FisherProduct(case.net.policy(case.obs), parameters)
    basis = torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)
    return fisher, torch.stack([fisher(v) for v in basis], 1)


def explicit_fisher(case: Case) -> Tensor:
    """E[score score'] [P, P], the mean over the observations and the exact one over the actions."""
    total = torch.zeros(())
    for n, k in np.ndindex(*case.weight.shape):
        log_prob = case.net.policy(case.obs[n : n + 1]).log_prob(case.actions[n : n + 1, k])
        s = score(case.net, log_prob.sum())
        total = total + case.weight[n, k] * torch.outer(s, s) / len(case.obs)
    return total


def fisher_is_explicit() -> Check:
    """F v is E[score score'] v for every v of a basis, of 7 kinds of policies."""
    return equal(*((product_of(case)[1], explicit_fisher(case)) for case in cases()))


def fisher_is_the_hessian() -> Check:
    """F v is the Hessian of the mean KL(old || theta) at theta = old, by differentiating the network twice."""
    pairs = []
    for case in cases():
        parameters = case.net.policy_parameters()
        new: Any = case.net.policy(case.obs)
        old = new._make(x.detach() if isinstance(x, Tensor) else x for x in new)
        slope = torch.cat([g.flatten() for g in grad(old.kl(new).mean(), parameters, create_graph=True)])
        rows = [torch.cat([g.flatten() for g in grad(s, parameters, retain_graph=True)]) for s in slope]
        pairs += [(product_of(case)[1], torch.stack(rows)), (slope.detach(), torch.zeros_like(slope))]
    return equal(*pairs)


def conjugate_gradient_solves() -> Check:
    """x = (F + 0.1 I)^-1 g, and the residual it reports is g - (F + 0.1 I) x, finished or not."""
    pairs = []
    for seed, case in enumerate(cases()):
        fisher, matrix = product_of(case)
        g = torch.randn(len(matrix), generator=Generator().manual_seed(80 + seed), dtype=torch.float64)
        damped = matrix + 0.1 * torch.eye(len(g), dtype=g.dtype)

        def damped_product(v: Tensor, fisher: Callable[[Tensor], Tensor] = fisher) -> Tensor:
            return fisher(v) + 0.1 * v

        x, _ = trust_region.conjugate_gradient(damped_product, g, 2 * len(g), 1e-13)
        early, residual = trust_region.conjugate_gradient(damped_product, g, 3, 1e-13)
        pairs += [(x, torch.linalg.solve(damped, g)), (residual, g - damped @ early)]
    return equal(*pairs)


def change_of(outputs: Tensor, parameters: Tensor, step: Tensor) -> Tensor:
    """What a small step [P] changes in `outputs`, to first order, in the shape of the outputs."""
    rows = [grad(x, parameters, retain_graph=True)[0] for x in outputs.flatten()]
    return (torch.stack(rows) @ step).view_as(outputs)


class Form(NamedTuple):
    """One policy written in two ways, theta = forward(theta'), and the slope g of what is to grow."""

    policy: Callable[[Tensor], Any]  # theta -> distribution
    theta: Tensor
    forward: Callable[[Tensor], Tensor]
    other: Tensor  # theta'
    objective: Callable[[Any], Tensor]


def forms() -> list[Form]:
    """Logits of switches mixed by a matrix, and a Gaussian by its variance instead of its log standard deviation."""
    random = Generator().manual_seed(90)
    mix = torch.randn(3, 3, generator=random, dtype=torch.float64) + 2.0 * torch.eye(3, dtype=torch.float64)
    theta, q = torch.randn(2, 3, generator=random, dtype=torch.float64)
    switches = Form(
        lambda x: Bernoulli(x.unsqueeze(-1)),
        theta,
        lambda x: mix @ x,
        torch.linalg.solve(mix, theta),
        lambda d: (d.logits.squeeze(-1).sigmoid() * q).sum(),
    )
    normal = Form(
        lambda x: DiagGaussian(x[:1].unsqueeze(0), x[1:]),
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        lambda x: torch.stack([x[0], 0.5 * x[1].log()]),
        torch.tensor([0.3, 0.7], dtype=torch.float64).mul(torch.tensor([1.0, 2.0])).clone(),
        lambda d: -((d.mean - 1.0).square() + (2.0 * d.log_std).exp()).sum(),  # E[-(a - 1)^2]
    )
    normal.other[1] = normal.other[1].exp()
    return [switches, normal]


def outputs_of(distribution: Any) -> Tensor:
    """The numbers of a distribution as one vector."""
    return torch.cat([x.flatten() for x in distribution])


def changes(form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the natural step and the plain gradient change in the policy, as theta and as theta', and J B B' g."""
    result = []
    for forward, start in ((lambda x: x, form.theta), (form.forward, form.other)):
        free = start.clone().requires_grad_()
        theta = forward(free)
        distribution = form.policy(theta)
        g = grad(form.objective(distribution), free, retain_graph=True)[0]
        fisher = trust_region.FisherProduct(distribution, [free])
        natural = trust_region.natural_step(
            g, fisher, step_size=1.0, max_kl=None, damping=0.0, iterations=9, tolerance=1e-14
        )
        outputs = outputs_of(distribution)
        result += [change_of(outputs, free, natural.step), change_of(outputs, free, g)]
    free = form.theta.clone().requires_grad_()
    distribution = form.policy(free)
    g = grad(form.objective(distribution), free, retain_graph=True)[0]
    b = torch.autograd.functional.jacobian(form.forward, form.other)
    return result[0], result[2], result[1], result[3], change_of(outputs_of(distribution), free, b @ b.T @ g)


def natural_gradient_is_invariant() -> Check:
    """The natural step changes the policy alike, to first order, however the policy is parameterised."""
    return equal(*(changes(form)[:2] for form in forms()))


def plain_gradient_is_not_invariant() -> Check:
    """With theta = B theta' the plain gradient of theta' moves the policy by J B B' g, not by J g."""
    checks = [differs(found, predicted, other) for _, _, other, found, predicted in map(changes, forms())]
    return max(checks)


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
        "Fisher-vector product is F v",
        "Kakade 2001, section 2",
        "FisherProduct of 7 kinds of policies and E[score score']",
        fisher_is_explicit,
    ),
    Statement(
        "Gauss-Newton is the Hessian of the KL",
        "Martens 2020, section 9",
        "FisherProduct of 7 kinds of policies, autograd twice",
        fisher_is_the_hessian,
    ),
    Statement(
        "conjugate gradients solve",
        "Hestenes & Stiefel 1952, section 3",
        "conjugate_gradient on 7 damped F and linalg.solve",
        conjugate_gradient_solves,
    ),
    Statement(
        "the natural gradient is invariant",
        "Kakade 2001, section 2",
        "natural_step in 2 x 2 parameterisations",
        natural_gradient_is_invariant,
    ),
    Statement(
        "the plain gradient is not",
        "Kakade 2001, section 2",
        "plain steps in the same, J B B' g; differs",
        plain_gradient_is_not_invariant,
    ),
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
