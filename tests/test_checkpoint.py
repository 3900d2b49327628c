import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgrl import checkpoint, files
from pgrl.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and every bit."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)] if alike else []
        return alike and torch.equal(*bits)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return isinstance(b, float) and repr(a) == repr(b)
    return type(a) is type(b) and a == b


def warn_not(message: str) -> None:
    raise AssertionError(message)


STATES: dict[str, Any] = {
    "empty": {},
    "scalars": {"a": 1, "b": True, "c": None, "d": "text\n\u2028\x00 ü", "e": [], "f": {}, "g": [[1], [[]]]},
    "ints": {"a": 2**63 - 1, "b": 2**63, "c": -(2**64), "d": 3**400, "e": 10**5000, "f": -(2**63)},
    "floats": {"a": 0.1, "b": -0.0, "c": 5e-324, "d": float("inf"), "e": -float("inf"), "f": float("nan"), "g": 1e308},
    "keys": {"": 1, "$tensor": 2, "$": {"$items": [3]}, "a/b": {"c": 4}, "a": {"b/c": 5}, "'": 6},
    "int keys": {"state": {0: {"step": torch.ones(())}, 1: {"step": 2}}, "mixed": {0: "a", "0": "b"}},
    "same paths": {"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1), "a/b'": torch.ones(2)},
    "dtypes": {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
            *(torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
        )
    },
    "shapes": {"0-d": torch.tensor(3.5), "empty": torch.zeros(0), "none": torch.zeros(3, 0, 2, dtype=torch.int64)},
    "strided": {"t": torch.arange(6.0).reshape(2, 3).T, "step": torch.arange(9)[::2], "wide": torch.ones(1).expand(4)},
    "odd floats": {"t": torch.tensor([0x7FC00123, -0x7FFFFFFF - 1, 1], dtype=torch.int32).view(torch.float32)},
    "arrays": {
        "f8": np.linspace(0, 1, 5),
        "u4": np.array([1, 2**32 - 1], np.uint32),
        "0-d": np.array(2.0),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float32),
        "reversed": np.arange(5)[::-1],
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    },
    "parameter": {"p": torch.nn.Parameter(torch.randn(3))},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_state_comes_back_bit_for_bit(tmp_path: Path, state: dict[str, Any]) -> None:
    path = checkpoint.save(tmp_path, 5, state)
    assert path == tmp_path / "checkpoints" / "step_000000000005"
    assert sorted(file.name for file in path.iterdir()) == ["MANIFEST.json", "state.json", "state.safetensors"]
    assert same(state, checkpoint.load(path))
    assert same([5, state], list(checkpoint.load_newest(tmp_path, warn_not)))


def test_what_comes_back_as_something_simpler(tmp_path: Path) -> None:
    state = {
        "tuple": (1, (2,)),
        "float64": np.float64("nan"),
        "float32": np.float32(0.1),
        "int": np.int64(2**40),
        "bool": np.bool_(True),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "big-endian": np.array([1, 2], ">i4"),
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, state))
    assert loaded["tuple"] == [1, [2]] and repr(loaded["float64"]) == "nan"
    assert type(loaded["float32"]) is float and loaded["float32"] == float(np.float32(0.1))
    assert type(loaded["int"]) is int and loaded["int"] == 2**40 and loaded["bool"] is True
    assert torch.equal(loaded["conjugate"], torch.tensor([1 - 2j]))
    assert loaded["big-endian"].dtype == np.int32 and loaded["big-endian"].tolist() == [1, 2]


def test_views_of_one_storage_come_back_apart(tmp_path: Path) -> None:
    flat = torch.randn(10)
    state = {"flat": flat, "head": flat[:4], "tail": flat[4:], "again": flat, "matrix": flat.view(2, 5)}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, state))
    assert same(state, loaded)
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == len(state)
    loaded["head"].add_(1)
    loaded["matrix"].numpy()[:] = 0
    assert torch.equal(loaded["flat"], flat)


