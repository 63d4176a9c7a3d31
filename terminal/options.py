"""Make the options of a command from the fields of a dataclass, the only place of a name, type, default and help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

import click

from options import Ge, Gt, Kind, Le, Lt, OptionField, OptionSet, option_fields
from terminal.help import Choice, instead_of, under
from terminal.types import (
    Architecture,
    BatchSize,
    Bytes,
    ImageSize,
    LocalFolder,
    Location,
    NameAndValue,
    NamedFolder,
    NamedSplit,
    Names,
    TeacherName,
)


class RegistryChoice(Choice):
    """Take one of the names that a registry has when the command runs."""

    def __init__(self, registry: Mapping[str, Any]):
        super().__init__(())  # the property below ignores what the base class stores
        self._registry = registry

    @property
    def choices(self) -> tuple[str, ...]:
        """The names of the registry."""
        return tuple(self._registry)

    @choices.setter
    def choices(self, value: object) -> None:
        """Ignore the value that the base class sets."""


class RegistryText(click.ParamType):
    """Take any text. The help lists the names of a registry and ``others``; the options check the value."""

    name = "text"

    def __init__(self, registry: Mapping[str, Any], others: tuple[str, ...]):
        self._registry, self._others = registry, others

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join((*self._registry, *self._others))}]"


class RegistryTexts(RegistryChoice):
    """Take names of a registry with commas between them. The options check names with a colon, a point or a slash."""

    def __init__(self, registry: Mapping[str, Any], others: tuple[str, ...]):
        super().__init__(registry)
        self._others = others

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join((*self._registry, *self._others))}],…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        for name in str(value).split(","):
            if name.strip() and not any(sign in name for sign in ":./"):
                super().convert(name.strip(), param, ctx)
        return value


KINDS: Mapping[Kind, Callable[[], click.ParamType]] = {
    Kind.LOCATION: Location,
    Kind.FOLDER: lambda: LocalFolder(path_type=Path),
    Kind.PATH: lambda: click.Path(path_type=Path),
    Kind.TEACHER: TeacherName,
    Kind.ARCHITECTURE: Architecture,
    Kind.SIZE: Bytes,
    Kind.BATCH_SIZE: BatchSize,
    Kind.IMAGE_SIZE: ImageSize,
}
NAMED: Mapping[Kind | None, Callable[[], click.ParamType]] = {
    Kind.NAMED_FOLDERS: NamedFolder,
    Kind.NAMED_SPLITS: NamedSplit,
}


def options_of(
    options: type[OptionSet],
    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    without: tuple[str, ...] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> list[Callable[..., Any]]:
    """Make the options of a command, under their headings.

    Args:
        options: the dataclass.
        changes: arguments of `click.option` by name of the field, which override those made here.
        without: names of fields that this command does not have.
        flags: spellings that are not the name with dashes, such as ``{"pyramid": "--pyramid/--flat"}``.

    Returns:
        Decorators, for `terminal.help.options`.
    """
    decorators = []
    for field in option_fields(options):
        if field.name not in without:
            if field.positional is not None:
                decorators.append(click.argument(field.name, metavar=field.positional, type=_type(field)))
                continue
            flag = flags.get(field.name) or _flag(field)
            metavar = {} if field.metavar is None else {"metavar": field.metavar}
            arguments = {"help": field.doc, **metavar, **_arguments(field), **changes.get(field.name, {})}
            option = click.option(flag, field.name, **arguments)
            if field.instead_of:
                option = instead_of(field.instead_of, option)
            decorators += under(field.heading, option)
    return decorators


def _flag(field: OptionField) -> str:
    name = field.name.replace("_", "-")
    return f"--{name}/--no-{name}" if bool in field.types and field.default is not False else f"--{name}"


def _arguments(field: OptionField) -> dict[str, Any]:
    """Return the arguments of `click.option` that follow from a field."""
    arguments: dict[str, Any] = {"required": True} if field.required else {"default": field.default}
    if bool in field.types:
        return arguments | ({"is_flag": True} if field.default is False else {})
    if any(get_origin(one) in (dict, Mapping) for one in field.types):
        if field.kind in NAMED:
            return {"multiple": True, "type": NAMED[field.kind](), "callback": _by_name}
        return {"multiple": True, "type": NameAndValue(), "callback": lambda ctx, param, pairs: dict(pairs)}
    return arguments | {"type": _type(field)}


def _by_name(ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Return the values by name, or refuse a name that is given twice."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise click.BadParameter(f"{twice[0]} is given twice: give each its own name", ctx, param)
    return dict(pairs)


def _type(field: OptionField) -> Any:
    if field.kind is not None:
        return KINDS[field.kind]()
    if field.separator is not None:
        return Names(field.separator, field.registry, field.or_else)
    if field.registry is not None and field.several:
        return RegistryTexts(field.registry, field.or_else)
    if field.registry is not None:
        return RegistryText(field.registry, field.or_else) if field.or_else else RegistryChoice(field.registry)
    if field.choices:
        return Choice(field.choices)
    pair = next(
        (get_args(one) for one in field.types if get_origin(one) is tuple and Ellipsis not in get_args(one)), ()
    )
    if pair:
        return tuple(_number(one, field) for one in pair)
    number = next((one for one in (int, float) if one in field.types), None)
    return str if number is None else _number(number, field)


def _number(number: type, field: OptionField) -> click.ParamType:
    low = next((bound for bound in field.bounds if isinstance(bound, Ge | Gt)), None)
    high = next((bound for bound in field.bounds if isinstance(bound, Le | Lt)), None)
    limits: dict[str, Any] = {
        "min": None if low is None else low.ge if isinstance(low, Ge) else low.gt,
        "max": None if high is None else high.le if isinstance(high, Le) else high.lt,
        "min_open": isinstance(low, Gt),
        "max_open": isinstance(high, Lt),
    }
    if number is int:
        return click.IntRange(**limits) if field.bounds else click.INT
    return click.FloatRange(**limits) if field.bounds else click.FLOAT
