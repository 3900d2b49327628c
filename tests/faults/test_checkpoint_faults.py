"""Crashes, power cuts, failing disks, damage and malice, injected into checkpoint.py and files.py."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgrl import checkpoint, files
from pgrl.errors import CheckpointError

FILES = ("state.safetensors", "state.json", "MANIFEST.json")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: thousands of small files are slow on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3,), float(step)), "counts": [step, None]}


def assert_state(step: int, state: dict[str, Any]) -> None:
    assert state["step"] == step and state["counts"] == [step, None]
    assert torch.equal(state["weights"], torch.full((3,), float(step)))


def make_run(run_dir: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(run_dir, step, state_of(step), keep=9)
    return run_dir


def damage(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:012d}" / "state.json").write_bytes(b"{}")


def resume_and_save(run_dir: Path) -> None:
    """What one process does between two checkpoints: clean, resume, save, rotate, and tell its status."""
    checkpoint.clean(run_dir)
    checkpoint.load_newest(run_dir, lambda message: None)
    checkpoint.save(run_dir, 40, state_of(40), keep=1, keep_also=[10])
    files.write_text(run_dir / "status.json", '{"step": 40}')


def count_operations(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> int:
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "operation", lambda name, path: seen.append(name))
        action()
    return len(seen)


def at(k: int, strike: Callable[[], object]) -> Callable[[str, Path], None]:
    """A hook that strikes at operation k, counted from 0."""
    count = iter(range(10**9))

    def hook(name: str, path: Path) -> None:
        if next(count) == k:
            strike()

    return hook


def dies(action: Callable[[], object]) -> bool:
    """Whether a child process that runs this dies at the injected point."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "newest damaged"])
def test_death_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    template = make_run(tmp_path / "template", 10, 20, 30)
    files.write_text(template / "status.json", '{"step": 30}')
    if damaged:
        damage(template, 30)
    newest = 20 if damaged else 30
    counted = Path(shutil.copytree(template, tmp_path / "counted"))
    total = count_operations(monkeypatch, lambda: resume_and_save(counted))
    assert total > 30
    for k in range(total + 1):
        run_dir = Path(shutil.copytree(template, tmp_path / str(k)))
        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", at(k, lambda: os._exit(9)))
            assert dies(lambda run_dir=run_dir: resume_and_save(run_dir)) is (k < total)
        warnings: list[str] = []
        step, state = checkpoint.load_newest(run_dir, warnings.append)
        assert step in (newest, 40)
        assert_state(step, state)
        assert damaged or not warnings  # nothing that a death leaves looks like damage
        assert json.loads((run_dir / "status.json").read_text())["step"] in (30, 40)
        resume_and_save(run_dir)
        assert checkpoint.list_steps(run_dir) == [10, 40]
        assert_state(40, checkpoint.load_newest(run_dir, pytest.fail)[1])
        assert not list(run_dir.rglob("*.tmp"))


def test_death_during_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counted").mkdir()
    total = count_operations(monkeypatch, lambda: make_run(tmp_path / "counted", 1))
    for k in range(total):
        run_dir = tmp_path / str(k)
        run_dir.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", at(k, lambda: os._exit(9)))
            assert dies(lambda run_dir=run_dir: make_run(run_dir, 1))
        if checkpoint.list_steps(run_dir):
            assert_state(1, checkpoint.load_newest(run_dir, pytest.fail)[1])
        else:
            with pytest.raises(CheckpointError):
                checkpoint.load_newest(run_dir, pytest.fail)
        make_run(run_dir, 1)
        assert_state(1, checkpoint.load_newest(run_dir, pytest.fail)[1])


class PowerCutError(BaseException):
    pass


