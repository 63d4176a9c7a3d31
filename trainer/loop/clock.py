"""The time of a training: in all, of waiting for data, since the last line of the log, since the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from trainer.stream.stream import Batch


class Timed:
    """Pass batches on; ``seconds_waiting`` is the time that the consumer has waited for them."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self.seconds_waiting = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds_waiting += time.perf_counter() - started


class Clock:
    """Add up ``seconds`` and ``seconds_waiting`` in the progress of a training, over all its starts.

    Args:
        progress: has the keys ``step``, ``seconds`` and ``seconds_waiting``; `update` changes the last two.
        timed: the batches of the training.
    """

    def __init__(self, progress: dict[str, Any], timed: Timed):
        self._progress, self._timed = progress, timed
        self._before = progress["seconds"], progress["seconds_waiting"]
        self._started = self._checkpoint = time.perf_counter()
        self._lap = (self._started, 0.0, progress["step"])

    def update(self) -> None:
        """Bring the progress up to date."""
        self._progress["seconds"] = self._before[0] + time.perf_counter() - self._started
        self._progress["seconds_waiting"] = self._before[1] + self._timed.seconds_waiting

    def lap(self, batch_size: int) -> dict[str, float]:
        """Measure the speed since the last call.

        Args:
            batch_size: samples of a step, over all processes.

        Returns:
            ``samples_per_second``, and ``waiting``, the share of the time that was spent waiting for data, in [0, 1].
        """
        now, waited, step = time.perf_counter(), self._timed.seconds_waiting, self._progress["step"]
        seconds, steps = max(now - self._lap[0], 1e-9), step - self._lap[2]
        share = (waited - self._lap[1]) / seconds
        self._lap = (now, waited, step)
        return {"samples_per_second": batch_size * steps / seconds, "waiting": share}

    def minutes_since_checkpoint(self) -> float:
        """Return the minutes since `checkpointed` was called, or since the start."""
        return (time.perf_counter() - self._checkpoint) / 60

    def checkpointed(self) -> None:
        """Note that a checkpoint was written now."""
        self._checkpoint = time.perf_counter()
