"""The CPU threads of PyTorch: as many as there are cores, and a word where they will wait for each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from dask.system import cpu_count

from options import Message, Option

log = logging.getLogger(__name__)


@contextmanager
def cpu_threads(threads: int | None, device: torch.device) -> Iterator[None]:
    """Let PyTorch compute with so many threads until the end of the context.

    Args:
        threads: the number; None for PyTorch's own choice, but no more than the cores that the process may use. PyTorch
            counts all cores of the machine in a container that may use a few. On a busy CPU the log then says that
            fewer may be faster.
        device: where the work runs.
    """
    before = torch.get_num_threads()
    if threads is None and device.type == "cpu":
        if before > cpu_count() and "OMP_NUM_THREADS" not in os.environ:
            threads = cpu_count()
            log.info(
                "%s CPU threads, one for each core that the process may use; PyTorch would take %s", threads, before
            )
        _tell_if_busy(threads or before)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def _tell_if_busy(threads: int) -> None:
    """Log that the load of the machine is higher than the number of its cores, where several threads would suffer."""
    load, cores = machine_load(), cpu_count()
    if threads > 1 and load > cores:
        log.warning(
            Message(
                f"this machine is busy (load {load:.1f}, {cores} core{'s' * (cores > 1)}): the {threads} threads of "
                "PyTorch wait for each other at every operation, which can take many times as long; stop other work, "
                "or give ",
                Option("threads", 1),
            )
        )


def machine_load() -> float:
    """Return the mean number of processes that wanted a core in the last minute; 0 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
