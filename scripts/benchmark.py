"""Train the benchmark suites on several seeds, resumably, and make their tables and pictures.

    python scripts/benchmark.py                         every suite, 5 seeds, 2 runs at a time
    python scripts/benchmark.py 'ppo-*' --seeds 10      the suites that match, seeds 1 to 10
    python scripts/benchmark.py --report                tables and pictures from what is there
    python scripts/benchmark.py ppo-hopper --extra algo.learning_rate=1e-3 --name lr-1e-3    a trial

Every run is a child process with one thread. Ctrl-C or SIGTERM makes the children write a checkpoint and ends
the runner; the same command goes on from there, skips what is done, and names what failed. Trials go to
results/trials and never into the main table.
"""

import argparse
import csv
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.live import Live
from rich.text import Text

from bench_peers import processor
from pgrl import __version__
from pgrl.config import compose
from pgrl.errors import UserError
from pgrl.evaluate import bootstrap_interval, iqm
from pgrl.files import lock
from pgrl.logger import read_rows
from plot_curves import BINS, Curves, bin_returns, plot_grid, plot_suite, short

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, "-m", "pgrl.train"]
EVALUATE = [sys.executable, "-m", "pgrl.evaluate"]
POLL_SECONDS = 0.2
PLAIN_LINE_SECONDS = 60.0


@dataclass(frozen=True)
class Suite:
    """One algorithm on one env: how long, the score to reach, and a published score with its source."""

    name: str
    algo: str
    env: str
    total_timesteps: int
    target: float
    reference: float
    source: str
    every_seed: bool = False  # the target is for the worst seed, not for the mean over seeds
    extra: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.algo.upper()} · {self.env} · {short(self.total_timesteps)}"


