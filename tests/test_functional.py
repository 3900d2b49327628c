"""Every estimator and loss against its definition, written here a second time as plain loops over floats."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pgrl import functional as F

DISCOUNTS = [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0), (0.0, 0.9), (1.0, 0.3)]


class Case(NamedTuple):
    """The inputs of an estimator, [T, B] in float64; `next_value` has nothing to do with the next row's `value`."""

    reward: Tensor
    value: Tensor
    next_value: Tensor
    terminated: Tensor
    truncated: Tensor


def numbers(seed: int, terminated: Tensor, truncated: Tensor) -> Case:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(3, *terminated.shape, generator=generator, dtype=torch.float64)
    return Case(*draws.unbind(), terminated, truncated)


def every_pattern(num_steps: int) -> Case:
    """One column for each way in which the steps can go on, terminate, be truncated, or both at once."""
    ends = torch.tensor(list(itertools.product(range(4), repeat=num_steps))).T
    return numbers(num_steps, ends % 2 == 1, ends >= 2)


def random_pattern(num_steps: int, num_envs: int, p: float) -> Case:
    generator = torch.Generator().manual_seed(num_steps)
    ends = torch.rand(2, num_steps, num_envs, generator=generator) < p
    return numbers(num_steps + 1, *ends.unbind())


CASES = {f"every pattern of {t}": every_pattern(t) for t in (1, 2, 3, 4)}
CASES |= {f"random {t}x{b}, p={p}": random_pattern(t, b, p) for t, b, p in [(37, 5, 0.1), (64, 3, 0.02), (100, 2, 0.0)]}
CASES["all end at once"] = random_pattern(5, 2, 1.1)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


class Column(NamedTuple):
    """One environment's T steps as plain numbers."""

    reward: list[float]
    value: list[float]
    next_value: list[float]
    terminated: list[bool]
    truncated: list[bool]

    def horizon(self, t: int) -> int:
        """The number of rewards from t until the episode or the rollout is over."""
        for k in range(t, len(self.reward)):
            if self.terminated[k] or self.truncated[k]:
                return k - t + 1
        return len(self.reward) - t

    def after(self, t: int) -> float:
        """What is still to be expected after step t."""
        return 0.0 if self.terminated[t] else self.next_value[t]


def consistent(case: Case) -> Case:
    """The case with the next row's value as `next_value` wherever no episode ends, as one value function has it."""
    next_value = torch.cat([case.value[1:], case.next_value[-1:]])
    return case._replace(next_value=torch.where(case.terminated | case.truncated, case.next_value, next_value))


def columns(case: Case) -> list[Column]:
    return [Column(*(x[:, b].tolist() for x in case)) for b in range(case.reward.shape[1])]


def by_definition(case: Case, formula: Callable[[Column, int], float]) -> Tensor:
    return torch.tensor(
        [[formula(column, t) for t in range(len(column.reward))] for column in columns(case)], dtype=torch.float64
    ).T


def n_step_return(column: Column, t: int, n: int, gamma: float) -> float:
    """G_{t:t+n} of Sutton & Barto, equation 7.1: up to n rewards, and then the value of what follows the last."""
    n = min(n, column.horizon(t))
    rewards = sum(gamma**k * column.reward[t + k] for k in range(n))
    return rewards + gamma**n * column.after(t + n - 1)


def lambda_return(column: Column, t: int, gamma: float, lam: float) -> float:
    """G_t^lambda of Sutton & Barto, equation 12.3: the n-step returns weighted by (1 - lambda) lambda^(n - 1)."""
    h = column.horizon(t)
    inner = sum((1 - lam) * lam ** (n - 1) * n_step_return(column, t, n, gamma) for n in range(1, h))
    return inner + lam ** (h - 1) * n_step_return(column, t, h, gamma)


