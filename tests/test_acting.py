"""Acting in numpy and in C++ gives what the network itself gives, and is what small networks act with."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import pgrl.acting
import pgrl.sampling
from pgrl.acting import Actor
from pgrl.agents import Agent, Setting
from pgrl.config import compose
from pgrl.data import Rollout, Transition
from pgrl.flat import FlatParameters
from pgrl.native import compilers, library
from pgrl.networks import ActorCritic, NetworkConfig, Policy, PolicyConfig
from pgrl.normalisers import RunningNorm
from pgrl.q_networks import DeterministicPolicy, OffPolicyNetworkConfig
from pgrl.runs import build
from pgrl.train import collect

ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "bounded": spaces.Box(np.float32([0.0, -4.0]), np.float32([1.0, 2.0]), dtype=np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
}


TOLERANCE: dict[str, dict[str, float]] = {"numpy": {}, "C++": {"rtol": 2e-6, "atol": 1e-5}}


def make(
    action: str = "box",
    shape: tuple[int, ...] = (5,),
    normalised: bool = True,
    clip: float | None = 1.5,
    **network: Any,
) -> tuple[Actor, ActorCritic, RunningNorm | None]:
    torch.manual_seed(0)
    policy = PolicyConfig(log_std_init=-0.7, distribution=network.pop("distribution", "gaussian"))
    obs_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
    net = ActorCritic(obs_space, ACTIONS[action], NetworkConfig(policy_gain=1.0, **network), policy)
    norm = RunningNorm(shape, clip) if normalised else None
    if norm is not None:
        norm.update(3.0 * torch.randn(100, *shape) + 1.0)
    return Actor(net, norm), net, norm


def setting(net: Policy | DeterministicPolicy, **named: Any) -> Setting:
    device = named.pop("device", torch.device("cpu"))
    return Setting(spaces.Box(-np.inf, np.inf, (5,), np.float32), net.action_space, 4, 1, device, **named)


@pytest.fixture(params=["numpy", "C++"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "C++" and not compilers():
        pytest.skip("needs a C++ compiler")
    if request.param == "numpy":
        monkeypatch.setattr("pgrl.sampling.CPP_ROWS", 0)
    return request.param


def actor_of(net: Policy | DeterministicPolicy, norm: RunningNorm | None, way: str) -> Actor:
    """An actor that samples small calls in this way."""
    actor = Actor(net, norm)
    assert actor.acts_with.startswith(way)
    return actor


def expected(net: ActorCritic, norm: RunningNorm | None, obs: Tensor, noise: Tensor) -> Tensor:
    with torch.no_grad():
        return net.sample(obs if norm is None else norm(obs), noise)


def inputs(net: ActorCritic, rows: int = 4, shape: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    random = Generator().manual_seed(1)
    return 3.0 * torch.randn(rows, *shape, generator=random), net.noise((rows,), random)


def refuse(*_: object) -> None:
    raise AssertionError("the network was asked")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [[], [8], [64, 64]])
def test_samples_are_those_of_the_network(
    action: str, normalised: bool, activation: str, hidden: list[int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, net, norm = make(action, normalised=normalised, activation=activation, hidden_sizes=hidden)
    actor, (obs, noise) = actor_of(net, norm, way), inputs(net)
    before, right = obs.clone(), expected(net, norm, obs, noise)
    monkeypatch.setattr(net, "sample", refuse)
    sampled = actor.sample(obs, noise)
    assert sampled.dtype == right.dtype and sampled.shape == right.shape
    torch.testing.assert_close(sampled, right, **TOLERANCE[way])
    assert torch.equal(obs, before)  # nothing of the rollout is overwritten
    assert torch.equal(sampled, actor.sample(obs, noise))


@pytest.mark.parametrize("own_std", [False, True])
@pytest.mark.parametrize("distribution", ["gaussian", "squashed"])
@pytest.mark.parametrize("action", ["box", "bounded"])
def test_samples_of_policies_without_a_critic(
    distribution: str, own_std: bool, action: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deviations that depend on the state, at their bounds too; those of SAC are of this kind."""
    torch.manual_seed(0)
    kind = PolicyConfig(distribution=distribution, state_dependent_std=own_std, log_std_init=-0.5)
    space = spaces.Box(-np.inf, np.inf, (5,), np.float32)
    net = Policy(space, ACTIONS[action], OffPolicyNetworkConfig(hidden_sizes=[32, 32]), kind)
    with torch.no_grad():
        net.policy_head.bias[-1] += 4.0
    obs, noise = inputs(net)  # type: ignore[arg-type]
    with torch.no_grad():
        right = net.sample(obs, noise)
    assert not own_std or (net.policy(obs).log_std == 2.0).any()  # type: ignore[union-attr]
    monkeypatch.setattr(net, "sample", refuse)
    torch.testing.assert_close(actor_of(net, None, way).sample(obs, noise), right, **TOLERANCE[way])


