"""Statements on the gradients that train: what an update does in expectation, over every episode there is."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl import functional
from pgrl.agents import A2CConfig, PPOConfig
from pgrl.data import Transition
from pgrl.theory.check import Check, Statement, differs, equal
from pgrl.theory.learners import Learner, ascent, build, expected_ascent, make
from pgrl.theory.mdp import discounts, episodes, lambda_values, objective, random_mdp, score_weighted, values
from pgrl.theory.scores import hermite

CLIPS: tuple[dict[str, Any], ...] = (
    {"clip_coef": None},
    {"clip_coef": 0.2},
    {"clip_coef": 0.2, "clip_coef_high": 0.3},
    {"clip_coef": 0.2, "dual_clip": 3.0},
    {"clip_coef": 0.2, "kl_coef": 1.0, "num_minibatches": 3},
)

ESTIMATORS: tuple[dict[str, Any], ...] = (
    {"advantage": "gae", "gae_lambda": 0.0},
    {"advantage": "gae", "gae_lambda": 0.5},
    {"advantage": "gae", "gae_lambda": 0.95},
    {"advantage": "gae", "gae_lambda": 1.0},
    {"advantage": "td_lambda", "gae_lambda": 0.5},
    {"advantage": "td0"},
    {"advantage": "n_step", "n_step": 2},
)


def actor_critic(gamma: float, *, first: int | None = None, **keys: Any) -> Learner:
    """A2C without an entropy bonus in an MDP of 2 states, 2 actions and 3 steps."""
    return make(A2CConfig(ent_coef=0.0, **keys), random_mdp(2, 2, 3, gamma, seed=40, first=first), seed=41)


def any_critic(learner: Learner) -> Tensor:
    """A random V [H + 1, S]."""
    shape = (learner.mdp.horizon + 1, len(learner.mdp.start))
    return torch.randn(shape, generator=Generator().manual_seed(42), dtype=torch.float64)


def exact_step(learner: Learner, q: Tensor | None = None, *, discounted: bool = False) -> Tensor:
    """(1/H) sum_t w_t E[grad log pi(a_t | s_t) q_t] [P], w_t = gamma^t if discounted, else 1; q is Q if not given."""
    policy = learner.policy()
    weight = discounts(learner.mdp) if discounted else torch.ones_like(discounts(learner.mdp))
    q = values(learner.mdp, policy.detach()).q if q is None else q
    return learner.gradient(score_weighted(learner.mdp, policy, q, weight)) / learner.mdp.horizon


def expected(learner: Learner) -> Tensor:
    """The expected step [P] of the learner's update over all episodes."""
    return expected_ascent(learner, episodes(learner.mdp, learner.policy().detach()))


def policy_gradient_theorem() -> Check:
    """grad J = sum_t gamma^t E[grad log pi Q]: of the exact J, by automatic differentiation through its recursion."""
    learner = actor_critic(0.9)
    slope = learner.gradient(objective(learner.mdp, learner.policy()))
    return equal((exact_step(learner, discounted=True) * learner.mdp.horizon, slope))


def a2c_is_the_policy_gradient() -> Check:
    """gamma = 1: A2C's expected step with any critic is grad J / H, for its loss is a mean over the H steps."""
    learner = actor_critic(1.0, advantage="monte_carlo")
    learner.set_critic(any_critic(learner))
    return equal((expected(learner), learner.gradient(objective(learner.mdp, learner.policy())) / 3.0))


def a2c_leaves_out_the_discount() -> Check:
    """gamma < 1: without gamma^t on the states, so A2C's expected step is not grad J / H; the gap is as predicted."""
    learner = actor_critic(0.6, advantage="monte_carlo")
    learner.set_critic(any_critic(learner))
    slope = learner.gradient(objective(learner.mdp, learner.policy())) / 3.0
    return differs(expected(learner), exact_step(learner), slope)


def every_lambda_is_exact() -> Check:
    """With the true V: gae and td_lambda with any lambda, td0 and n_step have one and the same expected step."""
    pairs = []
    for keys in ESTIMATORS:
        learner = actor_critic(0.9, first=0, **keys)
        v = values(learner.mdp, learner.policy().detach()).v
        learner.set_critic(torch.cat([v[:-1], any_critic(learner)[-1:]]))  # what it says of the end must not matter
        pairs.append((expected(learner), exact_step(learner)))
    return equal(*pairs)


def a_wrong_critic_biases() -> Check:
    """With another V and lambda < 1 the expected step is off, by what the expected lambda-returns say."""
    learner = actor_critic(0.9, advantage="gae", gae_lambda=0.5)
    critic = 10.0 * any_critic(learner)
    learner.set_critic(critic)
    q = lambda_values(learner.mdp, learner.policy().detach(), critic, 0.5).q
    return differs(expected(learner), exact_step(learner, q), exact_step(learner))


