"""The samples of a batch that is there already, which a DataLoader collates without a copy."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.private_torch import collate, default_collate_fn_map


class Sample(MutableMapping[str, Tensor]):
    """A sample of a batch: a mapping that becomes a dictionary of tensors when it is first read or changed.

    To cut a batch into dictionaries of tensors, and to stack them again, takes several times as long as to gather it.
    So `torch.utils.data.default_collate`, the collate function of a DataLoader, returns the batch itself where all its
    samples are as they were.

    Args:
        batch: the fields of N samples, with N on the first axis.
        row: the row of this sample.
    """

    __slots__ = ("_batch", "_fields", "_row")

    def __init__(self, batch: dict[str, Tensor], row: int):
        self._batch, self._row = batch, row
        self._fields: dict[str, Tensor] | None = None

    def _cut(self) -> dict[str, Tensor]:
        if self._fields is None:
            self._fields = {name: values[self._row] for name, values in self._batch.items()}
        return self._fields

    def __getitem__(self, name: str) -> Tensor:
        return self._cut()[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._cut()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._cut()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cut())

    def __len__(self) -> int:
        return len(self._cut())

    def __repr__(self) -> str:
        return repr(self._cut())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._cut(),)  # without the batch


def samples_of(batch: dict[str, Tensor]) -> list[Sample]:
    """Return the samples of a batch."""
    return [Sample(batch, row) for row in range(len(next(iter(batch.values()))))]


def _batch_of(samples: Sequence[Any], *, collate_fn_map: dict[Any, Any] | None = None) -> Any:
    """Return the batch of all its samples in their order, or collate those that were read, changed or chosen."""
    batch = samples[0]._batch
    if set(map(type, samples)) == {Sample}:
        untouched = all(sample._batch is batch and sample._fields is None for sample in samples)
        if untouched and [sample._row for sample in samples] == list(range(len(next(iter(batch.values()))))):
            return batch
    return collate([dict(sample) for sample in samples], collate_fn_map=collate_fn_map)


default_collate_fn_map[Sample] = _batch_of  # which PyTorch provides for types of a dataset's own
