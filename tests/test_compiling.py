"""Steps as graphs: which graph a call takes, what one may read, and where graphs are kept."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pgrl.compiling import collected_after, compile_step, keep_graphs, signature, without_guards


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


def test_graphs_are_kept_where_a_restart_leaves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(variable, "chosen")
    keep_graphs()
    assert os.environ[variable] == "chosen"
    monkeypatch.delenv(variable)
    keep_graphs()
    assert os.environ[variable] == str(tmp_path / "cache/pgrl/inductor")
    monkeypatch.delenv(variable)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where no folder can be made
    keep_graphs()
    assert variable not in os.environ


def test_a_signature_tells_graphs_apart() -> None:
    batch, lr = Batch(torch.zeros(4, 3), torch.zeros(4)), torch.tensor(0.1)
    same = signature((Batch(torch.ones(4, 3), torch.ones(4)), torch.tensor(0.2), ()))
    assert signature((batch, lr, ())) == same and hash(same) is not None
    other = Batch(torch.zeros(5, 3), torch.zeros(5))
    others = [(other, lr, ()), (batch, None, ()), (batch, torch.zeros(1), ()), (batch, lr, True), (batch, lr, False)]
    columns = Batch(torch.zeros(3, 4).T, torch.zeros(4))  # the graph would read it row by row
    assert len({same, *map(signature, [*others, (columns, lr, ())])}) == 7


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_no_graph_makes_a_constant_of_a_number(dtype: torch.dtype) -> None:
    fine = [torch.zeros(()), torch.zeros(1, dtype=dtype), torch.zeros((), dtype=torch.bool), 3, None]
    assert without_guards([SimpleNamespace(name="x", value=x) for x in fine]) == [False] * 5
    with pytest.raises(TypeError, match="reads self.count, torch.*would become a constant"):
        without_guards([SimpleNamespace(name="self.count", value=torch.zeros((), dtype=dtype))])


class Counted:
    """A step that reads a number of its object, and changes it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.count = torch.zeros((), dtype=dtype)

    def step(self, x: Tensor, twice: bool) -> Tensor:
        self.count += 1
        return x * self.count.float() * (2.0 if twice else 1.0)


@pytest.mark.slow  # the compiler takes seconds
def test_a_compiled_step_reads_the_present_number_and_has_a_graph_for_each_shape() -> None:
    step = compile_step(Counted(torch.float32).step)
    given = [(torch.ones(3), False), (torch.ones(3), False), (torch.ones(3), True), (torch.ones(2, 2), False)]
    assert [step(x, twice).unique().item() for x, twice in given] == [1.0, 2.0, 6.0, 4.0]


@pytest.mark.slow
def test_a_compiled_step_is_refused_a_number_that_would_be_constant() -> None:
    with pytest.raises(TypeError, match=r"reads self.count, torch.int64"):
        compile_step(Counted(torch.int64).step)(torch.ones(3), False)


@pytest.mark.slow
def test_a_graph_that_was_compiled_before_is_read_from_the_cache(tmp_path: Path) -> None:
    """In a process of its own; `aot_compile` alone would have inductor write all of its code anew."""
    script = """
import torch
from torch._dynamo.utils import counters
from tests.test_compiling import Counted
from pgrl.compiling import compile_step
compile_step(Counted(torch.float32).step)(torch.ones(3), False)
print(counters["inductor"]["fxgraph_cache_hit"])
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [subprocess.check_output([sys.executable, "-c", script], env=environment, text=True) for _ in range(2)]
    assert [int(said.split()[-1]) for said in hits] == [0, 1]


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_waits_for_the_end(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(KeyError), collected_after():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


class Squashed:
    def step(self, x: Tensor) -> Tensor:
        return x.tanh()


@pytest.mark.slow
def test_a_compiled_tanh_is_one_to_rounding() -> None:
    x = torch.cat([torch.linspace(-20, 20, 4096), torch.linspace(-0.01, 0.01, 4096), torch.tensor([-1e3, 1e3])])
    torch.testing.assert_close(compile_step(Squashed().step)(x).double(), x.double().tanh(), rtol=0, atol=5e-7)
