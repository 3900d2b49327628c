"""C++ beside the package's Python: built once, in a folder of the user's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgrl import native


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not native.compilers():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_library_is_built_once_and_again_where_its_source_or_flags_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "pgrl" / "native"
    assert native.library("sampling") is not None
    (first,) = built.iterdir()
    stamp = first.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library("sampling") is not None
    assert [p.stat().st_mtime_ns for p in built.iterdir()] == [stamp]
    native.library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-DOTHER"])
    other = native.library("sampling")
    assert other is not None and {p.name for p in built.iterdir()} == {first.name, f"sampling-{other.key}.so"}


def test_a_file_that_does_not_load_is_built_elsewhere(tmp_path: Path) -> None:
    """As one that was cut off, or of a newer system that shares the home."""
    assert native.library("sampling") is not None
    (first,) = (tmp_path / "pgrl" / "native").iterdir()
    first.unlink()  # not written over: it is in use
    first.write_bytes(b"no library")
    native.library.cache_clear()
    assert native.library("sampling") is not None


def test_the_next_compiler_is_asked_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    assert native.compilers()[0] == str(bad)
    assert native.library("sampling") is not None


def test_a_folder_that_cannot_be_made_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.cache_folder("native") is None
    assert native.library("sampling") is not None


def test_another_processor_has_a_build_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home may be shared by several, and the compiler tells what each can do."""
    first = native.library("sampling")
    native.library.cache_clear()
    monkeypatch.setattr(native, "ONLY_MACROS", ["-D__OTHER__", *native.ONLY_MACROS])
    other = native.library("sampling")
    assert first is not None and other is not None and first.key != other.key


@pytest.mark.parametrize("mode", [ctypes.DEFAULT_MODE, ctypes.RTLD_GLOBAL])
def test_nothing_need_be_kept(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda _: None)
    assert native.library("sampling", mode=mode) is not None
    native.library.cache_clear()
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "none"))
    assert native.library("sampling", mode=mode) is None


def test_what_does_not_compile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ["-no-such-flag"])
    assert native.library("sampling") is None
    native.library.cache_clear()
    monkeypatch.undo()
    assert native.library("no such source") is None
