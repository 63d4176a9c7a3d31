"""What the stream promises: the order of `order.py`, whatever the threads, the memory and the delays."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import open_dataset
from teacher_cache import open_cache
from trainer.stream import order
from trainer.stream import stream as module
from trainer.stream.memory import free_memory
from trainer.stream.stream import (
    Share,
    Slots,
    Source,
    explained_source,
    labelled_source,
    plan_slots,
    read_block,
    stored_heatmaps,
    stream,
)

INT, FLOAT = np.dtype(np.int64), np.dtype(np.float32)


class Store:
    """A source whose every value tells its sample and draw, and which counts, delays and fails as it is told.

    While it fills a slot, the slot is full of −1, so whoever looks at it too early or too late finds that.
    """

    def __init__(self, samples: int, block_samples: int, draws: int = 1, delays: int | None = None, fail=lambda key: 0):
        self.samples, self.block_samples, self.draws = samples, block_samples, draws
        self.reads: Counter[tuple[int, ...]] = Counter()
        self._delays, self._fail = np.random.default_rng(delays) if delays is not None else None, fail
        self._lock = threading.Lock()

    def source(self) -> Source:
        draw_fields = {"draw_index": ((2,), INT), "draw": ((), FLOAT)}
        fields = {"index": ((), INT), "image": ((2, 3), FLOAT)}
        return Source(self.samples, self.block_samples, fields, self.read, self.draws, draw_fields, self.read_draw)

    def _fill(self, key: tuple[int, ...], out: dict[str, np.ndarray], **values: object) -> None:
        with self._lock:
            self.reads[key] += 1
            delay = 0.0 if self._delays is None else self._delays.exponential(0.0005)
        for array in out.values():
            array[...] = -1
        time.sleep(delay)
        if self._fail(key):
            raise OSError(f"the disk under block {key} is gone")
        for name, array in out.items():
            array[...] = np.reshape(values[name], (-1,) + (1,) * (array.ndim - 1))

    def _samples(self, block: int) -> np.ndarray:
        start = block * self.block_samples
        return np.arange(start, min(start + self.block_samples, self.samples))

    def read(self, block: int, out: dict[str, np.ndarray]) -> None:
        self._fill((block,), out, index=self._samples(block), image=self._samples(block))

    def read_draw(self, block: int, draw: int, out: dict[str, np.ndarray]) -> None:
        index = self._samples(block)
        self._fill((block, draw), out, draw_index=index, draw=np.full(len(index), draw))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows of 48 samples, so that small stores have several."""
    monkeypatch.setattr(order, "WINDOW_SAMPLES", 48)


def take(source: Source, steps: int, **options: object) -> list[dict[str, torch.Tensor]]:
    batches = stream(source, **{"batch_size": 8, "seed": 0, **options})
    found = list(islice(batches, steps))
    batches.close()
    return found


