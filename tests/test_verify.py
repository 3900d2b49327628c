"""`python -m pgrl.verify`: the table, the filter, and the exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pgrl import verify
from pgrl.config import verify_main
from pgrl.errors import UserError
from pgrl.theory import STATEMENTS
from pgrl.theory.check import Check, Statement


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pgrl.verify", *words], capture_output=True, text=True, timeout=300)


def test_the_whole_table() -> None:
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, last = done.stdout.splitlines()
    assert header.split()[0] == "statement"
    assert len(rows) == len(STATEMENTS)
    for row, statement in zip(rows, STATEMENTS, strict=True):
        assert row.startswith(statement.name) and statement.source in row and statement.compared in row
        assert row.endswith("  pass")
    assert last.startswith(f"{len(STATEMENTS)} of {len(STATEMENTS)} statements hold")


def test_a_wrong_command_is_answered_in_a_line_or_two() -> None:
    done = command("--all")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["--all: there is no such option.", "Try: python -m pgrl.verify --help"]


def test_words_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.report(["lambda = 0", "N-STEP"])
    rows = capsys.readouterr().out.splitlines()[1:-1]
    assert [row.split("  ")[0] for row in rows] == [
        "GAE, lambda = 0: the TD residual",
        "n-step returns are their definition",
    ]
    with pytest.raises(UserError, match="nothing like it: no statement"):
        verify.report(["nothing like it"])


def test_one_failure_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {"holds": Check(0.0, 1e-10), "fails": Check(1e-9, 1e-10), "breaks": Check(float("nan"), 1e-10)}
    wrong = [Statement(name, "source", "compared", lambda c=check: c) for name, check in checks.items()]
    monkeypatch.setattr(verify, "STATEMENTS", wrong)
    with pytest.raises(SystemExit) as left:
        verify_main([], verify.report)
    assert left.value.code == 1
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows[1:-1]] == ["pass", "FAIL", "FAIL"]
    assert rows[-1].startswith("1 of 3 statements hold")
    verify_main(["holds"], verify.report)  # and none leaves no exit code


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    verify_main([word], lambda words: pytest.fail("nothing runs"))
    assert capsys.readouterr().out.startswith("python -m pgrl.verify [WORD ...]")
