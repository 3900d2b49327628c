"""Rollouts: an agent acts in its envs, and what comes out must be finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgrl.agents import Agent
from pgrl.data import Rollout, Transition
from pgrl.envs import VecEnv


class NonFiniteError(ArithmeticError):
    """Something became NaN or infinite: the run stops before such weights are saved."""


@torch.no_grad()
def collect(env: VecEnv, agent: Agent, rollout: Rollout, obs: Tensor, device: torch.device) -> Transition:
    """Let the agent act for T steps in every env, from obs [B, *obs]: a rollout [T, B, ...] on `device`."""
    rollout.begin(obs)
    for t, step in enumerate(rollout.steps):
        action = agent.act(rollout.obs[t].to(device))
        rollout.action[t].copy_(action)
        env.step(action, out=step)
    return Transition(*(x.to(device) for x in rollout.transition()))


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """NonFiniteError naming those of the tensors that hold NaN or infinity."""
    sums = [x.sum() if x.dim() else x for x in tensors.values() if x.is_floating_point()]
    if math.isfinite(sum(map(float, sums))):
        return
    bad = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if bad:  # else the numbers are merely large
        raise NonFiniteError(f"{source} NaN or infinity: {', '.join(bad)}")
