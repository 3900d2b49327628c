"""Distributions against torch.distributions and against integrals; samples against the laws they should follow."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as reference
from torch import Generator, Tensor

from pgrl.distributions import (
    TRIES,
    Bernoulli,
    Beta,
    Categorical,
    DiagGaussian,
    MultiCategorical,
    SquashedGaussian,
    gumbel,
)

N, A = 7, 3
SIZES = (2, 4, 3)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def above_one(*shape: int, seed: int) -> Tensor:
    return 1.0 + 2.0 * torch.rand(shape, generator=seeded(seed), dtype=torch.float64).exp()


def make(kind: str, seed: int) -> Any:
    match kind:
        case "gaussian":
            return DiagGaussian(randn(N, A, seed=seed), 0.5 * randn(A, seed=seed + 1))
        case "gaussian of the state":
            return DiagGaussian(randn(N, A, seed=seed), 0.5 * randn(N, A, seed=seed + 1))
        case "squashed":
            return SquashedGaussian(randn(N, A, seed=seed), 0.5 * randn(A, seed=seed + 1))
        case "squashed of the state":
            return SquashedGaussian(randn(N, A, seed=seed), 0.5 * randn(N, A, seed=seed + 1))
        case "beta":
            return Beta(above_one(N, A, seed=seed), above_one(N, A, seed=seed + 1))
        case "categorical":
            return Categorical(2 * randn(N, 5, seed=seed))
        case "multi":
            return MultiCategorical(2 * randn(N, sum(SIZES), seed=seed), SIZES)
    return Bernoulli(2 * randn(N, A, seed=seed))


KINDS = (
    "gaussian",
    "gaussian of the state",
    "squashed",
    "squashed of the state",
    "beta",
    "categorical",
    "multi",
    "bernoulli",
)
WIDTH = {"categorical": 5, "multi": sum(SIZES)}  # of the noise, where it is not A
DISCRETE = ("categorical", "multi", "bernoulli")


def in_torch(d: Any) -> reference.Distribution:
    """The same distribution in torch.distributions; MultiCategorical as a joint table over all its combinations."""
    match d:
        case DiagGaussian():
            return reference.Independent(reference.Normal(d.mean, d.log_std.exp().expand_as(d.mean)), 1)
        case SquashedGaussian():
            normal = reference.Normal(d.mean, d.log_std.exp().expand_as(d.mean))
            return reference.Independent(
                reference.TransformedDistribution(normal, reference.TanhTransform(cache_size=1)), 1
            )
        case Beta():
            stretch = reference.AffineTransform(-1.0, 2.0)
            return reference.Independent(reference.TransformedDistribution(reference.Beta(d.alpha, d.beta), stretch), 1)
        case Categorical():
            return reference.Categorical(logits=d.logits)
        case MultiCategorical():
            return reference.Categorical(logits=joint_logits(d))
        case Bernoulli():
            return reference.Independent(reference.Bernoulli(logits=d.logits), 1)
    raise AssertionError


def joint_logits(d: MultiCategorical) -> Tensor:
    """[N, product of sizes]: the logit of a combination is the sum of its parts'."""
    starts = [sum(d.sizes[:i]) for i in range(len(d.sizes))]
    combinations = itertools.product(*(range(n) for n in d.sizes))
    return torch.stack([sum(d.logits[:, s + c] for s, c in zip(starts, cs, strict=True)) for cs in combinations], -1)


def repeated(d: Any, count: int) -> Any:
    """The distribution with its rows `count` times over."""
    return type(d)(*(x.repeat(count, 1) if isinstance(x, Tensor) and x.dim() == 2 else x for x in d))


def draw(d: Any, kind: str, count: int, seed: int) -> Tensor:
    """[count * N, ...] samples, in the order of `repeated`."""
    return repeated(d, count).sample(d.noise((count * N, WIDTH.get(kind, A)), seeded(seed)).double())


