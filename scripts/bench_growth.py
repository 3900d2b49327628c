"""How the cost of PPO grows: with the envs, the width of the networks, the length of a rollout, and env processes.

    python scripts/bench_growth.py                  all of it, into results/growth.json; table and picture
    python scripts/bench_growth.py --report         table and picture from results/growth.json

HalfCheetah-v4, one epoch of minibatches of 512, eager, threads as pgrl chooses them. Every point is a training of its
own in a fresh process: the first rollout and update are dropped. Collecting is acting and the envs, the update is the
rest; steps are those of all envs together. `random` is the same envs, stepped with random actions and nothing else:
what training could reach at best.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_peers

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = {  # the values on the axis, and the sizes (envs, steps of a rollout, width, processes) that one gives
    "envs": ([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], lambda x: (x, 1024 // min(x, 8), 64, 1)),
    "width": ([64, 128, 256, 512, 1024], lambda x: (8, 128, x, 1)),
    "steps of a rollout": ([128, 256, 512, 1024, 2048, 4096, 8192], lambda x: (8, x, 64, 1)),
    "env.processes": ([1, 2, 4, 8], lambda x: (8, 256, 64, x)),  # as far as there are cores
}
WORDS = """algo=ppo env=HalfCheetah-v4 tuned=null algo.update_epochs=1 compile=false eval_every=null save_every=null
tensorboard=false"""


def measure(num_envs: int, num_steps: int, width: int, processes: int) -> dict[str, float]:
    """Microseconds of an env step in collecting and in the update, steps/s, MB at the peak, and random steps/s."""
    import pgrl  # before numpy and torch, as in every run

    # isort: split
    import torch

    from pgrl import train
    from pgrl.agents import AGENTS
    from pgrl.config import compose
    from pgrl.envs import make_vec

    rollout = num_envs * num_steps
    iterations = 1 + max(3, 8192 // rollout)
    words = f"{WORDS} num_envs={num_envs} algo.num_steps={num_steps} algo.num_minibatches={rollout // 512}"
    words += f" algo.network.hidden_sizes=[{width},{width}] total_timesteps={iterations * rollout}"
    words += f" env.processes={processes}"
    config = compose(words.split())
    agent = AGENTS[type(config.algo)]
    spent: dict[str, list[float]] = {"collect": [], "update": []}
    collect, update = train.collect, agent.update

    def timed(name: str, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        spent[name].append(time.perf_counter() - start)
        return result

    train.collect = lambda *arguments: timed("collect", collect, *arguments)
    agent.update = lambda *arguments: timed("update", update, *arguments)  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as folder:
        pgrl.run([*words.split(), f"run_dir={folder}/run"])
    memory = bench_peers.peak_memory_mb()
    medians = {name: 1e6 * statistics.median(times[1:]) / rollout for name, times in spent.items()}

    env = make_vec(config.env, num_envs, 1)
    env.reset()
    count = max(20, 8192 // num_envs)
    actions = 2 * torch.rand(count, num_envs, *(env.action_space.shape or ())) - 1
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    random = count * num_envs / (time.perf_counter() - start)
    env.close()
    return {**medians, "sps": 1e6 / sum(medians.values()), "memory_mb": memory, "random": random}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row for each point."""
    text = (
        "| what grows | value | steps/s | collecting, us a step | update, us a step | of random steps/s | peak MB |\n"
    )
    text += "|---|--:|--:|--:|--:|--:|--:|\n"
    for name, (values, _) in SWEEPS.items():
        for value, m in zip(values, results.get(name, []), strict=False):
            text += f"| {name} | {value:,} | {m['sps']:,.0f} | {m['collect']:.1f} | {m['update']:.1f} "
            text += f"| {m['sps'] / m['random']:.0%} | {m['memory_mb']:,.0f} |\n"
    return text


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Microseconds of a step, collecting and update on top of each other, and the peak of memory."""
    from matplotlib.figure import Figure

    from plot_curves import BLUE, GREY, save

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    widths = [2 + len(results.get(name, [])) for name in SWEEPS]
    rows = figure.subplots(2, len(SWEEPS), height_ratios=[2, 1], width_ratios=widths)
    for column, (name, (values, _)) in enumerate(SWEEPS.items()):
        measured = results.get(name, [])
        places = range(len(measured))
        collect, update = ([m[key] for m in measured] for key in ("collect", "update"))
        top, bottom = rows[0][column], rows[1][column]
        top.bar(places, collect, 0.7, color=BLUE, label="collecting")
        top.bar(places, update, 0.7, bottom=collect, color="#b5b5b5", label="update")
        bottom.plot(places, [m["memory_mb"] for m in measured], color=BLUE, marker="o", markersize=3)
        bottom.set_ylim(0, 1.1 * max((m["memory_mb"] for m in measured), default=1.0))
        bottom.set_xlabel(name, fontsize=9)
        for axes in (top, bottom):
            axes.set_xticks(places, [f"{value}" for value in values[: len(measured)]], fontsize=7, color=GREY)
            axes.tick_params(axis="y", labelsize=8, colors=GREY)
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("microseconds of an env step", fontsize=9)
    rows[1][0].set_ylabel("peak MB", fontsize=9)
    rows[0][0].legend(fontsize=8, frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where growth.json goes")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where growth.png goes")
    parser.add_argument("--child", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(*options.child)))
        return 0
    path: Path = options.results / "growth.json"
    if not options.report:
        from pgrl.processor import cores

        results: dict[str, list[dict[str, float]]] = {}
        for name, (values, sizes) in SWEEPS.items():
            for value in values if name != "env.processes" else [n for n in values if n <= cores()]:
                command = [__file__, "--child", *map(str, sizes(value))]
                results.setdefault(name, []).append(bench_peers.fresh_process(command, cores()))
                print(f"{name} {value}: {results[name][-1]['sps']:,.0f} steps/s", file=sys.stderr, flush=True)
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": bench_peers.machine(), "sweeps": results}, indent=1) + "\n")
    stored = json.loads(path.read_text())
    plot(stored["sweeps"], options.pictures / "growth.png")
    print(f"{', '.join(f'{key} {value}' for key, value in stored['machine'].items())}\n\n{table(stored['sweeps'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
