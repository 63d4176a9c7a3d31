"""The attributes of a heatmap store and the plan of its arrays, as data that is validated when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Any, get_origin, get_type_hints

import numpy as np

from options import Message, Option
from teacher_cache.codec import PRECISIONS, Compression, checksum
from teacher_cache.errors import CacheError

KIND = "explanation-distillation cache"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class ExplainerInfo:
    """How the heatmaps were made.

    Attributes:
        rule: Name of the explainer.
        draws: Draws of each sample.
        epsilon_low: Lower limit of ε, which is log-uniform.
        epsilon_high: Upper limit of ε.
        class_policy: ``top-or-other`` explains the teacher's top class with probability 0.5, otherwise one of the
            others. With ``none``, maps explain no class, and the stored classes mean nothing.
        seed: Random seed of the draws.
        map_shape: (C, H, W) of a map before it is pooled.
    """

    rule: str
    draws: int
    epsilon_low: float
    epsilon_high: float
    class_policy: str
    seed: int
    map_shape: tuple[int, int, int]


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher whose decisions the heatmaps explain.

    Attributes:
        arch: Name of the architecture.
        debias: Name of the debiasing step.
        bias_free: Whether the network has no additive terms.
        weights_sha256: SHA-256 of the weights.
        class_names: Names of the classes.
        head_sha256: SHA-256 of the stored last layer; None without one.
    """

    arch: str
    debias: str
    bias_free: bool
    weights_sha256: str
    class_names: tuple[str, ...]
    head_sha256: str | None


@dataclass(frozen=True)
class DatasetInfo:
    """The dataset split that was explained.

    Attributes:
        name: Name of the dataset.
        split: Name of the split.
        fingerprint: SHA-256 of the split's arrays.
        samples: Number of samples.
        image_shape: (C, H, W).
    """

    name: str
    split: str
    fingerprint: str
    samples: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class StorageInfo:
    """How heatmaps are stored.

    Attributes:
        precision: A name in `teacher_cache.PRECISIONS`.
        codec: Full name of the compression, such as ``blosc-lz4-5-bitshuffle``.
        resolution: Side of the square of pixels over which maps are averaged; 1 keeps them as they are.
        shard_samples: Samples of a shard, which is computed, written, committed and resumed as a whole.
        chunk_samples: Samples of a chunk, which is compressed as a whole and belongs to one draw.
        features: Width of the teacher's features; 0 if none are stored.
    """

    precision: str
    codec: str
    resolution: int
    shard_samples: int
    chunk_samples: int
    features: int