def flat_index(action: Tensor) -> Tensor:
    """The index of MultiCategorical actions [..., 3] among all combinations, in the order of `joint_logits`."""
    return (action[..., 0] * SIZES[1] + action[..., 1]) * SIZES[2] + action[..., 2]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob(kind: str) -> None:
    d = make(kind, 0)
    action = draw(d, kind, 20, seed=1)
    d = repeated(d, 20)
    expected = in_torch(d).log_prob(flat_index(action) if kind == "multi" else action.to(d[0].dtype))
    log_prob = d.log_prob(action)
    assert log_prob.shape == (20 * N,)
    close(log_prob, expected)


@pytest.mark.parametrize("kind", ["gaussian", "gaussian of the state", *DISCRETE])
def test_entropy(kind: str) -> None:
    d = make(kind, 2)
    assert d.entropy().shape == (N,)
    close(d.entropy(), in_torch(d).entropy())


def test_entropy_of_beta() -> None:
    d = make("beta", 2)
    scale = A * math.log(2.0)  # of the map from (0, 1) to (-1, 1)
    close(d.entropy(), reference.Beta(d.alpha, d.beta).entropy().sum(-1) + scale)


@pytest.mark.parametrize("kind", ["squashed", "squashed of the state"])
def test_entropy_of_squashed_gaussian_is_near(kind: str) -> None:
    """It has no closed form; at small deviations the approximation is good, and its gradient points the right way."""
    mean = randn(N, A, seed=3)
    for std, error in [(0.01, 1e-3), (0.1, 0.05)]:
        log_std = torch.full((N, A) if "state" in kind else (A,), math.log(std), dtype=torch.float64)
        d = SquashedGaussian(mean, log_std)
        samples = draw(d, "squashed", 4000, seed=4)
        expected = -repeated(d, 4000).log_prob(samples).view(4000, N).mean(0)
        sampling = 4 * math.sqrt(A / 2 / 4000)
        assert ((d.entropy() - expected).abs() < error * A + sampling).all()


@pytest.mark.parametrize("kind", KINDS)
def test_kl(kind: str) -> None:
    p, q = make(kind, 3), make(kind, 30)
    kl = p.kl(q)
    assert kl.shape == (N,) and (kl > 0).all()
    if isinstance(p, SquashedGaussian):  # a bijection keeps it
        expected = reference.kl_divergence(in_torch(p._normal()), in_torch(q._normal()))
    elif isinstance(p, Beta):
        expected = reference.kl_divergence(reference.Beta(p.alpha, p.beta), reference.Beta(q.alpha, q.beta)).sum(-1)
    else:
        expected = reference.kl_divergence(in_torch(p), in_torch(q))
    close(kl, expected)
    close(p.kl(p), torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_the_mean_log_ratio(kind: str) -> None:
    p, q = make(kind, 5), make(kind, 6)
    actions = draw(p, kind, 6000, seed=7)
    ratio = (repeated(p, 6000).log_prob(actions) - repeated(q, 6000).log_prob(actions)).view(6000, N)
    assert ((p.kl(q) - ratio.mean(0)).abs() < 5 * ratio.std(0) / math.sqrt(6000)).all()


def test_kl_of_gaussians_keeps_its_digits() -> None:
    """The trust region's radius is small: in single precision a tiny KL must not drown in 1 + KL - 1."""
    mean, log_std = torch.zeros(1, 1), torch.full((1,), 0.3)
    p, q = DiagGaussian(mean, log_std), DiagGaussian(mean + 1e-4, log_std + 1e-3)
    exact = DiagGaussian(*(x.double() for x in p)).kl(DiagGaussian(*(x.double() for x in q)))
    torch.testing.assert_close(p.kl(q).double(), exact, rtol=1e-3, atol=0)
    far = DiagGaussian(mean, log_std - 60.0)
    assert far.kl(p).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_kl_has_no_slope_where_both_are_equal(kind: str) -> None:
    d = make(kind, 8)
    moving = [x.clone().requires_grad_() for x in d if isinstance(x, Tensor)]
    copy = type(d)(*moving, *(x for x in d if not isinstance(x, Tensor)))
    for g in torch.autograd.grad(d.kl(copy).sum(), moving):
        close(g, torch.zeros_like(g))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    d, other = make(kind, 9), make(kind, 10)
    action = draw(d, kind, 1, seed=11)
    tensors = [x.requires_grad_() for x in d if isinstance(x, Tensor)]
    rest = [x for x in d if not isinstance(x, Tensor)]

    def check(f: Callable[[Any], Tensor]) -> None:
        assert torch.autograd.gradcheck(lambda *xs: f(type(d)(*xs, *rest)), tensors)

    check(lambda d: d.log_prob(action))
    check(lambda d: d.entropy())
    check(lambda d: d.kl(other))
    check(lambda d: other.kl(d))
    if "gaussian" in kind or "squashed" in kind:  # reparameterised
        noise = randn(N, A, seed=12)
        check(lambda d: d.sample(noise))


def test_mean_score_is_zero() -> None:
    """E[grad log p] = 0, summed exactly over all actions: what makes the policy gradient unbiased."""
    logits = randn(1, 5, seed=13).requires_grad_()
    every = torch.arange(5)
    log_prob = Categorical(logits.expand(5, 5)).log_prob(every)
    score = torch.autograd.grad((log_prob.detach().exp() * log_prob).sum(), logits)[0]
    close(score, torch.zeros_like(score))
    close(log_prob.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


# --- densities integrate to one ---


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (1.5, 0.3), (-0.7, 0.6)])
def test_squashed_density_integrates_to_one(mean: float, std: float) -> None:
    grid = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
    d = SquashedGaussian(torch.full((1, 1), mean).double(), torch.tensor([math.log(std)]).double())
    density = d.log_prob(grid.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 4.0), (2.0, 2.0), (9.0, 1.2), (1.0001, 1.0001)])
