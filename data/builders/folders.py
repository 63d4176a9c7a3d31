"""The files of an image folder: images by class, their masks, and their groups. Nothing is decoded here."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import DatasetError
from options import Message, Option

# torchvision's; torchvision itself is imported where it is needed, because readers of a store need no PyTorch
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SUFFIXES = tuple(suffix for lower in EXTENSIONS for suffix in (lower, lower.upper()))


@dataclass(frozen=True)
class Sample:
    """An image file.

    Attributes:
        path: the file.
        name: its path below the folder of the split.
        label: its class.
        mask: the file of its mask, if masks are used.
        group: the name of its group, if groups are used.
    """

    path: Path
    name: str
    label: int
    mask: Path | None = None
    group: str | None = None


def find_classes(train: Path) -> list[str]:
    """Return the names of the folders in ``train``, sorted, or raise DatasetError if there are none."""
    from torchvision.datasets import folder

    try:
        return list(folder.find_classes(train)[0])
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            Message(Option("train", str(train)), " must be a folder with a folder for each class")
        ) from None


def find_samples(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """Return the images of a split in torchvision's order, or raise DatasetError for an unknown class."""
    from torchvision.datasets.folder import make_dataset

    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: give a folder with a folder for each class")
    own = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    if unknown := sorted(own - set(classes)):
        raise DatasetError(f"{folder} has a class '{unknown[0]}' that training does not have: {', '.join(classes)}")
    index = {name: number for number, name in enumerate(classes)}
    files = [(Path(path), label) for path, label in make_dataset(folder, index, EXTENSIONS, allow_empty=True)]
    files = [(path, label) for path, label in files if not path.name.startswith(".")]
    if not files:
        raise DatasetError(
            f"{folder} has no images in folders by class. Their names must end in one of {', '.join(EXTENSIONS)}"
        )
    return [Sample(path, path.relative_to(folder).as_posix(), label) for path, label in files]


def read_groups(path: Path) -> dict[str, str]:
    """Return the group of each image, by ``SPLIT/CLASS/FILE``, from a CSV file, or raise DatasetError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := sorted({"path", "group"} - set(reader.fieldnames or ())):
                raise DatasetError(f"{path} has no column '{missing[0]}': its first line must name 'path' and 'group'")
            table: dict[str, str] = {}
            for row in reader:
                if row["path"] in table:
                    raise DatasetError(f"{path}, line {reader.line_num}: {row['path']} is there twice")
                if not row["group"]:
                    raise DatasetError(f"{path}, line {reader.line_num}: {row['path']} has no group")
                table[row["path"]] = row["group"]
            return table
    except FileNotFoundError:
        raise DatasetError(
            Message(Option("groups", str(path)), " does not exist: give a CSV file with the columns path and group")
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV file in UTF-8 ({error})") from None


def with_mask(sample: Sample, split: str, masks: Path) -> Sample:
    """Add the mask of an image, at the same place below ``masks/SPLIT``, or below ``masks`` if there is no such folder.

    Raises:
        LookupError: There is none; the text says where it was expected.
    """
    place = (masks / split if (masks / split).is_dir() else masks) / sample.name
    mask = next((path for path in map(place.with_suffix, _SUFFIXES) if path.exists()), None)
    if mask is None:
        raise LookupError(f"there is no mask {place.with_suffix('')} with one of {', '.join(EXTENSIONS)}")
    return replace(sample, mask=mask)


def with_group(sample: Sample, split: str, groups: Mapping[str, str]) -> Sample:
    """Add the group of an image.

    Raises:
        LookupError: The file of groups does not name it; the text says so.
    """
    group = groups.get(f"{split}/{sample.name}")
    if group is None:
        raise LookupError(f"it has no row {split}/{sample.name} in the file of groups")
    return replace(sample, group=group)
