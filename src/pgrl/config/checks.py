"""What a configuration must fulfil before anything is built: ranges, choices, and how keys go together."""

from __future__ import annotations

import ctypes
import difflib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pgrl.config import schema
from pgrl.config.capturing import obstacles
from pgrl.config.folders import is_run, read_status
from pgrl.files import is_unused
from pgrl.native import compilers

if TYPE_CHECKING:
    from pgrl.config.schema import RunConfig


class Needs(NamedTuple):
    """When a key counts, and the words that see to it."""

    counts: Callable[[Any], bool]
    words: str


def values_states(algo: Any) -> bool:
    """Whether the algorithm learns a value function."""
    return getattr(algo, "baseline", "value") == "value"


def has_layers(network: Any) -> bool:
    """Whether an MLP of the network has hidden layers, of whatever kind its body is."""
    return bool(network.hidden_sizes or getattr(network, "value_hidden_sizes", None))


# By the dotted name, for every algorithm that has the key; the function is asked about the run's configuration.
NEEDS: dict[str, Needs] = {
    "algo.n_step": Needs(lambda c: getattr(c.algo, "advantage", "n_step") == "n_step", "algo.advantage=n_step"),
    "algo.gae_lambda": Needs(lambda c: c.algo.advantage in ("gae", "td_lambda"), "algo.advantage=gae"),
    "algo.bootstrap_truncated": Needs(lambda c: values_states(c.algo), "algo.baseline=value"),
    "algo.norm_value": Needs(lambda c: values_states(c.algo), "algo.baseline=value"),
    **{
        f"algo.{key}": Needs(lambda c: values_states(c.algo), "algo.baseline=value")
        for key in ("update_epochs", "num_minibatches", "shuffle", "value_learning_rate", "vf_clip_coef")
    },
    "algo.step_size": Needs(lambda c: c.algo.max_kl is None, "algo.max_kl=null"),
    "algo.clip_obs": Needs(lambda c: c.algo.norm_obs, "algo.norm_obs=true"),
    "algo.anneal_clip": Needs(lambda c: c.algo.clip_coef is not None, "algo.clip_coef=0.2"),
    "algo.clip_grad_per_network": Needs(lambda c: c.algo.max_grad_norm is not None, "algo.max_grad_norm=0.5"),
    "algo.kl_coef_target": Needs(lambda c: c.algo.kl_coef is not None, "algo.kl_coef=1.0"),
    "algo.rms_prop_alpha": Needs(
        lambda c: getattr(c.algo, "optimizer", "rmsprop") == "rmsprop", "algo.optimizer=rmsprop"
    ),
    "algo.network.activation": Needs(lambda c: has_layers(c.algo.network), "algo.network.hidden_sizes=[64]"),
    "algo.network.layer_norm": Needs(lambda c: has_layers(c.algo.network), "algo.network.hidden_sizes=[64]"),
    "algo.network.policy_gain": Needs(lambda c: c.algo.network.init == "orthogonal", "algo.network.init=orthogonal"),
    "algo.network.value_gain": Needs(lambda c: c.algo.network.init == "orthogonal", "algo.network.init=orthogonal"),
    "algo.policy.log_std_init": Needs(
        lambda c: c.algo.policy.distribution != "beta", "algo.policy.distribution=gaussian"
    ),
    "algo.policy.state_dependent_std": Needs(
        lambda c: c.algo.policy.distribution != "beta", "algo.policy.distribution=gaussian"
    ),
    "tf32": Needs(lambda c: c.device != "cpu", "device=cuda"),
    "checkpoint.replay": Needs(lambda c: hasattr(c.algo, "buffer_size"), "algo=sac"),
    "algo.per_beta": Needs(lambda c: c.algo.per_alpha is not None, "algo.per_alpha=0.6"),
    "algo.ou_theta": Needs(lambda c: c.algo.noise == "ou", "algo.noise=ou"),
    "algo.target_noise_clip": Needs(lambda c: c.algo.target_noise is not None, "algo.target_noise=0.2"),
    **{
        f"algo.{key}": Needs(lambda c: c.algo.alpha is None, "algo.alpha=null")
        for key in ("alpha_init", "alpha_lr", "target_entropy")
    },
    "eval_episodes": Needs(lambda c: c.eval_every is not None, "eval_every=10000"),
}


class Problem(NamedTuple):
    """Something wrong with one key, and what puts it right."""

    key: str
    value: object
    why: str
    use: tuple[str, ...] = ()  # words for the command line instead of those that set the key
    command: str | None = None  # what to do where no other words help


