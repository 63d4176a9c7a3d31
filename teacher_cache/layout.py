"""What a heatmap store says of itself and where in it everything lies: plans, as data, checked where they come in."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Any, get_origin, get_type_hints

from teacher_cache.codec import PRECISIONS, Compression, checksum
from teacher_cache.errors import CacheError

KIND = "explanation-distillation cache"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class ExplainerInfo:
    """How the heatmaps were made. ``class_policy``: ``top-or-other`` is the teacher's top class with
    probability 0.5, otherwise one of the others, ``none`` that maps explain no class, whichever is noted; ε is
    log-uniform in [epsilon_low, epsilon_high]. ``map_shape`` is (C, h, w) of a map before it is pooled."""

    rule: str
    draws: int
    epsilon_low: float
    epsilon_high: float
    class_policy: str
    seed: int
    map_shape: tuple[int, int, int]


@dataclass(frozen=True)
class TeacherInfo:
    """Whose decisions they explain. ``head_sha256`` is that of the stored last layer, None where there is none."""

    arch: str
    debias: str
    bias_free: bool
    weights_sha256: str
    class_names: tuple[str, ...]
    head_sha256: str | None


@dataclass(frozen=True)
class DatasetInfo:
    """The dataset split that was explained; ``image_shape`` is (C, H, W)."""

    name: str
    split: str
    fingerprint: str
    samples: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class StorageInfo:
    """How heatmaps are laid out. ``precision`` and ``codec``: see `teacher_cache.codec`; maps are average-pooled by
    ``resolution``; a shard is what is computed, written, committed and resumed as one, a chunk what is compressed
    as one: some samples of one draw. ``features`` is the width of the teacher's features, 0 where none are stored."""

    precision: str
    codec: str
    resolution: int
    shard_samples: int
    chunk_samples: int
    features: int


