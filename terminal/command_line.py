"""How a command is described and told: options under headings, an example, values from a file, the nearest word.

Not here: which commands there are (cli.py). It imports click alone, so that --help answers at once. Headings are a few
lines of `format_options`: a library for them would ask for the newest click alone, and has none of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from options import did_you_mean
from options.yaml_file import read_yaml

OTHERS = "Other options"
INDENT = "  "  # of an example
ARGUMENTS = f"{__name__}.arguments"  # in a context's meta: the command as it was given
COMMAND = f"{__name__}.command"  # in a context's meta: the command itself
FILE = f"{__name__}.file"  # in a context's meta: where the values come from that the command line does not give
# of each pair a command takes one, so that what the command line gives makes void what a file says of the other
EITHER_OR = (("steps", "epochs"), ("method", "loss"), ("arch", "student_factory"), ("model", "teacher"))


# --- headings -----------------------------------------------------------------------------------------------


def under(heading: str, *parts: Any) -> list[Callable[..., Any]]:
    """These options (decorators, or lists of them), which the help of any command that has them puts there."""

    def marked(option: Callable[..., Any]) -> Callable[..., Any]:
        def decorate(command: Any) -> Any:
            command = option(command)
            command.__click_params__[-1].heading = heading
            return command

        return decorate

    return [marked(option) for option in _flat(parts)]


def options(*parts: Any) -> Callable[..., Any]:
    """Give a command all of these options, in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_flat(parts)):
            command = option(command)
        return command

    return decorate


def _flat(parts: Iterable[Any]) -> list[Callable[..., Any]]:
    return [option for part in parts for option in (part if isinstance(part, list) else [part])]


class Command(click.Command):
    """Shows its options under their headings and an example below, and takes values from a ``--config``.

    ``heading`` is where its group lists it; ``example`` are its arguments, as one would type them.
    """

    def __init__(self, *args: Any, heading: str = "Commands", example: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.heading, self.example = heading, example
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="FILE.yaml",
                is_eager=True,
                expose_value=False,
                callback=_take_config,
                help="Options by name, which the command line overrides; a training's config.yaml repeats it.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS], ctx.meta[COMMAND] = list(args), self
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is None or not _from_file(ctx, error.param.name):
                raise
            raise click.BadParameter(f"{error.message} (in {ctx.meta[FILE]})", ctx, error.param) from None
        _drop_the_other(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "heading", OTHERS), []).append(record)
        sections[OTHERS] = sections.pop(OTHERS)  # --config and --help, which all have, come last
        _write_sections(formatter, sections)
        _write_example(formatter, self.example)


