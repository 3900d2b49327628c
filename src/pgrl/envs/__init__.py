"""Environments: a batch of copies behind one small contract."""

from collections.abc import Callable
from dataclasses import replace

import torch

from pgrl.envs.base import EnvConfig, Episode, VecEnv
from pgrl.envs.envpool import EnvPoolVecEnv, in_gymnasium
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.envs.torch_classic import TorchVecEnv
from pgrl.errors import UserError

BACKENDS: dict[str, Callable[[EnvConfig, int, int, torch.device], VecEnv]] = {
    "gymnasium": lambda config, num_envs, seed, _: GymnasiumVecEnv(config, num_envs, seed),  # these two on the CPU
    "envpool": lambda config, num_envs, seed, _: EnvPoolVecEnv(config, num_envs, seed),
    "torch": TorchVecEnv,
}

__all__ = [
    "BACKENDS",
    "EnvConfig",
    "EnvPoolVecEnv",
    "Episode",
    "GymnasiumVecEnv",
    "TorchVecEnv",
    "VecEnv",
    "make_vec",
    "to_evaluate",
]


def make_vec(config: EnvConfig, num_envs: int, seed: int, device: torch.device | str = "cpu") -> VecEnv:
    """`num_envs` environments of `config`, their episodes seeded from `seed`, on `device` where the backend can."""
    if config.backend not in BACKENDS:
        raise UserError(
            f"env.backend={config.backend}: there is no such backend.\nUse env.backend={' or '.join(BACKENDS)}"
        )
    return BACKENDS[config.backend](config, num_envs, seed, torch.device(device))


def to_evaluate(config: EnvConfig) -> EnvConfig:
    """Gymnasium's env where a config means the same with another backend, so that returns compare with those of others.

    The torch backend's envs always do, EnvPool's where they can (`in_gymnasium`).
    """
    if config.backend == "envpool":
        return in_gymnasium(config)
    return replace(config, backend="gymnasium") if config.backend == "torch" else config
