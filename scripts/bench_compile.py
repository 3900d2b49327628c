"""What compiling costs and gains for every algorithm that can: the compiler's seconds, and what repays them.

    python scripts/bench_compile.py                  every workload, 3 rounds
    python scripts/bench_compile.py ppo-halfcheetah

Each measurement is a short training in a fresh process with one thread: eagerly, compiled with an empty cache (cold),
and compiled again (warm). The compiler's seconds are the first update's beyond those of a later one. What repays them
is the difference between eager and compiled updates; an update's gradient steps are those that `compile=auto` counts.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pgrl  # before numpy and torch, as in every run

# isort: split
import torch

import bench_peers

WORKLOADS = {  # the overrides, and the updates to time
    "ppo-halfcheetah": ("algo=ppo env=HalfCheetah-v4 num_envs=1", 6),
    "ppo-cartpole": ("algo=ppo env=CartPole-v1", 30),
    "a2c-cartpole": ("algo=a2c env=CartPole-v1", 300),
    "reinforce-cartpole": ("algo=reinforce env=CartPole-v1", 20),
    "npg-halfcheetah": ("algo=npg env=HalfCheetah-v4", 6),
    "trpo-halfcheetah": ("algo=trpo env=HalfCheetah-v4", 6),
    "ddpg-halfcheetah": ("algo=ddpg env=HalfCheetah-v4 algo.learning_starts=300", 300),
    "sac-halfcheetah": ("algo=sac env=HalfCheetah-v4 algo.learning_starts=300", 300),
    "sac-cartpole": ("algo=sac env=CartPole-v1 algo.learning_starts=300", 300),
}


def measure(name: str, compiled: bool) -> dict[str, float]:
    """Seconds of the first update and of a later one, and the gradient steps of one."""
    from pgrl.agents import AGENTS
    from pgrl.config import compilation, compose

    words, updates = WORKLOADS[name]
    words = f"{words} compile={str(compiled).lower()} threads=1 tensorboard=false eval_every=null"
    config = compose(words.split())
    agent = AGENTS[type(config.algo)]
    update, times, reported = agent.update, [], 0

    def timed(self: Any, *rest: Any) -> Any:
        nonlocal reported
        start = time.perf_counter()
        metrics = update(self, *rest)
        if len(metrics) > 1:  # it learnt
            times.append(time.perf_counter() - start)
        return metrics

    agent.update = timed  # type: ignore[method-assign]
    rollout = config.algo.num_steps * config.num_envs
    first = getattr(config.algo, "learning_starts", 0)
    config.total_timesteps = first + updates * rollout
    with tempfile.TemporaryDirectory() as folder:
        pgrl.run([*words.split(), f"total_timesteps={config.total_timesteps}", f"run_dir={folder}/run"])
    later = statistics.median(times[len(times) // 2 :])
    steps = compilation.gradient_steps(config) / len(times)
    return {"compiler": max(times[:2]) - later, "update": later, "steps": steps}


def line(name: str, measured: dict[str, list[dict[str, float]]]) -> str:
    """A row of the table: medians over rounds."""

    def median(way: str, key: str) -> float:
        return statistics.median(m[key] for m in measured[way])

    steps = median("cold", "steps")
    eager, compiled = (1e3 * median(way, "update") / steps for way in ("eager", "cold"))
    repaid = [1e3 * median(way, "compiler") / (eager - compiled) for way in ("cold", "warm")]
    seconds = f"{median('cold', 'compiler'):.1f} | {median('warm', 'compiler'):.1f}"
    counts = " | ".join(f"{x:,.0f}" if eager > compiled else "never" for x in repaid)
    return f"| {name} | {seconds} | {eager:.2f} | {compiled:.2f} | {eager / compiled:.2f} | {counts} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="all if none is given")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        name, compiled = options.child
        print(json.dumps(measure(name, compiled == "true")))
        return 0
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(options.rounds):
        for name in options.workloads:
            ways = measured.setdefault(name, {"eager": [], "cold": [], "warm": []})
            with tempfile.TemporaryDirectory() as cache:
                for way, found in ways.items():
                    command = [__file__, "--child", name, str(way != "eager").lower()]
                    found.append(bench_peers.fresh_process(command, 1, {"TORCHINDUCTOR_CACHE_DIR": cache}))
                    print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{bench_peers.processor()}, torch {torch.__version__}, one thread, medians of {options.rounds}\n")
    print("| workload | compiler cold, s | warm, s | eager, ms | compiled, ms | ratio | repaid by steps, cold | warm |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, ways in measured.items():
        print(line(name, ways))
    return 0


if __name__ == "__main__":
    sys.exit(main())
