"""Small environments of which everything is known; importing this module registers them.

As `tests.envs_for_tests:Counter-v0` they also work on the command line, from the top of the checkout.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import gymnasium.spaces as spaces
import numpy as np


class Counter(gymnasium.Env[Any, Any]):
    """From s, action a in {0, 1, 2} leads to s + 1 + a and pays 0.1 s - a; the observation is [s, steps so far].

    The first s is the seed's first draw below 1000.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(3)

    def __init__(self, terminate_at: int | None = None, truncate_at: int | None = None) -> None:
        self.terminate_at, self.truncate_at = terminate_at, truncate_at

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.s, self.t = int(self.np_random.integers(1000)), 0
        return np.array([self.s, self.t], np.float64), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 0.1 * self.s - action
        self.s, self.t = self.s + 1 + action, self.t + 1
        ended = self.t == self.terminate_at, self.t == self.truncate_at
        return np.array([self.s, self.t], np.float64), reward, *ended, {}


class Luck(gymnasium.Env[Any, Any]):
    """The seed's first draw chooses the episode's length among `lengths`; each step pays 1; observations are noise."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, lengths: tuple[int, ...] = (1, 40)) -> None:
        self.lengths = lengths

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = self.lengths[self.np_random.integers(len(self.lengths))]
        return self.np_random.random(3, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.np_random.random(3, np.float32), 1.0, self.left == 0, False, {}


class AnySpaces(gymnasium.Env[Any, Any]):
    """Any two spaces: it gives samples of the one, kept in `given`, and keeps what it receives of the other."""

    def __init__(self, observation: spaces.Space[Any] | None = None, action: spaces.Space[Any] | None = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,)) if observation is None else observation
        self.action_space = spaces.Discrete(2) if action is None else action
        self.given: list[Any] = []
        self.received: list[Any] = []

    def _sample(self) -> Any:
        self.given.append(self.observation_space.sample())
        return self.given[-1]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self._sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.received.append(action)
        return self._sample(), 0.0, False, False, {}


class Drifting(gymnasium.Env[Any, Any]):
    """An env whose observation, reward or end hangs on how many steps the whole process has taken."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)
    steps: ClassVar[int] = 0

    def __init__(self, where: str = "obs") -> None:
        self.where = where

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Drifting.steps += 1
        n = Drifting.steps
        obs = np.full(1, n if self.where == "obs" else 0, np.float32)
        return obs, float(n) if self.where == "reward" else 0.0, self.where == "end" and n % 30 == 0, False, {}


class Fragile(gymnasium.Env[Any, Any]):
    """Raises at the `at`-th call of its `where`, counted from 0 over all episodes; episodes last 5 steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, where: str = "step", at: int = 7) -> None:
        self.where, self.at = where, at
        self.calls = {"reset": 0, "step": 0}

    def _count(self, name: str) -> Any:
        self.calls[name] += 1
        if name == self.where and self.calls[name] > self.at:
            raise FloatingPointError("the simulator diverged")
        return np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._count("reset"), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs = self._count("step")
        return obs, 0.0, self.calls["step"] % 5 == 0, False, {}


class Careless(gymnasium.Env[Any, Any]):
    """Observations of NumPy's global generator, which no reset seeds."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.random.random(1).astype(np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.random.random(1).astype(np.float32), 0.0, False, False, {}


class NaNReward(Counter):
    """Counter, but the third step of an episode pays NaN."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.t == 3 else reward, *rest


class EveryOther(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Takes each action twice; a wrapper that an env is registered with stands outside its time limit."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: Any) -> Any:
        _, first, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:
            return _, first, terminated, truncated, {}
        obs, second, terminated, truncated, info = self.env.step(action)
        return obs, first + second, terminated, truncated, info


gymnasium.register("Counter-v0", Counter)
gymnasium.register("Counter-v1", Counter, max_episode_steps=6)
gymnasium.register("Counter-v2", Counter, max_episode_steps=6, additional_wrappers=(EveryOther.wrapper_spec(),))
gymnasium.register("Luck-v0", Luck)
gymnasium.register("AnySpaces-v0", AnySpaces)
gymnasium.register("Drifting-v0", Drifting)
gymnasium.register("Fragile-v0", Fragile)
gymnasium.register("NaNReward-v0", NaNReward)
gymnasium.register("Careless-v0", Careless)
gymnasium.register("NoPackage-v0", "a_package_that_nobody_has.envs:Env")

NAMES = [
    name for name, spec in gymnasium.registry.items() if str(getattr(spec.entry_point, "__module__", "")) == __name__
]