@dataclass(frozen=True)
class CacheInfo:
    """The attributes of a store.

    ``written_by`` holds versions of what wrote the store. All other attributes decide its content.
    """

    explainer: ExplainerInfo
    teacher: TeacherInfo
    dataset: DatasetInfo
    storage: StorageInfo
    written_by: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, as in the store's metadata."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, attributes: dict[str, Any]) -> CacheInfo:
        """Convert from plain data and check it.

        Raises:
            CacheError: A section has other fields than this format version, or a value that no store has.
        """
        known = {*_SECTIONS, "written_by", "kind", "format_version"}
        if unknown := sorted(set(attributes) - known):
            raise CacheError(f"it has attributes that this program does not know: {', '.join(unknown)}")
        parts: dict[str, Any] = {}
        for section, kind in _SECTIONS.items():
            values = attributes.get(section)
            expected = {field.name for field in dataclasses.fields(kind)}
            fields = set(values) if isinstance(values, dict) else set()
            if fields != expected:
                raise CacheError(f"its attribute '{section}' has fields {sorted(fields)}, expected {sorted(expected)}")
            assert isinstance(values, dict)
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for key, hint in get_type_hints(kind).items():
                type_: Any = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
                type_ = int | float if type_ is float else type_
                if not isinstance(values[key], type_) or (type_ is not bool and isinstance(values[key], bool)):
                    raise CacheError(f"its attribute '{section}.{key}' is {values[key]!r}, expected {hint}")
            parts[section] = kind(**values)
        written_by = attributes.get("written_by")
        if not isinstance(written_by, dict):
            raise CacheError(f"its attribute 'written_by' is {written_by!r}, expected names and versions")
        info = cls(written_by=written_by, **parts)
        _check(info)
        return info

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.dataset.samples // self.storage.shard_samples)

    @property
    def chunks(self) -> int:
        """Chunks of one draw of a full shard."""
        return self.storage.shard_samples // self.storage.chunk_samples

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a stored heatmap."""
        channels, height, width = self.explainer.map_shape
        return channels, height // self.storage.resolution, width // self.storage.resolution

    @property
    def raw_bytes(self) -> int:
        """Bytes of all heatmaps as float32 at full resolution."""
        return 4 * self.dataset.samples * self.explainer.draws * math.prod(self.explainer.map_shape)

    @property
    def rows(self) -> tuple[str, ...]:
        """The arrays other than heatmaps. Each has one chunk in a shard."""
        return (*ROWS, "features") if self.storage.features else ROWS

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Find the samples of a shard: its first one, and the one after its last.

        Raises:
            IndexError: There is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"there is no shard {shard}: the store has {self.shards}, counted from 0")
        start = shard * self.storage.shard_samples
        return start, min(start + self.storage.shard_samples, self.dataset.samples)

    def identity(self, shard: int) -> int:
        """Compute the CRC-32C of everything that decides a shard's content, so that it names this shard alone."""
        return checksum(f"[{self._deciding}, {shard}]".encode())

    @cached_property
    def _deciding(self) -> str:
        sections = {section: dataclasses.asdict(getattr(self, section)) for section in _SECTIONS}
        del sections["dataset"]["name"]
        return json.dumps(sections, sort_keys=True)

    def differences(self, other: CacheInfo) -> list[str]:
        """List the attributes that differ and decide the content, as ``section.field: own value, other's value``."""
        lines = []
        for section in _SECTIONS:
            own, others = (dataclasses.asdict(getattr(info, section)) for info in (self, other))
            decisive = [key for key in own if (section, key) != ("dataset", "name")]  # the fingerprint identifies it
            lines += [f"{section}.{key}: {own[key]!r}, {others[key]!r}" for key in decisive if own[key] != others[key]]
        return lines


_SECTIONS: dict[str, Any] = {
    "explainer": ExplainerInfo,
    "teacher": TeacherInfo,
    "dataset": DatasetInfo,
    "storage": StorageInfo,
}


def _check(info: CacheInfo) -> None:
    """Raise CacheError for values that no store can have."""
    storage, shape = info.storage, info.dataset.image_shape
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in (*shape, info.dataset.samples)):
        raise CacheError(f"its attribute 'dataset' has no sizes of images: {info.dataset}")
    maps = info.explainer.map_shape
    if len(maps) != 3 or not all(type(size) is int and size > 0 for size in maps):
        raise CacheError(f"its attribute 'explainer.map_shape' is {maps!r}, expected three sizes")
    if min(storage.shard_samples, storage.chunk_samples, storage.resolution, info.explainer.draws) < 1:
        raise CacheError(f"its attributes have a size under 1: {storage}, {info.explainer}")
    if storage.shard_samples % storage.chunk_samples:
        raise CacheError(f"its shards are no whole number of chunks: {storage}")
    if storage.features < 0:
        raise CacheError(f"its attribute 'storage.features' is {storage.features}, expected a width, or 0 for none")
    names = info.teacher.class_names
    if not names or not all(isinstance(name, str) for name in names):
        raise CacheError(f"its attribute 'teacher.class_names' is {names!r}, expected names of classes")
    if storage.precision not in PRECISIONS:
        raise CacheError(f"its precision is '{storage.precision}', this program knows {', '.join(PRECISIONS)}")
    if min(info.map_shape) < 1:
        raise CacheError(f"its maps are empty: {maps}, average-pooled by {storage.resolution}")
    Compression.parse(storage.codec)


