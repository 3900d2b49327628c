"""Wall-clock to a score: from the start of a process to a greedy policy that holds it, beside Stable-Baselines3.

    python scripts/bench_score.py                      every env, 5 seeds of each side, in turns
    python scripts/bench_score.py --only cartpole      one env (--only may be repeated)
    python scripts/bench_score.py --report             table and picture from results/scores.jsonl

Seconds run from the start of a fresh process (interpreter, imports, and what is compiled, with an empty cache) to the
end of the check that succeeds. Both sides train in pieces: each time that a multiple of so many env steps is reached,
after the update there, the policy without exploration plays the same 20 episodes, side by side, in the same function
on both sides. Its seconds count. A side that does not reach the score within the limits of steps and of seconds counts
as the limit of seconds, and is marked; so the median holds where most seeds reach it. Before a side learns, while it
only gathers random actions, it is not checked.

pgrl's side is `pgrl.run`, the command line, with the check behind `Upkeep.tend`, which comes after each update: not
`eval_every`, which would also write a checkpoint of each best policy, and play other episodes in other envs than the
other side's. The other side's check stands behind `train`, its update.

What each side trains with is in TASKS. Stable-Baselines3 has the settings of RL Baselines3 Zoo (hyperparams/ppo.yml and
hyperparams/sac.yml in its repository; of SAC, HalfCheetah-v3's for HalfCheetah-v4) and of the algorithms there the one
with the fewest steps: PPO on CartPole-v1, SAC on the others, for which its PPO is given 100,000 and 1,000,000. pgrl has
its tuned settings (configs/tuned) and the algorithm that gets there first; what differs from the tuned file is written
out. It was chosen by trials with seeds 11 to 18, none of which is reported: TRPO before PPO and REINFORCE on
CartPole-v1; PPO before SAC, DDPG and TRPO on Pendulum-v1, with rollouts of a quarter of the tuned ones (12,288 steps in
the place of 28,672); TRPO before PPO and NPG on HalfCheetah-v4. So seconds can be compared between the sides, and steps
cannot. Each side has the threads that its networks want: one where they are small, two for SAC's.

Every finished run is a line of results/scores.jsonl with all its checks, and the same command goes on where it was
stopped. Lines of other settings or threads are kept, and neither counted nor shown. Leave the machine alone while this
runs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import bench_peers

ROOT = Path(__file__).resolve().parent.parent
SIDES = bench_peers.SIDES
NAMES = {"pgrl": "pgrl", "peer": "Stable-Baselines3"}
EPISODES, FIRST_EPISODE = 20, 1_000_000  # of a check, and the seed of its first
Row = dict[str, Any]
Act = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Linear:
    """A schedule from `start` to 0, as the peer takes it: a function of what remains of the training, 1 to 0."""

    start: float

    def __call__(self, remaining: float) -> float:
        return remaining * self.start


@dataclass(frozen=True)
class Task:
    """A score to reach: how often it is asked for, the limits, and what each side trains with."""

    name: str
    env: str
    score: float
    every: int  # env steps between two checks
    steps: int  # the limit; also what a schedule runs to
    seconds: float  # the limit
    threads: tuple[int, int]  # of pgrl, of the peer
    ours: str  # overrides of pgrl.train
    peer: str  # the peer's class
    settings: Mapping[str, Any]  # of its constructor
    peer_envs: int = 1

    def threads_of(self, side: str) -> int:
        return self.threads[SIDES.index(side)]

    def trained_with(self, side: str) -> str:
        """The settings of a side, in one line; they name the rows that may be compared."""
        asked = f"score={self.score:g} every={self.every} steps={self.steps} seconds={self.seconds:g}"
        if side == "pgrl":
            return f"{' '.join(self.ours.split())} {asked}"
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.peer} n_envs={self.peer_envs} {settings} {asked}"


TASKS = (
    Task(
        "cartpole",
        "CartPole-v1",
        score=475,
        every=2048,
        steps=100_000,
        seconds=120,
        threads=(1, 1),
        ours="algo=trpo compile=false",
        peer="PPO",
        peer_envs=8,
        settings=dict(
            n_steps=32,
            batch_size=256,
            gae_lambda=0.8,
            gamma=0.98,
            n_epochs=20,
            ent_coef=0.0,
            learning_rate=Linear(1e-3),
            clip_range=Linear(0.2),
        ),
    ),
    Task(
        "pendulum",
        "Pendulum-v1",
        score=-200,
        every=512,
        steps=300_000,
        seconds=300,
        threads=(1, 2),
        ours="algo=ppo algo.num_steps=256 algo.num_minibatches=16 compile=false",
        peer="SAC",
        settings=dict(learning_rate=1e-3),
    ),
    Task(
        "halfcheetah",
        "HalfCheetah-v4",
        score=2000,
        every=5120,
        steps=1_000_000,
        seconds=1800,
        threads=(1, 2),
        ours="algo=trpo compile=false",
        peer="SAC",
        settings=dict(learning_starts=10_000),
    ),
)


# --------------------------------------------------------------------------------------- in the child process


class Over(BaseException):
    """A run has come to its end. Not an Exception: nothing between it and this script is to report it as an error."""


def play(envs: Sequence[Any], act: Act) -> float:
    """The mean return of an episode of each env, side by side, whose actions `act` gives for observations [B, *obs]."""
    started = [env.reset(seed=FIRST_EPISODE + i) for i, env in enumerate(envs)]
    obs = np.stack([first for first, _ in started]).astype(np.float32)
    bounds = envs[0].action_space
    running, returns = list(range(len(envs))), np.zeros(len(envs))
    while running:
        actions = act(obs)  # for all, so that every call is of one size
        if hasattr(bounds, "low"):
            actions = np.clip(actions, bounds.low, bounds.high)
        for i in list(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += float(reward)
            if terminated or truncated:
                running.remove(i)
    return float(returns.mean())


class Checks:
    """Asks for the score where a multiple of `every` env steps is reached, and ends the run once there is an answer."""

    def __init__(self, task: Task, started: float) -> None:
        self.task, self.started = task, started
        self.rows: list[tuple[int, float, float]] = []  # env steps, seconds since the start, score
        self._envs: list[Any] = []
        self._last = 0

    def __call__(self, step: int, act: Act) -> None:
        """What comes after each update; raises `Over`."""
        if step // self.task.every == self._last // self.task.every:
            return
        self._last = step
        if not self._envs:
            import gymnasium

            self._envs = [gymnasium.make(self.task.env) for _ in range(EPISODES)]
        score = play(self._envs, act)
        seconds = time.monotonic() - self.started
        self.rows.append((step, seconds, score))
        if score >= self.task.score or seconds >= self.task.seconds or step >= self.task.steps:
            raise Over

    def result(self) -> Row:
        """Steps, seconds and score of the last check, and whether it succeeded within the limit of seconds."""
        step, seconds, score = self.rows[-1] if self.rows else (0, float("inf"), float("-inf"))
        reached = score >= self.task.score and seconds <= self.task.seconds
        counted = seconds if reached else self.task.seconds
        return {"reached": reached, "seconds": counted, "steps": step, "score": score, "checks": self.rows}


def train_pgrl(task: Task, seed: int, threads: int, folder: Path, check: Checks) -> None:
    """Train with pgrl; the check comes after `Upkeep.tend`, once there were gradient steps."""
    import pgrl  # before torch, as in every run

    # isort: split
    import torch

    from pgrl.upkeep import Upkeep

    tend = Upkeep.tend

    def checked(upkeep: Upkeep, *rest: Any, **named: Any) -> None:
        tend(upkeep, *rest, **named)
        run = upkeep._run
        starts: int = getattr(upkeep._config.algo, "learning_starts", 0)

        @torch.no_grad()
        def act(obs: NDArray[Any]) -> NDArray[Any]:
            return np.asarray(run.agent.act(torch.from_numpy(obs), explore=False))

        if run.position.step > starts:
            check(run.position.step, act)

    Upkeep.tend = checked  # type: ignore[assignment, method-assign]
    words = f"env={task.env} total_timesteps={task.steps} seed={seed} threads={threads} device=cpu"
    quiet = f"eval_every=null save_every=null tensorboard=false run_dir={folder / 'run'}"
    pgrl.run(f"{words} {quiet} {task.ours}".split())


def train_peer(task: Task, seed: int, threads: int, folder: Path, check: Checks) -> None:
    """Train with the peer; the check comes after `train`, its update."""
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    del folder  # it writes nothing
    torch.set_num_threads(threads)
    algorithm = getattr(stable_baselines3, task.peer)

    def train(model: Any, *rest: Any, **named: Any) -> None:
        algorithm.train(model, *rest, **named)
        check(model.num_timesteps, lambda obs: np.asarray(model.predict(obs, deterministic=True)[0]))

    env = make_vec_env(task.env, n_envs=task.peer_envs, seed=seed)
    model = type(task.peer, (algorithm,), {"train": train})("MlpPolicy", env, seed=seed, device="cpu", **task.settings)
    model.learn(task.steps)


def child_main(name: str, side: str, seed: str, threads: str, folder: str, started: str, changes: str) -> None:
    """What `measure` runs: the training, and its result as the last line."""
    task = replace(find(name), **json.loads(changes))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(threads) :])
    check = Checks(task, float(started))
    train = train_pgrl if side == "pgrl" else train_peer
    try:
        train(task, int(seed), int(threads), Path(folder), check)
    except Over:
        pass
    print(json.dumps(check.result()))


# ------------------------------------------------------------------------------------------------- the parent


def measure(task: Task, side: str, seed: int) -> Row:
    """One run in a fresh process, with an empty cache for what it compiles."""
    changes = {key: value for key, value in vars(task).items() if value != getattr(find(task.name), key)}
    threads = task.threads_of(side)
    with tempfile.TemporaryDirectory() as folder:
        options = (task.name, side, seed, threads, folder, time.monotonic(), json.dumps(changes))
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        return bench_peers.fresh_process([__file__, "--child", *map(str, options)], threads, cache)


def read(path: Path) -> Iterator[Row]:
    """The rows in `path`; a line that was cut when its writer died is no row."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def of(task: Task, side: str, rows: Sequence[Row]) -> dict[int, Row]:
    """The rows of one side with these settings and threads, by seed."""
    wanted = {"task": task.name, "side": side, "threads": task.threads_of(side), "settings": task.trained_with(side)}
    return {row["seed"]: row for row in rows if wanted.items() <= row.items()}


