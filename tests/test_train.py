"""The loop and the contract around it, through the same calls that users make."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from tests.faults.test_resume import assert_same, equal

import pgrl
from pgrl import checkpoint, files, processor, runs
from pgrl.config import compose, decide_compile, load_run
from pgrl.data import Rollout
from pgrl.errors import NonFiniteError, UserError
from pgrl.evaluate import Evaluation
from pgrl.evaluate import main as evaluate_main
from pgrl.logger import read_rows
from pgrl.runs import build
from pgrl.signals import Signals, Stop
from pgrl.train import check_finite, collect
from pgrl.upkeep import due

PPO = ["algo=ppo", "env=CartPole-v1", "num_envs=4", "algo.num_steps=32", "algo.num_minibatches=4", "seed=3"]
PPO += ["algo.update_epochs=4"]
A2C = ["algo=a2c", "env=CartPole-v1", "num_envs=4", "seed=3"]
QUIET = ["tensorboard=false", "threads=1"]


def run(tmp_path: Path, name: str, *overrides: str) -> Path:
    return pgrl.run([*overrides, *QUIET, f"run_dir={tmp_path / name}"])


def last_state(run_dir: Path) -> dict[str, object]:
    return checkpoint.load_newest(run_dir, pytest.fail)[1]


def test_run_writes_what_the_contract_names(tmp_path: Path) -> None:
    run_dir = pgrl.run([*PPO, "total_timesteps=1000", f"run_dir={tmp_path / 'run'}"])
    assert run_dir == tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "train.log", "status.json", "tb", "checkpoints/step_000000000896"):
        assert (run_dir / name).exists(), name
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "done" and status["step"] == 896 and status["total_timesteps"] == 1000


def test_a_resumed_run_keeps_to_what_compile_auto_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    assert "\ncompile=auto: not compiled, for" in capsys.readouterr().out
    assert load_run(run_dir).compile is False
    stopped = json.loads((run_dir / "status.json").read_text()) | {"state": "stopped"}
    (run_dir / "status.json").write_text(json.dumps(stopped))
    longer = compose([f"resume={run_dir}", "total_timesteps=50000000"])  # which would repay the compiler
    assert decide_compile(longer) == (False, "")


def test_a_run_says_what_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run(tmp_path, "plain", *A2C, "total_timesteps=40")
    assert "captured" not in capsys.readouterr().out and load_run(run_dir).capture is False
    monkeypatch.setattr("pgrl.config.decide_capture", lambda _: ("update", "updates are captured"))
    run_dir = run(tmp_path, "run", *A2C, "total_timesteps=40", "capture=auto")
    said = capsys.readouterr().out
    assert "1 thread, updates captured | seed 3" in said and "\ncapture=auto: updates are captured\n" in said
    assert load_run(run_dir).capture == "update"


def test_default_folders_are_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {pgrl.run([*A2C, *QUIET, "total_timesteps=40"]) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == Path("runs/a2c/CartPole-v1") for folder in folders)


@pytest.mark.parametrize("algo", [PPO, A2C], ids=["ppo", "a2c"])
def test_two_runs_are_equal(algo: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path, name, *algo, "total_timesteps=2000", "log_every=200")
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("algo", [PPO, A2C], ids=["ppo", "a2c"])
def test_evaluation_does_not_disturb_training(algo: list[str], tmp_path: Path) -> None:
    plain = run(tmp_path, "plain", *algo, "total_timesteps=2000", "algo.norm_obs=true")
    watched = run(tmp_path, "watched", *algo, "total_timesteps=2000", "algo.norm_obs=true", "eval_every=500")
    assert equal(last_state(plain)["agent"], last_state(watched)["agent"])
    assert equal(last_state(plain)["env"], last_state(watched)["env"])
    assert [row["eval/return_mean"] for row in read_rows(watched) if "eval/return_mean" in row]


def test_best_checkpoint_is_kept(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=6000", "eval_every=500", "eval_episodes=2", "save_every=128")
    best = max(
        (r for r in read_rows(str(run_dir)) if "eval/return_mean" in r),
        key=lambda r: (r["eval/return_mean"], -r["step"]),
    )
    assert best["step"] in checkpoint.list_steps(run_dir)
    assert len(checkpoint.list_steps(run_dir)) <= 4
    agent = pgrl.load(run_dir, "best")
    assert agent.act(torch.zeros(2, 4), explore=False).shape == (2,)


def test_load_acts_like_the_trained_agent(tmp_path: Path) -> None:
    run_dir = run(
        tmp_path,
        "run",
        "algo=ppo",
        "env=Pendulum-v1",
        "total_timesteps=512",
        "algo.num_steps=128",
        "algo.norm_obs=true",
    )
    agent, saved = pgrl.load(run_dir), last_state(run_dir)["agent"]
    assert equal({k: v.clone() for k, v in agent.state_dict()["obs_norm"].items()}, saved["obs_norm"])  # type: ignore[index]
    obs = torch.randn(50, 3) * 100
    action = agent.act(obs, explore=False)
    assert action.abs().max() <= 2.0 and torch.equal(action, agent.act(obs, explore=False))


def test_evaluate_writes_its_file_and_leaves_the_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    evaluate_main([f"run={run_dir}", "episodes=5", "seed=4"])
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert len(result["returns"]) == len(result["lengths"]) == 5
    assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 5)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    evaluate_main([f"run={run_dir}", "episodes=5", "seed=4"])
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    assert "IQM" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_makes_its_envs_on_its_own_device(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def make_vec(config: object, num_envs: int, seed: int, device: str, *, compiled: bool) -> None:
        made.extend([num_envs, seed, device, compiled])
        raise UserError("enough")

    monkeypatch.setattr("pgrl.runs.make_vec", make_vec)
    with pytest.raises(UserError, match="enough"):
        build(replace(compose([*PPO, "env.backend=torch"]), device="cuda:3", compile=compiled))
    assert made == [4, 3, "cuda:3", compiled]


@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_multiplies_as_it_says(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(processor, "set_up", lambda *_, **named: told.append(named))
    build(compose([*PPO, f"tf32={str(tf32).lower()}"]))
    assert told[-1] == {"tf32": tf32}


def test_rows_count_env_steps_over_all_envs(tmp_path: Path) -> None:
    rows = read_rows(run(tmp_path, "run", *PPO, "total_timesteps=1280", "log_every=1"))
    assert [row["step"] for row in rows] == list(range(128, 1281, 128))
    assert [row["charts/updates"] for row in rows] == [16.0 * (i + 1) for i in range(10)]


@pytest.mark.parametrize("algo", [PPO, A2C, [*PPO, "env.backend=torch"]], ids=["ppo", "a2c", "ppo-torch"])
def test_snapshot_does_not_change_with_the_run(algo: list[str]) -> None:
    """What a signal writes is the state of a boundary: weights, moments, statistics, all of the same moment."""
    config = compose([*algo, *QUIET, "algo.norm_obs=true", "algo.norm_reward=true"])
    run = build(config)
    rollout = Rollout(run.agent.num_steps, config.num_envs, run.env.obs_space, run.env.action_space, run.env.device)
    run.env.reset()

    def iterate() -> None:
        transition = collect(run.env, run.agent, rollout, run.env.obs(), torch.device("cpu"))
        run.record.add(run.agent.update(transition, 0.0), run.env.episodes())

    iterate()
    state = run.snapshot().state
    before = copy.deepcopy(state)
    iterate()
    assert equal(state, before)
    after = run.snapshot().state
    assert not equal(after["agent"]["step"], before["agent"]["step"])
    assert not equal(after["agent"]["net"], before["agent"]["net"])


def full_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """From now on the disk refuses so many writes of checkpoints; those it has refused."""
    refused: list[Path] = []

    def refuse(name: str, path: Path) -> None:
        if "checkpoints" in str(path) and name == "fsync" and len(refused) < times:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "operation", refuse)
    return refused


def test_last_checkpoint_that_cannot_be_written_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, times=10**9)
    with pytest.raises(checkpoint.SaveError):
        run(tmp_path, "run", *PPO, "total_timesteps=1000")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    pgrl.run([f"resume={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_folder_of_a_run_that_died_at_once_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    run(tmp_path, "run", *A2C, "total_timesteps=40")


def test_damaged_newest_checkpoint_is_passed_over_by_load(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000", "save_every=128")
    newest = checkpoint.folder(run_dir, checkpoint.list_steps(run_dir)[-1])
    (newest / "state.json").write_text("")
    pgrl.load(run_dir)
    assert newest.exists()
    with pytest.raises(UserError, match="checkpoint=foo"):
        pgrl.load(run_dir, "foo")


def test_another_thread_count_is_told(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    pgrl.run([f"resume={run_dir}", "total_timesteps=2000", "threads=2"])
    assert "threads was 1, is 2" in (run_dir / "train.log").read_text()
    torch.set_num_threads(1)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_config_that_was_changed_by_hand_is_one_clear_screen(tmp_path: Path, command: str) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    text = (run_dir / "config.yaml").read_text()
    assert "    - 64\n" in text
    (run_dir / "config.yaml").write_text(text.replace("    - 64\n", "    - 32\n"))
    with pytest.raises(UserError, match="not of the configuration in config.yaml: (.|\n)*Undo the changes"):
        pgrl.run([f"resume={run_dir}", "total_timesteps=2000"]) if command == "train" else pgrl.load(run_dir)


def test_envs_are_closed_where_the_agent_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, make_vec = [], runs.make_vec

    def made(*arguments: Any, **named: Any) -> Any:
        env = make_vec(*arguments, **named)
        monkeypatch.setattr(env, "close", lambda: closed.append(env))
        return env

    monkeypatch.setattr(runs, "make_vec", made)
    with pytest.raises(UserError, match="algo=ddpg needs continuous actions"):
        build(compose(["algo=ddpg", "env=CartPole-v1"]))
    assert len(closed) == 1


def test_first_weights_do_not_hang_on_what_ran_before() -> None:
    """The decompositions that make them orthogonal round differently with more threads, or another library."""
    states = []
    for threads, precision in ((1, "none"), (2, "bf16")):
        torch.set_num_threads(threads)
        processor.MATMUL.fp32_precision = precision
        states.append(build(compose([*PPO, "threads=1", "algo.network.hidden_sizes=[96,96]"])).agent.state_dict())
    assert equal(*states)


def test_an_evaluation_has_the_threads_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, told = run(tmp_path, "run", *PPO, "total_timesteps=1000"), []
    learn = sum(p.numel() for p in build(load_run(run_dir)).agent.parameters())
    monkeypatch.setattr(processor, "set_up", lambda *arguments, **_: told.append(arguments[0]))
    evaluate_main([f"run={run_dir}", "episodes=1"])
    assert told == [learn]


def test_a_checkpoint_that_lacks_something_is_one_clear_screen(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    step, state = checkpoint.load_newest(run_dir, pytest.fail)
    del state["record"]["recent"]  # as if this pgrl had begun to keep it
    checkpoint.save(run_dir, step + 1, state)
    with pytest.raises(
        UserError, match="made by an earlier state of pgrl .* has no 'recent', which this(.|\n)*new run"
    ):
        pgrl.run([f"resume={run_dir}", "total_timesteps=2000"])
    del state["agent"]["net"]
    state["made_with"]["pgrl"] = "0.0.1"
    checkpoint.save(run_dir, step + 2, state)
    with pytest.raises(UserError, match="made by pgrl 0.0.1 and has no 'net'"):
        pgrl.load(run_dir)


@pytest.mark.parametrize(("was", "told"), [("another", "was another, is"), (None, "was None, is")])
def test_a_resumed_run_says_where_it_may_round_differently(
    was: str | None, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    step, state = checkpoint.load_newest(run_dir, pytest.fail)
    made = state["made_with"]
    made["acts with"] = was
    if was is None:  # as of a pgrl that did not note it
        del made["acts with"]
    checkpoint.save(run_dir, step + 1, state)
    pgrl.run([f"resume={run_dir}", "total_timesteps=2000"])
    (warning,) = [r.getMessage() for r in caplog.records if "bit for bit" in r.getMessage()]
    assert f"acts with {told}" in warning and warning.count(" was ") == 1


def test_due() -> None:
    assert [step for step in range(3, 31, 3) if due(10, step, 3)] == [12, 21, 30]
    assert not due(None, 10, 10)


def test_more_steps_on_resume(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=1000")
    with pytest.raises(UserError, match="total_timesteps"):
        pgrl.run([f"resume={run_dir}"])
    pgrl.run([f"resume={run_dir}", "total_timesteps=2000"])
    assert json.loads((run_dir / "status.json").read_text())["step"] == 1920


def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", *PPO, "total_timesteps=1000")
    young = run(tmp_path, "young", *PPO, "total_timesteps=1000")
    for path in sorted((young / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (young / "status.json").write_text('{"state": "running", "step": 0, "total_timesteps": 1000}')
    pgrl.run([f"resume={young}"])
    assert_same(whole, young)


def test_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = full_disk(monkeypatch, times=8)
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=2000", "save_every=128")
    assert len(refused) == 8
    assert "no checkpoint at step" in (run_dir / "train.log").read_text()
    assert last_state(run_dir)["position"]["step"] == 1920  # type: ignore[index]


def test_best_is_what_could_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best evaluation whose checkpoint the disk refused is not one that others must beat, nor one to load."""
    refused = full_disk(monkeypatch, times=1)
    monkeypatch.setattr("pgrl.upkeep.evaluate", lambda *_: Evaluation([100.0 - next(falling)], [1]))
    falling = iter(range(100))
    run_dir = run(tmp_path, "run", *PPO, "total_timesteps=2000", "eval_every=500", "save_every=null")
    evaluated = [row["step"] for row in read_rows(run_dir) if "eval/return_mean" in row]
    assert len(refused) == 1 and last_state(run_dir)["position"]["best_step"] == evaluated[1]
    assert pgrl.load(run_dir, "best")


