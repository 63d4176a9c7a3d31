"""Take the items of a dataset apart as people have them, and decode them once to scratch files of pixels of one size.

An item is a pair or a dictionary. Its image is a PIL image, an array, a tensor or an encoded file, and is read as the
files of an image folder are. Not here: where the items come from, and how they become a dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.builders.decoding import Decoded, Scratch
from data.builders.pictures import (
    Encoded,
    Mask,
    Picture,
    Source,
    UnreadableError,
    covered,
    cut_away,
    fitted,
    read_image,
    read_mask,
)
from options import Message, Option, did_you_mean, first_line
from options.common import Fit

CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # number of channels → Pillow's mode
USUAL = {  # keys of dictionaries, the first of which that an item has is taken
    "image": ("image", "img", "images", "pixel_values", "x"),
    "label": ("label", "labels", "target", "y", "class", "cls"),
    "mask": ("mask", "masks", "segmentation"),
    "group": ("group", "groups"),
}
POSITIONS = {"image": 0, "label": 1}  # of a tuple
REQUIRED = ("image", "label")
Key = str | int | None


class ItemError(ValueError):
    """An item cannot be used. Its only argument is the reason with the remedy, a text or a `Message`."""


@dataclass(frozen=True)
class Keys:
    """The keys of an item's parts, or their positions if items are tuples. None stands for the usual ones (`USUAL`)."""

    image: Key = None
    label: Key = None
    mask: Key = None
    group: Key = None


@dataclass(frozen=True)
class Item(Decoded):
    """What was learned of an item. ``digest`` is the SHA-256 of the image's pixels.

    Attributes:
        label: its class, a number or a name.
        group: the value of its bias attribute, a number or a name; None without.
        size: height and width of the image; None if it cannot be read.
        misfit: the image has another size than the dataset.
    """

    label: int | str | None = None
    group: int | str | None = None
    size: tuple[int, int] | None = None
    misfit: bool = False


@dataclass(frozen=True)
class Parts:
    """The parts of an item, decoded."""

    picture: Picture
    label: int | str
    mask: Mask | None
    group: int | str | None

    def digest(self) -> str:
        """Return a SHA-256 of everything, by which two reads of an item are compared."""
        mask = b"" if self.mask is None else self.mask.covers.tobytes()
        return hashlib.sha256(
            f"{pixels_digest(self.picture.image)}{self.label}{self.group}".encode() + mask
        ).hexdigest()


def pixels_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an image's size and pixels."""
    return hashlib.sha256(f"{image.size};".encode() + image.tobytes()).hexdigest()


