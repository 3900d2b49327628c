"""Measure pgrl against Stable-Baselines3, its contrib package (the `bench` extra), SBX, Tianshou and TorchRL.

    python scripts/bench_peers.py                              every workload, 5 pairs each
    python scripts/bench_peers.py ppo-cartpole --pairs 10      one of them, 10 pairs
    python scripts/bench_peers.py --python PATH                those whose peer this other interpreter has
    python scripts/bench_peers.py --report                     table and picture from results/peers.json

Equal work: the same env, number of envs, rollout, epochs, minibatches, nets, optimiser, learning rate and
clipping; no normalisation of observations or rewards, no learning-rate decay, no TensorBoard (the workloads
of measure_tianshou.py and measure_torchrl.py are those libraries' own examples, with what these have on both
sides). Each side has the setup with which it is faster, as a measurement of each tells beforehand: one thread, a thread
for each core, or, where there are several envs, one thread and processes that step them (pgrl's `env.processes`, a core
each; Stable-Baselines3's SubprocVecEnv, an env each). Beside Tianshou, TorchRL and random actions it is one process.
Every measurement is a fresh process. Both sides are stamped in the same place, at the return of each
update, with wall and CPU time; the first two iterations are dropped. Env steps and gradient steps are
counted on both sides and must be equal. The order is A B B A; the result is the median over pairs of the
ratio of steps per second. Leave the machine alone while this runs. Where pgrl compiles its gradient steps,
that happens in the dropped iterations; their seconds are in peers.json. SBX is Stable-Baselines3 in JAX (pip
install sbx-rl): its whole update is compiled, and so is pgrl's beside it. Where the peer is `random`, the other
side is pgrl's own envs, stepped with random actions and nothing else: the ratio is what training leaves of it.

Tianshou and TorchRL need, or would change, packages of other versions than pgrl's tools: give each an environment of
its own, in which pgrl need not be, with the same torch (pinned in constraints.txt), Gymnasium and MuJoCo.

    python -m venv tianshou-env
    tianshou-env/bin/pip install tianshou==2.0.1 torch==2.13.0 'gymnasium[mujoco]==1.4.0' mujoco==3.3.7
    python scripts/bench_peers.py --python tianshou-env/bin/python
    python -m venv torchrl-env
    torchrl-env/bin/pip install torchrl==0.14.1 torch==2.13.0 'gymnasium[mujoco]==1.4.0' mujoco==3.3.7
    python scripts/bench_peers.py --python torchrl-env/bin/python
"""

import argparse
import json
import multiprocessing
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
from typing import Any, NamedTuple, SupportsInt

ROOT = Path(__file__).resolve().parent.parent
DROPPED = 2  # iterations before the measurement starts
SIDES = ("pgrl", "peer")


