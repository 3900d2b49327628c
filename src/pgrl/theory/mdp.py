"""Tiny Markov decision processes in which everything is known: values, gradients, every episode and its probability.

Shapes: S states, A actions, H steps of an episode, K episodes. A policy is the tensor of its probabilities, [H, S, A]
or, where it does not depend on time, [S, A]; gradients flow through it. All numbers are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class MDP(NamedTuple):
    """States, actions, rewards; an episode is `horizon` steps long and then terminates."""

    transition: Tensor  # [S, A, S], the probability of the successor
    reward: Tensor  # [S, A]
    start: Tensor  # [S], the probability of the first state
    gamma: float
    horizon: int


def random_mdp(states: int, actions: int, horizon: int, gamma: float, seed: int, *, first: int | None = None) -> MDP:
    """An MDP with random dynamics and normal rewards; it starts anywhere, or in the state `first`."""
    random = Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    transition = draw(states, actions, states).softmax(-1)
    reward, start = draw(states, actions), draw(states).softmax(-1)
    if first is not None:
        start = (torch.arange(states) == first).double()
    return MDP(transition, reward, start, gamma, horizon)


def visits(mdp: MDP, policy: Tensor) -> Tensor:
    """The probability of being in a state at each time [H, S]."""
    at = [mdp.start]
    for probabilities in policy[:-1]:
        at.append(torch.einsum("s,sa,sab->b", at[-1], probabilities, mdp.transition))
    return torch.stack(at)


class Values(NamedTuple):
    """What is to be had from each time on."""

    q: Tensor  # [H, S, A]
    v: Tensor  # [H + 1, S]; 0 after the last step


def values(mdp: MDP, policy: Tensor) -> Values:
    """The values of a policy [H, S, A] by backward induction: Sutton & Barto 2018, equations 4.3 and 4.6."""
    return lambda_values(mdp, policy, torch.zeros_like(policy[:, :, 0]), 1.0)


def lambda_values(mdp: MDP, policy: Tensor, critic: Tensor, lam: float) -> Values:
    """The expected lambda-returns of a policy [H, S, A] with a critic [H, S]; with lam=1 the true values.

    E[G_t | s, a] with G_t as in Sutton & Barto 2018, equation 12.2.
    """
    v = [torch.zeros_like(mdp.start)]
    q: list[Tensor] = []
    for t in reversed(range(mdp.horizon)):
        ahead = v[-1] if t == mdp.horizon - 1 else lam * v[-1] + (1.0 - lam) * critic[t + 1]
        q.append(mdp.reward + mdp.gamma * mdp.transition @ ahead)
        v.append((policy[t] * q[-1]).sum(-1))
    return Values(torch.stack(q[::-1]), torch.stack(v[::-1]))


def objective(mdp: MDP, policy: Tensor) -> Tensor:
    """J, the expected discounted return of a policy [H, S, A]; [], and its gradient is the exact one."""
    return mdp.start @ values(mdp, policy).v[0]


def score_weighted(mdp: MDP, policy: Tensor, q: Tensor, weight: Tensor) -> Tensor:
    """A scalar [] whose gradient is sum_t weight_t E[grad log pi(a_t | s_t) q_t(s_t, a_t)]; q [H, S, A], weight [H].

    With the true q and weight_t = gamma^t that is the policy-gradient theorem: Sutton et al. 2000, theorem 1.
    """
    reached = visits(mdp, policy).detach() * weight.unsqueeze(-1)
    return (reached.unsqueeze(-1) * policy * q.detach()).sum()


def discounts(mdp: MDP) -> Tensor:
    """gamma^t [H]."""
    return mdp.gamma ** torch.arange(mdp.horizon, dtype=torch.float64)


class Episodes(NamedTuple):
    """Every episode that can happen."""

    state: Tensor  # [K, H] int64
    action: Tensor  # [K, H] int64
    reward: Tensor  # [K, H]
    probability: Tensor  # [K], summing to 1


def episodes(mdp: MDP, policy: Tensor) -> Episodes:
    """All possible episodes of H steps and their probabilities under a policy [H, S, A]."""
    states, actions = mdp.reward.shape
    ways = [torch.arange(states), torch.arange(actions)] * mdp.horizon
    state, action = torch.cartesian_prod(*ways).unflatten(-1, (mdp.horizon, 2)).unbind(-1)
    probability = mdp.start[state[:, 0]]
    for t in range(mdp.horizon):
        probability = probability * policy[t, state[:, t], action[:, t]]
        if t:
            probability = probability * mdp.transition[state[:, t - 1], action[:, t - 1], state[:, t]]
    possible = probability > 0.0
    found = Episodes(state, action, mdp.reward[state, action], probability)
    return Episodes(*(x[possible] for x in found))


class Stationary(NamedTuple):
    """The values of a policy that goes on for ever, and where it is."""

    v: Tensor  # [S]
    q: Tensor  # [S, A]
    visits: Tensor  # [S], sum_t gamma^t P(s_t = s): they sum to 1 / (1 - gamma)


def stationary(mdp: MDP, policy: Tensor) -> Stationary:
    """The values of a policy [S, A] without a horizon, by solving Bellman's equation; needs gamma < 1."""
    chain = torch.einsum("sa,sab->sb", policy, mdp.transition)
    kept = torch.eye(len(chain), dtype=chain.dtype) - mdp.gamma * chain
    v = torch.linalg.solve(kept, (policy * mdp.reward).sum(-1))
    return Stationary(v, mdp.reward + mdp.gamma * mdp.transition @ v, torch.linalg.solve(kept.T, mdp.start))