ZOO, ZOO_20K, ZOO_50K, ZOO_100K, ZOO_500K = (
    f"RL Baselines3 Zoo, one run, {n}" for n in ("1M", "20k", "50k", "100k", "500k")
)
BEST = "best published mean over seeds, 1M, MuJoCo v2-v4"
BEST_100K = "best published mean over seeds, 100k, MuJoCo v2-v4"
BEST_300K = "best published mean over seeds, 300k, MuJoCo v2-v4"
ENGSTROM = "Engstrom et al. 2020, training return, 1M, v2"
COMPILED = ("compile=true",)
ONE_STEP = (*COMPILED, "algo.utd_ratio=1", "algo.network.layer_norm=false")  # the tuned files ask for more, and norms
RICCATI = "the best controller there is, on the same 20 episodes"
SUITES = (
    Suite("ppo-cartpole", "ppo", "CartPole-v1", 100_000, 500, 500, ZOO_100K, every_seed=True),
    Suite("ppo-acrobot", "ppo", "Acrobot-v1", 500_000, -85, -73.5, ZOO),
    Suite("ppo-pendulum", "ppo", "Pendulum-v1", 300_000, -200, -172.2, ZOO_100K),
    Suite("ppo-lunarlander", "ppo", "LunarLander-v3", 1_000_000, 220, 242.1, ZOO + ", LunarLander-v2"),
    Suite("ppo-mountaincar-continuous", "ppo", "MountainCarContinuous-v0", 100_000, 85, 88.3, ZOO_20K),
    Suite("ppo-halfcheetah", "ppo", "HalfCheetah-v4", 1_000_000, 4000, 5780, BEST, extra=COMPILED),
    Suite("ppo-hopper", "ppo", "Hopper-v4", 1_000_000, 2520, 2513, ENGSTROM, extra=COMPILED),
    Suite("ppo-walker2d", "ppo", "Walker2d-v4", 1_000_000, 3300, 3494, BEST, extra=COMPILED),
    Suite(
        "ppo-inverted-double-pendulum", "ppo", "InvertedDoublePendulum-v4", 1_000_000, 8700, 8695, BEST, extra=COMPILED
    ),
    Suite("a2c-cartpole", "a2c", "CartPole-v1", 500_000, 500, 500, ZOO_500K),
    Suite("a2c-halfcheetah", "a2c", "HalfCheetah-v4", 1_000_000, 1900, 1936, BEST, extra=COMPILED),
    Suite("reinforce-cartpole", "reinforce", "CartPole-v1", 200_000, 480, 483, "Tianshou, 200k"),
    Suite("a3c-cartpole", "a3c", "CartPole-v1", 500_000, 475, 500, ZOO_500K + ", A2C"),
    Suite("npg-hopper", "npg", "Hopper-v4", 1_000_000, 1900, 1915, BEST, extra=COMPILED),
    Suite("npg-halfcheetah", "npg", "HalfCheetah-v4", 1_000_000, 3400, 3476, BEST, extra=COMPILED),
    Suite("trpo-cartpole", "trpo", "CartPole-v1", 100_000, 500, 500, ZOO_100K),
    Suite("trpo-hopper", "trpo", "Hopper-v4", 1_000_000, 3000, 3372, BEST, extra=COMPILED),
    Suite("trpo-walker2d", "trpo", "Walker2d-v4", 1_000_000, 3500, 4502, BEST, extra=COMPILED),
    Suite("trpo-halfcheetah", "trpo", "HalfCheetah-v4", 1_000_000, 3400, 4403, BEST, extra=COMPILED),
    Suite("sac-pendulum", "sac", "Pendulum-v1", 20_000, -165, -157, ZOO_20K, extra=COMPILED),
    Suite("ddpg-pendulum", "ddpg", "Pendulum-v1", 20_000, -170, -152, ZOO_20K, extra=COMPILED),
    Suite("sac-mountaincar-continuous", "sac", "MountainCarContinuous-v0", 50_000, 93, 94.7, ZOO_50K, extra=COMPILED),
    Suite("sac-cartpole", "sac", "CartPole-v1", 50_000, 450, 500, "the largest return", extra=COMPILED),
    Suite("sac-halfcheetah", "sac", "HalfCheetah-v4", 100_000, 6000, 6515, BEST_100K, extra=COMPILED),
    Suite("sac-hopper", "sac", "Hopper-v4", 100_000, 2000, 2613, BEST_100K, extra=COMPILED),
    Suite("sac-lunarlander-continuous", "sac", "LunarLanderContinuous-v3", 100_000, 180, 260, ZOO_500K, extra=COMPILED),
    Suite("ddpg-halfcheetah", "ddpg", "HalfCheetah-v4", 100_000, 5500, 6308, BEST_100K, extra=COMPILED),
    Suite("sac-halfcheetah-300k", "sac", "HalfCheetah-v4", 300_000, 9000, 9163, BEST_300K, extra=COMPILED),
    Suite("sac-hopper-300k", "sac", "Hopper-v4", 300_000, 3200, 3388, BEST_300K, extra=COMPILED),
    Suite("sac-walker2d-300k", "sac", "Walker2d-v4", 300_000, 3000, 3387, BEST_300K, extra=COMPILED),
    Suite("ddpg-halfcheetah-300k", "ddpg", "HalfCheetah-v4", 300_000, 8500, 9137, BEST_300K, extra=ONE_STEP),
    Suite("trpo-swimmer", "trpo", "Swimmer-v4", 1_000_000, 340, 359, BEST, extra=COMPILED),
    Suite("dpg-linear-quadratic", "dpg", "pgrl/LinearQuadratic-v0", 64_000, -55.08, -54.54, RICCATI, every_seed=True),
)


# ------------------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """One seed of one suite, and the child that works on it now."""

    suite: Suite
    seed: int
    folder: Path  # runs/<suite>
    stage: str = "waiting"  # waiting -> training -> evaluating -> done | stopped | failed | busy
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def run_dir(self) -> Path:
        return self.folder / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / f"seed_{self.seed}.log"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} if it is missing or torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def next_command(job: Job, retry: bool) -> list[str] | None:
    """The child that brings `job` on, None if there is none; sets `job.stage`."""
    run_dir, state = job.run_dir, read_json(job.run_dir / "status.json").get("state")
    if state == "done":
        job.stage = "done" if (run_dir / "evaluation.json").exists() else "evaluating"
        return None if job.stage == "done" else [*EVALUATE, f"run={run_dir}", "episodes=20", "seed=0"]
    if state == "failed" and not retry:
        job.stage = "failed"
        return None
    job.stage = "training"
    if run_dir.exists():
        try:
            with lock(run_dir):
                if any(run_dir.glob("checkpoints/step_*")):
                    return [*TRAIN, f"resume={run_dir}"]
            shutil.rmtree(run_dir)  # it died before its first checkpoint: there is nothing to continue
        except UserError:
            job.stage = "busy"
            return None
    job.folder.mkdir(parents=True, exist_ok=True)
    job.log.with_suffix(".json").write_text(json.dumps(provenance()))
    suite = job.suite
    return [
        *TRAIN,
        f"algo={suite.algo}",
        f"env={suite.env}",
        f"total_timesteps={suite.total_timesteps}",
        f"seed={job.seed}",
        "threads=1",
        f"run_dir={run_dir}",
        *suite.extra,
    ]


