"""MKL's code for AVX-512 on processors that are not Intel's.

On a CPU torch multiplies matrices with Intel's MKL. That takes AVX-512 only where a function of its own says that the
processor is Intel's, and AVX2 elsewhere, which on AMD's is half as fast. Of two functions of one name a process takes
that of the library which was loaded first for all to see; so one that says yes is loaded before torch. PyTorch's
maintainers name this remedy, with LD_PRELOAD: https://github.com/pytorch/builder/pull/1245
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

from pgrl import native

SWITCH = "PGRL_MKL_AVX512"  # 0 in the environment leaves MKL as it is
NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # by that code


@cache
def answer() -> native.Library | None:
    """What answers MKL's question, loaded before torch; None where that is too late, of no use, or cannot be built."""
    able = native.processor()
    amd = able.get("vendor_id") == "AuthenticAMD" and set(able.get("flags", "").split()) >= NEEDED
    if not amd or "torch" in sys.modules or os.environ.get(SWITCH) == "0":
        return None
    # without the C++ library, which would come before torch's own as well
    found = native.library("mkl", "-nostdlib")
    if found is not None:
        ctypes.CDLL(found.functions._name, ctypes.RTLD_GLOBAL)
    return found


def asked() -> bool:
    """Whether MKL has put its question, as it does at the first product, and was answered here."""
    return (found := answer()) is not None and bool(found.functions.pgrl_mkl_asked())
