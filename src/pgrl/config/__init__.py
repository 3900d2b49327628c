"""The configuration of a run: from the command line, or from a run's folder, to a checked RunConfig.

Nothing here imports torch before the command is found good, so that a wrong one is answered at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pgrl import checkpoint, env_ids
from pgrl.config import checks, composition, schema
from pgrl.config.capturing import decide_capture
from pgrl.config.checks import Problem, Wrong
from pgrl.config.compilation import decide_compile
from pgrl.config.composition import key_of, values_of
from pgrl.config.folders import is_run, load_run, new_run_dir, newest_runs, read_run, read_status, save_config
from pgrl.config.schema import EvaluateConfig, RunConfig, config_dir
from pgrl.errors import NonFiniteError, UserError
from pgrl.native import compilers
from pgrl.signals import Stop

__all__ = [
    "EvaluateConfig",
    "RunConfig",
    "compose",
    "config_dir",
    "decide_capture",
    "decide_compile",
    "evaluate_main",
    "load_run",
    "main",
    "new_run_dir",
    "save_config",
    "verify_main",
]

TRAIN, EVALUATE, VERIFY = "python -m pgrl.train", "python -m pgrl.evaluate", "python -m pgrl.verify"
HELP = f"""\
{TRAIN} [algo=NAME] [env=ID] [key=value ...]      train
{TRAIN} resume=RUN_DIR [total_timesteps=N]        continue a stopped run, or make one longer
{EVALUATE} run=RUN_DIR [episodes=20]           play without exploring
{VERIFY}                                        check the theorems

  {TRAIN} algo=ppo env=CartPole-v1
  {TRAIN} algo=ppo env=HalfCheetah-v5 total_timesteps=2000000 seed=3
  {TRAIN} env=my_package:MyEnv-v0 algo.gamma=0.999 algo.network.hidden_sizes=[256,256]
  {TRAIN} experiment=engstrom_ppo env=Hopper-v4
  {TRAIN} -m algo=ppo,a2c env=CartPole-v1,Acrobot-v1 seed=1,2,3

  algo=             %s
  env=              any registered Gymnasium id (--envs lists them), or package:Id-v0
  experiment=       %s
  network=          %s
  tuned=null        without the settings tuned for this algo and env; tuned=ALGO/ID: with another's
  total_timesteps=  steps of all envs together          num_envs=     envs stepped together
  seed=             fixes everything random             device=       cpu, cuda
  run_dir=          a new folder (runs/ALGO/ENV/...)    tensorboard=  true, false
  eval_every=       steps between evaluations           save_every=   steps between checkpoints
  eval_episodes=    episodes of each                    log_every=    steps between rows of metrics
  threads=          of torch; null chooses              compile=      auto, true, false
  capture=          CUDA graphs on a GPU: auto, true (rollouts and updates), rollout, update, false
  tf32=true         on a GPU, matrices multiplied in TF32
  checkpoint.replay=  false: checkpoints without the replay buffer, after which resume= is not exact
  profile=true      where the time goes: a table at the end, profile.json and profile.png
  algo.KEY= env.KEY=                                    --cfg job prints every key and its value

  -m, --multirun    a run for each combination of values given with commas
  --cfg job         print the configuration and leave
  --envs            list the registered envs and leave
  --help, --version
"""
EXAMPLE = ("algo=ppo", "env=CartPole-v1")
KEPT = (
    "total_timesteps",
    "save_every",
    "tensorboard",
    "device",
    "threads",
    "env.processes",
    "checkpoint.replay",
    "profile",
)  # what resume= may change


class Parser(argparse.ArgumentParser):
    """Option parsing whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nTry: {TRAIN} --help")


def main(argv: list[str] | None, job: Callable[[RunConfig], object]) -> None:
    """Do what the command line says, `job` for each run; leaves with exit code 2 after a user's mistake."""
    with exit_codes():
        command(sys.argv[1:] if argv is None else argv, job)


def listed(group: str) -> str:
    """The names of a group for the help page, in its second column."""
    return fill(", ".join(names(group)), 84, subsequent_indent=" " * 20)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Leave with the exit codes of the public contract: 2 after a user's mistake, 128 plus a signal's number.

    A run that diverged is answered without a traceback, which its train.log has; the code is 1.
    """
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except NonFiniteError as error:
        print("\n".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(1) from None
    except Stop as stop:
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:  # before a run's own handling of signals begins
        raise SystemExit(130) from None


def command(argv: list[str], job: Callable[[RunConfig], object]) -> None:
    """The command line, its errors raised."""
    parser = Parser(prog=TRAIN, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--envs", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("-m", "--multirun", action="store_true")
    options, words = parser.parse_known_args(argv)
    if options.help:
        print(HELP % tuple(listed(group) for group in ("algo", "experiment", "network")), end="")
    elif options.version:
        print(f"pgrl {version('pgrl')}")
    elif options.envs:
        print("\n".join(env_ids.all_ids()))
    elif options.cfg:
        print(save_config(answer(words, checked, TRAIN)), end="")
    elif options.multirun:
        sweep(words, job)
    else:
        config = compose(words)
        for note in checks.without_effect(config, values_of(words)):
            print(note, file=sys.stderr)
        job(config)


def names(group: str) -> list[str]:
    """The YAML files of a group, without those that only others use."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def compose(words: Sequence[str]) -> RunConfig:
    """The checked configuration of a command line; UserError tells all that is wrong, and a command that works."""
    return schema.real(answer(words, checked, TRAIN))  # type: ignore[no-any-return]


