"""Signals that stop a run: they raise `Stop` at once, but never in the middle of protected work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop(BaseException):
    """A signal asked the run to end; its exit code is 128 plus the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Signals:
    """While entered, stopping signals raise `Stop` in whatever the run is doing: a rollout, an update, an evaluation.

    Raising is safe because a stopped run writes a snapshot taken earlier and never what it was changing. The block of
    `protected` is not interrupted: the signal waits for its end. A second SIGINT leaves at once.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._protected = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            if signum == signal.SIGINT:
                os._exit(128 + signum)
            return
        self._pending = signum
        if not self._protected:
            raise Stop(signum)

    def end(self) -> None:
        """No signal interrupts from here on: the outcome is decided."""
        self._protected += 1

    def check(self) -> None:
        """Raise `Stop` if a signal came that something swallowed."""
        if self._pending is not None and not self._protected:
            raise Stop(self._pending)

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Work that a signal may not interrupt."""
        self._protected += 1
        try:
            yield
        finally:
            self._protected -= 1
        self.check()
