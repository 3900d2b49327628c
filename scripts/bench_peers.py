"""Measure pgrl against Stable-Baselines3, its contrib package (the `bench` extra), SBX and Tianshou, at equal work.

    python scripts/bench_peers.py                              every workload, 5 pairs each
    python scripts/bench_peers.py ppo-cartpole --pairs 10      one of them, 10 pairs
    python scripts/bench_peers.py --report                     table and picture from results/peers.json

Equal work: the same env, number of envs, rollout, epochs, minibatches, nets, optimiser, learning rate and
clipping; no normalisation of observations or rewards, no learning-rate decay, no TensorBoard. Each side has
the number of threads with which it is faster, one or all cores, as a measurement of each tells beforehand.
Every measurement is a fresh process. Both sides are stamped in the same place, at the return of each
update, with wall and CPU time; the first two iterations are dropped. Env steps and gradient steps are
counted on both sides and must be equal. The order is A B B A; the result is the median over pairs of the
ratio of steps per second. Leave the machine alone while this runs. Where pgrl compiles its gradient steps,
that happens in the dropped iterations; their seconds are in peers.json. Tianshou pins packages that pgrl's
own tools need newer: install it in an environment of its own (pip install tianshou), beside pgrl. SBX is
Stable-Baselines3 in JAX (pip install sbx-rl): its whole update is compiled, and so is pgrl's beside it.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, SupportsInt

ROOT = Path(__file__).resolve().parent.parent
DROPPED = 2  # iterations before the measurement starts
SIDES = ("pgrl", "peer")


@dataclass(frozen=True)
class Workload:
    """One comparison: the size of the work, and how each side is told to do it."""

    name: str
    env: str
    num_envs: int
    num_steps: int
    iterations: int
    pgrl: str  # overrides of pgrl.train
    peer: str  # module:class
    settings: Mapping[str, Any]  # of the peer's constructor
    target: float | None  # the ratio aimed at; None: only reported
    policy_steps: int = 0  # gradient steps of an iteration that the peer takes without an optimiser
    optimisers: int = 1  # of the peer, each of which takes a step where one is counted; 0: the peer counts its updates
    counts: int = 1  # gradient steps for each that the peer counts itself, where optimisers is 0
    warm_up: int = 0  # env steps before the first update
    dropped: int = DROPPED  # iterations before the measurement starts

    @property
    def total_timesteps(self) -> int:
        return self.warm_up + self.iterations * self.num_envs * self.num_steps


# No tuned file; where the defaults of the two sides differ, both are set. pgrl's value loss is half the peer's: 1.0 is
# its vf_coef of 0.5.
PLAIN = """tuned=null algo.norm_obs=false algo.norm_reward=false algo.clip_reward=null algo.norm_value=false
algo.anneal_lr=false algo.network.hidden_sizes=[64,64] algo.network.value_hidden_sizes=null
algo.network.activation=tanh algo.network.shared=false algo.policy.distribution=gaussian
algo.policy.state_dependent_std=false algo.policy.log_std_init=0 algo.gamma=0.99"""
CLIPPED = f"{PLAIN} algo.max_grad_norm=0.5 algo.vf_coef=1.0"
PPO = f"""algo=ppo {CLIPPED} algo.advantage=gae algo.gae_lambda=0.95 algo.norm_adv=minibatch
algo.adam_eps=1e-5 algo.clip_coef=0.2 algo.vf_clip_coef=null algo.recompute_advantages=false
algo.target_kl=null"""
A2C = f"""algo=a2c {CLIPPED} algo.advantage=gae algo.gae_lambda=1.0 algo.norm_adv=true
algo.optimizer=rmsprop algo.opt_eps=1e-5 algo.rms_prop_alpha=0.99"""
NATURAL = f"""algo=trpo {PLAIN} algo.advantage=gae algo.gae_lambda=0.95 algo.norm_adv=true algo.damping=0.1
algo.fisher_fraction=1 algo.adam_eps=1e-5 algo.max_grad_norm=null algo.vf_clip_coef=null compile=true"""
REPLAY = """tuned=null algo.num_steps=1 algo.utd_ratio=1 algo.batch_size=256 algo.buffer_size=1000000 algo.gamma=0.99
algo.learning_starts=1000 algo.tau=0.005 algo.n_step=1 algo.network.hidden_sizes=[256,256] algo.network.activation=relu
algo.norm_obs=false algo.max_grad_norm=null algo.per_alpha=null algo.policy_delay=1"""
SAC = f"algo=sac {REPLAY} algo.actor_lr=3e-4 algo.critic_lr=3e-4 algo.alpha_lr=3e-4"
DDPG = f"""algo=ddpg {REPLAY} algo.actor_lr=1e-3 algo.critic_lr=1e-3 algo.noise=gaussian algo.noise_std=0.1
algo.twin=false algo.target_noise=null"""
PEER_REPLAY = dict(
    batch_size=256, buffer_size=1_000_000, learning_starts=1000, tau=0.005, policy_kwargs=dict(net_arch=[256, 256])
)
NOISE = dict(action_noise=0.1)
WORKLOADS = (
    *(
        Workload(
            name,
            "HalfCheetah-v4",
            num_envs=num_envs,
            num_steps=2048 // num_envs,
            iterations=22,
            pgrl=f"""{PPO} algo.num_steps={2048 // num_envs} algo.update_epochs=10 algo.num_minibatches=32
            algo.learning_rate=3e-4 algo.ent_coef=0 compile=true""",
            peer=peer,
            settings=dict(n_steps=2048 // num_envs, n_epochs=10, batch_size=64, learning_rate=3e-4, ent_coef=0.0),
            target=target,
            optimisers=optimisers,
            counts=32,  # SBX's count is of epochs
        )
        for name, num_envs, peer, optimisers, target in (
            ("ppo-halfcheetah-1", 1, "stable_baselines3:PPO", 1, 5.0),
            ("ppo-halfcheetah-1-sbx", 1, "sbx:PPO", 0, 6.0),
            ("ppo-halfcheetah-8", 8, "stable_baselines3:PPO", 1, 5.0),
        )
    ),
    Workload(
        "ppo-cartpole",
        "CartPole-v1",
        num_envs=4,
        num_steps=128,
        iterations=196,
        pgrl=f"""{PPO} algo.num_steps=128 algo.update_epochs=4 algo.num_minibatches=4
        algo.learning_rate=2.5e-4 algo.ent_coef=0.01 compile=true""",
        peer="stable_baselines3:PPO",
        settings=dict(n_steps=128, n_epochs=4, batch_size=128, learning_rate=2.5e-4, ent_coef=0.01),
        target=7.0,
    ),
    Workload(
        "a2c-cartpole",
        "CartPole-v1",
        num_envs=8,
        num_steps=5,
        iterations=2500,
        pgrl=f"{A2C} algo.num_steps=5 algo.learning_rate=7e-4 algo.ent_coef=0 compile=true",
        peer="stable_baselines3:A2C",
        settings=dict(n_steps=5, learning_rate=7e-4, ent_coef=0.0, normalize_advantage=True),
        target=4.0,
    ),
    Workload(
        "trpo-halfcheetah-1",
        "HalfCheetah-v4",
        num_envs=1,
        num_steps=2048,
        iterations=22,
        pgrl=f"""{NATURAL} algo.max_kl=0.01 algo.cg_steps=15 algo.backtrack_factor=0.8 algo.backtrack_steps=10
        algo.accept_ratio=0 algo.num_steps=2048 algo.update_epochs=10 algo.num_minibatches=16
        algo.value_learning_rate=1e-3""",
        peer="sb3_contrib:TRPO",
        settings=dict(n_steps=2048, batch_size=128, learning_rate=1e-3, n_critic_updates=10, cg_max_steps=15),
        target=5.0,
        policy_steps=1,
    ),
    *(
        Workload(
            name,
            "HalfCheetah-v4",
            num_envs=1,
            num_steps=1,
            iterations=2000,
            pgrl=f"{ours} compile={str(compiled).lower()}",
            peer=peer,
            settings=dict(**PEER_REPLAY, **settings),
            target=target,
            optimisers=optimisers,
            warm_up=1000,
            dropped=200,
        )
        for name, ours, compiled, peer, settings, optimisers, target in (
            ("sac-halfcheetah", SAC, False, "stable_baselines3:SAC", dict(learning_rate=3e-4), 3, 1.6),
            ("sac-halfcheetah-compiled", SAC, True, "stable_baselines3:SAC", dict(learning_rate=3e-4), 3, 2.5),
            ("sac-halfcheetah-sbx", SAC, True, "sbx:SAC", dict(learning_rate=3e-4), 0, 1.4),
            ("ddpg-halfcheetah", DDPG, False, "stable_baselines3:DDPG", dict(learning_rate=1e-3, **NOISE), 2, 1.8),
            (
                "ddpg-halfcheetah-compiled",
                DDPG,
                True,
                "stable_baselines3:DDPG",
                dict(learning_rate=1e-3, **NOISE),
                2,
                3.0,
            ),
            ("ddpg-halfcheetah-sbx", DDPG, True, "sbx:DDPG", dict(learning_rate=1e-3, **NOISE), 0, None),
        )
    ),
    Workload(
        "npg-halfcheetah-16",
        "HalfCheetah-v4",
        num_envs=16,
        num_steps=64,
        iterations=42,
        pgrl=f"""{NATURAL.replace("trpo", "npg")} algo.max_kl=null algo.step_size=0.1 algo.cg_steps=10 algo.num_steps=64
        algo.update_epochs=20 algo.num_minibatches=1 algo.value_learning_rate=1e-3""",
        peer="tianshou.algorithm:NPG",
        settings=dict(optim_critic_iters=20, trust_region_size=0.1, learning_rate=1e-3),
        target=None,
        policy_steps=1,
    ),
    Workload(
        "reinforce-cartpole",
        "CartPole-v1",
        num_envs=4,
        num_steps=500,
        iterations=42,
        pgrl=f"algo=reinforce {PLAIN} algo.baseline=null algo.num_steps=500 algo.learning_rate=1e-2",
        peer="tianshou.algorithm:Reinforce",
        settings=dict(learning_rate=1e-2),
        target=None,
    ),
)


# --------------------------------------------------------------------------------------- in the child process


class Stamps:
    """The clock of one side: env steps, gradient steps, wall and CPU seconds at the return of each update."""

    def __init__(self, dropped: int = DROPPED) -> None:
        self.began, self.dropped = time.perf_counter(), dropped
        self.rows: list[tuple[int, SupportsInt, float, float]] = []

    def add(self, env_steps: int, gradient_steps: SupportsInt) -> None:
        self.rows.append((env_steps, gradient_steps, time.perf_counter(), time.process_time()))

    def result(self, reached: float) -> dict[str, float]:
        """The counts of the whole run, and the speed from the last dropped iteration to the end."""
        (steps0, _, wall0, cpu0), (steps1, updates, wall1, cpu1) = self.rows[self.dropped - 1], self.rows[-1]
        return {
            "iterations": len(self.rows),
            "env_steps": steps1,
            "gradient_steps": int(updates),
            "dropped_seconds": wall0 - self.began,
            "sps": (steps1 - steps0) / (wall1 - wall0),
            "steps_per_cpu_second": (steps1 - steps0) / (cpu1 - cpu0),
            "return": reached,
            "memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """The most memory this process has held, MB; ru_maxrss would also count its parent's at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def measure_pgrl(workload: Workload, seed: int, threads: int, folder: Path) -> dict[str, float]:
    """Train with pgrl; the stamps are taken around `update` of whichever agent runs."""
    import pgrl
    from pgrl.agents import Agent
    from pgrl.logger import read_rows

    stamps = Stamps(workload.dropped)
    for agent in Agent.__subclasses__():
        agent.update = stamped(agent.update, stamps)  # type: ignore[method-assign]
    size = f"env={workload.env} num_envs={workload.num_envs} total_timesteps={workload.total_timesteps}"
    run = f"seed={seed} threads={threads} device=cpu run_dir={folder / 'run'}"
    quiet = "eval_every=null save_every=null tensorboard=false"
    run_dir = pgrl.run(f"{size} {run} {quiet} {workload.pgrl}".split())
    returns = [row["charts/episodic_return_100"] for row in read_rows(run_dir) if "charts/episodic_return_100" in row]
    return stamps.result(float(returns[-1]) if returns else 0.0)


def stamped(update: Callable[..., Any], stamps: Stamps) -> Callable[..., Any]:
    """An agent's `update` that is stamped when it returns, once it learns."""
    env_steps = 0

    def wrapper(agent: Any, rollout: Any, *rest: Any, **named: Any) -> Any:
        nonlocal env_steps
        metrics = update(agent, rollout, *rest, **named)
        env_steps += rollout.reward.numel()
        if stamps.rows or int(metrics["charts/updates"]):
            stamps.add(env_steps, metrics["charts/updates"])
        return metrics

    return wrapper


def measure_peer(workload: Workload, seed: int, threads: int, folder: Path) -> dict[str, float]:
    """Train with the peer; the stamps are taken around `train`, its update."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from torch.optim.optimizer import register_optimizer_step_post_hook

    del folder  # it writes nothing
    torch.set_num_threads(threads)
    gradient_steps = 0

    def count(*_: object) -> None:
        nonlocal gradient_steps
        gradient_steps += 1

    register_optimizer_step_post_hook(count)
    module, _, name = workload.peer.partition(":")
    algorithm = getattr(import_module(module), name)
    stamps = Stamps(workload.dropped)

    def train(model: Any, *rest: Any, **named: Any) -> None:
        algorithm.train(model, *rest, **named)
        taken = gradient_steps // workload.optimisers if workload.optimisers else model._n_updates * workload.counts
        taken += workload.policy_steps * (len(stamps.rows) + 1)
        stamps.add(model.num_timesteps, taken)

    env = make_vec_env(workload.env, n_envs=workload.num_envs, seed=seed)
    settings = dict(workload.settings)
    if "action_noise" in settings:  # its standard deviation; the object is the peer's
        import numpy as np
        from stable_baselines3.common.noise import NormalActionNoise

        actions = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, settings["action_noise"]))
    stamped_algorithm = type(name, (algorithm,), {"train": train})
    model = stamped_algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)
    model.learn(workload.total_timesteps)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    return stamps.result(sum(returns) / max(len(returns), 1))


def measure_tianshou(workload: Workload, seed: int, threads: int, folder: Path) -> dict[str, float]:
    """Train with Tianshou's collector and update; networks as pgrl's, the rest as `settings` and its defaults say."""
    import gymnasium
    import torch
    from tianshou.algorithm.algorithm_base import policy_within_training_step
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from tianshou.utils.net.discrete import DiscreteActor
    from torch.distributions import Categorical, Independent, Normal
    from torch.optim.optimizer import register_optimizer_step_post_hook

    del folder  # it writes nothing
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    gradient_steps = 0

    def count(*_: object) -> None:
        nonlocal gradient_steps
        gradient_steps += 1

    register_optimizer_step_post_hook(count)
    env = DummyVectorEnv([lambda: gymnasium.make(workload.env) for _ in range(workload.num_envs)])
    env.seed(seed)
    space, actions = env.observation_space[0], env.action_space[0]

    def net() -> Any:
        return Net(state_shape=space.shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh)

    settings = dict(workload.settings)
    settings["optim"] = AdamOptimizerFactory(lr=settings.pop("learning_rate"))
    if isinstance(actions, gymnasium.spaces.Box):
        actor = ContinuousActorProbabilistic(preprocess_net=net(), action_shape=actions.shape, unbounded=True)
        policy = ProbabilisticActorPolicy(
            actor=actor, dist_fn=lambda both: Independent(Normal(*both), 1), action_space=actions
        )
        settings["critic"] = ContinuousCritic(preprocess_net=net())
    else:
        actor = DiscreteActor(preprocess_net=net(), action_shape=actions.n, softmax_output=False)
        policy = ProbabilisticActorPolicy(
            actor=actor, dist_fn=lambda logits: Categorical(logits=logits), action_space=actions, action_scaling=False
        )
    module, _, name = workload.peer.partition(":")
    algorithm = getattr(import_module(module), name)(policy=policy, **settings)
    rollout = workload.num_envs * workload.num_steps
    collector = Collector(algorithm, env, VectorReplayBuffer(rollout, workload.num_envs))
    collector.reset()
    stamps, env_steps, returns = Stamps(), 0, deque[float](maxlen=100)
    for iteration in range(1, workload.iterations + 1):
        with policy_within_training_step(policy):
            collected = collector.collect(n_step=rollout)
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)
        collector.reset_buffer(keep_statistics=True)
        env_steps += collected.n_collected_steps
        returns.extend(map(float, collected.returns))
        stamps.add(env_steps, gradient_steps + workload.policy_steps * iteration)
    return stamps.result(sum(returns) / max(len(returns), 1))


def first_step(workload: Workload, started: float, folder: Path) -> None:
    """Run `pgrl.train` as `python -m` does, and print the seconds from `started` to the first env step."""
    import runpy

    import gymnasium

    module, _, name = str(gymnasium.spec(workload.env).entry_point).partition(":")
    env_class = getattr(import_module(module), name)

    def step(*_: object) -> None:
        print(json.dumps({"seconds": time.time() - started}), flush=True)
        os._exit(0)

    env_class.step = step
    run = f"env={workload.env} num_envs={workload.num_envs} threads=1 run_dir={folder / 'run'}"
    sys.argv = ["pgrl.train", *run.split(), *workload.pgrl.split()]
    runpy.run_module("pgrl.train", run_name="__main__", alter_sys=True)


# ------------------------------------------------------------------------------------------------- the parent


def child(side: str, workload: Workload, seed: int, threads: int) -> dict[str, float]:
    """One measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        options = (side, workload.name, workload.iterations, seed, threads, folder, time.time())
        return fresh_process([__file__, "--child", *map(str, options)], threads)


def fresh_process(
    arguments: Sequence[str], threads: int, variables: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What another Python with so many threads prints last, a line of JSON. RuntimeError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | (variables or {})
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def child_main(side: str, name: str, iterations: str, seed: str, threads: str, folder: str, at: str) -> None:
    """What `child` runs: the measurement, printed as one line of JSON."""
    workload = replace(find(name), iterations=int(iterations))
    workload = replace(workload, dropped=min(workload.dropped, workload.iterations // 2))
    if side == "start":
        first_step(workload, float(at), Path(folder))
        return
    if hasattr(os, "sched_setaffinity"):  # the only way to tell JAX, and the same for all
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(threads) :])
    peer = measure_tianshou if workload.peer.startswith("tianshou") else measure_peer
    measure = measure_pgrl if side == "pgrl" else peer
    print(json.dumps(measure(workload, int(seed), int(threads), Path(folder))))


def order(pairs: int) -> list[tuple[str, str]]:
    """A B, B A, A B, ...: a drift of the machine hits both sides alike."""
    return [SIDES if pair % 2 == 0 else (SIDES[1], SIDES[0]) for pair in range(pairs)]


def better_threads(workload: Workload, side: str) -> int:
    """One thread or all cores, whichever this side is faster with."""
    from pgrl.processor import cores

    return max({1, cores()}, key=lambda threads: child(side, workload, 0, threads)["sps"])


def compare(workload: Workload, pairs: int, threads: Mapping[str, int]) -> list[dict[str, dict[str, float]]]:
    """Measure the pairs, each side with its number of threads, and refuse a comparison of unequal work."""
    results = []
    for seed, sides in enumerate(order(pairs), start=1):
        pair = {side: child(side, workload, seed, threads[side]) for side in sides}
        for count in ("iterations", "env_steps", "gradient_steps"):
            one, other = pair["pgrl"][count], pair["peer"][count]
            if one != other:
                raise RuntimeError(f"{workload.name}: unequal work, {count}: {one} and {other}")
        ratio = pair["pgrl"]["sps"] / pair["peer"]["sps"]
        speeds = ", ".join(f"{side} {pair[side]['sps']:,.0f} steps/s" for side in SIDES)
        print(f"{workload.name} pair {seed}: {speeds}, ratio {ratio:.2f}", flush=True)
        results.append(pair)
    return results


def median(values: Sequence[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def summary(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The median ratio with its bootstrap interval, and the medians of each side."""
    from pgrl.evaluate import bootstrap_interval

    ratios = [pair["pgrl"]["sps"] / pair["peer"]["sps"] for pair in pairs]
    sides = {side: {key: median([pair[side][key] for pair in pairs]) for key in pairs[0][side]} for side in SIDES}
    return {"ratio": median(ratios), "interval": bootstrap_interval(ratios, median), **sides}


HEADER = """| workload | peer | steps/s, pgrl / peer | ratio [95 % interval] | aim | threads | steps per CPU-second \
| return | peak MB | env steps | gradient steps | machine |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|:-:|
"""


def table(results: Mapping[str, Any]) -> str:
    """The markdown table of what `results` holds."""
    lines, machines = [], list[dict[str, str]]()
    for workload in WORKLOADS:
        if workload.name not in results["workloads"]:
            continue
        measured = results["workloads"][workload.name]
        if measured["machine"] not in machines:
            machines.append(measured["machine"])
        letter = chr(ord("A") + machines.index(measured["machine"]))
        one = summary(measured["pairs"])
        low, high = one["interval"]
        aim = "–" if workload.target is None else f"{workload.target:g}"
        both = {key: " / ".join(f"{one[side][key]:,.0f}" for side in SIDES) for key in one["pgrl"]}
        lines.append(
            f"| {workload.name} | {workload.peer.replace(':', '.')} | {both['sps']} "
            f"| **{one['ratio']:.2f}** [{low:.2f}, {high:.2f}] | {aim} "
            f"| {measured['threads']['pgrl']} / {measured['threads']['peer']} "
            f"| {both['steps_per_cpu_second']} | {both['return']} | {both['memory_mb']} "
            f"| {one['pgrl']['env_steps']:,.0f} | {one['pgrl']['gradient_steps']:,.0f} "
            f"| {letter} |\n"
        )
    text = HEADER + "".join(lines)
    starts = results.get("starts", [])
    if starts:
        text += (
            f"\n`python -m pgrl.train` takes {starts[0]:.1f} s to its first env step at the first call, then "
            f"{median(starts):.1f} s (median of {len(starts)}).\n"
        )
    for i, machine in enumerate(machines):
        text += f"\n{chr(ord('A') + i)}: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "\n"
    return text


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write the bars: steps per second of both sides, and the ratio beside them."""
    from matplotlib.figure import Figure

    from plot_curves import BLUE, GREY, save

    measured = [workload for workload in WORKLOADS if workload.name in results["workloads"]]
    figure = Figure(figsize=(7, 0.8 + 0.8 * len(measured)), layout="constrained")
    axes = figure.subplots()
    for place, workload in enumerate(measured):
        one = summary(results["workloads"][workload.name]["pairs"])
        for offset, side, colour in ((-0.18, "pgrl", BLUE), (0.18, "peer", "#b5b5b5")):
            sps = one[side]["sps"]
            label = (
                {"pgrl": "pgrl", "peer": "Stable-Baselines3, its contrib package, SBX, Tianshou"}[side]
                if place == 0
                else None
            )
            axes.barh(place + offset, sps, 0.34, color=colour, label=label)
            note = f" {sps:,.0f}" + (f"   {one['ratio']:.1f} ×" if side == "pgrl" else "")
            axes.text(sps, place + offset, note, va="center", fontsize=9, color="#222222")
    axes.set_yticks(range(len(measured)), [f"{workload.name}\n{workload.env}" for workload in measured], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=GREY)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("env steps per second, training", fontsize=9)
    figure.legend(loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    save(figure, path)


def processor() -> str:
    """How many of which processor this machine has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {model}"


def known(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def machine() -> dict[str, str]:
    """The machine and versions that the figures hold for."""
    from pgrl import __version__

    packages = ("torch", "gymnasium", "mujoco", "stable-baselines3", "sb3-contrib", "sbx-rl", "tianshou")
    versions = {package: version(package) for package in packages if known(package)}
    return {"cpu": processor(), "python": platform.python_version(), "pgrl": __version__, **versions}


def installed(workload: Workload) -> bool:
    return find_spec(workload.peer.partition(":")[0].partition(".")[0]) is not None


def find(name: str) -> Workload:
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    names = ", ".join(workload.name for workload in WORKLOADS)
    raise SystemExit(f"no workload {name!r}; there are: {names}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help="names; all of them if none is given")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side (default 5)")
    parser.add_argument("--threads", type=int, help="threads of each side (default: with which it is faster)")
    parser.add_argument("--iterations", type=int, help="rollouts of a measurement, for a quick look")
    parser.add_argument("--starts", type=int, default=5, help="measurements of the start (default 5)")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where peers.json goes")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where peers.png goes")
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(*options.child)
        return 0
    path: Path = options.results / "peers.json"
    results: dict[str, Any] = {"workloads": {}, "starts": []}
    if path.exists():
        results |= json.loads(path.read_text())
    if not options.report:
        options.results.mkdir(parents=True, exist_ok=True)
        workloads = [find(name) for name in options.workloads] or [w for w in WORKLOADS if installed(w)]
        for workload in workloads:
            if not installed(workload):
                package = {"sbx": "sbx-rl"}.get(name := workload.peer.partition(":")[0].partition(".")[0], name)
                raise SystemExit(f"{workload.name} needs {workload.peer}: pip install {package}")
        results["starts"] = [child("start", WORKLOADS[0], 0, 1)["seconds"] for _ in range(options.starts)]
        print("seconds to the first env step:", *(f"{start:.1f}" for start in results["starts"]), flush=True)
        for workload in workloads:
            sized = replace(workload, iterations=options.iterations or workload.iterations)
            threads = {side: options.threads or better_threads(sized, side) for side in SIDES}
            pairs = compare(sized, options.pairs, threads)
            results["workloads"][workload.name] = {"pairs": pairs, "threads": threads, "machine": machine()}
            path.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (options.results / "peers.md").write_text(text)
    plot(results, options.pictures / "peers.png")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
