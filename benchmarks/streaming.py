"""Measure how fast a student gets its batches: our stream beside a memory map, plain Zarr, HDF5 and one file a map.

    pip install -e ".[benchmarks]" && python benchmarks/streaming.py --work FOLDER

All of these deliver the same batches in the same order. Two more contenders read one draw of a shard at a time: our
reader, and Zarr's own sharding codec. A second table has the datasets for training loops of the user's own
(`own_loop.py`). Each contender runs once in every round, in random order, and ratios are taken within a round. Files
that exist in FOLDER are reused.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import torch
import zarr
from own_loop import compare
from report import processor, spread, table, verdict
from storage import photographs
from torch.utils.data import DataLoader, Dataset

from data import make_coloured_mnist
from pipeline import cache_explanations
from teacher_cache import Cache, open_cache
from trainer import train_student, train_teacher
from trainer.stream import order
from trainer.stream.stream import Source, stream

ROOF, COLD, WARM = "memory map, taken into place", "stream, from compressed shards", "stream, from RAM"
OUR_READER, ZARR_READER = "one draw of a shard, our reader", "one draw of a shard, Zarr's sharding codec"
NAMES = ("heatmaps", "scale", "target_class", "epsilon")
RIVAL_SAMPLES = 4096  # in the rival formats that are slow to write
LIMIT = 1.5  # seconds after its first batch at which a slow contender is stopped in each round

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Rival:
    """A contender.

    ``batches(seed)`` yields for one epoch or without end. ``target`` is the lowest ratio of samples/s that meets our
    goal: this contender's to that of ``to`` if that is the memory map, and the other way round for any other ``to``.
    """

    name: str
    batches: Callable[[int], Iterator[Batch]]
    to: str | None = None
    target: float | None = None


def prepare(kind: str, work: Path) -> tuple[Path, Path]:
    """Make the dataset and its heatmap store with the product's own commands."""
    data, teacher, cache = work / f"{kind}.zarr", work / f"{kind}-teacher", work / f"{kind}-cache.zarr"
    if not data.exists():
        make_coloured_mnist(data) if kind == "coloured-mnist" else photographs(data)
    if not (teacher / "result.json").exists():
        train_teacher(data, teacher, debias="none", bias_free=True, steps=200)
    cache_explanations(data, teacher, cache)
    return data, cache


# --- the contenders -----------------------------------------------------------------------------------


def maps_alone(cache: Cache) -> Source:
    """Make a stream source of the heatmaps without the images. The rivals' formats hold no images either."""
    info = cache.info
    return Source(
        samples=info.dataset.samples,
        block_samples=info.storage.shard_samples,
        fields={},
        read=lambda block, out: None,
        draws=info.explainer.draws,
        draw_fields=cache.draw_fields,
        read_draw=cache.read_draw,
    )


