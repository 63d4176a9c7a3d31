"""Anyone's own images: folders by class, as torchvision's ImageFolder has them; masks and groups where there are any.

Every file is looked at before anything is written, so that all that is wrong is said at once.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data.builders.rows import OPAQUE, Rows
from data.errors import DatasetError
from data.layout import DatasetWriter
from data.storage import Location

NAMED = 20  # bad files in an error
# torchvision's, which is imported where it is needed: those who read a store alone do without PyTorch
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """An image file: its name below the split's folder, its class, and its mask and group where there are any."""

    path: Path
    name: str
    label: int
    mask: Path | None = None
    group: str | None = None


def make_image_folder(
    out: Location,
    train: str | Path,
    tests: Mapping[str, str | Path],
    *,
    size: int,
    validation: str | Path | None = None,
    validation_share: float = 0.1,
    masks: str | Path | None = None,
    groups: str | Path | None = None,
    bias_attribute: str = "group",
    skip_bad: bool = False,
    seed: int = 0,
    echo: Callable[[str], object] = lambda note: None,
) -> dict[str, int]:
    """Write images of one's own in the dataset layout; returns the number of samples of each split.

    ``train``, ``validation`` and the ``tests`` by name (iid, ood, shift or any other) are folders with one folder for
    each class, as `torchvision.datasets.ImageFolder` takes them; the classes are those of ``train``. Without
    ``validation`` a share of each class of ``train`` is split off. Images uint8 (N, 3, size, size): in colour, turned
    as their camera says, transparency on black, the shorter side scaled to ``size`` with antialiasing, then cropped to
    the middle.

    ``masks`` is a folder with a mask for each image, at the same place below ``masks/NAME-OF-THE-SPLIT``, or below
    ``masks`` itself where there is no such folder, in any image format: 0 is background, all else the object.
    ``groups`` is a CSV file with the columns ``path``, as ``ood/cat/1.jpg``, and ``group``, values of
    ``bias_attribute``.

    Files that cannot be read, or lack their mask or group, are an error that lists them; with ``skip_bad`` they are
    left out. ``echo`` is told what is no error: what was left out, and images that are in training and in a test.

    Raises FileExistsError, DatasetError.
    """
    if size < 1:
        raise DatasetError(f"--size {size} is no size in pixels: give 1 or more")
    if not 0 < validation_share < 1:
        raise DatasetError(
            f"--validation-share {validation_share:g} is no share: give one between 0 and 1, such as 0.1"
        )
    if taken := {"train", "validation"} & set(tests):
        raise DatasetError(f"--test {taken.pop()}=… takes a name of the layout's own: call it iid, ood, shift or else")
    folders = {"train": Path(train), **({} if validation is None else {"validation": Path(validation)})}
    folders |= {name: Path(folder) for name, folder in tests.items()}
    classes = _classes(folders["train"])
    found = {name: _samples(folder, classes) for name, folder in folders.items()}
    table = None if groups is None else _groups(Path(groups))
    bad: dict[Path, str] = {}
    for name, samples in found.items():
        found[name] = [_complete(name, sample, masks, table, bad) for sample in samples]
    digests = _look(found, size, bad)
    if bad and not skip_bad:
        lines = [f"{path}: {problem}" for path, problem in list(bad.items())[:NAMED]]
        more = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        number = f"{len(bad)} file{'s' * (len(bad) > 1)}"
        raise DatasetError("\n".join([f"{number} cannot be used, --skip-bad leaves them out:", *lines, *more]))
    for name, samples in found.items():
        found[name] = [sample for sample in samples if sample.path not in bad]
        if left := len(samples) - len(found[name]):
            echo(f"{name}: {left} of {len(samples)} images left out")
    found, names = _of_classes(found, classes, folders, skip_bad, echo)
    _tell_leaks(found, digests, echo)
    if table is not None:
        used = {f"{name}/{sample.name}" for name, samples in found.items() for sample in samples}
        if unused := len(table.keys() - used):
            echo(f"{groups}: {unused} of {len(table)} rows are of no image here")
    if validation is None:
        found = _split_off(found, validation_share, seed)
    group_names = sorted({sample.group for samples in found.values() for sample in samples if sample.group is not None})
    with DatasetWriter(out) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, samples in found.items():
            arrays: dict[str, Any] = {
                "images": Rows((len(samples), 3, size, size), pool, partial(_image_of, samples, size)),
                "labels": np.array([sample.label for sample in samples], np.int64),
            }
            if masks is not None:
                arrays["masks"] = Rows((len(samples), 1, size, size), pool, partial(_mask_of, samples, size))
            if table is not None:
                arrays["groups"] = np.array([group_names.index(sample.group or "") for sample in samples], np.int64)
            writer.write_split(name, **arrays)
        writer.finish(
            name=Path(str(out)).stem,
            class_names=names,
            builder={"command": "make-data image-folder", "size": size, "seed": seed},
            **({} if table is None else {"bias_attribute": bias_attribute, "group_names": group_names}),
        )
    return {name: len(samples) for name, samples in found.items()}


