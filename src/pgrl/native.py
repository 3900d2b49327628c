"""C++ that stands beside this package's Python: built once for each processor, kept on disk, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Not -ffast-math: it takes NaN for a number, and before gcc 13 it makes the whole process lose numbers near zero.
FLAGS = "-std=c++17 -O3 -march=native -shared -fPIC -fno-math-errno -fno-trapping-math".split()

OF_PROCESSOR = ("vendor_id", "model name", "flags")


class Library(NamedTuple):
    """What was built of a source."""

    functions: ctypes.PyDLL  # which keep Python's lock
    key: str  # of the source, the compiler, its flags and the processor: what results depend on to the last bit


def compilers() -> list[str]:
    """The C++ compilers that are there, the one of $CXX first."""
    return [found for name in (os.environ.get("CXX", "g++"), "g++", "clang++") if (found := shutil.which(name))]


def cache_folder(name: str) -> Path | None:
    """The folder of this name among those that pgrl keeps for later runs; None where it cannot be written to."""
    with suppress(OSError, RuntimeError):  # it cannot be made, or no home is known
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pgrl" / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


@cache
def library(name: str, *flags: str) -> Library | None:
    """The functions of `name`.cpp, by the first compiler that builds it; None where none does."""
    with tempfile.TemporaryDirectory() as elsewhere:  # where what is kept cannot be loaded, or nothing be kept
        for compiler in dict.fromkeys(compilers()):
            for folder in (cache_folder("native"), Path(elsewhere)):
                with suppress(OSError, subprocess.SubprocessError):
                    if folder is not None:
                        return build(name, compiler, [*FLAGS, *flags], folder)
    return None


def build(name: str, compiler: str, flags: Sequence[str], folder: Path) -> Library:
    """The functions of `name`.cpp, compiled into a folder unless they are there; OSError or SubprocessError."""
    source = Path(__file__).with_name(f"{name}.cpp")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    able = str(sorted(processor().items()))  # a home may be shared by several
    key = hashlib.sha256("\0".join([source.read_text(), version, *flags, able]).encode()).hexdigest()[:16]
    built = folder / f"{name}-{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:  # others may be about it, too
            fresh = Path(own) / built.name
            subprocess.run([compiler, *flags, str(source), "-o", str(fresh)], check=True, capture_output=True)
            fresh.replace(built)
    return Library(ctypes.PyDLL(str(built)), key)


@cache
def processor() -> dict[str, str]:
    """What this processor is, and can do: on Linux `vendor_id`, `model name` and `flags`, of its first core."""
    found = {"machine": platform.machine(), "name": platform.processor()}
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = (line.partition(":") for line in first.splitlines())
        found |= {key.strip(): value.strip() for key, _, value in lines if key.strip() in OF_PROCESSOR}
    return found