def expected(store: Store, steps: int, batch_size: int = 8, seed: int = 0, start_step: int = 0, **ranks: int):
    """The samples and draws of each step by the order alone, slow and obvious."""
    windows = order.windows(
        samples=store.samples,
        block_samples=store.block_samples,
        window_samples=store.source().window_samples,
        batch_size=batch_size,
        seed=seed,
        **ranks,
    )
    shown: list[tuple[int, int]] = []
    size = order.step_samples(store.samples, batch_size, **ranks) // ranks.get("ranks", 1)
    while len(shown) < (start_step + steps) * size:
        epoch, samples = next(windows)
        for sample in samples.tolist():
            draw = order.draw_of_block(sample // store.block_samples, store.draws, seed, epoch)
            shown.append((sample, draw))
    return [shown[step * size : (step + 1) * size] for step in range(start_step, start_step + steps)]


def found(batches: list[dict[str, torch.Tensor]]) -> list[list[tuple[int, int]]]:
    for batch in batches:  # the fields of a sample belong together, and none was looked at while it was written
        assert torch.equal(batch["index"], batch["sample"])
        assert torch.equal(batch["index"], batch["draw_index"][:, 0])
        assert torch.equal(batch["index"], batch["draw_index"][:, 1])
        assert (batch["image"] == batch["index"][:, None, None]).all()
    return [list(zip(b["index"].tolist(), b["draw"].int().tolist(), strict=True)) for b in batches]


@given(
    samples=st.integers(3, 300),
    block=st.integers(1, 30),
    draws=st.integers(1, 4),
    share=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    rank=st.integers(0, 2),
    ranks=st.sampled_from([1, 3]),
    workers=st.integers(1, 4),
    budget=st.one_of(st.none(), st.integers(0, 40_000)),
    delays=st.one_of(st.none(), st.integers(0, 100)),
    start_step=st.integers(0, 40),
)
@settings(deadline=None, max_examples=150)
def test_the_batches_are_those_of_the_order_whatever_workers_budget_delays_and_start(
    samples, block, draws, share, seed, rank, ranks, workers, budget, delays, start_step
):
    store = Store(samples, block, draws, delays)
    rank, batch = min(rank, ranks - 1), share * ranks
    steps = min(2 * order.steps_per_epoch(samples, batch) + 1, 60)
    where = {"batch_size": batch, "seed": seed, "start_step": start_step}
    batches = take(store.source(), steps, share=Share(rank, ranks), workers=workers, memory_budget=budget, **where)
    assert found(batches) == expected(store, steps, rank=rank, ranks=ranks, **where)


def test_started_at_any_step_the_stream_yields_what_the_uninterrupted_one_yields_from_there():
    store = Store(130, 16, draws=2)
    whole = found(take(store.source(), 40))
    for step in range(36):
        assert found(take(store.source(), 4, start_step=step)) == whole[step : step + 4]


def test_the_ranks_batches_of_a_step_are_the_batch_of_one_rank_alone():
    store = Store(330, 16, draws=2)
    whole = found(take(store.source(), 45, batch_size=24))
    for ranks in (2, 3, 4):
        parts = [found(take(store.source(), 45, batch_size=24, share=Share(rank, ranks))) for rank in range(ranks)]
        assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_a_rank_reads_its_share_of_the_blocks_and_two_more_of_each_window_at_most(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_SAMPLES", 256)
    samples, block, batch, ranks = 1024, 8, 32, 4
    windows = samples // 256 + 1  # of an epoch, and the first of the next, which is read ahead
    share = 256 // block // ranks
    for rank in range(ranks):
        store = Store(samples, block)
        take(store.source(), samples // batch, batch_size=batch, share=Share(rank, ranks), memory_budget=0)
        assert sum(len(key) == 1 for key in store.reads.elements()) <= windows * (share + 2)
        assert plan_slots(store.source(), 0, batch, rank, ranks)[0] <= 2 * (share + 2)


def test_a_batch_says_which_samples_it_has():
    batches = take(Store(160, 16).source(), 30, batch_size=12, share=Share(2, 3))
    for batch in batches:
        assert batch["sample"].dtype == torch.int64
        assert batch["sample"].shape == (4,)
        assert torch.equal(batch["sample"], batch["index"])


def test_ranks_that_cannot_share_a_batch_are_refused_before_anything_is_read():
    store = Store(160, 16)
    with pytest.raises(ValueError, match="a batch of 8 samples cannot be shared by 3 ranks"):
        stream(store.source(), batch_size=8, seed=0, share=Share(0, 3))
    with pytest.raises(ValueError, match="there is no rank 2: there are 2"):
        stream(store.source(), batch_size=8, seed=0, share=Share(2, 2))
    assert not store.reads
    assert not stream_threads()


def test_windows_before_the_start_are_not_read():
    store = Store(480, 16)
    step = order.steps_per_epoch(480, 8) - 1  # the last of the epoch
    batches = stream(store.source(), batch_size=8, seed=0, start_step=step)
    next(batches)
    batches.close()
    assert len([key for key in store.reads if len(key) == 1]) <= 3 + 3  # one window, and the first of the next epoch


def test_every_sample_is_shown_once_an_epoch_and_with_each_draw_in_as_many_epochs():
    store = Store(160, 16, draws=3)
    shown = Counter(pair for batch in found(take(store.source(), 3 * 20)) for pair in batch)
    assert shown == Counter({(sample, draw): 1 for sample in range(160) for draw in range(3)})


def test_batches_belong_to_the_consumer():
    batches = take(Store(160, 16).source(), 60, memory_budget=0)
    copies = [{name: values.clone() for name, values in batch.items()} for batch in batches]
    for batch in batches:
        for values in batch.values():
            values.fill_(-7)
    assert found(copies) == found(take(Store(160, 16).source(), 60))


def test_blocks_are_decoded_once_where_the_budget_holds_them_all():
    store = Store(300, 16, draws=3)
    take(store.source(), 9 * order.steps_per_epoch(300, 8))
    assert store.reads == Counter([(b,) for b in range(19)] + [(b, d) for b in range(19) for d in range(3)])


def test_more_memory_means_fewer_reads_and_what_is_needed_every_epoch_is_kept_first():
    def reads(budget: int) -> tuple[int, int]:
        store = Store(960, 16, draws=2)
        take(store.source(), 8 * 120, memory_budget=budget)
        by_length = Counter(map(len, store.reads.elements()))
        return by_length[1], by_length[2]

    source = Store(960, 16, draws=2).source()
    field, drawn = 60 * 16 * (8 + 24), 60 * 16 * (16 + 4)
    least = reads(0)
    assert all(count >= 8 * 60 * 0.8 for count in least)
    # room for about half of the blocks saves nearly half of the reads
    assert reads(field // 2 + drawn // 7)[0] < 0.75 * least[0]
    all_fields = reads(field + drawn // 7)
    assert all_fields[0] == 60
    assert all_fields[1] > 0.8 * least[1]
    assert reads(field + 2 * drawn) == (60, 120)
    assert plan_slots(source, field + 2 * drawn, 8) == (60, 120)


@given(
    samples=st.integers(4, 500),
    block=st.integers(1, 60),
    draws=st.integers(1, 5),
    budget=st.integers(0, 100_000),
    share=st.integers(1, 30),
    ranks=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None)
def test_memory_is_bounded_by_the_plan_and_the_plan_by_the_budget_or_two_windows(
    samples, block, draws, budget, share, ranks, data
):
    source = Store(samples, block, draws).source()
    own = (order.step_samples(samples, share * ranks, 0, ranks), data.draw(st.integers(0, ranks - 1)), ranks)
    slots, draw_slots = plan_slots(source, budget, *own)
    two_windows = 2 * order.window_blocks(samples, block, source.window_samples, *own)
    rows = min(block, samples)
    asked = rows * (slots * 32 + draw_slots * 20)
    least = rows * (min(two_windows, source.blocks) * 32 + min(two_windows, source.blocks * draws) * 20)
    assert asked <= max(budget, least)
    assert slots <= source.blocks
    assert draw_slots <= source.blocks * draws
    if budget >= rows * source.blocks * (32 + draws * 20):
        assert (slots, draw_slots) == (source.blocks, source.blocks * draws)


def test_no_more_is_allocated_than_planned(monkeypatch):
    tables: list[Slots] = []
    create = Slots.__init__

    def note(self: Slots, *arguments: object) -> None:
        create(self, *arguments)
        tables.append(self)

    monkeypatch.setattr(module.Slots, "__init__", note)
    source = Store(960, 16, draws=4).source()
    take(source, 300, memory_budget=0)
    assert plan_slots(source, 0, 8) == (8, 8)
    assert [table.slots for table in tables] == [8, 8]
    assert [len(array) for table in tables for array in table.arrays.values()] == [8 * 16] * 4


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


@pytest.mark.parametrize("failing", [(7,), (7, 0)])
def test_an_error_while_reading_reaches_the_consumer_as_it_is_after_the_batches_before_it(failing):
    store = Store(480, 16, fail=lambda key: key == failing)
    batches = stream(store.source(), batch_size=8, seed=0)
    shown = []
    with pytest.raises(OSError, match=r"^the disk under block \(7,.*\) is gone$"):
        shown.extend(islice(batches, 120))
    assert found(shown) == expected(store, len(shown))
    missed = {sample for batch in expected(store, 60)[len(shown) : len(shown) + 7] for sample, _ in batch}
    assert missed & set(range(7 * 16, 8 * 16))
    assert not stream_threads()


def test_closed_early_it_stops_its_threads_even_in_the_middle_of_reading():
    for steps in (0, 1, 3):
        batches = stream(Store(960, 16, draws=2, delays=0).source(), batch_size=8, seed=0, workers=3)
        for _ in range(steps):
            next(batches)
        batches.close()
        assert not stream_threads()


def test_forgotten_or_interrupted_it_stops_its_threads_too():
    batches = stream(Store(960, 16, delays=0).source(), batch_size=8, seed=0)
    next(batches)
    del batches
    gc.collect()
    assert not stream_threads()

    def interrupt(key: tuple[int, ...]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(stream(Store(960, 16, fail=interrupt).source(), batch_size=8, seed=0))
    assert not stream_threads()


def test_tensors_have_the_stored_types():
    kinds = ["uint8", "int8", "int64", "int32", "float16", "float32", "uint16", "bool"]
    fields = {kind: ((3,), np.dtype(kind)) for kind in kinds}

    def read(block: int, out: dict[str, np.ndarray]) -> None:
        for values in out.values():
            values[...] = 1

    (batch,) = take(Source(20, 4, fields, read), 1)
    for kind in kinds:
        assert batch[kind].dtype == getattr(torch, kind)
        assert (batch[kind].numpy() == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for CUDA")
def test_pinned_batches_hold_the_same():
    batches = take(Store(160, 16).source(), 60, pin_memory=True)
    assert all(values.is_pinned() for batch in batches for values in batch.values())
    assert found(batches) == found(take(Store(160, 16).source(), 60))


def test_the_sources_of_a_dataset_and_a_store_have_what_is_stored(dataset, cache):
    split, store = open_dataset(dataset).split("train"), open_cache(cache)
    labelled = labelled_source(split)
    blocks = [read_block(labelled, block, 0) for block in range(labelled.blocks)]
    for name, array in (("images", split.images), ("labels", split.labels)):
        assert np.array_equal(np.concatenate([block[name].numpy() for block in blocks]), array[:])
    explained = explained_source(split, store)
    assert (explained.samples, explained.draws) == (300, 2)
    whole = store.read_shard(0)
    for draw in range(2):
        block = read_block(explained, 0, draw)
        maps = stored_heatmaps(block["heatmaps"], block["scale"], "float16", torch.device("cpu"))
        assert block["heatmaps"].dtype == torch.float16
        assert np.array_equal(maps.numpy(), whole.heatmaps[:, draw])
        assert np.array_equal(block["target_class"].numpy(), whole.target_class[:, draw])
        assert np.array_equal(block["epsilon"].numpy(), whole.epsilon[:, draw])
        assert np.array_equal(block["images"].numpy(), split.images[:300])


def test_blocks_of_a_dataset_are_whole_chunks_of_about_two_mebibytes(tmp_path):
    import zarr

    from data import DatasetWriter

    def block_samples(images: np.ndarray, chunk: int | None) -> int:
        path = tmp_path / f"{images.shape}-{chunk}.zarr"
        with DatasetWriter(path) as writer:
            writer.write_split("train", images=images, labels=np.zeros(len(images), np.int64))
            writer.finish(class_names=["one"])
        if chunk is not None:
            group = zarr.open_group(str(path), mode="r+")["train"]
            del group["images"]
            group.create_array("images", data=images, chunks=(chunk, *images.shape[1:]))
        return labelled_source(open_dataset(path).split("train")).block_samples

    small, large = np.zeros((3000, 1, 8, 8), np.uint8), np.zeros((40, 3, 224, 224), np.uint8)
    assert block_samples(small, 100) == 1000
    assert block_samples(small, 2000) == 2000
    assert block_samples(large, None) == 8
    assert block_samples(large, 4) == 12


def test_free_memory_is_what_the_machine_or_the_control_group_leaves(tmp_path):
    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("--", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    assert free_memory() > 2**20
    write(proc__meminfo="MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup/job"
    (group / "step").mkdir(parents=True)
    for folder, limit in ((group, "6000000\n"), (group / "step", "max\n")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("5000000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 2000000\n")
    assert free_memory(tmp_path) == 3_000_000  # the outer group's limit, and page cache gives way
    (tmp_path / "proc/self/cgroup").write_text("9:name=systemd:/\n4:memory:/elsewhere\n0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("700000")
    (group / "memory.usage_in_bytes").write_text("600000")
    (group / "memory.stat").write_text("total_inactive_file 0\n")
    assert free_memory(tmp_path) == 100_000
    (group / "memory.limit_in_bytes").write_text("500000")
    assert free_memory(tmp_path) == 0
