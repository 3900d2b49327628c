"""TorchRL's side of bench_peers.py: its collector, replay buffer, losses and estimators, in its own interpreter.

The settings are those of its own scripts (sota-implementations/ppo/ppo_mujoco.py and sota-implementations/sac/sac.py in
its repository, with their configurations, eager, as these are by default): PPO with normalised observations, advantages
estimated anew each epoch and two optimisers, SAC with a thousand steps and then as many updates. Only the number of
random actions before SAC learns is smaller.
"""

import warnings
from collections import deque
from typing import Any

import torch
from tensordict.nn import AddStateIndependentNormalScale, NormalParamExtractor, TensorDictModule
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import (
    ClipTransform,
    Compose,
    DoubleToFloat,
    ExplorationType,
    InitTracker,
    RewardSum,
    StepCounter,
    TransformedEnv,
    VecNorm,
)
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate, group_optimizers
from torchrl.objectives.value.advantages import GAE

from bench_peers import Stamps, Workload


def measure(workload: Workload, seed: int, threads: int) -> dict[str, float]:
    """Train with what `workload.peer` names, sized by the workload."""
    warnings.simplefilter("ignore")  # of names that a later version will drop
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    stamps = Stamps(workload.dropped)
    train = {"PPO": ppo, "SAC": sac}[workload.peer.partition(":")[2]]
    returns = train(workload, seed, stamps, Counter())
    return stamps.result(sum(returns) / max(len(returns), 1))


class Counter:
    """The steps that any optimiser has taken."""

    def __init__(self) -> None:
        self.steps = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.steps += 1


def collect(workload: Workload, env: Any, policy: Any, seed: int, random: int | None = None) -> Any:
    """Batches of transitions of the policy, after so many of random actions."""
    collector = Collector(
        env,
        policy,
        frames_per_batch=workload.num_steps,
        total_frames=workload.total_timesteps,
        init_random_frames=random,
        max_frames_per_traj=-1,
    )
    collector.set_seed(seed)
    return collector


def tanh_normal(env: Any, net: Any, log_prob: bool) -> Any:
    """A policy of a net that gives means and deviations; actions within the env's bounds."""
    actions = env.action_spec.space
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.full_action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": actions.low, "high": actions.high, "tanh_loc": False},
        return_log_prob=log_prob,
        default_interaction_type=ExplorationType.RANDOM,
    )


def ppo(workload: Workload, seed: int, stamps: Stamps, count: Counter) -> list[float]:
    """The PPO of its script; returns those of the last episodes."""
    settings = workload.settings
    env = TransformedEnv(
        GymEnv(workload.env),
        Compose(
            VecNorm(in_keys=["observation"], decay=0.99999, eps=1e-2),
            ClipTransform(in_keys=["observation"], low=-10, high=10),
            RewardSum(),
            StepCounter(),
            DoubleToFloat(in_keys=["observation"]),
        ),
    )
    inputs, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    policy_net, value_net = (
        MLP(in_features=inputs, out_features=n, num_cells=[64, 64], activation_class=torch.nn.Tanh)
        for n in (actions, 1)
    )
    for net, gain in ((policy_net, 1.0), (value_net, 0.01)):
        for layer in net.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.orthogonal_(layer.weight, gain)
                torch.nn.init.zeros_(layer.bias)
    scale = AddStateIndependentNormalScale(actions, scale_lb=1e-8)
    actor, critic = tanh_normal(env, torch.nn.Sequential(policy_net, scale), True), ValueOperator(value_net)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=False)
    loss_of = ClipPPOLoss(
        actor_network=actor,
        critic_network=critic,
        clip_epsilon=0.2,
        loss_critic_type="l2",
        entropy_coeff=0.0,
        critic_coeff=0.25,
        normalize_advantage=True,
    )
    rate = settings["learning_rate"]
    optimisers = [torch.optim.Adam(net.parameters(), lr=rate, eps=1e-5) for net in (actor, critic)]
    shuffled = TensorDictReplayBuffer(
        storage=LazyTensorStorage(workload.num_steps),
        sampler=SamplerWithoutReplacement(),
        batch_size=settings["batch_size"],
    )
    updates = workload.iterations * settings["n_epochs"] * (workload.num_steps // settings["batch_size"])
    returns, env_steps = deque[float](maxlen=100), 0
    collector = collect(workload, env, actor, seed)
    for data in collector:
        env_steps += data.numel()
        returns.extend(data["next", "episode_reward"][data["next", "done"]].tolist())
        for _ in range(settings["n_epochs"]):
            with torch.no_grad():
                data = advantage(data)
            shuffled.extend(data.reshape(-1))
            for batch in shuffled:
                remaining = 1.0 - count.steps // len(optimisers) / updates
                for optimiser in optimisers:
                    optimiser.param_groups[0]["lr"] = rate * remaining
                loss = loss_of(batch)
                (loss["loss_objective"] + loss["loss_entropy"] + loss["loss_critic"]).backward()
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
        collector.update_policy_weights_()
        stamps.add(env_steps, count.steps // workload.optimisers)
    collector.shutdown()
    return list(returns)


def sac(workload: Workload, seed: int, stamps: Stamps, count: Counter) -> list[float]:
    """The SAC of its script; returns those of the last episodes."""
    settings = workload.settings
    env = TransformedEnv(GymEnv(workload.env), Compose(InitTracker(), StepCounter(1000), DoubleToFloat(), RewardSum()))
    inputs, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    hidden: dict[str, Any] = dict(num_cells=[256, 256], activation_class=torch.nn.ReLU)
    extract = NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1)
    body = MLP(in_features=inputs, out_features=2 * actions, **hidden)
    actor = tanh_normal(env, torch.nn.Sequential(body, extract), False)
    critic = ValueOperator(
        MLP(in_features=inputs + actions, out_features=1, **hidden), in_keys=["action", "observation"]
    )
    loss_of = SACLoss(
        actor_network=actor,
        qvalue_network=critic,
        num_qvalue_nets=2,
        loss_function="l2",
        delay_actor=False,
        delay_qvalue=True,
        alpha_init=1.0,
    )
    loss_of.make_value_estimator(gamma=0.99)
    target = SoftUpdate(loss_of, eps=1.0 - settings["tau"])
    rate = settings["learning_rate"]
    parts = (
        list(loss_of.actor_network_params.flatten_keys().values()),
        list(loss_of.qvalue_network_params.flatten_keys().values()),
        [loss_of.log_alpha],
    )
    optimiser = group_optimizers(*(torch.optim.Adam(part, lr=rate) for part in parts))
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(settings["buffer_size"]), batch_size=settings["batch_size"], prefetch=3
    )
    returns, env_steps = deque[float](maxlen=100), 0
    collector = collect(workload, env, actor, seed, random=workload.warm_up)
    for data in collector:
        collector.update_policy_weights_()
        replay.extend(data.reshape(-1))
        env_steps += data.numel()
        returns.extend(data["next", "episode_reward"][data["next", "done"]].tolist())
        if env_steps <= workload.warm_up:
            continue
        for _ in range(data.numel()):
            losses = loss_of(replay.sample())
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).sum().backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            target.step()
        stamps.add(env_steps, count.steps // workload.optimisers)
    collector.shutdown()
    return list(returns)
