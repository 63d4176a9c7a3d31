"""What the order of samples promises: pure functions, tested without files."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.caching.draws import epsilons, target_classes, uniforms
from trainer.stream import order

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**40)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Samples, block, window and batch size, and ranks that can share a batch."""
    ranks, block = draw(st.integers(1, 6)), draw(st.integers(1, 50))
    return {
        "samples": draw(st.integers(ranks, 400)),
        "block_samples": block,
        "window_samples": block * draw(st.integers(1, 6)),
        "batch_size": ranks * draw(st.integers(1, 20)),
        "ranks": ranks,
    }


def windows_of(epochs: int, **options: int) -> list[order.Window]:
    """What a rank sees of the first epochs."""
    return list(takewhile(lambda window: window.epoch < epochs, order.windows(**options)))


def seen(epochs: int, **options: int) -> list[np.ndarray]:
    """The samples that a rank sees in each of the first epochs, in order."""
    shown: list[list[np.ndarray]] = [[] for _ in range(epochs)]
    for window in windows_of(epochs, **options):
        shown[window.epoch].append(window.samples)
    return [np.concatenate(parts) for parts in shown]


def alone(sizes: dict[str, int]) -> dict[str, int]:
    """One rank with the batches that those ranks share: fewer samples than a batch are as many as they can share."""
    whole = order.step_samples(sizes["samples"], sizes["batch_size"], 0, sizes["ranks"])
    return {**sizes, "batch_size": whole, "ranks": 1}


@given(sizes=sizes(), seed=SEEDS)
@settings(deadline=None)
def test_the_ranks_batches_of_a_step_are_the_batch_of_one_rank_alone_in_equal_parts(sizes, seed):
    single, ranks = alone(sizes), sizes["ranks"]
    batches = np.concatenate(seen(2, seed=seed, **single)).reshape(-1, single["batch_size"])
    parts = [np.concatenate(seen(2, seed=seed, rank=rank, **sizes)) for rank in range(ranks)]
    assert np.array_equal(np.concatenate([part.reshape(len(batches), -1) for part in parts], axis=1), batches)
    assert len({len(part) for part in parts}) == 1
    if sizes["samples"] >= sizes["batch_size"] or sizes["samples"] % ranks == 0:
        assert np.array_equal(batches.ravel(), np.concatenate(seen(2, seed=seed, **{**sizes, "ranks": 1})))


@given(sizes=sizes(), seed=SEEDS)
@settings(deadline=None)
def test_an_epoch_is_whole_batches_of_samples_shown_once_and_of_all_samples_that_fill_them(sizes, seed):
    samples, ranks = sizes["samples"], sizes["ranks"]
    parts = [seen(2, seed=seed, rank=rank, **sizes) for rank in range(ranks)]
    steps = order.steps_per_epoch(samples, sizes["batch_size"])
    for epoch in range(2):
        shown = np.concatenate([part[epoch] for part in parts])
        assert len(shown) == steps * order.step_samples(samples, sizes["batch_size"], 0, ranks)
        assert len(np.unique(shown)) == len(shown)
        assert 0 <= shown.min() <= shown.max() < samples
    assert steps * sizes["batch_size"] > samples - sizes["batch_size"]


@given(sizes=sizes(), seed=SEEDS, data=st.data())
@settings(deadline=None)
def test_from_a_step_on_the_order_is_the_tail_of_the_whole_on_any_number_of_ranks(sizes, seed, data):
    single = alone(sizes)
    batches = np.concatenate(seen(2, seed=seed, **single)).reshape(-1, single["batch_size"])
    step = data.draw(st.integers(0, len(batches) - 1))
    rank, size = data.draw(st.integers(0, sizes["ranks"] - 1)), single["batch_size"] // sizes["ranks"]
    rest = windows_of(2, seed=seed, start_step=step, rank=rank, **sizes)
    own = batches[step:, rank * size : (rank + 1) * size]
    assert np.array_equal(np.concatenate([window.samples for window in rest]), own.ravel())
    assert rest[0].epoch == step // order.steps_per_epoch(sizes["samples"], sizes["batch_size"])


