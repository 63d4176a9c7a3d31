"""What the order of samples promises: pure functions, tested without files."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draws import epsilons, target_classes, uniforms
from trainer import order
from trainer.stream import stream

SEEDS = st.integers(0, 2**63 - 1)


@given(samples=st.integers(1, 400), block=st.integers(1, 50), window=st.integers(1, 6), seed=SEEDS, epoch=SEEDS)
@settings(deadline=None)
def test_an_epoch_shows_every_block_once(samples, block, window, seed, epoch):
    ranges = order.blocks(samples, block)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(samples))
    chunks = list(order.windows(len(ranges), window, seed, epoch))
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(ranges)))
    assert max(map(len, chunks)) <= window


@given(n=st.integers(0, 300), seed=SEEDS, epoch=st.integers(0, 1000), window=st.integers(0, 1000))
@settings(deadline=None)
def test_a_window_is_a_permutation(n, seed, epoch, window):
    assert sorted(order.within_window(n, seed, epoch, window)) == list(range(n))


@given(start=st.integers(0, 10**6), n=st.integers(1, 200), draws=st.integers(1, 12), seed=SEEDS)
@settings(deadline=None)
def test_a_sample_shows_all_its_draws_in_as_many_epochs_whatever_its_block(start, n, draws, seed):
    epochs = np.stack([order.draw_of_samples(start, start + n, draws, seed, epoch) for epoch in range(draws)])
    assert (np.sort(epochs, axis=0) == np.arange(draws)[:, None]).all()
    cut = n // 2
    parts = [
        order.draw_of_samples(first, last, draws, seed, 0)
        for first, last in ((start, start + cut), (start + cut, start + n))
    ]
    assert np.array_equal(np.concatenate(parts), epochs[0])


def collect(samples: int, block: int, batch: int, epochs: int, seed: int = 0) -> list[np.ndarray]:
    def read(start: int, stop: int, epoch: int) -> dict[str, np.ndarray]:
        return {"index": np.arange(start, stop)}

    steps = epochs * max(1, samples // batch)
    batches = stream(read, samples, block, batch_size=batch, seed=seed)
    found = [b["index"] for b in islice(batches, steps)]
    batches.close()
    return found


@given(samples=st.integers(1, 300), block=st.integers(1, 64), batch=st.integers(1, 80))
@settings(deadline=None, max_examples=40)
def test_the_stream_shows_each_sample_at_most_once_an_epoch_in_whole_batches(samples, block, batch):
    batches = collect(samples, block, batch, epochs=2)
    size, per_epoch = min(batch, samples), max(1, samples // batch)
    assert all(len(b) == size for b in batches)
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        shown = np.concatenate(epoch)
        assert len(np.unique(shown)) == len(shown) >= samples - size + 1 - (size == samples)


def test_the_order_of_the_stream_depends_on_seed_and_epoch_and_nothing_else():
    first, again, other = (np.concatenate(collect(500, 16, 50, 2, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:500], first[500:])


def test_an_error_while_reading_reaches_the_consumer():
    def read(start: int, stop: int, epoch: int) -> dict[str, np.ndarray]:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(stream(read, 10, 4, batch_size=2, seed=0))


@given(start=st.integers(0, 10**9), n=st.integers(1, 100), draws=st.integers(1, 6), seed=SEEDS)
@settings(deadline=None)
def test_draws_of_a_sample_depend_on_seed_and_index_alone_and_more_draws_extend_fewer(start, n, draws, seed):
    top = np.arange(n) % 7
    classes, epsilon = target_classes(top, 7, seed, draws, start), epsilons(0.01, 1, seed, draws, start, start + n)
    i = n // 2
    assert np.array_equal(target_classes(top[i:], 7, seed, draws, start + i), classes[i:])
    assert np.array_equal(epsilons(0.01, 1, seed, draws, start + i, start + n), epsilon[i:])
    assert np.array_equal(target_classes(top, 7, seed, draws + 2, start)[:, :draws], classes)
    assert np.array_equal(epsilons(0.01, 1, seed, draws + 2, start, start + n)[:, :draws], epsilon)
    assert ((classes >= 0) & (classes < 7)).all()
    assert ((epsilon >= np.float32(0.01)) & (epsilon <= 1)).all()


def test_draws_are_distributed_as_designed():
    n = 40_000
    top = np.full(n, 3)
    classes = target_classes(top, 10, seed=0, draws=1, start=0)[:, 0]
    shares = np.bincount(classes, minlength=10) / n
    assert abs(shares[3] - 0.5) < 0.01
    assert np.abs(np.delete(shares, 3) - 0.5 / 9).max() < 0.005
    logs = np.log10(epsilons(0.01, 1.0, seed=0, draws=1, start=0, stop=n)[:, 0])
    assert np.abs(np.histogram(logs, bins=10, range=(-2, 0))[0] / n - 0.1).max() < 0.01
    pairs = uniforms(0, 0, 0, n)
    assert np.abs(np.corrcoef(pairs.T) - np.eye(4)).max() < 0.02
