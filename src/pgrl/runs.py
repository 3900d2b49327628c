"""A run around its loop: its parts and their snapshots, its status, and what it says at start and end."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from pgrl import files, memory, processor
from pgrl.agents import AGENTS, Agent, Setting
from pgrl.config import RunConfig
from pgrl.envs import VecEnv, make_vec
from pgrl.errors import CheckpointError, UserError
from pgrl.logger import log_to
from pgrl.record import Record
from pgrl.replay import Priority, nbytes
from pgrl.rows import Rows

log = logging.getLogger("pgrl")


@dataclass
class Position:
    """How far a run is, and its best evaluation so far."""

    iteration: int = 0
    step: int = 0  # env steps over all envs
    seconds: float = 0.0  # spent in training, by this process and earlier ones
    best_step: int = -1
    best_return: float = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class GlobalRandom:
    """The process-wide generators; pgrl draws from them only to initialise networks, but an env might."""

    def state_dict(self) -> dict[str, Any]:
        legacy: Any = np.random.get_state()
        return {"torch": torch.get_rng_state(), "numpy": legacy[1:], "python": random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        np.random.set_state(("MT19937", *state["numpy"]))
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))


class Snapshot(NamedTuple):
    """Everything an exact resume needs, as it was at the boundary of two iterations."""

    step: int
    best_step: int
    state: dict[str, Any]
    time: float  # of the monotonic clock, seconds


@dataclass
class Run:
    """The parts of a run that change while it goes on; what has no part here is not saved."""

    agent: Agent
    env: VecEnv
    position: Position = field(default_factory=Position)
    record: Record = field(default_factory=Record)
    random: GlobalRandom = field(default_factory=GlobalRandom)

    def snapshot(self) -> Snapshot:
        """A copy of the state; only between two iterations, when all finished episodes have been recorded."""
        state = {name: detached(part.state_dict()) for name, part in vars(self).items()}
        state["made_with"] = made_with(self.agent)
        return Snapshot(self.position.step, self.position.best_step, state, time.perf_counter())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot's state; warns of what may make the continuation round differently.

        CheckpointError where the state has not what this version of pgrl asks for, or the agent is of another config.
        """
        now = made_with(self.agent)
        load_agent(self.agent, state)
        try:
            for name, part in vars(self).items():
                if name != "agent":
                    part.load_state_dict(state[name])
        except KeyError as error:
            raise of_another_version(state, error) from error
        was = state["made_with"]
        changed = [f"{k} was {was.get(k)}, is {now.get(k)}" for k in {**was, **now} if was.get(k) != now.get(k)]
        if changed:
            log.warning("the run goes on, but perhaps not bit for bit: %s", ", ".join(changed))


def load_agent(agent: Agent, state: dict[str, Any]) -> None:
    """Restore the agent of a run from a checkpoint's state; CheckpointError where that is of another agent."""
    try:
        agent.load_state_dict(state["agent"])
    except KeyError as error:
        raise of_another_version(state, error) from error
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # other shapes, or a part that the other had and this has not
        raise CheckpointError(
            f"the checkpoint is not of the configuration in config.yaml: {' '.join(str(error).split())[:200]}\n"
            "Undo the changes to config.yaml, or start a new run with them: python -m pgrl.train"
        ) from error


def of_another_version(state: dict[str, Any], missing: KeyError) -> CheckpointError:
    """What to say of a checkpoint that lacks what this version of pgrl asks for."""
    was, now = state.get("made_with", {}).get("pgrl", "another version"), versions().get("pgrl")
    by = f"an earlier state of pgrl {now}" if was == now else f"pgrl {was}"
    return CheckpointError(
        f"the checkpoint was made by {by} and has no {missing}, which this pgrl, {now}, needs.\n"
        "Go on with the code that made it, or start a new run: python -m pgrl.train"
    )


def made_with(agent: Agent) -> dict[str, Any]:
    """What results depend on to the last bit, beside the configuration."""
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "as numpy chooses")
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor.multiplies_with()}"
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "numpy's threads": blas,
        "device": str(agent.device),
        "acts on": str(agent.act_device),
        "acts with": "torch" if agent.actor is None else agent.actor.acts_with,
        "processor": kind,
    }


