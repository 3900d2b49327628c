"""The algorithms: from the type of a config to the agent it configures."""

from pgrl.agents.a2c import A2C, A2CConfig
from pgrl.agents.a3c import A3C, A3CConfig
from pgrl.agents.base import Agent, Setting
from pgrl.agents.ppo import PPO, PPOConfig

AGENTS: dict[type, type[Agent]] = {PPOConfig: PPO, A2CConfig: A2C, A3CConfig: A3C}

__all__ = ["A2C", "A3C", "AGENTS", "PPO", "A2CConfig", "A3CConfig", "Agent", "PPOConfig", "Setting"]
