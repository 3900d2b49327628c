"""Deterministic policy gradient: Silver et al. 2014, "Deterministic policy gradient algorithms", COPDAC-Q.

For small problems and for reading: the equations of section 4.3 stand in `update` as they do in the paper. The
behaviour adds noise to the policy mu(s), and Q is learnt off-policy by

    Q(s, a) = w' phi(s, a) + v' phi(s),    phi(s, a) = grad mu(s) (a - mu(s)),

so that its slope at a = mu(s) is grad mu(s)' w. That makes the gradient with this Q the gradient with the true one
where w is fitted best (theorem 3). No importance weights are needed: no action is integrated over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium.spaces as spaces
import torch
from torch import Generator, Tensor, nn

from pgrl import functional
from pgrl.agents.base import Agent, Setting, generator
from pgrl.data import NoiseStream, Transition, flatten_time
from pgrl.errors import UserError
from pgrl.flat import FlatParameters, gradients_of_rows
from pgrl.networks import MLP


@dataclass
class DPGNetworkConfig:
    """The shape of the deterministic policy (`algo.network.*`)."""

    hidden_sizes: list[int] = field(default_factory=list)  # []: a linear policy, as in Silver et al. 2014, section 5
    activation: str = "tanh"  # tanh, relu, elu, silu, gelu


@dataclass
class DPGConfig:
    """`algo=dpg`; the paper gives no values: the defaults are those that solve pgrl/LinearQuadratic-v0."""

    gamma: float = 0.99  # discount, in [0, 1]
    num_steps: int = 1  # T: steps of each env between updates; Silver et al. 2014 update at each step
    noise_std: float = 0.5  # of the normal noise that the behaviour adds to the policy, in the env's units
    actor_lr: float = 0.01  # alpha_theta, of the policy
    advantage_lr: float = 0.1  # alpha_w, of Q's part that depends on the action
    value_lr: float = 0.05  # alpha_v, of Q's part that depends on the state alone
    anneal_lr: bool = False  # the three linearly to 0
    network: DPGNetworkConfig = field(default_factory=DPGNetworkConfig)


class Policy(nn.Module):
    """mu(s): actions [N, A] in the env's units, not yet within its bounds, for obs [N, *obs]; 0 at first."""

    low: Tensor
    high: Tensor

    def __init__(self, obs_space: spaces.Box, action_space: spaces.Box, config: DPGNetworkConfig) -> None:
        super().__init__()
        self.body = MLP([size(obs_space), *config.hidden_sizes], config.activation)
        self.head = nn.Linear(self.body.features, size(action_space))
        for layer in self.body.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.orthogonal_(layer.weight, 2.0**0.5)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("low", torch.tensor(action_space.low).flatten().float(), persistent=False)
        self.register_buffer("high", torch.tensor(action_space.high).flatten().float(), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        return self.head(self.body(obs))  # type: ignore[no-any-return]

    def noise(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Standard normal noise for `shape` actions."""
        return torch.randn((*shape, self.head.out_features), generator=generator, device=generator.device)


class DPG(Agent):
    name = "dpg"

    def __init__(self, config: DPGConfig, setting: Setting) -> None:
        actions = continuous(setting.action_space)
        self.config, self.num_steps = config, config.num_steps
        self.net = Policy(setting.obs_space, actions, config.network).to(setting.device)
        self.noise = NoiseStream(self.net.noise, config.num_steps, generator(setting.seed, 0, setting.device))
        self.theta = FlatParameters(list(self.net.parameters()))
        self.w = torch.zeros_like(self.theta.vector)
        self.v = self.theta.vector.new_zeros(count_features(setting.obs_space))
        self.updates = torch.zeros((), dtype=torch.int64)

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        action = self.net(obs)
        if explore:
            action = action + self.config.noise_std * self.noise.next(obs.shape[0])
        return action.clamp(self.net.low, self.net.high)  # type: ignore[no-any-return]

    @torch.no_grad()
    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        """A step along the mean of equations 24 to 27 over the rollout."""
        config, w, v = self.config, self.w, self.v
        self.theta.check()
        obs, action, reward, next_obs, terminated, _ = flatten_time(rollout)

        gradient = self.gradients(obs)  # grad mu(s)', [N, A, P]
        phi, phi_sa = self.phi(obs), self.compatible(gradient, action - self.net(obs))
        # a - mu(s) is 0 at the next action, mu(s'), so Q is v' phi(s') there
        delta = functional.td0(reward, self.phi(next_obs) @ v, terminated, config.gamma) - phi_sa @ w - phi @ v
        slope = gradient @ w  # grad_a Q(s, a) at a = mu(s), [N, A]
        ascent = self.compatible(gradient, slope).mean(0)  # E[grad mu(s) grad_a Q(s, a)]

        scale = 1.0 - progress if config.anneal_lr else 1.0
        self.theta.vector.add_(ascent, alpha=scale * config.actor_lr)
        w.add_(phi_sa.T @ delta / len(delta), alpha=scale * config.advantage_lr)
        v.add_(phi.T @ delta / len(delta), alpha=scale * config.value_lr)
        self.updates += 1
        return {
            "losses/value_loss": 0.5 * delta.square().mean(),
            "losses/value": (phi @ v).mean(),
            "losses/action_slope": slope.norm(dim=-1).mean(),
            "losses/grad_norm": ascent.norm(),
            "charts/learning_rate": torch.tensor(scale * config.actor_lr),
            "charts/updates": self.updates.clone(),
        }

    def gradients(self, obs: Tensor) -> Tensor:
        """grad mu(s)' [N, A, P]: the gradient of each action's mean with respect to theta."""
        with torch.enable_grad():
            mu = self.net(obs)
            return gradients_of_rows(mu.flatten(), self.theta.parameters).view(*mu.shape, -1)

    def compatible(self, gradient: Tensor, x: Tensor) -> Tensor:
        """grad mu(s) x [N, P] for x [N, A]: the features phi(s, a) where x is a - mu(s)."""
        return torch.einsum("nap,na->np", gradient, x)

    def phi(self, obs: Tensor) -> Tensor:
        """The features of a state [N, F]: 1, its entries, and the products of two of them."""
        s = obs.flatten(1)
        s = s.float() / 255.0 if s.dtype == torch.uint8 else s
        i, j = torch.triu_indices(s.shape[1], s.shape[1], device=s.device)
        return torch.cat([torch.ones_like(s[:, :1]), s, s[:, i] * s[:, j]], 1)

    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) [N] as learnt, for actions [N, A]; section 4.3."""
        phi_sa = self.compatible(self.gradients(obs), action - self.net(obs))
        return phi_sa @ self.w + self.phi(obs) @ self.v


def size(space: spaces.Box) -> int:
    """How many numbers a point of `space` is."""
    return int(torch.Size(space.shape).numel())


def count_features(space: spaces.Box) -> int:
    """F: how many features a state has; UserError if they are too many to hold a weight for each."""
    n = size(space)
    if n > 500:
        raise UserError(
            f"algo=dpg learns a weight for each product of two numbers of an observation, and this env's have {n:,}.\n"
            "Use: algo=ppo"
        )
    return 1 + n + n * (n + 1) // 2


def continuous(space: spaces.Space[Any]) -> spaces.Box:
    """An action space as the Box that it must be; UserError if it is none."""
    if isinstance(space, spaces.Box):
        return space
    raise UserError(
        f"algo=dpg follows the slope of Q in the action, so actions must be a Box; this env's are {space}.\n"
        "Use: algo=ppo"
    )
