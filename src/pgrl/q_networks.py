"""What algorithms with replay learn with: deterministic policies, and critics of actions, Q(s, a)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import gymnasium.spaces as spaces
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pgrl.distributions import DiagGaussian
from pgrl.errors import UserError
from pgrl.networks import ACTIVATIONS, MLP, linear, make_body, units


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
        self.action_space, self.actions = action_space, math.prod(action_space.shape)
        self.distribution, self.log_std, self.log_std_init = "deterministic", None, 0.0  # what a `Policy` has
        self.body = make_body(obs_space, network, list(network.hidden_sizes))
        self.policy_head = nn.Linear(self.body.features, self.actions)
        for name, bound in units(action_space, rescale=True).items():
            self.register_buffer(name, bound, persistent=False)
        self.affine = bool((self.center != 0).any() or (self.radius != 1).any())

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(linear(self.body.forward(obs), self.policy_head.weight, self.policy_head.bias))

    def noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Standard normal noise for `shape` actions."""
        return DiagGaussian.noise((*shape, self.actions), generator)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [N, A] in the env's units with noise [N, A], in the policy's, within the bounds."""
        return self._to_env_units((self.forward(obs) + noise).clamp_(-1.0, 1.0))

    def mode(self, obs: Tensor) -> Tensor:
        """Actions [N, A] in the env's units, within its bounds."""
        return self._to_env_units(self.forward(obs))

    def _to_env_units(self, action: Tensor) -> Tensor:
        """Actions [N, A] in [-1, 1] in the env's units, within its bounds."""
        return torch.addcmul(self.center, action, self.radius).clamp(self.low, self.high) if self.affine else action

    def to_policy_units(self, action: Tensor) -> Tensor:
        """Actions [N, A] of a rollout in [-1, 1]."""
        return (action - self.center) / self.radius if self.affine else action


Layer = tuple[Tensor, Tensor, Tensor | None]  # weights, biases, and a layer norm's factors and summands


class Critics(nn.Module):
    """Several networks Q(s, a) that begin differently, computed together: layer by layer one product for all of them.

    Each has an encoder of the observation (a CNN, or none), then an MLP; weights are [count, inputs, outputs], biases
    [count, 1, outputs]. They begin as torch makes a linear layer's: uniform within 1 / sqrt(inputs), as the hidden ones
    of Lillicrap et al. 2016, section 7.
    """

    def __init__(
        self,
        count: int,
        obs_space: spaces.Box,
        action_space: spaces.Space[Any],
        network: OffPolicyNetworkConfig,
    ) -> None:
        super().__init__()
        self.count, self.discrete = count, isinstance(action_space, spaces.Discrete)
        encoders = [make_body(obs_space, network, []) for _ in range(count)]
        self.encoders = nn.ModuleList(encoders)
        self._share_input = isinstance(encoders[0], MLP)  # without a layer, all are alike
        inputs = encoders[0].features + (0 if self.discrete else math.prod(action_space.shape or ()))
        outputs = int(action_space.n) if isinstance(action_space, spaces.Discrete) else 1
        sizes = [inputs, *network.hidden_sizes, outputs]
        made = [[nn.Linear(m, n) for _ in range(count)] for m, n in pairwise(sizes)]
        self.weights = nn.ParameterList([torch.stack([x.weight.detach().T for x in layer]) for layer in made])
        self.biases = nn.ParameterList([torch.stack([x.bias.detach()[None] for x in layer]) for layer in made])
        self.norms = nn.ParameterList()
        if network.layer_norm:  # a factor and a summand for each unit
            start = torch.stack([torch.ones(1), torch.zeros(1)])
            self.norms.extend(nn.Parameter(start.repeat(count, 1, n)) for n in network.hidden_sizes)
        self._activation = ACTIVATIONS[network.activation]
        # what `forward` reads: each look into a ParameterList costs as much as a small operation
        self._layers: list[Layer] = list(zip_longest(self.weights, self.biases, self.norms))

    def forward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        """What each says, [count, N], of actions [N, A] in the policy's units; where one is chosen among K, of [N], or
        [count, N, K] of all.
        """
        return self._q(list(self.encoders), self._layers, obs, action)

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """What the first one says, [N]."""
        layers = self._layers
        if self.count > 1:
            layers = [(weight[:1], bias[:1], None if norm is None else norm[:1]) for weight, bias, norm in layers]
        return self._q([self.encoders[0]], layers, obs, action)[0]

    def _q(self, encoders: list[nn.Module], layers: list[Layer], obs: Tensor, action: Tensor | None) -> Tensor:
        """What these encoders and layers say, [len(encoders), N] or [len(encoders), N, K]."""
        given = None if self.discrete else action
        if self._share_input:
            x: Tensor = encoders[0].forward(obs)
            x = (x if given is None else torch.cat([x, given], -1)).expand(len(encoders), -1, -1)
        else:
            x = torch.stack([encoder.forward(obs) for encoder in encoders])
            x = x if given is None else torch.cat([x, given.expand(len(x), -1, -1)], -1)
        for weight, bias, norm in layers[:-1]:
            x = torch.bmm(x, weight).add_(bias)
            if norm is not None:
                factor, summand = norm.split(1, 1)
                x = F.layer_norm(x, x.shape[-1:]) * factor + summand
            x = self._activation(x)
        weight, bias, _ = layers[-1]
        if torch.compiler.is_compiling() and not self.discrete:  # one column: see `networks.linear`
            return (x * weight.mT).sum(-1) + bias.squeeze(-1)
        q = torch.bmm(x, weight).add_(bias)
        if not self.discrete:
            return q.squeeze(-1)
        return q if action is None else q.gather(-1, action.expand(len(q), -1).unsqueeze(-1)).squeeze(-1)
