"""Networks: MLP and CNN bodies, the actor-critic pair, and initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import gymnasium.spaces as spaces
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pgrl.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    DiagGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
)
from pgrl.errors import UserError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # some change the layer's output in place
    "tanh": torch.tanh_,
    "relu": torch.relu_,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
}

LOG_STD_RANGE = -20.0, 2.0  # of log standard deviations that depend on the state


@dataclass
class NetworkConfig:
    """The shape of the policy and value networks (`algo.network.*`)."""

    body: str = "auto"  # auto (cnn for images, mlp otherwise), mlp, cnn
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 64])  # Schulman et al. 2017, section 6.1
    value_hidden_sizes: list[int] | None = None  # null: as the policy's; Andrychowicz et al. 2020 prefer wider
    activation: str = "tanh"  # tanh, relu, elu, silu, gelu; Schulman et al. 2017
    shared: bool = False  # one body for policy and value (usual with CNNs), or one each
    init: str = "orthogonal"  # orthogonal (gain sqrt 2, zero bias) or xavier (uniform); Engstrom et al. 2020, option 3
    policy_gain: float = 0.01  # gain of the last policy layer when orthogonal; Andrychowicz et al. 2020, section 3.2
    value_gain: float = 1.0  # gain of the last value layer when orthogonal; Huang et al. 2022, detail 2


@dataclass
class PolicyConfig:
    """The distribution of continuous actions (`algo.policy.*`); discrete ones need no choice."""

    distribution: str = "gaussian"  # gaussian (clipped by the env), squashed (tanh, with the log-det), beta
    log_std_init: float = 0.0  # initial log standard deviation, in the policy's units; Huang et al. 2022, detail 24
    state_dependent_std: bool = False  # the network outputs log_std, instead of one free parameter a dimension
    rescale: bool = True  # the policy works in [-1, 1], mapped to finite bounds; false: in the env's own units


FEW_OUTPUTS = 8  # of a layer, which the compiler sums up faster than a library multiplies; on a GPU one alone


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b [N, outputs] of x [N, inputs], weight [outputs, inputs] and bias [outputs].

    For the compiler in parts that it fuses with what follows, which it does not do with torch's.
    """
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    few = len(weight) <= (FEW_OUTPUTS if x.is_cpu else 1)
    return ((x.unsqueeze(-2) * weight).sum(-1) if few else x @ weight.T) + bias


class MLP(nn.Module):
    """Linear layers, each followed by an activation.

    [N, *shape] -> [N, sizes[-1]]; trailing dimensions are flattened, uint8 is scaled to [0, 1]. The forward is a flat
    loop: at 64 units a module's call costs as much as its arithmetic.
    """

    def __init__(self, sizes: list[int], activation: str) -> None:
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        self.layers = nn.ModuleList(layers)
        self._pairs = [(layer.weight, layer.bias) for layer in layers]
        self.activation, self._activation = activation, ACTIVATIONS[activation]
        self.features = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            x = x.flatten(1)
        if x.dtype == torch.uint8:
            x = x.float() / 255.0
        for weight, bias in self._pairs:
            x = self._activation(linear(x, weight, bias))
        return x


class NatureCNN(nn.Module):
    """Three convolutions and a layer of 512: Mnih et al. 2015, methods, "Model architecture".

    Images are [N, C, H, W] or [N, H, W, C] (the smaller end is taken as channels), uint8 scaled to [0, 1].
    """

    def __init__(self, shape: tuple[int, ...], features: int = 512) -> None:
        super().__init__()
        self.channels_last = shape[2] < shape[0]
        self._scale = 1.0 / 255.0
        c, h, w = (shape[2], shape[0], shape[1]) if self.channels_last else shape
        self.layers = nn.ModuleList([nn.Conv2d(c, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)])
        for kernel, stride in ((8, 4), (4, 2), (3, 1)):
            h, w = (h - kernel) // stride + 1, (w - kernel) // stride + 1
        self.layers.append(nn.Linear(64 * h * w, features))
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float() * self._scale
        if self.channels_last:
            x = x.movedim(-1, 1)
        *convolutions, last = self.layers
        for layer in convolutions:
            x = torch.relu(layer(x))
        return torch.relu(last(x.flatten(1)))


