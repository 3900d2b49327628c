"""What a run says about itself: the metrics and episodes since the last row, and over the last hundred episodes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pgrl.envs import Episodes

WINDOW = 100  # episodes
FOLD = 64  # updates kept one by one: reading a metric waits for a GPU, but each one kept makes a snapshot dearer


class Record:
    """Gathers metrics of updates and finished episodes, and gives their means as a row."""

    def __init__(self) -> None:
        self._pending: list[Mapping[str, Tensor | float]] = []
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._sum_return, self._sum_length, self._ended = 0.0, 0, 0
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, metrics: Mapping[str, Tensor | float], episodes: Episodes) -> None:
        """One update's metrics, which need not be the same each time, and the episodes that ended before it."""
        self._pending.append(metrics)
        if len(self._pending) == FOLD:
            self._fold()
        self._sum_return += math.fsum(episodes.env_return)
        self._sum_length += sum(episodes.length)
        self._ended += len(episodes.env)
        self.recent.extend(episodes.env_return[-WINDOW:])

    def row(self) -> dict[str, float]:
        """Means since the last row (the last value of `charts/*`), and of the last WINDOW episodes."""
        self._fold()
        row = {}
        if self._ended:
            row["charts/episodic_return"] = self._sum_return / self._ended
            row["charts/episodic_length"] = self._sum_length / self._ended
        if self.recent:
            row["charts/episodic_return_100"] = math.fsum(self.recent) / len(self.recent)
        for name, total in self._sums.items():
            row[name] = self._last[name] if name.startswith("charts/") else total / self._counts[name]
        self._sums, self._counts = {}, {}
        self._sum_return, self._sum_length, self._ended = 0.0, 0, 0
        return row

    def _fold(self) -> None:
        for name in dict.fromkeys(name for metrics in self._pending for name in metrics):
            values = numbers([metrics[name] for metrics in self._pending if name in metrics])
            self._sums[name] = math.fsum([self._sums.get(name, 0.0), *values])
            self._counts[name] = self._counts.get(name, 0) + len(values)
            self._last[name] = values[-1]
        self._pending = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "pending": [{k: float(v) for k, v in metrics.items()} for metrics in self._pending],
            "sums": dict(self._sums),
            "last": dict(self._last),
            "counts": dict(self._counts),
            "episodes": [self._sum_return, self._sum_length, self._ended],
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending, self._counts = list(state["pending"]), dict(state["counts"])
        self._sums, self._last = dict(state["sums"]), dict(state["last"])
        self._sum_return, self._sum_length, self._ended = state["episodes"]
        self.recent = deque(state["recent"], maxlen=WINDOW)


def numbers(values: list[Tensor | float]) -> list[float]:
    """The values of numbers and tensors []; those on one device are read by one wait for it."""
    devices = {x.device if isinstance(x, Tensor) else None for x in values}
    if len(devices) == 1 and devices.isdisjoint({None, torch.device("cpu")}):
        told: list[float] = torch.stack([x for x in values if isinstance(x, Tensor)]).tolist()
        return told
    return [float(x) for x in values]
