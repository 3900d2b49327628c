"""The theorems, checked on the code that trains; also `python -m pgrl.verify`."""

from __future__ import annotations

if __name__ == "__main__":  # here, not at the end, as in train.py
    from importlib import import_module

    from pgrl import config as command_line

    command_line.verify_main(None, lambda words: import_module("pgrl.verify").report(words))
    raise SystemExit

import time
from collections.abc import Sequence

import torch

from pgrl.errors import UserError
from pgrl.theory import STATEMENTS, Statement

HEADER = ("statement", "source", "what was compared", "error", "allowed", "")


def report(words: Sequence[str] = ()) -> bool:
    """Check the statements whose line has one of the words, or all of them; print a line for each.

    Returns whether all hold. UserError if there is none to check.
    """
    chosen = [s for s in STATEMENTS if not words or any(word.lower() in text(s).lower() for word in words)]
    if not chosen:
        raise UserError(f"{' '.join(words)}: no statement has this in its line.\nTry: python -m pgrl.verify")
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    start = time.perf_counter()
    widths = [max(map(len, column)) for column in zip(HEADER[:3], *(s[:3] for s in chosen), strict=True)]
    print(line(HEADER, widths))
    passed = 0
    for statement in chosen:
        check = statement.check()
        passed += check.passed
        result = (f"{check.error:.1e}", f"{check.tolerance:.0e}", "pass" if check.passed else "FAIL")
        print(line((*statement[:3], *result), widths), flush=True)
    print(f"{passed} of {len(chosen)} statements hold; checked in {time.perf_counter() - start:.1f} s")
    return passed == len(chosen)


def text(statement: Statement) -> str:
    """What a statement's line says before it is checked."""
    return "  ".join(statement[:3])


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of the table: three columns of text, two of numbers, and the result."""
    left = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
    return "  ".join([*left, cells[3].rjust(7), cells[4].rjust(7), cells[5]]).rstrip()