def answer(words: Sequence[str], build: Callable[[Sequence[str]], Any], program: str) -> Any:
    """What `build` makes of the words; where it finds problems, they are put right until it finds none."""
    lines: list[str] = []
    mended, remedy = list(words), ""
    for _ in range(10):
        try:
            result = build(mended)
        except Wrong as wrong:
            for p in wrong.problems:
                # later rounds may meet problems that only the mending made
                if not lines or any(key_of(text) == p.key or text == p.key for text in words):
                    lines.append(f"{p.key}={p.value}: {p.why}." if p.value is not None else f"{p.key}: {p.why}.")
                remedy = remedy or p.command or ""
            before, mended = mended, mend(mended, wrong.problems)
            if remedy or mended == before:
                break
        else:
            if not lines:
                return result
            remedy = shlex.join([*program.split(), *(mended or EXAMPLE)])
            break
    raise UserError("\n".join([*dict.fromkeys(lines), *([f"Try: {remedy}"] if remedy else [])]))


def mend(words: list[str], problems: Sequence[Problem]) -> list[str]:
    """The words with those that are wrong replaced."""
    for p in problems:
        wrong = [i for i, text in enumerate(words) if p.key in (text, key_of(text))]
        at = wrong[0] if wrong else len(words)
        rest = [text for i, text in enumerate(words) if i not in wrong]
        words = [*rest[:at], *p.use, *rest[at:]]
    return words


