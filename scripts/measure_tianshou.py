"""Tianshou's side of bench_peers.py: its collector and its updates, in its own interpreter.

PPO and SAC have the settings of Tianshou's MuJoCo examples (examples/mujoco/mujoco_ppo.py and mujoco_sac.py in its
repository): PPO with normalised observations, scaled returns, advantages recomputed each epoch and a learning rate that
falls to 0; SAC with a fixed temperature. The envs are stepped in turn within the process, as pgrl's are; the examples
use a process for each, which for envs as cheap as these is slower.
"""

from collections import deque
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
import torch
from tianshou.algorithm.algorithm_base import policy_within_training_step
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.modelfree.sac import SACPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor
from torch.distributions import Categorical, Independent, Normal
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench_peers import Stamps, Workload


def measure(workload: Workload, seed: int, threads: int) -> dict[str, float]:
    """Train with what `workload.peer` names; networks as pgrl's, the rest as `settings` and the defaults there say."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)
    gradient_steps = 0

    def count(*_: object) -> None:
        nonlocal gradient_steps
        gradient_steps += 1

    register_optimizer_step_post_hook(count)
    name, settings = workload.peer.partition(":")[2], dict(workload.settings)
    env: Any = DummyVectorEnv([lambda: gymnasium.make(workload.env) for _ in range(workload.num_envs)])
    env = VectorEnvNormObs(env) if name == "PPO" else env
    env.seed(seed)
    rollout = workload.num_envs * workload.num_steps
    size = settings.pop("buffer_size", rollout)
    parts: dict[str, Any] = {"PPO": ppo, "SAC": sac}.get(name, plain)(workload, env, settings)
    learn = {"batch_size": settings.pop("batch_size", None), "repeat": settings.pop("n_epochs", 1)}
    if name == "SAC":
        learn = {"sample_size": learn["batch_size"]}
    algorithm = getattr(import_module("tianshou.algorithm"), name)(**parts, **settings)
    collector = Collector[Any](algorithm, env, VectorReplayBuffer(size, workload.num_envs), exploration_noise=True)
    collector.reset()
    stamps, env_steps, returns = Stamps(workload.dropped), 0, deque[float](maxlen=100)
    if workload.warm_up:
        env_steps += collector.collect(n_step=workload.warm_up, random=True).n_collected_steps
    for iteration in range(1, workload.iterations + 1):
        with policy_within_training_step(algorithm.policy):
            collected = collector.collect(n_step=rollout)
            algorithm.update(buffer=collector.buffer, **learn)
        if name != "SAC":
            collector.reset_buffer(keep_statistics=True)
        env_steps += collected.n_collected_steps
        returns.extend(map(float, collected.returns))
        taken = gradient_steps // workload.optimisers + workload.policy_steps * iteration
        stamps.add(env_steps, taken)
    return stamps.result(sum(returns) / max(len(returns), 1))


def net(env: Any) -> Net:
    """The hidden layers of a policy or a critic of an on-policy algorithm."""
    return Net(state_shape=env.observation_space[0].shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh)


def plain(workload: Workload, env: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Policy, critic and optimiser of REINFORCE and NPG."""
    actions = env.action_space[0]
    parts: dict[str, Any] = {"optim": AdamOptimizerFactory(lr=settings.pop("learning_rate"))}
    if isinstance(actions, gymnasium.spaces.Box):
        actor = ContinuousActorProbabilistic(preprocess_net=net(env), action_shape=actions.shape, unbounded=True)
        policy = ProbabilisticActorPolicy(actor=actor, dist_fn=gaussian, action_space=actions)
        return parts | {"policy": policy, "critic": ContinuousCritic(preprocess_net=net(env))}
    choice = DiscreteActor(preprocess_net=net(env), action_shape=actions.n, softmax_output=False)
    policy = ProbabilisticActorPolicy(
        actor=choice, dist_fn=lambda logits: Categorical(logits=logits), action_space=actions, action_scaling=False
    )
    return parts | {"policy": policy}


def gaussian(both: tuple[torch.Tensor, torch.Tensor]) -> Independent:
    """The distribution of actions of a mean and a deviation."""
    return Independent(Normal(*both), 1)


def ppo(workload: Workload, env: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """PPO as in the example: what its constructor takes beside `settings`."""
    actions = env.action_space[0]
    actor = ContinuousActorProbabilistic(preprocess_net=net(env), action_shape=actions.shape, unbounded=True)
    critic = ContinuousCritic(preprocess_net=net(env))
    torch.nn.init.constant_(actor.sigma_param, -0.5)
    for part in (actor, critic):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.orthogonal_(layer.weight, gain=2**0.5)
                torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for layer in actor.mu.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(0.01)
    steps = workload.num_envs * workload.num_steps
    falling = LRSchedulerFactoryLinear(
        max_epochs=1, epoch_num_steps=workload.iterations * steps, collection_step_num_env_steps=steps
    )
    optimiser = AdamOptimizerFactory(lr=settings.pop("learning_rate")).with_lr_scheduler_factory(falling)
    return {
        "policy": ProbabilisticActorPolicy(
            actor=actor, dist_fn=gaussian, action_space=actions, deterministic_eval=True
        ),
        "critic": critic,
        "optim": optimiser,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "max_grad_norm": 0.5,
        "vf_coef": 0.25,
        "ent_coef": 0.0,
        "eps_clip": 0.2,
        "value_clip": False,
        "advantage_normalization": False,
        "recompute_advantage": True,
        "return_scaling": True,
    }


def sac(workload: Workload, env: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """SAC as in the example: what its constructor takes beside `settings`."""
    space, actions = env.observation_space[0], env.action_space[0]
    optimiser = AdamOptimizerFactory(lr=settings.pop("learning_rate"))
    body = Net(state_shape=space.shape, hidden_sizes=[256, 256])
    actor = ContinuousActorProbabilistic(
        preprocess_net=body, action_shape=actions.shape, unbounded=True, conditioned_sigma=True
    )
    parts: dict[str, Any] = {"policy": SACPolicy(actor=actor, action_space=actions), "policy_optim": optimiser}
    for name in ("critic", "critic2"):
        both = Net(state_shape=space.shape, action_shape=actions.shape, hidden_sizes=[256, 256], concat=True)
        parts |= {name: ContinuousCritic(preprocess_net=both), f"{name}_optim": optimiser}
    return parts