def gae_sum(column: Column, t: int, gamma: float, lam: float) -> float:
    """Equation 16 of Schulman et al. 2016: the sum of (gamma lambda)^l delta_{t+l} until the episode is cut."""
    return sum(
        (gamma * lam) ** k * (column.reward[t + k] + gamma * column.after(t + k) - column.value[t + k])
        for k in range(column.horizon(t))
    )


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_is_the_discounted_sum_of_td_errors(case: Case, gamma: float, lam: float) -> None:
    close(F.gae(*case, gamma, lam), by_definition(case, lambda c, t: gae_sum(c, t, gamma, lam)))


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_td_lambda_is_the_weighted_mean_of_n_step_returns(case: Case, gamma: float, lam: float) -> None:
    case = consistent(case)
    expected = by_definition(case, lambda c, t: lambda_return(c, t, gamma, lam))
    close(F.td_lambda(*case, gamma, lam), expected)
    close(F.gae(*case, gamma, lam), expected - case.value)


@pytest.mark.parametrize("gamma", [0.99, 0.5, 1.0, 0.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000])
def test_n_step_returns(case: Case, gamma: float, n: int) -> None:
    actual = F.n_step(case.reward, case.next_value, case.terminated, case.truncated, gamma, n)
    close(actual, by_definition(case, lambda c, t: n_step_return(c, t, n, gamma)))


@pytest.mark.parametrize("gamma", [0.99, 0.5, 1.0, 0.0])
def test_monte_carlo_returns(case: Case, gamma: float) -> None:
    actual = F.monte_carlo(case.reward, case.next_value, case.terminated, case.truncated, gamma)
    close(actual, by_definition(case, lambda c, t: n_step_return(c, t, c.horizon(t), gamma)))


def test_monte_carlo_without_values_is_the_sum_of_rewards() -> None:
    case = every_pattern(4)
    actual = F.monte_carlo(case.reward, torch.zeros_like(case.reward), case.terminated, case.truncated, 0.9)
    close(actual, by_definition(case, lambda c, t: sum(0.9**k * c.reward[t + k] for k in range(c.horizon(t)))))


@pytest.mark.parametrize("gamma", [0.99, 1.0, 0.0])
def test_one_step_targets(case: Case, gamma: float) -> None:
    expected = by_definition(case, lambda c, t: c.reward[t] + gamma * c.after(t))
    close(F.td0(case.reward, case.next_value, case.terminated, gamma), expected)
    close(F.td_error(case.reward, case.value, case.next_value, case.terminated, gamma), expected - case.value)


def test_limits_of_lambda_and_n(case: Case) -> None:
    case = consistent(case)
    ends = case.reward, case.next_value, case.terminated, case.truncated
    monte_carlo = F.monte_carlo(*ends, 0.9)
    td0 = F.td0(case.reward, case.next_value, case.terminated, 0.9)
    close(F.td_lambda(*case, 0.9, 1.0), monte_carlo)
    close(F.td_lambda(*case, 0.9, 0.0), td0)
    close(F.n_step(*ends, 0.9, 1), td0)
    close(F.n_step(*ends, 0.9, len(case.reward)), monte_carlo)


def test_gae_hand_computed() -> None:
    """Two steps, then a time limit, then one more: gamma = lambda = 1/2, so the trace decays by 1/4."""
    column = Case(
        reward=torch.tensor([[1.0], [2.0], [4.0]]),
        value=torch.tensor([[0.0], [1.0], [2.0]]),
        next_value=torch.tensor([[1.0], [6.0], [10.0]]),  # 6 is the true successor's, not the next row's 2
        terminated=torch.tensor([[False], [False], [True]]),
        truncated=torch.tensor([[False], [True], [False]]),
    )
    # delta: 1 + 0.5 - 0 = 1.5; 2 + 3 - 1 = 4; 4 + 0 - 2 = 2
    close(F.gae(*column, 0.5, 0.5), torch.tensor([[1.5 + 0.25 * 4.0], [4.0], [2.0]]))


