"""Checkpoints that survive a crash at any moment, and every other file operation of a run.

A checkpoint is the folder `checkpoints/step_<12 digits>/` of three files: `state.safetensors` (the tensors),
`state.json` (the tree they hang in) and `MANIFEST.json` (format version, sizes, sha256). It is built under a
temporary name, each file synced, and then renamed: a folder of the right name is whole, or was damaged later,
which the checksums show. Nothing in it is code, a class name or a path: loading one runs nothing.

The rows of a replay buffer are too many to be written anew each time. They lie in segments beside the three files, as
`rows_<table>_<number>.bin`. A segment to which nothing more will be added is written once; the next checkpoint gives
the same file a second name in its own folder (a hard link). So every folder is whole by itself, and a file is gone when
the last folder that has it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgrl.errors import CheckpointError, UserError
from pgrl.rows import Rows

if TYPE_CHECKING:
    import torch

State = dict[str, Any]
Entry = dict[str, Any]  # of the manifest: the size and sha256 of a file

_VERSION, _VERSION_WITH_ROWS = 1, 2
_TENSORS, _TREE, _MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"
_MANIFEST_LIMIT = 65536  # bytes; about 300 are used, and 120 for each segment of rows
_NAME = re.compile(r"step_([0-9]{12})")
_SEGMENT = re.compile(r"rows_[0-9]{1,3}_[0-9]{1,15}\.bin")
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT}
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64", "complex64", *_INTEGERS}


class SaveError(OSError):
    """A checkpoint could not be written; the older ones are as they were, and saving may be tried again."""


class _DamagedError(CheckpointError):
    """A checkpoint whose contents are not what was saved."""


class SavedRows:
    """Rows in the files of a checkpoint, read a segment at a time; CheckpointError where a file has changed."""

    def __init__(self, path: Path, info: State, final: dict[int, bool], files: dict[int, tuple[str, str]]) -> None:
        self._path, self._final, self._files = path, final, files  # files: names and checksums
        self.info, self.saved = info, {number: files[number][1] for number in final if final[number]}

    def segments(self) -> dict[int, bool]:
        """The numbers of the segments, and whether each is final."""
        return self._final

    def read(self, number: int) -> bytes:
        """A segment, verified once more."""
        name, digest = self._files[number]
        try:
            data = read_bytes(self._path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self._path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise _DamagedError(f"checkpoint {self._path} is damaged: {name} has changed")
        return data


def save(
    run_dir: Path, step: int, state: State, *, keep: int = 3, keep_also: Sequence[int] = (), rows: bool = True
) -> Path:
    """Saves a checkpoint, then removes all but the newest `keep` and those of the steps `keep_also`.

    state: a tree of dict (keys str or int), list, tuple (comes back as list), str, int, float, bool, None,
    tensors (come back on the CPU), arrays, and NumPy scalars (come back as Python's); TypeError for anything
    else, naming its place. `Rows` are written into segments, or come back as None if `rows` is false. A valid
    checkpoint of that step is left as it is. Returns the checkpoint's folder; SaveError if a file cannot be written.
    """
    from safetensors.torch import save as serialise

    if not 0 <= step < 10**12 or keep < 1:
        raise ValueError(f"step={step} must have at most 12 digits, and keep={keep} be at least 1")
    tree, tensors, tables = _split(state, rows)
    files = {_TENSORS: serialise(tensors), _TREE: _json({"step": step, "state": tree})}
    path = folder(run_dir, step)
    tmp = path.with_suffix(".tmp")
    try:
        if not _is_whole(path):
            make_dir(path.parent)
            _sweep(run_dir)
            _operation("mkdir", tmp)
            tmp.mkdir()
            segments = _write_segments(tmp, run_dir, tables) if tables else {}
            for name, data in files.items():
                _write(tmp / name, data)
            _write(tmp / _MANIFEST, _manifest({name: _entry(data) for name, data in files.items()} | segments))
            sync(tmp)
            if os.path.lexists(path):
                _set_aside(path)
            _rename(tmp, path)
        sync(path.parent)
        steps = list_steps(run_dir)
        for old in sorted(set(steps) - {*steps[-keep:], *keep_also, step}):
            # Renamed first, so that a crash half-way leaves nothing that looks like a damaged checkpoint.
            _rename(folder(run_dir, old), folder(run_dir, old).with_suffix(".tmp"))
        _sweep(run_dir)
    except OSError as error:
        with suppress(OSError):
            _sweep(run_dir)
        raise SaveError(error.errno, f"cannot save a checkpoint: {error.strerror}", str(path)) from error
    return path


def load(path: Path, *, rows: bool = True) -> State:
    """The state in the checkpoint folder `path`; CheckpointError unless it is exactly what was saved.

    `Rows` come as `SavedRows`; if `rows` is false they come as None, and their files are not looked at.
    """
    try:
        return _load(path, rows)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_newest(run_dir: Path, warn: Callable[[str], None], *, rows: bool = True) -> tuple[int, State]:
    """The step and state of the newest checkpoint that can be used, as by `load`; CheckpointError if there is none.

    Damaged ones on the way are renamed `*.corrupt`, and `warn` is told once of them and of the steps lost.
    """
    steps, problems = [], []
    try:
        steps = list_steps(run_dir)
    except OSError as error:
        problems.append(str(error))
    for step in reversed(steps):
        try:
            state = load(folder(run_dir, step), rows=rows)
        except CheckpointError as error:
            problems.append(str(error))
            if isinstance(error, _DamagedError):
                with suppress(OSError):
                    _set_aside(folder(run_dir, step))
            continue
        if problems:
            lost = f"the {steps[-1] - step:,} steps after it are lost and will be run again"
            warn("\n".join([*problems, f"Using the checkpoint of step {step:,} instead: {lost}."]))
        return step, state
    message = f"resume={run_dir}: this folder holds no checkpoint that can be used."
    remedies = ["Start a new run: python -m pgrl.train"]
    if any(_SEGMENT.search(problem) for problem in problems):
        remedies.append(
            f"or go on with an empty replay buffer: python -m pgrl.train resume={run_dir} checkpoint.replay=false"
        )
    raise CheckpointError("\n".join([message, *problems, *remedies]))


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would."""
    return run_dir / "checkpoints" / f"step_{step:012d}"


def list_steps(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, by their names, ascending."""
    names = map(_NAME.fullmatch, _list(run_dir / "checkpoints"))
    return sorted(int(name[1]) for name in names if name)


def clean(run_dir: Path) -> None:
    """Removes what interrupted operations left behind; only for the process that holds the run's lock."""
    _sweep(run_dir)
    for name in _list(run_dir):
        if name.startswith(".") and name.endswith(".tmp"):
            _remove(run_dir / name)


def _load(path: Path, rows: bool = True) -> State:
    from safetensors.torch import load as deserialise

    def damaged(why: object) -> _DamagedError:
        return _DamagedError(f"checkpoint {path} is damaged: {why}")

    def check(name: str, size: int | None) -> int:
        _operation("read", path / name)
        try:
            status = (path / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise damaged(f"{name} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise damaged(f"{name} is not a plain file")
        if status.st_size > _MANIFEST_LIMIT if size is None else status.st_size != size:
            raise damaged(f"{name} has {status.st_size:,} bytes")
        if status.st_size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise MemoryError(f"{name} has {status.st_size:,} bytes, more than this machine's memory")
        return status.st_size

    def read(name: str, size: int | None) -> bytes:
        size = check(name, size)
        with open(path / name, "rb") as file:
            return file.read(size)

    def entry(name: str, size: int) -> Entry:
        check(name, size)
        with open(path / name, "rb") as file:
            return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    if path.is_symlink():
        raise damaged("it is a symbolic link")
    manifest = read(_MANIFEST, None)
    try:
        content = json.loads(manifest)
        version = content["version"]
        told = content["files"]
        sizes = {name: told[name]["size"] for name in (_TENSORS, _TREE)}
        segments = {name: told[name] for name in sorted(told) if _SEGMENT.fullmatch(name)}
        segment_sizes = {name: one["size"] for name, one in segments.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"{_MANIFEST} cannot be understood ({error})") from None
    if version not in (_VERSION, _VERSION_WITH_ROWS):
        reads = f"formats {_VERSION} and {_VERSION_WITH_ROWS}"
        raise CheckpointError(f"checkpoint {path} has format {version!r:.20}; this pgrl reads {reads}")
    files = {name: read(name, size) for name, size in sizes.items()}
    if rows:
        segments = {name: entry(name, size) for name, size in segment_sizes.items()}
    if manifest != _manifest({name: _entry(data) for name, data in files.items()} | segments):
        wrong = next((name for name in segments if segments[name] != told[name]), "the files")
        raise damaged(f"{wrong} {'is' if wrong in segments else 'are'} not as {_MANIFEST} says (sha256)")
    try:
        content = json.loads(files[_TREE])
        tables = _Tables(path, {name: one["sha256"] for name, one in segments.items()}, rows)
        step, state = content["step"], _join(content["state"], deserialise(files[_TENSORS]), tables)
    except MemoryError:
        raise
    except Exception as error:  # whatever foreign contents may raise
        raise damaged(f"{type(error).__name__}: {error}") from error
    if (name := _NAME.fullmatch(path.name)) and int(name[1]) != step:
        raise damaged(f"it is the checkpoint of step {step}")
    return state


def _is_whole(path: Path) -> bool:
    try:
        _load(path)
    except CheckpointError:
        return False
    return True


def _sweep(run_dir: Path) -> None:
    """Removes checkpoints that are half made or half removed."""
    for name in _list(run_dir / "checkpoints"):
        if name.endswith(".tmp") and _NAME.fullmatch(name[:-4]):
            _remove(run_dir / "checkpoints" / name)


def _set_aside(path: Path) -> None:
    target, count = path.with_suffix(".corrupt"), 1
    while os.path.lexists(target):
        target, count = path.with_suffix(f".{count}.corrupt"), count + 1
    _rename(path, target)


def _entry(data: bytes) -> Entry:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(entries: dict[str, Entry]) -> bytes:
    version = _VERSION_WITH_ROWS if any(map(_SEGMENT.fullmatch, entries)) else _VERSION
    return _json({"version": version, "files": dict(sorted(entries.items(), key=lambda item: item[0][:4] == "rows"))})


def _write_segments(tmp: Path, run_dir: Path, tables: list[Rows]) -> dict[str, Entry]:
    """Writes the segments that no earlier checkpoint has and links the others; the manifest's entries, by name.

    What earlier checkpoints have is believed: their files are verified when they are loaded.
    """
    known: dict[tuple[str, str], tuple[Path, Entry]] = {}
    for step in list_steps(run_dir):
        for name, entry in _segments_of(folder(run_dir, step)).items():
            known[name, entry["sha256"]] = folder(run_dir, step) / name, entry
    entries: dict[str, Entry] = {}
    for table, rows in enumerate(tables):
        for number, final in rows.segments().items():
            name = f"rows_{table}_{number}.bin"
            one = known.get((name, rows.saved.get(number, "")))
            if one is not None and _link(one[0], tmp / name, one[1]["size"]):
                entries[name] = one[1]
                continue
            data = rows.read(number)
            _write(tmp / name, data)
            entries[name] = _entry(data)
            if final:
                rows.saved[number] = entries[name]["sha256"]
    return dict(sorted(entries.items()))


def _segments_of(path: Path) -> dict[str, Entry]:
    """The segments that the manifest of a checkpoint names; none where it cannot be understood."""
    try:
        _operation("read", path / _MANIFEST)
        with open(path / _MANIFEST, "rb") as file:
            files = json.loads(file.read(_MANIFEST_LIMIT))["files"]
        found = {name: entry for name, entry in files.items() if _SEGMENT.fullmatch(name)}
        return {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # then the segments are written from memory


def _json(tree: Any) -> bytes:
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")


def _split(state: State, with_rows: bool = True) -> tuple[Any, dict[str, torch.Tensor], list[Rows]]:
    """The state as a tree for JSON, the tensors and the rows it names; TypeError for what a checkpoint cannot hold."""
    import numpy as np
    import torch

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    tables: list[Rows] = []

    def put(tag: str, value: torch.Tensor, path: str) -> dict[str, str]:
        if value.layout is not torch.strided or value.is_meta or str(value.dtype)[6:] not in _DTYPES:
            kind = f"{value.dtype}, {value.layout}, {value.device}"
            raise TypeError(f"{path}: a checkpoint cannot hold a tensor of {kind}")
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses overlapping views of one storage
        storages.add(tensor.untyped_storage().data_ptr())
        while path in tensors:
            path += "'"
        tensors[path] = tensor
        return {tag: path}

    def visit(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value) if abs(value) < 2**63 else {"$int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, torch.Tensor):
            return put("$tensor", value, path)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            return put("$array", torch.from_numpy(array), path)
        if isinstance(value, np.generic) and not isinstance(value, np.longdouble):
            return visit(value.item(), path)
        if isinstance(value, list | tuple):
            return [visit(item, f"{path}/{index}") for index, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) and key[:1] != "$" for key in value):
            return {key: visit(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {"$items": [[key, visit(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, Rows):
            if not with_rows:
                return None
            tables.append(value)
            numbers = [[number, final] for number, final in value.segments().items()]
            return {"$rows": [len(tables) - 1, visit(value.info, path), numbers]}
        raise TypeError(f"{path}: a checkpoint cannot hold {type(value)}, or its keys")

    return visit(state, "state"), tensors, tables


class _Tables:
    """The segments of a checkpoint that no rows have taken yet."""

    def __init__(self, path: Path, digests: dict[str, str], wanted: bool) -> None:
        self.path, self.digests, self.wanted = path, digests, wanted

    def take(self, table: int, info: State, numbers: list[tuple[int, bool]]) -> SavedRows | None:
        """The rows of a table; any exception means a foreign tree."""
        final = {int(number): bool(last) for number, last in numbers}
        names = {number: f"rows_{table}_{number}.bin" for number in final}
        files = {number: (name, self.digests.pop(name)) for number, name in names.items()}
        return SavedRows(self.path, info, final, files) if self.wanted else None


def _join(tree: Any, tensors: dict[str, torch.Tensor], tables: _Tables) -> State:
    """The inverse of `_split`, which takes each tensor and segment once; any exception means a foreign tree."""

    def visit(node: Any) -> Any:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if not tag.startswith("$"):
            return {key: visit(item) for key, item in node.items()}
        (value,) = node.values()
        match tag:
            case "$tensor":
                return tensors.pop(value)
            case "$array":
                return tensors.pop(value).numpy()
            case "$int":
                return int(value, 16)
            case "$float":
                return float(value)
            case "$items":
                return {key: visit(item) for key, item in value}
            case "$rows":
                table, info, numbers = value
                return tables.take(table, visit(info), numbers)
        raise ValueError(f"unknown tag {tag!r}")

    state = visit(tree)
    if not isinstance(state, dict) or tensors or tables.digests:
        raise ValueError("the tree does not fit the tensors and rows")
    return state


# The run's folder and its other files.


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
            _operation("lock", path)
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
        _operation("mkdir", path)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def read_bytes(path: Path) -> bytes:
    """A file's contents."""
    _operation("read", path)
    return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file: a reader, or a crash, sees all of the old or all of the new."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        _write(tmp, data)
        _rename(tmp, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            _remove(tmp)
        raise


def append(path: Path, data: str | bytes) -> None:
    """Adds to a file's end with one write, all of it or (OSError) nothing; not synced."""
    data = data.encode() if isinstance(data, str) else data
    _operation("append", path)
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
    _operation("truncate", path)
    os.truncate(path, size)
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's contents, or a folder's entries, survive a power cut."""
    _operation("fsync", path)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _operation(name: str, path: Path) -> None:
    """Called before each file operation, so that tests can count them, and fail or die at any one."""


def _list(path: Path) -> list[str]:
    _operation("list", path)
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _write(path: Path, data: bytes) -> None:
    _operation("open", path)
    with open(path, "wb") as file:
        _operation("write", path)
        file.write(data)
        file.flush()
        _operation("fsync", path)
        os.fsync(file.fileno())


def _link(source: Path, target: Path, size: int) -> bool:
    """Gives a file a second name; False where the file system cannot, or where there is no such file of that size."""
    _operation("link", source)
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


def _rename(source: Path, target: Path) -> None:
    _operation("rename", source)
    os.rename(source, target)


def _remove(path: Path) -> None:
    """Removes a file or a folder of files; links are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        for name in _list(path):
            _operation("unlink", path / name)
            os.unlink(path / name)
        _operation("rmdir", path)
        os.rmdir(path)
    elif os.path.lexists(path):
        _operation("unlink", path)
        os.unlink(path)
