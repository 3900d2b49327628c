"""Fisher-vector products, conjugate gradients, natural steps and the line search, each against its definition."""

from __future__ import annotations

import math
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from pgrl.distributions import detached
from pgrl.flat import FlatParameters, flatten, gradients_of_rows
from pgrl.networks import ActorCritic, NetworkConfig, PolicyConfig
from pgrl.trust_region import FisherProduct, Trial, conjugate_gradient, line_search, natural_step

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
POLICIES: dict[str, tuple[spaces.Space[Any], PolicyConfig]] = {
    "gaussian": (BOX, PolicyConfig()),
    "gaussian with its own std": (BOX, PolicyConfig(state_dependent_std=True)),
    "squashed": (BOX, PolicyConfig(distribution="squashed")),
    "beta": (BOX, PolicyConfig(distribution="beta")),
    "discrete": (spaces.Discrete(3), PolicyConfig()),
    "multi": (spaces.MultiDiscrete([2, 3]), PolicyConfig()),
    "binary": (spaces.MultiBinary(2), PolicyConfig()),
}


def make(kind: str, hidden: list[int] | None = None) -> ActorCritic:
    torch.manual_seed(0)
    space, policy = POLICIES[kind]
    obs_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    return ActorCritic(obs_space, space, NetworkConfig(hidden_sizes=hidden or [5], policy_gain=0.5), policy).double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int) -> Tensor:
    a = random(n, n)
    return a @ a.T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("kind", POLICIES)
def test_product_is_the_hessian_of_the_kl(kind: str) -> None:
    net, obs = make(kind), random(11, 3, seed=1)
    flat = FlatParameters(net.policy_parameters())
    distribution = net.policy(obs)
    product = FisherProduct(distribution, flat.parameters)
    kl = detached(distribution).kl(net.policy(obs)).mean()
    slope = flatten(torch.autograd.grad(kl, flat.parameters, create_graph=True))
    assert slope.abs().max() < 1e-12
    for seed in range(3):
        v = random(len(flat.vector), seed=seed)
        exact = flatten(torch.autograd.grad(slope @ v, flat.parameters, retain_graph=True))
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(product(v), exact, rtol=1e-8, atol=1e-10)


def test_product_costs_little_more_than_one_pass_in_each_direction() -> None:
    net, obs = make("gaussian", hidden=[64, 64]), random(256, 3)
    parameters = net.policy_parameters()

    def count(run: Any) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return counter.get_total_flops()

    distribution = net.policy(obs)
    product = FisherProduct(distribution, parameters)
    v = random(sum(p.numel() for p in parameters))
    both_ways = count(
        lambda: torch.autograd.grad(net.policy(obs).entropy().sum() + net.policy(obs).mean.sum(), parameters)
    )  # type: ignore[attr-defined]  # noqa: E501
    assert count(lambda: product(v)) <= 1.5 * both_ways


def test_conjugate_gradient_solves() -> None:
    a, b = positive(12), random(12)
    x, residual = conjugate_gradient(lambda v: a @ v, b, 100, 1e-12)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(residual, b - a @ x, rtol=0, atol=1e-9)


def test_conjugate_gradient_stops_in_time() -> None:
    a, b, products = positive(12), random(12), [0]

    def product(v: Tensor) -> Tensor:
        products[0] += 1
        return a @ v

    _, residual = conjugate_gradient(product, b, 3, 0.0)
    assert products == [3]
    torch.testing.assert_close(residual, b - a @ conjugate_gradient(product, b, 3, 0.0)[0], rtol=0, atol=1e-10)
    products[0] = 0
    _, residual = conjugate_gradient(product, b, 100, 0.5)
    assert products[0] < 12 and residual.norm() <= 0.5 * b.norm()
    x, residual = conjugate_gradient(product, torch.zeros(12, dtype=torch.float64), 10, 1e-10)
    assert not x.any() and not residual.any()


def test_what_a_singular_matrix_does_not_see_gives_no_step() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    x, residual = conjugate_gradient(lambda v: a @ v, torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64), 10, 1e-10)
    assert not x.any() and residual.tolist() == [0.0, 0.0, 3.0]
    g = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    natural = natural_step(g, lambda v: a @ v, max_kl=0.01, damping=0.0, iterations=10, tolerance=1e-10)
    assert not natural.step.any() and natural.residual == 1.0


