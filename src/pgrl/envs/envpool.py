"""EnvPool's environments, stepped by its threads: a batch of them is one call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgrl.data import Step, action_rows
from pgrl.env_ids import envpool_ids, near_ids, time_limit
from pgrl.envs.base import EnvConfig, Episodes, episode_seed, new_step
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.envs.make import refuse_limit
from pgrl.envs.spaces import ToEnv, obs_rows
from pgrl.errors import UserError

THREADS = {"num_threads", "thread_affinity_offset"}  # of env.kwargs: they change the speed alone
OURS = {"num_envs", "batch_size", "seed", "env_seed", "env_type", "gym_reset_return_info", "max_episode_steps"}


class EnvPoolVecEnv:
    """`num_envs` envs of an EnvPool id, stepped together; an env that ends is reset within the same step.

    EnvPool by itself resets an env that ended instead of taking its next action; here it is reset at once, so that no
    such step is ever seen. Env i is seeded once, from (seed, i, 0), and draws all its episodes from one stream.

    The state is the number of each env's running episode, for EnvPool cannot put an env back into one: after
    `load_state_dict` all begin new episodes, from seeds of their own. The pool is made by `reset` or `load_state_dict`;
    before, the envs are known by their spaces.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self._id, self._seed = config.id, seed
        limit, self._options = options(config)
        self._limit = limit or math.inf
        spec = specification(config, self._options)
        with quiet():
            self._space, self.action_space = spec.gymnasium_observation_space, spec.gymnasium_action_space
        self.obs_space = obs_rows(config.id, self._space)
        self._to_env = ToEnv(config.id, self.action_space, num_envs)
        self._obs = np.zeros((num_envs, *self.obs_space.shape), self.obs_space.dtype)
        self._episode = [0] * num_envs  # index of the running episode
        self._return, self._length = np.zeros(num_envs), np.zeros(num_envs, np.int64)  # of the running episode so far
        self._finished = Episodes.none()
        self._pool: Any = None

    def reset(self) -> Tensor:
        self._begin([0] * self.num_envs)
        return self.obs()

    def obs(self) -> Tensor:
        return torch.from_numpy(self._obs.copy())

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        if self._pool is None:
            raise RuntimeError("call reset or load_state_dict before step")
        out = new_step(torch.from_numpy(self._obs)) if out is None else out
        obs, reward, terminated, truncated, next_obs = getattr(out, "arrays", None) or [x.numpy() for x in out]
        row, gain, over, cut, _ = self._pool.step(self._to_env(action))
        self._return += gain
        self._length += 1
        next_obs[:] = self._rows(row)
        reward[:], terminated[:] = gain, over
        np.logical_or(cut, self._length >= self._limit, out=truncated)
        obs[:] = next_obs
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        if len(ended):
            over = Episodes(self._return[ended].tolist(), self._length[ended].tolist(), ended.tolist())
            self._finished.extend(over)
            for i in over.env:
                self._episode[i] += 1
            self._return[ended], self._length[ended] = 0.0, 0
            obs[ended] = self._rows(self._pool.reset(ended)[0])
        self._obs[:] = obs
        return out

    def episodes(self) -> Episodes:
        return self._finished.take()

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "episode": list(self._episode)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the episode after the one that each env was in; a warning says that this is another run.

        ValueError if the state is that of another number of envs.
        """
        if len(state["episode"]) != self.num_envs:
            raise ValueError(f"a state of {len(state['episode'])} envs does not fit {self.num_envs} envs")
        self._seed = state["seed"]
        self._begin([k + 1 for k in state["episode"]])
        warnings.warn(
            f"EnvPool cannot put {self._id} back into a running episode: all {self.num_envs} envs begin new ones, and "
            "the run goes on, but not bit for bit",
            stacklevel=2,
        )

    def close(self) -> None:
        self._pool = None  # its threads end with it

    def _begin(self, episodes: list[int]) -> None:
        """Make the envs anew, each seeded for an episode, and begin it."""
        import envpool

        self._pool = None
        seeds = [episode_seed(self._seed, i, k) for i, k in enumerate(episodes)]
        own = {**self._options, "num_envs": self.num_envs, "seed": seeds}
        with quiet():
            self._pool = envpool.make(self._id, env_type="gymnasium", **own)
            self._obs[:] = self._rows(self._pool.reset()[0])
        self._episode = list(episodes)
        self._finished.clear()
        self._return[:], self._length[:] = 0.0, 0

    def _rows(self, batch: Any) -> NDArray[Any]:
        """Observations of n envs as EnvPool gives them, as rows [n, *obs]."""
        return flat(self._space, batch).reshape(-1, *self.obs_space.shape)


def flat(space: spaces.Space[Any], batch: Any) -> NDArray[Any]:
    """n observations of `space` in one array, or in a dict of them: [n, ...] for a Box, otherwise flat, [n, k]."""
    if isinstance(space, spaces.Dict):
        parts = [flat(part, batch[key]) for key, part in space.items()]
        return np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)
    if isinstance(space, spaces.Discrete):
        one_hot: NDArray[Any] = np.eye(int(space.n), dtype=np.float32)[batch - space.start]
        return one_hot
    return np.asarray(batch)


def options(config: EnvConfig) -> tuple[int | None, dict[str, Any]]:
    """The time limit in steps, None or 0 if the env alone decides, and what EnvPool is told beside num_envs and seed.

    At its limit EnvPool reports a truncation even where the task ended. Gymnasium's envs know nothing of their time
    limit, so for them it is told one step more, and episodes are cut here. Others may depend on it (MiniGrid's rewards
    do), and are told the limit itself. UserError if the id, the limit or a key of kwargs cannot be.
    """
    refuse_unknown(config.id)
    refuse_limit(config)
    wrong = sorted(OURS & config.kwargs.keys())
    if wrong:
        raise UserError(
            f"env.kwargs.{wrong[0]}: env.backend=envpool sets it from num_envs, seed and env.max_episode_steps.\n"
            f"Leave it out: {config.id} is stepped in one batch, all envs together"
        )
    told = dict(config.kwargs)
    limit = config.max_episode_steps or time_limit(config.id, "envpool")
    if limit and config.id in gymnasium.registry:
        told["max_episode_steps"] = limit + 1
    elif config.max_episode_steps:
        told["max_episode_steps"] = limit
    return limit, told


def specification(config: EnvConfig, told: dict[str, Any]) -> Any:
    """EnvPool's description of an env, or a UserError that says why there is none."""
    import envpool

    try:
        spec = envpool.make_spec(config.id, **told)
    except (TypeError, ValueError) as error:
        takes = [key for key in envpool.make_spec(config.id).config._fields if key not in OURS]
        raise UserError(
            f"env.kwargs={config.kwargs}: {str(error).splitlines()[0]}\n{config.id} takes: {', '.join(takes)}"
        ) from error
    if getattr(spec.config, "max_num_players", 1) != 1:
        raise UserError(f"env={config.id}: it has several players, and pgrl's agents play alone.\nUse another env")
    return spec


