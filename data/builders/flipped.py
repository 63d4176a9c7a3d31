"""A copy of any dataset with flipped and turned training images too, so that a teacher explains these as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

import data as datasets
from data.builders.copies import finish_copy
from data.builders.registry import HOW, BuilderOptions, builder
from data.errors import DatasetError
from options import Doc, Heading, Message, Option
from options.common import DatasetPlace

if TYPE_CHECKING:
    from data.storage import Location

TRAIN = "train"
Move = Callable[[np.ndarray], np.ndarray]


def _move(flipped: bool, quarter_turns: int) -> Move:
    """Return a function that flips images (n, C, H, W) from left to right, if asked to, and then turns them."""
    return lambda images: np.rot90(images[..., ::-1] if flipped else images, quarter_turns, axes=(2, 3))


# by name: the moves of an image, the first of which does nothing
SYMMETRIES: dict[str, tuple[Move, ...]] = {
    "left-right": tuple(_move(flipped, 0) for flipped in (False, True)),
    "flips": tuple(_move(flipped, turns) for turns in (0, 2) for flipped in (False, True)),
    "square": tuple(_move(flipped, turns) for turns in range(4) for flipped in (False, True)),
}


@dataclass(frozen=True, kw_only=True)
class FlippedOptions(BuilderOptions):
    """The options of ``make-data flipped``."""

    data: Annotated[DatasetPlace, Heading("Files")]
    symmetries: Annotated[
        Literal["left-right", "flips", "square"],
        Heading(HOW),
        Doc(
            "Symmetries of the images. left-right adds the mirror image (2 copies), flips adds both flips (4 copies), "
            "square adds flips and quarter turns (8 copies, of square images)."
        ),
    ] = "left-right"


@builder("flipped", FlippedOptions, example="make-data flipped --data DATA.zarr --symmetries square --out FLIPPED.zarr")
def make_flipped(out: Location, data: Location, **options: Any) -> dict[str, int]:
    """Build a copy of a dataset with flipped and turned training images.

    The copies of the train split follow each other: all images as they are, then all images of the first symmetry, and
    so on, with their masks, labels and groups. Other splits stay as they are. A teacher explains each copy, so a
    student has exact heatmaps of it. --augment flip flips the heatmaps instead, which is not the same for heatmaps of
    feature maps: those of a flipped image lie up to a position beside the flipped heatmaps.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, the dataset cannot be opened, or its images are not square and have to be.
    """
    from data.layout import read_builder

    chosen = FlippedOptions(out=out, data=data, **options)
    dataset = datasets.open_dataset(data)
    train = dataset.split(TRAIN)
    moves = SYMMETRIES[chosen.symmetries]
    height, width = train.image_shape[1:]
    if height != width and chosen.symmetries == "square":
        raise DatasetError(
            Message(
                f"the images of {dataset.path} are {width}×{height} pixels, and only square images can be turned by a "
                "quarter: give ",
                Option("symmetries", "flips"),
            )
        )
    sizes = {}
    with datasets.DatasetWriter(out) as writer:
        for name, split in dataset.splits.items():
            split.verify()
            moves_of_split = moves if name == TRAIN else moves[:1]
            arrays = {"images": _Copies(split.images, moves_of_split), "labels": _repeat(split.labels, moves_of_split)}
            if split.masks is not None:
                arrays["masks"] = _Copies(split.masks, moves_of_split)
            if split.groups is not None:
                arrays["groups"] = _repeat(split.groups, moves_of_split)
            writer.write_split(name, **arrays)
            sizes[name] = len(split) * len(moves_of_split)
        source = read_builder(data, train.fingerprint) or {}
        finish_copy(writer, dataset, "make-data flipped", symmetries=chosen.symmetries, source=source)
    return sizes


def _repeat(values: Any, moves: tuple[Move, ...]) -> np.ndarray:
    return np.tile(np.asarray(values[:]), len(moves))


class _Copies:
    """The images (N, C, H, W), one copy for each move, as an array whose rows are made when they are read."""

    def __init__(self, images: Any, moves: tuple[Move, ...]):
        self._images, self._moves = images, moves
        self.shape, self.dtype = (len(moves) * images.shape[0], *images.shape[1:]), np.dtype(images.dtype)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        samples, parts = self._images.shape[0], []
        while start < stop:
            copy, first = divmod(start, samples)
            last = min(samples, first + stop - start)
            parts.append(self._moves[copy](np.asarray(self._images[first:last])))
            start += last - first
        return np.ascontiguousarray(np.concatenate(parts))
