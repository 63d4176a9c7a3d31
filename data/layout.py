"""The dataset layout (docs/dataset-layout.md): open, check and write datasets. This module knows nothing about models.

A dataset is a Zarr format 3 group with one sub-group for each split. A split has the arrays ``images`` and ``labels``,
and optionally ``groups`` and ``masks``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data.arrays import as_arrays, axes_by_name, check_arrays, doubtful_axes, telling_names
from data.errors import DatasetError, check_name
from data.metadata import (
    MetadataError,
    no_group,
    open_array,
    read_group,
    refuse_encoded,
    refuse_format_2,
    refuse_lost,
)
from data.storage import PARTIAL, ROOT, Location, Storage, open_store, process_runs
from options import Call, Message, Option, first_line

log = logging.getLogger(__name__)

KIND = "explanation-distillation dataset"
FORMAT_VERSION = 1
ARRAYS = ("images", "labels", "groups", "masks")
UNFINISHED = "unfinished"  # the attribute that marks a dataset that is being written, or was interrupted
CHUNK_BYTES, SHARD_BYTES = 2**21, 2**26  # upper limits for images and masks
MAX_CHUNKS = 4096  # files of one array; above this number, chunks are grouped in shards, which read a little slower
CHUNK_ROWS = 2**16  # rows of a chunk of labels or groups
WRITTEN = re.compile(
    rf"{ROOT}|[^/]+/{ROOT}|[^/]+/({'|'.join(ARRAYS)})/({ROOT}|c/[0-9/]+)|(.*/)?\.[^/]+\.[0-9a-f]{{32}}\{PARTIAL}"
)
ANOTHER = Message("choose another ", Option("out"))
REMEDY = Message("build one with ", Call("make_image_folder", command="make-data"))
Lacking = Callable[[str], None]  # called with the name of a split without a fingerprint, before the split is read whole


class UnreadableError(DatasetError):
    """A chunk of a stored array cannot be read. The text has the array and the rows."""


@dataclass(frozen=True)
class Split:
    """One split of an opened dataset. Its arrays are read when they are indexed.

    Attributes:
        name: Name of the split.
        images: uint8 (N, C, H, W), values 0 to 255.
        labels: Integer (N,), an index into the class names.
        groups: Integer (N,), the id of the bias attribute's value; None without.
        masks: uint8 (N, 1, H, W), 0 on the background; None without.
        fingerprint: SHA-256 of all of the arrays.
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
        """Read the whole split once and compare it with its fingerprint.

        Raises:
            DatasetError: The split is damaged or was changed.
        """
        arrays = {"images": self.images, "labels": self.labels, "groups": self.groups, "masks": self.masks}
        where = f"the split '{self.name}' of {self.images.store_path.store} is damaged"
        try:
            content = fingerprint({name: array for name, array in arrays.items() if array is not None})
        except UnreadableError as error:
            raise DatasetError(f"{where}: {error}") from None
        if content != self.fingerprint:
            missing = [text for array in arrays.values() if array is not None and (text := _missing_chunks(array))]
            reason = f" ({', '.join(missing)})" if missing else ""
            raise DatasetError(
                f"{where}, or was changed after it was made{reason}: its content gives {content[:12]}…, its "
                f"fingerprint is {self.fingerprint[:12]}…; build it again, or delete the attribute 'fingerprint' if "
                "you changed the split on purpose"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Dataset:
    """An opened dataset.

    Attributes:
        path: The location that it was opened from.
        name: Name of the dataset.
        class_names: Names of the classes, in the order of the labels.
        bias_attribute: What tells the class in training, such as ``"colour"``; None if unknown.
        group_names: Names of the values in ``groups``, by their id.
        splits: The splits by name: train, validation, iid, ood and shift first.
    """

    path: str
    name: str
    class_names: tuple[str, ...]
    bias_attribute: str | None
    group_names: tuple[str, ...]
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """Get a split by its name.

        Raises:
            DatasetError: The dataset has no such split.
        """
        if name not in self.splits:
            raise DatasetError(f"the dataset {self.path} has no split '{name}': choose one of {', '.join(self.splits)}")
        return self.splits[name]

    def check_classes(self) -> None:
        """Check that there is something to learn.

        Raises:
            DatasetError: The dataset has a single class.
        """
        if len(self.class_names) < 2:
            raise DatasetError(
                f"the dataset {self.path} has one class, {self.class_names[0]!r}, so there is nothing to tell apart: "
                "make a dataset with two classes or more"
            )

    @property
    def test_splits(self) -> tuple[Split, ...]:
        """Every split except ``train`` and ``validation``."""
        return tuple(split for name, split in self.splits.items() if name not in ("train", "validation"))

    def group_name(self, group: int) -> str:
        """Get the name of a group's id; the id itself if it has no name."""
        return self.group_names[group] if 0 <= group < len(self.group_names) else str(group)


def open_dataset(location: Location) -> Dataset:
    """Open and check a dataset in our layout. Images are not read, except those of a split without a fingerprint.

    Args:
        location: A folder, an fsspec URL, or a Zarr store.

    Returns:
        The dataset.

    Raises:
        DatasetError: There is no dataset, it is damaged, or its arrays do not fit together.
        OSError: The location cannot be read.
    """
    return _open(location, open_store(location), functools.partial(_tell_whole_read, str(location)))


@functools.cache
def _tell_whole_read(path: str, split: str) -> None:
    """Tell that a split without a fingerprint is read whole, but only once in a process."""
    log.warning(
        Message(
            f"the split '{split}' of {path} has no fingerprint, so all of it is read whenever the dataset is opened: "
            "add one with ",
            Call("add_fingerprints", {"data": path}),
        )
    )


def _open(location: Location, store: Storage, lacks_fingerprint: Lacking) -> Dataset:
    path = str(location)
    raw = store.read(ROOT)
    if raw is None:
        if problem := no_group(store):
            raise DatasetError(f"no dataset at {path}: {problem}")
        raise DatasetError(Message(f"no dataset at {path}: there is no Zarr group; ", REMEDY))
    try:
        root = read_group(ROOT, raw)
    except MetadataError as error:
        raise DatasetError(Message(f"no dataset at {path}: {error}; ", REMEDY)) from None
    attributes = root["attributes"]
    _check_attributes(path, attributes)
    class_names, group_names = attributes["class_names"], tuple(attributes.get("group_names", []))
    _tell_one_class(path, class_names)
    return Dataset(
        path=path,
        name=str(attributes.get("name", Path(path).stem)),
        class_names=tuple(class_names),
        bias_attribute=attributes.get("bias_attribute"),
        group_names=group_names,
        splits=_open_splits(path, store, root, len(class_names), len(group_names), lacks_fingerprint),
    )


def read_builder(location: Location, fingerprint: str) -> dict[str, Any] | None:
    """Read what made a dataset, its attribute ``builder``. No array is read.

    Args:
        location: A folder, an fsspec URL, or a Zarr store.
        fingerprint: Fingerprint of one of its splits.

    Returns:
        The attribute, empty if there is none; None if the dataset is gone, or no split has the fingerprint.
    """
    try:
        store = open_store(location)
        if (raw := store.read(ROOT)) is None:
            return None
        root = read_group(ROOT, raw)
        for name, documents in _metadata_of_groups(store, root).items():
            attributes = read_group(f"{name}/{ROOT}", documents[ROOT])["attributes"]
            if attributes.get("fingerprint") == fingerprint:
                builder = root["attributes"].get("builder")
                return builder if isinstance(builder, dict) else {}
    except (OSError, MetadataError):
        pass
    return None


def _check_attributes(path: str, attributes: Mapping[str, Any]) -> None:
    """Raise DatasetError unless the attributes are those of a finished dataset that this program reads."""
    if attributes.get("kind") != KIND:
        raise DatasetError(
            Message(
                f"{path} is a Zarr group but no dataset of ours: its attribute 'kind' is "
                f"{attributes.get('kind')!r}, not {KIND!r}; ",
                REMEDY,
            )
        )
    if UNFINISHED in attributes:
        raise DatasetError(f"the dataset {path} was not finished, or is still being written: build it again")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has dataset format version {attributes.get('format_version')!r}, this program reads version "
            f"{FORMAT_VERSION}: build the dataset again"
        )
    class_names = attributes.get("class_names")
    if not (isinstance(class_names, list) and class_names and all(isinstance(c, str) for c in class_names)):
        problem = f"class_names {class_names!r}" if class_names else "no attribute 'class_names'"
        raise DatasetError(f"the dataset {path} has {problem}: make it a list of names, such as ['cat', 'dog']")
    _check_names(path, class_names)
    group_names = attributes.get("group_names", [])
    if not (isinstance(group_names, list) and all(isinstance(name, str) for name in group_names)):
        raise DatasetError(f"the dataset {path} has group_names {group_names!r}: make it a list of names")
    for name in group_names:
        check_name(name, f"a group of the dataset {path}")