def test_nan_reward_stops_the_run_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="reward"):
        run(tmp_path, "run", "algo=a2c", "env=tests.envs_for_tests:NaNReward-v0", "total_timesteps=1000")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_what_is_large_is_not(bad: float) -> None:
    large = {"obs": torch.full((3, 2), 3e38), "loss": torch.tensor(-1e38), "count": torch.ones(2, dtype=torch.int64)}
    told = check_finite(large, "x")  # though its sum is not finite
    assert type(told["loss"]) is float and told["obs"] is large["obs"] and told["count"] is large["count"]
    for name, x in (("row", torch.tensor([[0.0, bad]])), ("scalar", torch.tensor(bad))):
        with pytest.raises(NonFiniteError, match=f"x NaN or infinity: {name}"):
            check_finite({**large, name: x}, "x")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_rollout_that_may_not_be_finite_is_noticed(bad: float) -> None:
    box = spaces.Box(-1.0, 1.0, (3,))
    for part in ("obs", "action", "reward", "next_obs"):
        rollout = Rollout(4, 2, box, box, torch.device("cpu"))
        assert rollout.looks_finite()
        getattr(rollout.transition, part)[2, 1] = bad
        with warnings.catch_warnings(action="error"):
            assert not rollout.looks_finite()
    images = spaces.Box(0, 255, (3,), np.uint8)
    assert Rollout(1, 1, images, spaces.Discrete(2), torch.device("cpu")).looks_finite()
    assert not Rollout(1, 1, box, box, torch.device("meta")).looks_finite()  # of which only `check_finite` can tell


