"""The registry of builders, from which ``make-data`` makes its commands, and the options that several builders share.

A module of this package that enters a builder is a new dataset; nothing else lists it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from data.errors import DatasetError
from options import Doc, Ge, Kind, Le, OptionSet, Registry, takes
from options.common import Fit, Seed

Make = Callable[..., dict[str, int]]
HOW = "How it is built"  # a heading of the options
ImageSize = Annotated[int, Ge(1), Doc("Height and width of the images, in pixels.")]


@dataclass(frozen=True)
class Builder:
    """A builder of one dataset.

    Attributes:
        make: writes the dataset and returns the number of samples of each split.
        options: its options.
        help: what the dataset is, from the docstring of ``make``.
        example: the arguments of an example command.
    """

    make: Make
    options: type[BuilderOptions]
    help: str
    example: str


BUILDERS: Registry[Builder] = Registry("dataset", DatasetError)


def builder(name: str, options: type[BuilderOptions], *, example: str) -> Callable[[Make], Make]:
    """Enter the function below as the builder of the dataset ``name``.

    Its docstring up to ``Returns:`` is the command's help. Its signature gets the fields of ``options``.
    """

    def enter(make: Make) -> Make:
        text = inspect.cleandoc(make.__doc__ or "").partition("\n\nReturns:")[0]
        BUILDERS[name] = Builder(takes(options)(make), options, text, example)
        return make

    return enter


@functools.cache
def all_builders() -> Mapping[str, Builder]:
    """Import every module of this package and return the builders by name."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], "data.builders."):
        importlib.import_module(module.name)
    return BUILDERS


@dataclass(frozen=True, kw_only=True)
class BuilderOptions(OptionSet):
    """The options of every builder."""

    ERROR: ClassVar[type[Exception]] = DatasetError
    HEADING: ClassVar[str] = "Files"

    out: Annotated[Any, Kind.LOCATION, Doc("Dataset to write: a new folder or URL.")]


@dataclass(frozen=True, kw_only=True)
class Seeded(OptionSet):
    """The seed of a builder that draws random numbers."""

    HEADING: ClassVar[str] = HOW

    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Limited(OptionSet):
    """The limit of a builder whose whole dataset is fixed."""

    HEADING: ClassVar[str] = HOW

    limit: Annotated[int | None, Ge(1), Doc("Maximum number of samples in each split.")] = None


@dataclass(frozen=True, kw_only=True)
class PartlyUnbiased(OptionSet):
    """The share of the images of train and validation whose bias attribute does not depend on the class."""

    HEADING: ClassVar[str] = HOW

    unbiased_share: Annotated[
        float,
        Ge(0),
        Le(1),
        Doc(
            "Share of the images of train and validation whose bias attribute is drawn at random from those of all "
            "classes. The tests do not change."
        ),
    ] = 0.0

    @property
    def record(self) -> dict[str, float]:
        """The entry for the attribute ``builder``; none for a share of 0, which gives the bytes of earlier versions."""
        return {"unbiased_share": self.unbiased_share} if self.unbiased_share else {}


@dataclass(frozen=True, kw_only=True)
class Sized(OptionSet):
    """The size of square images."""

    HEADING: ClassVar[str] = HOW

    size: ImageSize = 64


@dataclass(frozen=True, kw_only=True)
class Fitted(OptionSet):
    """The options of a dataset of the user's own images, which may have any shape."""

    HEADING: ClassVar[str] = HOW

    fit: Annotated[
        Fit,
        Doc(
            "How images of another shape are fitted: crop cuts out the middle, pad adds black margins, stretch changes "
            "the aspect ratio."
        ),
    ] = "crop"
    bias_attribute: Annotated[str | None, Doc("Name of the attribute whose values are the groups.")] = "group"
