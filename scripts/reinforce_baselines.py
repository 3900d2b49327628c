"""REINFORCE's baselines compared: the variance of the gradient of each at one policy, and what each learns.

    python scripts/reinforce_baselines.py              measure, then draw
    python scripts/reinforce_baselines.py --report     draw from what is there

Variance: for each seed a policy is trained for a while, with its critic; then every baseline estimates the gradient
from the same rollouts of that policy, which stays as it is. Learning curves come from the benchmark runner's trials:

    python scripts/benchmark.py reinforce-cartpole
    python scripts/benchmark.py reinforce-cartpole --extra algo.baseline=mean --name baseline-mean     and so on

Writes results/reinforce-baselines.csv and .md, and docs/pictures/reinforce-baselines.png (the `plot` extra).
"""

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pgrl  # before numpy and torch, as in every run

# isort: split
import numpy as np
import torch

from pgrl.config import RunConfig, load_run
from pgrl.data import Rollout
from pgrl.envs import make_vec
from pgrl.evaluate import bootstrap_interval
from pgrl.runs import make_agent
from pgrl.theory.learners import ascent, record
from pgrl.train import collect

ROOT = Path(__file__).resolve().parent.parent
ENV, TRAINED = "CartPole-v1", 20_000  # steps of training before the measurement
BASELINES = (None, "mean", "time", "leave_one_out", "min_variance", "min_variance_per_parameter", "value")
COLOURS = ("#595959", "#E69F00", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#0072B2")  # Okabe and Ito's
COLUMNS = ("seed", "baseline", "rollouts", "variance", "squared_mean", "return_mean")


def trained(seed: int, folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and the networks of a short run with a critic."""
    words = ["algo=reinforce", f"env={ENV}", f"total_timesteps={TRAINED}", f"seed={seed}", "tensorboard=false"]
    run_dir = pgrl.run([*words, "threads=1", f"run_dir={folder / f'seed_{seed}'}"])
    agent = pgrl.load(run_dir)
    return load_run(run_dir), {k: v.clone() for k, v in agent.net.state_dict().items()}  # type: ignore[attr-defined]


def measure(seed: int, rollouts: int, folder: Path) -> list[dict[str, Any]]:
    """The total variance of the gradient estimate of each baseline, over rollouts of one policy."""
    config, net = trained(seed, folder)
    env = make_vec(config.env, config.num_envs, 1_000 + seed)
    agents = []
    for baseline in BASELINES:
        agent: Any = make_agent(replace(config, algo=replace(config.algo, baseline=baseline)), env)
        agent.net.load_state_dict(net)
        record(agent)
        agents.append(agent)
    rollout = Rollout(agents[0].num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    obs = env.reset()
    gradients: list[list[torch.Tensor]] = [[] for _ in agents]
    returns: list[float] = []
    for _ in range(rollouts):
        transition = collect(env, agents[0], rollout, obs, env.device)
        obs = rollout.obs[-1].clone()
        returns += env.episodes().env_return
        for agent, found in zip(agents, gradients, strict=True):
            found.append(ascent(agent, transition).double())
    env.close()
    rows = []
    for baseline, found in zip(BASELINES, gradients, strict=True):
        stacked = torch.stack(found)
        variance = float(stacked.var(0).sum())
        squared = float(stacked.mean(0).square().sum()) - variance / rollouts  # without the mean's own noise
        values = (seed, name(baseline), rollouts, f"{variance:.6g}", f"{squared:.6g}", f"{np.mean(returns):.1f}")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def name(baseline: str | None) -> str:
    return baseline or "null"


def ratios(rows: Sequence[dict[str, Any]], baseline: str | None) -> list[float]:
    """The variance of a baseline as a share of that without one, by seed."""
    of = {(row["seed"], row["baseline"]): float(row["variance"]) for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [of[seed, name(baseline)] / of[seed, "null"] for seed in seeds]


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curves(baseline: str | None, results: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [G] and training returns [S, G] of a baseline's trial, or of the suite itself; None if it was not run."""
    path = results / "trials/curves" / f"baseline-{name(baseline)}.csv"
    path = results / "curves/reinforce-cartpole.csv" if baseline == "value" else path
    if not path.exists():
        return None
    table = read(path)
    steps = np.array([float(row["step"]) for row in table])
    return steps, np.array([[float(row[key]) for row in table] for key in table[0] if key != "step"])


def table(rows: Sequence[dict[str, Any]], results: Path) -> str:
    """The markdown table of both comparisons."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"| `baseline=` | variance of the gradient, share of that without [95 % interval], {seeds} policies "
        "| seeds | mean training return over 200,000 steps [95 % interval] | last tenth |",
        "|---|--:|--:|--:|--:|",
    ]
    for baseline in BASELINES:
        share = ratios(rows, baseline)
        low, high = bootstrap_interval(share, lambda x: float(np.mean(x)))
        line = f"| `{name(baseline)}` | {np.mean(share):.3f} [{low:.3f}, {high:.3f}] |"
        found = curves(baseline, results)
        if found is None:
            lines.append(f"{line} 0 | | |")
            continue
        returns = found[1]
        means = np.nanmean(returns, axis=1)
        low, high = bootstrap_interval(list(means), lambda x: float(np.mean(x)))
        last = np.nanmean(returns[:, -len(returns[0]) // 10 :])
        lines.append(f"{line} {len(returns)} | {means.mean():.0f} [{low:.0f}, {high:.0f}] | {last:.0f} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], results: Path, path: Path) -> None:
    """Write the picture: learning curves on the left, variances on the right."""
    from matplotlib.figure import Figure

    from plot_curves import GREY, bootstrap_band, save, short

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for baseline, colour in zip(BASELINES, COLOURS, strict=True):
        found = curves(baseline, results)
        if found is not None:
            steps, returns = found
            left.plot(steps, returns.mean(0), color=colour, linewidth=1.8, label=name(baseline))
            left.fill_between(steps, *bootstrap_band(returns), color=colour, alpha=0.12, linewidth=0)
    left.set_xlabel("environment steps", fontsize=9)
    left.set_ylabel(f"return of a training episode, {ENV}", fontsize=9)
    left.xaxis.set_major_formatter(lambda value, _: short(value))
    if left.lines:
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    for place, (baseline, colour) in enumerate(zip(BASELINES, COLOURS, strict=True)):
        share = ratios(rows, baseline)
        right.barh(place, np.mean(share), 0.6, color=colour)
        right.plot(share, [place] * len(share), linestyle="none", marker="o", markersize=3, color="#222222")
        right.text(max(share) + 0.03, place, f"{np.mean(share):.3f}", va="center", fontsize=8)
    right.set_yticks(range(len(BASELINES)), [name(b) for b in BASELINES], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0.0, 1.2)
    right.set_xlabel("variance of the gradient (1 without a baseline)", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=GREY)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="policies to measure at (default 5)")
    parser.add_argument("--rollouts", type=int, default=40, help="estimates of each baseline (default 40)")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the tables go")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where the picture goes")
    options = parser.parse_args(arguments)
    path: Path = options.results / "reinforce-baselines.csv"
    if not options.report:
        torch.set_num_threads(1)
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(1, options.seeds + 1):
                rows += measure(seed, options.rollouts, Path(folder))
                print(f"seed {seed} of {options.seeds} measured", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    rows = read(path)
    text = table(rows, options.results)
    path.with_suffix(".md").write_text(text)
    plot(rows, options.results, options.pictures / "reinforce-baselines.png")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
