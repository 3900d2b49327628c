"""What agents see of an env's spaces, and how their actions become the env's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pgrl.errors import UserError

FLAT = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def obs_rows(env_id: str, space: spaces.Space[Any]) -> spaces.Box:
    """The space of the rows an agent sees: images stay uint8, other Boxes become float32, the rest is flattened.

    An image is a uint8 Box of three dimensions. Discrete parts become one-hot vectors. UserError if the space is, or
    holds, anything but Box, Discrete, MultiDiscrete, MultiBinary, Tuple and Dict.
    """
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return spaces.Box(0, 255, space.shape, np.uint8)
    if isinstance(space, spaces.Box):
        return spaces.Box(-np.inf, np.inf, space.shape or (1,), np.float32)
    if can_flatten(space):
        return spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
    raise UserError(
        f"env={env_id}: its observations, {space}, are not supported.\nSupported are Box (any shape and type), "
        "Discrete, MultiDiscrete, MultiBinary, and Tuple or Dict of these.\nWrap the env so that it gives one of them "
        "(gymnasium.wrappers.TransformObservation), register the wrapped env, and use env=your_package:YourEnv-v0"
    )


def can_flatten(space: spaces.Space[Any]) -> bool:
    """Whether observations of `space` are numbers of a fixed count. Gymnasium flattens text too, to letters."""
    if isinstance(space, spaces.Dict):
        return all(can_flatten(part) for part in space.values())
    if isinstance(space, spaces.Tuple):
        return all(can_flatten(part) for part in space)
    return isinstance(space, FLAT)


def to_row(space: spaces.Space[Any]) -> Callable[[Any], Any] | None:
    """What turns an observation of `space` into a row of `obs_rows`; None where it is one as it stands."""
    return None if isinstance(space, spaces.Box) else partial(spaces.flatten, space)


class ToEnv:
    """Turns an agent's actions into an env's; UserError if the space of these is not supported.

    An agent's are as `pgrl.data.action_rows` says: flat, Box in the env's units but not within its bounds, choices
    counted from 0. An env's are in bounds, and in its shape, type and count.
    """

    def __init__(self, env_id: str, space: spaces.Space[Any], num_envs: int) -> None:
        if not isinstance(space, FLAT):
            raise UserError(
                f"env={env_id}: its actions, {space}, are not supported.\nSupported are Box, Discrete, MultiDiscrete "
                "and MultiBinary.\nWrap the env so that it takes one of them (gymnasium.wrappers.TransformAction), "
                "register the wrapped env, and use env=your_package:YourEnv-v0"
            )
        self.shape = (num_envs, *(space.shape or ()))
        self.dtype: np.dtype[Any] = np.dtype(space.dtype)
        self.discrete = isinstance(space, spaces.Discrete)
        self._start: Any = getattr(space, "start", 0)  # the first choice's number
        self._bounds: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._whole = False
        if isinstance(space, spaces.Box):
            self._whole = self.dtype.kind in "iu"
            low, high = space.low, space.high
            if self._whole:  # float64 cannot tell larger whole numbers apart
                low, high = (np.clip(x.astype(np.float64), -(2.0**53), 2.0**53) for x in (low, high))
            # as many as actions: to spread them out in each call would cost as much as to compare
            self._bounds = tuple(np.broadcast_to(x, self.shape).copy() for x in (low, high))  # type: ignore[assignment]

    def __call__(self, action: Tensor) -> NDArray[Any]:
        """The env's actions [B, *action] for an agent's [B, ...]."""
        x: NDArray[Any] = action.numpy() if action.is_cpu else action.cpu().numpy()
        if x.shape != self.shape:
            x = x.reshape(self.shape)
        if self._bounds is not None:
            low, high = self._bounds
            x = np.minimum(np.maximum(x, low), high)  # np.clip costs twice as much
            if self._whole:
                x = np.rint(x)
        elif not self.discrete or self._start:
            x = x + self._start
        return x if x.dtype == self.dtype else x.astype(self.dtype)