def test_beta_density_integrates_to_one(alpha: float, beta: float) -> None:
    grid = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
    d = Beta(torch.tensor([[alpha]]).double(), torch.tensor([[beta]]).double())
    density = d.log_prob(grid.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=2e-4)
    mean = torch.trapezoid(density * grid, grid).item()
    assert mean == pytest.approx(2 * alpha / (alpha + beta) - 1, abs=2e-4)
    entropy = -torch.trapezoid(density * density.log(), grid)
    assert d.entropy().item() == pytest.approx(entropy.item(), abs=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "beta", "categorical", "multi", "bernoulli"])
def test_mode_is_where_the_density_is_highest(kind: str) -> None:
    d = make(kind, 14)
    mode = d.mode()
    if kind == "squashed":  # the mode of the normal beneath, the usual action of a squashed policy
        assert torch.equal(mode, d.mean.tanh())
        return
    others = repeated(d, 200).log_prob(draw(d, kind, 200, seed=15)).view(200, N)
    assert (others <= d.log_prob(mode) + 1e-12).all()
    assert mode.dtype == (torch.int64 if kind in DISCRETE else torch.float64)


# --- numbers at the edges ---


def test_squashed_log_prob_is_finite_at_the_bounds() -> None:
    d = SquashedGaussian(torch.tensor([[0.3]]), torch.tensor([0.1]))
    for a in (-1.0, 1.0, 1.0 - 1e-7, -0.99999):
        assert d.log_prob(torch.tensor([[a]])).isfinite().all()
    u = torch.tensor([[-40.0], [40.0], [0.0]])
    log_det = SquashedGaussian._log_det(u)
    torch.testing.assert_close(log_det, torch.tensor([2 * math.log(2) - 80, 2 * math.log(2) - 80, 0.0]) * 1.0)


