"""The theorems behind the algorithms, checked on the library's own code without sampling noise where possible."""

from pgrl.theory import deterministic, entropy, estimators, gradients, natural, regions, reinforce, scores
from pgrl.theory.check import Check, Statement

STATEMENTS: tuple[Statement, ...] = (
    *scores.STATEMENTS,
    *estimators.STATEMENTS,
    *reinforce.STATEMENTS,
    *gradients.STATEMENTS,
    *natural.STATEMENTS,
    *regions.STATEMENTS,
    *deterministic.STATEMENTS,
    *entropy.STATEMENTS,
)

__all__ = ["STATEMENTS", "Check", "Statement"]
