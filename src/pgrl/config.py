"""The configuration of a run: the command line, the YAML files, and the checks, up to a typed RunConfig.

Hydra composes it in this order: schema < algo < env < tuned < experiment < network < command line. Nothing here
imports torch before the configuration is found good, so that a wrong command is answered at once.
"""

from __future__ import annotations

import argparse
import itertools
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pgrl import checks, schema
from pgrl.checks import Problem, is_run, read_status, word
from pgrl.errors import UserError
from pgrl.schema import config_dir
from pgrl.signals import Stop

if TYPE_CHECKING:
    from pgrl.envs.base import EnvConfig
else:
    EnvConfig = schema.EnvConfig

__all__ = ["EvaluateConfig", "RunConfig", "compose", "config_dir", "evaluate_config", "load_run", "main"]

TRAIN, EVALUATE = "python -m pgrl.train", "python -m pgrl.evaluate"
HELP = f"""\
{TRAIN} [algo=NAME] [env=ID] [key=value ...]     train
{TRAIN} resume=RUN_DIR                           continue a stopped run
{EVALUATE} run=RUN_DIR [episodes=20]       play without exploring

  {TRAIN} algo=ppo env=CartPole-v1
  {TRAIN} algo=ppo env=HalfCheetah-v5 total_timesteps=2000000 seed=3 device=cuda
  {TRAIN} env=Hopper-v4 experiment=engstrom_ppo
  {TRAIN} env=my_package:MyEnv-v0 algo.learning_rate=1e-3 algo.network.hidden_sizes=[256,256]
  {TRAIN} -m algo=ppo,a2c env=CartPole-v1,Acrobot-v1 seed=1,2,3

  algo={{algos}}
  experiment={{experiments}}
  network={{networks}}
  env=               any registered Gymnasium id (--envs), or package:Id-v0
  tuned=null         without the settings tuned for this algo and env; tuned=ALGO/ID: with those of another
  total_timesteps=   env steps in all, over all envs          num_envs=       envs stepped together
  seed=              fixes the whole run                      device=         cpu, cuda
  threads=           torch's; null chooses                    compile=true    one compiled graph a gradient step
  run_dir=           a new folder; null: runs/ALGO/ENV/...    tensorboard=    true, false
  eval_every=        env steps between evaluations; null: off (then eval_episodes= each, and the best is kept)
  save_every=        env steps between checkpoints            log_every=      env steps between rows
  algo.*  env.*      what the algorithm and the env take: --cfg job prints every key with its value

  -m, --multirun     one run for each combination of the values given with commas
  --cfg job          print the configuration, and do not run
  --envs             list the registered envs
  --version, --help
"""
GROUPS = ("algo", "env", "tuned", "experiment", "network")
RESUMABLE = ("resume", "total_timesteps", "save_every", "tensorboard", "device", "threads")


@dataclass
class RunConfig:
    """Top-level keys. Counts and periods are in env steps over all envs; `null` switches a period off."""

    algo: Any = MISSING  # algo=ppo, a2c: the config of an agent
    env: EnvConfig = field(default_factory=EnvConfig)
    total_timesteps: int = 1_000_000
    num_envs: int = 1
    seed: int = 1
    device: str = "cpu"  # cpu, cuda, cuda:<number>
    threads: int | None = None  # torch's; null: 1 for small networks, all cores for large ones
    compile: bool = False  # each gradient step as one compiled graph
    run_dir: str | None = None  # null: runs/<algo>/<env>/<unique name>
    resume: str | None = None  # the folder of a stopped run
    eval_every: int | None = None  # evaluate without exploring, and keep the best checkpoint
    eval_episodes: int = 10
    save_every: int | None = 100_000
    log_every: int | None = 1_000
    tensorboard: bool = True


@dataclass
class EvaluateConfig:
    """The keys of `python -m pgrl.evaluate`."""

    run: str = MISSING  # the folder of a run
    episodes: int = 20
    seed: int = 0
    checkpoint: str = "last"  # last, best (needs a run with eval_every), or a step


