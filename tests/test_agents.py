"""The agents: against plain implementations of their papers, key by key, and whether all state is saved."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from pgrl import functional as F
from pgrl.acting import Actor
from pgrl.agents import (
    AGENTS,
    A2CConfig,
    A3CConfig,
    Agent,
    DDPGConfig,
    DPGConfig,
    NPGConfig,
    PPOConfig,
    REINFORCEConfig,
    SACConfig,
    Setting,
    TRPOConfig,
)
from pgrl.agents.base import generator
from pgrl.agents.on_policy import OnPolicyConfig, critic, targets, update_value_norm
from pgrl.data import Transition, action_rows
from pgrl.errors import UserError
from pgrl.flat import FlatParameters
from pgrl.normalisers import RunningNorm
from pgrl.replay import ReplayBuffer
from pgrl.rows import Rows

ENVS = 2
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


class World(NamedTuple):
    obs: spaces.Box
    action: spaces.Space[Any]


WORLDS = {
    "box": World(VECTOR, BOX),
    "unbounded": World(VECTOR, spaces.Box(-np.inf, np.inf, (2,), np.float32)),
    "discrete": World(VECTOR, spaces.Discrete(3)),
    "multi": World(VECTOR, spaces.MultiDiscrete([2, 3])),
    "binary": World(VECTOR, spaces.MultiBinary(2)),
    "image": World(IMAGE, spaces.Discrete(3)),
    "camera": World(IMAGE, BOX),
}

REPLAY: dict[str, Any] = {
    "num_steps": 8,
    "utd_ratio": 0.5,
    "buffer_size": 32,
    "batch_size": 8,
    "learning_starts": 8,
    "actor_lr": 1e-2,
    "critic_lr": 1e-2,
    "network.hidden_sizes": [16, 16],
}
SMALL: dict[type, dict[str, Any]] = {
    PPOConfig: {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "learning_rate": 1e-2, "ent_coef": 0.01},
    A2CConfig: {"num_steps": 16, "learning_rate": 1e-2},
    A3CConfig: {"num_steps": 16, "learning_rate": 1e-2},
    REINFORCEConfig: {"num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "learning_rate": 1e-2},
    NPGConfig: {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2},
    TRPOConfig: {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2},
    **dict.fromkeys((DDPGConfig, SACConfig), REPLAY),
    DPGConfig: {"num_steps": 4, "value_lr": 1e-3},  # these states are large, and their products larger
}
ON_POLICY = [cls for cls in AGENTS if issubclass(cls, OnPolicyConfig)]
NATURAL_EVERYTHING = {
    "norm_obs": True,
    "norm_value": True,
    "norm_reward": True,
    "clip_reward": 2.0,
    "vf_clip_coef": 0.2,
    "max_grad_norm": 0.5,
    "fisher_fraction": 0.5,
    "anneal_kl": True,
    "ent_coef": 0.01,
    "network.shared": True,
    "policy.state_dependent_std": True,
}
REPLAY_EVERYTHING = {
    "norm_obs": True,
    "per_alpha": 0.6,
    "n_step": 3,
    "max_grad_norm": 0.5,
    "policy_delay": 2,
    "network.layer_norm": True,
}
EVERYTHING: dict[type, dict[str, Any]] = {
    PPOConfig: {
        "norm_obs": True,
        "norm_value": True,
        "norm_reward": True,
        "clip_reward": 2.0,
        "kl_coef": 0.3,
        "kl_coef_target": 1e-5,
        "adaptive_lr_kl": 0.01,
        "target_kl": 1.0,
        "recompute_advantages": True,
        "ent_coef_final": 0.001,
        "value_learning_rate": 3e-3,
        "clip_grad_per_network": True,
        "network.shared": True,
        "anneal_clip": True,
    },
    A2CConfig: {
        "norm_obs": True,
        "norm_value": True,
        "norm_reward": True,
        "norm_adv": True,
        "optimizer": "adam",
        "policy.state_dependent_std": True,
    },
    A3CConfig: {"norm_obs": True, "norm_reward": True, "norm_adv": True},
    REINFORCEConfig: {
        "norm_obs": True,
        "norm_value": True,
        "norm_reward": True,
        "discount_states": True,
        "vf_clip_coef": 0.2,
        "max_grad_norm": 0.5,
        "ent_coef": 0.01,
        "network.shared": True,
    },
    NPGConfig: NATURAL_EVERYTHING,
    TRPOConfig: NATURAL_EVERYTHING,
    DDPGConfig: {
        **REPLAY_EVERYTHING,
        "noise": "ou",
        "twin": True,
        "target_noise": 0.2,
    },
    SACConfig: REPLAY_EVERYTHING,
}
VARIANTS = {
    "ppo": (PPOConfig, {}),
    "ppo with everything": (PPOConfig, EVERYTHING[PPOConfig]),
    "a2c": (A2CConfig, {}),
    "a2c with everything": (A2CConfig, EVERYTHING[A2CConfig]),
    "reinforce": (REINFORCEConfig, {}),
    "reinforce with everything": (REINFORCEConfig, EVERYTHING[REINFORCEConfig]),
    "reinforce without a critic": (REINFORCEConfig, {"baseline": "min_variance_per_parameter"}),
    "npg": (NPGConfig, {}),
    "npg with everything": (NPGConfig, NATURAL_EVERYTHING),
    "trpo": (TRPOConfig, {}),
    "trpo with everything": (TRPOConfig, NATURAL_EVERYTHING),
    "a3c": (A3CConfig, {}),
    "a3c with everything": (A3CConfig, EVERYTHING[A3CConfig]),
    "ddpg": (DDPGConfig, {}),
    "ddpg with everything": (DDPGConfig, EVERYTHING[DDPGConfig]),
    "sac": (SACConfig, {}),
    "sac with everything": (SACConfig, EVERYTHING[SACConfig]),
    "dpg": (DPGConfig, {}),
    "dpg with everything": (DPGConfig, {"anneal_lr": True, "network.hidden_sizes": [8, 8]}),
}


def configure(cls: type, keys: dict[str, Any]) -> Any:
    """A config with keys given by their dotted names."""
    config = cls()
    for key, value in {**SMALL[cls], **keys}.items():
        *path, last = key.split(".")
        part = functools.reduce(getattr, path, config)
        assert hasattr(part, last), key
        setattr(part, last, copy.deepcopy(value))
    return config


def make(cls: type, keys: dict[str, Any] | None = None, world: str = "box", seed: int = 1, **setting: Any) -> Any:
    torch.manual_seed(seed)
    config, spec = configure(cls, keys or {}), WORLDS[world]
    return AGENTS[cls](
        config,
        Setting(spec.obs, spec.action, setting.pop("num_envs", ENVS), seed, torch.device("cpu"), **setting),
    )


@torch.no_grad()
def play(agent: Agent, world: str, seed: int, num_envs: int = ENVS, ends: float = 0.1) -> Transition:
    """A rollout of the agent's own actions in a task that moves a point, with terminations, truncations and both."""
    spec, random = WORLDS[world], Generator().manual_seed(seed)

    def appear() -> Tensor:
        if spec.obs.dtype == np.uint8:
            return torch.randint(256, (num_envs, *spec.obs.shape), generator=random, dtype=torch.uint8)
        return 3 * torch.randn(num_envs, *spec.obs.shape, generator=random) + 1

    obs, rows = appear(), []
    for _ in range(agent.num_steps):
        action = agent.act(obs)
        assert action.shape == (num_envs, *action_rows(spec.action)[0]) and action.dtype == action_rows(spec.action)[1]
        push = action.float().view(num_envs, -1).mean(-1)
        next_obs = appear() if obs.dtype == torch.uint8 else 0.9 * obs + 0.3 * push.unsqueeze(-1).tanh()
        reward = 2 * push.tanh() + next_obs.float().view(num_envs, -1).mean(-1).clamp(-2, 2)
        terminated, truncated = torch.rand(2, num_envs, generator=random) < ends
        rows.append(Transition(obs, action, reward, next_obs, terminated, truncated))
        done = (terminated | truncated).view(-1, *[1] * (obs.dim() - 1))
        obs = torch.where(done, appear(), next_obs)
    return Transition(*(torch.stack(field) for field in zip(*rows, strict=True)))


