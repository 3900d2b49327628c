"""The benchmark runner's resuming with a fake trainer, the statistics against brute force, and the tables."""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from pgrl.errors import UserError
from pgrl.evaluate import bootstrap_interval, iqm
from pgrl.files import lock
from pgrl.native import compilers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
benchmark: Any = importlib.import_module("benchmark")
bench_peers: Any = importlib.import_module("bench_peers")
bench_acting: Any = importlib.import_module("bench_acting")
bench_compile: Any = importlib.import_module("bench_compile")
bench_fisher: Any = importlib.import_module("bench_fisher")
bench_gpu: Any = importlib.import_module("bench_gpu")
bench_growth: Any = importlib.import_module("bench_growth")
bench_score: Any = importlib.import_module("bench_score")
bench_updates: Any = importlib.import_module("bench_updates")
reinforce_baselines: Any = importlib.import_module("reinforce_baselines")
plot_curves: Any = importlib.import_module("plot_curves")

FAKE = """
import json, os, pathlib, signal, sys, time
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
here = pathlib.Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if "run" in options:
    run = pathlib.Path(options["run"])
    (run / "evaluation.json").write_text(json.dumps({"return_mean": 90.0, "return_std": 1.0}))
    sys.exit(0)
run = pathlib.Path(options.get("resume") or options["run_dir"])
run.mkdir(parents=True, exist_ok="resume" in options)
mode = (here / "mode.txt").read_text()
def end(state, code):
    (run / "checkpoints" / "step_000000000050").mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "step": 50}))
    os._exit(code)
signal.signal(signal.SIGTERM, lambda *_: end("stopped", 143))
signal.signal(signal.SIGINT, lambda *_: end("stopped", 130))
with open(run / "metrics.jsonl", "a") as file:
    for step in (50, 100):
        file.write(json.dumps({"step": step, "time": step / 10, "charts/episodic_return": float(step),
                               "charts/episodic_return_100": float(step)}) + "\\n")
if mode == "wait":
    (here / f"ready_{options['seed']}").touch()
    time.sleep(60)
end("failed", 1) if mode == "fail" else end("done", 0)
"""


