"""What a heatmap store says of itself: the group's attributes, as data, checked where they come in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_origin, get_type_hints

KIND = "explanation-distillation cache"
FORMAT_VERSION = 1


class CacheError(ValueError):
    """Not a heatmap store of ours, or not one that fits; the text has the path and the remedy."""


@dataclass(frozen=True)
class ExplainerInfo:
    """How the heatmaps were made. ``class_policy``: ``top-or-other`` is the teacher's top class with
    probability 0.5, otherwise one of the others; ε is log-uniform in [epsilon_low, epsilon_high]."""

    rule: str
    draws: int
    epsilon_low: float
    epsilon_high: float
    class_policy: str
    seed: int


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
    """How arrays are laid out: a shard is what is computed, written, committed and resumed as one."""

    dtype: str
    codec: str
    shard_samples: int
    chunk_samples: int


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
                if not isinstance(values[key], wanted) or (wanted is int and isinstance(values[key], bool)):
                    raise CacheError(f"its attribute '{section}.{key}' is {values[key]!r}, expected {hint}")
            parts[section] = kind(**values)
        written_by = attributes.get("written_by")
        if not isinstance(written_by, dict):
            raise CacheError(f"its attribute 'written_by' is {written_by!r}, expected names and versions")
        if min(parts["storage"].shard_samples, parts["storage"].chunk_samples, parts["explainer"].draws) < 1:
            raise CacheError(f"its attributes have a size under 1: {parts['storage']}, {parts['explainer']}")
        return cls(written_by=written_by, **parts)

    @property
    def shards(self) -> int:
        return -(-self.dataset.samples // self.storage.shard_samples)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one after its last. Raises IndexError for a shard that there is not."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"there is no shard {shard}: the store has {self.shards}, counted from 0")
        start = shard * self.storage.shard_samples
        return start, min(start + self.storage.shard_samples, self.dataset.samples)

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

SHARD_BYTES = 2**25  # of stored heatmaps, before compression
MAX_SHARD_SAMPLES, MAX_CHUNK_SAMPLES = 1024, 64


def plan_storage(draws: int, image_shape: tuple[int, int, int]) -> StorageInfo:
    """Shards of at most 32 MiB and 1,024 samples, a power of two; inner chunks of 64 samples of one draw."""
    channels, height, width = image_shape
    fitting = max(1, SHARD_BYTES // (draws * channels * height * width * 2))
    shard = min(MAX_SHARD_SAMPLES, 2 ** (fitting.bit_length() - 1))
    return StorageInfo("float16", "blosc-zstd-3-bitshuffle", shard, min(MAX_CHUNK_SAMPLES, shard))
