"""Which environments there are, what an unknown id may have meant, and which package a known one needs.

pgrl's own are registered here, by name alone: their code is imported when one is made.
"""

from __future__ import annotations

import difflib
import importlib
import re
from importlib.util import find_spec

import gymnasium
from gymnasium.envs.registration import EnvSpec

# Where an env's code lies, the module it needs, and what installs that.
PACKAGES = {
    "gymnasium.envs.mujoco": ("mujoco", "'pgrl[mujoco]'"),
    "gymnasium.envs.box2d": ("Box2D", "'pgrl[box2d]'"),
    "gymnasium.envs.phys2d": ("jax", "'gymnasium[jax]'"),
    "gymnasium.envs.tabular": ("jax", "'gymnasium[jax]'"),
    "ALE": ("ale_py", "ale-py"),
}

gymnasium.register("pgrl/LinearQuadratic-v0", "pgrl.envs.linear_quadratic:LinearQuadratic", max_episode_steps=100)


def find(env_id: str) -> EnvSpec:
    """The registered env of this id; its package, and that of the Atari games, is imported where the id names it.

    gymnasium.error.Error or ModuleNotFoundError if there is none.
    """
    if env_id.startswith("ALE/") and find_spec("ale_py"):
        importlib.import_module("ale_py")
    package, _, name = env_id.rpartition(":")
    if package:
        importlib.import_module(package)
    spec = gymnasium.spec(name)
    if not isinstance(spec.entry_point, str) and getattr(spec.entry_point, "__name__", "").startswith("_raise"):
        raise gymnasium.error.DeprecatedEnv(f"Gymnasium no longer has {name}.")
    return spec


def missing_package(env_id: str) -> tuple[str, str] | None:
    """The module that an env needs and that is not installed, and what `pip install` should be given, if any."""
    if env_id.startswith("ALE/") and not find_spec("ale_py"):
        return PACKAGES["ALE"]
    place = str(find(env_id).entry_point).rpartition(":")[0]
    for start, (module, package) in PACKAGES.items():
        if place.startswith(start) and find_spec(module) is None:
            return module, package
    return None


def all_ids() -> list[str]:
    """Every registered id that Gymnasium can still make, if its package is installed."""
    return [
        name
        for name, spec in gymnasium.registry.items()
        if isinstance(spec.entry_point, str) or not getattr(spec.entry_point, "__name__", "").startswith("_raise")
    ]


def envpool_ids() -> list[str]:
    """The ids that EnvPool knows, which need not be Gymnasium's; ImportError if it is not there."""
    import envpool

    ids: list[str] = envpool.list_all_envs()
    return ids


def time_limit(env_id: str, backend: str = "gymnasium") -> int | None:
    """The registered time limit of a known env in steps: None if it has none, 0 if it has one that it does not tell."""
    if backend != "envpool":
        return find(env_id).max_episode_steps
    import envpool

    steps: int = envpool.make_spec(env_id).config.max_episode_steps
    return steps if steps < 2**31 - 1 else None


def is_builtin(env_id: str) -> bool:
    """Whether a registered env is Gymnasium's or pgrl's own, so that it needs no package before its id."""
    entry = gymnasium.registry[env_id].entry_point
    return (entry if isinstance(entry, str) else getattr(entry, "__module__", "")).startswith(("gymnasium.", "pgrl."))


def near_registered(env_id: str) -> list[str]:
    """The registered ids that an unknown one may have meant, with the package that it names where they need it."""
    package, colon, name = env_id.rpartition(":")
    near = [known for known in near_ids(name) if known != name]
    return [known if is_builtin(known) else package + colon + known for known in near]


def near_ids(env_id: str, n: int = 3, ids: list[str] | None = None) -> list[str]:
    """Ids that an unknown one may have meant: other versions of the name, newest first, or names like it.

    They are among `ids`, or among all that are registered.
    """
    name = re.sub(r"-v\d+$", "", env_id.rpartition(":")[2]).lower()
    ids = all_ids() if ids is None else ids
    same = [known for known in ids if re.sub(r"-v\d+$", "", known).lower() == name]
    by_lower = {known.lower(): known for known in ids}
    near = [by_lower[k] for k in difflib.get_close_matches(env_id.lower(), by_lower, n=n, cutoff=0.5)]
    return same[::-1][:n] or near
