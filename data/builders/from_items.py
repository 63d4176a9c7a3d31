"""Make a dataset of splits that are map-style: a number gives an item. Its images are those of image-folder.

Rows are sorted by class, as the folders of an image folder are, so that the same images give the same fingerprint.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from tqdm import tqdm

from data.builders.decoding import Scratch, decode_all
from data.builders.folders import Echo, Sample, same_letters
from data.builders.items import Item, ItemError, Items, Keys, Parts, read_item
from data.builders.one_mask import OneMask, OneMaskOptions, one_mask, with_one_mask
from data.builders.pictures import Size
from data.builders.registry import HOW, BuilderOptions, Fitted, Seeded
from data.builders.samples import (
    Splits,
    height_and_width,
    split_off_validation,
    tell_copies,
    tell_images,
    tell_masks,
    without_bad,
    write_samples,
)
from data.errors import DatasetError, check_name
from options import Doc, Gt, Heading, Kind, Lt, Message, Metavar, Option, Separated

LOGGER = logging.getLogger(__name__)
COMPARED = 64  # items of a split that are read twice


@dataclass(frozen=True, kw_only=True)
class ItemsOptions(BuilderOptions, Fitted, Seeded, OneMaskOptions):
    """The options of datasets that are made of items."""

    size: Annotated[
        Any,
        Kind.IMAGE_SIZE,
        Heading(HOW),
        Doc(
            "Size of the images in pixels: 64, or height and width as 64x96. Default: that of the images, if all agree."
        ),
    ] = None
    validation_share: Annotated[
        float, Gt(0), Lt(1), Heading(HOW), Doc("Share of the training images for validation, if there is no split.")
    ] = 0.1
    class_names: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Heading(HOW),
        Metavar("CLASS,…"),
        Doc("Names of the classes, in the order of their numbers."),
    ] = None
    group_names: Annotated[
        tuple[str, ...] | None,
        Separated(),
        Heading(HOW),
        Metavar("GROUP,…"),
        Doc("Names of the groups, in the order of their numbers."),
    ] = None
    skip_bad: Annotated[bool, Heading(HOW), Doc("Leave out items that cannot be used.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            height_and_width(self.size)


@dataclass(frozen=True)
class Source:
    """One split.

    Attributes:
        items: gives an item for a number, and has a length.
        classes: names of the classes by number, if the items are labelled with numbers that have names.
        groups: names of the groups by number, in the same way.
        places: names of the items, for errors; by default, the split with the number, such as ``train[3]``.
    """

    items: Any
    classes: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    places: Sequence[str] | None = None

    def place(self, split: str, number: int) -> str:
        """Return the name of an item, for errors."""
        return f"{split}[{number}]" if self.places is None else self.places[number]


def make_from_items(
    chosen: ItemsOptions,
    sources: Mapping[str, Source],
    keys: Keys,
    builder: Mapping[str, Any],
    *,
    decode: Callable[..., list[Item]] = decode_all,
    twice: bool = False,
    echo: Echo = LOGGER.warning,
) -> dict[str, int]:
    """Decode the items of every split, and write them as a dataset.

    Args:
        chosen: the options.
        sources: the splits by name; train is among them.
        keys: the keys of an item's parts.
        builder: note on how the dataset was made.
        decode: decodes all items, as `decode_all` does.
        twice: read some items twice, and refuse a dataset that gives them otherwise.
        echo: is told notes.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: Items cannot be used; the error lists them.
    """
    for name, source in sources.items():
        if len(source.items) == 0:
            raise DatasetError(f"{name} has no items: leave the split out, or add some")
    size = _try_out(chosen, sources, keys, twice)
    mask = one_mask(chosen, size, chosen.fit)
    counts = [len(source.items) for source in sources.values()]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="items-"))
        bar = stack.enter_context(tqdm(total=2 * sum(counts), unit="image", desc="decoding", disable=None))
        scratch = Scratch(Path(folder), sum(counts), size)
        fit = None if chosen.size is None else chosen.fit
        items = Items([source.items for source in sources.values()], keys, scratch, fit)
        learned = decode(items, bar.update)
        if mask is not None:
            learned = _fitting(mask, learned, sources)
        splits, names, group_names = _samples(chosen, sources, learned, echo)
        row_of = {key: row for row, key in enumerate(_keys(sources))}
        used = [(name, s, learned[row_of[name, s.path]]) for name, part in splits.items() for s in part]
        tell_images(used, size, chosen.fit, echo)
        tell_masks(used, echo)
        tell_copies(used, echo)
        if mask is not None:
            splits, scratch = with_one_mask(splits, scratch, mask, echo)
        if "validation" not in splits:
            splits = split_off_validation(splits, chosen.validation_share, chosen.seed)
        bar.set_description("writing")
        recorded = {"size": chosen.size, "seed": chosen.seed} | ({} if chosen.fit == "crop" else {"fit": chosen.fit})
        attributes: dict[str, Any] = {"class_names": names, "builder": {**builder, **recorded, **chosen.mask_record()}}
        if group_names:
            attributes["bias_attribute"] = chosen.bias_attribute
        write_samples(chosen.out, splits, scratch, row_of, bar, group_names=group_names, **attributes)
    return {name: len(part) for name, part in splits.items()}


# --- the first items --------------------------------------------------------------------------------------------------


def _try_out(chosen: ItemsOptions, sources: Mapping[str, Source], keys: Keys, twice: bool) -> Size:
    """Read some items of each split before all others, because most mistakes show in the first one.

    Returns:
        The size of the dataset: the one that was chosen, or that of the first image of training.

    Raises:
        DatasetError: An item cannot be used, or two reads of one differ.
    """
    size = None if chosen.size is None else height_and_width(chosen.size)
    for name, source in sources.items():
        count = len(source.items)
        for number in np.unique(np.linspace(0, count - 1, min(COMPARED, count), dtype=int)).tolist():
            parts = _first_read(source, name, number, keys, chosen.skip_bad)
            if parts is None:
                continue
            if parts.mask is not None and (option := chosen.mask_option()) is not None:
                _refuse_own_mask(source.place(name, number), option)
            if twice:
                again = _first_read(source, name, number, keys, chosen.skip_bad)
                if again is None or again.digest() != parts.digest():
                    raise DatasetError(
                        f"two reads of {source.place(name, number)} differ, so the dataset changes its items at "
                        "random: leave out its augmentation (transform), because training has its own"
                    )
            if size is None:
                size = parts.picture.image.height, parts.picture.image.width
            if not twice:
                break
    if size is None:
        raise DatasetError(Message("no item of train can be used: leave out ", Option("skip_bad"), " to see why"))
    return size


def _first_read(source: Source, split: str, number: int, keys: Keys, skip: bool) -> Parts | None:
    try:
        return read_item(source.items, number, keys)
    except ItemError as error:
        if skip:
            return None
        raise DatasetError(
            Message(f"{source.place(split, number)} cannot be used: ", error.args[0])
        ) from error.__cause__


# --- one mask for all -------------------------------------------------------------------------------------------------


def _fitting(mask: OneMask, learned: Sequence[Item], sources: Mapping[str, Source]) -> list[Item]:
    """Return what was learned of the items, where an image that the mask does not fit has a problem.

    Raises:
        DatasetError: An item has a mask of its own.
    """
    for (_, place), item in zip(_keys(sources), learned, strict=True):
        if item.object is not None:
            _refuse_own_mask(str(place), mask.option)
    return [replace(item, problem=item.problem or mask.misfit(item.size)) for item in learned]


def _refuse_own_mask(place: str, option: Option) -> NoReturn:
    raise DatasetError(
        Message(f"{place} has a mask of its own: leave out ", option, ", or leave the masks out of the items")
    )


# --- samples ----------------------------------------------------------------------------------------------------------


def _keys(sources: Mapping[str, Source]) -> list[tuple[str, Path]]:
    """Return split and place of every item, in the order of the rows in the scratch files."""
    return [
        (name, Path(source.place(name, number)))
        for name, source in sources.items()
        for number in range(len(source.items))
    ]


def _samples(
    chosen: ItemsOptions, sources: Mapping[str, Source], learned: Sequence[Item], echo: Echo
) -> tuple[Splits, list[str], list[str]]:
    """Return the samples of each split, sorted by class, the names of the classes, and those of the groups.

    Raises:
        DatasetError: Items cannot be used; the text lists them.
    """
    keys = _keys(sources)
    rows = dict(zip(keys, learned, strict=True))
    problems: dict[tuple[str, Path], object] = {key: item.problem for key, item in rows.items() if item.problem}
    if misfits := [(key, item) for key, item in rows.items() if item.misfit]:
        _refuse_sizes(misfits, len(rows), chosen.skip_bad)
    usable = {key: item for key, item in rows.items() if key not in problems}
    classes = _class_names(
        chosen, sources["train"].classes, {place: item for (name, place), item in usable.items() if name == "train"}
    )
    number_of = {name: number for number, name in enumerate(classes)}
    samples: Splits = {name: [] for name in sources}
    groups = _Groups(chosen, sources)
    having = {(name, part) for (name, _), item in usable.items() for part in ("object", "group") if _has(item, part)}
    for key in keys:
        name, place = key
        item = rows[key]
        label, group = 0, None
        if key in usable:
            try:
                label = _number(item.label, sources[name].classes, sources["train"].classes, number_of)
                group = None if item.group is None else groups.name(item.group, sources[name].groups)
            except ItemError as error:
                problems[key] = error.args[0]
            for part, what in (("object", "mask"), ("group", "group")):
                if (name, part) in having and not _has(item, part):
                    problems[key] = f"it has no {what}, and others of {name} have one"
        mask = None if item.object is None else place
        samples[name].append(Sample(place, str(place), label, mask, group))
    samples = without_bad(samples, problems, chosen.skip_bad, echo, "item")
    _check_classes(samples, classes, echo)
    _tell_partial(having, sources, echo)
    ordered = {name: sorted(part, key=lambda sample: sample.label) for name, part in samples.items()}
    return ordered, classes, groups.names({s.group for part in samples.values() for s in part if s.group is not None})


def _has(item: Item, part: str) -> bool:
    return getattr(item, part) is not None


def _refuse_sizes(misfits: list[tuple[tuple[str, Path], Item]], count: int, skip: bool) -> None:
    """Raise DatasetError for images of several sizes, unless they are left out."""
    if not skip:
        (_, place), item = misfits[0]
        raise DatasetError(
            Message(
                f"{place} has another size than the first image ({item.problem}), as {len(misfits)} of {count} images ",
                "have: ", Option("size"), " scales all of them",
            )
        )  # fmt: skip


def _class_names(chosen: ItemsOptions, of_dataset: Sequence[str] | None, training: Mapping[Path, Item]) -> list[str]:
    """Return the names of the classes: those that were chosen, those of the dataset, or the labels of training."""
    if chosen.class_names and of_dataset is not None and len(chosen.class_names) != len(of_dataset):
        raise DatasetError(
            Message(
                Option("class_names"), f" has {len(chosen.class_names)} names, and the dataset has {len(of_dataset)} "
                f"classes ({_listed(of_dataset)}): give one for each",
            )
        )  # fmt: skip
    names = [same_letters(name) for name in chosen.class_names or of_dataset or _labels(training)]
    for name in names:
        check_name(name, "a class")
    return names


def _labels(training: Mapping[Path, Item]) -> list[str]:
    """Return the labels of training as names of classes: sorted if they are names, otherwise all up to the highest."""
    places = {type(item.label): place for place, item in training.items()}
    if len(places) > 1:
        name, number = places[str], places[int]
        raise DatasetError(
            f"the label of {name} is a name, {training[name].label!r}, and that of {number} a number, "
            f"{training[number].label}: give all labels in one way"
        )
    if str in places:
        return sorted({same_letters(str(item.label)) for item in training.values()})
    highest = max((int(item.label or 0) for item in training.values()), default=-1)
    if highest >= max(2, len(training)):
        raise DatasetError(
            f"the labels of train run to {highest}, and it has {len(training)} items: number the classes from 0"
        )
    return [str(number) for number in range(highest + 1)]


def _number(
    label: int | str | None,
    own: Sequence[str] | None,
    training: Sequence[str] | None,
    number_of: Mapping[str, int],
) -> int:
    """Return the number of an item's class in training.

    Args:
        label: the item's label.
        own: names of the classes of the item's split.
        training: names of the classes of training, as its dataset has them.
        number_of: numbers of the classes by name.

    Raises:
        ItemError: Training has no such class.
    """
    names = list(number_of)
    if isinstance(label, int):
        if not 0 <= label < len(names if own is None else own):
            text = f"its label is {label}, and classes have the numbers 0 to {len(own or names) - 1}: "
            if label < 0:  # as public test splits have it
                raise ItemError(f"{text}leave items without a label out")
            raise ItemError(Message(text, "correct it, or give all ", Option("class_names")))
        if own is None or training is None or list(own) == list(training):
            return label
        if own[label] in training:  # such as a folder that lacks a class
            return list(training).index(own[label])
        label = own[label]
    if label is not None and same_letters(label) in number_of:
        return number_of[same_letters(label)]
    raise ItemError(f"its class {label!r} is not a class of training: {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


class _Groups:
    """The groups of a dataset by name. Numbers get the names that were chosen, those of the dataset, or themselves."""

    def __init__(self, chosen: ItemsOptions, sources: Mapping[str, Source]):
        self.chosen, self.of_training = chosen.group_names, sources["train"].groups
        self.numbers: dict[str, int] = {}  # of groups without a name

    def name(self, group: int | str, own: Sequence[str] | None) -> str:
        """Return the name of an item's group; raise ItemError if it has none."""
        names = self.chosen or own
        if isinstance(group, str):
            name = same_letters(group)
            if self.chosen and name not in self.chosen:
                raise ItemError(Message(f"its group {group!r} is not among the ", Option("group_names")))
        elif names is None:
            self.numbers[str(group)] = group
            return str(group)
        elif 0 <= group < len(names):
            name = names[group]
        else:
            raise ItemError(f"its group is {group}, and there are {len(names)} names of groups")
        check_name(name, "a group")
        return name

    def names(self, used: set[str]) -> list[str]:
        """Return the names of all groups by their number in the dataset."""
        known = self.chosen or self.of_training or ()
        if used and used <= set(known):
            return list(known)
        return sorted(used, key=lambda name: (self.numbers.get(name, 0), name))


def _check_classes(samples: Splits, classes: Sequence[str], echo: Echo) -> None:
    for name, part in samples.items():
        if not part:
            raise DatasetError(f"{name} has no item left that can be used")
    training = Counter(sample.label for sample in samples["train"])
    if len(training) < 2:
        raise DatasetError(f"train has items of {len(training)} class: at least two are needed")
    if empty := [name for number, name in enumerate(classes) if not training[number]]:
        echo(f"classes without a training image: {_listed(empty)}")


def _tell_partial(having: set[tuple[str, str]], sources: Mapping[str, Source], echo: Echo) -> None:
    """Tell which splits have no masks or groups, if others have them."""
    for part, what in (("object", "mask"), ("group", "group")):
        without = [name for name in sources if (name, part) not in having]
        for name in without if len(without) < len(sources) else ():
            echo(f"{name}: no image has a {what}, so this split has no {what}s")