def checked(words: Sequence[str]) -> RunConfig:
    """The configuration of a command line, in the schema's own classes; Wrong says what is wrong."""
    composed = composition.compose(words)
    try:
        config: RunConfig = OmegaConf.to_object(composed.config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise composition.explain(error, values_of(words), composed.keys) from None
    if config.resume is not None:
        return resumed(config, values_of(words))
    problems = checks.check(config, composed.keys)
    if problems:
        raise Wrong(*problems)
    return config


def resumed(config: RunConfig, given: dict[str, str]) -> RunConfig:
    """The configuration of the run to continue, with the few changes that leave it the same run."""
    folder = Path(str(config.resume))
    if not is_run(folder):
        why = "is not the folder of a run: it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        others = [p for p in [*folder.parents, *newest_runs()] if is_run(p) and read_status(p).get("state") != "done"]
        raise Wrong(Problem("resume", folder, why, tuple(f"resume={p}" for p in others[:1])))
    run = read_run(folder)
    values = {"algo": schema.algo_name(run.algo), "env": run.env.id, **dict(schema.leaves(run))}
    why = "cannot change, because a run continues as it was{}; without resume= a new run starts"
    refused = [key for key in given if key not in KEPT and key != "resume" and not key.startswith("hydra")]
    if refused:
        had = [f" ({checks.word(key, values[key])})" if key in values else "" for key in refused]
        raise Wrong(*(Problem(key, given[key], why.format(h)) for key, h in zip(refused, had, strict=True)))
    total, status = run.total_timesteps, read_status(folder)
    for key in KEPT:
        if key in given:
            part, _, name = key.rpartition(".")
            setattr(attrgetter(part)(run) if part else run, name, attrgetter(key)(config))
    told = status.get("step")
    step = max(checkpoint.list_steps(folder), default=told if isinstance(told, int) else 0)
    rollout = run.num_envs * vars(run.algo).get("num_steps", 1)
    more = f"total_timesteps={2 * max(total, step)}"
    if run.total_timesteps < step:
        why = f"this run has taken {step:,} steps already"
        raise Wrong(Problem("total_timesteps", run.total_timesteps, why, (more,)))
    if status.get("state") == "done" and run.total_timesteps < step + rollout:
        extended = "total_timesteps" in given
        key, use = ("total_timesteps", (more,)) if extended else ("resume", (f"resume={folder}", more))
        why = f"the run is done, with {step:,} of {total:,} steps; a larger total_timesteps makes it longer"
        raise Wrong(Problem(key, given[key], why, use))
    keys = schema.keys(RunConfig, type(run.algo))
    if run.device == "cpu" and run.capture != "auto":
        run.capture = False  # whatever the run did on a GPU
    problems = [*checks.wrong_values(run, keys), *checks.wrong_asynchronous(run), *checks.wrong_capture(run)]
    problems += checks.wrong_processes(run)
    problems += checks.wrong_env(run.env.id, run.env.backend)
    if run.compile is True and not compilers():
        why = "the run's steps are compiled, and there is no C++ compiler, g++ or clang++: eager ones round differently"
        problems.append(Problem("compile", True, why, command="apt-get install g++"))
    problems += [] if any(p.key == "device" for p in problems) else checks.wrong_device(run.device)
    if problems:
        raise Wrong(*problems)
    run.resume = run.run_dir = str(folder)
    return run


def sweep(words: list[str], job: Callable[[RunConfig], object]) -> None:
    """Run every combination, in turn or as a Hydra launcher does; all are checked before the first begins."""
    if not any(text.startswith("hydra/sweeper=") for text in words):
        all_words = answer(words, composition.jobs, f"{TRAIN} -m")
        folders = [config.run_dir for config in every_one(all_words)]
        shared = [folder for folder in folders if folder is not None and folders.count(folder) > 1]
        if shared:
            raise UserError(
                f"run_dir={shared[0]}: {len(shared)} runs would share this folder.\n"
                f"Try: {shlex.join([*TRAIN.split(), '-m', *mend(words, [Problem('run_dir', None, '')])])}"
            )

    def run_one(_: object) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        print(f"Run {HydraConfig.get().job.num + 1}: {' '.join(text.lstrip('+') for text in overrides)}", flush=True)
        job(compose(overrides))

    overrides = composition.for_hydra(composition.parse(words), multirun=True)
    with composition.hydra_ready() as hydra:
        try:
            hydra.multirun("train", run_one, [*overrides, "hydra.mode=MULTIRUN"])
        except HydraException as error:
            raise UserError(f"the sweep cannot be run: {error}") from error


def every_one(jobs: Sequence[list[str]]) -> list[RunConfig]:
    """The configurations of a sweep; UserError tells what is wrong with the first that is, and a sweep without such."""
    right: dict[int, RunConfig] = {}
    first: UserError | None = None
    for k, words in enumerate(jobs):
        try:
            right[k] = answer(words, checked, TRAIN)
        except UserError as error:
            first = first or error
    if first is None:
        return list(right.values())
    why, _, remedy = str(first).partition(f"\nTry: {TRAIN} ")
    if not right or not remedy:
        raise first
    kept = []
    for texts in zip(*(jobs[k] for k in right), strict=True):  # a word of each
        key, _, value = texts[0].partition("=")
        values = dict.fromkeys([value, *(text.partition("=")[2] for text in texts)])
        kept.append(f"{key}={','.join(values)}")
    raise UserError(f"{why}\nTry: {TRAIN} -m {shlex.join(kept)}")


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate_main(argv: list[str] | None, job: Callable[[EvaluateConfig], object]) -> None:
    """The command line of `python -m pgrl.evaluate`; leaves with exit code 2 after a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    with exit_codes():
        if "--help" in words or "-h" in words:
            print(f"{EVALUATE} run=RUN_DIR [episodes=20] [seed=0] [checkpoint=last|best|STEP]")
        else:
            job(evaluate_config(words))


def evaluate_config(words: Sequence[str]) -> EvaluateConfig:
    """What the words of its command line say; UserError tells what is wrong, and a command that works."""
    return answer(words, evaluation, EVALUATE)  # type: ignore[no-any-return]


def evaluation(words: Sequence[str]) -> EvaluateConfig:
    """As `evaluate_config`; Wrong says what is wrong."""
    keys, merged = schema.keys(EvaluateConfig, None), OmegaConf.structured(EvaluateConfig)
    for text in words:
        if "=" not in text:
            use = (f"run={text}",) if is_run(Path(text)) else ()
            raise Wrong(Problem(text, None, "is not of the form key=value", use))
        try:
            given = OmegaConf.from_dotlist([text])
        except Exception as error:  # whatever the YAML parser may raise
            raise Wrong(Problem(text, None, f"cannot be read: {str(error).splitlines()[0]}")) from None
        try:
            merged = OmegaConf.merge(merged, given)
        except OmegaConfBaseException as error:
            raise composition.explain(error, values_of([text]), keys) from None
    runs = tuple(f"run={path}" for path in newest_runs()[:1])
    if OmegaConf.is_missing(merged, "run"):
        command = None if runs else shlex.join([*TRAIN.split(), *EXAMPLE])
        raise Wrong(Problem("run", None, "names the folder of the run to evaluate, and is missing", runs, command))
    config: EvaluateConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    problems = list(checks.wrong_values(config, keys))
    folder = Path(config.run)
    if not is_run(folder):
        why = "is not the folder of a run: it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        command = None if runs else shlex.join([*TRAIN.split(), *EXAMPLE])
        problems.append(Problem("run", folder, why, runs, command))
    if problems:
        raise Wrong(*problems)
    return config


# ------------------------------------------------------------------------------------------------------- verification


def verify_main(argv: list[str] | None, job: Callable[[Sequence[str]], bool]) -> None:
    """The command line of `python -m pgrl.verify`; leaves with exit code 1 where `job` finds that something fails."""
    words = sys.argv[1:] if argv is None else argv
    with exit_codes():
        if "--help" in words or "-h" in words:
            print(f"{VERIFY} [WORD ...]    check the theorems, or those whose line has one of the words")
            return
        for text in words:
            if text.startswith("-"):
                raise UserError(f"{text}: there is no such option.\nTry: {VERIFY} --help")
        if not job(words):
            raise SystemExit(1)