@cache
def versions() -> dict[str, str]:
    """Of python, and of the packages that compute; looking them up takes 5 ms."""
    found = {"python": platform.python_version()}
    for name in ("pgrl", "torch", "numpy", "gymnasium", "mujoco", "box2d", "envpool"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def detached(tree: Any) -> Any:
    """A copy of a tree of dicts and lists whose tensors share no memory with it."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {k: detached(v) for k, v in tree.items()}
    return [detached(v) for v in tree] if isinstance(tree, list | tuple) else tree


def holds_rows(tree: Any) -> bool:
    """Whether a state has the rows of a replay buffer."""
    if isinstance(tree, dict | list):
        return any(map(holds_rows, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, Rows)


def make_agent(config: RunConfig, env: VecEnv) -> Agent:
    """The agent of a run with fresh weights; UserError where it and the env do not fit together."""
    setting = Setting(
        obs_space=env.obs_space,
        action_space=env.action_space,
        num_envs=config.num_envs,
        seed=config.seed,
        device=torch.device(config.device),
        compiled=config.compile is True,
        env_device=env.device,
    )
    return AGENTS[type(config.algo)](config.algo, setting)


def build(config: RunConfig) -> Run:
    """The agent and the envs of a run, before their first step, with every global generator seeded."""
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    random.seed(config.seed)
    processor.set_up(0, torch.device("cpu"))  # so that first weights are the same whatever ran here before
    env = make_vec(config.env, config.num_envs, config.seed, config.device, compiled=config.compile is True)
    try:
        refuse_too_large(config, env)
        if vars(config.algo).get("norm_obs") and env.obs_space.dtype == "uint8":
            raise UserError(
                f"algo.norm_obs=true: the observations of {config.env.id} are images, which are divided by 255 instead."
                "\nUse: algo.norm_obs=false"
            )
        agent = make_agent(config, env)
    except BaseException:
        env.close()
        raise
    set_up(config, agent)
    return Run(agent, env)


def set_up(config: RunConfig, agent: Agent) -> None:
    """Prepare this process for the agent: threads, and what else makes its arithmetic fast."""
    learnt = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    processor.set_up(learnt, agent.device, config.threads, tf32=config.tf32)


def replay_bytes(config: RunConfig, env: VecEnv, transitions: int | None = None) -> int | None:
    """The bytes that the replay buffer of a run takes, or would with so many transitions; None without a buffer."""
    algo = vars(config.algo)
    if "buffer_size" not in algo:
        return None
    prioritised = None if algo.get("per_alpha") is None else Priority(algo["per_alpha"])
    capacity, n_step = transitions or algo["buffer_size"], algo.get("n_step", 1)
    return nbytes(capacity, config.num_envs, env.obs_space, env.action_space, n_step, prioritised)


def refuse_too_large(config: RunConfig, env: VecEnv) -> None:
    """UserError where the replay buffer of a run does not fit into memory; asked before anything is allocated."""
    needed = replay_bytes(config, env)
    if needed is None:
        return
    free, where = memory.available(), "of memory"
    if env.device.type == "cuda":
        free, where = torch.cuda.mem_get_info(env.device)[0], f"on {config.device}"
    if needed <= free:
        return
    size: int = vars(config.algo)["buffer_size"]
    fits = size
    while fits > 1 and (replay_bytes(config, env, fits) or 0) > 0.8 * free:
        fits = fits * 4 // 5
    fits = max(1, fits // (unit := 10 ** max(0, len(str(fits)) - 2)) * unit)
    algo: dict[str, Any] = vars(config.algo)
    least = max(algo["batch_size"], max(algo["num_steps"], algo.get("n_step", 1)) * config.num_envs)  # as in checks.py
    use = f"algo.buffer_size={fits}"
    if fits < least:
        use = f"a machine with more memory: a buffer of {least} transitions is the least that these settings need"
    elif fits < algo.get("learning_starts", 0):
        use += f" algo.learning_starts={max(algo['batch_size'], fits // 2)}"
    raise UserError(
        f"algo.buffer_size={size}: the replay buffer would take {needed / 1e6:,.0f} MB, "
        f"and {free / 1e6:,.0f} MB {where} are available.\nUse: {use}"
    )


class Warnings(logging.Handler):
    """Shows each warning of a run once, Python's among them, and counts them for its last words."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if message not in self.messages:
            say(f"{record.levelname.lower()}: {message}", file=sys.stderr)
        self.messages[message] = self.messages.get(message, 0) + 1


def say(text: str, file: TextIO | None = None) -> None:
    """Print for whoever still listens: a full disk or a closed pipe behind the output does not end a run."""
    with suppress(OSError):
        print(text, file=file, flush=True)


@contextmanager
def gathered_warnings(run_dir: Path) -> Iterator[Warnings]:
    """Send the log to the run's train.log, and the warnings of pgrl, Python and libraries through `Warnings` too."""
    to_file, warnings = log_to(run_dir), Warnings()
    loggers = [logging.getLogger("pgrl"), logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    loggers[0].addHandler(warnings)
    loggers[1].handlers = [to_file, warnings]
    try:
        yield warnings
    finally:
        logging.captureWarnings(False)
        loggers[0].removeHandler(warnings)
        loggers[0].removeHandler(to_file)
        loggers[1].handlers = []


def write_status(run_dir: Path, state: str, config: RunConfig, run: Run) -> None:
    """Replace status.json: running, done, stopped or failed, and how far the run was at its last checkpoint."""
    position = run.position
    status = {
        "state": state,
        "step": position.step,
        "total_timesteps": config.total_timesteps,
        "seconds": round(position.seconds, 3),
        "sps": round(position.step / position.seconds, 1) if position.seconds else None,
        "return_100": float(np.mean(run.record.recent)) if run.record.recent else None,
        "best_step": position.best_step if position.best_step >= 0 else None,
    }
    try:
        files.write_text(run_dir / "status.json", json.dumps(status, indent=2) + "\n")
    except OSError as error:
        log.warning("status.json not written: %s", error)


def headline(config: RunConfig, run: Run, run_dir: Path) -> str:
    """One line that says what runs."""
    threads = torch.get_num_threads()
    workers = getattr(config.algo, "num_workers", 0)
    needed = replay_bytes(config, run.env)
    replay = ""
    if needed is not None:
        replay = f" | replay buffer: {config.algo.buffer_size:,} transitions, {needed / 1e6:,.0f} MB"
    parts = {True: ", captured", "rollout": ", rollouts captured", "update": ", updates captured"}
    how = ", compiled" * (config.compile is True) + parts.get(config.capture, "")
    of = f"{workers} worker{'s' * (workers > 1)} of " if workers else ""
    stepped = f" in {config.env.processes} processes" if config.env.processes > 1 else ""
    return (
        f"{run.agent.name} on {config.env.id} | {config.device}, {threads} thread{'s' * (threads > 1)}"
        f"{how} | seed {config.seed} | {config.total_timesteps:,} steps, "
        f"{of}{config.num_envs} env{'s' * (config.num_envs > 1)}{stepped}{replay} | {run_dir}"
    )


def last_words(run_dir: Path, run: Run, warnings: Warnings) -> str:
    """What came out, what went wrong, and what to do next."""
    position, recent = run.position, run.record.recent
    achieved = (
        f"mean return of the last {len(recent)} episodes {np.mean(recent):,.1f}" if recent else "no episode ended"
    )
    speed = position.step / max(position.seconds, 1e-9)
    lines = [
        "",
        f"{position.step:,} steps in {position.seconds:,.1f} s ({speed:,.0f} steps/s): {achieved}",
        f"warnings met: {sum(warnings.messages.values()) or 'none'}",
        *(f"  {count} x {message.splitlines()[0]}" for message, count in list(warnings.messages.items())[:5]),
        "next:",
        f"  python -m pgrl.evaluate run={run_dir}",
        f"  tensorboard --logdir {run_dir}",
    ]
    return "\n".join(lines)
