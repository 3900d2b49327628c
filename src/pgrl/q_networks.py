"""What algorithms with replay learn with: deterministic policies, and critics of actions, Q(s, a)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import gymnasium.spaces as spaces
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pgrl.distributions import DiagGaussian
from pgrl.errors import UserError
from pgrl.networks import MLP, make_body, units


@dataclass
class OffPolicyNetworkConfig:
    """The shape of an off-policy algorithm's policy and of each of its critics (`algo.network.*`)."""

    body: str = "auto"  # auto (cnn for images, mlp otherwise), mlp, cnn
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256])  # Haarnoja et al. 2018 (1812.05905), table 1
    activation: str = "relu"  # tanh, relu, elu, silu, gelu; Haarnoja et al. 2018, table 1
    layer_norm: bool = False  # in the critics, before the activations; Hiraoka et al. 2022 (2110.02034), section 3


class DeterministicPolicy(nn.Module):
    """One action for each observation, [N, A] in [-1, 1]; `to_env_units` maps that onto the bounds."""

    low: Tensor
    high: Tensor
    center: Tensor
    radius: Tensor

    def __init__(self, obs_space: spaces.Box, action_space: spaces.Box, network: OffPolicyNetworkConfig) -> None:
        super().__init__()
        if not action_space.is_bounded("both"):
            raise UserError(
                f"algo=ddpg needs finite action bounds, but this env's are "
                f"[{action_space.low.min()}, {action_space.high.max()}].\nUse: algo=ppo"
            )
        self.actions = math.prod(action_space.shape)
        self.body = make_body(obs_space, network, list(network.hidden_sizes))
        self.head = nn.Linear(self.body.features, self.actions)
        for name, bound in units(action_space, rescale=True).items():
            self.register_buffer(name, bound, persistent=False)
        self.affine = bool((self.center != 0).any() or (self.radius != 1).any())

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(F.linear(self.body.forward(obs), self.head.weight, self.head.bias))

    def noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Standard normal noise for `shape` actions."""
        return DiagGaussian.noise((*shape, self.actions), generator)

    def to_env_units(self, action: Tensor) -> Tensor:
        """Actions [N, A] in [-1, 1] in the env's units, within its bounds."""
        return torch.addcmul(self.center, action, self.radius).clamp(self.low, self.high) if self.affine else action

    def to_policy_units(self, action: Tensor) -> Tensor:
        """Actions [N, A] of a rollout in [-1, 1]."""
        return (action - self.center) / self.radius if self.affine else action


class QNetwork(nn.Module):
    """Q(s, a) [N] for actions [N, A] in the policy's units; where one is chosen among K, [N], also [N, K] of them all.

    An encoder of the observation (a CNN, or none), then an MLP. Weights are as torch makes them: uniform within
    1 / sqrt(inputs), as the hidden ones of Lillicrap et al. 2016, section 7.
    """

    def __init__(self, obs_space: spaces.Box, action_space: spaces.Space[Any], network: OffPolicyNetworkConfig) -> None:
        super().__init__()
        self.encoder = make_body(obs_space, network, [])
        self.discrete = isinstance(action_space, spaces.Discrete)
        outputs = int(action_space.n) if isinstance(action_space, spaces.Discrete) else 1
        inputs = self.encoder.features + (0 if self.discrete else math.prod(action_space.shape or ()))
        self.body = MLP([inputs, *network.hidden_sizes], network.activation, network.layer_norm)
        self.head = nn.Linear(self.body.features, outputs)

    def forward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        x = self.encoder.forward(obs)
        if not self.discrete:
            assert action is not None
            x = torch.cat([x, action], -1)
        q = F.linear(self.body.forward(x), self.head.weight, self.head.bias)
        if not self.discrete:
            return q.squeeze(-1)
        return q if action is None else q.gather(-1, action.unsqueeze(-1)).squeeze(-1)


class Critics(nn.Module):
    """Several Q-networks that begin differently; what each says, [count, N], or [count, N, K] without an action."""

    def __init__(
        self,
        count: int,
        obs_space: spaces.Box,
        action_space: spaces.Space[Any],
        network: OffPolicyNetworkConfig,
    ) -> None:
        super().__init__()
        self.critics = nn.ModuleList([QNetwork(obs_space, action_space, network) for _ in range(count)])

    def forward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        return torch.stack([critic.forward(obs, action) for critic in self.critics])

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """What the first one says, [N]."""
        q: Tensor = self.critics[0].forward(obs, action)
        return q