@pytest.mark.parametrize("action", ["box", "bounded"])
def test_samples_of_deterministic_policies(action: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    space, box = spaces.Box(-np.inf, np.inf, (5,), np.float32), ACTIONS[action]
    assert isinstance(box, spaces.Box)
    net = DeterministicPolicy(space, box, OffPolicyNetworkConfig(hidden_sizes=[32, 32]))
    obs, noise = inputs(net)  # type: ignore[arg-type]
    with torch.no_grad():
        right = net.sample(obs, noise)
    assert (net.to_policy_units(right) == 1.0).any() and (net.to_policy_units(right).abs() < 0.9).any()
    monkeypatch.setattr(net, "sample", refuse)
    torch.testing.assert_close(actor_of(net, None, way).sample(obs, noise), right, **TOLERANCE[way])


def test_observations_of_many_dimensions_and_without_a_clip(way: str) -> None:
    _, net, norm = make(shape=(2, 3), clip=None)
    actor, (obs, noise) = actor_of(net, norm, way), inputs(net, shape=(2, 3))
    torch.testing.assert_close(actor.sample(obs, noise), expected(net, norm, obs, noise))
    apart = obs.flip(0).flip(0).transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart.is_contiguous()
    torch.testing.assert_close(actor.sample(apart, noise.T.contiguous().T), expected(net, norm, obs, noise))


def test_weights_and_statistics_are_the_present_ones(way: str) -> None:
    """Changed in place, moved to a flat vector, or copied with the agent: what is used is what the network has."""
    _, net, norm = make()
    assert norm is not None
    actor, (obs, noise) = actor_of(net, norm, way), inputs(net)
    first = actor.sample(obs, noise)
    with torch.no_grad():
        for p in net.policy_parameters():
            p.mul_(1.5)
    norm.update(torch.randn(50, 5) - 2.0)
    second = actor.sample(obs, noise)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, expected(net, norm, obs, noise))

    flat = FlatParameters(net.policy_parameters())
    flat.vector.mul_(0.5)
    third = actor.sample(obs, noise)
    assert not torch.allclose(second, third)
    torch.testing.assert_close(third, expected(net, norm, obs, noise))

    twin, twin_net = copy.deepcopy((actor, net))
    with torch.no_grad():
        twin_net.policy_head.bias.add_(1.0)
    assert torch.equal(actor.sample(obs, noise), third)
    torch.testing.assert_close(twin.sample(obs, noise), third + 1.0)


