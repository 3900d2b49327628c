"""What MKL is told of the processor, before torch is loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pgrl import mkl, native

AMD = {"vendor_id": "AuthenticAMD", "flags": "fpu " + " ".join(sorted(mkl.NEEDED))}


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without torch, on an AMD processor with AVX-512, where nothing was built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(mkl.SWITCH, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(native, "processor", lambda: AMD)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def answer() -> native.Library | None:
    """As in a process that has none yet."""
    found: native.Library | None = mkl.answer.__wrapped__()
    return found


@pytest.mark.skipif(not native.compilers() or sys.platform != "linux", reason="needs a C++ compiler, and Linux")
def test_the_answer_is_yes_for_the_whole_process_and_tells_that_it_was_asked() -> None:
    found = answer()
    assert found is not None
    assert not found.functions.pgrl_mkl_asked()
    assert ctypes.CDLL(found.functions._name).mkl_serv_intel_cpu_true() == 1
    assert found.functions.pgrl_mkl_asked()
    needed = subprocess.run(["readelf", "-d", found.functions._name], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" not in needed  # what it would bring would come before torch's own


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"vendor_id": "AuthenticAMD", "flags": "fpu avx avx2"},
        {"vendor_id": "AuthenticAMD", "flags": AMD["flags"].replace("avx512bw", "")},
        {"vendor_id": "GenuineIntel", "flags": AMD["flags"]},
    ],
)
def test_there_is_none_for_other_processors(processor: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor", lambda: processor)
    assert answer() is None


def test_there_is_none_after_torch_or_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        assert answer() is None
    monkeypatch.setenv(mkl.SWITCH, "0")
    assert answer() is None


def test_there_is_none_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compilers", lambda: [])
    assert answer() is None


CODE = """
import {first}, {second}
from pgrl import mkl, processor
processor.set_up(processor.LARGE, torch.device("cpu"))
x, y = torch.randn(2, 300, 300)
assert (x @ y - x.double() @ y.double()).abs().max() < 1e-3
print(processor.multiplies_with())
"""


def in_another(first: str, second: str, **variables: str) -> str:
    """What multiplies large matrices in a process that imports these two in turn."""
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"} | variables
    code = CODE.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_mkl_takes_avx512_where_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this processor, whichever it is
    able = native.processor()
    amd = able.get("vendor_id") == "AuthenticAMD" and set(able.get("flags", "").split()) >= mkl.NEEDED
    answered = in_another("pgrl", "torch")
    if amd and native.compilers() and torch.backends.mkl.is_available() and not os.environ.get(mkl.SWITCH):
        assert answered == "MKL with AVX-512"
    if not amd:
        assert answered in ("BLAS", "oneDNN")
    for other in (in_another("torch", "pgrl"), in_another("pgrl", "torch", **{mkl.SWITCH: "0"})):
        assert other == ("oneDNN" if answered.startswith("MKL") else answered)