@given(sizes=sizes(), seed=SEEDS, epoch=EPOCHS)
@settings(deadline=None)
def test_windows_are_whole_batches_of_equally_many_blocks_and_of_what_the_one_before_left(sizes, seed, epoch):
    samples, block, window, batch, _ = alone(sizes).values()
    blocks, ends = order.laid_blocks(samples, block, seed, epoch)
    dealt = order.blocks_in_windows(samples, block, window)
    numbers = np.diff(dealt, prepend=0)
    assert dealt[-1] == len(blocks)
    assert numbers.max() * block <= window
    assert numbers.max() - numbers.min() <= 1
    assert (len(dealt) - 1) * window < len(blocks) * block  # no more windows than are needed
    expected, left = [0], 0  # slow and obvious
    for chosen in np.split(blocks, dealt[:-1]):
        left += sum(order.block_rows(number, samples, block) for number in chosen.tolist())
        if left >= batch:
            expected.append(expected[-1] + left // batch * batch)
            left %= batch
    assert order.window_stops(ends, dealt, batch) == expected[1:]
    assert np.diff(expected).max() < window + batch


@given(sizes=sizes(), seed=SEEDS, epoch=EPOCHS, data=st.data())
@settings(deadline=None)
def test_samples_are_laid_block_after_block_and_any_stretch_of_them_is_a_slice(sizes, seed, epoch, data):
    samples, block = sizes["samples"], sizes["block_samples"]
    blocks, ends = order.laid_blocks(samples, block, seed, epoch)
    laid = order.laid_samples(blocks, ends, block, seed, epoch, 0, samples)
    assert np.array_equal(np.sort(laid), np.arange(samples))
    rows = [order.block_rows(number, samples, block) for number in blocks.tolist()]
    assert np.array_equal(laid // block, np.repeat(blocks, rows))
    assert np.array_equal(ends, np.cumsum(rows))
    start = data.draw(st.integers(0, samples - 1))
    stop = data.draw(st.integers(start + 1, samples))
    assert np.array_equal(order.laid_samples(blocks, ends, block, seed, epoch, start, stop), laid[start:stop])


@given(batch=st.integers(1, 40), batches=st.integers(1, 20), seed=SEEDS, epoch=EPOCHS, number=st.integers(0, 1000))
@settings(deadline=None)
def test_every_batch_is_spread_over_the_window_and_some_positions_over_a_part_of_it(
    batch, batches, seed, epoch, number
):
    shown = order.mixed(batch * batches, batch, seed, epoch, number)
    assert shown.shape == (batches, batch)
    for first in range(0, batch, order.MIXED):
        part = shown[:, first : first + order.MIXED]
        assert np.array_equal(np.sort(part, axis=None), first * batches + np.arange(part.size))


@given(sizes=sizes(), seed=SEEDS)
@settings(deadline=None)
def test_a_rank_has_rows_of_no_more_blocks_than_are_said_nor_of_more_than_its_share_and_two(sizes, seed):
    samples, block, window, batch, _ = alone(sizes).values()
    for rank in range(sizes["ranks"]):
        most = order.window_blocks(samples, block, window, batch, rank, sizes["ranks"])
        for shown in windows_of(2, seed=seed, rank=rank, **sizes):
            blocks = len(np.unique(shown.samples // block))
            assert blocks <= most
            if batch // sizes["ranks"] % order.MIXED == 0:
                assert blocks <= -(-len(shown.samples) // block) + 2


@pytest.mark.parametrize(
    ("samples", "block", "window", "batch", "rank", "ranks", "blocks"),
    [
        (73, 8, 24, 4, 0, 1, 4),  # three of its own, and one that the window before has left
        (73, 8, 24, 6, 0, 1, 5),  # or two, one of them the short one
        (71, 7, 7, 20, 0, 1, 5),  # a batch of more than a window
        (361, 9, 45, 8, 0, 2, 5),  # of half a window, which starts and ends within a block
    ],
)
def test_a_rank_may_have_rows_of_as_many_blocks_as_are_said(samples, block, window, batch, rank, ranks, blocks):
    sizes = {"samples": samples, "block_samples": block, "window_samples": window, "batch_size": batch}
    own = {**sizes, "rank": rank, "ranks": ranks}
    found = [len(np.unique(shown.samples // block)) for shown in windows_of(100, seed=0, **own)]
    assert max(found) == order.window_blocks(**own) == blocks


def test_the_order_depends_on_seed_and_epoch():
    options = {"samples": 500, "block_samples": 16, "window_samples": 64, "batch_size": 50}
    first, second = seen(2, seed=0, **options)
    assert np.array_equal(first, seen(1, seed=0, **options)[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, seen(1, seed=1, **options)[0])


def test_no_two_windows_are_mixed_alike_and_no_two_blocks_laid_alike():
    keys = [(seed, epoch, number) for seed in range(2) for epoch in range(2) for number in range(2)]
    for part in (slice(0, order.MIXED), slice(order.MIXED, None)):  # the last has fewer positions
        assert len({order.mixed(96, order.MIXED + 2, *key)[:, part].tobytes() for key in keys}) == 8
    block, end = np.array([[0], [1]]), np.array([20])
    laid = [order.laid_samples(block[number], end, 20, seed, epoch, 0, 20) % 20 for seed, epoch, number in keys]
    assert len({rows.tobytes() for rows in laid}) == 8


def test_what_is_left_over_differs_from_epoch_to_epoch():
    shown = seen(20, seed=0, samples=103, block_samples=10, window_samples=30, batch_size=10)
    assert len(np.unique(np.concatenate(shown))) == 103
    assert {len(part) for part in shown} == {100}


def test_a_batch_mixes_blocks():
    options = {"samples": 4096, "block_samples": 64, "window_samples": 512, "batch_size": 64}
    (shown,) = seen(1, seed=0, **options)
    for batch in shown.reshape(-1, 64):
        assert len(np.unique(batch // 64)) == 8  # all in a window


def test_a_sample_is_shown_as_often_in_any_part_of_an_epoch_and_in_any_part_of_a_batch():
    epochs, samples, batch = 400, 240, 24
    options = {"samples": samples, "block_samples": 20, "window_samples": 80, "batch_size": batch}
    places = np.argsort(np.stack(seen(epochs, seed=0, **options)), axis=1)  # (epochs, samples)
    for part in (places * 8 // samples, places % batch * 8 // batch):
        counts = np.stack([(part == number).sum(axis=0) for number in range(8)])  # (8, samples)
        statistic = ((counts - epochs / 8) ** 2 / (epochs / 8)).sum(axis=0)  # χ² of 7 degrees of freedom each
        assert 6 < statistic.mean() < 8
        assert statistic.max() < 40  # which one in a million exceeds


@pytest.mark.parametrize("block", [5, 16, 64])  # of which a window shows 16 in a row at a position of its batches
def test_any_two_samples_of_a_block_are_in_one_batch_about_as_often_as_chance_has_it(block):
    epochs, batch, window, samples = 600, 16, 256 // block * block, 512 // block * block
    options = {"samples": samples, "block_samples": block, "window_samples": window, "batch_size": batch}
    together = np.zeros((samples // block, block, block), np.int64)
    for shown in seen(epochs, seed=0, **options):
        batch_of = np.full(samples, -1 - np.arange(samples))  # nobody's, where a sample is not shown
        batch_of[shown] = np.arange(len(shown)) // batch
        blocks = batch_of.reshape(-1, block)
        together += blocks[:, :, None] == blocks[:, None]
    counts = together[:, *np.triu_indices(block, 1)]
    assert 0.7 < counts.mean() / (epochs * (batch - 1) / (window - 1)) < 1.1
    assert 0.8 < counts.var() / counts.mean() < 1.2  # as of independent events: no two meet more often than others
    assert counts.min() > 0


@given(bytes_per_sample=st.integers(0, 2**40), block=st.integers(1, 20_000))
def test_a_window_is_whole_blocks_within_bounds_or_one_block(bytes_per_sample, block):
    found = order.window_samples(bytes_per_sample, block)
    assert found % block == 0
    assert found == block or (found <= 8192 and found * bytes_per_sample <= 2**28)


def test_ranks_and_batches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="there is no rank 2: there are 2"):
        order.step_samples(10, 4, 2, 2)
    with pytest.raises(ValueError, match="3 samples are too few for 4 ranks"):
        order.step_samples(3, 4, 0, 4)
    with pytest.raises(ValueError, match="a batch of 10 samples cannot be shared by 4 ranks: give a multiple of 4"):
        order.step_samples(100, 10, 0, 4)
    with pytest.raises(ValueError, match="a batch of 0 samples"):
        order.step_samples(100, 0)


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
