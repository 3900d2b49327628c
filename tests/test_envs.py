"""The contract of the environments, kept by every backend, and what Gymnasium's adds to it."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from tests import envs_for_tests
from torch import Tensor

from pgrl import checkpoint, env_ids
from pgrl.config.checks import CHOICES
from pgrl.data import Rollout, Step, action_rows
from pgrl.envs import BACKENDS, EnvConfig, Episodes, VecEnv, make_vec
from pgrl.envs.base import episode_seed
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.envs.make import make, peel
from pgrl.envs.quick import Choice, quicken_space
from pgrl.errors import UserError

SEED = 7


PROCESSES = "gymnasium, in processes"  # which is no backend by its name, but keeps the same contract


@pytest.fixture(params=["gymnasium", PROCESSES])  # those that step any Gymnasium env
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["gymnasium", PROCESSES, "torch"])  # EnvPool is another package, and not exact
def classic_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def vec(name: str, num_envs: int = 2, seed: int = SEED, *, backend: str = "gymnasium", **options: Any) -> VecEnv:
    limit = options.pop("max_episode_steps", None)
    if backend != PROCESSES:
        return make_vec(EnvConfig(name, backend, max_episode_steps=limit, kwargs=options), num_envs, seed)
    name = f"tests.envs_for_tests:{name}" if name in envs_for_tests.NAMES else name
    return make_vec(EnvConfig(name, "gymnasium", limit, options, processes=3), num_envs, seed)


def random_actions(env: VecEnv, steps: int, seed: int = 0) -> Tensor:
    """Actions [steps, B, ...] as an agent would give them, some of a Box out of its bounds."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = action_rows(env.action_space)
    if dtype.is_floating_point:
        return torch.randn(steps, env.num_envs, *shape, generator=generator)
    if isinstance(env.action_space, spaces.MultiDiscrete):
        largest = int(env.action_space.nvec.min())
    else:
        largest = int(getattr(env.action_space, "n", 2)) if isinstance(env.action_space, spaces.Discrete) else 2
    return torch.randint(largest, (steps, env.num_envs, *shape), generator=generator)


def copied(step: Step) -> Step:
    return Step(*(x.clone() for x in step))


def assert_same(a: Step, b: Step) -> None:
    for name, x, y in zip(Step._fields, a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


def held(tree: Any) -> list[Any]:
    """Everything that a state holds, in order; its tensors as arrays that share their memory."""
    if isinstance(tree, dict | list):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in held(part)]
    return [tree.numpy() if isinstance(tree, Tensor) else tree]


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for x, y in zip(held(a), held(b), strict=True):
        assert np.array_equal(x, y)


# Every transition


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    ("terminate_at", "truncate_at", "max_episode_steps"),
    [(5, None, None), (None, 4, None), (None, None, 6), (3, 3, None), (4, None, 4), (1, None, None), (None, 1, None),
     (None, None, 1), (1, 1, 1), (None, None, None)],
)  # fmt: skip
def test_every_transition_is_the_known_one(
    backend: str, num_envs: int, terminate_at: int | None, truncate_at: int | None, max_episode_steps: int | None
) -> None:
    limits = {"terminate_at": terminate_at, "truncate_at": truncate_at}
    env = vec("Counter-v0", num_envs, backend=backend, max_episode_steps=max_episode_steps, **limits)

    def first(i: int, episode: int) -> int:
        return int(np.random.default_rng(episode_seed(SEED, i, episode)).integers(1000))

    obs = env.reset()
    s, t, episode, total = [first(i, 0) for i in range(num_envs)], [0] * num_envs, [0] * num_envs, [0.0] * num_envs
    assert obs.tolist() == [[s[i], 0] for i in range(num_envs)]
    for action in random_actions(env, 30):
        step = env.step(action)
        finished = Episodes.none()
        for i, a in enumerate(action.tolist()):
            reward = 0.1 * s[i] - a
            total[i] += reward
            s[i], t[i] = s[i] + 1 + a, t[i] + 1
            assert step.next_obs[i].tolist() == [s[i], t[i]]
            assert step.reward[i] == torch.tensor(reward)
            assert step.terminated[i] == (t[i] == terminate_at)
            assert step.truncated[i] == (t[i] in (truncate_at, max_episode_steps))
            if step.terminated[i] or step.truncated[i]:
                finished.extend(Episodes([total[i]], [t[i]], [i]))
                episode[i] += 1
                s[i], t[i], total[i] = first(i, episode[i]), 0, 0.0
            assert step.obs[i].tolist() == [s[i], t[i]]
        assert torch.equal(env.obs(), step.obs)
        assert env.episodes() == finished
        assert env.episodes() == Episodes.none()
    env.close()