def _check_names(path: str, class_names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(class_names).items() if count > 1]:
        raise DatasetError(f"the dataset {path} has several classes called {twice[0]!r}: give each its own name")
    for name in class_names:
        check_name(name, f"a class of the dataset {path}")


def _tell_one_class(path: str, class_names: Sequence[str]) -> None:
    if len(class_names) == 1:
        warn_once(f"the dataset {path} has one class, so nothing can be learnt from it: add another class")


def _open_splits(
    path: str, store: Storage, root: Mapping[str, Any], classes: int, group_names: int, lacks_fingerprint: Lacking
) -> dict[str, Split]:
    """Open and check every split. The known ones come first."""
    splits = {}
    try:
        groups = _metadata_of_groups(store, root)
    except MetadataError as error:
        raise DatasetError(f"{path} cannot be opened: {error}") from None
    for name, documents in groups.items():
        where = f"the split '{name}' of {path}"
        try:
            group = read_group(f"{name}/{ROOT}", documents.pop(ROOT))
            arrays = {key: open_array(store, f"{name}/{key}", raw) for key, raw in documents.items()}
            refuse_format_2(store, [f"{name}/{key}" for key in ARRAYS if key not in arrays])
        except MetadataError as error:
            raise DatasetError(f"{where} cannot be opened: {error}") from None
        digest = group["attributes"].get("fingerprint") or None
        splits[name] = _open_split(where, name, digest, arrays, classes, group_names, lacks_fingerprint)
    if not splits:
        raise DatasetError(f"the dataset {path} has no splits: it needs at least a group 'train'")
    shapes = {split.image_shape for split in splits.values()}
    if len(shapes) > 1:
        raise DatasetError(f"the splits of {path} have images of different shapes {sorted(shapes)}")
    first: dict[str, str] = {}
    for name, split in splits.items():
        if (other := first.setdefault(split.fingerprint, name)) != name:
            warn_once(f"the splits '{other}' and '{name}' of {path} hold the same samples: give each its own")
    order = ["train", "validation", "iid", "ood", "shift"]
    names = sorted(splits, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: splits[name] for name in names}


