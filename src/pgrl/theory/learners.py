"""The agents of pgrl on the episodes of a tiny MDP, and what their updates do in expectation."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import grad

from pgrl.agents import AGENTS, NPG, REINFORCE, TRPO, Setting
from pgrl.data import Transition
from pgrl.flat import FlatParameters
from pgrl.optim import GradientStep
from pgrl.theory.mdp import MDP, Episodes


class Recorder:
    """An optimiser that adds up the gradients it is given and changes nothing."""

    def __init__(self, vector: Tensor) -> None:
        self.total = torch.zeros_like(vector)

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        self.total += self.change(gradient, lr, divisor)

    def change(self, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> Tensor:
        return lr * gradient if divisor is None else lr * gradient / divisor

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total}


class Learner(NamedTuple):
    """An agent of pgrl in an MDP, in float64, on the one-hot of time and state.

    Its policy and its critic are linear, so that the critic can hold any value of any state at any time.
    """

    agent: Any
    mdp: MDP
    features: Tensor  # [H + 1, S, F], what the agent sees of each state at each time

    def parameters(self) -> list[Tensor]:
        """The parameters of the policy."""
        return list(self.agent.net.policy_parameters())

    def policy(self) -> Tensor:
        """Its probabilities [H, S, A], written anew from the weights; gradients flow to `parameters`."""
        weight, bias = self.parameters()
        return (self.features[:-1] @ weight.T + bias).softmax(-1)

    def gradient(self, scalar: Tensor) -> Tensor:
        """The gradient [P] of a scalar with respect to the policy's parameters."""
        return torch.cat([x.flatten() for x in grad(scalar, self.parameters())])

    def set_critic(self, table: Tensor) -> None:
        """Make the critic answer `table` [H + 1, S]."""
        head = self.agent.net.value_head
        head.weight.data.copy_((table - head.bias.data).flatten())

    def rollout(self, found: Episodes, k: list[int]) -> Transition:
        """The episodes k of `found`, one for each env, as a rollout [H, len(k), ...] that ends in terminations."""
        state, action, reward = found.state[k].T, found.action[k].T, found.reward[k].T
        time = torch.arange(self.mdp.horizon).unsqueeze(-1)
        # after the last step a state that gives the last action away: its value must not matter
        following = torch.cat([state[1:], action[-1:] % len(self.mdp.start)])
        terminated = (time == self.mdp.horizon - 1).expand_as(state)
        obs, next_obs = self.features[time, state], self.features[time + 1, following]
        return Transition(obs, action, reward, next_obs, terminated, torch.zeros_like(terminated))


def make(config: Any, mdp: MDP, *, timed: bool = True, num_envs: int = 1, seed: int = 0) -> Learner:
    """The agent of `config` in an MDP; with `timed` False it sees the state alone, not the time."""
    states, actions = mdp.reward.shape
    times = mdp.horizon + 1
    features = torch.eye(times * states if timed else states, dtype=torch.float64)
    features = features.view(times, states, -1) if timed else features.expand(times, -1, -1)
    config.gamma, config.num_steps = mdp.gamma, mdp.horizon
    return Learner(build(config, features.shape[-1], spaces.Discrete(actions), num_envs, seed), mdp, features)


def build(config: Any, features: int, action_space: spaces.Space[Any], num_envs: int, seed: int) -> Any:
    """The agent of `config` with linear networks and random weights, in float64.

    Its gradient steps are recorded instead of taken, at rate 1 and without clipping.
    """
    config.network.hidden_sizes = []
    space = spaces.Box(-np.inf, np.inf, (features,), np.float32)
    agent: Any = AGENTS[type(config)](config, Setting(space, action_space, num_envs, seed, torch.device("cpu")))
    agent.net.double()
    random = Generator().manual_seed(seed)
    for p in agent.net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random, dtype=p.dtype))
    record(agent)
    return agent


def record(agent: Any) -> None:
    """Let every gradient step of the agent add up, at rate 1, what it would change."""
    agent.config.learning_rate, agent.config.anneal_lr = 1.0, False
    policy, value = (agent.net.policy_parameters(), 1.0), (agent.net.value_parameters(), 1.0)
    if isinstance(agent, NPG | TRPO):
        agent.policy = FlatParameters(agent.net.policy_parameters())
    else:
        groups = [policy] if isinstance(agent, REINFORCE) else [policy, value]
        agent.step = GradientStep(agent.loss, groups, Recorder, max_grad_norm=None)
    if getattr(agent, "critic", None) is not None:
        agent.critic.step = GradientStep(agent.critic.loss, [value], Recorder, max_grad_norm=None)


def ascent(agent: Any, rollout: Transition) -> Tensor:
    """What an update adds to the policy's parameters [P] at rate 1: the estimate of the gradient that trains."""
    total: Tensor = agent.step.state_dict()["0"]["total"]
    total.zero_()
    agent.update(rollout, 0.0)
    size = sum(p.numel() for p in agent.net.policy_parameters())
    return -total[:size].clone()


def expected_ascent(learner: Learner, found: Episodes, num_envs: int = 1) -> Tensor:
    """The mean [P] of `ascent` over all episodes, or all ways to draw one episode for each of several envs."""
    mean = torch.zeros(sum(p.numel() for p in learner.parameters()), dtype=torch.float64)
    for k in torch.cartesian_prod(*[torch.arange(len(found.probability))] * num_envs).view(-1, num_envs).tolist():
        mean += found.probability[k].prod() * ascent(learner.agent, learner.rollout(found, k))
    return mean