def run(tasks: Sequence[Task], seeds: int, path: Path) -> None:
    """Bring every task to so many seeds of each side, in the order A B B A, and skip what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
    for task in tasks:
        for seed, sides in enumerate(bench_peers.order(seeds), start=1):
            for side in sides:
                if seed in of(task, side, list(read(path))):
                    continue
                kind = {"task": task.name, "side": side, "seed": seed, "threads": task.threads_of(side)}
                row = kind | {"settings": task.trained_with(side)} | measure(task, side, seed)
                with path.open("a") as file:
                    file.write(json.dumps(row | {"machine": bench_peers.machine()}) + "\n")
                print(f"{task.name} seed {seed}: {NAMES[side]} {words(row)}", flush=True)


def words(row: Row) -> str:
    """What came of a run, in a few words."""
    if row["reached"]:
        return f"{row['score']:,.1f} after {row['seconds']:,.1f} s, {row['steps']:,} steps"
    return f"not reached: {row['score']:,.1f} after {row['steps']:,} steps"


HEADER = """| env | score | pgrl / Stable-Baselines3 | seconds to it, pgrl [least, most] | Stable-Baselines3 \
| times as fast | env steps | seeds that reach it | threads |
|---|--:|---|--:|--:|--:|--:|--:|--:|
"""


def table(tasks: Sequence[Task], rows: Sequence[Row]) -> str:
    """Markdown: a row for each task that both sides have seeds of."""
    text, machines = HEADER, list[dict[str, str]]()
    for task in tasks:
        sides = {side: list(of(task, side, rows).values()) for side in SIDES}
        if not all(sides.values()):
            continue
        for row in (row for side in SIDES for row in sides[side]):
            if row["machine"] not in machines:
                machines.append(row["machine"])
        seconds = {side: [row["seconds"] for row in sides[side]] for side in SIDES}
        medians = {side: float(np.median(seconds[side])) for side in SIDES}
        unknown = any(np.sum([not row["reached"] for row in sides[side]]) * 2 >= len(sides[side]) for side in SIDES)
        shown = {
            side: f"{'> ' * (medians[side] >= task.seconds)}{medians[side]:,.1f} "
            f"[{min(seconds[side]):,.1f}, {max(seconds[side]):,.1f}]"
            for side in SIDES
        }
        steps = " / ".join(f"{np.median([row['steps'] for row in sides[side]]):,.0f}" for side in SIDES)
        reached = " / ".join(f"{sum(row['reached'] for row in sides[side])} of {len(sides[side])}" for side in SIDES)
        ratio = "–" if unknown else f"**{medians['peer'] / medians['pgrl']:.2f}**"
        algorithms = f"{task.ours.split()[0].partition('=')[2].upper()} / {task.peer}"
        text += f"| {task.env} | {task.score:g} | {algorithms} | {shown['pgrl']} | {shown['peer']} | {ratio} "
        text += f"| {steps} | {reached} | {' / '.join(map(str, task.threads))} |\n"
    for machine in machines:
        text += "\n" + ", ".join(f"{key} {value}" for key, value in machine.items()) + "\n"
    return text


def plot(tasks: Sequence[Task], rows: Sequence[Row], path: Path) -> None:
    """A dot for each seed, hollow where the score was not reached, and a stroke at the median."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    from plot_curves import BLUE, GREY, ORANGE, save

    tasks = [task for task in tasks if any(of(task, side, rows) for side in SIDES)]
    figure = Figure(figsize=(7, 0.9 + 0.9 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for place, task in enumerate(tasks):
        for offset, side, colour in ((-0.2, "pgrl", BLUE), (0.2, "peer", ORANGE)):
            found = list(of(task, side, rows).values())
            if not found:
                continue
            for row in found:
                inside = colour if row["reached"] else "none"
                axes.plot(row["seconds"], place + offset, "o", markersize=6, color=colour, markerfacecolor=inside)
            middle = float(np.median([row["seconds"] for row in found]))
            axes.plot([middle] * 2, [place + offset - 0.17, place + offset + 0.17], color=colour, linewidth=2.5)
            at = max(row["seconds"] for row in found)
            axes.annotate(
                f"{middle:,.1f} s", (at, place + offset), (8, 0), textcoords="offset points", va="center", fontsize=9
            )
    for side, colour in (("pgrl", BLUE), ("peer", ORANGE)):
        axes.plot([], [], "o", color=colour, label=NAMES[side])
    axes.set_yticks(range(len(tasks)), [f"{task.env}\n{task.score:g}" for task in tasks], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=GREY)
    axes.set_xlabel("seconds from the start of the process; dots are seeds, strokes medians", fontsize=9)
    figure.legend(loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    save(figure, path)


def find(name: str) -> Task:
    for task in TASKS:
        if task.name == name:
            return task
    refuse(name)


def refuse(name: str) -> NoReturn:
    raise SystemExit(f"no env {name!r}; there are: {', '.join(task.name for task in TASKS)}")


@contextmanager
def explained() -> Iterator[None]:
    """One line in the place of a traceback where a child fails."""
    try:
        yield
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="an env; may be repeated (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this (default 5)")
    parser.add_argument("--threads", type=int, help="threads of each side (default: by the env, see TASKS)")
    parser.add_argument("--ours", help="other overrides of pgrl's side, for a trial of one env")
    parser.add_argument("--steps", type=int, help="another limit of env steps, for a trial")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where scores.jsonl and scores.md go")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where score.png goes")
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(*options.child)
        return 0
    tasks = [find(name) for name in options.only] or list(TASKS)
    changes: dict[str, Any] = {key: value for key in ("ours", "steps") if (value := getattr(options, key)) is not None}
    if options.threads is not None:
        changes["threads"] = (options.threads, options.threads)
    tasks = [replace(task, **changes) for task in tasks]
    path: Path = options.results / "scores.jsonl"
    if not options.report:
        with explained():
            run(tasks, options.seeds, path)
    rows = list(read(path))
    text = table(tasks, rows)
    path.with_name("scores.md").write_text(text)
    plot(tasks, rows, options.pictures / "score.png")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