class Wrong(Exception):
    """Problems of a command, not yet told to the user."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems


class Rule(NamedTuple):
    """What a value must be; null is left to the type."""

    holds: Callable[[Any], bool]
    must: str


COUNT = Rule(lambda x: x >= 1, "must be at least 1")
COUNTS = Rule(lambda xs: all(x >= 1 for x in xs), "each must be at least 1")
POSITIVE = Rule(lambda x: x > 0, "must be above 0")
SHARE = Rule(lambda x: 0 <= x <= 1, "must be in [0, 1]")

# By the last part of the key, for every algorithm.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "total_timesteps num_envs threads eval_every eval_episodes save_every log_every max_episode_steps num_steps "
        "n_step update_epochs num_minibatches num_workers processes episodes cg_steps backtrack_steps buffer_size "
        "batch_size learning_starts policy_delay".split(),
        COUNT,
    ),
    **dict.fromkeys(("hidden_sizes", "value_hidden_sizes"), COUNTS),
    **dict.fromkeys(
        "learning_rate value_learning_rate adaptive_lr_kl adam_eps opt_eps max_grad_norm clip_coef clip_coef_high "
        "vf_clip_coef target_kl kl_coef kl_coef_target clip_obs clip_reward policy_gain value_gain max_kl "
        "step_size utd_ratio actor_lr critic_lr advantage_lr value_lr alpha alpha_init alpha_lr noise_std target_noise "
        "target_noise_clip".split(),
        POSITIVE,
    ),
    **dict.fromkeys(("gamma", "gae_lambda", "per_beta", "ou_theta"), SHARE),
    **dict.fromkeys(
        ("tau", "per_alpha", "fisher_fraction"), Rule(lambda x: 0 < x <= 1, "must be above 0, and at most 1")
    ),
    **dict.fromkeys(("damping", "cg_tolerance", "accept_ratio"), Rule(lambda x: x >= 0, "must not be negative")),
    "backtrack_factor": Rule(lambda x: 0 < x < 1, "must be above 0 and below 1"),
    **dict.fromkeys(("rms_prop_alpha", "noise_correlation"), Rule(lambda x: 0 <= x < 1, "must be in [0, 1)")),
    "vf_coef": Rule(lambda x: x >= 0, "must not be negative"),
    "dual_clip": Rule(lambda x: x > 1, "must be above 1"),
    "compile": Rule(lambda x: isinstance(x, bool) or x == "auto", "must be auto, true or false"),
    "capture": Rule(
        lambda x: isinstance(x, bool) or x in ("auto", "rollout", "update"),
        "must be auto, true, false, rollout or update",
    ),
    "seed": Rule(lambda x: 0 <= x < 2**63, "must be from 0 to 2^63 - 1"),
    "device": Rule(lambda x: re.fullmatch(r"cpu|cuda(:\d+)?", x) is not None, "must be cpu, cuda or cuda:<number>"),
    "checkpoint": Rule(lambda x: re.fullmatch(r"last|best|\d+", x) is not None, "must be last, best or a step"),
}
OVER_ENVS = ("leave_one_out", "min_variance", "min_variance_per_parameter")  # baselines
CHOICES: dict[str, tuple[str, ...]] = {
    "advantage": ("gae", "td_lambda", "n_step", "td0", "monte_carlo"),
    "norm_adv": ("minibatch", "batch"),
    "baseline": ("mean", "leave_one_out", "time", "value", "min_variance", "min_variance_per_parameter"),
    "optimizer": ("rmsprop", "adam"),
    "body": ("auto", "mlp", "cnn"),
    "activation": ("tanh", "relu", "elu", "silu", "gelu"),
    "init": ("orthogonal", "xavier"),
    "distribution": ("gaussian", "squashed", "beta"),
    "backend": ("gymnasium", "envpool", "torch"),
    "noise": ("gaussian", "ou"),
}


def word(key: str, value: object) -> str:
    """`key=value` as the command line takes it."""
    if value is None or isinstance(value, bool):
        value = json.dumps(value)
    return f"{key}={str(value).replace(' ', '') if isinstance(value, list) else value}"


def wrong_values(config: Any, keys: dict[str, schema.Key]) -> Iterator[Problem]:
    """Values out of their range or choice, each alone."""
    for key, value in schema.leaves(config):
        name = key.rpartition(".")[2]
        if key == "env.id" or value is None:
            continue
        default = (word(key, keys[key].default),) if key in keys else ()
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(key, value, "must be finite", default)
        elif name in RULES and not RULES[name].holds(value):
            yield Problem(key, value, RULES[name].must, default)
        elif name in CHOICES and isinstance(value, str) and value not in CHOICES[name]:
            near = difflib.get_close_matches(value, CHOICES[name], n=1)
            why = f"must be {' or '.join(CHOICES[name])}" + (", or null" if "None" in keys[key].type else "")
            yield Problem(key, value, why, (word(key, near[0]),) if near else default)


def wrong_together(config: RunConfig) -> Iterator[Problem]:
    """Values that do not fit each other."""
    algo = vars(config.algo)
    num_steps = algo.get("num_steps", 1)
    rollout = num_steps * config.num_envs
    size = f"num_steps * num_envs = {num_steps} * {config.num_envs} = {rollout}"
    parts = algo.get("num_minibatches", 1) if values_states(config.algo) else 1
    normalised = algo.get("norm_adv")
    least = 2 if normalised == "minibatch" else 1  # transitions of a minibatch

    if normalised and rollout < 2:
        why = f"one transition ({size}) cannot be normalised"
        yield Problem("algo.num_steps", num_steps, why, ("algo.num_steps=16",))
    elif rollout % parts or rollout // parts < least:
        why = f"does not divide the rollout of {size}"
        if rollout % parts == 0:
            why = f"leaves minibatches of one transition ({size}), whose advantages cannot be normalised"
        fitting = (n for n in divisors(rollout) if rollout // n >= least)
        nearest = min(fitting, key=lambda n: abs(n - parts))
        yield Problem("algo.num_minibatches", parts, why, (f"algo.num_minibatches={nearest}",))
    if config.total_timesteps < rollout:
        why = f"is less than one rollout of {size}"
        yield Problem("total_timesteps", config.total_timesteps, why, (f"total_timesteps={rollout}",))
    for key in ("target_kl", "adaptive_lr_kl", "kl_coef"):
        epochs = algo.get("update_epochs", 0)
        if algo.get(key) is not None and epochs == 1 and (parts == 1 or key == "target_kl"):
            why = f"leaves algo.{key} nothing to judge: the KL is measured before a gradient step, from the first on"
            yield Problem("algo.update_epochs", epochs, why, ("algo.update_epochs=2",))
    if algo.get("clip_coef", 0.0) is None:
        for key in ("clip_coef_high", "dual_clip"):
            if algo[key] is not None:
                why = "does nothing where algo.clip_coef=null switches clipping off"
                yield Problem(f"algo.{key}", algo[key], why, (f"algo.{key}=null",))
    if algo.get("baseline") in OVER_ENVS and config.num_envs == 1:
        why = f"leaves algo.baseline={algo['baseline']}, which averages over the other envs, none of them"
        yield Problem("num_envs", 1, why, ("num_envs=4",))
    if config.compile is True and schema.algo_name(config.algo) == "dpg":
        yield Problem("compile", True, "algo=dpg has no loss whose step could be compiled", ("compile=false",))
    network = algo.get("network")
    if getattr(network, "shared", False) and network.value_hidden_sizes is not None:
        why = "does nothing where algo.network.shared=true gives both networks one body"
        key = "algo.network.value_hidden_sizes"
        yield Problem(key, network.value_hidden_sizes, why, (f"{key}=null",))


def wrong_episodes(config: RunConfig) -> Iterator[Problem]:
    """Rollouts that may hold no whole episode, for an algorithm that learns from whole ones."""
    from pgrl import env_ids

    limit = config.env.max_episode_steps or env_ids.time_limit(config.env.id, config.env.backend)
    num_steps = vars(config.algo).get("num_steps", 1)
    if "baseline" in vars(config.algo) and limit is not None and num_steps < limit:
        why = f"may hold no whole episode of {config.env.id}, which can take {limit} steps, and REINFORCE needs one"
        parts = vars(config.algo)["num_minibatches"] if values_states(config.algo) else 1
        fitting = next(n for n in range(limit, 2 * limit + parts) if n * config.num_envs % parts == 0)
        yield Problem("algo.num_steps", num_steps, why, (f"algo.num_steps={fitting}",))


def wrong_replay(config: RunConfig) -> Iterator[Problem]:
    """A memory, or a run, too small for what is to be learnt from it."""
    algo = vars(config.algo)
    if "buffer_size" not in algo:
        return
    rollout = algo["num_steps"] * config.num_envs
    steps = config.total_timesteps // rollout * rollout
    starts, ratio, delay = algo["learning_starts"], algo["utd_ratio"], algo["policy_delay"]
    held = algo["buffer_size"] // config.num_envs * config.num_envs  # whole steps of all envs are kept
    for what, least in (
        (f"one rollout of num_steps * num_envs = {rollout}", rollout),
        (f"one batch, algo.batch_size={algo['batch_size']}", algo["batch_size"]),
        (f"algo.learning_starts={starts} transitions", starts),
        (f"algo.n_step={algo['n_step']} steps of {config.num_envs} envs", algo["n_step"] * config.num_envs),
    ):
        if held < least:
            enough = 10 * max(algo["batch_size"], starts, rollout, algo["n_step"] * config.num_envs)
            why = f"cannot hold {what}"
            yield Problem("algo.buffer_size", algo["buffer_size"], why, (f"algo.buffer_size={enough}",))
            break
    if starts < algo["batch_size"]:
        why = f"is less than one batch, algo.batch_size={algo['batch_size']}, which would repeat its transitions"
        yield Problem("algo.learning_starts", starts, why, (f"algo.learning_starts={algo['batch_size']}",))
    elif (steps - starts) * ratio < delay:
        why = f"leaves no gradient step after algo.learning_starts={starts}, with algo.utd_ratio={ratio:g} for a step"
        if delay > 1:
            why = why.replace("gradient step", "step of the policy") + f" and algo.policy_delay={delay}"
        enough = starts + 10 * max(rollout, math.ceil(delay / ratio))
        yield Problem("total_timesteps", config.total_timesteps, why, (f"total_timesteps={enough}",))
    if algo.get("noise") == "ou" and algo["num_steps"] > 1:
        why = "goes with algo.num_steps=1: it begins anew with each episode, whose end is seen after a rollout"
        yield Problem("algo.noise", "ou", why, ("algo.num_steps=1",))


def wrong_processes(config: RunConfig) -> Iterator[Problem]:
    """Envs that are to be stepped by several processes, and cannot be."""
    processes, use = config.env.processes, 1
    if processes == 1:
        return
    if config.env.backend != "gymnasium":
        why = f"is for Gymnasium's envs; those of env.backend={config.env.backend} are stepped together already"
    elif hasattr(config.algo, "num_workers"):
        why = "does not go with algo=a3c, whose workers are processes, each with envs of its own"
    elif processes > config.num_envs:
        why, use = f"is more than there are envs, num_envs={config.num_envs}", config.num_envs
    else:
        return
    yield Problem("env.processes", processes, why, (f"env.processes={use}",))


def wrong_asynchronous(config: RunConfig) -> Iterator[Problem]:
    """What worker processes that share their parameters cannot do."""
    if not hasattr(config.algo, "num_workers"):
        return
    if config.device != "cpu":
        why = "algo=a3c is for the CPU: its workers share parameters in the main memory"
        yield Problem("device", config.device, why, ("device=cpu",))
    if config.compile is True:
        why = "algo=a3c changes parameters that other processes change, which no compiled step may"
        yield Problem("compile", True, why, ("compile=false",))
    if config.profile:
        why = "algo=a3c acts and learns in processes of its own, whose time is not taken"
        yield Problem("profile", True, why, ("profile=false",))
    if config.algo.norm_value:
        why = "algo=a3c cannot rescale the value's last layer, which other workers change at the same time"
        yield Problem("algo.norm_value", True, why, ("algo.norm_value=false",))


def wrong_capture(config: RunConfig) -> Iterator[Problem]:
    """What is to be captured in CUDA graphs, and cannot be."""
    if config.capture in ("auto", False):
        return
    if config.device == "cpu":
        why = "captures CUDA graphs, which need device=cuda"
        yield Problem("capture", config.capture, why, ("capture=false",))
        return
    if config.profile:
        why = f"{word('capture', config.capture)} leaves a CUDA graph, which has no parts whose time could be taken"
        yield Problem("profile", True, why, ("profile=false",))
    found, parts = obstacles(config), ("rollout", "update")
    refused = [part for part in parts if part in found and config.capture in (True, part)]
    if refused:
        why = ", and ".join(f"{part}s cannot be captured, for {found[part]}" for part in refused)
        left = [part for part in parts if part not in found]
        yield Problem("capture", config.capture, why, (word("capture", left[0] if left else False),))


def divisors(n: int) -> list[int]:
    """All divisors of a whole number above 0."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return [*small, *(n // k for k in small)]


