"""Waterbirds (Sagawa et al., ICLR 2020): birds of CUB on backgrounds of Places, as their folder is published."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

import data
from data.builders.pictures import open_mask, open_squeezed
from data.builders.registry import HOW, BuilderOptions, ImageSize, Limited, builder
from data.builders.rows import Rows
from data.errors import DatasetError
from options import Doc, Heading, Kind, Message, Option, OptionSet, Word

if TYPE_CHECKING:
    from data.storage import Location

PUBLISHED = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
MASKS = "the folder segmentations of CUB-200-2011"
CLASSES, PLACES, SPLITS = ("landbird", "waterbird"), ("land", "water"), ("train", "validation", "test")
COLUMNS = {"y": CLASSES, "place": PLACES, "split": SPLITS}  # and the meanings of their numbers
LISTED = 5  # missing files in an error


@dataclass(frozen=True, kw_only=True)
class WaterbirdsSource(OptionSet):
    """The original files of Waterbirds."""

    HEADING = "Files"

    waterbirds: Annotated[Any, Kind.PATH, Doc("Folder of Waterbirds, which contains metadata.csv.")]
    masks: Annotated[Any, Kind.PATH, Doc("Folder segmentations of CUB-200-2011. Default: no masks.")] = None


@dataclass(frozen=True, kw_only=True)
class WaterbirdsOptions(WaterbirdsSource, BuilderOptions, Limited):
    """The options of ``make-data waterbirds``."""

    size: Annotated[ImageSize, Heading(HOW)] = 224


@builder(
    "waterbirds",
    WaterbirdsOptions,
    example="make-data waterbirds --waterbirds waterbird_complete95_forest2water2 --out DATA.zarr",
)
def make_waterbirds(
    out: Location, waterbirds: str | Path, masks: str | Path | None = None, **options: Any
) -> dict[str, int]:
    """Build Waterbirds from the published folder.

    The images show birds on backgrounds, which nearly tell the class in training. Images are squeezed: uint8 (N, 3,
    size, size). The splits are train (4,795 samples), in which 95 % of the birds are on their own background, and
    validation (1,199) and test (5,794), in which half of each kind are, in the order of metadata.csv. Groups are the
    four of the paper: kind of bird and of background. Nothing is downloaded.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or original files are missing or damaged.
    """
    chosen = WaterbirdsOptions(out=out, waterbirds=waterbirds, masks=masks, **options)
    size, limit = chosen.size, chosen.limit
    folder = Path(waterbirds)
    samples = _metadata(folder / "metadata.csv")
    birds = {split: [row for row in samples if row[0] == split][:limit] for split in SPLITS}
    birds = {split: rows for split, rows in birds.items() if rows}
    if "train" not in birds:
        raise DatasetError(f"{folder / 'metadata.csv'} has no training sample (split 0): download {PUBLISHED} again")
    pairs = [(folder / name, None if masks is None else _mask_of(Path(masks), name)) for _, _, _, name in samples]
    _check_files([path for path, _ in pairs], f"unpack {PUBLISHED} again")
    _check_files(
        [path for _, path in pairs if path is not None], "give ", Option("masks", Word("FOLDER")), f", {MASKS}"
    )
    from dask.system import cpu_count

    with data.DatasetWriter(out) as writer, ThreadPoolExecutor(cpu_count()) as pool:
        for split, rows in birds.items():
            names = [name for *_, name in rows]
            arrays: dict[str, Any] = {
                "images": Rows((len(rows), 3, size, size), pool, partial(_image, folder, names, size)),
                "labels": np.array([bird for _, bird, _, _ in rows], np.int64),
                "groups": np.array([len(PLACES) * bird + place for _, bird, place, _ in rows], np.int64),
            }
            if masks is not None:
                arrays["masks"] = Rows((len(rows), 1, size, size), pool, partial(_mask, Path(masks), names, size))
            writer.write_split(split, **arrays)
        writer.finish(
            name="waterbirds",
            class_names=list(CLASSES),
            bias_attribute="bird and background",
            group_names=[f"{bird} on {place}" for bird in CLASSES for place in PLACES],
            builder={"command": "make-data waterbirds", "size": size, "limit": limit, "masks": masks is not None},
        )
    return {split: len(rows) for split, rows in birds.items()}


_FOLDER = ("give ", Option("waterbirds", Word("FOLDER")), f", the folder that {PUBLISHED} unpacks to")


def _metadata(path: Path) -> list[tuple[str, int, int, str]]:
    """Return the split, bird, place and file of each sample."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = sorted({"img_filename", *COLUMNS} - set(reader.fieldnames or ()))
            if missing:
                raise DatasetError(Message(f"{path} has no column {', '.join(missing)}: ", *_FOLDER))
            return [_sample(path, reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise DatasetError(Message(f"there is no {path}: ", *_FOLDER)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV file ({error}): unpack {PUBLISHED} again") from None


def _sample(path: Path, line: int, row: dict[str, str]) -> tuple[str, int, int, str]:
    numbers = {}
    for column, meanings in COLUMNS.items():
        if row[column] not in map(str, range(len(meanings))):
            allowed = ", ".join(f"{number} ({meaning})" for number, meaning in enumerate(meanings))
            raise DatasetError(f"{path}, line {line}: {column} is {row[column]!r}, and not one of {allowed}")
        numbers[column] = int(row[column])
    return SPLITS[numbers["split"]], numbers["y"], numbers["place"], row["img_filename"]


def _image(folder: Path, names: list[str], size: int, sample: int) -> np.ndarray:
    return open_squeezed(folder / names[sample], size, f"unpack {PUBLISHED} again")


def _mask(masks: Path, names: list[str], size: int, sample: int) -> np.ndarray:
    return open_mask(_mask_of(masks, names[sample]), size, f"unpack {MASKS} again")


def _mask_of(masks: Path, name: str) -> Path:
    return (masks / name).with_suffix(".png")


def _check_files(paths: list[Path], *remedy: object) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise DatasetError(Message(f"there is no {', '.join(missing[:LISTED])}{more}: ", *remedy))
