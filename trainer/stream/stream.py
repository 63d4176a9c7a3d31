"""Batches at the speed of memory, in the order of `order.py`, within bounded memory.

Threads decode blocks straight into *slots*, rows of large preallocated arrays; a batch is gathered from them with one
copy. Where there are slots for everything, each block is decoded once; otherwise it is decoded again when it is needed
again. The code and the order are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import DatasetError, Split
from options import Call, Message
from pipeline.device import to_device
from teacher_cache import PRECISIONS, Cache, CacheError
from teacher_cache.codec import dequantise
from trainer.stream import order
from trainer.stream.memory import free_memory

Field = tuple[tuple[int, ...], np.dtype[Any]]  # shape of one sample, dtype
Arrays = dict[str, np.ndarray]
Batch = dict[str, Tensor]
Key = tuple[int, ...]  # (block,) or (block, draw)

BLOCK_SAMPLES, BLOCK_BYTES = 1024, 2**21  # of a block of a dataset without a store


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Source:
    """Samples in blocks, and the functions that read one block.

    ``fields`` are the same in all draws, ``draw_fields`` differ. ``read(block, out)`` and
    ``read_draw(block, draw, out)`` fill ``out``, one array for each field with the block's samples on the first axis.
    They are called from several threads; the consumer gets the errors that they raise.
    """

    samples: int
    block_samples: int
    fields: Mapping[str, Field]
    read: Callable[[int, Arrays], object]
    draws: int = 1
    draw_fields: Mapping[str, Field] = field(default_factory=dict)
    read_draw: Callable[[int, int, Arrays], object] = _nothing

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.samples // self.block_samples)

    @property
    def slot_rows(self) -> int:
        """The rows of a slot: samples of the largest block."""
        return min(self.block_samples, self.samples)

    @property
    def window_samples(self) -> int:
        """The samples of a window, within which the order is shuffled."""
        return order.window_samples(row_bytes(self.fields) + row_bytes(self.draw_fields), self.block_samples)


@dataclass(frozen=True)
class Share:
    """The part of each batch that a process takes: ``rank`` counts from 0, ``ranks`` is the number of processes."""

    rank: int = 0
    ranks: int = 1


def stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    share: Share = Share(),
    workers: int = 2,
    memory_budget: int | None = None,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Stream shuffled batches: this rank's part of each step, epoch after epoch without end.

    The batches of a step, concatenated over the ranks, are the batch of a single rank: the order depends on the
    source's sizes, ``batch_size`` and ``seed`` alone. Samples that are left over at the end of an epoch are dropped.
    Where there are fewer samples than ``batch_size``, a step has all of them, as far as the ranks can share them.
    Close the generator to stop its threads.

    Args:
        source: the samples.
        batch_size: samples of a step, over all ranks.
        seed: the seed of the order and the draws.
        start_step: the step to start from; from there on, batches are those of a stream that started at 0.
        share: this rank, and the number of ranks.
        workers: threads, which read the next window ahead.
        memory_budget: bytes for the decoded data of this rank; None means half of the free memory, shared by the
            ranks. Decoded data stays while the budget has room. The rank's blocks of two windows, each of 256 MiB at
            most or one block, and of a batch, are always held.
        pin_memory: whether batches lie in pinned memory, for CUDA.

    Yields:
        Batches with every field as a new tensor (batch_size / ranks, …) of the stored dtype, and ``sample``, int64
        (batch_size / ranks,), the index of each sample.

    Raises:
        ValueError: the rank does not exist, there are more ranks than samples, or they cannot share a batch.
    """
    rank, ranks = share.rank, share.ranks
    batch_size = order.step_samples(source.samples, batch_size, rank, ranks)
    if memory_budget is None:
        memory_budget = free_memory() // (2 * ranks)
    slots, draw_slots = plan_slots(source, memory_budget, batch_size, rank, ranks)
    windows = order.windows(
        samples=source.samples,
        block_samples=source.block_samples,
        window_samples=source.window_samples,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        rank=rank,
        ranks=ranks,
    )

    def block_and_draw(block: int, epoch: int) -> Key:
        return block, order.draw_of_block(block, source.draws, seed, epoch)

    shared = Slots(source, source.fields, source.read, slots, lambda block, epoch: (block,))
    drawn = Slots(source, source.draw_fields, source.read_draw, draw_slots, block_and_draw)
    tables = [table for table in (shared, drawn) if table.arrays]
    return _batches(windows, tables, batch_size // ranks, workers, pin_memory)


def plan_slots(source: Source, memory_budget: int, batch_size: int, rank: int = 0, ranks: int = 1) -> tuple[int, int]:
    """Plan the slots: enough for two windows, and as many more as the budget has room for.

    ``fields`` come first: they are needed in every epoch, a draw only in every ``draws``-th.

    Args:
        source: the samples.
        memory_budget: bytes for the slots of this rank.
        batch_size: samples of a step, over all ranks, that the ranks can share.
        rank, ranks: this rank, and the number of ranks.

    Returns:
        The numbers of slots for ``fields`` and for ``draw_fields``.
    """
    window_blocks = order.window_blocks(
        source.samples, source.block_samples, source.window_samples, batch_size, rank, ranks
    )
    left, counts = memory_budget, []
    tables = ((source.fields, source.blocks), (source.draw_fields, source.blocks * source.draws))
    least = [min(2 * window_blocks, most) for _, most in tables]
    sizes = [max(1, source.slot_rows * row_bytes(fields)) for fields, _ in tables]
    left -= sum(count * size for count, size in zip(least, sizes, strict=True))
    for (_, most), count, size in zip(tables, least, sizes, strict=True):
        more = min(max(0, left // size), most - count)
        left -= more * size
        counts.append(count + more)
    return counts[0], counts[1]


class Slots:
    """One preallocated array for each field, in slots of a block's size, and a table of the blocks in the slots.

    A single thread uses it. A read gets views of the rows of its slot. The slot is held from before the read starts
    until it is released, and only slots that are not held are filled again. So no row is read while it is written, if
    the holder of a slot waits for its read, and releases it after the last use.

    Args:
        source: the samples.
        fields: those that the slots have.
        read: fills the rows of a slot; takes the parts of a key, and the rows.
        slots: the number of slots.
        key: returns the key of a block in an epoch.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, Field],
        read: Callable[..., object],
        slots: int,
        key: Callable[[int, int], Key],
    ):
        self._source, self._read, self._key, self.slots = source, read, key, slots
        # np.empty: the system commits the memory of a slot when it is first written
        rows = slots * source.slot_rows
        self.arrays = {name: np.empty((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}
        self._slot_of: dict[Key, int] = {}
        self._starts: tuple[int, np.ndarray] | None = None  # epoch, first row of each block, less than 0 without one
        self._idle: dict[Key, None] = {}  # those not held, the one released last at the end

    def hold(self, window: order.Window, pool: Executor) -> Held:
        """Hold the slots of a window's blocks, and start to read those that are in no slot yet."""
        block_of, row_of = np.divmod(window.samples, self._source.block_samples)
        blocks = np.flatnonzero(np.bincount(block_of))
        keys = [self._key(block, window.epoch) for block in blocks.tolist()]
        for key in keys:  # first, so that none takes the slot of another
            self._idle.pop(key, None)
        reads = [
            pool.submit(self._read, *key, self._rows(self._take_slot(key), key[0]))
            for key in keys
            if key not in self._slot_of
        ]
        starts = np.empty(blocks[-1] + 1, np.int64)  # by block, up to the last one
        starts[blocks] = [self._slot_of[key] * self._source.slot_rows for key in keys]
        return Held(keys, starts[block_of] + row_of, reads)

    def rows(self, window: order.Window) -> np.ndarray | None:
        """Return the rows of samples, int64 (n,), or None where a block of theirs was not read: hold it then."""
        if self._starts is None or self._starts[0] != window.epoch:
            keys = [self._key(block, window.epoch) for block in range(self._source.blocks)]
            slots = np.array([self._slot_of.get(key, -1) for key in keys], np.int64)
            self._starts = window.epoch, slots * self._source.slot_rows
        block_of, row_of = np.divmod(window.samples, self._source.block_samples)
        starts = self._starts[1].take(block_of)
        return None if starts.size and starts.min() < 0 else starts + row_of

    def release(self, keys: Iterable[Key]) -> None:
        """Release slots that were held. Their blocks stay until the slots are needed for others."""
        self._idle.update(dict.fromkeys(keys))

    def _take_slot(self, key: Key) -> int:
        self._starts = None
        if len(self._slot_of) < self.slots:
            slot = len(self._slot_of)
        else:
            # The block that was released last is needed again last, because each epoch has all blocks. To evict the
            # oldest one instead would, with room for nearly everything, evict each block shortly before it is needed.
            evicted, _ = self._idle.popitem()
            slot = self._slot_of.pop(evicted)
        self._slot_of[key] = slot
        return slot

    def _rows(self, slot: int, block: int) -> Arrays:
        start = slot * self._source.slot_rows
        stop = start + order.block_rows(block, self._source.samples, self._source.block_samples)
        return {name: array[start:stop] for name, array in self.arrays.items()}


class Held(NamedTuple):
    """The slots that a window holds, its ``rows`` in them, int64 (n,), and the ``reads`` to wait for before use."""

    keys: list[Key]
    rows: np.ndarray
    reads: list[Future[object]]


def _batches(
    windows: Iterator[order.Window], tables: Sequence[Slots], batch_size: int, workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Gather batches from the windows, one after the other."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="stream")
    ending = sys.is_finalizing  # a name of this function: those of the module may be gone when the program ends
    try:
        for samples, rows_of_tables in _loaded(windows, tables, pool):
            for first in range(0, len(samples), batch_size):
                part = slice(first, first + batch_size)
                batch: Batch = {}
                batch["sample"], out = _empty((batch_size,), samples.dtype, pin_memory)
                out[...] = samples[part]
                for table, rows in zip(tables, rows_of_tables, strict=True):
                    for name, array in table.arrays.items():
                        batch[name], out = _empty((batch_size, *array.shape[1:]), array.dtype, pin_memory)
                        # mode "clip" as "raise", the default, goes through a buffer; all rows are in range
                        array.take(rows[part], axis=0, out=out, mode="clip")
                yield batch
    finally:
        if not ending():  # the threads have ended by then
            pool.shutdown(wait=True, cancel_futures=True)


def _loaded(
    windows: Iterator[order.Window], tables: Sequence[Slots], pool: Executor
) -> Generator[tuple[np.ndarray, list[np.ndarray]], None, None]:
    """Yield the samples of each window and, once they are read, its rows in the arrays of each table.

    The next window is being read by then. The slots of a window are held until the next window is requested.
    """
    samples, ahead = np.empty(0, np.int64), list[Held]()
    for window in windows:
        # the window before the last was released, so two are held at most, and its slots are free for this one
        following = [table.hold(window, pool) for table in tables]
        for held in ahead:
            for read in held.reads:
                read.result()
        if ahead:
            yield samples, [held.rows for held in ahead]
        for table, held, still in zip(tables, ahead, following, strict=False):
            table.release(set(held.keys) - set(still.keys))
        samples, ahead = window.samples, following


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], pin_memory: bool) -> tuple[Tensor, np.ndarray]:
    """Return a new tensor, and a NumPy array of the same memory."""
    if pin_memory:
        tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        return tensor, tensor.numpy()
    # of NumPy, because PyTorch's allocator takes fresh pages for each batch, which cost half as much as the gathering
    array = np.empty(shape, dtype)
    return torch.from_numpy(array), array


def read_block(source: Source, block: int, draw: int) -> Batch:
    """Read all fields of one block, with one draw, in the order of the source.

    Args:
        source: the samples.
        block: the number of the block.
        draw: the number of the draw.

    Returns:
        Tensors with the block's samples on the first axis, of the stored dtypes.
    """
    rows = order.block_rows(block, source.samples, source.block_samples)
    shared, drawn = (
        {name: np.empty((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}
        for fields in (source.fields, source.draw_fields)
    )
    source.read(block, shared)
    if drawn:
        source.read_draw(block, draw, drawn)
    return {name: torch.from_numpy(values) for name, values in (shared | drawn).items()}


def labelled_source(split: Split, groups: np.ndarray | None = None) -> Source:
    """Make a source of the samples of a split, without a store.

    Args:
        split: N samples.
        groups: the group of each sample, int64 (N,).

    Returns:
        A source of ``images``, ``labels``, ``masks`` where the split has them, and ``groups`` where they are given.
    """
    arrays: dict[str, Any] = {"images": split.images, "labels": split.labels}
    if split.masks is not None:
        arrays["masks"] = split.masks
    if groups is not None:
        arrays["groups"] = groups
    return _of_split(arrays, _block_samples(split))


def explained_source(split: Split, cache: Cache, needs: Collection[str] = ("heatmaps",)) -> Source:
    """Make a source of a split and its store, in blocks of the store's shards.

    Args:
        split: the samples that the store explains.
        cache: the store.
        needs: fields besides ``images``: ``heatmaps``, ``teacher_logits`` and ``features`` of the store, ``labels``,
            ``groups`` and ``masks`` of the split. ``heatmaps`` are the stored maps of each draw, with ``scale``,
            ``target_class`` and ``epsilon``; without them the source has a single draw, of no fields.

    Returns:
        A source of the fields.

    Raises:
        CacheError: the store has no features.
        DatasetError: the split has no masks or groups.
        ValueError: a need that neither has.
    """
    arrays = {"images": split.images}
    if unknown := set(needs) - {"heatmaps", "teacher_logits", "features", "labels", "groups", "masks"}:
        raise ValueError(f"no store and no split has {', '.join(sorted(unknown))}")
    if "features" in needs and "features" not in cache.sample_fields:
        raise CacheError(
            Message(
                f"the store {cache.path} has no features of the teacher: make another with ",
                Call("cache_explanations", {"features": True}),
            )
        )
    if "labels" in needs:
        arrays["labels"] = split.labels
    for name in ("groups", "masks"):
        if name in needs:
            if (array := getattr(split, name)) is None:
                raise DatasetError(
                    f"the split '{split.name}' has no '{name}', which are needed: add them to the dataset"
                )
            arrays[name] = array
    source = of_split = _of_split(arrays, cache.info.storage.shard_samples)
    stored = {name: kind for name, kind in cache.sample_fields.items() if name in needs}

    def read(block: int, out: Arrays) -> None:
        of_split.read(block, {name: out[name] for name in arrays})
        cache.read_samples(block, {name: out[name] for name in stored})

    if stored:
        source = replace(source, fields={**source.fields, **stored}, read=read)
    if "heatmaps" not in needs:
        return source
    return replace(source, draws=cache.info.explainer.draws, draw_fields=cache.draw_fields, read_draw=cache.read_draw)


def _of_split(arrays: Mapping[str, Any], block_samples: int) -> Source:
    samples = arrays["images"].shape[0]

    def read(block: int, out: Arrays) -> None:
        start = block * block_samples
        for name, array in arrays.items():
            out[name][...] = array[start : start + block_samples]

    fields = {name: (array.shape[1:], np.dtype(array.dtype).newbyteorder("=")) for name, array in arrays.items()}
    return Source(samples, block_samples, fields, read)


def _block_samples(split: Split) -> int:
    """Choose the samples of a block: whole chunks of the images, which are decoded whole, of about 2 MiB."""
    size, chunk = int(np.prod(split.image_shape)), split.images.chunks[0]
    fitting = max(1, min(BLOCK_SAMPLES, BLOCK_BYTES // size))
    if chunk * size > order.WINDOW_BYTES:  # to decode it more than once is better than to hold two of it
        return fitting
    return chunk * max(1, fitting // chunk)


def stored_heatmaps(heatmaps: Tensor, scale: Tensor, precision: str, device: torch.device) -> Tensor:
    """Decode heatmaps on the device.

    Like `dequantise` this is the inverse of `teacher_cache.codec.quantise`; on the device half the bytes are moved, and
    no thread that reads has to cast. A precision without a function for tensors is decoded by `dequantise`, on the CPU.

    Args:
        heatmaps: as they are stored, (N, C, h, w).
        scale: the scale of each map, (N,).
        precision: the precision of the store.
        device: where the heatmaps go.

    Returns:
        float32 (N, C, h, w) on the device.

    Raises:
        CacheError: there is no such precision.
    """
    decode = PRECISIONS.find(precision).dequantise_tensor
    if decode is None:
        return to_device(dequantise(heatmaps.numpy(force=True), scale.numpy(force=True), precision), device)
    return decode(to_device(heatmaps, device)) * to_device(scale, device)[:, None, None, None]


def row_bytes(fields: Mapping[str, Field]) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in fields.values())
