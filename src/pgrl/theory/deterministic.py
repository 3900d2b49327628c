"""Statements on the deterministic policy gradient, in linear-quadratic problems where Q is a known quadratic.

Expectations are exact: what is averaged is a polynomial of degree 3 at most in each normal variable, and a few equally
likely points with the same mean and covariance average it as the normal does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl.agents import DPG, DPGConfig, Setting
from pgrl.agents.dpg import DPGNetworkConfig
from pgrl.data import Transition
from pgrl.envs.linear_quadratic import Regulator, discounted_return, value_matrix
from pgrl.flat import FlatParameters, flatten
from pgrl.theory.check import Check, Statement, equal

STATES, ACTIONS, GAMMA = 3, 2, 0.9


def normal(seed: int, *shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def random_problem(seed: int) -> Regulator:
    """A problem of 3 states and 2 actions, none of whose matrices has a zero."""

    def covariance(n: int, seed: int) -> Tensor:
        x = normal(seed, n, n)
        return torch.addmm(0.1 * torch.eye(n, dtype=x.dtype), x, x.T, alpha=1.0 / n)

    a, b = 0.3 * normal(seed, STATES, STATES), 0.3 * normal(seed + 1, STATES, ACTIONS)
    return Regulator(a, b, *(covariance(n, seed + 2 + k) for k, n in enumerate((STATES, ACTIONS, STATES, STATES))))


def affine(problem: Regulator, mean: Tensor) -> Regulator:
    """The same with a state more that is always 1, so that the last column of a gain is a constant action.

    The first state has the mean [S].
    """
    n = len(problem.a)

    def extended(matrix: Tensor, corner: float) -> Tensor:
        larger: Tensor = torch.block_diag(matrix, torch.tensor([[corner]], dtype=matrix.dtype))
        return larger

    start = extended(problem.start + mean.outer(mean), 1.0)
    start[n, :n] = start[:n, n] = mean
    b = torch.cat([problem.b, torch.zeros_like(problem.b[:1])])
    return Regulator(
        extended(problem.a, 1.0), b, extended(problem.q, 0.0), problem.r, extended(problem.noise, 0.0), start
    )


class Case(NamedTuple):
    """An agent with a linear policy in a problem, and what is known of it."""

    agent: DPG
    problem: Regulator  # with the constant 1 as its last state
    gain: Tensor  # [A, S + 1], the policy's weights and biases
    p: Tensor  # [S + 1, S + 1]: V(s) = -[s 1] P [s 1]' - c, c the noise's part


def make(hidden_sizes: list[int], seed: int) -> DPG:
    """The library's agent with random weights, in float64, whose steps are taken at rate 1."""
    config = DPGConfig(gamma=GAMMA, actor_lr=1.0, advantage_lr=1.0, value_lr=1.0)
    config.network = DPGNetworkConfig(hidden_sizes=hidden_sizes)
    obs, action = (spaces.Box(-np.inf, np.inf, (n,), np.float32) for n in (STATES, ACTIONS))
    agent = DPG(config, Setting(obs, action, 1, seed, torch.device("cpu")))
    agent.net.double()
    agent.theta = FlatParameters(list(agent.net.parameters()))
    agent.theta.vector.copy_(0.3 * normal(seed, len(agent.theta.vector)))
    agent.w, agent.v = 0.3 * normal(seed + 1, len(agent.w)), 0.3 * normal(seed + 2, len(agent.v))
    return agent


def linear_case(seed: int) -> Case:
    """A linear policy in a random problem whose first state has a mean."""
    agent, problem = make([], seed), affine(random_problem(seed + 10), normal(seed + 20, STATES))
    gain = torch.cat([agent.net.head.weight, agent.net.head.bias.unsqueeze(-1)], 1).detach()
    return Case(agent, problem, gain, value_matrix(problem, gain, GAMMA))


def with_one(states: Tensor) -> Tensor:
    """States [N, S] with the constant 1 [N, S + 1]."""
    return torch.cat([states, torch.ones_like(states[:, :1])], 1)


