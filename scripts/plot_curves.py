"""Learning curves: the training return against env steps, mean over seeds with a 95 % bootstrap band.

Colours are of Okabe and Ito's palette, which colour-blind readers can tell apart. Matplotlib comes with the
`plot` extra.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
BINS = 100
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """One suite: `steps` [G], training `returns` [S, G], `final` evaluations [S], a published score."""

    title: str
    steps: Array
    returns: Array
    final: Array
    reference: float


def bin_returns(rows: Sequence[Mapping[str, Any]], total: int, bins: int = BINS) -> Array:
    """The raw training return in equal bins of steps up to `total`, [bins]: the mean of the rows in each.

    Bins without an episode are interpolated; those before the first episode are NaN.
    """
    tag = "charts/episodic_return"
    points = [(int(row["step"]), float(row[tag])) for row in rows if tag in row and math.isfinite(float(row[tag]))]
    sums, counts = np.zeros(bins), np.zeros(bins)
    for step, value in points:
        index = min(max(math.ceil(step * bins / total) - 1, 0), bins - 1)
        sums[index] += value
        counts[index] += 1
    filled = np.flatnonzero(counts)
    if not len(filled):
        return np.full(bins, np.nan)
    means = sums[filled] / counts[filled]
    return np.interp(np.arange(bins), filled, means, left=np.nan)


def bootstrap_band(curves: Array, n: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[Array, Array]:
    """A percentile bootstrap interval of the mean over seeds: `curves` [S, G] -> low [G], high [G].

    Whole curves are resampled, so the band is the same whatever the grid.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(len(curves), size=(n, len(curves)))
    weights = np.stack([np.bincount(row, minlength=len(curves)) for row in chosen]) / len(curves)
    low, high = np.quantile(weights @ curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def draw(axes: "Axes", curves: Curves) -> None:
    """Draw a thin line a seed, their mean with its band, the final evaluations, and the reference."""
    steps = curves.steps
    axes.plot(steps, curves.returns.T, color=BLUE, alpha=0.22, linewidth=0.7)
    if len(curves.returns) > 1:
        axes.fill_between(steps, *bootstrap_band(curves.returns), color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(steps, curves.returns.mean(axis=0), color=BLUE, linewidth=1.8, label="training, mean and 95 % band")
    axes.axhline(curves.reference, color=ORANGE, linestyle="--", linewidth=1.3, label="published reference")
    axes.plot(
        np.full(len(curves.final), steps[-1] * 1.025),
        curves.final,
        linestyle="none",
        marker="D",
        markersize=3.5,
        color=GREEN,
        markeredgewidth=0,
        alpha=0.8,
        label="evaluation of a seed",
        clip_on=False,
    )
    axes.set_title(curves.title, fontsize=10, loc="left")
    axes.set_xlim(0, steps[-1] * 1.05)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)


def short(steps: float) -> str:
    """A number of steps in few letters: 0, 250k, 1M."""
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"


def plot_suite(curves: Curves, path: Path) -> None:
    """Write the picture of one suite."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, curves)
    axes.set_xlabel("environment steps", fontsize=9)
    axes.set_ylabel("return of an episode", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def plot_grid(suites: Sequence[Curves], path: Path, columns: int = 4) -> None:
    """Write one picture of all suites, with one legend."""
    from matplotlib.figure import Figure

    columns = min(columns, len(suites))
    rows = math.ceil(len(suites) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, curves in zip(grid, suites, strict=False):
        draw(axes, curves)
    for axes in grid[len(suites) :]:
        axes.set_axis_off()
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return of an episode", fontsize=9)
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    save(figure, path)


def save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
