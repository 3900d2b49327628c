"""Every file operation of a run: its folder, claimed and locked, and files that survive a crash at any moment."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pgrl.errors import UserError

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT}


def is_unused(path: Path) -> bool:
    """Whether a folder is empty but for what a run leaves there that died before its first file."""
    return path.is_dir() and all(name == ".lock" or name.endswith(".tmp") for name in os.listdir(path))


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Makes the folder of a new run and holds its lock; UserError if it cannot be made or is in use already."""
    try:
        make_dir(path.parent)
        make_dir(path)
    except OSError as error:
        raise UserError(
            f"run_dir={path}: this folder cannot be made: {error.strerror}.\nUse another one, as run_dir=pgrl-run"
        ) from None
    with lock(path, "run_dir"):
        if not is_unused(path):  # asked under the lock, so that of many that come at once one goes on
            why = "this folder exists already, and two runs never share one.\n"
            why += f"Continue the run in it:  python -m pgrl.train resume={path}\nor use another one: run_dir={path}-2"
            raise UserError(f"run_dir={path}: {why}")
        yield


@contextmanager
def lock(run_dir: Path, key: str = "resume") -> Iterator[None]:
    """Holds a run's folder, given as `key`, for this process alone; UserError if another has it. Any death frees it."""
    path = run_dir / ".lock"
    with ExitStack() as stack:
        try:
            operation("lock", path)
            file = stack.enter_context(open(path, "a+", encoding="ascii"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = (
                f"this folder cannot be locked: {error.strerror}.\nContinue a copy of it:  cp -r {run_dir} {run_dir}-2"
            )
            if isinstance(error, BlockingIOError):
                file.seek(0)
                pid = file.read(20).strip()
                why = f"another process (pid {pid}) is running in this folder.\nTo make it save and stop:  kill {pid}"
            raise UserError(f"{key}={run_dir}: {why}") from None
        with suppress(OSError):
            os.truncate(path, 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


def make_dir(path: Path) -> None:
    """Makes a folder and its parents, to survive a power cut, unless it exists."""
    if not path.is_dir():
        make_dir(path.parent)
        operation("mkdir", path)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def read_bytes(path: Path) -> bytes:
    """A file's contents."""
    operation("read", path)
    return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file: a reader, or a crash, sees all of the old or all of the new."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(tmp, data)
        rename(tmp, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            remove(tmp)
        raise


def append(path: Path, data: str | bytes) -> None:
    """Adds to a file's end with one write, all of it or (OSError) nothing; not synced."""
    data = data.encode() if isinstance(data, str) else data
    operation("append", path)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, data) != len(data):
            os.truncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def truncate(path: Path, size: int) -> None:
    """Cuts a file to its first `size` bytes."""
    operation("truncate", path)
    os.truncate(path, size)
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's contents, or a folder's entries, survive a power cut."""
    operation("fsync", path)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def operation(name: str, path: Path) -> None:
    """Called before each file operation, so that tests can count them, and fail or die at any one."""


def list_names(path: Path) -> list[str]:
    """What lies in a folder, by name; nothing where there is no such folder."""
    operation("list", path)
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file in its place, to survive a power cut; a crash on the way leaves a part of it."""
    operation("open", path)
    with open(path, "wb") as file:
        operation("write", path)
        file.write(data)
        file.flush()
        operation("fsync", path)
        os.fsync(file.fileno())


def link(source: Path, target: Path, size: int) -> bool:
    """Gives a file a second name; False where the file system cannot, or where there is no such file of that size."""
    operation("link", source)
    try:
        status = source.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name, at once; it survives a power cut when the folder is synced."""
    operation("rename", source)
    os.rename(source, target)


def remove(path: Path) -> None:
    """Removes a file or a folder of files; links are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        for name in list_names(path):
            operation("unlink", path / name)
            os.unlink(path / name)
        operation("rmdir", path)
        os.rmdir(path)
    elif os.path.lexists(path):
        operation("unlink", path)
        os.unlink(path)