def start(job: Job, command: Sequence[str]) -> None:
    """Start the child in its own process group: a Ctrl-C must reach it once, through the runner."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with job.log.open("ab") as log:
        job.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )


def run_jobs(jobs: Sequence[Job], parallel: int, retry: bool) -> int:
    """Bring every job to its end, `parallel` at a time; 0, 1 if one failed, 128 + signal if one arrived."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    waiting, active, passed_on = list(jobs), list[Job](), 0
    try:
        with Progress(jobs) as progress:
            while active or (waiting and not received):
                while waiting and len(active) < parallel and not received:
                    job = waiting.pop(0)
                    command = next_command(job, retry)
                    if command is not None:
                        start(job, command)
                        active.append(job)
                for number in received[passed_on:]:
                    for job in active:
                        assert job.process is not None
                        job.process.send_signal(number)
                passed_on = len(received)
                for job in list(active):
                    assert job.process is not None
                    code = job.process.poll()
                    if code is None:
                        continue
                    active.remove(job)
                    state = read_json(job.run_dir / "status.json").get("state")
                    if code == 0 and job.stage == "evaluating":
                        job.stage = "done"
                    elif code == 0 and state == "done" and not received:
                        waiting.insert(0, job)  # its evaluation comes next
                    else:
                        job.stage = "stopped" if received else "failed"
                progress.show()
                time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return int(any(job.stage in ("failed", "busy") for job in jobs))


def provenance() -> dict[str, str]:
    """What a result depends on besides its config: pgrl's version, the commit, the processor."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    # the tables and pictures that this script writes change no run
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "configs", "scripts")
    commit = git("describe", "--always") + "-dirty" * bool(changed)
    return {"version": __version__, "commit": commit, "machine": processor()}


# --------------------------------------------------------------------------------------------------- progress


class Progress:
    """One line a running job: redrawn in place on a terminal, printed once a minute elsewhere."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.live = Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else None
        self.printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self) -> None:
        plain = self.live is None
        if plain and time.monotonic() - self.printed < PLAIN_LINE_SECONDS:
            return
        self.printed = time.monotonic()
        done = sum(job.stage == "done" for job in self.jobs)
        failed = sum(job.stage in ("failed", "busy") for job in self.jobs)
        lines = [f"{done} of {len(self.jobs)} runs done" + (f", {failed} failed" if failed else "")]
        lines += [progress_line(job) for job in self.jobs if job.stage in ("training", "evaluating")]
        if self.live is not None:
            self.live.update(Text("\n".join(lines)), refresh=True)
        else:
            print("\n".join(lines), flush=True)


def progress_line(job: Job) -> str:
    """Step, share, return, speed and time left of a running job, from the last row of its metrics."""
    name = f"  {job.suite.name} seed {job.seed}"
    if job.stage == "evaluating":
        return f"{name}: evaluating"
    row = last_row(job.run_dir / "metrics.jsonl")
    if not row:
        return f"{name}: starting"
    step, total = int(row["step"]), job.suite.total_timesteps
    speed = float(row.get("charts/SPS", 0)) or step / max(float(row["time"]), 1e-9)
    left = (total - step) / max(speed, 1e-9)
    reward = float(row.get("charts/episodic_return_100", "nan"))
    return (
        f"{name}: {step:,} of {total:,} ({step / total:.0%}), return {reward:,.1f}, "
        f"{speed:,.0f} steps/s, {left / 60:.0f} min left"
    )


