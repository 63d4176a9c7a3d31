"""The attributes of a dataset that is a changed copy of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.layout import Dataset, DatasetWriter


def finish_copy(writer: DatasetWriter, dataset: Dataset, command: str, **record: Any) -> None:
    """Finish a copy with the names of the original.

    Args:
        writer: the writer of the copy, whose splits are written.
        dataset: the original.
        command: the command that makes the copy.
        record: what else the copy's attribute ``builder`` says of how it was made.
    """
    names = {"bias_attribute": dataset.bias_attribute, "group_names": list(dataset.group_names)}
    writer.finish(
        name=dataset.name,
        class_names=list(dataset.class_names),
        builder={
            "command": command,
            "fingerprints": {name: split.fingerprint for name, split in dataset.splits.items()},
            **record,
        },
        **{key: value for key, value in names.items() if value},
    )
