"""The sum tree of prioritised replay, in which a share of the sum of all priorities finds its leaf at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAN = 32  # children of a node


def tree_sizes(leaves: int) -> list[int]:
    """The nodes of each level of a sum tree from the leaves up to a single family."""
    sizes = [-(-leaves // FAN) * FAN]
    while sizes[-1] > FAN:
        sizes.append(-(-sizes[-1] // FAN**2) * FAN)
    return sizes


class SumTree:
    """Priorities as the leaves of a tree of sums with FAN children a node; a leaf of 0 is never found.

    Every sum is computed anew from its children, so that no rounding accumulates.
    """

    def __init__(self, leaves: int, device: torch.device) -> None:
        sizes = tree_sizes(leaves)
        self.nodes = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.levels = self.nodes.split(sizes)  # from the leaves up
        self.highest = torch.ones((), dtype=torch.float64, device=device)  # priority so far, for what is new

    def replace(self, new: Tensor, removed: Tensor) -> None:
        """Give the leaves `new` [N] the highest priority that any had, and empty the leaves `removed` [M]."""
        self.levels[0][new] = self.highest
        self.levels[0][removed] = 0.0
        self._sum(torch.cat((new, removed)))

    def set(self, index: Tensor, priority: Tensor) -> None:
        """Change the leaves `index` [N], but for empty ones; of several priorities of one leaf the highest counts."""
        leaves = self.levels[0]
        priority = priority.masked_fill(leaves[index] == 0, 0.0)
        leaves.scatter_reduce_(0, index, priority, "amax", include_self=False)
        torch.maximum(self.highest, priority.max(), out=self.highest)
        self._sum(index)

    def _sum(self, index: Tensor) -> None:
        for below, above in zip(self.levels[:-1], self.levels[1:], strict=True):
            index = index.div(FAN, rounding_mode="floor")
            above[index] = below.view(-1, FAN).index_select(0, index).sum(1)

    def find(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The leaves that the shares u [N] in [0, 1) of the sum fall on, and the share of the sum that each has."""
        total = self.levels[-1].sum()
        u, index = (u * total).unsqueeze(1), torch.zeros_like(u, dtype=torch.int64)
        for level in reversed(self.levels):
            sums = level.view(-1, FAN).index_select(0, index).cumsum(1)
            # Below the last sum, so that rounding finds no empty leaf.
            u = torch.minimum(u, sums[:, -1:] * (1 - 2**-50))
            child = torch.searchsorted(sums, u, right=True)  # the first whose sum exceeds u
            before = sums.gather(1, (child - 1).clamp_(min=0)).masked_fill_(child == 0, 0.0)
            u, index = u - before, FAN * index + child.squeeze(1)
        return index, self.levels[0][index] / total

    def state_dict(self) -> dict[str, Any]:
        """All sums: not computed anew, they are the same to the last bit."""
        return {"nodes": self.nodes, "highest": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, in place."""
        self.nodes.copy_(state["nodes"])
        self.highest.copy_(state["highest"])
