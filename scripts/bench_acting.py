"""What acting in C++ and in numpy saves while rollouts are collected: `pgrl.acting.Actor` beside the network itself.

    python scripts/bench_acting.py [--rollouts 76]

One thread; the three ways take turns, a rollout of 256 env steps each, in the same envs. Figures are medians over
rollouts, and each ratio's median and deciles over rollouts that follow each other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import pgrl.acting  # before numpy and torch, as in every run

# isort: split
import torch
from torch import Tensor

import pgrl.sampling
from bench_peers import processor
from pgrl.config import compose
from pgrl.data import Rollout
from pgrl.runs import build
from pgrl.train import collect

WORKLOADS = {
    "HalfCheetah-v4, 1 env": "algo=trpo env=HalfCheetah-v4 tuned=null num_envs=1 algo.num_steps=256",
    "HalfCheetah-v4, 8 envs, normalised": "algo=trpo env=HalfCheetah-v4 num_envs=8 algo.num_steps=32",
    "CartPole-v1, 4 envs": "algo=trpo env=CartPole-v1 tuned=null num_envs=4 algo.num_steps=64",
}


WAYS = ("network", "numpy", "C++")


class Acting:
    """An agent that acts in one of the ways, as it would if there were no other."""

    def __init__(self, agent: Any, way: str) -> None:
        self.agent, self.act_device, self.update_device = agent, agent.act_device, agent.update_device
        rows, pgrl.sampling.CPP_ROWS = pgrl.sampling.CPP_ROWS, rows_of(way)
        actor = pgrl.acting.Actor(agent.net, agent.obs_norm)
        pgrl.sampling.CPP_ROWS = rows
        self.sample = actor.large if way == "network" else actor.sample
        if way != "network" and not actor.acts_with.startswith(way):
            raise SystemExit(f"{way} is not what acts here: {actor.acts_with} does")

    def act(self, obs: Tensor) -> Tensor:
        action: Tensor = self.sample(obs, self.agent.noise.next(len(obs)))
        return action


def rows_of(way: str) -> int:
    """For `pgrl.sampling.CPP_ROWS`: observations in a call, up to which C++ makes actions."""
    return pgrl.sampling.CPP_ROWS if way == "C++" else 0


def measure(command: str, rollouts: int) -> dict[str, list[float]]:
    """CPU microseconds of a step of all envs, for each rollout, in each way."""
    config = compose(f"{command} algo.num_minibatches=16".split())
    run = build(config)
    agent: Any = run.agent
    rollout = Rollout(agent.num_steps, config.num_envs, run.env.obs_space, run.env.action_space, run.env.device)
    acting = {way: Acting(agent, way) for way in WAYS}
    obs, spent = run.env.reset(), {way: list[float]() for way in WAYS}
    for _ in range(rollouts + 4):
        for way, times in spent.items():
            start = time.process_time()
            collect(run.env, acting[way], rollout, obs, torch.device("cpu"))  # type: ignore[arg-type]
            times.append((time.process_time() - start) / agent.num_steps * 1e6)
            obs = rollout.obs[-1]
    run.env.close()
    return {way: times[4:] for way, times in spent.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=76, help="timed rollouts of each way (default 76)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, microseconds a step of all envs")
    for name, command in WORKLOADS.items():
        spent = measure(command, options.rollouts)
        texts = [f"network {statistics.median(spent['network']):5.0f}"]
        for way in WAYS[1:]:
            ratios = [a / b for a, b in zip(spent["network"], spent[way], strict=True)]
            low, *_, high = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios * 2
            median, ratio = statistics.median(spent[way]), statistics.median(ratios)
            texts.append(f"{way} {median:5.0f}  ratio {ratio:.2f} [{low:.2f}, {high:.2f}]")
        print(f"{name:36} {'   '.join(texts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
