"""Statements on the score grad log pi of the library's distributions, and on a KL estimated from samples."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl import functional
from pgrl.agents import A2CConfig
from pgrl.networks import ActorCritic, NetworkConfig, PolicyConfig
from pgrl.theory.check import Check, Statement, equal
from pgrl.theory.learners import expected_ascent, make
from pgrl.theory.mdp import MDP, episodes

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
CHOICES: tuple[spaces.Space[Any], ...] = (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2))


def network(action_space: spaces.Space[Any], seed: int, policy: PolicyConfig | None = None) -> ActorCritic:
    """A policy with a hidden layer of 4 tanh units and random weights, in float64."""
    net = ActorCritic(OBS, action_space, NetworkConfig(hidden_sizes=[4]), policy or PolicyConfig()).double()
    random = Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, generator=random, dtype=p.dtype))
    return net


def observations(n: int, seed: int) -> Tensor:
    """Random observations [n, 3]."""
    return torch.randn(n, 3, generator=Generator().manual_seed(seed), dtype=torch.float64)


def every_action(space: spaces.Space[Any]) -> Tensor:
    """All actions of a finite space [K, ...] as the library's distributions take them."""
    if isinstance(space, spaces.Discrete):
        return torch.arange(int(space.n))
    sizes = space.nvec.tolist() if isinstance(space, spaces.MultiDiscrete) else [2] * int(space.shape[0])  # type: ignore[index]
    return torch.tensor(list(product(*map(range, sizes))))


def hermite(dims: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite quadrature of the standard normal: nodes [K, dims], weights [K] that sum to 1."""
    x, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[x] * dims).view(-1, dims)
    return grid, torch.cartesian_prod(*[w] * dims).view(-1, dims).prod(-1) / math.sqrt(2.0 * math.pi) ** dims


def legendre(dims: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre quadrature of [-1, 1]^dims: nodes [K, dims], weights [K]."""
    x, w = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(nodes))
    return torch.cartesian_prod(*[x] * dims).view(-1, dims), torch.cartesian_prod(*[w] * dims).view(-1, dims).prod(-1)


def score(net: ActorCritic, weighted: Tensor) -> Tensor:
    """The gradient [P] of a scalar with respect to the policy's parameters."""
    return torch.cat([x.flatten() for x in grad(weighted, net.policy_parameters(), retain_graph=True)])


def discrete_scores_have_zero_mean() -> Check:
    """sum_a pi(a|s) = 1 and sum_a pi(a|s) grad log pi(a|s) = 0, for every kind of discrete action."""
    pairs = []
    for seed, space in enumerate(CHOICES):
        net, actions = network(space, seed), every_action(space)
        log_prob = net.policy(observations(1, 20).expand(len(actions), -1)).log_prob(actions)
        p = log_prob.detach().exp()
        mean = score(net, p @ log_prob)
        pairs += [(p.sum(), torch.ones_like(p.sum())), (mean, torch.zeros_like(mean))]
    return equal(*pairs)


def continuous_scores_have_zero_mean() -> Check:
    """The same of Gaussian, tanh-squashed and Beta policies in two dimensions, by quadrature."""
    pairs = []
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    for seed, (kind, own_std) in enumerate(
        [("gaussian", False), ("gaussian", True), ("squashed", False), ("squashed", True), ("beta", False)]
    ):
        net = network(box, seed, PolicyConfig(distribution=kind, state_dependent_std=own_std))
        if kind == "beta":  # smooth up to the bounds
            net.policy_head.bias.data.add_(5.0)
            action, weight = legendre(2, 100)
        else:
            z, weight = hermite(2, 4)
        distribution: Any = net.policy(observations(1, 21).expand(len(weight), -1))
        if kind != "beta":
            action = distribution.sample(z).detach()
        log_prob = distribution.log_prob(action)
        weight = weight * log_prob.detach().exp() if kind == "beta" else weight
        mean = score(net, weight @ log_prob)
        pairs += [(weight.sum(), torch.ones_like(weight.sum())), (mean, torch.zeros_like(mean))]
    return equal(*pairs)


def two_actions() -> Check:
    """With two actions and one state, the gradient of J is pi_1 pi_2 (r_1 - r_2) (1, -1), by A2C without a critic."""
    one = torch.ones(1, 1, dtype=torch.float64)
    bandit = MDP(torch.ones(1, 2, 1, dtype=torch.float64), torch.tensor([[1.5, -0.5]]).double(), one[0], 1.0, 1)
    learner = make(A2CConfig(ent_coef=0.0), bandit, timed=False, seed=4)
    learner.set_critic(torch.zeros(1, 1, dtype=torch.float64))
    p = learner.policy().detach()
    slope = p[0, 0].prod() * 2.0
    closed = torch.stack([slope, -slope, slope, -slope])  # of the two weights, and of the two biases
    return equal((expected_ascent(learner, episodes(bandit, p)), closed))


def kl_estimate_is_unbiased() -> Check:
    """E_old[(ratio - 1) - log ratio] is KL(old || new), and so is its gradient, for every kind of discrete action."""
    pairs = []
    for seed, space in enumerate(CHOICES):
        net, other = network(space, seed), network(space, seed + 30)
        actions = every_action(space)
        obs = observations(1, 22).expand(len(actions), -1)
        new: Any = net.policy(obs)
        with torch.no_grad():
            old: Any = other.policy(obs)
            log_p = old.log_prob(actions)
        log_ratio = new.log_prob(actions) - log_p
        estimate = torch.stack([functional.approx_kl(x) for x in log_ratio.split(1)]) @ log_p.exp()
        exact = old.kl(new)[0]
        defined = -(log_p.exp() * log_ratio).sum()
        pairs += [(estimate, defined), (exact, defined), (score(net, estimate), score(net, exact))]
    return equal(*pairs)


STATEMENTS = (
    Statement(
        "the score has zero mean (discrete)",
        "Sutton & Barto 2018, section 13.4",
        "log_prob of 3 kinds of policies, all actions; 0",
        discrete_scores_have_zero_mean,
    ),
    Statement(
        "the score has zero mean (continuous)",
        "Sutton & Barto 2018, section 13.7",
        "log_prob of 5 kinds of policies, by quadrature; 0",
        continuous_scores_have_zero_mean,
    ),
    Statement(
        "softmax gradient of two actions",
        "Sutton & Barto 2018, section 2.8",
        "A2C's expected step and pi_1 pi_2 (r_1 - r_2)",
        two_actions,
    ),
    Statement(
        "approx_kl is unbiased, and its gradient",
        "Schulman 2020, estimator k3",
        "E[approx_kl] over all actions, kl, and the definition",
        kl_estimate_is_unbiased,
    ),
)
