"""What a copy of a dataset with flipped and turned training images promises."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from cli import main
from data import DatasetError, DatasetWriter, make_flipped, open_dataset

COPIES = {"left-right": 2, "flips": 4, "square": 8}


def write(path, shape=(5, 7, 7), samples=6, groups=True, masks=True):
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for name in ("train", "scene"):
            arrays = {"images": rng.integers(0, 256, (samples, *shape), np.uint8), "labels": np.arange(samples) % 2}
            if masks:
                arrays["masks"] = rng.integers(0, 2, (samples, 1, *shape[1:]), np.uint8) * np.uint8(255)
            if groups:
                arrays["groups"] = np.arange(samples) % 3
            writer.write_split(name, **arrays)
        names = {"bias_attribute": "ground", "group_names": ["a", "b", "c"]} if groups else {}
        writer.finish(
            name="d", class_names=["x", "y"], builder={"command": "make-data own", "licence": "CC BY 4.0"}, **names
        )
    return path


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "d", shape=(3, 7, 7))


def symmetric(image):
    """All eight images of a square image (C, S, S), as bytes."""
    turned = [np.rot90(image, turns, axes=(1, 2)) for turns in range(4)]
    return {np.ascontiguousarray(one).tobytes() for each in turned for one in (each, each[..., ::-1])}


@pytest.mark.parametrize("symmetries", COPIES)
def test_the_copies_are_the_symmetries_of_each_image_and_its_mask(dataset, tmp_path, symmetries):
    sizes = make_flipped(tmp_path / "f", dataset, symmetries=symmetries)
    assert sizes == {"train": 6 * COPIES[symmetries], "scene": 6}
    before, after = (open_dataset(path).split("train") for path in (dataset, tmp_path / "f"))
    images, masks = np.asarray(after.images[:]), np.asarray(after.masks[:])
    assert (images[:6] == before.images[:]).all()
    for sample in range(6):
        both = np.concatenate([images, masks], 1)[sample::6]  # a mask moves with its image
        original = np.concatenate([before.images[sample], before.masks[sample]])
        copies = {np.ascontiguousarray(one).tobytes() for one in both}
        assert len(copies) == COPIES[symmetries]
        assert copies <= symmetric(original)
    assert (after.labels[:] == np.tile(before.labels[:], COPIES[symmetries])).all()
    assert (after.groups[:] == np.tile(before.groups[:], COPIES[symmetries])).all()


def test_left_right_mirrors_and_does_not_turn(dataset, tmp_path):
    make_flipped(tmp_path / "f", dataset)
    before, after = (open_dataset(path).split("train").images[:] for path in (dataset, tmp_path / "f"))
    assert (after[6:] == before[..., ::-1]).all()


def test_other_splits_and_all_names_stay_as_they_are(dataset, tmp_path):
    make_flipped(tmp_path / "f", dataset, symmetries="square")
    before, after = open_dataset(dataset), open_dataset(tmp_path / "f")
    assert after.split("scene").fingerprint == before.split("scene").fingerprint
    for name in ("name", "class_names", "bias_attribute", "group_names"):
        assert getattr(after, name) == getattr(before, name)
    builder = zarr.open_group(tmp_path / "f", mode="r").attrs["builder"]
    assert builder["source"] == {"command": "make-data own", "licence": "CC BY 4.0"}


def test_images_that_are_not_square_are_flipped_and_not_turned_by_a_quarter(tmp_path):
    wide = write(tmp_path / "d", shape=(3, 6, 9), groups=False, masks=False)
    with pytest.raises(DatasetError, match=r"9×6 pixels, .*symmetries='flips'"):
        make_flipped(tmp_path / "f", wide, symmetries="square")
    assert not (tmp_path / "f").exists()
    assert make_flipped(tmp_path / "f", wide, symmetries="flips") == {"train": 24, "scene": 6}
    split = open_dataset(tmp_path / "f").split("train")
    assert (split.images[12:18] == split.images[:6][..., ::-1, ::-1]).all()
    assert split.masks is None
    assert split.groups is None


def test_copies_are_written_in_pieces_of_any_size(dataset, tmp_path, monkeypatch):
    make_flipped(tmp_path / "whole", dataset, symmetries="square")
    monkeypatch.setattr("data.layout.SHARD_BYTES", 4 * 3 * 7 * 7)  # pieces of 4 rows, and there are 6 images
    make_flipped(tmp_path / "pieces", dataset, symmetries="square")
    whole, pieces = (open_dataset(tmp_path / name).split("train") for name in ("whole", "pieces"))
    assert whole.fingerprint == pieces.fingerprint


def test_the_command_makes_the_copy_and_names_the_choices(dataset, tmp_path):
    command = ["make-data", "flipped", "--data", str(dataset), "--out", str(tmp_path / "f")]
    wrong = CliRunner().invoke(main, [*command, "--symmetries", "squares"])
    assert wrong.exit_code == 2
    assert "'square'" in wrong.stderr
    result = CliRunner().invoke(main, [*command, "--symmetries", "flips"])
    assert result.exit_code == 0, result.output
    assert "24" in result.stdout
