"""Bodies, heads, initialisation, the map between the policy's units and the env's, and running statistics."""

import copy
import math
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from pgrl.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    DiagGaussian,
    MultiCategorical,
    SquashedGaussian,
)
from pgrl.errors import UserError
from pgrl.networks import (
    ACTIVATIONS,
    FEW_OUTPUTS,
    MLP,
    ActorCritic,
    NatureCNN,
    NetworkConfig,
    PolicyConfig,
    is_image,
    linear,
)

OBS = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
BOUNDED = spaces.Box(np.array([-2.0, 0.0, -0.4], np.float32), np.array([2.0, 3.0, 0.1], np.float32))
UNBOUNDED = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = {
    "box": BOUNDED,
    "unbounded": UNBOUNDED,
    "matrix": spaces.Box(-1, 1, (2, 2), np.float32),
    "discrete": spaces.Discrete(4),
    "multi": spaces.MultiDiscrete([2, 4, 3]),
    "binary": spaces.MultiBinary(3),
}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def network(obs: spaces.Box = OBS, action: spaces.Space[Any] = BOUNDED, **keys: Any) -> ActorCritic:
    """A net whose policy head is not nearly zero, so that its outputs tell something."""
    torch.manual_seed(0)
    policy = {k: keys.pop(k) for k in list(keys) if k in PolicyConfig.__dataclass_fields__}
    return ActorCritic(obs, action, NetworkConfig(**{"policy_gain": 1.0, **keys}), PolicyConfig(**policy))


def observations(space: spaces.Box = OBS, n: int = 6) -> Tensor:
    if space.dtype == np.uint8:
        return torch.randint(256, (n, *space.shape), generator=seeded(1), dtype=torch.uint8)
    return torch.randn(n, *space.shape, generator=seeded(1))


# --- bodies ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_layers_in_sequence(activation: str) -> None:
    modules = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU}
    assert set(modules) == set(ACTIVATIONS)
    mlp = MLP([5, 7, 6, 4], activation)
    sequence: list[nn.Module] = []
    for layer in mlp.layers:
        sequence += [layer, modules[activation]()]
    expected = nn.Sequential(*sequence)
    assert torch.equal(mlp(observations()), expected(observations())) and mlp.features == 4


