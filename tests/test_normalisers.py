"""Running statistics against NumPy over everything, and the reward scaler against its loop."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Generator

from pgrl.normalisers import RewardScaler, RunningNorm


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_running_norm_is_numpy_over_everything(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(50.0, 3.0, (700, *shape)) * rng.uniform(0.01, 10.0, shape)
    for splits in ([700], [1, 699], [1, 1, 1, 697], sorted(rng.choice(np.arange(1, 700), 30, replace=False))):
        norm = RunningNorm(shape)
        ends = [0, *splits, 700] if len(splits) == 30 else [0, *np.cumsum(splits)]
        for a, b in itertools.pairwise(ends):
            norm.update(torch.from_numpy(x[a:b]))
        np.testing.assert_allclose(norm.mean.numpy(), x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(norm.var.numpy(), x.var(0), rtol=1e-10)
        assert norm.count == 700 and norm.mean.dtype == norm.var.dtype == torch.float64


def test_running_norm_takes_any_leading_dimensions() -> None:
    x = torch.randn(4, 5, 3, generator=seeded(8))
    a, b = RunningNorm((3,)), RunningNorm((3,))
    a.update(x)
    b.update(x.reshape(20, 3))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.var, b.var)
    assert torch.equal(a(x), b(x.reshape(20, 3)).view(4, 5, 3))


def test_running_norm_keeps_its_digits() -> None:
    """A long run far from zero: sums of squares would cancel, merged moments do not."""
    norm = RunningNorm(())
    x = 1e6 + torch.randn(200, 50, generator=seeded(9), dtype=torch.float64)
    for row in x:
        norm.update(row)
    np.testing.assert_allclose(norm.var.item(), x.numpy().var(), rtol=1e-8)


def test_running_norm_forward() -> None:
    norm = RunningNorm((2,), clip=1.5)
    x = torch.randn(50, 2, generator=seeded(10)) * torch.tensor([1.0, 9.0]) + 4
    assert torch.equal(RunningNorm((2,), clip=None)(x), x)  # the identity before the first update
    norm.update(x)
    expected = (x.numpy() - x.double().numpy().mean(0)) / np.sqrt(x.double().numpy().var(0) + 1e-8)
    torch.testing.assert_close(norm(x), torch.tensor(expected).float().clamp(-1.5, 1.5), rtol=1e-5, atol=1e-5)
    assert norm(x).dtype == torch.float32 and norm(x).abs().max() == 1.5
    frozen = norm.mean.clone()
    norm(x * 100)
    assert torch.equal(norm.mean, frozen)  # only `update` learns


def test_running_norm_of_a_constant_is_finite() -> None:
    norm = RunningNorm((1,))
    norm.update(torch.full((5, 1), 3.0))
    assert norm(torch.tensor([[3.0], [4.0]])).tolist() == [[0.0], [10.0]]


def test_denormalise_is_the_inverse() -> None:
    norm = RunningNorm((), clip=None)
    x = torch.randn(100, generator=seeded(11)) * 20 - 300
    assert torch.equal(norm.denormalise(x), x)
    norm.update(x)
    torch.testing.assert_close(norm.denormalise(norm(x)), x, rtol=1e-5, atol=1e-3)
    mean_and_one_std_above = torch.stack([x.mean(), x.mean() + x.std(correction=0)])
    torch.testing.assert_close(norm.denormalise(torch.tensor([0.0, 1.0])), mean_and_one_std_above, rtol=1e-4, atol=1e-3)


def test_running_norm_state() -> None:
    """Statistics alone are saved; what the forward reads is derived again on loading, and copies are independent."""
    norm = RunningNorm((3,))
    x = torch.randn(20, 3, generator=seeded(12)) * 5 + 2
    norm.update(x)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    assert set(state) == {"mean", "var", "count"}
    other = RunningNorm((3,))
    other.load_state_dict(state)
    assert torch.equal(other(x), norm(x))
    twin = copy.deepcopy(norm)
    twin.update(x * 9)
    assert torch.equal(norm(x), other(x)) and not torch.equal(twin(x), norm(x))
    for n in (norm, other):
        n.update(x - 1)
    assert torch.equal(norm(x), other(x)) and torch.equal(norm.var, other.var)


def test_reward_scaler_is_its_loop() -> None:
    """Algorithm 2 of Engstrom et al., step by step, over rollouts with ends inside them and at their edges."""
    rng = np.random.default_rng(1)
    scaler, gamma, envs = RewardScaler(3, 0.9), 0.9, 3
    running, seen = np.zeros(envs), []
    for length in (1, 7, 20, 1, 40):
        reward = rng.normal(2.0, 5.0, (length, envs)).astype(np.float32)
        done = rng.random((length, envs)) < 0.2
        done[-1, 0] = True
        for t in range(length):
            running = gamma * running + reward[t]
            seen.append(running.copy())
            running = np.where(done[t], 0.0, running)
        scaled = scaler(torch.from_numpy(reward), torch.from_numpy(done))
        assert scaled.dtype == torch.float32
        np.testing.assert_allclose(scaled.numpy(), reward / np.sqrt(np.var(seen) + 1e-8), rtol=1e-5)
        np.testing.assert_allclose(scaler.returns.var.item(), np.var(seen), rtol=1e-9)
        np.testing.assert_allclose(scaler.carry.numpy(), gamma * running, rtol=1e-12, atol=1e-12)


def test_reward_scaler_state() -> None:
    a, b = RewardScaler(2, 0.99), RewardScaler(2, 0.99)
    reward, done = torch.randn(9, 2, generator=seeded(13)), torch.zeros(9, 2, dtype=torch.bool)
    untouched = reward.clone()
    a(reward, done)
    assert torch.equal(reward, untouched)
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})
    assert torch.equal(a(reward, done), b(reward, done))
    assert (a.carry != 0).all() and torch.equal(a.carry, b.carry)
