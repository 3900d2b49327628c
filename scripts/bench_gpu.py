"""PPO on a GPU by the number of envs: eager, compiled, captured in CUDA graphs, and both.

    python scripts/bench_gpu.py                                        1k, 4k, 16k and 64k envs
    python scripts/bench_gpu.py --envs 4096 --ways eager captured
    python scripts/bench_gpu.py --device cpu --envs 64 --iterations 2  whether it works, without a GPU

CartPole-v1 as tensors on the device (env.backend=torch), rollouts of 32 steps, 4 epochs of 4 minibatches, through the
loop of every run. Each row is a training in a fresh process: medians over its iterations. `rest` is what the loop does
beside, above all the report of each episode that ended; `steps/s` counts it, over all envs. The first iteration is
apart: in it everything is compiled, warmed up and captured. On a CPU, where there are no graphs, the captured ways are
the code around them. Leaves with exit code 2 where there is no such device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import bench_peers

ENVS = [1024, 4096, 16384, 65536]
WAYS = {"eager": (False, False), "compiled": (True, False), "captured": (False, True), "both": (True, True)}
WARM_UPS = 3  # iterations before those that count
WORDS = """algo=ppo env=CartPole-v1 env.backend=torch tuned=null algo.num_steps=32 algo.update_epochs=4
algo.num_minibatches=4 threads=1"""


class Clock:
    """What the loop tells at the end of each iteration, in the place of a run's upkeep."""

    signals = SimpleNamespace(check=lambda: None)

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]
        self.rollouts: list[float] = []
        self.updates: list[float] = []

    def tend(self, _: int, collecting: float, updating: float, *, finished: bool) -> None:
        self.ends.append(time.perf_counter())
        self.rollouts.append(collecting)
        self.updates.append(updating)


def measure(way: str, num_envs: int, iterations: int, device: str) -> dict[str, float]:
    """Seconds of the first iteration, and medians of later ones: whole, rollout and update; and their env steps."""
    from pgrl.config import compose
    from pgrl.runs import build
    from pgrl.train import train

    compiled, captured = WAYS[way]
    steps = num_envs * 32
    words = [*WORDS.split(), f"num_envs={num_envs}", f"total_timesteps={(WARM_UPS + iterations) * steps}"]
    config = compose([*words, f"device={device}", f"compile={str(compiled).lower()}", "capture=false"])
    run, clock = build(config), Clock()
    run.env.reset()
    upkeep: Any = clock
    train(replace(config, capture=captured), run, upkeep)  # both waits of an iteration lie within what it times
    whole = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    found = {"whole": whole, "rollout": clock.rollouts, "update": clock.updates}
    medians = {name: statistics.median(times[WARM_UPS:]) for name, times in found.items()}
    return {**medians, "first": whole[0], "steps": steps}


def line(num_envs: int, way: str, m: dict[str, float]) -> str:
    """A row of the table."""
    rest = m["whole"] - m["rollout"] - m["update"]
    times = " | ".join(f"{1e3 * x:,.2f}" for x in (m["rollout"], m["update"], rest))
    return f"| {num_envs:,} | {way} | {m['steps'] / m['whole']:,.0f} | {times} | {m['first']:.1f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", type=int, default=ENVS, help="numbers of envs (default: 1k to 64k)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all if none is given")
    parser.add_argument("--iterations", type=int, default=20, help=f"of each, after {WARM_UPS} (default 20)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default cuda)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"there is no {options.device} for torch {torch.__version__}; try --device cpu", file=sys.stderr)
        return 2
    if options.child:
        way, num_envs = options.child
        print(json.dumps(measure(way, int(num_envs), options.iterations, options.device)))
        return 0
    name = bench_peers.processor() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    print(f"{name}, torch {torch.__version__}, medians of {options.iterations} iterations\n")
    print("| envs | way | steps/s | rollout, ms | update, ms | rest, ms | first iteration, s |")
    print("|--:|---|--:|--:|--:|--:|--:|", flush=True)
    for num_envs in options.envs:
        for way in options.ways:
            command = [__file__, "--child", way, str(num_envs), "--iterations", str(options.iterations)]
            found = bench_peers.fresh_process([*command, "--device", options.device], 1)
            print(line(num_envs, way, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
