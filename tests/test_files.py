"""Folders that are claimed and locked, and files that are replaced, added to and cut."""

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgrl import files
from pgrl.errors import UserError


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_run_folder_is_claimed_once(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "ppo" / "one"

    def claim(_: int) -> bool:
        try:
            with files.claim(path):
                (path / "config.yaml").write_text("")
        except UserError as error:
            assert f"run_dir={path}" in str(error)
            return False
        return True

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(claim, range(50))) == 1
    with pytest.raises(UserError, match=f"resume={path}"), files.claim(path):
        pass
    for bad in (path / "config.yaml", path / "config.yaml" / "below"):
        with pytest.raises(UserError, match="cannot be made"), files.claim(bad):
            pass


def test_a_lock_excludes_others_and_ends_with_its_holder(tmp_path: Path) -> None:
    with files.lock(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"pid {os.getpid()}\) is running in this folder"):
                with files.lock(tmp_path):
                    pass
    with pytest.raises(UserError, match="cannot be locked"), files.lock(tmp_path / "missing"):
        pass
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with files.lock(tmp_path):
            os.write(told, b"1")
            signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        with pytest.raises(UserError, match=rf"pid {child}\)"), files.lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    files.write_text(path, "ü\r\n")
    assert files.read_bytes(path) == "ü\r\n".encode()
    files.append(path, "a\n")
    files.append(path, b"\xff")
    assert files.read_bytes(path) == "ü\r\na\n".encode() + b"\xff"
    files.truncate(path, 3)
    assert files.read_bytes(path) == "ü\r".encode()
    files.make_dir(tmp_path / "a" / "b")
    files.make_dir(tmp_path / "a" / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "status.json"]

    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left"):
        files.append(path, "lost")
    assert files.read_bytes(path) == "ü\r".encode()


def test_a_failed_replacement_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    files.write_text(path, "old")

    for failing in ("open", "write", "fsync", "rename"):

        def fail(name: str, path: Path, failing: str = failing) -> None:
            if name == failing:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "operation", fail)
        with pytest.raises(OSError, match="No space left"):
            files.write_text(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
