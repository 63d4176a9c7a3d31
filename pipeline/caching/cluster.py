"""Running one task a shard on an existing Dask cluster. Knows no store and no model.

Dask itself sends the tasks of a lost worker to another one. Not here: what a task does (`stage_one.py`).
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import dask.config
from dask.utils import parse_timedelta

from options import Message, Option, first_line
from pipeline.errors import ClusterError

if TYPE_CHECKING:  # an optional dependency, imported where it is used
    from distributed import Client, Future

# Each costs client and scheduler together 60 to 100 kB (as measured, with 1,000 class names) and some ms, so that
# 10,000 at once would be a gigabyte. More threads than this in one cluster would find no task.
IN_FLIGHT = 1000


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler at ``address``, closed in the end. Raises ClusterError where none answers in time."""
    try:
        from distributed import Client
    except ImportError:
        raise ClusterError(
            Message(
                "running on a cluster needs the package 'distributed': "
                "pip install 'explanation-distillation[distributed]', or leave ",
                Option("scheduler"),
                " out",
            )
        ) from None
    patience = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    try:
        _greet(address, patience)
        client = Client(address, timeout=patience, set_as_default=False)
    except Exception as error:  # a foreign server makes Dask raise anything, MemoryError included
        reason = first_line(error)
        raise ClusterError(
            Message(
                f"no Dask scheduler answers at {address!r} ({reason}): give ",
                Option("scheduler"),
                " the address that "
                "`dask scheduler` prints, such as tcp://10.0.0.1:8786, or leave it out to run on this machine alone",
            )
        ) from None
    # they print tracebacks of what is raised as a ClusterError, and the last one of a Ctrl-C at the wrong moment
    quiet = ("distributed.client", "distributed.batched", "tornado.application")
    levels = {log: log.level for log in map(logging.getLogger, quiet)}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    try:
        with client:
            yield client
    finally:
        for log, level in levels.items():
            log.setLevel(level)


def _greet(address: str, patience: float) -> None:
    """Raise unless a scheduler shakes hands within ``patience`` s; a `Client` waits for ever on a silent server."""

    async def greet() -> None:
        from distributed.comm.core import connect
        from distributed.security import Security

        arguments = Security().get_connection_args("client")
        comm = await connect(address, timeout=patience, **arguments)
        await comm.close()

    async def in_time() -> None:
        try:
            await asyncio.wait_for(greet(), patience + 1)  # the second is for the clearer message of `connect`
        except TimeoutError:
            raise TimeoutError(f"something listens there, and says nothing in {patience:g} s") from None

    with ThreadPoolExecutor(1) as thread:  # this one may run an event loop already, as in a notebook
        thread.submit(asyncio.run, in_time()).result()


def run_on_cluster(
    client: Client, task: Callable[[int], Any], shards: Sequence[int], name: str, done: Callable[[Any], object]
) -> None:
    """Run ``task(shard)`` on the cluster's workers for every shard, and tell ``done`` each result as it comes.

    Leaves no task waiting when it ends, by whatever way; a worker finishes the one it is at. An error of a task is
    raised here as it was there. Raises ClusterError where workers die at a shard, cannot run this program, or the
    scheduler is lost.
    """
    from distributed import as_completed

    where = f"the cluster {getattr(client.scheduler, 'address', '')}"
    if shards and not client.nthreads():
        print(f"{where} has no worker yet: waiting for one", file=sys.stderr)
    run = uuid.uuid4().hex  # what an earlier run with this name left on the scheduler is another task
    outstanding: dict[Future[Any], int] = {}

    pickled = pickle.dumps(task)

    def unpickled(shard: int) -> Any:  # nested, so it travels by value: the scheduler need not have our packages
        try:
            there = pickle.loads(pickled)
        except Exception as error:  # no such module, or one of another version
            raise ImportError(str(error)) from error
        try:
            return there(shard)
        except Exception as error:
            error.__cause__ = error.__context__ = None  # which the journey might not let through, and the error with it
            raise

    def submit(shard: int) -> Future[Any]:
        future = client.submit(unpickled, shard, key=(f"explain {name}-{run}", shard), pure=False)
        outstanding[future] = shard
        return future

    waiting = iter(shards)
    futures = as_completed([submit(shard) for shard in islice(waiting, IN_FLIGHT)], loop=client.loop)
    try:
        for future in futures:
            done(_result(future, outstanding[future], where))
            del outstanding[future]
            for shard in islice(waiting, 1):
                futures.add(submit(shard))
    finally:
        if outstanding and client.status == "running":
            client.cancel(list(outstanding))


def _result(future: Future[Any], shard: int, where: str) -> Any:
    from distributed import KilledWorker
    from distributed.comm.core import CommClosedError

    try:
        return future.result()
    except KilledWorker as error:
        raise ClusterError(
            f"{error.allowed_failures + 1} workers of {where} died while they computed shard {shard}, the last of them "
            f"{error.last_worker.address}: look in the workers' logs for the reason (often it is memory: a smaller "
            "batch size needs less); the same command continues where it stopped"
        ) from None
    except (CancelledError, CommClosedError) as error:
        reason = getattr(error, "reason", "") or type(error).__name__
        raise ClusterError(
            f"{where} was lost, or cancelled the task of shard {shard} ({reason}): see that it runs, then give the "
            "same command, which continues where it stopped"
        ) from None
    except ImportError as error:
        raise ClusterError(
            f"a worker of {where} cannot run this program ({error}): install the same version of "
            "explanation-distillation in the environment of every worker"
        ) from None


def on_every_worker(client: Client, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in every worker process there is; what goes wrong there is no concern of the caller's."""
    if client.status == "running":
        client.run(function, *arguments, on_error="ignore")
