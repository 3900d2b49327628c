"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Bytes of main memory: what the kernel calls available, or less where a control group's limit is nearer.

    `root` is where `proc` and `sys` are. Page cache that the kernel would drop for us counts as free.
    """
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    told = numbers(root / "proc/meminfo", ":")
    if "MemAvailable" in told:
        free = [1024 * told["MemAvailable"]]
    for limit, used, statistics in control_groups(root):
        cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        free.append(limit - used + cached)
    return max(0, min(free))


def control_groups(root: Path) -> list[tuple[int, int, dict[str, int]]]:
    """Limit, use and statistics of the control groups of this process that limit its memory, of version 1 and 2."""
    found = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            if text(folder / limit).strip().isdigit() and text(folder / used).strip().isdigit():
                statistics = numbers(folder / "memory.stat", " ")
                found.append((int(text(folder / limit)), int(text(folder / used)), statistics))
            if folder == top:
                break
    return found


def numbers(path: Path, separator: str) -> dict[str, int]:
    """The first number of each line of a file, by what stands before the separator."""
    lines = [line.partition(separator) for line in text(path).splitlines()]
    return {key: int(rest.split()[0]) for key, _, rest in lines if rest.split() and rest.split()[0].isdigit()}


def text(path: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