def action_slope(case: Case) -> Tensor:
    """G [A, S + 1]: the slope of the true Q in the action, at the policy's own action, is G [s 1]'."""
    a, b, _, r, *_ = case.problem
    slope: Tensor = -2.0 * (r @ case.gain + GAMMA * b.T @ case.p @ (a + b @ case.gain))
    return slope


def points(mean: Tensor, covariance: Tensor) -> Tensor:
    """2n equally likely points [2n, n] with this mean [n], this covariance, and no third moments about the mean."""
    root = math.sqrt(len(mean)) * torch.linalg.cholesky(covariance).T
    return mean + torch.cat([root, -root])


class Change(NamedTuple):
    """What an update adds to the parameters of the agent."""

    theta: Tensor
    w: Tensor
    v: Tensor


def change(agent: DPG, batch: Transition) -> Change:
    """What `DPG.update` does with equally likely transitions [N, ...]; the agent stays as it was."""
    parts = agent.theta.vector, agent.w, agent.v
    before = [x.clone() for x in parts]
    agent.update(Transition(*(x.unsqueeze(1) for x in batch)), 0.0)
    found = Change(*(x - old for x, old in zip(parts, before, strict=True)))
    for x, old in zip(parts, before, strict=True):
        x.copy_(old)
    return found


def transitions(case: Case, states: Tensor, noise_std: float) -> Transition:
    """All that may follow states [K, S] when noise is added to the policy's actions, as equally likely transitions."""
    a, b, q, r, noise, _ = case.problem
    pushes = points(torch.zeros_like(r[0]), noise_std**2 * torch.eye(len(r), dtype=r.dtype))
    noises = points(torch.zeros_like(noise[0, :-1]), noise[:-1, :-1])
    k = torch.cartesian_prod(*(torch.arange(len(x)) for x in (states, pushes, noises)))
    s = with_one(states[k[:, 0]])
    action = s @ case.gain.T + pushes[k[:, 1]]
    reward = -((s @ q) * s).sum(-1) - ((action @ r) * action).sum(-1)
    next_obs = (s @ a.T + action @ b.T)[:, :-1] + noises[k[:, 2]]
    never = torch.zeros_like(reward, dtype=torch.bool)
    return Transition(s[:, :-1], action, reward, next_obs, never, never)


def only_states(states: Tensor) -> Transition:
    """Transitions from states [N, S] of which nothing but the state matters."""
    zeros = torch.zeros_like(states[:, 0])
    return Transition(states, normal(0, len(states), ACTIONS), zeros, states, zeros.bool(), zeros.bool())


def discounted_moments(case: Case) -> Tensor:
    """M [S + 1, S + 1] = (1 - gamma) sum_t gamma^t E[ss'], by M = (1 - gamma) E[s0 s0'] + gamma (F M F' + noise)."""
    f = case.problem.a + case.problem.b @ case.gain
    known = (1.0 - GAMMA) * case.problem.start + GAMMA * case.problem.noise
    left = torch.eye(known.numel(), dtype=known.dtype) - GAMMA * torch.kron(f, f)
    moments: Tensor = torch.linalg.solve(left, known.flatten())
    return moments.view_as(known)


def deterministic_policy_gradient() -> Check:
    """DPG's step with the true Q, over the states of d_gamma, is (1 - gamma) grad J, in closed form and by autograd."""
    pairs = []
    for seed in (0, 1):
        case = linear_case(100 * seed)
        moments, slope = discounted_moments(case), action_slope(case)
        mean = moments[-1, :-1]
        case.agent.w = torch.cat([slope[:, :-1].flatten(), slope[:, -1]])  # of the weights, then of the biases
        step = change(case.agent, only_states(points(mean, moments[:-1, :-1] - mean.outer(mean)))).theta
        free = case.gain.clone().requires_grad_()
        by_autograd = grad(discounted_return(case.problem, free, GAMMA), free)[0]
        found = torch.cat([step[:-ACTIONS].view(ACTIONS, STATES), step[-ACTIONS:].unsqueeze(-1)], 1)
        pairs += [(found, slope @ moments), (found, (1.0 - GAMMA) * by_autograd)]
    return equal(*pairs)


