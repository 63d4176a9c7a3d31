"""Decode images and masks once, in several processes, to scratch files of pixels of one size.

`Files` decodes the files of an image folder; `data.builders.items` decodes the items of any other dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data.builders.folders import RAW, Sample, is_of_images
from data.builders.pictures import (
    NoPictureError,
    Size,
    UnreadableError,
    covered,
    cut_away,
    fitted,
    read_image,
    read_mask,
)
from options.common import Fit

T = TypeVar("T")
BATCH = 16  # files that a process decodes at a time
PER_PROCESS = 64  # files for which a further process is worth its start


@dataclass(frozen=True)
class Decoded:
    """What was learned of a file.

    Attributes:
        digest: the SHA-256 of the image file, empty if it cannot be read.
        problem: why the image or its mask cannot be used; None if they can.
        picture: whether the file is an image at all, by its content or its suffix.
        cut: the share of its pixels that cropping cuts away.
        frames: the number of its frames.
        dark: see `data.builders.pictures.Picture`.
        object: the share of the mask's pixels that are object.
        read_by: see `data.builders.pictures.Mask`.
        size: height and width of the image; None if it cannot be read.
    """

    digest: str = ""
    problem: str | None = None
    picture: bool = True
    cut: float = 0.0
    frames: int = 1
    dark: bool = False
    object: float | None = None
    read_by: str | None = None
    size: Size | None = None


@dataclass(frozen=True)
class Scratch:
    """Pixels of every file, in files that are removed when the dataset is written.

    Attributes:
        folder: a temporary folder.
        samples: number of files.
        size: height and width in pixels.
    """

    folder: Path
    samples: int
    size: Size

    def images(self) -> np.memmap:
        """Open the images, uint8 (N, 3, height, width)."""
        return self._open("images", 3)

    def masks(self) -> np.ndarray:
        """Open the masks, uint8 (N, 1, height, width)."""
        return self._open("masks", 1)

    def _open(self, name: str, channels: int) -> np.memmap:
        path = self.folder / name
        return np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=(self.samples, channels, *self.size))


class Decoder(Protocol[T]):  # type: ignore[misc]  # T is only returned
    """A dataset of `torch.utils.data`: decoding an item writes its pixels, and returns what was learned."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> T: ...


class Files:
    """The files as a dataset of `torch.utils.data`: decoding one writes its pixels, and returns what was learned."""

    def __init__(self, samples: Sequence[Sample], scratch: Scratch, fit: Fit):
        self.samples, self.scratch, self.fit = samples, scratch, fit
        self.images, self.masks = scratch.images(), scratch.masks()

    def __getstate__(self) -> tuple[Sequence[Sample], Scratch, Fit]:
        return self.samples, self.scratch, self.fit  # another process opens the files itself

    def __setstate__(self, state: tuple[Sequence[Sample], Scratch, Fit]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Decoded:
        return _decode(self.samples[row], self, row)


def decode_all(decoder: Decoder[T], advance: Callable[[int], object], processes: int | None = None) -> list[T]:
    """Decode every item in order.

    Args:
        decoder: decodes an item, and writes its pixels to scratch files.
        advance: is told how many more items are decoded.
        processes: number of processes beside this one; by default, one for each core if there are many items.

    Returns:
        What was learned of each item.
    """
    import torch
    from dask.system import cpu_count
    from torch.utils.data import DataLoader

    if processes is None:
        processes = min(cpu_count(), len(decoder) // PER_PROCESS)
        processes = processes if processes > 1 else 0
    loader: Any = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_size=BATCH,
        num_workers=processes,
        collate_fn=list,
        prefetch_factor=4 if processes else None,
        generator=torch.Generator(),  # else the loader draws a seed from the caller's random state
    )
    decoded: list[T] = []
    for batch in loader:
        decoded += batch
        advance(len(batch))
    return decoded


def _decode(sample: Sample, files: Files, row: int) -> Decoded:
    size, fit = files.scratch.size, files.fit
    digest = ""
    suffix = sample.path.suffix.lower()
    try:
        if suffix in RAW:
            return Decoded(picture=False)
        picture = read_image(sample.path)
        image = picture.image
        with open(sample.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.images[row] = fitted(image, size, fit).transpose(2, 0, 1)
        learned = Decoded(
            digest,
            cut=cut_away(image, size),
            frames=picture.frames,
            dark=picture.dark,
            size=(image.height, image.width),
        )
        if sample.mask is None:
            return learned
        try:
            mask = read_mask(sample.mask)
        except UnreadableError as error:  # the image is one all the same
            return replace(learned, problem=str(error))
        height, width = mask.covers.shape
        if (width, height) != image.size:
            problem = f"it is {image.width}×{image.height}, its mask {sample.mask} {width}×{height}"
            return replace(learned, problem=problem)
        files.masks[row, 0] = covered(mask.covers, size, fit)
        return replace(learned, object=float(mask.covers.mean()), read_by=mask.read_by)
    except NoPictureError as error:
        return Decoded(digest, str(error), picture=error.kind is None and is_of_images(suffix))
    except UnreadableError as error:
        return Decoded(digest, str(error))
    except OSError as error:
        return Decoded(digest, f"it cannot be read: {error.strerror or error}")
