"""Environments: a batch of copies behind one small contract."""

from pgrl.envs.base import EnvConfig, Episode, VecEnv
from pgrl.envs.gymnasium import GymnasiumVecEnv

__all__ = ["EnvConfig", "Episode", "GymnasiumVecEnv", "VecEnv", "make_vec"]


def make_vec(config: EnvConfig, num_envs: int, seed: int) -> VecEnv:
    """`num_envs` environments of `config`, their episodes seeded from `seed`."""
    return GymnasiumVecEnv(config, num_envs, seed)