def test_beta_is_finite_at_the_bounds() -> None:
    d = Beta(torch.tensor([[1.0, 50.0]]), torch.tensor([[1.0, 1.0 + 1e-6]]))
    for a in (-1.0, 1.0):
        assert d.log_prob(torch.full((1, 2), a)).isfinite().all()
    assert d.entropy().isfinite().all()
    flat = Beta(torch.ones(1, 1), torch.ones(1, 1))
    assert flat.mode() == 0  # every action is as likely: the middle


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_discrete_distributions_are_finite_at_extreme_logits(scale: float) -> None:
    logits = torch.tensor([[scale, 0.0, -scale]])
    for d, action in [
        (Categorical(logits), torch.tensor([2])),
        (MultiCategorical(logits, (2, 1)), torch.tensor([[1, 0]])),
        (Bernoulli(logits), torch.tensor([[0, 1, 1]])),
    ]:
        log_prob = d.log_prob(action)
        assert log_prob.isfinite().all() and (log_prob < -scale * 0.99).all()
        assert d.entropy().isfinite().all() and (d.entropy() >= 0).all()
        assert d.kl(d) == 0


# --- samples ---


def ks(samples: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """The Kolmogorov-Smirnov statistic times sqrt(n); above 1.95 with probability 0.001 if the law is right."""
    x = samples.double().flatten().sort().values
    n = len(x)
    p = cdf(x)
    above = (torch.arange(1, n + 1) / n - p).max()
    below = (p - torch.arange(n) / n).max()
    return float(torch.maximum(above, below)) * math.sqrt(n)


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def test_ks_tells_a_wrong_law() -> None:
    x = randn(20_000, seed=16)
    assert ks(x, normal_cdf) < 1.95
    assert ks(x + 0.03, normal_cdf) > 1.95
    assert ks(x * 1.05, normal_cdf) > 1.95


def test_gaussian_samples() -> None:
    d = DiagGaussian(torch.tensor([[0.5, -2.0]]).expand(20_000, 2), torch.tensor([0.3, -1.0]))
    x = d.sample(d.noise((20_000, 2), seeded(17)))
    z = (x - d.mean) / d.log_std.exp()
    assert ks(z[:, 0], normal_cdf) < 1.95 and ks(z[:, 1], normal_cdf) < 1.95
    assert abs(torch.corrcoef(z.T)[0, 1]) < 0.03


def test_squashed_samples() -> None:
    d = SquashedGaussian(torch.full((20_000, 1), 0.4), torch.tensor([-0.5]))
    x = d.sample(d.noise((20_000, 1), seeded(18)))
    assert ks(x, lambda a: normal_cdf((a.atanh() - 0.4) / math.exp(-0.5))) < 1.95


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 1.0), (1.05, 3.0), (2.0, 2.0), (5.0, 1.2), (80.0, 40.0), (1.0, 900.0)]
)
def test_beta_samples(alpha: float, beta: float) -> None:
    n = 20_000
    d = Beta(torch.full((n, 1), alpha), torch.full((n, 1), beta))
    x = d.sample(d.noise((n, 1), seeded(19)))
    assert x.shape == (n, 1) and (x.abs() <= 1).all()
    law = reference.Beta(torch.tensor(alpha).double(), torch.tensor(beta).double())
    unit = (x.double() + 1) / 2
    assert unit.mean() == pytest.approx(law.mean.item(), abs=4 * law.stddev.item() / math.sqrt(n))
    assert unit.var() == pytest.approx(law.variance.item(), rel=0.06)
    grid = torch.linspace(0, 1, 400_003, dtype=torch.float64)[1:-1]
    cumulative = torch.cumulative_trapezoid(law.log_prob(grid).exp(), grid)
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])
    assert ks(unit, lambda q: cdf[torch.searchsorted(grid, q).clamp(max=len(grid) - 1)]) < 1.95


def test_beta_proposals_do_not_run_out() -> None:
    """The hardest case is the smallest shape, 1: even there all tries fail far less than once in a million draws."""
    noise = Beta.noise((200_000, 1), seeded(20))
    x, uniform = noise.unbind(-1)
    d = 2.0 / 3.0
    v = (1.0 + x / math.sqrt(9.0 * d)).pow(3)
    accept = (v > 0) & (uniform.log() < 0.5 * x.square() + d * (1.0 - v + v.clamp_min(1e-20).log()))
    rate = accept.double().mean().item()
    assert rate > 0.95 and (1 - rate) ** TRIES < 1e-9
    assert accept.any(-1).all()


