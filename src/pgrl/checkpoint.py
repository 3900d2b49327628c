"""Checkpoints that survive a crash at any moment: saved, loaded, verified and rotated.

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

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgrl import files
from pgrl.errors import CheckpointError
from pgrl.rows import Rows
from pgrl.state_tree import State, join, split

Entry = dict[str, Any]  # of the manifest: the size and sha256 of a file

_VERSION, _VERSION_WITH_ROWS = 1, 2
_TENSORS, _TREE, _MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"
_MANIFEST_LIMIT = 65536  # bytes; about 300 are used, and 120 for each segment of rows
_NAME = re.compile(r"step_([0-9]{12})")
_SEGMENT = re.compile(r"rows_[0-9]{1,3}_[0-9]{1,15}\.bin")


class SaveError(OSError):
    """A checkpoint could not be written; the older ones are as they were, and saving may be tried again."""


class _DamagedError(CheckpointError):
    """A checkpoint whose contents are not what was saved."""


class SavedRows:
    """Rows in the files of a checkpoint, read a segment at a time; CheckpointError where a file has changed."""

    def __init__(self, path: Path, info: State, final: dict[int, bool], names: dict[int, tuple[str, str]]) -> None:
        self._path, self._final, self._names = path, final, names  # names: those of the files, and their checksums
        self.info, self.saved = info, {number: names[number][1] for number in final if final[number]}

    def segments(self) -> dict[int, bool]:
        """The numbers of the segments, and whether each is final."""
        return self._final

    def read(self, number: int) -> bytes:
        """A segment, verified once more."""
        name, digest = self._names[number]
        try:
            data = files.read_bytes(self._path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self._path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise _DamagedError(f"checkpoint {self._path} is damaged: {name} has changed")
        return data


class _Tables:
    """The segments of a checkpoint that no rows have taken yet."""

    def __init__(self, path: Path, digests: dict[str, str], wanted: bool) -> None:
        self.path, self.digests, self.wanted = path, digests, wanted

    def take(self, table: int, info: State, numbers: list[tuple[int, bool]]) -> SavedRows | None:
        """The rows of a table; any exception means a foreign tree."""
        final = {int(number): bool(last) for number, last in numbers}
        names = {number: f"rows_{table}_{number}.bin" for number in final}
        found = {number: (name, self.digests.pop(name)) for number, name in names.items()}
        return SavedRows(self.path, info, final, found) if self.wanted else None


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
    tree, tensors, tables = split(state, rows)
    contents = {_TENSORS: serialise(tensors), _TREE: _json({"step": step, "state": tree})}
    path = folder(run_dir, step)
    tmp = path.with_suffix(".tmp")
    try:
        if not _is_whole(path):
            files.make_dir(path.parent)
            _sweep(run_dir)
            files.operation("mkdir", tmp)
            tmp.mkdir()
            segments = _write_segments(tmp, run_dir, tables) if tables else {}
            for name, data in contents.items():
                files.write_synced(tmp / name, data)
            files.write_synced(
                tmp / _MANIFEST, _manifest({name: _entry(data) for name, data in contents.items()} | segments)
            )
            files.sync(tmp)
            if os.path.lexists(path):
                _set_aside(path)
            files.rename(tmp, path)
        files.sync(path.parent)
        steps = list_steps(run_dir)
        for old in sorted(set(steps) - {*steps[-keep:], *keep_also, step}):
            # Renamed first, so that a crash half-way leaves nothing that looks like a damaged checkpoint.
            files.rename(folder(run_dir, old), folder(run_dir, old).with_suffix(".tmp"))
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
    names = map(_NAME.fullmatch, files.list_names(run_dir / "checkpoints"))
    return sorted(int(name[1]) for name in names if name)


def clean(run_dir: Path) -> None:
    """Removes what interrupted operations left behind; only for the process that holds the run's lock."""
    _sweep(run_dir)
    for name in files.list_names(run_dir):
        if name.startswith(".") and name.endswith(".tmp"):
            files.remove(run_dir / name)


def _load(path: Path, rows: bool = True) -> State:
    from safetensors.torch import load as deserialise

    def damaged(why: object) -> _DamagedError:
        return _DamagedError(f"checkpoint {path} is damaged: {why}")

    def check(name: str, size: int | None) -> int:
        files.operation("read", path / name)
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
    contents = {name: read(name, size) for name, size in sizes.items()}
    if rows:
        segments = {name: entry(name, size) for name, size in segment_sizes.items()}
    if manifest != _manifest({name: _entry(data) for name, data in contents.items()} | segments):
        wrong = next((name for name in segments if segments[name] != told[name]), "the files")
        raise damaged(f"{wrong} {'is' if wrong in segments else 'are'} not as {_MANIFEST} says (sha256)")
    try:
        content = json.loads(contents[_TREE])
        tables = _Tables(path, {name: one["sha256"] for name, one in segments.items()}, rows)
        step, state = content["step"], join(content["state"], deserialise(contents[_TENSORS]), tables.take)
        if tables.digests:
            raise ValueError("the tree does not fit the tensors and rows")
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
    for name in files.list_names(run_dir / "checkpoints"):
        if name.endswith(".tmp") and _NAME.fullmatch(name[:-4]):
            files.remove(run_dir / "checkpoints" / name)


def _set_aside(path: Path) -> None:
    target, count = path.with_suffix(".corrupt"), 1
    while os.path.lexists(target):
        target, count = path.with_suffix(f".{count}.corrupt"), count + 1
    files.rename(path, target)


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
            if one is not None and files.link(one[0], tmp / name, one[1]["size"]):
                entries[name] = one[1]
                continue
            data = rows.read(number)
            files.write_synced(tmp / name, data)
            entries[name] = _entry(data)
            if final:
                rows.saved[number] = entries[name]["sha256"]
    return dict(sorted(entries.items()))


def _segments_of(path: Path) -> dict[str, Entry]:
    """The segments that the manifest of a checkpoint names; none where it cannot be understood."""
    try:
        files.operation("read", path / _MANIFEST)
        with open(path / _MANIFEST, "rb") as file:
            entries = json.loads(file.read(_MANIFEST_LIMIT))["files"]
        found = {name: entry for name, entry in entries.items() if _SEGMENT.fullmatch(name)}
        return {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # then the segments are written from memory


def _json(tree: Any) -> bytes:
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")