def train(agent: Agent, world: str, updates: range = range(3)) -> list[dict[str, Tensor]]:
    return [agent.update(play(agent, world, seed=i), progress=i / 10) for i in updates]


def weights(agent: Any) -> Tensor:
    """Everything that is learnt."""
    learnt = [*agent.net.parameters(), *(getattr(agent, name) for name in ("w", "v") if hasattr(agent, name))]
    learnt += [
        p for name in ("critics", "temperature") if hasattr(agent, name) for p in getattr(agent, name).parameters()
    ]
    return torch.cat([p.detach().reshape(-1) for p in learnt])


def takes(cls: type, world: str) -> bool:
    """Whether an algorithm is for the actions and observations of a world."""
    continuous = isinstance(WORLDS[world].action, spaces.Box)
    return continuous or cls not in (DPGConfig, DDPGConfig)


class Spy:
    """An agent's gradient step that calls `see(batch, lr, scalars)` before each step and keeps the metrics."""

    def __init__(self, agent: Any, see: Callable[[Any, Tensor, Tensor], None] = lambda *_: None) -> None:
        self.step, self.see, self.metrics = agent.step, see, []
        agent.step = self

    def __call__(self, batch: Any, lr: Tensor, scalars: Tensor) -> Tensor:
        self.see(batch, lr, scalars)
        self.metrics.append(self.step(batch, lr, scalars))
        return self.metrics[-1]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[type, dict[str, Any]]:
    return VARIANTS[request.param]


# --- against the papers, written plainly ---


class Reference:
    """A policy and a value net as nn.Sequential, torch.distributions and torch's optimiser, sharing initial weights."""

    def __init__(self, agent: Any, optimiser: Callable[[Any], torch.optim.Optimizer]) -> None:
        def sequential(body: Any, head: nn.Linear) -> nn.Sequential:
            tanhs = [nn.Sequential(copy.deepcopy(layer), nn.Tanh()) for layer in body.layers]
            return nn.Sequential(*tanhs, copy.deepcopy(head))

        self.policy_net = sequential(agent.net.body, agent.net.policy_head)
        self.value_net = sequential(agent.net.value_body, agent.net.value_head)
        self.log_std = nn.Parameter(agent.net.log_std.detach().clone())
        self.parameters = [*self.policy_net.parameters(), self.log_std, *self.value_net.parameters()]
        self.optimiser = optimiser(self.parameters)
        low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
        self.to_unit = lambda action: 2 * (action - low) / (high - low) - 1

    def distribution(self, obs: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(torch.distributions.Normal(self.policy_net(obs), self.log_std.exp()), 1)

    def value(self, obs: Tensor) -> Tensor:
        return self.value_net(obs).squeeze(-1)

    def returns(self, r: Transition, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        """Advantages and returns by the backward loop of GAE, with the true successor's value at a time limit."""
        with torch.no_grad():
            value, next_value = self.value(r.obs), self.value(r.next_obs)
        advantage = torch.zeros_like(r.reward)
        trace = torch.zeros(r.reward.shape[1])
        for t in reversed(range(len(r.reward))):
            delta = r.reward[t] + gamma * next_value[t] * (1 - r.terminated[t].float()) - value[t]
            trace = delta + gamma * lam * trace * (1 - (r.terminated[t] | r.truncated[t]).float())
            advantage[t] = trace
        return advantage, advantage + value

    def step(self, loss: Tensor, lr: float) -> None:
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimiser.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])