def test_saving_leaves_the_state_alone_and_keeps_no_part_of_it(tmp_path: Path) -> None:
    weights, array = torch.ones(3, requires_grad=True), np.ones(3)
    array.flags.writeable = False
    state = {"w": weights, "nested": {"list": [1, array]}}
    path = checkpoint.save(tmp_path, 1, state)
    assert state["w"] is weights and weights.requires_grad and list(state) == ["w", "nested"]
    with torch.no_grad():
        weights.add_(1)
    assert torch.equal(checkpoint.load(path)["w"], torch.ones(3))
    checkpoint.load(path)["w"].add_(1)
    checkpoint.load(path)["nested"]["list"][1][0] = 5
    assert torch.equal(checkpoint.load(path)["w"], torch.ones(3))


def test_generators_continue_exactly(tmp_path: Path) -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    legacy, python = np.random.RandomState(3), random.Random(4)
    state = {
        "torch": generator.get_state(),
        "pcg64": rng.bit_generator.state,
        "mt19937": legacy.get_state(legacy=False),
        "python": python.getstate(),
    }
    path = checkpoint.save(tmp_path, 1, state)
    expected = torch.randn(3, generator=generator), rng.random(3), legacy.rand(3), python.random()
    loaded = checkpoint.load(path)
    generator.set_state(loaded["torch"])
    rng.bit_generator.state = loaded["pcg64"]
    legacy.set_state(loaded["mt19937"])
    version, words, gauss = loaded["python"]
    python.setstate((version, tuple(words), gauss))
    assert torch.equal(expected[0], torch.randn(3, generator=generator))
    assert np.array_equal(expected[1], rng.random(3)) and np.array_equal(expected[2], legacy.rand(3))
    assert expected[3] == python.random()


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        Path("x"),
        b"bytes",
        1j,
        {1.5: 0},
        {(1, 2): 0},
        np.array(["text"]),
        np.array([object()]),
        np.array(["2020-01-01"], "M8[D]"),
        np.longdouble(1),
        np.ones(2, np.complex128),
        torch.ones(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        lambda: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_held_is_refused_before_the_disk_is_touched(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="state/agent/0: a checkpoint cannot hold"):
        checkpoint.save(tmp_path, 1, {"agent": [value]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 3), (10**12, 3), (1, 0)])