def without_effect(config: RunConfig, given: dict[str, str]) -> Iterator[str]:
    """A note for each key of a command that changes nothing, given the rest of the configuration."""
    for key, value in given.items():
        if key in NEEDS and not NEEDS[key].counts(config):
            yield f"note: {key}={value} changes nothing without {NEEDS[key].words}"


def wrong_env(env_id: str, backend: str) -> Iterator[Problem]:
    """An env that does not exist, or whose package is missing."""
    import gymnasium

    from pgrl import env_ids

    if backend == "envpool":
        yield from wrong_in_envpool(env_id)
        return
    try:
        missing = env_ids.missing_package(env_id)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        why, near = "there is no such environment", env_ids.near_registered(env_id)
        if isinstance(error, ImportError):
            why = f"its package cannot be imported: {error}"
        elif near:
            why += f"; did you mean {' or '.join(near)}"
        yield Problem("env", env_id, f"{why} (--envs lists all)", (f"env={[*near, 'CartPole-v1'][0]}",))
        return
    if missing is not None:
        module, package = missing
        yield Problem("env", env_id, f"needs {module}, which is not installed", command=f"pip install {package}")


def wrong_in_envpool(env_id: str) -> Iterator[Problem]:
    """An env that EnvPool does not have, or EnvPool missing."""
    import gymnasium

    from pgrl import env_ids

    try:
        known = env_ids.envpool_ids()
    except ImportError as error:
        why = f"EnvPool cannot be imported: {error}"
        yield Problem("env.backend", "envpool", why, command="pip install envpool")
        return
    if env_id in known:
        try:
            env_ids.time_limit(env_id, "envpool")
        except ImportError as error:
            why = f"EnvPool cannot load it: {error}".rstrip(".")
            yield Problem("env", env_id, why, ("env=CartPole-v1",))
        return
    if ":" in env_id or env_id in gymnasium.registry:
        why = f"EnvPool has no {env_id}, which is one of Gymnasium's"
        yield Problem("env.backend", "envpool", why, ("env.backend=gymnasium",))
        return
    near = env_ids.near_ids(env_id, ids=known)
    why = "EnvPool has no such environment" + (f"; did you mean {' or '.join(near)}" if near else "")
    yield Problem("env", env_id, why, (f"env={[*near, 'CartPole-v1'][0]}",))


