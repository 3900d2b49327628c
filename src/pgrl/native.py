"""C++ that stands beside this package's Python: built once for each processor, kept on disk, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

# Sums may be taken in another order, as vector instructions do. Not -ffast-math: it takes NaN for a number, and before
# gcc 13 it makes the whole process round numbers near zero to it.
FLAGS = "-std=c++17 -O3 -march=native -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros".split()
FLAGS += ["-fassociative-math"]


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
def library(name: str) -> ctypes.PyDLL | None:
    """The functions of `name`.cpp, which keep Python's lock; None where they cannot be built or loaded."""
    import torch

    source = Path(__file__).with_name(f"{name}.cpp")
    with suppress(OSError, subprocess.CalledProcessError), tempfile.TemporaryDirectory() as elsewhere:
        compiler = compilers()[0] if compilers() else "g++"
        machine = str(sorted(torch.cpu.get_capabilities().items()))  # a home may be shared by several
        key = hashlib.sha256("\0".join([source.read_text(), compiler, *FLAGS, machine]).encode()).hexdigest()
        folder = cache_folder("native") or Path(elsewhere)
        built = folder / f"{name}-{key[:16]}.so"
        if not built.exists():
            fresh = folder / f"{built.name}.{os.getpid()}"  # others may be about it, too
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(fresh)], check=True, capture_output=True)
            fresh.replace(built)
        return ctypes.PyDLL(str(built))
    return None
