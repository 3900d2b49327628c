"""The return of an agent that does not explore; also `python -m pgrl.evaluate`."""

from __future__ import annotations

if __name__ == "__main__":  # here, not at the end, as in train.py
    from importlib import import_module

    from pgrl import config as command_line

    command_line.evaluate_main(None, lambda options: import_module("pgrl.evaluate").report(options))
    raise SystemExit

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgrl import checkpoint, env_ids, files
from pgrl import config as configuration
from pgrl.agents import Agent
from pgrl.config import EvaluateConfig, RunConfig
from pgrl.envs import EnvConfig, make_vec, to_evaluate
from pgrl.errors import CheckpointError
from pgrl.runs import load_agent, make_agent, set_up

MAX_ENVS = 32
LONGEST = 10_000  # steps of an episode of an env that has no time limit
EVALUATION_STREAM = 1_000_003  # added to the seed, so that evaluation never plays the episodes of training


class Evaluation(NamedTuple):
    """Returns and lengths (in steps) of whole episodes, in the order of their numbers."""

    returns: list[float]
    lengths: list[int]


@torch.no_grad()
def evaluate(
    agent: Agent, env_config: EnvConfig, episodes: int, seed: int, device: torch.device | str = "cpu"
) -> Evaluation:
    """Play `episodes` episodes side by side with the most likely actions; the agent does not change.

    Each env plays a share of the episodes fixed beforehand, so short episodes are not over-represented. Episodes of an
    env without a time limit are cut after LONGEST steps: a policy that stands still would never end them. An agent
    trained in the envs of another backend plays in Gymnasium's, where these are the same (`to_evaluate`).
    """
    env_config = to_evaluate(env_config)
    if env_config.max_episode_steps is None and env_ids.time_limit(env_config.id, env_config.backend) is None:
        env_config = replace(env_config, max_episode_steps=LONGEST)
    num_envs = min(episodes, MAX_ENVS)
    share = [len(range(i, episodes, num_envs)) for i in range(num_envs)]
    played: list[list[tuple[float, int]]] = [[] for _ in range(num_envs)]
    env = make_vec(env_config, num_envs, seed + EVALUATION_STREAM)
    try:
        obs = env.reset()
        while any(len(p) < s for p, s in zip(played, share, strict=True)):
            obs = env.step(agent.act(obs.to(device), explore=False)).obs
            for env_return, length, i in zip(*env.episodes(), strict=True):
                if len(played[i]) < share[i]:
                    played[i].append((env_return, length))
    finally:
        env.close()
    in_order = [played[k % num_envs][k // num_envs] for k in range(episodes)]
    return Evaluation([r for r, _ in in_order], [n for _, n in in_order])


def iqm(x: Sequence[float]) -> float:
    """The interquartile mean: the mean of the middle half, with fractional weights at its ends.

    Agarwal et al. 2021 (arXiv 2108.13264), section 4.3.
    """
    values = np.sort(np.asarray(x, np.float64))
    n = len(values)
    low, high = n / 4, 3 * n / 4
    weight = np.array([max(0.0, min(i + 1, high) - max(i, low)) for i in range(n)])
    return float((values * weight).sum() / weight.sum())


def bootstrap_interval(
    x: Sequence[float],
    statistic: Callable[[Sequence[float]], float],
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic from `n` resamples: Efron & Tibshirani 1993, section 13.3."""
    values = np.asarray(x, np.float64)
    if len(values) < 2:
        return (math.nan, math.nan)
    rng = np.random.default_rng(seed)
    samples = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(n)]  # type: ignore[arg-type]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def load(run_dir: Path, which: str = "last") -> tuple[Agent, RunConfig, int]:
    """The agent of a run at a checkpoint (`last`, `best` or a step), the run's config, and the checkpoint's step.

    Reads the run's folder and changes nothing in it. The agent is for acting: its parameters want no gradients, so that
    its actions are plain tensors. CheckpointError if there is no such checkpoint.
    """
    agent, config, step = restored(run_dir, which)
    for parameter in agent.parameters():
        parameter.requires_grad_(False)
    return agent, config, step


def restored(run_dir: Path, which: str) -> tuple[Agent, RunConfig, int]:
    """What `load` gives, but for the agent's parameters, which are those of training."""
    config = replace(configuration.load_run(run_dir), device="cpu", compile=False)
    step, state = newest(run_dir)
    if which != "last":
        steps = checkpoint.list_steps(run_dir)
        step = state["position"]["best_step"] if which == "best" else int(which) if which.isdecimal() else -1
        if step not in steps:
            raise CheckpointError(
                f"checkpoint={which}: this run keeps the checkpoints of steps {', '.join(map(str, steps))}"
                f"{'; the best one is known after an evaluation (eval_every)' * (which == 'best')}.\n"
                f"Try: python -m pgrl.evaluate run={run_dir} checkpoint={steps[-1]}"
            )
        state = checkpoint.load(checkpoint.folder(run_dir, step), rows=False)
    env = make_vec(config.env, 1, config.seed)
    agent = make_agent(config, env)
    env.close()
    load_agent(agent, state)
    return agent, config, step


def newest(run_dir: Path) -> tuple[int, dict[str, Any]]:
    """The step and state of the newest checkpoint that is whole, without rows; nothing in the folder is renamed."""
    for step in reversed(checkpoint.list_steps(run_dir)):
        try:
            return step, checkpoint.load(checkpoint.folder(run_dir, step), rows=False)
        except CheckpointError as error:
            logging.getLogger("pgrl").warning("%s", error)
    raise CheckpointError(f"run={run_dir}: it has no checkpoint yet.\nTry: python -m pgrl.train resume={run_dir}")


def main(argv: list[str] | None = None) -> None:
    """Evaluate a run and write evaluation.json beside it."""
    configuration.evaluate_main(argv, report)


def report(options: EvaluateConfig) -> None:
    """Print and write what `options` asks for."""
    run_dir = Path(options.run)
    agent, config, step = restored(run_dir, options.checkpoint)
    set_up(config, agent)
    result = evaluate(agent, config.env, options.episodes, options.seed)
    returns = result.returns
    low, high = bootstrap_interval(returns, iqm)
    summary = {
        "step": step,
        "episodes": options.episodes,
        "seed": options.seed,
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "return_iqm": iqm(returns),
        "return_ci": [low, high] if len(returns) > 1 else None,
        "length_mean": float(np.mean(result.lengths)),
        "returns": returns,
        "lengths": result.lengths,
    }
    files.write_text(run_dir / "evaluation.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"{agent.name} on {config.env.id} at step {step:,}, {options.episodes} episodes without exploration:\n"
        f"  return {summary['return_mean']:,.2f} +- {summary['return_std']:,.2f} (mean, std)\n"
        f"  IQM    {summary['return_iqm']:,.2f} [{low:,.2f}, {high:,.2f}] (95 % bootstrap interval)\n"
        f"  length {summary['length_mean']:,.1f} steps\n"
        f"written to {run_dir / 'evaluation.json'}"
    )
