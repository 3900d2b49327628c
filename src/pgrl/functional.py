"""Returns, advantages and losses: pure functions of tensors.

Shapes: T steps, B environments, N samples. Time runs along the first axis. `terminated` and `truncated` are bool:
after a termination nothing follows, so nothing is bootstrapped; after a truncation more would have followed, so
`next_value`, the value of the true successor, is. Every trace is cut at both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 32  # steps up to which one operation a step is fewer than composing the maps pairwise


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """The backward recursion y_t = x_t + decay_t * y_{t+1}, with y_T = 0; both [T, ...], returns [T, ...].

    Composes the affine maps pairwise, so T steps take log2(T) rounds of whole-tensor operations on any device; a few
    steps are taken one by one.
    """
    if len(x) <= SHORT:
        rows, decays = list(x.unbind()), decay.unbind()
        for t in reversed(range(len(rows) - 1)):
            rows[t] = torch.addcmul(rows[t], decays[t], rows[t + 1])
        return torch.stack(rows)
    k = 1
    while k < len(x):
        x = torch.cat([torch.addcmul(x[:-k], decay[:-k], x[k:]), x[-k:]])
        decay = torch.cat([decay[:-k] * decay[k:], decay[-k:]])
        k *= 2
    return x


def td_error(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """The one-step residual r + gamma * V(s') * (1 - terminated) - V(s); all [T, B]."""
    return td0(reward, next_value, terminated, gamma) - value


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates, the (gamma * lam)-discounted sum of TD errors to the episode's end.

    All inputs and the result are [T, B]; `next_value` is V of the true successor, before any reset.
    Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    delta = td_error(reward, value, next_value, terminated, gamma)
    return discounted_sum(delta, gamma * lam * (~(terminated | truncated)).to(delta.dtype))


def td_lambda(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """The lambda-return: all n-step returns, weighted by (1 - lam) lam^(n - 1); all [T, B].

    G_t = r_t + gamma * ((1 - lam) * V(s_{t+1}) + lam * G_{t+1}), with V alone where an episode is cut, and nothing
    after a termination. Sutton & Barto 2018, equations 12.2 and 12.18.
    """
    goes_on = (~(terminated | truncated)).to(reward.dtype)
    goes_on[-1] = 0.0
    ahead = next_value.masked_fill(terminated, 0.0) * (1.0 - lam * goes_on)
    return discounted_sum(reward + gamma * ahead, gamma * lam * goes_on)


def monte_carlo(reward: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float) -> Tensor:
    """Discounted returns to the episode's end, bootstrapped where a truncation or the rollout cuts it; all [T, B].

    Pass zeros as `next_value` for plain sums of rewards.
    """
    done = terminated | truncated
    last = done.clone()
    last[-1] = True
    x = reward + gamma * next_value.masked_fill(terminated | ~last, 0.0)
    return discounted_sum(x, gamma * (~done).to(x.dtype))


def n_step(reward: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, n: int) -> Tensor:
    """Returns over at most n rewards and then V; shorter where the episode or the rollout ends; all [T, B].

    Sutton & Barto 2018, equation 7.1. n = 1 is the TD(0) target.
    """
    done = terminated | truncated
    one = td0(reward, next_value, terminated, gamma)
    returns = one
    for _ in range(min(n, len(reward)) - 1):
        longer = torch.where(done[:-1], one[:-1], reward[:-1] + gamma * returns[1:])
        returns = torch.cat([longer, one[-1:]])
    return returns


def td0(reward: Tensor, next_value: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """The one-step target r + gamma * V(s') * (1 - terminated); all [T, B]."""
    return reward + gamma * next_value.masked_fill(terminated, 0.0)


def complete_episodes(terminated: Tensor, truncated: Tensor) -> tuple[Tensor, int]:
    """Which steps belong to episodes that end within the rollout, bool [T, B], and how many such episodes there are."""
    done = terminated | truncated
    ends_left = done.flip(0).cumsum(0).flip(0)
    return ends_left > 0, int(ends_left[0].sum())


def episode_age(terminated: Tensor, truncated: Tensor, first: Tensor) -> Tensor:
    """Steps since the beginning of the episode, [T + 1, B] int64: of each step, and of that after the last.

    `first` [B] is the age of the first step; the flags are [T, B].
    """
    t = torch.arange(len(terminated) + 1, device=terminated.device).unsqueeze(1)
    begins = torch.where(terminated | truncated, t[1:], -(2**62))  # the step after an end begins an episode
    return t - torch.cat([-first.unsqueeze(0), begins]).cummax(0).values


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * x) / sum(weight), as a tensor of x's shape."""
    return ((weight * x).sum() / weight.sum()).expand_as(x)


def others_ratio(x: Tensor, y: Tensor) -> Tensor:
    """The sum of x over the other rows by that of y, for each row; both [B, ...], y >= 0, and 0 where y's sum is 0.

    A row is left out, not taken off the sum of all: where it is by far the largest the difference would be rounding.
    """
    others = 1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    x, y = (torch.tensordot(others, part, 1) for part in (x, y))
    return (x / y).where(y > 0, 0.0)


def leave_one_out_mean(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of x over the other envs, for each env; all [T, B].

    As a baseline it leaves the expected gradient as it is, for it does not depend on an env's own actions. With weights
    |grad log pi|^2 it estimates the constant baseline of least variance, E[|grad log pi|^2 G] / E[|grad log pi|^2]:
    Weaver & Tao 2001, theorem 1; Greensmith et al. 2004, theorem 8.
    """
    return others_ratio((weight * x).sum(0), weight.sum(0)).expand_as(x)


def mean_by_age(x: Tensor, weight: Tensor, age: Tensor) -> Tensor:
    """The weighted mean of x over the entries of the same age; all [T, B], age int64."""
    flat = age.flatten()
    sums = x.new_zeros(2, int(flat.max()) + 1)
    sums.index_add_(1, flat, torch.stack([(weight * x).flatten(), weight.flatten()]))
    mean = (sums[0] / sums[1]).where(sums[1] > 0, 0.0)
    return mean[flat].view_as(x)


ADVANTAGES = ("gae", "td_lambda", "n_step", "td0", "monte_carlo")


def advantage(
    kind: str,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
    n: int,
) -> Tensor:
    """The advantage estimate named `kind`, one of ADVANTAGES; all [T, B].

    `gae` and `td_lambda` are one estimator, written as a sum of TD errors and as G^lambda - V. `lam` is used by these
    alone, `n` by `n_step`.
    """
    match kind:
        case "gae":
            return gae(reward, value, next_value, terminated, truncated, gamma, lam)
        case "td_lambda":
            return td_lambda(reward, value, next_value, terminated, truncated, gamma, lam) - value
        case "n_step":
            return n_step(reward, next_value, terminated, truncated, gamma, n) - value
        case "td0":
            return td_error(reward, value, next_value, terminated, gamma)
        case "monte_carlo":
            return monte_carlo(reward, next_value, terminated, truncated, gamma) - value
    raise ValueError(f"advantage={kind!r}: choose one of {', '.join(ADVANTAGES)}")


def normalise(x: Tensor, dim: int | None = None, eps: float = 1e-8) -> Tensor:
    """x shifted to mean 0 and scaled to standard deviation 1 along `dim`, or over all its entries; at least 2 each."""
    std, mean = torch.std_mean(x, dim, keepdim=True)
    return (x - mean) / (std + eps)


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """-E[log pi(a|s) A]; both [N]. Its gradient is the policy gradient: Sutton et al. 2000, theorem 1."""
    return -(log_prob * advantage).mean()


def ppo_loss(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """The unclipped surrogate -E[ratio * A]; both [N]. Schulman et al. 2017 (arXiv 1707.06347), equation 6."""
    return -(log_ratio.exp() * advantage).mean()


def ppo_clip_loss(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: Tensor,
    clip_high: Tensor | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate -E[min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)]; both [N], clips [].

    Schulman et al. 2017 (arXiv 1707.06347), equation 7. The ratio counts up to 1 + clip_high where A >= 0 and down to
    1 - clip_low where A < 0, so the clipped objective is A + clip |A|, with `clip_high` None for one range on both
    sides. With `dual_clip` c > 1 the objective of a negative advantage is bounded below by c * A: Ye et al. 2020
    (arXiv 1912.09729), equation 5.
    """
    clip = clip_low if clip_high is None else torch.where(advantage >= 0, clip_high, clip_low)
    objective = torch.minimum(log_ratio.exp() * advantage, advantage + clip * advantage.abs())
    if dual_clip is not None:
        objective = torch.maximum(objective, (dual_clip * advantage).where(advantage < 0, -math.inf))
    return -objective.mean()


def approx_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from samples of old: E[(ratio - 1) - log ratio] >= 0, unbiased, as is its gradient; [N] -> [].

    Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html, 2020), estimator k3.
    """
    return (log_ratio.expm1() - log_ratio).mean()


def clip_fraction(log_ratio: Tensor, clip_low: float | Tensor, clip_high: float | Tensor) -> Tensor:
    """The share of samples whose ratio lies outside [1 - clip_low, 1 + clip_high]; [N] -> []."""
    change = log_ratio.expm1()
    return ((change < -clip_low) | (change > clip_high)).to(log_ratio.dtype).mean()


def value_loss(value: Tensor, returns: Tensor) -> Tensor:
    """Half the mean squared error, so that its gradient is the mean error; both [N]."""
    return 0.5 * F.mse_loss(value, returns)


def clipped_value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the mean of the larger squared error of `value` and of `value` kept within `clip` of `old_value`; all [N].

    Engstrom et al. 2020 (arXiv 2005.12729), section 3, option 1.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (near - returns).square()).mean()


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 - Var[returns - value] / Var[returns]: 1 is perfect, 0 is no better than a constant; any equal shapes -> []."""
    return 1.0 - (returns - value).var(correction=0) / (returns.var(correction=0) + 1e-8)


def q_loss(q: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum over critics of half the mean squared error, weighted or not: q [K, N], target and weight [N] -> [].

    Haarnoja et al. 2018 (arXiv 1812.05905), equation 5; weights of prioritised replay: Schaul et al. 2016 (1511.05952).
    """
    if weight is None:
        return 0.5 * len(q) * F.mse_loss(q, target.expand_as(q))
    return 0.5 * (weight * (q - target).square()).mean(-1).sum()


def soft_value(q: Tensor, log_pi: Tensor, alpha: Tensor | float) -> Tensor:
    """E_{a ~ pi}[Q(s, a) - alpha log pi(a|s)] [N], of all K actions: q and log_pi [N, K], alpha the worth of a nat.

    Haarnoja et al. 2018 (arXiv 1801.01290), equation 3; for discrete actions Christodoulou 2019 (arXiv 1910.07207),
    equation 10.
    """
    return (log_pi.exp() * (q - alpha * log_pi)).sum(-1)
