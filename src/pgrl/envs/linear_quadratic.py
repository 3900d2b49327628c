"""The linear-quadratic regulator: an env whose best policy, and what any linear policy earns, are known exactly.

    s' = A s + B a + noise,    reward = -(s'Qs + a'Ra)

`pgrl/LinearQuadratic-v0` is the problem REGULATOR, for 100 steps. A policy is its gain K [A, S], the action is K s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Regulator(NamedTuple):
    """A linear-quadratic problem with normal noise and normal first states of mean 0; float64."""

    a: Tensor  # [S, S]
    b: Tensor  # [S, A]
    q: Tensor  # [S, S], what a state costs
    r: Tensor  # [A, A], what an action costs
    noise: Tensor  # [S, S], the noise's covariance
    start: Tensor  # [S, S], the first state's second moments: its covariance where its mean is 0


# A rotation that dies away, pushed along its second axis.
REGULATOR = Regulator(
    a=torch.tensor([[0.9, 0.3], [-0.3, 0.9]], dtype=torch.float64),
    b=torch.tensor([[0.0], [0.5]], dtype=torch.float64),
    q=torch.eye(2, dtype=torch.float64),
    r=0.1 * torch.eye(1, dtype=torch.float64),
    noise=0.1 * torch.eye(2, dtype=torch.float64),
    start=torch.eye(2, dtype=torch.float64),
)


class LinearQuadratic(gymnasium.Env[NDArray[Any], NDArray[Any]]):
    """REGULATOR without an end of its own; the observation is the state."""

    observation_space = spaces.Box(-np.inf, np.inf, REGULATOR.b.shape[:1], np.float64)
    action_space = spaces.Box(-np.inf, np.inf, REGULATOR.b.shape[1:], np.float32)

    def __init__(self) -> None:
        self._a, self._b, self._q, self._r = (x.numpy() for x in REGULATOR[:4])
        self._noise, self._start = (torch.linalg.cholesky(x).numpy() for x in REGULATOR[4:])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._s = self._start @ self.np_random.standard_normal(len(self._a))
        return self._s, {}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        s, a = self._s, action.astype(np.float64)
        self._s = self._a @ s + self._b @ a + self._noise @ self.np_random.standard_normal(len(s))
        return self._s, -float(s @ self._q @ s + a @ self._r @ a), False, False, {}


# ------------------------------------------------------------------------------------------- for ever, discounted


def value_matrix(problem: Regulator, gain: Tensor, gamma: float) -> Tensor:
    """P [S, S] with V(s) = -s'Ps + a constant: the Lyapunov equation P = Q + K'RK + gamma F'PF, F = A + BK, solved."""
    f = problem.a + problem.b @ gain
    cost = problem.q + gain.T @ problem.r @ gain
    # (F'PF) as a vector is kron(F', F') times P as one
    left = torch.eye(cost.numel(), dtype=cost.dtype) - gamma * torch.kron(f.T.contiguous(), f.T.contiguous())
    p: Tensor = torch.linalg.solve(left, cost.flatten())
    return p.view_as(cost)


def discounted_return(problem: Regulator, gain: Tensor, gamma: float) -> Tensor:
    """E[sum_t gamma^t r_t] []; differentiable. NaN where the discounted sum has no limit."""
    f = problem.a + problem.b @ gain.detach()
    if gamma >= 1.0 or gamma * torch.linalg.eigvals(f).abs().max() ** 2 >= 1.0:
        return torch.tensor(torch.nan, dtype=gain.dtype)
    p = value_matrix(problem, gain, gamma)
    cost: Tensor = (p * (problem.start + gamma / (1.0 - gamma) * problem.noise)).sum()
    return -cost


def optimal_gain(problem: Regulator, gamma: float) -> Tensor:
    """The gain [A, S] that is best for the discounted return, by Riccati's recursion to its fixed point.

    ArithmeticError if there is none within 100,000 steps, as where no gain keeps the sum finite.
    """
    p = problem.q
    for _ in range(100_000):
        gain, before = best_response(problem, p, gamma), p
        p = one_more_step(problem, gain, p, gamma)
        if torch.equal(p, before) or (p - before).abs().max() <= 1e-14 * p.abs().max():
            return gain
    raise ArithmeticError("Riccati's recursion has no limit")


def best_response(problem: Regulator, p: Tensor, gamma: float) -> Tensor:
    """The gain that is best for one step if what follows is worth -s'Ps."""
    curvature = problem.r + gamma * problem.b.T @ p @ problem.b
    gain: Tensor = torch.linalg.solve(curvature, -gamma * problem.b.T @ p @ problem.a)
    return gain


def one_more_step(problem: Regulator, gain: Tensor, p: Tensor, gamma: float) -> Tensor:
    """P of a step with this gain, before what is worth -s'Ps."""
    f = problem.a + problem.b @ gain
    cost: Tensor = problem.q + gain.T @ problem.r @ gain
    return cost + gamma * f.T @ p @ f


# ------------------------------------------------------------------------------------------- episodes of some steps


def optimal_gains(problem: Regulator, steps: int, gamma: float = 1.0) -> Tensor:
    """The gains [steps, A, S] that are best for an episode, by Riccati's recursion from its end."""
    p, gains = torch.zeros_like(problem.q), []
    for _ in range(steps):
        gains.append(best_response(problem, p, gamma))
        p = one_more_step(problem, gains[-1], p, gamma)
    return torch.stack(gains[::-1])


def episode_return(problem: Regulator, gains: Tensor, gamma: float = 1.0) -> Tensor:
    """E[sum_t gamma^t r_t] [] over an episode with the gains [steps, A, S], by the second moments of its states."""
    moments, total = problem.start, torch.zeros((), dtype=problem.q.dtype)
    for t, gain in enumerate(gains):
        total = total - gamma**t * ((problem.q + gain.T @ problem.r @ gain) * moments).sum()
        f = problem.a + problem.b @ gain
        moments = f @ moments @ f.T + problem.noise
    return total
