"""A user's own images, in folders by class as torchvision's ImageFolder reads them, with optional masks and groups.

The folders by class may lie in folders by source, such as hospitals, which are then the groups.

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

from tqdm import tqdm

from data.builders.decoding import Decoded, Files, Scratch, decode_all
from data.builders.folders import (
    Bad,
    Echo,
    Layout,
    Sample,
    find_classes,
    find_files,
    read_groups,
    with_groups,
    with_masks,
)
from data.builders.one_mask import OneMaskOptions, one_mask, with_one_mask
from data.builders.pictures import Size
from data.builders.registry import HOW, BuilderOptions, Fitted, Seeded, builder
from data.builders.samples import (
    NAMED,
    Key,
    Splits,
    check_tests,
    height_and_width,
    split_off_validation,
    tell_copies,
    tell_images,
    tell_masks,
    without_bad,
    write_samples,
)
from data.errors import DatasetError
from options import Doc, Gt, Heading, Kind, Lt, Message, Metavar, Option

if TYPE_CHECKING:
    from data.storage import Location

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageFolderOptions(BuilderOptions, Fitted, Seeded, OneMaskOptions):
    """The options of ``make-data image-folder``."""

    train: Annotated[
        Any, Kind.PATH, Metavar("FOLDER"), Doc("Folder of the training images, with a folder for each class.")
    ]
    validation: Annotated[
        Any,
        Kind.PATH,
        Metavar("FOLDER"),
        Doc("Folder of the validation images. Default: a share of the training images."),
    ] = None
    tests: Annotated[
        Mapping[str, Any], Kind.NAMED_FOLDERS, Doc("Folder of a test by its name, such as ood=DIR. Repeatable.")
    ] = field(default_factory=dict)
    masks: Annotated[
        Any, Kind.PATH, Doc("Folder with masks under the paths and names of the images. Splits may lack them.")
    ] = None
    layout: Annotated[
        Layout,
        Doc(
            "Folders between a split and its images: class, or source/class, where the sources, such as hospitals, are "
            "the groups."
        ),
    ] = "class"
    groups: Annotated[
        Any, Kind.PATH, Metavar("FILE.csv"), Doc("CSV file with the columns path and group. Splits may be missing.")
    ] = None
    validation_share: Annotated[
        float, Gt(0), Lt(1), Heading(HOW), Doc("Share of the training images for validation, if no folder is given.")
    ] = 0.1
    size: Annotated[
        Any, Kind.IMAGE_SIZE, Heading(HOW), Doc("Size of the images in pixels: 64, or height and width as 64x96.")
    ]
    skip_bad: Annotated[bool, Heading(HOW), Doc("Leave out images that cannot be read or have no mask or group.")] = (
        False
    )
    bias_attribute: Annotated[
        str | None,
        Heading(HOW),
        Doc("Name of the attribute whose values are the groups. Default: group, or source if the groups are sources."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        height_and_width(self.size)
        if self.by_source and self.groups is not None:
            raise DatasetError(
                Message(
                    "give ", Option("groups", str(self.groups)), " or ", Option("layout", self.layout),
                    ", not both: in this layout, the sources are the groups",
                )
            )  # fmt: skip

    @property
    def by_source(self) -> bool:
        """Whether the images lie in folders by source and class."""
        return self.layout == "source/class"

    @property
    def shape(self) -> Size:
        """Height and width of the images, in pixels."""
        return height_and_width(self.size)


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
    what an image viewer shows. Or one mask or box holds for all images. The file of groups names an image as
    SPLIT/CLASS/FILE, such as ood/cat/1.jpg. A split may lack masks or groups. In the layout source/class, the folders
    by class lie in folders by source, such as hospitals. A source may lack classes, and a test may have other sources
    than training. More is in docs/own-images.md.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or files cannot be used; the error lists them.
    """
    chosen = ImageFolderOptions(out=out, train=train, tests=tests, **options)
    check_tests(tests)
    mask = one_mask(chosen, chosen.shape, chosen.fit)
    folders = {"train": Path(train), **({} if chosen.validation is None else {"validation": Path(chosen.validation)})}
    folders |= {name: Path(folder) for name, folder in tests.items()}
    classes = find_classes(folders["train"], chosen.layout)
    bad: Bad = {}
    splits = {name: find_files(folder, classes, echo, chosen.layout) for name, folder in folders.items()}
    splits = _paired(splits, chosen, bad, echo)
    files = {(name, sample.path): sample for name, part in splits.items() for sample in part}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="image-folder-"))
        bar = stack.enter_context(tqdm(total=2 * len(files), unit="image", desc="decoding", disable=None))
        scratch = Scratch(Path(folder), len(files), chosen.shape)
        learned = dict(zip(files, decode_all(Files([*files.values()], scratch, chosen.fit), bar.update), strict=True))
        splits = _only_images(splits, learned, folders, echo)
        bad |= {key: why for key, one in learned.items() if mask and (why := mask.misfit(one.size))}
        problems = {key: bad.get(key) or one.problem for key, one in learned.items()}
        splits = without_bad(splits, problems, chosen.skip_bad, echo)
        splits, names = _with_learnt_classes(splits, classes, folders, chosen.skip_bad, echo)
        used = [(name, sample, learned[name, sample.path]) for name, part in splits.items() for sample in part]
        _tell_layout(splits["train"], names, chosen, echo)
        tell_images(used, chosen.shape, chosen.fit, echo)
        tell_masks(used, echo)
        tell_copies(used, echo)
        if mask is not None:
            splits, scratch = with_one_mask(splits, scratch, mask, echo)
        if chosen.validation is None:
            share, seed = chosen.validation_share, chosen.seed
            splits = split_off_validation(splits, share, seed, by_group=chosen.by_source)
        bar.set_description("writing")
        _write(chosen, splits, names, scratch, {key: row for row, key in enumerate(files)}, bar)
    return {name: len(part) for name, part in splits.items()}