def rows_in_order(source: Source, seed: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (samples, draws) of each batch of the stream's first epoch."""
    windows = order.windows(
        samples=source.samples, block_samples=source.block_samples, window_samples=source.window_samples,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    samples, draws = [], []
    for window in windows:
        if window.epoch:
            break
        samples.append(window.samples)
        block_draws = [order.draw_of_block(block, source.draws, seed, 0) for block in range(source.blocks)]
        draws.append(np.array(block_draws)[window.samples // source.block_samples])
    epoch_samples, epoch_draws = np.concatenate(samples), np.concatenate(draws)
    for first in range(0, len(epoch_samples), batch_size):
        yield epoch_samples[first : first + batch_size], epoch_draws[first : first + batch_size]


class Rows(Dataset[Batch]):
    """A map-style dataset over (sample, draw) rows of any store. The reading process opens the store."""

    def __init__(self, open_arrays: Callable[[], Callable[[int, int], Batch]], rows: list[tuple[int, int]]):
        self._open, self._rows, self._read = open_arrays, rows, None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> Batch:
        if self._read is None:
            self._read = self._open()
        return self._read(*self._rows[item])


def open_zarr(path: str) -> Callable[[int, int], Batch]:
    arrays = {name: zarr.open_array(path, path=name, mode="r") for name in NAMES}
    return lambda sample, draw: {name: np.asarray(array[sample, draw]) for name, array in arrays.items()}


def open_hdf5(path: Path) -> Callable[[int, int], Batch]:
    file = h5py.File(path)
    return lambda sample, draw: {name: np.asarray(file[name][sample, draw]) for name in NAMES}


def open_files(path: Path) -> Callable[[int, int], Batch]:
    return lambda sample, draw: torch.load(path / f"{sample}-{draw}.pt", weights_only=True)


def through_loader(
    open_arrays: Callable[[], Callable[[int, int], Batch]],
    source: Source,
    samples: int,
    workers: int,
    batch: int,
    seed: int,
) -> Iterator[Batch]:
    """Make a DataLoader over the first samples, in the stream's order. These formats hold no other samples."""
    rows = [
        (int(sample), int(draw))
        for batch_samples, batch_draws in rows_in_order(source, seed, batch)
        for sample, draw in zip(batch_samples, batch_draws, strict=True)
        if sample < samples
    ]
    loader = DataLoader(
        Rows(open_arrays, rows), batch, num_workers=workers, drop_last=True,
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    return iter(loader)


def write_memory_map(cache: Cache, folder: Path) -> dict[str, np.ndarray]:
    """Write every array uncompressed and open it with `numpy.memmap`."""
    arrays = {}
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        source, path = zarr.open_array(cache.path, path=name, mode="r"), folder / f"{name}.bin"
        if not path.exists():
            written = np.memmap(path, mode="w+", dtype=source.dtype, shape=source.shape)
            for shard in range(cache.info.shards):
                written[slice(*cache.info.shard_range(shard))] = source[slice(*cache.info.shard_range(shard))]
            written.flush()
        arrays[name] = np.memmap(path, mode="r", dtype=source.dtype, shape=source.shape)
    return arrays


def from_memory_map(
    arrays: dict[str, np.ndarray], source: Source, batch: int, seed: int
) -> Generator[Batch, None, None]:
    """Take rows of a flat array straight into the batch, which is as fast as NumPy can be."""
    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
    for samples, draws in rows_in_order(source, seed, batch):
        values = {name: np.empty((len(samples), *array.shape[1:]), array.dtype) for name, array in flat.items()}
        for name, array in flat.items():
            array.take(samples * source.draws + draws, axis=0, out=values[name], mode="clip")
        yield {name: torch.from_numpy(array) for name, array in values.items()}


def by_indexing(arrays: dict[str, np.ndarray], source: Source, batch: int, seed: int) -> Iterator[Batch]:
    """Index the memory map in the obvious way."""
    for samples, draws in rows_in_order(source, seed, batch):
        yield {name: torch.from_numpy(array[samples, draws]) for name, array in arrays.items()}


def write_rivals(arrays: dict[str, np.ndarray], samples: int, work: Path) -> tuple[Path, Path]:
    """Write the first samples to one HDF5 file, contiguous and uncompressed, and to a .pt file per (sample, draw)."""
    hdf5, files = work / "maps.h5", work / "files"
    if not hdf5.exists():
        with h5py.File(hdf5, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array[:samples])
    if not files.exists():
        partial_files = work / "files.partial"
        partial_files.mkdir(exist_ok=True)
        for sample in range(samples):
            for draw in range(arrays["scale"].shape[1]):
                values = {name: torch.from_numpy(np.array(array[sample, draw])) for name, array in arrays.items()}
                torch.save(values, partial_files / f"{sample}-{draw}.pt")
        partial_files.rename(files)
    return hdf5, files


def by_shard(cache: Cache, read: Callable[[int, int], Batch], seed: int) -> Iterator[Batch]:
    """Read one draw of every shard, in random order."""
    rng = np.random.default_rng(seed)
    for shard in rng.permutation(cache.info.shards).tolist():
        yield read(shard, int(rng.integers(cache.info.explainer.draws)))


def zarr_reader(cache: Cache) -> Callable[[int, int], Batch]:
    """Make Zarr's reader of one draw of a shard. It reads the maps alone; ours reads and checks their rows too."""
    maps = zarr.open_array(cache.path, path="heatmaps", mode="r")
    return lambda shard, draw: {"heatmaps": maps[slice(*cache.info.shard_range(shard)), draw]}


def contenders(cache: Cache, work: Path, batch: int) -> list[Rival]:
    source = maps_alone(cache)
    arrays = write_memory_map(cache, work / "raw")
    samples = min(RIVAL_SAMPLES, source.samples)
    hdf5, files = write_rivals(arrays, samples, work)
    held = stream(source, batch_size=batch, seed=0, memory_budget=2**40)
    for _ in range(source.draws * (source.samples // batch)):
        next(held)  # afterwards every draw is in RAM

    def cold(seed: int) -> Iterator[Batch]:
        return stream(source, batch_size=batch, seed=seed, memory_budget=0)

    rivals = [
        Rival(ROOF, partial(from_memory_map, arrays, source, batch)),
        Rival(COLD, cold, ROOF, 0.5),
        Rival(WARM, lambda seed: held, ROOF, 0.9),
        Rival("memory map, array[samples, draws]", partial(by_indexing, arrays, source, batch)),
        Rival(OUR_READER, partial(by_shard, cache, cache.read_draw)),
        Rival(ZARR_READER, partial(by_shard, cache, zarr_reader(cache)), OUR_READER, 1.3),
    ]
    formats = {
        "Zarr, a row an item": (partial(open_zarr, cache.path), 10.0),
        "HDF5, a row an item": (partial(open_hdf5, hdf5), 1.0),
        "a .pt file a map": (partial(open_files, files), 1.0),
    }
    for name, (open_arrays, target) in formats.items():
        for workers in (0, 2):
            batches = partial(through_loader, open_arrays, source, samples, workers, batch)
            rivals.append(Rival(f"{name}, DataLoader of {workers} workers", batches, COLD, target))
    return rivals


# --- timing -------------------------------------------------------------------------------------------


def samples_per_second(rival: Rival, seed: int, most: int) -> float:
    """Time a contender for some epochs or seconds.

    The time of the cold stream includes its start. That of the others excludes their first batch, in which they open
    files and start processes.
    """
    batches, samples, started = rival.batches(seed), 0, time.perf_counter()
    if rival.name != COLD:
        next(batches)
        started = time.perf_counter()
    for batch in batches:
        samples += len(batch["heatmaps"])
        if samples >= most or time.perf_counter() - started > LIMIT:
            break
    elapsed = time.perf_counter() - started
    if rival.name == COLD:
        batches.close()  # type: ignore[attr-defined]
    return samples / elapsed


def compare_from_disk(cache: Cache, files: Path, batch: int, rounds: int) -> str:
    """Compare the stream's samples/s with the memory map's in a first epoch, with no file in the system's memory."""
    source, ratios = maps_alone(cache), []
    write_memory_map(cache, files / "raw")
    for seed in range(rounds):
        seconds = []
        for name in (ROOF, COLD):
            drop_pages(files / "raw")
            drop_pages(Path(cache.path))
            if name == ROOF:
                batches = from_memory_map(write_memory_map(cache, files / "raw"), source, batch, seed)
            else:
                batches = stream(source, batch_size=batch, seed=seed, memory_budget=0)
            started = time.perf_counter()
            for _ in range(source.samples // batch):
                next(batches)
            seconds.append(time.perf_counter() - started)
            batches.close()
        ratios.append(seconds[0] / seconds[1])
    return spread(np.array(ratios))


def drop_pages(folder: Path) -> None:
    """Drop these files from the system's memory. Files that somebody has mapped stay."""
    os.sync()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timing_table(rivals: list[Rival], speeds: dict[str, list[float]], bytes_per_sample: int) -> str:
    lines = []
    for rival in rivals:
        own = np.array(speeds[rival.name])
        ratio = own / speeds[ROOF]
        cells = [rival.name, f"{np.median(own):,.0f}", f"{np.median(own) * bytes_per_sample / 1e6:,.0f}", spread(ratio)]
        if rival.to and rival.to != ROOF:
            against = np.array(speeds[rival.to]) / own
            cells += [f"{spread(against)} × slower than ours", *verdict(float(np.median(against)), rival.target, True)]
        else:
            cells += ["", *verdict(float(np.median(ratio)), rival.target, True)]
        lines.append(cells)
    return table(["", "samples/s", "MB/s", "of the memory map", "", "target", "met"], lines)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for datasets, stores and files.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Number of rounds.")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(1), help="Samples of a batch.")
@click.option(
    "--steps",
    default=200,
    show_default=True,
    type=click.IntRange(0),
    help="Steps of the student's training; 0 skips it.",
)
def main(work: Path, rounds: int, batch_size: int, steps: int) -> None:
    """Measure how fast each contender delivers batches."""
    versions = f"zarr {zarr.__version__}, h5py {h5py.__version__}, PyTorch {torch.__version__}"
    print(f"{versions}, {processor(torch.device('cpu'))}, {os.cpu_count()} cores, {rounds} rounds; median [quartiles]")
    work.mkdir(parents=True, exist_ok=True)
    for kind in ("coloured-mnist", "dense"):
        data, path = prepare(kind, work)
        cache = open_cache(path)
        files = work / f"{kind}-files"
        files.mkdir(exist_ok=True)
        from_disk = compare_from_disk(cache, files, batch_size, min(rounds, 3))
        rivals = contenders(cache, files, batch_size)
        most = 3 * cache.info.dataset.samples
        speeds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for rival in rivals[:6]:  # so that the files that they read are in memory
            samples_per_second(rival, 0, most)
        for seed in range(rounds):
            for rival in random.sample(rivals, len(rivals)):
                speeds[rival.name].append(samples_per_second(rival, seed, most))
        size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in cache.draw_fields.values())
        print(f"\n### {kind}: {cache.info.dataset.samples} samples, maps of {cache.info.map_shape}, "
              f"{cache.info.storage.codec}\n")  # fmt: skip
        print(timing_table(rivals, speeds, size), flush=True)
        print(f"\nFrom disk, with no file in memory: {from_disk} × the memory map's samples/s, one epoch.")
        loops = compare(str(data), str(path), rounds, batch_size)
        print(f"\nBatches with images, in a loop of the user's own:\n\n{loops}")
        if steps:
            student = work / f"{kind}-student"
            shutil.rmtree(student, ignore_errors=True)
            result = train_student(data, path, student, steps=steps)
            share = 100 * result["seconds_waiting"] / result["seconds"]
            print(
                f"A student's {steps} steps, small-cnn: {share:.2f} % of the time waiting for data (target: under 2 %)."
            )


if __name__ == "__main__":
    main()
