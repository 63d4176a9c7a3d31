"""What the order of samples promises: pure functions, tested without files."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draws import epsilons, target_classes, uniforms
from trainer import order

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**40)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Samples, block size, window size and ranks that fit together."""
    ranks = draw(st.integers(1, 5))
    block = draw(st.integers(1, 50))
    return {
        "samples": draw(st.integers(ranks, 400)),
        "block_samples": block,
        "window_samples": block * draw(st.integers(1, 6)),
        "ranks": ranks,
    }


def seen(epochs: int, block_samples: int, **options: int) -> list[np.ndarray]:
    """The sample indices that a rank sees in each of the first epochs, in order."""
    shown: list[list[np.ndarray]] = [[] for _ in range(epochs)]
    windows = order.windows(block_samples=block_samples, **options)
    for window in takewhile(lambda window: window.epoch < epochs, windows):
        shown[window.epoch].append(window.blocks * block_samples + window.rows)
    return [np.concatenate(parts) for parts in shown]


@given(sizes=sizes(), seed=SEEDS, epoch=EPOCHS)
@settings(deadline=None)
def test_the_ranks_parts_are_disjoint_equal_and_within_the_store(sizes, seed, epoch):
    samples, block, ranks = sizes["samples"], sizes["block_samples"], sizes["ranks"]
    parts = []
    for rank in range(ranks):
        pieces = order.pieces(samples, block, seed, epoch, rank, ranks)
        assert all(0 <= first < stop <= order.block_rows(b, samples, block) for b, first, stop in pieces.tolist())
        parts.append([b * block + row for b, first, stop in pieces.tolist() for row in range(first, stop)])
        # a part is contiguous in the shuffled blocks, so only the blocks at its edges may be cut
        assert all(stop - first == order.block_rows(b, samples, block) for b, first, stop in pieces[1:-1].tolist())
    assert {len(part) for part in parts} == {samples // ranks}
    assert len(np.unique(np.concatenate(parts))) == ranks * (samples // ranks)


@given(sizes=sizes(), seed=SEEDS, epoch=EPOCHS)
@settings(deadline=None)
def test_windows_are_whole_pieces_in_their_order_and_bounded(sizes, seed, epoch):
    samples, block, window, ranks = sizes.values()
    for rank in range(ranks):
        pieces = order.pieces(samples, block, seed, epoch, rank, ranks)
        windows = order.group(pieces, window)
        assert np.array_equal(np.concatenate(windows), pieces)
        for chosen in windows:
            assert (chosen[:, 2] - chosen[:, 1]).sum() <= window
            assert 1 <= len(chosen) <= order.window_blocks(samples, block, window, ranks)


def test_a_window_may_have_pieces_of_as_many_blocks_as_is_said():
    found = [len(order.group(order.pieces(57, 10, 0, epoch, 1, 3), 20)[0]) for epoch in range(50)]
    assert max(found) == order.window_blocks(57, 10, 20, 3) == 4  # 20 samples: a full block, and three short pieces


@given(sizes=sizes(), seed=SEEDS, epoch=EPOCHS, number=st.integers(0, 1000))
@settings(deadline=None)
def test_a_window_shows_each_of_its_rows_once_and_any_stretch_of_them_is_a_slice(sizes, seed, epoch, number):
    samples, block, window, ranks = sizes.values()
    (chosen, *_) = order.group(order.pieces(samples, block, seed, epoch, 0, ranks), window)
    blocks, rows = order.shuffled_rows(chosen, seed, epoch, 0, number)
    expected = [(b, row) for b, first, stop in chosen.tolist() for row in range(first, stop)]  # slow and obvious
    assert sorted(zip(blocks.tolist(), rows.tolist(), strict=True)) == sorted(expected)
    first, stop = len(rows) // 3, len(rows) // 2
    some_blocks, some_rows = order.shuffled_rows(chosen, seed, epoch, 0, number, first, stop)
    assert np.array_equal(some_blocks, blocks[first:stop])
    assert np.array_equal(some_rows, rows[first:stop])


@given(sizes=sizes(), batch=st.integers(1, 80), seed=SEEDS)
@settings(deadline=None)
def test_an_epoch_is_whole_batches_of_samples_shown_once_as_many_for_every_rank(sizes, batch, seed):
    samples, ranks = sizes["samples"], sizes["ranks"]
    parts = [seen(2, batch_size=batch, seed=seed, rank=rank, **sizes) for rank in range(ranks)]
    steps, size = order.steps_per_epoch(samples, batch, ranks), min(batch, samples // ranks)
    for epoch in range(2):
        assert all(len(part[epoch]) == steps * size for part in parts)
        shown = np.concatenate([part[epoch] for part in parts])
        assert len(np.unique(shown)) == len(shown)
        if ranks == 1 and samples % size == 0:
            assert np.array_equal(np.sort(shown), np.arange(samples))


@given(sizes=sizes(), batch=st.integers(1, 80), seed=SEEDS, data=st.data())
@settings(deadline=None)
def test_from_a_step_on_the_order_is_the_tail_of_the_whole(sizes, batch, seed, data):
    samples, ranks = sizes["samples"], sizes["ranks"]
    options = {"batch_size": batch, "seed": seed, "rank": data.draw(st.integers(0, ranks - 1)), **sizes}
    steps, size = order.steps_per_epoch(samples, batch, ranks), min(batch, samples // ranks)
    step = data.draw(st.integers(0, 2 * steps - 1))
    assert order.position(step, samples, batch, ranks) == (step // steps, step % steps * batch)
    _, blocks, rows = next(order.windows(start_step=step, **options))
    whole = np.concatenate(seen(2, **options))
    assert np.array_equal(whole[step * size :][: len(rows)], blocks * sizes["block_samples"] + rows)
    rest = [
        window.blocks * sizes["block_samples"] + window.rows
        for window in takewhile(lambda window: window.epoch < 2, order.windows(start_step=step, **options))
    ]
    assert np.array_equal(np.concatenate(rest), whole[step * size :])


def test_the_order_depends_on_seed_epoch_and_rank():
    options = {"samples": 500, "block_samples": 16, "window_samples": 64, "batch_size": 50}
    first, second = seen(2, seed=0, **options)
    assert np.array_equal(first, seen(1, seed=0, **options)[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, seen(1, seed=1, **options)[0])


def test_no_two_windows_shuffle_their_rows_alike():
    piece = np.array([[0, 0, 100]])
    orders = [
        order.shuffled_rows(piece, seed, epoch, rank, number)[1].tolist()
        for seed in range(2)
        for epoch in range(2)
        for rank in range(2)
        for number in range(2)
    ]
    assert len(set(map(tuple, orders))) == 16


def test_what_is_left_over_differs_from_epoch_to_epoch():
    shown = seen(20, seed=0, samples=103, block_samples=10, window_samples=30, batch_size=10)
    assert len(np.unique(np.concatenate(shown))) == 103
    assert {len(part) for part in shown} == {100}


def test_a_batch_mixes_blocks():
    options = {"samples": 4096, "block_samples": 64, "window_samples": 512, "batch_size": 64}
    (shown,) = seen(1, seed=0, **options)
    for batch in shown.reshape(-1, 64):
        assert len(np.unique(batch // 64)) >= 6  # of the 8 in a window


@given(bytes_per_sample=st.integers(0, 2**40), block=st.integers(1, 20_000))
def test_a_window_is_whole_blocks_within_bounds_or_one_block(bytes_per_sample, block):
    found = order.window_samples(bytes_per_sample, block)
    assert found % block == 0
    assert found == block or (found <= 8192 and found * bytes_per_sample <= 2**28)


def test_ranks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="there is no rank 2: there are 2"):
        order.samples_of_rank(10, 2, 2)
    with pytest.raises(ValueError, match="3 samples are too few for 4 ranks"):
        order.samples_of_rank(3, 0, 4)


@given(block=st.integers(0, 10**9), draws=st.integers(1, 12), seed=SEEDS, epoch=EPOCHS)
def test_a_block_shows_all_its_draws_in_as_many_epochs(block, draws, seed, epoch):
    shown = [order.draw_of_block(block, draws, seed, epoch + later) for later in range(draws)]
    assert sorted(shown) == list(range(draws))


def test_blocks_start_at_different_draws():
    shown = [order.draw_of_block(block, 4, 0, 0) for block in range(4000)]
    assert np.abs(np.bincount(shown) / 4000 - 0.25).max() < 0.03


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
