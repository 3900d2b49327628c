"""MKL's code for AVX-512 on AMD's processors.

On a CPU torch multiplies matrices with Intel's MKL. That takes AVX-512 only where a function of its own says that the
processor is Intel's, and AVX2 elsewhere, which on AMD's is half as fast. Of two functions of one name a process takes
that of the library which was loaded first for all to see; so one that says yes is loaded before torch. PyTorch's
maintainers name this remedy, with LD_PRELOAD: https://github.com/pytorch/builder/pull/1245
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

from pgrl import native

SWITCH = "PGRL_MKL_AVX512"  # 0 in the environment leaves MKL as it is
CHOICES = ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")  # so does one of MKL's own variables for its code
NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # by that code
CPUINFO = Path("/proc/cpuinfo")


@cache
def answer() -> native.Library | None:
    """What answers MKL's question, loaded before torch; None where that is too late, of no use, or cannot be built."""
    chosen = os.environ.get(SWITCH) == "0" or any(name in os.environ for name in CHOICES)
    if chosen or "torch" in sys.modules or not has_avx512_of_amd():
        return None
    # without the C++ library, which would come before torch's own as well
    return native.library("mkl", "-nostdlib", mode=ctypes.RTLD_GLOBAL)


def asked() -> bool:
    """Whether MKL has put its question, as it does at the first product, and was answered here."""
    return (found := answer()) is not None and bool(found.functions.pgrl_mkl_asked())


def has_avx512_of_amd() -> bool:
    """Whether this is a processor of AMD's that can do what MKL needs for AVX-512; known on Linux alone."""
    able: dict[str, str] = {}
    with suppress(OSError), CPUINFO.open() as lines:
        for line in takewhile(str.strip, lines):  # its first core
            name, _, value = line.partition(":")
            able[name.strip()] = value
    return able.get("vendor_id", "").strip() == "AuthenticAMD" and set(able.get("flags", "").split()) >= NEEDED
