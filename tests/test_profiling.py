"""Where the time of a run goes: sections that add up to it, measured without changing it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.faults.test_resume import assert_same

import pgrl
from pgrl import compiling, launch, profiling
from pgrl.logger import read_rows
from pgrl.profiling import Profile
from pgrl.signals import Stop

QUIET = ["tensorboard=false", "threads=1", "log_every=300", "save_every=700", "eval_every=900", "eval_episodes=1"]
RUNS = {
    "ppo": ["algo=ppo", "env=CartPole-v1", "num_envs=4", "algo.num_steps=32", "algo.norm_obs=true"],
    "trpo": ["algo=trpo", "env=CartPole-v1", "num_envs=4", "algo.num_steps=64"],
    "dpg": ["algo=dpg", "env=pgrl/LinearQuadratic-v0"],
    "sac": ["algo=sac", "env=Pendulum-v1", "algo.learning_starts=1850", "algo.per_alpha=0.6", "algo.batch_size=8"]
    + ["algo.network.hidden_sizes=[16]"],
}


def run(folder: Path, *words: str) -> Path:
    return pgrl.run([*words, *QUIET, "total_timesteps=2000", f"run_dir={folder}"])


def read(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """A run's profile.json, and its seconds by section."""
    tree = json.loads((folder / "profile.json").read_text())
    return tree, {line["section"]: line["seconds"] for line in tree["sections"]}


@pytest.mark.parametrize("algo", RUNS)
def test_a_profiled_run_is_the_same_run(algo: str, tmp_path: Path) -> None:
    """Weights, moments, statistics, generators, replay and rows, bit for bit."""
    plain, profiled = run(tmp_path / "plain", *RUNS[algo]), run(tmp_path / "profiled", *RUNS[algo], "profile=true")
    assert_same(plain, profiled)
    assert not list(plain.glob("profile.*"))

    tree, seconds = read(profiled)
    assert sum(line["share"] for line in tree["sections"]) == pytest.approx(1.0, abs=1e-9)
    assert sum(seconds.values()) == pytest.approx(tree["seconds"], rel=1e-9)
    steps = read_rows(profiled)[-1]["step"]
    assert tree["steps"] == steps
    for line in tree["sections"]:
        assert line["us_per_step"] == pytest.approx(1e6 * line["seconds"] / steps)
    expected = {"env", "acting", "rest of collecting", "update", "evaluation", "logging", "saving", "the rest"}
    replay = {"replay: adding", "replay: sampling"}
    assert seconds.keys() == expected | (replay if algo == "sac" else set())


def test_sections_agree_with_the_loop_s_own_times(tmp_path: Path) -> None:
    began = time.perf_counter()
    folder = run(tmp_path / "run", *RUNS["ppo"], "profile=true")
    whole = time.perf_counter() - began
    tree, seconds = read(folder)
    rows = read_rows(folder)
    collecting, updating = (sum(row[tag] for row in rows) for tag in ("time/collect", "time/update"))
    inside = seconds["env"] + seconds["acting"] + seconds["rest of collecting"]
    assert collecting <= inside  # which includes the loop's first lines
    assert updating - seconds["the rest"] <= seconds["update"] <= updating  # the loop's has the check of metrics too
    assert collecting + updating < tree["seconds"] < whole


class Clock:
    """A clock that stands still but where a part of the run takes its time."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float, then: Callable[[], object] = lambda: None) -> Callable[..., str]:
        def method(*_: Any, **__: Any) -> str:
            self.now += seconds
            then()
            return "an answer"

        return method


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run's parts that take known seconds."""
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    buffer = SimpleNamespace(add=clock.takes(1.0), sample=clock.takes(2.0), update_priorities=clock.takes(4.0))
    agent = SimpleNamespace(buffer=buffer, act=clock.takes(8.0))
    agent.update = clock.takes(16.0, lambda: (buffer.add(), buffer.sample(), buffer.update_priorities()))
    run = SimpleNamespace(agent=agent, env=SimpleNamespace(step=clock.takes(32.0)), position=SimpleNamespace(step=500))
    upkeep = SimpleNamespace(
        evaluate=clock.takes(64.0, lambda: agent.act()),
        log=clock.takes(128.0),
        snapshot=clock.takes(256.0),
        save=clock.takes(512.0),
    )

    def due() -> None:
        for what in (upkeep.evaluate, upkeep.log, upkeep.snapshot, upkeep.save):
            what()

    upkeep.tend = clock.takes(1024.0, due)
    return SimpleNamespace(clock=clock, agent=agent, run=run, upkeep=upkeep)