def test_natural_step_has_the_length_it_should() -> None:
    a, g = positive(8), random(8)
    options: dict[str, Any] = {"iterations": 50, "tolerance": 1e-14}
    natural = natural_step(g, lambda v: a @ v, max_kl=0.01, damping=0.0, **options)
    torch.testing.assert_close(0.5 * natural.step @ a @ natural.step, torch.tensor(0.01, dtype=torch.float64))
    direction = torch.linalg.solve(a, g)
    torch.testing.assert_close(natural.step / natural.step.norm(), direction / direction.norm())
    torch.testing.assert_close(natural.predicted, g @ natural.step)
    assert natural.residual < 1e-8
    fixed = natural_step(g, lambda v: a @ v, step_size=0.3, damping=0.0, **options)
    torch.testing.assert_close(fixed.step, 0.3 * direction)
    damped = natural_step(g, lambda v: a @ v, max_kl=0.01, damping=0.5, **options)
    assert 0.5 * damped.step @ a @ damped.step < 0.01
    nothing = natural_step(torch.zeros(8, dtype=torch.float64), lambda v: a @ v, max_kl=0.01, damping=0.1, **options)
    assert not nothing.step.any() and not nothing.predicted and not nothing.residual


@pytest.mark.parametrize(
    ("improvements", "kls", "fraction"),
    [
        ([1.0], [0.5], 1.0),
        ([1.0, 1.0], [2.0, 0.5], 0.5),  # too far
        ([-1.0, 0.4], [0.5, 0.5], 0.5),  # worse
        ([0.05, 0.06], [0.5, 0.5], 0.5),  # too little: 0.05 < 0.1 * 1, 0.06 >= 0.1 * 0.5
        ([math.nan, 0.3], [math.nan, 0.5], 0.5),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 0.0),
        ([-1.0, 0.0, -1.0], [0.1, 0.1, 0.1], 0.0),
    ],
)
def test_line_search_takes_the_first_good_point(improvements: list[float], kls: list[float], fraction: float) -> None:
    tried: list[float] = []

    def try_step(at: float) -> Trial:
        tried.append(at)
        if at == 0.0:
            return Trial(torch.tensor(0.0), torch.tensor(0.0))
        k = len(tried) - 1
        return Trial(torch.tensor(improvements[k]), torch.tensor(kls[k]))

    search = line_search(try_step, 1.0, max_kl=1.0, factor=0.5, tries=3, accept_ratio=0.1)
    assert search.fraction == fraction and tried[-1] == fraction
    assert tried[: len(improvements)] == [0.5**k for k in range(len(improvements))]
    k = tried.index(fraction)
    expected = (0.0, 0.0) if fraction == 0.0 else (improvements[k], kls[k])
    assert tuple(map(float, search.last)) == pytest.approx(expected)
    assert float(search.first.kl) == pytest.approx(kls[0], nan_ok=True)


def test_flat_parameters_are_views() -> None:
    net = make("gaussian")
    flat = FlatParameters(net.policy_parameters())
    flat.vector.fill_(0.25)
    assert all((p == 0.25).all() for p in net.policy_parameters())
    for p, part in zip(net.policy_parameters(), flat.split(torch.arange(len(flat.vector))), strict=True):
        assert part.shape == p.shape
    flat.check()
    net.float()
    with pytest.raises(RuntimeError, match="copied or moved"):
        flat.check()


def test_gradients_of_rows_are_those_of_single_rows() -> None:
    net, obs = make("discrete"), random(6, 3)
    action = torch.tensor([0, 1, 2, 2, 1, 0])
    together = gradients_of_rows(net.policy(obs).log_prob(action), net.policy_parameters())
    for i in range(6):
        alone = net.policy(obs[i : i + 1]).log_prob(action[i : i + 1]).sum()
        torch.testing.assert_close(together[i], flatten(torch.autograd.grad(alone, net.policy_parameters())))
