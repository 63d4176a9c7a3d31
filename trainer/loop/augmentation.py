"""Random flips, shifts and crops that move an image, its heatmap and its mask together, in batches on the device.

What happens to a sample is a function of the seed, the step and the sample's row in the global batch alone: processes
that have a part of it each do exactly what one process with all of it does. PyTorch's generators are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

from options import Call, Lazy, Message, Option, Registry
from trainer.errors import TrainingError

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from pipeline import device
else:
    np, torch, F = Lazy("numpy"), Lazy("torch"), Lazy("torch.nn.functional")
    device = Lazy("pipeline.device")

Kind = Literal["image", "map", "mask"]
Move = Callable[["Tensor", "np.ndarray", Kind], "Tensor"]

# Each takes values (N, C, H, W) of a kind and the samples' uniform numbers, and returns new values of the same shape.
# They are applied in this order.
AUGMENTATIONS: Registry[Move] = Registry("augment", TrainingError)

BACKGROUND = "background"  # moves nothing: see `trainer.loop.repainting`
LARGEST_SHIFT = 1 / 8  # of a side
SMALLEST_CROP = 0.6  # of the area

_STREAM = 16  # a random stream of the seed; those of trainer.stream.order count from 1
_FLIP, _SHIFT, _CROP, _NUMBERS = 0, slice(1, 3), slice(3, 6), 6  # a sample's uniform numbers, whatever is asked for


def check_augmentations(
    names: Collection[str],
    map_shape: tuple[int, ...] | None,
    image_shape: tuple[int, ...],
    valid: Collection[str],
) -> None:
    """Raise TrainingError for a name that is unknown, not ``valid`` for the method, or not possible at this size.

    ``map_shape`` (c, h, w) is that of the teacher's maps, None where there are none; ``image_shape`` is (C, H, W).
    Maps smaller than the image cannot be shifted by its pixels, nor cropped; they can be flipped.
    """
    for name in names:
        AUGMENTATIONS.check(name)
        if name not in valid:
            remedy: tuple[object, ...] = ()
            if name == "flip":
                copy = Call("make_flipped", command="make-data flipped")
                remedy = ("; ", copy, " adds flipped images to a dataset")
            can = ", ".join(valid) or "none"
            raise TrainingError(
                Message(Option("augment", name), f" is not valid for this method: it can have {can}", *remedy)
            )
        if name not in ("flip", BACKGROUND) and map_shape is not None and map_shape[-2:] != image_shape[-2:]:
            (h, w), (height, width) = map_shape[-2:], image_shape[-2:]
            raise TrainingError(
                Message(
                    Option("augment", name),
                    f" needs heatmaps of the images' size, {height}×{width}, these are {h}×{w}: leave it out, or make "
                    "a store of full resolution",
                )
            )


def augment(
    images: Tensor,
    maps: Tensor | None,
    names: Collection[str],
    *,
    seed: int,
    step: int,
    first: int,
    of: int,
) -> tuple[Tensor, Tensor | None]:
    """Move images, float (N, C, H, W), and their maps, float (N, c, h, w), by those of the ``names`` that move.

    ``step`` counts the steps of the whole training, ``first`` is the row of the first image in the global batch, and
    ``of`` the number of that batch's rows. Names are applied in the table's order; one changes nothing about what
    another does. Returns tensors of the same shapes, types and memory layouts; those given are not changed.

    Heatmaps smaller than the image can be flipped alone. Where they leave out its last columns, which do not fill a
    pixel of theirs, a flipped one lies beside its image by as many.

    Raises TrainingError as `check_augmentations` does, and ValueError for rows that the global batch lacks.
    """
    check_augmentations(names, None if maps is None else maps.shape, images.shape, AUGMENTATIONS)
    uniforms = _uniforms(seed, step, first, len(images), of)
    return _moved(images, names, uniforms, "image"), None if maps is None else _moved(maps, names, uniforms, "map")


def augment_masks(masks: Tensor, names: Collection[str], *, seed: int, step: int, first: int, of: int) -> Tensor:
    """Masks (N, 1, H, W) of any type, moved as `augment` moves their images: nearest pixel, no new values but 0."""
    check_augmentations(names, None, masks.shape, AUGMENTATIONS)
    return _moved(masks, names, _uniforms(seed, step, first, len(masks), of), "mask")


def _uniforms(seed: int, step: int, first: int, count: int, of: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (count, _NUMBERS), a row for each sample."""
    if not 0 <= first <= first + count <= of:
        raise ValueError(f"rows {first} to {first + count} are not all within a batch of {of}")
    return np.random.default_rng([seed, _STREAM, step]).random((of, _NUMBERS))[first : first + count]


