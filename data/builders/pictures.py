"""Decode image and mask files of any kind as an image viewer shows them. Not here: which files there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.builders.rows import OPAQUE


class UnreadableError(ValueError):
    """A file cannot be decoded; the text says why."""


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UnreadableError(f"{path.name} is no longer there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise UnreadableError(f"{path.name} cannot be read: {error}".replace(str(path), path.name)) from None


def read_image(path: Path) -> Image.Image:
    """Return an image file in RGB, upright, with transparent pixels in black, or raise UnreadableError."""
    image = ImageOps.exif_transpose(_decode(path))
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which Pillow would cut off at 255
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(on_black, image)
    return image.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Return a mask file in grey, 255 on the object, where a value or colour is not 0, or raise UnreadableError."""
    image = ImageOps.exif_transpose(_decode(path))
    if image.mode == "P":
        values = np.asarray(image)  # the numbers of the colours, of which 0 is the background by convention
    else:
        values = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "CMYK") else image)
    on_object = values.any(axis=2) if values.ndim == 3 else values != 0
    return Image.fromarray(np.where(on_object, np.uint8(OPAQUE), np.uint8(0)))


def middle_square(image: Image.Image, size: int) -> np.ndarray:
    """Return the middle square, scaled with antialiasing, uint8 (size, size) or (size, size, 3)."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