def last_row(path: Path, tail: int = 16_384) -> dict[str, Any]:
    """The last whole row of a metrics.jsonl, reading only its end; {} if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines[:-1]):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


# ---------------------------------------------------------------------------------------------------- results

MEASURED = "suite algo env seed steps eval_mean eval_std train_return_100 sps seconds"
COLUMNS = f"{MEASURED} version commit machine".split()
Row = dict[str, str]


def result_row(job: Job) -> Row:
    """One line of results/<suite>.csv, from the folder of a run that is done and evaluated."""
    evaluation = read_json(job.run_dir / "evaluation.json")
    rows = read_rows(job.run_dir)
    recent = [row["charts/episodic_return_100"] for row in rows if "charts/episodic_return_100" in row]
    steps, seconds = int(rows[-1]["step"]), float(rows[-1]["time"])
    scores = (evaluation["return_mean"], evaluation["return_std"], float(recent[-1]) if recent else np.nan)
    values = (job.suite.name, job.suite.algo, job.suite.env, job.seed, steps, *(f"{s:.2f}" for s in scores))
    values += (f"{steps / seconds:.0f}", f"{seconds:.1f}")
    row = dict(zip(MEASURED.split(), map(str, values), strict=True)) | read_json(job.log.with_suffix(".json"))
    return {column: row.get(column, "") for column in COLUMNS}


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def store(job: Job, results: Path) -> None:
    """Put a finished run into <suite>.csv and its binned training returns into curves/<suite>.csv."""
    path = results / f"{job.suite.name}.csv"
    rows = {row["seed"]: row for row in read_csv(path)} | {str(job.seed): result_row(job)}
    write_csv(path, COLUMNS, [rows[seed] for seed in sorted(rows, key=int)])

    total = job.suite.total_timesteps
    curve = bin_returns(read_rows(job.run_dir), total)
    path = results / "curves" / f"{job.suite.name}.csv"
    name = f"seed_{job.seed}"
    table = read_csv(path) or [{"step": str(round((i + 1) * total / BINS))} for i in range(BINS)]
    for row, value in zip(table, curve, strict=True):
        row[name] = f"{value:.2f}"
    seeds = sorted((column for column in table[0] if column != "step"), key=lambda column: int(column[5:]))
    write_csv(path, ("step", *seeds), table)


def read_curves(suite: Suite, results: Path) -> Curves | None:
    """The learning curves of a suite as stored, with its final evaluations; None if there are none."""
    table = read_csv(results / "curves" / f"{suite.name}.csv")
    if not table:
        return None
    steps = np.array([float(row["step"]) for row in table])
    returns = np.array([[float(row[column]) for row in table] for column in table[0] if column != "step"])
    final = np.array([float(row["eval_mean"]) for row in read_csv(results / f"{suite.name}.csv")])
    return Curves(suite.title, steps, returns, final, suite.reference)


HEADER = (
    "| suite | env | steps | seeds | mean ± std | IQM [95 % interval] | min | training return | target | met "
    "| reference | steps/s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|:-:|:--|--:|"
)
NOTES = """
Score of a seed: the mean return of 20 deterministic episodes after training. IQM: interquartile mean over
seeds, with a percentile bootstrap interval. Training return: the last 100 training episodes (with
exploration), mean over seeds. The target is for the mean over seeds, or for the worst seed where it says
so. Steps/s: median over seeds of a run with one thread, others running beside it. References follow other
protocols and env versions, as noted.
"""


def table_line(suite: Suite, rows: Sequence[Row]) -> str:
    """A suite's line of the table: its scores over seeds beside its target and reference."""
    scores = [float(row["eval_mean"]) for row in rows]
    training = float(np.mean([float(row["train_return_100"]) for row in rows]))
    low, high = bootstrap_interval(scores, iqm)
    met = (min(scores) if suite.every_seed else float(np.mean(scores))) >= suite.target
    speed = float(np.median([float(row["sps"]) for row in rows]))
    cells = (
        suite.name,
        suite.env,
        f"{suite.total_timesteps:,}",
        str(len(rows)),
        number(float(np.mean(scores))) + (f" ± {number(float(np.std(scores, ddof=1)))}" if len(scores) > 1 else ""),
        f"{number(iqm(scores))} [{number(low)}, {number(high)}]",
        number(min(scores)),
        number(training),
        f"{suite.target:,g}" + (" on every seed" if suite.every_seed else ""),
        "yes" if met else "**no**",
        f"{suite.reference:,g} ({suite.source})",
        f"{speed:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def number(value: float) -> str:
    """Four significant digits or whole numbers: 9,312, 497.3, -81.85."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def report(suites: Sequence[Suite], results: Path, pictures: Path, table_name: str = "table.md") -> str:
    """Write the table and the pictures of every suite that has results; return the table."""
    lines = [HEADER]
    curves: dict[str, Curves] = {}
    for suite in suites:
        rows = read_csv(results / f"{suite.name}.csv")
        stored = read_curves(suite, results)
        if rows and stored is not None:
            lines.append(table_line(suite, rows))
            curves[suite.name] = stored
    table = "\n".join(lines) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / table_name).write_text(table + NOTES)
    for name, curve in curves.items():
        plot_suite(curve, pictures / f"{name}.png")
    if len(curves) > 1:
        plot_grid(list(curves.values()), pictures / "curves.png")
    return table


def choose(patterns: Sequence[str], extra: Sequence[str], name: str | None) -> list[Suite]:
    """The suites that match, or the one trial that `extra` and `name` make of a suite."""
    known = ", ".join(suite.name for suite in SUITES)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(suite.name, pattern) for suite in SUITES):
            raise UserError(f"no suite matches {pattern!r}; there are: {known}")
    suites = [s for s in SUITES if any(fnmatch.fnmatch(s.name, pattern) for pattern in patterns or ["*"])]
    if not extra and name is None:
        return suites
    if len(suites) != 1 or not extra or name is None or any(name == suite.name for suite in SUITES):
        raise UserError("a trial needs one suite, --extra with its overrides, and --name with a new name")
    steps = [int(word.partition("=")[2]) for word in extra if word.startswith("total_timesteps=")]
    total = steps[-1] if steps else suites[0].total_timesteps
    rest = tuple(word for word in extra if not word.startswith("total_timesteps="))
    return [replace(suites[0], name=name, total_timesteps=total, extra=rest)]


def check_same(suite: Suite, folder: Path) -> None:
    """Refuse to mix runs of two configurations in one folder; note the configuration in a new one."""
    path = folder / "suite.json"
    command = [f"algo={suite.algo}", f"env={suite.env}", f"total_timesteps={suite.total_timesteps}", *suite.extra]
    config = {"command": command, "config": asdict(compose(command))}  # the tuned file is part of it
    if path.exists() and read_json(path) != config:
        raise UserError(f"{folder} holds runs of another configuration, {path} says which; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="names or patterns; all of them if none is given")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "results/runs", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the tables go")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where the pictures go")
    parser.add_argument("--extra", action="append", default=[], help="a trial's override; may be repeated")
    parser.add_argument("--name", help="the name of the trial")
    parser.add_argument("--retry", action="store_true", help="continue failed runs, too")
    parser.add_argument("--report", action="store_true", help="only make tables and pictures")
    options = parser.parse_args(arguments)
    try:
        suites = choose(options.suites, options.extra, options.name)
        runs: Path = options.runs.resolve()
        for suite in suites if not options.report else []:
            check_same(suite, runs / suite.name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    trial = bool(options.extra)
    results: Path = options.results / "trials" if trial else options.results
    pictures: Path = results if trial else options.pictures
    jobs = [Job(suite, seed, runs / suite.name) for suite in suites for seed in range(1, options.seeds + 1)]
    code = 0 if options.report else run_jobs(jobs, options.jobs, options.retry)
    for job in jobs:
        if (job.run_dir / "evaluation.json").exists():
            store(job, results)
    table_name = f"{options.name}.md" if trial else "table.md"
    print(report(suites if trial else SUITES, results, pictures, table_name))
    for job in jobs:
        if job.stage in ("failed", "stopped", "busy"):
            said = job.log.read_text(errors="replace").split("\n") if job.log.exists() else []
            last = next((line for line in reversed(said) if line), "")
            print(f"{job.suite.name} seed {job.seed}: {job.stage}: {last}\n  see {job.log}")
    return code


if __name__ == "__main__":
    sys.exit(main())
