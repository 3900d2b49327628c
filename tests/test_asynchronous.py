"""A3C's workers: one alone is A2C, several share what they learn, and none outlives its run, however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.test_resume import finish, start, wait_for_start
from tests.test_agents import make, play, weights

import pgrl
from pgrl import asynchronous, checkpoint
from pgrl.agents import A2CConfig, A3CConfig
from pgrl.asynchronous import WorkerError, worker_seed
from pgrl.evaluate import main as evaluate_main
from pgrl.logger import read_rows
from pgrl.upkeep import SNAPSHOT_SECONDS

QUICK = ["algo=a3c", "env=CartPole-v1", "algo.num_workers=2", "tensorboard=false", "threads=1"]
LONG = [*QUICK, "algo.num_steps=20", "total_timesteps=10_000_000", "save_every=null", "log_every=100"]


def last_state(run_dir: Path) -> dict[str, Any]:
    return checkpoint.load_newest(run_dir, pytest.fail)[1]


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


# --- what is shared ---


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("keys", [{}, {"norm_obs": True, "norm_reward": True, "norm_adv": True, "max_grad_norm": None}])
@pytest.mark.parametrize("world", ["box", "discrete"])
def test_one_worker_is_a2c_bit_for_bit(world: str, keys: dict[str, Any], joined: bool) -> None:
    a2c, a3c = make(A2CConfig, keys, world), make(A3CConfig, keys, world, seed=1 + joined)
    if joined:  # what the main process gave it counts, not its own beginnings
        origin = make(A3CConfig, keys, world)
        a3c.noise.load_state_dict(origin.noise.state_dict())
        shared = origin.share()
        a3c.join(shared)
    for i in range(4):
        rollout = play(a2c, world, seed=i)
        assert all(map(torch.equal, rollout, play(a3c, world, seed=i)))
        expected, metrics = a2c.update(rollout, i / 10), a3c.update(rollout, i / 10)
        assert expected.keys() == metrics.keys() and all(torch.equal(expected[k], metrics[k]) for k in expected)
        assert torch.equal(weights(a2c), weights(a3c))
    if joined:
        origin.read(shared)
        assert torch.equal(weights(origin), weights(a2c))
        for part in ("step", "obs_norm"):
            if part in a2c.state_dict():
                pairs = zip(tensors(a2c.state_dict()[part]), tensors(origin.state_dict()[part]), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for value in tree.values() for x in tensors(value)] if isinstance(tree, dict) else [tree]


def test_workers_change_what_all_of_them_share() -> None:
    """Each gradient is that of a worker's own, older copy; the change goes to the shared parameters."""
    keys = {"norm_obs": True, "norm_reward": True}
    origin = make(A3CConfig, keys)
    shared = origin.share()
    assert all(x.is_shared() for x in (shared.vector, shared.square, *shared.obs_norm.buffers()))
    first, second = make(A3CConfig, keys, seed=2), make(A3CConfig, keys, seed=3)
    for worker in (first, second):
        worker.join(shared)
        assert torch.equal(weights(worker), weights(origin))
    rollout, start = play(second, "box", seed=1), shared.vector.clone()
    first.update(play(first, "box", seed=0), 0.0)
    between, square = shared.vector.clone(), shared.square.clone()
    assert not torch.equal(between, start)
    assert torch.equal(weights(second), weights(origin))  # not yet
    second.update(rollout, 0.0)
    assert not torch.equal(shared.vector, between) and not torch.equal(shared.square, square)
    alone = make(A3CConfig, keys)
    alone.update(rollout, 0.0)
    assert not torch.equal(weights(alone), weights(second))  # for it has both changes
    assert second.obs_norm.count == shared.obs_norm.count == shared.returns.count == 2 * rollout.reward.numel()
    origin.read(shared)
    assert torch.equal(weights(origin), weights(second)) and not torch.equal(weights(first), weights(second))


def test_workers_have_seeds_of_their_own() -> None:
    seeds = {worker_seed(s, worker, begun) for s in range(4) for worker in range(4) for begun in (0, 100)}
    assert len(seeds) == 32 and all(0 <= s < 2**63 for s in seeds)


# --- a run ---


def test_run_counts_each_step_once_and_can_be_made_longer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["algo.num_steps=16", "algo.norm_obs=true", "algo.norm_reward=true", "log_every=64"]
    words += ["eval_every=1000", "eval_episodes=2"]
    run_dir = pgrl.run([*QUICK, *words, "num_envs=2", "total_timesteps=2020", f"run_dir={tmp_path / 'run'}"])
    assert "2 workers of 2 envs" in capfd.readouterr().out
    first, state = read_rows(run_dir), last_state(run_dir)
    assert status(run_dir)["state"] == "done" and status(run_dir)["step"] == first[-1]["step"] == 63 * 32
    assert state["position"]["iteration"] == state["agent"]["updates"] == first[-1]["charts/updates"] == 63
    counts = [float(state["agent"][k][name]) for k, name in (("obs_norm", "count"), ("reward_scaler", "returns.count"))]
    assert all(63 * 32 * 0.8 < count <= 63 * 32 for count in counts)  # two that merge at once may lose a batch
    assert state["agent"]["step"]["0"]["v"].any()

    pgrl.run([f"resume={run_dir}", "total_timesteps=4000"])
    rows, later = read_rows(run_dir), last_state(run_dir)
    assert rows[: len(first)] == first and rows[-1]["step"] == status(run_dir)["step"] == 125 * 32
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and all(row["charts/updates"] * 32 == row["step"] for row in rows)
    assert later["agent"]["updates"] == 125 and later["agent"]["obs_norm"]["count"] > counts[0]
    assert later["position"]["best_step"] in checkpoint.list_steps(run_dir)

    evaluate_main([f"run={run_dir}", "episodes=3"])
    agent = pgrl.load(run_dir, "best")
    assert agent.name == "a3c" and agent.act(torch.zeros(2, 4), explore=False).shape == (2,)


