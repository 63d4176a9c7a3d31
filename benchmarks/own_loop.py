"""Measure how fast a user's own loop gets its batches: ExplainedStream and ExplainedDataset beside our own stream.

    python benchmarks/own_loop.py --data DATA.zarr --cache CACHE.zarr --rounds 5

`benchmarks/streaming.py` prints the same table. Each contender runs one epoch in every round, in random order, after an
epoch that is not timed; ratios are taken within a round.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from report import processor, spread, table, verdict
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from data import open_dataset
from teacher_cache import open_cache
from trainer import ExplainedDataset, ExplainedStream
from trainer.stream.stream import explained_source, stream

OURS, GOAL, NO_WORKERS = "our own stream", 0.8, "DataLoader of 0 workers"


def contenders(data: str, cache: str, batch: int, budget: int | None) -> dict[str, Callable[[], int]]:
    """Return functions that read one epoch and return its samples."""
    common: dict[str, Any] = {"fields": ["heatmaps"], "memory_budget": budget}
    source = explained_source(open_dataset(data).split("train"), open_cache(cache))
    own, steps = stream(source, batch_size=batch, seed=0, memory_budget=budget), source.samples // batch

    def streamed() -> int:
        return sum(len(next(own)["images"]) for _ in range(steps))

    def read(loader: DataLoader[Any]) -> Callable[[], int]:
        epochs = iter(range(10**6))

        def epoch() -> int:
            loader.dataset.set_epoch(next(epochs))  # type: ignore[attr-defined]
            return sum(len(one["images"]) for one in loader)

        return epoch

    rivals = {OURS: streamed}
    for workers in (0, 1):
        how: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        name = f"DataLoader of {workers} workers"
        by_batch = ExplainedStream(data, cache, batch_size=batch, **common)
        rivals[f"ExplainedStream, {name}"] = read(DataLoader(by_batch, batch_size=None, **how))
        dataset = ExplainedDataset(data, cache, **common)
        shuffled = BatchSampler(RandomSampler(dataset), batch, drop_last=True)
        rivals[f"ExplainedDataset, whole batches, {name}"] = read(
            DataLoader(dataset, batch_size=None, sampler=shuffled, **how)
        )
        collated = DataLoader(ExplainedDataset(data, cache, **common), batch, shuffle=True, drop_last=True, **how)
        rivals[f"ExplainedDataset, collated, {name}"] = read(collated)
    ready = _Ready(next(own), steps)
    rivals["a batch that is there already, DataLoader of 1 workers"] = read(
        DataLoader(ready, batch_size=None, num_workers=1, persistent_workers=True)
    )
    return rivals


class _Ready(Dataset[Any]):
    """One batch, time and again: what a worker's way to the training process costs alone."""

    def __init__(self, batch: dict[str, torch.Tensor], batches: int):
        self.batch, self.batches = batch, batches

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values.clone() for name, values in self.batch.items()}


def compare(data: str, cache: str, rounds: int, batch: int, budget: int | None = None) -> str:
    """Return a table of samples/s, alone and relative to our own stream."""
    rivals = contenders(data, cache, batch, budget)
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name in random.sample(list(rivals), len(rivals)):
            started = time.perf_counter()
            samples = rivals[name]()
            if number:
                speeds[name].append(samples / (time.perf_counter() - started))
    ours = np.array(speeds[OURS])
    lines = []
    for name, own in speeds.items():
        ratio = np.array(own) / ours
        goal = GOAL if NO_WORKERS in name else None
        lines.append([name, f"{np.median(own):,.0f}", spread(ratio), *verdict(float(np.median(ratio)), goal, True)])
    return table(["", "samples/s", "of our own stream", "target", "met"], lines)


@click.command()
@click.option("--data", required=True, help="Dataset.")
@click.option("--cache", required=True, help="Heatmap store of the train split.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Number of rounds.")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(1), help="Samples of a batch.")
@click.option(
    "--memory-budget", type=click.IntRange(0), help="Bytes of decoded data. Default: half of the free memory."
)
def main(data: str, cache: str, rounds: int, batch_size: int, memory_budget: int | None) -> None:
    """Measure how fast each contender delivers batches."""
    print(f"PyTorch {torch.__version__}, {processor(torch.device('cpu'))}, {os.cpu_count()} cores, {rounds} rounds")
    print(compare(data, cache, rounds, batch_size, memory_budget))


if __name__ == "__main__":
    main()
