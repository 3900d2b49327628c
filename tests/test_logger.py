import errno
import io
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgrl import files, logger
from pgrl.logger import Logger, Progress, log_to, read_rows


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    log = logging.getLogger("pgrl")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level
    log.setLevel(level)


def fail(name: str, path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_rows_are_standard_json_at_once(tmp_path: Path) -> None:
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    assert list(tmp_path.iterdir()) == []
    log.write(10, 0.5, {"a/b": 1, "c": 0.1, "d": math.nan, "e": math.inf, "f": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=pytest.fail)
    assert strict == {"step": 10, "time": 0.5, "a/b": 1.0, "c": 0.1, "d": "nan", "e": "inf", "f": "-inf"}
    assert list(strict)[:2] == ["step", "time"] and text.count("\n") == 1 and text.endswith("\n")
    log.write(20, 1, {})
    log.close()
    first, second = read_rows(tmp_path)
    assert math.isnan(first.pop("d")) and first.pop("f") == -math.inf and first["e"] == math.inf
    assert second == {"step": 20, "time": 1} and type(second["step"]) is int


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 9, "ti', b'{"step": 3}', b"\x00" * 50, b"\xff\xfe\n", b"[1]\n", b"{}\n"]
)
def test_a_torn_end_is_passed_over_and_cut_on_resume(tmp_path: Path, tail: bytes) -> None:
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    for step in (1, 2):
        log.write(step, 0, {"x": step})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [row["step"] for row in read_rows(tmp_path)][:2] == [1, 2]
    Logger(tmp_path, tensorboard=False, resume_step=2)
    assert path.read_bytes() == whole
    Logger(tmp_path, tensorboard=False, resume_step=None)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("resume_step", "kept"), [(0, 0), (9, 0), (10, 1), (25, 2), (30, 3), (99, 3)])
def test_rows_past_the_checkpoint_are_cut(tmp_path: Path, resume_step: int, kept: int) -> None:
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    for step in (10, 20, 30):
        log.write(step, 0, {"x": step})
    rows = read_rows(tmp_path)
    resumed = Logger(tmp_path, tensorboard=False, resume_step=resume_step)
    assert read_rows(tmp_path) == rows[:kept]
    resumed.write(100, 0, {})
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 20, 30][:kept] + [100]


def test_resuming_without_a_file(tmp_path: Path) -> None:
    Logger(tmp_path, tensorboard=False, resume_step=5).close()
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path)


def test_a_full_disk_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    log.write(1, 0, {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files, "operation", fail)
        for step in range(2, 50):
            log.write(step, 0, {"x": step})
            log.sync()
    (warning,) = warnings(caplog)
    assert "metrics.jsonl" in warning and "No space left" in warning
    assert len(read_rows(tmp_path)) == 1
    log.write(50, 0, {"x": 50})
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, 51))
    log.close()
    assert len(warnings(caplog)) == 1


def test_rows_in_memory_are_bounded_and_their_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "_MAX_PENDING", 10)
    monkeypatch.setattr(files, "operation", fail)
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    for step in range(100):
        log.write(step, 0, {})
    log.close()
    assert len(warnings(caplog)) == 2 and "10 rows are lost" in warnings(caplog)[1]
    monkeypatch.undo()
    log.write(100, 0, {})
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(91, 101))


def test_sync_before_and_after_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str]] = []
    log = Logger(tmp_path, tensorboard=False, resume_step=None)
    log.sync()
    log.write(1, 0, {})
    monkeypatch.setattr(files, "operation", lambda name, path: seen.append((name, path.name)))
    log.sync()
    assert seen == [("fsync", "metrics.jsonl")] and not warnings(caplog)


