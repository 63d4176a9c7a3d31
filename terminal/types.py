"""Types of options that click does not have. Each turns the text of a command line into the value of a function."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


class Location(click.ParamType):
    """A folder, or a URL of fsspec, which ``pathlib`` would change."""

    name = "folder or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not (text := os.fspath(value)):
            self.fail("it is empty: give a folder, or a URL such as s3://bucket/name", param, ctx)
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class LocalFolder(click.Path):
    """A folder on this machine, for models and trainings."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "FOLDER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"'{value}' is a URL. Only datasets and stores can have a URL: give a local folder", param, ctx)
        return super().convert(value, param, ctx)


class TeacherName(LocalFolder):
    """A folder, or the name of a network such as timm:resnet18, clip:RN50 or package.module:function."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "FOLDER|NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if ":" in str(value) and "://" not in str(value) else super().convert(value, param, ctx)


class Bytes(click.ParamType):
    """A size such as 4GB, 500MiB or 2e9, as a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from dask.utils import parse_bytes

        try:
            size = int(parse_bytes(value))
        except (ValueError, OverflowError):
            self.fail(f"'{value}' is no size in bytes: give one such as 4GB, 500MiB or 2e9", param, ctx)
        if size < 0:
            self.fail(f"'{value}' is negative: give a size such as 4GB", param, ctx)
        return size


class BatchSize(click.ParamType):
    """A number of samples, at least 1, or auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            size = int(value)
        except ValueError:
            size = 0
        if size < 1:
            self.fail(f"'{value}' is no size of a batch: give a number of samples, at least 1, or auto", param, ctx)
        return size


class ImageSize(click.ParamType):
    """A number of pixels, or height and width as 64x96."""

    name = "pixels|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        sides = str(value).lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) >= 1 for side in sides):
            self.fail(f"'{value}' is not a size: give pixels such as 64, or height and width such as 64x96", param, ctx)
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class NameAndValue(click.ParamType):
    """NAME=VALUE, where the value is a number, true, false or text."""

    name, pairs = "name=value", True

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = value.partition("=")
        if not name.isidentifier() or not equals:
            self.fail(f"'{value}' is no NAME=VALUE: give one such as width=64", param, ctx)
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = text
        return name, parsed if isinstance(parsed, bool | int | float | str) else text


class Architecture(click.ParamType):
    """The name of a network. The function that builds the network checks it."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from pipeline.networks.models import architectures

        return [CompletionItem(name) for name in architectures() if name.startswith(incomplete)]


class Names(click.ParamType):
    """Names with a separator between them."""

    name = "names"

    def __init__(
        self, separator: str = ",", registry: Mapping[str, Any] | None = None, others: tuple[str, ...] = ()
    ) -> None:
        self.separator, self._registry, self._others = separator, registry, others

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        if self._registry is None:
            return None
        return f"[{'|'.join((*self._registry, *self._others))}]{self.separator}…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(name.strip() for name in value.split(self.separator) if name.strip())


class NamedFolder(click.ParamType):
    """NAME=DIR."""

    name, pairs = "name=folder", True
    form, example = "NAME=DIR", "ood=images/ood"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            self.fail(f"'{value}' is no {self.form}: give one such as {self.example}", param, ctx)
        return name, self.meaning(text)

    def meaning(self, text: str) -> Any:
        """Return the value of the text after the name."""
        return Path(text)


class NamedSplit(NamedFolder):
    """NAME=SPLIT."""

    name = "name=split"
    form, example = "NAME=SPLIT", "ood=test"

    def meaning(self, text: str) -> str:
        """Return the name of the split."""
        return text