def is_image(space: spaces.Box) -> bool:
    """Whether observations look like images the Nature CNN accepts: three dimensions, at least 36 by 36."""
    return len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def units(space: spaces.Box, *, rescale: bool) -> dict[str, Tensor]:
    """The bounds [A], and the centre and radius by which the policy's units become the env's: center + radius * x.

    Finite bounds are those of [-1, 1] with `rescale`; otherwise both units are the same.
    """
    low, high = torch.tensor(space.low).flatten().float(), torch.tensor(space.high).flatten().float()
    center, radius = torch.zeros_like(low), torch.ones_like(low)
    if rescale and bool((low.isfinite() & high.isfinite()).all()):
        center, radius = (low + high) / 2, (high - low).where(high > low, torch.full_like(low, 2.0)) / 2
    return {"low": low, "high": high, "center": center, "radius": radius}


class Shape(Protocol):
    """What a body needs to know of its configuration."""

    body: str
    hidden_sizes: list[int]
    activation: str


def make_body(space: spaces.Box, config: Shape, hidden_sizes: list[int]) -> MLP | NatureCNN:
    """The body that `config.body` names, for observations of `space`; UserError where it does not fit."""
    if config.body == "cnn" and not is_image(space):
        raise UserError(
            f"algo.network.body=cnn needs image observations (three dimensions, at least 36 by 36 pixels), but this "
            f"env's have shape {tuple(space.shape)}.\nUse: algo.network.body=mlp"
        )
    if config.body == "cnn" or (config.body == "auto" and is_image(space)):
        return NatureCNN(space.shape)
    return MLP([math.prod(space.shape), *hidden_sizes], config.activation)


class Policy(nn.Module):
    """A distribution over actions for each observation.

    `policy(obs)` is in the policy's units. `sample` and `mode` give actions in the env's units, which is what
    rollouts hold; `to_policy_units` takes those back. Finite bounds are mapped to [-1, 1] (`policy.rescale`); those
    of squashed and Beta policies always are. Weights are as torch makes them.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, obs_space: spaces.Box, action_space: spaces.Space[Any], network: Shape, policy: PolicyConfig
    ) -> None:
        super().__init__()
        self.action_space = action_space
        self.distribution = policy.distribution if isinstance(action_space, spaces.Box) else "discrete"
        self.body = make_body(obs_space, network, list(network.hidden_sizes))
        self.log_std: nn.Parameter | None = None
        self.log_std_init = policy.log_std_init
        actions = self._outputs()
        outputs = actions
        if isinstance(action_space, spaces.Box):
            if policy.distribution == "beta" or policy.state_dependent_std:
                outputs = 2 * actions
            else:
                self.log_std = nn.Parameter(torch.full((actions,), policy.log_std_init))
            self._set_bounds(action_space, policy)
        else:
            self.affine = False
        self.actions = actions
        self.policy_head = nn.Linear(self.body.features, outputs)
        self._policy_pair = (self.policy_head.weight, self.policy_head.bias)
        # the forward itself: a module's call and attributes cost as much as a layer of 64 units
        self._policy_features = self.body.forward
        self._distribution = self._family(policy)

    def _outputs(self) -> int:
        """How many numbers the policy head gives for one set of distribution parameters."""
        space = self.action_space
        if isinstance(space, spaces.Box):
            return math.prod(space.shape)
        if isinstance(space, spaces.Discrete):
            return int(space.n)
        if isinstance(space, spaces.MultiDiscrete):
            return int(space.nvec.sum())
        if isinstance(space, spaces.MultiBinary):
            return math.prod(space.shape)
        raise UserError(f"action space {space}: supported are Box, Discrete, MultiDiscrete and MultiBinary.")

    def _set_bounds(self, space: spaces.Box, policy: PolicyConfig) -> None:
        if self.distribution != "gaussian" and not space.is_bounded("both"):
            raise UserError(
                f"algo.policy.distribution={self.distribution} needs finite action bounds, but this env's are "
                f"[{space.low.min()}, {space.high.max()}].\nUse: algo.policy.distribution=gaussian"
            )
        for name, bound in units(space, rescale=policy.rescale or self.distribution != "gaussian").items():
            self.register_buffer(name, bound, persistent=False)
        self.affine = bool((self.center != 0).any() or (self.radius != 1).any())

    center: Tensor
    radius: Tensor

    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters the policy depends on (a shared body is among them), in a fixed order."""
        own = [*self.body.parameters(), *self.policy_head.parameters()]
        return own if self.log_std is None else [*own, self.log_std]

    def _family(self, policy: PolicyConfig) -> Callable[[Tensor], Distribution]:
        """What makes a distribution of the policy head's output [N, outputs]; chosen once, for acting is a hot path."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return Categorical
        if isinstance(space, spaces.MultiDiscrete):
            return partial(MultiCategorical, sizes=tuple(int(n) for n in space.nvec.flatten()))
        if isinstance(space, spaces.MultiBinary):
            return Bernoulli
        if policy.distribution == "beta":
            return beta
        normal = DiagGaussian if policy.distribution == "gaussian" else SquashedGaussian
        if self.log_std is None:
            return partial(with_own_std, normal, policy.log_std_init)
        return partial(normal, log_std=self.log_std)

    def policy(self, obs: Tensor) -> Distribution:
        return self._distribution(linear(self._policy_features(obs), *self._policy_pair))

    def noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Noise for `shape` samples, as `sample` takes it."""
        kinds: dict[str, type[Distribution]] = {
            "gaussian": DiagGaussian,
            "squashed": SquashedGaussian,
            "beta": Beta,
            "discrete": Bernoulli if isinstance(self.action_space, spaces.MultiBinary) else Categorical,
        }
        return kinds[self.distribution].noise((*shape, self.actions), generator)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [N, ...] in the env's units; a Gaussian's may lie out of bounds, the env clips them."""
        action = self.policy(obs).sample(noise)
        return torch.addcmul(self.center, action, self.radius) if self.affine else action

    def mode(self, obs: Tensor) -> Tensor:
        """The most likely actions [N, ...] in the env's units, within its bounds."""
        action = self.policy(obs).mode()
        if self.distribution == "discrete":
            return action
        return (self.center + action * self.radius).clamp(self.low, self.high)

    def to_policy_units(self, action: Tensor) -> Tensor:
        """Actions [N, ...] of a rollout as `policy(obs).log_prob` takes them."""
        return (action - self.center) / self.radius if self.affine else action