def iterate(parts: SimpleNamespace, rounds: int = 1) -> None:
    for _ in range(rounds):
        parts.clock.now += 0.25  # before, between and after the two
        assert parts.agent.act() == parts.run.env.step() == "an answer"
        parts.clock.now += 0.25
        parts.agent.update()
        parts.clock.now += 0.125
        parts.run.position.step += 10
        parts.upkeep.tend()


def test_sections_are_exclusive(parts: SimpleNamespace) -> None:
    profile = Profile(parts.run, parts.upkeep, compiled=False)
    with profile:
        iterate(parts, rounds=2)
        parts.clock.now += 0.5
    parts.clock.now += 1e6  # is of the run no more
    expected = {"acting": 8.0, "env": 32.0, "rest of collecting": 0.5 + 0.25, "update": 16.0, "replay: adding": 1.0}
    expected |= {"replay: sampling": 2.0 + 4.0, "evaluation": 64.0 + 8.0, "logging": 128.0, "saving": 256.0 + 512.0}
    expected |= {"the rest": 1024.0 + 0.125}
    assert {line.section: line.seconds for line in profile.lines()} == {k: 2 * v for k, v in expected.items()}
    assert profile.steps == 20
    whole = 2 * sum(expected.values())
    assert profile.seconds == whole
    acting = next(line for line in profile.lines() if line.section == "acting")
    assert acting.share == 16.0 / whole and acting.us_per_step == 16e6 / 20


def test_a_stopped_run_is_profiled_until_it_stops(parts: SimpleNamespace, tmp_path: Path) -> None:
    def strikes() -> None:
        raise Stop(15)

    parts.agent.buffer.add = parts.clock.takes(3.0, strikes)
    profile = Profile(parts.run, parts.upkeep, compiled=False)
    with pytest.raises(Stop), profile:
        try:
            iterate(parts)
        except Stop:
            parts.upkeep.save()
            raise
    seconds = {line.section: line.seconds for line in profile.lines()}
    assert seconds["replay: adding"] == 3.0 and seconds["saving"] == 512.0 and "replay: sampling" not in seconds
    assert profile.steps == 0  # of whole iterations
    assert "-" in profile.table() and json.dumps(profile.lines()).count("null") == len(seconds)
    profile.write(tmp_path, "a run")


def test_the_compiler_has_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what compiled steps say of their compilation, whoever compiles them."""

    class Learner:
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + 1

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: graph)
    compiled = compiling.compile_step(Learner().step)
    agent = SimpleNamespace(act=lambda: None, update=lambda: compiled(torch.ones(3)))
    upkeep = SimpleNamespace(**dict.fromkeys(("tend", "evaluate", "log", "snapshot", "save"), lambda: None))
    run = SimpleNamespace(agent=agent, env=SimpleNamespace(step=lambda: None), position=SimpleNamespace(step=0))

    def taken() -> dict[str, float]:
        profile = Profile(run, upkeep, compiled=True)  # type: ignore[arg-type]
        with profile:
            run.agent.update()
        return {line.section: line.seconds for line in profile.lines()}

    first, later = taken(), taken()
    assert first["compiler"] > 0.0 and first["update"] > 0.0
    assert "compiler" not in later and later["update"] > 0.0
    from torch._dynamo.callback import callback_handler

    assert not callback_handler.start_callbacks and not callback_handler.end_callbacks


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = run(tmp_path / "run", *RUNS["ppo"], "profile=true")
    out = capsys.readouterr().out
    for line in read(folder)[0]["sections"]:
        row = next(text for text in out.splitlines() if text.startswith(line["section"] + " "))
        assert row.split()[-3:] == [
            f"{line['seconds']:.3f}",
            f"{line['share']:.1%}",
            f"{line['us_per_step']:,.1f}",
        ]
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert out.index("where the time went") < out.index("next:")


def test_without_matplotlib_the_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*(name for name in sys.modules if name.startswith("matplotlib.")), "matplotlib.figure", "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    folder = run(tmp_path / "run", *RUNS["ppo"], "profile=true")
    assert read(folder)[1] and not (folder / "profile.png").exists()
    out = capsys.readouterr().out
    assert "where the time went" in out and "pip install matplotlib" in out


def test_without_the_key_nothing_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "Profile", pytest.fail)
    run(tmp_path / "run", *RUNS["ppo"])


def test_resume_may_be_given_profile(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *RUNS["ppo"])
    pgrl.run([f"resume={folder}", "total_timesteps=3000", "profile=true"])
    tree, _ = read(folder)
    assert tree["steps"] == 2944 - 1920  # those of this process
    (folder / "profile.json").unlink()
    pgrl.run([f"resume={folder}", "total_timesteps=4000", "profile=false"])
    assert not (folder / "profile.json").exists()
