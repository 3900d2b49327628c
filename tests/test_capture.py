"""Captured rollouts and updates against those that are not, with a stand-in for CUDA graphs, and what may be captured.

The stand-in notes every operation that torch dispatches in a call, and repeats them on the same memory: as in a graph,
no line of Python runs again, nothing moves, and what was a number stays that number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from tests.faults.test_resume import assert_same, equal, outcome
from tests.test_agents import EVERYTHING, FLIPS, ON_POLICY, WORLDS, configure, play
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pgrl
import pgrl.acting
import pgrl.networks
import pgrl.sampling
from pgrl import capture, checkpoint
from pgrl.agents import AGENTS, A2CConfig, Agent, PPOConfig, Setting
from pgrl.agents import on_policy as on_policy_module
from pgrl.agents.on_policy import all_values, values
from pgrl.agents.sac import Temperature
from pgrl.capture import Captured, Learner, Stepper, captured_update, generators, tensors
from pgrl.config import capturing, compose, load_run
from pgrl.data import Rollout, Transition
from pgrl.envs import EnvConfig, make_vec
from pgrl.errors import NonFiniteError, UserError
from pgrl.networks import ActorCritic, Policy
from pgrl.q_networks import Critics, DeterministicPolicy
from pgrl.runs import build, made_with
from pgrl.train import check_finite, collect

CPU = torch.device("cpu")
VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


def asks_for_a_value(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation must know what a tensor holds before the host can go on."""
    name = func.overloadpacket.__name__
    lists = [x for x in args if isinstance(x, list | tuple)]
    masks = [x for part in lists for x in part if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
    return name in VALUES or (name.startswith("index") and bool(masks))


# --------------------------------------------------------------------------------------------------- the stand-in


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for i, argument in enumerate(func._schema.arguments):
        given = kwargs.get(argument.name, args[i] if i < len(args) else None)
        if argument.alias_info is not None and argument.alias_info.is_write and given is not None:
            yield from tensors(given)


class Tape(TorchDispatchMode):
    """The operations of a call; to note them changes nothing that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not asks_for_a_value(func, args), f"{func} cannot be captured"
        self._before += [(x, x.clone()) for x in written(func, args, kwargs)]
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for x, before in reversed(self._before):
            x.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._operations:
            aliases = [x.alias_info for x in func._schema.returns]
            if aliases and all(x is not None and not x.is_write for x in aliases):
                continue  # a view, of memory that is still where it was
            again = func(*args, **kwargs)
            if aliases and all(x is None for x in aliases):
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    old.copy_(new)


def on_tape(call: Callable[[], None], found: Sequence[Generator], device: torch.device) -> Callable[[], object]:
    """`capture.record` with the stand-in."""
    states = [x.get_state() for x in found]
    with Tape() as tape:
        call()
    tape.undo()
    for x, state in zip(found, states, strict=True):
        x.set_state(state)
    return tape.replay


def use_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture on the CPU with the stand-in, and leave nothing to C++, numpy or to what asks for values, as on a GPU."""
    monkeypatch.setattr(capture, "record", on_tape)
    monkeypatch.setattr(Rollout, "put", lambda self, t, action: self._actions[t].copy_(action))
    monkeypatch.setattr("pgrl.sampling.LAYER_LIMIT", 0)
    monkeypatch.setattr("pgrl.sampling.CPP_LAYER_LIMIT", 0)
    monkeypatch.setattr(on_policy_module, "values", lambda net, norm, rollout, _: all_values(net, norm, rollout))


def test_the_stand_in_repeats_operations_and_not_python() -> None:
    x, generator, calls = torch.zeros(3), Generator().manual_seed(1), []

    def call() -> None:
        calls.append(len(calls))
        x.add_(torch.rand(3, generator=generator) + len(calls))

    replay = on_tape(call, [generator], CPU)
    assert calls == [0] and not x.any()
    twin = Generator().manual_seed(1)
    expected = torch.zeros(3)
    for _ in range(3):
        replay()
        expected += torch.rand(3, generator=twin) + 1
        assert torch.equal(x, expected) and calls == [0]
    for asks in (lambda: x[x > 0], lambda: float(x[0]), lambda: x.nonzero(), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="cannot be captured"):
            on_tape(asks, [], CPU)


# ------------------------------------------------------------------------------------------------------------- runs


SHORT = ["env=CartPole-v1", "env.backend=torch", "num_envs=4", "seed=3", "threads=1", "tensorboard=false"]
SHORT += ["env.max_episode_steps=30", "log_every=200", "tuned=null"]
PPO = ["algo=ppo", "algo.num_steps=16", "algo.num_minibatches=4", "algo.update_epochs=3", "total_timesteps=640"]
A2C = ["algo=a2c", "total_timesteps=400"]
NORMS = [f"algo.norm_{what}=true" for what in ("obs", "reward", "value")]
RUNS: dict[str, list[str]] = {
    "ppo": PPO,
    "ppo with everything": [
        *PPO,
        *NORMS,
        "algo.kl_coef=0.3",
        "algo.kl_coef_target=1e-5",
        "algo.adaptive_lr_kl=0.001",
        "algo.recompute_advantages=true",
        "algo.ent_coef=0.01",
        "algo.ent_coef_final=0.001",
        "algo.value_learning_rate=3e-3",
        "algo.clip_grad_per_network=true",
        "algo.anneal_clip=true",
        "algo.dual_clip=2",
    ],
    "ppo pendulum": [*PPO, "env=Pendulum-v1", "algo.network.shared=true", "algo.policy.distribution=beta"],
    "a2c": A2C,
    "a2c with everything": [*A2C, *NORMS, "algo.norm_adv=true", "algo.optimizer=adam", "algo.advantage=gae"],
    "a2c acrobot": [*A2C, "env=Acrobot-v1", "env.max_episode_steps=7", "algo.network.activation=relu"],
}
REPLAY = ["algo.learning_starts=32", "algo.batch_size=8", "algo.buffer_size=200", "algo.network.hidden_sizes=[8]"]
STEPS: dict[str, list[str]] = {
    "sac": ["algo=sac", *REPLAY, "env=Pendulum-v1", "total_timesteps=160", "algo.utd_ratio=1.5"],
    "sac with everything": [
        *["algo=sac", *REPLAY, "env=Pendulum-v1", "total_timesteps=160", "algo.norm_obs=true", "algo.n_step=3"],
        *["algo.per_alpha=0.6", "algo.policy_delay=3", "algo.max_grad_norm=1", "algo.noise_correlation=0.5"],
    ],
    "sac on choices": ["algo=sac", *REPLAY, "total_timesteps=160", "algo.target_entropy=0.2"],
    "ddpg": ["algo=ddpg", *REPLAY, "env=Pendulum-v1", "total_timesteps=160"],
    "td3": [
        *["algo=ddpg", *REPLAY, "env=Pendulum-v1", "total_timesteps=160", "algo.policy_delay=2", "algo.twin=true"],
        *["algo.target_noise=0.2", "algo.per_alpha=0.6"],
    ],
}


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, captured: bool | str, *words: str) -> Path:
    """A run whose `capture` is that on the CPU, too, where no command line allows it."""
    with monkeypatch.context() as patch:
        patch.setattr("pgrl.config.decide_capture", lambda _: (captured, ""))
        words = words if words[0].startswith("resume=") else (*SHORT, *words, f"run_dir={folder}")
        return pgrl.run(list(words))