def frequencies(index: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of indices [n] in units of its standard deviation above its mean."""
    n, k = len(index), len(probabilities)
    expected = probabilities * n
    chi2 = ((torch.bincount(index, minlength=k) - expected).square() / expected).sum()
    return float((chi2 - (k - 1)) / math.sqrt(2 * (k - 1)))


def test_gumbel_noise() -> None:
    x = gumbel((40_000,), seeded(21))
    assert ks(x, lambda g: (-(-g).exp()).exp()) < 1.95
    assert gumbel((1_000_000,), seeded(22)).isfinite().all()


def test_categorical_samples() -> None:
    logits = torch.tensor([1.0, -1.0, 0.0, 2.0])
    d = Categorical(logits.expand(40_000, 4))
    x = d.sample(d.noise((40_000, 4), seeded(23)))
    assert x.shape == (40_000,) and x.dtype == torch.int64
    assert frequencies(x, logits.softmax(0)) < 4


def test_multi_categorical_samples_are_independent() -> None:
    d = MultiCategorical(randn(1, sum(SIZES), seed=24).float().expand(60_000, -1), SIZES)
    x = d.sample(d.noise((60_000, sum(SIZES)), seeded(25)))
    assert x.shape == (60_000, 3) and x.dtype == torch.int64
    assert frequencies(flat_index(x), joint_logits(MultiCategorical(d.logits[:1], SIZES))[0].softmax(0)) < 4


def test_bernoulli_samples_are_independent() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0])
    d = Bernoulli(logits.expand(60_000, 3))
    x = d.sample(d.noise((60_000, 3), seeded(26)))
    assert x.shape == (60_000, 3) and x.dtype == torch.int64
    on = logits.sigmoid()
    bits = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    table = torch.where(bits == 1, on, 1 - on).prod(-1)
    assert frequencies(x @ torch.tensor([4, 2, 1]), table) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_all_the_randomness(kind: str) -> None:
    d = make(kind, 27)
    shape = (N, WIDTH.get(kind, A))
    a, b, c = (d.noise(shape, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    before = torch.get_rng_state()
    assert torch.equal(d.sample(a), d.sample(b))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_a_rollout_is_noise_of_its_steps(kind: str) -> None:
    """One draw for [T, B] gives rows that fit one step each, and a sample does not depend on its neighbours."""
    d = make(kind, 28)
    noise = d.noise((4, N, WIDTH.get(kind, A)), seeded(3)).double()
    samples = d.sample(noise[2])
    for i in range(N):
        parts = [x[i : i + 1] if isinstance(x, Tensor) and x.dim() == 2 else x for x in d]
        assert torch.equal(type(d)(*parts).sample(noise[2][i : i + 1])[0], samples[i])


@pytest.mark.parametrize("mean", [-0.7, 0.0, 2.0])
def test_squashed_samples_come_with_their_density(mean: float) -> None:
    d = SquashedGaussian(torch.full((64, 2), mean).double(), torch.full((64, 2), -0.4).double())
    noise = torch.randn(64, 2, generator=Generator().manual_seed(0)).double()
    action, log_prob = d.sample_with_log_prob(noise)
    assert torch.equal(action, d.sample(noise))
    torch.testing.assert_close(log_prob, d.log_prob(action))


def test_density_of_squashed_samples_is_finite_where_tanh_is_one() -> None:
    mean = torch.full((1, 1), 12.0, requires_grad=True)
    action, log_prob = SquashedGaussian(mean, torch.zeros(1, 1)).sample_with_log_prob(torch.zeros(1, 1))
    assert action.item() == 1.0
    # the tanh's slope at u is 4 exp(-2u) for large u
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - math.log(4) + 24.0, rel=1e-6)
    (slope,) = torch.autograd.grad(log_prob.sum(), mean)
    assert slope.item() == pytest.approx(2.0)