# --- which images can be used -----------------------------------------------------------------------------------------


def _paired(splits: Splits, chosen: ImageFolderOptions, bad: Bad, echo: Echo) -> Splits:
    """Add masks and groups; note in ``bad`` which images lack them, if others of their split have them."""
    if chosen.groups is not None:
        groups = read_groups(Path(chosen.groups))
        splits = {name: with_groups(part, name, groups, bad) for name, part in splits.items()}
        names = {f"{name}/{sample.name}" for name, part in splits.items() for sample in part}
        if unused := [name for name in groups if name not in names]:
            echo(
                f"{chosen.groups}: {len(unused)} of {len(groups)} rows name no image, such as {unused[0]}: a path is "
                f"SPLIT/CLASS/FILE, and SPLIT is one of {', '.join(splits)}"
            )
        _tell_without(splits, "group", echo)
        if not any(sample.group for part in splits.values() for sample in part):
            raise DatasetError(
                f"{chosen.groups} names no image here: its paths must be SPLIT/CLASS/FILE, such as train/cat/1.jpg"
            )
    if chosen.masks is not None:
        splits = {name: with_masks(part, name, Path(chosen.masks), bad) for name, part in splits.items()}
        _tell_without(splits, "mask", echo)
        if not any(sample.mask for sample in splits["train"]):
            first = splits["train"][0]
            place = Path("train", first.name).with_suffix(".png")
            masks = Option("masks", str(chosen.masks))
            raise DatasetError(Message(masks, f" has no mask of a training image, such as {place} for {first.path}"))
    return splits


def _tell_without(splits: Splits, attribute: str, echo: Echo) -> None:
    for name, part in splits.items():
        if not any(getattr(sample, attribute) for sample in part):
            echo(f"{name}: no image has a {attribute}, so this split has no {attribute}s")


Learned = Mapping[tuple[str, Path], Decoded]  # by split and path of the image