def test_spaces_and_types_are_those_of_the_contract(classic_backend: str) -> None:
    env = vec("CartPole-v1", 4, backend=classic_backend)
    obs = env.reset()
    step = env.step(torch.zeros(4, dtype=torch.int64))
    assert env.num_envs == 4 and env.device == torch.device("cpu")
    assert env.obs_space.shape == (4,) and env.obs_space.dtype == np.float32
    assert env.action_space == spaces.Discrete(2)
    assert obs.dtype == step.obs.dtype == step.next_obs.dtype == step.reward.dtype == torch.float32
    assert step.terminated.dtype == step.truncated.dtype == torch.bool
    assert obs.shape == step.obs.shape == step.next_obs.shape == (4, 4)
    assert obs.is_contiguous()
    assert step.reward.shape == step.terminated.shape == step.truncated.shape == (4,)


def test_answers_are_written_into_the_rows_of_a_rollout(classic_backend: str) -> None:
    env, twin = (vec("CartPole-v1", 3, backend=classic_backend, max_episode_steps=4) for _ in range(2))
    rollout = Rollout(6, 3, env.obs_space, env.action_space, env.device)
    rollout.begin(env.reset())
    twin.reset()
    where = [[x.data_ptr() for x in row] for row in rollout.steps]
    for _ in range(2):
        for t, action in enumerate(random_actions(env, 6)):
            assert env.step(action, out=rollout.steps[t]) is rollout.steps[t]
            assert_same(rollout.steps[t], twin.step(action))
            assert torch.equal(rollout.obs[t + 1], env.obs())
        assert [[x.data_ptr() for x in row] for row in rollout.steps] == where
        transition = rollout.transition
        assert transition.reward.data_ptr() == where[0][1] and transition.next_obs.data_ptr() == where[0][4]
        assert torch.equal(transition.next_obs[-1], rollout.steps[-1].next_obs)
        rollout.begin(rollout.obs[-1])


def test_what_a_caller_does_to_its_tensors_does_not_reach_the_env(classic_backend: str) -> None:
    env, twin = (vec("CartPole-v1", 2, backend=classic_backend, max_episode_steps=9) for _ in range(2))
    for e in (env, twin):
        e.reset()
    kept: list[tuple[Step, Step]] = []
    action = torch.zeros(2, dtype=torch.int64)
    for choice in random_actions(env, 5):
        action.copy_(choice)  # one tensor for all steps
        step = env.step(action)
        kept.append((step, copied(step)))
        action.fill_(0)
        twin.step(choice)
    for step, copy in kept:  # every step has memory of its own
        assert_same(step, copy)
        step.obs.fill_(-1.0)
    env.obs().fill_(-1.0)
    assert torch.equal(env.obs(), twin.obs())
    assert_same_state(env.state_dict(), twin.state_dict())


# Seeds


@pytest.mark.parametrize(("name", "options"), [("Luck-v0", {"lengths": tuple(range(1, 9))}), ("CartPole-v1", {})])
def test_an_episode_is_the_same_in_every_vectorisation(backend: str, name: str, options: dict[str, Any]) -> None:
    def episodes(num_envs: int, env_seed: int = SEED) -> dict[int, list[Tensor]]:
        """The observations of the first 120 steps of each env, under actions that hang on these alone."""
        env = vec(name, num_envs, env_seed, backend=backend, **options)
        obs = [env.reset()]
        for _ in range(120):
            obs.append(env.step((obs[-1][:, 0] * 1000).long() % 2).obs)
        return {i: [o[i] for o in obs] for i in range(num_envs)}

    most = episodes(8)
    for num_envs in (1, 3):
        for i, rows in episodes(num_envs).items():
            assert all(torch.equal(a, b) for a, b in zip(rows, most[i], strict=True))
    assert not torch.equal(most[0][0], most[1][0])
    assert not torch.equal(most[0][0], episodes(1, SEED + 1)[0][0])


