"""The algorithms: from the type of a config to the agent it configures."""

from pgrl.agents.a2c import A2C, A2CConfig
from pgrl.agents.a3c import A3C, A3CConfig
from pgrl.agents.base import Agent, Setting
from pgrl.agents.dpg import DPG, DPGConfig
from pgrl.agents.npg import NPG, NPGConfig
from pgrl.agents.ppo import PPO, PPOConfig
from pgrl.agents.reinforce import REINFORCE, REINFORCEConfig
from pgrl.agents.trpo import TRPO, TRPOConfig

AGENTS: dict[type, type[Agent]] = {
    REINFORCEConfig: REINFORCE,
    A2CConfig: A2C,
    A3CConfig: A3C,
    NPGConfig: NPG,
    TRPOConfig: TRPO,
    PPOConfig: PPO,
    DPGConfig: DPG,
}

__all__ = [
    "A2C",
    "A3C",
    "AGENTS",
    "DPG",
    "NPG",
    "PPO",
    "REINFORCE",
    "TRPO",
    "A2CConfig",
    "A3CConfig",
    "Agent",
    "DPGConfig",
    "NPGConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "Setting",
    "TRPOConfig",
]
