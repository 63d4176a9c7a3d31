"""Decode image and mask files of any kind as an image viewer shows them. Not here: which files there are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from data.builders.rows import OPAQUE
from data.errors import DatasetError
from options.common import Fit

T = TypeVar("T")
Size = tuple[int, int]  # height and width in pixels

LABELS = 32  # values that a mask of labels may have, whatever lies beside them
EDGE = 4  # levels by which neighbouring labels differ, where there are more values than that
SMALL = 64  # values of labels in a format that may be lossy are below this
INVISIBLE = 16  # opacity, of 255, up to which nothing is seen; a lossy file of opacity 0 has values above 0
LOSSY = ("JPEG", "MPO", "TIFF of JPEG")
MAYBE_LOSSY = ("WEBP", "AVIF", "JPEG2000", "HEIF", "JXL", "TIFF of WEBP")
NO_PICTURES = ("MPEG", "PDF", "EPS", "WMF")  # formats that Pillow opens without decoding them, or by other programs
SQUEEZED = ("make-data coco-on-places", "make-data waterbirds")  # use `open_squeezed`
TURNS = {  # EXIF's orientation → how the pixels are turned upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # the tag of EXIF


class UnreadableError(ValueError):
    """A file cannot be decoded; the text says why."""


class NoPictureError(UnreadableError):
    """A file is not an image. ``kind`` is its format, or None if that is unknown."""

    def __init__(self, text: str, kind: str | None = None):
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Encoded:
    """An image file in memory.

    Attributes:
        name: its name, for errors.
        data: its bytes.
    """

    name: str
    data: bytes


Source = Path | Encoded | Image.Image  # an image file, or an image that is opened or decoded already


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        image: in RGB, upright.
        frames: number of frames in the file, of which this is the first.
        dark: it has more than 8 bits, and its brightest value is below a sixteenth of their range.
    """

    image: Image.Image
    frames: int
    dark: bool


@dataclass(frozen=True)
class Mask:
    """A decoded mask.

    Attributes:
        covers: where the object is, bool (H, W), upright.
        read_by: the rule that told it, for a note to the user.
    """

    covers: np.ndarray
    read_by: str


def read_image(source: Source) -> Picture:
    """Decode an image as an image viewer shows it.

    Transparent pixels become black. Grey values of more than 8 bits are scaled by `_top`.

    Args:
        source: the image.

    Returns:
        The image.

    Raises:
        NoPictureError: The file is not an image.
        UnreadableError: The file cannot be decoded.
    """
    return _decoded(source, lambda image, kind: _as_shown(image))


def read_mask(source: Source, *, soft: bool = False) -> Mask:
    """Decode a mask. The object is where an image viewer shows something.

    1. If the opacity varies, the object is where the mask is more than half opaque.
    2. A palette of greys is read by its colours. In another palette, black is the background, or the number 0 if no
       pixel is black.
    3. Of colours, the brightest channel counts. Labels have few values in flat areas: 0 is the background, and all
       other values are the object. Everything else is soft or lossy: the object is brighter than half of the range.

    Args:
        source: the mask.
        soft: read brightness by the last rule, even if it looks like labels.

    Returns:
        The mask.

    Raises:
        UnreadableError: The file cannot be decoded.
    """
    return _decoded(source, lambda image, kind: _object(image, soft, kind))


def _decoded(source: Source, use: Callable[[Image.Image, str], T]) -> T:
    """Open an image, decode its pixels, and turn whatever Pillow raises on it into an UnreadableError.

    ``use`` takes the image and its format (`_kind`). It is our own code on decoded pixels, so its mistakes stay what
    they are.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as opened:
        warnings.simplefilter("ignore")  # of odd metadata
        with _blaming(source, Exception):  # Pillow and its plug-ins raise exceptions of any type on damaged files
            image = opened.enter_context(_opened(source))
            if isinstance(image, ImageFile.StubImageFile) or image.format in NO_PICTURES:
                raise NoPictureError(f"{_name(source)} is not an image, but {image.format}", image.format)
            image.load()
            kind = _kind(image, source)
        with _blaming(source):
            return use(image, kind)


def _name(source: Source) -> str:
    return "the image" if isinstance(source, Image.Image) else source.name


@contextlib.contextmanager
def _blaming(source: Source, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, and an UnreadableError, into an UnreadableError that names the image."""
    try:
        yield
    except NoPictureError:
        raise
    except UnreadableError as error:
        raise UnreadableError(f"{_name(source)} {error}") from None
    except kinds as error:
        if isinstance(error, FileNotFoundError):
            raise UnreadableError(f"{_name(source)} is no longer there") from None
        if isinstance(error, UnidentifiedImageError):
            raise NoPictureError(f"{_name(source)} cannot be read: cannot identify image file") from None
        reason = str(error) or type(error).__name__
        if isinstance(source, Path):
            reason = reason.replace(str(source), source.name)
        raise UnreadableError(f"{_name(source)} cannot be read: {reason}") from None


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """Open a file, and close it afterwards. An image that is open already stays open."""
    if isinstance(source, Image.Image):
        yield source
        return
    with Image.open(source if isinstance(source, Path) else BytesIO(source.data)) as image:
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its camera says; if its metadata cannot be read, return it as it lies."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION) or 1)
    except Exception:  # of many types: the metadata is damaged, and the pixels are not
        return image
    return image if turn is None else image.transpose(turn)