def _moved(values: Tensor, names: Collection[str], uniforms: np.ndarray, kind: Kind) -> Tensor:
    channels_last = values.is_contiguous(memory_format=torch.channels_last)
    for name, move in AUGMENTATIONS.items():
        if name in names:
            values = move(values, uniforms, kind)
    # a network whose weights are channels last would be slower, and round differently, on another layout
    return values.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@AUGMENTATIONS.add("flip")
def _flip(values: Tensor, uniforms: np.ndarray, kind: Kind) -> Tensor:
    """Exchange left and right, with probability 0.5. This is exact."""
    flipped = device.to_device(uniforms[:, _FLIP] < 0.5, values.device)
    return torch.where(flipped.view(-1, 1, 1, 1), values.flip(-1), values)


@AUGMENTATIONS.add("shift")
def _shift(values: Tensor, uniforms: np.ndarray, kind: Kind) -> Tensor:
    """Move by whole pixels, up to 1/8 of each side, and fill with zeros.

    Each number of pixels is as likely. This is exact.
    """
    size = np.array(values.shape[2:])
    most = (size * LARGEST_SHIFT).astype(np.int64)
    by = np.floor(uniforms[:, _SHIFT] * (2 * most + 1)).astype(np.int64) - most  # (N, 2): down, to the right
    rows, columns = (
        device.to_device(np.arange(size[axis]) + most[axis] - by[:, axis, None], values.device) for axis in range(2)
    )
    padded = F.pad(values, (int(most[1]),) * 2 + (int(most[0]),) * 2)
    samples = torch.arange(len(values), device=values.device).view(-1, 1, 1)
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@AUGMENTATIONS.add("crop")
def _crop(values: Tensor, uniforms: np.ndarray, kind: Kind) -> Tensor:
    """Cut out a box of 60 to 100 % of the area, with the image's aspect ratio, and resize it to the image's size.

    The box is anywhere in the image. Resizing is bilinear, for masks by the nearest pixel. A resized map has 1/share as
    many pixels for the box's relevance, with share the box's part of the area: it is multiplied by the share, so that
    the relevance in the box keeps its sum (up to interpolation) and no sample outweighs another.
    """
    areas, tops, lefts = uniforms[:, _CROP].T
    shares = SMALLEST_CROP + (1 - SMALLEST_CROP) * areas
    sides = np.sqrt(shares)
    ys, xs = (
        _centres(starts * (1 - sides), sides, size).to(_floating(values.dtype))
        for starts, size in zip((tops, lefts), values.shape[2:], strict=True)
    )
    ys, xs = device.to_device(ys, values.device)[:, :, None], device.to_device(xs, values.device)[:, None, :]
    grid = torch.stack(torch.broadcast_tensors(xs, ys), dim=-1)  # (N, H, W, 2)
    mode = "nearest" if kind == "mask" else "bilinear"
    resized = F.grid_sample(values.to(grid.dtype), grid, mode, padding_mode="border", align_corners=False)
    if kind == "map":
        resized = resized * device.to_device(torch.from_numpy(shares).to(grid.dtype), values.device).view(-1, 1, 1, 1)
    return resized.to(values.dtype)


def _centres(starts: np.ndarray, sides: np.ndarray, size: int) -> Tensor:
    """Where to sample ``size`` pixels of each stretch of the unit interval, float64 (N, size); −1 and 1 are its ends.

    In NumPy, and so the same numbers on every device and for every part of the batch.
    """
    return torch.from_numpy(2 * (starts[:, None] + sides[:, None] * (np.arange(size) + 0.5) / size) - 1)


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


@AUGMENTATIONS.add(BACKGROUND)
def _background(values: Tensor, uniforms: np.ndarray, kind: Kind) -> Tensor:
    """Move nothing; a quarter to half of the images get another background outside the dataset's masks.

    `trainer.loop.repainting` paints it.
    """
    return values
