"""SAC and DDPG: against plain implementations of their papers, and what they do with replay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from pgrl.agents import AGENTS, DDPGConfig, SACConfig, Setting
from pgrl.agents.off_policy import OffPolicyConfig, random_actions, updates_due
from pgrl.data import Transition
from pgrl.errors import UserError
from pgrl.q_networks import Critics

ENVS = 2
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
CHOICE = spaces.Discrete(3)
SMALL: dict[str, Any] = {
    "batch_size": 16,
    "buffer_size": 256,
    "learning_starts": 32,
    "actor_lr": 5e-3,
    "critic_lr": 1e-2,
}


def make(cls: type, action: spaces.Space[Any] = BOX, seed: int = 1, **keys: Any) -> Any:
    torch.manual_seed(seed)
    config = cls(**{**SMALL, **keys})
    config.network.hidden_sizes = [12, 12]
    return AGENTS[cls](config, Setting(OBS, action, ENVS, seed, torch.device("cpu")))


@torch.no_grad()
def play(agent: Any, steps: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Updates after single steps in a task without meaning, with ends of both kinds; their metrics."""
    random = Generator().manual_seed(seed)
    obs, metrics = torch.randn(ENVS, 3, generator=random), []
    for _ in range(steps):
        action = agent.act(obs)
        after = torch.randn(ENVS, 3, generator=random)
        terminated, truncated = torch.rand(2, ENVS, generator=random) < 0.2
        begun = torch.randn(ENVS, 3, generator=random)
        step = Transition(obs, action, after.sum(-1), after, terminated, truncated)
        with torch.enable_grad():
            metrics.append(agent.update(Transition(*(x.unsqueeze(0) for x in step)), 0.0))
        obs = torch.where((terminated | truncated).unsqueeze(-1), begun, after)
    return metrics


class Spy:
    """A gradient step that also keeps what it was called with."""

    def __init__(self, step: Any) -> None:
        self.step, self.calls = step, []

    def __call__(self, batch: Any, lr: Tensor, scalars: Any) -> Any:
        self.calls.append((copy.deepcopy(batch), float(lr), copy.deepcopy(scalars)))
        return self.step(batch, lr, scalars)


def plain(body: Any, head: nn.Linear, last: nn.Module | None = None) -> nn.Sequential:
    """The layers of an MLP as torch's own modules, with copies of the weights."""
    layers = [module for layer in body.layers for module in (copy.deepcopy(layer), nn.ReLU())]
    return nn.Sequential(*layers, copy.deepcopy(head), *([] if last is None else [last]))


def plain_critics(critics: Any) -> list[nn.Sequential]:
    """Each of them as torch's own modules, with copies of the weights."""
    nets = []
    for k in range(critics.count):
        layers: list[nn.Module] = []
        for weights, biases in zip(critics.weights, critics.biases, strict=True):
            layer = nn.Linear(*weights.shape[1:])
            layer.weight.data, layer.bias.data = weights[k].T.detach().clone(), biases[k, 0].detach().clone()
            layers += [layer, nn.ReLU()]
        nets.append(nn.Sequential(*layers[:-1]))
    return nets