def in_reference_order(agent: Any) -> Tensor:
    parameters = [*agent.net.policy_parameters(), *agent.net.value_parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def test_ppo_is_the_paper() -> None:
    agent = make(PPOConfig, {"num_minibatches": 4, "vf_clip_coef": 0.1, "anneal_clip": True})
    ref = Reference(agent, functools.partial(torch.optim.Adam, eps=1e-5))
    for i in range(3):
        rollout, progress = play(agent, "box", seed=i), i / 10
        order = Generator()
        order.set_state(agent.order.get_state())
        agent.update(rollout, progress)

        action = ref.to_unit(rollout.action)
        with torch.no_grad():
            old = ref.distribution(rollout.obs).log_prob(action).flatten()
            old_value = ref.value(rollout.obs).flatten()
        advantage, returns = (x.flatten() for x in ref.returns(rollout, 0.99, 0.95))
        obs, action, clip = rollout.obs.flatten(0, 1), action.flatten(0, 1), 0.2 * (1 - progress)
        for _ in range(2):
            for rows in torch.randperm(16 * ENVS, generator=order).split(8):
                a = (advantage[rows] - advantage[rows].mean()) / (advantage[rows].std() + 1e-8)
                d = ref.distribution(obs[rows])
                ratio = (d.log_prob(action[rows]) - old[rows]).exp()
                policy_loss = torch.max(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean()
                value = ref.value(obs[rows])
                near = old_value[rows] + (value - old_value[rows]).clamp(-0.1, 0.1)
                errors = torch.max((value - returns[rows]) ** 2, (near - returns[rows]) ** 2)
                loss = policy_loss + 0.5 * 0.5 * errors.mean() - 0.01 * d.entropy().mean()
                ref.step(loss, 1e-2 * (1 - progress))
        torch.testing.assert_close(in_reference_order(agent), ref.weights(), rtol=1e-3, atol=2e-4)


def test_a2c_is_the_paper() -> None:
    """Algorithm S3 of Mnih et al. 2016, with the rollout's end and its time limits valued by V."""
    agent = make(A2CConfig, {"optimizer": "adam"})  # RMSProp has a test of its own; torch's has eps elsewhere
    ref = Reference(agent, functools.partial(torch.optim.Adam, eps=1e-5))
    for i in range(5):
        rollout, progress = play(agent, "box", seed=i), i / 10
        agent.update(rollout, progress)
        d = ref.distribution(rollout.obs)
        advantage, returns = ref.returns(rollout, 0.99, 1.0)
        policy_loss = -(d.log_prob(ref.to_unit(rollout.action)) * advantage).mean()
        value_loss = 0.5 * (ref.value(rollout.obs) - returns).square().mean()
        ref.step(policy_loss + 0.5 * value_loss - 0.01 * d.entropy().mean(), 1e-2 * (1 - progress))
        torch.testing.assert_close(in_reference_order(agent), ref.weights(), rtol=1e-3, atol=2e-4)


def test_dpg_is_the_paper() -> None:
    """Equations 24 to 27 of Silver et al. 2014, a transition and a parameter at a time, for a policy A s + b."""
    agent = make(DPGConfig, {"gamma": 0.9, "actor_lr": 0.3, "advantage_lr": 0.2, "value_lr": 1e-3, "anneal_lr": True})
    features = [lambda s: 1.0, *(lambda s, i=i: s[i] for i in range(4))]
    features += [lambda s, i=i, j=j: s[i] * s[j] for i in range(4) for j in range(i, 4)]
    theta, w, v = np.zeros(10), np.zeros(10), np.zeros(len(features))
    ends = []

    def gradient(s: Any) -> Any:
        """grad mu(s) [P, A]: action k is row k of the weights times s, and bias k."""
        found = np.zeros((10, 2))
        for k in range(2):
            found[4 * k : 4 * k + 4, k], found[8 + k, k] = s, 1.0
        return found

    for i in range(4):
        rollout, progress = play(agent, "box", seed=i), i / 10
        agent.update(rollout, progress)
        ends.append((rollout.terminated, rollout.truncated & ~rollout.terminated))
        changes = []
        for s, a, r, after, terminated, _ in zip(*(x.flatten(0, 1).double().numpy() for x in rollout), strict=True):
            grad_mu = gradient(s)
            phi, phi_after = (np.array([feature(x) for feature in features]) for x in (s, after))
            phi_sa = grad_mu @ (a - grad_mu.T @ theta)  # mu(s) = grad mu(s)' theta, for mu is linear in theta
            q, q_after = phi_sa @ w + v @ phi, v @ phi_after
            delta = r + (0.0 if terminated else 0.9 * q_after) - q
            changes.append((0.3 * grad_mu @ (grad_mu.T @ w), 0.2 * delta * phi_sa, 1e-3 * delta * phi))
        for parameter, change in zip((theta, w, v), zip(*changes, strict=True), strict=True):
            parameter += (1 - progress) * np.mean(change, axis=0)
        for found, expected in ((agent.theta.vector, theta), (agent.w, w), (agent.v, v)):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=2e-4)
    assert min(np.abs(x).max() for x in (theta, w, v)) > 0.02
    assert all(torch.stack(flags).any() for flags in zip(*ends[1:], strict=True))  # once V is not 0


def test_dpg_gradients_are_those_of_single_states() -> None:
    agent = make(DPGConfig, {"network.hidden_sizes": [5]})
    agent.theta.vector.normal_(generator=Generator().manual_seed(0))
    obs = torch.randn(3, 4, generator=Generator().manual_seed(1))
    found = agent.gradients(obs)
    for n, k in itertools.product(range(3), range(2)):
        expected = torch.autograd.grad(agent.net(obs[n : n + 1])[0, k], list(agent.net.parameters()))
        torch.testing.assert_close(found[n, k], torch.cat([g.flatten() for g in expected]))


def test_dpg_explores_with_noise_of_its_size_within_the_bounds() -> None:
    agent = make(DPGConfig, {"noise_std": 0.3}, "unbounded")
    agent.theta.vector.normal_(generator=Generator().manual_seed(0))
    obs = torch.randn(1, 4).expand(4000, 4)
    noise = agent.act(obs) - agent.act(obs, explore=False)
    assert noise.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.1) and noise.mean(0).abs().max() < 0.03
    agent = make(DPGConfig, {"noise_std": 9.0})
    action = agent.act(obs)
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    assert torch.equal(action.amin(0), low) and torch.equal(action.amax(0), high)


@pytest.mark.parametrize("world", ["discrete", "multi", "binary"])
def test_dpg_refuses_what_is_not_continuous(world: str) -> None:
    with pytest.raises(UserError, match="algo=dpg.*must be a Box.*\nUse: algo=ppo"):
        make(DPGConfig, world=world)


def test_dpg_refuses_images() -> None:
    setting = Setting(IMAGE, BOX, ENVS, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="product of two numbers.*1,296(.|\n)*Use: algo=ppo"):
        AGENTS[DPGConfig](DPGConfig(), setting)


# --- the ratio, the statistics, the minibatches ---


@pytest.mark.parametrize("norm_obs", [False, True])
@pytest.mark.parametrize(
    ("world", "keys"),
    [
        ("box", {}),
        ("box", {"policy.distribution": "squashed"}),
        ("box", {"policy.distribution": "beta"}),
        ("box", {"policy.state_dependent_std": True, "network.shared": True}),
        ("box", {"norm_value": True, "norm_reward": True, "recompute_advantages": True}),
        ("unbounded", {}),
        ("discrete", {}),
        ("multi", {}),
        ("binary", {}),
    ],
)
def test_ratio_is_one_in_the_first_minibatch(world: str, keys: dict[str, Any], norm_obs: bool) -> None:
    """Old log-probs under newer statistics, or of clipped actions, would show here."""
    agent = make(PPOConfig, {"norm_obs": norm_obs, **keys}, world)
    train(agent, world, range(2))  # so that the statistics are not those of the start
    log_ratios: list[Tensor] = []

    def see(batch: Any, *_: Any) -> None:
        with torch.no_grad():
            log_ratios.append(agent.net.policy(batch.obs).log_prob(batch.action) - batch.log_prob)

    Spy(agent, see)
    train(agent, world, range(2, 3))
    assert len(log_ratios) == 4 and log_ratios[0].abs().max() < 1e-5
    assert log_ratios[-1].abs().max() > 1e-3  # later ones move


