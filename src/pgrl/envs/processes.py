"""Copies of one Gymnasium env, shared out among processes that step them at the same time."""

from __future__ import annotations

import builtins
import ctypes
import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgrl import processor
from pgrl.data import Step, action_rows
from pgrl.envs.base import EnvConfig, Episodes, new_step
from pgrl.envs.gymnasium import GymnasiumVecEnv
from pgrl.processes import (
    NAME,
    Failure,
    WorkerError,
    context,
    failure,
    follow_main,
    how_it_died,
    kill_at_exit,
    signals_waiting,
    start_server,
)

STEP, CALL, CLOSE = range(3)  # what a worker may be told
SPINS = 2000  # tries to take a semaphore before the process sleeps for it
GRACE_SECONDS = 2.0  # for workers to end by themselves
WORKER_STREAM = 3_000_017  # in the seeds of the generators of their processes
BROKEN = "an earlier call was interrupted or failed, and the processes are out of step: make new envs"


class Task(NamedTuple):
    """The envs of a worker."""

    config: EnvConfig
    first: int  # the number of its first env
    number: int  # of its envs
    of: int  # all envs
    seed: int


class Link(NamedTuple):
    """What a worker and the main process have in common."""

    memory: Any  # the bytes of one `layout`
    layout: np.dtype[Any]
    go: Any  # semaphores: the worker may go on, the worker is done
    done: Any
    pipe: Connection  # the worker's end
    spins: int

    def fields(self) -> dict[str, NDArray[Any]]:
        """The arrays in the memory, by their names."""
        one = np.frombuffer(self.memory, self.layout)
        return {name: one[name][0] if one[name].ndim > 1 else one[name] for name in self.layout.names or ()}


class Answer(NamedTuple):
    """What a call gave, and the warnings since the last one: their texts and categories."""

    result: Any
    warnings: list[tuple[str, str]]


