"""Classic control in tensors equals Gymnasium's; what the contract asks of every backend is in test_envs.py."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.callback import callback_handler

from pgrl.data import Rollout
from pgrl.envs import EnvConfig, Episodes, TorchVecEnv, VecEnv, make_vec
from pgrl.envs.torch_classic import CLASSICS, classic
from pgrl.errors import UserError

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
WIDEST = {  # states well beyond the ends of an episode, and up to each bound
    "CartPole-v1": [2.6, 3.0, 0.25, 3.0],
    "Pendulum-v1": [60.0, 8.0],
    "Acrobot-v1": [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
    "MountainCar-v0": [0.9, 0.07],
    "MountainCarContinuous-v0": [0.9, 0.07],
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CLASSICS),
    ("CartPole-v1", {"sutton_barto_reward": True}),
    ("Pendulum-v1", {"g": 9.81}),
    ("MountainCar-v0", {"goal_velocity": 0.02}),
    ("MountainCarContinuous-v0", {"goal_velocity": 0.02}),
]


def config(name: str, limit: int | None = None, **kwargs: Any) -> EnvConfig:
    return EnvConfig(name, "torch", max_episode_steps=limit, kwargs=kwargs)


def torch_env(name: str, num_envs: int, seed: int = 5, limit: int | None = None) -> TorchVecEnv:
    env = make_vec(config(name, limit), num_envs, seed)
    assert isinstance(env, TorchVecEnv)
    return env


def held(env: VecEnv) -> list[Tensor]:
    """The tensors an env keeps."""
    return [x for x in vars(env).values() if isinstance(x, Tensor)]


def actions_for(env: VecEnv, steps: int) -> Tensor:
    """Random actions [steps, B, ...]; a quarter of those of a Box is out of its bounds, on either side."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(env.action_space, spaces.Discrete):
        return torch.randint(int(env.action_space.n), (steps, env.num_envs), generator=generator)
    assert isinstance(env.action_space, spaces.Box)
    high = float(env.action_space.high.item())
    return high * (2 * torch.rand(steps, env.num_envs, 1, generator=generator) - 1) / 0.75


def give(env: Any, state: Tensor) -> None:
    """Put one of Gymnasium's envs into `state` [S]."""
    env.reset()
    env.unwrapped.state = state.numpy().copy()


def answer(env: Any, action: Tensor) -> tuple[Any, float, bool, bool]:
    """What one of Gymnasium's envs answers to an action in its bounds."""
    space = env.action_space
    chosen = int(action) if isinstance(space, spaces.Discrete) else np.clip(action.numpy(), space.low, space.high)
    obs, reward, terminated, truncated, _ = env.step(chosen)
    return obs, float(reward), bool(terminated), bool(truncated)


# Equal to Gymnasium


@pytest.mark.parametrize(("name", "kwargs"), OPTIONS)
def test_a_step_from_any_state_is_gymnasiums(name: str, kwargs: dict[str, Any]) -> None:
    n = 600
    generator = torch.Generator().manual_seed(2)
    widest = torch.tensor(WIDEST[name], dtype=torch.float64)[:, None]
    state = widest * (2 * torch.rand(len(widest), n, generator=generator, dtype=torch.float64) - 1)
    state[:, :50] = state[:, :50].sign() * widest  # corners
    if name.startswith("Mountain"):
        state[0] -= 0.3  # the road is not centred on 0
    env, ours = gymnasium.make(name, **kwargs).unwrapped, classic(config(name, **kwargs))
    action = actions_for(torch_env(name, n), 1)[0]
    bounds = (env.action_space.low, env.action_space.high) if isinstance(env.action_space, spaces.Box) else (None, None)
    flat = action.flatten() if bounds[0] is None else action.flatten().clamp(*(float(x.item()) for x in bounds))

    after, reward, terminated = ours.dynamics(state, flat)
    obs = ours.observe(after)
    ended = 0
    for i in range(n):
        give(env, state[:, i])
        row, gain, over, _ = answer(env, action[i])
        np.testing.assert_allclose(obs[:, i].float().numpy(), row, **TOLERANCE)
        np.testing.assert_allclose(reward[i].float().item(), gain, **TOLERANCE)
        assert terminated[i].item() == over, state[:, i]
        ended += over
    assert after.dtype == reward.dtype == torch.float64 and after.shape == state.shape
    assert (0 < ended < n) == (name != "Pendulum-v1")


