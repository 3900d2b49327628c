"""The gradient step against torch's optimisers and the papers' formulas, and its state."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn

from pgrl.optim import Adam, GradientStep, RMSProp, flatten


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


class Regression:
    """A small net with two groups of parameters and a loss with a steep gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 2)]).double()

    def loss(self, batch: Batch, scalars: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        error = self.net[1](self.net[0](batch.x).tanh()) - batch.y
        loss = 10 * error.square().mean() + scalars[0] * error.mean()
        return loss, (loss, error.mean())

    def groups(self, second: float = 1.0) -> list[tuple[Sequence[nn.Parameter], float]]:
        return [(list(self.net[0].parameters()), 1.0), (list(self.net[1].parameters()), second)]

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])


def batches(n: int) -> list[Batch]:
    generator = Generator().manual_seed(1)
    draws = torch.randn(n, 16, 6, generator=generator, dtype=torch.float64)
    return [Batch(d[:, :4], 3 * d[:, 4:]) for d in draws]


SCALARS = (torch.tensor(0.3, dtype=torch.float64),)
LRS = [0.01 * (1 - i / 25) for i in range(20)]  # annealed


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_adam_is_torchs(factor: float, limit: float | None, per_group: bool) -> None:
    ours, theirs = Regression(), Regression()
    step = GradientStep(
        ours.loss,
        ours.groups(factor),
        partial(Adam, eps=1e-5, beta1=0.8, beta2=0.95),
        max_grad_norm=limit,
        clip_per_group=per_group,
    )
    groups = theirs.groups()
    adam = torch.optim.Adam([{"params": list(p)} for p, _ in groups], eps=1e-5, betas=(0.8, 0.95))
    for batch, lr in zip(batches(20), LRS, strict=True):
        metrics = step(batch, torch.tensor(lr, dtype=torch.float64), SCALARS)
        assert not any(x.requires_grad for x in metrics)
        loss, expected = theirs.loss(batch, SCALARS)
        adam.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in theirs.net.parameters()]))
        if limit is not None:
            for parameters in [p for p, _ in groups] if per_group else [list(theirs.net.parameters())]:
                nn.utils.clip_grad_norm_(parameters, limit)
        for group, f in zip(adam.param_groups, (1.0, factor), strict=True):
            group["lr"] = lr * f
        adam.step()
        # the kernel's divisor is of float32
        precision = {"rtol": 1e-9, "atol": 1e-11} if limit is None else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(torch.stack(metrics), torch.stack([*expected, norm]), **precision)
        torch.testing.assert_close(ours.flat(), theirs.flat(), **precision)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_rmsprop_is_its_formula(limit: float | None) -> None:
    """Equations S2 and S3 of Mnih et al. 2016: g <- alpha g + (1 - alpha) d^2, and a step of -eta d / sqrt(g + eps)."""
    ours, theirs = Regression(), Regression()
    step = GradientStep(ours.loss, ours.groups(), partial(RMSProp, alpha=0.9, eps=1e-3), max_grad_norm=limit)
    mean_square = [torch.zeros_like(p) for p in theirs.net.parameters()]
    for batch, lr in zip(batches(20), LRS, strict=True):
        step(batch, torch.tensor(lr, dtype=torch.float64), SCALARS)
        parameters = list(theirs.net.parameters())
        gradients = torch.autograd.grad(theirs.loss(batch, SCALARS)[0], parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        shrink = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, mean_square, strict=True):
                v.copy_(0.9 * v + 0.1 * (shrink * g) ** 2)
                p.sub_(lr * shrink * g / (v + 1e-3).sqrt())
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-9, atol=1e-11)


