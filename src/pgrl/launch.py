"""A run from its configuration to its end: its folder, its parts, its loop, and its last words."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from pgrl import asynchronous, checkpoint, files, train
from pgrl import config as configuration
from pgrl.agents import A3C
from pgrl.config import RunConfig
from pgrl.errors import NonFiniteError
from pgrl.logger import Logger, Progress
from pgrl.profiling import Profile
from pgrl.runs import build, gathered_warnings, headline, holds_rows, last_words, replay_bytes, say, write_status
from pgrl.signals import Signals, Stop
from pgrl.upkeep import Upkeep

RATES = ("_lr", "learning_rate")  # how the keys of step sizes end
log = logging.getLogger("pgrl")


def launch(config: RunConfig) -> Path:
    """Train as configured, in a new folder or, with `resume`, in that of a stopped run; returns the folder."""
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        step = None
        compiled, why = configuration.decide_compile(config)
        captured, why_captured = configuration.decide_capture(config)
        config = replace(config, compile=compiled, capture=captured)
        if config.resume is None:
            run = build(config)
            stack.callback(run.env.close)
            run_dir = configuration.new_run_dir(config)
            stack.enter_context(files.claim(run_dir))
        else:
            run_dir, step = Path(config.resume), 0
            stack.enter_context(files.lock(run_dir))
            checkpoint.clean(run_dir)
            run = build(config)
            stack.callback(run.env.close)
        warnings = stack.enter_context(gathered_warnings(run_dir))
        if config.resume is not None and any((run_dir / "checkpoints").glob("step_*")):
            step, state = checkpoint.load_newest(run_dir, log.warning, rows=config.checkpoint.replay)
            run.restore(state)
            if config.checkpoint.replay and replay_bytes(config, run.env) is not None and not holds_rows(state):
                log.warning(
                    "the checkpoint has no replay buffer: the run goes on with an empty one, and is another run"
                )
        else:  # a new run, or one that was killed before its first checkpoint
            run.env.reset()
        files.write_text(run_dir / "config.yaml", configuration.save_config(replace(config, resume=None)))
        logger = Logger(run_dir, tensorboard=config.tensorboard, resume_step=step)
        stack.callback(logger.close)
        progress = Progress()
        stack.callback(progress.close)

        message = headline(config, run, run_dir) + ("" if step is None else f" | resumed at step {step:,}")
        message += f"\ncompile=auto: {why}" if why else ""
        message += f"\ncapture=auto: {why_captured}" if why_captured else ""
        if not config.checkpoint.replay and replay_bytes(config, run.env) is not None:
            message += (
                "\ncheckpoint.replay=false: a resumed run goes on with an empty replay buffer, and is not the same run"
            )
        if config.env.backend == "envpool":
            message += "\nenv.backend=envpool: a resumed run begins new episodes, and is not the same run"
        log.info(message)
        say(message)
        outcome, profile = "failed", None
        try:
            write_status(run_dir, "running", config, run)
            upkeep = Upkeep(config, run, logger, progress, run_dir, signals)
            loop = asynchronous if isinstance(run.agent, A3C) else train
            if config.profile:
                profile = Profile(run, upkeep, compiled=config.compile is True)
            with profile or nullcontext():
                loop.train(config, run, upkeep)
            outcome = "done"
        except Stop as stop:
            outcome = "stopped"
            say(f"\nstopped by {stop} at step {run.position.step:,}; to go on: python -m pgrl.train resume={run_dir}")
            raise
        except Exception as error:
            log.exception("the run failed")
            if isinstance(error, NonFiniteError):
                smaller = (f"algo.{k}={v / 10:g}" for k, v in vars(config.algo).items() if k.endswith(RATES) and v)
                error.add_note(f"If it is the learning that diverges, take smaller steps, such as {' '.join(smaller)}")
                error.add_note(f"Where it came up: {run_dir / 'train.log'}")
            raise
        finally:
            signals.end()
            progress.close()
            write_status(run_dir, outcome, config, run)
            if profile is not None:
                say(profile.write(run_dir, f"{run.agent.name} on {config.env.id}"))
        say(last_words(run_dir, run, warnings))
    return run_dir
