"""The training loop: `python -m pgrl.train algo=ppo env=CartPole-v1`."""

from __future__ import annotations

if __name__ == "__main__":  # here, not at the end: a wrong command is answered before torch is imported
    from pgrl import main as command_line

    command_line()
    raise SystemExit

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from pgrl.agents import Agent
from pgrl.capture import Captured, capture_acting, captured_update
from pgrl.config import RunConfig
from pgrl.data import Rollout, Transition
from pgrl.envs import VecEnv
from pgrl.errors import NonFiniteError
from pgrl.runs import Run
from pgrl.signals import Stop
from pgrl.upkeep import Upkeep


@torch.no_grad()
def collect(env: VecEnv, agent: Agent, rollout: Rollout, obs: Tensor, device: torch.device) -> Transition:
    """Let the agent, on `device`, act for T steps in every env, from obs [B, *obs]: a rollout [T, B, ...].

    The rollout is where `agent.update` takes it.
    """
    rollout.begin(obs)
    if env.device != device:
        agent.begin_rollout()
    acts_on = agent.act_device
    here = env.device == acts_on
    for t, step in enumerate(rollout.steps):
        action = agent.act(rollout.obs[t] if here else rollout.obs[t].to(acts_on))
        env.step(rollout.put(t, action), out=step)
    where = agent.update_device or device
    return rollout.transition if where == env.device else Transition(*(x.to(where) for x in rollout.transition))


def train(config: RunConfig, run: Run, upkeep: Upkeep) -> None:
    """Alternate rollouts and updates until `total_timesteps`; a signal leaves a checkpoint and raises `Stop`."""
    agent, env, position = run.agent, run.env, run.position
    device = torch.device(config.device)
    rollout = Rollout(agent.num_steps, env.num_envs, env.obs_space, env.action_space, env.device)
    steps = agent.num_steps * env.num_envs
    iterations = config.total_timesteps // steps

    def play(obs: Tensor) -> Transition:
        return collect(env, agent, rollout, obs, device)

    gather = Captured(play, [agent, env], device) if config.capture in (True, "rollout") else play
    if config.capture == "update":
        capture_acting(agent)
    update = captured_update(agent) if config.capture in (True, "update") else agent.update
    obs = env.obs()
    try:
        while position.iteration < iterations:
            upkeep.signals.check()
            start = time.perf_counter()
            transition = gather(obs)
            if not rollout.looks_finite():
                check_finite(rollout.transition._asdict(), f"{config.env.id} met or gave")  # where the envs are
            obs = rollout.obs[-1]
            collected = time.perf_counter()
            metrics = check_finite(update(transition, position.iteration / iterations), "the update gave")
            updated = time.perf_counter()

            position.iteration += 1
            position.step += steps
            run.record.add(metrics, env.episodes())
            # when due: evaluate, log, save
            finished = position.iteration == iterations
            upkeep.tend(steps, collected - start, updated - collected, finished=finished)
    except Stop:
        upkeep.save_last()
        raise


def check_finite(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor | float]:
    """The tensors, with those [] in main memory as numbers; NonFiniteError naming those that hold NaN or infinity."""
    told: dict[str, Tensor | float] = dict(tensors)
    total, elsewhere = 0.0, []
    for name, x in tensors.items():
        if x.is_cpu and not x.dim():
            told[name] = number = x.item()
            total += number
        elif x.is_floating_point() and x.is_cpu:
            total += x.sum().item()
        elif x.is_floating_point():
            elsewhere.append((x.sum() if x.dim() else x).float())
    if elsewhere:
        total += float(torch.stack(elsewhere).sum())  # one wait for the device, not one for each
    if not math.isfinite(total):
        bad = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
        if bad:  # else the numbers are merely large
            raise NonFiniteError(f"{source} NaN or infinity: {', '.join(bad)}")
    return told