class Bench:
    """The benchmark script with a fake trainer in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake.py").write_text(FAKE)
        self.mode("done")

    def mode(self, mode: str) -> None:
        (self.folder / "mode.txt").write_text(mode)

    def __call__(self, *arguments: str) -> int:
        code: int = benchmark.main(
            [
                *arguments,
                "--runs",
                str(self.runs),
                "--results",
                str(self.folder / "results"),
                "--pictures",
                str(self.folder / "pictures"),
            ]
        )
        return code

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def calls(self) -> list[str]:
        """The children started since the last look, sorted."""
        path = self.folder / "calls.txt"
        lines = sorted(path.read_text().splitlines()) if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    command = [sys.executable, "-I", "-S", str(tmp_path / "fake.py")]
    monkeypatch.setattr(benchmark, "TRAIN", command)
    monkeypatch.setattr(benchmark, "EVALUATE", command)
    monkeypatch.setattr(benchmark, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "plot_suite", lambda *_: None)
    monkeypatch.setattr(benchmark, "plot_grid", lambda *_: None)
    monkeypatch.setattr(benchmark, "provenance", lambda: {"version": "0", "commit": "abc", "machine": "one"})
    yield Bench(tmp_path)


def test_done_runs_are_evaluated_once_and_then_left_alone(bench: Bench) -> None:
    assert bench("ppo-hopper", "--seeds", "3") == 0
    calls = bench.calls()
    assert len(calls) == 6 and sum(call.startswith("run=") for call in calls) == 3
    assert calls[0] == (
        "algo=ppo env=Hopper-v4 total_timesteps=1000000 seed=1 threads=1 "
        f"run_dir={bench.runs / 'ppo-hopper' / 'seed_1'} compile=true"
    )
    rows = benchmark.read_csv(bench.folder / "results" / "ppo-hopper.csv")
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert rows[0] | {"seed": ""} == {
        "suite": "ppo-hopper",
        "algo": "ppo",
        "env": "Hopper-v4",
        "seed": "",
        "steps": "100",
        "eval_mean": "90.00",
        "eval_std": "1.00",
        "train_return_100": "100.00",
        "sps": "10",
        "seconds": "10.0",
        "version": "0",
        "commit": "abc",
        "machine": "one",
    }
    assert bench("ppo-hopper", "--seeds", "4") == 0
    assert len(bench.calls()) == 2  # seed 4: trained and evaluated
    assert bench("--report") == 0
    assert bench.calls() == []
    assert "| ppo-hopper | Hopper-v4 | 1,000,000 | 4 |" in (bench.folder / "results" / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_children_and_the_next_call_resumes(bench: Bench, number: signal.Signals) -> None:
    bench.mode("wait")

    def interrupt() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until and not all((bench.folder / f"ready_{seed}").exists() for seed in (1, 2)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    handler = signal.getsignal(number)
    assert bench("ppo-hopper", "--seeds", "3", "--jobs", "2") == 128 + number
    thread.join()
    assert signal.getsignal(number) is handler
    assert len(bench.calls()) == 2  # the third was not started
    folder = bench.runs / "ppo-hopper"
    assert [json.loads((folder / f"seed_{seed}" / "status.json").read_text())["state"] for seed in (1, 2)] == [
        "stopped"
    ] * 2

    bench.mode("done")
    assert bench("ppo-hopper", "--seeds", "3") == 0
    resumed = [call for call in bench.calls() if call.startswith("resume=")]
    assert resumed == [f"resume={folder / 'seed_1'}", f"resume={folder / 'seed_2'}"]


def test_failed_runs_are_reported_and_continued_only_on_demand(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.mode("fail")
    assert bench("a2c-cartpole", "--seeds", "1") == 1
    assert "a2c-cartpole seed 1: failed" in capsys.readouterr().out
    bench.mode("done")
    bench.calls()
    assert bench("a2c-cartpole", "--seeds", "1") == 1
    assert bench.calls() == []
    assert bench("a2c-cartpole", "--seeds", "1", "--retry") == 0
    assert [call.partition("=")[0] for call in bench.calls()] == ["resume", "run"]


def test_a_run_without_a_checkpoint_starts_afresh_unless_someone_works_on_it(bench: Bench) -> None:
    run_dir = bench.runs / "a2c-cartpole" / "seed_1"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text('{"state": "running", "step": 0}')
    with lock(run_dir):
        assert bench("a2c-cartpole", "--seeds", "1") == 1
    assert bench.calls() == [] and (run_dir / "status.json").exists()
    assert bench("a2c-cartpole", "--seeds", "1") == 0
    assert [call.partition("=")[0] for call in bench.calls()] == ["algo", "run"]


def test_trials_are_kept_apart_and_configurations_are_not_mixed(bench: Bench) -> None:
    trial = ("ppo-hopper", "--seeds", "1", "--name", "quick")
    assert bench(*trial, "--extra", "algo.learning_rate=1e-3", "--extra", "num_envs=8") == 0
    assert bench.calls()[0].endswith("algo.learning_rate=1e-3 num_envs=8")
    assert (bench.folder / "results" / "trials" / "quick.csv").exists()
    assert not (bench.folder / "results" / "table.md").exists()
    assert bench(*trial, "--extra", "algo.learning_rate=2e-3") == 2
    for wrong in (
        ["nonsense"],
        ["--extra", "a=1"],
        ["ppo-hopper", "--name", "x"],
        ["ppo-*", "--extra", "a=1", "--name", "x"],
    ):
        assert bench(*wrong) == 2
    assert bench.calls() == []
    [short] = benchmark.choose(["ppo-hopper"], ["total_timesteps=5_000", "num_envs=8"], "short")
    assert (short.total_timesteps, short.extra) == (5000, ("num_envs=8",))
    with pytest.raises(UserError, match="ppo-cartpole"):
        benchmark.choose(["nonsense"], [], None)
    assert len(benchmark.choose(["a2c-*", "ppo-hopper"], [], None)) == 3


def test_the_last_row_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert benchmark.last_row(path) == {}
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "ti')
    assert benchmark.last_row(path) == {"step": 2}
    assert benchmark.last_row(path, tail=20) == {}  # no whole row in the tail


def test_the_target_is_for_the_mean_or_for_the_worst_seed() -> None:
    rows = [{"eval_mean": f"{score}", "train_return_100": "400", "sps": "10"} for score in (500, 500, 400, 500)]
    suite = benchmark.Suite("x", "ppo", "CartPole-v1", 100, target=450, reference=1, source="y")
    assert "| 475.0 ± 50.0 |" in benchmark.table_line(suite, rows) and "| yes |" in benchmark.table_line(suite, rows)
    assert "| **no** |" in benchmark.table_line(benchmark.replace(suite, every_seed=True), rows)


# ------------------------------------------------------------------------------------------------- statistics


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    random = np.random.default_rng(0)
    for n in range(1, 21):
        x = random.normal(size=n)
        assert iqm(x.tolist()) == pytest.approx(np.mean(np.sort(np.repeat(x, 4))[n : 3 * n]))


@pytest.mark.parametrize("statistic", [iqm, lambda x: float(np.mean(x))], ids=["iqm", "mean"])
def test_the_bootstrap_interval_is_that_of_all_resamples(statistic: Callable[[Any], float]) -> None:
    x = [0.0, 1.0, 3.0, 7.0]
    every = np.array([statistic(list(sample)) for sample in itertools.product(x, repeat=4)])
    low, high = bootstrap_interval(x, statistic)
    for bound, quantile in ((low, 0.025), (high, 0.975)):
        assert np.mean(every < bound - 1e-9) <= quantile + 0.015
        assert np.mean(every <= bound + 1e-9) >= quantile - 0.015


def test_the_band_is_the_bootstrap_interval_at_every_point() -> None:
    curves = np.random.default_rng(1).normal(size=(3, 5))
    low, high = plot_curves.bootstrap_band(curves, n=20_000)
    every = np.array([curves[list(chosen)].mean(axis=0) for chosen in itertools.product(range(3), repeat=3)])
    for bound, quantile in ((low, 0.025), (high, 0.975)):
        assert (np.mean(every < bound - 1e-9, axis=0) <= quantile + 0.01).all()
        assert (np.mean(every <= bound + 1e-9, axis=0) >= quantile - 0.01).all()


def test_binned_returns_are_the_means_in_each_bin() -> None:
    random = np.random.default_rng(2)
    steps = np.sort(random.choice(np.arange(201, 1001), 400, replace=False))  # the first episode ends after bin 2 of 10
    rows: list[dict[str, Any]] = [{"step": int(step), "charts/episodic_return": float(step) ** 2} for step in steps]
    rows += [{"step": 150, "charts/SPS": 1.0}, {"step": 160, "charts/episodic_return": "nan"}]
    binned = plot_curves.bin_returns(rows, total=1000, bins=10)
    assert np.isnan(binned[:2]).all()
    for i in range(2, 10):
        inside = [float(step) ** 2 for step in steps if 100 * i < step <= 100 * (i + 1)]
        assert binned[i] == pytest.approx(np.mean(inside))
    gap = plot_curves.bin_returns(
        [{"step": 100, "charts/episodic_return": 0.0}, {"step": 305, "charts/episodic_return": 3.0}],
        total=400,
        bins=4,
    )
    assert gap == pytest.approx([0, 1, 2, 3])
    assert np.isnan(plot_curves.bin_returns([], total=400, bins=4)).all()


# ------------------------------------------------------------------------------------------------------ peers


def measurement(sps: float, gradient_steps: float = 8) -> dict[str, float]:
    return {
        "iterations": 4,
        "env_steps": 400,
        "gradient_steps": gradient_steps,
        "sps": sps,
        "steps_per_cpu_second": sps,
        "return": 100,
        "memory_mb": 300,
    }


def test_pairs_alternate_and_unequal_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ["".join(side[1] for side in pair) for pair in bench_peers.order(4)] == ["ge", "eg", "ge", "eg"]
    seen: list[str] = []

    def child(side: str, workload: Any, seed: int, setup: Any, python: str) -> dict[str, float]:
        seen.append(side)
        assert setup == setups[side] and python == sys.executable
        return measurement(300 if side == "pgrl" else 100)

    monkeypatch.setattr(bench_peers, "child", child)
    setups = {"pgrl": bench_peers.Setup(2), "peer": bench_peers.Setup(1, 8)}
    pairs = bench_peers.compare(bench_peers.WORKLOADS[0], 2, setups)
    assert seen == ["pgrl", "peer", "peer", "pgrl"]
    assert bench_peers.summary(pairs)["ratio"] == 3 and bench_peers.summary(pairs)["interval"] == (3, 3)
    monkeypatch.setattr(bench_peers, "child", lambda side, *_: measurement(1, 8 if side == "pgrl" else 9))
    with pytest.raises(RuntimeError, match="gradient_steps"):
        bench_peers.compare(bench_peers.WORKLOADS[0], 1, setups)
    assert bench_peers.compare(bench_peers.find("random-halfcheetah-8"), 1, setups)  # one side takes none


def test_only_the_peer_runs_in_the_other_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps(measurement(1)), "")

    monkeypatch.setattr(subprocess, "run", ran)
    setups = dict.fromkeys(("pgrl", "peer"), bench_peers.Setup(1))
    bench_peers.compare(bench_peers.find("ppo-halfcheetah-8-tianshou"), 2, setups, "elsewhere/bin/python")
    by_side = [(command[3], command[0]) for command in asked]
    assert by_side == [
        ("pgrl", sys.executable),
        ("peer", "elsewhere/bin/python"),
        ("peer", "elsewhere/bin/python"),
        ("pgrl", sys.executable),
    ]


def test_versions_of_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "python"
    other.write_text('#!/bin/sh\necho \'{"torch": "0.1", "tianshou": "2.0.1"}\'\n')
    other.chmod(0o755)
    machine = bench_peers.machine(str(other))
    assert machine["torch"].endswith(" / 0.1") and machine["tianshou"] == "2.0.1"
    assert machine["gymnasium"] == bench_peers.versions()["gymnasium"]
    names = {w.name for w in bench_peers.WORKLOADS if bench_peers.installed(w, str(other))}
    assert names == {w.name for w in bench_peers.WORKLOADS if w.library in ("pgrl", "tianshou")}
    monkeypatch.setattr(bench_peers, "child", lambda *_: measurement(1))
    results = ["--results", str(tmp_path), "--starts", "0"]
    with pytest.raises(SystemExit, match="pip install torchrl"):
        bench_peers.main(["sac-halfcheetah-torchrl", "--python", str(other), *results])


def test_random_actions_take_the_steps_of_the_training() -> None:
    pytest.importorskip("mujoco")
    workload = bench_peers.replace(bench_peers.find("random-halfcheetah-8"), iterations=4)
    measured = bench_peers.child("peer", workload, 1, bench_peers.Setup(1))
    assert measured["env_steps"] == workload.total_timesteps == 4 * 2048 and measured["gradient_steps"] == 0
    assert measured["sps"] > 500 and -800 < measured["return"] < 0  # of whole episodes of 1,000 steps


def test_each_side_has_the_setup_that_it_is_faster_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgrl.processor.cores", lambda: 4)
    speeds = {("pgrl", 1, 1): 100, ("pgrl", 4, 1): 300, ("pgrl", 1, 4): 400}
    speeds |= {("peer", 1, 1): 100, ("peer", 4, 1): 50, ("peer", 1, 8): 70}
    monkeypatch.setattr(bench_peers, "child", lambda side, _, __, setup, ___: measurement(speeds[side, *setup]))

    def better(name: str, threads: int | None = None) -> list[tuple[int, int]]:
        return [bench_peers.better_setup(bench_peers.find(name), side, threads) for side in ("pgrl", "peer")]

    assert better("ppo-halfcheetah-1") == [(4, 1), (1, 1)]
    assert better("ppo-halfcheetah-8") == [(1, 4), (1, 1)]
    assert better("ppo-halfcheetah-8", threads=1) == [(1, 4), (1, 1)]
    assert better("ppo-halfcheetah-1", threads=2) == [(2, 1), (2, 1)]  # nothing to compare
    assert better("ppo-halfcheetah-8-tianshou", threads=1) == [(1, 1), (1, 1)]


def test_the_first_two_iterations_are_dropped() -> None:
    stamps = bench_peers.Stamps()
    stamps.rows = [(100, 2, 50.0, 50.0), (200, 4, 60.0, 55.0), (300, 6, 61.0, 56.0), (400, 8, 62.0, 57.5)]
    result = stamps.result(1.0)
    assert result["sps"] == pytest.approx(100) and result["steps_per_cpu_second"] == pytest.approx(80)
    assert (result["iterations"], result["env_steps"], result["gradient_steps"]) == (4, 400, 8)
    assert 1 < result["memory_mb"] < 100_000


def test_an_agents_update_is_stamped_with_the_steps_of_its_rollout() -> None:
    class Rollout:
        reward = torch.zeros(5, 8)

    stamps = bench_peers.Stamps()
    counts = itertools.count(16, 16)
    update = bench_peers.stamped(lambda *_, **__: {"charts/updates": torch.tensor(next(counts))}, stamps)
    update(None, Rollout(), 0.5)
    assert update(None, Rollout(), progress=0.6) == {"charts/updates": 32}
    assert [(row[0], int(row[1])) for row in stamps.rows] == [(40, 16), (80, 32)]


@pytest.mark.peers
@pytest.mark.parametrize("workload", bench_peers.WORKLOADS, ids=lambda workload: workload.name)
def test_both_sides_of_every_workload_do_equal_work(workload: Any) -> None:
    python = os.environ.get("PEER_PYTHON", sys.executable)  # of an environment with Tianshou or TorchRL
    if not bench_peers.installed(workload, python):
        pytest.skip(f"{workload.library} is not installed")
    small = bench_peers.replace(workload, iterations=min(4, 4000 // workload.num_steps))
    both = [bench_peers.Setup(1), bench_peers.Setup(1, 2)] if workload.shared_out else [bench_peers.Setup(1)]
    pairs = [bench_peers.compare(small, 1, dict.fromkeys(bench_peers.SIDES, setup), python)[0] for setup in both]
    pair = pairs[0]
    assert all(p["pgrl"]["return"] == pair["pgrl"]["return"] for p in pairs)
    assert pair["pgrl"]["env_steps"] == small.total_timesteps
    limit = 700 if "buffer_size" in workload.pgrl and "compile=true" in workload.pgrl else 500  # replay and compiler
    assert pair["pgrl"]["sps"] > 0 and pair["pgrl"]["memory_mb"] < limit


def test_tables_and_pictures_of_what_was_measured(tmp_path: Path) -> None:
    names = [workload.name for workload in bench_peers.WORKLOADS[:2]]
    pairs = [{"pgrl": measurement(3000 + i), "peer": measurement(1000)} for i in range(5)]
    results = {
        "workloads": {
            name: {"pairs": pairs, "setups": {"pgrl": (2, 1), "peer": (1, 8)}, "machine": {"cpu": f"2 x {name}"}}
            for name in names
        },
        "starts": [3.0, 2.0, 2.5],
    }
    text = bench_peers.table(results)
    assert "| 3,002 / 1,000 | **3.00** [3.00, 3.00] | 5 | 2 / 1 x 8 |" in text and f"\nB: cpu 2 x {names[1]}\n" in text
    assert "3.0 s to its first env step" in text
    pytest.importorskip("matplotlib")
    bench_peers.plot(results, tmp_path / "peers.png")
    steps = np.linspace(1, 100, 20)
    returns = np.vstack([np.log(steps), np.sqrt(steps)])
    returns[:, :2] = math.nan
    curves = plot_curves.Curves("PPO", steps, returns, np.array([5.0, 9.0]), 8.0)
    plot_curves.plot_grid([curves, curves], tmp_path / "grid.png", columns=1)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("peers", "grid"))


# ----------------------------------------------------------------------------------------------- time to score


class Counting:
    """An env whose episodes last `length` steps of reward `worth`, and which notes its seeds and actions."""

    def __init__(self, length: int, worth: float) -> None:
        self.length, self.worth = length, worth
        self.seeds: list[int] = []
        self.actions: list[float] = []
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.left = self.length
        return np.zeros(3, np.float64), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(float(action[0]))
        self.left -= 1
        assert self.left >= 0  # what has ended is left alone
        return np.ones(3, np.float64), self.worth, self.left == 0 and self.worth > 0, self.left == 0, {}


def test_a_check_plays_the_same_whole_episodes_each_time() -> None:
    envs = [Counting(length, worth) for length, worth in ((2, 1.0), (5, -2.0), (3, 4.0))]
    shapes = set()

    def act(obs: Any) -> Any:
        shapes.add((obs.shape, obs.dtype))
        return np.full((len(obs), 1), 7.0)

    assert [bench_score.play(envs, act) for _ in range(2)] == [pytest.approx((2 - 10 + 12) / 3)] * 2
    assert shapes == {((3, 3), np.dtype(np.float32))} and envs[0].seeds == [bench_score.FIRST_EPISODE] * 2
    assert envs[2].seeds[0] == bench_score.FIRST_EPISODE + 2 and set(envs[1].actions) == {1.0}  # within bounds


def test_checks_come_at_the_same_steps_and_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 2.0, 10.0])
    monkeypatch.setattr(bench_score, "play", lambda *_: next(scores))
    task = bench_score.replace(bench_score.find("cartpole"), score=9, every=100, steps=1000)
    check = bench_score.Checks(task, time.monotonic() - 3)
    for step in (64, 128, 192, 256):
        check(step, None)
    with pytest.raises(bench_score.Over):
        check(320, None)
    result = check.result()
    assert [row[0] for row in result["checks"]] == [128, 256, 320] and result["reached"]
    assert result["steps"] == 320 and 3 < result["seconds"] < 20 and result["score"] == 10

    monkeypatch.setattr(bench_score, "play", lambda *_: 1.0)
    late = bench_score.Checks(task, time.monotonic() - 2 * task.seconds)
    with pytest.raises(bench_score.Over):
        late(100, None)
    assert late.result()["seconds"] == task.seconds and not late.result()["reached"]
    stopped = bench_score.Checks(task, time.monotonic())
    stopped(999, None)
    with pytest.raises(bench_score.Over):
        stopped(1000, None)
    monkeypatch.setattr(bench_score, "play", lambda *_: 10.0)
    too_late = bench_score.Checks(task, time.monotonic() - 2 * task.seconds)
    with pytest.raises(bench_score.Over):
        too_late(100, None)
    assert not too_late.result()["reached"]  # it holds the score, after the limit
    assert bench_score.Checks(task, 0.0).result()["seconds"] == task.seconds  # it was never checked


class Scores:
    """The script of times to a score with a fake measurement, whose seconds are ten times the seed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[str] = []
        monkeypatch.setattr(bench_score, "measure", self.measure)

    def measure(self, task: Any, side: str, seed: int) -> dict[str, Any]:
        self.asked.append(f"{task.name} {side} {seed} {task.threads_of(side)}")
        reached = side == "pgrl" or seed > 1
        seconds = 10.0 * seed * (1 if side == "pgrl" else 3) if reached else task.seconds
        return {"reached": reached, "seconds": seconds, "steps": 4096, "score": task.score, "checks": []}

    def __call__(self, *arguments: str) -> list[str]:
        """What was asked for by a call of the script."""
        self.asked.clear()
        folders = ["--results", str(self.folder), "--pictures", str(self.folder)]
        assert bench_score.main([*arguments, *folders]) == 0
        return list(self.asked)


