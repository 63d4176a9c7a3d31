"""Errors that name options as data, so that a Python user reads Python and a shell user reads flags.

An exception's only argument may be a `Message`. ``str(error)`` spells its options in Python; the command line spells
them as flags by `Message.spell`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Unset(Enum):
    """The value of an `Option` that only names an option."""

    UNSET = "UNSET"


UNSET = Unset.UNSET


class Word(str):
    """Text that is spelled without quotes in a `Call` or an `Option`, such as the placeholder TEACHER."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Option:
    """An option by its Python name, alone or with a value: ``lr``, or ``lr=0.1``."""

    name: str
    value: Any = UNSET

    def __str__(self) -> str:
        return self.name if self.value is UNSET else f"{self.name}={self.value!r}"


@dataclass(frozen=True)
class Call:
    """A call of a function of ours, as a remedy: ``cache_explanations(data='DATA.zarr', features=True)``.

    ``command`` is the name of the command that does the same, if that is not the function's name with dashes.
    ``switches`` are options that only the command needs.
    """

    function: str
    options: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    switches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.function}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class Message:
    """The text of an error in pieces: strings, options and calls. Messages and errors in it are split into pieces."""

    def __init__(self, *pieces: object):
        self.pieces: tuple[object, ...] = tuple(_flat(pieces))

    def __str__(self) -> str:
        return self.spell(str)

    def __repr__(self) -> str:
        return f"Message{self.pieces!r}"

    def spell(self, spelling: Callable[[Option | Call], str]) -> str:
        """Return the text, with options and calls spelled by ``spelling``."""
        return "".join(spelling(piece) if isinstance(piece, Option | Call) else str(piece) for piece in self.pieces)

    @property
    def options(self) -> tuple[Option, ...]:
        """The options that the text names."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Option))

    def __reduce__(self) -> tuple[type[Message], tuple[object, ...]]:
        return Message, self.pieces


def _flat(pieces: Iterable[object]) -> Iterable[object]:
    for piece in pieces:
        if isinstance(piece, BaseException) and len(piece.args) == 1 and isinstance(piece.args[0], Message):
            piece = piece.args[0]
        if isinstance(piece, Message):
            yield from piece.pieces
        else:
            yield piece


def joined(pieces: Iterable[object], separator: str) -> Message:
    """Return the pieces with a separator between them."""
    with_separators = [part for piece in pieces for part in (separator, piece)]
    return Message(*with_separators[1:])


def renamed(error: BaseException, names: Mapping[str, str]) -> Message:
    """Return the text of an error with other names of options, for a function that has them under these names."""
    pieces = Message(error).pieces
    return Message(
        *(
            Option(names.get(piece.name, piece.name), piece.value) if isinstance(piece, Option) else piece
            for piece in pieces
        )
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the nearest known words, after a space; an empty text if no word is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3)
    return f" Did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""


def unknown(option: str, value: object, known: Iterable[object]) -> Message:
    """Return the text of the error for a value that is not one of the known values of an option."""
    names = [str(name) for name in known]
    return Message(
        "unknown ", Option(option), f" '{value}': choose one of {', '.join(names)}.{did_you_mean(str(value), names)}"
    )


def import_problem(error: ImportError, library: str) -> str:
    """Tell why a library cannot be imported, as the end of a sentence: it is missing, or the error that it raised.

    An empty folder of the library's name is a module without content, which counts as missing.
    """
    of_library = (error.name or "").partition(".")[0] == library
    if of_library and (isinstance(error, ModuleNotFoundError) or error.path is None):
        return "is not installed"
    return f"cannot be imported ({first_line(error)})"


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