class Group(click.Group):
    """Lists its commands in their order under their headings, and knows what a misspelt one was to be."""

    command_class = Command

    def __init__(self, *args: Any, heading: str = "Commands", example: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.heading, self.example = heading, example

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{name}'.{did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands), default=0)
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            lines = sections.setdefault(getattr(command, "heading", "Commands"), [])
            lines.append((name, command.get_short_help_str(width)))
        _write_sections(formatter, sections)
        _write_example(formatter, self.example)


class LazyGroup(Group):
    """A group whose commands are made when one of them is needed, because making them imports more than click.

    ``make`` returns the commands by name. It is called each time, so that it can return new ones.
    """

    def __init__(self, *args: Any, make: Callable[[], dict[str, click.Command]], **settings: Any):
        self._make = make
        super().__init__(*args, **settings)

    @property
    def commands(self) -> dict[str, click.Command]:  # type: ignore[override]
        """The commands by name."""
        return self._make()

    @commands.setter
    def commands(self, value: object) -> None:
        """Ignore what the base class sets."""


def _write_sections(formatter: click.HelpFormatter, sections: Mapping[str, list[tuple[str, str]]]) -> None:
    for heading, lines in sections.items():
        with formatter.section(heading):
            formatter.write_dl(lines)


def _write_example(formatter: click.HelpFormatter, example: str) -> None:
    if example:
        with formatter.section("Example"):
            formatter.write(f"{INDENT}python cli.py {example}\n")


class Choice(click.Choice):
    """Some words, the nearest of which is offered for another one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        said = super().get_invalid_choice_message(value, ctx)
        return said + did_you_mean(str(value), map(str, self.choices))


# --- values from a file -------------------------------------------------------------------------------------


def _take_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """What the file says comes in the place of the defaults."""
    if path is not None and not ctx.resilient_parsing:
        ctx.meta[FILE] = path
        ctx.default_map = _read(path, ctx)


def _read(path: Path, ctx: click.Context) -> dict[str, Any]:
    """The values of a file by parameter, as click takes them from a command line.

    Raises click.UsageError for what is no mapping, and for names that the command does not have.
    """
    params = [param for param in ctx.command.params if param.expose_value]
    known = {name: param for param in params for name in _names(param.name, *param.opts)}
    opposite = {name: param for param in params for name in _names(*param.secondary_opts)}
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in read_yaml(path, texts=True, error=partial(click.UsageError, ctx=ctx)).items():
        (name,) = _names(str(key))
        if name not in known:
            flag = opposite.get(name)
            remedy = did_you_mean(name, known) if flag is None else f" Write '{flag.name}: false'."
            unknown.append(f"'{key}'.{remedy}")
        elif (param := known[name]).name in values:
            ctx.fail(f"{path} has '{key}' twice.")
        else:
            values[str(param.name)] = _as_typed(value, param, ctx)
    if unknown:
        ctx.fail(f"{path} has what {ctx.info_name} does not take: {' And '.join(unknown)}")
    return {name: value for name, value in values.items() if value is not None}


def _names(*spellings: str | None) -> list[str]:
    return [spelling.lstrip("-").replace("-", "_") for spelling in spellings if spelling]


def _as_typed(value: Any, param: click.Parameter, ctx: click.Context) -> Any:
    """A value of a file as the text, or the texts, that a command line would have; None for the default."""
    several = param.multiple or param.nargs != 1
    if value is None:
        if (default := _default(param, ctx)) not in (None, (), False):
            _refuse(f"it is null: leave it out for its default, {default}", param, ctx)
        return None
    if isinstance(value, dict) and param.multiple and getattr(param.type, "pairs", False):
        value = [f"{name}={_text(one, param, ctx)}" for name, one in value.items()]
    if isinstance(value, list) and not several and getattr(param.type, "separator", None):
        return param.type.separator.join(_text(one, param, ctx) for one in value)  # type: ignore[attr-defined]
    if several:
        return [_text(one, param, ctx) for one in (value if isinstance(value, list) else [value])]
    return _text(value, param, ctx)


def _text(value: Any, param: click.Parameter, ctx: click.Context) -> str:
    if value is None or isinstance(value, dict | list):
        _refuse(f"{value!r} is no single value", param, ctx)
    return str(value)


def _refuse(message: str, param: click.Parameter, ctx: click.Context) -> None:
    raise click.BadParameter(f"{message} (in {ctx.meta[FILE]})", ctx=ctx, param=param)


def _default(param: click.Parameter, ctx: click.Context) -> Any:
    """That of the command itself, None (or an empty tuple) where it has none, which some releases mark otherwise."""
    plain = isinstance(param.default, bool | int | float | str | tuple | list)
    return param.default if plain else param.type_cast_value(ctx, None)


def _from_file(ctx: click.Context, name: str | None) -> bool:
    return name is not None and ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP


def _drop_the_other(ctx: click.Context) -> None:
    """Of two options of which there can be one, that of the command line holds and not that of the file."""
    params = {param.name: param for param in ctx.command.params}
    for one, other in (pair for first, second in EITHER_OR for pair in ((first, second), (second, first))):
        typed = one in params and ctx.get_parameter_source(one) is click.core.ParameterSource.COMMANDLINE
        if typed and other in params and _from_file(ctx, other):
            ctx.params[other] = _default(params[other], ctx)
            ctx.set_parameter_source(other, click.core.ParameterSource.DEFAULT)
