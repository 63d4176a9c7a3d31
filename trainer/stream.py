"""Batches from blocks on disk, in the order of `order.py`, read ahead in the background within bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np

from data import Split
from teacher_cache import Cache
from trainer import order

Block = dict[str, np.ndarray]  # arrays with the samples on the first axis
ReadBlock = Callable[[int, int, int], Block]  # (first sample, one after the last, epoch)

WINDOW_SAMPLES = 8192
BLOCK_SAMPLES = 1024  # read at once from a dataset without a store


def stream(
    read: ReadBlock, samples: int, block_samples: int, *, batch_size: int, seed: int
) -> Generator[Block, None, None]:
    """Shuffled batches of exactly ``batch_size`` samples, epoch after epoch without end.

    What is left over at the end of an epoch is dropped, unless the epoch is smaller than one batch. The
    next window is read while this one is consumed, so two windows of about 8,192 samples are in memory.
    """
    batch_size = min(batch_size, samples)
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as reader:
        ahead = None
        rest: Block | None = None
        for window in _windows(samples, block_samples, seed):
            following = reader.submit(_load, read, *window, seed)
            if ahead is not None:
                rest = yield from _batches(ahead.result(), rest, batch_size)
            ahead, starts_epoch = following, window[2] == 0
            if starts_epoch:
                rest = None


def _windows(samples: int, block_samples: int, seed: int) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """(the sample ranges of its blocks, epoch, window number) of every window, without end."""
    ranges = order.blocks(samples, block_samples)
    window_blocks = max(1, WINDOW_SAMPLES // block_samples)
    for epoch in count():
        for number, chosen in enumerate(order.windows(len(ranges), window_blocks, seed, epoch)):
            yield [ranges[block] for block in chosen], epoch, number


def _load(read: ReadBlock, ranges: list[tuple[int, int]], epoch: int, number: int, seed: int) -> Block:
    parts = [read(start, stop, epoch) for start, stop in ranges]
    shuffled = order.within_window(sum(stop - start for start, stop in ranges), seed, epoch, number)
    return {key: np.concatenate([part[key] for part in parts])[shuffled] for key in parts[0]}


def _batches(window: Block, rest: Block | None, batch_size: int) -> Generator[Block, None, Block]:
    """Yield the whole batches in ``rest`` and ``window``; return the samples that remain."""
    if rest is not None:
        window = {key: np.concatenate([rest[key], window[key]]) for key in window}
    samples = len(next(iter(window.values())))
    whole = samples - samples % batch_size
    for first in range(0, whole, batch_size):
        yield {key: values[first : first + batch_size] for key, values in window.items()}
    return {key: values[whole:] for key, values in window.items()}


def read_labelled(split: Split) -> ReadBlock:
    """Blocks of ``images``, ``labels`` and, where the split has them, ``masks``."""

    def read(start: int, stop: int, epoch: int) -> Block:
        block = {"images": np.asarray(split.images[start:stop]), "labels": np.asarray(split.labels[start:stop])}
        if split.masks is not None:
            block["masks"] = np.asarray(split.masks[start:stop])
        return block

    return read


def read_explained(split: Split, cache: Cache, seed: int) -> ReadBlock:
    """Blocks of ``images`` with one draw of each: ``heatmaps`` (n, C, H, W), ``target_class`` and ``epsilon`` (n,)."""

    def read(start: int, stop: int, epoch: int) -> Block:
        draws = order.draw_of_samples(start, stop, cache.info.explainer.draws, seed, epoch)
        return explained_block(split, cache, start // cache.info.storage.shard_samples, draws)

    return read


def explained_block(split: Split, cache: Cache, shard: int, draws: np.ndarray) -> Block:
    """The block of one shard, each sample with its chosen draw, ``draws`` (n,); see `read_explained`."""
    start, stop = cache.info.shard_range(shard)
    content, rows = cache.read_shard(shard), np.arange(stop - start)
    return {
        "images": np.asarray(split.images[start:stop]),
        "heatmaps": content.heatmaps[rows, draws],
        "target_class": content.target_class[rows, draws],
        "epsilon": content.epsilon[rows, draws],
    }
