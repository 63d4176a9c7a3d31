"""The order in which a student sees samples: pure functions of sizes, seed and epoch. Moves no bytes.

Samples come in blocks (the shards of a store). An epoch shuffles the blocks, and the rows in each, and lays them end
to end; a window of some blocks is then mixed into whole batches, a part of each from a part of the window. So memory
holds a window, a rank reads its part of it, and threads, memory and the number of ranks have no say in the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

WINDOW_SAMPLES = 8192
WINDOW_BYTES = 2**28
MIXED = 4  # neighbouring positions of a batch whose rows come from the same part of a window


class Window(NamedTuple):
    """Whole batches of an epoch: the index of each sample, int64 (n,), in the order shown."""

    epoch: int
    samples: np.ndarray


def block_rows(block: int, samples: int, block_samples: int) -> int:
    """The number of samples in a block; the last one may be short."""
    return min(block_samples, samples - block * block_samples)


def step_samples(samples: int, batch_size: int, rank: int = 0, ranks: int = 1) -> int:
    """The samples that all ranks together see in a step: ``batch_size``, or all that the ranks can share if less.

    Raises ValueError for a rank that there is not, more ranks than samples, or a batch that they cannot share.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"there is no rank {rank}: there are {ranks}, counted from 0")
    if samples < ranks:
        raise ValueError(f"{samples} samples are too few for {ranks} ranks: start fewer")
    if batch_size < 1 or batch_size % ranks:
        raise ValueError(
            f"a batch of {batch_size} samples cannot be shared by {ranks} ranks: give a multiple of {ranks}"
        )
    return min(batch_size, samples - samples % ranks)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Steps of ``batch_size`` samples, over all ranks, in an epoch; one, smaller, where there are fewer samples."""
    return max(1, samples // batch_size)


def window_samples(bytes_per_sample: int, block_samples: int) -> int:
    """How many samples a window mixes: whole blocks, of 8,192 samples and 256 MiB at most, and one block at least.

    It follows from what is stored and not from the memory at hand, on which the order must not depend.
    """
    fitting = min(WINDOW_SAMPLES, WINDOW_BYTES // max(1, bytes_per_sample))
    return max(1, fitting // block_samples) * block_samples


def blocks_in_windows(samples: int, block_samples: int, window_samples: int) -> np.ndarray:
    """With which of an epoch's blocks, counted from 1, each window ends: int64 (windows,).

    A window has blocks of ``window_samples`` at most, a multiple of ``block_samples``, and as many as any other, give
    or take one: the batches of a small one at the end would come from few blocks.
    """
    blocks = -(-samples // block_samples)
    windows = -(-blocks // (window_samples // block_samples))
    return np.arange(1, windows + 1) * blocks // windows


def window_blocks(
    samples: int, block_samples: int, window_samples: int, batch_size: int, rank: int = 0, ranks: int = 1
) -> int:
    """The most blocks of which a rank can have rows in one window; ``batch_size`` is that of `step_samples`."""

    # Consecutive laid rows that end with a block have rows of at most so many blocks: up to ``short`` of them have as
    # little as one row in it, the others have all of theirs.
    def touched(rows: int, short: int) -> int:
        return min(rows, short + (rows - short) // block_samples)

    # A window has its own blocks, and before them what the one before has left, less than a batch. Short may be the
    # first of these, which was cut, and the store's last. Where blocks are whole batches, one block's end is left.
    own = int(np.diff(blocks_in_windows(samples, block_samples, window_samples), prepend=0).max())
    blocks = own + touched(batch_size - 1, 1 if block_samples % batch_size == 0 else 2)
    # A rank has rows of a part of that, where the last block may be cut too: it comes on top of those before it.
    first, stop = rank * batch_size // ranks // MIXED, -(-(rank + 1) * batch_size // ranks // MIXED)
    positions = min(batch_size, stop * MIXED) - first * MIXED
    rows = (own * block_samples + batch_size - 1) // batch_size * positions
    return min(-(-samples // block_samples), blocks, touched(rows - 1, 2) + 1)


def laid_blocks(samples: int, block_samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shuffled blocks of an epoch, and where each ends when their rows are laid end to end: int64 (blocks,)."""
    blocks = _generator(seed, _BLOCKS, epoch).permutation(-(-samples // block_samples))
    return blocks, np.cumsum(np.minimum(block_samples, samples - blocks * block_samples))


def window_stops(ends: np.ndarray, blocks_in_windows: np.ndarray, batch_size: int) -> list[int]:
    """Where each window stops among the laid rows: after its last whole batch. The next one starts there.

    So a window leaves less than a batch to the next, and the last one to none. One without a batch leaves all it has.
    """
    stops = np.unique(ends[blocks_in_windows - 1] // batch_size * batch_size)
    return stops[stops > 0].tolist()


def laid_samples(
    blocks: np.ndarray, ends: np.ndarray, block_samples: int, seed: int, epoch: int, start: int, stop: int
) -> np.ndarray:
    """The samples that lie from ``start`` to ``stop``, int64 (stop − start,); the rows of each block are shuffled."""
    first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
    lengths = np.diff(ends[first : last + 1], prepend=ends[first - 1] if first else 0)
    whole = [
        block * block_samples + _generator(seed, _ROWS, epoch, block).permutation(length)
        for block, length in zip(blocks[first : last + 1].tolist(), lengths.tolist(), strict=True)
    ]
    skipped = start - int(ends[first] - lengths[0])
    return np.concatenate(whole)[skipped : skipped + stop - start]


def mixed(rows: int, batch_size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Which of a window's laid rows each of its batches shows: int64 (rows // batch_size, batch_size).

    `MIXED` positions of all batches share so many times as many rows that lie together, in random order. So each batch
    is spread over the window, and a rank, which has consecutive positions, needs the blocks of a part of it. Two rows
    of a window are in one batch with the probability 1 / batches, those of one part with (`MIXED` - 1) / `MIXED` of it.
    With one position a part instead of `MIXED`, those of a block smaller than a part would not ever be.
    """
    batches, generator, laid = rows // batch_size, _generator(seed, _MIX, epoch, window), np.arange(rows)
    whole = rows - rows % (MIXED * batches)
    parts = laid[:whole].reshape(-1, MIXED * batches)
    generator.permuted(parts, axis=1, out=parts)
    generator.shuffle(laid[whole:])
    return laid.reshape(batch_size, batches).T


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

    Of each batch of `step_samples` a rank has one of ``ranks`` equal parts, in their order. What an epoch has beyond
    whole batches is not in any window; it is other samples each epoch. Windows that lie wholly before ``start_step``
    are passed over, so a training goes on in the middle of an epoch, on as many ranks as there are then.
    """
    batch_size = step_samples(samples, batch_size, rank, ranks)
    own = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
    dealt = blocks_in_windows(samples, block_samples, window_samples)
    start_epoch, skipped = divmod(start_step, steps_per_epoch(samples, batch_size))
    for epoch in count(start_epoch):
        blocks, ends = laid_blocks(samples, block_samples, seed, epoch)
        start = 0
        for number, stop in enumerate(window_stops(ends, dealt, batch_size)):
            if skipped * batch_size < stop - start:
                laid = laid_samples(blocks, ends, block_samples, seed, epoch, start, stop)
                yield Window(epoch, laid[mixed(stop - start, batch_size, seed, epoch, number)[skipped:, own].ravel()])
            skipped = max(0, skipped - (stop - start) // batch_size)
            start = stop


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


_BLOCKS, _DRAWS, _ROWS, _MIX = 1, 2, 3, 4  # random streams of one seed


def _generator(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose])
