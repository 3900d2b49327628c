"""Parameters as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([x.reshape(-1) for x in tensors])


def gradients_of_rows(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of each entry of x [n], as rows [n, P]; it costs n backward passes over the n rows."""
    each = torch.eye(len(x), dtype=x.dtype, device=x.device)
    gradients = torch.autograd.grad(x, list(parameters), each, is_grads_batched=True)
    return torch.cat([g.reshape(len(x), -1) for g in gradients], 1)


class FlatParameters:
    """Parameters that are views of one vector [P]: what changes the vector changes them.

    Copying or moving them afterwards parts them from it; `check` refuses that.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.vector = flatten([p.detach() for p in self.parameters])
        self._sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, self.vector.split(self._sizes), strict=True):
            p.data = part.view_as(p)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector [P] in the shapes of the parameters."""
        return [part.view_as(p) for p, part in zip(self.parameters, vector.split(self._sizes), strict=True)]

    def check(self) -> None:
        """RuntimeError if the parameters are no longer views of the vector."""
        if self.parameters[0].data_ptr() != self.vector.data_ptr():
            raise RuntimeError("the parameters were copied or moved: build what changes them afterwards")
