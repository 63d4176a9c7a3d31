"""What is in a store, whether it is what was committed, and how damage is taken out of it."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from teacher_cache.claims import claim_writing
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
    stored, raw = cache.store.size(), info.raw_bytes * samples // info.dataset.samples
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
        except (CacheError, OSError):
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
    """Read every committed shard, or those given, and say what is wrong with each that is not what was committed.

    Raises OSError for a store that cannot be read, unless it is the disk that cannot read just this shard.
    """
    damaged = {}
    for shard in committed_shards(cache) if shards is None else shards:
        try:
            cache.read_shard(shard)
        except CacheError as error:
            damaged[shard] = str(error)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            damaged[shard] = f"shard {shard} of {cache.path} cannot be read: {error.filename}: {error.strerror}"
    return damaged


def repair(cache: Cache, shards: Iterable[int] | None = None) -> dict[int, str]:
    """Uncommit each shard that `damaged_shards` names, so that the next cache-explanations computes just them.

    The store is opened ``writable``, and nobody else may be writing it (CacheError).
    """
    with claim_writing(cache):  # before looking: what is being written again looks like damage
        damaged = damaged_shards(cache, shards)
        for shard in damaged:
            cache.uncommit(shard)
    return damaged


def committed_shards(cache: Cache) -> list[int]:
    """The numbers of the shards that are there."""
    return np.flatnonzero(cache.committed()).tolist()


def describe(found: dict[str, Any]) -> str:
    """What `inspect_cache` found, for people: aligned lines."""
    teacher, explainer, dataset, storage = (found[key] for key in ("teacher", "explainer", "dataset", "storage"))
    bias = "without biases" if teacher["bias_free"] else "with biases"
    done = "complete" if found["complete"] else f"{found['committed_samples'] / found['samples']:.1%} done"
    of = "" if explainer["map_shape"] == dataset["image_shape"] else f"maps of {_sizes(explainer['map_shape'])}, "
    features = f", {storage['features']} features a sample" if storage["features"] else ""
    pooled = "" if storage["resolution"] == 1 else f", average-pooled by {storage['resolution']}"
    lines = {
        "store": found["path"],
        "teacher": f"{teacher['arch']} {bias}, debiasing {teacher['debias']}, weights {teacher['weights_sha256'][:12]}",
        "classes": f"{len(teacher['class_names'])}: {_few(teacher['class_names'])}",
        "explainer": f"{explainer['rule']}, {of}{explainer['draws']} draws a sample, "
        f"ε from {explainer['epsilon_low']:g} to {explainer['epsilon_high']:g}, "
        f"classes {explainer['class_policy']}, seed {explainer['seed']}",
        "dataset": f"{dataset['name']}, split {dataset['split']}: {dataset['samples']:,} images of "
        f"{_sizes(dataset['image_shape'])}, fingerprint {dataset['fingerprint'][:12]}",
        "storage": f"{storage['precision']}, {storage['codec']}{pooled}{features}, "
        f"shards of {storage['shard_samples']} samples in chunks of {storage['chunk_samples']}",
        "state": f"{done}: {found['committed_shards']:,} of {found['shards']:,} shards, "
        f"{found['committed_samples']:,} of {found['samples']:,} samples",
        "size": _megabytes(found["bytes"])
        + (f", {1 / found['ratio']:.1f} times smaller than the maps in float32" if found["ratio"] else ""),
    }
    if maps := found["maps"]:
        lines["maps"] = (
            f"{maps['zeros']:.1%} zeros, {maps['empty']:.1%} empty, mean relevance {maps['relevance']:.3g} of which "
            f"{maps['positive']:.0%} positive, largest {maps['largest']:.3g}"
        )
        top_class = "" if explainer["class_policy"] == "none" else f"{maps['top_class']:.1%} explain the top class, "
        lines["draws"] = f"{top_class}ε from {maps['epsilon_low']:.3g} to {maps['epsilon_high']:.3g}"
        lines["looked at"] = f"{maps['shards']} of {found['committed_shards']:,} shards, for maps and draws"
    lines["written by"] = ", ".join(f"{name} {version}" for name, version in found["written_by"].items())
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def continuing(cache: Cache) -> str:
    """The options that the command which made a store had, as far as the store knows, as a shell takes them."""
    explainer, dataset, storage = cache.info.explainer, cache.info.dataset, cache.info.storage
    return (
        f"cache-explanations --split {shlex.quote(dataset.split)} --draws {explainer.draws} --epsilon-range "
        f"{explainer.epsilon_low!r} {explainer.epsilon_high!r} --explainer {explainer.rule} --seed {explainer.seed} "
        f"--precision {storage.precision} --codec {storage.codec} --resolution {storage.resolution} "
        f"{'--features ' if storage.features else ''}--out {shlex.quote(cache.path)}"
    )


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _few(names: Sequence[str], shown: int = 10) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
