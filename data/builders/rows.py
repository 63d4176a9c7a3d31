"""Arrays whose rows are made when they are read, so that a dataset of files is written without being in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DatasetError

OPAQUE = 255


@dataclass(frozen=True)
class Rows:
    """A uint8 array for `DatasetWriter`. ``row(i)`` makes row i, in a thread of ``pool``."""

    shape: tuple[int, ...]
    pool: ThreadPoolExecutor
    row: Callable[[int], np.ndarray]
    dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack(list(self.pool.map(self.row, range(*rows.indices(self.shape[0])))))


def open_squeezed(path: Path, size: int, remedy: str) -> np.ndarray:
    """Read an image file in colour, squeezed with antialiasing.

    Args:
        path: the file.
        size: height and width in pixels.
        remedy: what the user can do about a bad file, for the error.

    Returns:
        uint8 (3, size, size).

    Raises:
        DatasetError: The file is missing or cannot be read.
    """
    return np.asarray(_open(path, size, "RGB", remedy)).transpose(2, 0, 1)


def open_mask(path: Path, size: int, remedy: str) -> np.ndarray:
    """Read a mask file, squeezed like an image: uint8 (1, size, size), 255 on pixels that the object fully covers."""
    grey = np.asarray(_open(path, None, "L", remedy))
    covered = Image.fromarray(np.where(grey > 127, np.uint8(OPAQUE), np.uint8(0)))
    opacity = np.asarray(covered.resize((size, size), Image.Resampling.BILINEAR))
    return np.where(opacity == OPAQUE, np.uint8(255), np.uint8(0))[None]


def _open(path: Path, size: int | None, mode: str, remedy: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture = image.convert(mode)
            return picture if size is None else picture.resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise DatasetError(f"there is no {path}: {remedy}") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises the last for a broken PNG
        raise DatasetError(f"the image {path} cannot be read ({error}): {remedy}") from None
