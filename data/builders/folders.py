"""The files of an image folder: images by class and source, their masks, and their groups. Nothing is decoded here."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from data.errors import DatasetError, check_name
from options import Message, Option

Echo = Callable[[str], object]
Bad = dict[tuple[str, Path], str]  # split and image → why it cannot be used
Layout = Literal["class", "source/class"]  # the folders of a split that an image lies in

SYSTEM = {  # names, in lower case, of what programs leave beside a user's files; a dot at the start says so too
    "__macosx", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
RAW = {  # photographs as the sensor saw them; Pillow opens some, but decodes only their small preview
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".kdc", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw",
    ".rw2", ".srw", ".x3f",
}  # fmt: skip
MASK_ENDS = ("", "_mask", "-mask")  # what a mask may have after the image's name
DELIMITERS = (",", ";", "\t")  # of a CSV file, as spreadsheet programs write them
INSIDE: Mapping[Layout, str] = {  # what the folder of a split has
    "class": "a folder for each class",
    "source/class": "a folder for each source, and in it one for each of its classes",
}


@dataclass(frozen=True)
class Sample:
    """An image file.

    Attributes:
        path: the file.
        name: its path below the folder of the split, with slashes.
        label: its class.
        mask: the file of its mask, if its split has masks.
        group: the name of its group, if its split has groups: in the layout source/class, that of its source.
    """

    path: Path
    name: str
    label: int
    mask: Path | None = None
    group: str | None = None


def is_system(name: str) -> bool:
    """Return whether a program, not the user, made a file or folder of this name, such as ``.ipynb_checkpoints``."""
    return name.startswith(".") or name.casefold() in SYSTEM


def is_of_images(suffix: str) -> bool:
    """Return whether Pillow opens files of this suffix, so that one that it cannot open is damaged."""
    return Image.registered_extensions().get(suffix.lower()) in Image.OPEN


# --- images -----------------------------------------------------------------------------------------------------------


def same_letters(name: str) -> str:
    """Return a name in Unicode's form NFC; macOS writes the letter é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def find_classes(train: Path, layout: Layout = "class") -> list[str]:
    """Return the names of the classes, sorted: the folders in ``train``, or those in the folders of its sources.

    Raises:
        DatasetError: There are none, a name cannot be printed, or a source has no folder of a class (`_sources`).
    """
    places: list[Path] = []
    if train.is_dir():
        places = [train] if layout == "class" else [*_sources(train).values()]
    names = sorted({name for place in places for name in _folders(place, "class")})
    if not names:
        raise DatasetError(Message(Option("train", str(train)), f" must be a folder with {INSIDE[layout]}"))
    for name in names:
        check_name(name, f"the folder of a class in {train}")
    return names


def _folders(folder: Path, of: str) -> dict[str, Path]:
    """Return the folders in a folder by name; raise DatasetError for two of one name, each ``of`` a class or source."""
    folders: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not is_system(entry.name):
            name = same_letters(entry.name)
            if name in folders:
                raise DatasetError(
                    f"{folder} has two folders for the {of} '{name}', in two forms of Unicode: merge them"
                )
            folders[name] = Path(entry.path)
    return folders


def _sources(folder: Path) -> dict[str, Path]:
    """Return the folders of the sources of a split by name.

    Raises:
        DatasetError: A name cannot be printed, or a source has no folder of a class, or an image outside of them.
    """
    sources = _folders(folder, "source")
    for name, source in sources.items():
        check_name(name, f"the folder of a source in {folder}")
        image = _image_in(source)
        if image is None and _folders(source, "class"):
            continue
        if image is None:
            problem = f"the source {source} has no folder of a class: add one, or delete the source"
        else:
            problem = f"the source {source} has an image, {image}, outside of the folders of its classes: move it there"
        raise DatasetError(
            Message(problem, f"; if '{name}' is a class and not a source, give ", Option("layout", "class"))
        )
    return sources


