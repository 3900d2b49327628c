"""C++ that stands beside this package's Python: built once for each processor, kept on disk, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
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

ONLY_MACROS = "-dM -E -x c++ /dev/null".split()


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
def library(name: str, *flags: str, mode: int = ctypes.DEFAULT_MODE) -> Library | None:
    """The functions of `name`.cpp, by the first compiler that builds it; None where none does.

    flags: the compiler's, beside FLAGS. mode: of loading; ctypes.RTLD_GLOBAL shows the functions to the whole process.
    """
    # elsewhere: where nothing can be kept, or loaded from there
    with suppress(OSError), tempfile.TemporaryDirectory() as elsewhere:
        for compiler in dict.fromkeys(compilers()):
            for folder in (cache_folder("native"), Path(elsewhere)):
                with suppress(OSError, subprocess.SubprocessError):
                    if folder is not None:
                        return build(name, [compiler, *FLAGS, *flags], folder, mode)
    return None


def build(name: str, compile_it: Sequence[str], folder: Path, mode: int) -> Library:
    """The functions of `name`.cpp, compiled into a folder unless they are there; OSError or SubprocessError."""
    source = Path(__file__).with_name(f"{name}.cpp")
    # the compiler's version, and what this processor can do: a home may be shared by several
    macros = subprocess.run([*compile_it, *ONLY_MACROS], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([source.read_text(), *compile_it[1:], macros]).encode()).hexdigest()[:16]
    built = folder / f"{name}-{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:  # others may be about it, too
            fresh = Path(own) / built.name
            subprocess.run([*compile_it, str(source), "-o", str(fresh)], check=True, capture_output=True)
            fresh.replace(built)
    return Library(ctypes.PyDLL(str(built), mode=mode), key)
