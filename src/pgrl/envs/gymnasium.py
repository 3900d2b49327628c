"""Any Gymnasium environment, B copies stepped in turn within this process."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray
from torch import Tensor

from pgrl.data import Step
from pgrl.envs.base import EnvConfig, Episode, episode_seed
from pgrl.errors import UserError

SUPPORTED_ACTIONS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def make(config: EnvConfig, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """One env of `config.id`; UserError says what is missing where it cannot be made."""
    options = {**config.kwargs, **kwargs}
    if config.max_episode_steps is not None:
        options["max_episode_steps"] = config.max_episode_steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date.*")
        try:
            return gymnasium.make(config.id, disable_env_checker=True, **options)
        except DependencyNotInstalled as error:
            raise missing_extra(config.id, error) from error
        except ModuleNotFoundError as error:
            raise missing_extra(config.id, error) from error
        except gymnasium.error.Error as error:
            raise unknown_env(config.id, error) from error
        except TypeError as error:
            raise UserError(f"env.kwargs={config.kwargs}: {config.id} does not take them: {error}") from error


def missing_extra(env_id: str, error: Exception) -> UserError:
    """What to install for an env whose package is missing."""
    text = f"{error} {getattr(error, 'name', '')}".lower()
    extra = "mujoco" if "mujoco" in text else "box2d" if "box2d" in text else None
    if extra is not None:
        remedy = f"Run: pip install 'pgrl[{extra}]'"
    else:
        package = getattr(error, "name", None) or env_id.split(":")[0]
        remedy = f"Run: pip install {package}"
    return UserError(f"env={env_id}: a package it needs is not installed ({str(error).splitlines()[0]}).\n{remedy}")


def unknown_env(env_id: str, error: Exception) -> UserError:
    """Which registered ids come near an unknown one."""
    near = difflib.get_close_matches(env_id, list(gymnasium.registry), n=3, cutoff=0.5)
    name = re.sub(r"-v\d+$", "", env_id.split(":")[-1])
    same = [known for known in gymnasium.registry if known.rsplit("-v", 1)[0].lower() == name.lower()]
    near = list(dict.fromkeys([*reversed(same), *near]))[:3]
    hint = f"\nDid you mean: env={near[0]}" + "".join(f", env={n}" for n in near[1:]) if near else ""
    return UserError(f"env={env_id}: {str(error).splitlines()[0]}{hint}\nAll ids: python -m pgrl.train --envs")


def rows_space(env_id: str, space: spaces.Space[Any]) -> spaces.Box:
    """The space of the rows an agent sees: images stay uint8, other Boxes become float32, the rest is flattened."""
    if isinstance(space, spaces.Box):
        dtype = np.uint8 if space.dtype == np.uint8 and len(space.shape) == 3 else np.float32
        return spaces.Box(
            -np.inf if dtype is np.float32 else 0, np.inf if dtype is np.float32 else 255, space.shape, dtype
        )
    if space.is_np_flattenable:
        return spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
    raise UserError(
        f"env={env_id}: observations {space} are not supported.\nSupported are Box (any shape and type), Discrete, "
        "MultiDiscrete, MultiBinary, and Tuple or Dict of these. Wrap the env to give one of them."
    )


class GymnasiumVecEnv:
    """`num_envs` copies of one Gymnasium env; an env that ends is reset within the same step.

    Episode k of env i is seeded from (seed, i, k), so that it is the same in every vectorisation. The state of a
    running episode is its number and the actions since its reset: restoring resets and replays, which is exact
    wherever the env draws all its randomness from its own generator.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int, **kwargs: Any) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self._id, self._seed = config.id, seed
        self._envs = [make(config, **kwargs) for _ in range(num_envs)]
        first = self._envs[0]
        self._raw_obs_space = first.observation_space
        self.obs_space = rows_space(config.id, first.observation_space)
        self.action_space = first.action_space
        if not isinstance(self.action_space, SUPPORTED_ACTIONS):
            raise UserError(
                f"env={config.id}: actions {self.action_space} are not supported.\nSupported are Box, Discrete, "
                "MultiDiscrete and MultiBinary. Wrap the env to take one of them."
            )
        self._flatten = not isinstance(first.observation_space, spaces.Box)
        self._obs = np.zeros((num_envs, *self.obs_space.shape), self.obs_space.dtype)
        self._episode = np.zeros(num_envs, np.int64)  # index of the running episode
        self._length = np.zeros(num_envs, np.int64)  # its steps so far
        self._return = np.zeros(num_envs, np.float64)  # its raw rewards so far
        self._actions: list[NDArray[Any]] = []  # [B, ...] of every step since the oldest running episode began
        self._finished: list[Episode] = []
        if isinstance(self.action_space, spaces.Box):
            self._low, self._high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)

    def reset(self) -> Tensor:
        for i in range(self.num_envs):
            self._begin(i, 0)
        return self.obs()

    def obs(self) -> Tensor:
        return torch.from_numpy(self._obs.copy())

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        out = self._new_step() if out is None else out
        obs, reward, terminated, truncated, next_obs = (x.numpy() for x in out)
        actions = self._to_env(action)
        self._actions.append(actions)
        rows = self._for_step(actions)
        for i, env in enumerate(self._envs):
            row, reward[i], terminated[i], truncated[i], _ = env.step(rows[i])
            next_obs[i] = self._flat(row) if self._flatten else row
        self._length += 1
        self._return += reward
        obs[:] = next_obs
        done = terminated | truncated
        if done.any():
            for i in done.nonzero()[0].tolist():
                self._finished.append(Episode(float(self._return[i]), int(self._length[i]), i))
                self._begin(i, int(self._episode[i]) + 1)
                obs[i] = self._obs[i]
            self._forget()
        self._obs[:] = obs
        return out

    def episodes(self) -> list[Episode]:
        finished, self._finished = self._finished, []
        return finished

    def state_dict(self) -> dict[str, Any]:
        actions = [
            np.array([a[i] for a in self._actions[len(self._actions) - n :]])
            for i, n in enumerate(self._length.tolist())
        ]
        return {
            "obs": self._obs.copy(),
            "episode": self._episode.copy(),
            "length": self._length.copy(),
            "return": self._return.copy(),
            "actions": actions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reset every env to its running episode and replay its actions.

        An env whose replay ends at another observation than the saved one is reported with a warning, and starts its
        next episode instead.
        """
        longest = max(int(n) for n in state["length"])
        history = [[None] * self.num_envs for _ in range(longest)]
        for i, env in enumerate(self._envs):
            self._begin(i, int(state["episode"][i]))
            actions = state["actions"][i]
            for a, row in zip(actions, self._for_step(actions), strict=True):
                obs, *_ = env.step(row)
                self._obs[i] = self._flat(obs) if self._flatten else obs
            if not np.array_equal(self._obs[i], state["obs"][i], equal_nan=True):
                warnings.warn(
                    f"env {i} ({self._id}) does not repeat its episode from the same seed and actions; the episode is "
                    "cut and the run goes on, but not bit for bit",
                    stacklevel=2,
                )
                self._begin(i, int(state["episode"][i]) + 1)
                continue
            self._length[i], self._return[i] = state["length"][i], state["return"][i]
            for t, a in enumerate(actions):
                history[longest - len(actions) + t][i] = a
        shape, dtype = self._action_like()
        blank = np.zeros(shape, dtype)
        self._actions = [np.stack([blank if a is None else a for a in row]) for row in history]

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _begin(self, i: int, episode: int) -> None:
        obs, _ = self._envs[i].reset(seed=episode_seed(self._seed, i, episode))
        self._obs[i] = self._flat(obs) if self._flatten else obs
        self._episode[i], self._length[i], self._return[i] = episode, 0, 0.0

    def _flat(self, obs: Any) -> NDArray[Any]:
        return np.asarray(spaces.flatten(self._raw_obs_space, obs), np.float32)

    def _to_env(self, action: Tensor) -> NDArray[Any]:
        """Actions [B, ...] in bounds, in the dtype the env expects; Box actions stay flat."""
        actions: NDArray[Any] = action.cpu().numpy()
        if isinstance(self.action_space, spaces.Box):
            return np.clip(actions.reshape(len(actions), -1), self._low, self._high).astype(self.action_space.dtype)
        return actions

    def _for_step(self, actions: NDArray[Any]) -> Any:
        """Actions [N, ...] as a sequence of what `env.step` takes."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return (actions + space.start).tolist() if space.start else actions.tolist()
        if isinstance(space, spaces.Box):
            return actions.reshape(len(actions), *space.shape)
        return actions.reshape(len(actions), *(space.shape or ())).astype(space.dtype)

    def _action_like(self) -> tuple[tuple[int, ...], Any]:
        space = self.action_space
        if isinstance(space, spaces.Box):
            return (math.prod(space.shape),), space.dtype
        return (() if isinstance(space, spaces.Discrete) else (math.prod(space.shape or ()),)), np.int64

    def _forget(self) -> None:
        """Drop actions from before the oldest running episode, but not at every end: the cost is spread."""
        needed = int(self._length.max())
        if len(self._actions) > 2 * needed + 1024:
            del self._actions[: len(self._actions) - needed]

    def _new_step(self) -> Step:
        shape = (self.num_envs, *self.obs_space.shape)
        dtype = torch.uint8 if self.obs_space.dtype == np.uint8 else torch.float32
        flags = torch.zeros(2, self.num_envs, dtype=torch.bool)
        rows = torch.zeros(2, *shape, dtype=dtype)
        return Step(rows[0], torch.zeros(self.num_envs), flags[0], flags[1], rows[1])
