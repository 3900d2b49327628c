"""Checkpoints that survive a crash at any moment, and every other file operation of a run.

A checkpoint is the folder `checkpoints/step_<12 digits>/` of three files: `state.safetensors` (the tensors),
`state.json` (the tree they hang in) and `MANIFEST.json` (format version, sizes, sha256). It is built under a
temporary name, each file synced, and then renamed: a folder of the right name is whole, or was damaged later,
which the checksums show. Nothing in it is code, a class name or a path: loading one runs nothing.
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

if TYPE_CHECKING:
    import torch

State = dict[str, Any]

_VERSION = 1
_TENSORS, _TREE, _MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"
_MANIFEST_LIMIT = 4096  # bytes; about 300 are used
_NAME = re.compile(r"step_([0-9]{12})")
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_DTYPES = {"bool", "float16", "bfloat16", "float32", "float64", "complex64", *_INTEGERS}


class SaveError(OSError):
    """A checkpoint could not be written; the older ones are as they were, and saving may be tried again."""


class _DamagedError(CheckpointError):
    """A checkpoint whose contents are not what was saved."""


def save(run_dir: Path, step: int, state: State, *, keep: int = 3, keep_also: Sequence[int] = ()) -> Path:
    """Saves a checkpoint, then removes all but the newest `keep` and those of the steps `keep_also`.

    state: a tree of dict (keys str or int), list, tuple (comes back as list), str, int, float, bool, None,
    tensors (come back on the CPU), arrays, and NumPy scalars (come back as Python's); TypeError for anything
    else, naming its place. A valid checkpoint of that step is left as it is. Returns the checkpoint's folder;
    SaveError if a file cannot be written.
    """
    from safetensors.torch import save as serialise

    if not 0 <= step < 10**12 or keep < 1:
        raise ValueError(f"step={step} must have at most 12 digits, and keep={keep} be at least 1")
    tree, tensors = _split(state)
    files = {_TENSORS: serialise(tensors), _TREE: _json({"step": step, "state": tree})}
    path = folder(run_dir, step)
    tmp = path.with_suffix(".tmp")
    try:
        if not _is_whole(path):
            make_dir(path.parent)
            _sweep(run_dir)
            _operation("mkdir", tmp)
            tmp.mkdir()
            for name, data in {**files, _MANIFEST: _manifest(files)}.items():
                _write(tmp / name, data)
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


def load(path: Path) -> State:
    """The state in the checkpoint folder `path`; CheckpointError unless it is exactly what was saved."""
    try:
        return _load(path)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_newest(run_dir: Path, warn: Callable[[str], None]) -> tuple[int, State]:
    """The step and state of the newest checkpoint that can be used; CheckpointError if there is none.

    Damaged ones on the way are renamed `*.corrupt`, and `warn` is told once of them and of the steps lost.
    """
    steps, problems = [], []
    try:
        steps = list_steps(run_dir)
    except OSError as error:
        problems.append(str(error))
    for step in reversed(steps):
        try:
            state = load(folder(run_dir, step))
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
    raise CheckpointError("\n".join([message, *problems, "Start a new run: python -m pgrl.train"]))


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


def _load(path: Path) -> State:
    from safetensors.torch import load as deserialise

    def damaged(why: object) -> _DamagedError:
        return _DamagedError(f"checkpoint {path} is damaged: {why}")

    def read(name: str, size: int | None) -> bytes:
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
        with open(path / name, "rb") as file:
            return file.read(status.st_size)

    if path.is_symlink():
        raise damaged("it is a symbolic link")
    manifest = read(_MANIFEST, None)
    try:
        content = json.loads(manifest)
        version = content["version"]
        sizes = {name: content["files"][name]["size"] for name in (_TENSORS, _TREE)}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(f"{_MANIFEST} cannot be understood ({error})") from None
    if version != _VERSION:
        raise CheckpointError(f"checkpoint {path} has format {version!r:.20}; this pgrl reads format {_VERSION}")
    files = {name: read(name, size) for name, size in sizes.items()}
    if manifest != _manifest(files):
        raise damaged(f"the files are not those of {_MANIFEST} (sha256)")
    try:
        content = json.loads(files[_TREE])
        step, state = content["step"], _join(content["state"], deserialise(files[_TENSORS]))
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


def _manifest(files: dict[str, bytes]) -> bytes:
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return _json({"version": _VERSION, "files": entries})


def _json(tree: Any) -> bytes:
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")


def _split(state: State) -> tuple[Any, dict[str, torch.Tensor]]:
    """The state as a tree for JSON, and the tensors it names; TypeError for what a checkpoint cannot hold."""
    import numpy as np
    import torch

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

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
        raise TypeError(f"{path}: a checkpoint cannot hold {type(value)}, or its keys")

    return visit(state, "state"), tensors


def _join(tree: Any, tensors: dict[str, torch.Tensor]) -> State:
    """The inverse of `_split`, which takes each tensor once; any exception means a foreign tree."""

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
        raise ValueError(f"unknown tag {tag!r}")

    state = visit(tree)
    if not isinstance(state, dict) or tensors:
        raise ValueError("the tree does not fit the tensors")
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
    """Replaces a file's text: a reader, or a crash, sees all of the old or all of the new."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        _write(tmp, text.encode())
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