def ppo_begins_with_the_policy_gradient() -> Check:
    """At ratio 1 the clipped surrogate of every form has the gradient of the policy: PPO's and A2C's steps agree."""
    mdp = random_mdp(2, 2, 3, 0.9, seed=40, first=0)
    pairs = []
    for keys in CLIPS:
        config = PPOConfig(update_epochs=1, norm_adv=None, vf_clip_coef=None, gae_lambda=1.0)
        config.num_minibatches = 1
        for key, value in keys.items():
            setattr(config, key, value)
        learner = make(config, mdp, seed=41)
        learner.set_critic(any_critic(learner))
        pairs.append((expected(learner) / config.num_minibatches, exact_step(learner)))
    return equal(*pairs)


def gaussian_steps_follow_the_gradient() -> Check:
    """With one state and the reward -(a - 1)^2, J = -(mean - 1)^2 - std^2: its slopes, and A2C's and PPO's steps.

    The actions are those of a Gauss-Hermite quadrature, exact for the fourth powers that occur.
    """
    pairs = []
    never, seen = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.float64)
    z, weight = hermite(1, 3)
    for config in (A2CConfig(ent_coef=0.0), PPOConfig(update_epochs=1, num_minibatches=1, norm_adv=None)):
        config.num_steps = 1
        agent = build(config, 1, spaces.Box(-np.inf, np.inf, (1,), np.float32), 1, seed=43)
        slope, bias, log_std = (p.detach() for p in agent.net.policy_parameters())
        mean, std = slope[0] + bias, log_std.exp()
        expected = torch.zeros(3, dtype=torch.float64)
        for x, w in zip(z, weight, strict=True):
            action = (mean + std * x).view(1, 1, 1)
            reward = -(action - 1.0).square().squeeze(-1)
            expected += w * ascent(agent, Transition(seen, action, reward, seen, ~never, never))
        pairs.append((expected, torch.cat([-2.0 * (mean - 1.0), -2.0 * (mean - 1.0), -2.0 * std.square()])))
    return equal(*pairs)


def clip_stops_the_gradient() -> Check:
    """The gradient of a sample is -A ratio, and 0 exactly where A > 0, ratio > 1 + high or A < 0, ratio < 1 - low.

    With the dual clip also where A < 0 and ratio > c. A grid of ratios on both sides of every bound, and three A.
    """
    low, high, dual = 0.2, 0.3, 3.0
    ratios = torch.tensor([0.05, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.29, 1.31, 2.9, 3.1, 20.0], dtype=torch.float64)
    ratio, advantage = torch.cartesian_prod(ratios, torch.tensor([-1.5, 0.0, 0.7], dtype=torch.float64)).unbind(-1)
    log_ratio = ratio.log().requires_grad_()
    clips = torch.tensor([low, high], dtype=torch.float64)
    pairs = []
    for up, args in ((low, (clips[0],)), (high, (clips[0], clips[1])), (high, (clips[0], clips[1], dual))):
        loss = functional.ppo_clip_loss(log_ratio, advantage, *args) * len(ratio)
        stopped = (advantage > 0) & (ratio > 1.0 + up) | (advantage < 0) & (ratio < 1.0 - low)
        if len(args) == 3:
            stopped |= (advantage < 0) & (ratio > dual)
        slope = grad(loss, log_ratio)[0]
        pairs.append((slope, torch.where(stopped, 0.0, -advantage * ratio)))
        pairs.append((slope[stopped] * 1e300, torch.zeros_like(slope[stopped])))  # not merely small
    return equal(*pairs)


STATEMENTS = (
    Statement(
        "policy-gradient theorem",
        "Sutton et al. 2000, theorem 1",
        "sum_t gamma^t E[grad log pi Q] and autograd of J",
        policy_gradient_theorem,
    ),
    Statement(
        "A2C's expected step is grad J / H",
        "Mnih et al. 2016, algorithm S3",
        "A2C's update over all 64 episodes, any V, gamma = 1",
        a2c_is_the_policy_gradient,
    ),
    Statement(
        "A2C with gamma < 1 is not grad J",
        "Nota & Thomas 2020",
        "A2C's update, the vector without gamma^t; differs",
        a2c_leaves_out_the_discount,
    ),
    Statement(
        "true V: every lambda is exact",
        "Schulman et al. 2016, prop. 1",
        "A2C's update with 7 estimators and the exact vector",
        every_lambda_is_exact,
    ),
    Statement(
        "wrong V: lambda < 1 is biased",
        "Schulman et al. 2016, section 3",
        "A2C's update, exact lambda-returns; differs",
        a_wrong_critic_biases,
    ),
    Statement(
        "PPO at ratio 1: the policy gradient",
        "Schulman et al. 2017, eq. 7",
        "PPO's update with 5 clips and the exact vector",
        ppo_begins_with_the_policy_gradient,
    ),
    Statement(
        "Gaussian steps follow the gradient",
        "Sutton & Barto 2018, section 13.7",
        "A2C's and PPO's updates by quadrature, closed forms",
        gaussian_steps_follow_the_gradient,
    ),
    Statement(
        "PPO's clip stops the gradient",
        "Schulman et al. 2017, fig. 1",
        "slope of ppo_clip_loss at 36 points, 3 clips",
        clip_stops_the_gradient,
    ),
)
