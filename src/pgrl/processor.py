"""How this process multiplies and allocates: threads, the library for matrices, TF32 on a GPU, memory that was freed.

All four matter where networks are so large that arithmetic, not the calls of operations, takes the time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

from pgrl import mkl

LARGE = 100_000  # parameters that learn: two MLPs of 256-256 have 150,000, of 128-128 40,000
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 1, -1, -3  # of glibc's malloc.h
# How torch multiplies matrices of single precision on the CPU: with "bf16" it calls oneDNN, with "none" MKL.
MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def set_up(parameters: int, device: torch.device, threads: int | None = None, *, tf32: bool = False) -> None:
    """Prepare this process for an agent with so many parameters that learn.

    threads: None is one where the matrices are small, for more would only wait for each other, and all cores otherwise.
    tf32: whether a GPU multiplies matrices of single precision in TF32.
    """
    large = parameters >= LARGE
    torch.set_num_threads(threads or (cores() if large else 1))
    MATMUL.fp32_precision = "bf16" if large and device.type == "cpu" and onednn_is_faster() else "none"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    if large:
        keep_freed_memory()


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_with() -> str:
    """The library that multiplies matrices now."""
    if MATMUL.fp32_precision == "bf16":
        return "oneDNN"
    return "MKL with AVX-512" if mkl_was_answered() else "BLAS"


@cache
def mkl_was_answered() -> bool:
    """Whether torch's MKL takes AVX-512, and is the faster so, because of `pgrl.mkl`."""
    x = torch.ones((8, 8), dtype=torch.float64, device="cpu")  # for oneDNN has no part in double precision
    _ = x @ x
    return mkl.asked()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies large matrices faster than MKL, in single precision as well.

    It does where MKL keeps to AVX2 for want of an answer (`pgrl.mkl`), as without a compiler, or where torch was
    imported before pgrl; oneDNN takes AVX-512 wherever it is. torch calls oneDNN if bf16 is allowed inside a product,
    which oneDNN takes up where it has hardware for it (AMX). So this is False there, and wherever a trial is less
    precise than single precision.
    """
    able = torch.cpu.get_capabilities()
    if mkl_was_answered() or not able.get("avx512_f") or able.get("amx_tile") or "AMD" not in str(able.get("cpu_name")):
        return False
    x, y = torch.randn((2, 256, 256), generator=torch.Generator().manual_seed(0))
    before, MATMUL.fp32_precision = MATMUL.fp32_precision, "bf16"
    try:
        error = (x @ y - x.double() @ y.double()).abs().max()
    finally:
        MATMUL.fp32_precision = before
    return float(error) < 1e-3  # of single precision 5e-5, of bf16 0.2


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors of that size, instead of having new pages from the system.

    An activation of 256 by 256 is beyond its first thresholds. It also merges its small freed pieces, its fast bins,
    each time a piece of 64 KiB is freed; without such bins there are none to merge. Other C libraries are left as they
    are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MXFAST, 0)
        library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc takes
        library.mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
