"""Crashes, power cuts, failing disks and damage while checkpoints share the segments of a replay buffer."""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from tests.faults.test_checkpoint_faults import PowerCutError, at, corrupt, count_operations, dies, no_fsync, tmp_path

from pgrl import checkpoint, files
from pgrl.data import Transition
from pgrl.errors import CheckpointError
from pgrl.replay import ReplayBuffer

__all__ = ["no_fsync", "tmp_path"]  # the fixtures

SPACES = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)
CAPACITY = 30


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgrl.replay_layout.SEGMENT_BYTES", 5 * 24)


def buffer_at(count: int) -> ReplayBuffer:
    """A buffer after so many steps, which tell their number, of episodes of 4 steps."""
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(CAPACITY, 1, *SPACES, torch.device("cpu"), generator, gamma=0.9)
    add(buffer, count)
    return buffer


def add(buffer: ReplayBuffer, count: int) -> None:
    number = torch.arange(buffer.count, buffer.count + count + 1.0).view(-1, 1, 1)
    none = torch.zeros((count, 1), dtype=torch.bool)
    ended = (number[:-1, :, 0] + 1) % 4 == 0
    obs = number.expand(-1, 1, 2)
    buffer.add(Transition(obs[:-1], number[:-1], number[:-1, :, 0], obs[1:], ended, none))


def save(run_dir: Path, buffer: ReplayBuffer, keep: int = 9) -> Path:
    return checkpoint.save(run_dir, buffer.count, {"replay": buffer.state_dict()}, keep=keep)


