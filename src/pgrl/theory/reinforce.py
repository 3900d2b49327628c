"""Statements on REINFORCE: its expected step, its bias without gamma^t, and each of its baselines."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from pgrl import functional
from pgrl.agents import REINFORCEConfig
from pgrl.data import Transition
from pgrl.theory.check import Check, Statement, differs, equal
from pgrl.theory.learners import Learner, ascent, expected_ascent, make
from pgrl.theory.mdp import MDP, discounts, episodes, objective, random_mdp, score_weighted, values

UNBIASED = {"leave_one_out": True, "min_variance": False, "min_variance_per_parameter": True}  # discount_states


def reinforce(
    baseline: str | None, *, discount_states: bool, gamma: float = 0.9, num_envs: int = 1, timed: bool = True
) -> Learner:
    """REINFORCE in an MDP of 2 states and 2 actions: one env and 3 steps, or two and 2 from the state 0."""
    config = REINFORCEConfig(baseline=baseline, discount_states=discount_states, update_epochs=1, num_minibatches=1)
    horizon, first = (3, None) if num_envs == 1 else (2, 0)
    mdp = random_mdp(2, 2, horizon, gamma, seed=50, first=first)
    return make(config, mdp, seed=51, num_envs=num_envs, timed=timed)


def exact(learner: Learner, *, discounted: bool) -> Tensor:
    """sum_t w_t E[grad log pi Q_t] [P] with w_t = gamma^t, which is grad J, or w_t = 1."""
    policy, weight = learner.policy(), discounts(learner.mdp)
    if discounted:
        return learner.gradient(objective(learner.mdp, policy))
    q = values(learner.mdp, policy.detach()).q
    return learner.gradient(score_weighted(learner.mdp, policy, q, torch.ones_like(weight)))


def expected(learner: Learner, num_envs: int = 1) -> Tensor:
    """The expected step [P] of an update over all episodes, or all combinations of one episode an env."""
    return expected_ascent(learner, episodes(learner.mdp, learner.policy().detach()), num_envs)


def step_is_the_gradient() -> Check:
    """With `discount_states` the expected step is grad J, of the exact J by automatic differentiation."""
    learner = reinforce(None, discount_states=True)
    return equal((expected(learner), exact(learner, discounted=True)))


def step_without_discount_is_biased() -> Check:
    """Without it the expected step is sum_t E[grad log pi Q_t], which differs from grad J.

    The gap is sum_t (1 - gamma^t) E[grad log pi Q_t], computed apart; the policy sees the state alone.
    """
    learner = reinforce(None, discount_states=False, gamma=0.6, timed=False)
    slope, policy = exact(learner, discounted=True), learner.policy()
    q = values(learner.mdp, policy.detach()).q
    gap = learner.gradient(score_weighted(learner.mdp, policy, q, 1.0 - discounts(learner.mdp)))
    return differs(expected(learner), slope + gap, slope)


def episodes_in_a_row() -> Check:
    """Two episodes and the beginning of a third in one rollout: the steps of each count from its own start.

    The expected step is grad J, for the loss is a mean over whole episodes and leaves out what has no return yet.
    """
    learner = reinforce(None, discount_states=True, num_envs=2)
    found = episodes(learner.mdp, learner.policy().detach())
    mean = torch.zeros_like(exact(learner, discounted=True))
    for i, j in torch.cartesian_prod(*[torch.arange(len(found.probability))] * 2).tolist():
        pairs = zip(*(learner.rollout(found, [k, k]) for k in (i, j, i)), strict=True)
        rollout = Transition(*(torch.cat(rows)[:-1] for rows in pairs))
        learner.agent.age.zero_()
        mean += found.probability[i] * found.probability[j] * ascent(learner.agent, rollout)
    return equal((mean, exact(learner, discounted=True)))


def state_baseline_leaves_the_gradient() -> Check:
    """baseline=value with any V: the expected step is the one without a baseline."""
    pairs = []
    for discounted in (True, False):
        learner = reinforce("value", discount_states=discounted)
        table = torch.randn(4, 2, generator=Generator().manual_seed(52), dtype=torch.float64)
        learner.set_critic(table)
        pairs.append((expected(learner), exact(learner, discounted=discounted)))
    return equal(*pairs)


def other_envs_baselines_leave_the_gradient() -> Check:
    """baseline=leave_one_out, min_variance, min_variance_per_parameter, over all pairs of episodes of two envs."""
    pairs = []
    for baseline, discounted in UNBIASED.items():
        learner = reinforce(baseline, discount_states=discounted, num_envs=2)
        pairs.append((expected(learner, num_envs=2), exact(learner, discounted=discounted)))
    return equal(*pairs)


def time_baseline_shrinks_the_gradient() -> Check:
    """baseline=time with n envs: the mean at time t holds the own return, so the expected step is 1 - 1/n of it."""
    learner = reinforce("time", discount_states=True, num_envs=2)
    slope = exact(learner, discounted=True)
    return differs(expected(learner, num_envs=2), 0.5 * slope, slope)


def mean_baseline_biases_the_gradient() -> Check:
    """baseline=mean of one env: the mean over an episode's returns holds what the action led to.

    E[grad log pi_t G_k] is gamma^(t - k) E[grad log pi_t Q_t] for k <= t, and E[grad log pi_t u] for k > t, with
    u(s, a) = E[V_k(s_k) | s_t = s, a_t = a]: by dynamic programming, without episodes.
    """
    learner = reinforce("mean", discount_states=False)
    mdp, policy = learner.mdp, learner.policy()
    q, v = values(mdp, policy.detach())
    steps = range(mdp.horizon)
    own = torch.zeros_like(q)
    for t in steps:
        own[t] += sum(mdp.gamma ** (t - k) for k in steps[: t + 1]) * q[t]
        for k in steps[t + 1 :]:
            ahead = v[k]
            for j in reversed(range(t + 1, k)):
                ahead = (policy[j].detach() * (mdp.transition @ ahead)).sum(-1)
            own[t] += mdp.transition @ ahead
    predicted = score_weighted(mdp, policy, q - own / mdp.horizon, torch.ones_like(q[:, 0, 0]))
    return differs(expected(learner), learner.gradient(predicted), exact(learner, discounted=False))


def best_baseline_minimises_the_variance() -> Check:
    """Var[grad log pi (G - b)] = Var at b* + E[|grad log pi|^2] (b - b*)^2, so b* is best; also for each parameter.

    b* is pgrl's: the baseline of a sixth env whose five fellows hold each action as often as the policy takes it.
    """
    reward = torch.tensor([[2.0, -1.0, 0.5]]).double()
    bandit = MDP(torch.ones(1, 3, 1, dtype=torch.float64), reward, torch.ones(1, dtype=torch.float64), 1.0, 1)
    learner = make(REINFORCEConfig(baseline="min_variance"), bandit, timed=False, num_envs=6, seed=53)
    weight, bias = learner.parameters()
    probability = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    weight.data.copy_((probability.log() - bias.data).unsqueeze(-1))
    actions = [0, 0, 1, 2, 2, 2]  # that of the sixth, then each as often as it is likely
    rollout = learner.rollout(episodes(bandit, learner.policy().detach()), actions)
    returns, ones = rollout.reward, torch.ones_like(rollout.reward)
    best = learner.agent.baseline(rollout, returns, torch.zeros_like(rollout.action), ones / 6.0, ones / 6.0)[0, 0]
    scores = torch.cat([score for score, _ in learner.agent.scores(rollout)])
    square = scores.square()
    best_each = functional.others_ratio(square * returns[0].unsqueeze(-1), square)[0]

    each = torch.stack([learner.gradient(learner.policy()[0, 0, a].log()) for a in range(3)])  # [3, P]

    def variance(b: Tensor) -> Tensor:
        estimate = each * (reward[0].unsqueeze(-1) - b)
        mean = probability @ estimate
        return probability @ (estimate - mean).square()

    power = probability @ each.square()
    pairs = []
    for away in torch.linspace(-2.0, 2.0, 9, dtype=torch.float64):
        excess = power * away.square()
        pairs.append((variance(best + away).sum() - variance(best).sum(), excess.sum()))
        pairs.append((variance(best_each + away) - variance(best_each), excess))
    return equal(*pairs)


STATEMENTS = (
    Statement(
        "REINFORCE's expected step is grad J",
        "Williams 1992, theorem 2",
        "REINFORCE with discount_states over all 64 episodes",
        step_is_the_gradient,
    ),
    Statement(
        "REINFORCE on episodes in a row",
        "Williams 1992, theorem 2",
        "REINFORCE, all 64 pairs and a part of a third episode",
        episodes_in_a_row,
    ),
    Statement(
        "without gamma^t REINFORCE is biased",
        "Nota & Thomas 2020",
        "REINFORCE, the vector without gamma^t; differs",
        step_without_discount_is_biased,
    ),
    Statement(
        "a state baseline changes nothing",
        "Sutton & Barto 2018, section 13.4",
        "REINFORCE with baseline=value, any V; exact vector",
        state_baseline_leaves_the_gradient,
    ),
    Statement(
        "baselines of other envs change nothing",
        "Kool et al. 2019",
        "REINFORCE with 3 baselines, all 64 pairs of episodes",
        other_envs_baselines_leave_the_gradient,
    ),
    Statement(
        "a mean at each time shrinks by 1/n",
        "first principles",
        "REINFORCE with baseline=time, all pairs; differs",
        time_baseline_shrinks_the_gradient,
    ),
    Statement(
        "an episode's mean as baseline biases",
        "first principles",
        "REINFORCE with baseline=mean, recursion; differs",
        mean_baseline_biases_the_gradient,
    ),
    Statement(
        "b* has the least variance",
        "Greensmith et al. 2004, theorem 8",
        "variance around the library's b*, its parabola",
        best_baseline_minimises_the_variance,
    ),
)