@pytest.mark.parametrize("renamed", [False, True], ids=["renames lost", "renames kept"])
def test_power_cut_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    """Whatever was not synced is lost: files are torn, and renames undone if their folder was not synced after."""
    real_rename, random_ = os.rename, random.Random(0)
    total = count_operations(monkeypatch, lambda: resume_and_save(make_run(tmp_path / "counted", 10, 20, 30)))
    for k in range(total):
        run_dir = make_run(tmp_path / str(k), 10, 20, 30)
        synced = {path.stat().st_ino for path in run_dir.rglob("*")}
        renames: list[tuple[Path, Path]] = []

        def rename(source: Path, target: Path, renames: list[tuple[Path, Path]] = renames) -> None:
            real_rename(source, target)
            renames.append((source, target))

        def fsync(handle: int, synced: set[int] = synced, renames: list[tuple[Path, Path]] = renames) -> None:
            number = os.fstat(handle).st_ino
            synced.add(number)
            renames[:] = [pair for pair in renames if pair[1].parent.stat().st_ino != number]

        def strike() -> None:
            raise PowerCutError

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            patch.setattr(os, "fsync", fsync)
            patch.setattr(files, "operation", at(k, strike))
            try:
                resume_and_save(run_dir)
            except PowerCutError:
                pass
        for source, target in reversed(renames):
            if not renamed and target.exists():
                real_rename(target, source)
        for path in run_dir.rglob("*"):
            if path.is_file() and path.stat().st_ino not in synced:
                os.truncate(path, random_.randrange(path.stat().st_size + 1))
        step, state = checkpoint.load_newest(run_dir, pytest.fail)
        assert step in (30, 40)
        assert_state(step, state)
        resume_and_save(run_dir)
        assert_state(40, checkpoint.load_newest(run_dir, pytest.fail)[1])
        shutil.rmtree(run_dir)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_failing_disk_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    template = make_run(tmp_path / "template", 10, 20, 30)

    def save(run_dir: Path) -> Path:
        return checkpoint.save(run_dir, 40, state_of(40), keep=2)

    counted = Path(shutil.copytree(template, tmp_path / "counted"))
    total = count_operations(monkeypatch, lambda: save(counted))
    assert total > 20
    for k in range(total):
        run_dir = Path(shutil.copytree(template, tmp_path / str(k)))
        count = iter(range(10**9))

        def fail(name: str, path: Path, k: int = k, count: Iterator[int] = count) -> None:
            number = next(count)
            if number == k or lasting and number > k:
                raise OSError(code, os.strerror(code), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", fail)
            with pytest.raises(checkpoint.SaveError, match=os.strerror(code)) as caught:
                save(run_dir)
        assert caught.value.errno == code
        assert lasting or not list(run_dir.rglob("*.tmp"))
        for step in checkpoint.list_steps(run_dir):
            assert_state(step, checkpoint.load(run_dir / "checkpoints" / f"step_{step:012d}"))
        assert {30} <= set(checkpoint.list_steps(run_dir)) <= {10, 20, 30, 40}
        assert_state(40, checkpoint.load(save(run_dir)))  # tried again, once the disk works
        assert checkpoint.list_steps(run_dir) == [30, 40]
        assert not list(run_dir.rglob("*.tmp"))


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end: the write itself fails, half-way."""
    import resource
    import signal

    make_run(tmp_path, 1)

    def overfill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            checkpoint.save(tmp_path, 2, {"weights": torch.zeros(10_000)})
        except checkpoint.SaveError:
            files.append(tmp_path / "log", "a" * 4000 + "\n")
            try:
                files.append(tmp_path / "log", "b" * 4000 + "\n")
            except OSError:
                os._exit(9)

    assert dies(overfill)
    assert (tmp_path / "log").read_text() == "a" * 4000 + "\n"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000000000001"]
    assert_state(1, checkpoint.load_newest(tmp_path, pytest.fail)[1])


def corrupt(random_: random.Random, data: bytes) -> bytes | None:
    """The data, changed in one random way; None for a deleted file."""
    place = random_.randrange(len(data))
    match random_.choice(["truncate", "flip", "byte", "swap", "zero", "empty", "delete", "longer", "insert", "drop"]):
        case "truncate":
            return data[:place]
        case "flip":
            return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]
        case "byte":
            return data[:place] + bytes([random_.randrange(256)]) + data[place + 1 :]
        case "swap":
            return data[place:] + data[:place]
        case "zero":
            return data[:place] + bytes(len(data) - place)
        case "empty":
            return b""
        case "longer":
            return data + random_.randbytes(1 + random_.randrange(9))
        case "insert":
            return data[:place] + random_.choice([b" ", b"\n", b"0", b"\x00"]) + data[place:]
        case "drop":
            return data[:place] + data[place + 1 :]
    return None


def test_a_thousand_corruptions_none_loaded(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, 1, 2)
    folder = run_dir / "checkpoints" / "step_000000000002"
    sound = {name: (folder / name).read_bytes() for name in FILES}
    random_ = random.Random(1)
    done = 0
    while done < 1000:
        name = random_.choice(FILES)
        data = corrupt(random_, sound[name])
        if data == sound[name]:
            continue
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)
        if done % 20 == 0:
            warnings: list[str] = []
            step, state = checkpoint.load_newest(run_dir, warnings.append)
            assert step == 1 and len(warnings) == 1 and "1 steps after it are lost" in warnings[0]
            assert_state(1, state)
            if not folder.exists():
                next(folder.parent.glob("*.corrupt")).rename(folder)
        (folder / name).write_bytes(sound[name])
        done += 1
    assert_state(2, checkpoint.load(folder))


def tensors_file(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def forge(folder: Path, tensors: bytes, tree: Any, manifest: bytes | None = None) -> Path:
    """A checkpoint with any contents, whose manifest has the right sizes and checksums."""
    folder.mkdir(parents=True)
    text = tree if isinstance(tree, bytes) else json.dumps(tree, separators=(",", ":")).encode()
    files = {"state.safetensors": tensors, "state.json": text}
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    honest = json.dumps({"version": 1, "files": entries}, separators=(",", ":")).encode()
    for name, data in {**files, "MANIFEST.json": honest if manifest is None else manifest}.items():
        (folder / name).write_bytes(data)
    return folder


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GOOD = tensors_file({"state/w": ONE}, bytes(4))
EMPTY = tensors_file({})


def tree(state: Any) -> dict[str, Any]:
    return {"step": 7, "state": state}


def hostile_contents() -> dict[str, tuple[bytes, Any]]:
    """Contents that no save wrote, by name: the bytes of state.safetensors, and the tree of state.json."""
    reference, deep = {"w": {"$tensor": "state/w"}}, 100_000

    def header(**fields: Any) -> bytes:
        return tensors_file({"state/w": {**ONE, **fields}}, bytes(4))

    return {
        "pickle for tensors": (pickle.dumps(Bomb()), tree(reference)),
        "pickle for the tree": (EMPTY, pickle.dumps(Bomb())),
        "header of 2**63 bytes": (tensors_file({}, size=2**63), tree({})),
        "header of 2**64-1 bytes": (tensors_file({}, size=2**64 - 1), tree({})),
        "header of 1 TB": (tensors_file({}, size=2**40), tree({})),
        "header of 99 MB that is not there": (tensors_file({}, size=99 * 2**20), tree({})),
        "no header": (b"", tree({})),
        "header that is a list": (tensors_file([]), tree({})),
        "header that is not text": (tensors_file(b"\xff\xfe{}"), tree({})),
        "offsets past the end": (header(data_offsets=[0, 2**40], shape=[2**38]), tree(reference)),
        "offsets backwards": (header(data_offsets=[4, 0]), tree(reference)),
        "shape that overflows": (header(shape=[2**62, 8]), tree(reference)),
        "shape that does not fit": (header(shape=[3]), tree(reference)),
        "negative shape": (header(shape=[-1]), tree(reference)),
        "unknown dtype": (header(dtype="PyObject"), tree(reference)),
        "data that no tensor has": (GOOD + b"more", tree(reference)),
        "overlapping tensors": (tensors_file({"state/w": ONE, "b": ONE}, bytes(4)), tree(reference)),
        "tensor that is not there": (EMPTY, tree(reference)),
        "tensor that nobody names": (GOOD, tree({})),
        "tensor named twice": (GOOD, tree([reference, reference])),
        "tag that names code": (EMPTY, tree({"x": {"$eval": "__import__('os').mkdir('exploded')"}})),
        "tag that names a class": (EMPTY, tree({"x": {"$class": "os.system"}})),
        "tag with company": (EMPTY, tree({"x": {"$int": "1", "y": 2}})),
        "float that is an expression": (EMPTY, tree({"x": {"$float": "1+1"}})),
        "int that is a list": (EMPTY, tree({"x": {"$int": [1]}})),
        "keys that are dictionaries": (EMPTY, tree({"x": {"$items": [[{}, 1]]}})),
        "state that is a list": (EMPTY, tree([])),
        "no state": (EMPTY, {"step": 7}),
        "another step": (EMPTY, {"step": 8, "state": {}}),
        "nested for ever": (EMPTY, b'{"step":7,"state":' + b"[" * deep + b"]" * deep + b"}"),
        "an integer of a million digits": (EMPTY, b'{"step":7,"state":{"x":' + b"9" * 10**6 + b"}}"),
        "not JSON": (EMPTY, b"\x80\x04."),
    }


def hostile_manifests() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Manifests that no save wrote, by name, each made of the honest one."""
    return {
        "a later version": lambda good: {**good, "version": 2},
        "version in words": lambda good: {**good, "version": "one" * 1000},
        "version 1.0": lambda good: {**good, "version": 1.0},
        "version true": lambda good: {**good, "version": True},
        "no version": lambda good: {"files": good["files"]},
        "a list": lambda good: [good],
        "another file": lambda good: {**good, "files": {**good["files"], "../x": {"size": 1, "sha256": ""}}},
        "an absolute path": lambda good: {**good, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}},
        "another field": lambda good: {**good, "hook": "os.system"},
        "huge size": lambda good: {
            **good,
            "files": {name: {**entry, "size": 2**60} for name, entry in good["files"].items()},
        },
        "size as text": lambda good: {
            **good,
            "files": {name: {**entry, "size": str(entry["size"])} for name, entry in good["files"].items()},
        },
        "no checksums": lambda good: {
            **good,
            "files": {name: {"size": entry["size"]} for name, entry in good["files"].items()},
        },
        "checksums in capitals": lambda good: json.loads(
            json.dumps(good).replace(digest := good["files"]["state.json"]["sha256"], digest.upper())
        ),
    }


