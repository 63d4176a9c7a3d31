"""A split and its store as PyTorch datasets, for a training loop of the user's own.

The batches have the fields of `explained_source` as they are stored; `trainer.DistillationLoss` decodes them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from data import Location, open_dataset
from options import Message, Option
from teacher_cache import Cache, open_cache
from teacher_cache.pairing import check_explains, open_paired
from trainer.errors import TrainingError
from trainer.stream import order
from trainer.stream.memory import free_memory
from trainer.stream.samples import Sample, samples_of
from trainer.stream.stream import Batch, Share, Slots, Source, explained_source, row_bytes, stream

log = logging.getLogger(__name__)

FIELDS = ("heatmaps", "labels", "groups", "masks", "teacher_logits", "features")


class _Explained:
    """A split and its store, which each process opens for itself, and the epoch, which all workers share."""

    def __init__(self, data: Location, cache: Location, split: str, fields: Collection[str] | None, seed: int):
        self.data, self.cache, self.split_name, self.seed = data, cache, split, seed
        dataset = open_dataset(data)
        store = open_paired(cache, dataset, split)
        if unknown := set(fields or ()) - set(FIELDS):
            raise TrainingError(f"there is no field '{min(unknown)}': the fields are {', '.join(FIELDS)}")
        self.fields = tuple(fields) if fields is not None else _available(dataset.split(split), store)
        if "heatmaps" in self.fields:
            check_explains(store)
        self._opened = os.getpid(), explained_source(dataset.split(split), store, self.fields)
        self.samples = len(dataset.split(split))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def source(self) -> Source:
        """The samples, opened in this process."""
        process, source = self._opened
        if process != os.getpid():
            split = open_dataset(self.data).split(self.split_name)
            source = explained_source(split, open_cache(self.cache), self.fields)
            self._opened = os.getpid(), source
        return source

    @property
    def epoch(self) -> int:
        """The epoch, which decides the order of a stream and the draw that each sample shows."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, at the start of each one, as for `torch.utils.data.DistributedSampler`.

        Workers that persist see it too. Without it, each sample shows the same draw in every epoch.

        Args:
            epoch: the number of the epoch, counted from 0.

        Raises:
            TrainingError: the number is negative.
        """
        if epoch < 0:
            raise TrainingError(Message(Option("epoch", epoch), " is negative: count epochs from 0"))
        self._epoch.fill_(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (None, None)}


class ExplainedDataset(_Explained, Dataset[Batch]):
    """A map-style dataset of the samples of a split with their heatmaps.

    An item is a dictionary of tensors, in the form in which they are stored; N becomes the first axis in a batch:

    - ``images`` uint8 (C, H, W), ``labels`` and ``groups`` integer (), ``masks`` uint8 (1, H, W), of the split;
    - ``heatmaps`` (C, h, w) in the type of the store, ``scale`` and ``epsilon`` float32 (), ``target_class`` int64 ():
      one draw, the same for all samples of a shard, and the next one in each epoch (`set_epoch`);
    - ``teacher_logits`` float32 (K,) and ``features`` float32 (F,), of the store;
    - ``ids`` int64 (), the index of the sample in the split.

    Several indices give a batch: ``dataset[[3, 1, 4]]``. A DataLoader collates a batch without a copy, unless samples
    were read or changed before `torch.utils.data.default_collate` (`trainer.stream.samples`).

    It works with every sampler, `torch.utils.data.DistributedSampler` too, and with workers that fork or spawn. Each
    worker keeps decoded shards within its memory budget. A shuffled order needs all of them in each epoch: where they
    do not fit, `ExplainedStream` is faster.

    Args:
        data: a dataset.
        cache: the store of the split.
        split: the name of the split.
        fields: what an item has besides ``images`` and ``ids``, of `heatmaps`, `labels`, `groups`, `masks`,
            `teacher_logits` and `features`; None means all that the split and the store have.
        seed: the seed of the draws.
        memory_budget: bytes of decoded shards in each worker; None means half of the free memory, shared by the
            workers and the processes of this job.

    Raises:
        CacheError, DatasetError: the store or the dataset cannot be used, or one does not belong to the other.
        TrainingError: a field that there is not.
    """

    def __init__(
        self,
        data: Location,
        cache: Location,
        *,
        split: str = "train",
        fields: Collection[str] | None = None,
        seed: int = 0,
        memory_budget: int | None = None,
    ):
        super().__init__(data, cache, split, fields, seed)
        self.memory_budget = memory_budget
        self._tables: tuple[int, list[Slots]] | None = None  # process, decoded shards
        self._lock = Lock()  # threads may share the dataset

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: SupportsIndex | Sequence[int] | Tensor | np.ndarray) -> Batch:
        """Return a sample, or for several indices their batch, with one copy: the fastest way to a shuffled batch."""
        if isinstance(index, Sequence) or (isinstance(index, Tensor | np.ndarray) and index.ndim):
            return self._gather(index)
        return {name: values[0] for name, values in self._gather([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples of a batch, for a DataLoader, which then collates them without a copy."""
        return samples_of(self._gather(indices))

    def _gather(self, indices: Any) -> Batch:
        """Copy samples from the slots of their shards, and read those shards that are in no slot."""
        samples = self._checked(indices)
        with self._lock:
            tables, window = self._slots(), order.Window(self.epoch, samples)
            rows = [table.rows(window) for table in tables]
            batch = {
                name: array.take(held, axis=0, mode="clip")
                for table, held in zip(tables, rows, strict=True)
                if held is not None
                for name, array in table.arrays.items()
            }
            if any(held is None for held in rows):
                batch = self._read_and_gather(tables, window)
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {"ids": torch.from_numpy(samples)}

    def _checked(self, indices: Any) -> np.ndarray:
        """Return indices as int64 (n,), counted from the start of the split."""
        samples = np.asarray(indices).reshape(-1)
        if samples.dtype.kind not in "iu" and samples.size:
            raise TypeError(f"indices of samples are integers, and these are {samples.dtype}")
        samples = samples.astype(np.int64)
        outside = samples[(samples < -self.samples) | (samples >= self.samples)]
        if outside.size:
            raise IndexError(f"there is no sample {outside[0]}: the split has {self.samples}, counted from 0")
        return samples % self.samples

    def _read_and_gather(self, tables: Sequence[Slots], window: order.Window) -> dict[str, np.ndarray]:
        """Gather samples, as many blocks at a time as there are slots."""
        kinds = {**self.source.fields, **self.source.draw_fields}
        batch = {name: np.empty((len(window.samples), *shape), dtype) for name, (shape, dtype) in kinds.items()}
        block_of = window.samples // self.source.block_samples
        blocks = np.unique(block_of)
        most = min(table.slots for table in tables)
        for first in range(0, len(blocks), most):
            part = np.flatnonzero(np.isin(block_of, blocks[first : first + most]))
            for table in tables:
                rows = self._read(table, order.Window(window.epoch, window.samples[part]))
                for name, array in table.arrays.items():
                    batch[name][part] = array.take(rows, axis=0, mode="clip")
        return batch

    def _read(self, table: Slots, window: order.Window) -> np.ndarray:
        """Return the rows of samples in a table, after reading the blocks that it lacks."""
        try:
            with ThreadPoolExecutor(2, thread_name_prefix="explained") as pool:
                held = table.hold(window, pool)
                for read in held.reads:
                    read.result()
        except BaseException:
            self._tables = None  # a slot may have part of a block
            raise
        table.release(held.keys)
        return held.rows

    def _slots(self) -> list[Slots]:
        """Return the tables of decoded shards of this process."""
        if self._tables is None or self._tables[0] != os.getpid():
            source = self.source
            sizes = [source.slot_rows * row_bytes(fields) for fields in (source.fields, source.draw_fields)]
            needed, budget = source.blocks * sum(sizes), self._bytes_of_slots()
            if budget < needed:
                log.warning(
                    f"{self.cache}: an epoch needs {needed / 2**20:,.0f} MiB of decoded shards in each worker, and the "
                    f"memory budget is {budget / 2**20:,.0f} MiB: a shuffled order decodes shards again and again, so "
                    "use ExplainedStream"
                )
            shared = max(1, min(source.blocks, budget // sum(sizes)))
            drawn = max(shared, min(source.blocks * source.draws, (budget - shared * sizes[0]) // max(1, sizes[1])))
            tables = [
                Slots(source, source.fields, source.read, shared, lambda block, epoch: (block,)),
                Slots(source, source.draw_fields, source.read_draw, drawn, self._block_and_draw),
            ]
            self._tables = os.getpid(), [table for table in tables if table.arrays]
        return self._tables[1]

    def _block_and_draw(self, block: int, epoch: int) -> tuple[int, int]:
        return block, order.draw_of_block(block, self.source.draws, self.seed, epoch)

    def _bytes_of_slots(self) -> int:
        if self.memory_budget is not None:
            return self.memory_budget
        worker = get_worker_info()
        sharing = (worker.num_workers if worker else 1) * (dist.get_world_size() if _distributed() else 1)
        return free_memory() // (2 * sharing)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()


class ExplainedStream(_Explained, IterableDataset[Batch]):
    """An iterable dataset of whole batches, in the order and at the speed of `train_student`.

    Give it to a `torch.utils.data.DataLoader` with ``batch_size=None``, or iterate over it. One iteration is one epoch;
    `set_epoch` comes first. With the same seed and batch size the batches are those of `train_student`. They have the
    fields of `ExplainedDataset`, with N = ``batch_size / ranks`` on the first axis. What an epoch has beyond whole
    batches is left out. It reads ahead in threads, so a DataLoader without workers is fastest. Each worker yields its
    part of the batches, and the order stays, but each decodes all shards.

    Args:
        data: as in `ExplainedDataset`.
        cache: as in `ExplainedDataset`.
        batch_size: samples of a step, over all processes.
        split: as in `ExplainedDataset`.
        fields: as in `ExplainedDataset`.
        seed: the seed of the order and the draws.
        share: (rank, ranks) of this process; None takes those of `torch.distributed`.
        memory_budget: bytes of decoded shards in each worker; None means half of the free memory, shared.

    Raises:
        CacheError, DatasetError: as in `ExplainedDataset`.
        TrainingError: a field that there is not, or a batch that the processes cannot share.
    """

    def __init__(
        self,
        data: Location,
        cache: Location,
        *,
        batch_size: int = 128,
        split: str = "train",
        fields: Collection[str] | None = None,
        seed: int = 0,
        share: tuple[int, int] | None = None,
        memory_budget: int | None = None,
    ):
        super().__init__(data, cache, split, fields, seed)
        if share is None:
            share = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        self.share, self.memory_budget = Share(*share), memory_budget
        try:
            self.batch_size = order.step_samples(self.samples, batch_size, *share)
        except ValueError as error:
            raise TrainingError(str(error)) from None
        self._position, self._resumed = (0, 0), False  # epoch and step of the next batch
        self._workers = torch.zeros((), dtype=torch.int64).share_memory_()  # that read the last epoch
        self._running: tuple[int, int, Generator[Batch, None, None]] | None = None  # process, next step, batches

    def __len__(self) -> int:
        return order.steps_per_epoch(self.samples, self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as `ExplainedDataset.set_epoch`; the epoch that `load_state_dict` set stays at its step."""
        super().set_epoch(epoch)
        if self._position[0] != epoch:
            self._position, self._resumed = (epoch, 0), False

    def state_dict(self) -> dict[str, int]:
        """Return the ``epoch`` and the ``step`` of the next batch; torchdata's StatefulDataLoader calls it.

        A loop that counts its batches can write this dictionary itself.

        Raises:
            TrainingError: worker processes of a plain DataLoader read the batches, ahead of the loop.
        """
        if int(self._workers) and get_worker_info() is None:
            raise TrainingError(
                Message(
                    f"{int(self._workers)} worker processes read this stream, ahead of the training, so its position "
                    "is not known here: use ", Option("num_workers", 0), " or torchdata's StatefulDataLoader, or count "
                    "the batches and write {'epoch': …, 'step': …}",
                )
            )  # fmt: skip
        epoch, step = self._position
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start at a state of `state_dict`, on as many processes as there are then."""
        self.set_epoch(state["epoch"])
        self._position, self._resumed = (state["epoch"], state["step"]), True

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self._workers.fill_(worker.num_workers if worker else 0)
        epoch = self.epoch
        first = self._position[1] if self._resumed else 0
        self._position, self._resumed = (epoch, first), False
        batches = self._batches_from(epoch * len(self) + first, workers)
        for step in range(first, len(self)):
            batch = next(batches)
            if step % workers != number:
                continue
            self._position = epoch, step + 1
            batch["ids"] = batch.pop("sample")
            yield batch
        self._running = os.getpid(), (epoch + 1) * len(self), batches

    def _batches_from(self, step: int, workers: int) -> Generator[Batch, None, None]:
        """Return the batches from a step of the training on: those of the last epoch continue, with its memory."""
        running, self._running = self._running, None
        if running is not None and running[:2] == (os.getpid(), step):
            return running[2]
        budget = self.memory_budget
        if budget is None:
            budget = free_memory() // (2 * self.share.ranks * workers)
        return stream(
            self.source,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=step,
            share=self.share,
            memory_budget=budget,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_running": None}


def _available(split: Any, store: Cache) -> tuple[str, ...]:
    """Return the fields that a split and its store have."""
    of_split = [name for name in ("labels", "groups", "masks") if getattr(split, name) is not None]
    return ("heatmaps", *of_split, *store.sample_fields)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