class Items:
    """The items of several splits, one after the other, as a `data.builders.decoding.Decoder`.

    Args:
        splits: map-style datasets. Each gets the rows of its items in this order.
        keys: the keys of the items.
        scratch: where the pixels go.
        fit: how images of another shape are fitted; None if all must have the size of ``scratch``.
    """

    def __init__(self, splits: Sequence[Any], keys: Keys, scratch: Scratch, fit: Fit | None):
        self.splits, self.keys, self.scratch, self.fit = splits, keys, scratch, fit
        self.images, self.masks = scratch.images(), scratch.masks()
        self.starts = np.cumsum([0, *map(len, splits)])

    def __getstate__(self) -> tuple[Sequence[Any], Keys, Scratch, Fit | None]:
        return self.splits, self.keys, self.scratch, self.fit  # another process opens the files itself

    def __setstate__(self, state: tuple[Sequence[Any], Keys, Scratch, Fit | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> Item:
        split = int(np.searchsorted(self.starts, row, "right")) - 1
        try:
            parts = read_item(self.splits[split], row - int(self.starts[split]), self.keys)
            return self._decode(parts, row)
        except ItemError as error:
            return Item(problem=error.args[0])

    def _decode(self, parts: Parts, row: int) -> Item:
        image, size = parts.picture.image, self.scratch.size
        item = Item(
            pixels_digest(image),
            frames=parts.picture.frames,
            dark=parts.picture.dark,
            label=parts.label,
            group=parts.group,
            size=(image.height, image.width),
        )
        if self.fit is None and item.size != size:
            first = f"{size[1]}×{size[0]}"
            return replace(item, problem=f"it is {image.width}×{image.height}, the first {first}", misfit=True)
        fit = self.fit or "crop"
        self.images[row] = fitted(image, size, fit).transpose(2, 0, 1)
        item = replace(item, cut=cut_away(image, size))
        if parts.mask is None:
            return item
        height, width = parts.mask.covers.shape
        if (height, width) != item.size:
            return replace(item, problem=f"it is {image.width}×{image.height}, its mask {width}×{height}")
        self.masks[row, 0] = covered(parts.mask.covers, size, fit)
        return replace(item, object=float(parts.mask.covers.mean()), read_by=parts.mask.read_by)


def read_item(items: Any, number: int, keys: Keys) -> Parts:
    """Read and decode an item of a map-style dataset.

    Raises:
        ItemError: The dataset raises an exception for it, or it cannot be used.
    """
    try:
        item = items[number]
    except ItemError:
        raise
    except Exception as error:  # of the user's own code
        raise ItemError(f"reading it raised {type(error).__name__}: {first_line(error)}") from error
    values = _parts_of(item, keys)
    mask = values.get("mask")
    return Parts(
        picture=_read(values["image"], "image", read_image),
        label=_name_or_number(values["label"], "label"),
        mask=None if mask is None else _read(mask, "mask", read_mask),
        group=None if values.get("group") is None else _name_or_number(values["group"], "group"),
    )


# --- the parts of an item ---------------------------------------------------------------------------------------------


def _parts_of(item: Any, keys: Keys) -> dict[str, Any]:
    """Return the image, the label, and the mask and the group if there are any."""
    if isinstance(item, Mapping):
        return {part: item[key] for part in USUAL if (key := _key_of(part, getattr(keys, part), item)) is not None}
    if isinstance(item, list | tuple):
        chosen = {part: getattr(keys, part) for part in USUAL}
        positions = {part: POSITIONS.get(part) if key is None else key for part, key in chosen.items()}
        for part, position in positions.items():
            if position is not None and not (isinstance(position, int) and -len(item) <= position < len(item)):
                raise ItemError(
                    Message(f"it is a tuple of {len(item)}, and ", Option(part), f" is {position!r}: give a position")
                    if chosen[part] is not None
                    else f"it is a tuple of {len(item)}: return (image, label), or a dictionary"
                )
        return {part: item[position] for part, position in positions.items() if position is not None}
    raise ItemError(
        f"it is of type {_type(item)}: return (image, label), or a dictionary with the keys image and label"
    )


def _key_of(part: str, key: Key, item: Mapping[Any, Any]) -> Any:
    if key is None:
        key = next((usual for usual in USUAL[part] if usual in item), None)
        if key is not None or part not in REQUIRED:
            return key
    elif key in item:
        return key
    names = ", ".join(map(str, item))
    remedy = (
        ("its key is ", Option(part))
        if key is None
        else (f"{key!r} is not one of them.{did_you_mean(str(key), map(str, item))}",)
    )
    raise ItemError(Message(f"it has no {part}, but {names}: ", *remedy))


def _name_or_number(value: Any, part: str) -> int | str:
    """Return a label or a group; a whole number of any type becomes an int.

    Raises:
        ItemError: It is neither a name nor a whole number.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        if not value.strip():
            raise ItemError(f"its {part} is an empty text: give a name or a number")
        return value
    try:
        array = np.asarray(_in_memory(value))
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    if array.size == 1 and array.dtype.kind in "iub":
        return int(array.item())
    if array.size == 1 and array.dtype.kind == "f" and float(array.item()).is_integer():
        return int(array.item())
    if array.size == 1 and array.dtype.kind == "U":
        return str(array.item())
    if array.dtype.kind in "iubf" and array.size > 1:
        raise ItemError(
            f"its {part} has the shape {array.shape}, and must be one number or name: "
            "take argmax of a one-hot vector, or choose one of several attributes"
        )
    raise ItemError(f"its {part} is {_short(value)}, and must be a whole number or a name: convert it")


def _short(value: Any) -> str:
    text = repr(value)
    return f"of type {_type(value)}" if len(text) > 40 else text


def _type(value: Any) -> str:
    return type(value).__name__


def _in_memory(values: Any) -> Any:
    """Convert a PyTorch tensor on any device, without importing PyTorch."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") and hasattr(values, "cpu") else values


# --- images and masks -------------------------------------------------------------------------------------------------


def _read(value: Any, part: str, read: Callable[[Source], Any]) -> Any:
    try:
        return read(_source(value, part))
    except UnreadableError as error:
        raise ItemError(str(error)) from None


def _source(value: Any, part: str) -> Source:
    """Return what `read_image` and `read_mask` take.

    Raises:
        ItemError: The value is no image, or an array that is none.
    """
    if isinstance(value, Image.Image | Encoded | Path):
        return value
    if isinstance(value, bytes):
        return Encoded(f"the {part}", value)
    is_tensor = hasattr(value, "detach") and hasattr(value, "cpu")
    if is_tensor or hasattr(value, "__array__"):
        try:
            array = np.asarray(_in_memory(value))
        except (ValueError, TypeError, RuntimeError) as error:  # such as a sparse tensor, or bfloat16
            raise ItemError(f"its {part} cannot be made a NumPy array ({first_line(error)}): convert it") from None
        return _image_of(_channels_last(array, part, first=is_tensor), part)
    raise ItemError(f"its {part} is of type {_type(value)}: give a PIL image, an array or a tensor")


def _channels_last(array: np.ndarray, part: str, first: bool) -> np.ndarray:
    """Return an array (H, W) or (H, W, C). Channels come first in tensors and last in arrays, if both are possible."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ItemError(f"its {part} has the shape {array.shape}: give (H, W), (H, W, C) or (C, H, W)")
    if array.ndim == 2:
        return array
    may_be_first, may_be_last = array.shape[0] in CHANNELS, array.shape[2] in CHANNELS
    if not may_be_first and not may_be_last:
        raise ItemError(
            f"its {part} has the shape {array.shape}: give 1 to 4 channels, or write other numbers of channels with "
            "DatasetWriter (docs/dataset-layout.md)"
        )
    if may_be_first and (first or not may_be_last):
        array = array.transpose(1, 2, 0)
    return array[:, :, 0] if array.shape[2] == 1 else array


def _image_of(array: np.ndarray, part: str) -> Image.Image:
    """Return an array (H, W) or (H, W, C) as Pillow has it when it reads the same values from a file."""
    kind = array.dtype.kind
    if kind == "b":
        return Image.fromarray(array.astype(np.uint8) * np.uint8(255))
    if kind == "f":
        return Image.fromarray(_levels(array, part))
    if kind not in "iu":
        raise ItemError(f"its {part} is an array of {array.dtype}: convert it to uint8")
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high <= 255:
        return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
    if array.ndim == 2 and low >= 0 and high <= 65535:  # as grey images of 16 bits
        return Image.fromarray(np.ascontiguousarray(array.astype(np.uint16)))
    if part == "mask" and array.ndim == 2:
        return Image.fromarray(np.where(array != 0, np.uint8(255), np.uint8(0)))
    raise ItemError(f"its {part} is {array.dtype} with values from {low} to {high}: scale them to 0 to 255")


def _levels(array: np.ndarray, part: str) -> np.ndarray:
    """Convert fractions from 0 to 1 to uint8, as ``ToTensor`` of torchvision made them."""
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # or one of them is NaN
        if not np.isfinite(array).all():
            raise ItemError(f"its {part} has values that are not finite: correct them")
        values = f"its {part} is {array.dtype} with values from {low:.4g} to {high:.4g}"
        if low >= 0 and high <= 255:
            raise ItemError(f"{values}: convert them to uint8, or scale them to 0 to 1")
        raise ItemError(f"{values}, so it is normalised: leave out the normalisation, because the model has its own")
    return np.ascontiguousarray(np.rint(array * array.dtype.type(255)).astype(np.uint8))
