"""Datasets of Hugging Face in a folder: saved with ``save_to_disk``, or Parquet files. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from data.builders.folders import Echo
from data.builders.from_items import ItemsOptions, Source, make_from_items
from data.builders.items import USUAL, ItemError, Keys
from data.builders.pictures import Encoded
from data.builders.registry import HOW, builder
from data.builders.samples import check_tests
from data.errors import DatasetError
from options import Doc, Heading, Kind, Message, Metavar, Option, Positional, did_you_mean, first_line, import_problem

if TYPE_CHECKING:
    from data.storage import Location

LOGGER = logging.getLogger(__name__)
TRAIN, VALIDATION = ("train", "training"), ("validation", "valid", "val", "dev")
SHARD = re.compile(r"(.+?)(?:[-_.]\d+(?:-of-\d+(?:-\w+)?)?)?")  # train-00000-of-00002, train_0, train
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow
PARTS = ("image", "label", "mask", "group")


@dataclass(frozen=True, kw_only=True)
class HfOptions(ItemsOptions):
    """The options of ``make-data hf``."""

    dataset: Annotated[Any, Kind.PATH, Positional("DATASET_FOLDER"), Doc("Folder of the dataset.")]
    train: Annotated[
        str | None, Metavar("SPLIT"), Doc("Split of the training images. Default: train, or the only one.")
    ] = None
    validation: Annotated[
        str | None,
        Metavar("SPLIT"),
        Doc("Split of the validation images. Default: validation, if any, or a share of the training images."),
    ] = None
    tests: Annotated[
        Mapping[str, Any],
        Kind.NAMED_SPLITS,
        Doc("Split of a test by its name, such as ood=test. Repeatable. Default: all other splits under their names."),
    ] = field(default_factory=dict)
    image: Annotated[
        str | None, Heading(HOW), Metavar("COLUMN"), Doc("Column of the images. Default: the one of images.")
    ] = None
    label: Annotated[
        str | None, Heading(HOW), Metavar("COLUMN"), Doc("Column of the labels. Default: the one of class labels.")
    ] = None
    mask: Annotated[
        str | None, Heading(HOW), Metavar("COLUMN"), Doc("Column of the masks. Default: mask, if it has images.")
    ] = None
    group: Annotated[
        str | None, Heading(HOW), Metavar("COLUMN"), Doc("Column of the groups. Default: group, if there is one.")
    ] = None


@builder("hf", HfOptions, example="make-data hf DATASET_FOLDER --test ood=test --size 64 --out DATA.zarr")
def make_hf(out: Location, dataset: str | Path, *, echo: Echo = LOGGER.warning, **options: Any) -> dict[str, int]:
    """Build a dataset from one of Hugging Face.

    The folder was saved by save_to_disk of the library datasets, or has Parquet files whose names begin with the split.
    The columns of images and labels are found by their types. Images become uint8 (N, 3, height, width), sorted by
    class, exactly as image-folder makes them of the same files. Masks and groups are optional. Nothing is downloaded,
    and images need not fit in memory. The extra [hf] is required.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, the library is missing, or the dataset cannot be read.
    """
    chosen = HfOptions(out=out, dataset=dataset, **options)
    check_tests(chosen.tests)
    with _opened(Path(chosen.dataset)) as splits:
        sources: dict[str, Source] = {}
        for name, theirs in _splits(list(splits), chosen, echo).items():
            table = splits[theirs]
            columns = _columns(theirs, table.features, chosen)
            classes, groups = (_names(table.features.get(columns.get(part))) for part in ("label", "group"))
            sources[name] = Source(_Rows(table, columns), classes, groups)
        return make_from_items(chosen, sources, Keys("image", "label"), {"command": "make-data hf"}, echo=echo)


# --- splits -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Open the dataset in a folder: its splits by name. Rows are read when they are needed.

    Raises:
        DatasetError: The library is missing, there is no dataset, or it is damaged.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        problem = import_problem(error, "datasets")
        raise DatasetError(
            f'the library datasets, which reads datasets of Hugging Face, {problem}: pip install -e ".[hf]"'
        ) from None
    if not folder.exists():
        raise DatasetError(Message(Option("dataset", str(folder)), " does not exist: give the folder of a dataset"))
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = {} if saved else _parquet_files(folder)
    if cut := [path for path in sorted(folder.rglob("*.arrow")) if saved and not _has_end(path)]:
        raise DatasetError(f"{cut[0]} cannot be read (it has no end): save or download it again")
    with tempfile.TemporaryDirectory(prefix="hf-") as cache:
        try:
            with _silent_without_terminal():
                if saved:
                    loaded = load_from_disk(str(folder))
                    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
                else:
                    splits = load_dataset("parquet", data_files=files, cache_dir=cache)
        except Exception as error:  # pyarrow and the library raise exceptions of any type on damaged files
            reason = first_line(error.__cause__ or error)
            raise DatasetError(f"{folder} cannot be read ({reason}): save or download it again") from error
        yield splits


def _has_end(path: Path) -> bool:
    """Return whether an Arrow file is whole. Arrow itself reads one that ends after some of its batches."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        return file.read() == END


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Return the Parquet files of each split, by the beginning of their names, or by their folders."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise DatasetError(
            f"{folder} has neither a dataset of save_to_disk nor Parquet files: write one with "
            "datasets.load_dataset(…).save_to_disk(folder)"
        )
    splits: dict[str, list[Path]] = {}
    for path in files:
        match = SHARD.fullmatch(path.stem)
        name = path.parent.name if path.stem.isdecimal() or match is None else match[1]
        splits.setdefault(name, []).append(path)
    for name, paths in splits.items():
        if len(places := {path.parent for path in paths}) > 1:
            raise DatasetError(
                f"{folder} has files of the split '{name}' in {' and '.join(sorted(map(str, places))[:2])}: give the "
                "folder of one configuration"
            )
    return {name: [str(path) for path in paths] for name, paths in splits.items()}


@contextlib.contextmanager
def _silent_without_terminal() -> Iterator[None]:
    """Switch the progress bars of the library off, if there is no terminal."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _splits(available: list[str], chosen: HfOptions, echo: Echo) -> dict[str, str]:
    """Return the split of the dataset that each of ours is made of, by our name."""
    train = chosen.train or next((name for name in TRAIN if name in available), None)
    if train is None and len(available) == 1:
        train = available[0]
    if train is None:
        raise DatasetError(
            Message(f"none of the splits {', '.join(available)} is called train: its name is ", Option("train"))
        )
    validation = chosen.validation or next((name for name in VALIDATION if name in available and name != train), None)
    splits = {"train": train, **({} if validation is None else {"validation": validation})}
    others = [name for name in available if name not in splits.values()]
    splits |= {name: str(theirs) for name, theirs in chosen.tests.items()} or {name: name for name in others}
    for name in splits.values():
        if name not in available:
            raise DatasetError(
                f"the dataset has no split '{name}', but {', '.join(available)}.{did_you_mean(name, available)}"
            )
    if left_out := [name for name in others if name not in splits.values()]:
        echo(f"splits that are left out: {', '.join(left_out)}")
    return splits


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns(split: str, features: Mapping[str, Any], chosen: HfOptions) -> dict[str, str]:
    """Return the column of each part of an item: the one that was chosen, or the one of the right type."""
    from datasets import ClassLabel

    columns = {part: name for part in PARTS if (name := getattr(chosen, part)) is not None}
    for part, name in columns.items():
        if name not in features:
            raise DatasetError(
                Message(
                    Option(part), f" is '{name}', and {split} has the columns {', '.join(features)}."
                    f"{did_you_mean(name, features)}",
                )
            )  # fmt: skip
    free = [name for name in features if name not in columns.values()]
    images = [name for name in free if _has_images(features[name])]
    for part, names in (("mask", images), ("group", free)):
        if part not in columns and (usual := _usual(part, names)):
            columns[part] = usual[0]
    of_type = {
        "image": [name for name in images if name != columns.get("mask")],
        "label": [name for name in free if isinstance(features[name], ClassLabel) and name != columns.get("group")],
    }
    of_type["label"] = of_type["label"] or _usual("label", [name for name in free if _has_values(features[name])])[:1]
    for part, names in of_type.items():
        if part not in columns:
            columns[part] = _only(split, part, names, features)
    return columns


def _usual(part: str, names: list[str]) -> list[str]:
    return [name for name in USUAL[part] if name in names]


def _only(split: str, part: str, names: list[str], features: Mapping[str, Any]) -> str:
    """Return the column of a part, by its type or, if there are several, by its name."""
    usual = _usual(part, names)
    if len(names) == 1 or usual:
        return (usual or names)[0]
    what = {"image": "images", "label": "class labels"}[part]
    found = (
        f"several columns of {what}, {', '.join(names)}" if names else f"no column of {what}, but {', '.join(features)}"
    )
    raise DatasetError(Message(f"{split} has {found}: its name is ", Option(part)))


def _has_images(feature: Any) -> bool:
    """Return whether a column has images: encoded files, with or without their type."""
    from datasets import Image, Value

    if isinstance(feature, Value):
        return str(feature.dtype) in ("binary", "large_binary")
    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _has_values(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value)


def _names(feature: Any) -> list[str] | None:
    names = getattr(feature, "names", None)  # of a ClassLabel
    return None if names is None else list(names)


class _Rows:
    """The rows of a split as items, whose images are still encoded."""

    def __init__(self, table: Any, columns: Mapping[str, str]):
        from datasets import Image

        table = table.select_columns(sorted(set(columns.values()))).with_format(None)
        for name, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
        self.table, self.columns = table, dict(columns)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.table[number]
        item = {part: row[name] for part, name in self.columns.items()}
        return item | {part: _encoded(item[part], part) for part in ("image", "mask") if item.get(part) is not None}


def _encoded(value: Any, part: str) -> Any:
    if not isinstance(value, dict):
        return np.asarray(value) if isinstance(value, list) else value
    path, data = value.get("path"), value.get("bytes")
    if data is not None:
        return Encoded(Path(path or f"the {part}").name, data)
    if path is None:
        raise ItemError(f"its {part} is empty: correct it")
    return Path(path)
