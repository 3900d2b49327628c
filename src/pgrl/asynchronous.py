"""The loop of A3C: worker processes act and learn, the main process counts, evaluates, logs and saves.

A worker takes the numbers of its rollouts from a counter until there are none left, and reports through a pipe of its
own. The main process takes no lock that a worker takes, for one that is killed may hold it.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch

from pgrl.agents import A3C
from pgrl.agents.a3c import Shared
from pgrl.config import RunConfig
from pgrl.data import Rollout
from pgrl.envs import Episodes
from pgrl.errors import NonFiniteError
from pgrl.processes import NAME, Failure, WorkerError, context, failure, follow_main, how_it_died, start_server
from pgrl.runs import Run, build
from pgrl.signals import Signals, Stop
from pgrl.train import check_finite, collect
from pgrl.upkeep import Upkeep

log = logging.getLogger("pgrl")

REPORT_SECONDS = 0.15  # between two reports of a worker
GRACE_SECONDS = 1.5  # for workers to end by themselves
WORKER_STREAM = 2_000_003  # in the seeds of workers, which share no stream with anything else


class Report(NamedTuple):
    """What a worker has done since its last report."""

    updates: list[tuple[dict[str, float], Episodes]]  # the metrics of each, and the episodes that ended before it
    collecting: float  # seconds
    updating: float  # seconds


class Task(NamedTuple):
    """What a worker is given."""

    config: RunConfig  # the run's, with the worker's own seed
    shared: Shared
    counter: Any  # rollouts begun so far by all workers; an int with a lock
    stop: Any  # an int: no more rollouts once it is not 0
    iterations: int  # rollouts of the whole run
    reports: Connection


def train(config: RunConfig, run: Run, upkeep: Upkeep) -> None:
    """Let workers alternate rollouts and updates until `total_timesteps`.

    A signal leaves a checkpoint and raises `Stop`, a worker that fails or dies leaves one and raises WorkerError. The
    run's own agent is a copy of what the workers share, made when one reports, so that nothing changes while it is
    evaluated or saved.
    """
    agent, position = run.agent, run.position
    assert isinstance(agent, A3C)
    steps = agent.num_steps * config.num_envs
    iterations = config.total_timesteps // steps
    shared = agent.share()
    with closing(Workers(config.algo.num_workers)) as workers:
        try:
            workers.start(config, shared, position.iteration, iterations, upkeep.signals)
            while position.iteration < iterations:
                upkeep.signals.check()
                report = workers.next_report()
                for metrics, episodes in report.updates:
                    agent.updates += 1
                    run.record.add({**metrics, "charts/updates": float(agent.updates)}, episodes)
                done = len(report.updates)
                position.iteration += done
                position.step += done * steps
                agent.read(shared)
                check_finite({name: p.detach() for name, p in agent.net.named_parameters()}, "the updates gave")
                # when due: evaluate, log, save
                finished = position.iteration == iterations
                times = report.collecting / workers.number, report.updating / workers.number
                upkeep.tend(done * steps, *times, finished=finished)
        except Stop:
            workers.close()
            upkeep.save_last()
            raise
        except (WorkerError, NonFiniteError) as error:
            with upkeep.signals.protected():
                workers.close()
                saved = upkeep.save_last()
            at = f"saved at step {position.step:,}" if saved else "not saved"
            raise type(error)(
                f"{error}\nThe run is stopped and {at}; to go on: python -m pgrl.train resume={upkeep.run_dir}"
            ) from None


class Workers:
    """The worker processes of a run, from their start to their end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._context = context()
        self._stop = self._context.RawValue("b", 0)
        self._counter: Any = None
        self._processes: list[Any] = []
        self._pipes: dict[Connection, int] = {}  # of the workers that may still report

    def start(self, config: RunConfig, shared: Shared, iteration: int, iterations: int, signals: Signals) -> None:
        """Begin with rollout `iteration` of `iterations`."""
        with signals.protected():
            start_server()
        self._counter = self._context.Value("q", iteration)  # kept, or it would be gone before workers open it
        for i in range(self.number):
            own = replace(config, seed=worker_seed(config.seed, i, iteration), threads=config.threads or 1)
            with signals.protected():
                here, there = self._context.Pipe(duplex=False)
                task = Task(own, shared, self._counter, self._stop, iterations, there)
                self._processes.append(self._context.Process(target=work, args=(task,), name=f"{NAME} {i + 1}"))
                self._processes[i].start()
                there.close()
                self._pipes[here] = i

    def next_report(self) -> Report:
        """The next report of any worker; WorkerError if one has failed or died."""
        while self._pipes:
            sentinels = {self._processes[i].sentinel: pipe for pipe, i in self._pipes.items()}
            for ready in wait([*self._pipes, *sentinels]):
                pipe = ready if isinstance(ready, Connection) else sentinels[ready]
                name = f"worker {self._pipes[pipe] + 1} of {self.number}"
                try:
                    message = pipe.recv() if pipe.poll() else None
                except (EOFError, OSError):
                    message = None
                if isinstance(message, Report):
                    return message
                if isinstance(message, Failure):
                    log.info("%s raised:\n%s", name, message.trace)
                    raise WorkerError(f"{name} failed: {message.message}")
                process = self._processes[self._pipes.pop(pipe)]
                process.join()
                if process.exitcode != 0:
                    raise WorkerError(f"{name} died ({how_it_died(process)})")
                break  # it is done
        raise WorkerError(f"all {self.number} workers ended before their work was done")

    def close(self) -> None:
        """End the workers after the rollouts they are in; those that take longer are killed."""
        self._stop.value = 1
        deadline = time.monotonic() + GRACE_SECONDS
        while self._pipes and time.monotonic() < deadline:
            ready = wait(list(self._pipes), 0.1)
            for pipe in [pipe for pipe in self._pipes if pipe in ready]:
                try:
                    pipe.recv()  # a worker may wait for room in its pipe
                except (EOFError, OSError):
                    del self._pipes[pipe]
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], {}