def _frames(image: Image.Image) -> int:
    """Count the frames, for which Pillow reads on in the file."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # of any type, on a damaged file
        raise UnreadableError(f"cannot be read: {str(error) or type(error).__name__}") from None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to another mode of Pillow, which does not know every pair of them."""
    try:
        return image.convert(mode)
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot be read: {error}") from None


# --- images -----------------------------------------------------------------------------------------------------------


def _as_shown(image: Image.Image) -> Picture:
    frames, dark = _frames(image), False
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut values off at 255
        values = _finite(image)
        top = _top(values)
        dark = bool(top == 65535 and values.max(initial=0) < 4096)
        image = Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = _converted(image, "RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return Picture(_converted(image, "RGB"), frames, dark)


def _finite(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise UnreadableError("has values that are not finite")
    return values


def _top(values: np.ndarray) -> float:
    """Return the value of white for grey values of more than 8 bits.

    It is 1 for fractions up to 1, then 255 or 65535 if no value is above that, then the largest value. The number of
    bits alone does not tell, because programs store 8-bit images in files of 16 and 32 bits.
    """
    largest = float(values.max(initial=0))
    if largest <= 1 and (values != np.floor(values)).any():
        return 1.0
    return next((top for top in (255.0, 65535.0) if largest <= top), largest)


# --- masks ------------------------------------------------------------------------------------------------------------


def _object(image: Image.Image, soft: bool, kind: str) -> Mask:
    image = _upright(image)
    if image.has_transparency_data and not (image.mode.startswith("I") or image.mode == "F"):
        opacity = np.asarray(_converted(image, "RGBA").getchannel("A"))
        opaque = opacity > OPAQUE // 2
        if opaque.any() != opaque.all() or opacity.max() <= INVISIBLE:
            return Mask(opaque, "opacity")
        image = _converted(image, "RGBA").convert("RGB") if image.mode != "P" else image
    if image.mode == "P":
        numbers = np.asarray(image)
        palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
        used = palette[np.unique(numbers)]
        if (used != used[:, :1]).any():
            black = (used == 0).all(1).any()
            covers = palette[numbers].any(2) if black else numbers != 0
            return Mask(covers, "the numbers of its palette" if not black else "the colours of its palette")
        return Mask(_bright(palette[numbers, 0], OPAQUE, kind, soft), "the colours of its palette")
    if image.mode == "1":
        return Mask(np.asarray(image), "brightness")
    if image.mode.startswith("I") or image.mode == "F":
        values = _finite(image)
        return Mask(_bright(values, _top(values), kind, soft), "brightness")
    values = np.asarray(image if image.mode == "L" else _converted(image, "RGB"))
    return Mask(_bright(values if values.ndim == 2 else values.max(2), OPAQUE, kind, soft), "brightness")


def _kind(image: Image.Image, source: Source) -> str:
    """Return the format of a file that is open; TIFF says how it is compressed, and WebP whether it is lossless."""
    kind, compression = str(image.format), str(image.info.get("compression", ""))
    if kind == "WEBP" and b"VP8L" in _head(source):  # the chunk of lossless pixels
        return "WEBP without loss"
    if kind == "TIFF" and compression in ("jpeg", "tiff_jpeg", "webp"):
        return f"TIFF of {compression.removeprefix('tiff_').upper()}"
    return kind


def _head(source: Source) -> bytes:
    """Return the first bytes of an image file; none if the image was opened elsewhere, and not from a file."""
    if isinstance(source, Encoded):
        return source.data[:4096]
    path = source if isinstance(source, Path) else Path(str(getattr(source, "filename", "")))
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(4096)


def _bright(values: np.ndarray, top: float, kind: str, soft: bool) -> np.ndarray:
    """Return where the object is, bool (H, W), by the brightness of a mask."""
    half = np.asarray(2.0 * values > top)
    if soft or kind in LOSSY:
        return half
    lowest, highest = values.min(initial=0), values.max(initial=0)
    if kind in MAYBE_LOSSY and (highest >= SMALL or lowest > 0 or not values.any()):
        return half
    if not _are_labels(values):
        return half
    lowest = values.min()
    if lowest > 0 and lowest < highest:  # nothing is 0, so the darker half of the values is the background
        return np.asarray(2.0 * values > float(lowest) + float(highest))
    return np.asarray(values > 0)


def _are_labels(values: np.ndarray) -> bool:
    """Return whether values are numbers of classes or objects, and not degrees of brightness.

    Labels are whole numbers and fill flat areas. If there are many, neighbours differ by more than a smooth transition.
    """
    between = np.asarray((values > 0) & (values < values.max()))
    if not between.any():
        return True
    if (values != np.floor(values)).any():
        return False
    right, below = values[:, 1:] == values[:, :-1], values[1:] == values[:-1]
    flat = np.zeros((2, *values.shape), np.bool_)  # equal to a neighbour at the side, and to one above or below
    flat[0, :, 1:] |= right
    flat[0, :, :-1] |= right
    flat[1, 1:] |= below
    flat[1, :-1] |= below
    if 2 * (flat[0] & flat[1] & between).sum() < between.sum():
        return False
    if len(np.unique(values)) <= LABELS:
        return True
    numbers = values.astype(np.float64)
    steps = np.concatenate([np.abs(np.diff(numbers, axis=axis)).ravel() for axis in (0, 1)])
    return bool(np.median(steps[steps > 0]) >= EDGE)


# --- size -------------------------------------------------------------------------------------------------------------


def fitted(image: Image.Image, size: Size, fit: Fit) -> np.ndarray:
    """Scale an image with antialiasing.

    Args:
        image: the image, in grey or RGB.
        size: height and width of the result in pixels.
        fit: ``crop`` scales until the result is covered, and cuts off what is beyond the middle; ``pad`` scales until
            the whole image is inside, and leaves black margins; ``stretch`` changes the aspect ratio.

    Returns:
        uint8 (height, width) or (height, width, 3).
    """
    height, width = size
    if fit == "pad":
        scale = min(width / image.width, height / image.height)
        inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(image.resize(inner, Image.Resampling.BILINEAR), (left, top))
        return np.asarray(canvas)
    box = _middle(image, size) if fit == "crop" else None
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def fit_of(builder: Mapping[str, Any]) -> Fit | None:
    """Return how a dataset's images were fitted, by its attribute ``builder``; None if that is unknown."""
    fit, command = builder.get("fit"), builder.get("command")
    if fit in get_args(Fit):
        return cast(Fit, fit)
    if command in SQUEEZED:
        return "stretch"
    return "crop" if command == "make-data image-folder" else None  # which records any other fit


def _middle(image: Image.Image, size: Size) -> tuple[int, int, int, int]:
    """Return the largest box of this aspect ratio in the middle of an image: left, top, right, bottom."""
    height, width = size
    box_width = min(image.width, max(1, round(image.height * width / height)))
    box_height = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - box_width) // 2, (image.height - box_height) // 2
    return left, top, left + box_width, top + box_height


def covered(covers: np.ndarray, size: Size, fit: Fit) -> np.ndarray:
    """Scale a mask, bool (H, W), like an image: uint8 (height, width), 255 on pixels that the object fully covers."""
    opacity = fitted(Image.fromarray(np.where(covers, np.uint8(OPAQUE), np.uint8(0))), size, fit)
    return np.where(opacity == OPAQUE, np.uint8(255), np.uint8(0))


def cut_away(image: Image.Image, size: Size) -> float:
    """Return the share of an image's pixels that ``crop`` cuts away, from 0 to 1."""
    left, top, right, bottom = _middle(image, size)
    return 1 - (right - left) * (bottom - top) / (image.width * image.height)


# --- files of published datasets --------------------------------------------------------------------------------------


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
    squeezed = _published(path, remedy, lambda image: fitted(_converted(image, "RGB"), (size, size), "stretch"))
    return squeezed.transpose(2, 0, 1)


def open_mask(path: Path, size: int, remedy: str) -> np.ndarray:
    """Read a soft mask file, squeezed like an image: uint8 (1, size, size), 255 on pixels that the object fully covers.

    Arguments and errors are those of `open_squeezed`.
    """
    covers = _published(path, remedy, lambda image: _object(image, soft=True, kind="").covers)
    return covered(covers, (size, size), "stretch")[None]


def _published(path: Path, remedy: str, use: Callable[[Image.Image], T]) -> T:
    if not path.exists():
        raise DatasetError(f"there is no {path}: {remedy}")
    try:
        return _decoded(path, lambda image, kind: use(image))
    except UnreadableError as error:
        raise DatasetError(f"the image {path} cannot be read ({error}): {remedy}") from None
