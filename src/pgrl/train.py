"""The training loop: `python -m pgrl.train algo=ppo env=CartPole-v1`."""

from __future__ import annotations

if __name__ == "__main__":  # here, not at the end: a wrong command is answered before torch is imported
    from pgrl import main as command_line

    command_line()
    raise SystemExit

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgrl import checkpoint
from pgrl import config as configuration
from pgrl.agents import Agent
from pgrl.config import RunConfig
from pgrl.data import Rollout, Transition
from pgrl.envs import VecEnv
from pgrl.evaluate import evaluate
from pgrl.logger import Logger, Progress
from pgrl.runs import Run, Snapshot, build, gathered_warnings, headline, last_words, say, write_status
from pgrl.signals import Signals, Stop

log = logging.getLogger("pgrl")

SNAPSHOT_SECONDS = 0.5  # a stopped run repeats at most this much and one iteration when it goes on


class NonFiniteError(ArithmeticError):
    """Something became NaN or infinite: the run stops before such weights are saved."""


@torch.no_grad()
def collect(env: VecEnv, agent: Agent, rollout: Rollout, obs: Tensor, device: torch.device) -> Transition:
    """Let the agent act for T steps in every env, from obs [B, *obs]: a rollout [T, B, ...] on `device`."""
    rollout.begin(obs)
    for t, step in enumerate(rollout.steps):
        action = agent.act(rollout.obs[t].to(device))
        rollout.action[t].copy_(action)
        env.step(action, out=step)
    return Transition(*(x.to(device) for x in rollout.transition()))


def train(config: RunConfig, run: Run, logger: Logger, progress: Progress, run_dir: Path, signals: Signals) -> None:
    """Alternate rollouts and updates until `total_timesteps`; a signal leaves a checkpoint and raises `Stop`."""
    agent, env, position, record = run.agent, run.env, run.position, run.record
    device = torch.device(config.device)
    rollout = Rollout(agent.num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    steps = agent.num_steps * env.num_envs
    iterations = config.total_timesteps // steps
    obs = env.obs()
    last = run.snapshot()
    progress.start(iterations * steps, position.step)
    began = time.perf_counter() - position.seconds
    row_step, row_time, collecting, updating = position.step, time.perf_counter(), 0.0, 0.0
    try:
        while position.iteration < iterations:
            signals.check()
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
            position.seconds = updated - began
            record.add(metrics, env.episodes())
            collecting, updating = collecting + collected - start, updating + updated - collected
            finished = position.iteration == iterations

            evaluation: dict[str, float] = {}
            improved, best = False, (position.best_step, position.best_return)
            if config.eval_every and (finished or due(config.eval_every, position.step, steps)):
                returns = evaluate(agent, config.env, config.eval_episodes, config.seed, device).returns
                evaluation = {"eval/return_mean": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}
                improved = evaluation["eval/return_mean"] > position.best_return
                if improved:
                    position.best_step, position.best_return = position.step, evaluation["eval/return_mean"]

            if finished or evaluation or due(config.log_every, position.step, steps):
                now = time.perf_counter()
                row = {**record.row(), **evaluation, "charts/SPS": (position.step - row_step) / (now - row_time)}
                row |= {"time/collect": collecting, "time/update": updating}
                with signals.protected():
                    logger.write(position.step, now - began, row)
                progress.update(position.step, row)
                row_step, row_time, collecting, updating = position.step, now, 0.0, 0.0

            if finished or improved or due(config.save_every, position.step, steps):
                last = run.snapshot()
                saved = save(last, config, run, run_dir, logger, signals)
                if improved and not saved:  # what is not on disk is not the best checkpoint
                    position.best_step, position.best_return = best
                if finished and not saved:
                    raise checkpoint.SaveError("the last checkpoint could not be written")
            elif time.perf_counter() - last.time > SNAPSHOT_SECONDS:
                last = run.snapshot()
    except Stop:
        position.load_state_dict(last.state["position"])
        save(last, config, run, run_dir, logger, signals)
        raise


def due(every: int | None, step: int, steps: int) -> bool:
    """Whether the last `steps` of `step` env steps reached a multiple of `every`."""
    return every is not None and step // every > (step - steps) // every


def save(snapshot: Snapshot, config: RunConfig, run: Run, run_dir: Path, logger: Logger, signals: Signals) -> bool:
    """Write a checkpoint; a disk that refuses it is reported, and asked again at the next one."""
    with signals.protected():
        logger.sync()
        try:
            checkpoint.save(run_dir, snapshot.step, snapshot.state, keep_also=[snapshot.best_step])
        except checkpoint.SaveError as error:
            log.warning("no checkpoint at step %d, the next is tried as usual: %s", snapshot.step, error)
            return False
        write_status(run_dir, "running", config, run)
    return True


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """NonFiniteError naming those of the tensors that hold NaN or infinity."""
    sums = [x.sum() if x.dim() else x for x in tensors.values() if x.is_floating_point()]
    if math.isfinite(sum(map(float, sums))):
        return
    bad = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if bad:  # else the numbers are merely large
        raise NonFiniteError(f"{source} NaN or infinity: {', '.join(bad)}")


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
            train(config, run, logger, progress, run_dir, signals)
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
