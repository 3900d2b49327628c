"""Real processes, really killed: a resumed run ends exactly as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgrl import checkpoint
from pgrl.logger import read_rows
from pgrl.replay_rows import same
from pgrl.rows import Rows
from pgrl.upkeep import SNAPSHOT_SECONDS

CASES = {
    "ppo-classic": ["algo=ppo", "env=CartPole-v1", "total_timesteps=24576", "num_envs=4", "algo.num_steps=64"],
    "a2c-classic": ["algo=a2c", "env=CartPole-v1", "total_timesteps=16000", "num_envs=8"],
    "ppo-mujoco": ["algo=ppo", "env=HalfCheetah-v4", "total_timesteps=8192", "num_envs=2", "algo.num_steps=128"],
    "a2c-mujoco": ["algo=a2c", "env=HalfCheetah-v4", "total_timesteps=8000", "num_envs=4", "algo.num_steps=5"],
    "ppo-box2d": ["algo=ppo", "env=LunarLander-v3", "total_timesteps=16384", "num_envs=4", "algo.num_steps=128"],
    "a2c-box2d": ["algo=a2c", "env=LunarLander-v3", "total_timesteps=12000", "num_envs=4", "algo.num_steps=5"],
    "reinforce-classic": ["algo=reinforce", "env=CartPole-v1", "total_timesteps=24000", "num_envs=2"],
    "npg-mujoco": ["algo=npg", "env=HalfCheetah-v4", "total_timesteps=8192", "num_envs=2", "algo.num_steps=128"],
    "trpo-classic": ["algo=trpo", "env=CartPole-v1", "total_timesteps=24576", "num_envs=4", "algo.num_steps=64"],
    "trpo-mujoco": ["algo=trpo", "env=HalfCheetah-v4", "total_timesteps=8192", "num_envs=2", "algo.num_steps=128"],
    "trpo-box2d": ["algo=trpo", "env=LunarLander-v3", "total_timesteps=16384", "num_envs=4", "algo.num_steps=128"],
    "sac-classic": ["algo=sac", "env=Pendulum-v1", "total_timesteps=3000", "algo.n_step=3"],
    "sac-discrete": ["algo=sac", "env=CartPole-v1", "total_timesteps=3000", "algo.norm_obs=true", "num_envs=2"],
    "sac-mujoco": ["algo=sac", "env=Hopper-v4", "total_timesteps=3000", "algo.per_alpha=0.6"],
    "sac-box2d": ["algo=sac", "env=LunarLanderContinuous-v3", "total_timesteps=3000", "algo.utd_ratio=0.5"],
    "ddpg-classic": ["algo=ddpg", "env=Pendulum-v1", "total_timesteps=4000", "algo.noise=ou"],
    "ddpg-mujoco": ["algo=ddpg", "experiment=td3", "env=HalfCheetah-v4", "total_timesteps=3000", "num_envs=2"],
    "ppo-torch": ["algo=ppo", "env=CartPole-v1", "env.backend=torch", "total_timesteps=49152", "num_envs=8"],
    "ppo-processes": ["algo=ppo", "env=CartPole-v1", "env.processes=2", "total_timesteps=24576", "num_envs=4"],
    "sac-torch": ["algo=sac", "env=Pendulum-v1", "env.backend=torch", "total_timesteps=3000", "num_envs=2"],
    "dpg-linear": ["algo=dpg", "env=pgrl/LinearQuadratic-v0", "total_timesteps=24000", "num_envs=8"],
}
COMMON = {
    "ppo": ["algo.update_epochs=4", "algo.num_minibatches=4", "algo.norm_obs=true", "algo.norm_reward=true"],
    "a2c": ["algo.norm_obs=true", "algo.norm_reward=true"],
    "reinforce": ["algo.num_steps=500", "algo.num_minibatches=10", "algo.norm_obs=true", "algo.norm_reward=true"],
    "dpg": ["algo.num_steps=2", "algo.network.hidden_sizes=[8]"],
    # a buffer that is full before the run ends
    **dict.fromkeys(
        ("ddpg", "sac"),
        [
            "algo.learning_starts=200",
            "algo.buffer_size=1000",
            "algo.batch_size=32",
            "algo.network.hidden_sizes=[32,32]",
        ],
    ),
    **dict.fromkeys(
        ("npg", "trpo"),
        ["algo.num_minibatches=4", "algo.norm_obs=true", "algo.norm_reward=true", "algo.fisher_fraction=0.5"],
    ),
}
PERIODS = ["save_every=2000", "log_every=500", "seed=7", "threads=1", "tensorboard=false"]


def arguments(case: str) -> list[str]:
    overrides = CASES[case]
    return [*overrides, *COMMON[overrides[0].removeprefix("algo=")], *PERIODS]


def start(*args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pgrl.train", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[bytes], code: int = 0) -> str:
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == code, output
    return output


def equal(a: Any, b: Any) -> bool:
    """Whether two state trees are the same bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Rows):
        return isinstance(b, Rows) and same(a, b)
    return bool(a == b)