class Setup(NamedTuple):
    """What a side may use: torch's threads, and the processes that step its envs."""

    threads: int
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.threads}" + (f" x {self.processes}" if self.processes > 1 else "")


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
    learns: bool = True  # the peer; else it takes no gradient steps to compare

    @property
    def library(self) -> str:
        """The peer's package."""
        return self.peer.partition(":")[0].partition(".")[0]

    @property
    def shared_out(self) -> bool:
        """Whether several processes may step the envs."""
        return self.num_envs > 1 and self.library in ("stable_baselines3", "sb3_contrib", "sbx")

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
        "random-halfcheetah-8",
        "HalfCheetah-v4",
        num_envs=8,
        num_steps=256,
        iterations=22,
        pgrl=f"""{PPO} algo.num_steps=256 algo.update_epochs=10 algo.num_minibatches=32 algo.learning_rate=3e-4
        algo.ent_coef=0 compile=true""",
        peer="pgrl:random",
        settings={},
        target=0.55,
        learns=False,
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
    # The examples of two libraries, with their own settings: examples/mujoco/mujoco_ppo.py and mujoco_sac.py of
    # Tianshou, sota-implementations/ppo and sac of TorchRL. Fewer random actions come first; they are dropped anyway.
    Workload(
        "ppo-halfcheetah-8-tianshou",
        "HalfCheetah-v4",
        num_envs=8,
        num_steps=256,
        iterations=22,
        pgrl=f"""{PPO} algo.num_steps=256 algo.update_epochs=10 algo.num_minibatches=32 algo.learning_rate=3e-4
        algo.ent_coef=0 algo.norm_obs=true algo.norm_reward=true algo.anneal_lr=true algo.recompute_advantages=true
        algo.norm_adv=null algo.vf_coef=0.5 algo.policy.log_std_init=-0.5 algo.adam_eps=1e-8 compile=true""",
        peer="tianshou.algorithm:PPO",
        settings=dict(learning_rate=3e-4, n_epochs=10, batch_size=64),
        target=None,
    ),
    Workload(
        "sac-halfcheetah-tianshou",
        "HalfCheetah-v4",
        num_envs=1,
        num_steps=1,
        iterations=2000,
        pgrl=f"""algo=sac {REPLAY} algo.actor_lr=1e-3 algo.critic_lr=1e-3 algo.alpha=0.2 compile=true""",
        peer="tianshou.algorithm:SAC",
        settings=dict(learning_rate=1e-3, batch_size=256, buffer_size=1_000_000, tau=0.005, alpha=0.2),
        target=None,
        optimisers=3,
        warm_up=1000,
        dropped=200,
    ),
    Workload(
        "ppo-halfcheetah-1-torchrl",
        "HalfCheetah-v4",
        num_envs=1,
        num_steps=2048,
        iterations=22,
        pgrl=f"""{PPO} algo.num_steps=2048 algo.update_epochs=10 algo.num_minibatches=32 algo.learning_rate=3e-4
        algo.ent_coef=0 algo.norm_obs=true algo.anneal_lr=true algo.recompute_advantages=true algo.max_grad_norm=null
        algo.vf_coef=0.5 algo.policy.distribution=squashed compile=true""",
        peer="torchrl:PPO",
        settings=dict(learning_rate=3e-4, n_epochs=10, batch_size=64),
        target=None,
        optimisers=2,
    ),
    Workload(
        "sac-halfcheetah-torchrl",
        "HalfCheetah-v4",
        num_envs=1,
        num_steps=1000,
        iterations=4,
        pgrl=f"{SAC.replace('algo.num_steps=1 ', 'algo.num_steps=1000 ')} compile=true",
        peer="torchrl:SAC",
        settings=dict(learning_rate=3e-4, batch_size=256, buffer_size=1_000_000, tau=0.005),
        target=None,
        warm_up=1000,
        dropped=1,
    ),
)


# --------------------------------------------------------------------------------------- in the child process


class Stamps:
    """The clock of one side: env steps, gradient steps, wall and CPU seconds at the return of each update."""

    def __init__(self, dropped: int = DROPPED, iterations: int = 0) -> None:
        self.began, self.dropped, self.iterations = time.perf_counter(), dropped, iterations
        self.memory = 0.0
        self.rows: list[tuple[int, SupportsInt, float, float]] = []

    def add(self, env_steps: int, gradient_steps: SupportsInt) -> None:
        cpu = time.process_time()
        if len(self.rows) in (self.dropped - 1, self.iterations - 1):  # with the processes that step envs
            others = [str(process.pid) for process in multiprocessing.active_children()]
            cpu += sum(map(cpu_seconds, others))
            self.memory = peak_memory_mb() + sum(map(peak_memory_mb, others))
        self.rows.append((env_steps, gradient_steps, time.perf_counter(), cpu))

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
            "memory_mb": self.memory or peak_memory_mb(),
        }


def cpu_seconds(process: str) -> float:
    """What another process has had of the processor."""
    used = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