# --- which files there are ----------------------------------------------------------------------------------


def _classes(train: Path) -> list[str]:
    from torchvision.datasets.folder import find_classes

    try:
        return list(find_classes(train)[0])
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"--train {train} is no folder with a folder for each class in it") from None


def _samples(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """In the order of torchvision. Raises DatasetError for a class that training does not have."""
    from torchvision.datasets.folder import make_dataset

    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: give the folder that holds one for each class")
    own = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    if unknown := sorted(own - set(classes)):
        raise DatasetError(f"{folder} has a class '{unknown[0]}' that training does not have: {', '.join(classes)}")
    index = {name: number for number, name in enumerate(classes)}
    files = [(Path(path), label) for path, label in make_dataset(folder, index, EXTENSIONS, allow_empty=True)]
    files = [(path, label) for path, label in files if not path.name.startswith(".")]
    if not files:
        raise DatasetError(f"{folder} has no images in folders by class: they end in {', '.join(EXTENSIONS)}")
    return [Sample(path, path.relative_to(folder).as_posix(), label) for path, label in files]


def _groups(path: Path) -> dict[str, str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := sorted({"path", "group"} - set(reader.fieldnames or ())):
                raise DatasetError(
                    f"{path} has no column '{missing[0]}': its first line has to name 'path' and 'group'"
                )
            table: dict[str, str] = {}
            for row in reader:
                if row["path"] in table:
                    raise DatasetError(f"{path}, line {reader.line_num}: {row['path']} is there twice")
                if not row["group"]:
                    raise DatasetError(f"{path}, line {reader.line_num}: {row['path']} has no group")
                table[row["path"]] = row["group"]
            return table
    except FileNotFoundError:
        raise DatasetError(f"there is no file {path}: --groups is a CSV file with the columns path and group") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is no CSV file in UTF-8 ({error})") from None


def _complete(
    split: str, sample: Sample, masks: str | Path | None, table: Mapping[str, str] | None, bad: dict[Path, str]
) -> Sample:
    """With its mask and group; what it lacks is noted as bad."""
    mask = group = None
    if masks is not None:
        root = Path(masks) / split
        place = (root if root.is_dir() else Path(masks)) / sample.name
        mask = next((path for path in map(place.with_suffix, _SUFFIXES) if path.exists()), None)
        if mask is None:
            bad[sample.path] = f"there is no mask {place.with_suffix('')} with one of {', '.join(EXTENSIONS)}"
    if table is not None:
        group = table.get(f"{split}/{sample.name}")
        if group is None:
            bad[sample.path] = f"it has no row {split}/{sample.name} in the file of groups"
    return Sample(sample.path, sample.name, sample.label, mask, group)


_SUFFIXES = tuple(suffix for lower in EXTENSIONS for suffix in (lower, lower.upper()))


def _look(found: Mapping[str, list[Sample]], size: int, bad: dict[Path, str]) -> dict[Path, str]:
    """The SHA-256 of every file; those that cannot be decoded are noted as bad."""
    samples = [sample for part in found.values() for sample in part]

    def look(sample: Sample) -> tuple[Path, str, str | None]:
        problem = None
        try:
            digest = hashlib.sha256(sample.path.read_bytes()).hexdigest()
            shape = _read_image(sample.path).size
            if sample.mask is not None and (of_mask := _read_mask(sample.mask).size) != shape:
                problem = f"it is {shape[0]}×{shape[1]}, its mask {sample.mask} {of_mask[0]}×{of_mask[1]}"
        except _Unreadable as error:
            problem = str(error)
        except OSError as error:
            digest, problem = "", f"it cannot be read: {error.strerror}"
        return sample.path, digest, problem

    digests = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(samples), unit="image", desc="looking at the images", disable=None) as bar,
    ):
        for path, digest, problem in pool.map(look, samples):
            digests[path] = digest
            if problem is not None:
                bad.setdefault(path, problem)
            bar.update()
    return digests


