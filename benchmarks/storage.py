"""Measure what each way of storing heatmaps costs: bytes, decoding speed, error, and the student's accuracy.

    pip install -e ".[benchmarks]" && python benchmarks/storage.py --work FOLDER

The maps are those of COLOURED MNIST with its teacher, and dense 64×64 colour maps of a network that tells photographs
apart by their crops. All kinds of stores are written from the same maps. Students are trained from each with several
seeds and evaluated on the test splits of COLOURED MNIST. Files that exist in FOLDER are reused.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import click
import numcodecs
import numpy as np
import torch
import zarr
from report import processor, table

from data import DatasetWriter, Split, make_coloured_mnist, open_dataset
from pipeline import load_classifier
from pipeline.caching.batches import Batches
from pipeline.caching.stage_one import cache_explanations, explain_shard
from pipeline.device import pick_device, place
from teacher_cache import Cache, CacheInfo, choose_compression, create_cache, inspect_cache, open_cache, plan_storage
from teacher_cache.codec import COMPRESSORS, SHUFFLES, Compression, average_pool, dequantise, quantise
from trainer import evaluate, train_student, train_teacher

KINDS = [("float16", 1), ("bfloat16", 1), ("int8", 1), ("float16", 2), ("float16", 4), ("int8", 2)]
T = TypeVar("T")
SAMPLES = 2048  # samples on which codecs are measured, one draw each
CHUNK = 64


def photographs(path: Path) -> None:
    """Write a dataset of 64×64 crops of scikit-image's colour photographs, labelled by photograph."""
    import skimage.data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos, rng = [getattr(skimage.data, name)() for name in names], np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for split, samples in (("train", 4096), ("validation", 512), ("iid", 512)):
            labels = rng.integers(0, len(names), samples)
            images = np.empty((samples, 3, 64, 64), np.uint8)
            for image, label in zip(images, labels, strict=True):
                photo, side = photos[label], rng.integers(64, 160)
                top, left = (rng.integers(0, size - side) for size in photo.shape[:2])
                pixels = np.linspace(0, side - 1, 64).astype(int)
                image[:] = photo[top + pixels[:, None], left + pixels].transpose(2, 0, 1)
            writer.write_split(split, images=images, labels=labels)
        writer.finish(name="crops of photographs", class_names=list(names))


def prepare(work: Path) -> dict[str, tuple[Path, Path]]:
    """Make the dataset and the teacher of each kind of maps."""
    places = {kind: (work / f"{kind}.zarr", work / f"{kind}-teacher") for kind in ("coloured-mnist", "dense")}
    for kind, (data, teacher) in places.items():
        if not data.exists():
            make_coloured_mnist(data) if kind == "coloured-mnist" else photographs(data)
        if not (teacher / "result.json").exists():
            front = (
                {"debias": "grayscale", "steps": 1000} if kind == "coloured-mnist" else {"debias": "none", "steps": 300}
            )
            train_teacher(data, teacher, bias_free=True, **front)  # type: ignore[arg-type]
    return places


def stores(data: Path, teacher: Path, work: Path, device: torch.device) -> dict[tuple[str, int], Cache]:
    """Write the same maps to a store of each kind. `cache_explanations` writes the first one."""
    first = work / f"{data.stem}-cache.zarr"
    cache_explanations(data, teacher, first, device=device.type)
    caches = {KINDS[0]: open_cache(first)}
    info, split = caches[KINDS[0]].info, open_dataset(data).split("train")
    first_maps = caches[KINDS[0]].read_shard(0).heatmaps[:64, 0]
    for precision, resolution in KINDS[1:]:
        codec = str(choose_compression(average_pool(first_maps, resolution), precision))
        storage = plan_storage(info.explainer.draws, split.image_shape, precision, codec, resolution)
        path = work / f"{data.stem}-cache-{precision}-{resolution}.zarr"
        cache = create_cache(path, dataclasses.replace(info, storage=storage), caches[KINDS[0]].head)
        caches[precision, resolution] = cache
    model, _ = load_classifier(teacher)
    place(model, device)
    for shard in range(info.shards):
        missing = [cache for cache in list(caches.values())[1:] if not cache.is_committed(shard)]
        if missing:
            content = explain_shard(model, *shard_inputs(split, info, shard), Batches(128), device)
            for cache in missing:
                cache.write_shard(shard, content)
    return caches


def shard_inputs(split: Split, info: CacheInfo, shard: int) -> tuple[np.ndarray, None, CacheInfo, int]:
    """Read the arguments of `explain_shard` for one shard: images, masks, store attributes and first sample."""
    start, stop = info.shard_range(shard)
    return np.asarray(split.images[start:stop]), None, info, start


