"""What `capture=auto` means for a run: which of its parts a CUDA graph can repeat, and what stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgrl.config import schema

if TYPE_CHECKING:
    from pgrl.config.schema import RunConfig

ACT = ("a2c", "npg", "ppo", "reinforce", "trpo")  # whose acting asks the host nothing
LEARN = ("a2c", "ddpg", "ppo", "sac")  # whose update is a function of tensors, or the steps that it takes are


def obstacles(config: RunConfig) -> dict[str, str]:
    """What of a run on CUDA cannot be captured, `rollout` or `update`, and why."""
    algo, found = schema.algo_name(config.algo), {}
    if config.env.backend != "torch":
        found["rollout"] = f"env.backend={config.env.backend} steps its envs on the CPU"
    elif algo not in ACT:
        found["rollout"] = f"algo={algo} decides on the CPU how it acts"
    target_kl = vars(config.algo).get("target_kl")
    if algo not in LEARN:
        found["update"] = f"algo={algo} decides on the CPU how it learns"
    elif target_kl is not None:
        found["update"] = f"algo.target_kl={target_kl:g} ends an update by what the CPU reads"
    return found


def decide_capture(config: RunConfig) -> tuple[bool | str, str]:
    """What is captured (`rollout`, `update`, True: both), and why; where that is given, there is nothing to say."""
    if config.device == "cpu":
        return False, ""
    if config.capture != "auto":
        return config.capture, ""
    if config.profile:
        return False, "nothing is captured, for a CUDA graph has no parts whose time profile=true could take"
    found = obstacles(config)
    match found:
        case {"rollout": rollout, "update": update}:
            return False, f"nothing is captured, for {rollout}, and {update}"
        case {"rollout": why}:
            what = "updates, and acting where the GPU does it, are captured as CUDA graphs"
            return "update", f"{what}; whole rollouts are not, for {why}"
        case {"update": why}:
            return "rollout", f"rollouts are captured as a CUDA graph; updates are not, for {why}"
    return True, "rollouts and updates are captured as two CUDA graphs"