def outcome(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The final state and the rows of a run, but for times."""
    step, state = checkpoint.load_newest(run_dir, pytest.fail)
    del state["position"]["seconds"]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    timed = ("time", "time/collect", "time/update", "charts/SPS")
    return state, [{k: v for k, v in row.items() if k not in timed} for row in read_rows(run_dir)]


def assert_same(a: Path, b: Path) -> None:
    (state_a, rows_a), (state_b, rows_b) = outcome(a), outcome(b)
    for name in state_a:
        assert equal(state_a[name], state_b[name]), name
    assert rows_a == rows_b
    steps = [row["step"] for row in rows_a]
    assert steps == sorted(set(steps))


def wait_for_start(run_dir: Path, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Until the run has its folder and says that it is running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "status.json").exists():
            return
        time.sleep(0.01)


def interrupted(run_dir: Path, args: list[str], kills: int, seed: int, longest: float, how: signal.Signals) -> int:
    """Run to the end through `kills` interruptions at random moments; returns how many hit a living process."""
    rng, hits = random.Random(seed), 0
    process = start(*args, f"run_dir={run_dir}")
    wait_for_start(run_dir, process)
    for _ in range(kills):
        time.sleep(rng.uniform(0.0, longest))
        if process.poll() is not None:
            break
        process.send_signal(how)
        output = process.communicate(timeout=60)[0]
        if process.returncode == 0:
            break
        hits += 1
        before_pgrl = b"KeyboardInterrupt" in output and b"pgrl" not in output  # Python itself was starting: code 1
        assert process.returncode in (-how, 128 + how) or before_pgrl, output.decode()
        process = start(f"resume={run_dir}")
        if how == signal.SIGKILL and rng.random() < 0.3:  # also while it starts
            continue
        wait_for_start(run_dir, process)
    process.communicate(timeout=600)
    if process.returncode != 0 and json.loads((run_dir / "status.json").read_text())["state"] != "done":
        pytest.fail(f"the last process ended with {process.returncode}")
    return hits


@pytest.mark.parametrize(
    "case",
    [
        "ppo-classic",
        "a2c-box2d",
        "ppo-mujoco",
        "ppo-torch",
        "ppo-processes",
        "reinforce-classic",
        "trpo-mujoco",
        "dpg-linear",
        "sac-mujoco",
        "ddpg-classic",
    ],
)
def test_killed_run_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    finish(start(*arguments(case), f"run_dir={tmp_path / 'whole'}"))
    hits = interrupted(tmp_path / "killed", arguments(case), 2, seed=1, longest=1.0, how=signal.SIGKILL)
    assert hits
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_a_hundred_kills(case: str, tmp_path: Path) -> None:
    args = [
        a if not a.startswith("total_timesteps") else f"total_timesteps={int(a.split('=')[1]) * 16}"
        for a in arguments(case)
    ]
    finish(start(*args, f"run_dir={tmp_path / 'whole'}"))
    hits = interrupted(tmp_path / "killed", args, 100, seed=2, longest=0.6, how=signal.SIGKILL)
    print(f"{case}: {hits} kills hit")
    assert hits == 100
    assert_same(tmp_path / "whole", tmp_path / "killed")


COMPILED = ["ppo-classic", "a2c-classic", "reinforce-classic", "npg-mujoco", "trpo-box2d", "sac-mujoco", "ddpg-mujoco"]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_runs_resume_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Three processes: the one that compiles, one that was killed, and one that goes on."""
    args = [*arguments(case), "compile=true"]
    finish(start(*args, f"run_dir={tmp_path / 'whole'}"))
    assert interrupted(tmp_path / "killed", args, 3, seed=4, longest=6.0, how=signal.SIGKILL)
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_signal_saves_and_exits_with_its_code(how: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(
        *arguments("ppo-classic"),
        "total_timesteps=10_000_000",
        "save_every=null",
        "compile=false",
        f"run_dir={run_dir}",
    )
    wait_for_start(run_dir, process)
    time.sleep(SNAPSHOT_SECONDS + 1.0)
    sent = time.monotonic()
    process.send_signal(how)
    finish(process, 128 + how)
    assert time.monotonic() - sent < 3.0
    step, _ = checkpoint.load_newest(run_dir, pytest.fail)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped" and step > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
@pytest.mark.parametrize("case", ["ppo-classic", "ppo-processes", "a2c-mujoco"])
def test_signalled_runs_resume_bit_for_bit(case: str, how: signal.Signals, tmp_path: Path) -> None:
    finish(start(*arguments(case), f"run_dir={tmp_path / 'whole'}"))
    assert interrupted(tmp_path / "stopped", arguments(case), 10, seed=3, longest=0.5, how=how)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
