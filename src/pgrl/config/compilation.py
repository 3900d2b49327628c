"""What `compile=auto` means for a run: whether so many gradient steps repay a compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgrl.config import schema
from pgrl.config.checks import values_states
from pgrl.native import compilers

if TYPE_CHECKING:
    from pgrl.config.schema import RunConfig

# Gradient steps that repay a compilation with an empty cache, 9 to 17 s: scripts/bench_compile.py, docs/performance.md.
# Both sides grow with the processor's slowness. A3C and DPG have nothing to compile.
REPAID = {
    "a2c": 22_000,
    "ddpg": 12_000,
    "npg": 90_000,
    "ppo": 45_000,
    "reinforce": 110_000,
    "sac": 16_000,
    "trpo": 90_000,
}


def gradient_steps(config: RunConfig) -> int:
    """How many a run takes, if none is left out by an early stop."""
    algo: dict[str, Any] = vars(config.algo)
    if "utd_ratio" in algo:
        return int(max(0, config.total_timesteps - algo["learning_starts"]) * algo["utd_ratio"])
    updates = config.total_timesteps // (algo["num_steps"] * config.num_envs)
    if values_states(config.algo):
        updates *= algo.get("update_epochs", 1) * algo.get("num_minibatches", 1)
    return int(updates)


def decide_compile(config: RunConfig) -> tuple[bool, str]:
    """Whether a run's gradient steps are compiled, and why; where that is given, there is nothing to say."""
    if isinstance(config.compile, bool):
        return config.compile, ""
    steps, enough = gradient_steps(config), REPAID.get(schema.algo_name(config.algo))
    if enough is None:
        return False, ""
    if config.device != "cpu":
        return False, f"not compiled: how many gradient steps repay it on {config.device} was not measured"
    if steps < enough:
        return False, f"not compiled, for {steps:,} gradient steps would not repay it; {enough:,} would"
    if not compilers():
        return False, "not compiled: there is no C++ compiler, g++ or clang++, with which this run would be faster"
    return True, f"compiled, for {steps:,} gradient steps repay it; the first waits for the compiler"
