"""Deterministic policies and critics of actions."""

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pgrl.errors import UserError
from pgrl.q_networks import Critics, DeterministicPolicy, OffPolicyNetworkConfig

OBS = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
BOUNDED = spaces.Box(np.array([-2.0, 0.0, -0.4], np.float32), np.array([2.0, 3.0, 0.1], np.float32))
UNBOUNDED = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def observations(space: spaces.Box = OBS) -> Tensor:
    if space.dtype == np.uint8:
        return torch.randint(256, (6, *space.shape), generator=seeded(1), dtype=torch.uint8)
    return torch.randn(6, *space.shape, generator=seeded(1))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("obs", [OBS, IMAGE], ids=["vector", "image"])
def test_critics_say_what_each_of_them_says(obs: spaces.Box, layer_norm: bool) -> None:
    torch.manual_seed(0)
    network, x = OffPolicyNetworkConfig(hidden_sizes=[8, 7], layer_norm=layer_norm), observations(obs)
    critics = Critics(3, obs, BOUNDED, network)
    action = torch.randn(6, 3, generator=seeded(2))
    for norm in critics.norms:
        norm.data.uniform_(generator=seeded(3))
    q = critics(x, action)
    assert q.shape == (3, 6) and q.unique().numel() == 18  # they begin differently
    for k, encoder in enumerate(critics.encoders):
        expected = torch.cat([encoder(x), action], 1)
        for i, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
            expected = expected @ weight[k] + bias[k]
            if i < 2 and layer_norm:
                expected = F.layer_norm(expected, expected.shape[-1:], *critics.norms[i][k])
            expected = expected.relu() if i < 2 else expected.squeeze(1)
        torch.testing.assert_close(q[k], expected)
    torch.testing.assert_close(critics.first(x, action), q[0])
    assert not torch.equal(critics(x, action + 1), q)


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_critic_is_differentiated_as_among_all(count: int) -> None:
    critics, x = Critics(count, OBS, BOUNDED, OffPolicyNetworkConfig(hidden_sizes=[8])), observations()
    action = torch.randn(6, 3, generator=seeded(2), requires_grad=True)
    [through_all] = torch.autograd.grad(critics(x, action)[0].sum(), action)
    [found] = torch.autograd.grad(critics.first(x, action).sum(), action)
    torch.testing.assert_close(found, through_all)


def test_critics_begin_as_linear_layers_do() -> None:
    critics = Critics(2, OBS, BOUNDED, OffPolicyNetworkConfig(hidden_sizes=[300, 200]))
    for p, inputs in zip([*critics.weights, *critics.biases], 2 * [8, 300, 200], strict=True):
        bound = inputs**-0.5
        assert float(p.detach().abs().max()) == pytest.approx(bound, rel=0.05 if p.numel() > 9 else 1.0)
        assert p.detach().abs().max() <= bound


def test_critics_of_choices_give_all_or_the_one_taken() -> None:
    critics = Critics(2, OBS, spaces.Discrete(4), OffPolicyNetworkConfig(hidden_sizes=[8]))
    x, action = observations(), torch.tensor([0, 3, 1, 2, 0, 1])
    every, taken = critics(x), critics(x, action)
    assert every.shape == (2, 6, 4) and torch.equal(taken, every[:, torch.arange(6), action])


def test_a_deterministic_policy_stays_within_the_bounds() -> None:
    policy = DeterministicPolicy(OBS, BOUNDED, OffPolicyNetworkConfig(hidden_sizes=[8]))
    x = 1e4 * observations()
    action = policy(x)
    assert (action.abs() <= 1).all()
    low, high = torch.tensor(BOUNDED.low), torch.tensor(BOUNDED.high)
    for end, bound in ((-1.0, low), (1.0, high)):
        assert torch.allclose(policy.sample(x, torch.full((len(x), 3), 9 * end)), bound)
    units = policy.mode(x)
    assert ((units >= low) & (units <= high)).all()
    torch.testing.assert_close(policy.to_policy_units(units), action)
    noise = 0.1 * torch.ones_like(action)
    noisy = policy.to_policy_units(policy.sample(x, noise))
    torch.testing.assert_close(noisy, (action + noise).clamp(max=1.0))
    with pytest.raises(UserError, match="algo=ddpg needs finite action bounds(.|\n)*algo=ppo"):
        DeterministicPolicy(OBS, UNBOUNDED, OffPolicyNetworkConfig())
