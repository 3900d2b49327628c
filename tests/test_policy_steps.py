"""REINFORCE, NPG and TRPO: one update against the formulas of their papers, written out plainly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.autograd.functional import hessian

from pgrl import functional as F
from pgrl.agents import AGENTS, NPGConfig, REINFORCEConfig, Setting, TRPOConfig
from pgrl.agents.critic import Critic
from pgrl.data import Transition
from pgrl.errors import UserError
from pgrl.flat import FlatParameters, flatten
from pgrl.optim import GradientStep
from pgrl.trust_region import NaturalStep

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BASELINES = (None, "mean", "leave_one_out", "time", "value", "min_variance", "min_variance_per_parameter")
ENVS, STEPS = 3, 24
SETTING = Setting(OBS, spaces.Discrete(3), ENVS, 1, torch.device("cpu"))


class Descent:
    """Plain gradient descent, so that the change of the parameters is the gradient."""

    def __init__(self, vector: Tensor) -> None: ...

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        vector.sub_(lr * gradient if divisor is None else lr * gradient / divisor)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def make(cls: type, **keys: Any) -> Any:
    """An agent with a small policy in double precision."""
    torch.manual_seed(0)
    config = cls(num_steps=STEPS, num_minibatches=1, **keys)
    config.network.hidden_sizes, config.network.policy_gain = [4], 0.5
    agent = AGENTS[cls](config, SETTING)
    for module in vars(agent).values():
        if isinstance(module, torch.nn.Module):
            module.double()
    if hasattr(agent, "policy"):
        agent.policy = FlatParameters(agent.net.policy_parameters())
    if getattr(agent, "critic", None) is not None:
        agent.critic = Critic(config, agent.net, SETTING)
    return agent


def rollout(agent: Any, seed: int = 0) -> Transition:
    random = Generator().manual_seed(seed)
    shape = (STEPS, ENVS)
    obs = torch.randn(STEPS + 1, ENVS, 3, generator=random, dtype=torch.float64)
    action = torch.randint(3, shape, generator=random)
    reward = torch.randn(shape, generator=random, dtype=torch.float64) + action
    terminated, truncated = torch.rand(2, *shape, generator=random) < 0.12
    terminated[-4:], truncated[-4:] = False, False
    assert (terminated | truncated).any(0).all()
    return Transition(obs[:-1], action, reward, obs[1:], terminated, truncated)


def returns_of(r: Transition, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """G, whether it is known, and the age of each step, for ages 0, 3 and 5 at the start; [T, B]."""
    done = r.terminated | r.truncated
    returns, known = torch.zeros_like(r.reward), torch.zeros_like(done)
    age = torch.zeros(r.reward.shape, dtype=torch.int64)
    for b, start in enumerate([0, 3, 5]):
        total, whole, steps = 0.0, False, start
        for t in reversed(range(STEPS)):
            total, whole = (
                (float(r.reward[t, b]), True) if done[t, b] else (float(r.reward[t, b] + gamma * total), whole)
            )
            returns[t, b], known[t, b] = total, whole
        for t in range(STEPS):
            age[t, b] = steps
            steps = 0 if done[t, b] else steps + 1
    return returns, known, age


@pytest.mark.parametrize("discount_states", [False, True])
@pytest.mark.parametrize("baseline", BASELINES)
def test_reinforce_follows_its_formula(baseline: str | None, discount_states: bool) -> None:
    """The step taken is sum over steps of gamma^t score (G - b) / episodes, each score by its own backward pass."""
    keys = {"baseline": baseline, "discount_states": discount_states, "gamma": 0.9, "ent_coef": 0.1, "anneal_lr": False}
    agent = make(REINFORCEConfig, **keys, learning_rate=1.0)
    parameters = agent.net.policy_parameters()
    agent.step = GradientStep(agent.loss, [(parameters, 1.0)], Descent, max_grad_norm=None)
    agent.age.copy_(torch.tensor([0, 3, 5]))
    r = rollout(agent)
    returns, known, age = returns_of(r, 0.9)
    if baseline == "value":  # time limits are valued by V, as is what no rollout's end allows to know
        with torch.no_grad():
            returns = F.monte_carlo(r.reward, agent.net.value(r.next_obs.flatten(0, 1)).view(STEPS, ENVS), *r[4:], 0.9)
            value = agent.net.value(r.obs.flatten(0, 1)).view(STEPS, ENVS)
    weight = 0.9 ** age.double() if discount_states else torch.ones_like(returns)
    log_prob = agent.net.policy(r.obs.flatten(0, 1)).log_prob(r.action.flatten()).view(STEPS, ENVS)
    score = torch.stack(
        [torch.stack([flatten(torch.autograd.grad(x, parameters, retain_graph=True)) for x in row]) for row in log_prob]
    )
    entropy = (agent.net.policy(r.obs.flatten(0, 1)).entropy().view(STEPS, ENVS) * known).sum()
    expected = 0.1 * flatten(torch.autograd.grad(entropy, parameters))
    for t, b in itertools.product(range(STEPS), range(ENVS)):
        if not known[t, b]:
            continue
        others = [c for c in range(ENVS) if c != b]
        match baseline:
            case None:
                base: Any = 0.0
            case "mean":
                base = returns[known].mean()
            case "leave_one_out":
                base = returns[:, others][known[:, others]].mean()
            case "time":
                base = returns[known & (age == age[t, b])].mean()
            case "value":
                base = value[t, b]
            case _:
                square = (score[:, others] * weight[:, others, None])[known[:, others]].square()
                square = square if baseline == "min_variance_per_parameter" else square.sum(-1, keepdim=True)
                base = (square * returns[:, others][known[:, others]][:, None]).sum(0) / square.sum(0)
        expected = expected + weight[t, b] * score[t, b] * (returns[t, b] - base)
    episodes = (r.terminated | r.truncated).sum()

    before = flatten([p.detach().clone() for p in parameters])
    agent.update(r, 0.0)
    change = flatten([p.detach() for p in parameters]) - before
    torch.testing.assert_close(change, expected / episodes, rtol=1e-8, atol=1e-9)
    assert change.abs().max() > 1e-3


def test_reinforce_knows_how_old_the_running_episodes_are() -> None:
    agent = make(REINFORCEConfig, baseline="mean")
    agent.step = lambda *_: (torch.zeros(()),) * 3
    r = rollout(agent)
    agent.update(r, 0.0)
    done = r.terminated | r.truncated
    expected = [STEPS - 1 - int(done[:, b].nonzero()[-1]) for b in range(ENVS)]
    assert agent.age.tolist() == expected


def test_reinforce_refuses_a_rollout_without_an_end() -> None:
    agent = make(REINFORCEConfig)
    r = rollout(agent)
    none = torch.zeros_like(r.terminated)
    with pytest.raises(UserError, match=r"no episode ended .*(.|\n)*algo.num_steps=240"):
        agent.update(r._replace(terminated=none, truncated=none), 0.0)


@pytest.mark.parametrize("cls", [NPGConfig, TRPOConfig])
def test_natural_agents_follow_their_formulas(cls: type) -> None:
    """(F + damping I)^-1 g with F the Hessian of the mean KL, solved directly, and TRPO's search along it."""
    agent = make(cls, damping=0.1, cg_steps=200, cg_tolerance=1e-14, max_kl=0.05, ent_coef=0.01, gamma=0.9)
    r = rollout(agent)
    net, parameters = agent.net, agent.net.policy_parameters()
    start = agent.policy.vector.clone()
    obs, action = r.obs.flatten(0, 1), r.action.flatten()
    with torch.no_grad():
        value, next_value = (net.value(x.flatten(0, 1)).view(STEPS, ENVS) for x in (r.obs, r.next_obs))
        old = net.policy(obs)
    advantage = F.gae(r.reward, value, next_value, r.terminated, r.truncated, 0.9, 0.95)
    advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()

    def logits(vector: Tensor) -> Tensor:
        w0, b0, w1, b1 = (part for part in agent.policy.split(vector))
        return torch.tanh(obs @ w0.T + b0) @ w1.T + b1

    def kl(vector: Tensor) -> Tensor:
        p, q = old.logits.log_softmax(-1), logits(vector).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def surrogate(vector: Tensor) -> Tensor:
        p, q = old.logits.log_softmax(-1), logits(vector).log_softmax(-1)
        ratio = (q - p).gather(1, action[:, None]).squeeze(1).exp()
        return (ratio * advantage).mean() - 0.01 * (q.exp() * q).sum(-1).mean()

    at = start.clone().requires_grad_()
    gradient = torch.autograd.grad(surrogate(at), at)[0]
    matrix = hessian(kl, start) + 0.1 * torch.eye(len(start), dtype=torch.float64)
    x = torch.linalg.solve(matrix, gradient)
    step = (2 * 0.05 / (x @ matrix @ x)).sqrt() * x
    metrics = agent.update(r, 0.0)
    moved = agent.policy.vector - start
    fraction = float(metrics.get("losses/step_fraction", 1.0))
    torch.testing.assert_close(moved, fraction * step, rtol=1e-6, atol=1e-8)
    assert len(parameters) == 4 and fraction > 0
    torch.testing.assert_close(metrics["losses/kl"], kl(start + moved), rtol=1e-6, atol=1e-9)
    gained = surrogate(start + moved) - surrogate(start)
    torch.testing.assert_close(metrics["losses/actual_improvement"], gained, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(metrics["losses/predicted_improvement"], gradient @ step, rtol=1e-6, atol=1e-9)
    if cls is TRPOConfig:
        torch.testing.assert_close(metrics["losses/kl_full_step"], kl(start + step), rtol=1e-6, atol=1e-9)
        assert metrics["losses/kl"] <= 0.05


def test_a_refused_step_leaves_the_policy_as_it_is() -> None:
    agent = make(TRPOConfig, accept_ratio=1e6)
    before = agent.policy.vector.clone()
    metrics = agent.update(rollout(agent), 0.0)
    assert torch.equal(agent.policy.vector, before)
    assert metrics["losses/step_fraction"] == 0 and metrics["losses/kl"] == 0
    assert metrics["losses/actual_improvement"] == 0 and metrics["losses/kl_full_step"] > 0


def test_a_step_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gradient: Tensor, *_: Any, **__: Any) -> NaturalStep:
        return NaturalStep(gradient * math.nan, torch.tensor(0.1), torch.tensor(0.0))

    monkeypatch.setattr("pgrl.agents.natural.natural_step", broken)
    agent = make(TRPOConfig)
    before = agent.policy.vector.clone()
    assert agent.update(rollout(agent), 0.0)["losses/step_fraction"] == 0
    assert torch.equal(agent.policy.vector, before)


@pytest.mark.parametrize("cls", [NPGConfig, TRPOConfig])
def test_the_radius_is_annealed(cls: type) -> None:
    lengths = []
    for progress in (0.0, 0.75):
        agent = make(cls, anneal_kl=True, max_kl=1e-6)
        before = agent.policy.vector.clone()
        agent.update(rollout(agent), progress)
        lengths.append(float((agent.policy.vector - before).norm()))
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=1e-3)


@pytest.mark.parametrize("cls", [NPGConfig, TRPOConfig])
def test_the_critic_of_a_shared_body_leaves_the_policy_alone(cls: type) -> None:
    torch.manual_seed(0)
    config = cls(num_steps=STEPS, num_minibatches=2)
    config.network.shared = True
    agent = AGENTS[cls](config, SETTING)
    obs = torch.randn(STEPS, ENVS, 3)
    before = [x.detach().clone() for x in agent.net.policy(obs.flatten(0, 1))]
    agent.critic.fit(obs, torch.zeros(STEPS, ENVS), torch.ones(STEPS, ENVS), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.net.policy(obs.flatten(0, 1)), strict=True))
