"""Spell errors for a shell: options as ``--flag value``, calls of our functions as commands."""

from __future__ import annotations

import shlex
from typing import Any

from options import Call, Message, Option, Word
from options.messages import UNSET


def text_of(error: BaseException) -> str:
    """Tell an error's text, spelled for a shell."""
    if len(error.args) == 1 and isinstance(error.args[0], Message):
        return error.args[0].spell(spell)
    return str(error)


def spell(piece: Option | Call) -> str:
    """Spell an option or a call for a shell."""
    if isinstance(piece, Option):
        return _flag(piece.name, piece.value)
    command = piece.command or piece.function.replace("_", "-")
    return " ".join(["python cli.py", command, *(_flag(name, value) for name, value in piece.options.items())])


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is UNSET or value is True:
        return flag
    values = value if isinstance(value, tuple | list) else [value]
    return " ".join([flag, *(each if isinstance(each, Word) else shlex.quote(str(each)) for each in values)])