class Known:
    """Draws of a generator whose next numbers in [0, 1) are known."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise.numpy()

    def uniform(self, low: Any, high: Any, size: Any = None) -> Any:
        noise = self.noise if size or np.ndim(low) else self.noise[0]
        return low + (np.asarray(high) - low) * noise


@pytest.mark.parametrize("name", CLASSICS)
def test_a_first_state_is_gymnasiums(name: str) -> None:
    ours, env = classic(config(name)), gymnasium.make(name).unwrapped
    noise = torch.rand(ours.size, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    noise[:, 0], noise[:, 1] = 0.0, 1.0
    state = ours.reset(noise)
    assert state.dtype == torch.float64
    for i in range(20):
        env.np_random = Known(noise[:, i])  # type: ignore[assignment]
        obs, _ = env.reset()
        np.testing.assert_allclose(state[:, i].numpy(), np.asarray(env.state), rtol=0, atol=1e-8)  # type: ignore[attr-defined]
        np.testing.assert_allclose(ours.observe(state)[:, i].float().numpy(), obs, **TOLERANCE)


@pytest.mark.parametrize(("name", "limit"), [*((name, 40) for name in CLASSICS), ("CartPole-v1", 12)])
def test_episodes_are_gymnasiums_from_equal_first_states(name: str, limit: int) -> None:
    """Gymnasium's envs are told the first state of each episode alone; all that follows is their own."""
    num_envs, steps = 8, 130
    env = torch_env(name, num_envs, limit=limit)
    twins = [gymnasium.make(name, max_episode_steps=limit) for _ in range(num_envs)]

    def begin(i: int) -> None:
        give(twins[i], env._state[:, i])
        totals[i], lengths[i] = 0.0, 0

    totals, lengths, ended = [0.0] * num_envs, [0] * num_envs, Episodes.none()
    at_once = 0
    obs = env.reset()
    for i in range(num_envs):
        begin(i)
    for action in actions_for(env, steps):
        step = env.step(action)
        for i, twin in enumerate(twins):
            row, gain, over, cut = answer(twin, action[i])
            np.testing.assert_allclose(step.next_obs[i].numpy(), row, **TOLERANCE)
            np.testing.assert_allclose(step.reward[i].item(), gain, **TOLERANCE)
            assert (step.terminated[i].item(), step.truncated[i].item()) == (over, cut)
            totals[i], lengths[i] = totals[i] + gain, lengths[i] + 1
            at_once += over and cut
            if over or cut:
                ended.extend(Episodes([totals[i]], [lengths[i]], [i]))
                begin(i)
                assert not torch.equal(step.obs[i], step.next_obs[i])
                first = twin.unwrapped
                seen = first._get_obs() if name == "Pendulum-v1" else None
                seen = first._get_ob() if name == "Acrobot-v1" else first.state if seen is None else seen
                np.testing.assert_allclose(step.obs[i].numpy(), seen, **TOLERANCE)
            else:
                assert torch.equal(step.obs[i], step.next_obs[i])
        assert torch.equal(env.obs(), step.obs)
    assert not torch.equal(obs, env.obs())
    told = env.episodes()
    assert told[1:] == ended[1:]
    np.testing.assert_allclose(told.env_return, ended.env_return, rtol=0, atol=1e-4)
    assert len(told.env) >= 3 * num_envs and env.episodes() == Episodes.none()
    assert (at_once > 0) == (limit == 12)


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov and Smirnov's distance of two samples [n], in units of what equal distributions exceed once in 1e4."""
    points = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b)]
    threshold = math.sqrt(-math.log(0.5e-4) / 2) * math.sqrt(1 / len(a) + 1 / len(b))
    return float((below[0] - below[1]).abs().max()) / threshold