def maps_of(data: Path, teacher: Path, cache: Cache, device: torch.device) -> np.ndarray:
    """Compute heatmaps float32 (n, C, H, W) of the first samples, one draw each. They are never stored."""
    split, (model, _) = open_dataset(data).split("train"), load_classifier(teacher)
    place(model, device)
    shards = range(-(-SAMPLES // cache.info.storage.shard_samples))
    return np.concatenate(
        [
            explain_shard(model, *shard_inputs(split, cache.info, shard), Batches(128), device).heatmaps[:, 0]
            for shard in shards
        ]
    )


def codec_lines(maps: np.ndarray) -> Iterator[list[str]]:
    """Measure every precision with every compression: bytes per map, ratio to raw float32, speeds of a core, error."""
    for precision, resolution in KINDS:
        pooled = average_pool(maps, resolution)
        stored, scale = quantise(pooled, precision)
        error = np.abs(dequantise(stored, scale, precision) - pooled).sum() / np.abs(pooled).sum()
        pairs = [(name, entry.level) for name, entry in COMPRESSORS.items()]
        for compression in (Compression(*pair, shuffle) for pair in pairs for shuffle in SHUFFLES):
            blosc = compression.blosc()
            parts = [stored[first : first + CHUNK] for first in range(0, len(stored), CHUNK)]
            encoded, encoding = timed(lambda parts=parts, blosc=blosc: [blosc.encode(part) for part in parts], 1)
            out = np.empty_like(parts[0])
            _, decoding = timed(
                lambda encoded=encoded, blosc=blosc, out=out: [blosc.decode(e, out=out) for e in encoded]
            )
            size = sum(map(len, encoded))
            default = compression == choose_compression(pooled[:CHUNK], precision)
            yield [
                f"{precision}, 1/{resolution}" if resolution > 1 else precision,
                f"**{compression}**" if default else str(compression),
                f"{size / len(maps):.0f}",
                f"{size / (4 * maps.size):.4f}",
                f"{len(maps) / encoding / 1000:.0f}",
                f"{len(maps) / decoding / 1000:.0f}",
                f"{stored.nbytes / decoding / 1e9:.2f}",
                f"{error:.4f}",
            ]


def timed(run: Callable[[], T], repeats: int = 5) -> tuple[T, float]:
    """Run a function several times. Return its result, and the CPU seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = run()
        seconds.append(time.process_time() - started)
    return result, min(seconds)


def student_line(data: Path, cache: Cache, work: Path, steps: int, seeds: int, device: torch.device) -> list[str]:
    """Measure the accuracies of one store's students: mean over the seeds, and in brackets lowest and highest."""
    accuracies: dict[str, list[float]] = {"iid": [], "ood": [], "shift": []}
    for seed in range(seeds):
        out = work / f"student-{Path(cache.path).stem}-{steps}-{seed}"
        if not (out / "result.json").exists():
            train_student(data, cache.path, out, steps=steps, seed=seed, optimizer="adam", device=device.type)
        splits = evaluate(data, out, device=device.type)["splits"]
        for name, values in accuracies.items():
            values.append(splits[name]["accuracy"])
    storage, stored = cache.info.storage, inspect_cache(cache)
    return [
        f"{storage.precision}, 1/{storage.resolution}" if storage.resolution > 1 else storage.precision,
        storage.codec,
        f"{stored['bytes'] / cache.info.dataset.samples / cache.info.explainer.draws:.0f}",
        f"{stored['ratio']:.4f}",
        *(f"{np.mean(each):.2f} [{min(each):.2f}–{max(each):.2f}]" for each in accuracies.values()),
    ]


@click.command()
@click.option(
    "--work", required=True, type=click.Path(path_type=Path), help="Folder for datasets, stores and students."
)
@click.option(
    "--steps",
    default=1000,
    show_default=True,
    type=click.IntRange(0),
    help="Steps of each student's training; 0 skips it.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Number of students of each store.")
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu or cuda.")
def main(work: Path, steps: int, seeds: int, device: str) -> None:
    """Measure every way of storing heatmaps."""
    torch_device = pick_device(device)
    versions = f"zarr {zarr.__version__}, numcodecs {numcodecs.__version__}, PyTorch {torch.__version__}"
    print(f"{versions}, {processor(torch_device)}. Speeds are per core, in CPU time. The default codec is in bold.")
    work.mkdir(parents=True, exist_ok=True)
    header = ["precision", "codec", "bytes/map", "ratio", "encoded k/s", "decoded k/s", "decoded GB/s", "error"]
    caches = {}
    for kind, (data, teacher) in prepare(work).items():
        caches[kind] = stores(data, teacher, work, torch_device)
        maps = maps_of(data, teacher, caches[kind][KINDS[0]], torch_device)
        print(f"\n### {kind}: maps of {'×'.join(map(str, maps.shape[1:]))}, {100 * (maps == 0).mean():.1f} % zeros\n")
        print(table(header, list(codec_lines(maps))), flush=True)
    if steps:
        print(f"\n### Students on COLOURED MNIST, {steps} steps, {seeds} seeds: mean [lowest–highest] in %\n")
        data = prepare(work)["coloured-mnist"][0]
        lines = [
            student_line(data, cache, work, steps, seeds, torch_device) for cache in caches["coloured-mnist"].values()
        ]
        print(table(["precision", "codec", "bytes/map, all of the store", "ratio", "IID", "OOD", "shift"], lines))


if __name__ == "__main__":
    main()
