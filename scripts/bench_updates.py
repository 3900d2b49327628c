"""Where the time of SAC and DDPG goes while they train: gradient steps, all the rest, and the limit of the processor.

    python scripts/bench_updates.py                 both, with one thread and with two, eager and compiled
    python scripts/bench_updates.py sac --rounds 5

HalfCheetah-v4, 256-256 units, batches of 256, one update a step. Every measurement is a training of its own in a fresh
process, after its first steps; the ways take turns. A gradient step is what an agent does with a sample: the noise of
its actions, the losses, their gradients, the optimisers and the target networks. The rest is acting, the env, adding to
the replay buffer and sampling from it, finite checks, logs and snapshots. The floor is the time that the floating-point
operations of an update's matrix products would take at the best rate of torch in this process, at 256 by 256 by 256.
`plain` is without what pgrl does for large networks: products in AVX-512 where MKL would keep to AVX2 (`pgrl.mkl`), or
else by oneDNN, and memory that is kept (`pgrl.processor`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import pgrl.agents  # before numpy and torch, as in every run

# isort: split
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_peers
from pgrl import mkl, processor

FIRST = 200  # updates before the measurement starts
ALGOS = ("sac", "ddpg")
WAYS = {  # compiled, as pgrl sets the process up
    "eager, plain": (False, False),
    "eager": (False, True),
    "compiled, plain": (True, False),
    "compiled": (True, True),
}


def measure(algo: str, way: str, threads: int, updates: int) -> dict[str, float]:
    """Milliseconds of an update's gradient steps, of all the rest of its env step, and of the floor."""
    compiled, tuned = WAYS[way]
    if not tuned:
        processor.onednn_is_faster = lambda: False  # type: ignore[assignment]
        processor.keep_freed_memory = lambda: None  # type: ignore[assignment]
    agents: list[Any] = []
    spent, began, ended = 0.0, 0.0, 0.0

    def timed(call: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = call(*arguments, **named)
            spent += sign * (time.perf_counter() - start)
            return result

        return wrapper

    kind = next(kind for kind in pgrl.agents.Agent.__subclasses__() if kind.name == algo)
    update = kind.update

    def noted(self: Any, *rest: Any) -> Any:
        nonlocal spent, began, ended
        if not agents:
            agents.append(self)
            self.learn, self.buffer.sample = timed(self.learn, 1), timed(self.buffer.sample, -1)
        metrics = update(self, *rest)
        if int(self.updates) == FIRST:
            spent, began = 0.0, time.perf_counter()
        ended = time.perf_counter()
        return metrics

    kind.update = noted  # type: ignore[method-assign]
    workload = bench_peers.find(f"{algo}-halfcheetah")
    steps = workload.warm_up + FIRST + updates
    with tempfile.TemporaryDirectory() as folder:
        quiet = f"eval_every=null tensorboard=false run_dir={folder}/run"
        command = f"env=HalfCheetah-v4 num_envs=1 total_timesteps={steps} threads={threads} {quiet} {workload.pgrl}"
        command = f"{command} compile={str(compiled).lower()}"
        pgrl.run(command.split())
    gradient, whole = 1e3 * spent / updates, 1e3 * (ended - began) / updates
    [trained] = agents
    trained.step = trained.steps  # whose operations can be counted
    with FlopCounterMode(display=False) as counter:
        trained.learn(1.0)
    floor = 1e3 * counter.get_total_flops() / rate()
    return {"gradient": gradient, "whole": whole, "floor": floor}


def rate(size: int = 256, rounds: int = 300) -> float:
    """The most floating-point operations in a second that a product of two square matrices reaches."""
    x, y, out = torch.randn(3, size, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(x, y, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def line(algo: str, way: str, threads: int, measured: Sequence[dict[str, float]]) -> str:
    """A row of the table: medians over rounds."""
    gradient, whole, floor = (statistics.median(m[key] for m in measured) for key in ("gradient", "whole", "floor"))
    rest = statistics.median(1 - m["gradient"] / m["whole"] for m in measured)
    over = statistics.median(m["gradient"] / m["floor"] for m in measured)
    return f"| {algo} | {way} | {threads} | {whole:.2f} | {gradient:.2f} | {rest:.1%} | {floor:.2f} | {over:.2f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algos", nargs="*", default=ALGOS, help="sac, ddpg; both if none is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way (default 3)")
    parser.add_argument("--updates", type=int, default=1000, help="timed updates of a measurement (default 1000)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        algo, way, threads, updates = options.child
        print(json.dumps(measure(algo, way, int(threads), int(updates))))
        return 0
    ways = [(algo, way, threads) for algo in options.algos for way in WAYS for threads in options.threads]
    measured: dict[tuple[str, str, int], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            algo, name, threads = way
            command = [__file__, "--child", algo, name, str(threads), str(options.updates)]
            variables = {} if WAYS[name][1] else {mkl.SWITCH: "0"}
            measured[way].append(bench_peers.fresh_process(command, threads, variables))
            print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{bench_peers.processor()}, torch {torch.__version__}, milliseconds, medians of {options.rounds}\n")
    print(
        "| algo | way | threads | env step and update | gradient step | all the rest | floor | gradient step / floor |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for way in ways:
        print(line(*way, measured[way]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
