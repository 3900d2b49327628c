"""From the words of a command line to a composed configuration, by Hydra; its errors become `Wrong`.

The order is schema < algo < env < tuned < experiment < network < command line (configs/train.yaml).
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from pgrl import env_ids
from pgrl.config import schema
from pgrl.config.checks import Problem, Wrong, word
from pgrl.config.schema import ALGOS, RunConfig, config_dir

GROUPS = ("algo", "env", "tuned", "experiment", "network")
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[int]": "a list such as [64,64]",
    "dict[str, Any]": "a mapping such as {g:5}",
}


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


def family(env_id: str) -> str:
    """An env's name without its version."""
    return re.sub(r"-v\d+$", "", env_id)


@cache
def register() -> None:
    """Tell Hydra of the schemas and the envs, once."""
    Plugins.instance().register(GymnasiumSource)
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig, package="_global_")
    for name, cls in ALGOS.items():
        store.store(group="schema", name=name, node=cls, package="algo")
    OmegaConf.register_new_resolver("family", family, replace=True)


@contextmanager
def hydra_ready() -> Iterator[Any]:
    """Hydra, knowing the schemas, the envs, and where the YAML files are."""
    register()
    outer = GlobalHydra.instance().hydra  # of the sweep that this is a part of
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir()), job_name="train", version_base="1.3"):
            yield GlobalHydra.instance().hydra
    finally:
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def key_of(text: str) -> str:
    """The key that a word of the command line sets."""
    key = text.lstrip("+~").partition("=")[0]
    return "env" if key == "env.id" else key


def parse(words: Sequence[str]) -> list[Override]:
    """The words as Hydra understands them, each alone."""
    parser, found = OverridesParser.create(), []
    for text, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if text.startswith("-"):
            name, value = text.lstrip("-").replace("-", "_"), following if "=" not in following else ""
            use = (name,) if "=" in name else (f"{name}={value}",) if value else ()
            rest = [Problem(value, None, f"belongs to {text}")] if use and "=" not in name else []
            raise Wrong(Problem(text, None, "there is no such option; keys are given as key=value", use), *rest)
        try:
            found.append(parser.parse_override(text))
        except HydraException as error:
            if "=" in text:
                raise Wrong(Problem(text, None, f"cannot be read: {str(error).splitlines()[0]}")) from None
            default = schema.keys(RunConfig, None).get(text)
            meant = [f"algo={text}"] if text in ALGOS else [f"env={text}"] if text in env_ids.all_ids() else []
            meant += [word(text, default.default)] if default else []
            raise Wrong(Problem(text, None, "is not of the form key=value", tuple(meant))) from None
    return found


def for_hydra(overrides: Sequence[Override], multirun: bool = False) -> list[str]:
    """Overrides in Hydra's form: groups may be null, `env.id` is `env`, and no key needs a +."""
    words = []
    for o in overrides:
        text = str(o.input_line)
        key, given = key_of(text), text.partition("=")[2]
        # a sweep's keys are known to be right, and read better without
        plus = "" if key in GROUPS or (multirun and not key.startswith("env.kwargs")) else "++"
        if key.startswith("hydra"):
            words.append(text)
        elif o.is_sweep_override():
            if not multirun:
                command = "python -m pgrl.train -m " + shlex.join(str(o.input_line) for o in overrides)
                raise Wrong(Problem(key, given, "gives several values, which needs -m", command=command))
            words.append(f"{plus}{key}={given}")
        elif not key:
            raise Wrong(Problem(text, None, "names no key"))
        elif key in GROUPS and (o.is_delete() or o.value() in (None, "")):
            if key in ("algo", "env"):
                raise Wrong(Problem(key, given, "needs a name"))
            words += ["~tuned"] if key == "tuned" else []
        elif o.is_delete():
            raise Wrong(Problem(text, None, "removes a key; null switches off what can be off"))
        elif key in GROUPS and not isinstance(o.value(), dict):
            if key == "tuned" and not (config_dir() / f"tuned/{o.value()}.yaml").is_file():
                raise Wrong(Problem(key, given, "there are no tuned settings of this name", ("tuned=null",)))
            words.append(f"{key}={given}" if isinstance(o.value(), str) else f"{key}='{given}'")
        else:
            words.append(f"{plus}{key}={given}")
    return words


class Composed(NamedTuple):
    """A composed configuration: the values, the chosen files by their groups, and all keys of its schema."""

    config: DictConfig
    choices: dict[str, Any]
    keys: dict[str, schema.Key]


