"""What MKL is told of the processor, before torch is loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgrl import mkl, native

FLAGS = " ".join(sorted(mkl.NEEDED))
CPUINFO = "processor\t: 0\nvendor_id\t: {}\nflags\t\t: fpu {}\n\nvendor_id\t: AuthenticAMD\nflags\t\t: " + FLAGS


def in_another(code: str, tmp_path: Path, **variables: str) -> str:
    """What a process prints that has none of the variables by which MKL is left as it is, and an empty cache folder."""
    left_out = {mkl.SWITCH, *mkl.CHOICES}
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


ANSWERED = """
import ctypes, os, pathlib
from pgrl import mkl
assert mkl.answer() is None
mkl.answer.cache_clear()
del os.environ[mkl.SWITCH]
mkl.CPUINFO = pathlib.Path(os.environ["CPUINFO"])
found = mkl.answer()
assert found is not None and not mkl.asked()
assert ctypes.CDLL(None).mkl_serv_intel_cpu_true() == 1
assert mkl.asked()
print(found.functions._name)
"""


@pytest.mark.skipif(not native.compilers() or sys.platform != "linux", reason="needs a C++ compiler, and Linux")
def test_the_answer_is_yes_for_the_whole_process_and_tells_that_it_was_asked(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format("AuthenticAMD", FLAGS))
    library = in_another(ANSWERED, tmp_path, CPUINFO=str(tmp_path / "cpuinfo"), **{mkl.SWITCH: "0"})
    assert Path(library).parent == tmp_path / "pgrl" / "native"
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "Dynamic section" in needed and "NEEDED" not in needed  # what it brought would come before torch's own


@pytest.mark.parametrize(
    ("vendor", "flags", "able"),
    [
        ("AuthenticAMD", FLAGS, True),
        ("AuthenticAMD", "avx avx2", False),
        ("AuthenticAMD", FLAGS.replace("avx512bw", ""), False),
        ("GenuineIntel", FLAGS, False),
    ],
)
def test_which_processors_it_is_for(
    vendor: str, flags: str, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mkl, "CPUINFO", tmp_path / "cpuinfo")
    assert not mkl.has_avx512_of_amd()  # of which nothing is told
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(vendor, flags))
    assert mkl.has_avx512_of_amd() is able


def test_there_is_none_where_it_is_too_late_or_somebody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[tuple[Any, ...]] = []
    monkeypatch.setattr(mkl, "has_avx512_of_amd", lambda: True)
    monkeypatch.setattr(native, "library", lambda *words, mode: asked_for.append((*words, mode)))
    for name in (mkl.SWITCH, *mkl.CHOICES):
        monkeypatch.delenv(name, raising=False)
    mkl.answer.__wrapped__()
    assert "torch" in sys.modules and not asked_for
    monkeypatch.delitem(sys.modules, "torch")
    for name, value in ((mkl.SWITCH, "0"), *((name, "AVX2") for name in mkl.CHOICES)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            mkl.answer.__wrapped__()
            assert not asked_for
    monkeypatch.setenv(mkl.SWITCH, "1")
    mkl.answer.__wrapped__()
    assert asked_for == [("mkl", "-nostdlib", ctypes.RTLD_GLOBAL)]


PRODUCT = """
import {}, {}
from pgrl import processor
processor.set_up(processor.LARGE, torch.device("cpu"))
x, y = torch.randn(2, 300, 300)
assert (x @ y - x.double() @ y.double()).abs().max() < 1e-3
print(processor.multiplies_with())
"""


def test_mkl_takes_avx512_where_it_is_answered(tmp_path: Path) -> None:
    """On this processor, whichever it is."""
    answered = in_another(PRODUCT.format("pgrl", "torch"), tmp_path)
    if mkl.has_avx512_of_amd() and native.compilers() and torch.backends.mkl.is_available():
        assert answered == "MKL with AVX-512"
    else:
        assert answered in ("BLAS", "oneDNN")
    too_late = in_another(PRODUCT.format("torch", "pgrl"), tmp_path)
    switched_off = in_another(PRODUCT.format("pgrl", "torch"), tmp_path, **{mkl.SWITCH: "0"})
    assert {too_late, switched_off} == {"oneDNN" if answered == "MKL with AVX-512" else answered}
