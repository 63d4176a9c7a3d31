"""Shards of WebDataset: tar files in which the files of one sample share a name and follow one another.

Only the headers of a shard are read at first, so that its samples can be decoded in parallel and in any number.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tqdm import tqdm

from data.builders.folders import Echo, is_of_images
from data.builders.from_items import ItemsOptions, Source, make_from_items
from data.builders.items import USUAL, ItemError, Keys
from data.builders.pictures import Encoded
from data.builders.registry import HOW, builder
from data.builders.samples import check_tests
from data.errors import DatasetError
from options import Doc, Heading, Kind, Message, Metavar, Option, Positional, first_line, import_problem

if TYPE_CHECKING:
    from data.storage import Location

LOGGER = logging.getLogger(__name__)
NUMBER = re.compile(r"[+-]?\d+")
META = re.compile(r"(.*/)?__[^/]*__($|/)")  # files on the shard, and no samples
BLOCK = 512  # bytes of a tar file
MASKS = ("mask", "seg", "segmentation")  # how the suffix of a mask begins


@dataclass(frozen=True, kw_only=True)
class WebDatasetOptions(ItemsOptions):
    """The options of ``make-data webdataset``."""

    shards: Annotated[
        Any, Kind.PATH, Positional("SHARDS"), Doc("Shards of the training images, such as 'train-{000..099}.tar'.")
    ]
    validation: Annotated[
        Any,
        Kind.PATH,
        Metavar("SHARDS"),
        Doc("Shards of the validation images. Default: a share of the training images."),
    ] = None
    tests: Annotated[
        Mapping[str, Any],
        Kind.NAMED_FOLDERS,
        Metavar("NAME=SHARDS"),
        Doc("Shards of a test by its name, such as 'ood=ood-{0..9}.tar'. Repeatable."),
    ] = field(default_factory=dict)
    image: Annotated[
        str | None,
        Heading(HOW),
        Metavar("SUFFIX"),
        Doc("Suffix of the images, such as 'jpg;png'. Default: any suffix of images."),
    ] = None
    label: Annotated[
        str | None,
        Heading(HOW),
        Metavar("SUFFIX|json:KEY"),
        Doc("Suffix of the labels, or json:KEY. Default: cls, or the key label of json."),
    ] = None
    mask: Annotated[
        str | None,
        Heading(HOW),
        Metavar("SUFFIX"),
        Doc("Suffix of the masks. Default: mask.png or similar, if there is one."),
    ] = None
    group: Annotated[
        str | None,
        Heading(HOW),
        Metavar("SUFFIX|json:KEY"),
        Doc("Suffix of the groups, or json:KEY. Default: group, or the key group of json."),
    ] = None


@builder(
    "webdataset",
    WebDatasetOptions,
    example="make-data webdataset 'train-{000..099}.tar' --test 'ood=ood-{0..9}.tar' --size 64 --out DATA.zarr",
)
def make_webdataset(
    out: Location, shards: str | Path, *, echo: Echo = LOGGER.warning, **options: Any
) -> dict[str, int]:
    """Build a dataset from shards of WebDataset.

    Shards are tar files on this machine, given as one path with braces or wildcards, or as their folder. A label is the
    number or the name in a file with the suffix cls, or in a JSON file. Images become uint8 (N, 3, height, width),
    sorted by class, exactly as image-folder makes them of the same files. Masks and groups are optional. Images need
    not fit in memory. The extra [webdataset] is required.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, the library is missing, or shards are missing or damaged.
    """
    chosen = WebDatasetOptions(out=out, shards=shards, **options)
    check_tests(chosen.tests)
    patterns = {"train": chosen.shards}
    patterns |= {} if chosen.validation is None else {"validation": chosen.validation}
    files = {name: _shards(str(pattern)) for name, pattern in {**patterns, **chosen.tests}.items()}
    sources = {}
    with tqdm(total=sum(map(len, files.values())), unit="shard", desc="reading headers", disable=None) as bar:
        for name, paths in files.items():
            samples = _index(name, paths, bar.update)
            sources[name] = Source(
                _Samples([files for _, files in samples], chosen), places=[place for place, _ in samples]
            )
    return make_from_items(chosen, sources, Keys("image", "label"), {"command": "make-data webdataset"}, echo=echo)


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the file."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Files = dict[str, _Member]  # the files of a sample by their suffix


def _shards(pattern: str) -> list[Path]:
    """Return the shards that a path with braces or wildcards, or a folder, stands for.

    Raises:
        DatasetError: The library is missing, or there are none.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        problem = import_problem(error, "webdataset")
        raise DatasetError(
            f'the library webdataset, which knows the samples of shards, {problem}: pip install -e ".[webdataset]"'
        ) from None
    if re.match(r"\w+:/|pipe:", pattern):
        raise DatasetError(f"{pattern} is a URL, and shards are files on this machine: download them first")
    if os.path.isdir(pattern):
        paths = sorted(Path(pattern).glob("*.tar"))
    else:
        try:
            texts = expand_urls(pattern)
        except Exception as error:  # of an unknown variable, or braces without an end
            raise DatasetError(
                f"{pattern} is no path of shards ({first_line(error)}): give 'train-{{000..099}}.tar'"
            ) from None
        paths = [Path(path) for text in texts for path in (sorted(glob.glob(text)) if glob.has_magic(text) else [text])]
    if not paths:
        raise DatasetError(f"there are no shards {pattern}: give a path such as 'train-{{000..099}}.tar'")
    if missing := [path for path in paths if not path.is_file()]:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} shards do not exist, such as {missing[0]}: correct the path"
        )
    return paths