def test_impossible_numbers_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match=f"step={step} .* keep={keep} "):
        checkpoint.save(tmp_path, step, {}, keep=keep)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(0, 80, 10):
        checkpoint.save(tmp_path, step, {"step": step}, keep=3, keep_also=[20])
    assert checkpoint.list_steps(tmp_path) == [20, 50, 60, 70]
    checkpoint.save(tmp_path, 80, {}, keep=2, keep_also=[60, 12345])
    assert checkpoint.list_steps(tmp_path) == [60, 70, 80]
    checkpoint.save(tmp_path, 5, {}, keep=1)  # what was just saved is never removed
    assert checkpoint.list_steps(tmp_path) == [5, 80]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_steps_are_listed_by_valid_names_only(tmp_path: Path) -> None:
    assert checkpoint.list_steps(tmp_path) == []
    for name in (
        *("step_000000000002", "step_000000000010", "step_000000000003.tmp", "step_000000000004.corrupt"),
        *("step_5", "step_0000000000006", "step_00000000000٧", "x", "step_000000000008\n"),
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.list_steps(tmp_path) == [2, 10]


def test_saving_twice_leaves_the_first(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": 1})
    before = [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in sorted(path.iterdir())]
    assert checkpoint.save(tmp_path, 1, {"a": 2}) == path
    assert before == [(file, file.stat().st_mtime_ns, file.stat().st_ino) for file in sorted(path.iterdir())]
    assert checkpoint.load(path) == {"a": 1}


def test_saving_over_a_damaged_one_sets_it_aside(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        path = checkpoint.save(tmp_path, 1, {"a": value})
        assert checkpoint.load(path) == {"a": value}
        (path / "state.json").write_bytes(b"")
    names = sorted(folder.name for folder in path.parent.iterdir())
    assert names == ["step_000000000001", "step_000000000001.1.corrupt", "step_000000000001.corrupt"]


def test_damaged_ones_are_passed_over_with_one_warning_and_renamed(tmp_path: Path) -> None:
    for step in (1000, 2000, 3000, 4000):
        checkpoint.save(tmp_path, step, {"step": step}, keep=9)
    folder = tmp_path / "checkpoints"
    (folder / "step_000000004000" / "state.json").unlink()
    (folder / "step_000000003000" / "MANIFEST.json").write_text("{")
    warnings: list[str] = []
    assert checkpoint.load_newest(tmp_path, warnings.append) == (2000, {"step": 2000})
    (text,) = warnings
    assert "state.json is missing" in text and "MANIFEST.json cannot be understood" in text
    assert "step 2,000 instead" in text and "2,000 steps after it are lost" in text
    assert (folder / "step_000000004000.corrupt").is_dir() and (folder / "step_000000003000.corrupt").is_dir()
    assert checkpoint.load_newest(tmp_path, warn_not) == (2000, {"step": 2000})


def test_no_usable_checkpoint_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"(?s)holds no checkpoint.*python -m pgrl\.train"):
            checkpoint.load_newest(tmp_path / "missing", warn_not)
    path = checkpoint.save(tmp_path, 7, {})
    (path / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="(?s)holds no checkpoint.*MANIFEST.json is missing"):
        checkpoint.load_newest(tmp_path, warn_not)


def test_another_format_is_passed_over_but_not_called_corrupt(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {})
    manifest = checkpoint.save(tmp_path, 2, {}) / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"version":1', '"version":3'))
    warnings: list[str] = []
    assert checkpoint.load_newest(tmp_path, warnings.append)[0] == 1
    assert "format 3; this pgrl reads formats 1 and 2" in warnings[0] and checkpoint.list_steps(tmp_path) == [1, 2]


def test_a_disk_that_cannot_be_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {})

    def fail(name: str, path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "operation", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.load_newest(tmp_path, warn_not)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "checkpoints/step_000000000001")
    monkeypatch.undo()
    assert checkpoint.list_steps(tmp_path) == [1]


def test_a_checkpoint_may_be_copied_under_another_name_but_not_under_another_step(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": 1})
    assert checkpoint.load(path.rename(tmp_path / "best")) == {"a": 1}
    with pytest.raises(CheckpointError, match="checkpoint of step 1"):
        checkpoint.load((tmp_path / "best").rename(path.with_name("step_000000000002")))


def test_clean_removes_only_what_was_left_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {})
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    folder = tmp_path / "checkpoints"
    for name in ("step_000000000002.tmp", "mine.tmp"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("")
    (folder / "step_000000000003.tmp").symlink_to(victim)
    (tmp_path / ".status.json.tmp").write_text("")
    (tmp_path / "notes.tmp").write_text("")
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.tmp", "step_000000000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "notes.tmp", "victim"]
    assert (victim / "file").read_text() == "precious"
    checkpoint.clean(tmp_path / "missing")


def test_rotation_follows_no_links(tmp_path: Path) -> None:
    victim = checkpoint.save(tmp_path / "other", 1, {})
    for step in (2, 3):
        checkpoint.save(tmp_path, step, {})
    victim_link = tmp_path / "checkpoints" / "step_000000000001"
    victim_link.symlink_to(victim)
    checkpoint.save(tmp_path, 4, {}, keep=3)
    assert not victim_link.is_symlink() and checkpoint.load(victim) == {}


def test_everything_is_synced_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, {})
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "operation", lambda name, path: seen.append((name, path.name)))
    checkpoint.save(tmp_path, 2, {"w": torch.ones(1)})
    changes = [operation for operation in seen if operation[0] not in ("read", "list", "open")]
    assert changes == [
        ("mkdir", "step_000000000002.tmp"),
        ("write", "state.safetensors"),
        ("fsync", "state.safetensors"),
        ("write", "state.json"),
        ("fsync", "state.json"),
        ("write", "MANIFEST.json"),
        ("fsync", "MANIFEST.json"),
        ("fsync", "step_000000000002.tmp"),
        ("rename", "step_000000000002.tmp"),
        ("fsync", "checkpoints"),
    ]


def test_importing_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, pgrl; before = set(sys.modules); import pgrl.checkpoint, pgrl.logger;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(new & {'torch', 'numpy', 'safetensors', 'tensorboard', 'rich', 'google', 'pickle'})"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (output.stdout, output.stderr) == ("set()\n", "")
