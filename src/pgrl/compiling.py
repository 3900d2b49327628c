"""Steps as graphs that inductor compiles: made once for each shape, kept on disk, and called without guards."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pgrl.native import cache_folder

T = TypeVar("T")

OPTIONS = {  # of inductor
    "cpp_wrapper": True,
    "cpp.use_decompose_tanh": True,  # made of exp, which is faster: within 5e-7
    "size_asserts": False,  # of every input at every call; `signature` asks what can change
    "alignment_asserts": False,
    "loop_ordering_after_fusion": False,  # of a GPU's loops; torch 2.11 fails at it where an optimiser's are among them
    "pattern_matcher": False,  # it would put a layer's product and its bias back together, see `networks.linear`
}


def compile_step(step: Callable[..., T]) -> Callable[..., T]:
    """`step`, a method, as one graph for each shape of its arguments, differentiated and fused by inductor.

    Graphs are called without torch's guards, which would ask at every call whether what `step` reads of its object is
    still what was compiled. So it must read there nothing that changes but tensors that keep their shapes. Of the
    arguments it is asked here, by `signature`. TypeError where it reads a tensor whose value would become a constant.
    """
    import torch._dynamo.config as dynamo
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    keep_graphs()
    dynamo.trace_autograd_ops = True  # without it torch.autograd.grad breaks the graph
    dynamo.enable_aot_compile = True  # which torch 2.11 asks for
    owner = step.__self__  # type: ignore[attr-defined]
    options: Any = {"guard_filter_fn": without_guards}
    compiled: Any = torch.compile(step, fullgraph=True, dynamic=False, backend=inductor, options=options)
    graphs: dict[Any, Callable[..., T]] = {}

    def call(*arguments: Any) -> T:
        key = signature(arguments)
        graph = graphs.get(key)
        if graph is None:
            # `aot_compile` tells none of those who listen to torch's compilations, as a profile does
            with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "pgrl"), collected_after():
                program = compiled.aot_compile((arguments, {}))
            program.disable_guard_check()
            graph = graphs[key] = program.fn
        return graph(owner, *arguments)

    return call


@contextmanager
def collected_after() -> Iterator[None]:
    """Collect garbage once, at the end: of what the compiler makes much is kept, and looked through each time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        if collects:
            gc.enable()


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """The backend: inductor with its C++ wrapper, and with its cache, which `aot_compile` would pass by.

    For `aot_compile` is meant for saving what it returns, all in one; here inductor's cache has it in its own parts.
    """
    import torch._functorch.config as functorch
    from torch._dynamo.aot_compile_types import SerializableCallable
    from torch._inductor.compile_fx import compile_fx

    class Unsaved(SerializableCallable):
        def __init__(self, run: Any) -> None:
            self.run = run

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return self.run(*arguments, **named)

        @classmethod
        def serialize_compile_artifacts(cls, fn: Any) -> bytes:
            raise NotImplementedError

        @classmethod
        def deserialize_compile_artifacts(cls, data: bytes) -> Any:
            raise NotImplementedError

    switches = ("strict_autograd_cache", "bypass_autograd_cache_key", "bundled_autograd_cache", "force_autograd_cache")
    with functorch.patch(dict.fromkeys(switches, False)):
        on_cpu = all(x.is_cpu for x in inputs)
        run: Any = compile_fx(graph, inputs, config_patches={**OPTIONS, "cpp_wrapper": on_cpu})
        return Unsaved(run)


def without_guards(guards: Sequence[Any]) -> list[bool]:
    """For `guard_filter_fn`: keep none of them, and refuse what only guards make right.

    Dynamo may take the present value of a whole number, or one in double precision, that is a tensor without dimensions
    in main memory, for a constant, and guard it.
    """
    for guard in guards:
        x = guard.value
        if isinstance(x, Tensor) and x.dim() == 0 and x.is_cpu and x.dtype not in (torch.float32, torch.bool):
            raise TypeError(f"a compiled step reads {guard.name}, {x.dtype}, whose value would become a constant")
    return [False] * len(guards)


def signature(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a graph of these arguments is good for: the shapes, strides and types of tensors, and plain values.

    Of a tuple the first tensor's are enough: those of the others follow from them.
    """
    firsts = (x[0] if isinstance(x, tuple) and x else x for x in arguments)
    return tuple([(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in firsts])


def keep_graphs() -> None:
    """Let inductor keep what it compiles in the user's cache folder; its own one is lost when the machine restarts."""
    if folder := cache_folder("inductor"):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