def test_nothing_crosses_the_end_of_an_episode() -> None:
    """Whatever follows a termination or a truncation leaves what came before untouched, bit for bit."""
    case = random_pattern(40, 4, 0.15)
    done = case.terminated | case.truncated
    first = done.long().argmax(0)
    later = torch.arange(40).unsqueeze(1) > first
    other = case._replace(
        reward=case.reward.masked_fill(later, 1e3), value=case.value.masked_fill(later, -1e3),
        next_value=case.next_value.masked_fill(later, 7e3),
    )  # fmt: skip
    assert done.any(0).all() and later.any(0).all()
    for kind in F.ADVANTAGES:
        before, after = (F.advantage(kind, *c, 0.99, 0.9, 7) for c in (case, other))
        assert torch.equal(before[~later], after[~later]), kind
        assert not torch.equal(before[later], after[later]), kind


def test_values_after_a_termination_are_never_read() -> None:
    case = every_pattern(4)
    poisoned = case._replace(next_value=case.next_value.masked_fill(case.terminated, math.nan))
    for kind in F.ADVANTAGES:
        assert torch.equal(F.advantage(kind, *case, 0.9, 0.8, 3), F.advantage(kind, *poisoned, 0.9, 0.8, 3)), kind


def test_truncation_is_not_termination() -> None:
    case = random_pattern(20, 3, 0.0)
    end = torch.zeros(20, 3, dtype=torch.bool)
    end[9] = True
    for kind in F.ADVANTAGES:
        dead = F.advantage(kind, *case._replace(terminated=end), 0.9, 0.8, 3)
        cut = F.advantage(kind, *case._replace(truncated=end), 0.9, 0.8, 3)
        assert not torch.allclose(dead[9], cut[9]), kind
        assert torch.equal(dead[10:], cut[10:]), kind


