"""What a checkpoint asks of rows that are too many to be written anew each time, and need not be."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Rows(Protocol):
    """Rows in numbered segments. A segment is final when no later state has it otherwise; then it is written once."""

    @property
    def info(self) -> dict[str, Any]:
        """What else it takes to load them: numbers by name."""

    @property
    def saved(self) -> dict[int, str]:
        """The checksums of the final segments that were written or read; whoever writes one adds it."""

    def segments(self) -> dict[int, bool]:
        """The numbers of the segments, ascending, and whether each is final."""

    def read(self, number: int) -> bytes:
        """The bytes of a segment."""