def test_reset_begins_the_first_episodes_again(classic_backend: str) -> None:
    env = vec("CartPole-v1", backend=classic_backend, max_episode_steps=3)
    first, again = (
        [env.reset(), *(env.step(action).obs for action in random_actions(env, 8)), env.episodes()] for _ in range(2)
    )
    assert first[-1] == again[-1] != Episodes.none()
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], again[:-1], strict=True))
    assert len({tuple(row) for obs in first[:-1] for row in obs.tolist()}) == 18
    for action in random_actions(env, 3):
        env.step(action)
    env.reset()
    assert env.episodes() == Episodes.none()
    assert not torch.equal(vec("CartPole-v1", seed=SEED + 1, backend=classic_backend).reset(), first[0])


def test_neighbouring_seeds_share_nothing() -> None:
    keys = [(seed, i, k) for seed in range(4) for i in range(8) for k in range(100)]
    seeds = [episode_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**31 for s in seeds)
    draws = np.array([np.random.default_rng(s).random() for s in seeds]).reshape(4, 8, 100)
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]), (draws[..., 1:], draws[..., :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    first = vec("CartPole-v1", 64, 1).reset(), vec("CartPole-v1", 64, 2).reset()
    assert len({tuple(row) for obs in first for row in obs.tolist()}) == 128


# Actions


def received(action_space: spaces.Space[Any], action: Tensor) -> list[Any]:
    """What two envs of this action space get for `action` [2, ...]; they refuse what is not in it."""
    env = vec("AnySpaces-v0", action=action_space)
    env.reset()
    env.step(action)
    return [e.unwrapped.received[-1] for e in env._envs]  # type: ignore[attr-defined]


INF = float("inf")


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Box(-1, 1, (2,)), [[0.5, -3.0], [9.0, 1.0]], [[0.5, -1.0], [1.0, 1.0]]),
        (spaces.Box(np.float32([-2, 0]), np.float32([3, 0.1])), [[-2.5, 1.0], [7.0, -1.0]], [[-2.0, 0.1], [3.0, 0.0]]),
        (spaces.Box(-INF, INF, (1,)), [[1e30], [-1e30]], [[1e30], [-1e30]]),
        (
            spaces.Box(np.float32([0, -INF]), np.float32([INF, 0])),
            [[-1.0, -5.0], [9.0, 5.0]],
            [[0.0, -5.0], [9.0, 0.0]],
        ),
        (spaces.Box(-0.1, 0.1, (2,), np.float64), [[1.0, -1.0], [0.05, 0.0]], [[0.1, -0.1], [0.05, 0.0]]),
        (spaces.Box(-0.3, 0.3, (1,), np.float16), [[1.0], [-1.0]], [[0.3], [-0.3]]),
        (spaces.Box(-1, 1, (2, 2)), [[2.0, 0.1, 0.2, 0.3]] * 2, [[[1.0, 0.1], [0.2, 0.3]]] * 2),
        (spaces.Box(0, 255, (2,), np.uint8), [[3.6, 999.0], [-4.0, 0.4]], [[4, 255], [0, 0]]),
        (spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64), [[1e30], [-1e30]], [[2**53], [-(2**53)]]),
    ],
)
def test_box_actions_arrive_in_bounds_shape_and_type(space: spaces.Box, action: Any, expected: Any) -> None:
    for got, want in zip(received(space, torch.tensor(action)), expected, strict=True):
        assert got.dtype == space.dtype and got.shape == space.shape
        assert (got >= space.low).all() and (got <= space.high).all()
        assert np.allclose(got.astype(np.float64), want, rtol=1e-3 if space.dtype == np.float16 else 1e-6)


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Discrete(3), [0, 2], [0, 2]),
        (spaces.Discrete(3, start=-1), [0, 2], [-1, 1]),
        (spaces.Discrete(2, start=5), [1, 0], [6, 5]),
        (spaces.MultiDiscrete([2, 3]), [[1, 2], [0, 0]], [[1, 2], [0, 0]]),
        (spaces.MultiDiscrete([2, 3], start=[4, -1]), [[1, 2], [0, 0]], [[5, 1], [4, -1]]),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), [[1, 2, 3, 4], [0, 1, 2, 3]], [[[1, 2], [3, 4]], [[0, 1], [2, 3]]]),
        (spaces.MultiBinary(3), [[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]),
        (spaces.MultiBinary((2, 2)), [[1, 0, 1, 0]] * 2, [[[1, 0], [1, 0]]] * 2),
    ],
)
def test_choices_arrive_counted_shaped_and_typed(space: spaces.Space[Any], action: Any, expected: Any) -> None:
    for got, want in zip(received(space, torch.tensor(action)), expected, strict=True):
        assert np.array_equal(got, want) and np.shape(got) == (space.shape or ())
        if isinstance(space, spaces.Discrete):
            assert type(got) is int
        else:
            assert got.dtype == space.dtype


