"""EnvPool's envs: the resets and the errors with a stand-in for the package, the rest with the package where it is."""

from __future__ import annotations

import math
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.envs_for_tests import Counter
from tests.test_envs import assert_same, copied, random_actions, vec

import pgrl
from pgrl import checkpoint, config, env_ids
from pgrl.data import Rollout
from pgrl.envs import EnvConfig, Episodes, VecEnv, make_vec, to_evaluate
from pgrl.envs.base import episode_seed
from pgrl.envs.envpool import flat
from pgrl.envs.spaces import to_row
from pgrl.errors import UserError

SEED = 7
LIMITS = {
    "Counter-v0": 2**31 - 1,
    "Counter-v1": 8,
    "Alone-v0": 6,
    "OwnClock-v0": 0,
    "CartPole-v1": 500,
    "Broken-v0": 9,
    "Players-v0": 9,
    "Table-v0": 9,
}
Config = namedtuple("Config", "num_envs seed max_episode_steps max_num_players num_threads terminate_at")


def refusal(env_id: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        vec(env_id, backend="envpool", **options)
    return str(caught.value)


# A stand-in with EnvPool's ways: one stream for each env, an ended env is reset instead of taking its next action, and
# an end at the time limit is a truncation whatever else it is.


class Pool:
    """Counters; env i terminates after terminate_at + i steps."""

    def __init__(self, told: Config) -> None:
        self.told, n = told, told.num_envs
        at = told.terminate_at
        self.envs = [Counter(None if at is None else at + i) for i in range(n)]
        self.over, self.bogus = [False] * n, 0
        self.first = [np.random.default_rng(seed).integers(1000) for seed in told.seed]

    def reset(self, ids: NDArray[Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.array([self._begin(i) for i in (range(len(self.envs)) if ids is None else ids)]), {}

    def step(self, actions: NDArray[Any]) -> tuple[Any, ...]:
        rows = []
        for i, (env, a) in enumerate(zip(self.envs, actions, strict=True)):
            if self.over[i]:
                self.bogus += 1
                rows.append((self._begin(i), 0.0, False, False))
                continue
            obs, reward, over, _, _ = env.step(int(a))
            cut = env.t >= self.told.max_episode_steps
            self.over[i] = over or cut
            rows.append((obs, reward, over and not cut, cut))
        obs, reward, over, cut = (np.array(x) for x in zip(*rows, strict=True))
        return obs, reward.astype(np.float32), over, cut, {}

    def _begin(self, i: int) -> NDArray[Any]:
        self.over[i] = False
        self.first[i] += 100
        self.envs[i].s, self.envs[i].t = int(self.first[i]), 0
        return np.array([self.first[i], 0], np.float64)


def make_spec(env_id: str, **told: Any) -> Any:
    known = {"num_envs": 1, "seed": 42, "max_episode_steps": LIMITS[env_id], "max_num_players": 1, "num_threads": 0}
    known |= {"terminate_at": None} | ({"max_num_players": 2} if env_id == "Players-v0" else {})
    if env_id == "Broken-v0":
        raise ImportError("it needs Qt")
    for key in told.keys() - known.keys():
        raise TypeError(f"Config.__new__() got an unexpected keyword argument '{key}'")
    rows = spaces.Discrete(5) if env_id == "Table-v0" else Counter.observation_space
    return types.SimpleNamespace(
        config=Config(**known | told), gymnasium_observation_space=rows, gymnasium_action_space=Counter.action_space
    )


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """The pools that were made, by a package that stands in for EnvPool."""
    made: list[Pool] = []

    def make(env_id: str, env_type: str, **told: Any) -> Pool:
        assert env_type == "gymnasium"
        made.append(Pool(make_spec(env_id, **told).config))
        return made[-1]

    stand_in = types.ModuleType("envpool")
    vars(stand_in).update(make=make, make_spec=make_spec, list_all_envs=lambda: list(LIMITS))
    monkeypatch.setitem(sys.modules, "envpool", stand_in)
    return made


@pytest.mark.parametrize("name", ["Counter-v0", "Alone-v0"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("terminate_at", "limit"), [(3, None), (None, 4), (3, 4), (4, 4), (1, None), (None, 1)])
def test_every_transition_is_the_known_one(
    pools: list[Pool], name: str, num_envs: int, terminate_at: int | None, limit: int | None
) -> None:
    env = vec(name, num_envs, backend="envpool", max_episode_steps=limit, terminate_at=terminate_at)
    obs = env.reset()
    first = [int(np.random.default_rng(episode_seed(SEED, i, 0)).integers(1000)) + 100 for i in range(num_envs)]
    s, t, total = list(first), [0] * num_envs, [0.0] * num_envs
    cut_at = limit or (6 if name == "Alone-v0" else None)
    assert obs.tolist() == [[s[i], 0] for i in range(num_envs)]
    for action in random_actions(env, 30):
        step = env.step(action)
        finished = Episodes.none()
        for i, a in enumerate(action.tolist()):
            reward = torch.tensor(0.1 * s[i] - a)
            total[i] += float(reward)
            s[i], t[i] = s[i] + 1 + a, t[i] + 1
            assert step.next_obs[i].tolist() == [s[i], t[i]]
            assert step.reward[i] == reward
            over, cut = terminate_at is not None and t[i] == terminate_at + i, t[i] == cut_at
            assert step.terminated[i] == (over and not (cut and name == "Alone-v0"))  # there EnvPool alone knows
            assert step.truncated[i] == cut
            if over or cut:
                finished.extend(Episodes([total[i]], [t[i]], [i]))
                first[i] += 100
                s[i], t[i], total[i] = first[i], 0, 0.0
            assert step.obs[i].tolist() == [s[i], t[i]]
        assert torch.equal(env.obs(), step.obs)
        assert env.episodes() == finished and env.episodes() == Episodes.none()
    assert [pool.bogus for pool in pools] == [0]


def test_the_clock_of_gymnasiums_envs_is_kept_here_and_that_of_others_by_envpool(pools: list[Pool]) -> None:
    for name, limit, told in (
        ("Counter-v1", None, 9),
        ("Counter-v1", 20, 21),
        ("Counter-v0", None, 2**31 - 1),
        ("Alone-v0", None, 6),
        ("Alone-v0", 20, 20),
        ("OwnClock-v0", None, 0),
    ):
        vec(name, backend="envpool", max_episode_steps=limit).reset()
        assert pools[-1].told.max_episode_steps == told, name
    assert env_ids.time_limit("OwnClock-v0", "envpool") == 0
    assert env_ids.time_limit("Counter-v0", "envpool") is None


def test_a_restored_state_begins_other_episodes_and_says_so(pools: list[Pool]) -> None:
    env, others = vec("Counter-v0", 2, backend="envpool", terminate_at=3), []
    first = env.reset()
    for action in random_actions(env, 8):  # env 0 is in its third episode, env 1, with one step more, too
        env.step(action)
    state = env.state_dict()
    assert state == {"seed": SEED, "episode": [2, 2]}
    for _ in range(2):
        other = vec("Counter-v0", 2, seed=SEED + 1, backend="envpool", terminate_at=3)
        with pytest.warns(UserWarning, match="cannot put Counter-v0 back .* all 2 envs begin new ones") as caught:
            other.load_state_dict(state)
        assert len(caught) == 1
        others.append(other)
    assert pools[-1].told.seed == [episode_seed(SEED, i, 3) for i in range(2)]
    assert torch.equal(others[0].obs(), others[1].obs()) and not torch.equal(others[0].obs(), first)
    assert others[0].obs()[:, 1].tolist() == [0, 0] and others[0].episodes() == Episodes.none()
    for action in random_actions(env, 5):
        assert_same(others[0].step(action), others[1].step(action))
    assert others[0].episodes().length == [3, 4]
    assert others[0].state_dict() == {"seed": SEED, "episode": [4, 4]}
    with pytest.raises(ValueError, match="a state of 2 envs does not fit 3 envs"):
        vec("Counter-v0", 3, backend="envpool").load_state_dict(state)


def test_evaluation_is_in_gymnasiums_env_where_it_is_the_same_one(pools: list[Pool]) -> None:
    same = EnvConfig("Counter-v1", "envpool", 5, {"num_threads": 3})
    assert to_evaluate(same) == EnvConfig("Counter-v1", "gymnasium", 5)
    gymnasium.register("Table-v0", Counter)  # what EnvPool calls so has other observations
    for name, kwargs in (("Alone-v0", {}), ("Table-v0", {}), ("Counter-v1", {"terminate_at": 3})):
        other = EnvConfig(name, "envpool", kwargs=kwargs)
        assert to_evaluate(other) is other, name
    del gymnasium.registry["Table-v0"]
    plain = EnvConfig("Counter-v1")
    assert to_evaluate(plain) == plain == to_evaluate(EnvConfig("Counter-v1", processes=4))
    assert pools == []  # spaces are known without envs


# Errors


def test_the_absence_of_the_package_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    text = refusal("CartPole-v1")
    assert text.startswith("env.backend=envpool: ") and text.splitlines()[-1] == "Run: pip install envpool"
    with pytest.raises(SystemExit) as caught:
        config.main(["env.backend=envpool"], lambda run: None)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.startswith("env.backend=envpool: EnvPool cannot be imported")
    assert text.splitlines()[-1] == "Try: pip install envpool"


@pytest.mark.parametrize(
    ("env_id", "why", "use"),
    [
        ("Counter-v7", "did you mean Counter-v1 or Counter-v0", "env=Counter-v1"),
        ("alone-v0", "did you mean Alone-v0", "env=Alone-v0"),
        ("Acrobot-v1", "EnvPool has no Acrobot-v1, which is one of Gymnasium's", "env.backend=gymnasium"),
        ("pgrl/LinearQuadratic-v0", "one of Gymnasium's", "env.backend=gymnasium"),
        ("tests.envs_for_tests:Luck-v0", "one of Gymnasium's", "env.backend=gymnasium"),
        ("Broken-v0", "EnvPool cannot load it: it needs Qt", "env=CartPole-v1"),
    ],
)
def test_an_unknown_id_is_answered_with_one_that_works(
    pools: list[Pool], env_id: str, why: str, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good: list[Any] = []
    with pytest.raises(SystemExit) as caught:
        config.main(["env.backend=envpool", f"env={env_id}", "tuned=null"], good.append)
    *lines, remedy = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and why in lines[0] and use in remedy.split()
    config.main(remedy.removeprefix("Try: python -m pgrl.train ").split(), good.append)
    assert len(good) == 1
    text = refusal(env_id)
    assert text.startswith(f"env={env_id}: ") and (use in text or why in text)


def test_arguments_that_envpool_does_not_take_are_refused(pools: list[Pool]) -> None:
    text = refusal("Alone-v0", colour="red")
    assert text.startswith("env.kwargs={'colour': 'red'}: ") and "'colour'" in text.splitlines()[0]
    assert text.splitlines()[-1] == "Alone-v0 takes: max_num_players, num_threads, terminate_at"
    assert refusal("Alone-v0", batch_size=2).startswith("env.kwargs.batch_size: ")
    assert refusal("Alone-v0", max_episode_steps=-1).startswith("env.max_episode_steps=-1: must be at least 1")
    assert "several players" in refusal("Players-v0")


def test_a_batch_of_observations_becomes_rows() -> None:
    space = spaces.Dict(
        b=spaces.Dict(c=spaces.MultiBinary(2), a=spaces.Box(-1, 1, (2, 2))),
        d=spaces.Discrete(3, start=1),
        e=spaces.Box(0, 9, ()),
    )
    space.seed(0)
    samples = [space.sample() for _ in range(4)]

    def batch(part: Any, pick: Any) -> Any:
        if isinstance(part, spaces.Dict):
            return {key: batch(part[key], lambda x, key=key: pick(x)[key]) for key in part}
        return np.stack([pick(x) for x in samples])

    row: Any = to_row(space)
    assert np.allclose(flat(space, batch(space, lambda x: x)), np.stack([row(x) for x in samples]))


# The package itself


@pytest.fixture
def envpool() -> Any:
    return pytest.importorskip("envpool")


def pool(name: str, num_envs: int, seed: int = SEED, **options: Any) -> VecEnv:
    return vec(name, num_envs, seed, backend="envpool", **options)


@pytest.mark.parametrize(("num_envs", "limit"), [(1, 15), (64, 15), (64, None)])
def test_every_row_of_cartpole_follows_the_equations(envpool: Any, num_envs: int, limit: int | None) -> None:
    """Each row is repeated by Gymnasium's own step from the same state: a reset taken for a step could not be."""
    oracle: Any = gymnasium.make("CartPole-v1").unwrapped
    env = pool("CartPole-v1", num_envs, max_episode_steps=limit)
    obs, length, ended = env.reset(), [0] * num_envs, 0
    at_limit = {True: 0, False: 0}
    for action in random_actions(env, 4000 // num_envs):
        step = env.step(action)
        episodes = {e[2]: e for e in zip(*env.episodes(), strict=True)}
        for i, a in enumerate(action.tolist()):
            oracle.state, oracle.steps_beyond_terminated = obs[i].double().numpy(), None
            row, reward, terminated, _, _ = oracle.step(a)
            length[i] += 1
            assert np.allclose(row, step.next_obs[i], atol=1e-5)
            assert step.reward[i] == reward == 1.0
            if min(abs(abs(row[0]) - 2.4), abs(abs(row[2]) - oracle.theta_threshold_radians)) > 1e-4:
                assert step.terminated[i] == terminated
            assert step.truncated[i] == (length[i] == (limit or 500))
            over = bool(step.terminated[i] | step.truncated[i])
            assert over == (i in episodes)
            if over:
                assert episodes[i] == (length[i], length[i], i)
                assert (step.obs[i].abs() <= 0.05).all()
                if limit and length[i] == limit:
                    at_limit[bool(step.terminated[i])] += 1
                length[i], ended = 0, ended + 1
            else:
                assert torch.equal(step.obs[i], step.next_obs[i])
        obs = step.obs
    assert ended > 20
    assert limit is None or num_envs == 1 or min(at_limit.values()) > 0  # both happened: the pole fell at the limit
    env.close()


def test_halfcheetah_steps_as_gymnasiums(envpool: Any) -> None:
    """From any state on the way; the observation is the state but for the position along the track."""
    pytest.importorskip("mujoco")
    oracle: Any = gymnasium.make("HalfCheetah-v4").unwrapped
    oracle.reset(seed=0)
    env = pool("HalfCheetah-v4", 4, max_episode_steps=20)
    obs = env.reset()
    for action in random_actions(env, 45):
        step = env.step(action)
        for i in range(4):
            state = obs[i].double().numpy()
            oracle.set_state(np.concatenate([[0.0], state[:8]]), state[8:])
            row, reward, _, _, _ = oracle.step(action[i].clamp(-1, 1).numpy())
            assert np.allclose(row, step.next_obs[i], atol=1e-2) and abs(reward - float(step.reward[i])) < 1e-3
        obs = step.obs


def test_returns_are_distributed_as_gymnasiums(envpool: Any) -> None:
    def returns(backend: str) -> NDArray[Any]:
        env = vec("CartPole-v1", 32, backend=backend)
        env.reset()
        for action in random_actions(env, 1500, seed=1):
            env.step(action)
        return np.array(env.episodes().env_return)

    a, b = returns("envpool"), returns("gymnasium")
    assert min(len(a), len(b)) > 1500
    assert abs(a.mean() - b.mean()) < 4 * math.sqrt(a.var() / len(a) + b.var() / len(b))
    for q in (12, 20, 35):  # shares of episodes up to so many steps
        p = np.mean(np.concatenate([a, b]) <= q)
        assert abs(np.mean(a <= q) - np.mean(b <= q)) < 4 * math.sqrt(p * (1 - p) * (1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v4"])
def test_an_env_is_the_same_in_every_vectorisation_and_after_a_reset(envpool: Any, name: str) -> None:
    def rows(num_envs: int, seed: int = SEED) -> list[torch.Tensor]:
        env = pool(name, num_envs, seed, max_episode_steps=25)
        actions = random_actions(pool(name, 8), 70)[:, :num_envs]
        runs = []
        for _ in range(2):
            runs.append(torch.stack([env.reset(), *(env.step(a).obs for a in actions)]))
            assert len(env.episodes().env) >= 2 * num_envs
        assert torch.equal(*runs)
        return list(runs[0].unbind(1))

    most = rows(8)
    assert all(torch.equal(a, b) for n in (1, 3) for a, b in zip(rows(n), most, strict=False))
    firsts = [tuple(r[0].tolist()) for r in [*most, *rows(8, SEED + 1)]]
    assert len(set(firsts)) == 16  # neighbouring seeds share no stream


def test_actions_are_clipped_to_the_bounds(envpool: Any) -> None:
    env, twin = pool("Pendulum-v1", 2), pool("Pendulum-v1", 2)
    assert torch.equal(env.reset(), twin.reset())
    assert_same(env.step(torch.tensor([[9.0], [-9.0]])), twin.step(torch.tensor([[2.0], [-2.0]])))


def test_answers_have_memory_of_their_own_or_are_written_into_a_rollout(envpool: Any) -> None:
    env, twin = (pool("CartPole-v1", 3, max_episode_steps=4) for _ in range(2))
    rollout = Rollout(6, 3, env.obs_space, env.action_space, env.device)
    rollout.begin(env.reset())
    twin.reset()
    kept = []
    for t, action in enumerate(random_actions(env, 6)):
        assert env.step(action, out=rollout.steps[t]) is rollout.steps[t]
        step = twin.step(action)
        assert_same(rollout.steps[t], step)
        assert torch.equal(rollout.obs[t + 1], env.obs())
        kept.append((step, copied(step)))
    for step, copy in kept:
        assert_same(step, copy)
    env.obs().fill_(9.0)
    assert torch.equal(env.obs(), twin.obs())


def test_stepping_before_the_reset_is_refused(envpool: Any) -> None:
    with pytest.raises(RuntimeError, match="call reset or load_state_dict before step"):
        pool("CartPole-v1", 2).step(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("HalfCheetah-v4", (17,), torch.float32),
        ("Pong-v5", (4, 84, 84), torch.uint8),
        ("FrozenLake-v1", (16,), torch.float32),
        ("WalkerWalk-v1", (24,), torch.float32),
    ],
)
def test_observations_are_rows(envpool: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    env = pool(name, 3, max_episode_steps=5)
    obs = env.reset()
    for action in random_actions(env, 12):
        step = env.step(action)
        for x in (obs, step.obs, step.next_obs):
            assert x.shape == (3, *shape) and x.dtype == dtype
        if dtype.is_floating_point:
            assert torch.isfinite(step.next_obs).all()
        obs = step.obs
    if name != "FrozenLake-v1":  # which may end earlier
        assert env.episodes().length == [5] * 6
    env.close()


def test_real_ids_and_arguments_are_known(envpool: Any) -> None:
    assert "env=Pong-v5" in refusal("Pong-v4")
    assert "Did you mean env=HalfCheetah-v" in refusal("HalfCheeta-v4")
    assert "HalfCheetah-v4 takes: " in refusal("HalfCheetah-v4", colour="red")
    pytest.importorskip("mujoco")
    assert to_evaluate(EnvConfig("HalfCheetah-v4", "envpool")).backend == "gymnasium"
    assert to_evaluate(EnvConfig("Pong-v5", "envpool")).backend == "envpool"


@pytest.mark.filterwarnings("default:EnvPool cannot put:UserWarning")  # which is what is to be seen
@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_run_trains_evaluates_and_resumes(
    envpool: Any, algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = ["algo.num_steps=32", "algo.num_minibatches=4"] if algo == "ppo" else ["algo.learning_starts=64"]
    sized += ["algo.batch_size=64"] * (algo == "sac")
    run_dir = pgrl.run(
        [f"algo={algo}", "env=Pendulum-v1", "env.backend=envpool", "env.max_episode_steps=20", "num_envs=4", *sized]
        + ["tuned=null", "total_timesteps=512", "eval_every=256", "threads=1", "tensorboard=false"]
        + [f"run_dir={tmp_path / 'run'}"]
    )
    line = "\nenv.backend=envpool: a resumed run begins new episodes, and is not the same run\n"
    assert line in capsys.readouterr().out
    assert pgrl.run([f"resume={run_dir}", "total_timesteps=1024"]) == run_dir
    text = capsys.readouterr()
    assert line in text.out and "all 4 envs begin new ones" in text.err
    step, state = checkpoint.load_newest(run_dir, pytest.fail, rows=True)
    assert step == 1024 and state["env"]["episode"] == [6 + 1 + 6] * 4  # 6 whole episodes, a lost one, 6 whole ones


def test_make_vec_takes_the_backend(pools: list[Pool]) -> None:
    env = make_vec(EnvConfig("Alone-v0", "envpool"), 2, 0)
    assert env.num_envs == 2 and env.obs_space.shape == (2,) and env.device == torch.device("cpu")
