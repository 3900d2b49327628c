"""Statements on values, advantages and their estimators."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor

from pgrl import functional
from pgrl.agents import A2CConfig
from pgrl.data import Transition
from pgrl.theory.check import Check, Statement, equal
from pgrl.theory.learners import make
from pgrl.theory.mdp import MDP, Episodes, discounts, episodes, objective, random_mdp, stationary, values

LAMBDAS = (0.0, 0.5, 0.95, 1.0)


def tabular(seed: int, *shape: int) -> Tensor:
    """A random policy, probabilities along the last dimension."""
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def ends(found: Episodes) -> tuple[Tensor, Tensor]:
    """Where the episodes terminate, and nowhere; both [H, K]."""
    never = torch.zeros_like(found.state.T, dtype=torch.bool)
    last = never.clone()
    last[-1] = True
    return last, never


def critics(found: Episodes, v: Tensor) -> tuple[Tensor, Tensor]:
    """V [H + 1, S] at the states of the episodes and at their successors, with 7 after the end; both [H, K]."""
    value = v[torch.arange(len(v) - 1).unsqueeze(-1), found.state.T]
    return value, torch.cat([value[1:], torch.full_like(value[:1], 7.0)])


def occupancy_sums_to_one() -> Check:
    """sum_s sum_t gamma^t P(s_t = s) = 1 / (1 - gamma).

    The left side is the expected return of the reward 1{s_t = s}, by `monte_carlo` on episodes cut after H steps.
    """
    mdp, policy = random_mdp(3, 2, 3, 0.9, seed=1), tabular(2, 3, 2)
    found = episodes(mdp, policy.expand(3, -1, -1))
    never = torch.zeros_like(found.state.T, dtype=torch.bool)
    cut = ~ends(found)[1]
    cut[:-1] = False
    returns = []
    for s in range(3):
        there = mdp._replace(reward=(torch.arange(3) == s).double().unsqueeze(-1).expand(3, 2))
        world = stationary(there, policy)
        ahead = there.transition[found.state.T, found.action.T] @ world.v
        reward = (found.state.T == s).double()
        returns.append(functional.monte_carlo(reward, ahead, never, cut, mdp.gamma)[0] @ found.probability)
    d = (1.0 - mdp.gamma) * torch.stack(returns)
    exact = (1.0 - mdp.gamma) * stationary(mdp, policy).visits
    return equal((d.sum(), torch.ones_like(d.sum())), (d, exact))


def conditional_means(mdp: MDP, found: Episodes, x: Tensor) -> Tensor:
    """E[x_t | s_t = s, a_t = a] [H, S, A] of x [H, K]."""
    total = torch.zeros(mdp.horizon, *mdp.reward.shape, dtype=torch.float64)
    mass = torch.zeros_like(total)
    time = torch.arange(mdp.horizon).unsqueeze(-1).expand_as(x)
    at = (time, found.state.T, found.action.T)
    total.index_put_(at, x * found.probability, accumulate=True)
    mass.index_put_(at, found.probability.expand_as(x), accumulate=True)
    return total / mass


def advantages_average_to_zero() -> Check:
    """With the true V, E[A_t | s, a] = Q - V for every lambda, and its mean under pi is 0."""
    mdp, policy = random_mdp(3, 2, 3, 0.9, seed=3), tabular(4, 3, 3, 2)
    found, (q, v) = episodes(mdp, policy), values(mdp, policy)
    (last, never), (value, next_value) = ends(found), critics(found, v)
    pairs = []
    for lam in LAMBDAS:
        advantage = functional.gae(found.reward.T, value, next_value, last, never, mdp.gamma, lam)
        means = conditional_means(mdp, found, advantage)
        average = (policy * means).sum(-1)
        pairs += [(means, q - v[:-1].unsqueeze(-1)), (average, torch.zeros_like(average))]
    return equal(*pairs)


def performance_difference() -> Check:
    """J(pi') - J(pi) = E_pi'[sum_t gamma^t A_pi(s_t, a_t)], with pgrl's TD errors of V_pi for A_pi."""
    mdp, old, new = random_mdp(3, 2, 3, 0.9, seed=5), tabular(6, 3, 3, 2), tabular(7, 3, 3, 2)
    found = episodes(mdp, new)
    value, next_value = critics(found, values(mdp, old).v)
    delta = functional.td_error(found.reward.T, value, next_value, ends(found)[0], mdp.gamma)
    gain = discounts(mdp) @ delta @ found.probability
    return equal((gain, objective(mdp, new) - objective(mdp, old)))


def all_endings(num_steps: int) -> tuple[Tensor, Tensor]:
    """Every pattern of going on, terminating, being truncated, or both, as terminated and truncated [T, 4^T]."""
    kinds = torch.tensor(list(product(range(4), repeat=num_steps))).T
    return kinds % 2 == 1, kinds >= 2


def random_rows(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and values of successors, all of `shape`; these two are unrelated, as where episodes are cut."""
    random = Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, *shape, generator=random, dtype=torch.float64)
    return reward, value, next_value


def lambda_zero_is_td() -> Check:
    """GAE with lambda = 0 is r + gamma V(s') - V(s), without V(s') after a termination."""
    terminated, truncated = all_endings(4)
    reward, value, next_value = random_rows(terminated.shape, 8)
    found = functional.gae(reward, value, next_value, terminated, truncated, 0.9, 0.0)
    return equal((found, reward + 0.9 * next_value * (~terminated).double() - value))


def lambda_one_is_monte_carlo() -> Check:
    """GAE with lambda = 1 is the discounted return minus V, where values agree from row to row."""
    terminated, truncated = all_endings(4)
    reward, value, next_value = random_rows(terminated.shape, 9)
    goes_on = ~(terminated | truncated)[:-1]
    next_value[:-1] = torch.where(goes_on, value[1:], next_value[:-1])
    found = functional.gae(reward, value, next_value, terminated, truncated, 0.9, 1.0)
    returns = functional.monte_carlo(reward, next_value, terminated, truncated, 0.9)
    rows = list(reward + 0.9 * next_value.masked_fill(terminated, 0.0))
    for t in reversed(range(len(rows) - 1)):  # the sum of rewards, bootstrapped where it is cut
        rows[t] = torch.where(goes_on[t], reward[t] + 0.9 * rows[t + 1], rows[t])
    return equal((found, returns - value), (returns, torch.stack(rows)))


def defined_gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE [T, B] as it is defined: a sum over l of (gamma lam)^l delta_{t+l}, up to the first end of an episode."""
    num_steps = len(reward)
    result = torch.zeros_like(reward)
    for t in range(num_steps):
        alive = torch.ones_like(reward[0])
        for k in range(t, num_steps):
            delta = reward[k] + gamma * next_value[k] * (~terminated[k]).double() - value[k]
            result[t] += (gamma * lam) ** (k - t) * alive * delta
            alive = alive * (~done[k]).double()
    return result


def averaged_gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE [T, B] as an average: n-step advantages weighted by (1 - lam) lam^(n - 1), the last by what is left."""
    num_steps = len(reward)
    result = torch.zeros_like(reward)
    for t in range(num_steps):
        so_far, left = torch.zeros_like(reward[0]), torch.ones_like(reward[0])
        alive = torch.ones_like(reward[0], dtype=torch.bool)
        for k in range(t, num_steps):
            so_far = so_far + gamma ** (k - t) * reward[k]
            n_step = so_far + gamma ** (k - t + 1) * next_value[k].masked_fill(terminated[k], 0.0) - value[t]
            final = done[k] | (k == num_steps - 1)
            weight = torch.where(final, left, (1.0 - lam) * left)
            result[t] += torch.where(alive, weight * n_step, 0.0)
            left = left - weight
            alive = alive & ~final
    return result


def gae_is_its_definition() -> Check:
    """Under every pattern of endings of 5 steps, and under random ones of 40 (which take the other code path)."""
    pairs = []
    every, some = all_endings(5), torch.rand(2, 40, 64, generator=Generator().manual_seed(10)) < 0.1
    for (terminated, truncated), lambdas in ((every, LAMBDAS), (some, (0.95,))):
        reward, value, next_value = random_rows(terminated.shape, 11)
        done = terminated | truncated
        agree = torch.where(done[:-1], next_value[:-1], value[1:])
        next_value = torch.cat([agree, next_value[-1:]])
        for lam in lambdas:
            given = (reward, value, next_value, terminated)
            found = functional.gae(*given, truncated, 0.9, lam)
            averaged = functional.td_lambda(*given, truncated, 0.9, lam) - value
            defined = defined_gae(*given, done, 0.9, lam)
            pairs += [(found, defined), (averaged, defined), (found, averaged_gae(*given, done, 0.9, lam))]
    return equal(*pairs)


def n_step_is_its_definition() -> Check:
    """r_t + ... + gamma^(m-1) r_{t+m-1} + gamma^m V, m = n or, if fewer, the steps to the end of episode or rollout."""
    terminated, truncated = all_endings(5)
    reward, value, next_value = random_rows(terminated.shape, 13)
    done = terminated | truncated
    pairs = []
    for n in (1, 2, 3, 7):
        found = functional.n_step(reward, next_value, terminated, truncated, 0.9, n)
        expected = torch.zeros_like(reward)
        for t in range(5):
            alive = torch.ones_like(done[0])
            for k in range(t, min(t + n, 5)):
                last = done[k] | (k == min(t + n, 5) - 1)
                ahead = 0.9 * next_value[k].masked_fill(terminated[k] | ~last, 0.0)
                expected[t] += torch.where(alive, 0.9 ** (k - t) * (reward[k] + ahead), 0.0)
                alive = alive & ~done[k]
        pairs.append((found, expected))
    return equal(*pairs)


def targets(agent: Any, rollout: Transition) -> Tensor:
    """The returns [N] that the agent's update on a rollout teaches its critic."""
    step, seen = agent.step, []

    def spy(batch: Any, lr: Tensor, scalars: Any) -> Any:
        seen.append(batch.returns)
        return step(batch, lr, scalars)

    agent.step = spy
    agent.update(rollout, 0.0)
    agent.step = step
    return torch.cat(seen)


def truncation_bootstraps() -> Check:
    """In a chain of rewards 1 with V = 1 / (1 - gamma), the targets that A2C learns from after H steps.

    Cut by the clock they are 1 / (1 - gamma) at every step; after a termination (1 - gamma^(H-t)) / (1 - gamma).
    """
    gamma, num_steps = 0.9, 5
    one = torch.ones(1, 1, dtype=torch.float64)
    chain = MDP(one.unsqueeze(0), one, one[0], gamma, num_steps)
    forever = torch.full((num_steps,), 1.0 / (1.0 - gamma), dtype=torch.float64)
    finite = (1.0 - gamma ** torch.arange(num_steps, 0, -1, dtype=torch.float64)) / (1.0 - gamma)
    pairs = []
    for kind, lam in [(kind, lam) for kind in functional.ADVANTAGES for lam in LAMBDAS]:
        learner = make(A2CConfig(advantage=kind, gae_lambda=lam, n_step=num_steps), chain)
        learner.set_critic(forever[0].expand(num_steps + 1, 1))
        rollout = learner.rollout(episodes(chain, learner.policy().detach()), [0])
        cut = rollout._replace(terminated=rollout.truncated, truncated=rollout.terminated)
        pairs.append((targets(learner.agent, cut), forever))
        if kind == "monte_carlo" or (kind == "gae" and lam == 1.0):
            pairs.append((targets(learner.agent, rollout), finite))
    return equal(*pairs)


STATEMENTS = (
    Statement(
        "d_gamma is a distribution",
        "Sutton et al. 2000, section 1",
        "E[monte_carlo] of 1{s_t = s}, the solved d_gamma",
        occupancy_sums_to_one,
    ),
    Statement(
        "advantages average to zero",
        "Sutton et al. 2000, section 3",
        "E[gae | s, a] and Q - V; its mean under pi and 0",
        advantages_average_to_zero,
    ),
    Statement(
        "performance-difference lemma",
        "Kakade & Langford 2002, lemma 6.1",
        "E_new[sum gamma^t td_error], J(new) - J(old)",
        performance_difference,
    ),
    Statement(
        "GAE, lambda = 0: the TD residual",
        "Schulman et al. 2016, eq. 17",
        "gae and its residual, all 256 endings of 4 steps",
        lambda_zero_is_td,
    ),
    Statement(
        "GAE, lambda = 1: Monte Carlo - V",
        "Schulman et al. 2016, eq. 18",
        "gae and sums of rewards, all 256 endings of 4 steps",
        lambda_one_is_monte_carlo,
    ),
    Statement(
        "GAE is its definition",
        "Schulman et al. 2016, eq. 16",
        "gae, td_lambda: 1024 endings of 5 steps, 64 of 40",
        gae_is_its_definition,
    ),
    Statement(
        "n-step returns are their definition",
        "Sutton & Barto 2018, eq. 7.1",
        "n_step for 4 n, all 1024 endings of 5 steps",
        n_step_is_its_definition,
    ),
    Statement(
        "a truncation bootstraps, an end does not",
        "Pardo et al. 2018",
        "A2C's targets in a chain of rewards 1, closed forms",
        truncation_bootstraps,
    ),
)
