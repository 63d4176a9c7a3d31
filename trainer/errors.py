"""What a user is told when a training cannot be had as asked for."""

import difflib
from collections.abc import Iterable


class TrainingError(ValueError):
    """A training that cannot start, or must stop; the text says why and what to change."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known words, a space before it; empty where none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""
