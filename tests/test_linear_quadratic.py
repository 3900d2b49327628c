"""The linear-quadratic env and its best policy, against simulation, difference quotients and search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from pgrl.config import composition
from pgrl.envs import EnvConfig, make_vec
from pgrl.envs.linear_quadratic import (
    REGULATOR,
    LinearQuadratic,
    Regulator,
    discounted_return,
    episode_return,
    optimal_gain,
    optimal_gains,
    value_matrix,
)
from pgrl.evaluate import evaluate

ENV = "pgrl/LinearQuadratic-v0"


def random_problem(seed: int) -> Regulator:
    random = Generator().manual_seed(seed)
    a, b, *roots = (torch.randn(3, n, generator=random, dtype=torch.float64) for n in (3, 2, 3, 3, 3, 3))
    q, r, noise, start = (x @ x.T + 0.1 * torch.eye(3, dtype=x.dtype) for x in roots)
    return Regulator(0.4 * a, b, q, r[:2, :2], noise, start)


PROBLEMS = {"the env's": REGULATOR, "a": random_problem(1), "b": random_problem(2)}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Regulator:
    return PROBLEMS[request.param]


def away(gain: Tensor, by: float, seed: int = 0) -> Tensor:
    return gain + by * torch.randn(gain.shape, generator=Generator().manual_seed(seed), dtype=gain.dtype)


def test_env_is_the_regulator() -> None:
    """Steps by the formulas; the noise is what is left, and has its covariance; so do the first states."""
    env, rng = LinearQuadratic(), np.random.default_rng(0)
    a, b, q, r = (x.numpy() for x in REGULATOR[:4])
    first, noise = [], []
    for seed in range(2000):
        s, _ = env.reset(seed=seed)
        first.append(s)
        action = rng.standard_normal(1).astype(np.float32)
        following, reward, terminated, truncated, _ = env.step(action)
        assert reward == pytest.approx(-(s @ q @ s + action @ r @ action)) and not terminated and not truncated
        assert env.observation_space.contains(s) and env.action_space.contains(action)
        noise.append(following - a @ s - b @ action)
    for found, expected in ((first, REGULATOR.start), (noise, REGULATOR.noise)):
        np.testing.assert_allclose(np.cov(np.array(found).T), expected, atol=0.1 * float(expected.max()))
        assert np.abs(np.mean(found, 0)).max() < 0.1 * float(expected.max()) ** 0.5
    assert np.abs(np.corrcoef(np.hstack([first, noise]).T)[:2, 2:]).max() < 0.1


def test_returns_are_those_of_simulation(problem: Regulator) -> None:
    """Means of 20,000 simulated episodes, discounted for as long as it matters."""
    random, n, steps, gamma = Generator().manual_seed(3), 20_000, 60, 0.8
    gain = away(optimal_gain(problem, gamma), 0.05)
    roots = [torch.linalg.cholesky(x).T for x in (problem.start, problem.noise)]
    s = torch.randn(n, len(problem.a), generator=random, dtype=torch.float64) @ roots[0]
    total, early = torch.zeros(2, n, dtype=torch.float64)
    for t in range(steps):
        action = s @ gain.T
        reward = -((s @ problem.q) * s).sum(-1) - ((action @ problem.r) * action).sum(-1)
        total = total + gamma**t * reward
        early = early + reward * (t < 5)
        s = s @ problem.a.T + action @ problem.b.T + torch.randn(s.shape, generator=random, dtype=s.dtype) @ roots[1]
    assert float(total.mean()) == pytest.approx(float(discounted_return(problem, gain, gamma)), rel=0.03)
    assert float(early.mean()) == pytest.approx(float(episode_return(problem, gain.expand(5, -1, -1))), rel=0.03)


def test_two_ways_to_the_discounted_return(problem: Regulator) -> None:
    """Lyapunov's equation, and the sum over many steps of the second moments."""
    gain = away(optimal_gain(problem, 0.9), 0.05)
    long = episode_return(problem, gain.expand(1000, -1, -1), gamma=0.9)
    torch.testing.assert_close(discounted_return(problem, gain, 0.9), long)
    p = value_matrix(problem, gain, 0.9)
    f = problem.a + problem.b @ gain
    torch.testing.assert_close(p, problem.q + gain.T @ problem.r @ gain + 0.9 * f.T @ p @ f)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_no_gain_is_better(problem: Regulator, gamma: float) -> None:
    """The slope is 0 at the best gain, every gain nearby earns less, and gradient ascent from nearby ends there."""
    best = optimal_gain(problem, gamma).requires_grad_()
    top = discounted_return(problem, best, gamma)
    slope = torch.autograd.grad(top, best)[0]
    assert slope.abs().max() < 1e-8 * top.abs().max()
    for seed, by in enumerate([1e-3, 1e-2, 0.1] * 10):
        assert not discounted_return(problem, away(best.detach(), by, seed), gamma) >= top  # nan where it diverges


