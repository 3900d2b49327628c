"""Running statistics: the normaliser of observations and values, and the scaler of rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgrl.functional import discounted_sum


class RunningNorm(nn.Module):
    """(x - mean) / std clipped to [-clip, clip], with statistics of everything `update` has seen, in float64.

    x is [..., *shape], any leading dimensions. Batches are merged by Chan et al. 1979, equation 2.1. Until the first
    `update` it only clips. The float32 scale and shift that `forward` uses are derived in `refresh`.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float | None = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.clip, self.eps = clip, eps
        self.register_buffer("scale", torch.ones(shape), persistent=False)
        self.register_buffer("shift", torch.zeros(shape), persistent=False)
        self.register_load_state_dict_post_hook(RunningNorm._loaded)

    scale: Tensor
    shift: Tensor

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge the batch x [..., *shape]."""
        x = x.reshape(-1, *self.mean.shape).double()
        var, mean = torch.var_mean(x, 0, unbiased=False)
        self.merge(mean, var, float(len(x)))

    def merge(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Merge a batch of `count` rows given by its mean and (biased) variance."""
        total = self.count + count
        delta = mean - self.mean
        m2 = self.var * self.count + var * count + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)
        self.refresh()

    def _loaded(self, _: object) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Derive `scale` and `shift` from the statistics."""
        scale = (self.var + self.eps).rsqrt()
        self.scale.copy_(scale)
        self.shift.copy_(-self.mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, x, self.scale)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of an unclipped forward: x * std + mean."""
        return (x - self.shift) / self.scale


class RewardScaler(nn.Module):
    """Rewards divided by the running standard deviation of the discounted return, without shifting them.

    R <- gamma * R + r, reset at the episode's end; r / std(R). Engstrom et al. 2020 (arXiv 2005.12729), section 3,
    option 2 and algorithm 2. The statistics of a rollout are merged before it is scaled.
    """

    carry: Tensor

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.returns = RunningNorm((), clip=None)
        self.gamma = gamma
        self.register_buffer("carry", torch.zeros(num_envs, dtype=torch.float64))  # gamma * R, 0 after an end

    @torch.no_grad()
    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """reward [T, B] float32, done [T, B] bool -> scaled reward [T, B]."""
        keep = self.gamma * (~done).double()
        x = reward.double()
        x[0] += self.carry
        decay = torch.cat([torch.zeros_like(keep[:1]), keep[:-1]])
        running = discounted_sum(x.flip(0), decay.flip(0)).flip(0)
        self.carry.copy_(running[-1] * keep[-1])
        self.returns.update(running)
        return reward * self.returns.scale