def wrong_device(device: str) -> Iterator[Problem]:
    """A GPU that is not there."""
    if not device.startswith("cuda"):
        return
    why = "there is no NVIDIA driver on this machine"
    try:
        ctypes.CDLL("libcuda.so.1")  # torch is imported only if this says that there may be a GPU
    except OSError:
        pass
    else:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) < count:
            return
        why = f"torch {torch.__version__} sees {count} GPUs"
    yield Problem("device", device, f"CUDA is not available: {why}", ("device=cpu",))


def wrong_compile() -> Iterator[Problem]:
    """Compilation without a compiler."""
    if not compilers():
        yield Problem("compile", True, "needs a C++ compiler, g++ or clang++, and there is none", ("compile=false",))


def wrong_folder(run_dir: Path, given: bool) -> Iterator[Problem]:
    """A folder for a new run that exists, or that cannot be made."""
    if given and is_unused(run_dir):
        return
    if given and os.path.lexists(run_dir):
        if is_run(run_dir) and read_status(run_dir).get("state") != "done":
            command = f"python -m pgrl.train {shlex.quote(f'resume={run_dir}')}"
            yield Problem("run_dir", run_dir, "is the folder of a run, which resume= continues", command=command)
        else:
            why = "exists already, and two runs never share a folder"
            yield Problem("run_dir", run_dir, why, (f"run_dir={free_name(run_dir)}",) if run_dir.name else ())
        return
    parent = next(p for p in run_dir.absolute().parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "is not writable" if parent.is_dir() else "is not a folder"
        use = () if given else ("run_dir=/tmp/pgrl-run",)
        yield Problem("run_dir", run_dir, f"cannot be made: {parent} {why}", use)


def free_name(path: Path) -> Path:
    """A path beside `path` where nothing is yet."""
    return next(p for n in range(2, 10_000) if not os.path.lexists(p := path.with_name(f"{path.name}-{n}")))


def check(config: RunConfig, keys: dict[str, schema.Key]) -> list[Problem]:
    """All that is wrong with the configuration of a new run, before torch is imported."""
    problems = list(wrong_values(config, keys))
    if not problems:
        problems += wrong_together(config)
        problems += wrong_replay(config)
        problems += wrong_asynchronous(config)
        problems += wrong_processes(config)
        problems += wrong_capture(config)
    problems += wrong_env(config.env.id, config.env.backend)
    if not problems:
        problems += wrong_episodes(config)
    if not any(p.key == "device" for p in problems):
        problems += wrong_device(config.device)
    if config.compile is True and not any(p.key == "compile" for p in problems):
        problems += wrong_compile()
    problems += wrong_folder(Path("runs/new" if config.run_dir is None else config.run_dir), config.run_dir is not None)
    return problems
