"""One gradient step: gradients of a loss, their norm clipped, one optimiser step.

The step is a function of tensors that changes parameters and moments in place, so one and the same code runs eagerly
or compiled into a single graph. The optimisers divide the gradients by what clipping asks for while they read them,
and take the learning rate as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Optimiser(Protocol):
    """Changes its parameters in place by gradients divided by `divisor` [], at the learning rate `lr` []."""

    def __call__(self, gradients: list[Tensor], lr: Tensor, divisor: Tensor) -> None: ...
    def state_dict(self) -> dict[str, list[Tensor]]: ...


class Adam:
    """Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1; `eps` is added to the root of the corrected second moment.

    Eagerly torch's fused kernel does it in one operation; the compiler, which does not know that kernel, fuses the
    written-out form.
    """

    def __init__(self, parameters: Sequence[Tensor], *, eps: float = 1e-8, beta1: float = 0.9, beta2: float = 0.999):
        self._parameters = list(parameters)
        self._m = [torch.zeros_like(p) for p in parameters]
        self._v = [torch.zeros_like(p) for p in parameters]
        self._steps = [torch.zeros((), device=p.device) for p in parameters]
        self._eps, self._beta1, self._beta2 = eps, beta1, beta2

    def __call__(self, gradients: list[Tensor], lr: Tensor, divisor: Tensor) -> None:
        if torch.compiler.is_compiling():
            self._written_out(gradients, lr, divisor)
            return
        torch._foreach_add_(self._steps, 1.0)
        torch._fused_adam_(
            self._parameters,
            [g.contiguous() for g in gradients],  # the kernel reads memory in order, whatever the strides
            self._m,
            self._v,
            [],
            self._steps,
            lr=lr,
            beta1=self._beta1,
            beta2=self._beta2,
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor.float(),  # of single precision for all parameters
        )

    def _written_out(self, gradients: list[Tensor], lr: Tensor, divisor: Tensor) -> None:
        for p, g, m, v, step in zip(self._parameters, gradients, self._m, self._v, self._steps, strict=True):
            g = g / divisor
            step.add_(1.0)
            m.lerp_(g, 1.0 - self._beta1)
            v.mul_(self._beta2).addcmul_(g, g, value=1.0 - self._beta2)
            root = (v / (1.0 - self._beta2**step)).sqrt() + self._eps
            p.sub_(lr / (1.0 - self._beta1**step) * m / root)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"m": self._m, "v": self._v, "steps": self._steps}


class RMSProp:
    """Uncentred RMSProp with `eps` inside the root: Mnih et al. 2016 (arXiv 1602.01783), equations S2 and S3."""

    def __init__(self, parameters: Sequence[Tensor], *, alpha: float = 0.99, eps: float = 1e-5) -> None:
        self._parameters = list(parameters)
        self._v = [torch.zeros_like(p) for p in parameters]
        self._alpha, self._eps = alpha, eps

    def __call__(self, gradients: list[Tensor], lr: Tensor, divisor: Tensor) -> None:
        gradients = list(torch._foreach_div(gradients, divisor))
        torch._foreach_mul_(self._v, self._alpha)
        torch._foreach_addcmul_(self._v, gradients, gradients, 1.0 - self._alpha)
        roots = torch._foreach_add(self._v, self._eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(gradients, lr)
        torch._foreach_addcdiv_(self._parameters, gradients, roots, -1.0)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"v": self._v}


# A loss maps a minibatch and some scalars [S] to the loss [] and to metrics [M], the latter detached.
Loss = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class GradientStep:
    """`step(batch, lr, scalars)` changes the parameters by one clipped optimiser step on `loss(batch, scalars)`.

    `groups` holds the parameters with the factor of the learning rate for each; `lr` is a 0-d tensor. Gradients are
    clipped to `max_grad_norm` over all groups together, or over each on its own with `clip_per_group`: Pascanu et al.
    2013 (arXiv 1211.5063), algorithm 1. Returns the loss's metrics followed by the norm of the whole gradient before
    clipping, [M + 1].
    """

    def __init__(
        self,
        loss: Loss,
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        optimiser: Callable[[Sequence[Tensor]], Optimiser],
        *,
        max_grad_norm: float | None,
        clip_per_group: bool = False,
        compiled: bool = False,
    ) -> None:
        if not clip_per_group and all(factor == 1.0 for _, factor in groups):
            groups = [([p for parameters, _ in groups for p in parameters], 1.0)]
        self._loss, self._max_grad_norm, self._clip_per_group = loss, max_grad_norm, clip_per_group
        self._parameters = [p for parameters, _ in groups for p in parameters]
        self._groups = [(optimiser(parameters), len(parameters), factor) for parameters, factor in groups]
        self._step: Callable[[Any, Tensor, Tensor], Tensor] = compile_step(self.step) if compiled else self.step

    def __call__(self, batch: Any, lr: Tensor, scalars: Tensor) -> Tensor:
        return self._step(batch, lr, scalars)

    def step(self, batch: Any, lr: Tensor, scalars: Tensor) -> Tensor:
        loss, metrics = self._loss(batch, scalars)
        gradients = list(torch.autograd.grad(loss, self._parameters))
        with torch.no_grad():
            norm = global_norm(gradients)
            divisor = self._divisor(norm)
            first = 0
            for optimiser, count, factor in self._groups:
                part = gradients[first : first + count]
                own = self._divisor(global_norm(part)) if self._clip_per_group else divisor
                optimiser(part, lr if factor == 1.0 else lr * factor, own)
                first += count
            return torch.cat([metrics, norm.unsqueeze(0)])

    def _divisor(self, norm: Tensor) -> Tensor:
        """What to divide gradients of this norm by, so that their norm is at most `max_grad_norm`."""
        if self._max_grad_norm is None:
            return torch.ones_like(norm)
        return ((norm + 1e-6) / self._max_grad_norm).clamp(min=1.0)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimiser.state_dict() for i, (optimiser, _, _) in enumerate(self._groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (optimiser, _, _) in enumerate(self._groups):
            for name, tensors in optimiser.state_dict().items():
                for tensor, saved in zip(tensors, state[str(i)][name], strict=True):
                    tensor.copy_(saved)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, []."""
    norm: Tensor = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in gradients]))
    return norm


def compile_step(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`step` as one graph, differentiated and fused by inductor."""
    import torch._dynamo.config as dynamo

    dynamo.trace_autograd_ops = True  # without it torch.autograd.grad breaks the graph
    return torch.compile(step, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