def compatible_q_has_the_policys_slope() -> Check:
    """grad_a Q^w(s, a) at a = mu(s) is grad mu(s)' w, for a linear policy and one with a hidden layer."""
    pairs = []
    for hidden in ([], [4]):
        agent, states = make(hidden, 30), normal(33, 7, STATES)
        action = agent.net(states).detach().requires_grad_()
        slope = grad(agent.q(states, action).sum(), action)[0]
        pairs.append((slope, torch.stack([jacobian(agent, s) @ agent.w for s in states])))
    return equal(*pairs)


def jacobian(agent: DPG, state: Tensor) -> Tensor:
    """grad mu(s)' [A, P] at one state [S], an action at a time."""
    mu = agent.net(state.unsqueeze(0)).squeeze(0)
    return torch.stack([flatten(grad(m, list(agent.net.parameters()), retain_graph=True)) for m in mu])


def best_compatible_q_is_as_good_as_q() -> Check:
    """With the w of least E|grad_a Q^w - grad_a Q|^2 DPG's step is that of the true Q, though the slopes differ.

    A policy with a hidden layer of 4 units has 26 parameters, and 40 states have 80 slopes, which none of them fit.
    """
    agent, states, case = make([4], 40), 3.0 * normal(43, 40, STATES), linear_case(44)
    true = with_one(states) @ action_slope(case).T  # of the Q of another policy: the theorem is on any Q
    rows = torch.stack([jacobian(agent, s) for s in states])
    agent.w = torch.linalg.lstsq(rows.flatten(0, 1), true.flatten().unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    if not (rows @ agent.w - true).abs().max() > 0.05 * true.abs().max():
        return Check(math.inf, 0.0)
    with_q = grad((agent.net(states) * true).sum(-1).mean(), list(agent.net.parameters()))
    return equal((change(agent, only_states(states)).theta, flatten(with_q)))


def copdac_rests_at_the_solution() -> Check:
    """At the true slope of Q, and the values with the behaviour's noise, w and v are not expected to change.

    From any state: the noise of the behaviour costs the same everywhere, so it only shifts V, and the part of Q that is
    quadratic in the noise is uncorrelated with it.
    """
    case, noise_std = linear_case(50), 0.7
    _, b, _, r, noise, _ = case.problem
    cost = noise_std**2 * (r + GAMMA * b.T @ case.p @ b).trace() + GAMMA * (case.p @ noise).trace()
    slope, states = action_slope(case), normal(54, 40, STATES)
    case.agent.w = torch.cat([slope[:, :-1].flatten(), slope[:, -1]])
    s = with_one(states)
    v = -((s @ case.p) * s).sum(-1) - cost / (1.0 - GAMMA)
    case.agent.v = torch.linalg.lstsq(case.agent.phi(states), v.unsqueeze(-1)).solution.squeeze(-1)
    found = [change(case.agent, transitions(case, one.unsqueeze(0), noise_std)) for one in states[:5]]
    return equal(*((x, torch.zeros_like(x)) for step in found for x in (step.w, step.v)))


STATEMENTS = (
    Statement(
        "deterministic policy gradient theorem",
        "Silver et al. 2014, theorem 1",
        "DPG's step with the true Q; Lyapunov equations, autograd",
        deterministic_policy_gradient,
    ),
    Statement(
        "the compatible Q has the policy's slope",
        "Silver et al. 2014, theorem 3",
        "autograd of DPG's Q in the action, grad mu(s)' w",
        compatible_q_has_the_policys_slope,
    ),
    Statement(
        "the best compatible Q is as good as Q",
        "Silver et al. 2014, theorem 3",
        "DPG's step with the least-squares w and with the true Q",
        best_compatible_q_is_as_good_as_q,
    ),
    Statement(
        "COPDAC-Q rests at the solution",
        "Silver et al. 2014, eq. 24-27",
        "DPG's expected change of w and v, off-policy; 0",
        copdac_rests_at_the_solution,
    ),
)
