"""Action distributions as small named tuples of tensors, without validation and without hidden randomness.

Each has `log_prob(action) [N]`, `entropy() [N]`, `kl(other) [N]`, `mode() [N, A]` and `sample(noise) [N, A]`, where
`noise` comes from the function `noise(shape, generator)` of the same class. Sampling from given noise lets eager,
compiled and vectorised code consume one and the same random stream. Actions of `Categorical` are [N].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LOG_2PI = math.log(2.0 * math.pi)
TRIES = 8  # of the Beta sampler: each is accepted with p > .95, so all eight fail once in 10^10 draws


class Distribution(Protocol):
    """What an agent needs of a policy's output."""

    def log_prob(self, action: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...
    def kl(self, other: Any) -> Tensor: ...
    def sample(self, noise: Tensor) -> Tensor: ...
    def mode(self) -> Tensor: ...
    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor: ...


def detached(distribution: Distribution) -> Distribution:
    """The same distribution, as constants."""
    fields: Any = distribution
    parts = (x.detach() if isinstance(x, Tensor) else x for x in fields)
    return fields._make(parts)  # type: ignore[no-any-return]


def gumbel(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard Gumbel noise: argmax(logits + gumbel) is a sample of softmax(logits)."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return -torch.log(-torch.log(uniform.clamp_(1e-20, 1.0 - 1e-7)))


class DiagGaussian(NamedTuple):
    """Independent normals; mean [N, A], log_std [A] or [N, A]."""

    mean: Tensor
    log_std: Tensor

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def sample(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.mean, noise, self.log_std.exp())

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_std).exp()
        return -0.5 * (z.square().sum(-1) + LOG_2PI * self.mean.shape[-1]) - self.log_std.sum(-1)

    def entropy(self) -> Tensor:
        per_row = self.log_std.sum(-1) + 0.5 * (1.0 + LOG_2PI) * self.mean.shape[-1]
        return per_row.expand(self.mean.shape[:-1])

    def kl(self, other: DiagGaussian) -> Tensor:
        """KL(self || other) [N]."""
        log_var_ratio = 2.0 * (self.log_std - other.log_std)
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return 0.5 * (shift + (log_var_ratio.expm1() - log_var_ratio)).sum(-1)


class SquashedGaussian(NamedTuple):
    """tanh of independent normals, so that actions lie in (-1, 1); mean [N, A], log_std [A] or [N, A].

    The log-determinant log(1 - tanh(u)^2) is written 2 (log 2 - u - softplus(-2u)), exact for large |u|.
    Haarnoja et al. 2018 (arXiv 1812.05905), appendix C. The entropy has no closed form: `entropy` returns that of
    the normal plus the log-determinant at its mean, a common approximation used for the entropy bonus alone.
    """

    mean: Tensor
    log_std: Tensor

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def _normal(self) -> DiagGaussian:
        return DiagGaussian(self.mean, self.log_std)

    @staticmethod
    def _log_det(u: Tensor) -> Tensor:
        return (2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        return self._normal().sample(noise).tanh()

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A sample [N, A] and its log-density [N], which is exact also where the tanh has rounded to 1."""
        u = self._normal().sample(noise)
        normal = -0.5 * (noise.square().sum(-1) + LOG_2PI * noise.shape[-1]) - self.log_std.sum(-1)
        return u.tanh(), normal - self._log_det(u)

    def mode(self) -> Tensor:
        return self.mean.tanh()

    def log_prob(self, action: Tensor) -> Tensor:
        bound = 1.0 - torch.finfo(action.dtype).eps
        u = torch.atanh(action.clamp(-bound, bound))
        return self._normal().log_prob(u) - self._log_det(u)

    def entropy(self) -> Tensor:
        return self._normal().entropy() + self._log_det(self.mean)

    def kl(self, other: SquashedGaussian) -> Tensor:
        """KL(self || other) [N]: that of the normals, for tanh is a bijection."""
        return self._normal().kl(other._normal())


class Beta(NamedTuple):
    """Independent Beta variables mapped from (0, 1) to (-1, 1); alpha and beta [N, A], both above 1.

    Chou et al. 2017, "Improving stochastic policy gradients ... with the Beta distribution", section 4.
    """

    alpha: Tensor
    beta: Tensor

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Proposals for two Gamma variables: [..., A, 2, TRIES, 2] normal and uniform draws."""
        full = (*shape, 2, TRIES)
        normal = torch.randn(full, generator=generator, device=generator.device)
        uniform = torch.rand(full, generator=generator, device=generator.device)
        return torch.stack([normal, uniform], -1)

    def sample(self, noise: Tensor) -> Tensor:
        """X / (X + Y) of Gamma variables by the rejection method of Marsaglia & Tsang 2000, first accepted try."""
        d = torch.stack([self.alpha, self.beta], -1).unsqueeze(-1) - 1.0 / 3.0
        x, uniform = noise.unbind(-1)
        v = (1.0 + x / (9.0 * d).sqrt()).pow(3)
        positive = v > 0
        v = v.clamp_min(1e-20)
        accept = positive & (uniform.log() < 0.5 * x.square() + d * (1.0 - v + v.log()))
        first = accept.to(torch.uint8).argmax(-1, keepdim=True)
        gamma = (d * v).gather(-1, first).squeeze(-1)
        return 2.0 * gamma[..., 0] / gamma.sum(-1) - 1.0

    def mode(self) -> Tensor:
        tiny = torch.finfo(self.alpha.dtype).tiny  # the middle where both are 1 and every action is as likely
        a, b = self.alpha - 1.0 + tiny, self.beta - 1.0 + tiny
        return (a - b) / (a + b)

    def log_prob(self, action: Tensor) -> Tensor:
        x = (0.5 * (action + 1.0)).clamp(1e-6, 1.0 - 1e-6)
        log_norm = self.alpha.lgamma() + self.beta.lgamma() - (self.alpha + self.beta).lgamma()
        kernel = (self.alpha - 1.0) * x.log() + (self.beta - 1.0) * (1.0 - x).log()
        return (kernel - log_norm - math.log(2.0)).sum(-1)

    def entropy(self) -> Tensor:
        total = self.alpha + self.beta
        log_norm = self.alpha.lgamma() + self.beta.lgamma() - total.lgamma()
        inner = (self.alpha - 1.0) * self.alpha.digamma() + (self.beta - 1.0) * self.beta.digamma()
        return (log_norm - inner + (total - 2.0) * total.digamma() + math.log(2.0)).sum(-1)

    def kl(self, other: Beta) -> Tensor:
        """KL(self || other) [N]."""
        total, other_total = self.alpha + self.beta, other.alpha + other.beta
        log_norm = self.alpha.lgamma() + self.beta.lgamma() - total.lgamma()
        other_norm = other.alpha.lgamma() + other.beta.lgamma() - other_total.lgamma()
        inner = (self.alpha - other.alpha) * self.alpha.digamma() + (self.beta - other.beta) * self.beta.digamma()
        return (other_norm - log_norm + inner + (other_total - total) * total.digamma()).sum(-1)


class Categorical(NamedTuple):
    """One choice among K; logits [N, K], actions [N] int64."""

    logits: Tensor

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return gumbel(shape, generator)

    def sample(self, noise: Tensor) -> Tensor:
        return (self.logits + noise).argmax(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return -F.cross_entropy(self.logits, action, reduction="none")

    def entropy(self) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other) [N]."""
        log_p = self.logits.log_softmax(-1)
        return (log_p.exp() * (log_p - other.logits.log_softmax(-1))).sum(-1)


class MultiCategorical(NamedTuple):
    """Independent choices among sizes[0], sizes[1], ...; logits [N, sum(sizes)], actions [N, len(sizes)] int64."""

    logits: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        return gumbel(shape, generator)

    def _parts(self) -> list[Categorical]:
        return [Categorical(x) for x in self.logits.split(self.sizes, -1)]

    def sample(self, noise: Tensor) -> Tensor:
        parts = zip(self._parts(), noise.split(self.sizes, -1), strict=True)
        return torch.stack([part.sample(n) for part, n in parts], -1)

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self._parts()], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        parts = zip(self._parts(), action.unbind(-1), strict=True)
        return torch.stack([part.log_prob(a) for part, a in parts], -1).sum(-1)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self._parts()], -1).sum(-1)

    def kl(self, other: MultiCategorical) -> Tensor:
        """KL(self || other) [N]."""
        parts = zip(self._parts(), other._parts(), strict=True)
        return torch.stack([p.kl(q) for p, q in parts], -1).sum(-1)


class Bernoulli(NamedTuple):
    """Independent switches; logits [N, A], actions [N, A] of 0 and 1, int64."""

    logits: Tensor

    @staticmethod
    def noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
        uniform = torch.rand(shape, generator=generator, device=generator.device).clamp_(1e-7, 1.0 - 1e-7)
        return torch.logit(uniform)

    def sample(self, noise: Tensor) -> Tensor:
        return (self.logits + noise > 0).long()

    def mode(self) -> Tensor:
        return (self.logits > 0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        return -F.softplus(torch.where(action > 0, -self.logits, self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        return (F.softplus(self.logits) - self.logits * self.logits.sigmoid()).sum(-1)

    def kl(self, other: Bernoulli) -> Tensor:
        """KL(self || other) [N]."""
        p = self.logits.sigmoid()
        on = F.softplus(-other.logits) - F.softplus(-self.logits)
        off = F.softplus(other.logits) - F.softplus(self.logits)
        return (p * on + (1.0 - p) * off).sum(-1)