def test_times_to_a_score_are_measured_in_turns_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    scores = Scores(tmp_path, monkeypatch)
    once = ["cartpole pgrl 1 1", "cartpole peer 1 1", "cartpole peer 2 1", "cartpole pgrl 2 1"]
    assert scores("--only", "cartpole", "--seeds", "2") == once
    path = tmp_path / "scores.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rstrip().rindex("\n") + 20])  # its writer died within the last line
    assert scores("--only", "cartpole", "--seeds", "2") == once[-1:]
    assert scores("--only", "cartpole", "--seeds", "3") == ["cartpole pgrl 3 1", "cartpole peer 3 1"]
    assert scores("--only", "cartpole", "--seeds", "3") == [] == scores("--report")
    assert scores("--only", "cartpole", "--seeds", "1", "--threads", "2") == ["cartpole pgrl 1 2", "cartpole peer 1 2"]
    assert scores("--only", "cartpole", "--seeds", "1", "--ours", "algo=a2c") == ["cartpole pgrl 1 1"]

    assert scores("--report", "--seeds", "3") == []
    table = (tmp_path / "scores.md").read_text()
    assert "| 20.0 [10.0, 30.0] | 90.0 [60.0, 120.0] | **4.50** | 4,096 / 4,096 | 3 of 3 / 2 of 3 | 1 / 1 |" in table
    assert table.count("| CartPole-v1 |") == 1 and "Pendulum" not in table and table.count("cpu ") == 1
    assert (tmp_path / "score.png").stat().st_size > 5000


