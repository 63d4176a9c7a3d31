"""SIGTERM and Ctrl-C while a training runs: they are noted, so that it ends between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# torchrun passes on a Ctrl-C that the terminal has already sent to its processes; this does not count as a second one
IMPATIENT_AFTER = 2.0  # seconds


class TrainingInterrupted(KeyboardInterrupt):
    """A signal has stopped a training, which has written a checkpoint; the text says how to resume.

    Args:
        text: what was stopped, and how it is resumed.
        signum: the signal; None, where another process received it, counts as SIGTERM.
    """

    def __init__(self, text: str, signum: int | None):
        super().__init__(text)
        self.signum = signum or signal.SIGTERM


class Interruption:
    """A context in which the first SIGTERM or SIGINT is kept in ``signal``; a second one, seconds later, raises.

    A signal that came without an error in the context is raised again at its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._at = signum, time.monotonic()
        elif time.monotonic() - self._at > IMPATIENT_AFTER:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self.signal is not None and kind is None:
            signal.raise_signal(self.signal)