@pytest.mark.parametrize("outputs", [1, FEW_OUTPUTS, FEW_OUTPUTS + 1])
def test_layer_in_parts_is_that_of_torch(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Linear(5, outputs).double(), torch.randn(7, 5, dtype=torch.float64)
    whole = layer(x)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    parts = linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(parts, whole)
    weight = [torch.autograd.grad(y.square().sum(), layer.weight)[0] for y in (parts, whole)]
    torch.testing.assert_close(*weight)


def test_mlp_flattens() -> None:
    mlp = MLP([24, 8], "tanh")
    x = torch.randn(6, 2, 3, 4)
    assert torch.equal(mlp(x), mlp(x.reshape(6, 24)))


def test_mlp_without_hidden_layers_is_linear() -> None:
    net = network(hidden_sizes=[])
    obs = observations()
    assert torch.equal(net.value(obs), net.value_head(obs).squeeze(-1))


@pytest.mark.parametrize("shape", [(36, 40, 3), (3, 36, 40), (84, 84, 4), (4, 84, 84), (210, 160, 3)])
def test_cnn_takes_either_order_of_channels(shape: tuple[int, ...]) -> None:
    cnn = NatureCNN(shape)
    x = torch.randint(256, (2, *shape), generator=seeded(2), dtype=torch.uint8)
    assert cnn(x).shape == (2, 512) and cnn.features == 512
    assert cnn.channels_last == (shape[-1] in (3, 4))
    channels_first = x.permute(0, 3, 1, 2) if cnn.channels_last else x
    plain = nn.Sequential(
        cnn.layers[0], nn.ReLU(), cnn.layers[1], nn.ReLU(), cnn.layers[2], nn.ReLU(), nn.Flatten(),
        cnn.layers[3], nn.ReLU(),
    )  # fmt: skip
    torch.testing.assert_close(cnn(x), plain(channels_first / 255.0))
    torch.testing.assert_close(cnn(x), cnn(x.float() / 255.0))  # float images are taken as they are


def test_cnn_is_the_one_of_the_paper() -> None:
    cnn = NatureCNN((4, 84, 84))
    shapes = [tuple(layer.weight.shape) for layer in cnn.layers]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert [layer.stride for layer in cnn.layers[:3]] == [(4, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("shape", "answer"),
    [((36, 36, 1), True), ((3, 84, 84), True), ((35, 84, 3), False), ((10, 10, 4), False), ((84, 84), False)],
)
def test_is_image(shape: tuple[int, ...], answer: bool) -> None:
    assert is_image(spaces.Box(0, 255, shape, np.uint8)) == answer


def test_body_follows_the_config() -> None:
    assert isinstance(network(IMAGE).body, NatureCNN)
    assert isinstance(network(IMAGE, body="cnn").value_body, NatureCNN)
    assert isinstance(network(IMAGE, body="mlp").body, MLP)
    assert isinstance(network(OBS).body, MLP)
    with pytest.raises(UserError, match="algo.network.body=mlp"):
        network(OBS, body="cnn")


@pytest.mark.parametrize("shape", [(10, 10, 4), (36, 40, 3)])
def test_mlp_reads_bytes_as_the_cnn_does(shape: tuple[int, ...]) -> None:
    """Images too small for the CNN, or an MLP by choice: bytes are scaled to [0, 1]."""
    space = spaces.Box(0, 255, shape, np.uint8)
    net = network(space, body="mlp" if is_image(space) else "auto")
    obs = observations(space)
    torch.testing.assert_close(net.value(obs), net.value(obs.float() / 255.0))


def test_separate_networks_share_nothing() -> None:
    net = network(hidden_sizes=[8, 7], value_hidden_sizes=[6])
    policy, value = net.policy_parameters(), net.value_parameters()
    ids = [id(p) for p in (*policy, *value)]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in net.parameters()}
    assert [tuple(p.shape) for p in value] == [(6, 5), (6,), (1, 6), (1,)]
    for p in torch.autograd.grad(net.value(observations()).sum(), policy, allow_unused=True):
        assert p is None
    mean = net.policy(observations()).mode()
    for p in torch.autograd.grad(mean.sum(), value, allow_unused=True):
        assert p is None


def test_shared_network_has_one_body() -> None:
    net = network(hidden_sizes=[8, 7], value_hidden_sizes=[6], shared=True)
    assert net.value_body is None and net.value_head.weight.shape == (1, 7)
    ids = [id(p) for p in (*net.policy_parameters(), *net.value_parameters())]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in net.parameters()}
    gradients = torch.autograd.grad(net.value(observations()).sum(), list(net.body.parameters()))
    assert all((g != 0).any() for g in gradients)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("space", [OBS, IMAGE], ids=["vector", "image"])
def test_policy_and_value_together_equal_each_alone(shared: bool, space: spaces.Box) -> None:
    net, obs = network(space, shared=shared), observations(space)
    policy, value = net.policy_and_value(obs)
    assert torch.equal(policy.mode(), net.policy(obs).mode())
    assert torch.equal(value, net.value(obs)) and value.shape == (6,)


# --- initialisation ---


def gains(net: ActorCritic, body: float, policy: float, value: float) -> list[tuple[Tensor, float]]:
    bodies = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    heads = {net.policy_head: policy, net.value_head: value}
    return [(layer.weight.detach().flatten(1), heads.get(layer, body)) for layer in bodies]  # type: ignore[call-overload]


@pytest.mark.parametrize("space", [OBS, IMAGE], ids=["vector", "image"])
def test_orthogonal_initialisation(space: spaces.Box) -> None:
    net = network(space, policy_gain=0.01, value_gain=0.7, hidden_sizes=[8, 7])
    for weight, gain in gains(net, math.sqrt(2.0), 0.01, 0.7):
        gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5 * gain**2, rtol=1e-4)


def test_xavier_initialisation() -> None:
    net = network(IMAGE, init="xavier", policy_gain=9.0, value_gain=9.0)
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert layer.weight.abs().max() <= bound
            n = layer.weight.numel()
            assert layer.weight.detach().var() == pytest.approx(bound**2 / 3, rel=5 / math.sqrt(n))
    network(OBS, init="xavier")


@pytest.mark.parametrize("init", ["orthogonal", "xavier"])
def test_biases_start_at_zero(init: str) -> None:
    for net in (network(OBS, init=init), network(IMAGE, init=init)):
        assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))


def test_initialisation_follows_the_seed() -> None:
    a, b = network().state_dict(), network().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(1)
    other = ActorCritic(OBS, BOUNDED, NetworkConfig(), PolicyConfig()).state_dict()
    assert not torch.equal(a["body.layers.0.weight"], other["body.layers.0.weight"])


# --- policies ---


