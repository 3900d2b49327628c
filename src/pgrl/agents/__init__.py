"""The algorithms: from the type of a config to the agent it configures."""

from pgrl.agents.a2c import A2C, A2CConfig
from pgrl.agents.a3c import A3C, A3CConfig
from pgrl.agents.base import Agent, Setting
from pgrl.agents.ddpg import DDPG, DDPGConfig
from pgrl.agents.dpg import DPG, DPGConfig
from pgrl.agents.npg import NPG, NPGConfig
from pgrl.agents.ppo import PPO, PPOConfig
from pgrl.agents.reinforce import REINFORCE, REINFORCEConfig
from pgrl.agents.sac import SAC, SACConfig
from pgrl.agents.trpo import TRPO, TRPOConfig

AGENTS: dict[type, type[Agent]] = {
    REINFORCEConfig: REINFORCE,
    A2CConfig: A2C,
    A3CConfig: A3C,
    NPGConfig: NPG,
    TRPOConfig: TRPO,
    PPOConfig: PPO,
    DPGConfig: DPG,
    DDPGConfig: DDPG,
    SACConfig: SAC,
}

__all__ = [
    "A2C",
    "A3C",
    "AGENTS",
    "DDPG",
    "DPG",
    "NPG",
    "PPO",
    "REINFORCE",
    "SAC",
    "TRPO",
    "A2CConfig",
    "A3CConfig",
    "Agent",
    "DDPGConfig",
    "DPGConfig",
    "NPGConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "SACConfig",
    "Setting",
    "TRPOConfig",
]
