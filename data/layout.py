"""The dataset layout on disk (docs/dataset-layout.md): opening, checking and writing it. Knows no models.

A dataset is a Zarr format 3 group with one sub-group a split, each holding ``images``, ``labels`` and,
where there are any, ``groups`` and ``masks``.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
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

    def verify(self) -> None:
        """Read all of it once. Raises DatasetError where it is not what the fingerprint was taken of."""
        arrays = {"images": self.images, "labels": self.labels, "groups": self.groups, "masks": self.masks}
        try:
            found = fingerprint({name: array for name, array in arrays.items() if array is not None})
        except (ValueError, RuntimeError) as error:  # a chunk that does not decode
            found = str(error)
        if found != self.fingerprint:
            raise DatasetError(
                f"the split '{self.name}' of {self.images.store_path.store} is damaged, or was changed after it was "
                f"made: its content gives {found[:60]}, its fingerprint is {self.fingerprint[:12]}…; build it again "
                "with make-data, or delete the attribute 'fingerprint' of a split that you changed on purpose"
            )

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
        return self.group_names[group] if 0 <= group < len(self.group_names) else str(group)


def open_dataset(path: str | Path) -> Dataset:
    """Open and check a dataset in our layout; images are not read.

    Raises DatasetError where there is none, it is damaged, or its arrays do not fit together.
    """
    path = str(path)
    try:
        root = zarr.open_group(path, mode="r", zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError, NotADirectoryError):
        raise DatasetError(f"no dataset at {path}: there is no Zarr group; {REMEDY}") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
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
    class_names = attributes.get("class_names")
    if not (isinstance(class_names, list) and class_names and all(isinstance(c, str) for c in class_names)):
        raise DatasetError(f"the dataset {path} has no attribute 'class_names', a list of names: add it")
    group_names = attributes.get("group_names", [])
    if not (isinstance(group_names, list) and all(isinstance(name, str) for name in group_names)):
        raise DatasetError(f"the dataset {path} has group_names {group_names!r}: make it a list of names")
    try:
        splits = {name: _open_split(path, name, group, len(class_names)) for name, group in sorted(root.groups())}
    except DatasetError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # what Zarr says of broken metadata and chunks
        raise DatasetError(f"the dataset {path} is damaged ({error}): build it again with make-data") from error
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
        group_names=tuple(group_names),
        splits={name: splits[name] for name in names},
    )


def _open_split(path: str, name: str, group: zarr.Group, classes: int) -> Split:
    where = f"the split '{name}' of {path}"
    arrays = {key: array for key, array in group.arrays() if key in ARRAYS}
    _check_arrays(where, arrays)
    labels = arrays["labels"]
    values = np.asarray(labels[:])
    if values.min() < 0 or values.max() >= classes:
        raise DatasetError(
            f"{where}: labels run from {values.min()} to {values.max()}, but there are {classes} class names"
        )
    found = group.attrs.get("fingerprint") or fingerprint(arrays)
    return Split(name, arrays["images"], labels, arrays.get("groups"), arrays.get("masks"), str(found))


ARRAYS = ("images", "labels", "groups", "masks")


def _check_arrays(where: str, arrays: Mapping[str, Any]) -> None:
    """Raise DatasetError unless a split's arrays have the types of the layout and fit together."""
    for required in ("images", "labels"):
        if required not in arrays:
            raise DatasetError(f"{where} has no array '{required}' (docs/dataset-layout.md)")
    images = arrays["images"]
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise DatasetError(f"{where}: 'images' is {images.dtype} {images.shape}, expected uint8 (N, C, H, W)")
    samples, _, height, width = images.shape
    for key in ("labels", "groups"):
        if key in arrays and (arrays[key].shape != (samples,) or arrays[key].dtype.kind not in "iu"):
            found = f"{arrays[key].dtype} {arrays[key].shape}"
            raise DatasetError(f"{where}: '{key}' is {found}, expected integers ({samples},)")
    masks, expected = arrays.get("masks"), (samples, 1, height, width)
    if masks is not None and (masks.shape != expected or masks.dtype != np.uint8):
        raise DatasetError(f"{where}: 'masks' is {masks.dtype} {masks.shape}, expected uint8 {expected}")


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
    """Writes a dataset split by split, in a hidden folder beside ``path`` that `finish` moves there.

    Use as a context manager: what is not finished is removed. Raises FileExistsError for a path that is taken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._check_free()
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        self._root = zarr.create_group(str(self._partial), zarr_format=3)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def write_split(self, name: str, **arrays: np.ndarray) -> None:
        """Add a split from ``images``, ``labels`` and, where there are any, ``groups`` and ``masks``.

        Raises DatasetError for arrays that are not as the layout says.
        """
        if unknown := sorted(set(arrays) - set(ARRAYS)):
            raise DatasetError(f"a split has no array {', '.join(unknown)}: choose from {', '.join(ARRAYS)}")
        _check_arrays(f"the split '{name}' for {self.path}", arrays)
        group = self._root.create_group(name)
        rows = _rows_per_chunk(arrays["images"].shape)
        for key, values in arrays.items():
            group.create_array(key, data=values, chunks=(rows, *values.shape[1:]))
        group.attrs["fingerprint"] = fingerprint(arrays)

    def finish(self, **attributes: Any) -> None:
        """Write the attributes (``name``, ``class_names``, ``bias_attribute``, …): the dataset now exists."""
        self._root.attrs.put({"kind": KIND, "format_version": FORMAT_VERSION, **attributes})
        self._check_free()
        self._partial.rename(self.path)

    def _check_free(self) -> None:
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} exists and is not empty: choose another --out, or remove it first")
