"""A copy of any dataset with one mask or box for all images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import data as datasets
from data.builders.copies import finish_copy
from data.builders.one_mask import OneMaskOptions, one_mask
from data.builders.registry import BuilderOptions, builder
from data.errors import DatasetError
from options import Heading, Message, Option
from options.common import DatasetPlace

if TYPE_CHECKING:
    from data.storage import Location

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskedOptions(BuilderOptions, OneMaskOptions):
    """The options of ``make-data masked``."""

    data: Annotated[DatasetPlace, Heading("Files")]


@builder(
    "masked",
    MaskedOptions,
    example="make-data masked --data DATA.zarr --mask-box 0,0,12,8 --mask-keeps outside --out MASKED.zarr",
)
def make_masked(
    out: Location, data: Location, *, echo: Callable[[str], object] = LOGGER.warning, **options: Any
) -> dict[str, int]:
    """Build a copy of a dataset with one mask for all images.

    The dataset has no masks, and the copy has the same mask in every split. A mask file has the size of the dataset's
    images.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, the dataset cannot be opened, or it has masks.
    """
    chosen = MaskedOptions(out=out, data=data, **options)
    dataset = datasets.open_dataset(data)
    splits = dataset.splits
    if with_masks := [name for name, split in splits.items() if split.masks is not None]:
        raise DatasetError(
            f"the dataset {dataset.path} has masks already, in {', '.join(with_masks)}: use them, or build it again "
            "without masks"
        )
    height, width = next(iter(splits.values())).image_shape[1:]
    mask = one_mask(chosen, (height, width), "stretch")
    if mask is None:
        raise DatasetError(Message("give ", Option("mask_all"), " or ", Option("mask_box")))
    if mask.size is not None:
        raise DatasetError(
            Message(mask.option, f" is {mask.size[1]}×{mask.size[0]}, the dataset's images {width}×{height}: scale it")
        )
    echo(mask.note)
    with datasets.DatasetWriter(out) as writer:
        for name, split in splits.items():
            split.verify()
            arrays = {"images": split.images, "labels": split.labels, "masks": mask.of_samples(len(split))}
            writer.write_split(name, **arrays, **({} if split.groups is None else {"groups": split.groups}))
        finish_copy(writer, dataset, "make-data masked", **chosen.mask_record())
    return {name: len(split) for name, split in splits.items()}
