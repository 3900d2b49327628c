"""Statements on natural gradients: the Fisher matrix, conjugate gradients, and reparameterisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl import trust_region
from pgrl.distributions import Bernoulli, DiagGaussian
from pgrl.networks import ActorCritic, PolicyConfig
from pgrl.theory.check import Check, Statement, differs, equal
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


class Form(NamedTuple):
    """One policy written in two ways, theta = forward(theta'), and what is to grow."""

    policy: Callable[[Tensor], Any]  # theta -> distribution
    objective: Callable[[Any], Tensor]  # distribution -> []
    forward: Callable[[Tensor], Tensor]
    other: Tensor  # theta'


def forms() -> list[Form]:
    """Logits of switches mixed by a matrix, and a Gaussian by its variance instead of its log standard deviation."""
    random = Generator().manual_seed(90)
    mix = torch.randn(3, 3, generator=random, dtype=torch.float64) + 2.0 * torch.eye(3, dtype=torch.float64)
    start, q = torch.randn(2, 3, generator=random, dtype=torch.float64)
    switches = Form(
        lambda theta: Bernoulli(theta.unsqueeze(-1)),
        lambda d: (d.logits.squeeze(-1).sigmoid() * q).sum(),
        lambda x: mix @ x,
        start,
    )
    normal = Form(
        lambda theta: DiagGaussian(theta[:1].unsqueeze(0), theta[1:]),
        lambda d: -((d.mean - 1.0).square() + (2.0 * d.log_std).exp()).sum(),  # E[-(a - 1)^2]
        lambda x: torch.stack([x[0], 0.5 * x[1].log()]),
        torch.tensor([0.3, 4.0], dtype=torch.float64),
    )
    return [switches, normal]


class Changes(NamedTuple):
    """What steps change in the numbers of a policy's distribution, to first order."""

    natural: Tensor
    plain: Tensor


def changes(form: Form, forward: Callable[[Tensor], Tensor], start: Tensor) -> Changes:
    """Those of the natural step and of the plain gradient of x, where theta = forward(x) and x is at `start`."""
    free = start.clone().requires_grad_()
    distribution = form.policy(forward(free))
    g = grad(form.objective(distribution), free, retain_graph=True)[0]
    fisher = trust_region.FisherProduct(distribution, [free])
    step = trust_region.natural_step(g, fisher, damping=0.0, iterations=9, tolerance=1e-14).step
    rows = [grad(x, free, retain_graph=True)[0] for field in distribution for x in field.flatten()]
    jacobian = torch.stack(rows)
    return Changes(jacobian @ step, jacobian @ g)


def both_ways(form: Form) -> tuple[Changes, Changes]:
    """The changes with theta and with theta' as the parameters."""
    return changes(form, lambda x: 1.0 * x, form.forward(form.other)), changes(form, form.forward, form.other)


def natural_gradient_is_invariant() -> Check:
    """The natural step changes the policy alike, to first order, however the policy is parameterised."""
    return equal(*((one.natural, other.natural) for one, other in map(both_ways, forms())))


def plain_gradient_is_not_invariant() -> Check:
    """With B = d theta / d theta' the plain gradient of theta' moves the policy by J B B' g, not by J g.

    The policy's numbers are theta itself here, so J is the identity.
    """
    checks = []
    for form in forms():
        one, other = both_ways(form)
        b = torch.autograd.functional.jacobian(form.forward, form.other)
        checks.append(differs(other.plain, b @ b.T @ one.plain, one.plain))
    return equal(*((torch.tensor(c.error), torch.zeros(())) for c in checks))


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
)