def test_signal_waits_for_protected_work() -> None:
    import signal

    done = []
    with pytest.raises(Stop) as stop, Signals() as signals:
        with signals.protected():
            signal.raise_signal(signal.SIGTERM)
            done.append("work")
        done.append("never")
    assert done == ["work"] and stop.value.exit_code == 143


LEARNS = {
    "ppo": ["algo=ppo", "env=CartPole-v1", "total_timesteps=30000"],
    "a2c": ["algo=a2c", "env=CartPole-v1", "total_timesteps=40000"],
    "sac": ["algo=sac", "env=CartPole-v1", "total_timesteps=6000"],
    "ddpg": ["algo=ddpg", "env=Pendulum-v1", "total_timesteps=5000", "algo.network.hidden_sizes=[64,64]"],
}
ABOVE = {"ddpg": -1000.0}  # random actions earn about -1200


@pytest.mark.parametrize("algo", list(LEARNS))
def test_learns(algo: str, tmp_path: Path) -> None:
    run_dir = run(tmp_path, "run", *LEARNS[algo], "seed=1")
    tag = "charts/episodic_return_100" if algo in ("ppo", "a2c") else "charts/episodic_return"  # of few, long episodes
    assert read_rows(run_dir)[-1][tag] > ABOVE.get(algo, 100.0)
