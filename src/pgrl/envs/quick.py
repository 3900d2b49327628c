"""What makes some of Gymnasium's own envs step with less Python around the physics, to the same results bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
from numpy.typing import NDArray

Env = gymnasium.Env[Any, Any]
Answer = tuple[NDArray[Any], Any, bool, bool, dict[str, Any]]

TRIAL = 64  # steps that must be the env's own: with random actions a Hopper and a Walker2d have fallen by then
WALKERS = [f"gymnasium.envs.mujoco.{name}_v{version}" for name in ("hopper", "walker2d") for version in (4, 5)]
MUJOCO = [*WALKERS, *(f"gymnasium.envs.mujoco.half_cheetah_v{version}" for version in (4, 5))]


def quicken(envs: Sequence[Env]) -> None:
    """Make copies of an env quicker where it is one of those known here; they stay the same objects.

    An env that draws what it does for people to see is left as it is.
    """
    for env in envs:
        quicken_space(env.unwrapped.action_space)
    known = type(envs[0]).__module__ in MUJOCO and not any("step" in vars(env) for env in envs)
    if known and envs[0].render_mode != "human":
        with suppress(Exception):  # of another version of Gymnasium, or of wrong arguments, which the env itself tells
            steps = [quick_step(env) for env in envs]
            if is_as(envs[0], steps[0]):
                for env, step in zip(envs, steps, strict=True):
                    env.step = step  # type: ignore[assignment, method-assign]


class Choice(spaces.Discrete):
    """Discrete that tells quickly whether it has an int: envs that ask at every step spend a quarter of it on that."""

    def contains(self, x: Any) -> bool:
        return bool(self.start <= x < self.start + self.n) if type(x) is int else super().contains(x)


def quicken_space(space: spaces.Space[Any]) -> None:
    """Make an env's own Discrete space a `Choice`; it stays the same object, equal to what it was."""
    if type(space) is spaces.Discrete:
        space.__class__ = Choice


def quick_step(env: Any) -> Callable[[NDArray[Any]], Answer]:
    """`env.step` of a HalfCheetah, Hopper or Walker2d, without its info and the contact forces that nothing here reads.

    A fifth to a half of a step of these is Python around the physics.
    """
    from mujoco import mj_step

    model, data, frame_skip, dt = env.model, env.data, env.frame_skip, env.dt
    qpos, qvel, ctrl = data.qpos, data.qvel, data.ctrl
    first = 1 if env._exclude_current_positions_from_observation else 0
    forward_weight, cost_weight = env._forward_reward_weight, env._ctrl_cost_weight

    def advance(action: NDArray[Any]) -> tuple[Any, Any]:
        """The rewards of the way forward, and the cost of the action."""
        before = qpos[0]
        ctrl[:] = action
        mj_step(model, data, frame_skip)
        return forward_weight * ((qpos[0] - before) / dt), cost_weight * np.add.reduce(np.square(action))

    def cheetah(action: NDArray[Any]) -> Answer:
        forward, cost = advance(action)
        return np.concatenate((qpos[first:], qvel)), forward - cost, False, False, {}

    kind = type(env).__module__
    if kind not in WALKERS:
        return cheetah

    hops, by_fall = "hopper" in kind, "v4" in kind  # version 4 pays for health also in the step of the fall
    (low_z, high_z), (low_angle, high_angle) = env._healthy_z_range, env._healthy_angle_range
    low, high = env._healthy_state_range if hops else (0.0, 0.0)
    ends, healthy_weight = env._terminate_when_unhealthy, env._healthy_reward

    def walker(action: NDArray[Any]) -> Answer:
        forward, cost = advance(action)
        place, speed = qpos.tolist(), qvel.tolist()
        healthy = low_z < place[1] < high_z and low_angle < place[2] < high_angle
        if healthy and hops:
            healthy = all([low < x < high for x in (*place[2:], *speed)])
        paid = float(healthy or (by_fall and ends))
        obs = np.concatenate((qpos[first:], np.minimum(np.maximum(qvel, -10.0), 10.0)))
        return obs, forward + paid * healthy_weight - cost, ends and not healthy, False, {}

    return walker


def is_as(env: Env, step: Callable[[NDArray[Any]], Answer]) -> bool:
    """Whether `step` answers as `env.step` does, in a trial after which the env is to be reset."""
    box = env.action_space
    assert isinstance(box, spaces.Box)
    random = np.random.default_rng(0)
    actions = random.uniform(box.low, box.high, (TRIAL, *box.shape)).astype(box.dtype)
    answers = []
    for way in (env.step, step):
        env.reset(seed=0)
        answers.append([way(action)[:4] for action in actions])
    return all(np.array_equal(one[0], other[0]) and one[1:] == other[1:] for one, other in zip(*answers, strict=True))
