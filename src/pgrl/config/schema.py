"""The dataclasses that are the schema of the configuration: RunConfig, and those beside the agents and envs.

An agent's config stands at the top of its file, which imports torch, and that takes seconds; a wrong command should
be answered at once. So the config classes of these files, and nothing else, are evaluated here in a module of their
own. `real` turns their objects into those of the files themselves.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """The folder of the YAML files: in a checkout at its top, otherwise inside the package."""
    checkout = PACKAGE.parents[1] / "configs"
    return checkout if PACKAGE.parent.name == "src" and checkout.is_dir() else PACKAGE / "configs"


def read_classes() -> tuple[ModuleType, dict[str, type], dict[type, str]]:
    """A module of all config classes, the algorithms' by name, and the name of each class's own module."""
    algos = sorted(path.stem for path in (config_dir() / "algo").glob("*.yaml"))
    shared = sorted(path.stem for path in (PACKAGE / "agents").glob("*.py") if path.stem not in algos)
    module, by_algo, homes = ModuleType("pgrl._schema"), {}, {}
    sys.modules[module.__name__] = module  # where the types that fields name are looked up
    exec("from dataclasses import dataclass, field\nfrom typing import Any", vars(module))
    for name in ["networks", "q_networks", "envs.base", *(f"agents.{stem}" for stem in [*shared, *algos])]:
        path = PACKAGE / f"{name.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
        exec(compile(tree, path, "exec"), vars(module))
        for node in tree.body:
            assert isinstance(node, ast.ClassDef)
            homes[getattr(module, node.name)] = f"pgrl.{name}"
            by_algo[name.removeprefix("agents.")] = getattr(module, node.name)
    return module, {algo: by_algo[algo] for algo in algos}, homes


_module, ALGOS, _homes = read_classes()
if TYPE_CHECKING:
    from pgrl.envs.base import EnvConfig
else:
    EnvConfig = _module.EnvConfig


@dataclass
class CheckpointConfig:
    """What checkpoints hold beside what every run needs."""

    replay: bool = True  # the replay buffer; without it a resumed run goes on with an empty one, and is another run


@dataclass
class RunConfig:
    """Top-level keys. Counts and periods are in env steps over all envs; `null` switches a period off."""

    algo: Any = "???"  # algo=ppo, a2c: the config of an agent
    env: EnvConfig = field(default_factory=EnvConfig)  # env=<id>
    total_timesteps: int = 1_000_000
    num_envs: int = 1
    seed: int = 1
    device: str = "cpu"  # cpu, cuda, cuda:<number>
    threads: int | None = None  # torch's; null: 1 for small networks, all cores for large ones
    compile: bool | str = "auto"  # gradient steps, and what else is tensors alone, as one graph each; auto: if it pays
    tf32: bool = False  # on CUDA, multiply float32 matrices in TF32: faster, with factors of 10 bits of mantissa
    capture: bool | str = "auto"  # on CUDA, rollouts and updates as CUDA graphs; auto: what of them can be
    run_dir: str | None = None  # null: runs/<algo>/<env>/<unique name>
    resume: str | None = None  # the folder of a stopped run
    eval_every: int | None = None  # evaluate without exploring, and keep the best checkpoint
    eval_episodes: int = 10
    save_every: int | None = 100_000
    log_every: int | None = 1_000
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tensorboard: bool = True
    profile: bool = False  # where the time goes: a table at the end, profile.json, profile.png; not of algo=a3c


@dataclass
class EvaluateConfig:
    """The keys of `python -m pgrl.evaluate`."""

    run: str = "???"  # the folder of a run
    episodes: int = 20
    seed: int = 0
    checkpoint: str = "last"  # last, best (of a run with eval_every), or a step


def real(config: Any) -> Any:
    """The same configuration in the classes that the agents and envs know; imports torch."""
    if not is_dataclass(config):
        return config
    kind = type(config)
    cls = getattr(import_module(_homes.get(kind, kind.__module__)), kind.__name__)
    return cls(**{f.name: real(getattr(config, f.name)) for f in fields(config)})


def algo_name(config: Any) -> str:
    """The name of the algorithm that `config` configures."""
    return next(name for name, cls in ALGOS.items() if cls.__name__ == type(config).__name__)


class Key(NamedTuple):
    """A key of the configuration: its type as the source spells it, and its default."""

    type: str
    default: Any


def keys(cls: type, algo: type | None, prefix: str = "") -> dict[str, Key]:
    """All keys of a config class by their dotted names; `algo` is the class of the key of that name."""
    found: dict[str, Key] = {}
    for f in fields(cls):
        inner = algo if f.name == "algo" else f.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            found |= keys(inner, algo, f"{prefix}{f.name}.")
        else:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            found[prefix + f.name] = Key(str(f.type), default)
    return found


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration with their dotted names."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value