@pytest.mark.parametrize("how", ["called", "repeated"])
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_captured_run_is_the_run_without(
    words: list[str], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "repeated":
        use_tape(monkeypatch)
    for name, captured in (("plain", False), ("captured", True)):
        run(tmp_path / name, monkeypatch, captured, *words)
    assert_same(tmp_path / "plain", tmp_path / "captured")
    assert len(outcome(tmp_path / "captured")[1]) >= 2 and outcome(tmp_path / "captured")[0]["record"]["recent"]


@pytest.mark.parametrize("part", ["rollout", "update"])
@pytest.mark.parametrize("words", [RUNS["ppo"], RUNS["a2c"]], ids=["ppo", "a2c"])
def test_each_part_can_be_captured_alone(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tape(monkeypatch)
    made: list[str] = []
    record = capture.record
    monkeypatch.setattr(capture, "record", lambda *rest: made.append(part) or record(*rest))  # type: ignore[func-returns-value]
    for name, captured in (("plain", False), ("captured", part)):
        run(tmp_path / name, monkeypatch, captured, *words)
    assert made == ([part, part] if part == "update" else [part])  # acting, too
    assert_same(tmp_path / "plain", tmp_path / "captured")


@pytest.mark.parametrize("algo", ["npg", "trpo", "reinforce"])
def test_rollouts_are_captured_where_updates_are_not(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tape(monkeypatch)
    words = [f"algo={algo}", "algo.num_steps=32", "algo.num_minibatches=2", "algo.update_epochs=1"]
    words += ["total_timesteps=384", "algo.norm_obs=true"]
    for name, captured in (("plain", False), ("captured", "rollout")):
        run(tmp_path / name, monkeypatch, captured, *words)
    assert_same(tmp_path / "plain", tmp_path / "captured")


def test_updates_are_captured_whoever_steps_the_envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tape(monkeypatch)
    for name, captured in (("plain", False), ("captured", "update")):
        run(tmp_path / name, monkeypatch, captured, *PPO, "env.backend=gymnasium", *NORMS)
    assert_same(tmp_path / "plain", tmp_path / "captured")


@pytest.mark.parametrize("how", ["called", "repeated"])
@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_captured_steps_are_those_without(
    words: list[str], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    if how == "repeated":
        use_tape(monkeypatch)
    record = capture.record
    monkeypatch.setattr(capture, "record", lambda *rest: made.append(1) or record(*rest))  # type: ignore[func-returns-value]
    for name, captured in (("plain", False), ("captured", "update")):
        run(tmp_path / name, monkeypatch, captured, *words)
    graphs = 1 + any(word.startswith("algo.policy_delay") for word in words)  # one for each set of flags
    assert len(made) == graphs + (how == "repeated")  # and one for acting, which is numpy's on a CPU otherwise
    assert_same(tmp_path / "plain", tmp_path / "captured")


def forget_the_last_checkpoint(folder: Path) -> int:
    """As if the run had stopped before it; the step of the one that is left."""
    *_, before, last = checkpoint.list_steps(folder)
    shutil.rmtree(checkpoint.folder(folder, last))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    return before


@pytest.mark.parametrize("how", ["called", "repeated"])
@pytest.mark.parametrize("name", ["ppo with everything", "a2c with everything"])
def test_a_captured_run_resumes_bit_for_bit(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "repeated":
        use_tape(monkeypatch)
    words = [*RUNS[name], "save_every=1", "eval_every=150", "eval_episodes=1"]
    whole = run(tmp_path / "whole", monkeypatch, True, *words)
    stopped = run(tmp_path / "stopped", monkeypatch, True, *words)
    before = forget_the_last_checkpoint(stopped)
    run(stopped, monkeypatch, True, f"resume={stopped}")
    assert f"resumed at step {before:,}" in (stopped / "train.log").read_text()
    assert_same(whole, stopped)


def test_what_is_not_finite_is_found_in_a_captured_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tape(monkeypatch)
    with pytest.raises(NonFiniteError, match="the update gave NaN or infinity: losses/"):
        run(tmp_path / "run", monkeypatch, True, *PPO, "algo.learning_rate=1e30")


# ---------------------------------------------------------------------------------------------------------- Captured


class Walk:
    """A part of a run: a place, moved by random steps."""

    def __init__(self) -> None:
        self.place, self.random = torch.zeros(2), Generator().manual_seed(1)

    def move(self, by: Tensor) -> tuple[Tensor, Tensor]:
        self.place += by + torch.rand(2, generator=self.random)
        by.mul_(2.0)
        return self.place * 1.0, by

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place.copy_(state["place"])
        self.random.set_state(state["random"])


@pytest.mark.parametrize("how", ["called", "repeated"])
def test_calls_are_those_of_the_function(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups and the capture leave no trace in state, generators or inputs, which the function may change."""
    if how == "repeated":
        use_tape(monkeypatch)
    ours, theirs = Walk(), Walk()
    captured = Captured(ours.move, [ours], CPU)
    room = None
    for k in range(4):
        mine, given = torch.full((2,), k + 1.0), torch.full((2,), k + 1.0)
        place, by = captured(mine)
        expected, _ = theirs.move(given)
        assert torch.equal(place, expected) and torch.equal(by, given)
        assert equal(ours.state_dict(), theirs.state_dict())
        room = mine if room is None else room
        assert by.data_ptr() == room.data_ptr()


def test_it_warms_up_before_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its capture the function must not do anything for the first time."""
    calls: list[str] = []

    def record(call: Callable[[], None], *_: object) -> Callable[[], None]:
        calls.append("record")
        return call

    monkeypatch.setattr(capture, "record", record)
    captured = Captured(lambda: calls.append("call"), [], CPU)
    captured()
    captured()
    assert calls == ["call"] * capture.WARM_UPS + ["record", "call", "call"] and capture.WARM_UPS >= 1


class Driver:
    """torch.cuda without a GPU: notes what is asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        self.asked: list[str] = []
        self._streams, self._refuses = 0, refuses
        graph = create_autospec(torch.cuda.CUDAGraph, instance=True)
        graph.register_generator_state = lambda _: self.asked.append("register")
        graph.replay = lambda: self.asked.append("replay")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.inside(f"on {stream.name}"))
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream("main"))

    def stream(self, name: str) -> Any:
        wait = lambda other: self.asked.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait)

    def new_stream(self, _: torch.device) -> Any:
        self._streams += 1
        return self.stream(f"side {self._streams}")

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.asked.append(name)
        yield
        self.asked.append(f"no longer {name}")

    @contextmanager
    def capture(self, graph: Any, *, stream: Any) -> Iterator[None]:
        with self.inside(f"capture on {stream.name}"):
            yield
            if self._refuses:
                raise RuntimeError("operation not permitted\nwith advice")


def test_what_cuda_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups on a stream beside the main one, generators before the capture, and then replays alone."""
    driver, walk = Driver(monkeypatch), Walk()
    there = type("There", (Generator,), {"device": torch.device("cuda")})
    walk.random, walk.here = there().manual_seed(1), Generator()  # type: ignore[attr-defined]

    def move(by: Tensor) -> None:
        driver.asked.append("call")
        walk.move(by)

    captured = Captured(move, [walk], torch.device("cuda"))
    captured(torch.ones(2))
    captured(torch.zeros(2))
    warm_up = ["side 1 waits for main", "on side 1", *["call"] * capture.WARM_UPS, "no longer on side 1"]
    warm_up += ["main waits for side 1"]
    assert driver.asked == [
        *warm_up,
        "register",
        "capture on side 2",
        "call",
        "no longer capture on side 2",
        "replay",
        "replay",
    ]


def test_a_graph_that_cuda_refuses_is_one_clear_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, refuses=True)
    with pytest.raises(UserError, match="^capture: CUDA refused a graph: operation not permitted\nUse: capture=false$"):
        Captured(lambda: None, [], torch.device("cuda"))()


def test_metrics_are_read_before_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tape(monkeypatch)
    agent = make(PPOConfig, {})
    update = captured_update(agent)
    first = update(play(agent, "box", seed=1), 0.0)
    kept = {name: float(x) for name, x in first.items()}
    second = update(play(agent, "box", seed=2), 0.1)
    assert {name: float(x) for name, x in first.items()} == kept and first.keys() == second.keys()
    assert all(x.is_cpu and not x.dim() for x in first.values())
    assert (kept["charts/updates"], float(second["charts/updates"])) == (4.0, 8.0)
    assert float(second["charts/learning_rate"]) == pytest.approx(0.9e-2)


def make(cls: type, keys: dict[str, Any], world: str = "box", device: torch.device = CPU) -> Any:
    torch.manual_seed(1)
    setting = Setting(WORLDS[world].obs, WORLDS[world].action, 2, 1, device, env_device=device)
    return AGENTS[cls](configure(cls, keys), setting)


@pytest.mark.parametrize("cls", ON_POLICY)
def test_every_generator_is_registered(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Generator] = []

    class Noted(Generator):
        def __init__(self, *_: object) -> None:
            made.append(self)

    monkeypatch.setattr(torch, "Generator", Noted)
    agent = make(cls, EVERYTHING[cls])
    env = make_vec(EnvConfig("CartPole-v1", backend="torch"), 2, 1)
    found = [*generators(agent), *generators(env)]
    assert found and set(map(id, found)) == set(map(id, made)) and len(found) == len(made)


def test_what_can_be_captured_is_what_the_configuration_says() -> None:
    learners, steppers = (
        {AGENTS[cls].name for cls in AGENTS if isinstance(make(cls, {}), kind)} for kind in (Learner, Stepper)
    )
    assert learners | steppers == set(capturing.LEARN) and learners <= set(capturing.ACT)
    assert not learners & steppers and not steppers & set(capturing.ACT)
    with pytest.raises(TypeError, match="trpo"):
        captured_update(make(next(cls for cls in AGENTS if AGENTS[cls].name == "trpo"), {}))


@pytest.mark.parametrize("cls", [PPOConfig, A2CConfig])
def test_valuing_all_successors_gives_the_values_that_count(cls: type) -> None:
    agent = make(cls, {"norm_value": True})
    rollout = play(agent, "box", seed=3)
    terminated = rollout.terminated
    assert (rollout.truncated & ~terminated).any() and terminated.any()
    value, next_value = values(agent.net, agent.value_norm, rollout, terminated)
    every, every_next = all_values(agent.net, agent.value_norm, rollout)
    torch.testing.assert_close(every, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(every_next[~terminated], next_value[~terminated], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- without the host


class NoHost(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or the device for the host, and what is computed on the host.

    For tensors of the meta device, which hold nothing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not asks_for_a_value(func, args), f"{func} asks for a value"
        on_host = [x for x in args if isinstance(x, Tensor) and x.is_cpu]
        assert not on_host, f"{func} computes with what lies on the host"
        return func(*args, **kwargs)


class NoNumbers(TorchFunctionMode):
    """Refuses to make tensors of Python's numbers, which lie on the host; dispatch does not tell of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} copies from the host"
        return func(*args, **kwargs or {})


class HostGenerator(Generator):
    """Lies in main memory, says that it is on the meta device, and is asked for no state."""

    device = torch.device("meta")

    def __new__(cls, *_: object) -> HostGenerator:
        return super().__new__(cls)


META = torch.device("meta")


def refused(call: Callable[[], Any]) -> str:
    try:
        with NoHost(), NoNumbers():
            call()
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x[x > 0], "asks for a value"),
        (lambda x: float(x[0]), "asks for a value"),
        (lambda x: x.nonzero(), "asks for a value"),
        (lambda x: x.masked_select(x > 0), "asks for a value"),
        (lambda x: x.__setitem__(x > 0, x[0]), "asks for a value"),
        (lambda x: torch.tensor([1.0], device=META), "from the host"),
        (lambda x: x.copy_(torch.zeros(3)), "lies on the host"),
        (lambda x: x * torch.zeros(()), "lies on the host"),
        (lambda x: torch.zeros(3).add_(1), "lies on the host"),
        (lambda x: torch.zeros(3).to(META), "lies on the host"),
        (lambda x: x.masked_fill(x > 0, 1.0) * 2 + x[1], ""),
        (lambda x: torch.where(x > 0, 1.0, x), ""),
    ],
)
def test_the_guard_sees_the_host(call: Callable[[Tensor], Any], words: str) -> None:
    found = refused(lambda: call(torch.zeros(3, device=META)))
    assert words in found and bool(words) == bool(found)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the meta device lacks: generators, networks that can be moved there, Adam's kernel, and a way back."""
    import torch._dynamo  # which torch's operations on meta import, and which needs the true Generator

    units = pgrl.networks.units

    def there(begin: Callable[..., None]) -> Callable[..., None]:
        def begin_there(*rest: Any) -> None:
            with META:
                begin(*rest)

        return begin_there

    def generator(device: torch.device | str = CPU) -> Generator:
        return HostGenerator() if torch.device(device) == META else Generator(device)

    def units_on_host(*rest: Any, **named: Any) -> dict[str, Tensor]:
        with CPU:
            return units(*rest, **named)

    def fused_adam(*lists: list[Tensor], lr: Tensor, grad_scale: Tensor, **_: Any) -> None:
        assert {x.device for x in (*tensors(lists), lr, *([] if grad_scale is None else [grad_scale]))} == {META}

    monkeypatch.setattr(torch, "Generator", generator)
    for cls in (ActorCritic, Policy, DeterministicPolicy, Critics, Temperature):
        monkeypatch.setattr(cls, "__init__", there(cls.__init__))
    for module in ("networks", "q_networks"):
        monkeypatch.setattr(f"pgrl.{module}.units", units_on_host)  # is asked for numbers
    monkeypatch.setattr(torch, "_fused_adam_", fused_adam)
    monkeypatch.setattr(pgrl.acting, "copies", lambda xs: [np.zeros(x.shape, np.float32) for x in xs])


def a_rollout(agent: Agent, world: str) -> Transition:
    spec = WORLDS[world]
    rollout = Rollout(agent.num_steps, 2, spec.obs, spec.action, META)
    return rollout.transition


CASES = [
    pytest.param(cls, {**base, key: value}, world, id=f"{cls.__name__}-{key}-{value}")
    for cls in (PPOConfig, A2CConfig)
    for key, (base, options, world) in FLIPS[cls].items()
    for value in options
    if key != "target_kl"
]
CASES += [
    pytest.param(cls, {}, world, id=f"{cls.__name__}-{world}") for cls in (PPOConfig, A2CConfig) for world in WORLDS
]
CASES += [
    pytest.param(PPOConfig, {**EVERYTHING[PPOConfig], "target_kl": None}, "box", id="ppo-everything"),
    pytest.param(A2CConfig, EVERYTHING[A2CConfig], "discrete", id="a2c-everything"),
]


@pytest.mark.parametrize(("cls", "keys", "world"), CASES)
def test_no_update_asks_the_host(cls: type, keys: dict[str, Any], world: str, on_meta: None) -> None:
    agent = make(cls, keys, world, META)
    rollout = a_rollout(agent, world)
    schedules = agent.schedules(0.5)
    assert refused(lambda: agent.learn(rollout, *schedules)) == ""


def test_the_early_stop_asks_the_host(on_meta: None) -> None:
    agent = make(PPOConfig, {"target_kl": 0.01}, "box", META)
    rollout, schedules = a_rollout(agent, "box"), agent.schedules(0.5)
    assert "asks for a value" in refused(lambda: agent.learn(rollout, *schedules))


@pytest.mark.parametrize("cls", [cls for cls in ON_POLICY if AGENTS[cls].name in capturing.ACT])
@pytest.mark.parametrize("keys", [{}, {"norm_obs": True, "policy.state_dependent_std": True}], ids=["plain", "norm"])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0"])
def test_no_rollout_asks_the_host(name: str, keys: dict[str, Any], cls: type, on_meta: None) -> None:
    env = make_vec(EnvConfig(name, backend="torch"), 2, 1, "meta")
    agent = AGENTS[cls](configure(cls, keys), Setting(env.obs_space, env.action_space, 2, 1, META, env_device=META))
    rollout = Rollout(agent.num_steps, 2, env.obs_space, env.action_space, META)
    obs = env.reset()
    assert refused(lambda: collect(env, agent, rollout, obs, META)) == ""


def test_finite_tensors_are_checked_by_one_value_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def number(x: Tensor) -> float:
        asked.append(x.device)
        return 0.0

    monkeypatch.setattr("pgrl.train.float", number, raising=False)
    check_finite({name: torch.zeros(2, device=META) for name in "abc"} | {"n": torch.zeros(2, dtype=torch.int64)}, "x")
    assert asked == [META]


@pytest.mark.parametrize("activation", ["tanh", "elu"])
@pytest.mark.parametrize("cls", [cls for cls in ON_POLICY if AGENTS[cls].name in capturing.ACT])
def test_rollouts_beside_envs_in_main_memory_go_to_an_agent_elsewhere(
    cls: type, activation: str, on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_vec(EnvConfig("Pendulum-v1"), 2, 1)
    keys = {"norm_obs": True, "network.activation": activation}
    agent = AGENTS[cls](configure(cls, keys), Setting(env.obs_space, env.action_space, 2, 1, META))
    assert agent.act_device == (CPU if activation == "tanh" else META) and agent.device == META
    rollout = Rollout(agent.num_steps, 2, env.obs_space, env.action_space, CPU)
    acted: list[torch.device] = []
    if agent.act_device == META:  # whose actions have no values
        monkeypatch.setattr(rollout, "put", lambda t, a: acted.append(a.device) or rollout._actions[t])
    transition = collect(env, agent, rollout, env.reset(), META)
    assert {x.device for x in transition} == {META}
    assert set(acted) == ({META} if activation == "elu" else set())
    made = made_with(agent)
    assert (made["device"], made["acts on"]) == ("meta", "cpu" if activation == "tanh" else "meta")


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_replay_in_main_memory_and_an_agent_elsewhere_do_not_mix(words: list[str], on_meta: None) -> None:
    """On the meta device operations ask, as on a GPU, that all they take lies there."""
    config = compose([*SHORT, *words, "env.backend=gymnasium", "algo.per_alpha=null"])
    env = make_vec(config.env, config.num_envs, 1)
    agent: Any = AGENTS[type(config.algo)](config.algo, Setting(env.obs_space, env.action_space, 4, 1, META))
    assert agent.update_device == CPU and agent.act_device == CPU and agent.device == META
    rollout = Rollout(1, 4, env.obs_space, env.action_space, CPU)
    obs = env.reset()
    for _ in range(20):
        transition = collect(env, agent, rollout, obs, META)
        obs = rollout.obs[-1].clone()
        metrics = agent.update(transition, 0.0)
    assert {x.device for name, x in metrics.items() if name.startswith("losses/")} == {META}


def test_a_captured_function_refuses_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured(lambda x: x + 1, [], CPU, own_room=True)
    captured(torch.zeros(3))
    with pytest.raises(ValueError, match=r"captured for an input of shape \(3,\), not \(1,\)"):
        captured(torch.zeros(1))


# ---------------------------------------------------------------------------------------------------------- on a GPU


def play_at_random(run: Any, steps: int) -> list[Transition]:
    """Rollouts of one step, by an agent that has learnt nothing yet."""
    env, device, found = run.env, run.agent.device, []
    rollout, obs = Rollout(1, env.num_envs, env.obs_space, env.action_space, env.device), env.reset()
    for _ in range(steps):
        transition = collect(env, run.agent, rollout, obs, device)
        obs = rollout.obs[-1].clone()
        found.append(Transition(*(x.clone() for x in transition)))
    return found


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CUDA_RUNS = {name: [*words, "device=cuda"] for name, words in RUNS.items()}
CUDA_STEPS = {name: [*words, "device=cuda"] for name, words in STEPS.items()}
CUDA_RUNS["ppo of elu"] = [*CUDA_RUNS["ppo"], "algo.network.activation=elu"]  # which acts on the GPU in any case
ON_CPU = {  # with envs, and replay, in main memory
    f"{name}, envs on the cpu": [*words, "env.backend=gymnasium"]
    for name, words in (CUDA_RUNS | CUDA_STEPS).items()
    if name in ("ppo", "ppo of elu", "a2c with everything", *STEPS)
}


@pytest.mark.gpu
@pytest.mark.parametrize("words", CUDA_RUNS.values(), ids=CUDA_RUNS)
def test_on_cuda_graphs_give_what_single_operations_give_and_nobody_waits(words: list[str]) -> None:
    config, device = compose([*SHORT, *words, "capture=false"]), torch.device("cuda")
    ours, twin = build(config), build(config)
    agent: Any = ours.agent
    rollout, other = (
        Rollout(run.agent.num_steps, config.num_envs, run.env.obs_space, run.env.action_space, device)
        for run in (ours, twin)
    )
    gather = Captured(partial(collect, ours.env, agent, rollout, device=device), [agent, ours.env], device)
    learn = Captured(agent.learn, [agent], device)
    obs = ours.env.reset()
    twin.env.reset()
    for i in range(5):
        twin.agent.load_state_dict(agent.state_dict())
        twin.env.load_state_dict(ours.env.state_dict())
        schedules = agent.schedules(i / 5)
        expected = collect(twin.env, twin.agent, other, twin.env.obs(), device)
        with nobody_waits() if i else nullcontext():  # the capture itself waits
            transition = gather(obs)
            metrics = learn(transition, *schedules)
        for x, y in zip(transition, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        told = twin.agent.update(expected, i / 5)
        assert metrics.keys() == told.keys()
        for name in told:
            torch.testing.assert_close(metrics[name].double(), told[name].double(), rtol=1e-3, atol=1e-4)
        for x, y in zip(agent.parameters(), twin.agent.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        for found, right in zip(generators(agent), generators(twin.agent), strict=True):
            assert torch.equal(found.get_state(), right.get_state())
        assert ours.env.episodes()[1:] == twin.env.episodes()[1:]
        obs = rollout.obs[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CUDA_RUNS, *CUDA_STEPS, *ON_CPU])
def test_on_cuda_a_captured_run_repeats_itself_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    words = CUDA_RUNS.get(name) or [*(CUDA_STEPS | ON_CPU)[name], "save_every=32"]
    folders = [tmp_path / folder for folder in ("whole", "again", "stopped")]
    for folder in folders:
        pgrl.run([*SHORT, "save_every=1", *words, "capture=auto", f"run_dir={folder}"])
        assert load_run(folder).capture == ("update" if name in STEPS or "cpu" in name else True)
    forget_the_last_checkpoint(folders[-1])
    pgrl.run([f"resume={folders[-1]}"])
    for folder in folders[1:]:
        assert_same(folders[0], folder)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [*CUDA_STEPS.values(), *[ON_CPU[f"{name}, envs on the cpu"] for name in STEPS]])
def test_on_cuda_captured_steps_give_what_single_operations_give(words: list[str]) -> None:
    compare_steps(words)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CUDA_STEPS)
def test_on_cuda_compiled_steps_can_be_captured_and_give_what_single_operations_give(name: str) -> None:
    large = ["algo.network.hidden_sizes=[256,256]", "algo.batch_size=32"]
    compare_steps([*CUDA_STEPS[name], *large], compiled=True)


def compare_steps(words: list[str], *, compiled: bool = False) -> None:
    """Updates of captured steps, compiled or not, beside those of single operations."""
    ours, twin = (
        build(compose([*SHORT, *words, "capture=false", f"compile={str(how).lower()}"])) for how in (compiled, False)
    )
    update = captured_update(ours.agent)
    for k, transition in enumerate(play_at_random(twin, 10)):
        metrics, told = update(transition, k / 40), twin.agent.update(transition, k / 40)
        assert metrics.keys() == told.keys()
        for name in told:
            torch.testing.assert_close(metrics[name].double().cpu(), told[name].double().cpu(), rtol=1e-2, atol=1e-3)
    assert told["charts/updates"] >= 8
    for x, y in zip(ours.agent.parameters(), twin.agent.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_on_cuda_compiled_steps_can_be_captured(name: str, tmp_path: Path) -> None:
    """Beside an eager run without graphs, for one update: later ones magnify rounding."""
    weights = []
    for how in ("true", "false"):
        words = [*SHORT, *CUDA_RUNS[name], f"capture={how}", f"compile={how}", f"run_dir={tmp_path / how}"]
        config = compose(words)
        folder = pgrl.run([*words, f"total_timesteps={config.algo.num_steps * config.num_envs}"])
        weights.append(torch.cat([p.detach().reshape(-1) for p in pgrl.load(folder).parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=2e-4)


@pytest.mark.gpu
def test_on_cuda_what_cannot_be_captured_is_told() -> None:
    x = torch.zeros(3, device="cuda")
    with pytest.raises(UserError, match="refused a graph(.|\n)*Use: capture=false"):
        capture.record(lambda: print(float(x.sum())), [], x.device)