def test_long_rollouts_in_single_precision() -> None:
    case = random_pattern(2048, 2, 0.003)
    single = Case(*(x.float() if x.is_floating_point() else x for x in case))
    expected = F.gae(*case, 0.99, 0.95)
    close(expected, by_definition(case, lambda c, t: gae_sum(c, t, 0.99, 0.95)))
    torch.testing.assert_close(F.gae(*single, 0.99, 0.95).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_discounted_sum_is_its_recursion(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x, decay = torch.randn(2, length, 3, 2, generator=generator, dtype=torch.float64).unbind()
    untouched = x.clone(), decay.clone()
    expected, y = [], torch.zeros(3, 2, dtype=torch.float64)
    for t in reversed(range(length)):
        y = x[t] + decay[t] * y
        expected.append(y)
    close(F.discounted_sum(x, decay), torch.stack(expected[::-1]))
    assert torch.equal(x, untouched[0]) and torch.equal(decay, untouched[1])


def test_discounted_sum_gradient() -> None:
    x, decay = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.autograd.gradcheck(F.discounted_sum, (x.requires_grad_(), decay.requires_grad_()))


def test_advantage_names_its_estimators() -> None:
    case = every_pattern(3)
    ends = case.reward, case.next_value, case.terminated, case.truncated
    expected = {
        "gae": F.gae(*case, 0.9, 0.7),
        "td_lambda": F.td_lambda(*case, 0.9, 0.7) - case.value,
        "n_step": F.n_step(*ends, 0.9, 2) - case.value,
        "td0": F.td0(case.reward, case.next_value, case.terminated, 0.9) - case.value,
        "monte_carlo": F.monte_carlo(*ends, 0.9) - case.value,
    }
    assert set(expected) == set(F.ADVANTAGES)
    for kind, advantage in expected.items():
        close(F.advantage(kind, *case, 0.9, 0.7, 2), advantage)
    with pytest.raises(ValueError, match="advantage='gea': choose one of gae"):
        F.advantage("gea", *case, 0.9, 0.7, 2)


def test_normalise() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30 + 700
    y = F.normalise(x)
    close(y, (x - x.mean()) / (np.std(x.numpy(), ddof=1) + 1e-8))
    assert y.shape == x.shape and abs(y.mean()) < 1e-10
    assert torch.equal(F.normalise(torch.full((4,), 3.0)), torch.zeros(4))


# --- losses ---


def grad(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def test_policy_gradient_loss() -> None:
    log_prob, advantage = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, -1.0, 4.0])
    close(F.policy_gradient_loss(log_prob, advantage), torch.tensor(-(-2.0 + 2.0 - 12.0) / 3))
    close(grad(lambda x: F.policy_gradient_loss(x, advantage), log_prob), -advantage / 3)


def test_unclipped_surrogate() -> None:
    log_ratio, advantage = torch.tensor([2.0, 0.5, 1.0]).log(), torch.tensor([1.0, -4.0, 6.0])
    close(F.ppo_loss(log_ratio, advantage), torch.tensor(-(2.0 - 2.0 + 6.0) / 3))
    # where the policies agree, its gradient is the policy gradient
    zero = torch.zeros(3)
    close(grad(lambda x: F.ppo_loss(x, advantage), zero), grad(lambda x: F.policy_gradient_loss(x, advantage), zero))


# ratio, advantage, and by hand: the objective and its derivative by the log ratio; clip_low = 0.2, clip_high = 0.4
CLIPPED = [
    (1.0, 2.0, 2.0, 2.0),
    (1.3, 2.0, 2.6, 2.6),  # inside the wider upper side
    (1.5, 2.0, 2.8, 0.0),  # too far up and good: no more
    (0.5, 2.0, 1.0, 1.0),  # below and good: back up
    (0.9, -2.0, -1.8, -1.8),
    (0.5, -2.0, -1.6, 0.0),  # too far down and bad: no more
    (3.0, -2.0, -6.0, -6.0),  # above and bad: back down, however far
    (1.5, 0.0, 0.0, 0.0),
]


def test_clipped_surrogate() -> None:
    ratio, advantage, objective, slope = torch.tensor(CLIPPED, dtype=torch.float64).unbind(1)
    low, high = torch.tensor([0.2, 0.4], dtype=torch.float64)

    def loss(log_ratio: Tensor) -> Tensor:
        return F.ppo_clip_loss(log_ratio, advantage, low, high)

    close(loss(ratio.log()), -objective.mean())
    gradient = grad(loss, ratio.log())
    close(gradient, -slope / len(slope))
    assert torch.equal(gradient == 0, slope == 0)  # exactly


def test_clipped_surrogate_on_a_grid() -> None:
    """Every ratio, advantage and pair of ranges, one sample at a time, against min(r A, clip(r) A)."""
    for r, a, low, high, dual in itertools.product(
        np.linspace(0.05, 4.0, 23), [-2.5, -1.0, 0.0, 0.5, 3.0], [0.1, 0.2], [0.1, 0.28], [None, 1.5, 3.0]
    ):
        clip = min(max(r, 1 - low), 1 + high)
        objective, active = min((r * a, 0), (clip * a, 1))[0], r * a <= clip * a
        if dual is not None and a < 0 and objective < dual * a:
            objective, active = dual * a, False
        ratio, advantage, expected, slope, *clips = torch.tensor(
            [r, a, -objective, -r * a if active else 0.0, low, high], dtype=torch.float64
        ).split(1)
        loss = partial(F.ppo_clip_loss, advantage=advantage, clip_low=clips[0], clip_high=clips[1], dual_clip=dual)
        close(loss(ratio.log()), expected.squeeze())
        close(grad(loss, ratio.log()), slope)


def test_dual_clip() -> None:
    log_ratio = torch.tensor([5.0, 2.0, 5.0]).log()
    advantage = torch.tensor([-1.0, -1.0, 1.0])

    def loss(x: Tensor) -> Tensor:
        return F.ppo_clip_loss(x, advantage, torch.tensor(0.2), dual_clip=3.0)

    close(loss(log_ratio), torch.tensor(-(-3.0 - 2.0 + 1.2) / 3))
    assert (grad(loss, log_ratio) == 0).tolist() == [True, False, True]


def test_approx_kl() -> None:
    log_ratio = torch.tensor([2.0, 1.0, 0.5]).log()
    expected = ((1 - math.log(2)) + 0 + (-0.5 + math.log(2))) / 3
    close(F.approx_kl(log_ratio), torch.tensor(expected))
    assert F.approx_kl(torch.zeros(5)) == 0


def test_approx_kl_and_its_gradient_are_unbiased() -> None:
    """Over four equally likely samples of old = (1/4, 1/2, 1/4) the mean is the expectation."""
    samples, old = torch.tensor([0, 1, 1, 2]), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)

    def estimate(x: Tensor) -> Tensor:
        return F.approx_kl(x.log_softmax(-1)[samples] - old.log()[samples])

    def exact(x: Tensor) -> Tensor:
        return (old * (old.log() - x.log_softmax(-1))).sum()

    close(estimate(logits), exact(logits))
    close(grad(estimate, logits), grad(exact, logits))