class ActorCritic(Policy):
    """A policy and a value function on the same observations, with separate bodies or a shared one.

    `value(obs)` is [N]. Weights are as `network.init` says.
    """

    def __init__(
        self, obs_space: spaces.Box, action_space: spaces.Space[Any], network: NetworkConfig, policy: PolicyConfig
    ) -> None:
        super().__init__(obs_space, action_space, network, policy)
        hidden = network.hidden_sizes if network.value_hidden_sizes is None else network.value_hidden_sizes
        self.value_body = None if network.shared else make_body(obs_space, network, list(hidden))
        self.value_head = nn.Linear((self.value_body or self.body).features, 1)
        initialise(self, network)
        self._value_pair = (self.value_head.weight, self.value_head.bias)
        self._value_features = (self.value_body or self.body).forward

    def value_parameters(self) -> list[nn.Parameter]:
        """The parameters only the value depends on, in a fixed order."""
        body = [] if self.value_body is None else list(self.value_body.parameters())
        return [*body, *self.value_head.parameters()]

    def value(self, obs: Tensor) -> Tensor:
        return linear(self._value_features(obs), *self._value_pair).squeeze(-1)

    def policy_and_value(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """Both at once, so that a shared body runs once."""
        features = self._policy_features(obs)
        other = features if self.value_body is None else self._value_features(obs)
        policy = self._distribution(linear(features, *self._policy_pair))
        return policy, linear(other, *self._value_pair).squeeze(-1)


def beta(out: Tensor) -> Beta:
    """Beta distributions of a policy head's output [N, 2 A], both parameters above 1 so that there is one peak."""
    return Beta(*(F.softplus(out) + 1.0).chunk(2, -1))


def with_own_std(
    normal: type[DiagGaussian] | type[SquashedGaussian], log_std_init: float, out: Tensor
) -> DiagGaussian | SquashedGaussian:
    """Normals of a policy head's output [N, 2 A], which holds means and log standard deviations."""
    mean, log_std = out.chunk(2, -1)
    return normal(mean, (log_std + log_std_init).clamp(*LOG_STD_RANGE))


@torch.no_grad()
def initialise(net: ActorCritic, config: NetworkConfig) -> None:
    """Fill the weights as `config.init` says, with torch's global generator; biases are zero."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if config.init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                heads: dict[nn.Module, float] = {net.policy_head: config.policy_gain, net.value_head: config.value_gain}
                nn.init.orthogonal_(layer.weight, heads.get(layer, math.sqrt(2.0)))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