def worker_seed(seed: int, worker: int, iteration: int) -> int:
    """The seed of a worker that begins at an iteration of the run: after a resume it plays other episodes."""
    sequence = np.random.SeedSequence([seed, WORKER_STREAM, worker, iteration])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def work(task: Task) -> None:
    """The life of a worker process."""
    follow_main()
    with suppress(ConnectionError):  # nobody listens any more
        try:
            learn(task)
        except Exception as error:
            task.reports.send(failure(error))
            raise SystemExit(1) from None


def learn(task: Task) -> None:
    """Alternate rollouts and updates as long as the counter has numbers, and report: algorithm S3, repeated."""
    config = task.config
    run = build(config)
    agent, env, device = run.agent, run.env, torch.device("cpu")
    assert isinstance(agent, A3C)
    agent.join(task.shared)
    rollout = Rollout(agent.num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    obs = env.reset()
    report, sent = Report([], 0.0, 0.0), time.perf_counter()
    while not task.stop.value:
        with task.counter.get_lock():
            number = task.counter.value
            task.counter.value += 1
        if number >= task.iterations:
            break
        start = time.perf_counter()
        transition = collect(env, agent, rollout, obs, device)
        if not rollout.looks_finite():
            check_finite(transition._asdict(), f"{config.env.id} met or gave")
        obs = rollout.obs[-1]
        collected = time.perf_counter()
        metrics = check_finite(agent.update(transition, number / task.iterations), "the update gave")
        updated = time.perf_counter()

        report.updates.append(({name: float(value) for name, value in metrics.items()}, env.episodes()))
        collecting, updating = report.collecting + collected - start, report.updating + updated - collected
        report = Report(report.updates, collecting, updating)
        if updated - sent > REPORT_SECONDS:
            task.reports.send(report)
            report, sent = Report([], 0.0, 0.0), updated
    if report.updates:
        task.reports.send(report)
    env.close()
