"""Environments: a batch of copies behind one small contract."""

from collections.abc import Callable
from dataclasses import replace

import torch

from pgrl.envs.base import EnvConfig, Episodes, VecEnv
from pgrl.envs.envpool import EnvPoolVecEnv, in_gymnasium
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.envs.processes import ProcessesVecEnv
from pgrl.envs.torch_classic import TorchVecEnv
from pgrl.errors import UserError


def on_cpu(config: EnvConfig, num_envs: int, seed: int, *_: object) -> VecEnv:
    """Gymnasium's envs, in as many processes as are asked for and there are envs."""
    kind = ProcessesVecEnv if min(config.processes, num_envs) > 1 else GymnasiumVecEnv
    return kind(config, num_envs, seed)


BACKENDS: dict[str, Callable[[EnvConfig, int, int, torch.device, bool], VecEnv]] = {
    "gymnasium": on_cpu,
    "envpool": lambda config, num_envs, seed, *_: EnvPoolVecEnv(config, num_envs, seed),  # on the CPU, too
    "torch": TorchVecEnv,
}

__all__ = [
    "BACKENDS",
    "EnvConfig",
    "EnvPoolVecEnv",
    "Episodes",
    "GymnasiumVecEnv",
    "ProcessesVecEnv",
    "TorchVecEnv",
    "VecEnv",
    "make_vec",
    "to_evaluate",
]


def make_vec(
    config: EnvConfig, num_envs: int, seed: int, device: torch.device | str = "cpu", *, compiled: bool = False
) -> VecEnv:
    """`num_envs` environments of `config`, their episodes seeded from `seed`.

    They are on `device`, and a step of theirs is one compiled graph, where the backend can.
    """
    if config.backend not in BACKENDS:
        raise UserError(
            f"env.backend={config.backend}: there is no such backend.\nUse env.backend={' or '.join(BACKENDS)}"
        )
    return BACKENDS[config.backend](config, num_envs, seed, torch.device(device), compiled)


def to_evaluate(config: EnvConfig) -> EnvConfig:
    """Gymnasium's env where a config means the same with another backend, so that returns compare with those of others.

    The torch backend's envs always do, EnvPool's where they can (`in_gymnasium`). One process steps them.
    """
    if config.backend == "envpool":
        return in_gymnasium(config)
    return replace(config, backend="gymnasium", processes=1)