def test_a_median_of_runs_that_failed_is_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    scores = Scores(tmp_path, monkeypatch)
    scores("--only", "pendulum", "--seeds", "1")
    table = (tmp_path / "scores.md").read_text()
    assert "| 10.0 [10.0, 10.0] | > 300.0 [300.0, 300.0] | – |" in table and "| 1 of 1 / 0 of 1 |" in table


def tiny(name: str) -> Any:
    """A task that any policy has done at its second check."""
    task = bench_score.find(name)
    easy = {"cartpole": 1.0, "pendulum": -3000.0, "halfcheetah": -5000.0}[name]
    return bench_score.replace(task, score=easy, every=1024, steps=50_000, seconds=100)


def test_pgrl_trains_to_a_score_in_a_fresh_process() -> None:
    result = bench_score.measure(tiny("cartpole"), "pgrl", 1)
    assert result["reached"] and result["steps"] == 1024 and len(result["checks"]) == 1
    assert 0.5 < result["seconds"] < 100 and 1 <= result["score"] <= 500


@pytest.mark.peers
@pytest.mark.parametrize("side", bench_score.SIDES)
@pytest.mark.parametrize("name", [task.name for task in bench_score.TASKS])
def test_both_sides_train_to_a_score(name: str, side: str) -> None:
    result = bench_score.measure(tiny(name), side, 1)
    assert result["reached"] and result["seconds"] < 100 and -5000 < result["score"] <= 500