@pytest.mark.parametrize("start", [0, -3])
def test_a_quickened_space_is_what_it_was(start: int) -> None:
    """Only faster: the same object, equal, with the same members and the same generator."""
    plain, quick = (spaces.Discrete(3, seed=1, start=start) for _ in range(2))
    quicken_space(quick)
    assert isinstance(quick, Choice) and quick == plain and plain == quick and repr(quick) == repr(plain)
    values = [*range(-5, 6), 2**63, True, 1.0, "0", None, *map(np.int64, range(-5, 6)), np.array(0), np.array([0])]
    for x in values:
        assert quick.contains(x) == plain.contains(x) and (x in quick) == (x in plain)
    assert [quick.sample() for _ in range(9)] == [plain.sample() for _ in range(9)]
    assert pickle.loads(pickle.dumps(quick)) == plain
    box = spaces.Box(0.0, 1.0)
    quicken_space(box)
    assert type(box) is spaces.Box


def test_envs_have_quickened_spaces() -> None:
    env = GymnasiumVecEnv(EnvConfig("CartPole-v1"), 2, seed=1)
    assert all(isinstance(one.unwrapped.action_space, Choice) for one in env._envs)


def test_an_env_may_change_the_action_it_is_given_and_keep_it() -> None:
    env = vec("AnySpaces-v0", action=spaces.Box(-1, 1, (2,)))
    env.reset()
    for _ in range(3):
        env.step(torch.full((2, 2), 0.5))
        for e in env._envs:  # type: ignore[attr-defined]
            e.unwrapped.received[-1][:] = -9.0
    assert all((a == 0.5).all() for a in env.state_dict()["actions"])


def test_actions_of_another_number_of_envs_are_refused() -> None:
    env = vec("Counter-v0", 3)
    env.reset()
    with pytest.raises(ValueError, match="reshape"):
        env.step(torch.zeros(1, dtype=torch.int64))


