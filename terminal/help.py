"""Commands whose help has headings and an example, and whose errors suggest the nearest word for a misspelt one.

Not here: the commands (cli.py), and the values that a file gives them (config_file.py). It imports only click, so that
--help answers at once. A library for headings would need the newest click, and would do none of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from options import did_you_mean
from terminal import config_file

OTHERS = "Other options"
INDENT = "  "  # of an example
HELP = ("-h", "--help")  # of every command
ARGUMENTS = f"{__name__}.arguments"  # key of a context's meta: the arguments as they were typed
COMMAND = f"{__name__}.command"  # key of a context's meta: the command

Decorator = Callable[..., Any]


# --- decorators ---------------------------------------------------------------------------------------------


def under(heading: str, *parts: Any) -> list[Decorator]:
    """Put options under a heading in the help of their command.

    Args:
        heading: the heading. Options of several calls with the same heading stand together.
        parts: decorators such as ``click.option(…)``, or lists of them.

    Returns:
        The decorators, for `options`.
    """
    return [_with_attribute(option, "heading", heading) for option in _flat(parts)]


def instead_of(others: tuple[str, ...], option: Decorator) -> Decorator:
    """Mark an option that a command does not take together with any of some others.

    An option on the command line then replaces the others of a config file.

    Args:
        others: the Python names of the other options. Those that the command does not have are ignored.
        option: a decorator such as ``click.option(…)``.
    """
    return _with_attribute(option, config_file.INSTEAD_OF, others)


def options(*parts: Any) -> Decorator:
    """Give a command all of these options, in their order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_flat(parts)):
            command = option(command)
        return command

    return decorate


def _with_attribute(option: Decorator, name: str, value: object) -> Decorator:
    def decorate(command: Any) -> Any:
        command = option(command)
        setattr(command.__click_params__[-1], name, value)
        return command

    return decorate


def _flat(parts: Iterable[Any]) -> list[Decorator]:
    return [option for part in parts for option in (part if isinstance(part, list) else [part])]


# --- commands -----------------------------------------------------------------------------------------------


class Command(click.Command):
    """Show the options under their headings, then an example. Take values from a ``--config`` file.

    Args:
        heading: where the group lists this command.
        example: the arguments of a call, as a user would type them.
    """

    def __init__(self, *args: Any, heading: str = "Commands", example: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.heading, self.example = heading, example
        self.params.append(config_file.config_option())

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return [*HELP]  # whatever the context: click makes the option once, even without the program's settings

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS], ctx.meta[COMMAND] = list(args), self
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            raise config_file.naming_the_file(error, ctx) from None
        config_file.drop_replaced(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "heading", OTHERS), []).append(record)
        sections[OTHERS] = sections.pop(OTHERS)  # --config and --help, which every command has, come last
        _write_sections(formatter, sections)
        _write_example(formatter, self.example)


class Group(click.Group):
    """List the commands in their order under their headings, and suggest the nearest one for a misspelt one."""

    command_class = Command

    def __init__(self, *args: Any, heading: str = "Commands", example: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.heading, self.example = heading, example

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return [*HELP]

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
    """Make the commands of a group when one of them is needed, because making them imports more than click.

    Args:
        make: returns the commands by name. It is called each time, so that it can return new ones.
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
        """Ignore the value that the base class sets."""


def _write_sections(formatter: click.HelpFormatter, sections: Mapping[str, list[tuple[str, str]]]) -> None:
    for heading, lines in sections.items():
        with formatter.section(heading):
            formatter.write_dl(lines)


def _write_example(formatter: click.HelpFormatter, example: str) -> None:
    if example:
        with formatter.section("Example"):
            formatter.write(f"{INDENT}python cli.py {example}\n")


class Choice(click.Choice):
    """Take one of some words, and suggest the nearest one for a misspelt one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        message = super().get_invalid_choice_message(value, ctx)
        return message + did_you_mean(str(value), map(str, self.choices))
