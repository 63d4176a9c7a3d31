"""What one mask or box for all images promises: the pixels that were meant, no cost, and clear refusals."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image

from cli import main
from data import DatasetError, DatasetWriter, make_image_folder, make_masked, open_dataset
from pipeline import load_classifier
from trainer import train_teacher

SIZE = 16
BOX = "10,12,16,16"  # a stamp in the lower right corner: columns 10 to 15, rows 12 to 15


def save(path: Path, image: Image.Image | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


def photos(root: Path, size: tuple[int, int] = (SIZE, SIZE), each: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "far"):
        for name in ("cat", "dog"):
            for number in range(each):
                save(root / split / name / f"{number}.png", rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    return root


def make(root: Path, **options) -> list[str]:
    """Build a dataset beside the folder ``root``; return what was logged."""
    handler, logger = BufferingHandler(1000), logging.getLogger("data.builders")
    logger.addHandler(handler)
    try:
        options = {"tests": {"ood": root / "far"}, "size": SIZE, **options}
        make_image_folder(root.parent / "d", root / "train", **options)
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in handler.buffer]


def masks(path: Path) -> dict[str, np.ndarray]:
    return {name: split.masks[:] for name, split in open_dataset(path).splits.items()}


def stamp(inside: bool, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """The mask of the box, by another way than slices of it."""
    rows, columns = np.indices(size)
    marked = (rows >= 12) & (rows < 16) & (columns >= 10) & (columns < 16)
    return np.where(marked == inside, 255, 0)


# --- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", ["inside", "outside"])
@pytest.mark.parametrize("box", [BOX, (10, 12, 16, 16), ["10", "12", "16", "16"], " 10, 12 ,16,16"])
def test_a_box_is_kept_or_left_out_in_every_image_of_every_split(tmp_path, box, keeps):
    notes = make(photos(tmp_path / "p"), mask_box=box, mask_keeps=keeps)
    assert set(masks(tmp_path / "d")) == {"train", "validation", "ood"}
    for found in masks(tmp_path / "d").values():
        assert (found == stamp(keeps == "inside")).all()
    share = 9.4 if keeps == "inside" else 90.6
    (note,) = [note for note in notes if note.startswith("masks")]
    assert note.endswith(f"for all images; the object is {keeps} of it, {share} % of an image")


def test_a_box_is_in_pixels_of_the_datasets_images_whatever_the_sizes_of_the_files_and_their_fit(tmp_path):
    root = photos(tmp_path / "p", (30, 50))
    save(root / "train" / "cat" / "wide.png", np.zeros((20, 90, 3), np.uint8))
    for fit in ("crop", "pad", "stretch"):
        out = tmp_path / fit
        make_image_folder(
            out, root / "train", {}, size=(20, 24), fit=fit, mask_box=BOX, mask_keeps="outside", echo=lambda text: None
        )
        assert (masks(out)["train"] == stamp(False, (20, 24))).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("keeps", [None, "inside", "outside"])
def test_a_mask_file_is_read_and_fitted_as_a_folder_of_equal_files(tmp_path, fit, keeps):
    root = photos(tmp_path / "p", (24, 40))
    drawn = np.zeros((24, 40), np.uint8)
    drawn[3:17, 5:31] = 1  # labels, as the reader of masks knows them
    file = save(tmp_path / "mask.png", drawn)
    marked = 1 - drawn if keeps == "outside" else drawn
    for split in ("train", "far"):
        for image in (root / split).rglob("*.png"):
            save(tmp_path / "m" / {"far": "ood"}.get(split, split) / image.relative_to(root / split), marked)
    notes = make(root, mask_all=file, mask_keeps=keeps, fit=fit)
    make_image_folder(
        tmp_path / "each", root / "train", {"ood": root / "far"}, size=SIZE, fit=fit, masks=tmp_path / "m"
    )
    one, each = open_dataset(tmp_path / "d"), open_dataset(tmp_path / "each")
    assert {name: split.fingerprint for name, split in one.splits.items()} == {
        name: split.fingerprint for name, split in each.splits.items()
    }
    assert any(f"masks: {file}, read by brightness, for all images" in note for note in notes)


def test_a_mask_file_of_the_datasets_size_fits_images_of_any_size(tmp_path):
    root = photos(tmp_path / "p", (30, 50))
    save(root / "train" / "cat" / "wide.png", np.zeros((20, 90, 3), np.uint8))
    file = save(tmp_path / "mask.png", stamp(True).astype(np.uint8))
    make(root, mask_all=file, mask_keeps="outside")
    assert all((found == stamp(False)).all() for found in masks(tmp_path / "d").values())


def test_a_half_covered_pixel_is_hidden_with_the_stamp_and_with_the_surroundings_of_an_object(tmp_path):
    drawn = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    drawn[:9, :9] = 255  # 4.5 pixels of the dataset
    root, file = photos(tmp_path / "p", (2 * SIZE, 2 * SIZE)), save(tmp_path / "mask.png", drawn)
    make(root, mask_all=file, mask_keeps="outside")
    assert (masks(tmp_path / "d")["train"][:, 0, :5, :5] == 0).all()
    make_image_folder(tmp_path / "in", root / "train", {}, size=SIZE, mask_all=file, echo=lambda text: None)
    assert (masks(tmp_path / "in")["train"][:, 0, 4, :5] == 0).all()


def test_the_images_and_the_validation_split_are_those_without_the_mask(tmp_path):
    root = photos(tmp_path / "p")
    make(root, mask_box=BOX, mask_keeps="outside")
    make_image_folder(tmp_path / "plain", root / "train", {"ood": root / "far"}, size=SIZE)
    one, plain = open_dataset(tmp_path / "d"), open_dataset(tmp_path / "plain")
    for name in plain.splits:
        assert np.array_equal(one.splits[name].images[:], plain.splits[name].images[:])
        assert np.array_equal(one.splits[name].labels[:], plain.splits[name].labels[:])
    assert all(split.masks is None for split in plain.splits.values())


def test_one_mask_for_many_images_costs_less_than_ten_copies(tmp_path):
    with DatasetWriter(tmp_path / "plain") as writer:
        images = np.zeros((4000, 3, 64, 64), np.uint8)
        writer.write_split("train", images=images, labels=np.arange(4000) % 2)
        writer.finish(name="plain", class_names=["a", "b"])
    make_masked(tmp_path / "d", tmp_path / "plain", mask_box=BOX, mask_keeps="outside", echo=lambda text: None)
    stored = zarr.open_group(tmp_path / "d", mode="r")["train"]["masks"]
    assert stored.shape == (4000, 1, 64, 64)
    assert stored.nbytes_stored() < 10 * 64 * 64


def test_a_teacher_behind_the_mask_does_not_see_the_stamp(tmp_path):
    make(photos(tmp_path / "p"), mask_box=BOX, mask_keeps="outside")
    train_teacher(tmp_path / "d", tmp_path / "t", debias="mask", steps=2, batch_size=4, arch_options={"width": 4})
    model, _ = load_classifier(tmp_path / "t")
    split = open_dataset(tmp_path / "d").split("ood")
    images, mask = torch.from_numpy(split.images[:]) / 255, torch.from_numpy(split.masks[:]).float() / 255
    painted, elsewhere = images.clone(), images.clone()
    painted[:, :, 12:, 10:] = 1
    elsewhere[:, :, :4, :6] = 1
    with torch.no_grad():
        assert torch.equal(model(images, mask), model(painted, mask))
        assert not torch.equal(model(images, mask), model(elsewhere, mask))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "error"),
    [
        ("10,12,17,16", "mask_box='10,12,17,16' is not within the dataset's images of 16×16 pixels"),
        ("-1,0,4,4", "not within"),
        ("0,0,4,99", "not within"),
        ("4,4,4,8", "is empty"),
        ("8,4,4,8", "is empty"),
        ("0,8,4,4", "is empty"),
        ("0,0,16,16", "makes all of the 16×16 pixels of an image the object"),
        ("0.5,0,1,1", "is not a box: give four whole numbers of pixels"),
        ((0.0, 0.0, 0.5, 0.5), "is not a box"),
        ("1,2,3", "is not a box"),
        ("1,2,3,4,5", "is not a box"),
        ("a,b,c,d", "is not a box"),
        ("", "is not a box"),
    ],
)
def test_a_box_that_is_none_is_refused_before_anything_is_read_or_written(tmp_path, box, error):
    with pytest.raises(DatasetError, match=error):
        make(tmp_path / "nowhere", mask_box=box, mask_keeps="inside")
    with DatasetWriter(tmp_path / "s") as writer:
        writer.write_split("train", images=np.zeros((4, 3, SIZE, SIZE), np.uint8), labels=np.arange(4) % 2)
        writer.finish(name="s", class_names=["a", "b"])
    with pytest.raises(DatasetError, match=error):
        make_masked(tmp_path / "d", tmp_path / "s", mask_box=box, mask_keeps="inside")
    assert not (tmp_path / "d").exists()


def test_a_box_around_the_whole_image_leaves_nothing_outside_of_it(tmp_path):
    with pytest.raises(DatasetError, match="makes none of the 16×16 pixels of an image the object"):
        make(photos(tmp_path / "p"), mask_box="0,0,16,16", mask_keeps="outside")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_box": BOX}, "mask_box='10,12,16,16' needs mask_keeps='inside' .* or mask_keeps='outside'"),
        ({"mask_keeps": "outside"}, "mask_keeps='outside' needs mask_all or mask_box"),
        ({"mask_box": BOX, "mask_keeps": "both"}, "unknown mask_keeps 'both': choose one of inside, outside"),
        ({"mask_box": BOX, "mask_keeps": "inside", "masks": "m"}, "give masks='m' or mask_box=.*, not both"),
        ({"mask_all": "m.png", "masks": "m"}, "give masks='m' or mask_all='m.png', not both"),
        ({"mask_all": "m.png", "mask_box": BOX, "mask_keeps": "inside"}, "give mask_all='m.png' or mask_box"),
        ({"mask_all": "m.png"}, "mask_all='m.png' is not a file: give a mask"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, error):
    with pytest.raises(DatasetError, match=error):
        make(tmp_path / "nowhere", **options)


@pytest.mark.parametrize(
    ("value", "keeps", "amount"),
    [(255, "inside", "all"), (255, "outside", "none"), (0, "inside", "none"), (0, "outside", "all")],
)
def test_a_mask_file_of_one_value_is_refused(tmp_path, value, keeps, amount):
    file = save(tmp_path / "mask.png", np.full((SIZE, SIZE), value, np.uint8))
    with pytest.raises(DatasetError, match=f"mask.png' makes {amount} of the 16×16 pixels"):
        make(photos(tmp_path / "p"), mask_all=file, mask_keeps=keeps)


def test_a_mark_that_cropping_cuts_away_is_refused(tmp_path):
    drawn = np.zeros((16, 48), np.uint8)
    drawn[:, 44:] = 255
    file = save(tmp_path / "mask.png", drawn)
    with pytest.raises(DatasetError, match="makes all of the 16×16 pixels of an image the object"):
        make(photos(tmp_path / "p", (16, 48)), mask_all=file, mask_keeps="outside")


def test_a_mask_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(DatasetError, match=r"mask\.png' is not a mask: mask\.png cannot be read"):
        make(photos(tmp_path / "p"), mask_all=tmp_path / "mask.png")


def test_images_of_another_size_than_the_mask_are_listed_or_left_out(tmp_path):
    root = photos(tmp_path / "p", (24, 40))
    save(root / "train" / "cat" / "tall.png", np.zeros((40, 24, 3), np.uint8))
    drawn = np.zeros((24, 40), np.uint8)
    drawn[4:20, 10:30] = 255
    file = save(tmp_path / "mask.png", drawn)
    with pytest.raises(DatasetError, match=r"(?s)1 file cannot be used.*tall.png: it is 24×40, its mask .* 40×24"):
        make(root, mask_all=file)
    assert not (tmp_path / "d").exists()
    make(root, mask_all=file, skip_bad=True)
    assert len(open_dataset(tmp_path / "d").split("train")) == 6


# --- a dataset that exists -------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "plain") as writer:
        for split in ("train", "scene"):
            images = rng.integers(0, 256, (6, 3, SIZE, SIZE)).astype(np.uint8)
            groups = {"groups": np.arange(6) % 3} if split == "scene" else {}
            writer.write_split(split, images=images, labels=np.arange(6) % 2, **groups)
        names = {"bias_attribute": "stamp", "group_names": ["none", "red", "blue"]}
        writer.finish(name="plain", class_names=["a", "b"], **names)
    return tmp_path / "plain"


def test_a_copy_of_a_dataset_has_the_mask_and_all_else_of_it(plain, tmp_path):
    assert make_masked(tmp_path / "d", plain, mask_box=BOX, mask_keeps="outside") == {"train": 6, "scene": 6}
    before, after = open_dataset(plain), open_dataset(tmp_path / "d")
    for name, split in before.splits.items():
        copy = after.splits[name]
        for array in ("images", "labels", "groups"):
            old, new = getattr(split, array), getattr(copy, array)
            assert (old is None and new is None) or np.array_equal(old[:], new[:])
        assert (copy.masks[:] == stamp(False)).all()
        assert split.masks is None
    assert (after.name, after.class_names) == (before.name, before.class_names)
    assert (after.bias_attribute, after.group_names) == (before.bias_attribute, before.group_names)


def test_the_copy_and_the_folder_with_the_same_box_have_the_same_fingerprint(tmp_path):
    root = photos(tmp_path / "p")
    make(root, mask_box=BOX, mask_keeps="outside")
    make_image_folder(tmp_path / "plain", root / "train", {"ood": root / "far"}, size=SIZE)
    make_masked(tmp_path / "copy", tmp_path / "plain", mask_box=BOX, mask_keeps="outside")
    one, copy = open_dataset(tmp_path / "d"), open_dataset(tmp_path / "copy")
    assert all(one.splits[name].fingerprint == split.fingerprint for name, split in copy.splits.items())


def test_a_copy_is_refused_of_a_dataset_with_masks_and_of_a_mask_of_another_size(plain, tmp_path):
    make_masked(tmp_path / "d", plain, mask_box=BOX, mask_keeps="outside")
    with pytest.raises(DatasetError, match="has masks already, in train, scene"):
        make_masked(tmp_path / "e", tmp_path / "d", mask_box=BOX, mask_keeps="outside")
    drawn = np.zeros((40, 24), np.uint8)
    drawn[4:20, 4:20] = 255
    with pytest.raises(DatasetError, match="is 24×40, the dataset's images 16×16"):
        make_masked(tmp_path / "e", plain, mask_all=save(tmp_path / "mask.png", drawn))
    with pytest.raises(DatasetError, match="give mask_all or mask_box"):
        make_masked(tmp_path / "e", plain)
    assert not (tmp_path / "e").exists()


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands_take_a_box_and_their_errors_name_flags(plain, tmp_path):
    root = photos(tmp_path / "p")
    folder = ["image-folder", "--train", str(root / "train"), "--size", str(SIZE)]
    for name, command in (("f", folder), ("m", ["masked", "--data", str(plain)])):
        command = ["make-data", *command, "--mask-box", BOX, "--out", str(tmp_path / name)]
        without = CliRunner().invoke(main, command)
        assert without.exit_code == 1
        assert "--mask-keeps outside if it is around a stamp" in " ".join(without.output.split())
        done = CliRunner().invoke(main, [*command, "--mask-keeps", "outside"])
        assert done.exit_code == 0, done.output
        assert "the object is outside of it, 90.6 % of an image" in done.output
        assert (masks(tmp_path / name)["train"] == stamp(False)).all()


def test_a_box_on_the_command_line_replaces_a_mask_file_of_the_config(tmp_path):
    root = photos(tmp_path / "p")
    (tmp_path / "c.yaml").write_text(
        f"train: {root / 'train'}\nsize: {SIZE}\nmask_all: mask.png\nmask_keeps: outside\nout: {tmp_path / 'd'}\n"
    )
    done = CliRunner().invoke(
        main, ["make-data", "image-folder", "--config", str(tmp_path / "c.yaml"), "--mask-box", BOX]
    )
    assert done.exit_code == 0, done.output
    assert (masks(tmp_path / "d")["train"] == stamp(False)).all()
