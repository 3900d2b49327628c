"""Training on a GPU: eager, compiled, captured in CUDA graphs, and both.

    python scripts/bench_gpu.py                                   PPO on 1k, 4k, 16k and 64k envs of CartPole-v1
    python scripts/bench_gpu.py --envs 4096 --ways eager captured
    python scripts/bench_gpu.py ppo-halfcheetah sac-halfcheetah   with envs on the CPU, as LeanRL's figures
    python scripts/bench_gpu.py --device cpu --envs 64 --iterations 2    whether it works, without a GPU
    python scripts/bench_gpu.py --report    only the picture of results/gpu.md, where rows were put by hand

CartPole-v1 as tensors on the device (env.backend=torch), 4 epochs of 4 minibatches, through the loop of every run.
HalfCheetah-v4 with the sizes of LeanRL's ppo_continuous_action.py and sac_continuous_action.py, but without normalising
observations and rewards, as PPO does there, and with a step of SAC's policy at each step, not two at every other one.

Medians over iterations. `rest` is what the loop does beside, such as the report of each episode that ended; `steps/s`
counts it, over all envs. The longest iteration is apart: it is one in which something is compiled, warmed up and
captured. On a CPU, where there are no graphs, the captured ways are the code around them. Leaves with exit code 2 where
there is no such device.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pgrl  # noqa: F401  # before numpy and torch, as in every run

# isort: split
import torch

import bench_peers

ROOT = Path(__file__).parent.parent
ENVS = [1024, 4096, 16384, 65536]
WAYS = {"eager": (False, False), "compiled": (True, False), "captured": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Workload:
    """What is trained: the words of a run, and how its iterations are measured."""

    words: str
    num_steps: int  # of each env in an iteration
    captures: bool | str  # what is captured in the captured ways
    envs: Sequence[int] = ()  # numbers of envs; none given: those of --envs
    iterations: int | None = None  # None: those of --iterations
    warm_ups: int = 3  # iterations before those that count


WORKLOADS = {
    "ppo-cartpole": Workload(
        "algo=ppo env=CartPole-v1 env.backend=torch algo.update_epochs=4 algo.num_minibatches=4",
        num_steps=32,
        captures=True,
    ),
    "ppo-halfcheetah": Workload(
        "algo=ppo env=HalfCheetah-v4 algo.update_epochs=10 algo.num_minibatches=32",
        num_steps=2048,
        captures="update",
        envs=[1],
        iterations=5,
        warm_ups=2,
    ),
    "sac-halfcheetah": Workload(
        "algo=sac env=HalfCheetah-v4 algo.batch_size=256 algo.learning_starts=1000",
        num_steps=1,
        captures="update",
        envs=[1],
        iterations=1000,
        warm_ups=1300,
    ),
}


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


def measure(
    workload: Workload, way: str, num_envs: int, iterations: int, device: str, *, tf32: bool = False
) -> dict[str, float]:
    """Seconds of the longest iteration, medians of those that count: whole, rollout and update; and their env steps."""
    from pgrl.config import compose
    from pgrl.runs import build
    from pgrl.train import train

    compiled, captured = WAYS[way]
    steps = num_envs * workload.num_steps
    total = (workload.warm_ups + iterations) * steps
    words = [*workload.words.split(), f"algo.num_steps={workload.num_steps}", f"num_envs={num_envs}"]
    words += ["tuned=null", "threads=1", f"total_timesteps={total}", f"device={device}", f"tf32={str(tf32).lower()}"]
    config = compose([*words, f"compile={str(compiled).lower()}", "capture=false"])
    run, clock = build(config), Clock()
    run.env.reset()
    upkeep: Any = clock
    # both waits of an iteration lie within what it times
    train(replace(config, capture=captured and workload.captures), run, upkeep)
    run.env.close()
    whole = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    found = {"whole": whole, "rollout": clock.rollouts, "update": clock.updates}
    medians = {name: statistics.median(times[workload.warm_ups :]) for name, times in found.items()}
    return {**medians, "longest": max(whole), "steps": steps}


def line(name: str, num_envs: int, way: str, m: dict[str, float]) -> str:
    """A row of the table."""
    rest = m["whole"] - m["rollout"] - m["update"]
    times = " | ".join(f"{1e3 * x:,.2f}" for x in (m["rollout"], m["update"], rest))
    return f"| {name} | {num_envs:,} | {way} | {m['steps'] / m['whole']:,.0f} | {times} | {m['longest']:.1f} |"


def rows(text: str) -> dict[str, dict[int, float]]:
    """Env steps/s by way, then by envs: of the first rows of PPO on CartPole-v1, and of measure_purejaxrl.py."""
    found: dict[str, dict[int, float]] = {}
    for row in text.splitlines():
        cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]
        if cells[0] == "ppo-cartpole":
            found.setdefault(cells[2], {}).setdefault(int(cells[1]), float(cells[3]))
        elif cells[0].isdigit():
            found.setdefault("as PureJaxRL, TF32", {}).setdefault(int(cells[0]), float(cells[1]))
    return found


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    """Env steps a second against envs."""
    from matplotlib.figure import Figure

    from plot_curves import BLUE, GREY, save

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    shades = {"eager": "#c6dbef", "compiled": "#9ecae1", "captured": "#6baed6", "both": BLUE}
    for name, sps in found.items():
        axes.plot(list(sps), list(sps.values()), color=shades.get(name, GREY), marker="o", markersize=4)
        at = min(sps), sps[min(sps)]
        axes.annotate(name, at, (-7, 0), textcoords="offset points", fontsize=8, ha="right", va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    envs = sorted({n for sps in found.values() for n in sps})
    axes.set_xticks(envs, [f"{n:,}" for n in envs])
    axes.set_xlim(envs[0] / 5, envs[-1] * 1.2)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.set_xlabel("envs", fontsize=9)
    axes.set_ylabel("env steps/s", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"of {', '.join(WORKLOADS)} (default: the first)"
    parser.add_argument("workloads", nargs="*", help=known)
    parser.add_argument("--envs", nargs="+", type=int, default=ENVS, help="of CartPole-v1 (default: 1k to 64k)")
    parser.add_argument("--num-steps", type=int, default=32, help="of a rollout of CartPole-v1 (default 32)")
    parser.add_argument("--tf32", action="store_true", help="multiply matrices in TF32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all if none is given")
    parser.add_argument("--iterations", type=int, default=20, help="that count, of CartPole-v1 (default 20)")
    parser.add_argument("--report", action="store_true", help="only make the picture")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where gpu.png goes")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default cuda)")
    options = parser.parse_args(arguments)
    if options.report:
        plot(rows((ROOT / "results/gpu.md").read_text()), options.pictures / "gpu.png")
        return 0
    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"there is no {options.device} for torch {torch.__version__}; try --device cpu", file=sys.stderr)
        return 2
    for name in options.workloads:
        if name not in WORKLOADS:
            parser.error(f"{name}: there is no such workload; {known}")
    machine = bench_peers.processor() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    products = "TF32" if options.tf32 else "float32"
    print(f"{machine}, torch {torch.__version__}, products in {products}, medians of iterations\n")
    print("| workload | envs | way | steps/s | rollout, ms | update, ms | rest, ms | longest iteration, s |")
    print("|---|--:|---|--:|--:|--:|--:|--:|", flush=True)
    for name in options.workloads or ["ppo-cartpole"]:
        workload = WORKLOADS[name]
        if not workload.envs:
            workload = replace(workload, num_steps=options.num_steps)
        for num_envs in workload.envs or options.envs:
            for way in options.ways:
                iterations = workload.iterations or options.iterations
                found = measure(workload, way, num_envs, iterations, options.device, tf32=options.tf32)
                print(line(name, num_envs, way, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
