"""Statements on rewarded entropy: the squashed Gaussian's density, the soft value, and soft Bellman backups."""

from __future__ import annotations

import torch
from torch import Generator
from torch.autograd import grad

from pgrl import functional
from pgrl.distributions import SquashedGaussian
from pgrl.theory.check import Check, Statement, equal
from pgrl.theory.mdp import random_mdp, stationary

ALPHAS = (0.5, 1.0, 3.0)


def squashed_density_integrates_to_one() -> Check:
    """The integral over (-1, 1) of exp log_prob is 1, and over a square that of two dimensions.

    At the points a = tanh u of an even grid of u, with da = du / cosh(u)^2. A trapezoid of so smooth a function is
    exact but for rounding.
    """
    pairs = []
    for mean, std in ((0.0, 0.3), (0.0, 1.0), (0.7, 2.0), (-2.0, 0.5), (3.0, 0.8)):
        u = torch.linspace(mean - 8.0 * std, mean + 8.0 * std, 161, dtype=torch.float64).unsqueeze(-1)
        weight = u.squeeze(-1).cosh() ** -2 * 0.1 * std
        density = SquashedGaussian(torch.full_like(u, mean), torch.full_like(u, std).log()).log_prob(u.tanh()).exp()
        pairs.append(((density * weight).sum(), torch.ones_like(weight[0])))
    u = torch.cartesian_prod(*[torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)] * 2)
    means, stds = torch.tensor([[0.2, -0.3], [0.4, 0.5]], dtype=torch.float64)
    density = SquashedGaussian(means.expand_as(u), stds.log()).log_prob(u.tanh()).exp()
    integral = (density * u.cosh().prod(-1) ** -2).sum() * 0.1**2
    return equal(*pairs, (integral, torch.ones_like(integral)))


def soft_bandit() -> Check:
    """E[q - alpha log pi] is greatest, alpha log sum exp(q / alpha), at pi = softmax(q / alpha).

    The slope is 0 there, every other policy falls short by alpha KL(pi || softmax), and gradient ascent ends there.
    """
    q, start = 0.5 * torch.randn(2, 5, 4, generator=Generator().manual_seed(0), dtype=torch.float64)
    pairs = []
    for alpha in ALPHAS:
        best = (q / alpha).log_softmax(-1)
        top = alpha * (q / alpha).logsumexp(-1)
        logits = best.clone().requires_grad_()
        value = functional.soft_value(q, logits.log_softmax(-1), alpha)
        pairs += [(value, top), (grad(value.sum(), logits)[0], torch.zeros_like(q))]
        other = start.log_softmax(-1)
        gap = alpha * (other.exp() * (other - best)).sum(-1)
        pairs.append((top - functional.soft_value(q, other, alpha), gap))
        logits = start.clone().requires_grad_()
        for _ in range(2000):
            value = functional.soft_value(q, logits.log_softmax(-1), alpha).sum()
            logits.data.add_(grad(value, logits)[0], alpha=1.0 / alpha)
        pairs.append((logits.detach().softmax(-1), best.exp()))
    return equal(*pairs)


def soft_backups_converge() -> Check:
    """Q <- r + gamma E[soft value of Q at softmax(Q / alpha)] from any Q ends where soft value iteration does.

    That is V = alpha log sum exp(Q / alpha), and what the policy softmax(Q / alpha) earns, entropy included, by
    solving Bellman's equation.
    """
    mdp, pairs = random_mdp(4, 3, 1, 0.8, seed=5), []
    never = torch.zeros_like(mdp.reward, dtype=torch.bool)
    for alpha in ALPHAS:
        q = 10.0 * torch.randn(4, 3, generator=Generator().manual_seed(6), dtype=torch.float64)
        for _ in range(200):
            v = functional.soft_value(q, (q / alpha).log_softmax(-1), alpha)
            q = functional.td0(mdp.reward, mdp.transition @ v, never, mdp.gamma)
        expected = torch.zeros_like(q)
        for _ in range(200):
            expected = mdp.reward + mdp.gamma * mdp.transition @ (alpha * (expected / alpha).exp().sum(-1).log())
        log_pi = (expected / alpha).log_softmax(-1)
        earned = stationary(mdp._replace(reward=mdp.reward - alpha * log_pi), log_pi.exp()).v
        pairs += [(q, expected), (functional.soft_value(q, log_pi, alpha), earned)]
    return equal(*pairs)


STATEMENTS = (
    Statement(
        "the squashed density integrates to 1",
        "Haarnoja et al. 2018b, appendix C",
        "log_prob of 6 squashed Gaussians by quadrature; 1",
        squashed_density_integrates_to_one,
    ),
    Statement(
        "the soft optimum is softmax(q / alpha)",
        "Haarnoja et al. 2018a, eq. 4",
        "soft_value, its slope and ascent; alpha log sum exp",
        soft_bandit,
    ),
    Statement(
        "soft backups are soft value iteration",
        "Haarnoja et al. 2018a, theorem 1",
        "200 backups by soft_value and td0, the fixed point",
        soft_backups_converge,
    ),
)