def events(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tb"))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_rows_and_hides_those_past_the_checkpoint(tmp_path: Path) -> None:
    log = Logger(tmp_path, tensorboard=True, resume_step=None)
    for step in (10, 20, 30, 40):
        log.write(step, 0, {"charts/SPS": step / 4, "losses/policy": -step})
    log.write(50, 0, {"odd": math.inf})
    assert events(tmp_path) == {
        "charts/SPS": [(10, 2.5), (20, 5.0), (30, 7.5), (40, 10.0)],
        "losses/policy": [(10, -10.0), (20, -20.0), (30, -30.0), (40, -40.0)],
        "odd": [(50, math.inf)],
    }
    log.close()
    log = Logger(tmp_path, tensorboard=True, resume_step=20)
    log.write(45, 0, {"charts/SPS": 1})
    assert events(tmp_path)["charts/SPS"] == [(10, 2.5), (20, 5.0), (45, 1.0)]
    assert events(tmp_path)["losses/policy"] == [(10, -10.0), (20, -20.0)]
    assert len(list((tmp_path / "tb").iterdir())) == 2


def test_records_have_the_checksums_of_the_format() -> None:
    # The test vectors of RFC 3720, B.4, masked.
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert int.from_bytes(logger._masked_crc(data), "little") == masked


def test_a_tensorboard_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_there(name: str, path: Path) -> None:
        if "tb" in path.parts:
            fail(name, path)

    log = Logger(tmp_path, tensorboard=True, resume_step=None)
    log.write(1, 0, {"x": 1})
    monkeypatch.setattr(files, "operation", fail_there)
    for step in range(2, 10):
        log.write(step, 0, {"x": step})
    assert len(read_rows(tmp_path)) == 9
    (warning,) = warnings(caplog)
    assert "TensorBoard" in warning and "No space left" in warning


def test_a_missing_tensorboard_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    log = Logger(tmp_path, tensorboard=True, resume_step=None)
    log.write(1, 0, {"x": 1})
    log.write(2, 0, {"x": 1})
    assert len(read_rows(tmp_path)) == 2 and len(warnings(caplog)) == 1


def test_tensorboard_is_imported_for_the_first_row_and_tensorflow_never(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pgrl.logger import Logger;"
        f"log = Logger(Path({str(tmp_path)!r}), tensorboard=True, resume_step=None);"
        "assert 'tensorboard' not in sys.modules; log.write(1, 0, {'x': 1});"
        "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules;"
        "assert 'tensorboard.compat.tensorflow_stub' not in sys.modules"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_kills_leave_every_line_whole_and_no_step_twice(tmp_path: Path) -> None:
    """A writer is killed and resumed until it is done; what it wrote equals what an uninterrupted one writes."""
    last, random_ = 400, random.Random(0)
    mark = tmp_path / "mark"
    mark.write_text("0")

    def write_on() -> None:
        start = int(mark.read_text())
        log = Logger(tmp_path, tensorboard=True, resume_step=start)
        for step in range(start + 1, last + 1):
            log.write(step, 0, {"x": step / 3, "y": step})
            if step % 7 == 0:
                files.write_text(mark, str(step))

    kills = 0
    for attempt in range(1000):
        child = os.fork()
        if not child:
            try:
                write_on()
            except BaseException:
                os._exit(1)
            os._exit(0)
        if attempt < 40:
            time.sleep(random_.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            break
    assert kills > 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = [{"step": step, "time": 0, "x": step / 3, "y": float(step)} for step in range(1, last + 1)]
    assert [json.loads(line) for line in lines] == expected


def test_the_text_log_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("pgrl")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        log_to(tmp_path / name)
        log.info("message of %s", name)
        log.debug("not this")
        logging.getLogger("pgrl.part").warning("and of a part")
    for name in ("first", "second"):
        lines = (tmp_path / name / "train.log").read_text().splitlines()
        assert len(lines) == 2
        assert lines[0].endswith(f"INFO message of {name}") and lines[1].endswith("WARNING and of a part")
    monkeypatch.setattr(files, "operation", fail)
    log.info("lost, but nothing is raised")


def progress_at(times: list[float], monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> Progress:
    clock = iter(times)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    return Progress(stream)


def test_progress_is_a_line_at_most_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bar = progress_at([0, 2, 10, 10, 13, 14], monkeypatch, stream)
    bar.start(5000, 1000)
    bar.update(1100, {"charts/episodic_return": 5.0})
    bar.update(2000, {"losses/x": 1.0})
    bar.update(2100, {"charts/episodic_return": 6.0, "charts/episodic_return_100": 1234.56})
    bar.close()
    assert stream.getvalue().splitlines() == [
        "2,000/5,000 steps  40%  100 steps/s  return 5  ETA 0:00:30",
        "2,100/5,000 steps  42%  79 steps/s  return 1,235  ETA 0:00:37",
    ]
    bar.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    bar = Progress(stream)
    streams = sys.stdout, sys.stderr
    bar.start(1000)
    time.sleep(0.21)
    bar.update(500, {"charts/episodic_return_100": 7.0})
    bar.close()
    assert (sys.stdout, sys.stderr) == streams
    assert "\x1b[" in stream.getvalue() and "━" in stream.getvalue()
    assert "500/1,000 steps  50%" in stream.getvalue().splitlines()[-1]
    assert "return 7" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_never_raises(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    bar = Progress(stream)
    bar.update(1, {"charts/episodic_return": math.nan})
    bar.close()
    bar.start(0)
    stream.close()
    bar._period = 0
    bar.update(1, {})
    bar.update(2, {})
    bar.close()
    bar = Progress(stream)
    bar.start(10)
    bar.update(1, {})
    bar.close()
    stream = Terminal() if terminal else io.StringIO()
    bar = Progress(stream)
    bar.start(10, 10)
    bar.close()