def samples(env: VecEnv, limit: int, episodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last observations [n, O], and returns [n], of episodes with random actions."""
    firsts, lasts = [env.reset()], []
    generator = torch.Generator().manual_seed(3)
    for _ in range(limit * episodes):
        if isinstance(env.action_space, spaces.Discrete):
            action = torch.randint(int(env.action_space.n), (env.num_envs,), generator=generator)
        else:
            assert isinstance(env.action_space, spaces.Box)
            action = float(env.action_space.high[0]) * (2 * torch.rand(env.num_envs, 1, generator=generator) - 1)
        step = env.step(action)
        ended = step.terminated | step.truncated
        firsts.append(step.obs[ended])
        lasts.append(step.next_obs[ended])
    return torch.cat(firsts), torch.cat(lasts), torch.tensor(env.episodes().env_return)


@pytest.mark.parametrize("name", CLASSICS)
def test_random_play_has_gymnasiums_distribution(name: str) -> None:
    limit = 25
    theirs = samples(make_vec(EnvConfig(name, max_episode_steps=limit), 64, 3), limit, 12)
    ours = samples(torch_env(name, 512, limit=limit), limit, 12)
    assert len(theirs[2]) >= 12 * 64 and len(ours[2]) >= 12 * 512
    for a, b in zip(theirs[:2], ours[:2], strict=True):
        for theirs_at, ours_at in zip(a.T, b.T, strict=True):
            assert distance(theirs_at, ours_at) < 1
    assert distance(theirs[2], ours[2]) < 1
    error = math.sqrt(theirs[2].var() / len(theirs[2]) + ours[2].var() / len(ours[2]))
    assert abs(theirs[2].mean() - ours[2].mean()) <= 4 * error  # both 0 where each step costs 1


def test_the_distance_sees_small_differences() -> None:
    """The numbers of samples above tell a range of first states that is a fifth wider."""
    uniform = torch.rand(7000, generator=torch.Generator().manual_seed(4)) - 0.5
    assert distance(uniform[:800], uniform[800:]) < 1 < distance(1.2 * uniform[:800], uniform[800:])


@pytest.mark.parametrize("name", CLASSICS)
def test_spaces_and_limits_are_gymnasiums(name: str) -> None:
    ours, theirs = torch_env(name, 2), make_vec(EnvConfig(name), 2, 5)
    assert ours.obs_space == theirs.obs_space and ours.action_space == theirs.action_space
    assert ours._limit == gymnasium.spec(name).max_episode_steps


def test_envs_begin_differently_each_time_and_hang_on_the_seed() -> None:
    env = torch_env("CartPole-v1", 4, limit=1)
    firsts = [env.reset(), *(env.step(torch.zeros(4, dtype=torch.int64)).obs for _ in range(20))]
    assert len({tuple(row) for obs in firsts for row in obs.tolist()}) == 84
    assert torch.equal(torch_env("CartPole-v1", 4).reset(), firsts[0])
    assert not torch.equal(torch_env("CartPole-v1", 4, seed=6).reset(), firsts[0])


# Without waiting for the device


class HostGenerator(torch.Generator):
    """Lies in main memory, whichever device is asked for."""

    def __new__(cls, device: torch.device) -> HostGenerator:
        return super().__new__(cls)


@pytest.mark.parametrize("name", CLASSICS)
def test_a_step_waits_for_no_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device hold nothing: whatever asks them for a number, or mixes them with others, fails."""
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    device = torch.device("meta")
    env = make_vec(config(name), 3, 0, "meta")
    rollout = Rollout(5, 3, env.obs_space, env.action_space, device)
    rollout.begin(env.reset())
    for t, step in enumerate(rollout.steps):
        rollout.put(t, torch.zeros_like(rollout.transition.action[t]))
        env.step(rollout.transition.action[t], out=step)
    action = rollout.transition.action[0]
    assert {x.device for x in (env.obs(), *env.step(action), *held(env))} == {device}
    with pytest.raises(NotImplementedError, match="nonzero"):  # numbers are out of reach
        env.episodes()


def test_a_step_leaves_its_tensors_in_their_place() -> None:
    """What a captured graph writes to, once there is room for the ends of a rollout."""
    env = torch_env("Acrobot-v1", 3, limit=2)
    env.reset()

    def places() -> list[int]:
        return [x.data_ptr() for x in held(env)]

    for _ in range(8):
        env.step(torch.zeros(3, dtype=torch.int64))
    before = places()
    for _ in range(3):
        assert len(env.episodes().env) == 12
        for _ in range(8):
            env.step(torch.zeros(3, dtype=torch.int64))
    env.load_state_dict(env.state_dict())
    env.reset()
    assert places() == before and len(before) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), OPTIONS)
