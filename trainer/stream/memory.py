"""The memory that is free for this process, by the machine and by the control group that it runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 2**31  # bytes, where the system does not tell


def free_memory(root: str | Path = "/") -> int:
    """Return the memory that this process may still take: of the machine, or of its control group where that is less.

    Control groups of version 2 and 1 are read. The page cache counts as free, because the system gives it up. Without
    ``/proc/meminfo`` (macOS) it is half of the physical memory.

    Args:
        root: the folder that has ``proc`` and ``sys``.

    Returns:
        A number of bytes, at least 0.
    """
    root = Path(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = _half_of_physical()
    return max(0, min([free, *_left_in_groups(root)]))


def _half_of_physical() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


# of a control group: its folder, the files of its limit and usage, the line of memory.stat with page cache to give up
_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each limit leaves: of the process's group and of the groups around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, usage, cache = _V1 if controllers else _V2
        top = root / folder
        group = top / path.lstrip("/")  # in a container it may be invisible, and then the top is the container's
        for directory in (group, *group.parents):
            if directory.is_relative_to(top):
                yield from _left(directory, limit, usage, cache)


def _left(directory: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        left = int((directory / limit).read_text()) - int((directory / usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        yield left + int(stat.get(cache, 0))
    except (OSError, ValueError):  # not visible, or no limit ("max")
        return