# Observations


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(-1, 1, (3,)), (3,), torch.float32),
        (spaces.Box(-1, 1, (2, 3), np.float64), (2, 3), torch.float32),
        (spaces.Box(-5, 5, (4,), np.int64), (4,), torch.float32),
        (spaces.Box(0, 1, (3,), bool), (3,), torch.float32),
        (spaces.Box(-1, 1, (), np.float32), (1,), torch.float32),
        (spaces.Box(0, 255, (128,), np.uint8), (128,), torch.float32),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), (8, 8, 3), torch.uint8),
        (spaces.Box(0, 1, (3, 8, 8), np.float32), (3, 8, 8), torch.float32),
        (spaces.Discrete(4), (4,), torch.float32),
        (spaces.Discrete(4, start=-2), (4,), torch.float32),
        (spaces.MultiDiscrete([2, 3]), (5,), torch.float32),
        (spaces.MultiBinary(3), (3,), torch.float32),
        (spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2, 2))]), (6,), torch.float32),
        (spaces.Dict(a=spaces.Dict(b=spaces.MultiBinary(2)), c=spaces.Box(0, 9, (1,), np.int32)), (3,), torch.float32),
    ],
)
def test_observations_become_rows(space: spaces.Space[Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    env = vec("AnySpaces-v0", observation=space, max_episode_steps=2)
    obs = env.reset()
    envs = [e.unwrapped for e in env._envs]  # type: ignore[attr-defined]
    assert env.obs_space.shape == shape and torch.from_numpy(np.zeros(0, env.obs_space.dtype)).dtype == dtype

    def row(raw: Any) -> Tensor:
        flat = raw if isinstance(space, spaces.Box) else spaces.flatten(space, raw)
        return torch.tensor(np.asarray(flat)).to(dtype).reshape(shape)

    for _ in range(3):
        assert obs.shape == (2, *shape) and obs.dtype == dtype
        assert all(torch.equal(obs[i], row(e.given[-1])) for i, e in enumerate(envs))
        step = env.step(torch.zeros(2, dtype=torch.int64))
        ended = bool(step.truncated[0])
        assert all(torch.equal(step.next_obs[i], row(e.given[-1 - ended])) for i, e in enumerate(envs))
        obs = step.obs


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Box(0, 1, (2,)), None),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
        spaces.Dict(a=spaces.Discrete(2), b=spaces.Text(3)),
        spaces.Tuple([spaces.Tuple([spaces.Sequence(spaces.Discrete(2))])]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_observations_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(UserError, match=r"env=AnySpaces-v0: its observations.*\nSupported are Box .*Dict of these"):
        vec("AnySpaces-v0", observation=space)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
        spaces.Dict(a=spaces.Box(-1, 1, (1,))),
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_actions_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(UserError, match=r"env=AnySpaces-v0: its actions.*\nSupported are Box, Discrete, Multi"):
        vec("AnySpaces-v0", action=space)


# Restore

CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
MUJOCO = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Swimmer-v4", "Reacher-v4", "InvertedPendulum-v4",
          "InvertedDoublePendulum-v4", "Humanoid-v4", "HalfCheetah-v5", "Hopper-v5"]  # fmt: skip
TABLES = ["FrozenLake-v1", "Blackjack-v1"]  # with Discrete and Tuple observations


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("gymnasium", name) for name in [*CLASSIC, *BOX2D, *MUJOCO, *TABLES, "Counter-v1", "Luck-v0"]),
        *(("torch", name) for name in CLASSIC),
    ],
)
def test_restored_in_the_middle_of_an_episode_an_env_goes_on_bit_for_bit(backend: str, name: str) -> None:
    if name in BOX2D:
        pytest.importorskip("Box2D")
    if name in MUJOCO:
        pytest.importorskip("mujoco")
    env = vec(name, backend=backend, max_episode_steps=60)
    env.reset()
    actions = random_actions(env, 90)
    for action in actions[:40]:
        env.step(action)
    env.episodes()
    state = env.state_dict()
    other = vec(name, seed=SEED + 1, backend=backend, max_episode_steps=60)  # the seed is part of the state
    other.load_state_dict(state)
    assert torch.equal(env.obs(), other.obs())
    for action in actions[40:]:
        assert_same(env.step(action), other.step(action))
    ended = env.episodes()
    assert ended.env and ended == other.episodes()
    assert torch.equal(env.reset(), other.reset())
    env.close()
    other.close()


def test_a_state_survives_a_checkpoint(classic_backend: str, tmp_path: Any) -> None:
    env, other = (vec("CartPole-v1", 3, backend=classic_backend) for _ in range(2))
    env.reset()
    actions = random_actions(env, 150)
    for action in actions[:70]:
        env.step(action)
    checkpoint.save(tmp_path, 70, {"env": env.state_dict()})
    _, state = checkpoint.load_newest(tmp_path, warn=pytest.fail)
    other.load_state_dict(state["env"])
    env.episodes()
    for action in actions[70:]:
        assert_same(env.step(action), other.step(action))
    assert env.episodes() == other.episodes()


