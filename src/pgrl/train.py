"""The training loop: `python -m pgrl.train algo=ppo env=CartPole-v1`."""

from __future__ import annotations

if __name__ == "__main__":  # here, not at the end: a wrong command is answered before torch is imported
    from pgrl import main as command_line

    command_line()
    raise SystemExit

import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from pgrl import asynchronous, checkpoint
from pgrl import config as configuration
from pgrl.agents import A3C
from pgrl.collect import check_finite, collect
from pgrl.config import RunConfig
from pgrl.data import Rollout
from pgrl.logger import Logger, Progress
from pgrl.runs import Run, build, gathered_warnings, headline, last_words, say, write_status
from pgrl.signals import Signals, Stop
from pgrl.upkeep import Upkeep

log = logging.getLogger("pgrl")


def train(config: RunConfig, run: Run, upkeep: Upkeep) -> None:
    """Alternate rollouts and updates until `total_timesteps`; a signal leaves a checkpoint and raises `Stop`."""
    agent, env, position = run.agent, run.env, run.position
    device = torch.device(config.device)
    rollout = Rollout(agent.num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    steps = agent.num_steps * env.num_envs
    iterations = config.total_timesteps // steps
    obs = env.obs()
    try:
        while position.iteration < iterations:
            upkeep.signals.check()
            start = time.perf_counter()
            transition = collect(env, agent, rollout, obs, device)
            check_finite(transition._asdict(), f"{config.env.id} met or gave")
            obs = rollout.obs[-1]
            collected = time.perf_counter()
            metrics = agent.update(transition, position.iteration / iterations)
            check_finite(metrics, "the update gave")
            updated = time.perf_counter()

            position.iteration += 1
            position.step += steps
            run.record.add(metrics, env.episodes())
            # when due: evaluate, log, save
            finished = position.iteration == iterations
            upkeep.tend(steps, collected - start, updated - collected, finished=finished)
    except Stop:
        upkeep.save_last()
        raise


def launch(config: RunConfig) -> Path:
    """Train as configured, in a new folder or, with `resume`, in that of a stopped run; returns the folder."""
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        step = None
        if config.resume is None:
            run = build(config)
            run_dir = configuration.new_run_dir(config)
            stack.enter_context(checkpoint.claim(run_dir))
        else:
            run_dir, step = Path(config.resume), 0
            stack.enter_context(checkpoint.lock(run_dir))
            checkpoint.clean(run_dir)
            run = build(config)
        stack.callback(run.env.close)
        warnings = stack.enter_context(gathered_warnings(run_dir))
        if config.resume is not None and any((run_dir / "checkpoints").glob("step_*")):
            step, state = checkpoint.load_newest(run_dir, log.warning)
            run.restore(state)
        else:  # a new run, or one that was killed before its first checkpoint
            run.env.reset()
        checkpoint.write_text(run_dir / "config.yaml", configuration.save_config(replace(config, resume=None)))
        logger = Logger(run_dir, tensorboard=config.tensorboard, resume_step=step)
        stack.callback(logger.close)
        progress = Progress()
        stack.callback(progress.close)

        message = headline(config, run, run_dir) + ("" if step is None else f" | resumed at step {step:,}")
        log.info(message)
        say(message)
        outcome = "failed"
        try:
            write_status(run_dir, "running", config, run)
            upkeep = Upkeep(config, run, logger, progress, run_dir, signals)
            loop = asynchronous.train if isinstance(run.agent, A3C) else train
            loop(config, run, upkeep)
            outcome = "done"
        except Stop as stop:
            outcome = "stopped"
            say(f"\nstopped by {stop} at step {run.position.step:,}; to go on: python -m pgrl.train resume={run_dir}")
            raise
        except Exception:
            log.exception("the run failed")
            raise
        finally:
            signals.end()
            progress.close()
            write_status(run_dir, outcome, config, run)
        say(last_words(run_dir, run, warnings))
    return run_dir