def peak_memory_mb(process: str = "self") -> float:
    """The most memory a process has held, MB; ru_maxrss would also count its parent's at the fork."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def measure_pgrl(workload: Workload, seed: int, setup: Setup, folder: Path) -> dict[str, float]:
    """Train with pgrl; the stamps are taken around `update` of whichever agent runs."""
    import pgrl
    from pgrl.agents import Agent
    from pgrl.logger import read_rows

    stamps = Stamps(workload.dropped, workload.iterations)
    for agent in Agent.__subclasses__():
        agent.update = stamped(agent.update, stamps)  # type: ignore[method-assign]
    size = f"env={workload.env} num_envs={workload.num_envs} total_timesteps={workload.total_timesteps}"
    run = f"seed={seed} threads={setup.threads} device=cpu run_dir={folder / 'run'}"
    run += f" env.processes={setup.processes}"
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


def measure_peer(workload: Workload, seed: int, setup: Setup, folder: Path) -> dict[str, float]:
    """Train with the peer; the stamps are taken around `train`, its update."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
    from torch.optim.optimizer import register_optimizer_step_post_hook

    del folder  # it writes nothing
    torch.set_num_threads(setup.threads)
    gradient_steps = 0

    def count(*_: object) -> None:
        nonlocal gradient_steps
        gradient_steps += 1

    register_optimizer_step_post_hook(count)
    module, _, name = workload.peer.partition(":")
    algorithm = getattr(import_module(module), name)
    stamps = Stamps(workload.dropped, workload.iterations)

    def train(model: Any, *rest: Any, **named: Any) -> None:
        algorithm.train(model, *rest, **named)
        taken = gradient_steps // workload.optimisers if workload.optimisers else model._n_updates * workload.counts
        taken += workload.policy_steps * (len(stamps.rows) + 1)
        stamps.add(model.num_timesteps, taken)

    kind = SubprocVecEnv if setup.processes > 1 else DummyVecEnv
    env = make_vec_env(workload.env, n_envs=workload.num_envs, seed=seed, vec_env_cls=kind)
    settings = dict(workload.settings)
    if "action_noise" in settings:  # its standard deviation; the object is the peer's
        import numpy as np
        from stable_baselines3.common.noise import NormalActionNoise

        actions = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, settings["action_noise"]))
    stamped_algorithm = type(name, (algorithm,), {"train": train})
    model = stamped_algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)
    model.learn(workload.total_timesteps)
    env.close()
    returns = [episode["r"] for episode in model.ep_info_buffer]
    return stamps.result(sum(returns) / max(len(returns), 1))


def measure_random(workload: Workload, seed: int, setup: Setup, folder: Path) -> dict[str, float]:
    """Step the envs of pgrl's side with random actions, a rollout of which is drawn at a time."""
    import torch

    from pgrl.config import compose
    from pgrl.envs import make_vec

    del folder  # it writes nothing
    torch.set_num_threads(setup.threads)
    env = make_vec(compose([f"env={workload.env}"]).env, workload.num_envs, seed)
    low, high = (torch.from_numpy(bound) for bound in (env.action_space.low, env.action_space.high))  # type: ignore[attr-defined]
    stamps, returns = Stamps(workload.dropped), deque[float](maxlen=100)
    env.reset()
    for iteration in range(1, workload.iterations + 1):
        for action in low + (high - low) * torch.rand(workload.num_steps, workload.num_envs, *low.shape):
            env.step(action)
        returns.extend(env.episodes().env_return)
        stamps.add(iteration * workload.num_envs * workload.num_steps, 0)
    env.close()
    return stamps.result(sum(returns) / max(len(returns), 1))


def measure_other(workload: Workload, seed: int, setup: Setup, folder: Path) -> dict[str, float]:
    """Train with Tianshou or TorchRL, by a module of their own: their interpreter need not have what others import."""
    del folder  # they write nothing
    measured: dict[str, float] = import_module(f"measure_{workload.library}").measure(workload, seed, setup.threads)
    return measured


MEASURES = {"pgrl": measure_random, "tianshou": measure_other, "torchrl": measure_other}  # by the peer's library


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


