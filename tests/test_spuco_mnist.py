"""What SpuCoMNIST promises."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import zarr

from data import DatasetError, make_spuco_mnist, open_dataset
from data.builders.idx import read_mnist
from data.builders.spuco_mnist import CLASS_NAMES, COLOURS, DIFFICULTIES

SIZES = {"train": 48000, "validation": 12000, "iid": 10000, "ood": 10000, "shift": 10000}
AREAS = {  # rows and columns from the upper left corner that may have a colour, and how many pixels have it
    "magnitude-large": (28, 784),
    "magnitude-medium": (4, 16),
    "magnitude-small": (2, 4),
    "variance-low": (7, 49),
    "variance-medium": (14, 49),
    "variance-high": (28, 49),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spuco") / "data.zarr"
    assert make_spuco_mnist(path) == SIZES
    return path


def pairs(split) -> np.ndarray:
    """The number of samples by class and colour, (5, 5)."""
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (split.labels[:], split.groups[:]), 1)
    return counts


def attributes(path: Path) -> dict:
    return dict(zarr.open_group(str(path)).attrs)


def test_the_layout_says_what_is_in_it(full):
    dataset = open_dataset(full)
    assert {name: len(split) for name, split in dataset.splits.items()} == SIZES
    assert dataset.class_names == tuple(CLASS_NAMES)
    assert dataset.bias_attribute == "colour"
    assert dataset.group_names == ("#ff0000", "#d1ff00", "#00ff5c", "#0074ff", "#b900ff")
    assert dataset.split("ood").image_shape == (3, 28, 28)
    assert attributes(full)["builder"] == {
        "command": "make-data spuco-mnist",
        "difficulty": "magnitude-large",
        "correlation": 0.995,
        "seed": 0,
        "limit": None,
    }


def test_the_colours_are_those_of_matplotlibs_map():
    expected = [[round(255 * value) for value in matplotlib.colormaps["hsv"](number / 5)[:3]] for number in range(5)]
    assert COLOURS.tolist() == expected


def test_the_correlation_is_exact_in_each_class_and_its_exceptions_are_balanced(full):
    dataset = open_dataset(full)
    for name in ("train", "validation", "iid"):
        for label, counts in enumerate(pairs(dataset.split(name))):
            assert counts[label] == round(0.995 * counts.sum())
            others = np.delete(counts, label)
            assert others.max() - others.min() <= 1
    ood = pairs(dataset.split("ood"))
    assert (ood.max(1) - ood.min(1) <= 1).all()
    shift = pairs(dataset.split("shift"))
    assert (np.diag(shift) == 0).all()
    others = shift[~np.eye(5, dtype=bool)].reshape(5, 4)
    assert (others.max(1) - others.min(1) <= 1).all()


@pytest.mark.parametrize("correlation", [0.3, 1, 1.0])
def test_the_correlation_is_exact_among_the_samples_of_a_limit_too(tmp_path, correlation):
    make_spuco_mnist(tmp_path / "d", correlation=correlation, limit=333)
    dataset = open_dataset(tmp_path / "d")
    for name in ("train", "validation", "iid"):
        counts = pairs(dataset.split(name))
        assert counts.sum() == 333
        assert np.diag(counts).tolist() == [round(correlation * samples) for samples in counts.sum(1).tolist()]
    assert not np.diag(pairs(dataset.split("shift"))).any()


def test_digits_are_mnists_and_no_training_digit_is_used_twice(full):
    dataset = open_dataset(full)
    digits, numbers = [], []
    for name in ("train", "validation"):
        split = dataset.split(name)
        shown = split.masks[:] == 255
        digits.append(np.where(shown, split.images[:, :1], 0).reshape(len(split), -1))
        numbers.append(split.labels[:])
    images, labels = read_mnist("train")
    found = np.concatenate(digits)
    original = images.reshape(60000, -1)
    order, expected = ([row.tobytes() for row in rows] for rows in (found, original))
    assert sorted(order) == sorted(expected)
    classes = dict(zip(expected, labels // 2, strict=True))
    assert all(classes[row] == label for row, label in zip(order, np.concatenate(numbers), strict=True))


def test_all_tests_show_the_test_digits_in_grey(full):
    images, labels = read_mnist("t10k")
    for name in ("iid", "ood", "shift"):
        split = open_dataset(full).split(name)
        assert np.array_equal(split.labels[:], labels // 2)
        assert np.array_equal(split.masks[:, 0], 255 * (images > 0).astype(np.uint8))
        shown = np.broadcast_to(images[:, None] > 0, (10000, 3, 28, 28))
        assert np.array_equal(split.images[:][shown], np.repeat(images[:, None], 3, axis=1)[shown])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_background_is_coloured_where_the_difficulty_says_and_black_elsewhere(tmp_path, difficulty):
    make_spuco_mnist(tmp_path / "d", difficulty=difficulty, limit=40)
    dataset = open_dataset(tmp_path / "d")
    side, pixels = AREAS[difficulty]
    everywhere = {}
    for name, split in dataset.splits.items():
        images, colours, digit = split.images[:], COLOURS[split.groups[:]], split.masks[:, 0] > 0
        coloured = (images == colours[:, :, None, None]).all(1) & ~digit
        assert not images[np.repeat(~(coloured | digit)[:, None], 3, axis=1)].any(), "black"
        assert not coloured[:, side:].any()
        assert not coloured[:, :, side:].any()
        visible = pixels - (digit[:, :side, :side].sum((1, 2)))
        if pixels == side**2:
            assert np.array_equal(coloured.sum((1, 2)), visible)
        else:
            assert (coloured.sum((1, 2)) <= pixels).all()
            assert (coloured.sum((1, 2)) >= visible).all()
            assert coloured.sum(0)[:side, :side].astype(bool).mean() > 0.75, "each image has its own pixels"
            assert len({row.tobytes() for row in coloured}) == len(coloured)
        everywhere[name] = coloured
    assert np.array_equal(everywhere["iid"], everywhere["ood"])
    assert np.array_equal(everywhere["iid"], everywhere["shift"])
    assert attributes(tmp_path / "d")["builder"]["difficulty"] == difficulty


def test_behind_the_mask_the_colour_is_gone(full):
    dataset = open_dataset(full)
    iid, shift = (dataset.split(name) for name in ("iid", "shift"))
    masked = [split.images[:500] * (split.masks[:500] > 0) for split in (iid, shift)]
    assert np.array_equal(masked[0], masked[1])
    assert (masked[0] == masked[0][:, :1]).all(), "grey"


def test_the_same_seed_gives_the_same_dataset_and_another_one_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_spuco_mnist(tmp_path / name, difficulty="variance-high", limit=200, seed=seed)
    first, same, other = (open_dataset(tmp_path / name).splits for name in "abc")
    for name in first:
        assert first[name].fingerprint == same[name].fingerprint != other[name].fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correlation": 0}, "correlation must be more than 0 and at most 1, got 0"),
        ({"correlation": 1.01}, "correlation must be more than 0 and at most 1, got 1.01"),
        ({"difficulty": "magnitude-larg"}, "unknown difficulty 'magnitude-larg'.*Did you mean magnitude-large"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_left(tmp_path, options, message):
    with pytest.raises(DatasetError, match=message):
        make_spuco_mnist(tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()
