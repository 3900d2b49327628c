"""The sum tree against a cumulative sum."""

import itertools

import pytest
import torch
from torch import Generator

from pgrl.sum_tree import SumTree


@pytest.mark.parametrize("leaves", [1, 31, 32, 33, 1024, 1025, 5000])
def test_sums_and_shares(leaves: int) -> None:
    """Every sum is that of its leaves, and shares fall on the leaves that a cumulative sum says."""
    generator, tree = Generator().manual_seed(leaves), SumTree(leaves, torch.device("cpu"))
    tree.replace(torch.arange(leaves), torch.arange(0))
    for _ in range(5):
        index = torch.randint(leaves, (50,), generator=generator)
        tree.set(index, torch.rand(50, dtype=torch.float64, generator=generator) ** 4)
        tree.replace(torch.arange(0), torch.randint(leaves, (leaves // 3,), generator=generator))
        values = tree.levels[0]
        for level, sums in itertools.pairwise(tree.levels):
            assert torch.allclose(level.view(-1, 32).sum(1), sums[: len(level) // 32])
        if not values.sum():
            return
        u = torch.cat([torch.rand(200, dtype=torch.float64, generator=generator), torch.tensor([0.0, 1 - 2**-53, 1.0])])
        found, share = tree.find(u)
        assert (values[found] > 0).all() and torch.allclose(share, values[found] / values.sum())
        cumulative = values.cumsum(0) / values.sum()
        before = cumulative[found] - share
        assert (before <= u + 1e-12).all() and (u <= cumulative[found] + 1e-12).all()