def test_what_is_not_finite_stays_so(way: str) -> None:
    """So that the loop, which asks whether actions are finite, can say it."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        _, net, _ = make(hidden_sizes=[64, 64])
        actor, (obs, noise) = actor_of(net, None, way), inputs(net)
        with torch.no_grad():
            net.policy_head.weight[0, 7] = bad
        assert not actor.sample(obs, noise)[:, 0].isfinite().any()
        if bad != bad:
            obs[2, 1] = bad
            assert actor.sample(obs, noise).isnan()[2].all()
    _, net, _ = make()
    actor, (obs, noise) = actor_of(net, None, way), inputs(net)
    with torch.no_grad():
        net.log_std[0] = float("inf")  # type: ignore[index]
    assert not actor.sample(obs, noise)[:, 0].isfinite().any()


@pytest.mark.parametrize(
    ("obs", "noise"),
    [
        ((5,), (5, 2)),  # no batch
        ((3, 4), (3, 2)),
        ((3, 6), (3, 2)),
        ((3, 5), (2, 2)),
        ((3, 5), (3, 1)),
        ((3, 5), (3,)),
    ],
)
def test_other_shapes_are_refused(obs: tuple[int, ...], noise: tuple[int, ...], way: str) -> None:
    _, net, _ = make()
    actor = actor_of(net, None, way)
    if way == "numpy" and noise in ((3, 1), (3,)):
        pytest.skip("numpy spreads it out, or says so by itself")
    with pytest.raises(ValueError):
        actor.sample(torch.randn(obs), torch.randn(noise))


@pytest.mark.parametrize("what", ["double noise", "obs elsewhere", "noise elsewhere"])
def test_other_numbers_are_refused(what: str) -> None:
    _, net, _ = make()
    actor, (obs, noise) = actor_of(net, None, "C++"), inputs(net)
    with pytest.raises(ValueError, match="in main memory"):
        actor.sample(
            obs.to("meta") if what == "obs elsewhere" else obs,
            noise.double() if what == "double noise" else noise.to("meta") if what == "noise elsewhere" else noise,
        )


def test_a_network_of_another_precision_is_left_to_numpy(way: str) -> None:
    _, net, _ = make(normalised=False)
    actor, (obs, noise) = actor_of(net, None, way), inputs(net)
    before = actor.sample(obs, noise)
    net.double()  # at other places
    torch.testing.assert_close(actor.sample(obs, noise).float(), before)
    assert actor.acts_with == "numpy"


def test_a_copy_knows_nothing_of_where_the_first_had_its_numbers(way: str) -> None:
    _, net, norm = make()
    actor, (obs, noise) = actor_of(net, norm, way), inputs(net)
    right = actor.sample(obs, noise)
    twin = copy.deepcopy(actor)
    assert twin._place == -1 and "_small" not in vars(twin)
    assert torch.equal(twin.sample(obs, noise), right)
    assert copy.deepcopy(actor).acts_with == actor.acts_with


def test_structs_are_as_large_as_in_cpp() -> None:
    assert (pgrl.sampling.LAYER.itemsize, pgrl.sampling.POLICY.itemsize) == (32, 112)  # what sampling.cpp asserts


def test_calls_of_more_observations_than_cpp_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor whose envs are more leaves them to numpy; where others ask for more it is torch, as without envs."""
    _, net, norm = make()
    many = setting(net)
    many.num_envs = 9
    assert Actor(net, norm, many).acts_with == "numpy"
    many.num_envs = 8
    actor = Actor(net, norm, many)
    assert actor.acts_with.partition(" ")[0] == ("C++" if compilers() else "numpy")
    monkeypatch.setattr(actor, "apply", lambda obs, noise: len(obs))
    assert not compilers() or actor.sample(*inputs(net, 9)) == 9


