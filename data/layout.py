"""The dataset layout on disk (docs/dataset-layout.md): opening, checking and writing it. Knows no models.

A dataset is a Zarr format 3 group with one sub-group a split, each holding ``images``, ``labels`` and,
where there are any, ``groups`` and ``masks``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors

KIND = "explanation-distillation dataset"
FORMAT_VERSION = 1
CHUNK_BYTES = 2**21  # of images; other arrays follow the images' chunks
REMEDY = "build one with: python cli.py make-data"


class DatasetError(ValueError):
    """Not a dataset in our layout, or not one that fits; the text has the path and the remedy."""


@dataclass(frozen=True)
class Split:
    """One split, its arrays opened and not read.

    images: uint8 (N, C, H, W); labels: integer (N,); groups: the bias attribute's id, integer (N,), or
    None; masks: uint8 (N, 1, H, W), 0 for background, or None. ``fingerprint`` is the SHA-256 of them all.
    """

    name: str
    images: zarr.Array
    labels: zarr.Array
    groups: zarr.Array | None
    masks: zarr.Array | None
    fingerprint: str

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Dataset:
    """An opened dataset; ``group_names`` names the ids in ``groups``, values of ``bias_attribute``."""

    path: str
    name: str
    class_names: tuple[str, ...]
    bias_attribute: str | None
    group_names: tuple[str, ...]
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DatasetError(f"the dataset {self.path} has no split '{name}': choose one of {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def test_splits(self) -> tuple[Split, ...]:
        """Every split that is neither trained on nor used to choose a model."""
        return tuple(split for name, split in self.splits.items() if name not in ("train", "validation"))

    def group_name(self, group: int) -> str:
        return self.group_names[group] if group < len(self.group_names) else str(group)


def open_dataset(path: str | Path) -> Dataset:
    """Open and check a dataset in our layout; images are not read.

    Raises DatasetError where there is none, it is incomplete, or its arrays do not fit together.
    """
    path = str(path)
    try:
        root = zarr.open_group(path, mode="r", zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, NotADirectoryError):
        raise DatasetError(f"no dataset at {path}: there is no Zarr group; {REMEDY}") from None
    except ValueError as error:
        raise DatasetError(f"no dataset at {path}: its zarr.json cannot be read ({error}); {REMEDY}") from None
    attributes: dict[str, Any] = dict(root.attrs)
    if attributes.get("kind") != KIND:
        raise DatasetError(
            f"{path} is a Zarr group but no dataset of ours: its attribute 'kind' is "
            f"{attributes.get('kind')!r}, not {KIND!r}; {REMEDY}"
        )
    if attributes.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has dataset format version {attributes.get('format_version')!r}, this program reads "
            f"version {FORMAT_VERSION}: build the dataset again with make-data"
        )
    if not attributes.get("complete", True):
        raise DatasetError(f"the dataset {path} is incomplete, its making was interrupted: run make-data again")
    class_names = attributes.get("class_names")
    if not (isinstance(class_names, list) and class_names and all(isinstance(c, str) for c in class_names)):
        raise DatasetError(f"the dataset {path} has no attribute 'class_names', a list of names: add it")
    splits = {name: _open_split(path, name, group, len(class_names)) for name, group in sorted(root.groups())}
    if not splits:
        raise DatasetError(f"the dataset {path} has no splits: it needs at least a group 'train'")
    shapes = {split.image_shape for split in splits.values()}
    if len(shapes) > 1:
        raise DatasetError(f"the splits of {path} have images of different shapes {sorted(shapes)}")
    order = ["train", "validation", "iid", "ood", "shift"]  # the known ones first, in this order
    names = sorted(splits, key=lambda name: (order.index(name) if name in order else len(order), name))
    return Dataset(
        path=path,
        name=str(attributes.get("name", Path(path).stem)),
        class_names=tuple(class_names),
        bias_attribute=attributes.get("bias_attribute"),
        group_names=tuple(map(str, attributes.get("group_names", ()))),
        splits={name: splits[name] for name in names},
    )


def _open_split(path: str, name: str, group: zarr.Group, classes: int) -> Split:
    where = f"the split '{name}' of {path}"
    arrays = dict(group.arrays())
    for required in ("images", "labels"):
        if required not in arrays:
            raise DatasetError(f"{where} has no array '{required}' (docs/dataset-layout.md)")
    images, labels, groups, masks = (arrays.get(key) for key in ("images", "labels", "groups", "masks"))
    assert images is not None
    assert labels is not None
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[0] == 0:
        raise DatasetError(f"{where}: 'images' is {images.dtype} {images.shape}, expected uint8 (N, C, H, W)")
    samples, _, height, width = images.shape
    for key, array in (("labels", labels), ("groups", groups)):
        if array is not None and (array.shape != (samples,) or array.dtype.kind not in "iu"):
            raise DatasetError(f"{where}: '{key}' is {array.dtype} {array.shape}, expected integers ({samples},)")
    if masks is not None and (masks.shape != (samples, 1, height, width) or masks.dtype != np.uint8):
        raise DatasetError(
            f"{where}: 'masks' is {masks.dtype} {masks.shape}, expected uint8 {(samples, 1, height, width)}"
        )
    values = np.asarray(labels[:])
    if values.min() < 0 or values.max() >= classes:
        raise DatasetError(
            f"{where}: labels run from {values.min()} to {values.max()}, but there are {classes} class names"
        )
    present = {key: value for key, value in (("groups", groups), ("masks", masks)) if value is not None}
    found = group.attrs.get("fingerprint") or fingerprint({"images": images, "labels": labels, **present})
    return Split(name, images, labels, groups, masks, str(found))


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and values of a split's arrays, read in pieces of bounded size."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        dtype = np.dtype(array.dtype).newbyteorder("<")
        digest.update(f"{name} {dtype.str} {tuple(array.shape)};".encode())
        rows = _rows_per_chunk(array.shape, dtype.itemsize)
        for start in range(0, array.shape[0], rows):
            piece = np.asarray(array[start : start + rows]).astype(dtype, copy=False)
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()


def _rows_per_chunk(shape: tuple[int, ...], itemsize: int = 1) -> int:
    return max(1, min(shape[0], CHUNK_BYTES // (int(np.prod(shape[1:])) * itemsize)))


class DatasetWriter:
    """Writes a dataset split by split; it is a dataset only once `finish` was called.

    Raises FileExistsError for a path that holds anything else than an unfinished dataset of ours.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_free(self.path)
        self._unfinished: dict[str, Any] = {"kind": KIND, "format_version": FORMAT_VERSION, "complete": False}
        self._root = zarr.create_group(str(self.path), overwrite=True, zarr_format=3, attributes=self._unfinished)

    def write_split(self, name: str, **arrays: np.ndarray) -> None:
        """Add a split from ``images``, ``labels`` and, where there are any, ``groups`` and ``masks``."""
        group = self._root.create_group(name)
        rows = _rows_per_chunk(arrays["images"].shape)
        for key, values in arrays.items():
            group.create_array(key, data=values, chunks=(rows, *values.shape[1:]))
        group.attrs["fingerprint"] = fingerprint(arrays)

    def finish(self, **attributes: Any) -> None:
        """Write the attributes (``name``, ``class_names``, ``bias_attribute``, …): the dataset now exists."""
        self._root.attrs.put({**self._unfinished, **attributes, "complete": True})


def check_free(path: Path) -> None:
    """Raise FileExistsError unless a dataset may be written here: nothing, an empty folder, an unfinished one."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        attributes = dict(zarr.open_group(str(path), mode="r", zarr_format=3).attrs)
    except (OSError, ValueError):
        attributes = {}
    if attributes.get("kind") != KIND or attributes.get("complete", True):
        raise FileExistsError(f"{path} exists and is not empty: choose another --out, or remove it first")
