"""What a statement is, and how it is found to be true."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

EXACT = 1e-10  # the largest error of what is equal but for rounding, in float64
LARGE = 0.05  # the least difference of what is said to differ, as a share of its largest entry


class Check(NamedTuple):
    """The largest error that was found, and the largest that is allowed."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its tolerance; NaN is not."""
        return self.error <= self.tolerance


class Statement(NamedTuple):
    """A theorem, where it stands, what of pgrl it was compared with, and the comparison."""

    name: str
    source: str
    compared: str
    check: Callable[[], Check]


def equal(*pairs: tuple[Tensor, Tensor], tolerance: float = EXACT) -> Check:
    """The largest absolute difference over pairs of tensors of one shape each."""
    errors = []
    for found, expected in pairs:
        assert found.shape == expected.shape, (found.shape, expected.shape)
        errors.append(float((found - expected).detach().abs().max()))
    return Check(max(errors), tolerance) if all(e == e for e in errors) else Check(float("nan"), tolerance)


def differs(found: Tensor, predicted: Tensor, other: Tensor, tolerance: float = EXACT) -> Check:
    """As `equal(found, predicted)`, and infinite unless `predicted` is LARGE away from `other`."""
    if not equal((predicted, other)).error >= LARGE * float(other.detach().abs().max()):
        return Check(float("inf"), tolerance)
    return equal((found, predicted), tolerance=tolerance)


def at_least(*pairs: tuple[Tensor, Tensor], tolerance: float = EXACT) -> Check:
    """How far the first of a pair falls below the second, at most; 0 where it nowhere does."""
    return equal(*((found.clamp(max=bound), bound) for found, bound in pairs), tolerance=tolerance)
