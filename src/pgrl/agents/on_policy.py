"""What the on-policy algorithms share: how a rollout becomes what their losses take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgrl import functional
from pgrl.agents.base import Setting
from pgrl.data import Transition
from pgrl.networks import ActorCritic, NetworkConfig, PolicyConfig
from pgrl.normalisers import RewardScaler, RunningNorm


@dataclass
class OnPolicyConfig:
    """Keys of every on-policy algorithm."""

    gamma: float = 0.99  # discount, in [0, 1]
    norm_obs: bool = False  # observations to mean 0, std 1 by running statistics; Engstrom et al. 2020, option 6
    clip_obs: float | None = 10.0  # normalised observations within +-; null: off; Engstrom et al. 2020, option 7
    norm_reward: bool = False  # rewards / std of the discounted return; Engstrom et al. 2020, option 2
    clip_reward: float | None = None  # (scaled) rewards within +-; Engstrom et al. 2020, option 5
    norm_value: bool = False  # the value net learns normalised targets; van Hasselt et al. 2016 (Pop-Art), algorithm 1
    bootstrap_truncated: bool = True  # value what follows a time limit; false: as death, as papers before 2018 did
    network: NetworkConfig = field(default_factory=NetworkConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)


@dataclass
class AdvantageConfig(OnPolicyConfig):
    """Keys of those that estimate advantages with a critic."""

    gae_lambda: float = 0.95  # for advantage=gae; Schulman et al. 2016, section 6
    advantage: str = "gae"  # gae (= td_lambda), n_step, td0, monte_carlo
    n_step: int = 5  # rewards before V, for advantage=n_step


def make_normalisers(
    config: OnPolicyConfig, setting: Setting
) -> tuple[RunningNorm | None, RunningNorm | None, RewardScaler | None]:
    """The normalisers of observations, values and rewards, each where it is switched on."""
    obs_norm = value_norm = reward_scaler = None
    if config.norm_obs and setting.obs_space.dtype != "uint8":
        obs_norm = RunningNorm(setting.obs_space.shape, config.clip_obs).to(setting.device)
    if config.norm_value:
        value_norm = RunningNorm((), clip=None).to(setting.device)
    if config.norm_reward:
        reward_scaler = RewardScaler(setting.num_envs, config.gamma).to(setting.device)
    return obs_norm, value_norm, reward_scaler


class Targets(NamedTuple):
    """What the critic makes of a rollout; all [T, B]. With `norm_value`, value and returns are normalised."""

    value: Tensor
    advantage: Tensor
    returns: Tensor  # advantage + value: what the value should have been


def critic(net: ActorCritic, value_norm: RunningNorm | None, obs: Tensor) -> Tensor:
    """V [N] in the units of the rewards, for normalised obs [N, *obs]."""
    value = net.value(obs)
    return value if value_norm is None else value_norm.denormalise(value)


@torch.no_grad()
def values(
    net: ActorCritic, value_norm: RunningNorm | None, rollout: Transition, terminated: Tensor
) -> tuple[Tensor, Tensor]:
    """V of each step's obs and of its true successor, both [T, B], by one pass over normalised observations.

    After a step that is `terminated` [T, B] the second is arbitrary.
    """
    num_steps, num_envs = rollout.reward.shape
    # a graph has one shape, whatever is cut; and to pick the few of below would wait for a device
    if torch.compiler.is_compiling() or not rollout.obs.is_cpu:
        return all_values(net, value_norm, rollout)
    # the value of the next row is the successor's, but at the rollout's end and where the clock cut an episode
    cut = rollout.truncated & ~terminated
    successors = rollout.next_obs[-1], rollout.next_obs[cut]
    both = critic(net, value_norm, torch.cat([rollout.obs.flatten(0, 1), *successors]))
    value = both[: num_steps * num_envs].view(num_steps, num_envs)
    next_value = both[num_envs : (num_steps + 1) * num_envs].view(num_steps, num_envs)
    return value, next_value.masked_scatter(cut, both[(num_steps + 1) * num_envs :])


@torch.no_grad()
def all_values(net: ActorCritic, value_norm: RunningNorm | None, rollout: Transition) -> tuple[Tensor, Tensor]:
    """As `values`, by a pass over all successors, whichever of them are needed."""
    value, next_value = critic(net, value_norm, torch.cat([rollout.obs, rollout.next_obs]).flatten(0, 1)).chunk(2)
    return value.view_as(rollout.reward), next_value.view_as(rollout.reward)


@torch.no_grad()
def targets(
    config: AdvantageConfig,
    net: ActorCritic,
    value_norm: RunningNorm | None,
    rollout: Transition,
    *,
    first: bool = True,
) -> Targets:
    """Values, advantages and returns of a rollout [T, B, ...] of normalised observations, by the present critic.

    The statistics of the returns learn from it the first time only.
    """
    terminated = ends(config, rollout)
    value, next_value = values(net, value_norm, rollout, terminated)
    advantage = functional.advantage(
        config.advantage,
        rollout.reward,
        value,
        next_value,
        terminated,
        rollout.truncated,
        config.gamma,
        config.gae_lambda,
        config.n_step,
    )
    value, returns = normalised(value_norm, net, value, advantage + value, first=first)
    return Targets(value, advantage, returns)


def normalised(
    value_norm: RunningNorm | None, net: ActorCritic, value: Tensor, returns: Tensor, *, first: bool = True
) -> tuple[Tensor, Tensor]:
    """Values and returns [T, B] in the units the critic learns; the statistics learn from these returns if `first`."""
    if value_norm is None:
        return value, returns
    if first:
        update_value_norm(value_norm, net.value_head, returns)
    return value_norm(value), value_norm(returns)


def ends(config: OnPolicyConfig, rollout: Transition) -> Tensor:
    """After which steps nothing is valued, [T, B]: terminations, and time limits too without `bootstrap_truncated`."""
    return rollout.terminated if config.bootstrap_truncated else rollout.terminated | rollout.truncated


@torch.no_grad()
def prepare(
    config: OnPolicyConfig,
    net: ActorCritic,
    obs_norm: RunningNorm | None,
    scaler: RewardScaler | None,
    rollout: Transition,
) -> Transition:
    """The rollout with normalised observations, scaled and clipped rewards, and actions in the policy's units."""
    obs, next_obs, reward = rollout.obs, rollout.next_obs, rollout.reward
    if obs_norm is not None:
        obs, next_obs = obs_norm(obs), obs_norm(next_obs)
    if scaler is not None:
        reward = scaler(reward, rollout.terminated | rollout.truncated)
    if config.clip_reward is not None:
        reward = reward.clamp(-config.clip_reward, config.clip_reward)
    action = net.to_policy_units(rollout.action)
    return rollout._replace(obs=obs, next_obs=next_obs, reward=reward, action=action)


@torch.no_grad()
def update_value_norm(value_norm: RunningNorm, head: nn.Linear, returns: Tensor) -> None:
    """Merge `returns` into the statistics and rescale the head so that its denormalised outputs stay the same.

    van Hasselt et al. 2016 (arXiv 1602.07714), equations 5 and 6.
    """
    old_scale, old_shift = value_norm.scale.clone(), value_norm.shift.clone()
    value_norm.update(returns)
    factor = value_norm.scale / old_scale
    head.weight.mul_(factor)
    head.bias.sub_(old_shift).mul_(factor).add_(value_norm.shift)