def test_adam_corrects_its_moments_after_many_steps() -> None:
    """Fused and written out, as the compiler takes it, in single precision."""
    fused, written, theirs = torch.zeros(3), torch.zeros(3), nn.Parameter(torch.zeros(3))
    adam, other = Adam(fused), Adam(written)
    reference = torch.optim.Adam([theirs], lr=1e-3)
    generator, lr, divisor = Generator().manual_seed(2), torch.tensor(1e-3), torch.tensor(2.0)
    for _ in range(1500):
        gradient = torch.randn(3, generator=generator)
        theirs.grad = gradient / 2
        adam(fused, gradient.clone(), lr, divisor)
        written -= other.change(gradient.clone(), lr, divisor)
        reference.step()
    torch.testing.assert_close(fused, theirs.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(written, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_flatten_reads_in_order_whatever_the_strides() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert flatten([x.T, torch.tensor(7.0)]).tolist() == [0, 3, 1, 4, 2, 5, 7]


@pytest.mark.parametrize("optimiser", [Adam, RMSProp])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_groups_have_their_own_rate(optimiser: Callable[[Tensor], Any], factor: float) -> None:
    """Without clipping, a group's step is its rate's factor times the step it would have taken."""
    plain, scaled = Regression(), Regression()
    start = plain.flat()
    for model, f in ((plain, 1.0), (scaled, factor)):
        GradientStep(model.loss, model.groups(f), optimiser, max_grad_norm=None)(
            batches(1)[0], torch.tensor(0.01, dtype=torch.float64), SCALARS
        )
    change, scaled_change = plain.flat() - start, scaled.flat() - start
    first = 4 * 8 + 8
    torch.testing.assert_close(scaled_change[:first], change[:first])
    torch.testing.assert_close(scaled_change[first:], factor * change[first:])


def test_gradients_never_reach_grad() -> None:
    """Nothing accumulates in `.grad`, so there is nothing to forget to clear."""
    model = Regression()
    step = GradientStep(model.loss, model.groups(), Adam, max_grad_norm=0.5)
    step(batches(1)[0], torch.tensor(0.01, dtype=torch.float64), SCALARS)
    assert all(p.grad is None for p in model.net.parameters())


@pytest.mark.parametrize("optimiser", [Adam, RMSProp])
def test_state_continues_bit_for_bit(optimiser: Callable[[Tensor], Any]) -> None:
    data, lr = batches(20), torch.tensor(0.01, dtype=torch.float64)
    model = Regression()
    step = GradientStep(model.loss, model.groups(0.5), optimiser, max_grad_norm=0.5)
    for batch in data[:10]:
        step(batch, lr, SCALARS)
    saved = copy.deepcopy((step.state_dict(), model.net.state_dict()))
    for batch in data[10:]:
        step(batch, lr, SCALARS)

    other = Regression()
    resumed = GradientStep(other.loss, other.groups(0.5), optimiser, max_grad_norm=0.5)
    resumed(data[3], lr, SCALARS)  # whatever it did before is forgotten
    other.net.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    for batch in data[10:]:
        resumed(batch, lr, SCALARS)
    assert torch.equal(other.flat(), model.flat())
    for group, moments in step.state_dict().items():
        for name, moment in moments.items():
            assert torch.equal(moment, resumed.state_dict()[group][name]), name


def test_state_is_copied_in() -> None:
    """A loaded state is not aliased: further steps leave it as it was."""
    model = Regression()
    step = GradientStep(model.loss, model.groups(), Adam, max_grad_norm=None)
    state = copy.deepcopy(step.state_dict())
    step.load_state_dict(state)
    step(batches(1)[0], torch.tensor(0.01, dtype=torch.float64), SCALARS)
    assert (state["0"]["m"][0] == 0).all() and (step.state_dict()["0"]["m"][0] != 0).any()


@pytest.mark.parametrize("optimiser", [Adam, RMSProp])
def test_strides_of_gradients_do_not_matter(optimiser: Callable[[Tensor], Any]) -> None:
    """Convolutions over images with channels last give gradients whose memory is in another order."""
    slope = torch.randn(4, 3, 2, 2, generator=Generator().manual_seed(0))
    weights = []
    for factor in (slope, slope.to(memory_format=torch.channels_last)):
        weight = nn.Parameter(torch.zeros(4, 3, 2, 2))
        step = GradientStep(lambda x, _, w=weight: ((w * x).sum(), ()), [([weight], 1.0)], optimiser, max_grad_norm=1.0)
        step(factor, torch.tensor(0.1), ())
        weights.append(weight.detach())
    assert torch.equal(*weights) and weights[0].any()


@pytest.mark.parametrize("per_group", [False, True])
def test_parameters_that_were_parted_from_their_vector_are_refused(per_group: bool) -> None:
    """A step would change the vector and leave the parameters alone."""
    model, lr = Regression(), torch.tensor(0.01, dtype=torch.float64)
    step = GradientStep(model.loss, model.groups(), Adam, max_grad_norm=0.5, clip_per_group=per_group)
    state = {name: x.clone() for name, x in model.net.state_dict().items()}
    step(batches(1)[0], lr, SCALARS)
    model.net.load_state_dict(state)  # copies into the views
    step(batches(1)[0], lr, SCALARS)
    assert not any(torch.equal(x, state[name]) for name, x in model.net.state_dict().items())
    model.net[0].float().double()
    with pytest.raises(RuntimeError, match="copied or moved"):
        step(batches(1)[0], lr, SCALARS)
