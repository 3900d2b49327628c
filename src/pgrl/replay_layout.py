"""Where the parts of a transition lie in the bytes of a row, and views of them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import torch
from torch import Tensor

from pgrl.data import action_rows

SEGMENTS, SEGMENT_BYTES = 64, 2**18  # a full ring has about so many segments, or fewer of at least so many bytes


class Layout(NamedTuple):
    """Where things lie in the bytes of a row, and how many rows there are."""

    capacity: int  # rows in time; times num_envs: transitions
    num_envs: int
    obs_shape: tuple[int, ...]
    obs_dtype: torch.dtype
    obs_bytes: int
    action_shape: tuple[int, ...]
    action_dtype: torch.dtype  # as stored: float32 or int32
    action_at: int
    reward_at: int  # then the discount, gamma or 0, and the link
    width: int  # bytes
    n_step: int

    @property
    def size(self) -> int:
        """Times in the ring: those it holds, and the head."""
        return self.capacity + 1

    @property
    def length(self) -> int:
        """Rows of an env: the ring, and its first n rows once more, so that n rows follow every row."""
        return self.size + self.n_step

    @property
    def segment(self) -> int:
        """Times in a segment of a checkpoint."""
        return max(-(-self.capacity // SEGMENTS), -(-SEGMENT_BYTES // (self.num_envs * self.width)))


def layout(
    capacity: int, num_envs: int, obs_space: spaces.Box, action_space: spaces.Space[Any], n_step: int = 1
) -> Layout:
    """The layout for `capacity` transitions of `num_envs` envs, rounded down to whole times, but at least one."""
    obs_dtype = torch.uint8 if obs_space.dtype == "uint8" else torch.float32
    obs_bytes = torch.Size(obs_space.shape).numel() * obs_dtype.itemsize
    shape, dtype = action_rows(action_space)
    if not dtype.is_floating_point:
        dtype = torch.int32
    action_at = -(-obs_bytes // 4) * 4
    reward_at = action_at + torch.Size(shape).numel() * dtype.itemsize
    times = max(1, capacity // num_envs)
    return Layout(
        *(times, num_envs, obs_space.shape, obs_dtype, obs_bytes, shape, dtype),
        *(action_at, reward_at, reward_at + 12, n_step),
    )


def field(rows: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What lies from byte `at` on in rows [..., width], as [..., *shape]: a view."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return rows[..., at : at + size].view(dtype).view(*rows.shape[:-1], *shape)


def columns(data: Tensor, count: int, width: int, at: int, shape: tuple[int, ...]) -> Tensor:
    """Columns of contiguous data [count, width] from `at` on, as [count, *shape]: a view, in one operation."""
    return data.as_strided((count, *shape), (width, *strides(shape)), at)


@cache
def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