@pytest.mark.parametrize("why", ["double precision", "no compiler", "it fails"])
def test_where_there_is_no_cpp_it_is_numpy(why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, net, norm = make(normalised=False)
    library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is built there yet
    if not compilers():
        pytest.skip("needs a C++ compiler")
    if why == "double precision":
        net = net.double()
    elif why == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif why == "it fails":
        monkeypatch.setattr("pgrl.native.FLAGS", ["--no-such-flag"])
    assert Actor(net, norm).acts_with == "numpy"
    library.cache_clear()


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ({"hidden_sizes": [600, 600]}, 1),
        ({}, 1000),
        ({"activation": "gelu"}, 4),
        ({"distribution": "beta"}, 4),
    ],
)
def test_everything_else_is_left_to_torch(kind: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, net, norm = make(**kind)
    obs, noise = inputs(net, rows)
    with torch.no_grad():
        assert torch.equal(actor.sample(obs, noise), expected(net, norm, obs, noise))
        monkeypatch.setattr(net, "sample", refuse)
        with pytest.raises(AssertionError, match="asked"):
            actor.sample(obs, noise)


def test_images_and_modes_are_left_to_torch() -> None:
    space = spaces.Box(0, 255, (3, 8, 8), np.uint8)
    net = ActorCritic(space, ACTIONS["discrete"], NetworkConfig(body="mlp", hidden_sizes=[8]), PolicyConfig())
    obs = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    noise = net.noise((4,), Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(Actor(net, None).sample(obs, noise), net.sample(obs, noise))
        assert torch.equal(Actor(net, None).mode(obs), net.mode(obs))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["gaussian", "squashed", "beta"])
@pytest.mark.parametrize("own_std", [False, True])
def test_compiled_acting_samples_what_the_network_samples(distribution: str, own_std: bool) -> None:
    net = ActorCritic(
        spaces.Box(-np.inf, np.inf, (5,), np.float32),
        ACTIONS["bounded"],
        NetworkConfig(policy_gain=1.0),
        PolicyConfig(distribution=distribution, state_dependent_std=own_std),
    )
    norm = RunningNorm((5,), 1.5)
    actor = Actor(net, norm, setting(net, compiled=True))
    obs, noise = inputs(net, rows=64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(actor.apply(obs, noise), expected(net, norm, obs, noise), rtol=1e-4, atol=1e-5)
            norm.update(3.0 * torch.randn(100, 5) + 1.0)  # the graph reads what there is now
            net.policy_head.bias.add_(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(4)], ids=str)
def test_compiled_acting_chooses_what_the_network_chooses(space: spaces.Space[Any]) -> None:
    net = ActorCritic(
        spaces.Box(-np.inf, np.inf, (5,), np.float32), space, NetworkConfig(policy_gain=1.0), PolicyConfig()
    )
    actor = Actor(net, None, setting(net, compiled=True))
    obs, noise = inputs(net, rows=64)
    with torch.no_grad():
        assert torch.equal(actor.apply(obs, noise), net.sample(obs, noise))


ELSEWHERE = torch.device("cpu", 0)  # to torch another device than "cpu", for which it stands in


def learn(device: torch.device, *words: str) -> tuple[Agent, list[Transition]]:
    """An agent after some iterations of the loop beside envs on the CPU, and its rollouts."""
    quiet = ["tuned=null", "num_envs=2", "seed=3", "threads=1", "compile=false", "total_timesteps=10000"]
    run = build(replace(compose([*quiet, *words]), device=str(device)))
    agent, env, found = run.agent, run.env, []
    rollout, obs = Rollout(agent.num_steps, 2, env.obs_space, env.action_space, env.device), env.reset()
    for k in range(max(3, 40 // agent.num_steps)):
        transition = collect(env, agent, rollout, obs, device)
        obs = rollout.obs[-1].clone()
        found.append(Transition(*(x.clone() for x in transition)))
        agent.update(transition, k / 100)
    env.close()
    return agent, found


SMALL = ["algo.num_steps=8", "algo.num_minibatches=4", "algo.update_epochs=2"]
REPLAY = ["algo.learning_starts=16", "algo.batch_size=8", "algo.network.hidden_sizes=[16,16]", "env=Pendulum-v1"]


@pytest.mark.parametrize(
    "words",
    [
        ["algo=ppo", *SMALL, "env=CartPole-v1", "algo.norm_obs=true"],
        ["algo=ppo", *SMALL, "env=Pendulum-v1", "algo.policy.rescale=true"],
        ["algo=trpo", *SMALL, "env=Pendulum-v1"],
        ["algo=npg", *SMALL, "env=CartPole-v1"],
        ["algo=reinforce", *SMALL[1:2], "algo.num_steps=32", "env=CartPole-v1", "env.max_episode_steps=16"],
        ["algo=a2c", "env=Pendulum-v1", "algo.norm_obs=true"],
        ["algo=sac", *REPLAY, "algo.norm_obs=true", "algo.noise_correlation=0.5"],
        ["algo=sac", *REPLAY, "env=CartPole-v1", "algo.target_entropy=0.2"],
        ["algo=ddpg", *REPLAY, "algo.noise=ou"],
    ],
    ids=" ".join,
)
def test_a_copy_beside_the_envs_acts_as_what_learns_elsewhere(words: list[str]) -> None:
    (agent, expected), (other, found) = learn(torch.device("cpu"), *words), learn(ELSEWHERE, *words)
    assert (other.act_device, other.device) == (torch.device("cpu"), torch.device("cpu"))
    for rollout, right in zip(found, expected, strict=True):
        assert all(map(torch.equal, rollout, right))
    assert all(map(torch.equal, other.parameters(), agent.parameters()))


def test_a_copy_is_renewed_when_a_rollout_begins() -> None:
    _, net, norm = make()
    actor = Actor(net, norm, setting(net, device=ELSEWHERE))
    obs, noise = inputs(net)
    first = actor.sample(obs, noise)
    with torch.no_grad():
        net.policy_head.bias.add_(1.0)
        assert torch.equal(actor.sample(obs, noise), first)
        actor.take_over()
        torch.testing.assert_close(actor.sample(obs, noise), expected(net, norm, obs, noise))
        assert not torch.equal(actor.sample(obs, noise), first)


@pytest.mark.parametrize("why", ["many envs", "a body that numpy does not know", "envs there", "images"])
def test_others_act_where_they_learn(why: str) -> None:
    _, net, norm = make(activation="elu" if why.startswith("a body") else "tanh")
    meta = torch.device("meta")
    there = setting(net, device=meta)
    assert Actor(net, norm, there).device == (meta if why.startswith("a body") else torch.device("cpu"))
    if why == "many envs":
        there.num_envs = 10**6
    elif why == "envs there":
        there.env_device = meta
    elif why == "images":
        there.obs_space = spaces.Box(0, 255, (5,), np.uint8)
    actor = Actor(net, norm, there)
    assert actor.device == meta
    actor._look_up = refuse  # type: ignore[method-assign]
    obs, noise = inputs(net)
    assert torch.equal(actor.sample(obs, noise), expected(net, norm, obs, noise))


def test_more_envs_than_a_copy_is_for_are_sent_to_the_network() -> None:
    _, net, norm = make()
    actor = Actor(net, norm, setting(net, device=torch.device("meta")))
    actor._copies, actor._rows = True, 3
    actor._weight = nn.Parameter(actor._weight.to("meta"))
    actor.apply = lambda obs, noise: obs[:, :2] + noise
    assert {actor.sample(*inputs(net)).device} == {torch.device("meta")}


def test_a_resumed_agent_acts_with_what_was_saved() -> None:
    words = ["algo=ppo", *SMALL, "env=Pendulum-v1"]
    agent, _ = learn(ELSEWHERE, *words)
    fresh, _ = learn(ELSEWHERE, *words, "seed=4")
    fresh.load_state_dict(copy.deepcopy(agent.state_dict()))
    obs = torch.randn(2, 3)
    with torch.no_grad():
        for each in (agent, fresh):
            each.begin_rollout()
        assert torch.equal(agent.act(obs), fresh.act(obs))
