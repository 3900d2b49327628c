"""Worker processes of a run: how they start, and that none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, util
from typing import Any, NamedTuple

import torch.multiprocessing

from pgrl.signals import STOPPING

NAME = "pgrl worker"  # of the processes

# A worker runs the main program again by its name, which for `python -m pgrl.train` is a module that it has already.
warnings.filterwarnings("ignore", "'pgrl.train' found in sys.modules", RuntimeWarning)


class WorkerError(RuntimeError):
    """A worker failed or died, which ends the run."""


class Failure(NamedTuple):
    """What a worker raised, as text: a pipe would have to pickle the error itself."""

    message: str
    trace: str


def failure(error: Exception) -> Failure:
    """What to tell the main process of an error."""
    message = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return Failure(message, "".join(traceback.format_exception(error)))


def context() -> Any:
    """Of multiprocessing, for workers that inherit neither threads nor locks, and need not import torch anew."""
    return torch.multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the process that workers are forked from, with pgrl imported; no signal that stops a run reaches it.

    Terminals and batch systems send these signals to all processes of a run: the main one tells the others.
    """
    forkserver.set_forkserver_preload(["pgrl.asynchronous"])
    with signals_waiting():
        resource_tracker.ensure_running()  # before anything that it tracks; it unblocks some
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        forkserver.ensure_running()


@contextmanager
def signals_waiting() -> Iterator[None]:
    """While entered, signals that stop a run wait; processes that are started inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_at_exit(owner: object, process: Any) -> util.Finalize:
    """Kill a worker when its owner is forgotten, or else at the exit of this process, which would wait for it."""
    return util.Finalize(owner, process.kill, exitpriority=10)


def follow_main() -> None:
    """In a worker: take no notice of what stops a run, and end with the main process, however it ends."""
    for signum in STOPPING:
        signal.signal(signum, lambda *_: None)  # and not SIG_IGN, which programs that an env starts would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    threading.Thread(target=leave_with_main, daemon=True).start()


def leave_with_main() -> None:
    """Wait for the end of the main process, and follow it."""
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def refuse_in_worker() -> None:
    """Leave a worker that runs its main program again: it is a script without `if __name__ == "__main__":`."""
    if multiprocessing.current_process().name.startswith(NAME):
        guard = 'what it runs must stand under if __name__ == "__main__":'
        print(f"Worker processes import the script that trains: {guard}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def how_it_died(process: Any) -> str:
    """What ended a process that has ended."""
    code = process.exitcode
    if code is None:
        return "it does not answer"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
