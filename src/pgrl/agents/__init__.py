"""The algorithms: from the type of a config to the agent it configures."""

from pgrl.agents.a2c import A2C, A2CConfig
from pgrl.agents.base import Agent, Setting
from pgrl.agents.npg import NPG, NPGConfig
from pgrl.agents.ppo import PPO, PPOConfig
from pgrl.agents.reinforce import REINFORCE, REINFORCEConfig
from pgrl.agents.trpo import TRPO, TRPOConfig

AGENTS: dict[type, type[Agent]] = {
    REINFORCEConfig: REINFORCE,
    A2CConfig: A2C,
    NPGConfig: NPG,
    TRPOConfig: TRPO,
    PPOConfig: PPO,
}

__all__ = [
    "A2C",
    "AGENTS",
    "NPG",
    "PPO",
    "REINFORCE",
    "TRPO",
    "A2CConfig",
    "Agent",
    "NPGConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "Setting",
    "TRPOConfig",
]
