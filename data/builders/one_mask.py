"""One mask or box for all images of a dataset, such as for a stamp that is always in the same corner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from data.builders.decoding import Scratch
from data.builders.folders import Echo
from data.builders.pictures import Size, UnreadableError, covered, read_mask
from data.builders.samples import Splits
from data.errors import DatasetError
from options import Doc, InsteadOf, Kind, Message, Option, OptionSet, Separated
from options.common import Fit

Keeps = Literal["inside", "outside"]
OWN_MASKS = ("masks", "mask")  # the options of builders for a mask of each image
FOR_ALL = ("mask_all", "mask_box")


@dataclass(frozen=True, kw_only=True)
class OneMaskOptions(OptionSet):
    """The options of one mask for all images. A builder of images of one size has them as a base."""

    ERROR: ClassVar[type[Exception]] = DatasetError
    HEADING: ClassVar[str] = "One mask for all images"

    mask_all: Annotated[
        Any,
        Kind.PATH,
        InsteadOf(*OWN_MASKS),
        Doc("Mask file for all images. It has the size of the original images or of the dataset's images."),
    ] = None
    mask_box: Annotated[
        str | tuple[int | str, ...] | None,
        Separated(),
        InsteadOf(*OWN_MASKS, "mask_all"),
        Doc(
            "Box for all images, in pixels of the dataset's images from the upper left corner: X0,Y0,X1,Y1, where "
            "column X1 and row Y1 are outside."
        ),
    ] = None
    mask_keeps: Annotated[
        Keeps | None,
        InsteadOf(*OWN_MASKS),
        Doc(
            "Part of each image that is the object: inside or outside of the mask or box. outside hides a stamp. "
            "Required for a box; for a mask file, the default is inside."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [option for name in (*OWN_MASKS, *FOR_ALL) if (option := self._option(name)) is not None]
        if len(chosen) > 1:
            raise DatasetError(Message("give ", chosen[0], " or ", chosen[1], ", not both"))
        if self.mask_keeps is not None and self.mask_all is None and self.mask_box is None:
            raise DatasetError(
                Message(
                    Option("mask_keeps", self.mask_keeps), " needs ", Option("mask_all"), " or ", Option("mask_box"),
                )
            )  # fmt: skip
        if self.mask_box is not None and self.mask_keeps is None:
            raise DatasetError(
                Message(
                    Option("mask_box", _plain(self.mask_box)), " needs ", Option("mask_keeps", "inside"),
                    " if the box is around the object, or ", Option("mask_keeps", "outside"),
                    " if it is around a stamp",
                )
            )  # fmt: skip

    def _option(self, name: str) -> Option | None:
        value = getattr(self, name, None)
        return None if value is None else Option(name, _plain(value))

    def mask_option(self) -> Option | None:
        """Return the option of the mask or box for all images; None if there is none."""
        return next((option for name in FOR_ALL if (option := self._option(name)) is not None), None)

    def mask_record(self) -> dict[str, Any]:
        """Return the options that are set as plain values, for the record of the builder: of a file, its name."""
        name = None if self.mask_all is None else Path(self.mask_all).name
        values = {"mask_all": name, "mask_box": self.mask_box, "mask_keeps": self.mask_keeps}
        return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


@dataclass(frozen=True)
class OneMask:
    """A mask for all images.

    Attributes:
        pixels: uint8 (1, height, width), 255 on the object and 0 on the background.
        size: height and width that the original images must have; None if they may have any.
        option: the option that it is from.
        note: what to tell the user of it.
    """

    pixels: np.ndarray
    size: Size | None
    option: Option
    note: str

    def misfit(self, size: Size | None) -> str | None:
        """Tell why an original image of this height and width does not fit; None if it does, or has no size."""
        if self.size is None or size is None or size == self.size:
            return None
        (height, width), (mask_height, mask_width) = size, self.size
        return (
            f"it is {width}×{height}, its mask {self.option.value} {mask_width}×{mask_height}: a mask of the size of "
            "the dataset's images fits all images"
        )

    def of_samples(self, samples: int) -> np.ndarray:
        """Return the mask for each sample, uint8 (N, 1, height, width), of which one copy is in memory."""
        return np.broadcast_to(self.pixels, (samples, *self.pixels.shape))


def one_mask(options: OneMaskOptions, size: Size, fit: Fit) -> OneMask | None:
    """Read the mask file, or draw the box.

    A mask file is read and fitted like the masks of an image folder. Only pixels that are wholly on the object count as
    object.

    Args:
        options: the mask or the box.
        size: height and width of the dataset's images.
        fit: how images of another shape are fitted.

    Returns:
        The mask; None without one.

    Raises:
        DatasetError: The file is no mask, the box is not within the images, or nothing or everything is object.
    """
    inside = options.mask_keeps != "outside"
    if options.mask_box is not None:
        option, of_images = Option("mask_box", _plain(options.mask_box)), None
        what = f"the box {option.value}"
        left, top, right, bottom = _box(options.mask_box, size)
        marked = np.zeros(size, np.bool_)
        marked[top:bottom, left:right] = True
        kept = marked if inside else ~marked
    elif options.mask_all is not None:
        option = Option("mask_all", str(options.mask_all))
        path = Path(options.mask_all)
        if not path.is_file():
            raise DatasetError(Message(option, " is not a file: give a mask, in a file of any image format"))
        try:
            mask = read_mask(path)
        except UnreadableError as error:
            raise DatasetError(Message(option, f" is not a mask: {error}")) from None
        shape = (mask.covers.shape[0], mask.covers.shape[1])
        of_images, what = None if shape == size else shape, f"{path}, read by {mask.read_by},"
        kept = covered(mask.covers if inside else ~mask.covers, size, fit) > 0
    else:
        return None
    _check_kept(kept, option)
    side = "inside" if inside else "outside"
    share = f"{100 * kept.mean():.1f} % of an image"
    note = f"masks: {what} for all images; the object is {side} of it, {share}"
    return OneMask(np.where(kept, np.uint8(255), np.uint8(0))[None], of_images, option, note)


def _check_kept(kept: np.ndarray, option: Option) -> None:
    if kept.any() and not kept.all():
        return
    height, width = kept.shape
    raise DatasetError(
        Message(
            option, f" makes {'all' if kept.all() else 'none'} of the {width}×{height} pixels of an image the object: "
            "mark a part of the image, at least a whole pixel, or change ", Option("mask_keeps"),
        )
    )  # fmt: skip


def _box(box: str | tuple[int | str, ...], size: Size) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a box. Raises DatasetError."""
    texts = box.split(",") if isinstance(box, str) else [*box]
    option, (height, width) = Option("mask_box", _plain(box)), size
    try:
        if len(texts) != 4 or any(isinstance(text, float) for text in texts):
            raise ValueError
        left, top, right, bottom = map(int, texts)
    except (ValueError, TypeError):
        raise DatasetError(
            Message(option, " is not a box: give four whole numbers of pixels, left,top,right,bottom, such as 0,0,12,8")
        ) from None
    if left >= right or top >= bottom:
        raise DatasetError(
            Message(option, " is empty: its right side must be beyond its left one, and its lower side below its upper")
        )
    if left < 0 or top < 0 or right > width or bottom > height:
        raise DatasetError(
            Message(
                option, f" is not within the dataset's images of {width}×{height} pixels: give its pixels after the "
                f"images are fitted to this size, 0 to {width} and 0 to {height}",
            )
        )  # fmt: skip
    return left, top, right, bottom


@dataclass(frozen=True)
class MaskedScratch(Scratch):
    """Scratch files whose images have one mask."""

    mask: OneMask

    def masks(self) -> np.ndarray:
        """Return the masks, uint8 (N, 1, height, width)."""
        return self.mask.of_samples(self.samples)


def with_one_mask(splits: Splits, scratch: Scratch, mask: OneMask, echo: Echo) -> tuple[Splits, Scratch]:
    """Give every sample the same mask, and tell so.

    Args:
        splits: the samples of each split, without masks.
        scratch: their pixels.
        mask: the mask.
        echo: is told its note.

    Returns:
        The samples and their pixels, both with the mask.
    """
    echo(mask.note)
    path = Path(str(mask.option.value))
    splits = {name: [replace(sample, mask=path) for sample in part] for name, part in splits.items()}
    return splits, MaskedScratch(scratch.folder, scratch.samples, scratch.size, mask)