def test_restoring_twice_and_before_the_first_step(classic_backend: str) -> None:
    env, other = (vec("CartPole-v1", backend=classic_backend, max_episode_steps=6) for _ in range(2))
    env.reset()
    for action in random_actions(env, 20):
        other.load_state_dict(env.state_dict())
        other.load_state_dict(other.state_dict())
        assert_same(env.step(action), other.step(action))


def test_a_state_shares_no_memory_with_the_env(classic_backend: str) -> None:
    env, twin, other, mid = (vec("CartPole-v1", backend=classic_backend, max_episode_steps=30) for _ in range(4))
    for e in (env, twin):
        e.reset()
    actions = random_actions(env, 80)
    for action in actions[:20]:
        env.step(action)
        twin.step(action)
    state, before = env.state_dict(), env.state_dict()
    for action in actions[20:40]:
        env.step(action)
        twin.step(action)
    assert_same_state(state, before)

    def wipe(state: dict[str, Any]) -> None:
        for x in held(state):
            if isinstance(x, np.ndarray):
                x[...] = 0

    wipe(state)
    for action in actions[40:]:
        assert_same(env.step(action), twin.step(action))
    assert env.episodes() == twin.episodes() != Episodes.none()
    other.load_state_dict(before)
    wipe(before)
    mid.load_state_dict(other.state_dict())
    for action in actions[20:]:
        assert_same(mid.step(action), other.step(action))


def test_a_state_of_another_number_of_envs_is_refused(classic_backend: str) -> None:
    env = vec("CartPole-v1", 3, backend=classic_backend)
    env.reset()
    with pytest.raises(ValueError, match="a state of 3 envs does not fit 2 envs"):
        vec("CartPole-v1", 2, backend=classic_backend).load_state_dict(env.state_dict())


@pytest.mark.parametrize("where", ["obs", "reward", "end"])
def test_an_env_with_hidden_state_is_reported_once_and_cut(where: str) -> None:
    envs_for_tests.Drifting.steps = 0
    env = vec("Drifting-v0", 3, where=where)
    env.reset()
    actions = random_actions(env, 50)
    for action in actions[:9]:  # 27 steps: the replay reaches the 30th
        env.step(action)
    other = vec("Drifting-v0", 3, where=where)
    with pytest.warns(UserWarning) as caught:
        other.load_state_dict(env.state_dict())
    assert len(caught) == 1
    assert "Drifting-v0 does not repeat its episodes" in str(caught[0].message)
    lost = [1, 2] if where == "end" else [0, 1, 2]
    if where == "end":
        assert "(env 0 of 3)" in str(caught[0].message)
        lost = [0]
    after = other.state_dict()
    assert [i for i, k in enumerate(after["episode"]) if k == 1] == lost
    assert [len(a) for a in after["actions"]] == [0 if i in lost else 9 for i in range(3)]
    assert other.episodes() == Episodes.none()
    for action in actions[9:]:
        other.step(action)


def test_the_history_of_actions_stays_bounded() -> None:
    env = vec("Counter-v0", max_episode_steps=500)
    env.reset()
    history = env._history  # type: ignore[attr-defined]
    room, most = len(history._rows), 0
    for action in random_actions(env, 6_100):
        env.step(action)
        most = max(most, history.steps)
    assert most <= len(history._rows) == room
    assert [len(a) for a in env.state_dict()["actions"]] == [100, 100]


def test_the_history_grows_with_an_episode_that_does_not_end() -> None:
    env, other = (vec("Counter-v0") for _ in range(2))
    env.reset()
    actions = random_actions(env, 5_000)
    for action in actions:
        env.step(action)
    state = env.state_dict()
    for i in range(2):
        assert np.array_equal(state["actions"][i], actions[:, i].numpy())
    assert len(env._history._rows) <= 4 * 5_000  # type: ignore[attr-defined]
    other.load_state_dict(state)
    assert_same(env.step(actions[0]), other.step(actions[0]))


def test_envs_that_end_at_different_times_keep_their_own_histories(backend: str) -> None:
    env = vec("Luck-v0", 3, backend=backend, lengths=(1, 7, 900, 1500))
    env.reset()
    actions = random_actions(env, 4_000)
    began = [0, 0, 0]
    for t, action in enumerate(actions, 1):
        for i in env.step(action).terminated.nonzero().flatten().tolist():
            began[i] = t
        if t % 397 == 0:
            for i, a in enumerate(env.state_dict()["actions"]):
                assert np.array_equal(a, actions[began[i] : t, i].numpy())


