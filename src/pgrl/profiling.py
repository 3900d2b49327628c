"""Where the time of a run goes: `profile=true`.

The parts of a run do not know that they are watched: their bound methods are replaced on the objects, and there is one
clock, which is always running for one section. So the sections are exclusive, and add up to the whole by construction.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pgrl import files
from pgrl.runs import Run
from pgrl.upkeep import Upkeep

log = logging.getLogger("pgrl")

ENV, ACT, COLLECT = "env", "acting", "rest of collecting"
UPDATE, ADD, SAMPLE, COMPILER = "update", "replay: adding", "replay: sampling", "compiler"
EVALUATE, LOG, SAVE, REST = "evaluation", "logging", "saving", "the rest"
SECTIONS = (ENV, ACT, COLLECT, UPDATE, ADD, SAMPLE, COMPILER, EVALUATE, LOG, SAVE, REST)

BLUE, GREY = "#0072B2", "#595959"


class Line(NamedTuple):
    """A section of a run's time."""

    section: str
    seconds: float
    share: float  # of the loop's time, in [0, 1]
    us_per_step: float | None  # microseconds for each env step; None where there was none


class Profile:
    """Takes the time of a run's sections between `with profile:` and its end, and reports it.

    To be made when the run is about to enter its loop. Everything is measured in this process, from where it began or
    was resumed. The methods that are replaced hold no state, so that a run's snapshots are what they are without.
    """

    def __init__(self, run: Run, upkeep: Upkeep, *, compiled: bool) -> None:
        self._position, self._first_step = run.position, run.position.step
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._now, self._since, self._interrupted = COLLECT, time.perf_counter(), UPDATE
        self._compiled = compiled
        self._watch(run.env, "step", ENV)
        self._watch(run.agent, "act", ACT)
        self._watch(run.agent, "update", UPDATE, then=REST)  # until `tend`: what the loop does with the metrics
        buffer = getattr(run.agent, "buffer", None)
        if buffer is not None:
            self._watch(buffer, "add", ADD)
            self._watch(buffer, "sample", SAMPLE)
            self._watch(buffer, "update_priorities", SAMPLE)
        self._watch(upkeep, "tend", REST, then=COLLECT)
        self._watch(upkeep, "evaluate", EVALUATE)
        self._watch(upkeep, "log", LOG)
        self._watch(upkeep, "snapshot", SAVE)
        self._watch(upkeep, "save", SAVE)

    def __enter__(self) -> Profile:
        if self._compiled:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._compiler_starts)
            callback_handler.register_end_callback(self._compiler_ends)
        self._now, self._since = COLLECT, time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._switch(REST)
        if self._compiled:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._compiler_starts)
            callback_handler.remove_end_callback(self._compiler_ends)

    def _watch(self, part: Any, method: str, section: str, then: str | None = None) -> None:
        """Let the clock run for `section` while a method of `part` runs, and `then`, or as before, when it is done."""
        call: Callable[..., Any] = getattr(part, method)

        @wraps(call)
        def watched(*arguments: Any, **named: Any) -> Any:
            if self._now == EVALUATE:  # is one section, acting and all
                return call(*arguments, **named)
            before = self._switch(section)
            try:
                return call(*arguments, **named)
            finally:
                self._switch(then or before)

        setattr(part, method, watched)

    def _switch(self, section: str) -> str:
        """Let the clock run for another section from now on; the section it ran for."""
        now, before = time.perf_counter(), self._now
        self._seconds[before] += now - self._since
        self._now, self._since = section, now
        return before

    def _compiler_starts(self, _: object) -> None:
        self._interrupted = self._switch(COMPILER)

    def _compiler_ends(self, _: object) -> None:
        self._switch(self._interrupted)

    @property
    def steps(self) -> int:
        """Env steps that were profiled, over all envs."""
        return self._position.step - self._first_step

    @property
    def seconds(self) -> float:
        """The time of the loop."""
        return sum(self._seconds.values())

    def lines(self) -> list[Line]:
        """The sections that took time, in the order in which an iteration meets them."""
        whole, steps = self.seconds, self.steps
        return [
            Line(section, seconds, seconds / whole, 1e6 * seconds / steps if steps else None)
            for section, seconds in self._seconds.items()
            if seconds
        ]

    def table(self) -> str:
        """What is shown at the end of a run."""
        rows = [*self.lines(), Line("all", self.seconds, 1.0, 1e6 * self.seconds / self.steps if self.steps else None)]
        text = [f"{'where the time went':20} {'seconds':>10} {'share':>8} {'µs/step':>10}"]
        for section, seconds, share, us in rows:
            text.append(f"{section:20} {seconds:10.3f} {share:8.1%} {'-' if us is None else f'{us:,.1f}':>10}")
        return "\n".join(text)

    def write(self, run_dir: Path, title: str) -> str:
        """Write profile.json, and profile.png where matplotlib is installed: the table, and a word on what is not."""
        tree = {"steps": self.steps, "seconds": self.seconds, "sections": [line._asdict() for line in self.lines()]}
        note = f"also in {run_dir}: profile.json, profile.png"
        try:
            files.write_text(run_dir / "profile.json", json.dumps(tree, indent=2) + "\n")
            files.write_bytes(run_dir / "profile.png", self.picture(title))
        except ImportError:
            note = f"also in {run_dir}: profile.json; for a picture: pip install matplotlib"
        except OSError as error:
            note = f"not written to {run_dir}: {error}"
        return f"\n{self.table()}\n{note}"

    def picture(self, title: str) -> bytes:
        """The table as horizontal bars, a PNG; ImportError without matplotlib, which is of the `plot` extra."""
        from matplotlib.figure import Figure

        lines = self.lines()[::-1]  # the first on top
        figure = Figure(figsize=(7.0, 1.1 + 0.32 * len(lines)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([line.section for line in lines], [100 * line.share for line in lines], color=BLUE, height=0.7)
        labels = [f"{line.share:.1%}   {line.seconds:,.2f} s" for line in lines]
        axes.bar_label(bars, labels, padding=4, color=GREY, fontsize=9)
        axes.set_xlim(0, 130 * max(line.share for line in lines))  # room for the labels
        axes.set_title(f"{title}: {self.seconds:,.1f} s for {self.steps:,} env steps", loc="left", fontsize=10)
        axes.xaxis.set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()