@pytest.mark.parametrize(
    ("action", "policy", "kind"),
    [
        ("box", {}, DiagGaussian),
        ("unbounded", {}, DiagGaussian),
        ("box", {"distribution": "squashed"}, SquashedGaussian),
        ("box", {"distribution": "beta"}, Beta),
        ("matrix", {"state_dependent_std": True}, DiagGaussian),
        ("discrete", {}, Categorical),
        ("discrete", {"distribution": "beta"}, Categorical),  # discrete ones need no choice
        ("multi", {}, MultiCategorical),
        ("binary", {}, Bernoulli),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_policy_of_every_space(action: str, policy: dict[str, Any], kind: type, shared: bool) -> None:
    net, obs = network(OBS, ACTIONS[action], shared=shared, **policy), observations()
    d = net.policy(obs)
    assert isinstance(d, kind)
    noise = net.noise((6,), seeded(3))
    for a in (net.sample(obs, noise), net.mode(obs)):
        assert d.log_prob(net.to_policy_units(a)).shape == (6,)
        assert d.log_prob(net.to_policy_units(a)).isfinite().all()
        flat = int(np.prod(ACTIONS[action].shape))
        assert a.shape == ((6,) if action == "discrete" else (6, flat))
        assert a.dtype == (torch.float32 if action in ("box", "unbounded", "matrix") else torch.int64)
    assert d.entropy().shape == (6,)
    for row in net.mode(obs).detach().numpy():
        assert ACTIONS[action].contains(row.reshape(ACTIONS[action].shape).astype(ACTIONS[action].dtype))


def test_samples_of_discrete_policies_are_in_their_space() -> None:
    for action in ("discrete", "multi", "binary"):
        net, obs = network(OBS, ACTIONS[action]), observations(n=500)
        for row in net.sample(obs, net.noise((500,), seeded(4))).numpy():
            assert ACTIONS[action].contains(row.astype(ACTIONS[action].dtype))


def test_unsupported_actions_are_refused() -> None:
    with pytest.raises(UserError, match="Box, Discrete, MultiDiscrete and MultiBinary"):
        network(OBS, spaces.Text(3))


@pytest.mark.parametrize("distribution", ["squashed", "beta"])
def test_bounded_policies_need_bounds(distribution: str) -> None:
    with pytest.raises(UserError, match="algo.policy.distribution=gaussian"):
        network(OBS, UNBOUNDED, distribution=distribution)


def test_log_std() -> None:
    free = network(log_std_init=-0.7)
    assert free.log_std is not None and torch.equal(free.log_std, torch.full((3,), -0.7))
    assert any(p is free.log_std for p in free.policy_parameters())
    assert torch.equal(free.policy(observations()).log_std, free.log_std)
    dependent = network(log_std_init=-0.7, state_dependent_std=True)
    log_std = dependent.policy(observations()).log_std
    assert dependent.log_std is None and log_std.shape == (6, 3)
    assert not torch.equal(log_std[0], log_std[1])
    with torch.no_grad():
        dependent.policy_head.weight.zero_()
    assert torch.equal(dependent.policy(observations()).log_std, torch.full((6, 3), -0.7))
    with torch.no_grad():
        dependent.policy_head.bias.fill_(100.0)
    assert (dependent.policy(observations()).log_std <= 2.0).all()


@pytest.mark.parametrize("distribution", ["gaussian", "squashed", "beta"])
def test_actions_are_mapped_to_the_bounds_of_the_env(distribution: str) -> None:
    """-1 and 1 of the policy are the bounds, whatever they are, and the way back is the inverse."""
    net, obs = network(OBS, BOUNDED, distribution=distribution), observations()
    noise = net.noise((6,), seeded(5))
    low, high = torch.tensor(BOUNDED.low), torch.tensor(BOUNDED.high)
    inner = net.policy(obs).sample(noise)
    action = net.sample(obs, noise)
    torch.testing.assert_close(action, low + (inner + 1) / 2 * (high - low))
    torch.testing.assert_close(net.to_policy_units(action), inner)
    torch.testing.assert_close(net.to_policy_units(low.expand(6, 3)), -torch.ones(6, 3))
    torch.testing.assert_close(net.to_policy_units(high.expand(6, 3)), torch.ones(6, 3))
    if distribution != "gaussian":
        many = net.sample(obs[:1].expand(5000, -1), net.noise((5000,), seeded(6)))
        assert (many >= low).all() and (many <= high).all()
        spread = (many - low) / (high - low)
        assert (spread.amin(0) < 0.2).all() and (spread.amax(0) > 0.8).all()


def test_gaussian_without_rescale_works_in_the_units_of_the_env() -> None:
    net, obs = network(OBS, BOUNDED, rescale=False), observations()
    noise = net.noise((6,), seeded(5))
    action = net.sample(obs, noise)
    assert torch.equal(action, net.policy(obs).sample(noise)) and not net.affine
    assert torch.equal(net.to_policy_units(action), action)
    unbounded = network(OBS, UNBOUNDED)
    assert not unbounded.affine  # there is nothing to map to
    assert torch.equal(unbounded.mode(obs), unbounded.policy(obs).mode())


@pytest.mark.parametrize("distribution", ["gaussian", "squashed", "beta"])
def test_log_prob_does_not_depend_on_the_bounds(distribution: str) -> None:
    """A wider env gets the same policy in its own units: densities differ by a constant, which no ratio sees."""
    wide = spaces.Box(BOUNDED.low * 10 + 7, BOUNDED.high * 10 + 7)
    a, b = (network(OBS, space, distribution=distribution) for space in (BOUNDED, wide))
    obs, noise = observations(), a.noise((6,), seeded(7))
    log_prob = [net.policy(obs).log_prob(net.to_policy_units(net.sample(obs, noise))) for net in (a, b)]
    torch.testing.assert_close(log_prob[0], log_prob[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.sample(obs, noise), a.sample(obs, noise) * 10 + 7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("distribution", "rescale"), [("gaussian", True), ("gaussian", False), ("squashed", True), ("beta", True)]
)
def test_mode_is_within_the_bounds(distribution: str, rescale: bool) -> None:
    net = network(OBS, BOUNDED, distribution=distribution, rescale=rescale, policy_gain=300.0)
    mode = net.mode(observations(n=200))
    assert (mode >= torch.tensor(BOUNDED.low)).all() and (mode <= torch.tensor(BOUNDED.high)).all()
    assert mode.std(0).min() > 0  # extreme, but not stuck


def test_half_bounded_actions_are_clipped_but_not_mapped() -> None:
    space = spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([np.inf, 1.0], np.float32))
    net = network(OBS, space, policy_gain=50.0)
    assert not net.affine
    mode = net.mode(observations(n=50))
    assert (mode[:, 0] >= 0).all() and (mode[:, 1] <= 1).all() and mode.isfinite().all()


# --- copies and conversions keep the parameters that the forward reads ---


def check_tied(net: ActorCritic) -> None:
    """The forward reads exactly the parameters the module lists."""
    listed = {id(p) for p in net.parameters()}
    bodies = [b for b in (net.body, net.value_body) if isinstance(b, MLP)]
    read = [p for body in bodies for pair in body._pairs for p in pair]
    read += [*net._policy_pair, *net._value_pair]
    assert {id(p) for p in read} <= listed
    for body in bodies:
        for layer, (weight, bias) in zip(body.layers, body._pairs, strict=True):
            assert layer.weight is weight and layer.bias is bias
    obs = observations().to(net.value_head.weight.dtype)
    before = net.mode(obs), net.value(obs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)
    assert not torch.equal(before[0], net.mode(obs)) and not torch.equal(before[1], net.value(obs))


@pytest.mark.parametrize("shared", [True, False])
def test_copies_have_their_own_parameters(shared: bool) -> None:
    net = network(shared=shared)
    other = copy.deepcopy(net)
    obs = observations()
    untouched = net.mode(obs), net.value(obs)
    assert torch.equal(other.mode(obs), untouched[0])
    assert not {id(p) for p in net.parameters()} & {id(p) for p in other.parameters()}
    check_tied(other)
    assert torch.equal(net.mode(obs), untouched[0]) and torch.equal(net.value(obs), untouched[1])
    check_tied(net)


@pytest.mark.parametrize("shared", [True, False])
def test_conversion_keeps_parameters_tied(shared: bool) -> None:
    net = network(shared=shared)
    single = net.mode(observations())
    net.to(torch.float64)
    double = net.mode(observations().double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    check_tied(net)
    check_tied(net.to(torch.float32))


def test_loading_keeps_parameters_tied() -> None:
    source = network()
    torch.manual_seed(9)
    net = ActorCritic(OBS, BOUNDED, NetworkConfig(), PolicyConfig())
    obs = observations()
    assert not torch.equal(net.mode(obs), source.mode(obs))
    net.load_state_dict(source.state_dict())
    assert torch.equal(net.mode(obs), source.mode(obs)) and torch.equal(net.value(obs), source.value(obs))
    check_tied(net)


def test_bounds_are_not_state() -> None:
    """They come from the env, so a checkpoint neither holds nor overwrites them."""
    assert set(network().state_dict()) == {name for name, _ in network().named_parameters()}
