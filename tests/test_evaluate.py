"""Evaluation: fixed shares of episodes, no bias towards short ones, and an agent that does not notice."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from tests import envs_for_tests  # noqa: F401  (registers the envs)
from torch import Tensor

from pgrl import evaluate as evaluation
from pgrl.agents import PPO, Agent, PPOConfig, Setting
from pgrl.data import Transition
from pgrl.envs import EnvConfig, make_vec
from pgrl.envs.base import episode_seed
from pgrl.evaluate import EVALUATION_STREAM, MAX_ENVS, bootstrap_interval, evaluate, iqm


class Still(Agent):
    """Takes action 0, and counts how often it is asked."""

    name = "still"
    num_steps = 1

    def __init__(self) -> None:
        self.asked = 0

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        assert not explore
        self.asked += 1
        return torch.zeros(len(obs), dtype=torch.int64)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        raise AssertionError("evaluation does not train")


def luck(*lengths: int) -> EnvConfig:
    """Episodes of these lengths, chosen by the first draw of the episode's seed, that return their length."""
    return EnvConfig("Luck-v0", kwargs={"lengths": lengths})


def foretold(seed: int, episodes: int, lengths: tuple[int, ...]) -> list[int]:
    """The length of each episode: number k is the (k // num_envs)-th of env k % num_envs."""
    num_envs = min(episodes, MAX_ENVS)
    seeds = [episode_seed(seed + EVALUATION_STREAM, k % num_envs, k // num_envs) for k in range(episodes)]
    return [lengths[np.random.default_rng(s).integers(len(lengths))] for s in seeds]


@pytest.mark.parametrize("episodes", [1, 2, MAX_ENVS - 1, MAX_ENVS, MAX_ENVS + 1, 70, 3 * MAX_ENVS])
def test_each_env_plays_its_share_and_the_order_is_that_of_the_episodes_numbers(episodes: int) -> None:
    result = evaluate(Still(), luck(1, 5, 20), episodes, seed=3)
    assert result.lengths == foretold(3, episodes, (1, 5, 20))
    assert result.returns == [float(n) for n in result.lengths]


def test_short_episodes_are_not_over_represented() -> None:
    lengths, seeds = (1, 60), range(8)
    returns = [r for seed in seeds for r in evaluate(Still(), luck(*lengths), MAX_ENVS, seed).returns]
    error = np.std(lengths) / np.sqrt(len(returns))
    assert abs(np.mean(returns) - np.mean(lengths)) < 4 * error

    # the test has teeth: the episodes that end first are the short ones
    env = make_vec(luck(*lengths), MAX_ENVS, 0)
    env.reset()
    first: list[float] = []
    while len(first) < MAX_ENVS:
        env.step(torch.zeros(MAX_ENVS, dtype=torch.int64))
        first += env.episodes().env_return
    assert np.mean(first) < np.mean(lengths) - 8 * error


def test_evaluation_repeats_itself_and_hangs_on_its_seed() -> None:
    a, b, c = (evaluate(Still(), luck(*range(1, 30)), 40, seed) for seed in (5, 5, 6))
    assert a == b
    assert a != c


def test_it_stops_with_the_last_episode_it_needs() -> None:
    agent = Still()
    assert evaluate(agent, luck(9), 2 * MAX_ENVS, seed=0).lengths == [9] * 2 * MAX_ENVS
    assert agent.asked == 18


def make_agent(name: str) -> Agent:
    torch.manual_seed(0)
    env = make_vec(EnvConfig(name), 2, 0)
    setting = Setting(env.obs_space, env.action_space, 2, 0, torch.device("cpu"))
    return PPO(PPOConfig(num_steps=16, num_minibatches=2, update_epochs=1, norm_obs=True), setting)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [x for key in sorted(tree, key=str) for x in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [x for part in tree for x in leaves(part)]
    return [tree.clone() if isinstance(tree, Tensor) else tree]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_agent_and_the_process_are_unchanged(name: str) -> None:
    agent, twin = make_agent(name), make_agent(name)
    obs = torch.randn(2, 4 if name == "CartPole-v1" else 3, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        assert torch.equal(agent.act(obs), twin.act(obs))
    state = leaves(agent.state_dict())
    attributes = set(vars(agent))
    globals_ = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
    evaluate(agent, EnvConfig(name, max_episode_steps=50), 6, seed=1)
    assert same(leaves(agent.state_dict()), state)
    assert set(vars(agent)) == attributes
    assert same(leaves([torch.get_rng_state(), np.random.get_state()[1], random.getstate()]), leaves(globals_))
    for _ in range(20):  # beyond the noise drawn before
        assert torch.equal(agent.act(obs), twin.act(obs))


@pytest.mark.parametrize(("limit", "length"), [(None, 30), (12, 12)])
def test_an_env_without_a_time_limit_is_cut(monkeypatch: pytest.MonkeyPatch, limit: int | None, length: int) -> None:
    """A policy that never ends its episodes would be evaluated for ever."""
    monkeypatch.setattr("pgrl.evaluate.LONGEST", 30)
    env = EnvConfig("tests.envs_for_tests:Counter-v0", max_episode_steps=limit)
    assert evaluate(Still(), env, 3, seed=1).lengths == [length] * 3


def test_the_envs_are_closed_even_where_the_agent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Failing(Still):
        def act(self, obs: Tensor, explore: bool = True) -> Tensor:
            raise FloatingPointError("no action")

    def make(*args: Any) -> Any:
        env = make_vec(*args)
        close = env.close
        env.close = lambda: (closed.append(True), close())  # type: ignore[method-assign]
        return env

    monkeypatch.setattr(evaluation, "make_vec", make)
    with pytest.raises(FloatingPointError):
        evaluate(Failing(), luck(3), 2, seed=0)
    evaluate(Still(), luck(3), 2, seed=0)
    assert closed == [True, True]


@pytest.mark.parametrize("n", range(1, 14))
def test_iqm_is_the_mean_of_the_middle_half(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n) ** 3
    fourfold = np.sort(np.repeat(x, 4))  # its middle half begins and ends between two values
    assert iqm(x.tolist()) == pytest.approx(fourfold[n : 3 * n].mean(), abs=1e-12)


def test_iqm_ignores_the_outer_quarters() -> None:
    assert iqm([-1e9, 1, 2, 3, 4, 5, 6, 1e9]) == iqm([0, 1, 2, 3, 4, 5, 6, 7]) == 3.5
    assert iqm([3.0]) == 3.0


def test_the_bootstrap_interval_nears_that_of_all_resamples() -> None:
    x = [0.0, 1.0, 4.0, 9.0, 20.0]
    every = np.array(list(itertools.product(x, repeat=5)))  # each resample, equally likely
    for statistic in (np.mean, iqm):
        exact = np.quantile([statistic(list(row)) for row in every], [0.05, 0.95])
        low, high = bootstrap_interval(x, lambda v, f=statistic: float(f(v)), n=4000, level=0.9)
        assert abs(low - exact[0]) < 0.6 and abs(high - exact[1]) < 0.6


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for k in range(200):
        low, high = bootstrap_interval(rng.normal(size=30).tolist(), lambda v: float(np.mean(v)), n=200, seed=k)
        inside += low <= 0.0 <= high
    assert 0.87 < inside / 200 <= 0.99


def test_the_bootstrap_interval_at_its_edges() -> None:
    assert np.isnan(bootstrap_interval([1.0], iqm)).all()
    assert bootstrap_interval([2.0, 2.0, 2.0], iqm) == (2.0, 2.0)
    x = [1.0, 5.0, 2.0, 8.0]
    assert bootstrap_interval(x, iqm, seed=1) == bootstrap_interval(x, iqm, seed=1)
    wide, narrow = (bootstrap_interval(x, iqm, level=level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


def test_an_agent_of_another_backend_plays_gymnasiums_env() -> None:
    played = [evaluate(Still(), EnvConfig("CartPole-v1", backend), 5, seed=3) for backend in ("torch", "gymnasium")]
    assert played[0] == played[1]
