"""A value function that learns by itself, beside a policy that takes steps of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgrl import functional
from pgrl.agents.base import Setting, generator
from pgrl.data import minibatches, random_order, restore_generator
from pgrl.networks import ActorCritic
from pgrl.optim import Adam, GradientStep


@dataclass
class CriticConfig:
    """Keys of the algorithms whose value function is fitted apart from the policy."""

    update_epochs: int = 10  # passes of the value function over a rollout; Engstrom et al. 2020, appendix A.1
    num_minibatches: int = 32  # parts of a pass; must divide num_steps * num_envs; Engstrom et al. 2020, appendix A.1
    shuffle: bool = True  # a fresh random order each pass
    value_learning_rate: float = 1e-3  # Adam's; Tianshou's and SB3-contrib's, for TRPO
    anneal_lr: bool = True  # learning rates linearly to 0
    adam_eps: float = 1e-5  # Engstrom et al. 2020, appendix A.1
    max_grad_norm: float | None = None  # of the value's gradient, and of REINFORCE's policy gradient; null: off
    vf_clip_coef: float | None = (
        None  # values within +- this of the old ones; null: off; Engstrom et al. 2020, option 1
    )


class Batch(NamedTuple):
    """What the value loss takes; [T, B, ...], then [N, ...]."""

    obs: Tensor
    value: Tensor  # as it was before
    returns: Tensor


METRICS = ("losses/value_loss", "losses/value_grad_norm")


class Critic:
    """Fits `net.value` to returns: epochs of minibatches with Adam.

    Where policy and value share a body only the value's own layer learns: steps on the body would move the policy.
    """

    def __init__(self, config: CriticConfig, net: ActorCritic, setting: Setting) -> None:
        self.config, self.net = config, net
        self.order = generator(setting.seed, 1, setting.device)
        self.step = GradientStep(
            self.loss,
            [(net.value_parameters(), 1.0)],
            partial(Adam, eps=config.adam_eps),
            max_grad_norm=config.max_grad_norm,
            compiled=setting.compiled,
        )
        self.updates = torch.zeros((), dtype=torch.int64)

    def fit(self, obs: Tensor, value: Tensor, returns: Tensor, progress: float) -> dict[str, Tensor]:
        """Learn from obs [T, B, *obs], the present values and the returns, both [T, B]."""
        config = self.config
        lr = torch.tensor(config.value_learning_rate * (1.0 - progress if config.anneal_lr else 1.0), device=obs.device)
        batch = Batch(*(x.flatten(0, 1) for x in (obs, value, returns)))
        steps = []
        for _ in range(config.update_epochs):
            order = random_order(len(batch[0]), self.order) if config.shuffle else None
            parts = minibatches(batch, config.num_minibatches, order)
            steps += [self.step(Batch(*part), lr, ()) for part in zip(*parts, strict=True)]
        self.updates += len(steps)
        means = (torch.stack(x).mean() for x in zip(*steps, strict=True))
        return {
            **dict(zip(METRICS, means, strict=True)),
            "losses/explained_variance": functional.explained_variance(value, returns),
            "charts/value_learning_rate": lr,
        }

    def loss(self, batch: Batch, _: tuple[()]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss [] of a minibatch [N, ...], which is also its metric."""
        value = self.net.value(batch.obs)
        if self.config.vf_clip_coef is None:
            loss = functional.value_loss(value, batch.returns)
        else:
            loss = functional.clipped_value_loss(value, batch.value, batch.returns, self.config.vf_clip_coef)
        return loss, (loss,)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step.state_dict(), "order": self.order.get_state(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state["step"])
        restore_generator(self.order, state["order"])
        self.updates.copy_(state["updates"])
