"""Samples whose pixels lie in scratch files: which are used, notes on them, the split of validation, and their dataset.

Builders of datasets that the user brings share it, so that the same images give the same dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import data
from data.builders.decoding import Decoded, Scratch
from data.builders.folders import Echo, Sample
from data.builders.pictures import Size
from data.errors import DatasetError
from options import Message, Option, joined
from options.common import Fit

LISTED = 20  # bad samples in an error
NAMED = 5  # samples in a note
Splits = dict[str, list[Sample]]
Key = tuple[str, Path]  # split and path of a sample


def height_and_width(size: Any) -> Size:
    """Return the option ``size`` as height and width in pixels.

    Raises:
        DatasetError: It is neither one number of pixels nor two.
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise DatasetError(
            Message(Option("size"), f" must be a number of pixels, or height and width, each at least 1, got {size}")
        )
    return sides


def check_tests(names: Iterable[str]) -> None:
    """Raise DatasetError for a test that is called as another split."""
    if reserved := {"train", "validation"} & set(names):
        raise DatasetError(
            f"a test cannot be called {reserved.pop()}, which is another split: call it iid, ood, shift or similar"
        )


def without_bad(splits: Splits, problems: Mapping[Key, object], skip: bool, echo: Echo, what: str = "file") -> Splits:
    """Leave out samples that have a problem.

    Args:
        splits: the samples of each split.
        problems: why a sample cannot be used, a text or a `Message`.
        skip: leave them out. Otherwise they are an error.
        echo: is told how many are left out of each split.
        what: name of a sample, for the error.

    Raises:
        DatasetError: There are such samples, and ``skip`` is false. The text lists them.
    """
    bad = {
        (name, sample.path): problem
        for name, part in splits.items()
        for sample in part
        if (problem := problems.get((name, sample.path)))
    }
    if bad and not skip:
        lines = [Message(f"{path}: ", problem) for (_, path), problem in list(bad.items())[:LISTED]]
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        first = f"{len(bad)} {what}{'s' * (len(bad) > 1)} cannot be used, "
        rest = joined([" leaves them out:", *lines, *more], "\n")
        raise DatasetError(Message(first, Option("skip_bad", True), rest))
    usable = {name: [sample for sample in part if (name, sample.path) not in bad] for name, part in splits.items()}
    for name, part in splits.items():
        if left_out := len(part) - len(usable[name]):
            echo(f"{name}: {left_out} of {len(part)} {'images' if what == 'file' else what + 's'} left out")
    return usable