class Wrong(Exception):
    """Something is wrong with a command; it becomes a UserError once a command that works is found."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems


# ------------------------------------------------------------------------------------------------------- composition


class GymnasiumSource(ConfigSource):
    """Answers `env/<id>` for any id, so that no env needs a YAML file; whether it exists is checked later."""

    @staticmethod
    def scheme() -> str:
        return "gymnasium"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == "env"

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith("env/") and len(config_path) > len("env/")

    def load_config(self, config_path: str) -> ConfigResult:
        env_id = config_path.removeprefix("env/").removesuffix(".yaml")
        return ConfigResult(self.provider, "gymnasium://", OmegaConf.create({"id": env_id}), {"package": "env"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


@contextmanager
def hydra_ready() -> Iterator[Any]:
    """Hydra, knowing the schemas, the envs and the folder of the YAML files."""
    Plugins.instance().register(GymnasiumSource)
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig, package="_global_")
    for name, cls in schema.ALGOS.items():
        store.store(group="schema", name=name, node=cls, package="algo")
    # Hopper-v4 and Hopper-v5 are one family
    family = lambda env_id: re.sub(r"-v\d+$", "", env_id)  # noqa: E731
    OmegaConf.register_new_resolver("family", family, replace=True)
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="train"):
        yield GlobalHydra.instance().hydra


def key_of(text: str) -> str:
    """The key that a word of the command line sets."""
    key = text.lstrip("+~").partition("=")[0]
    return "env" if key == "env.id" else key


def parse(words: Sequence[str]) -> list[Override]:
    """The words of a command line, each as Hydra understands it."""
    found = []
    for text in words:
        try:
            found.append(OverridesParser.create().parse_override(text))
        except (OverrideParseException, HydraException) as error:
            from pgrl import env_ids

            keys = schema.keys(RunConfig, schema.ALGOS["ppo"])
            why, use = f"cannot be read: {str(error).splitlines()[0]}", ()
            if "=" not in text:
                why = "is not of the form key=value"
                if text in schema.ALGOS:
                    use = (f"algo={text}",)
                elif text in env_ids.all_ids():
                    use = (f"env={text}",)
                elif text in keys:
                    use = (word(text, keys[text].default),)
            raise Wrong(Problem(text, None, why, use)) from None
    return found


def for_hydra(overrides: Sequence[Override], multirun: bool = False) -> list[str]:
    """Overrides in the form that Hydra takes: null and `env.id` work for groups, and + is never needed."""
    words = []
    for o in overrides:
        text, key = str(o.input_line), key_of(str(o.input_line))
        bare = f"{key}={text.partition('=')[2]}"
        if key.startswith("hydra.") or key.startswith("hydra/"):
            words.append(text)
            continue
        if o.is_sweep_override() and not multirun:
            command = f"{TRAIN} -m {shlex.join(str(o.input_line) for o in overrides)}"
            raise Wrong(Problem(key, text.partition("=")[2], "are several values: a sweep needs -m", command=command))
        value = None if o.is_delete() or o.is_sweep_override() else o.value()
        if key in GROUPS and value is None and not o.is_sweep_override():
            if key in ("algo", "env"):
                raise Wrong(Problem(key, "null", "needs a name", (f"{key}={ {'algo': 'ppo'}.get(key, 'CartPole-v1') }",)))
            words += ["~tuned"] if key == "tuned" else []
        elif o.is_delete():
            raise Wrong(Problem(text, None, "cannot be removed; null switches off what can be off"))
        elif key == "tuned" and not (config_dir() / "tuned" / f"{value}.yaml").is_file() and not multirun:
            raise Wrong(Problem(key, value, "there are no tuned settings of this name", ("tuned=null",)))
        elif key in GROUPS and not isinstance(value, dict):
            words.append(bare if isinstance(value, str) or o.is_sweep_override() else f"{key}='{value}'")
        else:
            words.append(bare if o.is_sweep_override() else f"++{bare}")
    return words
