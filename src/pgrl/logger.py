"""What a run tells: metrics.jsonl (the truth), TensorBoard (derived from it), train.log and a display."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from pgrl import files

Row = dict[str, float]

_MAX_PENDING = 10_000  # rows kept in memory while the disk refuses them
_log = logging.getLogger("pgrl")


class Logger:
    """Writes one row of metrics after another; a disk that fails never stops the training.

    resume_step: the step that training continues from, whose later rows are cut; None for a new run.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int | None) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._pending: deque[str] = deque(maxlen=_MAX_PENDING)
        self._failed = False
        self._events = _Events(run_dir / "tb", resume_step) if tensorboard else None
        if resume_step is not None:
            _cut(self._path, resume_step)

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Adds the row of `step` (env steps), `seconds` after the start; NaN and Inf stand as strings."""
        row = {tag: float(value) for tag, value in values.items()}
        standard = {tag: value if math.isfinite(value) else str(value) for tag, value in row.items()}
        self._pending.append(json.dumps({"step": step, "time": seconds, **standard}, allow_nan=False) + "\n")
        self._flush()
        if self._events:
            try:
                self._events.write(step, row)
            except Exception as error:  # whatever is wrong with it, metrics.jsonl has the rows
                self._events = None
                _log.warning("TensorBoard gets no more rows: %s", error)

    def sync(self) -> None:
        """Makes the rows so far survive a power cut; to be called before a checkpoint is saved."""
        if self._flush():
            try:
                files.sync(self._path)
            except FileNotFoundError:
                pass  # no row yet
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Tries for the last time to write what the disk refused."""
        if not self._flush():
            _log.warning("%s: the last %d rows are lost", self._path, len(self._pending))
        self._events = None

    def _flush(self) -> bool:
        if self._pending:
            try:
                files.append(self._path, "".join(self._pending))
            except OSError as error:
                self._warn(error)
                return False
            self._pending.clear()
        return True

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            _log.warning("%s: %s; rows are kept in memory and tried again", self._path, error.strerror)
        self._failed = True


def read_rows(run_dir: Path | str) -> list[Row]:
    """The rows of a run's metrics.jsonl, without a torn one; OSError if there is no such file."""
    lines = files.read_bytes(Path(run_dir) / "metrics.jsonl").split(b"\n")
    return [row for row in map(_parse, lines) if row]


def log_to(run_dir: Path) -> logging.Handler:
    """Sends the log of `pgrl` (level INFO) to this run's train.log, and no longer to an earlier run's."""
    for old in [handler for handler in _log.handlers if isinstance(handler, _LogFile)]:
        _log.removeHandler(old)
    handler = _LogFile(run_dir / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    return handler


class Progress:
    """How far a run is: a bar on a terminal, elsewhere a line every 5 s; it never raises into training."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._period = math.inf  # seconds between two displays; for ever while nothing is to be shown
        self._total = self._step0 = self._step = 0
        self._start = self._shown = 0.0
        self._return = ""

    def start(self, total: int, step0: int = 0) -> None:
        """Begins at step0 of `total` env steps."""
        self._total, self._step0, self._step, self._period = total, step0, step0, 5.0
        self._start = self._shown = time.monotonic()
        with suppress(Exception):
            if self._stream.isatty() and os.environ.get("TERM") != "dumb":
                from rich import console, progress

                columns = progress.BarColumn(), progress.TextColumn("{task.description}")
                screen = console.Console(file=self._stream)
                bar = progress.Progress(*columns, console=screen, auto_refresh=False, transient=True)
                bar.add_task("", total=total, completed=step0)
                bar.start()
                self._bar, self._period = bar, 0.2

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the step and the newest return among the metrics, and shows them when it is time."""
        self._step = step
        value = values.get("charts/episodic_return_100", values.get("charts/episodic_return"))
        if value is not None:
            self._return = f"  return {value:,.4g}"
        if time.monotonic() - self._shown >= self._period:
            self._show()

    def close(self) -> None:
        """Shows the last state, and gives the terminal back."""
        if self._bar:
            with suppress(Exception):
                self._bar.stop()
            self._bar = None
        if self._period < math.inf:
            self._show()
            self._period = math.inf

    def _show(self) -> None:
        self._shown = time.monotonic()
        try:
            sps = (self._step - self._step0) / max(self._shown - self._start, 1e-9)
            text = f"{self._step:,}/{self._total:,} steps  {self._step / self._total:.0%}"
            text += f"  {sps:,.0f} steps/s{self._return}"
            if 0 < self._step - self._step0 < self._total - self._step0:
                text += f"  ETA {timedelta(seconds=round((self._total - self._step) / sps))}"
            if self._bar:
                self._bar.update(0, completed=self._step, description=text, refresh=True)
            else:
                print(text, file=self._stream, flush=True)
        except Exception:
            self._period = math.inf  # nobody is watching any more


class _LogFile(logging.Handler):
    """Appends each record to a file; a record that the disk refuses is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            files.append(self.path, self.format(record) + "\n")
        except OSError:
            pass
        except Exception:
            self.handleError(record)


class _Events:
    """An event file of TensorBoard, without TensorFlow or a thread; its package is imported for the first row."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 1000:016d}.pgrl"
        self._resume_step = resume_step
        self._event: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        data = b""
        if self._event is None:
            files.make_dir(self._path.parent)
            self._event = import_module("tensorboard.compat.proto.event_pb2").Event
            data = self._record(file_version="brain.Event:2")
            if self._resume_step is not None:
                # A new session hides what earlier files hold from its step on; 1 is SessionLog.START.
                data += self._record(step=self._resume_step + 1, session_log={"status": 1})
        summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]}
        files.append(self._path, data + self._record(step=step, summary=summary))

    def _record(self, **fields: Any) -> bytes:
        """An event as a TFRecord: length, its masked CRC, data, its masked CRC; all little-endian."""
        data: bytes = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = len(data).to_bytes(8, "little")
        return length + _masked_crc(length) + data + _masked_crc(data)


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [entry >> 1 ^ (0x82F63B78 if entry & 1 else 0) for entry in table]  # CRC-32C, reflected
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc, table = 0xFFFFFFFF, _CRC
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _parse(line: bytes) -> Row | None:
    try:
        row = {tag: float(value) if isinstance(value, str) else value for tag, value in json.loads(line).items()}
    except (ValueError, AttributeError):
        return None
    return row if "step" in row else None


def _cut(path: Path, step: int) -> None:
    """Cuts metrics.jsonl before its first row past `step`, and what is torn at its end."""
    try:
        data = files.read_bytes(path)
    except FileNotFoundError:
        return
    kept = end = 0
    for line in data.split(b"\n")[:-1]:
        end += len(line) + 1
        if row := _parse(line):
            if row["step"] > step:
                break
            kept = end
    if kept < len(data):
        files.truncate(path, kept)