def split_off_validation(splits: Splits, share: float, seed: int, *, by_group: bool = False) -> Splits:
    """Move a share of each class of the training images to validation; at least one image, if the class has two.

    With ``by_group``, each group of a class gives its part of the share, up to a fraction of an image.
    """
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    labels = np.array([sample.label for sample in splits["train"]])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
        number = min(max(1, round(share * len(rows))), len(rows) - 1)
        if by_group:  # the images of a group follow each other, and those at equal distances are chosen
            rows = sorted(rows, key=lambda row: splits["train"][row].group or "")
            rows = [rows[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]
        chosen |= set(rows[:number])
    parts: Splits = {"train": [], "validation": []}
    for row, sample in enumerate(splits["train"]):
        parts["validation" if row in chosen else "train"].append(sample)
    tests = {name: part for name, part in splits.items() if name != "train"}
    return {name: part for name, part in {**parts, **tests}.items() if part}


# --- notes ------------------------------------------------------------------------------------------------------------

Used = Sequence[tuple[str, Sample, Decoded]]  # split, file, and what was learned of it


def tell_images(used: Used, size: Size, fit: Fit, echo: Echo) -> None:
    """Tell what cropping cuts away, and which files have several frames or are dark."""
    cut = [learned.cut for _, _, learned in used if learned.cut > 0.005]
    if cut and fit == "crop":
        height, width = size
        echo(
            f"{len(cut)} of {len(used)} images have another aspect ratio than {width}×{height}: cropping to the middle "
            f"cuts away {100 * sum(cut) / len(cut):.0f} % of their pixels, and the fit pad or stretch keeps them"
        )
    if frames := [sample.path for _, sample, learned in used if learned.frames > 1]:
        echo(f"files with several frames, of which the first is used: {len(frames)}, such as {frames[0]}")
    if dark := [sample.path for _, sample, learned in used if learned.dark]:
        echo(
            f"images that use less than a sixteenth of their 16 bits and become nearly black: {len(dark)}, such as "
            f"{dark[0]}; scale their values to 0 … 65535 if they should be brighter"
        )


def tell_masks(used: Used, echo: Echo) -> None:
    """Tell how masks were read, how much of them is object, and which of them have no object, or no background."""
    masks = [(sample.mask, learned) for _, sample, learned in used if learned.object is not None]
    if not masks:
        return
    rules = Counter(learned.read_by for _, learned in masks)
    share = float(np.mean([learned.object for _, learned in masks]))
    by = ", ".join(f"{count} by {rule}" for rule, count in rules.most_common())
    echo(f"masks: {len(masks)} read, {by}; on average the object covers {100 * share:.1f} % of an image")
    for what, value in (("all object", 1.0), ("no object", 0.0)):
        if paths := [str(path) for path, learned in masks if learned.object == value]:
            more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
            echo(f"masks that have {what}: {len(paths)} of {len(masks)}, {', '.join(paths[:NAMED])}{more}")


def tell_copies(used: Used, echo: Echo) -> None:
    """Warn of images, by their files' SHA-256, that are in training and in another split, or in two classes."""
    copies: dict[str, list[tuple[str, Sample]]] = {}
    for name, sample, learned in used:
        copies.setdefault(learned.digest, []).append((name, sample))
    splits: dict[str, list[str]] = {}
    in_two_classes = []
    for same in copies.values():
        names = [name for name, _ in same]
        for name, sample in same:
            if (name == "validation" and "train" in names) or (
                name not in ("train", "validation") and {"train", "validation"} & set(names)
            ):
                splits.setdefault(name, []).append(sample.name)
        if len({sample.label for _, sample in same}) > 1:
            in_two_classes.append(" and ".join(str(sample.path) for _, sample in same[:2]))
    for name, leaks in splits.items():
        result = "it cannot select the weights" if name == "validation" else "its accuracy will be too high"
        echo(f"{name}: images that are also trained on: {len(leaks)}, such as {leaks[0]}; {result}")
    if in_two_classes:
        echo(f"images in two classes, one of which is wrong: {len(in_two_classes)}, such as {in_two_classes[0]}")


# --- their pixels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Some rows of a scratch file, as an array for `DatasetWriter`."""

    pixels: np.ndarray
    rows: np.ndarray
    bar: Any
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.pixels.shape[1:])

    def __getitem__(self, part: slice) -> np.ndarray:
        rows = self.rows[part]
        if self.bar is not None:
            self.bar.update(len(rows))
        return self.pixels[rows]


def write_samples(
    out: Any,
    splits: Splits,
    scratch: Scratch,
    row_of: Mapping[Key, int],
    bar: Any,
    *,
    group_names: Sequence[str],
    **attributes: Any,
) -> None:
    """Write the dataset.

    Args:
        out: where to.
        splits: the samples of each split; those of a validation split may be of the training split.
        scratch: their pixels.
        row_of: the row of each sample in the scratch files.
        bar: is updated with the number of images that are written.
        group_names: names of the groups by their number.
        attributes: further attributes of the dataset, see `DatasetWriter.finish`.
    """
    number_of = {name: number for number, name in enumerate(group_names)}
    with data.DatasetWriter(out) as writer:
        for name, part in splits.items():
            source = name if (name, part[0].path) in row_of else "train"  # validation may be split off from it
            rows = np.array([row_of[source, sample.path] for sample in part])
            arrays: dict[str, Any] = {
                "images": _Rows(scratch.images(), rows, bar),
                "labels": np.array([sample.label for sample in part], np.int64),
            }
            if any(sample.mask for sample in part):
                arrays["masks"] = _Rows(scratch.masks(), rows, None)
            if any(sample.group for sample in part):
                arrays["groups"] = np.array([number_of[sample.group or ""] for sample in part], np.int64)
            writer.write_split(name, **arrays)
        names = {"group_names": list(group_names)} if group_names else {}
        writer.finish(name=Path(str(out)).stem, **attributes, **names)
