"""Options as fields of frozen dataclasses: the notes beside a field, and the checks that follow from them.

A field is ``name: Annotated[type, Doc("Help text."), Ge(1), ...] = default``. Not here: the options of a
command line (`terminal/options.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from options.messages import Message, Option, unknown

F = TypeVar("F", bound=Callable[..., Any])
Bound = Ge | Gt | Le | Lt
WORDS = {
    Ge: ("at least", "__ge__"),
    Gt: ("more than", "__gt__"),
    Le: ("at most", "__le__"),
    Lt: ("less than", "__lt__"),
}


class Kind(Enum):
    """The meaning of a value, if its type does not tell."""

    LOCATION = "a folder, or a URL of fsspec"
    FOLDER = "a folder or file of this machine"
    PATH = "a file or folder of the user's own"
    TEACHER = "the folder of a teacher, or the name of a vision-language model"
    ARCHITECTURE = "the name of a network"
    SIZE = "a number of bytes"
    BATCH_SIZE = "a number of samples, or auto"
    NAMED_FOLDERS = "folders by name"
    NAMED_SPLITS = "splits by name"
    IMAGE_SIZE = "a number of pixels, or height and width"


@dataclass(frozen=True)
class Among:
    """The value is a name in a registry. If the field is a tuple, every item is such a name.

    ``or_else`` lists other texts that the value may be. The class of the field checks them. With ``several``, the value
    is one text of names with commas between them, and ``or_else`` are names with a colon, a point or a slash.
    """

    registry: Mapping[str, Any]
    or_else: tuple[str, ...] = ()
    several: bool = False


@dataclass(frozen=True)
class Separated:
    """The values of a tuple are one text on a command line, with this separator."""

    separator: str = ","


@dataclass(frozen=True)
class InsteadOf:
    """The option is given instead of others, never together with one of them: ``InsteadOf("steps")``."""

    others: tuple[str, ...]

    def __init__(self, *others: str) -> None:
        object.__setattr__(self, "others", others)


@dataclass(frozen=True)
class Positional:
    """The value is an argument of a command, without a flag. ``metavar`` stands for it in the help."""

    metavar: str


@dataclass(frozen=True)
class Metavar:
    """The word that stands for the value of an option in the help, if its type does not tell: ``Metavar("COLUMN")``."""

    text: str


@dataclass(frozen=True)
class Heading:
    """The heading of one field, if it is not the ``HEADING`` of the class."""

    text: str


@dataclass(frozen=True)
class OptionField:
    """A field of an `OptionSet`, with its notes. ``types`` are the plain types that a value may have."""

    name: str
    types: tuple[Any, ...]
    default: Any  # dataclasses.MISSING where a value is required
    heading: str
    doc: str = ""
    bounds: tuple[Bound, ...] = ()
    choices: tuple[Any, ...] = ()  # of a Literal
    registry: Mapping[str, Any] | None = None
    or_else: tuple[str, ...] = ()  # of an `Among`
    several: bool = False  # of an `Among`
    kind: Kind | None = None
    separator: str | None = None
    instead_of: tuple[str, ...] = ()  # names of other options; a command takes none of them together with this one
    positional: str | None = None  # the metavar, of a `Positional`
    metavar: str | None = None  # of a `Metavar`

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def allowed(self) -> tuple[Any, ...]:
        """The names that a value can have at this moment; empty if any value of the type is allowed."""
        if self.or_else:
            return ()
        return tuple(self.registry) if self.registry is not None else self.choices


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """The base of every dataclass of options. It checks its values when it is created.

    ``ERROR`` is the exception for a wrong value. ``HEADING`` is the heading of the fields in the help of a command.
    """

    ERROR: ClassVar[type[Exception]] = ValueError
    HEADING: ClassVar[str] = "Options"

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            check(field, getattr(self, field.name), self.ERROR)


def option_fields(options: type[OptionSet]) -> tuple[OptionField, ...]:
    """Return the fields of an `OptionSet`: first those of the class itself, then those of its bases in their order."""
    return _option_fields(options)  # type: ignore[arg-type]


def overridden(options: type[OptionSet], names: Iterable[str]) -> set[str]:
    """Return the names of options that these override: themselves, and those that exclude one of them."""
    own = set(names)
    pairs = [(field.name, other) for field in option_fields(options) for other in field.instead_of]
    return own | {other for name, other in pairs if name in own} | {name for name, other in pairs if other in own}


@cache
def _option_fields(options: Any) -> tuple[OptionField, ...]:
    hints = get_type_hints(options, include_extras=True)
    defaults = {field.name: _default(field) for field in dataclasses.fields(options)}
    fields: dict[str, OptionField] = {}
    for owner in options.__mro__:
        for name in vars(owner).get("__annotations__", {}):
            if name in defaults and name not in fields:
                heading = vars(owner).get("HEADING", options.HEADING)
                fields[name] = _option_field(name, hints[name], defaults[name], heading)
    return tuple(fields.values())


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _option_field(name: str, hint: Any, default: Any, heading: str) -> OptionField:
    notes = getattr(hint, "__metadata__", ())
    plain = get_args(hint)[0] if notes else hint
    types = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
    choices = tuple(choice for one in types if get_origin(one) is Literal for choice in get_args(one))
    docs = [note.documentation for note in notes if isinstance(note, Doc)]
    headings = [note.text for note in notes if isinstance(note, Heading)]
    return OptionField(
        name=name,
        types=types,
        default=default,
        heading=(headings or [heading])[0],
        doc=(docs or [""])[0],
        bounds=tuple(note for note in notes if isinstance(note, Bound)),
        choices=choices,
        or_else=next((note.or_else for note in notes if isinstance(note, Among)), ()),
        several=any(note.several for note in notes if isinstance(note, Among)),
        registry=next((note.registry for note in notes if isinstance(note, Among)), None),
        kind=next((note for note in notes if isinstance(note, Kind)), None),
        separator=next((note.separator for note in notes if isinstance(note, Separated)), None),
        instead_of=next((note.others for note in notes if isinstance(note, InsteadOf)), ()),
        positional=next((note.metavar for note in notes if isinstance(note, Positional)), None),
        metavar=next((note.text for note in notes if isinstance(note, Metavar)), None),
    )


# --- checks ---------------------------------------------------------------------------------------------------------


def check(field: OptionField, value: Any, error: type[Exception]) -> None:
    """Raise ``error``, with a `Message` that names the option, for a value that the field cannot have."""
    if value is None and NoneType in field.types:
        return
    if not _is_of_type(field, value):
        names = " or ".join(_type_name(one) for one in field.types)
        raise error(Message(Option(field.name), f" must be {names}, got {value!r}"))
    values = value if isinstance(value, tuple | list) else (value,)
    if field.allowed:
        for one in values:
            if one not in field.allowed:
                raise error(unknown(field.name, one, field.allowed))
    for one in values:
        _check_bounds(field, one, error)


def _check_bounds(field: OptionField, value: Any, error: type[Exception]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not all(getattr(float(value), WORDS[type(bound)][1])(_limit(bound)) for bound in field.bounds):
        limits = " and ".join(f"{WORDS[type(bound)][0]} {_limit(bound):g}" for bound in field.bounds)
        raise error(Message(Option(field.name), f" must be {limits}, got {value:g}"))
    if not math.isfinite(value) and math.inf not in map(_limit, field.bounds):
        raise error(Message(Option(field.name), f" must be a finite number, got {value:g}"))


def _limit(bound: Bound) -> float:
    return next(getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name))


def _is_of_type(field: OptionField, value: Any) -> bool:
    if field.kind is not None or field.choices:
        return True  # the code that uses the value checks it; the choices check a Literal
    for one in field.types:
        origin = get_origin(one) or one
        if origin is Any or (origin is float and isinstance(value, int) and not isinstance(value, bool)):
            return True
        if isinstance(origin, type) and issubclass(origin, tuple) and isinstance(value, list | tuple):
            return True
        if isinstance(origin, type) and isinstance(value, origin) and not (isinstance(value, bool) and origin is int):
            return True
    return False


def _type_name(one: Any) -> str:
    if get_origin(one) is not None:
        return str(one).replace("typing.", "")
    return "None" if one is NoneType else getattr(one, "__name__", str(one))


# --- signatures -----------------------------------------------------------------------------------------------------


def takes(options: type[OptionSet]) -> Callable[[F], F]:
    """Give a function with ``**options`` the signature and the documentation of the dataclass's options."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        kept = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [field for field in option_fields(options) if field.name not in signature.parameters]
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.required else field.default,
                annotation=" | ".join(map(_type_name, field.types)),
            )
            for field in sorted(others, key=lambda field: not field.required)
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *keywords])  # type: ignore[attr-defined]
        documented = "".join(f"\n    {field.name}: {field.doc}" for field in others)
        text = textwrap.dedent(" " * 4 + (function.__doc__ or ""))
        function.__doc__ = f"{text.rstrip()}\n\nKeyword Args:{documented}\n"
        return function

    return decorate