def make_hostile(parent: Path) -> Iterator[tuple[str, Path]]:
    for name, (tensors, content) in hostile_contents().items():
        yield name, forge(parent / name / "step_000000000007", tensors, content)
    for name, change in hostile_manifests().items():
        folder = forge(parent / f"manifest with {name}" / "step_000000000007", EMPTY, tree({}))
        good = json.loads((folder / "MANIFEST.json").read_bytes())
        (folder / "MANIFEST.json").write_text(json.dumps(change(good), separators=(",", ":")))
        yield f"manifest with {name}", folder
    for name, text in {
        "deep manifest": b"[" * 2000,
        "huge manifest": b" " * 10**6,
        "manifest that is a pickle": pickle.dumps(Bomb()),
    }.items():
        yield name, forge(parent / name / "step_000000000007", EMPTY, tree({}), text)
    for number, file in enumerate((*FILES, "")):
        folder = forge(parent / f"link {number}" / "step_000000000007", EMPTY, tree({}))
        moved = (folder / file).rename(folder.parent / "elsewhere")
        (folder / file).symlink_to(moved, target_is_directory=not file)
        yield f"symbolic link for {file or 'the folder'}", folder
    folder = forge(parent / "link of the right size" / "step_000000000007", EMPTY, tree({"text": "x" * 501}))
    (folder / "state.json").rename(folder / "elsewhere")
    (folder / "state.json").symlink_to(("./" * 300)[: (folder / "elsewhere").stat().st_size - 9] + "elsewhere")
    yield "symbolic link of the right size", folder
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():
        folder = forge(parent / name / "step_000000000007", EMPTY, tree({}))
        (folder / "state.json").unlink()
        make(folder / "state.json")
        yield f"{name} for state.json", folder
    folder = forge(parent / "sparse" / "step_000000000007", EMPTY, tree({}))
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    manifest["files"]["state.safetensors"]["size"] = 2**43
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
    os.truncate(folder / "state.safetensors", 2**43)
    yield "8 TB of nothing", folder