def _metadata_of_groups(store: Storage, root: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """Read the metadata of every group in the root: its own document under ``zarr.json``, those of arrays by name.

    A store that cannot list its keys, such as a web server, has the names in its consolidated metadata.
    """
    consolidated = (root.get("consolidated_metadata") or {}).get("metadata") or {}
    names = sorted({*store.names(), *(key.split("/")[0] for key in consolidated)} - {ROOT})
    keys = [(name, key) for name in names for key in (ROOT, *ARRAYS)]
    documents = store.read_many([f"{name}/{key}" if key == ROOT else f"{name}/{key}/{ROOT}" for name, key in keys])
    by_name: dict[str, dict[str, bytes]] = {name: {} for name in names}
    for (name, key), raw in zip(keys, documents, strict=True):
        if raw is not None:
            by_name[name][key] = raw
    for name, own in by_name.items():
        if ROOT not in own:
            refuse_lost(store, name, own)
    return {name: own for name, own in by_name.items() if ROOT in own and not _is_array(own[ROOT])}


def _is_array(raw: bytes) -> bool:
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(raw).get("node_type") == "array"
    return False


def _open_split(
    where: str,
    name: str,
    digest: str | None,
    arrays: Mapping[str, Any],
    classes: int,
    group_names: int,
    lacks_fingerprint: Lacking,
) -> Split:
    _check_meaning(where, arrays)
    _check_arrays(where, arrays)
    labels = arrays["labels"]
    try:
        _check_labels(where, *_range(labels), classes)
        if "groups" in arrays and group_names and (problem := _without_name(*_range(arrays["groups"]), group_names)):
            warn_once(f"{where}: {problem}")
        if digest is None:
            lacks_fingerprint(name)
            digest = fingerprint(arrays)
            for array in arrays.values():
                if missing := _missing_chunks(array):
                    warn_once(
                        f"{where}: {missing}, and are read as {array.fill_value}. Zarr leaves out chunks that hold "
                        "nothing else: if these do not, write them again"
                    )
    except UnreadableError as error:
        raise DatasetError(f"{where} is damaged: {error}") from None
    return Split(name, arrays["images"], labels, arrays.get("groups"), arrays.get("masks"), str(digest))


def add_fingerprints(data: Location) -> dict[str, str]:
    """Give every split of a foreign dataset its fingerprint, so that it is not read whole whenever it is opened.

    A fingerprint that is there is compared with the arrays. Nothing else in the dataset changes.

    Args:
        data: A folder, an fsspec URL, or a Zarr store.

    Returns:
        The fingerprint of each split by name.

    Raises:
        DatasetError: There is no dataset, it is being written or damaged, or a fingerprint is that of other arrays.
        OSError: The location cannot be read or written.
    """
    store = open_store(data, writable=True)
    lacking = []

    def check_writable(split: str) -> None:  # before the split is read, which may take long
        lacking.append(split)
        key = f"{split}/{ROOT}"
        if store.read_only:
            raise OSError(f"{data} is read-only: open it for writing, or copy the dataset first")
        store.write(key, store.read(key) or b"")

    dataset = _open(data, store, check_writable)
    for name, split in dataset.splits.items():
        if name not in lacking:
            split.verify()
            log.info(f"the split '{name}' of {data} has its fingerprint already, and its arrays match")
    for name in lacking:
        key = f"{name}/{ROOT}"
        group = read_group(key, store.read(key) or b"")
        group["attributes"]["fingerprint"] = dataset.splits[name].fingerprint
        store.write(key, json.dumps(group, indent=2).encode())
    return {name: split.fingerprint for name, split in dataset.splits.items()}


def _check_arrays(where: str, arrays: Mapping[str, Any]) -> None:
    """Raise DatasetError unless a split's arrays fit the layout; warn if the axes may be others."""
    check_arrays(where, arrays)
    shape = tuple(arrays["images"].shape)
    if doubtful_axes(arrays["images"]):
        warn_once(
            f"{where}: 'images' is {shape}, which means {shape[1]} channels and {shape[3]} columns of pixels; if the "
            "channels are the last axis, write images.transpose(0, 3, 1, 2)"
        )


def _check_meaning(where: str, arrays: Mapping[str, Any]) -> None:
    """Raise DatasetError if metadata say that an array means other values, or has other axes; warn of x before y."""
    for name, array in arrays.items():
        try:
            refuse_encoded(name, array)
        except MetadataError as error:
            raise DatasetError(f"{where}: {error}") from None
        if name in ("images", "masks") and (named := axes_by_name(array)):
            names, axes = named
            text = (
                f"{where}: '{name}' has the dimensions {', '.join(names)}, expected samples, channels, rows, columns: "
                f"transpose them, {name}.transpose{axes}, or correct these names"
            )
            if axes != (0, 1, 3, 2):
                raise DatasetError(text)
            warn_once(text)


def _range(ids: Any) -> tuple[int, int]:
    """Find the lowest and the highest of labels or groups."""
    ranges = [(int(piece.min()), int(piece.max())) for piece in _pieces(ids)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _check_labels(where: str, lowest: int, highest: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        raise DatasetError(f"{where}: labels run from {lowest} to {highest}, but there are {classes} class names")


def _without_name(lowest: int, highest: int, group_names: int) -> str | None:
    if lowest < 0 or highest >= group_names:
        return (
            f"groups run from {lowest} to {highest}, but there are {group_names} group names: correct the numbers, or "
            "complete group_names"
        )
    return None


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, but only once in a process, in which a dataset is opened several times."""
    log.warning(text)


def fingerprint(
    arrays: Mapping[str, Any], copy: Callable[[str, int, np.ndarray], None] = lambda name, start, piece: None
) -> str:
    """Compute the SHA-256 of a split's arrays: their names, types, shapes and values.

    Args:
        arrays: The arrays by name. Each is read once, in pieces of at most 64 MiB.
        copy: Function that is called with every piece: the array's name, the piece's first row, its values.

    Returns:
        The digest in hexadecimal.

    Raises:
        DatasetError: An array gives other rows than its shape says, or a chunk cannot be read.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        dtype = np.dtype(array.dtype).newbyteorder("<")
        digest.update(f"{name} {dtype.str} {tuple(array.shape)};".encode())
        start = 0
        for piece in _pieces(array):
            digest.update(piece.data)
            copy(name, start, piece)
            start += len(piece)
    return digest.hexdigest()


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """Yield the rows of anything with a shape, a dtype and slices, in order, little-endian and contiguous.

    A piece holds many whole chunks, which Zarr reads and writes concurrently, or one whole shard.
    """
    dtype = np.dtype(array.dtype).newbyteorder("<")
    rows = _power_of_two(array.shape[0], SHARD_BYTES // _row_bytes(array))
    for start in range(0, array.shape[0], rows):
        stop = min(start + rows, array.shape[0])
        piece = np.ascontiguousarray(_rows(array, start, stop), dtype)
        if piece.shape != (stop - start, *array.shape[1:]):
            raise DatasetError(f"an array of shape {tuple(array.shape)} gives {piece.shape} for rows {start} to {stop}")
        yield piece


def _rows(array: Any, start: int, stop: int) -> Any:
    """Read rows. Raise UnreadableError if they are those of a Zarr array that cannot be decoded."""
    try:
        return array[start:stop]
    except OSError:
        raise
    except Exception as error:  # codecs raise errors of every kind for bytes that they cannot decode
        if not isinstance(array, zarr.Array):
            raise
        raise UnreadableError(
            f"rows {start} to {stop - 1} of the array '{array.path}' cannot be read ({first_line(error)}); write the "
            "array again"
        ) from error


def _missing_chunks(array: zarr.Array) -> str | None:
    """Tell how many files of an array are not stored, and are read as its fill value; None if all are."""
    file = array.shards or array.chunks  # a file holds a chunk, or a shard of several
    files = math.prod(-(-size // rows) for size, rows in zip(array.shape, file, strict=True))
    missing = files - array.nchunks_initialized * math.prod(array.chunks) // math.prod(file)
    kind = "shards" if array.shards else "chunks"
    return f"{missing} of {files} {kind} of '{array.path}' are missing" if missing else None


def _chunk_rows(array: Any) -> tuple[int, ...]:
    """Choose the rows of a chunk and, for a large array, of a shard: powers of two, as in the heatmap store."""
    samples, row = array.shape[0], _row_bytes(array)
    if len(array.shape) == 1:
        return (_power_of_two(samples, CHUNK_ROWS),)
    chunk, shard = (_power_of_two(samples, limit // row) for limit in (CHUNK_BYTES, SHARD_BYTES))
    return (chunk,) if samples <= MAX_CHUNKS * chunk else (chunk, shard)


def _row_bytes(array: Any) -> int:
    return math.prod(array.shape[1:]) * np.dtype(array.dtype).itemsize


def _power_of_two(samples: int, most: int) -> int:
    """Find the largest power of two up to ``most``, but not more than the smallest one that holds all samples."""
    return 2 ** min(max(1, most).bit_length() - 1, (max(1, samples) - 1).bit_length())


class DatasetWriter:
    """Write a dataset split by split. Use it as a context manager.

    The writer claims the location at once, by attributes that say "unfinished". `finish` turns it into a dataset. On
    leaving the context, the writer removes an unfinished dataset. After a killed writer, the next one does.

    Args:
        location: A new or empty folder, an fsspec URL, or a Zarr store.

    Raises:
        FileExistsError: The location holds anything else, or another process is writing to it.
    """

    def __init__(self, location: Location):
        self.path = str(location)
        self._store = open_store(location, writable=True)
        self._mark = {"writer": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._finished = False
        self._ranges: dict[str, dict[str, tuple[int, int]]] = {}  # the lowest and the highest value, by split and array
        self._claim()
        self._root = zarr.open_group(self._store, mode="r+", zarr_format=3)

    def _claim(self) -> None:
        taken = Message(f"{self.path} exists and is not empty: ", ANOTHER, ", or remove it first")
        try:
            self._made_folder = self._store.make()
        except NotADirectoryError:
            raise FileExistsError(taken) from None
        if self._store.names():
            mark = _mark(self._store)
            if mark is None:
                raise FileExistsError(taken)
            if mark.get("host") == socket.gethostname() and _another_runs(mark.get("pid")):
                raise FileExistsError(
                    Message(f"{self.path} is being written by process {mark.get('pid')}: let it finish, or ", ANOTHER)
                )
            self._clear()
            self._store.make()
        if not self._store.write(ROOT, _root({UNFINISHED: self._mark}), exclusive=True):
            raise FileExistsError(Message(f"{self.path} is being written by another process: ", ANOTHER))

    def _clear(self) -> None:
        """Remove everything that a writer wrote. Raise FileExistsError first if there is anything else."""
        if foreign := [key for key in self._store.all_keys() if not WRITTEN.fullmatch(key)]:
            raise FileExistsError(
                Message(
                    f"{self.path} is a dataset that was not finished, and holds {foreign[0]}, which is no part of one: "
                    "move it elsewhere first, or ",
                    ANOTHER,
                )
            )
        self._store.remove_all()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._finished:
            return
        with contextlib.suppress(OSError):  # the rest stays marked as unfinished, and the next writer removes it
            if _mark(self._store) == self._mark:
                self._clear()
                if self._made_folder:
                    self._store.remove_root()

    def write_split(self, name: str, **arrays: Any) -> None:
        """Add a split.

        Args:
            name: Name of the split.
            arrays: ``images``, ``labels`` and optionally ``groups`` and ``masks``, with shapes and dtypes as in
                `Split`. Each is anything with ``shape``, ``dtype`` and slices of rows: a NumPy, Zarr, Dask or h5py
                array, a ``numpy.memmap``, or an object that makes its rows on demand. It is read once, in order, in
                pieces of at most 64 MiB. PyTorch tensors, lists and pandas columns are taken too. Booleans and
                integers of other dtypes are converted if no value changes, except for boolean images.

        Raises:
            DatasetError: The arrays do not fit the layout, the name is taken or not plain, or another process took
                the location over. The split is removed, and can be written again.
        """
        if unknown := sorted(set(arrays) - set(ARRAYS)):
            raise DatasetError(f"a split has no array {', '.join(unknown)}: choose from {', '.join(ARRAYS)}")
        if not name or set(name) & set("/\\") or name in (".", "..", ROOT) or name.endswith(PARTIAL):
            raise DatasetError(f"no split of {self.path} can be called {name!r}: give it a plain name, such as 'train'")
        if name in self._ranges:
            raise DatasetError(f"the split '{name}' for {self.path} is written already: give each its own name")
        where = f"the split '{name}' for {self.path}"
        _check_meaning(where, arrays)
        arrays = as_arrays(where, arrays)
        _check_arrays(where, arrays)
        self._check_ours()
        group = self._root.create_group(name)
        try:
            self._write(where, name, group, arrays)
        except BaseException:
            with contextlib.suppress(Exception):  # a failed clean-up must not hide the first error
                del self._root[name]
            raise

    def _write(self, where: str, name: str, group: zarr.Group, arrays: Mapping[str, Any]) -> None:
        targets = {key: _create(group, key, values) for key, values in arrays.items()}
        ranges: dict[str, list[tuple[int, int]]] = {key: [] for key in arrays}

        def copy(key: str, start: int, piece: np.ndarray) -> None:
            targets[key][start : start + len(piece)] = piece
            ranges[key].append((int(piece.min()), int(piece.max())))

        try:
            group.attrs["fingerprint"] = fingerprint(arrays, copy)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from None
        self._ranges[name] = {
            key: (min(low for low, _ in each), max(high for _, high in each)) for key, each in ranges.items()
        }
        if self._ranges[name]["images"][1] == 1:
            warn_once(f"{where}: 'images' has no value over 1, so it is nearly black; white is 255: images * 255")

    def finish(self, **attributes: Any) -> None:
        """Write the attributes. From then on the dataset exists.

        Args:
            attributes: ``class_names``, and optionally ``name``, ``bias_attribute``, ``group_names`` and ``builder``.

        Raises:
            DatasetError: A label has no class name, a group none of the given group names, two classes have one name,
                or another process took the location over.
        """
        class_names, group_names = attributes["class_names"], attributes.get("group_names") or ()
        _check_names(self.path, class_names)
        _tell_one_class(self.path, class_names)
        for name, ranges in self._ranges.items():
            where = f"the split '{name}' for {self.path}"
            _check_labels(where, *ranges["labels"], len(class_names))
            if "groups" in ranges and group_names and (problem := _without_name(*ranges["groups"], len(group_names))):
                raise DatasetError(f"{where}: {problem}")
        self._check_ours()
        self._store.write(ROOT, _root(attributes))
        self._finished = True

    def _check_ours(self) -> None:
        if _mark(self._store) != self._mark:
            raise DatasetError(Message(f"{self.path} was taken over by another process: ", ANOTHER, " for one of them"))


def _create(group: zarr.Group, name: str, values: Any) -> zarr.Array:
    shape, dtype = tuple(values.shape), np.dtype(values.dtype).newbyteorder("<")
    chunk, *shard = _chunk_rows(values)
    shards = (shard[0], *shape[1:]) if shard else None
    names = telling_names(values) if name == "images" else None
    chunks = (chunk, *shape[1:])
    return group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, shards=shards, dimension_names=names)


def _root(attributes: Mapping[str, Any]) -> bytes:
    """Encode the metadata of the dataset's group as Zarr format 3 specifies it."""
    ours = {"kind": KIND, "format_version": FORMAT_VERSION, **attributes}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": ours}, indent=2).encode()


def _mark(store: Storage) -> dict[str, Any] | None:
    """Read who left an unfinished dataset here; None if there is none."""
    try:
        attributes = json.loads(store.read(ROOT) or b"")["attributes"]
        return dict(attributes[UNFINISHED]) if attributes["kind"] == KIND else None
    except (ValueError, TypeError, KeyError):
        return None


def _another_runs(pid: Any) -> bool:
    """Check whether another process of this machine has this id."""
    return isinstance(pid, int) and pid != os.getpid() and process_runs(pid)