@dataclass(frozen=True)
class ArrayPlan:
    """One array of a store: its shape and dtype in Zarr, and the names of its axes."""

    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]


def plan_arrays(info: CacheInfo) -> dict[str, ArrayPlan]:
    """Plan every array of a store, in the order in which they are created."""
    rows = (info.dataset.samples, info.explainer.draws)
    maps = (*rows, *info.map_shape)
    logits = (rows[0], len(info.teacher.class_names))
    record = 1 + len(info.rows) + info.chunks * info.explainer.draws
    features = ArrayPlan((rows[0], info.storage.features), "float32", ("sample", "feature"))
    return {
        "heatmaps": ArrayPlan(maps, PRECISIONS[info.storage.precision].dtype, ("sample", "draw", "channel", "y", "x")),
        "scale": ArrayPlan(rows, "float32", ("sample", "draw")),
        "target_class": ArrayPlan(rows, "int32", ("sample", "draw")),
        "epsilon": ArrayPlan(rows, "float32", ("sample", "draw")),
        "teacher_logits": ArrayPlan(logits, "float32", ("sample", "class")),
        **({"features": features} if info.storage.features else {}),
        "commits": ArrayPlan((info.shards, record), "uint32", ("shard", "checksum")),
    }


ROWS = ("scale", "target_class", "epsilon", "teacher_logits")

SHARD_BYTES = 2**25  # limit for a shard's heatmaps before compression, and for the images that they explain
MAX_SHARD_SAMPLES, MAX_CHUNK_SAMPLES = 1024, 64


def plan_storage(
    draws: int,
    image_shape: tuple[int, int, int],
    precision: str = "float16",
    codec: str = "blosc-lz4-5-bitshuffle",
    resolution: int = 1,
    *,
    map_shape: tuple[int, int, int] | None = None,
    features: int = 0,
) -> StorageInfo:
    """Plan how heatmaps are stored.

    Shards have at most 32 MiB and 1,024 samples, a power of two. Chunks have at most 64 samples of one draw.

    Args:
        draws: Draws of each sample.
        image_shape: (C, H, W) of the images.
        precision: A name in `teacher_cache.PRECISIONS`.
        codec: Full name of the compression.
        resolution: Side of the square of pixels over which maps are averaged.
        map_shape: (C, H, W) of the maps before pooling; None if it is that of the images.
        features: Width of the stored features, 0 for none. It does not change the shards.

    Returns:
        The plan.

    Raises:
        CacheError: There is no such precision or codec, or the resolution is too coarse for these maps.
    """
    map_shape = map_shape or image_shape
    value_bytes = max(2, np.dtype(PRECISIONS.find(precision).dtype).itemsize)  # int8 has the shards of float16
    _check_resolution(resolution, *map_shape[1:])
    Compression.parse(codec)
    fitting = max(1, SHARD_BYTES // max(draws * math.prod(map_shape) * value_bytes, math.prod(image_shape)))
    shard = min(MAX_SHARD_SAMPLES, 2 ** (fitting.bit_length() - 1))
    return StorageInfo(precision, codec, resolution, shard, min(MAX_CHUNK_SAMPLES, shard), features)


def _check_resolution(resolution: int, height: int, width: int) -> None:
    """Raise CacheError if pooled maps of height × width would not tell where relevance is."""

    def left(factor: int) -> int:
        return (height // factor) * (width // factor)

    if resolution < 1 or left(resolution) < min(2, height * width):
        nothing = "nothing" if resolution < 1 or not left(resolution) else "a single number"
        choices = [str(factor) for factor in (1, 2, 4) if left(factor) > 1] or ["1"]
        raise CacheError(
            Message(
                Option("resolution", resolution),
                f" leaves {nothing} of maps of {height}×{width}: choose {' or '.join(choices)}",
            )
        )
