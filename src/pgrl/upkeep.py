"""What a run does beside learning, whenever it is due: evaluations, rows of metrics, checkpoints."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from pgrl import checkpoint
from pgrl.config import RunConfig
from pgrl.evaluate import evaluate
from pgrl.logger import Logger, Progress
from pgrl.runs import Run, write_status
from pgrl.signals import Signals

log = logging.getLogger("pgrl")

SNAPSHOT_SECONDS = 2.0  # a stopped run repeats at most this much and one iteration when it goes on


class Upkeep:
    """Evaluates, logs and saves a run between its iterations, and keeps the last snapshot in memory."""

    def __init__(
        self, config: RunConfig, run: Run, logger: Logger, progress: Progress, run_dir: Path, signals: Signals
    ) -> None:
        self.run_dir, self.signals = run_dir, signals
        self._config, self._run, self._logger, self._progress = config, run, logger, progress
        self._last = run.snapshot()
        self._began = time.perf_counter() - run.position.seconds
        self._row_step, self._row_time = run.position.step, time.perf_counter()
        self._collecting, self._updating = 0.0, 0.0  # seconds since the last row
        steps = run.agent.num_steps * config.num_envs
        progress.start(config.total_timesteps // steps * steps, run.position.step)

    def tend(self, steps: int, collecting: float, updating: float, *, finished: bool) -> None:
        """What is due after another `steps` env steps, which took so many seconds in rollouts and in updates.

        Ends with a snapshot if the last one is old. SaveError if the run is finished and cannot be saved.
        """
        config, position = self._config, self._run.position
        position.seconds = time.perf_counter() - self._began
        self._collecting, self._updating = self._collecting + collecting, self._updating + updating

        evaluation: dict[str, float] = {}
        improved, best = False, (position.best_step, position.best_return)
        if config.eval_every and (finished or due(config.eval_every, position.step, steps)):
            evaluation = self.evaluate()
            improved = evaluation["eval/return_mean"] > position.best_return
            if improved:
                position.best_step, position.best_return = position.step, evaluation["eval/return_mean"]

        if finished or evaluation or due(config.log_every, position.step, steps):
            self.log(evaluation)

        if finished or improved or due(config.save_every, position.step, steps):
            self.snapshot()
            saved = self.save()
            if improved and not saved:  # what is not on disk is not the best checkpoint
                position.best_step, position.best_return = best
            if finished and not saved:
                raise checkpoint.SaveError("the last checkpoint could not be written")
        elif time.perf_counter() - self._last.time > SNAPSHOT_SECONDS:
            self.snapshot()

    def evaluate(self) -> dict[str, float]:
        """The returns of an agent that does not explore, as metrics."""
        config, agent = self._config, self._run.agent
        returns = evaluate(agent, config.env, config.eval_episodes, config.seed, agent.device).returns
        return {"eval/return_mean": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}

    def log(self, evaluation: dict[str, float]) -> None:
        """Write and show a row: the means since the last one, and an evaluation if there was one."""
        step, now = self._run.position.step, time.perf_counter()
        sps = (step - self._row_step) / (now - self._row_time)
        row = {**self._run.record.row(), **evaluation, "charts/SPS": sps}
        row |= {"time/collect": self._collecting, "time/update": self._updating}
        with self.signals.protected():
            self._logger.write(step, now - self._began, row)
        self._progress.update(step, row)
        self._row_step, self._row_time, self._collecting, self._updating = step, now, 0.0, 0.0

    def snapshot(self) -> None:
        """Keep the present state in memory, as the last."""
        self._last = self._run.snapshot()

    def save_last(self) -> bool:
        """Go back to the last snapshot's position, and write it as a checkpoint; whether the disk took it."""
        self._run.position.load_state_dict(self._last.state["position"])
        return self.save()

    def save(self) -> bool:
        """Write the last snapshot as a checkpoint; a disk that refuses it is reported, and asked again at the next."""
        with self.signals.protected():
            self._logger.sync()
            try:
                keep, rows = [self._last.best_step], self._config.checkpoint.replay
                checkpoint.save(self.run_dir, self._last.step, self._last.state, keep_also=keep, rows=rows)
            except checkpoint.SaveError as error:
                log.warning("no checkpoint at step %d, the next is tried as usual: %s", self._last.step, error)
                return False
            write_status(self.run_dir, "running", self._config, self._run)
        return True


def due(every: int | None, step: int, steps: int) -> bool:
    """Whether the last `steps` of `step` env steps reached a multiple of `every`."""
    return every is not None and step // every > (step - steps) // every