def assert_state(step: int, state: dict[str, object]) -> None:
    """The rows are those of that step."""
    expected, buffer = buffer_at(step), buffer_at(0)
    buffer.load_state_dict(state["replay"])  # type: ignore[arg-type]
    assert buffer.count == step and len(buffer) == len(expected)
    ours, theirs = (b._batch(torch.arange(b._first, b._time) % 31, torch.ones(len(b))) for b in (buffer, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def make_run(run_dir: Path, *steps: int) -> Path:
    buffer = buffer_at(0)
    for step in steps:
        add(buffer, step - buffer.count)
        save(run_dir, buffer)
    return run_dir


def linked_copy(source: Path, target: Path) -> Path:
    """A copy of a run in which files that were one file still are."""
    copies: dict[int, str] = {}

    def copy(a: str, b: str) -> str:
        number = os.stat(a).st_ino
        if number in copies:
            os.link(copies[number], b)
        else:
            copies[number] = shutil.copy2(a, b)
        return b

    return Path(shutil.copytree(source, target, copy_function=copy))


def resume_and_save(run_dir: Path, to: int = 58) -> None:
    """What one process does between two checkpoints: clean, resume, go on, save, rotate."""
    checkpoint.clean(run_dir)
    _, state = checkpoint.load_newest(run_dir, lambda message: None)
    buffer = buffer_at(0)
    buffer.load_state_dict(state["replay"])
    add(buffer, to - buffer.count)
    save(run_dir, buffer, keep=2)


def test_death_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = make_run(tmp_path / "template", 20, 37, 48)
    total = count_operations(monkeypatch, lambda: resume_and_save(linked_copy(template, tmp_path / "counted")))
    assert total > 50
    for k in range(total + 1):
        run_dir = linked_copy(template, tmp_path / str(k))
        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", at(k, lambda: os._exit(9)))
            assert dies(lambda run_dir=run_dir: resume_and_save(run_dir)) is (k < total)
        step, state = checkpoint.load_newest(run_dir, pytest.fail)
        assert step in (48, 58)
        assert_state(step, state)
        resume_and_save(run_dir)
        assert checkpoint.list_steps(run_dir) == [48, 58]
        for one in (48, 58):
            assert_state(one, checkpoint.load(checkpoint.folder(run_dir, one)))
        assert not list(run_dir.rglob("*.tmp"))
        shutil.rmtree(run_dir)


def test_power_cut_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were not synced are torn, and so are all their names."""
    random_ = random.Random(0)
    template = make_run(tmp_path / "template", 20, 37, 48)
    total = count_operations(monkeypatch, lambda: resume_and_save(linked_copy(template, tmp_path / "counted")))
    for k in range(total):
        run_dir = linked_copy(template, tmp_path / str(k))
        synced = {path.stat().st_ino for path in run_dir.rglob("*")}

        def fsync(handle: int, synced: set[int] = synced) -> None:
            synced.add(os.fstat(handle).st_ino)

        def strike() -> None:
            raise PowerCutError

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(files, "operation", at(k, strike))
            try:
                resume_and_save(run_dir)
            except PowerCutError:
                pass
        for path in run_dir.rglob("*"):
            if path.is_file() and path.stat().st_ino not in synced:
                os.truncate(path, random_.randrange(path.stat().st_size + 1))
        step, state = checkpoint.load_newest(run_dir, pytest.fail)
        assert step in (48, 58)
        assert_state(step, state)
        resume_and_save(run_dir)
        assert_state(58, checkpoint.load_newest(run_dir, pytest.fail)[1])
        shutil.rmtree(run_dir)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_failing_disk_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    """A save fails as a whole or succeeds, and the buffer knows afterwards which segments are on disk."""
    buffer = buffer_at(0)
    for step in (20, 37, 48):
        add(buffer, step - buffer.count)
        save(tmp_path / "template", buffer)
    saved = dict(buffer._saved)
    add(buffer, 10)
    total = count_operations(
        monkeypatch, lambda: save(linked_copy(tmp_path / "template", tmp_path / "counted"), buffer, 2)
    )
    for k in range(total):
        buffer._saved.clear()
        buffer._saved.update(saved)
        run_dir = linked_copy(tmp_path / "template", tmp_path / str(k))
        count = iter(range(10**9))

        def fail(name: str, path: Path, k: int = k, count: Iterator[int] = count) -> None:
            number = next(count)
            if number == k or lasting and number > k:
                raise OSError(code, os.strerror(code), str(path))

        failed = False
        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", fail)
            try:
                save(run_dir, buffer, 2)
            except checkpoint.SaveError as error:
                failed = True
                assert error.errno == code
        assert failed or not lasting
        for step in checkpoint.list_steps(run_dir):
            assert_state(step, checkpoint.load(checkpoint.folder(run_dir, step)))
        assert {48} <= set(checkpoint.list_steps(run_dir))
        assert_state(58, checkpoint.load(save(run_dir, buffer, 2)))
        assert checkpoint.list_steps(run_dir) == [48, 58]
        assert not list(run_dir.rglob("*.tmp"))


def damage_one(random_: random.Random, path: Path) -> None:
    data = path.read_bytes()
    changed = corrupt(random_, data)
    while changed == data:
        changed = corrupt(random_, data)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)  # in place: every name of the file has it


def test_three_hundred_corruptions_none_loaded(tmp_path: Path) -> None:
    template, random_ = make_run(tmp_path / "template", 20, 37, 48), random.Random(1)
    for number in range(300):
        run_dir = linked_copy(template, tmp_path / "run")
        path = random_.choice(sorted(checkpoint.folder(run_dir, 48).glob("rows_*")))
        sharing = [s for s in (20, 37) if (checkpoint.folder(run_dir, s) / path.name).exists()]
        shared = [s for s in sharing if (checkpoint.folder(run_dir, s) / path.name).samefile(path)]
        damage_one(random_, path)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(checkpoint.folder(run_dir, 48))
        gone = not path.exists()
        for step in (20, 37):
            if step in shared and not gone:
                with pytest.raises(CheckpointError, match="damaged"):
                    checkpoint.load(checkpoint.folder(run_dir, step))
            else:
                assert_state(step, checkpoint.load(checkpoint.folder(run_dir, step)))
        if number % 20 == 0:
            assert checkpoint.load_newest(run_dir, lambda message: None, rows=False)[0] == 48
        shutil.rmtree(run_dir)


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end, in the middle of a segment."""
    import resource
    import signal

    make_run(tmp_path, 20)

    def overfill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            save(tmp_path, buffer_at(37))
        except checkpoint.SaveError:
            os._exit(9)

    assert dies(overfill)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000000000020"]
    assert_state(20, checkpoint.load_newest(tmp_path, pytest.fail)[1])
