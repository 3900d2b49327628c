"""The statements of `python -m pgrl.verify`, a test each; and that each of them fails where the code is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pgrl import functional, trust_region
from pgrl.agents import DPG, on_policy, reinforce, trpo
from pgrl.agents import natural as natural_agents
from pgrl.distributions import Beta, Categorical, DiagGaussian, SquashedGaussian
from pgrl.theory import STATEMENTS, Statement, estimators, gradients, natural
from pgrl.theory.check import Check, at_least, differs, equal
from pgrl.theory.mdp import episodes, objective, random_mdp, score_weighted, values

BY_NAME = {s.name: s for s in STATEMENTS}
THEORY_PAGE = Path(__file__).parents[2] / "docs" / "theory.md"


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.name)
def test_statement_holds(statement: Statement) -> None:
    check = statement.check()
    assert check.passed, check
    assert check.tolerance <= 1e-6


def test_each_name_is_one_line_of_its_own() -> None:
    assert len(BY_NAME) == len(STATEMENTS)
    assert all(len("  ".join(s[:3])) <= 140 for s in STATEMENTS)


# --- mutations: what is wrong in the code, and which statements then fail ---


class Mutation(NamedTuple):
    what: str
    owner: Any
    name: str
    wrong: Callable[[Any], Any]  # from the right one
    fails: tuple[str, ...]


def unmasked(_: Any) -> Any:
    return lambda reward, value, next_value, terminated, gamma: reward + gamma * next_value - value


def uncut(_: Any) -> Any:
    def gae(
        reward: Tensor,
        value: Tensor,
        next_value: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
        lam: float,
    ) -> Tensor:
        delta = functional.td_error(reward, value, next_value, terminated, gamma)
        return functional.discounted_sum(delta, gamma * lam * (~terminated).double())

    return gae


def own_included(_: Any) -> Any:
    return lambda x, y: (x.sum(0) / y.sum(0)).expand_as(x)


def clamped_alone(_: Any) -> Any:
    """The clipped term without the minimum: it also stops what should come back."""

    def loss(log_ratio: Tensor, advantage: Tensor, low: Tensor, high: Any = None, dual: Any = None) -> Tensor:
        return -(log_ratio.exp().clamp(1 - low, 1 + (low if high is None else high)) * advantage).mean()

    return loss


def shifted(right: Any) -> Any:
    return lambda log_ratio, *args: right(log_ratio + 0.3, *args)


def scaled(by: float) -> Callable[[Any], Any]:
    return lambda right: lambda *args, **kwargs: by * right(*args, **kwargs)


def longer(right: Any) -> Any:
    def natural_step(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return found._replace(step=1.01 * found.step)

    return natural_step


def careless(right: Any) -> Any:
    """A line search that takes whatever it tries first."""
    return lambda try_step, predicted, **_: trust_region.Search(1.0, *[try_step(1.0)] * 2)


def stays_behind(right: Any) -> Any:
    """A line search that does not move back after it refused every point."""

    def line_search(try_step: Any, predicted: float, **keys: Any) -> Any:
        return right(lambda fraction: try_step(fraction or 1e-3), predicted, **keys)

    return line_search


def same_coordinates(right: Any) -> Any:
    return lambda: [form._replace(forward=lambda x: 1.0 * x) for form in right()]


def count_one_more(right: Any) -> Any:
    def complete_episodes(*args: Any) -> Any:
        complete, n = right(*args)
        return complete, n + 1

    return complete_episodes


MUTATIONS = (
    Mutation(
        "logits for log-probs",
        Categorical,
        "log_prob",
        lambda _: lambda self, action: self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1),
        ("the score has zero mean (discrete)", "REINFORCE's expected step is grad J"),
    ),
    Mutation(
        "a Gaussian that forgets its scale",
        DiagGaussian,
        "log_prob",
        lambda right: lambda self, action: right(self, action) + self.log_std.sum(-1),
        (
            "the score has zero mean (continuous)",
            "Fisher-vector product is F v",
            "Gaussian steps follow the gradient",
        ),
    ),
    Mutation(
        "a Beta density off by its norm",
        Beta,
        "log_prob",
        lambda right: lambda self, action: right(self, action) + self.alpha.lgamma().sum(-1),
        ("the score has zero mean (continuous)",),
    ),
    Mutation(
        "a loss of the wrong sign",
        functional,
        "policy_gradient_loss",
        scaled(-1.0),
        ("softmax gradient of two actions", "A2C's expected step is grad J / H"),
    ),
    Mutation(
        "the biased estimate of the KL",
        functional,
        "approx_kl",
        lambda _: lambda log_ratio: 0.5 * log_ratio.square().mean(),
        ("approx_kl is unbiased, and its gradient",),
    ),
    Mutation(
        "returns without a bootstrap",
        functional,
        "monte_carlo",
        lambda right: lambda reward, next_value, *args: right(reward, torch.zeros_like(reward), *args),
        ("d_gamma is a distribution", "a truncation bootstraps, an end does not", "GAE, lambda = 1: Monte Carlo - V"),
    ),
    Mutation(
        "returns without a discount",
        functional,
        "monte_carlo",
        lambda right: (
            lambda reward, next_value, terminated, truncated, _: right(reward, next_value, terminated, truncated, 1.0)
        ),
        ("A2C with gamma < 1 is not grad J", "REINFORCE's expected step is grad J"),
    ),
    Mutation(
        "V after a termination",
        functional,
        "td_error",
        unmasked,
        (
            "advantages average to zero",
            "performance-difference lemma",
            "GAE, lambda = 0: the TD residual",
            "GAE is its definition",
            "true V: every lambda is exact",
        ),
    ),
    Mutation(
        "a trace that runs on through truncations",
        functional,
        "gae",
        uncut,
        ("GAE is its definition", "GAE, lambda = 1: Monte Carlo - V"),
    ),
    Mutation(
        "another lambda",
        functional,
        "gae",
        lambda right: lambda *args: right(*args[:-1], 0.9 * args[-1] + 0.02),
        ("GAE, lambda = 0: the TD residual", "GAE is its definition", "wrong V: lambda < 1 is biased"),
    ),
    Mutation(
        "one reward too many",
        functional,
        "n_step",
        lambda right: lambda *args: right(*args[:-1], args[-1] + 1),
        ("n-step returns are their definition",),
    ),
    Mutation(
        "time limits taken for terminations",
        on_policy,
        "ends",
        lambda _: lambda config, rollout: rollout.terminated | rollout.truncated,
        ("a truncation bootstraps, an end does not",),
    ),
    Mutation(
        "gamma^0 at every step",
        functional,
        "episode_age",
        lambda right: lambda *args: torch.zeros_like(right(*args)),
        ("REINFORCE's expected step is grad J", "a state baseline changes nothing", "REINFORCE on episodes in a row"),
    ),
    Mutation(
        "an age that is never reset",
        functional,
        "episode_age",
        lambda right: lambda a, b, first: right(torch.zeros_like(a), torch.zeros_like(b), first),
        ("REINFORCE on episodes in a row",),
    ),
    Mutation(
        "an episode too many",
        functional,
        "complete_episodes",
        count_one_more,
        ("without gamma^t REINFORCE is biased", "REINFORCE's expected step is grad J"),
    ),
    Mutation(
        "a baseline that saw the action",
        reinforce,
        "values",
        lambda right: lambda *args: right(*args)[1:] * 2,
        ("a state baseline changes nothing",),
    ),
    Mutation(
        "baselines that hold the own return",
        functional,
        "others_ratio",
        own_included,
        ("baselines of other envs change nothing", "b* has the least variance"),
    ),
    Mutation(
        "one mean for all times",
        functional,
        "mean_by_age",
        lambda _: lambda x, weight, age: functional.weighted_mean(x, weight),
        ("a mean at each time shrinks by 1/n",),
    ),
    Mutation(
        "no baseline",
        functional,
        "weighted_mean",
        lambda _: lambda x, weight: torch.zeros_like(x),
        ("an episode's mean as baseline biases",),
    ),
    Mutation(
        "a theorem without gamma^t",
        gradients,
        "discounts",
        lambda right: lambda mdp: torch.ones_like(right(mdp)),
        ("policy-gradient theorem",),
    ),
    Mutation(
        "a sum instead of a mean",
        functional,
        "policy_gradient_loss",
        lambda _: lambda log_prob, advantage: -(log_prob * advantage).sum(),
        ("A2C's expected step is grad J / H", "A2C with gamma < 1 is not grad J", "wrong V: lambda < 1 is biased"),
    ),
    Mutation(
        "ratios that begin beyond the clip",
        functional,
        "ppo_clip_loss",
        shifted,
        ("PPO at ratio 1: the policy gradient", "PPO's clip stops the gradient"),
    ),
    Mutation(
        "a clip without the minimum",
        functional,
        "ppo_clip_loss",
        clamped_alone,
        ("PPO's clip stops the gradient",),
    ),
    Mutation(
        "a Fisher matrix 1 % too large",
        trust_region.FisherProduct,
        "__call__",
        scaled(1.01),
        (
            "Fisher-vector product is F v",
            "Gauss-Newton is the Hessian of the KL",
            "NPG's step is the natural gradient's",
            "NPG's KL is max_kl to second order",
        ),
    ),
    Mutation(
        "no Fisher matrix",
        trust_region.FisherProduct,
        "__call__",
        lambda _: lambda self, v: v,
        ("the natural gradient is invariant",),
    ),
    Mutation(
        "conjugate gradients that stop early",
        trust_region,
        "conjugate_gradient",
        lambda right: lambda product, b, iterations, tolerance: right(product, b, iterations // 20, tolerance),
        ("conjugate gradients solve", "NPG's step is the natural gradient's"),
    ),
    Mutation(
        "one policy written in one way",
        natural,
        "forms",
        same_coordinates,
        ("the plain gradient is not",),
    ),
    Mutation(
        "a step 1 % too long",
        natural_agents,
        "natural_step",
        longer,
        ("NPG's step is the natural gradient's", "NPG's KL is max_kl to second order"),
    ),
    Mutation(
        "no line search",
        trpo,
        "line_search",
        careless,
        ("TRPO keeps its KL and never falls",),
    ),
    Mutation(
        "a refused step that stays",
        trpo,
        "line_search",
        stays_behind,
        ("TRPO keeps its KL and never falls",),
    ),
    Mutation(
        "a surrogate 1 % too steep",
        functional,
        "ppo_loss",
        scaled(1.01),
        ("the surrogate agrees to first order",),
    ),
    Mutation(
        "no penalty",
        Categorical,
        "kl",
        lambda _: lambda self, other: torch.zeros_like(self.logits[..., 0]),
        ("TRPO's lower bound",),
    ),
    Mutation(
        "gradients of the policy 1 % too large",
        DPG,
        "gradients",
        scaled(1.01),
        (
            "deterministic policy gradient theorem",
            "the compatible Q has the policy's slope",
            "the best compatible Q is as good as Q",
            "COPDAC-Q rests at the solution",
        ),
    ),
    Mutation(
        "the successor of another state",
        functional,
        "td0",
        lambda right: lambda reward, next_value, *args: right(reward, next_value.roll(1, 0), *args),
        ("COPDAC-Q rests at the solution", "soft backups are soft value iteration"),
    ),
    Mutation(
        "a density without the slope of tanh",
        SquashedGaussian,
        "_log_det",
        lambda _: staticmethod(lambda u: torch.zeros_like(u[..., 0])),
        ("the squashed density integrates to 1",),
    ),
    Mutation(
        "entropy at half its price",
        functional,
        "soft_value",
        lambda right: lambda q, log_pi, alpha: right(q, log_pi, 0.5 * alpha),
        ("the soft optimum is softmax(q / alpha)", "soft backups are soft value iteration"),
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_wrong_code_fails(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(mutation.owner, mutation.name)
    monkeypatch.setattr(mutation.owner, mutation.name, mutation.wrong(right))
    for name in mutation.fails:
        assert not BY_NAME[name].check().passed, name


def test_every_statement_can_fail() -> None:
    assert {name for mutation in MUTATIONS for name in mutation.fails} == set(BY_NAME)


# --- the checks, and the tiny worlds they use ---


def test_checks() -> None:
    one, two = torch.ones(2).double(), torch.tensor([1.0, 2.0]).double()
    assert equal((one, one), (two, one)) == Check(1.0, 1e-10)
    assert not equal((one, one * torch.nan), (one, one)).passed
    assert differs(two, two, one).passed and not differs(one, one, one).passed and not differs(one, two, one).passed
    assert at_least((two, one)).error == 0.0 and at_least((one, two)).error == 1.0
    assert not at_least((one * torch.nan, one)).passed
    with pytest.raises(AssertionError):
        equal((one, one[:1]))


def test_episodes_are_all_there_are() -> None:
    mdp = random_mdp(3, 2, 3, 0.9, seed=0)
    policy = estimators.tabular(1, 3, 3, 2)
    found = episodes(mdp, policy)
    assert len(found.probability) == 3 * 2 * (3 * 2) ** 2
    torch.testing.assert_close(found.probability.sum(), torch.ones(()).double())
    returns = (found.reward * 0.9 ** torch.arange(3)).sum(-1)
    torch.testing.assert_close(found.probability @ returns, objective(mdp, policy))
    only = episodes(random_mdp(3, 2, 3, 0.9, seed=0, first=1), policy)
    assert set(only.state[:, 0].tolist()) == {1} and len(only.state) == 2 * (3 * 2) ** 2


def test_exact_gradient_is_the_difference_quotient() -> None:
    mdp = random_mdp(2, 2, 3, 0.9, seed=2)
    logits = estimators.tabular(3, 3, 2, 2).log().requires_grad_()
    policy = logits.softmax(-1)
    weight = 0.9 ** torch.arange(3).double()
    weighted = score_weighted(mdp, policy, values(mdp, policy).q, weight)
    slope = torch.autograd.grad(weighted, logits)[0]
    h = 1e-6
    for index in [(0, 0, 0), (1, 1, 0), (2, 0, 1)]:
        away = torch.zeros_like(logits)
        away[index] = h
        up, down = (objective(mdp, (logits + x).softmax(-1)) for x in (away, -away))
        torch.testing.assert_close((up - down).detach() / (2 * h), slope[index], rtol=0.0, atol=1e-8)


# --- docs/theory.md ---


def test_the_page_names_every_statement_and_only_what_exists() -> None:
    page = THEORY_PAGE.read_text()
    headings = re.findall(r"^\*\*(.+?)\*\* ", page, re.MULTILINE)
    assert headings == [s.name for s in STATEMENTS]
    linked = re.findall(r"\[`([\w.]+)`\]\(\.\./(src/pgrl/[\w/]+\.py)\)", page)
    assert len(linked) >= len(STATEMENTS)
    for name, file in linked:
        source = (THEORY_PAGE.parents[1] / file).read_text()
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b|^{part}\b.*=", source, re.MULTILINE), f"{name} in {file}"
    for s in STATEMENTS:
        assert s.source in page, s.source