class ProcessesVecEnv:
    """B copies of one Gymnasium env in several processes, this one among them; the same transitions as in one.

    Each process has a GymnasiumVecEnv with a share of the envs, which keep their numbers and so their seeds. Actions
    and answers pass through shared memory, everything else through pipes. A state is that of a GymnasiumVecEnv, and
    goes with any number of processes.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        sizes = shares(num_envs, config.processes)
        self._own = GymnasiumVecEnv(config, sizes[0], seed, of=num_envs)
        self.obs_space, self.action_space = self._own.obs_space, self._own.action_space
        self._obs = np.zeros((num_envs, *self.obs_space.shape), self.obs_space.dtype)
        self._finished = Episodes.none()
        self._begun = self._broken = False
        spins = SPINS if len(sizes) <= processor.cores() else 0  # else it would keep a core from one that works
        start_server()
        self._workers: list[Worker] = []
        try:
            for k, size in enumerate(sizes[1:], 1):
                task = Task(config, sum(sizes[:k]), size, num_envs, seed)
                kind = layout(self.obs_space, self.action_space, size)
                self._workers.append(Worker(f"{k + 1} of {len(sizes)}", task, kind, spins))
            for worker in self._workers:
                worker.answer()
        except BaseException:
            self.close()
            raise

    def reset(self) -> Tensor:
        self._finished.clear()
        self._obs[:] = np.concatenate(self._everywhere("reset"))
        self._begun = True
        return self.obs()

    def obs(self) -> Tensor:
        return torch.from_numpy(self._obs.copy())

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        if self._broken or not self._begun:
            raise RuntimeError(BROKEN if self._broken else "call reset or load_state_dict before step")
        out = new_step(torch.from_numpy(self._obs)) if out is None else out
        arrays = getattr(out, "arrays", None) or [x.numpy() for x in out]
        action, own = action.cpu(), self._own.num_envs
        try:
            for worker in self._workers:
                worker.begin(action)
            self._own.answer(action[:own], [x[:own] for x in arrays])
            for worker in self._workers:
                if worker.finish(arrays):
                    self._finished.extend(self._own.episodes())  # of this step or an earlier one
                    self._finished.extend(worker.episodes())
        except BaseException:
            self._broken = True
            raise
        self._obs[:] = arrays[0]
        return out

    def episodes(self) -> Episodes:
        self._finished.extend(self._own.episodes())
        return self._finished.take()

    def state_dict(self) -> dict[str, Any]:
        parts = self._everywhere("state_dict")
        joined: dict[str, list[Any]] = {
            key: sum((part[key] for part in parts), []) for key in ("episode", "return", "actions")
        }
        return {"seed": parts[0]["seed"], **joined, "obs": self._obs.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As GymnasiumVecEnv's, each process for its envs."""
        if len(state["actions"]) != self.num_envs:
            raise ValueError(f"a state of {len(state['actions'])} envs does not fit {self.num_envs} envs")
        self._finished.clear()
        parts, first = [], 0
        for number in [self._own.num_envs, *(worker.task.number for worker in self._workers)]:
            rows = slice(first, first + number)
            theirs = {key: state[key][rows] for key in ("episode", "return", "obs", "actions")}
            parts.append(({"seed": state["seed"], **theirs},))
            first += number
        self._everywhere("load_state_dict", parts)
        self._obs[:] = np.concatenate(self._everywhere("obs"))
        self._begun = True

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.end(deadline)
        self._own.close()

    def _everywhere(self, name: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """The results of a method in all processes at the same time, each with arguments of its own."""
        if self._broken:
            raise RuntimeError(BROKEN)
        own, *others = arguments or [()] * (1 + len(self._workers))
        try:
            for worker, given in zip(self._workers, others, strict=True):
                worker.call(name, given)
            return [called(self._own, name, own), *(worker.answer() for worker in self._workers)]
        except BaseException:
            self._broken = True
            raise


class Worker:
    """A worker process as the main process sees it."""

    def __init__(self, name: str, task: Task, kind: np.dtype[Any], spins: int) -> None:
        self.task, self._name = task, f"env process {name}"
        self._rows = slice(task.first, task.first + task.number)  # of the rows of all envs
        processes = context()
        self._pipe, there = processes.Pipe()
        memory = processes.RawArray(ctypes.c_byte, kind.itemsize)
        self._link = Link(memory, kind, processes.Semaphore(0), processes.Semaphore(0), there, spins)
        fields = self._link.fields()
        self._command, self._action, self._ended = fields["command"], fields["action"], fields["ended"]
        self._returns, self._lengths = fields["returns"], fields["lengths"]
        self._answers = [fields[name] for name in Step._fields]
        self._process = processes.Process(target=work, args=(task, self._link), name=f"{NAME} {name}")
        with signals_waiting():
            self._process.start()
            self._killed_at_exit = kill_at_exit(self, self._process)
        there.close()

    def tell(self, command: int) -> None:
        """Wake the worker for a command."""
        self._command[0] = command
        self._link.go.release()

    def begin(self, action: Tensor) -> None:
        """Let its envs step, with their share of the actions [B, ...] of all."""
        self._action[:] = action.numpy()[self._rows]
        self.tell(STEP)

    def finish(self, arrays: list[NDArray[Any]]) -> int:
        """Wait for the step that was begun, and put it into the rows [B, ...] of all; how many episodes ended."""
        if not wait_for(self._link.done, self._link.spins, self._process.is_alive):
            raise self._died()
        ended = int(self._ended[0])
        if ended < 0:
            self.answer()  # raises what it met
        for row, shared in zip(arrays, self._answers, strict=True):
            row[self._rows] = shared
        return ended

    def episodes(self) -> Episodes:
        """Those that ended in the last step."""
        over = np.flatnonzero(self._lengths)
        return Episodes(self._returns[over].tolist(), self._lengths[over].tolist(), (self.task.first + over).tolist())

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Begin a method of its GymnasiumVecEnv; `answer` has the result."""
        self.tell(CALL)
        with suppress(ConnectionError):  # `answer` says more
            self._pipe.send((name, arguments))

    def answer(self) -> Any:
        """The result of the method that was called; WorkerError where the worker failed or died."""
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._died() from None
        if isinstance(answer, Failure):
            error = WorkerError(f"{self._name} failed: {answer.message}")
            error.add_note(answer.trace)
            raise error
        for text, category in answer.warnings:
            warnings.warn(text, getattr(builtins, category, UserWarning), stacklevel=2)
        return answer.result

    def close(self) -> None:
        """Ask it to end; what it may be sending is not read."""
        self.tell(CLOSE)
        self._pipe.close()

    def end(self, deadline: float) -> None:
        """Wait for its end; one that is not there at the deadline is killed."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._killed_at_exit.cancel()

    def _died(self) -> WorkerError:
        self._process.join(GRACE_SECONDS)
        return WorkerError(f"{self._name} died ({how_it_died(self._process)})")


def shares(num_envs: int, processes: int) -> list[int]:
    """How many envs each process has, the main one first, which has other work, too: no more than the others."""
    processes = min(processes, num_envs)
    return [(num_envs + k) // processes for k in range(processes)]


def layout(obs_space: Any, action_space: Any, number: int) -> np.dtype[Any]:
    """What lies in the memory of a worker with so many envs."""
    shape, dtype = action_rows(action_space)
    obs = str(obs_space.dtype), (number, *obs_space.shape)
    fields: list[Any] = [
        ("command", "int64"),
        ("ended", "int64"),  # episodes, in the last step; -1: the worker failed
        ("action", str(dtype).removeprefix("torch."), (number, *shape)),
        ("obs", *obs),
        ("reward", "float32", (number,)),
        ("terminated", "bool", (number,)),
        ("truncated", "bool", (number,)),
        ("next_obs", *obs),
        ("returns", "float64", (number,)),  # of the episodes that ended in the last step
        ("lengths", "int64", (number,)),  # theirs; 0 where none ended
    ]
    return np.dtype(fields, align=True)


def wait_for(semaphore: Any, spins: int, alive: Callable[[], bool] = lambda: True) -> bool:
    """Take a semaphore, at first without sleeping, for waking up takes longer than a step; False if nobody is alive."""
    for _ in range(spins):
        if semaphore.acquire(False):
            return True
    while not semaphore.acquire(True, 1.0):
        if not alive():
            return bool(semaphore.acquire(False))
    return True


def called(envs: GymnasiumVecEnv, name: str, arguments: tuple[Any, ...]) -> Any:
    """The result of a method, observations as an array."""
    result = getattr(envs, name)(*arguments)
    return result.numpy() if isinstance(result, Tensor) else result


def work(task: Task, link: Link) -> None:
    """The life of a worker process."""
    follow_main()
    torch.set_num_threads(1)
    own = np.random.SeedSequence([task.seed, WORKER_STREAM, task.first]).generate_state(1)
    torch.manual_seed(int(own[0]))  # for envs that draw from the process's generators
    np.random.seed(own)
    random.seed(int(own[0]))
    met: list[tuple[str, str]] = []
    warnings.showwarning = lambda message, category, *_, **__: met.append((str(message), category.__name__))
    with suppress(ConnectionError):  # nobody listens any more
        try:
            envs = GymnasiumVecEnv(task.config, task.number, task.seed, first=task.first, of=task.of)
            link.pipe.send(Answer(None, met.copy()))
            met.clear()
            serve(task, link, envs, met)
            envs.close()
        except Exception as error:
            link.fields()["ended"][0] = -1
            link.done.release()
            link.pipe.send(failure(error))


def serve(task: Task, link: Link, envs: GymnasiumVecEnv, met: list[tuple[str, str]]) -> None:
    """Step the envs and call their methods, as the main process says, until it says CLOSE; `met` gathers warnings."""
    fields = link.fields()
    action, rows = torch.from_numpy(fields["action"]), [fields[name] for name in Step._fields]
    command, ended, lengths, returns = (fields[name] for name in ("command", "ended", "lengths", "returns"))
    while True:
        wait_for(link.go, link.spins)  # without the main process this one ends by itself
        if command[0] == CLOSE:
            return
        if command[0] == CALL:
            result = called(envs, *link.pipe.recv())
            link.pipe.send(Answer(result, met.copy()))
            met.clear()
            continue
        envs.answer(action, rows)
        episodes = envs.episodes()
        if episodes.env or ended[0]:
            lengths[:], ended[0] = 0, len(episodes.env)
            own = [env - task.first for env in episodes.env]
            returns[own], lengths[own] = episodes.env_return, episodes.length
        link.done.release()