def test_approx_kl_is_accurate_for_small_steps() -> None:
    """Of a ratio e^x the estimate is x^2 / 2 to first order, which (e^x - 1) - x in single precision must not lose."""
    x = torch.full((8,), 1e-3)
    torch.testing.assert_close(F.approx_kl(x), torch.tensor(0.5e-6), rtol=2e-3, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_clip_fraction(as_tensor: bool) -> None:
    log_ratio = torch.tensor([0.5, 0.85, 1.0, 1.15, 1.3, 2.0, 9.0, 0.79]).log()
    low, high = (torch.tensor(c) if as_tensor else c for c in (0.2, 0.4))
    assert F.clip_fraction(log_ratio, low, high) == 4 / 8
    assert F.clip_fraction(log_ratio, math.inf, math.inf) == 0


def test_value_loss() -> None:
    value, returns = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 3.0])
    close(F.value_loss(value, returns), torch.tensor((4.0 + 1.0) / 4))
    close(grad(lambda x: F.value_loss(x, returns), value), (value - returns) / 2)


# value, old value, return, and by hand: the squared error that counts and its half's derivative by the value; clip 0.2
VALUE_CLIPPED = [
    (0.1, 0.0, 1.0, 0.81, -0.9),  # near the old value: nothing is clipped
    (0.5, 0.0, 1.0, 0.64, 0.0),  # further than allowed towards the target: no more
    (-1.0, 0.0, 1.0, 4.0, -2.0),  # away from the target: the larger error, which still pulls back
    (3.0, 0.0, 1.0, 4.0, 2.0),  # past the target by more than the clipped value falls short of it
    (2.5, 2.6, 2.5, 0.0, 0.0),
]


def test_clipped_value_loss() -> None:
    value, old, returns, squared, slope = torch.tensor(VALUE_CLIPPED, dtype=torch.float64).unbind(1)
    close(F.clipped_value_loss(value, old, returns, 0.2), 0.5 * squared.mean())
    gradient = grad(lambda x: F.clipped_value_loss(x, old, returns, 0.2), value)
    close(gradient, slope / len(slope))


def test_clipped_value_loss_takes_the_larger_error() -> None:
    generator = torch.Generator().manual_seed(3)
    value, old, returns = torch.randn(3, 500, generator=generator, dtype=torch.float64).unbind()
    expected = 0.0
    for v, o, g in zip(value.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = min(max(v, o - 0.3), o + 0.3)
        expected += 0.5 * max((v - g) ** 2, (near - g) ** 2) / 500
    assert math.isclose(F.clipped_value_loss(value, old, returns, 0.3).item(), expected)
    assert F.clipped_value_loss(value, old, returns, 0.3) >= F.value_loss(value, returns)


def test_explained_variance() -> None:
    returns = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    value = returns + torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = 1 - np.var((returns - value).numpy()) / np.var(returns.numpy())
    torch.testing.assert_close(F.explained_variance(value, returns).item(), expected, rtol=1e-6, atol=0)
    assert F.explained_variance(returns, returns) == 1
    assert F.explained_variance(returns + 3, returns) == pytest.approx(1)  # a constant error is not variance
    assert F.explained_variance(torch.zeros_like(returns), returns) == pytest.approx(0, abs=1e-6)
    assert F.explained_variance(-returns, returns) == pytest.approx(-3, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1)])
