"""Making Gymnasium environments, and saying what is wrong where that fails."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator
from gymnasium.error import DependencyNotInstalled
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from pgrl.env_ids import PACKAGES, find, near_registered
from pgrl.envs.base import EnvConfig
from pgrl.errors import UserError

Env = gymnasium.Env[Any, Any]


def make(config: EnvConfig, num_envs: int) -> list[Env]:
    """`num_envs` new copies of `config.id`; UserError says what is missing where it cannot be made.

    Gymnasium's notice that a newer version of the env exists is not passed on: scores are compared by version.
    """
    options = dict(config.kwargs)
    refuse_limit(config)
    if config.max_episode_steps is not None:
        options["max_episode_steps"] = config.max_episode_steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*The environment .* is out of date", DeprecationWarning)
        try:
            find(config.id)  # imports what registers it
            return [gymnasium.make(config.id, disable_env_checker=True, **options) for _ in range(num_envs)]
        except (DependencyNotInstalled, ModuleNotFoundError) as error:
            raise missing_package(config.id, error) from error
        except (gymnasium.error.Error, ImportError) as error:
            raise unknown_env(config.id, error) from error
        except Exception as error:  # of the env's own code
            if isinstance(error, TypeError) and "argument" in str(error):
                raise wrong_kwargs(config, error) from error
            if not config.kwargs:
                raise
            text = " ".join(str(error).split())
            raise UserError(f"env.kwargs={config.kwargs}: {config.id} says {type(error).__name__}: {text}") from error


def refuse_limit(config: EnvConfig) -> None:
    """UserError if the time limit is not a number of steps."""
    if config.max_episode_steps is not None and config.max_episode_steps < 1:
        raise UserError(
            f"env.max_episode_steps={config.max_episode_steps}: must be at least 1.\n"
            "Use env.max_episode_steps=1000, or null for the limit that the env is registered with"
        )


def missing_package(env_id: str, error: Exception) -> UserError:
    """What to install for an env whose package is missing."""
    text, missing = str(error).splitlines()[0], getattr(error, "name", None) or ""
    if missing and f"{env_id.rpartition(':')[0]}.".startswith(f"{missing}."):
        return UserError(
            f"env={env_id}: its package cannot be imported: {text}\n"
            f"Run this in the folder that holds {missing}, set PYTHONPATH to that folder, or install what has {missing}"
        )
    known = [package for module, package in PACKAGES.values() if module.lower() in text.lower()]
    module = (missing or env_id.partition(":")[0]).partition(".")[0]
    return UserError(
        f"env={env_id}: a package it needs is not installed: {text}\nRun: pip install {known[0] if known else module}"
    )


def unknown_env(env_id: str, error: Exception) -> UserError:
    """Which registered ids come near one that Gymnasium does not know, or no longer has."""
    near = " or ".join(f"env={known}" for known in near_registered(env_id))
    text = str(error).partition(" Did you mean")[0].splitlines()[0]
    hint = f"\nDid you mean {near}?" if near else ""
    return UserError(f"env={env_id}: {text}{hint}\nAll ids: python -m pgrl.train --envs")


def wrong_kwargs(config: EnvConfig, error: TypeError) -> UserError:
    """Which arguments an env takes that was given others."""
    creator: Any = find(config.id).entry_point
    creator = load_env_creator(creator) if isinstance(creator, str) else creator
    takes = [name for name, p in inspect.signature(creator).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return UserError(
        f"env.kwargs={config.kwargs}: {str(error).partition(' was raised from')[0]}\n"
        f"{config.id} takes: {', '.join(takes) or 'none'}"
    )


def peel(env: Env) -> tuple[Env, float]:
    """The env inside the time limit and the check of call order that `gymnasium.make` puts around it, and the limit.

    Both are calls at every step, for what a vectoriser knows anyway: it counts the steps, and resets before it steps.
    Only the outermost wrappers are taken off, and only of exactly these types; the limit is in steps, inf if none.
    """
    limit = None
    if type(env) is TimeLimit and env.spec is not None:
        limit = env.spec.max_episode_steps
        env = env if limit is None else env.env
    if type(env) is OrderEnforcing:
        env = env.env
    return env, math.inf if limit is None else limit
