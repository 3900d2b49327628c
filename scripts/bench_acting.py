"""What acting in numpy saves while rollouts are collected: `pgrl.acting.Actor` beside the network itself.

    python scripts/bench_acting.py [--rollouts 76]

One thread; the two ways take turns, a rollout of 256 env steps each, in the same envs. Figures are medians over
rollouts, and the ratio's median and deciles over pairs of rollouts that follow each other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


class Through:
    """An agent that acts through its network, as it would without its actor."""

    def __init__(self, agent: Any) -> None:
        self.agent, self.act_device, self.update_device = agent, agent.act_device, agent.update_device

    def act(self, obs: Tensor) -> Tensor:
        agent = self.agent
        obs = obs if agent.obs_norm is None else agent.obs_norm(obs)
        action: Tensor = agent.net.sample(obs, agent.noise.next(len(obs)))
        return action


def measure(command: str, rollouts: int) -> tuple[list[float], list[float]]:
    """CPU microseconds of a step of all envs, for each rollout: through the network, and through the actor."""
    config = compose(f"{command} algo.num_minibatches=16".split())
    run = build(config)
    agent: Any = run.agent
    rollout = Rollout(agent.num_steps, config.num_envs, run.env.obs_space, run.env.action_space, run.env.device)
    obs, spent = run.env.reset(), ([], [])  # type: tuple[Tensor, tuple[list[float], list[float]]]
    for _ in range(rollouts + 4):
        for way, times in zip((Through(agent), agent), spent, strict=True):
            start = time.process_time()
            collect(run.env, way, rollout, obs, torch.device("cpu"))  # type: ignore[arg-type]
            times.append((time.process_time() - start) / agent.num_steps * 1e6)
            obs = rollout.obs[-1]
    run.env.close()
    return spent[0][4:], spent[1][4:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=76, help="timed rollouts of each way (default 76)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, microseconds a step of all envs")
    for name, command in WORKLOADS.items():
        network, actor = measure(command, options.rollouts)
        ratios = [a / b for a, b in zip(network, actor, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios * 2
        print(
            f"{name:36} network {statistics.median(network):5.0f}   actor {statistics.median(actor):5.0f}   "
            f"ratio {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
