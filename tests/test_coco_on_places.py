"""What COCO-on-Places promises, on a miniature of both originals in their own layouts."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as rle

from cli import main
from data import DatasetError, make_coco_on_places, open_dataset
from data.builders.coco_on_places import BIASING, CLASSES, UNSEEN
from trainer.reproduction import profiles

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
FEW = {"train_per_class": 3, "test_per_class": 2}
WIDTH, HEIGHT = 320, 240
IDS = {name: 3 * place + 2 for place, name in enumerate(CLASSES)}  # COCO's are not consecutive either


class Annotations:
    """An instances file as COCO's, and its pictures."""

    def __init__(self, coco: Path):
        self.coco, self.images, self.instances = coco, [], []
        (coco / "annotations").mkdir(parents=True)
        (coco / "train2017").mkdir()

    def picture(self, colour, mode="RGB") -> int:
        number = len(self.images) + 101
        name = f"{number:012}.jpg"
        self.images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        Image.new("RGB", (WIDTH, HEIGHT), colour).convert(mode).save(self.coco / "train2017" / name, quality=95)
        return number

    def box(self, picture, name, left, top, right, bottom, *, crowd=False):
        polygon = [left, top, right, top, right, bottom, left, bottom]
        instance = {
            "id": len(self.instances) + 1,
            "image_id": picture,
            "category_id": IDS[name],
            "area": (right - left) * (bottom - top),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": int(crowd),
            "segmentation": [polygon],
        }
        if crowd:  # these are run lengths, as text or as numbers
            packed = rle.merge(rle.frPyObjects([polygon], HEIGHT, WIDTH))
            instance["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
        self.instances.append(instance)

    def write(self):
        categories = [{"id": number, "name": name} for name, number in IDS.items()] + [{"id": 90, "name": "toothbrush"}]
        content = {"images": self.images, "annotations": self.instances, "categories": categories}
        (self.coco / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def colour_of(number: int) -> tuple[int, int, int]:
    """One that tells pictures apart, after JPEG too: multiples of 16, red at least 128."""
    return 128 + 16 * (number % 8), 16 * (number // 8 % 16), 16 * (number // 128 % 16)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, Path]:
    """COCO and Places365: pictures of one colour each; scenes of a colour whose red is below 112."""
    root = tmp_path_factory.mktemp("originals")
    made = Annotations(root / "coco")
    for place, name in enumerate(CLASSES):
        for number in range(8):
            picture = made.picture(colour_of(10 * place + number), "L" if (place, number) == (0, 0) else "RGB")
            made.box(picture, name, 0, 0, 60, 60)  # 3,600: another of the class, smaller
            made.box(picture, name, 160, 60, 320, 180)  # 19,200: the right half's middle
            made.box(picture, name, 0, 0, 320, 240, crowd=True)  # larger, and no object
        small = made.picture((255, 255, 255))
        made.box(small, name, 0, 0, 100, 100)  # 10,000, and no pixel more
    both = made.picture(colour_of(200))
    made.box(both, "boat", 160, 60, 320, 180)
    made.box(both, "dog", 0, 0, 160, 120)
    made.write()
    for place, scene in enumerate((*BIASING, *UNSEEN)):
        folder = root / "places" / "data_256" / scene[0] / scene
        folder.mkdir(parents=True)
        for number in range(24):
            shade = (8 * place, 8 * number, 128)
            Image.new("RGB", (256, 256), shade).save(folder / f"{number:08}.png" if number else folder / "0.PNG")
    return root / "coco", root / "places"


@pytest.fixture(scope="module")
def made(originals, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "data.zarr"
    sizes = make_coco_on_places(path, *originals, size=32, **FEW)
    assert sizes == {"train": 27, "validation": 18, "iid": 18, "ood": 18, "shift": 18}
    return path


def pictures(split) -> list[tuple[int, ...]]:
    """The colour of each sample's object, as a number of sixteenths."""
    return [tuple(np.round(image[:, 16, 28] / 16).astype(int)) for image in split.images[:].astype(float)]


def scenes(split) -> list[tuple[int, ...]]:
    """The colour of each sample's photograph, in its corner."""
    return [tuple(image[:, 2, 2].tolist()) for image in split.images[:]]


def test_each_class_has_its_samples_and_its_scene(made):
    dataset = open_dataset(made)
    assert dataset.class_names == CLASSES
    assert dataset.group_names == (*BIASING, *UNSEEN)
    for name, split in dataset.splits.items():
        labels, groups = split.labels[:], split.groups[:]
        assert np.bincount(labels).tolist() == [3 if name == "train" else 2] * 9
        assert (np.diff(labels) != 0).any()
        assert labels.tolist() != sorted(labels), "classes are mixed"
        if name in ("train", "validation", "iid"):
            assert np.array_equal(labels, groups)
        else:
            assert not (labels == groups).any()
            assert (groups >= 9).all() == (name == "ood")
        for group, scene in zip(groups.tolist(), scenes(split), strict=True):
            assert scene[0] == 8 * group, "the photograph is one of that type"


def test_no_picture_and_no_photograph_is_in_two_splits_but_the_objects_of_the_tests(made):
    dataset = open_dataset(made)
    shown = {name: pictures(split) for name, split in dataset.splits.items()}
    assert shown["iid"] == shown["ood"] == shown["shift"]
    learnt = [*shown["train"], *shown["validation"], *shown["iid"]]
    assert len(set(learnt)) == len(learnt)
    behind = [scene for split in dataset.splits.values() for scene in scenes(split)]
    assert len(set(behind)) == len(behind)


def test_the_largest_instance_is_cut_out_where_it_is_squeezed_to(made):
    for split in open_dataset(made).splits.values():
        for mask, image in zip(split.masks[:, 0] > 0, split.images[:], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if columns[0] >= 16:  # but for the dog of the picture with two classes
                # of 240 rows 60 to 180, of 320 columns 160 to 320: quarters and halves of 32, less an edge
                assert rows[0] in (8, 9)
                assert rows[-1] in (22, 23)
                assert columns[0] in (16, 17)
                assert columns[-1] == 31
            inside = image[:, mask]
            assert inside.astype(int).max(1) - inside.astype(int).min(1) == pytest.approx(0, abs=6), "one colour"


def test_a_picture_with_two_classes_is_shown_for_one_of_them(originals, tmp_path):
    """It is the ninth of either class: both cannot have nine."""
    more = {"train_per_class": 5, "test_per_class": 2}
    with pytest.raises(DatasetError, match="has 8 pictures with an instance of 'airplane' over 10,000 pixels, and 9"):
        make_coco_on_places(tmp_path / "d", *originals, size=32, **more)
    assert not (tmp_path / "d").exists()


def test_the_same_seed_gives_the_same_dataset_and_another_one_another(made, originals, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        make_coco_on_places(tmp_path / name, *originals, size=32, seed=seed, **FEW)
    first, same, other = (open_dataset(path).splits for path in (made, tmp_path / "same", tmp_path / "other"))
    for split in first:
        assert first[split].fingerprint == same[split].fingerprint != other[split].fingerprint


def test_folders_of_places_without_their_letters_do_too(made, originals, tmp_path):
    coco, places = originals
    for scene in (*BIASING, *UNSEEN):
        shutil.copytree(places / "data_256" / scene[0] / scene, tmp_path / "flat" / scene)
    make_coco_on_places(tmp_path / "d", coco, tmp_path / "flat", size=32, **FEW)
    assert open_dataset(tmp_path / "d").split("ood").fingerprint == open_dataset(made).split("ood").fingerprint


def test_a_limit_keeps_the_first_samples(made, originals, tmp_path):
    make_coco_on_places(tmp_path / "d", *originals, size=32, limit=4, **FEW)
    for name, split in open_dataset(tmp_path / "d").splits.items():
        assert np.array_equal(split.images[:], open_dataset(made).split(name).images[:4])


def spoilt(originals, tmp_path, spoil) -> tuple[Path, Path]:
    for folder, name in zip(originals, ("coco", "places"), strict=True):
        shutil.copytree(folder, tmp_path / name)
    spoil(tmp_path)
    return tmp_path / "coco", tmp_path / "places"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda root: (root / "coco/annotations/instances_train2017.json").unlink(),
            r"no annotations/instances_train2017.json .*annotations_trainval2017.zip",
        ),
        (
            lambda root: (root / "coco/annotations/instances_train2017.json").write_text('{"images": []'),
            "is not an instances file of COCO",
        ),
        (
            lambda root: (root / "coco/annotations/instances_train2017.json").write_text("[]"),
            "is not an instances file of COCO",
        ),
        (lambda root: shutil.rmtree(root / "coco/train2017"), "there is no folder train2017 in .*train2017.zip"),
        (
            lambda root: shutil.rmtree(root / "places/data_256/d"),
            r"no folder d/desert/sand in .*train_256_places365standard.tar \(of which beach",
        ),
        (
            lambda root: [path.unlink() for path in sorted((root / "places/data_256/b/beach").iterdir())[4:]],
            "has 4 photographs of 'beach', and more are needed",
        ),
        (
            lambda root: [path.write_bytes(b"\xff\xd8 cut") for path in (root / "coco/train2017").iterdir()],
            r"the image .*\.jpg cannot be read",
        ),
        (
            lambda root: [path.unlink() for path in (root / "coco/train2017").iterdir()],
            r"there is no .*\.jpg: unpack http",
        ),
        (
            lambda root: [path.write_bytes(b"") for path in (root / "places/data_256/z/zen_garden").iterdir()],
            r"the image .*zen_garden.* cannot be read",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_nothing_is_left(originals, tmp_path, spoil, words):
    paths = spoilt(originals, tmp_path, spoil)
    with pytest.raises(DatasetError, match=words):
        make_coco_on_places(tmp_path / "d", *paths, size=32, **FEW)
    assert not (tmp_path / "d").exists()


def test_the_command_makes_it(made, originals, tmp_path):
    coco, places = map(str, originals)
    command = ["make-data", "coco-on-places", "--coco", coco, "--places", places, "--out", str(tmp_path / "d")]
    result = CliRunner().invoke(main, [*command, "--size", "32", "--train-per-class", "3", "--test-per-class", "2"])
    assert result.exit_code == 0, result.output
    assert "train 27, validation 18, iid 18, ood 18, shift 18" in result.output
    assert open_dataset(tmp_path / "d").split("iid").fingerprint == open_dataset(made).split("iid").fingerprint


def test_the_table_is_made_from_the_original_files_wherever_they_lie(originals, tmp_path, monkeypatch):
    coco, places = originals
    tiny = dataclasses.replace(
        profiles.ON_PLACES["gpu"],
        data={"size": 16, **FEW},
        teacher={**profiles.ON_PLACES["gpu"].teacher, "arch_options": {"width": 4}, "steps": 2, "batch_size": 9},
        student={
            **profiles.ON_PLACES["gpu"].student,
            "arch_options": {"width": 4},
            "steps": 2,
            "batch_size": 9,
            "snapshots": 1,
        },
        of_row={},
        draws=1,
    )
    monkeypatch.setitem(profiles.ON_PLACES, "gpu", tiny)

    def table(coco, places, *methods):
        command = ["reproduce", "coco-on-places", "--coco", str(coco), "--places", str(places), "--device", "cpu"]
        return CliRunner().invoke(
            main, [*command, "--out", str(tmp_path / "r"), "--seeds", "1", "--methods", ",".join(methods)]
        )

    result = table(tmp_path, places, "erm")
    assert result.exit_code == 1
    assert "instances_train2017.json" in result.output
    result = table(coco, places, "erm", "lrp")  # the same folder, with the right files
    assert result.exit_code == 0, result.output
    assert re.search(r"^in % .* on object +published: gap ", result.output, re.MULTILINE)
    assert re.search(r"^LRP distillation .* 4\.40 ", result.output, re.MULTILINE)
    assert re.search(r"^IRM .* 52\.10 .*needs unbiased data$", result.output, re.MULTILINE)
    assert open_dataset(tmp_path / "r" / "data.zarr").name == "coco-on-places"
    result = table(tmp_path / "gone", tmp_path / "gone", "features")  # which are not needed any more
    assert result.exit_code == 0, result.output
