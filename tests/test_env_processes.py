"""Envs in several processes: the same transitions as in one, and what happens when a process fails or dies.

The contract that they share with other envs is in test_envs.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import pytest
import torch
from tests.faults.test_resume import equal
from torch import Tensor

import pgrl
from pgrl import checkpoint
from pgrl.config import compose
from pgrl.data import Rollout, action_rows
from pgrl.envs import EnvConfig, GymnasiumVecEnv, ProcessesVecEnv, VecEnv, make_vec
from pgrl.envs.processes import CALL, shares
from pgrl.processes import WorkerError
from pgrl.runs import build

OURS = "tests.envs_for_tests:"
PPO = ["algo=ppo", "env=CartPole-v1", "tuned=null", "num_envs=3", "algo.num_steps=32", "algo.num_minibatches=4"]
PPO += ["seed=3", "threads=1", "tensorboard=false"]


def vec(name: str, num_envs: int, processes: int, **kwargs: Any) -> Any:
    return make_vec(EnvConfig(name, processes=processes, kwargs=kwargs), num_envs, 5)


def actions(env: VecEnv, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape, dtype = action_rows(env.action_space)
    if isinstance(env.action_space, spaces.Discrete):
        return torch.randint(int(env.action_space.n), (steps, env.num_envs), generator=generator)
    return torch.randn(steps, env.num_envs, *shape, generator=generator).to(dtype)


def play(env: VecEnv, taken: Tensor) -> list[Any]:
    """All that envs answer to the actions [T, B, ...], every fifth step in detail."""
    rollout = Rollout(len(taken), env.num_envs, env.obs_space, env.action_space, env.device)
    seen: list[Any] = []
    for t, action in enumerate(taken):
        env.step(action, out=rollout.steps[t])
        if t % 5 == 0:
            seen += [env.episodes(), env.state_dict(), env.obs()]
    return [*seen, *rollout.transition, rollout.obs[-1], env.episodes(), env.state_dict()]


def pids(env: Any) -> list[int]:
    return [worker._process.pid for worker in env._workers]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("num_envs", "processes"), [(2, 2), (5, 2), (5, 3), (7, 4), (3, 9)])
def test_shares_are_even_and_the_main_process_has_the_least(num_envs: int, processes: int) -> None:
    found = shares(num_envs, processes)
    assert sum(found) == num_envs and len(found) == min(num_envs, processes)
    assert found == sorted(found) and found[-1] - found[0] <= 1 and found[0] >= 1


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", OURS + "Counter-v1", OURS + "AnySpaces-v0"])
def test_any_number_of_processes_gives_the_same(name: str) -> None:
    expected: list[Any] = []
    for processes in (1, 2, 5):
        env = vec(name, 5, processes)
        assert type(env) is (GymnasiumVecEnv if processes == 1 else ProcessesVecEnv)
        found = [env.reset(), *play(env, actions(env, 60))]
        expected = expected or found
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
        env.close()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_a_state_goes_with_any_number_of_processes(before: int, after: int) -> None:
    env, other = vec("CartPole-v1", 4, before), vec("CartPole-v1", 4, after)
    env.reset()
    taken = actions(env, 50)
    play(env, taken[:20])
    other.load_state_dict(env.state_dict())
    assert equal(env.obs(), other.obs())
    assert all(equal(a, b) for a, b in zip(play(env, taken[20:]), play(other, taken[20:]), strict=True))
    env.close(), other.close()


def test_a_run_is_the_same_and_resumes_with_another_number(tmp_path: Path) -> None:
    states = []
    for k, (first, then) in enumerate([(1, 1), (2, 2), (2, 3)]):
        run_dir = pgrl.run([*PPO, f"env.processes={first}", "total_timesteps=960", f"run_dir={tmp_path / str(k)}"])
        pgrl.run([f"resume={run_dir}", "total_timesteps=1920", f"env.processes={then}"])
        states.append(checkpoint.load_newest(run_dir, pytest.fail)[1])
    for state in states[1:]:
        for name in ("agent", "env", "record"):
            differ = [key for key, value in states[0][name].items() if not equal(value, state[name][key])]
            assert not differ, f"{name}: {differ}"


def test_what_an_env_raises_in_a_worker_is_told() -> None:
    env = vec(OURS + "Fragile-v0", 2, 2, at=7)
    env.reset()
    env._own._envs[0].at = 1000
    with pytest.raises(WorkerError, match="env process 2 of 2 failed: FloatingPointError: the simulator") as caught:
        play(env, actions(env, 20))
    assert "raised by env 1 of 2 (tests.envs_for_tests:Fragile-v0) in episode 1" in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    (pid,) = pids(env)
    env.close()
    assert gone(pid)


def test_an_env_that_only_workers_cannot_make_is_told() -> None:
    with pytest.raises(WorkerError, match="env process 2 of 2 failed: UserError: env=OnlyHere-v0"):
        import gymnasium
        from tests.envs_for_tests import Counter

        gymnasium.register("OnlyHere-v0", Counter)
        vec("OnlyHere-v0", 2, 2)


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_is_killed_is_told(busy: bool) -> None:
    env = vec("CartPole-v1", 4, 2)
    env.reset()
    taken = actions(env, 50)
    (pid,) = pids(env)
    if busy:
        env._workers[0].begin(taken[0])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"env process 2 of 2 died \(killed by SIGKILL\)"):
        play(env, taken)
        env.state_dict()
    start = time.perf_counter()
    env.close()
    assert time.perf_counter() - start < 1.0


def test_closing_ends_workers_whatever_they_do() -> None:
    env = vec("CartPole-v1", 4, 4)
    env.reset()
    one, two, three = env._workers
    one.begin(actions(env, 1)[0])  # as where a signal comes between the two halves of a step
    two.tell(CALL)  # or those of a call
    three.call("_where", (0,))
    start = time.perf_counter()
    env.close()
    assert [worker._process.exitcode for worker in env._workers] == [0, 0, 0]
    assert time.perf_counter() - start < 1.0
    env.close()  # once more does nothing


def test_a_call_with_a_large_result_that_nobody_reads_is_closed() -> None:
    env = vec(OURS + "Counter-v0", 2, 2)
    env.reset()
    (worker,) = env._workers
    for action in actions(env, 4_000):  # one episode, whose actions take 32 kB
        env.step(action)
    for _ in range(50):  # more than a pipe has room for
        worker.call("state_dict", ())
    time.sleep(0.5)  # until it waits for room
    env.close()
    assert worker._process.exitcode == 0


def test_what_was_interrupted_cannot_be_used_any_more() -> None:
    env = vec("CartPole-v1", 2, 2)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(actions(env, 1)[0])
    env.reset()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    env._own.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        env.step(actions(env, 1)[0])
    for call in (env.state_dict, env.reset, lambda: env.step(actions(env, 1)[0])):
        with pytest.raises(RuntimeError, match="make new envs"):
            call()
    env.close()


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_script_that_does_not_close_its_envs_ends(tmp_path: Path, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pgrl.envs import EnvConfig, make_vec\nfrom pgrl.signals import Signals\n"
        "if __name__ == '__main__':\n"
        "    with Signals():\n"
        "        env = make_vec(EnvConfig('CartPole-v1', processes=3), 3, 1)\n"
        f"        {end or 'pass'}\n"
    )
    subprocess.run([sys.executable, script], capture_output=True, timeout=30)  # and no longer


def test_a_run_that_cannot_begin_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make_agent(config: Any, env: Any) -> None:
        made.append(env)
        raise MemoryError

    monkeypatch.setattr("pgrl.runs.make_agent", make_agent)
    with pytest.raises(MemoryError):
        build(compose([*PPO, "env.processes=2"]))
    assert [worker._process.exitcode for worker in made[0]._workers] == [0]


def test_generators_of_the_processes_differ() -> None:
    """For envs that draw from them, and not from what `reset(seed=...)` gives."""
    env, other = (vec(OURS + "Careless-v0", 3, 3) for _ in range(2))
    drawn = env.reset()
    assert len(set(drawn[1:].flatten().tolist())) == 2 and equal(drawn[1:], other.reset()[1:])
    env.close(), other.close()


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgrl.envs.processes.GRACE_SECONDS", 0.1)
    env = vec("CartPole-v1", 2, 2)
    (pid,) = pids(env)
    os.kill(pid, signal.SIGSTOP)
    env.close()
    assert gone(pid)


def test_workers_do_not_outlive_the_main_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\nfrom pgrl.envs import EnvConfig, make_vec\n"
        "if __name__ == '__main__':\n"
        "    env = make_vec(EnvConfig('CartPole-v1', processes=3), 3, 1)\n    env.reset()\n"
        "    print(*(worker._process.pid for worker in env._workers), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    found = [int(pid) for pid in done.stdout.split()]
    deadline = time.monotonic() + 10
    while not all(map(gone, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == 2 and all(map(gone, found))


def test_warnings_of_workers_are_passed_on() -> None:
    env, other = (vec(OURS + "Drifting-v0", 2, 2, where="reward") for _ in range(2))
    env.reset()
    play(env, actions(env, 5))
    state = env.state_dict()
    state["return"] = [r + 1.0 for r in state["return"]]  # what no replay leads to
    with pytest.warns(UserWarning, match="does not repeat its episodes") as caught:
        other.load_state_dict(state)
    assert [str(w.message).partition("(")[2][:10] for w in caught] == ["env 0 of 2", "env 1 of 2"]
    assert torch.isfinite(other.obs()).all()
    env.close(), other.close()