def plain_qs(critics: Any) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Q(s, a) of each of them."""

    def q(net: nn.Sequential, obs: Tensor, action: Tensor) -> Tensor:
        return net(torch.cat([obs, action], 1)).squeeze(1)

    qs = [partial(q, net) for net in plain_critics(critics)]
    for found in qs:
        found.net = found.args[0]  # type: ignore[attr-defined]
    return list(qs)


def parameters(*nets: Any) -> list[nn.Parameter]:
    return [p for net in nets for p in getattr(net, "net", net).parameters()]


def same(found: Any, *expected: Any) -> None:
    pairs = zip(found.parameters(), parameters(*expected), strict=True)
    if isinstance(found, Critics):
        nets = plain_critics(found)
        pairs = zip(parameters(*nets), parameters(*expected), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def one_more(agent: Any, *steps: str) -> list[Spy]:
    """Let the agent learn once, seen by spies at the named gradient steps."""
    spies = [Spy(getattr(agent, name)) for name in steps]
    for name, spy in zip(steps, spies, strict=True):
        setattr(agent, name, spy)
    agent.learn(0.0)
    return spies


def test_sac_is_the_paper() -> None:
    """Equations 3 to 9 and 18 of Haarnoja et al. 2018, with torch's distributions and its Adam."""
    agent = make(SACConfig, alpha_lr=2e-2, tau=0.1)
    play(agent, 16)
    assert agent.updates == 0 and agent.buffer.count == 32  # warm-up just ended: Adam is new on both sides
    policy = plain(agent.net.body, agent.net.policy_head)
    q1, q2 = plain_qs(agent.critics)
    target1, target2 = plain_qs(agent.target_critics)
    log_alpha = nn.Parameter(agent.temperature.log.detach().clone())
    optimisers = [torch.optim.Adam(parameters(q1, q2), 1e-2), torch.optim.Adam(policy.parameters(), 5e-3)]
    optimisers.append(torch.optim.Adam([log_alpha], 2e-2))

    def sample(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = policy(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = mean + log_std.clamp(-20, 2).exp() * noise
        action = u.tanh()
        return action, (normal.log_prob(u) - torch.log(1 - action**2)).sum(-1)

    def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    for _ in range(4):
        critic, actor = one_more(agent, "critic_step", "actor_step")
        (batch, _, alpha), (actor_batch, _, _) = critic.calls[0], actor.calls[0]
        agent.critic_step, agent.actor_step = critic.step, actor.step
        torch.testing.assert_close(alpha, log_alpha.exp())
        assert not torch.equal(actor_batch.noise, batch.noise)  # each has actions of its own
        with torch.no_grad():
            action, log_prob = sample(batch.next_obs, batch.noise)
            value = torch.min(target1(batch.next_obs, action), target2(batch.next_obs, action)) - alpha * log_prob
            target = batch.reward + batch.discount * value
        errors = [(q(batch.obs, batch.action) - target).square().mean() for q in (q1, q2)]
        descend(optimisers[0], 0.5 * (errors[0] + errors[1]))
        with torch.no_grad():
            pairs = zip(parameters(target1, target2), parameters(q1, q2), strict=True)
            for slow, fast in pairs:
                slow.copy_(0.9 * slow + 0.1 * fast)
        action, log_prob = sample(actor_batch.obs, actor_batch.noise)
        smaller = torch.min(q1(actor_batch.obs, action), q2(actor_batch.obs, action))
        descend(optimisers[1], (alpha * log_prob - smaller).mean())
        descend(optimisers[2], -log_alpha.exp() * (log_prob.detach() - 2.0).mean())  # target: -2, for two actions
        same(agent.critics, q1, q2)
        same(agent.target_critics, target1, target2)
        same(agent.net, policy)
        torch.testing.assert_close(agent.temperature.log, log_alpha)


def test_discrete_sac_is_the_paper() -> None:
    """Christodoulou 2019, equations 10 to 12: expectations over the actions are sums."""
    agent = make(SACConfig, CHOICE, alpha=0.3)
    play(agent, 16)
    policy = plain(agent.net.body, agent.net.policy_head)
    q1, q2 = plain_critics(agent.critics)
    t1, t2 = plain_critics(agent.target_critics)
    (critic, actor) = one_more(agent, "critic_step", "actor_step")
    (batch, _, alpha), (actor_batch, _, _) = critic.calls[0], actor.calls[0]
    assert float(alpha) == pytest.approx(0.3)
    with torch.no_grad():
        pi = policy(batch.next_obs).softmax(-1)
        value = (pi * (torch.min(t1(batch.next_obs), t2(batch.next_obs)) - 0.3 * pi.log())).sum(-1)
        target = batch.reward + batch.discount * value
    optimiser = torch.optim.Adam(parameters(q1, q2), 1e-2)
    rows = torch.arange(16)
    loss = sum(0.5 * (q(batch.obs)[rows, batch.action] - target).square().mean() for q in (q1, q2))
    loss.backward()
    optimiser.step()
    same(agent.critics, q1, q2)
    optimiser = torch.optim.Adam(policy.parameters(), 5e-3)
    pi = policy(actor_batch.obs).softmax(-1)
    with torch.no_grad():
        smaller = torch.min(q1(actor_batch.obs), q2(actor_batch.obs))
    (pi * (0.3 * pi.log() - smaller)).sum(-1).mean().backward()
    optimiser.step()
    same(agent.net, policy)


@pytest.mark.parametrize("td3", [False, True])
def test_ddpg_is_the_paper(td3: bool) -> None:
    """Algorithm 1 of Lillicrap et al. 2016, and that of Fujimoto et al. 2018."""
    keys = {"twin": True, "target_noise": 0.2, "target_noise_clip": 0.3, "policy_delay": 2} if td3 else {}
    agent = make(DDPGConfig, tau=0.1, **keys)
    play(agent, 16)
    actor = plain(agent.net.body, agent.net.policy_head, nn.Tanh())
    slow_actor = plain(agent.target_net.body, agent.target_net.policy_head, nn.Tanh())
    qs = plain_qs(agent.critics)
    slow_qs = plain_qs(agent.target_critics)
    assert len(qs) == 1 + td3
    q_adam, actor_adam = torch.optim.Adam(parameters(*qs), 1e-2), torch.optim.Adam(actor.parameters(), 5e-3)
    for k in range(4):
        (spy,) = one_more(agent, "critic_step")
        agent.critic_step = spy.step
        batch = spy.calls[0][0]
        with torch.no_grad():
            action = slow_actor(batch.next_obs)
            if td3:
                action = (action + (0.2 * batch.noise).clamp(-0.3, 0.3)).clamp(-1, 1)
            value = torch.stack([q(batch.next_obs, action) for q in slow_qs]).min(0).values
            target = batch.reward + batch.discount * value
        q_adam.zero_grad()
        sum(0.5 * (q(batch.obs, batch.action) - target).square().mean() for q in qs).backward()  # type: ignore[union-attr]
        q_adam.step()
        if not td3 or k % 2 == 1:
            actor_adam.zero_grad()
            (-qs[0](batch.obs, actor(batch.obs)).mean()).backward()
            actor_adam.step()
            with torch.no_grad():
                pairs = zip(parameters(slow_actor, *slow_qs), parameters(actor, *qs), strict=True)
                for slow, fast in pairs:
                    slow.copy_(0.9 * slow + 0.1 * fast)
        same(agent.critics, *qs)
        same(agent.net, actor)
        same(agent.target_critics, *slow_qs)
        same(agent.target_net, slow_actor)


# --- what they do with replay ---


class Counted(NamedTuple):
    """A buffer of which only sizes are asked."""

    count: int
    held: int

    def __len__(self) -> int:
        return self.held


@pytest.mark.parametrize(("ratio", "rollout"), [(1.0, 1), (0.25, 1), (0.3, 4), (4.0, 2), (2.5, 3)])
def test_gradient_steps_keep_their_ratio(ratio: float, rollout: int) -> None:
    config = OffPolicyConfig(learning_starts=20, batch_size=10, utd_ratio=ratio)
    done = 0
    for count in range(rollout, 200, rollout):
        due = updates_due(config, Counted(count, count), rollout)  # type: ignore[arg-type]
        done += due
        assert done == math.floor(max(0, count - 20) * ratio) and (count > 20 or not due)


def test_an_empty_buffer_is_filled_before_it_is_learnt_from() -> None:
    config = OffPolicyConfig(learning_starts=20, batch_size=10)
    assert updates_due(config, Counted(1000, 9), 1) == 0  # type: ignore[arg-type]
    assert updates_due(config, Counted(1001, 10), 1) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [SACConfig, DDPGConfig])
def test_the_first_actions_are_uniform_and_nothing_is_learnt(cls: type) -> None:
    agent = make(cls, learning_starts=4000, buffer_size=8000)
    before = [p.detach().clone() for p in agent.critics.parameters()]
    obs, noise = torch.randn(ENVS, 3), agent.noise.state_dict()["generator"].clone()
    actions = torch.cat([agent.act(obs) for _ in range(1000)])
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    assert (actions >= low).all() and (actions <= high).all()
    torch.testing.assert_close(actions.mean(0), (low + high) / 2, atol=0.06, rtol=0)
    torch.testing.assert_close(actions.var(0), (high - low) ** 2 / 12, atol=0.06, rtol=0)
    assert torch.equal(agent.noise.state_dict()["generator"], noise)  # the policy's own is not touched
    metrics = play(agent, 5)
    assert metrics[-1].keys() == {"charts/updates"} and metrics[-1]["charts/updates"] == 0
    assert all(torch.equal(p, q) for p, q in zip(before, agent.critics.parameters(), strict=True))


def test_random_choices_are_uniform() -> None:
    drawn = random_actions(CHOICE, 3000, Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.bincount().tolist() == pytest.approx([1000] * 3, rel=0.1)


def test_the_noise_is_as_large_as_asked() -> None:
    agent = make(DDPGConfig, noise_std=0.3)
    assert agent.next_noise(20_000).std() == pytest.approx(0.3, rel=0.02)


def test_coloured_noise_fits_any_number_of_envs() -> None:
    agent = make(DDPGConfig, noise="ou", learning_starts=16)
    play(agent, 10)
    for n in (1, 7):  # as an agent that was loaded may be asked
        assert agent.act(torch.randn(n, 3)).shape == (n, 2)


@pytest.mark.parametrize("action", [BOX, CHOICE], ids=["box", "discrete"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_every_parameter_learns(action: spaces.Space[Any], layer_norm: bool) -> None:
    for cls in (SACConfig, DDPGConfig) if action is BOX else (SACConfig,):
        torch.manual_seed(0)
        config = cls(**SMALL)
        config.network.hidden_sizes, config.network.layer_norm = [8], layer_norm
        agent: Any = AGENTS[cls](config, Setting(OBS, action, ENVS, 1, torch.device("cpu")))
        parts = [agent.net, agent.critics, agent.target_critics]
        assert any("norm" in name for name, _ in agent.critics.named_parameters()) == layer_norm
        before = [p.detach().clone() for part in parts for p in part.parameters()]
        play(agent, 40)
        after = [p for part in parts for p in part.parameters()]
        assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_the_temperature_seeks_its_entropy() -> None:
    for target, rises in ((-50.0, False), (50.0, True)):
        agent = make(SACConfig, alpha_lr=1e-2)
        agent.target_entropy = target
        metrics = play(agent, 60)
        alphas = [float(row["losses/alpha"]) for row in metrics if "losses/alpha" in row]
        assert (alphas[-1] > alphas[0]) == rises and alphas == sorted(alphas, reverse=not rises)
    assert "losses/alpha_loss" not in play(make(SACConfig, alpha=0.1), 40)[-1]


def test_the_usual_target_entropies() -> None:
    assert make(SACConfig).target_entropy == -2.0
    assert make(SACConfig, CHOICE).target_entropy == pytest.approx(0.98 * math.log(3))


@pytest.mark.parametrize(("space", "largest"), [(BOX, 2 * math.log(2)), (CHOICE, math.log(3))])
def test_an_entropy_out_of_reach_is_refused(space: spaces.Space[Any], largest: float) -> None:
    assert make(SACConfig, space, target_entropy=largest - 1e-3)
    assert make(SACConfig, space, target_entropy=largest + 1.0, alpha=0.1)  # which nothing asks for
    with pytest.raises(UserError, match=f"never reached: .* {largest:.3g} nats.\nUse: algo.target_entropy="):
        make(SACConfig, space, target_entropy=largest)
    if space is CHOICE:
        with pytest.raises(UserError, match=r"target_entropy=-1 is never reached: .* above 0.\nUse: .*=1.08"):
            make(SACConfig, space, target_entropy=-1.0)


def test_a_delayed_policy_learns_at_every_nth_step() -> None:
    for cls in (SACConfig, DDPGConfig):
        agent = make(cls, policy_delay=3)
        play(agent, 16)
        learnt = []
        for _ in range(6):
            before = agent.net.state_dict()["body.layers.0.weight"].clone()
            learnt.append("losses/actor_loss" in agent.learn(0.0))
            assert learnt[-1] != torch.equal(before, agent.net.state_dict()["body.layers.0.weight"])
        assert learnt == [False, False, True] * 2


def test_coloured_noise_drifts_and_begins_anew() -> None:
    """Ornstein and Uhlenbeck's: x <- (1 - theta) x + std * normal, 0 after the end of an episode."""
    agent = make(DDPGConfig, noise="ou", noise_std=0.01, ou_theta=0.5, learning_starts=16)
    play(agent, 10)
    agent.noise = copy.deepcopy(agent.noise)
    drift, obs = agent.drift.clone(), torch.randn(ENVS, 3)
    noise = copy.deepcopy(agent.noise).next(ENVS)
    center, radius = agent.net.center, agent.net.radius
    with torch.no_grad():
        expected = agent.net(obs) + 0.5 * drift + noise
        torch.testing.assert_close(agent.act(obs), center + radius * expected)
    torch.testing.assert_close(agent.drift, 0.5 * drift + noise)
    ended = torch.tensor([[True, False]])
    step = Transition(obs, agent.act(obs).detach(), torch.zeros(ENVS), obs, *[torch.zeros(ENVS, dtype=torch.bool)] * 2)
    rollout = Transition(*(x.unsqueeze(0) for x in step))
    before = agent.drift.clone()
    agent.update(rollout._replace(truncated=ended), 0.0)
    assert torch.equal(agent.drift[0], torch.zeros(2)) and torch.equal(agent.drift[1], before[1])


def test_correlated_noise_is_as_large_and_remembers() -> None:
    """Standard normal at each step, with the correlation asked for between one and the next (Eberhard et al. 2023)."""
    agent = make(SACConfig, noise_correlation=0.9)
    others = [make(SACConfig, seed=seed, noise_correlation=0.9) for seed in range(300)]
    first = torch.stack([other.next_noise(ENVS).clone() for other in others])
    assert first.mean() == pytest.approx(0.0, abs=0.1) and first.std() == pytest.approx(1.0, abs=0.1)
    noise = torch.stack([agent.next_noise(ENVS).clone() for _ in range(40_000)])
    assert noise.mean() == pytest.approx(0.0, abs=0.05) and noise.std() == pytest.approx(1.0, abs=0.03)
    for lag, expected in ((1, 0.9), (2, 0.81), (30, 0.04)):
        assert (noise[lag:] * noise[:-lag]).mean() == pytest.approx(expected, abs=0.05)
    assert (noise[..., 0] * noise[..., 1]).mean() == pytest.approx(0.0, abs=0.05)
    assert agent.next_noise(500).std() == pytest.approx(1.0, abs=0.1)  # as an agent that was loaded may be asked


def test_correlated_noise_is_for_continuous_actions() -> None:
    with pytest.raises(UserError, match="algo.noise_correlation=0.5 is for continuous actions"):
        make(SACConfig, CHOICE, noise_correlation=0.5)


@pytest.mark.parametrize("cls", [SACConfig, DDPGConfig])
def test_priorities_follow_the_errors(cls: type) -> None:
    """The mean over critics of |Q - target|, before the step."""
    agent = make(cls, per_alpha=1.0, **({"twin": True} if cls is DDPGConfig else {}))
    play(agent, 20)
    step, expected, told = agent.critic_step, [], []

    @torch.no_grad()
    def see(batch: Any, alpha: Any) -> None:
        if cls is SACConfig:
            value = agent.next_value(batch, alpha)
        else:
            value = agent.target_critics(batch.next_obs, agent.target_net(batch.next_obs)).amin(0)
        q = agent.critics(batch.obs, batch.action)
        expected.append((q - (batch.reward + batch.discount * value)).abs().mean(0))

    def seen(batch: Any, lr: Tensor, scalars: Any) -> Any:
        see(batch, scalars)
        return step(batch, lr, scalars)

    agent.critic_step = seen
    agent.buffer.update_priorities = lambda index, error: told.append(error)
    agent.learn(0.0)
    torch.testing.assert_close(told[0], expected[0])


def test_a_priority_that_is_not_finite_leaves_the_others() -> None:
    agent = make(SACConfig, per_alpha=0.6)
    play(agent, 20)
    errors = torch.tensor([math.nan, math.inf, 1.0])
    agent.buffer.update_priorities(torch.arange(3), errors)  # the run stops for the loss, which names what is wrong
    share = agent.buffer.sample(4000, 1.0).index.bincount(minlength=3) / 4000
    assert share[0] < 1e-3 and share[1] < 1e-3 and share[2] > 0.01


def test_importance_weights_grow_to_their_full_power() -> None:
    agent, betas = make(SACConfig, per_alpha=0.6, per_beta=0.4), []
    play(agent, 20)
    sample = agent.buffer.sample
    agent.buffer.sample = lambda size, beta: (betas.append(beta), sample(size, beta))[1]
    for progress in (0.0, 0.5, 1.0):
        agent.learn(progress)
    assert betas == pytest.approx([0.4, 0.7, 1.0])


@pytest.mark.parametrize("cls", [SACConfig, DDPGConfig])
def test_batches_are_normalised_by_statistics_that_change_last(cls: type) -> None:
    agent, seen = make(cls, norm_obs=True, clip_obs=0.7), []
    add = agent.buffer.add
    agent.buffer.add = lambda rollout: (seen.append(rollout.obs[0].double()), add(rollout))
    play(agent, 20)
    torch.testing.assert_close(agent.obs_norm.mean, torch.cat(seen).mean(0))
    sample, samples, counts = agent.buffer.sample, [], []

    def sampled(*args: Any) -> Any:
        assert args == (16, 0.4)
        samples.append(sample(*args))
        counts.append(float(agent.obs_norm.count))
        return samples[-1]

    agent.buffer.sample = sampled
    (spy,) = one_more(agent, "critic_step")
    batch, raw = spy.calls[0][0], samples[0]
    norm = copy.deepcopy(agent.obs_norm)
    for found, before in ((batch.obs, raw.obs), (batch.next_obs, raw.next_obs)):
        assert torch.equal(found, norm(before)) and not torch.equal(found, before)
    assert batch.obs.abs().max() == pytest.approx(0.7)
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    torch.testing.assert_close(batch.action, (raw.action - (low + high) / 2) / ((high - low) / 2))
    counts.clear()
    play(agent, 1)
    assert counts == [40.0, 40.0] and agent.obs_norm.count == 42  # two gradient steps, then the two new rows


@pytest.mark.parametrize(
    ("cls", "space", "words"),
    [
        (SACConfig, spaces.Box(-np.inf, np.inf, (2,), np.float32), "algo=sac needs finite action bounds"),
        (SACConfig, spaces.MultiDiscrete([2, 3]), "algo=sac needs Box or Discrete actions"),
        (DDPGConfig, spaces.Box(-np.inf, np.inf, (2,), np.float32), "algo=ddpg needs finite action bounds"),
        (DDPGConfig, CHOICE, "algo=ddpg needs continuous actions"),
        (DDPGConfig, spaces.MultiBinary(2), "algo=ddpg needs continuous actions"),
    ],
)
def test_actions_that_do_not_apply_are_refused(cls: type, space: spaces.Space[Any], words: str) -> None:
    with pytest.raises(UserError, match=f"{words}.*\nUse: algo=(ppo|sac)"):
        make(cls, space)
