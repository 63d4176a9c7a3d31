"""Objects pasted on backgrounds that tell the class in training: what every dataset of background bias is made of.

Not here: where objects and backgrounds come from (`fashion_on_textures.py`, `coco_on_places.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.builders.rows import OPAQUE, Rows
from data.layout import DatasetWriter
from data.storage import Location


@dataclass(frozen=True)
class Scenes:
    """A split that is to be made: which object stands on which background, in the order of its samples.

    labels: integer (N,). groups: integer (N,), the type of the background. ``cut_out(i)``: sample i's picture, uint8
    (3, size, size), and how opaque each pixel of the object in it is, uint8 (size, size). ``background(i)``: uint8
    (3, size, size). Both are called from several threads, more than once for a sample, and always give the same.
    """

    labels: np.ndarray
    groups: np.ndarray
    cut_out: Callable[[int], tuple[np.ndarray, np.ndarray]]
    background: Callable[[int], np.ndarray]


def tied_groups(split: str, labels: np.ndarray, classes: int, unseen: int, rng: np.random.Generator) -> np.ndarray:
    """The value of the bias attribute of each sample, integer (N,): 0 … classes − 1 are those that tell the class.

    In ``train``, ``validation`` and ``iid`` it is the class; in ``ood`` one of the ``unseen`` values from ``classes``
    on; in ``shift`` that of another class (Ahmed et al., ICLR 2021). Raises ValueError for another split.
    """
    if split == "ood":
        return rng.integers(classes, classes + unseen, len(labels))
    if split == "shift":
        return (labels + rng.integers(1, classes, len(labels))) % classes
    if split not in ("train", "validation", "iid"):
        raise ValueError(f"no rule ties a background to the class in a split '{split}'")
    return labels.copy()


def write_on_backgrounds(out: Location, splits: Mapping[str, Scenes], size: int, **attributes: Any) -> dict[str, int]:
    """Paste and write every split in the dataset layout, with ``masks``; returns the number of samples of each.

    Images are uint8 (N, 3, size, size). A mask is 255 where the object is fully opaque, and 0 elsewhere: behind it a
    teacher sees nothing of the background, not even what shines through the object's edge. ``attributes`` are those of
    the dataset, as `DatasetWriter.finish` takes them; the bias attribute is the background.

    Raises FileExistsError, DatasetError, and what ``cut_out`` and ``background`` raise.
    """
    with DatasetWriter(out) as writer, ThreadPoolExecutor(os.cpu_count()) as pool:
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