def _only_images(splits: Splits, learned: Learned, folders: Mapping[str, Path], echo: Echo) -> Splits:
    """Leave out files that are not images, and tell how many, by suffix."""
    for name, part in splits.items():
        suffixes = Counter(s.path.suffix.lower() or "without suffix" for s in part if not learned[name, s.path].picture)
        if suffixes:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
            echo(f"{name}: left out {listed}, which are not images that can be decoded here")
    images = {name: [sample for sample in part if learned[name, sample.path].picture] for name, part in splits.items()}
    for name, part in images.items():
        if not part:
            raise DatasetError(f"{folders[name]} has no images in folders by class")
    return images


def _with_learnt_classes(
    splits: Splits, classes: Sequence[str], folders: Mapping[str, Path], skip: bool, echo: Echo
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
        echo(f"classes without a training image, left out: {', '.join(empty)}")
    kept = [number for number in range(len(classes)) if training[number]]
    if len(kept) < 2:
        raise DatasetError(f"{folders['train']} has images of {len(kept)} class: at least two are needed")
    renumbered = {number: place for place, number in enumerate(kept)}
    usable = {
        name: [replace(sample, label=renumbered[sample.label]) for sample in part if sample.label in renumbered]
        for name, part in splits.items()
    }
    for name, part in usable.items():
        if not part:
            raise DatasetError(f"{folders[name]} has no image left that can be used")
    return usable, [classes[number] for number in kept]


def _tell_layout(
    training: Sequence[Sample], class_names: Sequence[str], chosen: ImageFolderOptions, echo: Echo
) -> None:
    """Tell which sources of training have one class only; of folders by class, whether they may be sources."""
    if chosen.by_source:
        _tell_sources(training, class_names, echo)
    elif all(sample.name.count("/") > 1 for sample in training):
        name, inside, *_ = training[0].name.split("/")
        echo(
            f"train: all images of a class lie in further folders, such as {name}/{inside}, which are not told apart; "
            f"if '{name}' is a source and '{inside}' a class, use the layout source/class"
        )


def _tell_sources(training: Sequence[Sample], class_names: Sequence[str], echo: Echo) -> None:
    """Tell which classes have sources without another class in training, because such a source tells the class."""
    labels_of: dict[str | None, set[int]] = {}
    for sample in training:
        labels_of.setdefault(sample.group, set()).add(sample.label)
    images = Counter(sample.label for sample in training)
    own = Counter(sample.label for sample in training if len(labels_of[sample.group]) == 1)
    listed = []
    for label, count in sorted(own.items())[:NAMED]:
        sources = sorted(str(source) for source, labels in labels_of.items() if labels == {label})
        more = f" and {len(sources) - NAMED} more" if len(sources) > NAMED else ""
        listed.append(
            f"{class_names[label]} in {', '.join(sources[:NAMED])}{more} ({count} of its {images[label]} images)"
        )
    if listed:
        more = f"; and {len(own) - NAMED} more classes" if len(own) > NAMED else ""
        echo(
            "train: some sources have one class only, so a network can learn the source instead of the class: "
            f"{'; '.join(listed)}{more}"
        )


def _write(
    chosen: ImageFolderOptions,
    splits: Splits,
    class_names: list[str],
    scratch: Scratch,
    row_of: Mapping[Key, int],
    bar: Any,
) -> None:
    recorded = {"size": chosen.size, "seed": chosen.seed} | ({} if chosen.fit == "crop" else {"fit": chosen.fit})
    recorded |= ({"layout": chosen.layout} if chosen.by_source else {}) | chosen.mask_record()
    default = "source" if chosen.by_source else "group"
    grouped = chosen.by_source or chosen.groups is not None
    write_samples(
        chosen.out,
        splits,
        scratch,
        row_of,
        bar,
        group_names=sorted({sample.group for part in splits.values() for sample in part if sample.group is not None}),
        class_names=class_names,
        builder={"command": "make-data image-folder", **recorded},
        **({"bias_attribute": chosen.bias_attribute or default} if grouped else {}),
    )
