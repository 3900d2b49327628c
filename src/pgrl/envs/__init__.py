"""Environments: a batch of copies behind one small contract."""

from collections.abc import Callable

from pgrl.envs.base import EnvConfig, Episode, VecEnv
from pgrl.envs.envpool import EnvPoolVecEnv, to_evaluate
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.errors import UserError

BACKENDS: dict[str, Callable[[EnvConfig, int, int], VecEnv]] = {
    "gymnasium": GymnasiumVecEnv,
    "envpool": EnvPoolVecEnv,
}

__all__ = [
    "BACKENDS",
    "EnvConfig",
    "EnvPoolVecEnv",
    "Episode",
    "GymnasiumVecEnv",
    "VecEnv",
    "make_vec",
    "to_evaluate",
]


def make_vec(config: EnvConfig, num_envs: int, seed: int) -> VecEnv:
    """`num_envs` environments of `config`, their episodes seeded from `seed`."""
    if config.backend not in BACKENDS:
        raise UserError(
            f"env.backend={config.backend}: there is no such backend.\nUse env.backend={' or '.join(BACKENDS)}"
        )
    return BACKENDS[config.backend](config, num_envs, seed)
