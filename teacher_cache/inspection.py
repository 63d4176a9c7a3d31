"""What is in a store, whether it is what was committed, and how damage is taken out of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from data.storage import size
from teacher_cache.layout import CacheError
from teacher_cache.store import Cache

LOOKED_AT = 8  # shards, for the maps' statistics


def inspect_cache(cache: Cache) -> dict[str, Any]:
    """What a store is and how far, as plain data: its attributes, ``shards`` and ``committed_shards``, ``samples`` and
    ``committed_samples``, ``bytes`` (all that is stored), ``raw_bytes`` (the committed maps in float32 at full
    resolution), ``ratio`` of the two, and ``maps``, statistics over some evenly chosen shards; None without any.

    A shard that is damaged is left out of the statistics; `damaged_shards` names it. Raises OSError.
    """
    info = cache.info
    there = np.flatnonzero(cache.committed())
    samples = sum(stop - start for start, stop in map(info.shard_range, there.tolist()))
    stored, raw = size(cache.store), info.raw_bytes * samples // info.dataset.samples
    chosen = there[np.linspace(0, len(there) - 1, min(LOOKED_AT, len(there))).astype(int)]
    return {
        "path": cache.path,
        **info.to_dict(),
        "shards": info.shards,
        "committed_shards": len(there),
        "samples": info.dataset.samples,
        "committed_samples": samples,
        "complete": len(there) == info.shards,
        "bytes": stored,
        "raw_bytes": raw,
        "ratio": stored / raw if raw else None,
        "maps": _statistics(cache, chosen.tolist()),
    }


def _statistics(cache: Cache, shards: list[int]) -> dict[str, Any] | None:
    """Of maps (n, D, C, h, w) and draws: how sparse, how large, how concentrated, and what they explain."""
    found: list[dict[str, float]] = []
    for shard in shards:
        try:
            content = cache.read_shard(shard)
        except CacheError:
            continue
        maps, top = content.heatmaps, content.teacher_logits.argmax(1)
        absolute = np.abs(maps).sum((-3, -2, -1))
        found.append({
            "zeros": float((maps == 0).mean()),
            "empty": float((absolute == 0).mean()),
            "relevance": float(absolute.mean()),
            "positive": float(np.maximum(maps, 0).sum() / max(absolute.sum(), np.finfo(np.float32).tiny)),
            "largest": float(np.abs(maps).max()),
            "top_class": float((content.target_class == top[:, None]).mean()),
            "epsilon_low": float(content.epsilon.min()),
            "epsilon_high": float(content.epsilon.max()),
        })  # fmt: skip
    if not found:
        return None
    combined: dict[str, Any] = {"largest": max, "epsilon_low": min, "epsilon_high": max}
    values = {key: [part[key] for part in found] for key in found[0]}
    return {"shards": len(found), **{key: float(combined.get(key, np.mean)(each)) for key, each in values.items()}}


def damaged_shards(cache: Cache, shards: Iterable[int] | None = None) -> dict[int, str]:
    """Read every committed shard, or those given, and say what is wrong with each that is not what was committed."""
    damaged = {}
    for shard in np.flatnonzero(cache.committed()).tolist() if shards is None else shards:
        try:
            cache.read_shard(shard)
        except CacheError as error:
            damaged[shard] = str(error)
    return damaged


def repair(cache: Cache, damaged: Iterable[int]) -> None:
    """Uncommit shards, so that the next cache-explanations computes just them. The store is opened ``writable``."""
    for shard in damaged:
        cache.uncommit(shard)