# Gymnasium's wrappers


@pytest.mark.parametrize("name", ["CartPole-v1", "Counter-v1", "Counter-v2"])
def test_an_env_without_its_time_limit_wrapper_plays_the_same(name: str) -> None:
    env = vec(name, 1)
    plain = gymnasium.make(name)
    obs = env.reset()
    episode = 0
    row, _ = plain.reset(seed=episode_seed(SEED, 0, 0))
    for action in random_actions(env, 100):
        assert torch.equal(obs[0], torch.tensor(row, dtype=torch.float32))
        step = env.step(action)
        row, reward, terminated, truncated, _ = plain.step(int(action))
        assert torch.equal(step.next_obs[0], torch.tensor(row, dtype=torch.float32))
        assert (step.reward[0], step.terminated[0], step.truncated[0]) == (torch.tensor(reward), terminated, truncated)
        if terminated or truncated:
            episode += 1
            row, _ = plain.reset(seed=episode_seed(SEED, 0, episode))
        obs = step.obs
    assert episode > 0


def test_only_the_outermost_standard_wrappers_are_taken_off() -> None:
    def peeled(name: str, **options: Any) -> tuple[str, float]:
        env, limit = peel(make(EnvConfig(name, **options), 1)[0])
        return str(env).replace("Instance", ""), limit

    class OwnLimit(TimeLimit):
        """A subclass may do more."""

    assert peeled("CartPole-v1")[1] == 500
    assert isinstance(peel(make(EnvConfig("CartPole-v1"), 1)[0])[0], type(gymnasium.make("CartPole-v1").unwrapped))
    assert peeled("CartPole-v1", max_episode_steps=9)[1] == 9
    assert peeled("Counter-v0")[1] == float("inf")
    env = make(EnvConfig("Counter-v2"), 1)[0]
    assert peel(env) == (env, float("inf"))
    own = OwnLimit(gymnasium.make("Counter-v0"), 5)
    assert peel(own) == (own, float("inf"))
    assert type(own.env) is OrderEnforcing


def test_stepping_before_the_reset_is_refused(classic_backend: str) -> None:
    with pytest.raises(RuntimeError, match="call reset or load_state_dict before step"):
        vec("CartPole-v1", backend=classic_backend).step(torch.zeros(2, dtype=torch.int64))


def test_the_notice_of_a_newer_version_does_not_reach_the_user() -> None:
    pytest.importorskip("mujoco")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vec("HalfCheetah-v4", 1).close()
        vec("CartPole-v0", 1).close()


# Errors


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        vec(name, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CartPole-v7", "env=CartPole-v1"),
        ("cartpole-v1", "env=CartPole-v1"),
        ("CartPloe-v1", "env=CartPole-v1"),
        ("HalfCheeta-v4", "env=HalfCheetah-v4"),
        ("LunarLander-v2", "env=LunarLander-v3"),
        ("Hopper-v3", "env=Hopper-v5"),
        ("tests.envs_for_tests:Countr-v0", "env=tests.envs_for_tests:Counter-v0"),
        ("tests.envs_for_tests:CartPle-v1", "env=CartPole-v1"),
    ],
)
def test_an_unknown_id_gets_its_near_misses(name: str, hint: str) -> None:
    text = refusal(name)
    assert text.startswith(f"env={name}: ") and "Did you mean" in text and hint in text
    assert text.count("Did you mean") == 1
    assert "python -m pgrl.train --envs" in text


