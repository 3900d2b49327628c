"""docs/algorithms.md lists every key of every algorithm with its default."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgrl.agents import (
    A2CConfig,
    A3CConfig,
    DDPGConfig,
    DPGConfig,
    NPGConfig,
    PPOConfig,
    REINFORCEConfig,
    SACConfig,
    TRPOConfig,
)
from pgrl.agents.critic import CriticConfig
from pgrl.agents.dpg import DPGNetworkConfig
from pgrl.agents.off_policy import OffPolicyConfig
from pgrl.agents.on_policy import AdvantageConfig, OnPolicyConfig
from pgrl.networks import NetworkConfig, PolicyConfig
from pgrl.q_networks import OffPolicyNetworkConfig

PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
HEADINGS: dict[str, type] = {
    "Every on-policy algorithm": OnPolicyConfig,
    "Advantages": AdvantageConfig,
    "A critic of its own": CriticConfig,
    "Networks: `algo.network.*`": NetworkConfig,
    "Policies: `algo.policy.*`": PolicyConfig,
    "PPO": PPOConfig,
    "A2C": A2CConfig,
    "REINFORCE": REINFORCEConfig,
    "NPG": NPGConfig,
    "TRPO": TRPOConfig,
    "A3C": A3CConfig,
    "Every algorithm with replay": OffPolicyConfig,
    "Networks with replay: `algo.network.*`": OffPolicyNetworkConfig,
    "DDPG": DDPGConfig,
    "SAC": SACConfig,
    "DPG": DPGConfig,
    "DPG's network: `algo.network.*`": DPGNetworkConfig,
}


def test_tuned_files_are_listed() -> None:
    section = PAGE.split("## Tuned settings\n", 1)[1].split("\n## ", 1)[0]
    mujoco = re.sub(r"\s+", " ", section.split(" v4 and v5 of ", 1)[1].rstrip(".\n")).replace(" and ", ", ")
    folder = Path(__file__).parents[1] / "configs/tuned"
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\w.+) \|$", section, re.MULTILINE)
    assert {name for names, _ in rows for name in names.strip("`").split("`, `")} == {p.name for p in folder.iterdir()}
    for names, envs in rows:
        for name in names.strip("`").split("`, `"):
            there = {path.relative_to(folder / name).as_posix() for path in (folder / name).rglob("*-v*.yaml")}
            assert {re.sub(r"-v\d+\.yaml$", "", path) for path in there} == set(
                envs.replace("MuJoCo", mujoco).split(", ")
            )
            assert {f"{env}-v{n}.yaml" for env in mujoco.split(", ") if "MuJoCo" in envs for n in (4, 5)} <= there


def table(heading: str) -> dict[str, Any]:
    """The keys and defaults under a heading."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    return {key: yaml.safe_load(re.sub(r"^(\d+)(e-?\d+)$", r"\1.0\2", default)) for key, default in rows}


def defaults(cls: type) -> dict[str, Any]:
    """The keys and defaults of a config class that it does not merely inherit, without nested configs."""
    inherited = {key: value for base in cls.__mro__[1:-1] for key, value in defaults(base).items()}
    found = {}
    for f in fields(cls):
        value = f.default if f.default_factory is MISSING else f.default_factory()
        if not is_dataclass(value) and not (f.name in inherited and inherited[f.name] == value):
            found[f.name] = value
    return found


@pytest.mark.parametrize("heading", HEADINGS)
def test_keys_and_defaults(heading: str) -> None:
    assert table(heading) == defaults(HEADINGS[heading])
