"""Rollouts and updates as CUDA graphs: thousands of kernels in one launch, with no word of the host between them.

A graph repeats the operations of one call on the same memory. So what is captured may change tensors only in their
place, may ask none for its value, and must leave nothing to Python that differs from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from pgrl.agents import Agent
from pgrl.data import Transition
from pgrl.errors import UserError
from pgrl.optim import GradientStep
from pgrl.runs import detached

WARM_UPS = 2  # calls before the capture: libraries set themselves up at the first, torch.compile may until the second

T = TypeVar("T")


class Stateful(Protocol):
    """A part of a run."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Learner(Protocol):
    """An agent whose update is a function of tensors: `update(rollout, p)` is `learn(rollout, *schedules(p))`."""

    device: torch.device

    def schedules(self, progress: float) -> tuple[Any, ...]:
        """What depends on the share of training done, as trees of tensors on the device."""

    def learn(self, rollout: Transition, *schedules: Any) -> dict[str, Tensor]:
        """Learn from a rollout [T, B, ...]; metrics as 0-d tensors."""


@runtime_checkable
class Stepper(Protocol):
    """An agent whose update decides on the host what it learns from, by `step`, a function of tensors and flags."""

    device: torch.device
    step: Callable[..., tuple[dict[str, Tensor], Tensor]]

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]: ...

    def steps(self, *arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
        """What `step` computes, compiled or not: metrics, and TD errors [N] or [0]; it draws no random numbers."""


class Captured(Generic[T]):
    """`function` of trees of tensors, captured at its first call and from then on repeated as it was then.

    What it changes, the states of `parts` and perhaps its inputs, is as if that first call had been the only one: the
    calls that warm up are undone. It draws from generators of `parts` alone, and of those from the device's. What it
    returns lies where the first call's result lay, so a call overwrites the result before it. The inputs of the first
    call are its room for inputs, or with `own_room` copies of them: later ones that lie elsewhere are copied there. On
    a CPU, where there are no graphs, the function itself is called.

    UserError if CUDA refuses the capture, ValueError for inputs of other shapes than the first.
    """

    def __init__(
        self, function: Callable[..., T], parts: Sequence[Stateful], device: torch.device, *, own_room: bool = False
    ) -> None:
        self._function, self._parts, self._device, self._own_room = function, parts, device, own_room
        self._inputs: tuple[Any, ...] = ()
        self._replay: Callable[[], object] | None = None
        self._result: T

    def __call__(self, *inputs: Any) -> T:
        if self._replay is None:
            self._inputs = copied(inputs) if self._own_room else inputs
            self._warm_up()
            drawn = [g for part in self._parts for g in generators(part) if g.device.type == self._device.type]
            self._replay = record(self._call, drawn, self._device)
        for mine, given in zip(tensors(self._inputs), tensors(inputs), strict=True):
            if mine.data_ptr() != given.data_ptr():
                if mine.shape != given.shape:
                    raise ValueError(f"captured for an input of shape {tuple(mine.shape)}, not {tuple(given.shape)}")
                mine.copy_(given)
        self._replay()
        return self._result

    def _call(self) -> None:
        self._result = self._function(*self._inputs)

    def _warm_up(self) -> None:
        """Call the function, on CUDA beside the main stream as torch asks for, and undo it."""
        inputs = [(x, x.clone()) for x in tensors(self._inputs)]
        states = [(part, detached(part.state_dict())) for part in self._parts]
        with beside(self._device):
            for _ in range(WARM_UPS):
                self._call()
                for part, state in states:
                    part.load_state_dict(state)
                for x, before in inputs:
                    x.copy_(before)


def capture_acting(agent: Agent) -> None:
    """Capture what the agent's network has to do with an action, where the rollout is not captured as a whole.

    From then on it explores in so many envs alone, and an action is overwritten by the next.
    """
    if agent.actor is not None:
        agent.actor.apply = Captured(agent.actor.apply, [], agent.device, own_room=True)


class CapturedSteps:
    """A Stepper's `step` as graphs, one for each set of flags: of its arguments, what is no tensor nor tuple of them.

    The TD errors of a call are overwritten by the next one with its flags.
    """

    def __init__(self, agent: Stepper) -> None:
        self._step, self._device = agent.step, agent.device
        self._parts = [part for part in vars(agent).values() if isinstance(part, nn.Module | GradientStep)]
        self._graphs: dict[Any, tuple[Captured[tuple[Tensor, Tensor]], list[str]]] = {}

    def __call__(self, *arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
        flags = tuple(TENSORS if isinstance(x, Tensor | tuple) else x for x in arguments)
        inputs = tuple(x for x in arguments if isinstance(x, Tensor | tuple))
        if flags not in self._graphs:
            self._graphs[flags] = self._new(flags)
        graph, names = self._graphs[flags]
        metrics, td_error = graph(*inputs)
        return dict(zip(names, metrics.clone().unbind(), strict=True)), td_error

    def _new(self, flags: tuple[Any, ...]) -> tuple[Captured[tuple[Tensor, Tensor]], list[str]]:
        names = list[str]()

        def step(*inputs: Any) -> tuple[Tensor, Tensor]:
            left = iter(inputs)
            metrics, td_error = self._step(*(next(left) if x is TENSORS else x for x in flags))
            names[:] = metrics
            return torch.stack(list(metrics.values())), td_error

        return Captured(step, self._parts, self._device, own_room=True), names


TENSORS = object()  # stands among flags where an argument has tensors


def copied(tree: Any) -> Any:
    """Nested tuples with copies of their tensors, each in memory of its own."""
    if isinstance(tree, Tensor):
        return tree.clone(memory_format=torch.contiguous_format)
    branches = map(copied, tree)
    return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Within it, what CUDA is given runs on a stream of its own, after what came before and ahead of what follows."""
    if device.type != "cuda":
        yield
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)


def record(call: Callable[[], None], generators: Sequence[Generator], device: torch.device) -> Callable[[], object]:
    """What repeats `call` on the device: the replay of a CUDA graph of it, and on a CPU the call itself.

    To record it changes no tensor and no generator. Each replay draws on from where `generators` stand, and moves them.
    """
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        # a stream of its own, for torch's is that of the device that it first captured on
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            call()
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"capture: CUDA refused a graph: {why}\nUse: capture=false") from error
    return graph.replay


def captured_update(agent: Agent) -> Callable[[Transition, float], dict[str, Tensor]]:
    """`agent.update`, captured whole for a `Learner`, and for a `Stepper` each step that it takes.

    A Learner's metrics come in main memory, by the one wait of an update.
    """
    if isinstance(agent, Stepper):
        agent.step = CapturedSteps(agent)
        return agent.update
    if not isinstance(agent, Learner):
        raise TypeError(f"{agent.name} has no update that can be captured")
    learner, names = agent, list[str]()

    def learn(rollout: Transition, *schedules: Any) -> Tensor:
        metrics = learner.learn(rollout, *schedules)
        names[:] = metrics
        return torch.stack([x.double() for x in metrics.values()])  # exact for what is counted, too

    captured = Captured(learn, [agent], agent.device)

    def update(rollout: Transition, progress: float) -> dict[str, Tensor]:
        values = captured(rollout, *learner.schedules(progress)).to("cpu", copy=True)
        return dict(zip(names, values.unbind(), strict=True))

    return update


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for branch in tree:
            yield from tensors(branch)


def generators(part: Any) -> Iterator[Generator]:
    """The generators among the attributes of a part of a run, and among those of its parts that have a state."""
    for value in vars(part).values():
        if isinstance(value, Generator):
            yield value
        elif hasattr(value, "state_dict") and not isinstance(value, nn.Module):
            yield from generators(value)
