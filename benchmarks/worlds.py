"""Datasets with a bias on which trainings take a minute, made of the training files of MNIST and Fashion-MNIST alone.

The tests of the published benchmarks are not in them, so that anything may be chosen by what these tests show.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from data import Dataset, DatasetWriter, make_coloured_mnist, make_fashion_on_textures, open_dataset
from data.builders import coloured_mnist, fashion_on_textures
from data.builders.backgrounds import Scenes, tied_groups, write_on_backgrounds
from data.builders.coloured_mnist import BIASING_COLOURS, read_mnist
from pipeline import cache_explanations
from trainer import train_student, train_teacher

HELD_OUT = 5000  # of the training files, for the tests
SAMPLES = 12_000  # in training, at most
LOW, WIDE, HIGH = (0.01, 0.1), (0.01, 1.0), (0.1, 1.0)  # ranges of ε
STEPS = 600  # of a student


def _held_out(read: Callable[..., Any], *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read a part of MNIST or Fashion-MNIST, of which both parts are from the training files."""
    *folder, part = arguments
    images, labels = read(*folder, "train")
    rows = slice(-HELD_OUT, None) if part == "t10k" else slice(None, -HELD_OUT)
    return images[rows], labels[rows]


def colours(path: Path, samples: int = SAMPLES) -> None:
    """The colour of the digit tells the class: COLOURED MNIST."""
    with mock.patch.object(coloured_mnist, "read_mnist", partial(_held_out, read_mnist)):
        make_coloured_mnist(path, seed=1, limit=samples)


def textures(path: Path, samples: int = SAMPLES) -> None:
    """The photograph behind a garment tells the class: Fashion-on-Textures."""
    with mock.patch.object(fashion_on_textures, "_read", partial(_held_out, fashion_on_textures._read)):
        make_fashion_on_textures(path, size=32, seed=1, limit=samples)


def grounds(path: Path, samples: int = SAMPLES) -> None:
    """The colour of the ground behind a white digit tells the class, one of five."""
    images, labels = read_mnist("train")
    of_five = np.flatnonzero(labels < 5)
    held, rest = of_five[-HELD_OUT // 2 :], of_five[: -HELD_OUT // 2]
    parts = {
        "train": rest[1000 : 1000 + samples],
        "validation": rest[:1000],
        **dict.fromkeys(("iid", "ood", "shift"), held),
    }
    palette = np.concatenate([BIASING_COLOURS[:5], 255 - BIASING_COLOURS[5:]])  # the latter are unseen in training
    splits = {}
    for number, (split, rows) in enumerate(parts.items()):
        rng = np.random.default_rng([1, number])
        groups = tied_groups(split, labels[rows], 5, 5, rng)
        shades = np.clip(palette[groups] + rng.integers(-20, 21, (len(rows), 3)), 0, 255).astype(np.uint8)

        def cut_out(sample: int, rows: np.ndarray = rows) -> tuple[np.ndarray, np.ndarray]:
            digit = images[rows[sample]]
            return np.full((3, 28, 28), 255, np.uint8), np.where(digit > 127, 255, 0).astype(np.uint8)

        def background(sample: int, shades: np.ndarray = shades) -> np.ndarray:
            return np.broadcast_to(shades[sample][:, None, None], (3, 28, 28))

        splits[split] = Scenes(labels[rows], groups, cut_out, background)
    names = [f"ground {number}" for number in range(10)]
    write_on_backgrounds(path, splits, 28, name="grounds", class_names=[*"01234"], group_names=names)


@dataclass(frozen=True)
class World:
    """A dataset and its teacher; ``student`` has the options of all its students."""

    make: Callable[..., None]
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]


_SMALL = {"arch": "small-cnn", "batch_size": 128}
_RESIDUAL = {"arch": "small-resnet", "batch_size": 64}
WORLDS = {
    "colours": World(colours, {**_SMALL, "debias": "grayscale", "steps": 600}, _SMALL),
    "grounds": World(grounds, {**_SMALL, "debias": "mask", "steps": 600}, _SMALL),
    "textures": World(textures, {**_RESIDUAL, "debias": "mask", "steps": 1000}, _RESIDUAL),
}


def _first(dataset: Dataset, samples: int, path: Path) -> None:
    """Write a copy that has the first training images alone."""
    with DatasetWriter(path) as writer:
        for name, split in dataset.splits.items():
            rows = slice(samples if name == "train" else None)
            arrays = {key: getattr(split, key) for key in ("images", "labels", "groups", "masks")}
            writer.write_split(name, **{k: np.asarray(of[rows]) for k, of in arrays.items() if of is not None})
        writer.finish(
            name=dataset.name, class_names=list(dataset.class_names), bias_attribute=dataset.bias_attribute,
            group_names=list(dataset.group_names),
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The folder of a world, with its dataset, teacher and stores, each made when it is first asked for.

    Attributes:
        folder: the folder.
        world: the world.
        threads: CPU threads.
        bias_free: whether the teacher is.
        samples: of the training split.
        precision: of the students.
        whole: the place whose dataset has more training images, of which this one has the first; None to make it.
    """

    folder: Path
    world: World
    threads: int
    bias_free: bool = True
    samples: int = SAMPLES
    precision: str = "float32"
    whole: Place | None = None

    def dataset(self) -> Dataset:
        path = self.folder / "data.zarr"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.whole is None:
                self.world.make(path, self.samples)
            else:
                _first(self.whole.dataset(), self.samples, path)
        return open_dataset(path)

    def teacher(self) -> Path:
        folder = self.folder / ("teacher" if self.bias_free else "teacher-with-biases")
        if not (folder / "result.json").exists():
            options = {"bias_free": self.bias_free, **self.world.teacher, "threads": self.threads}
            train_teacher(self.dataset().path, folder, **options)
        return folder

    def cache(self, epsilon_range: tuple[float, float], draws: int = 2) -> Path:
        of = "cache-{:g}-{:g}".format(*epsilon_range)
        of += f"-{draws}-draws" * (draws != 2) + "-with-biases" * (not self.bias_free)
        folder = self.folder / f"{of}.zarr"
        cache_explanations(
            self.dataset().path, self.teacher(), folder, epsilon_range=epsilon_range, draws=draws, features=True,
            threads=self.threads,
        )  # fmt: skip
        return folder

    @contextmanager
    def student(self, cache: Path | None, **options: Any) -> Iterator[Path]:
        """Train a student of 600 steps, which exists while the context lasts; an interrupted training is resumed."""
        folder = self.folder / "student"
        if (folder / "result.json").exists():  # of a process that ended before it was measured
            shutil.rmtree(folder)
        if cache is not None and not options.keys() & {"method", "loss"}:
            options["method"] = "lrp"  # and nothing besides
        given = {
            "steps": STEPS, **self.world.student, "threads": self.threads, "precision": self.precision, **options,
        }  # fmt: skip
        train_student(self.dataset().path, cache, folder, **given)
        yield folder
        shutil.rmtree(folder)
