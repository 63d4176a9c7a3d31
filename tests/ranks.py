"""Real processes of one job on this machine, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore


def run(ranks: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[int]:
    """Call ``function(*arguments)`` in each of so many processes; their exit statuses, −SIGKILL for one that hung."""
    # they meet at a port that nobody else has
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    context = multiprocessing.get_context("forkserver")  # which imports everything once
    context.set_forkserver_preload(["torchvision", "trainer.loop.distributed"])
    processes = [
        context.Process(target=_run, args=(rank, ranks, store.port, function, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _run(rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is there already: rank 0 does not open one
        TORCHELASTIC_RESTART_COUNT="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    function(*arguments)
