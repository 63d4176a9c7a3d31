"""SpuCoMNIST (Joshi et al., "Towards Mitigating Spurious Correlations in the Wild", arXiv 2306.11957).

Pairs of digits on a background whose colour tells the class in nearly all training images. Written from the published
description and package (spuco 2.0.3); no code is from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

import data
from data.builders.idx import read_mnist
from data.builders.registry import HOW, BuilderOptions, Limited, Seeded, builder
from options import Among, Doc, Gt, Heading, Le

if TYPE_CHECKING:
    from data.storage import Location

CLASS_NAMES = ["zero or one", "two or three", "four or five", "six or seven", "eight or nine"]
CLASSES = len(CLASS_NAMES)
COLOURS = np.array(  # RGB of class 0 … 4: Matplotlib's colour map hsv at 0, 0.2, 0.4, 0.6 and 0.8, of 255
    [(255, 0, 0), (209, 255, 0), (0, 255, 92), (0, 116, 255), (185, 0, 255)], dtype=np.uint8
)
SIDE = 28
DIFFICULTIES = {  # number of coloured pixels, and side of the square in the upper left corner that they lie in
    "magnitude-large": (784, 28),
    "magnitude-medium": (16, 4),
    "magnitude-small": (4, 2),
    "variance-low": (49, 7),
    "variance-medium": (49, 14),
    "variance-high": (49, 28),
}
VALIDATION_SAMPLES = 12000
OWN_SHARES = {"ood": 1 / CLASSES, "shift": 0.0}  # of images in their own colour; in other splits, the correlation
STREAMS = {  # of random numbers: for the colours, and for the coloured pixels, which tests share; 0 divides the digits
    "train": (1, 2),
    "validation": (3, 4),
    "iid": (5, 6),
    "ood": (7, 6),
    "shift": (8, 6),
}


@dataclass(frozen=True, kw_only=True)
class SpucoMnistOptions(BuilderOptions, Seeded, Limited):
    """The options of ``make-data spuco-mnist``."""

    difficulty: Annotated[
        str,
        Among(DIFFICULTIES),
        Heading(HOW),
        Doc(
            "What has the colour: the whole background (magnitude-large), 4×4 or 2×2 pixels in the corner "
            "(magnitude-medium, magnitude-small), or 49 pixels: 7×7 in the corner (variance-low), or at random places "
            "of 14×14 in the corner (variance-medium) or of the image (variance-high)."
        ),
    ] = "magnitude-large"
    correlation: Annotated[
        float,
        Gt(0),
        Le(1),
        Heading(HOW),
        Doc("Share of the images of a class that have its own colour, in train, validation and iid."),
    ] = 0.995


@builder("spuco-mnist", SpucoMnistOptions, example="make-data spuco-mnist --out DATA.zarr")
def make_spuco_mnist(out: Location, **options: Any) -> dict[str, int]:
    """Build SpuCoMNIST.

    The colour of the background tells the class in training, with few exceptions, and misleads in the tests. The images
    show MNIST digits in grey on a black background that is coloured as a whole or in part: uint8 (N, 3, 28, 28), with
    masks of the digits. The classes are pairs of digits: 0 and 1, 2 and 3, 4 and 5, 6 and 7, 8 and 9. The splits are
    train (48,000 samples), validation (12,000 of the training images) and iid (10,000), in which most images of a class
    have its own colour, and the others have the other four equally often; ood, in which each class has all five colours
    equally often, as in the published test; and shift, in which each class has the colours of the other four. iid, ood
    and shift show the same digits. Groups are the colours, by the class that they tell. The same seed gives the same
    bytes.

    The published validation split is a fixed list of 11,996 images, with balanced colours unless a correlation is
    given. This one is drawn by the seed, and has the correlation of the training split.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or the MNIST files are damaged.
    """
    chosen = SpucoMnistOptions(out=out, **options)
    seed, limit = chosen.seed, chosen.limit
    digits, numbers = read_mnist("train")
    order = np.random.default_rng([seed, 0]).permutation(len(digits))
    train, validation = order[VALIDATION_SAMPLES:], order[:VALIDATION_SAMPLES]
    splits = {
        "train": (digits[train], numbers[train]),
        "validation": (digits[validation], numbers[validation]),
        **dict.fromkeys(("iid", "ood", "shift"), read_mnist("t10k")),
    }
    sizes = {}
    with data.DatasetWriter(out) as writer:
        for name, (digits, numbers) in splits.items():
            colour_rng, pixel_rng = (np.random.default_rng([seed, stream]) for stream in STREAMS[name])
            digits, labels = digits[:limit], numbers[:limit].astype(np.int64) // 2
            groups = _colours(labels, OWN_SHARES.get(name, chosen.correlation), colour_rng)
            coloured = _coloured(chosen.difficulty, len(labels), pixel_rng)
            writer.write_split(
                name,
                images=_paint(digits, coloured, COLOURS[groups]),
                labels=labels,
                groups=groups,
                masks=np.where(digits > 0, np.uint8(255), np.uint8(0))[:, None],
            )
            sizes[name] = len(labels)
        writer.finish(
            name="spuco-mnist",
            class_names=CLASS_NAMES,
            bias_attribute="colour",
            group_names=["#{:02x}{:02x}{:02x}".format(*colour) for colour in COLOURS.tolist()],
            builder={
                "command": "make-data spuco-mnist",
                **{name: getattr(chosen, name) for name in ("difficulty", "correlation", "seed", "limit")},
            },
        )
    return sizes


def _colours(labels: np.ndarray, own_share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose the colour of each sample.

    Args:
        labels: int64 (N,).
        own_share: the share of the n samples of a class that have its own colour: round(own_share · n) of them. The
            others have the other colours, whose numbers differ by one at most.
        rng: chooses the samples.

    Returns:
        The classes whose colours they are, int64 (N,).
    """
    groups = labels.copy()
    for label in range(CLASSES):
        samples = rng.permutation(np.flatnonzero(labels == label))
        others = samples[round(own_share * len(samples)) :]
        groups[others] = (label + 1 + np.arange(len(others)) % (CLASSES - 1)) % CLASSES
    return groups


def _coloured(difficulty: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the coloured pixels of each sample, where the digit does not hide them: bool (samples, 28, 28)."""
    pixels, side = DIFFICULTIES[difficulty]
    square = np.tile(np.arange(side**2) < pixels, (samples, 1))
    coloured = np.zeros((samples, SIDE, SIDE), np.bool_)
    coloured[:, :side, :side] = rng.permuted(square, axis=1).reshape(samples, side, side)
    return coloured


def _paint(digits: np.ndarray, coloured: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Put digits, uint8 (N, 28, 28), in front of coloured pixels, bool (N, 28, 28).

    Args:
        digits: their grey values. Pixels of value 0 show the background.
        coloured: the pixels of the background that have a colour. The others are black.
        colours: the colour of each image, uint8 (N, 3).

    Returns:
        The images, uint8 (N, 3, 28, 28).
    """
    background = coloured[:, None] * colours[:, :, None, None]
    return np.where(digits[:, None] > 0, digits[:, None], background)
