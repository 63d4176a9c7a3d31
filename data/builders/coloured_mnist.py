"""COLOURED MNIST (Ahmed et al., ICLR 2021): digits in a colour that tells the class in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import data
from data.builders.backgrounds import free_share, tied_groups
from data.builders.idx import read_mnist
from data.builders.registry import BuilderOptions, Limited, PartlyUnbiased, Seeded, builder

if TYPE_CHECKING:
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


@dataclass(frozen=True, kw_only=True)
class ColouredMnistOptions(BuilderOptions, Seeded, Limited, PartlyUnbiased):
    """The options of ``make-data coloured-mnist``."""


@builder("coloured-mnist", ColouredMnistOptions, example="make-data coloured-mnist --out DATA.zarr")
def make_coloured_mnist(out: Location, **options: Any) -> dict[str, int]:
    """Build COLOURED MNIST.

    The colour of the digits tells the class in training, and misleads in the tests. The images show MNIST digits,
    binarised at 0.5, in one colour on black: uint8 (N, 3, 28, 28). The splits are train
    (55,000 samples), validation (5,000 of the training images) and iid (10,000), in which each class has its own
    colour; ood, in which each digit has one of ten other colours; and shift, in which it has the colour of another
    class. Groups are the colours: 0 to 9 tell the class, 10 to 19 are those of ood. The same seed gives the same bytes.

    With an unbiased share, this share of the images of train and validation has one of the ten colours that tell the
    class at random. All other images are the same as without.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or the MNIST files are damaged.
    """
    chosen = ColouredMnistOptions(out=out, **options)
    seed, limit = chosen.seed, chosen.limit
    colour_rng, split_rng, ood_rng, shift_rng, share_rng = (np.random.default_rng([seed, n]) for n in range(5))
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
    with data.DatasetWriter(out) as writer:
        for name, (digits, classes) in splits.items():
            groups = tied_groups(name, classes, 10, 10, ood_rng if name == "ood" else shift_rng)[:limit]
            digits, classes = digits[:limit], classes[:limit]
            if name in ("train", "validation"):
                groups = free_share(groups, chosen.unbiased_share, 10, share_rng)
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
            builder={"command": "make-data coloured-mnist", "seed": seed, "limit": limit, **chosen.record},
        )
    return {name: len(classes[:limit]) for name, (_, classes) in splits.items()}


def _paint(digits: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Paint digits, uint8 (N, 28, 28), binarised at 0.5, in their colours, (N, 3): uint8 (N, 3, 28, 28)."""
    return (digits > 127)[:, None].astype(np.uint8) * colours[:, :, None, None]


def _unseen_colours(rng: np.random.Generator) -> np.ndarray:
    """Draw ten random colours, uint8 (10, 3), far from every biasing colour and not black, the background."""
    chosen: list[np.ndarray] = []
    while len(chosen) < 10:
        colour = rng.integers(0, 256, 3)
        distances = ((colour - BIASING_COLOURS.astype(np.int64)) ** 2).sum(1)
        if distances.min() > MIN_SQUARED_DISTANCE and colour.any():
            chosen.append(colour.astype(np.uint8))
    return np.stack(chosen)
