"""Describe a store, verify its shards, and uncommit damaged ones."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from options import Call, Message
from teacher_cache.claims import claim_writing
from teacher_cache.errors import CacheError
from teacher_cache.store import Cache, Shard

SAMPLED_SHARDS = 8  # for the maps' statistics
NO_SHARES = ("input-gradient", "grad-cam", "attention")  # explainers whose maps are no shares of the logit


def inspect_cache(cache: Cache) -> dict[str, Any]:
    """Describe a store as plain data.

    Args:
        cache: The store.

    Returns:
        Its attributes, ``path``, ``shards`` and ``committed_shards``, ``samples`` and ``committed_samples``,
        ``complete``, ``bytes`` (of everything that is stored), ``raw_bytes`` (of the committed maps as float32 at full
        resolution), ``ratio`` of the two, and ``maps``: statistics over up to 8 evenly spaced shards, None without
        any. Statistics leave damaged shards out; `damaged_shards` names those. ``maps.sums`` has, for the lower and the
        upper half of the range of ε on a logarithmic scale: ``epsilon_low`` and ``epsilon_high``, the number of
        ``maps``, the median ``share`` of the sum of a map in its logit, and the ``correlation`` of the two. It is empty
        for maps that are no shares of a logit.

    Raises:
        OSError: The store cannot be read.
    """
    info = cache.info
    committed = np.flatnonzero(cache.committed())
    samples = sum(stop - start for start, stop in map(info.shard_range, committed.tolist()))
    stored, raw = cache.store.size(), info.raw_bytes * samples // info.dataset.samples
    sampled = committed[np.linspace(0, len(committed) - 1, min(SAMPLED_SHARDS, len(committed))).astype(int)]
    return {
        "path": cache.path,
        **info.to_dict(),
        "shards": info.shards,
        "committed_shards": len(committed),
        "samples": info.dataset.samples,
        "committed_samples": samples,
        "complete": len(committed) == info.shards,
        "bytes": stored,
        "raw_bytes": raw,
        "ratio": stored / raw if raw else None,
        "maps": _statistics(cache, sampled.tolist()),
    }


def _statistics(cache: Cache, shards: list[int]) -> dict[str, Any] | None:
    """Compute how sparse, how large and how concentrated the maps (n, D, C, h, w) are, and what the draws explain."""
    statistics: list[dict[str, float]] = []
    sums: list[np.ndarray] = []  # ε, sum and logit of each map, float64 (3, n · D)
    for shard in shards:
        try:
            content = cache.read_shard(shard)
        except (CacheError, OSError):
            continue
        maps, top = content.heatmaps, content.teacher_logits.argmax(1)
        absolute = np.abs(maps).sum((-3, -2, -1))
        sums.append(_of_maps(cache, content))
        statistics.append({
            "zeros": float((maps == 0).mean()),
            "empty": float((absolute == 0).mean()),
            "relevance": float(absolute.mean()),
            "positive": float(np.maximum(maps, 0).sum() / max(absolute.sum(), np.finfo(np.float32).tiny)),
            "largest": float(np.abs(maps).max()),
            "top_class": float((content.target_class == top[:, None]).mean()),
            "epsilon_low": float(content.epsilon.min()),
            "epsilon_high": float(content.epsilon.max()),
        })  # fmt: skip
    if not statistics:
        return None
    combine: dict[str, Any] = {"largest": max, "epsilon_low": min, "epsilon_high": max}
    values = {key: [part[key] for part in statistics] for key in statistics[0]}
    combined = {key: float(combine.get(key, np.mean)(each)) for key, each in values.items()}
    return {"shards": len(statistics), **combined, "sums": _sums(cache, np.concatenate(sums, 1))}


def _of_maps(cache: Cache, content: Shard) -> np.ndarray:
    """Compute ε, sum and logit of each map of a shard, float64 (3, n · D)."""
    pixels = cache.info.storage.resolution**2  # of which a stored value is the mean
    sums = pixels * content.heatmaps.sum((-3, -2, -1), dtype=np.float64)
    logits = np.take_along_axis(content.teacher_logits, content.target_class, 1)
    return np.stack([values.ravel() for values in (content.epsilon, sums, logits)]).astype(np.float64)


def share_of_logits(cache: Cache) -> float | None:
    """Return the median share of the sum of a map in its logit, over one shard in the middle of a store.

    Returns:
        The share; None for maps that are no shares of a logit, and where no shard is committed.

    Raises:
        CacheError, OSError: the shard is damaged, or cannot be read.
    """
    committed = committed_shards(cache)
    if cache.info.explainer.rule in NO_SHARES or not committed:
        return None
    _, total, logits = _of_maps(cache, cache.read_shard(committed[len(committed) // 2]))
    told = logits != 0
    return _median(total[told] / logits[told]) if told.any() else None


def _sums(cache: Cache, of_maps: np.ndarray) -> list[dict[str, float | None]]:
    """Compare the sums of maps with their logits, in two halves of the range of ε.

    Args:
        cache: The store.
        of_maps: ε, sum and logit of each map, float64 (3, M).
    """
    info = cache.info.explainer
    if info.rule in NO_SHARES:
        return []
    low, high = info.epsilon_low, info.epsilon_high
    middle = (low * high) ** 0.5
    epsilon, total, logits = of_maps
    halves = {(low, high): epsilon > 0}
    if low < high:
        halves = {(low, middle): epsilon < middle, (middle, high): epsilon >= middle}
    return [
        {
            "epsilon_low": start,
            "epsilon_high": stop,
            "maps": int(rows.sum()),
            "share": _median(total[rows & (logits != 0)] / logits[rows & (logits != 0)]),
            "correlation": _correlation(total[rows], logits[rows]),
        }
        for (start, stop), rows in halves.items()
        if (rows & (logits != 0)).any()
    ]


def _median(values: np.ndarray) -> float:
    """Compute the median; NumPy's imports its masked arrays, which `inspect-cache` needs for nothing else."""
    ordered = np.sort(values)
    return float(ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Compute the correlation; None if one of the two is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else None


def damaged_shards(cache: Cache, shards: Iterable[int] | None = None) -> dict[int, Message]:
    """Read shards and find those whose content differs from what was committed.

    Args:
        cache: The store.
        shards: Numbers of the shards to read; None reads every committed shard.

    Returns:
        For each damaged shard, the problem and the remedy.

    Raises:
        OSError: The store cannot be read. A disk error (EIO) in one shard is damage of that shard.
    """
    damaged: dict[int, Message] = {}
    for shard in committed_shards(cache) if shards is None else shards:
        try:
            cache.read_shard(shard)
        except CacheError as error:
            damaged[shard] = Message(error)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            damaged[shard] = Message(
                f"shard {shard} of {cache.path} cannot be read: {error.filename}: {error.strerror}"
            )
    return damaged


def repair(cache: Cache, shards: Iterable[int] | None = None) -> dict[int, Message]:
    """Uncommit damaged shards, so that the next run of stage one computes only those.

    Args:
        cache: The store, opened writable.
        shards: Numbers of the shards to read; None reads every committed shard.

    Returns:
        The shards that were damaged, as `damaged_shards` does.

    Raises:
        CacheError: Another process is writing the store.
        OSError: The store cannot be read or written.
    """
    with claim_writing(cache):  # first, because a shard that is being written again looks damaged
        damaged = damaged_shards(cache, shards)
        for shard in damaged:
            cache.uncommit(shard)
    return damaged


def committed_shards(cache: Cache) -> list[int]:
    """List the numbers of the committed shards."""
    return np.flatnonzero(cache.committed()).tolist()


def describe(inspection: dict[str, Any]) -> str:
    """Format the result of `inspect_cache` for people, in aligned lines."""
    teacher, explainer, dataset, storage = (inspection[key] for key in ("teacher", "explainer", "dataset", "storage"))
    bias = "without biases" if teacher["bias_free"] else "with biases"
    done = (
        "complete" if inspection["complete"] else f"{inspection['committed_samples'] / inspection['samples']:.1%} done"
    )
    of = "" if explainer["map_shape"] == dataset["image_shape"] else f"maps of {_sizes(explainer['map_shape'])}, "
    features = f", {storage['features']} features a sample" if storage["features"] else ""
    pooled = "" if storage["resolution"] == 1 else f", average-pooled by {storage['resolution']}"
    lines = {
        "store": inspection["path"],
        "teacher": f"{teacher['arch']} {bias}, debiasing {teacher['debias']}, weights {teacher['weights_sha256'][:12]}",
        "classes": f"{len(teacher['class_names'])}: {_few(teacher['class_names'])}",
        "explainer": f"{explainer['rule']}, {of}{explainer['draws']} draws a sample, "
        f"ε from {explainer['epsilon_low']:g} to {explainer['epsilon_high']:g}, "
        f"classes {explainer['class_policy']}, seed {explainer['seed']}",
        "dataset": f"{dataset['name']}, split {dataset['split']}: {dataset['samples']:,} images of "
        f"{_sizes(dataset['image_shape'])}, fingerprint {dataset['fingerprint'][:12]}",
        "storage": f"{storage['precision']}, {storage['codec']}{pooled}{features}, "
        f"shards of {storage['shard_samples']} samples in chunks of {storage['chunk_samples']}",
        "state": f"{done}: {inspection['committed_shards']:,} of {inspection['shards']:,} shards, "
        f"{inspection['committed_samples']:,} of {inspection['samples']:,} samples",
        "size": _megabytes(inspection["bytes"])
        + (f", {1 / inspection['ratio']:.1f} times smaller than the maps in float32" if inspection["ratio"] else ""),
    }
    if maps := inspection["maps"]:
        lines["maps"] = (
            f"{maps['zeros']:.1%} zeros, {maps['empty']:.1%} empty, mean relevance {maps['relevance']:.3g} of which "
            f"{maps['positive']:.0%} positive, largest {maps['largest']:.3g}"
        )
        if maps["sums"]:
            lines["sums"] = "; ".join(
                f"{half['share']:.0%} of the logit, correlation "
                + ("unknown" if half["correlation"] is None else f"{half['correlation']:.2f}")
                + f", with ε from {half['epsilon_low']:.3g} to {half['epsilon_high']:.3g}"
                for half in maps["sums"]
            )
        top_class = "" if explainer["class_policy"] == "none" else f"{maps['top_class']:.1%} explain the top class, "
        lines["draws"] = f"{top_class}ε from {maps['epsilon_low']:.3g} to {maps['epsilon_high']:.3g}"
        lines["looked at"] = f"{maps['shards']} of {inspection['committed_shards']:,} shards, for maps and draws"
    lines["written by"] = ", ".join(f"{name} {version}" for name, version in inspection["written_by"].items())
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def continuing(cache: Cache) -> Call:
    """Make the call that resumes a store, with every option that the store knows. It lacks ``data`` and ``teacher``."""
    explainer, dataset, storage = cache.info.explainer, cache.info.dataset, cache.info.storage
    options = {
        "split": dataset.split,
        "draws": explainer.draws,
        "epsilon_range": (explainer.epsilon_low, explainer.epsilon_high),
        "explainer": explainer.rule,
        "seed": explainer.seed,
        "precision": storage.precision,
        "codec": storage.codec,
        "resolution": storage.resolution,
        **({"features": True} if storage.features else {}),
        "out": cache.path,
    }
    return Call("cache_explanations", options)


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _few(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
