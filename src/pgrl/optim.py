"""One gradient step: gradients of a loss as one flat vector, its norm clipped, one optimiser step.

The step is a function of tensors that changes parameters and moments in place, so one and the same code runs eagerly
or compiled into a single graph. The optimisers are written out because on a flat vector they are a handful of
operations, take the learning rate as a tensor, and fuse with the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Optimiser(Protocol):
    """Turns a flat gradient [P] into a flat change of the parameters [P], keeping its moments in place."""

    def __call__(self, grad: Tensor, lr: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Moments:
    """Named tensors that change in place."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


class Adam(Moments):
    """Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1; `eps` is added to the root of the corrected second moment."""

    def __init__(self, like: Tensor, *, eps: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)
        self.decay = torch.ones(2, dtype=torch.float64, device=like.device)  # betas ** steps
        self.betas, self.eps = betas, eps
        self._betas = torch.tensor(betas, dtype=torch.float64, device=like.device)
        super().__init__(m=self.m, v=self.v, decay=self.decay)

    def __call__(self, grad: Tensor, lr: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        self.m.lerp_(grad, 1.0 - beta1)
        self.v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        self.decay.mul_(self._betas)
        first, second = (1.0 - self.decay).to(grad.dtype).unbind()
        return self.m / ((self.v / second).sqrt_().add_(self.eps)) * (-lr / first)


class RMSProp(Moments):
    """Uncentred RMSProp with `eps` inside the root: Mnih et al. 2016 (arXiv 1602.01783), equation S2 and S3."""

    def __init__(self, like: Tensor, *, alpha: float = 0.99, eps: float = 1e-5) -> None:
        self.v = torch.zeros_like(like)
        self.alpha, self.eps = alpha, eps
        super().__init__(v=self.v)

    def __call__(self, grad: Tensor, lr: Tensor) -> Tensor:
        self.v.mul_(self.alpha).addcmul_(grad, grad, value=1.0 - self.alpha)
        return grad * (self.v + self.eps).rsqrt() * -lr


def clip_norm(grad: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The vector scaled to a norm of at most `limit`, and its norm before: Pascanu et al. 2013, algorithm 1."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (limit / (norm + 1e-6)).clamp(max=1.0), norm


# A loss maps a minibatch and some scalars [S] to the loss [] and to metrics [M], the latter detached.
Loss = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class GradientStep:
    """`step(batch, lr, scalars)` changes the parameters by one clipped optimiser step on `loss(batch, scalars)`.

    `groups` holds the parameters with the factor of the learning rate for each; `lr` is a 0-d tensor. Gradients are
    clipped to `max_grad_norm` over all groups together, or over each on its own with `clip_per_group`. Returns the
    loss's metrics followed by the norm of the gradient before clipping, [M + 1].
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
        self._loss = loss
        self._parameters = [p for parameters, _ in groups for p in parameters]
        self._sizes = [p.numel() for p in self._parameters]
        self._group_sizes = [sum(p.numel() for p in parameters) for parameters, _ in groups]
        flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self._optimiser = optimiser(flat)
        factors = [factor for _, factor in groups]
        self._factor = None
        if any(factor != 1.0 for factor in factors):
            self._factor = torch.cat([flat.new_full((n,), f) for n, f in zip(self._group_sizes, factors, strict=True)])
        self._max_grad_norm, self._clip_per_group = max_grad_norm, clip_per_group
        self._step: Callable[[Any, Tensor, Tensor], Tensor] = compile_step(self.step) if compiled else self.step

    def __call__(self, batch: Any, lr: Tensor, scalars: Tensor) -> Tensor:
        return self._step(batch, lr, scalars)

    def step(self, batch: Any, lr: Tensor, scalars: Tensor) -> Tensor:
        loss, metrics = self._loss(batch, scalars)
        gradients = torch.autograd.grad(loss, self._parameters)
        with torch.no_grad():
            grad, norm = self._clip(torch.cat([g.reshape(-1) for g in gradients]))
            change = self._optimiser(grad, lr)
            if self._factor is not None:
                change = change * self._factor
            parts = [c.view_as(p) for c, p in zip(change.split(self._sizes), self._parameters, strict=True)]
            torch._foreach_add_(self._parameters, parts)
            return torch.cat([metrics, norm.unsqueeze(0)])

    def _clip(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self._max_grad_norm is None:
            return grad, torch.linalg.vector_norm(grad)
        if self._clip_per_group:
            clipped, norms = zip(
                *(clip_norm(g, self._max_grad_norm) for g in grad.split(self._group_sizes)), strict=True
            )
            return torch.cat(clipped), torch.linalg.vector_norm(torch.stack(norms))
        return clip_norm(grad, self._max_grad_norm)

    def state_dict(self) -> dict[str, Tensor]:
        return self._optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._optimiser.load_state_dict(state)


def compile_step(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`step` as one graph, differentiated and fused by inductor."""
    import torch._dynamo.config as dynamo

    dynamo.trace_autograd_ops = True  # without it torch.autograd.grad breaks the graph
    return torch.compile(step, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