def test_atari_ids_are_registered_by_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gymnasium does not import ale_py by itself."""
    assert env_ids.missing_package("ALE/Pretended-v5") == ("ale_py", "ale-py")
    (tmp_path / "ale_py.py").write_text(
        "import gymnasium\n"
        "from tests.envs_for_tests import Counter\n"
        "gymnasium.register('ALE/Pretended-v5', Counter, max_episode_steps=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert env_ids.missing_package("ALE/Pretended-v5") is None
    assert vec("ALE/Pretended-v5").reset().shape == (2, 2)
    del gymnasium.registry["ALE/Pretended-v5"], sys.modules["ale_py"]


def test_an_id_like_no_other_gets_the_list() -> None:
    assert "Did you mean" not in refusal("zzzzzzzzzzzzzzzzzz-v0")
    assert "All ids: " in refusal("zzzzzzzzzzzzzzzzzz-v0")
    assert "Malformed" in refusal("not an id")


def test_a_missing_package_gets_its_pip_line() -> None:
    text = refusal("NoPackage-v0")
    assert text.startswith("env=NoPackage-v0: a package it needs is not installed: No module named")
    assert text.splitlines()[-1] == "Run: pip install a_package_that_nobody_has"


@pytest.mark.parametrize("name", ["nobodys_module:Thing-v0", "nobodys_module.envs:Thing-v0"])
def test_a_module_of_ones_own_is_not_looked_for_elsewhere(name: str) -> None:
    """It lies in another folder; what has its name where packages come from is somebody else's."""
    text = refusal(name)
    assert "its package cannot be imported: No module named 'nobodys_module'" in text
    assert "in the folder that holds nobodys_module" in text and "pip install" not in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (gymnasium.error.DependencyNotInstalled("MuJoCo is not installed, run `pip ..."), "pip install 'pgrl[mujoco]'"),
        (gymnasium.error.DependencyNotInstalled("Box2D is not installed, you can ..."), "pip install 'pgrl[box2d]'"),
        (ModuleNotFoundError("No module named 'Box2D'", name="Box2D"), "pip install 'pgrl[box2d]'"),
        (ModuleNotFoundError("No module named 'vizdoom.so'", name="vizdoom.so"), "pip install vizdoom"),
    ],
)
def test_an_extra_of_pgrl_is_named_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gymnasium, "make", fail)
    assert refusal("Hopper-v4").splitlines()[-1] == f"Run: {line}"


def test_wrong_keyword_arguments_are_answered_with_the_right_ones() -> None:
    text = refusal("CartPole-v1", colour="red")
    assert text.startswith("env.kwargs={'colour': 'red'}: ") and "'colour'" in text.splitlines()[0]
    assert text.splitlines()[-1] == "CartPole-v1 takes: sutton_barto_reward, render_mode"
    assert "Counter-v0 takes: terminate_at, truncate_at" in refusal("Counter-v0", size=3)
    assert "takes: terminate_at, truncate_at" in refusal("tests.envs_for_tests:Counter-v0", size=3)
    text = refusal("FrozenLake-v1", map_name="foo")  # a value that the env itself refuses
    assert text == "env.kwargs={'map_name': 'foo'}: FrozenLake-v1 says KeyError: 'foo'"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_time_limit_below_one_step_is_refused(classic_backend: str, limit: int) -> None:
    text = refusal("CartPole-v1", backend=classic_backend, max_episode_steps=limit)
    assert text.startswith(f"env.max_episode_steps={limit}: ")


def test_an_unknown_backend_is_refused() -> None:
    assert "Use env.backend=gymnasium or envpool or torch" in refusal("CartPole-v1", backend="abacus")


def test_the_command_line_knows_every_backend() -> None:
    assert CHOICES["backend"] == tuple(BACKENDS)


@pytest.mark.parametrize(("where", "at", "step"), [("step", 3, 4), ("step", 7, 3), ("reset", 0, 0), ("reset", 2, 0)])
def test_what_an_env_raises_says_where(backend: str, where: str, at: int, step: int) -> None:
    env = vec("Fragile-v0", 3, backend=backend, where=where, at=at)
    with pytest.raises(FloatingPointError, match="the simulator diverged") as caught:
        env.reset()
        for action in random_actions(env, 50):
            env.step(action)
    episode = at // 5 if where == "step" else at
    seed = episode_seed(SEED, 0, episode)
    (note,) = caught.value.__notes__
    assert note.replace("tests.envs_for_tests:", "") == (
        f"raised by env 0 of 3 (Fragile-v0) in episode {episode}, reset(seed={seed}), step {step}"
    )
    env.close()
