"""Paste objects on backgrounds that tell the class in training, for every dataset with background bias.

Not here: where objects and backgrounds come from (`fashion_on_textures.py`, `coco_on_places.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import data
from data.builders.rows import OPAQUE, Rows

if TYPE_CHECKING:
    from data.storage import Location


@dataclass(frozen=True)
class Scenes:
    """A split to build: the object and the background of each sample.

    ``cut_out`` and ``background`` are called in several threads, and more than once for a sample. They always return
    the same pixels.

    Attributes:
        labels: integer (N,).
        groups: the types of the backgrounds, integer (N,).
        cut_out: takes the number of a sample; returns its picture, uint8 (3, size, size), and the opacity of the
            object, uint8 (size, size).
        background: takes the number of a sample; returns its background, uint8 (3, size, size).
    """

    labels: np.ndarray
    groups: np.ndarray
    cut_out: Callable[[int], tuple[np.ndarray, np.ndarray]]
    background: Callable[[int], np.ndarray]


def tied_groups(split: str, labels: np.ndarray, classes: int, unseen: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the bias attribute of each sample (Ahmed et al., ICLR 2021).

    In ``train``, ``validation`` and ``iid``, it is the class; in ``ood``, one of the ``unseen`` values from ``classes``
    on; in ``shift``, another class.

    Args:
        split: the name of the split.
        labels: integer (N,).
        classes: number of classes.
        unseen: number of values that only ``ood`` has.
        rng: draws the values of ``ood`` and ``shift``.

    Returns:
        The values, integer (N,).

    Raises:
        ValueError: The split has another name.
    """
    if split == "ood":
        return rng.integers(classes, classes + unseen, len(labels))
    if split == "shift":
        return (labels + rng.integers(1, classes, len(labels))) % classes
    if split not in ("train", "validation", "iid"):
        raise ValueError(f"no rule ties a background to the class in a split '{split}'")
    return labels.copy()


def free_share(groups: np.ndarray, share: float, values: int, rng: np.random.Generator) -> np.ndarray:
    """Give a share of the samples a random bias attribute, whatever their class is.

    Args:
        groups: the bias attribute of each sample, integer (N,).
        share: the share of the samples, from 0 to 1, that get a random value: round(share · N) of them.
        values: the random values are from 0 to this number less 1, equally likely. A sample may get its own again.
        rng: chooses the samples and their values.

    Returns:
        The new values, integer (N,).
    """
    rows = rng.permutation(len(groups))[: round(share * len(groups))]
    freed = groups.copy()
    freed[rows] = rng.integers(0, values, len(rows))
    return freed


def write_on_backgrounds(out: Location, splits: Mapping[str, Scenes], size: int, **attributes: Any) -> dict[str, int]:
    """Paste the objects of every split and write the dataset.

    Images are uint8 (N, 3, size, size). A mask is 255 where the object is fully opaque, and 0 elsewhere. Thus a teacher
    behind the mask sees nothing of the background, not even through the object's edge.

    Args:
        out: the dataset to write.
        splits: the splits by name.
        size: height and width of the images in pixels.
        attributes: attributes of the dataset, as `DatasetWriter.finish` takes them. The bias attribute is the
            background.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: As ``cut_out`` and ``background`` raise it.
    """
    from dask.system import cpu_count

    with data.DatasetWriter(out) as writer, ThreadPoolExecutor(cpu_count()) as pool:
        for name, scenes in splits.items():
            samples = len(scenes.labels)
            writer.write_split(
                name,
                images=Rows((samples, 3, size, size), pool, _image(scenes)),
                labels=scenes.labels.astype(np.int64),
                groups=scenes.groups.astype(np.int64),
                masks=Rows((samples, 1, size, size), pool, _mask(scenes)),
            )
        writer.finish(bias_attribute="background", **attributes)
    return {name: len(scenes.labels) for name, scenes in splits.items()}


def _image(scenes: Scenes) -> Callable[[int], np.ndarray]:
    def row(sample: int) -> np.ndarray:
        picture, opacity = scenes.cut_out(sample)
        opacity = opacity.astype(np.uint32)
        mixed = opacity * picture + (OPAQUE - opacity) * scenes.background(sample)
        return ((mixed + OPAQUE // 2) // OPAQUE).astype(np.uint8)

    return row


def _mask(scenes: Scenes) -> Callable[[int], np.ndarray]:
    def row(sample: int) -> np.ndarray:
        return np.where(scenes.cut_out(sample)[1] == OPAQUE, np.uint8(255), np.uint8(0))[None]

    return row