@pytest.mark.parametrize("world", ["box", "discrete"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_log_probs_are_those_of_acting(world: str, norm_obs: bool) -> None:
    """The old log-prob of a rollout's action is that which the acting policy gave it."""
    agent = make(PPOConfig, {"norm_obs": norm_obs, "shuffle": False, "num_minibatches": 1}, world)
    train(agent, world, range(2))
    acted: list[Tensor] = []
    act = agent.act

    def acting(obs: Tensor, explore: bool = True) -> Tensor:
        action = act(obs, explore)
        seen = obs if agent.obs_norm is None else agent.obs_norm(obs)
        acted.append(agent.net.policy(seen).log_prob(agent.net.to_policy_units(action)).detach())
        return action

    agent.act = acting
    batches: list[Any] = []
    Spy(agent, lambda batch, *_: batches.append(batch))
    train(agent, world, range(2, 3))
    torch.testing.assert_close(batches[0].log_prob, torch.cat(acted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", ON_POLICY)
def test_statistics_change_last(cls: type) -> None:
    agent = make(cls, {"norm_obs": True})
    train(agent, "box", range(1))
    before = agent.obs_norm.mean.clone()
    seen: list[Tensor] = []
    Spy(agent if hasattr(agent, "step") else agent.critic, lambda *_: seen.append(agent.obs_norm.mean.clone()))
    rollout = play(agent, "box", seed=1)
    assert torch.equal(agent.obs_norm.mean, before)  # acting learns nothing
    agent.update(rollout, 0.1)
    assert seen and all(torch.equal(mean, before) for mean in seen)
    assert agent.obs_norm.count == 2 * agent.num_steps * ENVS
    everything = torch.cat([play(make(cls, {"norm_obs": True}), "box", seed=0).obs, rollout.obs]).double()
    torch.testing.assert_close(agent.obs_norm.mean, everything.flatten(0, 1).mean(0))


def test_every_epoch_has_a_fresh_order() -> None:
    agent = make(PPOConfig, {"update_epochs": 3, "num_minibatches": 4})
    orders: list[list[float]] = [[] for _ in range(6)]
    steps = itertools.count()

    def see(batch: Any, *_: Any) -> None:
        orders[next(steps) // 4].extend(batch.log_prob.tolist())

    Spy(agent, see)
    train(agent, "box", range(2))
    for update in (orders[:3], orders[3:]):
        assert len({tuple(order) for order in update}) == 3  # three epochs, three orders
        assert all(sorted(order) == sorted(update[0]) and len(order) == 16 * ENVS for order in update)
    places = [[sorted(o).index(x) for x in o] for o in orders]
    assert len({tuple(p) for p in places}) == 6  # nor does an update repeat the orders of another

    agent, kept = make(PPOConfig, {"shuffle": False}), []
    Spy(agent, lambda batch, *_: kept.append(batch.log_prob))
    train(agent, "box", range(1))
    assert torch.equal(torch.cat(kept[:2]), torch.cat(kept[2:]))


def test_metrics_are_means_over_all_minibatches() -> None:
    """Not those of the last minibatch, nor of the last epoch."""
    agent = make(PPOConfig)
    spy = Spy(agent)
    metrics = train(agent, "box", range(1))[0]
    policy_loss, value_loss, entropy, log_ratio, grad_norm = map(torch.stack, zip(*spy.metrics, strict=True))
    seen = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "grad_norm": grad_norm}
    seen["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean(1)
    seen["clipfrac"] = ((log_ratio.exp() - 1).abs() > 0.2).float().mean(1)
    for name, values in seen.items():
        torch.testing.assert_close(metrics[f"losses/{name}"], values.mean(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(values.mean(), values[-1]) or name == "clipfrac"


def test_metrics_are_detached_scalars_of_their_update(variant: tuple[type, dict[str, Any]]) -> None:
    agent = make(*variant)
    first = train(agent, "box", range(1))[0]
    kept = {name: value.clone() for name, value in first.items()}
    train(agent, "box", range(1, 3))
    for name, value in first.items():
        assert value.shape == () and not value.requires_grad and value.isfinite(), name
        assert torch.equal(value, kept[name]), f"{name} is a part of the agent that went on changing"
        assert name.split("/")[0] in ("losses", "charts")


def test_update_leaves_the_rollout_alone(variant: tuple[type, dict[str, Any]]) -> None:
    agent = make(*variant)
    rollout = play(agent, "box", seed=0)
    before = Transition(*(x.clone() for x in rollout))
    agent.update(rollout, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(rollout, before, strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("cls", ON_POLICY)
def test_every_parameter_learns(cls: type, world: str) -> None:
    agent = make(cls, {"network.shared": world == "image"}, world)
    before = {name: p.detach().clone() for name, p in agent.net.named_parameters()}
    train(agent, world, range(1))
    for name, p in agent.net.named_parameters():
        assert not torch.equal(p, before[name]) and p.isfinite().all(), name


def test_one_step_of_one_env_is_enough_for_a2c() -> None:
    agent = make(A2CConfig, {"num_steps": 1, "advantage": "td0"}, num_envs=1)
    for i in range(3):
        metrics = agent.update(play(agent, "box", seed=i, num_envs=1), 0.0)
        assert all(value.isfinite() for value in metrics.values())


# --- ends of episodes ---


@pytest.mark.parametrize("norm_value", [False, True])
@pytest.mark.parametrize("kind", F.ADVANTAGES)
def test_targets_value_the_true_successor(kind: str, norm_value: bool) -> None:
    """V(next_obs) at time limits and at the rollout's end; never V of the obs after the reset."""
    agent = make(A2CConfig, {"advantage": kind, "norm_value": norm_value, "n_step": 3})
    train(agent, "box", range(2))
    rollout = play(agent, "box", seed=9, ends=0.15)
    assert (rollout.truncated & ~rollout.terminated)[:-1].any() and rollout.terminated.any()
    with torch.no_grad():
        value, next_value = (
            critic(agent.net, agent.value_norm, obs.flatten(0, 1)).view_as(rollout.reward)
            for obs in (rollout.obs, rollout.next_obs)
        )
    ends = rollout.terminated, rollout.truncated
    expected = F.advantage(kind, rollout.reward, value, next_value, *ends, 0.99, 0.95, 3)
    t = targets(agent.config, agent.net, agent.value_norm, rollout)
    norm = agent.value_norm.denormalise if norm_value else torch.Tensor.clone
    torch.testing.assert_close(norm(t.value), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.advantage, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm(t.returns), expected + value, rtol=1e-4, atol=1e-4)
    again = targets(agent.config, agent.net, agent.value_norm, rollout, first=False)
    torch.testing.assert_close(again.value, t.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", ON_POLICY)
def test_without_bootstrap_truncation_is_termination(cls: type) -> None:
    rollout = play(make(cls), "box", seed=0)
    as_death = rollout._replace(
        terminated=rollout.terminated | rollout.truncated, truncated=torch.zeros_like(rollout.truncated)
    )
    assert not torch.equal(as_death.terminated, rollout.terminated)
    results = []
    for bootstrap, r in [(False, rollout), (False, as_death), (True, as_death), (True, rollout)]:
        agent = make(cls, {"bootstrap_truncated": bootstrap})
        agent.update(r, 0.0)
        results.append(weights(agent))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


@pytest.mark.parametrize("cls", [PPOConfig, A2CConfig, A3CConfig, NPGConfig, TRPOConfig])
def test_successor_matters_where_the_clock_ran_out(cls: type) -> None:
    """Another successor changes the update after a truncation, and changes nothing after a termination."""
    rollout = play(make(cls), "box", seed=0, ends=0.0)
    results = {}
    for end, moved in itertools.product(("terminated", "truncated"), (0.0, 5.0)):
        flag = torch.zeros_like(rollout.terminated)
        flag[7] = True
        next_obs = rollout.next_obs.clone()
        next_obs[7] += moved
        agent = make(cls)
        agent.update(rollout._replace(next_obs=next_obs, **{end: flag}), 0.0)
        results[end, moved] = weights(agent)
    assert torch.equal(results["terminated", 0.0], results["terminated", 5.0])
    assert not torch.equal(results["truncated", 0.0], results["truncated", 5.0])


def test_value_normalisation_preserves_outputs() -> None:
    """Pop-Art: new statistics change what the head learns, not what the critic says."""
    agent, obs = make(A2CConfig), 3 * torch.randn(50, 4, generator=Generator().manual_seed(0))
    norm = RunningNorm((), clip=None)
    for i, (shift, scale) in enumerate([(0.0, 1.0), (400.0, 30.0), (-1000.0, 0.5)]):
        before = critic(agent.net, norm, obs).detach()
        returns = shift + scale * torch.randn(64, generator=Generator().manual_seed(i))
        update_value_norm(norm, agent.net.value_head, returns)
        after = critic(agent.net, norm, obs).detach()
        torch.testing.assert_close(after, before, rtol=1e-3, atol=2e-3)
        assert not torch.equal(norm.shift, torch.zeros(()))
    assert norm.count == 3 * 64


# --- schedules ---


@pytest.mark.parametrize("cls", [REINFORCEConfig, A2CConfig, A3CConfig, PPOConfig])
def test_learning_rate_is_annealed(cls: type) -> None:
    for anneal, progress in itertools.product([True, False], [0.0, 0.25, 0.9]):
        agent = make(cls, {"anneal_lr": anneal})
        lrs: list[float] = []
        Spy(agent, lambda _, lr, __: lrs.append(float(lr)))  # noqa: B023
        metrics = agent.update(play(agent, "box", seed=0), progress)
        expected = 1e-2 * (1 - progress if anneal else 1)
        assert all(lr == pytest.approx(expected) for lr in [*lrs, float(metrics["charts/learning_rate"])])


@pytest.mark.parametrize("cls", [REINFORCEConfig, NPGConfig, TRPOConfig])
def test_the_critics_learning_rate_is_annealed(cls: type) -> None:
    for anneal, progress in itertools.product([True, False], [0.0, 0.25]):
        agent = make(cls, {"anneal_lr": anneal, "value_learning_rate": 1e-2})
        spy_lrs: list[float] = []
        Spy(agent.critic, lambda _, lr, __: spy_lrs.append(float(lr)))  # noqa: B023
        metrics = agent.update(play(agent, "box", seed=0), progress)
        expected = 1e-2 * (1 - progress if anneal else 1)
        assert all(lr == pytest.approx(expected) for lr in [*spy_lrs, float(metrics["charts/value_learning_rate"])])


def test_schedules_of_ppo() -> None:
    agent = make(
        PPOConfig, {"anneal_clip": True, "clip_coef_high": 0.4, "ent_coef": 0.1, "ent_coef_final": 0.0, "kl_coef": 3.0}
    )
    seen: list[Tensor] = []
    Spy(agent, lambda _, __, scalars: seen.append(torch.stack(scalars)))
    agent.update(play(agent, "box", seed=0), 0.25)
    torch.testing.assert_close(seen[0], torch.tensor([0.2 * 0.75, 0.4 * 0.75, 0.1 * 0.75, 3.0]))


@pytest.mark.parametrize(("target", "epochs"), [(1e-9, 1), (1e9, 2)])
def test_kl_stops_the_epochs(target: float, epochs: int) -> None:
    agent = make(PPOConfig, {"target_kl": target})
    spy = Spy(agent)
    metrics = train(agent, "box", range(1))[0]
    assert metrics["losses/epochs"] == epochs and len(spy.metrics) == 2 * epochs
    assert metrics["charts/updates"] == 2 * epochs


def test_kl_penalty_adapts() -> None:
    for target, factor in [(1e-9, 2.0), (1e9, 0.5)]:
        agent = make(PPOConfig, {"kl_coef": 0.3, "kl_coef_target": target})
        assert train(agent, "box", range(2))[-1]["losses/kl_coef"] == pytest.approx(0.3 * factor**2)


def test_learning_rate_follows_the_kl() -> None:
    for target, factor in [(1e-9, 1 / 1.5), (1e9, 1.5)]:
        agent = make(PPOConfig, {"adaptive_lr_kl": target, "anneal_lr": False})
        lrs: list[float] = []
        Spy(agent, lambda _, lr, __: lrs.append(float(lr)))  # noqa: B023
        train(agent, "box", range(2))
        assert lrs[::2] == pytest.approx([1e-2 * factor**k for k in range(4)], rel=1e-5)
        train(agent, "box", range(2, 6))
        assert 1e-4 * 0.99 <= lrs[-1] <= 0.3 * 1.01  # bounded


# --- state ---


def snapshot(
    x: Any, path: str = "agent", found: dict[str, Any] | None = None, seen: dict[int, Any] | None = None
) -> Any:
    """Everything an object holds, however deep, by path; functions, spaces and types aside."""
    found, seen = {} if found is None else found, {} if seen is None else seen
    if isinstance(x, Tensor):
        found[path] = x.detach().clone()
    elif isinstance(x, Generator):
        found[path] = x.get_state()
    elif isinstance(x, str | int | float | bool | bytes | None):
        found[path] = x
    elif isinstance(x, ReplayBuffer):  # by its state: what it no longer holds may lie about in its memory
        snapshot(x.state_dict(), path, found, seen)
    elif isinstance(x, Rows):
        snapshot({str(number): x.read(number) for number in x.segments()}, path, found, seen)
    elif id(x) in seen:
        pass
    else:
        seen[id(x)] = x  # kept, so that no other object gets its id
        if isinstance(x, dict):
            for k, v in x.items():
                snapshot(v, f"{path}.{k}", found, seen)
        elif isinstance(x, list | tuple | set):
            for i, v in enumerate(x):
                snapshot(v, f"{path}.{i}", found, seen)
        elif hasattr(x, "__dict__") and not isinstance(x, type | spaces.Space) and not callable_only(x):
            snapshot(vars(x), path, found, seen)
    return found


def callable_only(x: Any) -> bool:
    return callable(x) and not type(x).__module__.startswith(("pgrl", "torch.nn"))


def differences(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.shape == y.shape and torch.equal(x, y)
        return bool(x == y) if not isinstance(x, Tensor) and not isinstance(y, Tensor) else False

    return {path for path in {*a, *b} if path not in a or path not in b or not equal(a[path], b[path])}


def test_snapshot_sees_deep_changes() -> None:
    agent = make(PPOConfig, {"norm_obs": True})
    before = snapshot(agent)
    assert not differences(before, snapshot(agent))
    agent.obs_norm.mean += 1
    agent.step._groups[0].optimiser._m[0] = 1
    agent.config.network.hidden_sizes[0] = 7
    assert differences(before, snapshot(agent)) >= {
        "agent.obs_norm._buffers.mean",
        "agent.step._groups.0.optimiser._m",
        "agent.config.network.hidden_sizes.0",
    }


@pytest.mark.parametrize("world", ["box", "discrete"])
def test_whatever_changes_is_state(variant: tuple[type, dict[str, Any]], world: str) -> None:
    """What acting and updating change is in `state_dict`, and loading it makes a new agent the same throughout."""
    cls, keys = variant
    if not takes(cls, world):
        pytest.skip("needs continuous actions")
    agent = make(cls, keys, world)
    before = snapshot(agent)
    train(agent, world)
    changed = {path.split(".")[1] for path in differences(before, snapshot(agent))}
    assert {"net", "noise", "updates"} <= changed
    views = {name for name, part in vars(agent).items() if isinstance(part, FlatParameters | Actor)}  # of the net
    assert changed - views <= set(agent.state_dict())

    other = make(cls, keys, world, seed=2)
    assert differences(snapshot(agent), snapshot(other))
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    # noise that is used up is not kept: its own state says what comes next; and each actor knows addresses
    apart = ("agent.noise.", "agent.actor._place", "agent.actor._small._at")
    left = {p for p in differences(snapshot(agent), snapshot(other)) if not p.startswith(apart)}
    assert not left
    assert not differences(snapshot(agent.noise.state_dict()), snapshot(other.noise.state_dict()))


@pytest.mark.parametrize("world", ["box", "discrete"])
@pytest.mark.parametrize("acted", [0, 5])
def test_a_saved_agent_goes_on_bit_for_bit(variant: tuple[type, dict[str, Any]], world: str, acted: int) -> None:
    cls, keys = variant
    if not takes(cls, world):
        pytest.skip("needs continuous actions")
    agent = make(cls, keys, world)
    train(agent, world)
    obs = torch.randn(ENVS, 4, generator=Generator().manual_seed(0))
    for _ in range(acted):  # also in the middle of a rollout
        agent.act(obs)
    state = copy.deepcopy(agent.state_dict())
    expected = train(agent, world, range(3, 6))

    other = make(cls, keys, world, seed=7)
    train(other, world, range(20, 21))  # whatever it did before is forgotten
    other.load_state_dict(state)
    metrics = train(other, world, range(3, 6))
    assert torch.equal(weights(agent), weights(other))
    assert not differences(snapshot(agent.state_dict()), snapshot(other.state_dict()))
    for a, b in zip(expected, metrics, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_loaded_state_is_not_aliased(variant: tuple[type, dict[str, Any]]) -> None:
    agent = make(*variant)
    train(agent, "box", range(1))
    state = copy.deepcopy(agent.state_dict())
    kept = snapshot(state)
    agent.load_state_dict(state)
    train(agent, "box", range(1, 3))
    assert not differences(kept, snapshot(state))


def test_acting_without_exploring_changes_nothing(variant: tuple[type, dict[str, Any]]) -> None:
    agent = make(*variant)
    train(agent, "box")
    before, global_before = snapshot(agent), torch.get_rng_state()
    obs = 3 * torch.randn(7, 4, generator=Generator().manual_seed(0))  # another number of envs than in training
    first = agent.act(obs, explore=False)
    assert torch.equal(first, agent.act(obs, explore=False))
    assert not differences(before, snapshot(agent))
    assert torch.equal(global_before, torch.get_rng_state())
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    assert first.shape == (7, 2) and (first >= low).all() and (first <= high).all()


def test_evaluation_sees_the_statistics_of_training() -> None:
    agent = make(PPOConfig, {"norm_obs": True})
    train(agent, "box")
    other = make(PPOConfig, {"norm_obs": True}, seed=5)
    other.load_state_dict(agent.state_dict())
    obs = 3 * torch.randn(6, 4, generator=Generator().manual_seed(0)) + 1
    assert torch.equal(other.act(obs, explore=False), agent.act(obs, explore=False))
    assert torch.equal(agent.act(obs, explore=False), agent.net.mode(agent.obs_norm(obs)))
    assert not torch.equal(agent.act(obs, explore=False), agent.net.mode(obs))


@pytest.mark.parametrize("cls", AGENTS)
def test_runs_repeat_and_seeds_differ(cls: type) -> None:
    runs = []
    for seed in (1, 1, 2):
        agent = make(cls, seed=seed)
        train(agent, "box")
        runs.append(weights(agent))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_neighbouring_seeds_share_no_stream() -> None:
    """Stream k + 1 of a seed is not stream k of the next, as it would be with seed + k."""
    draws = {
        (seed, stream): tuple(torch.rand(4, generator=generator(seed, stream, torch.device("cpu"))).tolist())
        for seed in range(6)
        for stream in range(6)
    }
    assert len(set(draws.values())) == 36
    assert draws[3, 1] == tuple(torch.rand(4, generator=generator(3, 1, torch.device("cpu"))).tolist())


def test_agents_are_found_by_their_configs() -> None:
    for config, agent in AGENTS.items():
        assert config.__name__ == f"{agent.__name__}Config" and agent.name == agent.__name__.lower()
        assert agent.__bases__ == (Agent,)  # one level deep: algorithms share functions, not ancestors


# --- every key changes something ---

Flip = tuple[dict[str, Any], list[Any], str]


def flip(*values: Any, world: str = "box", **base: Any) -> Flip:
    """Values of a key to compare with that of a base in which the key can matter."""
    return {k.replace("__", "."): v for k, v in base.items()}, list(values), world


ADVANTAGE_FLIPS: dict[str, Flip] = {
    "gae_lambda": flip(0.5, advantage="gae"),
    "advantage": flip("n_step", "td0", "monte_carlo", advantage="gae"),
    "n_step": flip(2, advantage="n_step"),
}
SHARED_FLIPS: dict[str, Flip] = {
    "gamma": flip(0.5, 1.0),
    "norm_obs": flip(True),
    "clip_obs": flip(0.5, norm_obs=True),
    "norm_reward": flip(True),
    "clip_reward": flip(0.5),
    "norm_value": flip(True),
    "bootstrap_truncated": flip(False),
    "num_steps": flip(8),
    "anneal_lr": flip(False),
    "max_grad_norm": flip(0.1, None),
    "ent_coef": flip(0.5),
    "network.body": flip("mlp", world="image"),
    "network.hidden_sizes": flip([64], [32, 32]),
    "network.value_hidden_sizes": flip([32]),
    "network.activation": flip("relu", "elu", "silu", "gelu"),
    "network.shared": flip(True),
    "network.init": flip("xavier"),
    "network.policy_gain": flip(1.0),
    "network.value_gain": flip(0.1),
    "policy.distribution": flip("squashed", "beta"),
    "policy.log_std_init": flip(-1.0),
    "policy.state_dependent_std": flip(True),
    "policy.rescale": flip(False),
}
GRADIENT_FLIPS: dict[str, Flip] = {**ADVANTAGE_FLIPS, "learning_rate": flip(1e-3), "vf_coef": flip(0.1)}
CRITIC_FLIPS: dict[str, Flip] = {
    "update_epochs": flip(1),
    "num_minibatches": flip(4),
    "shuffle": flip(False),
    "value_learning_rate": flip(1e-4),
    "adam_eps": flip(0.1),
    "max_grad_norm": flip(0.01),
    "vf_clip_coef": flip(0.01, None, vf_clip_coef=0.1),
}
NATURAL_FLIPS: dict[str, Flip] = {
    **SHARED_FLIPS,
    **ADVANTAGE_FLIPS,
    **CRITIC_FLIPS,
    "max_kl": flip(0.05),
    "anneal_kl": flip(True),
    "damping": flip(0.5, 0.0),
    "cg_steps": flip(2),
    "cg_tolerance": flip(0.3),
    "fisher_fraction": flip(0.25),
    "norm_adv": flip(False, damping=0.1, ent_coef=0.1),  # beside the entropy: the radius takes all other scales away
}
REPLAY_FLIPS: dict[str, Flip] = {
    "gamma": flip(0.5),
    "num_steps": flip(4),
    "utd_ratio": flip(1.0),
    "buffer_size": flip(16),
    "batch_size": flip(4),
    "learning_starts": flip(16),
    "tau": flip(0.5),
    "n_step": flip(3),
    "per_alpha": flip(0.6, 0.9),
    "per_beta": flip(1.0, per_alpha=0.6),
    "norm_obs": flip(True),
    "clip_obs": flip(0.5, norm_obs=True),
    "max_grad_norm": flip(0.01),
    "actor_lr": flip(1e-3),
    "critic_lr": flip(1e-3),
    "policy_delay": flip(3),
    "network.hidden_sizes": flip([32], [8, 8]),
    "network.activation": flip("tanh", "elu", "silu", "gelu"),
    "network.layer_norm": flip(True),
}
FLIPS: dict[type, dict[str, Flip]] = {
    REINFORCEConfig: {
        **SHARED_FLIPS,
        **CRITIC_FLIPS,
        "num_steps": flip(16),
        "baseline": flip("mean", "leave_one_out", "time", "min_variance", "min_variance_per_parameter", None),
        "discount_states": flip(True),
        "learning_rate": flip(1e-3),
    },
    NPGConfig: {**NATURAL_FLIPS, "max_kl": flip(0.05, None), "step_size": flip(0.01, max_kl=None)},
    TRPOConfig: {
        **NATURAL_FLIPS,
        # a Fisher matrix of three rows makes for steps that are too long
        "backtrack_factor": flip(0.8, fisher_fraction=0.1, damping=1e-3),
        "backtrack_steps": flip(2, fisher_fraction=0.1, damping=1e-3),
        "accept_ratio": flip(1.5, fisher_fraction=0.1, damping=1e-3),
    },
    PPOConfig: {
        **SHARED_FLIPS,
        **GRADIENT_FLIPS,
        "update_epochs": flip(1),
        "num_minibatches": flip(4),
        "shuffle": flip(False),
        "recompute_advantages": flip(True),
        "norm_adv": flip("batch", None),
        "value_learning_rate": flip(1e-3),
        "adaptive_lr_kl": flip(1e-9),
        "adam_eps": flip(0.1),
        "clip_grad_per_network": flip(True),
        "clip_coef": flip(0.01, None),
        "clip_coef_high": flip(0.3, clip_coef=0.01),
        "anneal_clip": flip(True, clip_coef=0.1),
        "dual_clip": flip(1.01),
        "target_kl": flip(1e-9),
        "kl_coef": flip(1.0),
        "kl_coef_target": flip(1e-9, kl_coef=1.0, kl_coef_target=1e9),
        "ent_coef_final": flip(0.5),
        "vf_clip_coef": flip(0.05, None, vf_clip_coef=0.5),
    },
    A2CConfig: {
        **SHARED_FLIPS,
        **GRADIENT_FLIPS,
        "norm_adv": flip(True),
        "optimizer": flip("adam"),
        "rms_prop_alpha": flip(0.5),
        "opt_eps": flip(0.1),
    },
    A3CConfig: {
        **SHARED_FLIPS,
        **GRADIENT_FLIPS,
        "norm_adv": flip(True),
        "rms_prop_alpha": flip(0.5),
        "opt_eps": flip(0.1),
    },
    DDPGConfig: {
        **REPLAY_FLIPS,
        "network.body": flip("mlp", world="camera"),
        "noise": flip("ou"),
        "noise_std": flip(0.5),
        "ou_theta": flip(0.9, noise="ou"),
        "twin": flip(True),
        "target_noise": flip(0.2),
        "target_noise_clip": flip(0.01, target_noise=0.2),
    },
    SACConfig: {
        **REPLAY_FLIPS,
        "network.body": flip("mlp", world="image"),
        "alpha": flip(0.05),
        "alpha_init": flip(0.1),
        "alpha_lr": flip(0.1),
        "target_entropy": flip(1.0),
        "noise_correlation": flip(0.9),
    },
    DPGConfig: {
        "gamma": flip(0.5, 1.0),
        "num_steps": flip(2),
        "noise_std": flip(0.1),
        "actor_lr": flip(0.1),
        "advantage_lr": flip(0.01),
        "value_lr": flip(1e-4),
        "anneal_lr": flip(True),
        "network.hidden_sizes": flip([8], [4, 4]),
        "network.activation": flip("relu", "elu", "silu", "gelu", network__hidden_sizes=[8]),
    },
}
# Refused for a run (config/checks.py), or no matter of the agent but of the loop.
ELSEWHERE: dict[type, set[str]] = {A3CConfig: {"norm_value", "num_workers"}}
for cls, keys in ELSEWHERE.items():
    FLIPS[cls] = {key: values for key, values in FLIPS[cls].items() if key not in keys}


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        yield from leaves(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [prefix + f.name]


@pytest.mark.parametrize("cls", AGENTS)
def test_every_key_is_flipped(cls: type) -> None:
    assert set(FLIPS[cls]) == set(leaves(cls())) - ELSEWHERE.get(cls, set())


@functools.cache
def result(cls: type, world: str, keys: tuple[tuple[str, Any], ...]) -> Tensor:
    agent = make(cls, {k: list(v) if isinstance(v, tuple) else v for k, v in keys}, world)
    for i in range(2):
        agent.update(play(agent, world, seed=i), progress=i / 2)
    assert weights(agent).isfinite().all()
    return weights(agent)


def outcome(cls: type, world: str, keys: dict[str, Any]) -> Tensor:
    """The weights after two updates."""
    return result(cls, world, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(keys.items())))


@pytest.mark.parametrize(
    ("cls", "key"), [pytest.param(c, k, id=f"{c.__name__}.{k}") for c, table in FLIPS.items() for k in table]
)
def test_every_key_changes_something(cls: type, key: str) -> None:
    base, values, world = FLIPS[cls][key]
    outcomes = [outcome(cls, world, base)] + [outcome(cls, world, {**base, key: value}) for value in values]
    for (i, a), (j, b) in itertools.combinations(enumerate(outcomes), 2):
        assert not torch.equal(a, b), f"{key}: {['its base', *values][i]} and {['its base', *values][j]} are the same"


def test_two_names_of_one_estimator() -> None:
    a, b = (outcome(PPOConfig, "box", {"advantage": kind}) for kind in ("gae", "td_lambda"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "same"),
    [
        ({"kl_coef": 0.0}, {"kl_coef": None}),
        ({"clip_coef": 1e9}, {"clip_coef": None}),
        ({"vf_clip_coef": 1e9}, {"vf_clip_coef": None}),
        ({"max_grad_norm": 1e9}, {"max_grad_norm": None}),
        ({"clip_coef_high": 0.2}, {"clip_coef_high": None}),
        ({"value_learning_rate": 1e-2}, {"value_learning_rate": None}),
        ({"ent_coef_final": 0.01}, {"ent_coef_final": None}),
        ({"dual_clip": 1e9}, {"dual_clip": None}),
        ({"target_kl": 1e9}, {"target_kl": None}),
        ({"norm_obs": True, "clip_obs": 1e9}, {"norm_obs": True, "clip_obs": None}),
        ({"clip_reward": 1e9}, {"clip_reward": None}),
        ({"network.value_hidden_sizes": [64, 64]}, {"network.value_hidden_sizes": None}),
    ],
)
def test_off_is_the_limit_of_on(keys: dict[str, Any], same: dict[str, Any]) -> None:
    """What `null` means: no bound, or the value of the key it stands beside."""
    a, b = outcome(PPOConfig, "box", keys), outcome(PPOConfig, "box", same)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- compiled ---


@pytest.mark.parametrize("cls", [PPOConfig, A2CConfig, REINFORCEConfig, NPGConfig, TRPOConfig, DDPGConfig, SACConfig])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_agent_samples_in_a_graph_where_numpy_does_not(
    cls: type, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def compile_step(step: Any) -> Any:
        return lambda *arguments: asked.append(len(arguments[0])) or step(*arguments)  # type: ignore[func-returns-value]

    monkeypatch.setattr("pgrl.acting.compile_step", compile_step)
    agent = make(cls, {"learning_starts": 0} if cls in (DDPGConfig, SACConfig) else {}, compiled=compiled)
    with torch.no_grad():
        assert len(agent.act(torch.zeros(3, *VECTOR.shape))) == 3 and not asked
        agent.actor._rows = 2
        assert len(agent.act(torch.zeros(3, *VECTOR.shape))) == 3
    assert asked == [3] * compiled


@pytest.mark.slow  # the compiler takes most of a minute
@pytest.mark.parametrize("world", ["box", "discrete"])
@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (PPOConfig, {"norm_obs": True, "learning_rate": 1e-3, "num_minibatches": 2, "num_steps": 32}),
        (A2CConfig, {"num_steps": 32}),
        (A2CConfig, EVERYTHING[A2CConfig]),
        (A2CConfig, {**EVERYTHING[A2CConfig], "norm_value": False}),
        (PPOConfig, EVERYTHING[PPOConfig]),
        (REINFORCEConfig, {}),
        (REINFORCEConfig, {"baseline": None}),
        (
            NPGConfig,
            {"num_steps": 32, "damping": 0.5},
        ),  # with little damping, 64 states leave their Fisher matrix nearly
        (TRPOConfig, {"num_steps": 32, "damping": 0.5}),  # singular, and conjugate gradients magnify rounding
        (DDPGConfig, {}),
        (DDPGConfig, EVERYTHING[DDPGConfig]),
        (DDPGConfig, {**EVERYTHING[DDPGConfig], "per_alpha": None}),
        (SACConfig, {}),
        (SACConfig, EVERYTHING[SACConfig]),
        (SACConfig, {**EVERYTHING[SACConfig], "per_alpha": None}),
    ],
)
def test_compiled_equals_eager_and_compiles_once(cls: type, keys: dict[str, Any], world: str) -> None:
    import torch._dynamo as dynamo

    if not takes(cls, world):
        pytest.skip("needs continuous actions")
    dynamo.reset()
    dynamo.utils.counters.clear()
    graphs = 1 if keys.get("policy_delay", 1) == 1 else 2  # without the policy's step, and with it
    if cls is REINFORCEConfig and keys.get("baseline", "value") == "value":
        graphs = 2  # the policy's step, and that of the values
    if cls is PPOConfig:  # the minibatches and the step; and the rollout's preparation, if no statistics are in it
        graphs = 2 if keys.get("norm_value") else 3
    at_once = cls in (REINFORCEConfig, PPOConfig)
    eager, compiled = make(cls, keys, world), make(cls, keys, world, compiled=True)
    for i in range(3 if keys.get("per_alpha") else 10):  # with priorities rounding soon decides what is drawn
        rollout = play(eager, world, seed=i)
        expected = eager.update(rollout, i / 10)
        with dynamo.config.patch(error_on_recompile=i > 0 if at_once else i >= graphs):
            metrics = compiled.update(rollout, i / 10)
        for name, value in expected.items():
            if name != "losses/cg_residual":  # what rounding leaves
                torch.testing.assert_close(metrics[name], value, rtol=2e-3, atol=1e-4, msg=f"{name} of update {i}")
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-3, atol=2e-4)
    assert math.isfinite(weights(compiled).sum())