def test_explained_variance_of_constant_returns_is_finite(shape: tuple[int, int]) -> None:
    assert F.explained_variance(torch.ones(shape), torch.full(shape, 2.0)).isfinite()


# --- what REINFORCE makes of a rollout ---


def ends(num_steps: int, num_envs: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, num_steps, num_envs, generator=random) < 0.15
    return draws[0], draws[1]


@pytest.mark.parametrize("seed", range(5))
def test_episodes_are_counted_and_aged(seed: int) -> None:
    terminated, truncated = ends(20, 3, seed)
    first = torch.tensor([0, 4, 9])
    age = F.episode_age(terminated, truncated, first)
    complete, episodes = F.complete_episodes(terminated, truncated)
    done = terminated | truncated
    assert episodes == done.sum() and age.shape == (21, 3)
    for b in range(3):
        now = int(first[b])
        for t in range(20):
            assert age[t, b] == now and complete[t, b] == done[t:, b].any()
            now = 0 if done[t, b] else now + 1
        assert age[20, b] == now


def test_batch_baselines_are_weighted_means() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 3, generator=random), torch.rand(7, 3, generator=random)
    age = torch.randint(4, (7, 3), generator=random)
    weight[2] = 0.0
    mean, others, by_age = F.weighted_mean(x, weight), F.leave_one_out_mean(x, weight), F.mean_by_age(x, weight, age)
    for t in range(7):
        for b in range(3):
            rest = [c for c in range(3) if c != b]
            same = age == age[t, b]
            torch.testing.assert_close(mean[t, b], (x * weight).sum() / weight.sum())
            torch.testing.assert_close(others[t, b], (x * weight)[:, rest].sum() / weight[:, rest].sum())
            torch.testing.assert_close(by_age[t, b], (x * weight)[same].sum() / weight[same].sum())
    nothing = torch.zeros(7, 3)
    assert not F.leave_one_out_mean(x, nothing).any() and not F.mean_by_age(x, nothing, age).any()


def test_others_are_not_what_is_left_of_a_large_sum() -> None:
    """In float32 the sum of all less the largest row is rounding."""
    y = torch.tensor([[1e9], [1.0], [2.0], [0.0]])
    ratio = F.others_ratio(5.0 * y, y)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 5.0))
    assert F.others_ratio(y[:1], y[:1]) == 0.0 and F.others_ratio(y[[0, 3]], y[[0, 3]])[0] == 0.0


def test_soft_value_is_its_definition() -> None:
    """Also with a temperature that is learnt, and with an action that is never taken."""
    generator = torch.Generator().manual_seed(0)
    q, logits = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(-1)
    found = F.soft_value(q, log_pi, alpha)
    for n in range(5):
        p = [math.exp(x) for x in log_pi[n].tolist()]
        expected = sum(p[k] * (float(q[n, k]) - 0.3 * math.log(p[k])) for k in range(3))
        assert float(found[n].detach()) == pytest.approx(expected)
    entropy = -(log_pi.exp() * log_pi).sum()
    torch.testing.assert_close(torch.autograd.grad(found.sum(), alpha)[0], entropy)
    sure = torch.tensor([[0.0, -800.0, -900.0]], dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(F.soft_value(q[:1], sure, 0.5), q[0, :1])


def test_q_loss_is_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    q, target, weight = (torch.randn(*shape, generator=random) for shape in ((2, 5), (5,), (5,)))
    errors = [sum(float(weight[n]) * float(q[k, n] - target[n]) ** 2 / 2 for n in range(5)) / 5 for k in range(2)]
    assert float(F.q_loss(q, target, weight)) == pytest.approx(sum(errors), rel=1e-5)
    torch.testing.assert_close(F.q_loss(q, target), F.q_loss(q, target, torch.ones(5)))
