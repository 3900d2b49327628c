"""Envs that are made quicker answer as they did, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from pgrl.envs import quick
from pgrl.envs.base import EnvConfig
from pgrl.envs.make import make

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
IDS = [f"{name}-v{version}" for name in ("HalfCheetah", "Hopper", "Walker2d") for version in (4, 5)]


def bare(env_id: str, **named: Any) -> Any:
    try:
        return make(EnvConfig(env_id, kwargs=named), 1)[0].unwrapped
    except DependencyNotInstalled:
        pytest.skip("needs mujoco")


def episodes(env: Any, seeds: int = 4, steps: int = 150) -> list[Any]:
    """Everything but the infos of some episodes of random actions, which go on after a fall."""
    random, answers = np.random.default_rng(5), []
    for seed in range(seeds):
        answers.append(env.reset(seed=seed)[0].tolist())
        for _ in range(steps):
            action = random.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            answers.append((obs.tolist(), float(reward), bool(terminated), bool(truncated)))
    return answers


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize(
    "named", [{}, {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.37}], ids=str
)
def test_a_quick_env_answers_as_its_own_step_does(env_id: str, named: dict[str, Any]) -> None:
    plain, quicker = bare(env_id, **named), bare(env_id, **named)
    quick.quicken([quicker])
    assert "step" in vars(quicker) and "step" not in vars(plain)
    expected = episodes(plain)
    assert episodes(quicker) == expected
    if "Cheetah" not in env_id:
        steps = [answer for answer in expected if len(answer) == 4]
        assert {terminated for _, _, terminated, _ in steps} == {False, True}
        assert max(max(obs) for obs, *_ in steps) == 10.0  # a speed beyond that is cut


@pytest.mark.parametrize("env_id", [x for x in IDS if "Cheetah" not in x])
def test_one_that_goes_on_after_a_fall(env_id: str) -> None:
    named = {"terminate_when_unhealthy": False, "healthy_reward": 0.3}
    plain, quicker = bare(env_id, **named), bare(env_id, **named)
    quick.quicken([quicker])
    assert "step" in vars(quicker)
    assert episodes(quicker) == episodes(plain)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_a_hopper_falls_by_any_part_of_its_state(env_id: str) -> None:
    named = {"healthy_state_range": (-2.0, 2.0), "healthy_angle_range": (-9.0, 9.0), "healthy_z_range": (-9.0, 9.0)}
    plain, quicker = bare(env_id, **named), bare(env_id, **named)
    quick.quicken([quicker])
    assert "step" in vars(quicker)
    expected = episodes(plain)
    assert episodes(quicker) == expected
    assert {answer[2] for answer in expected if len(answer) == 4} == {False, True}


def test_all_copies_are_made_quicker_and_others_are_not() -> None:
    cheetahs = [bare("HalfCheetah-v4"), bare("HalfCheetah-v4")]
    quick.quicken(cheetahs)
    assert all("step" in vars(env) for env in cheetahs)
    for env in cheetahs:
        env.reset(seed=0)
    before = cheetahs[1].data.qpos.copy()
    cheetahs[0].step(cheetahs[0].action_space.high)
    assert (cheetahs[1].data.qpos == before).all()  # each steps its own physics
    assert (cheetahs[0].data.qpos != before).any()
    for env in (bare("Ant-v4"), gymnasium.make("CartPole-v1").unwrapped):
        quick.quicken([env])
        assert "step" not in vars(env)


def test_a_subclass_and_one_that_is_watched_are_left_as_they_are() -> None:
    watched = bare("HalfCheetah-v4")
    watched.render_mode = "human"
    own = type("Own", (type(watched),), {"__module__": "somewhere"})
    other = copy.copy(bare("HalfCheetah-v4"))
    other.__class__ = own
    for env in (watched, other):
        quick.quicken([env])
        assert "step" not in vars(env)


def test_wrong_arguments_are_told_by_the_env_itself() -> None:
    env = bare("Hopper-v5", healthy_z_range=0.7)
    quick.quicken([env])
    assert "step" not in vars(env)


def test_a_step_that_was_replaced_stays() -> None:
    env = bare("HalfCheetah-v4")
    env.step = own = lambda action: type(env).step(env, action)
    quick.quicken([env])
    assert env.step is own


@pytest.mark.parametrize("change", ["reward", "termination", "observation", "attribute"])
def test_an_env_of_another_version_is_left_as_it_is(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = bare("Hopper-v5")
    own = type(env).step

    def step(self: Any, action: Any) -> Any:
        obs, reward, terminated, truncated, info = own(self, action)
        if change == "reward":
            reward += 1e-12
        if change == "observation":
            obs = np.nextafter(obs, 1.0)
        return obs, reward, terminated ^ (change == "termination"), truncated, info

    monkeypatch.setattr(type(env), "step", step)
    if change == "attribute":
        del env._healthy_z_range
    quick.quicken([env])
    assert "step" not in vars(env)
