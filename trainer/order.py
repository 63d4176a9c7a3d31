"""The order in which a student sees samples: pure functions of sizes, seed and epoch. Moves no bytes.

Samples come in blocks (the shards of a store). An epoch shuffles the blocks, takes them in windows of a few,
and shuffles the samples of each window, so a window is all that must be in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def blocks(samples: int, block_samples: int) -> list[tuple[int, int]]:
    """The (first, one after last) sample of each block."""
    return [(start, min(start + block_samples, samples)) for start in range(0, samples, block_samples)]


def windows(blocks: int, window_blocks: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Every block index once, shuffled, in windows of at most ``window_blocks``."""
    order = _generator(seed, epoch, 0).permutation(blocks)
    for first in range(0, blocks, window_blocks):
        yield order[first : first + window_blocks]


def within_window(samples: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of the samples inside a window: a permutation of range(samples)."""
    return _generator(seed, epoch, 1 + window).permutation(samples)


def draw_of_samples(start: int, stop: int, draws: int, seed: int, epoch: int) -> np.ndarray:
    """Which of its draws each sample in [start, stop) shows in an epoch: int64 (stop − start,).

    Each sample starts at a random draw of its own and goes on to the next with each epoch, so it has shown
    all of them after as many epochs.
    """
    first = np.random.Philox(key=np.array([seed, _DRAWS], np.uint64), counter=start).random_raw(4 * (stop - start))
    return ((first[::4] % np.uint64(draws)).astype(np.int64) + epoch) % draws


_ORDER, _DRAWS = 1, 2  # random streams of one seed


def _generator(seed: int, epoch: int, part: int) -> np.random.Generator:
    return np.random.default_rng([seed, _ORDER, epoch, part])
