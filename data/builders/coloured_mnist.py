"""COLOURED MNIST (Ahmed et al., ICLR 2021): digits painted in a colour that tells the class in training."""

from __future__ import annotations

import numpy as np

from data.builders.backgrounds import tied_groups
from data.builders.idx import read_mnist
from data.layout import DatasetWriter
from data.storage import Location

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BIASING_COLOURS = np.array(  # RGB of class 0 … 9
    [
        (0, 100, 0),
        (188, 143, 143),
        (255, 0, 0),
        (255, 215, 0),
        (0, 255, 0),
        (65, 105, 225),
        (0, 225, 225),
        (0, 0, 255),
        (255, 20, 147),
        (160, 32, 240),
    ],
    dtype=np.uint8,
)
MIN_SQUARED_DISTANCE = 2500  # of an unseen colour from every biasing colour
VALIDATION_SAMPLES = 5000


def make_coloured_mnist(out: Location, seed: int = 0, limit: int | None = None) -> dict[str, int]:
    """Write COLOURED MNIST, 100 % biased, in the dataset layout; returns the number of samples a split.

    MNIST binarised at 0.5, the digit in a colour on black, uint8 (N, 3, 28, 28). ``train`` (55,000),
    ``validation`` (5,000 split off the training images) and ``iid`` (10,000): class c in colour c. ``ood``:
    one of ten random colours, at squared distance over 2500 from every biasing colour. ``shift``: the
    colour of another class. ``groups`` is the colour's id: 0–9 biasing, 10–19 unseen. ``limit`` keeps the
    first samples of each split. The same seed gives the same bytes.

    Raises FileExistsError, DatasetError.
    """
    colour_rng, split_rng, ood_rng, shift_rng = (np.random.default_rng([seed, stream]) for stream in range(4))
    colours = np.concatenate([BIASING_COLOURS, _unseen_colours(colour_rng)])
    images, labels = read_mnist("train")
    order = split_rng.permutation(len(images))
    train, validation = order[VALIDATION_SAMPLES:], order[:VALIDATION_SAMPLES]
    test_images, test_labels = read_mnist("t10k")
    splits = {
        "train": (images[train], labels[train]),
        "validation": (images[validation], labels[validation]),
        **dict.fromkeys(("iid", "ood", "shift"), (test_images, test_labels)),
    }
    with DatasetWriter(out) as writer:
        for name, (digits, classes) in splits.items():
            groups = tied_groups(name, classes, 10, 10, ood_rng if name == "ood" else shift_rng)[:limit]
            digits, classes = digits[:limit], classes[:limit]
            writer.write_split(
                name,
                images=_paint(digits, colours[groups]),
                labels=classes.astype(np.int64),
                groups=groups.astype(np.int64),
            )
        writer.finish(
            name="coloured-mnist",
            class_names=CLASS_NAMES,
            bias_attribute="colour",
            group_names=["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.tolist()],
            builder={"command": "make-data coloured-mnist", "seed": seed, "limit": limit},
        )
    return {name: len(classes[:limit]) for name, (_, classes) in splits.items()}


def _paint(digits: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Digits (N, 28, 28) uint8, binarised at 0.5, in one colour (N, 3) each: uint8 (N, 3, 28, 28)."""
    return (digits > 127)[:, None].astype(np.uint8) * colours[:, :, None, None]


def _unseen_colours(rng: np.random.Generator) -> np.ndarray:
    """Ten random colours (10, 3) uint8, far from every biasing colour; black, on which nothing is seen, is none."""
    chosen: list[np.ndarray] = []
    while len(chosen) < 10:
        colour = rng.integers(0, 256, 3)
        distances = ((colour - BIASING_COLOURS.astype(np.int64)) ** 2).sum(1)
        if distances.min() > MIN_SQUARED_DISTANCE and colour.any():
            chosen.append(colour.astype(np.uint8))
    return np.stack(chosen)
