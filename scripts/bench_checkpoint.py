"""Measure what safety costs: the snapshot in memory and the checkpoint on disk, beside one iteration of training.

    python scripts/bench_checkpoint.py                                       the two cases below
    python scripts/bench_checkpoint.py algo=ppo env=Hopper-v4 num_envs=8     another run

Prints medians over 20 iterations, and the share of time that the defaults (a snapshot every half second, a
checkpoint every `save_every` env steps) take.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pgrl  # noqa: F401  # before numpy and torch, as in every run

# isort: split
import torch

from pgrl import checkpoint, config
from pgrl.data import Rollout
from pgrl.runs import build
from pgrl.train import collect
from pgrl.upkeep import SNAPSHOT_SECONDS

CASES = (["algo=ppo", "env=HalfCheetah-v4"], ["algo=a2c", "env=CartPole-v1"])
ITERATIONS = 20


def measure(overrides: list[str]) -> str:
    """One line: milliseconds of an iteration, a snapshot, a save; the size of a checkpoint; shares of time."""
    options = config.compose([*overrides, "threads=1"])
    run, device = build(options), torch.device("cpu")
    agent, env = run.agent, run.env
    rollout = Rollout(agent.num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    env.reset()
    iteration, snapshot, save = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ITERATIONS):
            times = [time.perf_counter()]
            metrics = agent.update(collect(env, agent, rollout, env.obs(), device), i / ITERATIONS)
            run.record.add(metrics, env.episodes())
            times.append(time.perf_counter())
            state = run.snapshot().state
            times.append(time.perf_counter())
            path = checkpoint.save(Path(folder), i, state)
            times.append(time.perf_counter())
            for series, a, b in zip((iteration, snapshot, save), times[:-1], times[1:], strict=True):
                series.append(1e3 * (b - a))
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e3
    env.close()
    one, shot, disk = (statistics.median(series[2:]) for series in (iteration, snapshot, save))
    steps = agent.num_steps * env.num_envs
    saves = disk / (one * (options.save_every or 10**12) / steps)
    shots = shot / max(1e3 * SNAPSHOT_SECONDS, one)
    return (
        f"{' '.join(overrides)}: iteration of {steps} steps {one:.1f} ms, snapshot {shot:.2f} ms, "
        f"save {disk:.1f} ms of {size:.0f} kB; snapshots take {shots:.2%} of the time, checkpoints {saves:.2%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="of pgrl.train, for another run than the two")
    words = parser.parse_args().words
    for case in [words] if words else CASES:
        print(measure(list(case)), flush=True)
