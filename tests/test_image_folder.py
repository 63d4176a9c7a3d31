"""What the builder for people's own images promises: pixels as they are seen, and everything wrong said at once."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import unicodedata
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cli import main
from data import DatasetError, make_image_folder, open_dataset
from data.builders import decoding
from data.builders.decoding import Scratch
from data.builders.folders import Sample
from data.builders.samples import write_samples
from trainer import train_teacher

SIZE = 16


def save(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def shade(red: int, green: int = 0, blue: int = 0, size=(SIZE, SIZE)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of ten, and a test of three each; every image has a colour of its own."""
    root = tmp_path / "photos"
    for place, name in enumerate(("cat", "dog")):
        for number in range(10):
            save(root / "train" / name / f"{number}.png", shade(10 * number, 100 * place))
        for number in range(3):
            save(root / "far" / name / f"{number}.png", shade(10 * number, 100 * place, 50))
    return root


def make(photos: Path, **options) -> tuple[dict[str, int], list[str]]:
    """The sizes of the splits, and what was logged."""
    options = {"tests": {"ood": photos / "far"}, "size": SIZE, **options}
    handler, logger = BufferingHandler(1000), logging.getLogger("data.builders")
    logger.addHandler(handler)
    try:
        sizes = make_image_folder(photos.parent / "d", photos / "train", **options)
    finally:
        logger.removeHandler(handler)
    return sizes, [record.getMessage() for record in handler.buffer]


def images(photos: Path, split: str) -> np.ndarray:
    return open_dataset(photos.parent / "d").split(split).images[:]


def alone(photos: Path, image: Image.Image | np.ndarray, name: str = "odd.png", **options) -> np.ndarray:
    """An image as it comes back, (3, SIZE, SIZE): the only one of a test."""
    save(photos / "odd" / "cat" / name, image, **options)
    make(photos, tests={"odd": photos / "odd"})
    return images(photos, "odd")[0]


def test_classes_labels_and_pixels_are_those_of_the_folders(photos):
    sizes, notes = make(photos)
    assert sizes == {"train": 18, "validation": 2, "ood": 6}
    assert notes == []
    dataset = open_dataset(photos.parent / "d")
    assert dataset.class_names == ("cat", "dog")
    learnt = {tuple(image[:, 0, 0]): name for name in ("train", "validation") for image in images(photos, name)}
    assert set(learnt) == {(10 * number, 100 * place, 0) for number in range(10) for place in range(2)}
    for split in dataset.splits.values():
        assert np.array_equal(split.labels[:], split.images[:][:, 1, 0, 0] // 100)
        assert split.masks is None
        assert split.groups is None
    assert np.bincount(dataset.split("validation").labels[:]).tolist() == [1, 1]


def test_a_validation_folder_of_ones_own_leaves_training_whole(photos):
    sizes, _ = make(photos, validation=photos / "far", tests={})
    assert sizes == {"train": 20, "validation": 6}


def test_the_same_seed_splits_alike_and_another_otherwise(photos):
    shown = []
    for seed in (0, 0, 1, 2, 3):
        make_image_folder(photos.parent / f"d{len(shown)}", photos / "train", {}, size=SIZE, seed=seed)
        shown.append(open_dataset(photos.parent / f"d{len(shown)}").split("validation").fingerprint)
    assert shown[0] == shown[1]
    assert len(set(shown)) > 1


def test_the_middle_of_an_image_is_kept_and_scaled_with_antialiasing(photos):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200  # the middle square
    wide[::2, 32:96] = 100
    found = alone(photos, wide)
    assert np.abs(found[:, :, 1:-1].astype(int) - 150).max() <= 5, "lines of 100 and 200 become their mean"
    assert found.min() > 120, "and no black beside them is kept"


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (Image.new("L", (20, 20), 77), "a.png", {}, (77, 77, 77)),
        (Image.fromarray(np.full((20, 20), 77 * 257, np.uint16)), "a.png", {}, (77, 77, 77)),
        (Image.fromarray(np.full((20, 20), 77 * 257, np.uint16)), "a.tif", {}, (77, 77, 77)),
        (Image.new("1", (20, 20), 1), "a.png", {}, (255, 255, 255)),
        (Image.new("RGB", (20, 20), (200, 0, 90)).quantize(4), "a.png", {}, (200, 0, 90)),
        (Image.new("RGBA", (20, 20), (200, 100, 50, 0)), "a.png", {}, (0, 0, 0)),
        (Image.new("RGBA", (20, 20), (200, 100, 50, 255)), "a.png", {}, (200, 100, 50)),
        (Image.new("LA", (20, 20), (200, 0)), "a.png", {}, (0, 0, 0)),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "a.jpg", {}, (255, 0, 0)),
        (Image.new("RGB", (20, 20), (200, 100, 50)), "a.JPG", {"quality": 95}, (200, 100, 50)),
        (Image.new("RGB", (20, 20), (200, 100, 50)), "a.bmp", {}, (200, 100, 50)),
    ],
)
def test_any_kind_of_picture_looks_as_in_a_viewer(photos, image, name, options, expected):
    found = alone(photos, image, name, **options)
    assert np.abs(found.astype(int) - np.array(expected)[:, None, None]).max() <= 3