def _image_in(folder: Path) -> str | None:
    """Return the name of the first image that lies directly in a folder, by its suffix; None without."""
    return min(
        (
            entry.name
            for entry in os.scandir(folder)
            if not entry.is_dir() and not is_system(entry.name) and is_of_images(Path(entry.name).suffix)
        ),
        default=None,
    )


def find_files(folder: Path, classes: Sequence[str], echo: Echo, layout: Layout = "class") -> list[Sample]:
    """Return every file of a split that may be an image, by class, source, folder and name.

    Folders below those of the classes count too. A link to a folder is followed once for each folder of a class, and
    never to a folder above it. Files and folders that programs leave behind are ignored (`is_system`). In the layout
    source/class, the source is the group.

    Raises:
        DatasetError: The folder is missing, has a class that ``classes`` lacks, is of the other layout, or has no file.
    """
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: give a folder with {INSIDE[layout]}")
    sources = {"": folder} if layout == "class" else _sources(folder)
    folders = {source: _folders(place, "class") for source, place in sources.items()}
    for source, place in sources.items():
        _check_known(place, folders[source], classes, layout)
    samples = [
        Sample(path, same_letters(path.relative_to(folder).as_posix()), label, group=source or None)
        for label, name in enumerate(classes)
        for source, place in sources.items()
        if name in folders[source]  # neither a split nor a source need have every class
        for path in sorted(_walk(folders[source][name], {*map(os.path.realpath, (folder, place))}, echo), key=_order)
    ]
    if not samples:
        raise DatasetError(f"{folder} has no images in folders by {layout.replace('/', ' and ')}")
    return samples


def _check_known(place: Path, folders: Mapping[str, Path], classes: Sequence[str], layout: Layout) -> None:
    """Raise DatasetError for a class that training does not have; tell the layout if it may be a source."""
    if unknown := sorted(set(folders) - set(classes)):
        name = unknown[0]
        known = f"{place} has a class '{name}' that training does not have: {', '.join(classes)}"
        if layout == "class" and _image_in(folders[name]) is None and (inside := _folders(folders[name], "class")):
            hint = f"; if '{name}' is a source, with a folder for each class such as '{min(inside)}', give "
            raise DatasetError(Message(known, hint, Option("layout", "source/class")))
        raise DatasetError(known)


def find_images(places: Sequence[Path], echo: Echo) -> dict[Path, bool]:
    """Return every file that may be an image: files as they are given, and those below folders as in `find_files`.

    Args:
        places: files and folders. A file in several of them counts once, at its first place.
        echo: is told of links that are not followed, and of folders without files.

    Returns:
        By path, whether the file itself was given. One below a folder may be left out if it is not an image.

    Raises:
        DatasetError: There is no such file or folder.
    """
    files: dict[str, tuple[Path, bool]] = {}  # by absolute path
    for place in places:
        if place.is_dir():
            below = sorted(_walk(place, set(), echo), key=_order)
            if not below:
                echo(f"{place} has no files, apart from those that programs leave behind")
            for path in below:
                files.setdefault(os.path.abspath(path), (path, False))
        elif place.exists() or place.is_symlink():
            first, _ = files.get(os.path.abspath(place), (place, True))
            files[os.path.abspath(place)] = (first, True)
        else:
            raise DatasetError(f"there is no file or folder {place}: give image files, or folders that have some")
    return dict(files.values())


def _order(path: Path) -> tuple[str, str]:
    return str(path.parent), path.name


def _walk(folder: Path, above: set[str], echo: Echo) -> Iterator[Path]:
    """Yield the files below a folder. ``above`` are the real paths of folders that links do not lead to again."""
    real = os.path.realpath(folder)
    if real in above:
        echo(f"{folder} links to a folder that is read anyway, and is not followed")
        return
    above.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_system(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), above, echo)
        else:
            yield Path(entry.path)


# --- masks ------------------------------------------------------------------------------------------------------------


