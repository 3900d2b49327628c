"""What a process is prepared for: threads, and products that stay in single precision."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pgrl import processor
from pgrl.processor import LARGE, MATMUL, mkl_was_answered, multiplies_with, onednn_is_faster, set_up

CPU = torch.device("cpu")
BLAS = "MKL with AVX-512" if mkl_was_answered() else "BLAS"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), MATMUL.fp32_precision
    yield
    torch.set_num_threads(threads)
    MATMUL.fp32_precision = precision


def error() -> float:
    """The largest error of a product, of entries near 16."""
    x, y = torch.randn((2, 256, 256), generator=torch.Generator().manual_seed(1))
    return float((x @ y - x.double() @ y.double()).abs().max())


def test_threads_follow_the_networks() -> None:
    set_up(LARGE - 1, CPU)
    assert torch.get_num_threads() == 1
    set_up(LARGE, CPU)
    assert torch.get_num_threads() == processor.cores()
    set_up(LARGE, CPU, threads=1)
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_cores_are_those_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processor.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert processor.cores() == len(before)


def test_waiting_threads_give_up_their_core_unless_told_otherwise() -> None:
    code = "import os, pgrl; print(os.environ['GOMP_SPINCOUNT'])"
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"} | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_large_networks_multiply_in_single_precision() -> None:
    set_up(LARGE, CPU, threads=1)
    assert multiplies_with() == ("oneDNN" if onednn_is_faster() else BLAS)
    assert error() < 1e-3


@pytest.mark.parametrize(("parameters", "device"), [(LARGE - 1, CPU), (LARGE, torch.device("cuda"))])
def test_another_library_is_for_large_networks_on_the_cpu(
    parameters: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "onednn_is_faster", lambda: True)
    set_up(LARGE, CPU, threads=1)
    assert multiplies_with() == "oneDNN"
    set_up(parameters, device, threads=1)  # also after one that had it
    assert multiplies_with() == BLAS


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_f": True, "amx_tile": False, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": True, "amx_tile": False, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"avx512_f": False, "amx_tile": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "amx_tile": True, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_which_processors_gain(able: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(processor, "mkl_was_answered", lambda: False)
    before = MATMUL.fp32_precision
    assert onednn_is_faster.__wrapped__() is (expected and precise())
    monkeypatch.setattr(processor, "mkl_was_answered", lambda: True)
    assert onednn_is_faster.__wrapped__() is False
    assert MATMUL.fp32_precision == before


def precise() -> bool:
    """Whether this processor keeps single precision where bf16 is allowed."""
    MATMUL.fp32_precision, before = "bf16", MATMUL.fp32_precision
    try:
        return error() < 1e-3
    finally:
        MATMUL.fp32_precision = before


def test_imprecise_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "AMD EPYC"})
    monkeypatch.setattr(processor, "mkl_was_answered", lambda: False)
    rounded = lambda x, y: torch.mm(x if x.dtype == torch.float64 else x.bfloat16().float(), y)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert onednn_is_faster.__wrapped__() is False


def test_freed_memory_is_kept_once() -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, what: int, value: int) -> int:
            calls.append((what, value))
            return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctypes.CDLL", lambda _: Library())
        processor.keep_freed_memory.cache_clear()
        set_up(LARGE - 1, CPU, threads=1)
        assert not calls
        set_up(LARGE, CPU, threads=1)
        set_up(LARGE, CPU, threads=1)
    assert calls == ([(1, 0), (-3, 2**25), (-1, 2**28)] if sys.platform == "linux" else [])


@pytest.mark.gpu
def test_a_gpu_multiplies_in_single_precision_unless_tf32_is_asked_for() -> None:
    x, y = torch.randn((2, 256, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    errors = []
    for tf32 in (False, True, False):
        set_up(1, torch.device("cuda"), tf32=tf32)
        errors.append(float((x @ y - x.double() @ y.double()).abs().max()))
    assert max(errors[0], errors[2]) < 1e-4 < 1e-3 < errors[1]