# ------------------------------------------------------------------------------------------- Fisher, baselines


def test_updates_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def fresh_process(arguments: list[str], threads: int, variables: dict[str, str]) -> dict[str, float]:
        assert variables == ({"PGRL_MKL_AVX512": "0"} if "plain" in arguments[3] else {})
        asked.append(arguments[2:5])
        return {"gradient": 4.0, "whole": 5.0, "floor": 2.0}

    monkeypatch.setattr(bench_peers, "fresh_process", fresh_process)
    assert bench_updates.main(["sac", "--threads", "1", "--rounds", "2"]) == 0
    assert asked == [["sac", way, "1"] for way in bench_updates.WAYS] * 2
    assert "| sac | eager | 1 | 5.00 | 4.00 | 20.0% | 2.00 | 2.00 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("algo", bench_updates.ALGOS)
def test_an_update_takes_longer_than_its_floor(algo: str) -> None:
    measured = bench_peers.fresh_process([bench_updates.__file__, "--child", algo, "eager", "1", "20"], 1)
    assert 0 < measured["floor"] < measured["gradient"] < measured["whole"]


def test_what_repays_a_compilation() -> None:
    eager = [{"compiler": 0.0, "update": 0.32, "steps": 320.0}]
    cold, warm = ([{"compiler": c, "update": 0.16, "steps": 320.0}] for c in (10.0, 2.0))
    line = bench_compile.line("ppo", {"eager": eager, "cold": cold, "warm": warm})
    assert line == "| ppo | 10.0 | 2.0 | 1.00 | 0.50 | 2.00 | 20,000 | 4,000 |"
    slower = [{"compiler": 10.0, "update": 0.64, "steps": 320.0}]
    assert "| never | never |" in bench_compile.line("ppo", {"eager": eager, "cold": slower, "warm": slower})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_bench_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and "no cuda" in output.err