def test_the_best_gain_is_found_by_search() -> None:
    """A grid over both numbers of the env's gain: the best point of it lies beside Riccati's."""
    best = optimal_gain(REGULATOR, 0.95)
    grid = [torch.linspace(-3.0, 1.0, 41, dtype=torch.float64) for _ in range(2)]
    points = torch.cartesian_prod(*grid)
    earned = torch.stack([discounted_return(REGULATOR, k.unsqueeze(0), 0.95) for k in points])
    found = points[earned.nan_to_num(-torch.inf).argmax()]
    assert (found - best[0]).abs().max() <= 0.1
    assert float(earned.nan_to_num(-torch.inf).max()) <= float(discounted_return(REGULATOR, best, 0.95))


def test_gains_of_an_episode_are_the_best_for_it(problem: Regulator) -> None:
    """The slope of an episode's return is 0 at Riccati's gains; they beat the best that does not depend on time."""
    gains = optimal_gains(problem, 7).requires_grad_()
    top = episode_return(problem, gains)
    slope = torch.autograd.grad(top, gains)[0]
    assert slope.abs().max() < 1e-8 * top.abs() and not gains[-1].any()  # what is done last costs, and changes nothing
    assert episode_return(problem, optimal_gain(problem, 0.99).expand(7, -1, -1)) < top
    long = optimal_gains(problem, 300, gamma=0.9)
    torch.testing.assert_close(long[0], optimal_gain(problem, 0.9))


def test_what_has_no_limit_is_nan() -> None:
    assert discounted_return(REGULATOR, torch.tensor([[0.0, 9.0]]).double(), 0.99).isnan()


class Best:
    """The best controller of an episode of 100 steps, as `evaluate` takes an agent."""

    def __init__(self) -> None:
        self.gains, self.steps = optimal_gains(REGULATOR, 100), 0

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        self.steps += 1
        return (obs.double() @ self.gains[(self.steps - 1) % 100].T).float()


def test_the_benchmarks_reference_is_the_best_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the 20 episodes that the agents are scored on; over many it earns what Riccati's equation says."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import benchmark

    suite = next(s for s in benchmark.SUITES if s.algo == "dpg")
    agent: Any = Best()
    scored = np.mean(evaluate(agent, EnvConfig(ENV), 20, 0).returns)
    assert suite.env == ENV and scored == pytest.approx(suite.reference, abs=0.005)
    assert suite.target == pytest.approx(1.01 * suite.reference, abs=0.01) and suite.every_seed
    expected = float(episode_return(REGULATOR, Best().gains))
    assert np.mean(evaluate(agent, EnvConfig(ENV), 960, 1).returns) == pytest.approx(expected, rel=0.03)


def test_env_works_by_its_id_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    from pgrl import config, env_ids

    assert ENV in env_ids.all_ids() and env_ids.missing_package(ENV) is None
    assert config.checked(["algo=dpg", f"env={ENV}"]).algo.gamma == 0.97  # the tuned file is found
    assert composition.jobs([f"env={ENV},CartPole-v1"]) == [[f"env={ENV}"], ["env=CartPole-v1"]]
    config.main(["--envs"], lambda run: None)
    assert ENV in capsys.readouterr().out.split()
    for wrong in ("LinearQuadratic-v0", "pgrl/LinearQuadratic", "pgrl/LinearQuadratic-v7", "linearquadratic"):
        assert env_ids.near_ids(wrong)[0] == ENV
    env = make_vec(EnvConfig(ENV), 3, 1)
    env.reset()
    steps = [env.step(torch.zeros(3, 1)) for _ in range(100)]
    assert steps[-1].truncated.all() and not steps[-2].truncated.any() and not steps[-1].terminated.any()
