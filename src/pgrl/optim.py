"""One gradient step: gradients of a loss, their norm clipped, one optimiser step.

The step is a function of tensors that changes parameters and moments in place, and runs eagerly or compiled into a
single graph: the same loss, gradient and clipping, and the same update, which torch's fused kernel takes eagerly.
Gradients, moments and parameters are flat vectors: an optimiser is a handful of operations whatever the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgrl.compiling import compile_step
from pgrl.flat import FlatParameters, flatten


class Optimiser(Protocol):
    """What a gradient [P] does to a vector [P] of parameters at the learning rate `lr` [].

    It counts divided by `divisor` [], which may then be done in place; None: as it is.
    """

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        """Change the vector in place."""

    def change(self, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> Tensor:
        """What to subtract from the vector, [P]."""

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, live."""


class Adam:
    """Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1; `eps` is added to the root of the corrected second moment.

    A call is one operation, torch's fused kernel, which counts `steps`. The compiler, which does not know that kernel,
    fuses `change`, which divides the averages by the same averages of ones, 1 - beta ** steps: a power would be
    computed again and again in its loop. A run keeps to one of the two.
    """

    def __init__(self, vector: Tensor, *, eps: float = 1e-8, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self._m, self._v = torch.zeros_like(vector), torch.zeros_like(vector)
        self._steps = torch.zeros((), device=vector.device)
        self._m_of_ones, self._v_of_ones = torch.zeros(2, device=vector.device).unbind()
        self._eps, self._beta1, self._beta2 = eps, beta1, beta2

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        self._steps.add_(1.0)
        torch._fused_adam_(
            [vector],
            [gradient],
            [self._m],
            [self._v],
            [],
            [self._steps],
            lr=lr,
            beta1=self._beta1,
            beta2=self._beta2,
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None if divisor is None else divisor.float(),  # of single precision whatever the parameters
        )

    def change(self, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> Tensor:
        gradient = gradient if divisor is None else gradient / divisor
        self._m.lerp_(gradient, 1.0 - self._beta1)
        self._m_of_ones.mul_(self._beta1).add_(1.0 - self._beta1)
        self._v.mul_(self._beta2).addcmul_(gradient, gradient, value=1.0 - self._beta2)
        self._v_of_ones.mul_(self._beta2).add_(1.0 - self._beta2)
        root = (self._v / self._v_of_ones).sqrt() + self._eps
        return lr / self._m_of_ones * self._m / root

    def state_dict(self) -> dict[str, Tensor]:
        ones = {"m_of_ones": self._m_of_ones, "v_of_ones": self._v_of_ones}
        return {"m": self._m, "v": self._v, "steps": self._steps, **ones}


class RMSProp:
    """Uncentred RMSProp with `eps` inside the root: Mnih et al. 2016 (arXiv 1602.01783), equations S2 and S3."""

    def __init__(self, vector: Tensor, *, alpha: float = 0.99, eps: float = 1e-5) -> None:
        self._v = torch.zeros_like(vector)
        self._alpha, self._eps = alpha, eps

    def __call__(self, vector: Tensor, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        vector.sub_(self.change(gradient, lr, divisor))

    def change(self, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> Tensor:
        gradient = gradient if divisor is None else gradient / divisor
        self._v.mul_(self._alpha).addcmul_(gradient, gradient, value=1.0 - self._alpha)
        return lr * gradient / (self._v + self._eps).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        return {"v": self._v}


# A loss maps a minibatch and some scalars, a named tuple of [] each, to the loss [] and to metrics.
Loss = Callable[[Any, Any], tuple[Tensor, tuple[Tensor, ...]]]


class Group(FlatParameters):
    """Parameters that share a learning rate, `factor` times that of the step, and their optimiser."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], factor: float, optimiser: Callable[[Tensor], Optimiser]
    ) -> None:
        super().__init__(parameters)
        self.factor, self.optimiser = factor, optimiser(self.vector)

    def step(self, gradient: Tensor, lr: Tensor, divisor: Tensor | None) -> None:
        lr = lr if self.factor == 1.0 else lr * self.factor
        if torch.compiler.is_compiling():  # the graph takes every parameter, and never learns that they share memory
            change = self.optimiser.change(gradient, lr, divisor)
            torch._foreach_sub_(self.parameters, self.split(change))  # type: ignore[arg-type]
        else:
            self.optimiser(self.vector, gradient, lr, divisor)


class GradientStep:
    """`step(batch, lr, scalars)` changes the parameters by one clipped optimiser step on `loss(batch, scalars)`.

    `groups` holds the parameters with the factor of the learning rate for each; `lr` is a 0-d tensor. Gradients are
    clipped to `max_grad_norm` over all groups together, or over each on its own with `clip_per_group`: Pascanu et al.
    2013 (arXiv 1211.5063), algorithm 1. Returns the loss's metrics, detached, followed by the norm [] of the whole
    gradient before clipping.
    """

    def __init__(
        self,
        loss: Loss,
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        optimiser: Callable[[Tensor], Optimiser],
        *,
        max_grad_norm: float | None,
        clip_per_group: bool = False,
        compiled: bool = False,
    ) -> None:
        if not clip_per_group and all(factor == 1.0 for _, factor in groups):
            groups = [([p for parameters, _ in groups for p in parameters], 1.0)]
        self._loss, self._max_grad_norm, self._clip_per_group = loss, max_grad_norm, clip_per_group
        self._groups = [Group(parameters, factor, optimiser) for parameters, factor in groups]
        self._parameters = [p for group in self._groups for p in group.parameters]
        self._sizes = [len(group.vector) for group in self._groups]
        self._step: Callable[[Any, Tensor, Any], tuple[Tensor, ...]] = (
            compile_step(self.step) if compiled else self.step
        )

    def __call__(self, batch: Any, lr: Tensor, scalars: Any) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():  # as part of a larger graph
            for group in self._groups:
                group.check()
        return self._step(batch, lr, scalars)

    @property
    def whole(self) -> FlatParameters:
        """All parameters, where they are one group."""
        (group,) = self._groups
        return group

    def step(self, batch: Any, lr: Tensor, scalars: Any) -> tuple[Tensor, ...]:
        loss, metrics = self._loss(batch, scalars)
        gradients = torch.autograd.grad(loss, self._parameters)
        with torch.no_grad():
            gradient = flatten(gradients)
            norm: Tensor = torch.linalg.vector_norm(gradient)
            divisor = self._divisor(norm)
            for group, part in zip(self._groups, gradient.split(self._sizes), strict=True):
                own = self._divisor(torch.linalg.vector_norm(part)) if self._clip_per_group else divisor
                group.step(part, lr, own)
            return (*(x.detach() for x in metrics), norm)

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """What to divide gradients of this norm by, so that their norm is at most `max_grad_norm`; None: nothing."""
        if self._max_grad_norm is None:
            return None
        return ((norm + 1e-6) / self._max_grad_norm).clamp(min=1.0)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): group.optimiser.state_dict() for i, group in enumerate(self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, group in enumerate(self._groups):
            for name, tensor in group.optimiser.state_dict().items():
                tensor.copy_(state[str(i)][name])