@pytest.mark.slow
def test_short_run_learns(tmp_path: Path) -> None:
    run_dir = pgrl.run(
        [*QUICK, "algo.num_steps=20", "algo.learning_rate=2e-3", "total_timesteps=20000", f"run_dir={tmp_path / 'run'}"]
    )
    rows = read_rows(run_dir)
    assert rows[-1]["charts/episodic_return_100"] > 2 * rows[0]["charts/episodic_return"]


@pytest.mark.parametrize(
    ("env", "why"), [("Fragile", "FloatingPointError: the simulator"), ("NaNReward", "NonFiniteError: .*reward")]
)
def test_worker_that_raises_is_named(env: str, why: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(WorkerError, match=f"worker [12] of 2 failed: {why}") as caught:
        pgrl.run([*QUICK, f"env=tests.envs_for_tests:{env}-v0", "total_timesteps=100000", f"run_dir={run_dir}"])
    assert f"python -m pgrl.train resume={run_dir}" in str(caught.value)
    assert status(run_dir)["state"] == "failed" and checkpoint.list_steps(run_dir)
    assert "in learn" in (run_dir / "train.log").read_text()  # the worker's own traceback


def test_parameters_that_diverge_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Any, shared: Any) -> None:
        shared.vector[0] = float("nan")
        read(self, shared)

    read = asynchronous.A3C.read
    monkeypatch.setattr(asynchronous.A3C, "read", poisoned)
    with pytest.raises((ArithmeticError, WorkerError), match="NaN or infinity"):
        pgrl.run([*QUICK, "total_timesteps=100000", f"run_dir={tmp_path / 'run'}"])
    assert all(x.isfinite().all() for x in last_state(tmp_path / "run")["agent"]["net"].values())


# --- processes ---


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run's main process: the children of the server that it started."""
    return [worker for child in children(pid) for worker in children(child)]


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def running(tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path, list[int]]:
    """A long run that has begun to learn: its main process, its folder, and all processes below the main one."""
    run_dir = tmp_path / "run"
    process = start(*LONG, f"run_dir={run_dir}")
    wait_for_start(run_dir, process)
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_rows(run_dir)) > 3)
    time.sleep(SNAPSHOT_SECONDS + 0.1)  # so that there is a snapshot of what was learnt
    workers = workers_of(process.pid)
    assert len(workers) == 2
    return process, run_dir, [*children(process.pid), *workers]


Running = tuple[subprocess.Popen[bytes], Path, list[int]]


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGUSR1))]
)
def test_signal_saves_and_leaves_no_process(how: signal.Signals, running: Running) -> None:
    process, run_dir, below = running
    sent = time.monotonic()
    process.send_signal(how)
    finish(process, 128 + how)
    assert time.monotonic() - sent < 4.0
    wait_until(lambda: not any(map(alive, below)), 3.0)
    state, told = last_state(run_dir), status(run_dir)
    assert (
        told["state"] == "stopped" and told["step"] == state["position"]["step"] == 20 * state["agent"]["updates"] > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda s: s.name)
def test_signal_to_all_processes_is_a_stop(how: signal.Signals, running: Running) -> None:
    """As Ctrl-C in a terminal and batch systems send it."""
    process, run_dir, below = running
    for pid in (*below, process.pid):
        os.kill(pid, how)
    output = finish(process, 128 + how)
    assert status(run_dir)["state"] == "stopped" and "died" not in output
    wait_until(lambda: not any(map(alive, below)), 3.0)


def test_killed_main_process_leaves_no_other(running: Running) -> None:
    process, _, below = running
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: not any(map(alive, below)), 3.0)


def test_killed_worker_is_named_and_the_run_goes_on_later(running: Running) -> None:
    process, run_dir, below = running
    os.kill(below[-1], signal.SIGKILL)
    output = finish(process, 1)
    assert " of 2 died (killed by SIGKILL)" in output and f"python -m pgrl.train resume={run_dir}" in output
    wait_until(lambda: not any(map(alive, below)), 3.0)
    before = last_state(run_dir)
    assert status(run_dir)["state"] == "failed" and before["position"]["step"] > 0
    pgrl.run([f"resume={run_dir}", f"total_timesteps={before['position']['step'] + 500}"])
    after = last_state(run_dir)
    assert after["position"]["step"] == before["position"]["step"] + 500
    assert after["agent"]["updates"] == before["agent"]["updates"] + 25
    assert read_rows(run_dir)[-1]["step"] == after["position"]["step"]


@pytest.mark.slow
def test_killed_forkserver_ends_the_run(running: Running) -> None:
    process, run_dir, below = running
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert "died" in finish(process, 1) and status(run_dir)["state"] == "failed"
    wait_until(lambda: not any(map(alive, below)), 5.0)


@pytest.mark.slow
def test_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    words = [*QUICK, "total_timesteps=1000", f"run_dir={tmp_path / 'run'}"]
    lines = ["import pgrl", f"pgrl.run({words!r})"]
    script.write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'stand under if __name__ == "__main__"' in done.stderr
    assert "worker 1 of 2 died" in done.stderr or "worker 2 of 2 died" in done.stderr
    script.write_text(f"{lines[0]}\nif __name__ == '__main__':\n    {lines[1].replace('/run', '/run2')}\n")
    subprocess.run([sys.executable, script], check=True, capture_output=True, timeout=120)
    assert status(tmp_path / "run2")["state"] == "done"


def test_workers_of_the_command_line_start_without_a_warning(tmp_path: Path) -> None:
    words = [*QUICK, "total_timesteps=1000", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "pgrl.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr
