"""Datasets of PyTorch and arrays in memory, for Python. The shell has image-folder, hf and webdataset instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pickle import PicklingError
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from data.builders.decoding import BATCH, Decoder, decode_all
from data.builders.folders import Echo
from data.builders.from_items import ItemsOptions, Source, make_from_items
from data.builders.items import USUAL, Key, Keys
from data.builders.registry import HOW
from data.builders.samples import check_tests
from data.errors import DatasetError
from options import Doc, Ge, Heading, Message, Option, first_line, takes

if TYPE_CHECKING:
    from data.storage import Location

LOGGER = logging.getLogger(__name__)
ARRAYS = {"images": "image", "labels": "label", "masks": "mask", "groups": "group"}


@dataclass(frozen=True, kw_only=True)
class TorchOptions(ItemsOptions):
    """The options of `from_torch`."""

    image: Annotated[Any, Heading(HOW), Doc("Key of the image, or its position in a tuple.")] = None
    label: Annotated[Any, Heading(HOW), Doc("Key or position of the label.")] = None
    mask: Annotated[Any, Heading(HOW), Doc("Key or position of the mask.")] = None
    group: Annotated[Any, Heading(HOW), Doc("Key or position of the group.")] = None
    workers: Annotated[
        int | None, Ge(0), Heading(HOW), Doc("Processes that read items; 0 reads in this one. Default: one a core.")
    ] = None


@takes(TorchOptions)
def from_torch(
    out: Location,
    train: Any,
    tests: Mapping[str, Any] = MappingProxyType({}),
    *,
    validation: Any = None,
    echo: Echo = LOGGER.warning,
    **options: Any,
) -> dict[str, int]:
    """Build a dataset from map-style datasets of PyTorch, such as those of torchvision.

    An item is a tuple (image, label) or a dictionary. An image is a PIL image, an array (H, W) or (H, W, C), or a
    tensor (C, H, W), of integers from 0 to 255 or fractions from 0 to 1. A label is a number or a name. Masks and
    groups are optional. Processes read the items, as those of a ``DataLoader`` do, and the items need not fit in
    memory. Images become uint8 (N, 3, height, width), sorted by class, exactly as `make_image_folder` makes them of the
    same images in folders. The names of the classes are ``train.classes``, if there is such a list.

    Args:
        out: the dataset to write: a new folder or URL.
        train: the training items.
        tests: the items of each test by its name. `evaluate` computes the gap from ``iid`` and ``ood``.
        validation: the items of validation; by default, a share of the training items.
        echo: is told notes.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or items cannot be used; the error names them.
    """
    chosen = TorchOptions(out=out, **options)
    keys = Keys(chosen.image, chosen.label, chosen.mask, chosen.group)
    datasets = _named(train, validation, tests)
    for name, dataset in datasets.items():
        _check_map_style(name, dataset)
    _tell_ignored(train, keys, echo)
    return make_from_items(
        chosen,
        {name: Source(dataset, *_names(name, dataset, keys)) for name, dataset in datasets.items()},
        keys,
        {"command": "data.from_torch"},
        decode=partial(_decode_in_processes, chosen.workers),
        twice=True,
        echo=echo,
    )


@takes(ItemsOptions)
def from_arrays(
    out: Location,
    train: Any,
    tests: Mapping[str, Any] = MappingProxyType({}),
    *,
    validation: Any = None,
    echo: Echo = LOGGER.warning,
    **options: Any,
) -> dict[str, int]:
    """Build a dataset from arrays in memory, tensors, or anything else that gives a row for a number.

    A split is a tuple (images, labels), or a dictionary with ``images``, ``labels`` and optionally ``masks`` and
    ``groups``. Images are (N, H, W), (N, H, W, C) or (N, C, H, W), of integers from 0 to 255 or fractions from 0 to 1.
    Labels and groups are numbers or names. Images become uint8 (N, 3, height, width), sorted by class, exactly as
    `make_image_folder` makes them of the same images in folders.

    Args:
        out: the dataset to write: a new folder or URL.
        train: the training arrays.
        tests: the arrays of each test by its name. `evaluate` computes the gap from ``iid`` and ``ood``.
        validation: the arrays of validation; by default, a share of the training images.
        echo: is told notes.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or images cannot be used; the error names them.
    """
    chosen = ItemsOptions(out=out, **options)
    splits = _named(train, validation, tests)
    return make_from_items(
        chosen,
        {name: Source(_Arrays(name, arrays)) for name, arrays in splits.items()},
        Keys("image", "label"),
        {"command": "data.from_arrays"},
        decode=_decode_on_threads,
        echo=echo,
    )


def _named(train: Any, validation: Any, tests: Any) -> dict[str, Any]:
    """Return the splits by name."""
    if not isinstance(tests, Mapping):
        raise DatasetError(
            Message(Option("tests"), f" is of type {type(tests).__name__}: give a dictionary such as {{'ood': …}}")
        )
    check_tests(tests)
    return {"train": train, **({} if validation is None else {"validation": validation}), **tests}


# --- datasets of PyTorch ----------------------------------------------------------------------------------------------


def _check_map_style(name: str, dataset: Any) -> None:
    """Raise DatasetError unless a dataset has a length and gives an item for a number."""
    from torch.utils.data import DataLoader, IterableDataset

    if isinstance(dataset, DataLoader):
        raise DatasetError(f"{name} is a DataLoader: give its dataset, loader.dataset")
    has_length = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)
    if isinstance(dataset, IterableDataset) or not has_length:
        raise DatasetError(
            f"{name} is of type {type(dataset).__name__}, which does not give an item for a number: give a map-style "
            "Dataset, or list(dataset) if it fits in memory"
        )


def _names(name: str, dataset: Any, keys: Keys) -> tuple[list[str] | None, list[str] | None]:
    """Return the names of the classes and of the groups, as torchvision or Hugging Face have them."""
    features, classes = getattr(dataset, "features", None), getattr(dataset, "classes", None)
    if isinstance(features, Mapping):
        return _of_feature(features, keys.label, "label"), _of_feature(features, keys.group, "group")
    if isinstance(classes, list | tuple) and classes:
        synonyms = [", ".join(one) if isinstance(one, tuple) else one for one in classes]  # ImageNet has several names
        return (synonyms if all(isinstance(one, str) for one in synonyms) else None), None
    if hasattr(dataset, "dataset"):  # of a Subset
        return _names(name, dataset.dataset, keys)
    parts = [_names(name, part, keys) for part in getattr(dataset, "datasets", ())]  # of a ConcatDataset
    if any(part != parts[0] for part in parts):
        raise DatasetError(
            f"{name} consists of datasets whose classes differ, so that a number means several of them: return names "
            "as labels"
        )
    return parts[0] if parts else (None, None)


def _of_feature(features: Mapping[str, Any], key: Key, part: str) -> list[str] | None:
    names = next((name for name in ((key,) if key is not None else USUAL[part]) if name in features), None)
    values = getattr(features.get(names), "names", None) if isinstance(names, str) else None
    return None if values is None else list(values)


def _decode_in_processes(workers: int | None, decoder: Decoder[Any], advance: Callable[[int], object]) -> list[Any]:
    """Decode as `decode_all` does, and tell the remedy if the dataset cannot be read in other processes."""
    try:
        return decode_all(decoder, advance, workers)
    except (PicklingError, AttributeError, TypeError, RuntimeError) as error:  # those of items are caught there
        if workers == 0 or str(error).startswith("Caught "):  # by a process that reads the dataset: a mistake of ours
            raise
        raise DatasetError(
            Message(
                f"other processes cannot read the dataset ({first_line(error)}): ", Option("workers", 0),
                " reads it in this process",
            )
        ) from error  # fmt: skip


def _tell_ignored(train: Any, keys: Keys, echo: Echo) -> None:
    """Tell that items have further parts, which may be masks or groups."""
    try:
        item = train[0]
    except Exception:  # the first item is tried again, with an error
        return
    if isinstance(item, tuple | list) and len(item) > 2 and keys == Keys():
        echo(
            f"items are tuples of {len(item)}, of which the first two are taken as image and label: mask=2 or group=2 "
            "takes another one"
        )


# --- arrays -----------------------------------------------------------------------------------------------------------


class _Arrays:
    """The arrays of a split as a map-style dataset."""

    def __init__(self, name: str, arrays: Any):
        if isinstance(arrays, tuple | list) and len(arrays) == 2:
            arrays = {"images": arrays[0], "labels": arrays[1]}
        if not isinstance(arrays, Mapping) or not {"images", "labels"} <= set(arrays) <= set(ARRAYS):
            keys = f" with {', '.join(map(str, arrays))}" if isinstance(arrays, Mapping) else ""
            raise DatasetError(
                f"{name} is of type {type(arrays).__name__}{keys}: give (images, labels), or a dictionary with images, "
                "labels and optionally masks and groups"
            )
        self.arrays = {key: _rows(name, key, values) for key, values in arrays.items() if values is not None}
        lengths = {key: len(values) for key, values in self.arrays.items()}
        if len(set(lengths.values())) > 1:
            counted = ", ".join(f"{count} {key}" for key, count in lengths.items())
            raise DatasetError(f"{name} has {counted}: give one of each for each image")

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {ARRAYS[key]: values[number] for key, values in self.arrays.items()}


def _rows(name: str, key: str, values: Any) -> Any:
    """Return an object with a length that gives a row for a number."""
    if hasattr(values, "to_numpy"):  # pandas finds a row by its label
        return values.to_numpy()
    if key == "images" and len(getattr(values, "shape", (0, 0, 0))) < 3:
        raise DatasetError(
            f"{name}: images has the shape {tuple(values.shape)}: give (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    if hasattr(values, "__len__") and hasattr(values, "__getitem__") and not isinstance(values, Mapping | str):
        return values
    raise DatasetError(f"{name}: {key} is of type {type(values).__name__}: give an array, a tensor or a list")


def _decode_on_threads(decoder: Decoder[Any], advance: Callable[[int], object]) -> list[Any]:
    """Decode as `decode_all` does, on threads, which share the arrays."""
    decoded: list[Any] = []
    rows = iter(range(len(decoder)))
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(rows, 64 * BATCH)):
            for item in pool.map(decoder.__getitem__, batch):
                decoded.append(item)
                advance(1)
    return decoded
