"""Natural gradients: Fisher-vector products, conjugate gradients, and the line search of a trust region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad


class FisherProduct:
    """v [P] -> F v [P], F the mean Fisher matrix of the distributions of a batch with respect to `parameters`.

    `distribution` is a named tuple of tensors computed from the parameters, with a method `kl`. The product is that of
    Gauss and Newton, F v = J' M J v: J is the Jacobian of the distribution's own parameters (such as means), and M the
    Hessian of the mean KL with respect to these. It equals the Hessian of the mean KL at KL = 0, where the first
    derivative vanishes, without differentiating the network twice: J v is the derivative of u -> J' u, which is
    recorded once, so a product costs about one forward and one backward pass. Martens 2020 (arXiv 1412.1193),
    sections 8 and 9; Schulman et al. 2015 (arXiv 1502.05477), appendix C.1.
    """

    def __init__(self, distribution: Any, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._outputs = [x for x in distribution if isinstance(x, Tensor)]
        self._u = [torch.zeros_like(x, requires_grad=True) for x in self._outputs]
        self._pulled = grad(self._outputs, self._parameters, self._u, create_graph=True)  # J' u

        self._at = [x.detach().requires_grad_() for x in self._outputs]
        fixed, free = iter([x.detach() for x in self._outputs]), iter(self._at)
        old = distribution._make(next(fixed) if isinstance(x, Tensor) else x for x in distribution)
        new = distribution._make(next(free) if isinstance(x, Tensor) else x for x in distribution)
        self._slope = grad(old.kl(new).mean(), self._at, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in self._parameters])
        shaped = [part.view_as(p) for p, part in zip(self._parameters, parts, strict=True)]
        jv = grad(self._pulled, self._u, shaped, retain_graph=True)
        mjv = grad(self._slope, self._at, jv, retain_graph=True)
        return torch.cat([x.reshape(-1) for x in grad(self._outputs, self._parameters, mjv, retain_graph=True)])


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """x [P] with A x = b, for `product` v -> A v with A symmetric and positive definite, and the residual b - A x [P].

    Stops after `iterations`, once |residual| <= tolerance * |b|, or before a direction along which A is not positive.
    Hestenes & Stiefel 1952, section 3.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = b.clone(), b @ b
    enough = tolerance**2 * float(squared)
    for _ in range(iterations):
        if float(squared) <= enough:
            break
        along = product(direction)
        curvature = direction @ along
        if not float(curvature) > 0.0:
            break
        length = squared / curvature
        x.add_(length * direction)
        residual.sub_(length * along)
        before, squared = squared, residual @ residual
        direction = residual + (squared / before) * direction
    return x, residual


class NaturalStep(NamedTuple):
    """A step along the natural gradient, and how it came about."""

    step: Tensor  # [P]
    predicted: Tensor  # [], the improvement to first order, g' step
    residual: Tensor  # [], |g - (F + damping) x| / |g| that conjugate gradients left


def natural_step(
    gradient: Tensor,
    fisher: Callable[[Tensor], Tensor],
    *,
    max_kl: float | None = None,
    step_size: float = 1.0,
    damping: float,
    iterations: int,
    tolerance: float,
) -> NaturalStep:
    """The step along x = (F + damping I)^-1 g for the gradient g [P] of what is to grow.

    Its length is sqrt(2 max_kl / x' (F + damping I) x), so that without damping the KL is `max_kl` to second order, and
    below it otherwise; with `max_kl` None it is step_size * x. Kakade 2001; Schulman et al. 2015 (arXiv 1502.05477),
    appendix C; Rajeswaran et al. 2017 (arXiv 1703.02660), equation 4. A zero gradient gives a zero step.
    """
    x, residual = conjugate_gradient(lambda v: fisher(v) + damping * v, gradient, iterations, tolerance)
    if max_kl is None:
        length = torch.full_like(x[0], step_size)
    else:
        squared = x @ (gradient - residual)  # x' (F + damping I) x
        length = (2.0 * max_kl / squared).sqrt().where(squared > 0.0, 0.0)
    tiny = torch.finfo(gradient.dtype).tiny
    return NaturalStep(length * x, length * (gradient @ x), residual.norm() / gradient.norm().clamp_min(tiny))


class Trial(NamedTuple):
    """What a point of a line search is worth, [] each."""

    improvement: Tensor  # of the surrogate over the start
    kl: Tensor  # mean KL from the start


class Search(NamedTuple):
    """How a line search ended."""

    fraction: float  # of the full step; 0 where every point was refused
    first: Trial  # of the full step
    last: Trial  # of the point it ended at


def line_search(
    try_step: Callable[[float], Trial],
    predicted: float,
    *,
    max_kl: float,
    factor: float,
    tries: int,
    accept_ratio: float,
) -> Search:
    """The first of the fractions 1, factor, factor^2, ... of a step that keeps the KL and is worth taking.

    `try_step(fraction)` moves there and measures. Accepted is a point with KL <= max_kl whose improvement is above 0
    and at least accept_ratio * fraction * predicted: Schulman et al. 2015 (arXiv 1502.05477), appendix C. Where none
    is, `try_step(0.0)` moves back.
    """
    trials: list[Trial] = []
    for k in range(tries):
        fraction = factor**k
        trials.append(try_step(fraction))
        improvement, kl = map(float, trials[-1])
        if kl <= max_kl and improvement > 0.0 and improvement >= accept_ratio * fraction * predicted:
            return Search(fraction, trials[0], trials[-1])
    return Search(0.0, trials[0], try_step(0.0))