def child(side: str, workload: Workload, seed: int, setup: Setup, python: str = sys.executable) -> dict[str, float]:
    """One measurement in a fresh process; `python` is the peer's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        options = (side, workload.name, workload.iterations, seed, *setup, folder, time.time())
        interpreter = python if side == "peer" else sys.executable
        return fresh_process([__file__, "--child", *map(str, options)], setup.threads, python=interpreter)


def fresh_process(
    arguments: Sequence[str],
    threads: int,
    variables: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> dict[str, float]:
    """What another Python with so many threads prints last, a line of JSON. RuntimeError if it fails."""
    # numpy's BLAS has one thread, as `import pgrl` asks for where it comes first
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | own | (variables or {})
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def child_main(
    side: str, name: str, iterations: str, seed: str, threads: str, processes: str, folder: str, at: str
) -> None:
    """What `child` runs: the measurement, printed as one line of JSON."""
    workload = replace(find(name), iterations=int(iterations))
    workload = replace(workload, dropped=min(workload.dropped, workload.iterations // 2))
    if side == "start":
        first_step(workload, float(at), Path(folder))
        return
    setup = Setup(int(threads), int(processes))
    if hasattr(os, "sched_setaffinity"):  # the only way to tell JAX, and the same for all
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-max(setup) :])
    measure = measure_pgrl if side == "pgrl" else MEASURES.get(workload.library, measure_peer)
    print(json.dumps(measure(workload, int(seed), setup, Path(folder))))


def order(pairs: int) -> list[tuple[str, str]]:
    """A B, B A, A B, ...: a drift of the machine hits both sides alike."""
    return [SIDES if pair % 2 == 0 else (SIDES[1], SIDES[0]) for pair in range(pairs)]


def better_setup(workload: Workload, side: str, threads: int | None, python: str = sys.executable) -> Setup:
    """That with which this side is faster; `threads`, where it is given, is the number for one process."""
    from pgrl.processor import cores

    setups = [Setup(n) for n in ([threads] if threads else sorted({1, cores()}))]
    if workload.shared_out:
        setups.append(Setup(1, min(cores(), workload.num_envs) if side == "pgrl" else workload.num_envs))
    if len(setups) == 1:
        return setups[0]
    return max(setups, key=lambda setup: child(side, workload, 0, setup, python)["sps"])


def compare(
    workload: Workload, pairs: int, setups: Mapping[str, Setup], python: str = sys.executable
) -> list[dict[str, dict[str, float]]]:
    """Measure the pairs, each side with its setup, and refuse a comparison of unequal work."""
    results = []
    for seed, sides in enumerate(order(pairs), start=1):
        pair = {side: child(side, workload, seed, setups[side], python) for side in sides}
        for count in ("iterations", "env_steps", *(["gradient_steps"] if workload.learns else [])):
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


HEADER = """| workload | peer | steps/s, pgrl / peer | ratio [95 % interval] | aim | threads x processes \
| steps per CPU-second | return | peak MB | env steps | gradient steps | machine |
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
            f"| {' / '.join(str(Setup(*measured['setups'][side])) for side in SIDES)} "
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
    """Write the ratios: a dot with its interval for each workload, a dot for each pair, and a stroke at the aim."""
    from matplotlib.figure import Figure

    from plot_curves import BLUE, GREY, ORANGE, save

    measured = [workload for workload in WORKLOADS if workload.name in results["workloads"]]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(measured)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    for place, workload in enumerate(measured):
        pairs = results["workloads"][workload.name]["pairs"]
        one = summary(pairs)
        ratio, (low, high) = one["ratio"], one["interval"]
        once = place == 0
        axes.plot([low, high], [place] * 2, color=BLUE, linewidth=2.5, solid_capstyle="butt", alpha=0.45)
        each = [pair["pgrl"]["sps"] / pair["peer"]["sps"] for pair in pairs]
        axes.plot(each, [place] * len(each), "o", color=BLUE, markersize=2.5, label="a pair" if once else None)
        axes.plot(ratio, place, "D", color=BLUE, markersize=6, label="median, 95 % interval" if once else None)
        if workload.target is not None:
            label = None if any(w.target is not None for w in measured[:place]) else "aim"
            axes.plot(workload.target, place, "|", color=ORANGE, markersize=15, markeredgewidth=2, label=label)
        right = max(*each, ratio, workload.target or 0)
        axes.annotate(f"{ratio:.2f} ×", (right, place), (7, 0), textcoords="offset points", va="center", fontsize=8)
    names = [f"{workload.name}  ({workload.peer.replace(':', '.')})" for workload in measured]
    axes.set_yticks(range(len(measured)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.14)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=GREY)
    axes.set_xlabel("training, env steps per second: pgrl's over the peer's", fontsize=9)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
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