def compose(words: Sequence[str]) -> Composed:
    """The configuration that the words of a command line give; unknown keys and wrong types are Wrong."""
    overrides, given = parse(words), values_of(words)
    try:
        with hydra_ready():
            config = hydra.compose("train", for_hydra(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise explain(error, given) from error
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    keys = schema.keys(RunConfig, OmegaConf.get_type(config, "algo"))
    unknown = [key for key in flat(OmegaConf.to_container(config), keys) if key not in keys]
    if unknown:
        raise Wrong(*(misspelt(key, given, keys) for key in unknown))
    covered = config_dir() / f"experiment/by_env/{choices['experiment']}"
    if covered.is_dir() and not (covered / f"{family(choices['env'])}.yaml").exists():
        names = sorted(path.stem for path in covered.glob("*.yaml"))
        why = f"experiment={choices['experiment']} has settings for {', '.join(names)} only"
        raise Wrong(Problem("env", choices["env"], why, (f"env={names[0]}-v4",)))
    return Composed(config, choices, keys)


def flat(tree: Any, keys: dict[str, schema.Key], prefix: str = "") -> Iterator[str]:
    """The dotted names of a nested dict, no deeper than the schema goes."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in keys:
            yield from flat(value, keys, f"{key}.")
        else:
            yield key


def explain(error: Exception, given: dict[str, str], keys: dict[str, schema.Key] | None = None) -> Wrong:
    """What an error of Hydra or OmegaConf means to the user, who gave these values."""
    if isinstance(error, Wrong):
        return error
    algo = given.get("algo", "")
    own = schema.keys(RunConfig, ALGOS.get(algo))
    if keys is None:
        keys = {k: v for cls in ALGOS.values() for k, v in schema.keys(RunConfig, cls).items()} | own
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing, options = str(error.missing_cfg_file), list(error.options or [])
        group = next((key for key in given if missing.startswith(f"{key}/")), missing.partition("/")[0])
        name = missing.removeprefix(f"{group}/")
        # a run can do without an experiment, but not without an algorithm
        cutoff = 0.6 if group == "experiment" else 0.0
        near = difflib.get_close_matches(name.lower(), options, n=1, cutoff=cutoff) if name else options[:1]
        use = tuple(f"{group}={n}" for n in near)
        if group == "algo" and (config_dir() / f"experiment/{name.lower()}.yaml").is_file():
            use = (f"experiment={name.lower()}",)
        return Wrong(Problem(group, name, f"must be {' or '.join(options)}", use))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        text = " ".join(str(error).split())
        in_yaml = re.search(r"full_key: (algo\.\S+)", text)
        if in_yaml and "algo" in given and "network" in given and f"'network/{given['network']}'" in text:
            why = f"sets {in_yaml[1]}, which algo={algo} does not have"
            body = (f"algo.network.body={given['network']}",) if "algo.network.body" in own else ()
            return Wrong(Problem("network", given["network"], why, body))
        if in_yaml and "algo" in given and "experiment" in given:
            why = f"does not have {in_yaml[1]}, which experiment={given['experiment']} sets"
            return Wrong(Problem("algo", algo, why))
        key = next(
            (key for key in given if key and re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text)), "command"
        )
        return Wrong(Problem(key, given.get(key), "there is no such key" if "force-add" in text else text))
    full = re.sub(r"\[\d+\]", "", str(cause.full_key))
    key = full if full in given else next((k for k in given if full.startswith(f"{k}.")), full)
    value = given.get(key)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and full not in keys:
        return Wrong(misspelt(full, given, keys))
    if isinstance(cause, ValidationError) and full in keys:
        kind, default = keys[full]
        must = TYPES.get(kind.removesuffix(" | None"), kind) + (" or null" if kind.endswith("None") else "")
        return Wrong(Problem(key, value, f"must be {must}", (word(full, repaired(value, kind, default)),)))
    inner = [k for k in keys if k.startswith(f"{full}.")]
    if inner:
        return Wrong(Problem(key, value, f"is a group of keys, such as {inner[0]}"))
    return Wrong(Problem(key, value, str(cause).splitlines()[0]))


def misspelt(key: str, given: dict[str, str], keys: dict[str, schema.Key]) -> Problem:
    """An unknown key, with the known ones that come nearest."""
    last = {known.rpartition(".")[2]: known for known in [*GROUPS, *reversed(keys)]}
    near = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=3, cutoff=0.7)]
    own = (
        name
        for name, cls in ALGOS.items()
        if key.startswith("algo.") and key not in keys and key in schema.keys(RunConfig, cls)
    )
    owners = [f"algo={name}" for name in own]
    why = f"there is no such key{f', but for {owners[0]}' if owners else ''}"
    why += f"; did you mean {' or '.join(near)}" if near else ""
    source = key if key in given else next((k for k in given if key.startswith(f"{k}.")), key)
    if source != key:
        return Problem(source, given.get(source), f"{key}: {why}")
    return Problem(key, given.get(key), why, (f"{near[0]}={given[key]}",) if near and key in given else ())


def repaired(text: str | None, kind: str, default: object) -> object:
    """The value that was probably meant: 1e6 is a whole number, and 64 a list of one."""
    try:
        number = float(text or "")
    except ValueError:
        return default
    if kind.startswith("int") and number == int(number):
        return int(number)
    return f"[{text}]" if kind.startswith("list") else default


def values_of(words: Sequence[str]) -> dict[str, str]:
    """The keys that the words of a command line set, and to what."""
    return {key_of(text): text.partition("=")[2] for text in words}


def jobs(words: Sequence[str]) -> list[list[str]]:
    """The command lines of a sweep, one for each combination of its values."""
    overrides, axes = parse(words), []
    for_hydra(overrides, multirun=True)
    with hydra_ready() as ready:
        for o in overrides:
            o.config_loader = ready.config_loader
            if not o.is_sweep_override() or str(o.input_line).startswith("hydra"):
                axes.append([str(o.input_line)])
                continue
            try:
                values = list(o.sweep_string_iterator())
            except HydraException as error:
                raise explain(error, values_of(words)) from error
            if o.key_or_group in GROUPS and "null" in values:
                raise Wrong(Problem(o.key_or_group, ",".join(values), "null cannot be among the values of a sweep"))
            axes.append([f"{o.get_key_element()}={value}" for value in values])
    return [list(job) for job in itertools.product(*axes)]