def test_a_compiled_step_is_the_step_and_is_compiled_once(name: str, kwargs: dict[str, Any]) -> None:
    made: list[int] = []
    ours = make_vec(config(name, 30, **kwargs), 16, 5, compiled=True)
    twin = make_vec(config(name, 30, **kwargs), 16, 5)
    rollout = Rollout(3, 16, ours.obs_space, ours.action_space, torch.device("cpu"))
    assert torch.equal(ours.reset(), twin.reset())
    note = lambda _: made.append(1)  # noqa: E731
    callback_handler.register_end_callback(note)
    try:
        for k, action in enumerate(actions_for(twin, 90)):
            twin.load_state_dict(ours.state_dict())  # rounding may end an episode a step later
            for x, y in zip(ours.step(action, out=rollout.steps[k % 3]), twin.step(action), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
            assert ours.episodes()[1:] == twin.episodes()[1:]
            for name_, tensor in ours.state_dict().items():
                if isinstance(tensor, Tensor):
                    torch.testing.assert_close(tensor, twin.state_dict()[name_], rtol=1e-9, atol=1e-9)
    finally:
        callback_handler.remove_end_callback(note)
    assert made == [1]


def test_a_state_of_another_kind_of_device_goes_on_with_first_states_of_its_own() -> None:
    env, other = torch_env("CartPole-v1", 2), torch_env("CartPole-v1", 2, seed=6)
    env.reset()
    state = {**env.state_dict(), "generator": torch.zeros(16, dtype=torch.uint8)}  # as CUDA's is
    other.load_state_dict(state)
    assert torch.equal(other.obs(), env.obs())
    firsts = []
    for _ in range(2):
        other.load_state_dict(state)
        other._length.fill_(499)
        firsts.append(other.step(torch.zeros(2, dtype=torch.int64)).obs)
    assert torch.equal(*firsts) and not torch.equal(firsts[0], env.reset())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSICS)
def test_on_cuda_a_step_is_that_of_the_cpu_and_waits_for_nothing(name: str) -> None:
    ours, twin = make_vec(config(name, 30), 64, 5, "cuda"), torch_env(name, 64, limit=30)
    ours.reset()
    actions = actions_for(twin, 60)
    on_device = actions.cuda()
    for action, same in zip(actions, on_device, strict=True):
        state = ours.state_dict()
        twin.load_state_dict({**state, **{key: state[key].cpu() for key in ("state", "length", "return")}})
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = ours.step(same)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = twin.step(action)
        for x, y in zip(step[1:], expected[1:], strict=True):  # first states are each device's own
            assert x.is_cuda and torch.allclose(x.cpu().float(), y.float(), **TOLERANCE)
        ended = expected.terminated | expected.truncated
        assert torch.allclose(step.obs.cpu()[~ended], expected.obs[~ended], **TOLERANCE)
        assert ours.episodes()[1:] == twin.episodes()[1:]


# Errors


def refusal(name: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_vec(config(name, **kwargs), 2, 0)
    return str(caught.value)


def test_other_envs_are_refused_with_the_five_and_a_way_out() -> None:
    text = refusal("Hopper-v4")
    assert text.startswith("env=Hopper-v4: ") and all(name in text for name in CLASSICS)
    assert text.splitlines()[-1] == "Use: env=Hopper-v4 env.backend=gymnasium"


@pytest.mark.parametrize(
    ("name", "kwargs", "takes"),
    [
        ("CartPole-v1", {"render_mode": "human"}, "takes env.kwargs.sutton_barto_reward=false alone"),
        ("CartPole-v1", {"sutton_barto_reward": 1}, "takes env.kwargs.sutton_barto_reward=false alone"),
        ("Pendulum-v1", {"g": "low"}, "takes env.kwargs.g=10.0 alone"),
        ("Pendulum-v1", {"g": True}, "takes env.kwargs.g=10.0 alone"),
        ("MountainCar-v0", {"goal_position": 0.5}, "takes env.kwargs.goal_velocity=0.0 alone"),
        ("Acrobot-v1", {"g": 9.8}, "takes none."),
    ],
)
def test_other_keyword_arguments_are_refused(name: str, kwargs: dict[str, Any], takes: str) -> None:
    text = refusal(name, **kwargs)
    key, value = next(iter(kwargs.items()))
    assert text.startswith(f"env.kwargs.{key}={value}: {name} with env.backend=torch {takes}")
    assert text.splitlines()[-1].startswith(f"Use: env={name} env.backend=torch")


def test_actions_of_another_number_of_envs_are_refused() -> None:
    env = torch_env("CartPole-v1", 3)
    env.reset()
    with pytest.raises(RuntimeError, match="shape"):
        env.step(torch.zeros(1, dtype=torch.int64))
