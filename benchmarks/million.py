"""A million small images through both stages: is the memory flat, the time linear, the number of files small?

    python benchmarks/million.py --work FOLDER

Images are generated piece by piece, and the teacher is a stub that makes maps without a network, so that what is left
is the product's own reading, encoding, committing and streaming. Each size runs in a process of its own, whose resident
memory is sampled from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from report import processor, table

SHAPE = (3, 16, 16)
SIZES = (125_000, 250_000, 500_000, 1_000_000)
BUDGET = 2**28  # bytes for the stream, so that no size fits
PAGE = os.sysconf("SC_PAGE_SIZE")


class Generated:
    """Images uint8 (N, C, H, W) that are made when they are asked for: a bright square somewhere on dim noise."""

    dtype = np.dtype(np.uint8)

    def __init__(self, samples: int):
        self.shape = (samples, *SHAPE)

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(self.shape[0])
        rng = np.random.default_rng(start)
        images = rng.integers(0, 32, (stop - start, *SHAPE), dtype=np.uint8)
        for image, (top, left) in zip(images, rng.integers(0, SHAPE[1] - 4, (stop - start, 2)), strict=True):
            image[:, top : top + 4, left : left + 4] = 255
        return images


def generate(path: Path, samples: int) -> None:
    from data import DatasetWriter

    with DatasetWriter(path) as writer:
        writer.write_split("train", images=Generated(samples), labels=np.zeros(samples, np.uint8))
        writer.finish(name=f"{samples} generated images", class_names=["a", "b"])


def stub(model: Any, images: np.ndarray, masks: Any, info: Any, start: int, batches: Any, device: Any) -> Any:
    """In place of `pipeline.caching.stage_one.explain_shard`: each draw's map is the image times noise."""
    from teacher_cache import Shard

    rows = (len(images), info.explainer.draws)
    noise = np.random.default_rng(start).standard_normal((*rows, *SHAPE), np.float32)
    maps = images[:, None].astype(np.float32) / 255 * noise
    return Shard(maps, np.zeros(rows, np.int64), np.ones(rows, np.float32), np.zeros((len(images), 2), np.float32))


def explain(data: Path, teacher: Path, cache: Path) -> None:
    import pipeline.caching.stage_one as stage_one

    stage_one.explain_shard = stub
    stage_one.cache_explanations(data, teacher, cache, draws=2)


def an_epoch(data: Path, cache: Path) -> None:
    from data import open_dataset
    from teacher_cache import open_cache
    from trainer.stream.stream import explained_source, stream

    split = open_dataset(data).split("train")
    batches = stream(explained_source(split, open_cache(cache)), batch_size=128, seed=0, memory_budget=BUDGET)
    total = 0.0
    for _ in range(len(split) // 128):
        total += next(batches)["scale"].sum().item()
    batches.close()
    assert total > 0


PHASES: dict[str, Callable[..., None]] = {
    "generate": generate,
    "stage one": explain,
    "an epoch of the stream": an_epoch,
}


def measured(phase: str, *arguments: object) -> tuple[float, float]:
    """Seconds without imports, and the largest resident memory in MiB, of a phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", json.dumps([phase, *map(str, arguments)])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            try:
                peak = max(peak, int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE)
            except (OSError, IndexError):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{phase} failed")
    return float(printed), peak / 2**20


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="A folder for datasets and stores.")
@click.option("--sizes", multiple=True, type=click.IntRange(1024), default=SIZES, show_default=True)
@click.option("--phase", hidden=True)
def main(work: Path | None, sizes: tuple[int, ...], phase: str | None) -> None:
    """Run both stages' input and output on generated datasets of growing size."""
    if phase is not None:
        import trainer  # noqa: F401, before the clock starts

        name, *arguments = json.loads(phase)
        started = time.perf_counter()
        PHASES[name](*(int(given) if given.isdecimal() else Path(given) for given in arguments))
        print(time.perf_counter() - started)
        return
    if work is None:
        raise click.UsageError("give --work, a folder for datasets and stores")
    from trainer import train_teacher

    work.mkdir(parents=True, exist_ok=True)
    teacher = work / "teacher"
    if not (teacher / "result.json").exists():
        generate(work / "first.zarr", 1024)
        train_teacher(work / "first.zarr", teacher, steps=2, batch_size=32)
    lines = []
    for samples in sizes:
        data, cache = work / f"{samples}.zarr", work / f"{samples}-cache.zarr"
        for path in (data, cache):
            shutil.rmtree(path, ignore_errors=True)
        figures = [
            measured("generate", data, samples),
            measured("stage one", data, teacher, cache),
            measured("an epoch of the stream", data, cache),
        ]
        files = [sum(1 for path in place.rglob("*") if path.is_file()) for place in (data, cache)]
        cells = [f"{seconds:.0f} s, {1e6 * seconds / samples:.0f} µs each, {peak:.0f} MiB" for seconds, peak in figures]
        lines.append([f"{samples:,}", *cells, *(f"{count:,}" for count in files)])
        print(lines[-1], file=sys.stderr, flush=True)
    print(
        f"PyTorch {torch.__version__}, {processor(torch.device('cpu'))}; images {SHAPE}, two draws, memory is resident"
    )
    print(table(["samples", *PHASES, "files of the dataset", "files of the store"], lines))


if __name__ == "__main__":
    main()