def test_the_gpu_bench_works_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--device", "cpu", "--envs", "64", "--iterations", "2", "--ways", "eager", "captured"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[:3] for row in rows] == [["| ppo-cartpole", "64", "eager"], ["| ppo-cartpole", "64", "captured"]]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)


def test_the_gpu_bench_tells_what_takes_the_time() -> None:
    m = {"whole": 0.5, "rollout": 0.1, "update": 0.3, "longest": 2.0, "steps": 64}
    assert bench_gpu.line("x", 1024, "both", m) == "| x | 1,024 | both | 128 | 100.00 | 300.00 | 100.00 | 2.0 |"


def test_the_gpu_bench_draws_what_it_measured(tmp_path: Path) -> None:
    found = bench_gpu.rows((bench_gpu.ROOT / "results/gpu.md").read_text())
    assert list(found) == [*bench_gpu.WAYS, "as PureJaxRL, TF32"]
    assert all(list(sps) == bench_gpu.ENVS for sps in found.values())
    row = bench_gpu.line(
        "ppo-cartpole", 1024, "both", {"whole": 0.5, "rollout": 0.1, "update": 0.3, "steps": 64, "longest": 2.0}
    )
    assert bench_gpu.rows(f"{row}\n| 2,048 | 9,000 | 1.0 | 2.0 | 3 |") == {
        "both": {1024: 128.0},
        "as PureJaxRL, TF32": {2048: 9000.0},
    }
    pytest.importorskip("matplotlib")
    assert bench_gpu.main(["--report", "--pictures", str(tmp_path)]) == 0
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_growth_is_a_table_and_a_picture(tmp_path: Path) -> None:
    point = {"collect": 20.0, "update": 5.0, "sps": 40_000.0, "memory_mb": 300.0, "random": 80_000.0}
    sweeps = {name: [point for _ in values] for name, (values, _) in bench_growth.SWEEPS.items()}
    assert "| width | 1,024 | 40,000 | 20.0 | 5.0 | 50% | 300 |" in bench_growth.table(sweeps)
    for values, sizes in bench_growth.SWEEPS.values():
        assert all(num_envs * num_steps % 512 == 0 for num_envs, num_steps, *_ in map(sizes, values))
    pytest.importorskip("matplotlib")
    bench_growth.plot(sweeps, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_point_of_growth_is_measured() -> None:
    point = bench_peers.fresh_process([bench_growth.__file__, "--child", "8", "128", "64", "2"], 1)
    assert 0 < point["sps"] < point["random"] and point["memory_mb"] > 100


def test_the_bench_of_acting_times_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    if not compilers():
        pytest.skip("needs a C++ compiler")
    assert bench_acting.main(["--rollouts", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(bench_acting.WORKLOADS) and all(line.count("ratio") == 2 for line in lines[1:])


def test_the_fisher_benchmark_times_three_things(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_fisher.main(["--rows", "8", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("passes") == 3
    _, product, twice = (run() for run in bench_fisher.passes(64).values())
    torch.testing.assert_close(product, torch.cat([x.flatten() for x in twice]), rtol=1e-3, atol=1e-5)


def test_baselines_are_measured_on_the_same_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce_baselines, "TRAINED", 2000)
    results = ["--results", str(tmp_path), "--pictures", str(tmp_path)]
    assert reinforce_baselines.main(["--seeds", "1", "--rollouts", "2", *results]) == 0
    rows = reinforce_baselines.read(tmp_path / "reinforce-baselines.csv")
    assert [row["baseline"] for row in rows] == [reinforce_baselines.name(b) for b in reinforce_baselines.BASELINES]
    assert all(float(row["variance"]) > 0 for row in rows)
    assert reinforce_baselines.ratios(rows, None) == [1.0]
    assert len((tmp_path / "reinforce-baselines.md").read_text().splitlines()) == 9
    assert (tmp_path / "reinforce-baselines.png").stat().st_size > 5000
