"""A user's own images, in folders by class as torchvision's ImageFolder reads them, with optional masks and groups.

Every file is decoded once, before anything is written, so that one error lists everything that is wrong.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

import data
from data.builders.decoding import Decoded, Scratch, decode_all
from data.builders.folders import (
    Echo,
    Sample,
    find_classes,
    find_files,
    read_groups,
    with_groups,
    with_masks,
)
from data.builders.pictures import Fit, Size
from data.builders.registry import HOW, BuilderOptions, Seeded, builder
from data.errors import DatasetError
from options import Doc, Gt, Heading, Kind, Lt, Message, Option

if TYPE_CHECKING:
    from data.storage import Location

LISTED = 20  # bad files in an error
NAMED = 5  # files in a note
LOGGER = logging.getLogger(__name__)
Splits = dict[str, list[Sample]]


@dataclass(frozen=True, kw_only=True)
class ImageFolderOptions(BuilderOptions, Seeded):
    """The options of ``make-data image-folder``."""

    train: Annotated[Any, Kind.PATH, Doc("Folder of the training images, with a folder for each class.")]
    validation: Annotated[
        Any, Kind.PATH, Doc("Folder of the validation images. Default: a share of the training images.")
    ] = None
    tests: Annotated[
        Mapping[str, Any], Kind.NAMED_FOLDERS, Doc("Folder of a test by its name, such as ood=DIR. Repeatable.")
    ] = field(default_factory=dict)
    masks: Annotated[
        Any, Kind.PATH, Doc("Folder with masks under the paths and names of the images. Splits may lack them.")
    ] = None
    groups: Annotated[Any, Kind.PATH, Doc("CSV file with the columns path and group. Splits may be missing.")] = None
    validation_share: Annotated[
        float, Gt(0), Lt(1), Heading(HOW), Doc("Share of the training images for validation, if no folder is given.")
    ] = 0.1
    bias_attribute: Annotated[str, Heading(HOW), Doc("Name of the attribute whose values are the groups.")] = "group"
    size: Annotated[
        Any, Kind.IMAGE_SIZE, Heading(HOW), Doc("Size of the images in pixels: 64, or height and width as 64x96.")
    ]
    fit: Annotated[
        Fit,
        Heading(HOW),
        Doc(
            "How images of another shape are fitted: crop cuts out the middle, pad adds black margins, stretch changes "
            "the aspect ratio."
        ),
    ] = "crop"
    skip_bad: Annotated[
        bool, Heading(HOW), Doc("Leave out images that cannot be read or have no mask or group.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise DatasetError(
                Message(Option("size"), f" must be a number of pixels, or height and width, each at least 1, got {self.size}")
            )

    @property
    def shape(self) -> Size:
        """Height and width of the images, in pixels."""
        height, width = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        return height, width


@builder(
    "image-folder",
    ImageFolderOptions,
    example="make-data image-folder --train images/train --test ood=images/ood --size 64 --out DATA.zarr",
)
def make_image_folder(
    out: Location, train: str | Path, tests: Mapping[str, str | Path], *, echo: Echo = LOGGER.warning, **options: Any
) -> dict[str, int]:
    """Build a dataset from your own images.

    The images lie in folders by class, as torchvision's ImageFolder reads them. The classes are the folders of the
    training images. Images become uint8 (N, 3, height, width): in colour, upright, with transparent pixels in black.
    Masks are images too, at the same place below MASKS/SPLIT, or below MASKS if there is no such folder. The object is
    what an image viewer shows. The file of groups names an image as SPLIT/CLASS/FILE, such as ood/cat/1.jpg. A split
    may lack masks or groups. More is in docs/own-images.md.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or files cannot be used; the error lists them.
    """
    chosen = ImageFolderOptions(out=out, train=train, tests=tests, **options)
    if reserved := {"train", "validation"} & set(tests):
        raise DatasetError(
            f"a test cannot be called {reserved.pop()}, which is another split: call it iid, ood, shift or similar"
        )
    folders = {"train": Path(train), **({} if chosen.validation is None else {"validation": Path(chosen.validation)})}
    folders |= {name: Path(folder) for name, folder in tests.items()}
    classes = find_classes(folders["train"])
    bad: dict[Path, str] = {}
    splits = _paired({name: find_files(folder, classes, echo) for name, folder in folders.items()}, chosen, bad, echo)
    samples = [sample for part in splits.values() for sample in part]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="image-folder-"))
        bar = stack.enter_context(tqdm(total=2 * len(samples), unit="image", desc="decoding", disable=None))
        scratch = Scratch(Path(folder), len(samples), chosen.shape)
        decoded = dict(zip(samples, decode_all(samples, scratch, chosen.fit, bar.update), strict=True))
        splits = _pictures(splits, decoded, bad, echo)
        splits = _without_bad(splits, bad, chosen.skip_bad, echo)
        splits, names = _with_learnt_classes(splits, classes, folders, chosen.skip_bad, echo)
        used = {sample: one for sample, one in decoded.items() if any(sample.path == s.path for s in ())} or decoded
        _tell_pictures(splits, used, chosen, echo)
        _tell_twins(splits, decoded, echo)
        if chosen.validation is None:
            splits = _split_off_validation(splits, chosen.validation_share, chosen.seed)
        bar.set_description("writing")
        _write(chosen, splits, names, scratch, {sample: row for row, sample in enumerate(samples)}, bar)
    return {name: len(part) for name, part in splits.items()}
