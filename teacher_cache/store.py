"""The heatmap store: create, write shard by shard, read. Knows arrays, not models.

A shard without its commit record does not exist for a reader, so whatever interrupts a writer, what can be
read is whole. One shard is written by one writer: two writers of one shard lose data in Zarr.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from teacher_cache.layout import FORMAT_VERSION, KIND, CacheError, CacheInfo

REMEDY = "make one with: python cli.py cache-explanations"


@dataclass(frozen=True)
class Shard:
    """The content of one shard: n samples, D draws, K classes.

    heatmaps: float32 (n, D, C, H, W); target_class: int64 (n, D); epsilon: float32 (n, D);
    teacher_logits: float32 (n, K).
    """

    heatmaps: np.ndarray
    target_class: np.ndarray
    epsilon: np.ndarray
    teacher_logits: np.ndarray


class Cache:
    """An opened store. ``head`` is the teacher's last layer: ``weight`` (K, F) and, if it has one, ``bias`` (K,).

    Raises CacheError where its arrays are not those that the attributes promise.
    """

    def __init__(self, path: str, root: zarr.Group, info: CacheInfo):
        self.path, self.info = path, info
        try:
            self._arrays = dict(root.arrays())
            found = {name: (array.shape, str(array.dtype)) for name, array in self._arrays.items()}
            head = root.get("head")
            self.head: Mapping[str, np.ndarray] = (
                {name: np.asarray(array[:]) for name, array in head.arrays()} if isinstance(head, zarr.Group) else {}
            )
        except (ValueError, TypeError, KeyError, RuntimeError) as error:  # what Zarr says of broken metadata and chunks
            raise CacheError(f"the store {path} is damaged ({error}): remove it and make it again") from error
        expected = {name: (shape, dtype) for name, (shape, dtype, _) in _plan(info).items()}
        if found != expected:
            raise CacheError(
                f"the store {path} is damaged: its arrays are {found}, its attributes promise {expected}; "
                "remove it and make it again"
            )
        if head_sha256(self.head) != info.teacher.head_sha256:
            raise CacheError(f"the teacher's last layer in the store {path} is damaged: remove it and make it again")

    def committed(self) -> np.ndarray:
        """Which shards exist: bool (number of shards,)."""
        return np.array([self._commit(shard).any() for shard in range(self.info.shards)], bool)

    def intact(self, shard: int) -> bool:
        """Whether a shard is committed and its content is what was committed; reads all of it."""
        try:
            self.read_shard(shard)
        except CacheError:
            return False
        return True

    def _commit(self, shard: int) -> np.ndarray:
        try:
            return np.asarray(self._arrays["commits"][shard])
        except (ValueError, RuntimeError):  # a record that was cut is none
            return np.zeros(32, np.uint8)

    def write_shard(self, shard: int, content: Shard) -> None:
        """Write one whole shard, then its commit record. Safe beside writers of other shards."""
        start, stop = self.info.shard_range(shard)
        draws, classes = (stop - start, self.info.explainer.draws), (stop - start, len(self.info.teacher.class_names))
        expected = ((*draws, *self.info.dataset.image_shape), draws, draws, classes)
        found = tuple(np.shape(getattr(content, field.name)) for field in dataclasses.fields(content))
        if found != expected:
            raise ValueError(f"shard {shard} holds arrays of shapes {expected}, got {found}")
        if not (np.isfinite(content.heatmaps).all() and np.isfinite(content.teacher_logits).all()):
            raise CacheError(
                f"the heatmaps or logits of shard {shard} (samples {start} to {stop - 1}) are not finite: the teacher "
                "overflows on some of these images; train it with a smaller --lr, or look for damaged images"
            )
        stored = _encode(content)
        if self._commit(shard).any():
            self._arrays["commits"][shard] = 0  # from here on there is no such shard, until it is whole again
        for name, values in stored.items():
            self._arrays[name][start:stop] = values
        self._arrays["commits"][shard] = _digest(stored)

    def read_shard(self, shard: int, draws: np.ndarray | None = None) -> Shard:
        """Read and check one committed shard; all its draws, or one for each sample, ``draws`` (n,) → D = 1.

        Raises CacheError, naming the shard, where it is not committed or its content is not what was committed.
        """
        start, stop = self.info.shard_range(shard)
        commit = self._commit(shard)
        if not commit.any():
            raise CacheError(
                f"shard {shard} of {self.path} (samples {start} to {stop - 1}) is not there yet: "
                "run the cache-explanations command that made the store again, it continues"
            )
        try:
            stored = {name: np.asarray(self._arrays[name][start:stop]) for name in _ARRAYS}
            intact = bool((_digest(stored) == commit).all())
        except (ValueError, RuntimeError):  # a chunk whose checksum or compressed form is broken
            intact = False
        if not intact:
            raise CacheError(
                f"shard {shard} of {self.path} (samples {start} to {stop - 1}) is damaged: its content is not "
                "what was committed; run the cache-explanations command that made the store again, it computes what "
                "is damaged anew"
            )
        return _decode(stored, draws)


_ARRAYS = ("heatmaps", "scale", "target_class", "epsilon", "teacher_logits")


def _encode(content: Shard) -> dict[str, np.ndarray]:
    """Maps as float16 relative to their largest absolute value, which is kept as ``scale``."""
    maps = np.asarray(content.heatmaps, np.float32)
    scale = np.abs(maps).max(axis=(2, 3, 4))
    safe = np.where(scale > 0, scale, 1)[..., None, None, None]
    return {
        "heatmaps": (maps / safe).astype(np.float16) + np.float16(0),  # no -0, which Zarr may not tell from 0
        "scale": scale,
        "target_class": content.target_class.astype(np.int32),
        "epsilon": content.epsilon.astype(np.float32),
        "teacher_logits": content.teacher_logits.astype(np.float32),
    }


def _decode(stored: Mapping[str, np.ndarray], draws: np.ndarray | None) -> Shard:
    chosen = {name: stored[name] for name in ("heatmaps", "scale", "target_class", "epsilon")}
    if draws is not None:
        rows = np.arange(len(draws))
        chosen = {name: values[rows, draws][:, None] for name, values in chosen.items()}
    maps = chosen["heatmaps"].astype(np.float32)
    maps *= chosen["scale"][..., None, None, None]
    return Shard(maps, chosen["target_class"].astype(np.int64), chosen["epsilon"], stored["teacher_logits"])


def _digest(stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 over the stored values of one shard, as uint8 (32,): its commit record."""
    digest = hashlib.sha256()
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(stored[name]).data)
    return np.frombuffer(digest.digest(), np.uint8)


