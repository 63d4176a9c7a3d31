"""A logger that says less for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_level(name: str | None, level: int) -> Iterator[None]:
    """Set the level of a logger, and restore it at the end.

    Args:
        name: the name of the logger; None for the root.
        level: the lowest level of the messages that are still logged.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