def _index(split: str, shards: Sequence[Path], advance: Callable[[int], object]) -> list[tuple[str, Files]]:
    """Return the samples of a split: the place of each one, for errors, and its files.

    Raises:
        DatasetError: A shard is damaged, or has a sample twice.
    """
    from webdataset.tariterators import group_by_keys

    samples: dict[str, Files] = {}
    for shard in shards:
        try:
            for sample in group_by_keys(_members(shard)):
                place = f"{shard}/{sample['__key__']}"
                if place in samples:
                    raise DatasetError(
                        f"{place} is there twice: give each shard once, and pack the files of a sample one after "
                        "the other"
                    )
                samples[place] = {suffix: file for suffix, file in sample.items() if isinstance(file, _Member)}
        except (tarfile.TarError, EOFError) as error:
            raise DatasetError(f"the shard {shard} is damaged ({first_line(error)}): {_remedy(shard)}") from None
        except ValueError as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"the shard {shard} cannot be used ({error.args[0]}): pack it again") from None
        advance(1)
    if not samples:
        raise DatasetError(f"the shards of {split} have no samples: give others")
    return list(samples.items())


def _remedy(shard: Path) -> str:
    with open(shard, "rb") as file:
        if file.read(3) in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z"):
            return "it is compressed, so unpack it to a .tar file, such as with gunzip"
    return "copy or download it again"


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """Yield the files of a shard as webdataset has them, but with their places instead of their bytes."""
    with tarfile.open(shard, "r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
            if info.isreg() and not META.match(info.name):
                yield {"fname": info.name, "data": _Member(shard, info.offset_data, info.size), "__url__": str(shard)}
        end = archive.offset
    with open(shard, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        rest = file.read(2**20)
    if len(rest) < BLOCK or rest.strip(b"\0"):
        raise tarfile.ReadError(f"it has no end, or something else is at byte {end}")


# --- samples ----------------------------------------------------------------------------------------------------------


class _Samples:
    """The samples of a split as items, whose images are still encoded."""

    def __init__(self, samples: Sequence[Files], chosen: WebDatasetOptions):
        self.samples, self.chosen = samples, chosen

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        files, chosen = self.samples[number], self.chosen
        images = [suffix for suffix in files if is_of_images(f".{suffix.rpartition('.')[2]}")]
        masks = [suffix for suffix in images if suffix.partition(".")[0] in MASKS]
        image = _suffix("image", chosen.image, [suffix for suffix in images if suffix not in masks], files)
        mask = _suffix("mask", chosen.mask, masks, files)
        texts = {
            "label": _text(files, "label", chosen.label, "cls"),
            "group": _text(files, "group", chosen.group, "group"),
        }
        item: dict[str, Any] = {part: value for part, value in texts.items() if value is not None}
        for part, suffix in (("image", image), ("mask", mask)):
            if suffix is not None:
                item[part] = Encoded(f"the {suffix}", files[suffix].read())
        for part in ("image", "label"):
            if part not in item:
                raise ItemError(Message(f"it has no {part}, but {', '.join(files)}: the suffix is ", Option(part)))
        return item


def _suffix(part: str, chosen: str | None, usual: Sequence[str], files: Files) -> str | None:
    """Return the suffix of a part's file: the first of those that were chosen, or the only usual one."""
    if chosen is not None:
        return next((suffix for suffix in chosen.lower().replace(" ", "").split(";") if suffix in files), None)
    if len(usual) > 1:
        raise ItemError(Message(f"it has several {part}s, {', '.join(usual)}: the suffix is ", Option(part)))
    return usual[0] if usual else None


def _text(files: Files, part: str, chosen: str | None, usual: str) -> int | str | None:
    """Return a label or a group: the content of a text file, or a value in a JSON file; None without."""
    suffix, _, key = (chosen or usual).partition(":")
    if not key and suffix in files and suffix != "json":
        text = files[suffix].read().decode("utf-8", "replace").strip()
        return int(text) if NUMBER.fullmatch(text) else text
    if "json" not in files or (chosen and suffix != "json"):
        return None
    try:
        values = json.loads(files["json"].read())
    except ValueError as error:
        raise ItemError(f"its json cannot be read ({first_line(error)}): correct it") from None
    keys = (key,) if key else USUAL[part]
    return next((values[name] for name in keys if isinstance(values, dict) and name in values), None)
