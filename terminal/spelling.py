"""Spell errors for a shell: options as ``--flag value``, calls of our functions as commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import click

from options import Call, Message, Option, Word
from options.messages import UNSET


def text_of(error: BaseException, command: click.Command | None = None) -> str:
    """Return an error's text, with options spelled as those of the command, where it has them."""
    if len(error.args) == 1 and isinstance(error.args[0], Message):
        return error.args[0].spell(speller(command))
    return str(error)


def speller(command: click.Command | None = None) -> Callable[[Option | Call], str]:
    """Return what spells an option or a call for a shell."""
    params = {param.name: param for param in command.params} if command is not None else {}

    def spell(piece: Option | Call) -> str:
        if isinstance(piece, Option):
            return _flag(piece.name, piece.value, params.get(piece.name))
        name = piece.command or piece.function.replace("_", "-")
        return " ".join(["python cli.py", name, *(_flag(option, value) for option, value in piece.options.items())])

    return spell


spell = speller()


def _flag(name: str, value: Any, param: click.Parameter | None = None) -> str:
    flag = f"--{name.replace('_', '-')}" if param is None else max(param.opts, key=len)
    if value is False and param is not None and param.secondary_opts:
        return param.secondary_opts[0]
    if value is UNSET or value is True:
        return flag
    values = value if isinstance(value, tuple | list) else [value]
    return " ".join([flag, *(each if isinstance(each, Word) else shlex.quote(str(each)) for each in values)])
