"""The rows of a replay buffer at one moment: kept while the buffer goes on, and as segments of bytes and back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pgrl.replay_layout import Layout, field
from pgrl.rows import Rows


class Snapshot:
    """The rows that a buffer held at one moment, while the buffer goes on.

    The buffer copies what it overwrites, so that a snapshot costs what is overwritten while it is kept.
    """

    def __init__(
        self,
        layout: Layout,
        rows: Tensor | None,
        ends: Tensor,
        *,
        first: int,
        time: int,
        next_end: int,
        saved: dict[int, str],
    ) -> None:
        self.layout, self.rows, self.ends = layout, rows, ends
        self.first, self.time, self.next_end = first, time, next_end
        self.saved = saved  # the buffer's own, so that the next snapshot knows it too
        self.kept: list[tuple[Tensor, Tensor]] = []  # slots [n], and what was there, [n, B, width]
        self.kept_ends: list[tuple[Tensor, Tensor]] = []  # slots of ends [n], and what was there, [n, obs_bytes]

    @property
    def info(self) -> dict[str, Any]:
        """The first time, the next entry, and what tells whether a buffer fits."""
        now = {"first": self.first, "time": self.time, "next_end": self.next_end}
        return {**now, "segment": self.layout.segment, **fit(self.layout)}

    def segments(self) -> dict[int, bool]:
        """All but the last are final, or all but the last two: the newest row may still be cut."""
        length = self.layout.segment
        if self.rows is None or self.first == self.time:
            return {}
        numbers = range(self.first // length, -(-self.time // length))
        return {number: (number + 1) * length < self.time for number in numbers}

    def read(self, number: int) -> bytes:
        """A segment: its first time and the time after its last (int64), the rows, and the ends that they name."""
        assert self.rows is not None
        shape = self.layout
        first = max(self.first, number * shape.segment)
        stop = min(self.time, (number + 1) * shape.segment)
        block = as_it_was(self.rows, torch.arange(first, stop) % shape.size, self.kept)
        link = field(block, shape.width - 4, (), torch.int32)
        ends = as_it_was(self.ends, (link[link >= 0] >> 1) % len(self.ends), self.kept_ends)
        return struct.pack("<qq", first, stop) + block.numpy().tobytes() + ends.numpy().tobytes()

    def __deepcopy__(self, _: object) -> Copied:
        return Copied(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and same(self, other)

    __hash__ = None  # type: ignore[assignment]


class Copied:
    """A copy of rows that shares nothing with a buffer."""

    def __init__(self, rows: Rows) -> None:
        self.info, self.saved, self._final = rows.info, dict(rows.saved), rows.segments()
        self._data = {number: rows.read(number) for number in self._final}

    def segments(self) -> dict[int, bool]:
        """Those of the original."""
        return self._final

    def read(self, number: int) -> bytes:
        """The same bytes."""
        return self._data[number]


def as_it_was(memory: Tensor, slots: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`memory` [size, ...] at `slots` [n] before what was there was `kept`: [n, ...] in host memory."""
    block = memory.index_select(0, slots.to(memory.device)).cpu()
    place = {slot: i for i, slot in enumerate(slots.tolist())}
    for changed, before in reversed(kept):  # of many changes the first tells what was there
        for i, slot in enumerate(changed.tolist()):
            if slot in place:
                block[place[slot]] = before[i]
    return block


def fit(shape: Layout) -> dict[str, int]:
    """What must be the same for one buffer to load the rows of another."""
    keys = ("capacity", "num_envs", "width", "obs_bytes")
    return {key: getattr(shape, key) for key in keys}


def held(rows: Rows) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Segment by segment: its first time that is held, the rows [times, B, width], and their ends [n, obs_bytes].

    ValueError where the bytes are not those of such rows.
    """
    told = rows.info
    capacity, num_envs, width, obs_bytes = (told[key] for key in ("capacity", "num_envs", "width", "obs_bytes"))
    time = told["first"]
    for number in rows.segments():
        data = bytearray(rows.read(number))
        first, stop = struct.unpack_from("<qq", data)
        size = 16 + (stop - first) * num_envs * width
        if not first <= time < stop <= told["time"] or stop - first > capacity or len(data) < size:
            raise ValueError(f"segment {number} holds the times {first} to {stop}, where {time} was expected")
        every = torch.frombuffer(data, dtype=torch.uint8)
        block, ends = every[16:size].view(-1, num_envs, width), every[size:]
        named = field(block, width - 4, (), torch.int32) >= 0
        if len(ends) != int(named.sum()) * obs_bytes:
            raise ValueError(f"segment {number} has {len(data):,} bytes, which is not what its rows say")
        skipped = int(named[: time - first].sum())  # of times that were overwritten before the state was taken
        yield time, block[time - first :], ends.view(-1, obs_bytes)[skipped:]
        time = stop
    if time != told["time"]:
        raise ValueError(f"the rows from time {time} on are missing")


def same(a: Rows, b: Rows) -> bool:
    """Whether two states have the same rows, however they are kept."""
    if a.info != b.info:
        return False
    pairs = zip(held(a), held(b), strict=True)
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) for x, y in pairs)
