"""Spell errors for a shell: options as ``--flag value``, calls of our functions as commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click

from options import Call, Message, Option, Word
from options.messages import UNSET


def text_of(error: BaseException, command: click.Command | None = None) -> str:
    """Return the text of an error for a shell. Options are spelled as those of the command, if it has them."""
    return Message(error).spell(speller(command))


def speller(command: click.Command | None = None) -> Callable[[Option | Call], str]:
    """Return a function that spells an option or a call for a shell. It can be pickled, for another process."""
    params = () if command is None else command.params
    return partial(_spell, {param.name: (max(param.opts, key=len), *param.secondary_opts[:1]) for param in params})


def _spell(flags: Mapping[str | None, tuple[str, ...]], piece: Option | Call) -> str:
    """Spell an option by the flags of a command: for each name its flag, and the flag that turns it off if any."""
    if isinstance(piece, Option):
        return _flag(piece.name, piece.value, *flags.get(piece.name, ()))
    name = piece.command or piece.function.replace("_", "-")
    pairs = [*dict.fromkeys(piece.switches, True).items(), *piece.options.items()]
    return " ".join(["python cli.py", name, *(_flag(option, value) for option, value in pairs)])


spell = speller()


def _flag(name: str, value: Any, flag: str = "", off_flag: str = "") -> str:
    flag = flag or f"--{name.replace('_', '-')}"
    if value is False and off_flag:
        return off_flag
    if value is UNSET or value is True:
        return flag
    values = value if isinstance(value, tuple | list) else [value]
    return " ".join([flag, *(each if isinstance(each, Word) else shlex.quote(str(each)) for each in values)])