def head_sha256(head: Mapping[str, np.ndarray]) -> str | None:
    """SHA-256 over a last layer's arrays in float32, by name; None without any."""
    digest = hashlib.sha256()
    for name, values in sorted(head.items()):
        digest.update(f"{name} {values.shape};".encode() + np.asarray(values, "<f4").tobytes())
    return digest.hexdigest() if head else None


def _plan(info: CacheInfo) -> dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Shape, dtype and dimension names of every array of a store."""
    rows = (info.dataset.samples, info.explainer.draws)
    return {
        "heatmaps": ((*rows, *info.dataset.image_shape), info.storage.dtype, ("sample", "draw", "channel", "y", "x")),
        "scale": (rows, "float32", ("sample", "draw")),
        "target_class": (rows, "int32", ("sample", "draw")),
        "epsilon": (rows, "float32", ("sample", "draw")),
        "teacher_logits": ((rows[0], len(info.teacher.class_names)), "float32", ("sample", "class")),
        "commits": ((info.shards, 32), "uint8", ("shard", "sha256")),
    }


def create_cache(path: str | Path, info: CacheInfo, head: Mapping[str, np.ndarray] | None = None) -> Cache:
    """Create the store with every shard uncommitted, or open the one that the same settings made.

    It is built in a hidden folder beside ``path`` and moved there whole. Raises CacheError for a store made with
    other settings, FileExistsError for a path that holds anything else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a folder: choose another --out")
    if path.exists() and any(path.iterdir()):
        return _reopen(path, info)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _build(partial, info, head or {})
        try:
            partial.rename(path)
        except OSError:  # somebody else was faster
            return _reopen(path, info)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_cache(path, writable=True)


def _build(path: Path, info: CacheInfo, head: Mapping[str, np.ndarray]) -> None:
    root = zarr.create_group(str(path), zarr_format=3)
    shard, chunk = info.storage.shard_samples, info.storage.chunk_samples
    for name, (shape, dtype, dimensions) in _plan(info).items():
        layout: dict[str, Any]
        if name == "heatmaps":
            layout = {
                "chunks": (chunk, 1, *shape[2:]),
                "shards": (shard, *shape[1:]),
                "compressors": (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=2), Crc32cCodec()),
            }
        elif name == "commits":
            layout = {"chunks": (1, 32), "compressors": None}
        else:
            layout = {"chunks": (shard, shape[1])}
        root.create_array(name, shape=shape, dtype=dtype, dimension_names=dimensions, **layout)
    if head:
        head_group = root.create_group("head")
        for name, values in head.items():
            head_group.create_array(name, data=np.asarray(values, np.float32))
    root.attrs.put({"kind": KIND, "format_version": FORMAT_VERSION, **info.to_dict()})


def open_cache(path: str | Path, *, writable: bool = False) -> Cache:
    """Open a store, complete or not.

    Raises CacheError where there is none, it is of another format version, or it is not as its attributes say.
    """
    path = str(path)
    attributes = _attributes(path)
    if attributes.get("kind") != KIND:
        found = f"its attribute 'kind' is {attributes.get('kind')!r}" if attributes else "there is no Zarr group"
        raise CacheError(f"no heatmap store at {path}: {found}; {REMEDY}")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"{path} has store format version {attributes.get('format_version')!r}, this program reads version "
            f"{FORMAT_VERSION}: use the program that wrote it, or make the store again"
        )
    try:
        info = CacheInfo.from_dict(attributes)
    except CacheError as error:
        raise CacheError(f"{path} is no store that this program can read: {error}; make it again") from None
    return Cache(path, zarr.open_group(path, mode="r+" if writable else "r", zarr_format=3), info)


def check_complete(cache: Cache) -> None:
    """Raise CacheError, saying how far it is, unless every shard is committed."""
    committed = cache.committed()
    if not committed.all():
        raise CacheError(
            f"the store {cache.path} is incomplete: {committed.sum()} of {len(committed)} shards are there; "
            "run the cache-explanations command that made it again, it continues where it stopped"
        )


def _reopen(path: Path, info: CacheInfo) -> Cache:
    if _attributes(str(path)).get("kind") != KIND:
        raise FileExistsError(f"{path} is not empty and holds no store of ours: choose another --out")
    cache = open_cache(path, writable=True)
    if differences := cache.info.differences(info):
        raise CacheError(
            f"{path} was made with other settings ({'; '.join(differences)}; the store's first, this "
            "command's second): give the same ones to continue it, or choose another --out"
        )
    return cache


def _attributes(path: str) -> dict[str, Any]:
    try:
        return dict(zarr.open_group(path, mode="r", zarr_format=3).attrs)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # none there, or not to be read
        return {}