PACKAGES = ("torch", "gymnasium", "mujoco", "stable-baselines3", "sb3-contrib", "sbx-rl", "tianshou", "torchrl")


def versions(python: str = sys.executable) -> dict[str, str]:
    """Of the packages that the figures depend on, where an interpreter has them."""
    if python != sys.executable:
        found: dict[str, str] = json.loads(subprocess.check_output([python, __file__, "--versions"], text=True))
        return found
    return {package: version(package) for package in PACKAGES if known(package)}


def machine(python: str = sys.executable) -> dict[str, str]:
    """The machine and versions that the figures hold for; `pgrl's / peer's` where an interpreter has another one."""
    from pgrl import __version__

    ours, theirs = versions(), versions(python)
    both = {
        package: ours[package]
        if theirs.get(package, ours[package]) == ours[package]
        else f"{ours[package]} / {theirs[package]}"
        for package in ours
    }
    return {"cpu": processor(), "python": platform.python_version(), "pgrl": __version__, **theirs, **both}


def installed(workload: Workload, python: str = sys.executable) -> bool:
    """Whether the peer's interpreter has the peer."""
    if workload.library == "pgrl":
        return True
    if python == sys.executable:
        return find_spec(workload.library) is not None
    distribution = {"stable_baselines3": "stable-baselines3", "sb3_contrib": "sb3-contrib", "sbx": "sbx-rl"}
    return distribution.get(workload.library, workload.library) in versions(python)


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
    parser.add_argument("--threads", type=int, help="threads of each side in one process (default: the faster number)")
    parser.add_argument("--iterations", type=int, help="rollouts of a measurement, for a quick look")
    parser.add_argument("--starts", type=int, default=5, help="measurements of the start (default 5)")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where peers.json goes")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures", help="where peers.png goes")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the interpreter of the other side, for a peer with an environment of its own",
    )
    parser.add_argument("--child", nargs=8, help=argparse.SUPPRESS)
    parser.add_argument("--versions", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(*options.child)
        return 0
    if options.versions:
        print(json.dumps(versions()))
        return 0
    path: Path = options.results / "peers.json"
    results: dict[str, Any] = {"workloads": {}, "starts": []}
    if path.exists():
        results |= json.loads(path.read_text())
    if not options.report:
        options.results.mkdir(parents=True, exist_ok=True)
        python = options.python
        own = python == sys.executable
        workloads = [find(name) for name in options.workloads]
        workloads = workloads or [w for w in WORKLOADS if installed(w, python) and (own or w.library != "pgrl")]
        for workload in workloads:
            if not installed(workload, python):
                package = {"sbx": "sbx-rl"}.get(workload.library, workload.library)
                raise SystemExit(
                    f"{workload.name} needs {workload.peer}, which {python} has not: pip install {package}, if need be "
                    "in an environment of its own, and --python with its path; --help has the commands"
                )
        results["starts"] = [child("start", WORKLOADS[0], 0, Setup(1))["seconds"] for _ in range(options.starts)]
        print("seconds to the first env step:", *(f"{start:.1f}" for start in results["starts"]), flush=True)
        for workload in workloads:
            sized = replace(workload, iterations=options.iterations or workload.iterations)
            interpreter = sys.executable if workload.library == "pgrl" else python
            setups = {side: better_setup(sized, side, options.threads, interpreter) for side in SIDES}
            pairs = compare(sized, options.pairs, setups, interpreter)
            results["workloads"][workload.name] = {"pairs": pairs, "setups": setups, "machine": machine(interpreter)}
            path.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (options.results / "peers.md").write_text(text)
    plot(results, options.pictures / "peers.png")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
