"""A user's own images, in folders by class as torchvision's ImageFolder reads them, with optional masks and groups.

Every file is decoded before anything is written, so that one error lists everything that is wrong.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

import data
from data.builders.folders import Sample, find_classes, find_samples, read_groups, with_group, with_mask
from data.builders.pictures import UnreadableError, middle_square, read_image, read_mask
from data.builders.registry import HOW, BuilderOptions, ImageSize, Seeded, builder
from data.builders.rows import OPAQUE, Rows
from data.errors import DatasetError
from options import Doc, Gt, Heading, Kind, Lt, Message, Option

if TYPE_CHECKING:
    from data.storage import Location

LISTED = 20  # bad files in an error
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
    masks: Annotated[Any, Kind.PATH, Doc("Folder with a mask for each image, under the image's path and name.")] = None
    groups: Annotated[Any, Kind.PATH, Doc("CSV file with the columns path and group.")] = None
    validation_share: Annotated[
        float, Gt(0), Lt(1), Heading(HOW), Doc("Share of the training images for validation, if no folder is given.")
    ] = 0.1
    bias_attribute: Annotated[str, Heading(HOW), Doc("Name of the attribute whose values are the groups.")] = "group"
    size: Annotated[ImageSize, Heading(HOW)]
    skip_bad: Annotated[bool, Heading(HOW), Doc("Leave out images that cannot be read or have no mask or group.")] = (
        False
    )


@builder(
    "image-folder",
    ImageFolderOptions,
    example="make-data image-folder --train images/train --test ood=images/ood --size 64 --out DATA.zarr",
)
def make_image_folder(
    out: Location, train: str | Path, tests: Mapping[str, str | Path], **options: Any
) -> dict[str, int]:
    """Build a dataset from your own images.

    The images lie in folders by class, as torchvision's ImageFolder reads them. The classes are the folders of the
    training images. The images become uint8 (N, 3, size, size): in colour, upright, with transparent pixels in black.
    The shorter side is scaled to the size with antialiasing, and the middle is cut out. Masks are images too, in any
    format: 0 is the background, everything else the object. They lie at the same place as the image, below MASKS/SPLIT,
    or below MASKS if there is no such folder. The file of groups names an image as SPLIT/CLASS/FILE, such as
    ood/cat/1.jpg. More is in docs/own-images.md.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or files cannot be used; the error lists them.
    """
    chosen = ImageFolderOptions(out=out, train=train, tests=tests, **options)
    if reserved := {"train", "validation"} & set(tests):
        raise DatasetError(
            Message(f"a test cannot be called {reserved.pop()}, a split of its own: call it iid, ood, shift or similar")
        )
    folders = {"train": Path(train), **({} if chosen.validation is None else {"validation": Path(chosen.validation)})}
    folders |= {name: Path(folder) for name, folder in tests.items()}
    classes = find_classes(folders["train"])
    groups = None if chosen.groups is None else read_groups(Path(chosen.groups))
    bad: dict[Path, str] = {}
    splits = {
        name: [_complete(sample, name, chosen.masks, groups, bad) for sample in find_samples(folder, classes)]
        for name, folder in folders.items()
    }
    digests = _decode_all(splits, bad)
    splits = _without_bad(splits, bad, chosen.skip_bad)
    splits, names = _with_learnt_classes(splits, classes, folders, chosen.skip_bad)
    _warn_of_leaks(splits, digests)
    if groups is not None:
        _warn_of_unused_rows(splits, groups, chosen.groups)
    if chosen.validation is None:
        splits = _split_off_validation(splits, chosen.validation_share, chosen.seed)
    _write(chosen, splits, names)
    return {name: len(samples) for name, samples in splits.items()}


def _write(chosen: ImageFolderOptions, splits: Splits, class_names: list[str]) -> None:
    size, group_names = chosen.size, sorted({s.group for part in splits.values() for s in part if s.group is not None})
    with data.DatasetWriter(chosen.out) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, samples in splits.items():
            arrays: dict[str, Any] = {
                "images": Rows((len(samples), 3, size, size), pool, partial(_image_of, samples, size)),
                "labels": np.array([sample.label for sample in samples], np.int64),
            }
            if chosen.masks is not None:
                arrays["masks"] = Rows((len(samples), 1, size, size), pool, partial(_mask_of, samples, size))
            if chosen.groups is not None:
                arrays["groups"] = np.array([group_names.index(sample.group or "") for sample in samples], np.int64)
            writer.write_split(name, **arrays)
        attributes = {"bias_attribute": chosen.bias_attribute, "group_names": group_names}
        writer.finish(
            name=Path(str(chosen.out)).stem,
            class_names=class_names,
            builder={"command": "make-data image-folder", "size": size, "seed": chosen.seed},
            **({} if chosen.groups is None else attributes),
        )


# --- which images can be used -----------------------------------------------------------------------------------------


def _complete(
    sample: Sample, split: str, masks: str | Path | None, groups: Mapping[str, str] | None, bad: dict[Path, str]
) -> Sample:
    """Add the mask and the group of an image, or note in ``bad`` which of them is missing."""
    try:
        sample = sample if groups is None else with_group(sample, split, groups)
    except LookupError as error:
        bad[sample.path] = str(error)
    try:
        return sample if masks is None else with_mask(sample, split, Path(masks))
    except LookupError as error:
        bad.setdefault(sample.path, str(error))
        return sample


def _decode_all(splits: Splits, bad: dict[Path, str]) -> dict[Path, str]:
    """Return the SHA-256 of every image file; note in ``bad`` which images or masks cannot be decoded."""
    samples = [sample for part in splits.values() for sample in part]
    digests = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(samples), unit="image", desc="decoding", disable=None) as bar,
    ):
        for sample, (digest, problem) in zip(samples, pool.map(_decode, samples), strict=True):
            digests[sample.path] = digest
            if problem is not None:
                bad.setdefault(sample.path, problem)
            bar.update()
    return digests


def _decode(sample: Sample) -> tuple[str, str | None]:
    """Return the SHA-256 of an image file, and why the image or its mask cannot be used, if so."""
    digest = ""
    try:
        digest = hashlib.sha256(sample.path.read_bytes()).hexdigest()
        (width, height) = read_image(sample.path).size
        if sample.mask is not None and (of_mask := read_mask(sample.mask).size) != (width, height):
            return digest, f"it is {width}×{height}, its mask {sample.mask} {of_mask[0]}×{of_mask[1]}"
    except UnreadableError as error:
        return digest, str(error)
    except OSError as error:
        return digest, f"it cannot be read: {error.strerror}"
    return digest, None


def _without_bad(splits: Splits, bad: Mapping[Path, str], skip: bool) -> Splits:
    """Leave out bad images, or raise DatasetError with a list of them."""
    if bad and not skip:
        lines = [f"{path}: {problem}" for path, problem in list(bad.items())[:LISTED]]
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        first = f"{len(bad)} file{'s' * (len(bad) > 1)} cannot be used, "
        rest = "\n".join([" leaves them out:", *lines, *more])
        raise DatasetError(Message(first, Option("skip_bad", True), rest))
    usable = {name: [sample for sample in samples if sample.path not in bad] for name, samples in splits.items()}
    for name, samples in splits.items():
        if left_out := len(samples) - len(usable[name]):
            LOGGER.warning("%s: %d of %d images left out", name, left_out, len(samples))
    return usable


def _with_learnt_classes(
    splits: Splits, classes: Sequence[str], folders: Mapping[str, Path], skip: bool
) -> tuple[Splits, list[str]]:
    """Return the images of the classes that have a training image, and the names of these classes."""
    training = Counter(sample.label for sample in splits["train"])
    if empty := [name for number, name in enumerate(classes) if not training[number]]:
        if not skip:
            raise DatasetError(
                Message(
                    f"the class '{empty[0]}' in {folders['train']} has no image: add images or delete its folder; ",
                    Option("skip_bad", True), " leaves the class out",
                )
            )  # fmt: skip
        LOGGER.warning("classes without a training image, left out: %s", ", ".join(empty))
    kept = [number for number in range(len(classes)) if training[number]]
    if len(kept) < 2:
        raise DatasetError(f"{folders['train']} has images of {len(kept)} class: at least two are needed")
    renumbered = {number: place for place, number in enumerate(kept)}
    usable = {
        name: [replace(sample, label=renumbered[sample.label]) for sample in samples if sample.label in renumbered]
        for name, samples in splits.items()
    }
    for name, samples in usable.items():
        if not samples:
            raise DatasetError(f"{folders[name]} has no image left that can be used")
    return usable, [classes[number] for number in kept]


def _warn_of_leaks(splits: Splits, digests: Mapping[Path, str]) -> None:
    trained_on = {digests[sample.path] for name in ("train", "validation") for sample in splits.get(name, ())}
    for name, samples in splits.items():
        if name not in ("train", "validation"):
            leaks = [sample.name for sample in samples if digests[sample.path] in trained_on]
            if leaks:
                LOGGER.warning(
                    "%s: %d images are also trained on, %s first: its accuracy will be too high",
                    name, len(leaks), leaks[0],
                )  # fmt: skip


def _warn_of_unused_rows(splits: Splits, groups: Mapping[str, str], path: str | Path) -> None:
    used = {f"{name}/{sample.name}" for name, samples in splits.items() for sample in samples}
    if unused := len(groups.keys() - used):
        LOGGER.warning("%s: %d of %d rows name no image", path, unused, len(groups))


def _split_off_validation(splits: Splits, share: float, seed: int) -> Splits:
    """Move a share of each class of the training images to validation; at least one image, if the class has two."""
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    labels = np.array([sample.label for sample in splits["train"]])
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        number = min(max(1, round(share * len(rows))), len(rows) - 1)
        chosen |= {int(row) for row in rng.permutation(rows)[:number]}
    parts: Splits = {"train": [], "validation": []}
    for row, sample in enumerate(splits["train"]):
        parts["validation" if row in chosen else "train"].append(sample)
    tests = {name: samples for name, samples in splits.items() if name != "train"}
    return {name: samples for name, samples in {**parts, **tests}.items() if samples}


# --- their pixels -----------------------------------------------------------------------------------------------------


def _image_of(samples: Sequence[Sample], size: int, row: int) -> np.ndarray:
    return middle_square(read_image(samples[row].path), size).transpose(2, 0, 1)


def _mask_of(samples: Sequence[Sample], size: int, row: int) -> np.ndarray:
    mask = samples[row].mask
    assert mask is not None
    return np.where(middle_square(read_mask(mask), size) == OPAQUE, np.uint8(255), np.uint8(0))[None]
