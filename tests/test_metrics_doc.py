"""docs/metrics.md lists exactly the tags that runs write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pgrl
from pgrl.logger import read_rows

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
LINE = re.compile(r"^\| `([^`]+)` \| ([a-z0-9, ]+) \| .+ \| (.+) \|$", re.MULTILINE)
SMALL = ["algo.learning_starts=64", "algo.batch_size=16", "algo.network.hidden_sizes=[16]"]
RUNS = {
    "ppo": [
        "total_timesteps=1024",
        "num_envs=2",
        "algo.num_steps=64",
        "algo.num_minibatches=2",
        "algo.update_epochs=2",
        "algo.kl_coef=0.2",
        "algo.target_kl=0.5",
    ],
    "a2c": ["total_timesteps=640", "num_envs=4"],
    "reinforce": ["total_timesteps=4000", "num_envs=2", "algo.num_steps=500", "algo.num_minibatches=2"],
    **dict.fromkeys(("npg", "trpo"), ["total_timesteps=1024", "num_envs=2", "algo.num_steps=64"]),
    "a3c": ["total_timesteps=640", "algo.num_workers=2", "algo.num_steps=16"],
    "dpg": ["total_timesteps=640", "num_envs=2", "algo.num_steps=4"],
    "sac": ["total_timesteps=640", *SMALL],
    "ddpg": ["total_timesteps=640", *SMALL],
}
ENVS = {"dpg": "pgrl/LinearQuadratic-v0", "ddpg": "Pendulum-v1"}  # the others' is CartPole-v1
COMMON = ["log_every=128", "eval_every=256", "eval_episodes=2", "threads=1", "tensorboard=false"]


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, float]]]:
    """An algorithm's name and the rows of a short run of it."""
    algo = request.param
    run_dir = tmp_path_factory.mktemp("metrics") / algo
    pgrl.run([f"algo={algo}", f"env={ENVS.get(algo, 'CartPole-v1')}", *COMMON, *RUNS[algo], f"run_dir={run_dir}"])
    return algo, read_rows(run_dir)


def documented() -> dict[str, tuple[list[str], str]]:
    """Of each tag, the algorithms that write it, and when."""
    return {tag: (algos.split(", "), when) for tag, algos, when in LINE.findall(PAGE.read_text(encoding="utf-8"))}


def test_tags_are_the_documented_ones(run: tuple[str, list[dict[str, float]]]) -> None:
    algo, rows = run
    assert {tag for row in rows for tag in row} == {tag for tag, (algos, _) in documented().items() if algo in algos}


def test_tags_that_are_always_there(run: tuple[str, list[dict[str, float]]]) -> None:
    algo, rows = run
    # all of these runs learn before their first row
    whens = ("always", "once it learns")
    always = {tag for tag, (algos, when) in documented().items() if algo in algos and when in whens}
    assert len(always) > 10
    for row in rows:
        assert always <= row.keys()


def test_values_are_what_the_page_says(run: tuple[str, list[dict[str, float]]]) -> None:
    algo, rows = run
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    for before, row in zip(rows, rows[1:], strict=False):
        assert row["time"] > before["time"]
        assert row["charts/updates"] > before["charts/updates"]
        assert ("eval/return_mean" in row) == (row["step"] // 256 > before["step"] // 256 or row is rows[-1])
        # CartPole pays 1 for each step
        assert algo in ENVS or row.get("charts/episodic_return") == row.get("charts/episodic_length")
        assert "charts/episodic_return" in row or "charts/episodic_return_100" in before
    seconds = sum(row["time/collect"] + row["time/update"] for row in rows)
    assert 0 < seconds < rows[-1]["time"]
