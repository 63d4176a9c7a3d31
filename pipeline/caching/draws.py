"""Which class and which ε each draw of a sample explains: pure functions of (seed, draw, sample index).

So a store does not depend on batch size, shard size, workers or order, and one with more draws extends one
with fewer.
"""

from __future__ import annotations

import math

import numpy as np

CLASS_POLICY = "top-or-other"
DRAWS, MOST_DRAWS, MAPS = 4, 8, 20_000  # by default: draws of a sample, and maps of a store of few samples


def usual_draws(samples: int) -> int:
    """Return the draws of each sample by default: 4, and up to 8 for fewer than 5,000 samples, to which more draws help
    (docs/results/learning-curves.md)."""
    return min(MOST_DRAWS, max(DRAWS, math.ceil(MAPS / max(samples, 1))))


def uniforms(seed: int, stream: int, start: int, stop: int) -> np.ndarray:
    """Four numbers in [0, 1) for each sample in [start, stop): float64 (stop − start, 4).

    One block of the counter-based Philox generator a sample, keyed by (seed, stream).
    """
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=start)
    return (generator.random_raw(4 * (stop - start)) >> np.uint64(11)).reshape(-1, 4) * 2.0**-53


def target_classes(top: np.ndarray, classes: int, seed: int, draws: int, start: int) -> np.ndarray:
    """The explained classes, int64 (n, draws), of samples from ``start`` on whose top class is ``top`` (n,).

    With probability 0.5 the teacher's top class, otherwise one of the others, all alike: the other classes
    teach the student what says nothing about them.
    """
    columns = []
    for draw in range(draws):
        of_top, of_other, *_ = uniforms(seed, draw, start, start + len(top)).T
        other = (top + 1 + (of_other * (classes - 1)).astype(np.int64)) % classes
        columns.append(np.where(of_top < 0.5, top, other))
    return np.stack(columns, axis=1).astype(np.int64)


def epsilons(low: float, high: float, seed: int, draws: int, start: int, stop: int) -> np.ndarray:
    """ε of each draw, float32 (stop − start, draws): log-uniform in [low, high]."""
    exponents = np.stack([uniforms(seed, draw, start, stop)[:, 2] for draw in range(draws)], axis=1)
    return (low * (high / low) ** exponents).astype(np.float32)
