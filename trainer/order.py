"""The order in which a student sees samples: pure functions of sizes, seed, epoch and rank. Moves no bytes.

Samples come in blocks (the shards of a store). An epoch shuffles the blocks and deals their samples to the ranks, a
contiguous part each; a rank takes its part in windows of some blocks and shuffles the rows of each window. So a
window is all that must be in memory, and neither threads nor the memory at hand have a say in the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

WINDOW_SAMPLES = 8192
WINDOW_BYTES = 2**28


class Window(NamedTuple):
    """Rows in the order shown: their ``blocks`` and their ``rows`` in these, int64 (n,) each."""

    epoch: int
    blocks: np.ndarray
    rows: np.ndarray


def block_rows(block: int, samples: int, block_samples: int) -> int:
    """The number of samples in a block; the last one may be short."""
    return min(block_samples, samples - block * block_samples)


def samples_of_rank(samples: int, rank: int, ranks: int) -> int:
    """The samples that each rank sees in an epoch. Raises ValueError where there is not one, or no such rank."""
    if not 0 <= rank < ranks:
        raise ValueError(f"there is no rank {rank}: there are {ranks}, counted from 0")
    if samples < ranks:
        raise ValueError(f"{samples} samples are too few for {ranks} ranks: start fewer")
    return samples // ranks


def steps_per_epoch(samples: int, batch_size: int, ranks: int = 1) -> int:
    """Steps of ``batch_size`` samples a rank in an epoch; one, of a smaller batch, where a rank has fewer samples."""
    return max(1, samples // ranks // batch_size)


def position(step: int, samples: int, batch_size: int, ranks: int = 1) -> tuple[int, int]:
    """Where a step, counted from 0 over all epochs, starts: its epoch, and its first sample within the rank's part."""
    epoch, step_of_epoch = divmod(step, steps_per_epoch(samples, batch_size, ranks))
    return epoch, step_of_epoch * batch_size


def window_samples(bytes_per_sample: int, block_samples: int) -> int:
    """How many samples a window mixes: whole blocks, of 8,192 samples and 256 MiB at most, and one block at least.

    It follows from what is stored and not from the memory at hand, on which the order must not depend.
    """
    fitting = min(WINDOW_SAMPLES, WINDOW_BYTES // max(1, bytes_per_sample))
    return max(1, fitting // block_samples) * block_samples


def window_blocks(samples: int, block_samples: int, window_samples: int, ranks: int = 1) -> int:
    """The most blocks that a window can have pieces of; ``window_samples`` is a multiple of ``block_samples``."""
    # Full windows have window_samples // block_samples pieces. A piece may be short, and let one more in, for three
    # reasons: the store's last block is, or it lies at the first or at the last edge of the rank's part. One short
    # piece takes the place of a full one; each of the other two comes on top.
    edges = 2 if ranks > 1 else 0
    return min(-(-samples // block_samples), window_samples // block_samples + edges)


def pieces(samples: int, block_samples: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """A rank's part of an epoch: int64 (P, 3), a row for each piece (block, first row, one after the last).

    The blocks are shuffled, their samples laid end to end and cut into equal parts. So the parts are disjoint, and
    only a block at an edge is read by two ranks. The samples % ranks at the end are dropped: others each epoch.
    """
    part = samples_of_rank(samples, rank, ranks)
    blocks = _generator(seed, _BLOCKS, epoch).permutation(-(-samples // block_samples))
    sizes = np.minimum(block_samples, samples - blocks * block_samples)
    starts = np.cumsum(sizes) - sizes
    first = np.maximum(rank * part - starts, 0)
    stop = np.minimum((rank + 1) * part - starts, sizes)
    return np.stack([blocks, first, stop], axis=1)[first < stop]


def group(pieces: np.ndarray, window_samples: int) -> list[np.ndarray]:
    """Cut the pieces (P, 3) into windows of whole pieces, ``window_samples`` at most and one piece at least."""
    cuts, size = [], 0
    for index, length in enumerate((pieces[:, 2] - pieces[:, 1]).tolist()):
        if index and size + length > window_samples:
            cuts.append(index)
            size = 0
        size += length
    return np.split(pieces, cuts)


def shuffled_rows(
    pieces: np.ndarray, seed: int, epoch: int, rank: int, window: int, first: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a window's pieces in the order shown, from ``first`` to ``stop``: their blocks, their rows (n,)."""
    blocks, starts, stops = pieces.T
    lengths = stops - starts
    total = int(lengths.sum())
    shown = _generator(seed, _ROWS, epoch, rank, window).permutation(total)[first:stop]
    rows = np.arange(total) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return np.repeat(blocks, lengths)[shown], rows[shown]


def windows(
    *,
    samples: int,
    block_samples: int,
    window_samples: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Window]:
    """What a rank sees from a step on, window after window and epoch after epoch without end.

    Every epoch has a whole number of batches; what is left over of the rank's part is not in any window. Windows
    that lie wholly before ``start_step`` are passed over, so a training goes on in the middle of an epoch.
    """
    part = samples_of_rank(samples, rank, ranks)
    batch_size = min(batch_size, part)
    used = part - part % batch_size
    start_epoch, start = position(start_step, samples, batch_size, ranks)
    for epoch in count(start_epoch):
        first = 0  # of the window, within the rank's part
        parts = group(pieces(samples, block_samples, seed, epoch, rank, ranks), window_samples)
        for number, window in enumerate(parts):
            size = int((window[:, 2] - window[:, 1]).sum())
            skip, stop = max(0, start - first), min(size, used - first)
            if skip < stop:
                yield Window(epoch, *shuffled_rows(window, seed, epoch, rank, number, skip, stop))
            first += size
        start = 0


def draw_of_block(block: int, draws: int, seed: int, epoch: int) -> int:
    """Which of their draws the samples of a block show in an epoch: a random one first, then the next each epoch.

    So each sample has shown all its draws after as many epochs. The draws of a sample are independent of each other
    and of those of other samples, and distributed alike: an index says nothing about a draw, and one index for the
    whole block is as random as one for each sample. But only one in ``draws`` of the stored maps is read and decoded.
    """
    return (_number_of_block(block, seed) + epoch) % draws


@lru_cache(maxsize=2**16)  # dearer than all else that is done for a block in an epoch
def _number_of_block(block: int, seed: int) -> int:
    return int(np.random.Philox(key=np.array([seed, _DRAWS], np.uint64), counter=block).random_raw())


_BLOCKS, _DRAWS, _ROWS = 1, 2, 3  # random streams of one seed


def _generator(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose])
