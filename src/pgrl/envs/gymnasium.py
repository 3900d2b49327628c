"""Any Gymnasium environment, B copies stepped in turn within this process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgrl.data import Step
from pgrl.envs.base import EnvConfig, Episodes, episode_seed, new_step
from pgrl.envs.make import make, peel
from pgrl.envs.quick import quicken
from pgrl.envs.spaces import ToEnv, obs_rows, to_row


class GymnasiumVecEnv:
    """`num_envs` copies of one Gymnasium env; an env that ends is reset within the same step.

    Episode k of env i is seeded from (seed, i, k), so that it is the same in every vectorisation. The state of a
    running episode is its number and the actions since its reset: restoring resets and replays, which is exact
    wherever the env draws all its randomness from its own generator, and costs the steps of the running episodes.

    What an env raises is passed on, with a note that names the env, the episode and its seed.

    The envs may be some of more: those from number `first` on, of `of` in all.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int, *, first: int = 0, of: int | None = None) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self._id, self._seed, self._first, self._of = config.id, seed, first, of or num_envs
        peeled = [peel(env) for env in make(config, num_envs)]
        self._envs, self._limit = [env for env, _ in peeled], peeled[0][1]
        quicken(self._envs)
        space, self.action_space = self._envs[0].observation_space, self._envs[0].action_space
        self.obs_space, self._to_row = obs_rows(config.id, space), to_row(space)
        self._to_env = ToEnv(config.id, self.action_space, num_envs)
        self._obs = np.zeros((num_envs, *self.obs_space.shape), self.obs_space.dtype)
        self._episode = [0] * num_envs  # index of the running episode
        self._return = [0.0] * num_envs  # its rewards so far
        self._history = History(self._to_env.shape, self._to_env.dtype)
        self._finished = Episodes.none()
        self._begun = False

    def reset(self) -> Tensor:
        self._finished.clear()
        for i in range(self.num_envs):
            self._begin(i, 0)
        self._begun = True
        return self.obs()

    def obs(self) -> Tensor:
        return torch.from_numpy(self._obs.copy())

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        out = new_step(torch.from_numpy(self._obs)) if out is None else out
        self.answer(action, getattr(out, "arrays", None) or [x.numpy() for x in out])
        return out

    def answer(self, action: Tensor, arrays: Sequence[NDArray[Any]]) -> None:
        """`step`, into the fields of a Step as arrays."""
        if not self._begun:
            raise RuntimeError("call reset or load_state_dict before step")
        obs, reward, terminated, truncated, next_obs = arrays
        actions = self._to_env(action)
        steps = self._history.append(actions)
        began, returns, limit, to_row = self._history.began, self._return, self._limit, self._to_row
        ended = []
        i = 0
        try:
            for i, a in enumerate(actions.tolist() if self._to_env.discrete else actions):
                row, gain, over, cut, _ = self._envs[i].step(a)
                if steps - began[i] >= limit:
                    cut = True
                next_obs[i] = row if to_row is None else to_row(row)
                reward[i], terminated[i], truncated[i] = gain, over, cut
                returns[i] += float(gain)
                if over or cut:
                    ended.append(i)
        except Exception as error:
            error.add_note(self._where(i))
            raise
        obs[:] = next_obs
        for i in ended:
            self._finished.extend(Episodes([returns[i]], [steps - began[i]], [self._first + i]))
            self._begin(i, self._episode[i] + 1)
            obs[i] = self._obs[i]
        self._obs[:] = obs

    def episodes(self) -> Episodes:
        return self._finished.take()

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "episode": list(self._episode),
            "return": list(self._return),
            "obs": self._obs.copy(),
            "actions": [self._history.of(i) for i in range(self.num_envs)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reset every env to its running episode and replay its actions.

        Envs whose replay does not lead to the saved observation and return are reported in one warning, and begin
        their next episode instead. ValueError if the state is that of another number of envs.
        """
        if len(state["actions"]) != self.num_envs:
            raise ValueError(f"a state of {len(state['actions'])} envs does not fit {self.num_envs} envs")
        self._seed = state["seed"]
        self._finished.clear()
        lost = []
        for i, actions in enumerate(state["actions"]):
            self._begin(i, state["episode"][i])
            goes_on = self._replay(i, actions)
            same_obs = np.array_equal(self._obs[i], state["obs"][i], equal_nan=self._obs.dtype.kind == "f")
            if not (goes_on and same_obs and self._return[i] == state["return"][i]):
                lost.append(i)
        self._history.restore([actions[:0] if i in lost else actions for i, actions in enumerate(state["actions"])])
        for i in lost:
            self._begin(i, self._episode[i] + 1)
        self._begun = True
        if lost:
            which = f"env {', '.join(str(self._first + i) for i in lost)} of {self._of}"
            warnings.warn(
                f"{self._id} does not repeat its episodes from the same seeds and actions ({which}): they are cut, and "
                "the run goes on, but not bit for bit",
                stacklevel=2,
            )

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _begin(self, i: int, episode: int) -> None:
        """Reset env i to an episode."""
        self._episode[i], self._return[i] = episode, 0.0
        self._history.begin(i)
        try:
            row, _ = self._envs[i].reset(seed=self._seed_of(i, episode))
            self._obs[i] = row if self._to_row is None else self._to_row(row)
        except Exception as error:
            error.add_note(self._where(i))
            raise

    def _replay(self, i: int, actions: NDArray[Any]) -> bool:
        """Take these actions [n, ...] in env i; whether its episode still goes on."""
        for a in actions.tolist() if self._to_env.discrete else actions:
            row, gain, over, cut, _ = self._envs[i].step(a)
            self._return[i] += float(gain)
            self._obs[i] = row if self._to_row is None else self._to_row(row)
            if over or cut:
                return False
        return True

    def _seed_of(self, i: int, episode: int) -> int:
        return episode_seed(self._seed, self._first + i, episode)

    def _where(self, i: int) -> str:
        episode, length = self._episode[i], self._history.steps - self._history.began[i]
        return (
            f"raised by env {self._first + i} of {self._of} ({self._id}) in episode {episode}, "
            f"reset(seed={self._seed_of(i, episode)}), step {length}"
        )


class History:
    """The actions [steps, B, *action] of every step since the oldest running episode began.

    It has room for 1,024 steps, or at most four times the longest episode so far. `shape` is [B, *action].
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._rows = np.zeros((1024, *shape), dtype)
        self.steps = 0  # rows in use
        self.began = [0] * shape[0]  # the first row of each env's running episode

    def append(self, actions: NDArray[Any]) -> int:
        """Record one step's actions [B, *action]; returns the number of rows in use."""
        if self.steps == len(self._rows):
            self._make_room()
        self._rows[self.steps] = actions
        self.steps += 1
        return self.steps

    def begin(self, i: int) -> None:
        """A new episode of env i starts with the next step."""
        self.began[i] = self.steps

    def of(self, i: int) -> NDArray[Any]:
        """A copy of the actions [n, *action] of env i's running episode."""
        return self._rows[self.began[i] : self.steps, i].copy()

    def restore(self, actions: list[NDArray[Any]]) -> None:
        """Begin with the actions [n, *action] of each env's running episode."""
        self.steps = max(len(a) for a in actions)
        self._rows = np.zeros((max(1024, 2 * self.steps), *self._rows.shape[1:]), self._rows.dtype)
        for i, a in enumerate(actions):
            self.began[i] = self.steps - len(a)
            self._rows[self.began[i] : self.steps, i] = a

    def _make_room(self) -> None:
        """Forget what lies before the oldest running episode; double the room if that leaves little."""
        oldest = min(self.began)
        kept = self._rows[oldest : self.steps]
        if len(kept) > len(self._rows) // 2:
            self._rows = np.concatenate([kept, np.zeros_like(self._rows)])
        else:
            self._rows[: len(kept)] = kept
        self.steps, self.began = len(kept), [b - oldest for b in self.began]
