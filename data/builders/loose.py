"""Decode image files from anywhere to the shape of a model's images, in order and in bounded memory.

Not here: which files there are (`folders.py`), and how one is decoded (`pictures.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.builders.folders import RAW, is_of_images
from data.builders.pictures import NoPictureError, UnreadableError, cut_away, fitted, read_image
from data.errors import DatasetError
from options.common import Fit

PER_PROCESS = 64  # files for which a further process is worth its start
MODES = {1: "L", 3: "RGB"}  # by the number of channels
Shape = tuple[int, int, int]  # (C, H, W)


@dataclass(frozen=True)
class LooseImage:
    """A decoded file.

    Attributes:
        path: the file.
        pixels: uint8 (C, H, W); None if the file cannot be used.
        problem: why it cannot be used; None if it can, or if it is no image and was only found in a folder.
        scaled: whether the image had another height or width.
        cut: the share of its pixels that cropping cuts away.
    """

    path: Path
    pixels: np.ndarray | None = None
    problem: str | None = None
    scaled: bool = False
    cut: float = 0.0


class _Files:
    """The files as a dataset of `torch.utils.data`."""

    def __init__(self, files: Mapping[Path, bool], shape: Shape, fit: Fit):
        self.files, self.shape, self.fit = list(files.items()), shape, fit

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> LooseImage:
        path, is_given = self.files[place]
        try:
            return _decode(path, self.shape, self.fit)
        except NoPictureError as error:
            damaged = error.kind is None and is_of_images(path.suffix)
            return LooseImage(path, problem=str(error) if is_given or damaged else None)
        except UnreadableError as error:
            return LooseImage(path, problem=str(error))
        except OSError as error:
            return LooseImage(path, problem=f"{path.name} cannot be read: {error.strerror or error}")


def decode_files(files: Mapping[Path, bool], shape: Shape, fit: Fit, batch_size: int) -> Iterator[Sequence[LooseImage]]:
    """Decode files in several processes.

    Args:
        files: by path, whether the user gave the file itself, see `data.builders.folders.find_images`.
        shape: (C, H, W) of the result, where C is 1 for grey values or 3 for colours.
        fit: how images of another aspect ratio are fitted.
        batch_size: number of files that are decoded at a time. A few batches are decoded ahead.

    Returns:
        The files in their order, in batches.

    Raises:
        DatasetError: No file has so many channels.
    """
    if shape[0] not in MODES:
        raise DatasetError(
            f"the model takes images of {shape[0]} channels, and image files have 1 or 3: use a model of such images"
        )
    import torch
    from dask.system import cpu_count
    from torch.utils.data import DataLoader

    processes = min(cpu_count(), len(files) // PER_PROCESS)
    loader: Any = DataLoader(
        _Files(files, shape, fit),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=processes if processes > 1 else 0,
        collate_fn=list,
        generator=torch.Generator(),  # else the loader draws a seed from the caller's random state
    )
    return iter(loader)


def _decode(path: Path, shape: Shape, fit: Fit) -> LooseImage:
    """Decode a file. Raises UnreadableError, OSError."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise NoPictureError(f"{path.name} is not a file")
    if path.suffix.lower() in RAW:
        raise NoPictureError(f"{path.name} is a raw photograph: develop it, and save it as PNG or JPEG", "RAW")
    channels, *size = shape
    height, width = size
    image = read_image(path).image.convert(MODES[channels])
    pixels = fitted(image, (height, width), fit)
    return LooseImage(
        path,
        pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1),
        scaled=image.size != (width, height),
        cut=cut_away(image, (height, width)),
    )