def refuse_unknown(env_id: str) -> None:
    """UserError if EnvPool is not installed, does not know the id, or lacks a library that the env needs."""
    try:
        known = envpool_ids()
    except ImportError as error:
        raise UserError(
            f"env.backend=envpool: EnvPool cannot be imported: {error}\nRun: pip install envpool"
        ) from error
    if env_id in known:
        try:
            time_limit(env_id, "envpool")
        except ImportError as error:
            raise UserError(f"env={env_id}: EnvPool cannot load it: {error}") from error
        return
    if ":" in env_id or env_id in gymnasium.registry:
        hint = "\nIt is one of Gymnasium's: env.backend=gymnasium"
    else:
        near = near_ids(env_id, ids=known)
        hint = f"\nDid you mean {' or '.join(f'env={name}' for name in near)}?" if near else ""
    raise UserError(f"env={env_id}: EnvPool has no such environment.{hint}\nAll ids: {LIST}")


LIST = "python -c 'import envpool; print(*envpool.list_all_envs())'"


@contextmanager
def quiet() -> Iterator[None]:
    """Without Gymnasium's remarks on the bounds of the spaces that EnvPool makes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*precision lowered by casting", UserWarning)
        yield


def in_gymnasium(config: EnvConfig) -> EnvConfig:
    """Gymnasium's env where an EnvPool config means the same there, otherwise `config` itself.

    Gymnasium must have the id, it must look the same to an agent, and the config have no kwargs but those of threads.
    """
    if config.kwargs.keys() - THREADS:
        return config
    other = replace(config, backend="gymnasium", kwargs={})
    try:
        env = GymnasiumVecEnv(other, 1, 0)
    except UserError:  # Gymnasium does not have it, or it needs a package that is not there
        return config
    env.close()
    pool = EnvPoolVecEnv(config, 1, 0)
    same = pool.obs_space == env.obs_space and same_actions(pool.action_space, env.action_space)
    return other if same else config


def same_actions(a: spaces.Space[Any], b: spaces.Space[Any]) -> bool:
    """Whether an action for one means the same for the other, of whatever precision they are."""
    if isinstance(a, spaces.Box) and isinstance(b, spaces.Box):
        return action_rows(a) == action_rows(b) and np.allclose(a.low, b.low) and np.allclose(a.high, b.high)
    return a == b
