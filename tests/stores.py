"""Small heatmap stores of random content, and a second, slower way to look into one: through Zarr itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from data.storage import Location, open_store
from teacher_cache import (
    Cache,
    CacheError,
    CacheInfo,
    DatasetInfo,
    ExplainerInfo,
    Shard,
    StorageInfo,
    TeacherInfo,
    create_cache,
    head_sha256,
)

CLASSES = ("a", "b", "c")
HEAD = {"weight": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(3, np.float32)}
STORAGE = StorageInfo("float16", "blosc-lz4-5-bitshuffle", resolution=1, shard_samples=4, chunk_samples=2, features=5)


def info(
    samples: int = 10,
    draws: int = 2,
    image_shape: tuple[int, int, int] = (3, 6, 5),
    explainer: dict[str, Any] | None = None,
    **storage: Any,
) -> CacheInfo:
    made = ExplainerInfo("flex", draws, 0.01, 1.0, "top-or-other", seed=0, map_shape=image_shape)
    return CacheInfo(
        explainer=dataclasses.replace(made, **(explainer or {})),
        teacher=TeacherInfo("small-cnn", "grayscale", True, "0" * 64, CLASSES, head_sha256(HEAD)),
        dataset=DatasetInfo("mine", "train", "1" * 64, samples, image_shape),
        storage=dataclasses.replace(STORAGE, **storage),
        written_by={"zarr": "3"},
    )


def content(of: CacheInfo, shard: int, seed: int = 0) -> Shard:
    """Random content of one shard: sparse maps, as those of images on black are."""
    start, stop = of.shard_range(shard)
    samples, draws, width = stop - start, of.explainer.draws, of.storage.features
    rng = np.random.default_rng([seed, shard])
    maps = rng.standard_normal((samples, draws, *of.explainer.map_shape)).astype(np.float32) * 1e-7
    return Shard(
        heatmaps=maps * (rng.random(maps.shape) < 0.5),
        target_class=rng.integers(0, len(CLASSES), (samples, draws)),
        epsilon=rng.random((samples, draws)).astype(np.float32),
        teacher_logits=rng.standard_normal((samples, len(CLASSES))).astype(np.float32),
        features=rng.standard_normal((samples, width)).astype(np.float32) if width else None,
    )


def filled(location: Location, of: CacheInfo | None = None, seed: int = 0) -> Cache:
    """A complete store."""
    of = of or info()
    cache = create_cache(location, of, HEAD)
    for shard in range(of.shards):
        cache.write_shard(shard, content(of, shard, seed))
    return cache


def expected(of: CacheInfo, shard: int, seed: int = 0) -> Shard:
    """What reading a shard of `filled` gives."""
    alone = create_cache(MemoryStore(), of, HEAD)
    alone.write_shard(shard, content(of, shard, seed))
    return alone.read_shard(shard)


def same(one: Shard, other: Shard) -> bool:
    """Bit for bit."""
    fields = [field.name for field in dataclasses.fields(Shard)]
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all(a is b or (a is not None and b is not None and a.tobytes() == b.tobytes()) for a, b in pairs)


def files(location: Location) -> dict[str, bytes]:
    """Every key with its bytes."""
    store = open_store(location)
    return {key: raw for key in store.all_keys() if (raw := store.read(key)) is not None}


def arrays(location: Location) -> dict[str, np.ndarray]:
    """Every array of a store, its head's too, as plain Zarr reads it."""
    root = zarr.open_group(open_store(location), mode="r")
    found = {name: np.asarray(array[...]) for name, array in root.arrays()}
    return found | {f"head/{name}": np.asarray(array[...]) for name, array in root["head"].arrays()}


def refusal(work: Any) -> str | None:
    """What a call is refused with: the text of its CacheError; None where it is not."""
    try:
        work()
    except CacheError as error:
        return str(error)
    return None