@dataclass(frozen=True)
class CacheInfo:
    """The attributes of a store. ``written_by`` (versions) is provenance; all else decides what it holds."""

    explainer: ExplainerInfo
    teacher: TeacherInfo
    dataset: DatasetInfo
    storage: StorageInfo
    written_by: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, attributes: dict[str, Any]) -> CacheInfo:
        """Raises CacheError naming the section whose fields are not those of this format version."""
        known = {*_SECTIONS, "written_by", "kind", "format_version"}
        if unknown := sorted(set(attributes) - known):
            raise CacheError(f"it has attributes that this program does not know: {', '.join(unknown)}")
        parts: dict[str, Any] = {}
        for section, kind in _SECTIONS.items():
            values = attributes.get(section)
            expected = {field.name for field in dataclasses.fields(kind)}
            found = set(values) if isinstance(values, dict) else set()
            if found != expected:
                raise CacheError(f"its attribute '{section}' has fields {sorted(found)}, expected {sorted(expected)}")
            assert isinstance(values, dict)
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for key, hint in get_type_hints(kind).items():
                wanted: Any = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
                wanted = int | float if wanted is float else wanted
                if not isinstance(values[key], wanted) or (wanted is not bool and isinstance(values[key], bool)):
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
        return -(-self.dataset.samples // self.storage.shard_samples)

    @property
    def chunks(self) -> int:
        """Chunks of one draw of a whole shard."""
        return self.storage.shard_samples // self.storage.chunk_samples

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a stored heatmap."""
        channels, height, width = self.explainer.map_shape
        return channels, height // self.storage.resolution, width // self.storage.resolution

    @property
    def raw_bytes(self) -> int:
        """Of the heatmaps as float32 at full resolution."""
        return 4 * self.dataset.samples * self.explainer.draws * math.prod(self.explainer.map_shape)

    @property
    def rows(self) -> tuple[str, ...]:
        """The arrays besides heatmaps, of which a shard is one chunk each."""
        return (*ROWS, "features") if self.storage.features else ROWS

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one after its last. Raises IndexError for a shard that there is not."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"there is no shard {shard}: the store has {self.shards}, counted from 0")
        start = shard * self.storage.shard_samples
        return start, min(start + self.storage.shard_samples, self.dataset.samples)

    def identity(self, shard: int) -> int:
        """CRC-32C of all that decides what a shard holds: equal for the same shard of the same store alone."""
        return checksum(f"[{self._deciding}, {shard}]".encode())

    @cached_property
    def _deciding(self) -> str:
        sections = {section: dataclasses.asdict(getattr(self, section)) for section in _SECTIONS}
        del sections["dataset"]["name"]
        return json.dumps(sections, sort_keys=True)

    def differences(self, other: CacheInfo) -> list[str]:
        """What the two would hold differently, as ``section.field: this one's, the other's`` lines."""
        lines = []
        for section in _SECTIONS:
            mine, theirs = (dataclasses.asdict(getattr(info, section)) for info in (self, other))
            decisive = [key for key in mine if (section, key) != ("dataset", "name")]  # the fingerprint says which
            lines += [
                f"{section}.{key}: {mine[key]!r}, {theirs[key]!r}" for key in decisive if mine[key] != theirs[key]
            ]
        return lines


_SECTIONS: dict[str, Any] = {
    "explainer": ExplainerInfo,
    "teacher": TeacherInfo,
    "dataset": DatasetInfo,
    "storage": StorageInfo,
}


def _check(info: CacheInfo) -> None:
    """Raise CacheError for values that no store has."""
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
    try:
        Compression.parse(storage.codec)
    except ValueError as error:
        raise CacheError(str(error)) from None


@dataclass(frozen=True)
class ArrayPlan:
    """One array of a store: shape and type in Zarr, the names of its axes."""

    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]


def plan_arrays(info: CacheInfo) -> dict[str, ArrayPlan]:
    """Every array of a store, in the order in which they are created."""
    rows = (info.dataset.samples, info.explainer.draws)
    maps = (*rows, *info.map_shape)
    logits = (rows[0], len(info.teacher.class_names))
    record = 1 + len(info.rows) + info.chunks * info.explainer.draws
    features = ArrayPlan((rows[0], info.storage.features), "float32", ("sample", "feature"))
    return {
        "heatmaps": ArrayPlan(maps, PRECISIONS[info.storage.precision], ("sample", "draw", "channel", "y", "x")),
        "scale": ArrayPlan(rows, "float32", ("sample", "draw")),
        "target_class": ArrayPlan(rows, "int32", ("sample", "draw")),
        "epsilon": ArrayPlan(rows, "float32", ("sample", "draw")),
        "teacher_logits": ArrayPlan(logits, "float32", ("sample", "class")),
        **({"features": features} if info.storage.features else {}),
        "commits": ArrayPlan((info.shards, record), "uint32", ("shard", "checksum")),
    }


ROWS = ("scale", "target_class", "epsilon", "teacher_logits")

SHARD_BYTES = 2**25  # of stored heatmaps before compression, and of the images that they explain
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
    """Shards of at most 32 MiB and 1,024 samples, a power of two; chunks of at most 64 samples of one draw.

    ``map_shape`` (C, h, w) is that of maps that are not shaped as the images; ``features`` the width of stored ones,
    which changes nothing else. Raises CacheError for a precision, codec or resolution that there is not.
    """
    map_shape = map_shape or image_shape
    if precision not in PRECISIONS:
        raise CacheError(f"no precision is called '{precision}': choose one of {', '.join(PRECISIONS)}")
    _check_resolution(resolution, *map_shape[1:])
    try:
        Compression.parse(codec)
    except ValueError as error:
        raise CacheError(str(error)) from None
    fitting = max(1, SHARD_BYTES // max(draws * math.prod(map_shape) * 2, math.prod(image_shape)))
    shard = min(MAX_SHARD_SAMPLES, 2 ** (fitting.bit_length() - 1))
    return StorageInfo(precision, codec, resolution, shard, min(MAX_CHUNK_SAMPLES, shard), features)


def _check_resolution(resolution: int, height: int, width: int) -> None:
    """Raise CacheError where pooled maps of height × width would say nothing about where relevance is."""

    def left(factor: int) -> int:
        return (height // factor) * (width // factor)

    if resolution < 1 or left(resolution) < min(2, height * width):
        nothing = "nothing" if resolution < 1 or not left(resolution) else "a single number"
        choices = [str(factor) for factor in (1, 2, 4) if left(factor) > 1] or ["1"]
        raise CacheError(
            f"--resolution {resolution} leaves {nothing} of maps of {height}×{width}: choose {' or '.join(choices)}"
        )