def with_masks(samples: Sequence[Sample], split: str, masks: Path, bad: Bad) -> list[Sample]:
    """Add the masks of a split, if it has any; note in ``bad`` which images have none or several.

    A mask lies at the place of its image below ``masks/SPLIT``, or below ``masks`` if no split has a folder there. Its
    name is that of the image, with or without the image's suffix, and may end in ``_mask``; any suffix follows.
    """
    places = _mask_files(masks / split if (masks / split).is_dir() else masks)
    pairs = [(sample, [path for key in _mask_names(sample.name) for path in places.get(key, ())]) for sample in samples]
    if not any(paths for _, paths in pairs):
        return list(samples)
    for sample, paths in pairs:
        if not paths:
            place = (masks / split if (masks / split).is_dir() else masks) / PurePosixPath(sample.name).with_suffix("")
            bad[split, sample.path] = f"there is no mask {place} with the suffix of an image"
        elif len(paths) > 1:
            bad[split, sample.path] = f"there are {len(paths)} masks: {', '.join(map(str, paths))}"
    return [replace(sample, mask=paths[0]) if len(paths) == 1 else sample for sample, paths in pairs]


def _mask_names(name: str) -> list[str]:
    """Return the paths that a mask may have without its suffix, for an image of this path."""
    path = PurePosixPath(name)
    stems = dict.fromkeys((str(path.with_suffix("")), name))
    return [stem + end for stem in stems for end in MASK_ENDS]


def _mask_files(folder: Path) -> dict[str, list[Path]]:
    """Return the images below a folder by their path without suffix; annotation tools write other files beside them."""
    files: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(_walk(folder, set(), lambda note: None)):
            if path.suffix and not is_of_images(path.suffix):
                continue
            files.setdefault(same_letters(path.relative_to(folder).with_suffix("").as_posix()), []).append(path)
    return files


# --- groups -----------------------------------------------------------------------------------------------------------


def read_groups(path: Path) -> dict[str, str]:
    """Read the groups of images from a CSV file with the columns ``path`` and ``group``.

    Commas, semicolons or tabs separate the columns, as spreadsheet programs write them.

    Returns:
        The name of the group by ``SPLIT/CLASS/FILE``.

    Raises:
        DatasetError: The file is missing, is not such a file, or names an image twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            delimiter = max(DELIMITERS, key=header.count)
            names = [name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter), [])]
            if missing := sorted({"path", "group"} - set(names)):
                raise DatasetError(f"{path} has no column '{missing[0]}': its first line must name 'path' and 'group'")
            table: dict[str, str] = {}
            reader = csv.DictReader(file, names, delimiter=delimiter)
            for row in reader:
                image, group = _name(row["path"] or ""), (row["group"] or "").strip()
                line = reader.line_num + 1  # the reader does not see the header
                if image in table:
                    raise DatasetError(f"{path}, line {line}: {image} is there twice")
                if not group:
                    raise DatasetError(f"{path}, line {line}: {image} has no group")
                check_name(group, f"a group in {path}, line {line},")
                table[image] = group
            return table
    except FileNotFoundError:
        raise DatasetError(
            Message(Option("groups", str(path)), " does not exist: give a CSV file with the columns path and group")
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV file in UTF-8 ({error}): save it as one") from None


def _name(path: str) -> str:
    """Return a path as `Sample.name` spells it: with slashes, and nothing before the split."""
    return same_letters(PurePosixPath(path.strip().replace("\\", "/")).as_posix())


def with_groups(samples: Sequence[Sample], split: str, groups: Mapping[str, str], bad: Bad) -> list[Sample]:
    """Add the groups of a split, if it has any; note in ``bad`` which images have none."""
    names = {sample: groups.get(f"{split}/{sample.name}") for sample in samples}
    if not any(names.values()):
        return list(samples)
    for sample, group in names.items():
        if group is None:
            bad[split, sample.path] = f"it has no row {split}/{sample.name} in the file of groups"
    return [replace(sample, group=names[sample]) for sample in samples]