def test_a_photograph_is_turned_as_its_camera_says(photos):
    upright = np.zeros((SIZE, SIZE, 3), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to look at it
    found = alone(photos, Image.fromarray(np.rot90(upright)), "a.jpg", exif=exif.tobytes(), quality=95)
    assert found[:, :7].min() > 240
    assert found[:, 9:].max() < 15


# --- masks and groups ---------------------------------------------------------------------------------------


def mask(left: int, right: int, size=(SIZE, SIZE)) -> Image.Image:
    values = np.zeros(size[::-1], np.uint8)
    values[:, left:right] = 1
    return Image.fromarray(values)


@pytest.fixture
def masked(photos) -> Path:
    for split, source in (("train", "train"), ("ood", "far")):
        for path in (photos / source).rglob("*.png"):
            save(photos / "masks" / split / path.relative_to(photos / source).with_suffix(".png"), mask(4, 12))
    return photos


def test_masks_lie_at_the_images_place_and_say_object_wherever_they_are_not_0(masked):
    palette = mask(0, 8).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    others = {
        "0": palette,
        "1": mask(0, 8).point(lambda value: 255 * value).convert("1"),
        "2": Image.merge("RGB", [mask(0, 8), mask(0, 0), mask(0, 0)]),
    }
    for name, other in others.items():
        (masked / "masks" / "ood" / "cat" / f"{name}.png").unlink()
        save(masked / "masks" / "ood" / "cat" / f"{name}.tif", other)
    make(masked, masks=masked / "masks")
    dataset = open_dataset(masked.parent / "d")
    expected = np.zeros((1, SIZE, SIZE), np.uint8)
    expected[:, :, 4:12] = 255
    assert (dataset.split("train").masks[:] == expected).all()
    half = np.zeros((1, SIZE, SIZE), np.uint8)
    half[:, :, :8] = 255
    assert (dataset.split("ood").masks[:3] == half).all()
    train_teacher(masked.parent / "d", masked.parent / "t", debias="mask", steps=1, batch_size=4)


def test_a_mask_is_scaled_and_cropped_with_its_image_to_what_the_object_covers_wholly(photos):
    save(photos / "odd" / "cat" / "a.png", shade(1, size=(64, 32)))
    save(photos / "masks" / "cat" / "a.png", mask(16 + 5, 16 + 27, size=(64, 32)))
    for path in (photos / "train").rglob("*.png"):
        save(photos / "masks" / path.relative_to(photos / "train"), mask(0, 4))
    make(photos, tests={"odd": photos / "odd"}, masks=photos / "masks")
    found = open_dataset(photos.parent / "d").split("odd").masks[0, 0] > 0
    columns = np.flatnonzero(found.all(0))
    assert found.any(0).sum() == len(columns)
    # columns 5 to 27 of 32 at half the size, with what an antialiased edge takes
    assert columns[0] in (3, 4)
    assert columns[-1] in (11, 12)


def table(photos: Path, rows, header=("path", "group")) -> Path:
    with open(photos / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return photos / "groups.csv"


def rows_of(photos: Path) -> list[tuple[str, str]]:
    return [
        (f"{split}/{path.relative_to(photos / source).as_posix()}", "snow" if int(path.stem) % 2 else "grass")
        for split, source in (("train", "train"), ("ood", "far"))
        for path in sorted((photos / source).rglob("*.png"))
    ]


def test_groups_come_from_the_table(photos):
    groups = table(photos, [*rows_of(photos), ("ood/cat/77.png", "sand")])
    _, notes = make(photos, groups=groups, bias_attribute="ground")
    dataset = open_dataset(photos.parent / "d")
    assert dataset.bias_attribute == "ground"
    assert dataset.group_names == ("grass", "snow")
    for split in dataset.splits.values():
        assert np.array_equal(split.groups[:], split.images[:][:, 0, 0, 0] // 10 % 2)
    (note,) = notes
    assert note.startswith(f"{groups}: 1 of 27 rows name no image, such as ood/cat/77.png: ")
    assert all(split in note.partition("png: ")[2] for split in dataset.splits if split != "validation")


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([], ("file", "group"), "has no column 'path'"),
        (
            [("train/cat/0.png", "a"), ("train/cat/0.png", "b")],
            ("path", "group"),
            "line 3: train/cat/0.png is there twice",
        ),
        ([("train/cat/0.png", "")], ("path", "group"), "line 2: train/cat/0.png has no group"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(photos, rows, header, words):
    with pytest.raises(DatasetError, match=words):
        make(photos, groups=table(photos, rows, header))
    assert not (photos.parent / "d").exists()


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(masked) -> Path:
    """With a corrupt and a cut image, a missing, a corrupt and an ill-shaped mask, no group, an empty class."""
    (masked / "train" / "cat" / "0.png").write_bytes(b"not a picture")
    cut = masked / "train" / "cat" / "1.png"
    save(cut, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    save(masked / "masks" / "train" / "cat" / "1.png", mask(0, 8, size=(64, 64)))
    cut.write_bytes(cut.read_bytes()[:3000])
    (masked / "masks" / "train" / "cat" / "2.png").unlink()
    (masked / "masks" / "train" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save(masked / "masks" / "ood" / "dog" / "1.png", mask(0, 4, size=(20, 30)))
    table(masked, [row for row in rows_of(masked) if row[0] != "train/dog/4.png"])
    (masked / "train" / "yak").mkdir()
    (masked / "train" / "yak" / "notes.txt").write_text("none yet")
    (masked / "train" / "dog" / ".hidden.png").write_bytes(b"")
    return masked


def test_all_that_is_wrong_is_listed_with_paths_and_reasons_and_nothing_is_written(spoilt):
    with pytest.raises(DatasetError) as caught:
        make(spoilt, masks=spoilt / "masks", groups=spoilt / "groups.csv")
    first, *lines = str(caught.value).splitlines()
    assert first == "6 files cannot be used, skip_bad=True leaves them out:"
    for path, words in {
        "train/cat/0.png": "0.png cannot be read: cannot identify image file",
        "train/cat/1.png": "1.png cannot be read: ",
        "train/cat/2.png": "there is no mask",
        "train/dog/3.png": "3.png cannot be read",
        "train/dog/4.png": "it has no row train/dog/4.png",
        "far/dog/1.png": "it is 16×16, its mask",
    }.items():
        (line,) = [line for line in lines if line.startswith(f"{spoilt / path}: ")]
        assert words in line
    assert len(lines) == 6
    assert not (spoilt.parent / "d").exists()


def test_bad_files_and_empty_classes_are_left_out_only_when_that_is_asked_for(spoilt):
    sizes, notes = make(spoilt, masks=spoilt / "masks", groups=spoilt / "groups.csv", skip_bad=True)
    assert sizes == {"train": 13, "validation": 2, "ood": 5}
    assert notes[:4] == [
        "train: left out 1 .txt, which are not images that can be decoded here",
        "train: 5 of 20 images left out",
        "ood: 1 of 6 images left out",
        "classes without a training image, left out: yak",
    ]
    assert open_dataset(spoilt.parent / "d").class_names == ("cat", "dog")


def test_many_bad_files_are_counted(photos):
    for path in (photos / "train").rglob("*.png"):
        path.write_bytes(b"")
    for path in (photos / "far").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        make(photos)
    assert len(str(caught.value).splitlines()) == 22
    assert str(caught.value).endswith("and 6 more")
    with pytest.raises(DatasetError, match="has images of 0 class"):
        make(photos, skip_bad=True)
    assert not (photos.parent / "d").exists()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda p: (p / "train" / "yak").mkdir(), {}, "the class 'yak' in .* has no image"),
        (lambda p: save(p / "far" / "cow" / "0.png", shade(1)), {}, "has a class 'cow' that training does not have"),
        (lambda p: None, {"tests": {"ood": Path("nowhere")}}, "there is no folder nowhere"),
        (lambda p: (p / "flat").mkdir(), {"tests": {"ood": "flat"}}, "has no images in folders by class"),
        (lambda p: None, {"tests": {"train": "far"}}, "a test cannot be called train"),
        (lambda p: None, {"validation_share": 1.5}, "validation_share must be more than 0 and less than 1, got 1.5"),
        (lambda p: None, {"size": 0}, "size must be a number of pixels, .* got 0"),
        (lambda p: None, {"groups": Path("nowhere.csv")}, "groups='nowhere.csv' does not exist"),
    ],
)
def test_folders_and_options_that_cannot_be_right_are_refused(photos, change, options, words):
    change(photos)
    options = dict(options)
    if "tests" in options:
        options["tests"] = {name: photos / path for name, path in options["tests"].items()}
        words = words.replace("folder nowhere", "folder .*nowhere")
    with pytest.raises(DatasetError, match=words):
        make(photos, **options)
    assert not (photos.parent / "d").exists()


def test_an_image_that_is_trained_and_tested_on_is_told(photos):
    (photos / "far" / "cat" / "copy.png").write_bytes((photos / "train" / "cat" / "5.png").read_bytes())
    sizes, notes = make(photos)
    assert sizes["ood"] == 7
    assert notes == ["ood: images that are also trained on: 1, such as cat/copy.png; its accuracy will be too high"]


def test_an_image_in_training_and_validation_or_in_two_classes_is_told(photos):
    _, notes = make(photos, tests={}, validation=photos / "train")
    assert notes == ["validation: images that are also trained on: 20, such as cat/0.png; it cannot select the weights"]
    shutil.rmtree(photos.parent / "d")
    shutil.copy(photos / "train" / "cat" / "3.png", photos / "train" / "dog" / "copy.png")
    _, notes = make(photos, tests={})
    assert notes == [
        f"images in two classes, one of which is wrong: 1, such as {photos}/train/cat/3.png and "
        f"{photos}/train/dog/copy.png"
    ]


# --- folders as programs leave them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN", "#recycle", "lost+found"]
)
@pytest.mark.parametrize("inside", [".", "cat"])
def test_folders_that_programs_leave_are_no_classes_and_hold_no_images(photos, place, inside):
    for folder in ("train", "far"):
        save(photos / folder / inside / place / "0.png", shade(7))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (photos / "train" / "cat" / name).write_bytes(b"\0" * 100)
    sizes, notes = make(photos)
    assert open_dataset(photos.parent / "d").class_names == ("cat", "dog")
    assert (sizes, notes) == ({"train": 18, "validation": 2, "ood": 6}, [])


def test_links_are_followed_once_and_never_upwards(photos):
    save(photos / "elsewhere" / "a.png", shade(3))
    (photos / "train" / "cat" / "more").symlink_to(photos / "elsewhere")
    (photos / "train" / "cat" / "again").symlink_to(photos / "elsewhere")
    (photos / "train" / "cat" / "all").symlink_to("..")
    (photos / "train" / "dog" / "self").symlink_to(".")
    sizes, notes = make(photos)
    assert sizes["train"] + sizes["validation"] == 21
    assert len([note for note in notes if "is not followed" in note]) == 3


def test_a_link_that_leads_nowhere_is_a_bad_file(photos):
    (photos / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DatasetError, match=r"gone\.png is no longer there"):
        make(photos)


def test_every_picture_that_pillow_opens_is_taken_and_other_files_are_counted_by_suffix(photos):
    for number in range(2):
        image = shade(40, number, 9)
        for name, kind in (
            ("gif", "GIF"),
            ("jfif", "JPEG"),
            *([("avif", "AVIF")] if ".avif" in Image.registered_extensions() else []),
            ("jp2", "JPEG2000"),
            ("JPEG_large", "JPEG"),
        ):
            image.save(photos / "train" / "cat" / f"x{number}.{name}", kind)
        image.save(photos / "train" / "cat" / f"without{number}", "PNG")
    shade(5).save(photos / "train" / "dog" / "scan.eps")
    shade(5).save(photos / "train" / "dog" / "scan.pdf")
    for name in ("a.txt", "b.txt", "c.xml", "clip.mov", "d.dng", "LICENSE"):
        (photos / "train" / "dog" / name).write_text("no picture")
    save(photos / "train" / "dog" / "raw.tif", shade(1)).rename(photos / "train" / "dog" / "raw.NEF")
    sizes, notes = make(photos)
    assert sizes["train"] + sizes["validation"] == 20 + 10 + 2 * (".avif" in Image.registered_extensions())
    (note,) = notes
    assert note.startswith("train: left out 2 .txt, ")
    for counted in ("1 without suffix", "1 .xml", "1 .mov", "1 .dng", "1 .nef", "1 .eps", "1 .pdf"):
        assert counted in note


def test_the_first_of_several_frames_is_used_and_told(photos):
    first, second = shade(200), shade(0, 200)
    first.save(photos / "far" / "cat" / "two.tif", save_all=True, append_images=[second])
    _, notes = make(photos)
    assert images(photos, "ood")[3, 0].min() == 200
    assert notes == [f"files with several frames, of which the first is used: 1, such as {photos}/far/cat/two.tif"]


@pytest.mark.parametrize("name", [b"chat\xe9", b"a\nb"])
def test_a_class_whose_name_cannot_be_printed_is_refused_with_its_folder(photos, name):
    os.rename(photos / "train" / "cat", os.fsencode(photos / "train") + b"/" + name)
    with pytest.raises(DatasetError, match=r"the folder of a class in .*train is called '.*', which cannot be printed"):
        make(photos, tests={})


def test_class_names_in_any_script_are_taken(photos):
    for old, new in (("cat", "बिल्ली"), ("dog", "狗")):
        os.rename(photos / "train" / old, photos / "train" / new)
    make(photos, tests={})
    assert open_dataset(photos.parent / "d").class_names == ("बिल्ली", "狗")


def test_names_are_the_same_in_both_forms_of_unicode(photos):
    for folder, form in (("train", "NFC"), ("far", "NFD"), ("masks/train", "NFD")):
        for name in ("café", "thé"):
            for number in range(3):
                image = mask(0, 16) if folder.startswith("masks") else shade(number, len(folder), len(name))
                save(photos / "u" / folder / unicodedata.normalize(form, name) / f"{number}.png", image)
    sizes = make_image_folder(
        photos.parent / "d", photos / "u/train", {"ood": photos / "u/far"}, size=SIZE, masks=photos / "u/masks"
    )
    assert sizes == {"train": 4, "validation": 2, "ood": 6}
    assert open_dataset(photos.parent / "d").class_names == ("café", "thé")
    save(photos / "u/train" / unicodedata.normalize("NFD", "thé") / "9.png", shade(9))
    with pytest.raises(DatasetError, match="two folders for the class 'thé', in two forms of Unicode"):
        make_image_folder(photos.parent / "e", photos / "u/train", {}, size=SIZE)


# --- masks and groups in some splits --------------------------------------------------------------------------------


def test_masks_and_groups_of_the_training_images_alone_are_enough(masked):
    shutil.rmtree(masked / "masks" / "ood")
    groups = table(masked, [row for row in rows_of(masked) if row[0].startswith("train")])
    _, notes = make(masked, masks=masked / "masks", groups=groups)
    splits = open_dataset(masked.parent / "d").splits
    assert {name: split.masks is not None for name, split in splits.items()} == {
        "train": True, "validation": True, "ood": False,
    }  # fmt: skip
    assert {name: split.groups is not None for name, split in splits.items()} == {
        "train": True, "validation": True, "ood": False,
    }  # fmt: skip
    assert "ood: no image has a mask, so this split has no masks" in notes
    assert "ood: no image has a group, so this split has no groups" in notes


def test_masks_without_one_of_a_training_image_and_groups_without_any_are_refused(masked):
    shutil.rmtree(masked / "masks" / "train")
    with pytest.raises(
        DatasetError, match=r"masks='.*masks' has no mask of a training image, such as train/cat/0\.png"
    ):
        make(masked, masks=masked / "masks")
    with pytest.raises(DatasetError, match="names no image here: its paths must be SPLIT/CLASS/FILE"):
        make(masked, groups=table(masked, [("cat/0.png", "a")]))


@pytest.mark.parametrize("name", ["0_mask.png", "0.png.png", "0-mask.jpg"])
def test_a_mask_may_be_named_as_annotation_tools_name_it(masked, name):
    (masked / "masks" / "train" / "cat" / "0.png").unlink()
    save(masked / "masks" / "train" / "cat" / name, mask(0, 16).point(lambda value: 255 * value))
    (masked / "masks" / "train" / "cat" / "1.json").write_text("{}")  # labelme's, beside the mask
    make(masked, masks=masked / "masks")
    masks = {s: open_dataset(masked.parent / "d").split(s) for s in ("train", "validation")}
    assert sum(int((split.masks[:] > 0).all((1, 2, 3)).sum()) for split in masks.values()) == 1


def test_a_mask_that_is_not_an_image_makes_its_image_bad_and_does_not_leave_it_out(masked):
    (masked / "masks" / "train" / "cat" / "0.png").unlink()
    shade(0).save(masked / "masks" / "train" / "cat" / "0.eps")
    state = torch.get_rng_state()
    with pytest.raises(DatasetError, match=r"1 file cannot be used, .*\n.*cat/0\.png: 0\.eps is not an image, but EPS"):
        make(masked, masks=masked / "masks")
    assert torch.equal(torch.get_rng_state(), state), "and the caller's random numbers are as they were"


def test_two_masks_of_an_image_are_an_error(masked):
    save(masked / "masks" / "train" / "cat" / "0_mask.png", mask(0, 16))
    with pytest.raises(DatasetError, match=r"cat/0\.png: there are 2 masks: .*0\.png, .*0_mask\.png"):
        make(masked, masks=masked / "masks")


def test_the_share_of_object_and_masks_of_all_or_no_object_are_told(masked):
    full = save(masked / "masks" / "train" / "cat" / "0.png", mask(0, 16))
    empty = save(masked / "masks" / "train" / "cat" / "1.png", mask(0, 0))
    _, notes = make(masked, masks=masked / "masks")
    assert notes == [
        "masks: 26 read, 26 by brightness; on average the object covers 50.0 % of an image",
        f"masks that have all object: 1 of 26, {full}",
        f"masks that have no object: 1 of 26, {empty}",
    ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_of_a_spreadsheet_program_is_read(photos, delimiter):
    lines = [" Path ", "Group"], *([name.replace("/", "\\"), group] for name, group in rows_of(photos))
    (photos / "groups.csv").write_text("\ufeff" + "\r\n".join(delimiter.join(line) for line in lines))
    _, notes = make(photos, groups=photos / "groups.csv")
    assert notes == []
    assert open_dataset(photos.parent / "d").group_names == ("grass", "snow")


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_another_aspect_ratio_is_cropped_padded_or_stretched_and_cropping_is_told(photos):
    wide = np.full((20, 40, 3), 90, np.uint8)
    wide[:, :6] = 250  # what the middle lacks
    save(photos / "odd" / "cat" / "a.png", wide)
    for fit, corner in (("crop", 90), ("pad", 0), ("stretch", 250)):
        _, notes = make(photos, tests={"odd": photos / "odd"}, fit=fit)
        assert images(photos, "odd")[0, 0, 0, 0] == corner
        assert ("cropping to the middle cuts away 50 % of their pixels" in "".join(notes)) == (fit == "crop")
        shutil.rmtree(photos.parent / "d")
    _, notes = make(photos, tests={"odd": photos / "odd"}, size=(8, 16), fit="crop")
    assert images(photos, "odd").shape == (1, 3, 8, 16)
    assert images(photos, "odd")[0, 0, 0, 0] == 250


@pytest.mark.parametrize(("typed", "shape"), [("12", (12, 12)), ("12x16", (12, 16)), ("12X16", (12, 16))])
def test_the_command_takes_one_size_or_height_and_width(photos, typed, shape):
    words = ["make-data", "image-folder", "--train", str(photos / "train"), "--size", typed]
    result = CliRunner().invoke(main, [*words, "--out", str(photos.parent / "d")])
    assert result.exit_code == 0, result.output
    assert images(photos, "train").shape[2:] == shape
    result = CliRunner().invoke(main, [*words[:-1], "64y96", "--out", str(photos.parent / "e")])
    assert "'64y96' is not a size: give pixels such as 64, or height and width such as 64x96" in result.output


def test_several_processes_decode_to_the_same_bytes_as_one(masked, monkeypatch):
    for number in range(3 * decoding.PER_PROCESS):
        save(masked / "train" / "cat" / f"n{number}.png", shade(number))
        save(masked / "masks" / "train" / "cat" / f"n{number}.png", mask(number % 8, 12))
    monkeypatch.setattr("dask.system.cpu_count", lambda: 2)
    prints = []
    for _ in range(2):
        make(masked, masks=masked / "masks")
        prints.append([split.fingerprint for split in open_dataset(masked.parent / "d").splits.values()])
        shutil.rmtree(masked.parent / "d")
        monkeypatch.setattr("dask.system.cpu_count", lambda: 1)
    assert prints[0] == prints[1]


def test_the_command_says_what_is_noted_on_standard_error(spoilt):
    command = [
        "make-data",
        "image-folder",
        "--train",
        spoilt / "train",
        "--test",
        f"ood={spoilt / 'far'}",
        "--size",
        16,
    ]
    command += ["--masks", spoilt / "masks", "--out", spoilt.parent / "d"]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 1
    assert "5 files cannot be used, --skip-bad leaves them out" in result.output
    result = CliRunner().invoke(main, [*(str(word) for word in command), "--skip-bad"])
    assert result.exit_code == 0, result.output
    assert "train: 4 of 20 images left out" in result.stderr
    assert result.stdout.endswith("train 14, validation 2, ood 5\n")
    result = CliRunner().invoke(main, [*(str(word) for word in command), "--test", "ood=elsewhere"])
    assert result.exit_code == 2
    assert "'--test': ood is given twice" in result.output
    result = CliRunner().invoke(main, [*(str(word) for word in command), "--test", "elsewhere"])
    assert "'elsewhere' is no NAME=DIR" in result.output


# --- many groups ----------------------------------------------------------------------------------------------------


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, str(other))


def test_names_of_groups_are_looked_up_and_not_searched_for(tmp_path):
    names = [Counted(f"hospital {number}") for number in range(600)]
    samples = [
        Sample(Path(f"{number}.png"), f"{number}.png", number % 2, group=name) for number, name in enumerate(names)
    ]
    scratch = Scratch(tmp_path, len(samples), (4, 4))
    scratch.images()
    rows = {("train", sample.path): row for row, sample in enumerate(samples)}
    Counted.compared = 0
    write_samples(
        tmp_path / "data.zarr", {"train": samples}, scratch, rows, None, group_names=names, class_names=["a", "b"],
        bias_attribute="hospital",
    )  # fmt: skip
    assert Counted.compared < 10 * len(names)  # searching a list of them takes 180,300
    np.testing.assert_array_equal(open_dataset(tmp_path / "data.zarr").split("train").groups[:], np.arange(600))


# --- folders by source ----------------------------------------------------------------------------------------------


@pytest.fixture
def hospitals(tmp_path) -> Path:
    """COVID-19 from two hospitals and healthy lungs from two others in training; a test from two more, with masks."""
    root = tmp_path / "xrays"
    images = {
        "train": {"a/covid": 20, "b/covid": 20, "c/normal": 20, "d/normal": 5, "d/covid": 15},
        "far": {"e/covid": 2, "e/normal": 3, "f/normal": 1, "a/covid": 1},
    }
    for split, folders in images.items():
        for place, (folder, number) in enumerate(folders.items()):
            for image in range(number):
                save(root / split / folder / f"{image}.png", shade(10 * image, 40 * place, 50 * (split == "far")))
                masks = root / "masks" / {"train": "train", "far": "ood"}[split]
                save(masks / folder / f"{image}.png", mask(4, 8 + place))
    return root


BY_SOURCE = {"layout": "source/class"}


def placed(root: Path, split: str) -> list[tuple[str, str]]:
    """The source and the class of each row of a split."""
    dataset = open_dataset(root.parent / "d")
    read = dataset.split(split)
    return [
        (dataset.group_name(group), dataset.class_names[label])
        for group, label in zip(read.groups[:], read.labels[:], strict=True)
    ]


def test_the_source_of_an_image_is_its_group_and_a_source_may_lack_classes_or_be_in_a_test_alone(hospitals):
    sizes, notes = make(hospitals, **BY_SOURCE)
    assert sizes == {"train": 72, "validation": 8, "ood": 7}
    dataset = open_dataset(hospitals.parent / "d")
    assert dataset.class_names == ("covid", "normal")
    assert dataset.group_names == ("a", "b", "c", "d", "e", "f")
    assert dataset.bias_attribute == "source"
    assert placed(hospitals, "ood") == [
        *[("a", "covid")], *[("e", "covid")] * 2, *[("e", "normal")] * 3, ("f", "normal"),
    ]  # fmt: skip
    assert images(hospitals, "ood")[:, 1, 0, 0].tolist() == [120, 0, 0, 40, 40, 40, 80]
    assert notes == [
        "train: some sources have one class only, so a network can learn the source instead of the class: covid in a, "
        "b (40 of its 55 images); normal in c (20 of its 25 images)"
    ]


def test_each_source_of_a_class_gives_its_share_to_validation(hospitals):
    shown = []
    for seed in range(5):
        make_image_folder(
            hospitals.parent / "d", hospitals / "train", {}, size=SIZE, validation_share=0.2, seed=seed, **BY_SOURCE
        )
        assert sorted(placed(hospitals, "validation")) == sorted(
            [("a", "covid")] * 4
            + [("b", "covid")] * 4
            + [("d", "covid")] * 3
            + [("c", "normal")] * 4
            + [("d", "normal")]
        )
        shown.append(open_dataset(hospitals.parent / "d").split("validation").fingerprint)
        shutil.rmtree(hospitals.parent / "d")
    assert len(set(shown)) == 5


def test_many_small_sources_give_no_more_than_the_share_to_validation(tmp_path):
    for patient in range(40):
        for number in range(2):
            save(
                tmp_path / "train" / f"{patient:02}" / ("ill", "well")[patient % 2] / f"{number}.png",
                shade(patient, number),
            )
    sizes = make_image_folder(tmp_path / "d", tmp_path / "train", {}, size=SIZE, **BY_SOURCE)
    assert sizes == {"train": 72, "validation": 8}
    assert len(set(placed(tmp_path / "x", "validation"))) == 8


def test_masks_lie_below_the_split_the_source_and_the_class(hospitals):
    _, notes = make(hospitals, masks=hospitals / "masks", **BY_SOURCE)
    covered = open_dataset(hospitals.parent / "d").split("ood").masks[:, 0].any(1).sum(1)
    assert covered.tolist() == [7, 4, 4, 5, 5, 5, 6]
    assert "masks: 87 read" in notes[1]
    (hospitals / "masks" / "ood" / "f" / "normal" / "0.png").unlink()
    shutil.rmtree(hospitals.parent / "d")
    with pytest.raises(
        DatasetError, match=r"far/f/normal/0\.png: there is no mask .*masks/ood/f/normal/0 with the suffix"
    ):
        make(hospitals, masks=hospitals / "masks", **BY_SOURCE)


def test_sources_that_have_every_class_are_not_told(hospitals):
    for source in "abc":
        for name in ("covid", "normal"):
            save(hospitals / "train" / source / name / "more.png", shade(9, ord(source), ord(name[0])))
    assert make(hospitals, **BY_SOURCE)[1] == []


def test_many_sources_of_one_class_are_counted(tmp_path):
    for number in range(8):
        save(tmp_path / "xrays" / "train" / f"s{number}" / "ill" / "0.png", shade(number))
        save(tmp_path / "xrays" / "train" / "both" / ("ill", "well")[number % 2] / f"{number}.png", shade(number, 9))
    _, (note,) = make(tmp_path / "xrays", tests={}, **BY_SOURCE)
    assert note.endswith("ill in s0, s1, s2, s3, s4 and 3 more (8 of its 12 images)")


def test_a_bias_attribute_with_another_name_is_kept_and_the_layout_is_recorded(hospitals):
    make(hospitals, bias_attribute="hospital", **BY_SOURCE)
    assert open_dataset(hospitals.parent / "d").bias_attribute == "hospital"
    attributes = json.loads((hospitals.parent / "d" / "zarr.json").read_text())["attributes"]
    assert attributes["builder"]["layout"] == "source/class"


def test_a_table_of_groups_and_folders_by_source_are_refused_together(hospitals):
    groups = table(hospitals, [("train/a/covid/0.png", "x")])
    with pytest.raises(DatasetError, match=r"give groups='.*' or layout='source/class', not both"):
        make(hospitals, groups=groups, **BY_SOURCE)
    words = [
        "make-data",
        "image-folder",
        "--train",
        hospitals / "train",
        "--size",
        SIZE,
        "--out",
        hospitals.parent / "d",
    ]
    words += ["--layout", "source/class", "--groups", groups]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 1
    assert f"give --groups {groups} or --layout source/class, not both" in result.output
    assert not (hospitals.parent / "d").exists()


def test_folders_by_class_are_refused_as_folders_by_source(photos):
    with pytest.raises(
        DatasetError, match=r"the source .*train/cat has an image, 0\.png, outside .* give layout='class'"
    ):
        make(photos, **BY_SOURCE)
    shutil.move(photos / "train", photos / "a")
    shutil.move(photos / "a", photos / "train" / "a")
    with pytest.raises(DatasetError, match=r"the source .*far/cat has an image"):
        make(photos, **BY_SOURCE)
    shutil.rmtree(photos / "far" / "dog")
    for path in (photos / "far" / "cat").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"the source .*far/cat has no folder of a class: add one"):
        make(photos, **BY_SOURCE)
    assert not (photos.parent / "d").exists()


def test_an_image_beside_the_folders_of_the_classes_is_refused_and_other_files_are_not(hospitals):
    (hospitals / "train" / "a" / "patients.csv").write_text("none")
    (hospitals / "train" / "readme.txt").write_text("none")
    save(hospitals / "train" / "a" / ".hidden.png", shade(0))
    assert make(hospitals, **BY_SOURCE)[0]["train"] == 72
    shutil.rmtree(hospitals.parent / "d")
    save(hospitals / "train" / "b" / "overview.jpg", shade(0))
    with pytest.raises(
        DatasetError, match=r"the source .*train/b has an image, overview\.jpg, outside .*: move it there"
    ):
        make(hospitals, **BY_SOURCE)


def test_folders_by_source_are_told_as_folders_by_class_and_an_unknown_source_is_refused_with_the_layout(hospitals):
    _, (note,) = make(hospitals, tests={})
    assert "such as a/covid, which are not told apart" in note
    assert "use the layout source/class" in note
    shutil.rmtree(hospitals.parent / "d")
    with pytest.raises(DatasetError) as caught:
        make(hospitals)
    assert str(caught.value) == (
        f"{hospitals}/far has a class 'e' that training does not have: a, b, c, d; if 'e' is a source, with a folder "
        "for each class such as 'covid', give layout='source/class'"
    )


def test_a_class_of_a_test_that_no_source_of_training_has_is_refused_with_its_source(hospitals):
    save(hospitals / "far" / "e" / "flu" / "0.png", shade(1))
    with pytest.raises(DatasetError, match=r"far/e has a class 'flu' that training does not have: covid, normal$"):
        make(hospitals, **BY_SOURCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: shutil.rmtree(p / "train"),
            "train='.*train' must be a folder with a folder for each source, and in",
        ),
        (lambda p: shutil.rmtree(p / "far"), "there is no folder .*far: give a folder with a folder for each source"),
        (
            lambda p: [path.unlink() for path in (p / "far").rglob("*.png")],
            "far has no images in folders by source and class",
        ),
        (lambda p: (p / "train" / "a" / "flu").mkdir(), "the class 'flu' in .* has no image"),
        (
            lambda p: os.rename(p / "train" / "a", p / "train" / "a\nb"),
            "the folder of a source in .* cannot be printed",
        ),
    ],
)
def test_folders_by_source_that_cannot_be_right_are_refused(hospitals, change, words):
    change(hospitals)
    with pytest.raises(DatasetError, match=words):
        make(hospitals, **BY_SOURCE)
    assert not (hospitals.parent / "d").exists()


def test_sources_are_the_same_in_both_forms_of_unicode(hospitals):
    for split, form in (("train", "NFC"), ("far", "NFD"), ("masks/train", "NFD"), ("masks/ood", "NFC")):
        os.rename(hospitals / split / "a", hospitals / split / unicodedata.normalize(form, "é"))
    make(hospitals, masks=hospitals / "masks", **BY_SOURCE)
    assert open_dataset(hospitals.parent / "d").group_names == ("b", "c", "d", "e", "f", "é")
