"""Values of options from a YAML file, ``--config``: they replace the defaults, and the command line overrides them.

Not here: the dialect of YAML (`options/yaml_file.py`), and a sweep's file (`trainer/reproduction/sweep.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from options import did_you_mean
from options.yaml_file import read_yaml

FILE = f"{__name__}.file"  # key of a context's meta: the path of the file
INSTEAD_OF = "instead_of"  # attribute of a click option: the options that it excludes


def config_option() -> click.Option:
    """Return the option ``--config``, for any command."""
    return click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=_load,
        help="YAML file with options by name. The command line overrides it. A run's config.yaml repeats the run.",
    )


def naming_the_file(error: click.BadParameter, ctx: click.Context) -> click.BadParameter:
    """Add the file's path to the error for a wrong value, if the value is from the file."""
    if error.param is None or not _is_from_file(ctx, error.param.name):
        return error
    return click.BadParameter(f"{error.message} (in {ctx.meta[FILE]})", ctx, error.param)


def drop_replaced(ctx: click.Context) -> None:
    """Reset an option of the file to its default if the command line has an option that is given instead of it."""
    params = {param.name: param for param in ctx.command.params}
    pairs = [
        (name, other) for name, param in params.items() for other in getattr(param, INSTEAD_OF, ()) if other in params
    ]
    for typed, other in [*pairs, *((other, name) for name, other in pairs)]:
        is_typed = ctx.get_parameter_source(str(typed)) is click.core.ParameterSource.COMMANDLINE
        if is_typed and _is_from_file(ctx, other):
            ctx.params[str(other)] = _default(params[other], ctx)
            ctx.set_parameter_source(str(other), click.core.ParameterSource.DEFAULT)


def _is_from_file(ctx: click.Context, name: str | None) -> bool:
    return name is not None and ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP


def _load(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Replace the defaults of the context with the values of the file."""
    if path is not None and not ctx.resilient_parsing:
        ctx.meta[FILE] = path
        ctx.default_map = _read(path, ctx)


def _read(path: Path, ctx: click.Context) -> dict[str, Any]:
    """Read the values of a file by parameter, as click takes them from a command line.

    Raises:
        click.UsageError: the file is not a mapping, or has a name that is not an option of the command.
    """
    params = [param for param in ctx.command.params if param.expose_value]
    known = {name: param for param in params for name in _names(param.name, *param.opts)}
    off_switches = {name: param for param in params for name in _names(*param.secondary_opts)}
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in read_yaml(path, texts=True, error=partial(click.UsageError, ctx=ctx)).items():
        (name,) = _names(str(key))
        if name not in known:
            switch = off_switches.get(name)
            remedy = did_you_mean(name, known) if switch is None else f" Write '{switch.name}: false'."
            unknown.append(f"'{key}'.{remedy}")
        elif (param := known[name]).name in values:
            ctx.fail(f"{path} has '{key}' twice.")
        else:
            values[str(param.name)] = _as_typed(value, param, ctx)
    if unknown:
        ctx.fail(f"{path} has options that {ctx.info_name} does not take: {' And '.join(unknown)}")
    return {name: value for name, value in values.items() if value is not None}


def _names(*spellings: str | None) -> list[str]:
    return [spelling.lstrip("-").replace("-", "_") for spelling in spellings if spelling]


def _as_typed(value: Any, param: click.Parameter, ctx: click.Context) -> Any:
    """Return a value of the file as the text, or the texts, of a command line; None stands for the default."""
    takes_several = param.multiple or param.nargs != 1
    if value is None:
        if (default := _default(param, ctx)) not in (None, (), False):
            _refuse(f"it is null: leave it out for its default, {default}", param, ctx)
        return None
    if isinstance(value, dict) and param.multiple and getattr(param.type, "pairs", False):
        value = [f"{name}={_text(one, param, ctx)}" for name, one in value.items()]
    if isinstance(value, list) and not takes_several and getattr(param.type, "separator", None):
        return param.type.separator.join(_text(one, param, ctx) for one in value)  # type: ignore[attr-defined]
    if takes_several:
        return [_text(one, param, ctx) for one in (value if isinstance(value, list) else [value])]
    return _text(value, param, ctx)


def _text(value: Any, param: click.Parameter, ctx: click.Context) -> str:
    if value is None or isinstance(value, dict | list):
        _refuse(f"{value!r} is no single value", param, ctx)
    return str(value)


def _refuse(message: str, param: click.Parameter, ctx: click.Context) -> None:
    raise click.BadParameter(f"{message} (in {ctx.meta[FILE]})", ctx=ctx, param=param)


def _default(param: click.Parameter, ctx: click.Context) -> Any:
    """Return the default of the command itself: None or () if it has none, which releases of click mark differently."""
    is_plain = isinstance(param.default, bool | int | float | str | tuple | list)
    return param.default if is_plain else param.type_cast_value(ctx, None)