def _of_classes(
    found: Mapping[str, list[Sample]],
    classes: Sequence[str],
    folders: Mapping[str, Path],
    skip_bad: bool,
    echo: Callable[[str], object],
) -> tuple[dict[str, list[Sample]], list[str]]:
    """What is left, of the classes that have an image in training; their names."""
    learnt = Counter(sample.label for sample in found["train"])
    empty = [name for number, name in enumerate(classes) if not learnt[number]]
    if empty:
        if not skip_bad:
            raise DatasetError(
                f"the class '{empty[0]}' in {folders['train']} has no image: put some there, or take its folder away; "
                "--skip-bad leaves it out"
            )
        echo(f"without an image in training, and left out: {', '.join(empty)}")
    kept = [number for number in range(len(classes)) if learnt[number]]
    if len(kept) < 2:
        raise DatasetError(f"{folders['train']} has images of {len(kept)} class: there have to be two at least")
    renumbered = {number: place for place, number in enumerate(kept)}
    left = {
        name: [
            Sample(sample.path, sample.name, renumbered[sample.label], sample.mask, sample.group)
            for sample in samples
            if sample.label in renumbered
        ]
        for name, samples in found.items()
    }
    for name, samples in left.items():
        if not samples:
            raise DatasetError(f"{folders[name]} has no image left that can be used")
    return left, [classes[number] for number in kept]


def _tell_leaks(found: Mapping[str, list[Sample]], digests: Mapping[Path, str], echo: Callable[[str], object]) -> None:
    learnt = {digests[sample.path] for name in ("train", "validation") for sample in found.get(name, ())}
    for name, samples in found.items():
        if name not in ("train", "validation"):
            leaks = [sample.name for sample in samples if digests[sample.path] in learnt]
            if leaks:
                echo(
                    f"{name}: {len(leaks)} images are also trained on, {leaks[0]} first: its accuracy will be too high"
                )


def _split_off(found: Mapping[str, list[Sample]], share: float, seed: int) -> dict[str, list[Sample]]:
    """A validation split of each class of the training images; one image at least, where it has two."""
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    labels = np.array([sample.label for sample in found["train"]])
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        number = min(max(1, round(share * len(rows))), len(rows) - 1)
        chosen |= {int(row) for row in rng.permutation(rows)[:number]}
    parts: dict[str, list[Sample]] = {"train": [], "validation": []}
    for row, sample in enumerate(found["train"]):
        parts["validation" if row in chosen else "train"].append(sample)
    return {name: samples for name, samples in {**parts, **_without(found, "train")}.items() if samples}


def _without(found: Mapping[str, list[Sample]], name: str) -> dict[str, list[Sample]]:
    return {other: samples for other, samples in found.items() if other != name}


# --- what is in them ----------------------------------------------------------------------------------------


class _Unreadable(ValueError):
    """Why a file is no picture."""


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise _Unreadable(f"there is no {path.name} any more") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise _Unreadable(f"{path.name} cannot be read: {error}".replace(str(path), path.name)) from None


def _read_image(path: Path) -> Image.Image:
    """In RGB, as it is to be looked at."""
    image = ImageOps.exif_transpose(_decoded(path))
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which Pillow would cut off at 255
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(on_black, image)
    return image.convert("RGB")


def _read_mask(path: Path) -> Image.Image:
    """255 on the object: where a value, or the colour, is not 0."""
    image = ImageOps.exif_transpose(_decoded(path))
    if image.mode == "P":
        values = np.asarray(image)  # the numbers of the colours, of which 0 is the background by convention
    else:
        values = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "CMYK") else image)
    on_object = values.any(axis=2) if values.ndim == 3 else values != 0
    return Image.fromarray(np.where(on_object, np.uint8(OPAQUE), np.uint8(0)))


def _scaled(image: Image.Image, size: int) -> np.ndarray:
    """The middle square, of the shorter side, scaled with antialiasing: uint8 (size, size) or (size, size, 3)."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _image_of(samples: Sequence[Sample], size: int, row: int) -> np.ndarray:
    return _scaled(_read_image(samples[row].path), size).transpose(2, 0, 1)


def _mask_of(samples: Sequence[Sample], size: int, row: int) -> np.ndarray:
    mask = samples[row].mask
    assert mask is not None
    return np.where(_scaled(_read_mask(mask), size) == OPAQUE, np.uint8(255), np.uint8(0))[None]
