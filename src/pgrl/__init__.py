"""pgrl: every policy-gradient algorithm, from REINFORCE to SAC, in one readable, fast and restartable suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pgrl import mkl

if TYPE_CHECKING:
    from pgrl.agents import Agent

# Read when numpy loads its BLAS: agents act with it, one call at a time, and for that more threads are no gain.
if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Read when torch loads GNU's OpenMP: how long a thread that waits for another keeps its core. By default that is so
# long that two programs which share the cores all but stop each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
mkl.answer()  # also before torch

__version__ = "0.1.0"
__all__ = ["__version__", "load", "main", "run"]


def main() -> None:
    """The command line of training; a wrong one is answered before torch, which takes seconds, is imported."""
    from importlib import import_module

    from pgrl import config

    config.main(None, lambda run_config: import_module("pgrl.launch").launch(run_config))


def run(overrides: list[str]) -> Path:
    """Train as `python -m pgrl.train` with these arguments would, and return the run's folder.

    Raises UserError for a mistake in the arguments, and `pgrl.signals.Stop` if a signal ends the run.
    """
    from pgrl import config
    from pgrl.launch import launch
    from pgrl.processes import refuse_in_worker

    refuse_in_worker()
    return launch(config.compose(overrides))


def load(run_dir: str | Path, checkpoint: str = "last") -> Agent:
    """The agent of a run, with the weights and statistics of a checkpoint: `last`, `best`, or a step.

    `agent.act(obs, explore=False)` takes observations [B, *obs] and gives actions [B, ...] in the env's units.
    """
    from pgrl.evaluate import load as load_agent

    return load_agent(Path(run_dir), checkpoint)[0]