def test_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    assert checkpoint.load(forge(tmp_path / "honest" / "step_000000000007", EMPTY, tree({}))) == {}
    accepted, refused = [], 0
    for name, folder in make_hostile(tmp_path):
        try:
            checkpoint.load(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            accepted.append(name)
    assert not accepted and refused >= 50


def test_what_has_the_wrong_size_is_not_read(tmp_path: Path) -> None:
    for name in FILES:
        folder = checkpoint.folder(make_run(tmp_path / name, 1), 1)
        os.truncate(folder / name, 2**40)
        with pytest.raises(CheckpointError, match=f"{name} has 1,099,511,627,776 bytes"):
            checkpoint.load(folder)


def test_loading_runs_nothing_and_opens_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child, because an audit hook cannot be taken off again."""
    run_dir = make_run(tmp_path, 1, 2)
    state = {"array": np.ones(2), "tensor": torch.ones(2), "big": 2**100, "nan": float("nan"), "keys": {0: 1}}
    sound = checkpoint.save(run_dir, 3, state)
    (sound / "state.pkl").write_bytes(pickle.dumps(Bomb()))
    hostile = list(make_hostile(tmp_path / "hostile"))
    monkeypatch.chdir(tmp_path)
    events: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            events.append((event, Path(os.fspath(arguments[0])).name))
        elif event.split(".")[0] in ("pickle", "exec", "compile", "import", "marshal", "ctypes", "subprocess"):
            events.append((event, ""))
        elif event.split(".")[0] in ("socket", "os", "shutil") and event not in ("os.listdir", "os.rename"):
            events.append((event, ""))

    def watch() -> None:
        checkpoint.load(sound)  # whatever it imports is imported now
        for module in (pickle, sys.modules["_pickle"]):
            for name in ("load", "loads", "Unpickler"):
                setattr(module, name, None)
        torch.load = None  # type: ignore[assignment]
        sys.addaudithook(hook)
        checkpoint.load(sound)
        opened = [name for event, name in events if event == "open"]
        assert sorted(opened) == sorted(FILES), opened
        for _, folder in hostile:
            try:
                checkpoint.load(folder)
            except CheckpointError:
                pass
        assert {event for event, _ in events} == {"open"}, events
        assert {name for _, name in events} == set(FILES), events
        os._exit(9)

    assert dies(watch)
    assert not (tmp_path / "exploded").exists()
