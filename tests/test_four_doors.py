"""What from_torch, from_arrays, hf and webdataset promise: the dataset of the same images in folders, or one error."""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import subprocess
import sys
import tarfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
from cli import main
from data import DatasetError, from_arrays, from_torch, make_image_folder, open_dataset
from data.builders import decoding, samples

SIZE = 16
CLASSES = ("cat", "dog")
GROUPS = ("beach", "snow", "wood")
SPLITS = {"train": 10, "ood": 4}  # images of each class
ROOT = Path(__file__).parent.parent


def fingerprints(path: Path) -> dict[str, str]:
    return {name: split.fingerprint for name, split in open_dataset(path).splits.items()}


def pixels(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(number: int) -> tuple[Image.Image, str, dict[str, Any]]:
    """An image of any kind, its suffix, and how it is saved."""
    image = Image.fromarray(pixels(number, 20, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 250)
    kinds = [
        (image, "png", {}),
        (image, "jpg", {"exif": exif.tobytes()}),
        (image.convert("LA"), "png", {}),
        (image.convert("P"), "png", {}),
        (deep, "png", {}),
        (image.convert("CMYK"), "jpg", {}),
        (image.convert("1"), "png", {}),
    ]
    return kinds[number % len(kinds)]


@functools.cache
def rows(split: str) -> list[tuple[str, int]]:
    """The name of each image of a split, in an order that mixes the classes, and its class."""
    return [(f"{number:03}", number % 2) for number in range(2 * SPLITS[split])]


def seed_of(split: str, name: str) -> int:
    return int(name) + 100 * list(SPLITS).index(split)


def group_of(split: str, name: str) -> int:
    return seed_of(split, name) % 3


@pytest.fixture
def photos(tmp_path) -> Path:
    """Folders with images of many kinds, their masks and their groups."""
    root = tmp_path / "photos"
    table = []
    for split in SPLITS:
        for name, label in rows(split):
            image, suffix, options = picture(seed_of(split, name))
            path = root / split / CLASSES[label] / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **options)
            upright = (20, 24) if "exif" not in options else (24, 20)
            mask = np.zeros(upright, np.uint8)
            mask[4:15, 3 : 9 + label] = 1
            place = root / "masks" / split / CLASSES[label] / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(place)
            table.append((path.relative_to(root).as_posix(), GROUPS[group_of(split, name)]))
    with open(root / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "group"), *table])
    return root


def files(photos: Path, split: str) -> list[tuple[Path, Path, int, int]]:
    """Image, mask, label and group of each row of a split, which are not sorted by class."""
    found = []
    for name, label in rows(split):
        (path,) = (photos / split / CLASSES[label]).glob(f"{name}.*")
        found.append((path, photos / "masks" / split / CLASSES[label] / f"{name}.png", label, group_of(split, name)))
    return found


def of_folders(photos: Path, **options: Any) -> dict[str, str]:
    """The fingerprints of the folders, with masks and groups."""
    paired = {"masks": photos / "masks", "groups": photos / "groups.csv", "size": SIZE, "bias_attribute": "place"}
    tests = {"ood": photos / "ood"}
    make_image_folder(photos.parent / "folders", photos / "train", tests, **paired, **options)
    return fingerprints(photos.parent / "folders")


class Photos(Dataset):
    """A dataset as people write it: dictionaries of images that Pillow opened."""

    def __init__(self, photos: Path, split: str):
        self.files = files(photos, split)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image, mask, label, group = self.files[number]
        return {
            "picture": Image.open(image),
            "label": CLASSES[label],
            "mask": Image.open(mask),
            "place": torch.tensor(group),
        }


# --- the same images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_dataset_of_pytorch_equals_the_same_images_in_folders(photos, fit):
    expected = of_folders(photos, fit=fit)
    sizes = from_torch(
        train=Photos(photos, "train"),
        tests={"ood": Photos(photos, "ood")},
        out=photos.parent / "d",
        size=SIZE,
        fit=fit,
        image="picture",
        group="place",
        group_names=GROUPS,
        bias_attribute="place",
    )
    assert sizes == {"train": 18, "validation": 2, "ood": 8}
    assert fingerprints(photos.parent / "d") == expected
    dataset = open_dataset(photos.parent / "d")
    assert (dataset.class_names, dataset.group_names, dataset.bias_attribute) == (CLASSES, GROUPS, "place")


def test_a_dataset_of_huggingface_equals_the_same_images_in_folders(photos):
    pytest.importorskip("datasets")
    expected = of_folders(photos)
    hf_dataset(photos).save_to_disk(photos.parent / "hf")
    for split, table in hf_dataset(photos).items():
        (photos.parent / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(photos.parent / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    for name in ("hf", "parquet"):
        out = photos.parent / f"{name}.zarr"
        words = [photos.parent / name, "--test", "ood=test", "--size", SIZE, "--group", "place", "--out", out]
        result = CliRunner().invoke(main, ["make-data", "hf", *map(str, words)])
        assert result.exit_code == 0, result.output
        assert f"{out}: train 18, validation 2, ood 8" in result.output
        assert fingerprints(out) == expected
        assert open_dataset(out).class_names == CLASSES
        assert open_dataset(out).group_names == GROUPS


def test_a_table_of_huggingface_is_a_dataset_of_pytorch_too(photos):
    pytest.importorskip("datasets")
    expected = of_folders(photos)
    train, ood = hf_dataset(photos).rename_column("photo", "image").values()
    from_torch(photos.parent / "d", train, {"ood": ood}, size=SIZE, group="place")
    assert fingerprints(photos.parent / "d") == expected
    assert open_dataset(photos.parent / "d").group_names == GROUPS


@pytest.mark.parametrize("library", ["datasets", "webdataset"])
def test_files_are_decoded_in_several_processes_with_the_same_result(photos, library, monkeypatch):
    pytest.importorskip(library)
    if library == "datasets":
        hf_dataset(photos).save_to_disk(photos.parent / "hf")
        make = functools.partial(data.make_hf, dataset=photos.parent / "hf", size=SIZE)
    else:
        write_shards(photos, "train")
        make = functools.partial(data.make_webdataset, shards=photos.parent / "train-{0..2}.tar", size=SIZE)
    make(photos.parent / "here")
    monkeypatch.setattr(decoding, "PER_PROCESS", 4)
    monkeypatch.setattr("dask.system.cpu_count", lambda: 2)
    make(photos.parent / "there")
    assert fingerprints(photos.parent / "here") == fingerprints(photos.parent / "there")


def hf_dataset(photos: Path) -> Any:
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    place = ClassLabel(names=list(GROUPS))
    features = Features(
        {"photo": ImageFeature(), "mask": ImageFeature(), "label": ClassLabel(names=list(CLASSES)), "place": place}
    )

    def table(split: str) -> Dataset:
        image, mask, label, group = zip(*files(photos, split), strict=True)
        columns = {"photo": map(str, image), "mask": map(str, mask), "label": label, "place": group}
        return Dataset.from_dict({name: list(column) for name, column in columns.items()}, features=features)

    return DatasetDict({"train": table("train"), "test": table("ood")})


@pytest.mark.parametrize("form", ["files", "json"])
def test_shards_of_webdataset_equal_the_same_images_in_folders(photos, form):
    pytest.importorskip("webdataset")
    expected = of_folders(photos)
    for split in SPLITS:
        write_shards(photos, split, form)
    out = photos.parent / "wds.zarr"
    words = [
        f"{photos.parent}/train-{{0..2}}.tar",
        "--test",
        f"ood={photos.parent}/ood-*.tar",
        "--size",
        SIZE,
        "--out",
        out,
    ]
    names = ["--class-names", "cat,dog", "--group-names", "beach,snow,wood"]
    result = CliRunner().invoke(main, ["make-data", "webdataset", *map(str, words), *names])
    assert result.exit_code == 0, result.output
    assert fingerprints(out) == expected
    assert open_dataset(out).class_names == CLASSES


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shards(photos: Path, split: str, form: str = "files", with_masks: bool = True) -> None:
    """Write three shards of a split, with labels in files of their own or in JSON; form "pairs" has no groups."""
    every = files(photos, split)
    for shard, start in enumerate(range(0, len(every), 8)):
        with tarfile.open(photos.parent / f"{split}-{shard}.tar", "w") as archive:
            add(archive, "__index__/info.json", b"{}")
            for number, (image, mask, label, group) in enumerate(every[start : start + 8], start):
                key = f"samples/{number:05}"
                add(archive, f"{key}{image.suffix}", image.read_bytes())
                if with_masks:
                    add(archive, f"{key}.mask.png", mask.read_bytes())
                if form == "json":
                    add(archive, f"{key}.json", json.dumps({"label": label, "group": GROUPS[group]}).encode())
                else:
                    add(archive, f"{key}.cls", f"{label}\n".encode())
                if form == "files":
                    add(archive, f"{key}.group", str(group).encode())


def test_shards_that_webdataset_wrote_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(20):
            sink.write({"__key__": f"{number:03}", "png": Image.fromarray(pixels(number)), "cls": number % 2})
    assert data.make_webdataset(tmp_path / "d", tmp_path / "a.tar") == {"train": 18, "validation": 2}
    assert open_dataset(tmp_path / "d").class_names == ("0", "1")


@pytest.fixture(scope="module")
def fakes(tmp_path_factory) -> tuple[Path, torchvision.datasets.FakeData]:
    """Images of torchvision's FakeData with labels in any order, and the same images in folders."""
    root = tmp_path_factory.mktemp("fakes")
    fake = torchvision.datasets.FakeData(40, (3, 20, 24), 3)
    for number, (image, label) in enumerate(fake):
        path = root / "folders" / str(int(label)) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    make_image_folder(root / "d", root / "folders", {}, size=(20, 24))
    return root, fake


TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.mark.parametrize("transform", [None, v2.PILToTensor(), torchvision.transforms.ToTensor(), TO_FLOAT, np.asarray])
def test_datasets_of_torchvision_equal_the_same_images_in_folders(fakes, transform, tmp_path):
    root, fake = fakes
    fake = torchvision.datasets.FakeData(40, (3, 20, 24), 3, transform)
    folder = torchvision.datasets.ImageFolder(root / "folders", transform)
    for name, dataset in (("fake", fake), ("folder", folder), ("part", Subset(folder, range(len(folder))))):
        from_torch(tmp_path / name, dataset)
        assert fingerprints(tmp_path / name) == fingerprints(root / "d"), name


@pytest.mark.parametrize("form", ["last", "first", "float", "double", "half", "int64", "tensor", "list", "dictionary"])
def test_arrays_equal_the_same_images_in_folders(fakes, form, tmp_path):
    root, fake = fakes
    images = np.stack([np.asarray(image) for image, _ in fake])
    labels = [int(label) for _, label in fake]
    split: Any = {
        "last": (images, labels),
        "first": (images.transpose(0, 3, 1, 2), torch.tensor(labels)),
        "float": (np.float32(images) / np.float32(255), labels),
        "double": (images / 255, np.array(labels, np.uint8)),
        "half": (np.float16(images / 255), labels),
        "int64": (images.astype(np.int64), labels),
        "tensor": (torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels)),
        "list": (list(images), labels),
        "dictionary": {"images": images, "labels": np.array(labels)},
    }[form]
    from_arrays(out=tmp_path / "d", train=split)
    assert fingerprints(tmp_path / "d") == fingerprints(root / "d")


def test_masks_and_groups_of_arrays_are_those_of_the_dataset(tmp_path):
    images, labels = np.stack([pixels(number) for number in range(20)]), np.arange(20) % 2
    masks = np.zeros((20, SIZE, SIZE), bool)
    masks[:, 2:9, 3:7] = True
    groups = [("snow", "beach")[number % 3 % 2] for number in range(20)]
    ways = {"bool": masks, "labels": masks.astype(np.int64) * 7, "floats": masks * 0.9, "channel": masks[:, None] * 255}
    for name, way in ways.items():
        split = {"images": images, "labels": labels, "masks": way, "groups": groups}
        from_arrays(tmp_path / name, split, {"ood": split})
        ood = open_dataset(tmp_path / name).split("ood")
        assert ood.masks is not None
        assert ood.groups is not None
        order = np.argsort(labels, kind="stable")
        assert np.array_equal(ood.masks[:], masks[order][:, None] * np.uint8(255)), name
        names = open_dataset(tmp_path / name).group_names
        assert [names[group] for group in ood.groups[:]] == [groups[row] for row in order]


def test_items_are_decoded_in_several_processes_with_the_same_result(photos, monkeypatch):
    monkeypatch.setattr(decoding, "PER_PROCESS", 4)
    monkeypatch.setattr("dask.system.cpu_count", lambda: 2)
    trains = {name: Photos(photos, "train") for name in ("here", "there", "chosen")}
    state = torch.random.get_rng_state()
    for name, workers in (("here", 0), ("there", None), ("chosen", 1)):
        from_torch(photos.parent / name, trains[name], size=SIZE, image="picture", workers=workers)
    assert fingerprints(photos.parent / "here") == fingerprints(photos.parent / "there")
    assert fingerprints(photos.parent / "here") == fingerprints(photos.parent / "chosen")
    assert torch.equal(state, torch.random.get_rng_state()), "nothing is drawn from the caller's random state"


def test_items_are_read_one_at_a_time_so_that_they_need_not_fit_in_memory(tmp_path):
    class Counted(Dataset):
        alive, most = 0, 0

        def __len__(self):
            return 200

        def __getitem__(self, number):
            image = Image.fromarray(pixels(number, 64, 64))
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            image.info["watched"] = Watched()
            return image, number % 2

    class Watched:
        def __del__(self):
            Counted.alive -= 1

    from_torch(tmp_path / "d", Counted(), size=8, workers=0)
    assert Counted.most <= 4


def test_names_of_classes_are_those_of_the_dataset_and_mapped_by_name(tmp_path):
    for split, names in {"train": ("ant", "bee", "cow"), "ood": ("bee", "cow")}.items():
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(pixels(len(name) + number)).save(folder / f"{number}.png")
    train, ood = (torchvision.datasets.ImageFolder(tmp_path / split) for split in ("train", "ood"))
    assert ood.class_to_idx == {"bee": 0, "cow": 1}
    from_torch(tmp_path / "d", train, {"ood": ood})
    dataset = open_dataset(tmp_path / "d")
    assert dataset.class_names == ("ant", "bee", "cow")
    assert Counter(dataset.split("ood").labels[:].tolist()) == {1: 4, 2: 4}
    from_torch(tmp_path / "named", train, {"ood": ood}, class_names=("Ameise", "Biene", "Kuh"))
    assert open_dataset(tmp_path / "named").class_names == ("Ameise", "Biene", "Kuh")
    assert np.array_equal(open_dataset(tmp_path / "named").split("ood").labels[:], dataset.split("ood").labels[:])
    with pytest.raises(DatasetError, match=r"ood\[0\]: its class 'ant' is not a class of training: bee, cow"):
        from_torch(tmp_path / "x", ood, {"ood": train})


def test_a_validation_dataset_leaves_training_whole(fakes, tmp_path):
    _, fake = fakes
    assert from_torch(tmp_path / "d", fake, validation=Subset(fake, range(20))) == {"train": 40, "validation": 20}


def test_images_that_are_also_trained_on_are_told(fakes, tmp_path):
    _, fake = fakes
    notes: list[str] = []
    from_torch(tmp_path / "d", fake, {"ood": Subset(fake, range(5))}, echo=notes.append)
    assert "ood: images that are also trained on: 5" in " ".join(notes)


def test_building_imports_no_pytorch_until_it_is_needed():
    code = "import sys, data.builders.torch_datasets, data.builders.hf, data.builders.webdataset; "
    code += "assert not {'torch', 'datasets', 'webdataset', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- one mask for all images ----------------------------------------------------------------------------------


class Pairs(Dataset):
    """Pairs of an image and a label, without masks."""

    def __init__(self, photos: Path, split: str):
        self.files = files(photos, split)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Image.Image, str]:
        image, _, label, _ = self.files[number]
        return Image.open(image), CLASSES[label]


def through(door: str, photos: Path, out: Path, with_masks: bool = False, **options: Any) -> None:
    """Build the dataset through one of the doors: hf and webdataset by their commands, the others in Python."""
    options = {"size": SIZE, **options}
    if door == "from_torch":
        pairs = {split: Photos(photos, split) if with_masks else Pairs(photos, split) for split in SPLITS}
        key = {"image": "picture"} if with_masks else {}
        from_torch(out, pairs["train"], {"ood": pairs["ood"]}, workers=0, **key, **options)
        return
    if door == "from_arrays":
        splits: dict[str, Any] = {}
        for split in SPLITS:
            images, masks, labels, _ = zip(*files(photos, split), strict=True)
            masks = {"masks": [Image.open(mask) for mask in masks]} if with_masks else {}
            splits[split] = {"images": [Image.open(image) for image in images], "labels": labels, **masks}
        from_arrays(out, splits["train"], {"ood": splits["ood"]}, class_names=CLASSES, **options)
        return
    pytest.importorskip({"hf": "datasets", "webdataset": "webdataset"}[door])
    if door == "hf":
        table = hf_dataset(photos)
        (table if with_masks else table.remove_columns("mask")).save_to_disk(photos.parent / "hf")
        words = [photos.parent / "hf", "--test", "ood=test"]
    else:
        for split in SPLITS:
            write_shards(photos, split, "pairs", with_masks)
        words = [f"{photos.parent}/train-{{0..2}}.tar", "--test", f"ood={photos.parent}/ood-*.tar"]
        words += ["--class-names", ",".join(CLASSES)]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(main, ["make-data", door, *map(str, words), "--out", str(out)])
    if result.exit_code:
        raise DatasetError(" ".join(result.output.split()))


DOORS = ("from_torch", "from_arrays", "hf", "webdataset")
every_door = pytest.mark.parametrize("door", DOORS)


@every_door
@pytest.mark.parametrize("form", ["box", "file"])
def test_one_mask_for_all_images_is_that_of_the_same_images_in_folders(photos, door, form):
    drawn = np.zeros((SIZE, SIZE), np.uint8)
    drawn[9:, 11:] = 255
    Image.fromarray(drawn).save(photos.parent / "stamp.png")
    option = {"mask_box": "11,9,16,16"} if form == "box" else {"mask_all": photos.parent / "stamp.png"}
    options: dict[str, Any] = {**option, "mask_keeps": "outside", "fit": "pad"}
    tests, folders, out = {"ood": photos / "ood"}, photos.parent / "folders", photos.parent / "d"
    make_image_folder(folders, photos / "train", tests, size=SIZE, echo=lambda note: None, **options)
    through(door, photos, out, **options)
    for name, split in open_dataset(folders).splits.items():
        ours = open_dataset(out).splits[name]
        assert np.array_equal(ours.masks[:], np.broadcast_to(np.where(drawn, 0, 255), ours.masks.shape)), name
        assert ours.fingerprint == split.fingerprint
    recorded = json.loads((out / "zarr.json").read_text())["attributes"]["builder"]
    assert recorded["mask_keeps"] == "outside"
    assert recorded[next(iter(option))] == ("stamp.png" if form == "file" else "11,9,16,16")


@every_door
def test_a_second_mask_is_refused(photos, door):
    box: dict[str, Any] = {"mask_box": "0,0,4,4", "mask_keeps": "outside"}
    out = photos.parent / "d"
    with pytest.raises(DatasetError, match=r"train.* has a mask of its own: leave out (--mask-box|mask_box=).0,0,4,4"):
        through(door, photos, out, with_masks=True, **box)
    with pytest.raises(DatasetError, match=r"give (--mask-all |mask_all=).*m\.png.* or .*mask.box.* not both"):
        through(door, photos, out, mask_all=photos / "m.png", **box)
    if door != "from_arrays":
        with pytest.raises(DatasetError, match=r"give (--mask |mask=).*seg.* or .*mask.box.* not both"):
            through(door, photos, out, mask="seg", **box)
    assert not out.exists()


def test_a_mask_of_one_item_in_the_middle_is_a_second_mask_too(tmp_path):
    items = [{"image": image, "label": label} for image, label in GOOD]
    items[7]["mask"] = Image.new("L", (SIZE, SIZE), 255)
    for skip_bad in (False, True):
        with pytest.raises(DatasetError, match=r"train\[7\] has a mask of its own: leave out mask_box='0,0,4,4'"):
            from_torch(tmp_path / "d", items, workers=0, skip_bad=skip_bad, mask_box="0,0,4,4", mask_keeps="outside")
    assert not (tmp_path / "d").exists()


def test_items_of_another_size_than_the_mask_are_listed_or_left_out(tmp_path):
    drawn = np.zeros((SIZE, SIZE), np.uint8)
    drawn[:4, :4] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    items = with_item((Image.fromarray(pixels(9, 20, 24)), 1), 5)
    options: dict[str, Any] = {"workers": 0, "size": 8, "mask_all": tmp_path / "mask.png", "mask_keeps": "outside"}
    with pytest.raises(DatasetError, match=r"(?s)1 item cannot be used.*train\[5\]: it is 24×20, its mask .* 16×16"):
        from_torch(tmp_path / "d", items, **options)
    assert sum(from_torch(tmp_path / "d", items, skip_bad=True, **options).values()) == 11
    with pytest.raises(DatasetError, match=r"mask_box='0,0,17,4' is not within the dataset's images of 16×16 pixels"):
        from_torch(tmp_path / "e", GOOD, workers=0, mask_box="0,0,17,4", mask_keeps="outside")


# --- wrong inputs ---------------------------------------------------------------------------------------------

GOOD = [(Image.fromarray(pixels(number)), number % 2) for number in range(12)]


def with_item(item: Any, number: int = 7) -> list[Any]:
    return [*GOOD[:number], item, *GOOD[number + 1 :]]


def test_an_error_lists_at_most_twenty_items_and_counts_the_others(tmp_path):
    items = [(image, label if row % 2 else -3) for row, (image, label) in enumerate(GOOD * 5)]
    with pytest.raises(DatasetError) as raised:
        from_torch(tmp_path / "d", items, class_names=CLASSES, workers=0)
    assert str(raised.value).startswith("30 items cannot be used, skip_bad=True leaves them out:\ntrain[0]: ")
    assert str(raised.value).count("train[") == samples.LISTED
    assert str(raised.value).endswith("and 10 more")


def test_skip_bad_leaves_bad_items_out(tmp_path):
    items = [*with_item((Image.new("RGB", (3, 3)), 1), 5), ("no image", 0), (GOOD[0][0], 99)]
    notes: list[str] = []
    sizes = from_torch(tmp_path / "d", items, skip_bad=True, class_names=CLASSES, workers=0, echo=notes.append)
    assert sum(sizes.values()) == 11
    assert "train: 3 of 14 items left out" in notes


def test_further_parts_of_a_tuple_are_told(tmp_path):
    notes: list[str] = []
    from_torch(tmp_path / "d", [(*item, 0) for item in GOOD], echo=notes.append)
    assert any("tuples of 3" in note and "mask=2 or group=2" in note for note in notes)


def test_a_dataset_that_other_processes_cannot_read_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error.")

    monkeypatch.setattr("data.builders.torch_datasets.decode_all", broken)
    with pytest.raises(DatasetError, match=r"killed by signal.*workers=0 reads it in this process"):
        from_torch(tmp_path / "d", GOOD)


def test_a_mistake_of_our_own_in_another_process_is_not_blamed_on_the_dataset(tmp_path, monkeypatch):
    def mistaken(*_: Any) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr("data.builders.items.fitted", mistaken)
    with pytest.raises(TypeError, match="unsupported operand"):
        from_torch(tmp_path / "d", GOOD, workers=1)
    assert not (tmp_path / "d").exists()


def test_one_channel_and_alpha_are_read_as_files_are(tmp_path):
    shade = np.full((8, 8), 77, np.uint8)
    clear = np.concatenate([pixels(0, 8, 8), np.zeros((8, 8, 1), np.uint8)], axis=2)
    ways = [
        shade,
        shade[..., None],
        shade[None],
        torch.tensor(shade),
        torch.tensor(shade)[None] / 255,
        shade.astype(bool),
    ]
    ways += [tv_tensors.Image(torch.tensor(shade)[None]), clear, torch.tensor(clear).permute(2, 0, 1)]
    from_torch(tmp_path / "d", [(way, number % 2) for number, way in enumerate(ways * 2)], workers=0)
    values = Counter(
        int(image[0, 0, 0]) for split in open_dataset(tmp_path / "d").splits.values() for image in split.images[:]
    )
    assert values == {77: 12, 255: 2, 0: 4}


# --- wrong datasets of Hugging Face and shards ----------------------------------------------------------------


def run(*words: object) -> str:
    """The error of a command, on one line."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    result = CliRunner().invoke(main, ["make-data", *map(str, words)])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def hf(tmp_path) -> Path:
    """A dataset of Hugging Face with one split, in one Arrow file."""
    datasets = pytest.importorskip("datasets")
    return save(tmp_path / "hf", datasets.ClassLabel(names=list(CLASSES)))


def save(path: Path, label: Any, labels: Any = (0, 1) * 6, **columns: Any) -> Path:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = Features(
        {"image": ImageFeature(), "label": label, **{name: feature for name, (feature, _) in columns.items()}}
    )
    values = {name: column for name, (_, column) in columns.items()}
    images = [image for image, _ in GOOD]
    Dataset.from_dict({"image": images, "label": list(labels), **values}, features=features).save_to_disk(path)
    return path


def test_a_wrong_option_of_hf_is_one_error(hf, tmp_path):
    out = tmp_path / "d"
    assert "has no split 'tset', but train" in run("hf", hf, "--test", "ood=tset", "--out", out)
    assert "--label is 'lable', and train has the columns image, label. Did you mean label?" in run(
        "hf", hf, "--label", "lable", "--out", out
    )
    assert "does not exist: give the folder of a dataset" in run("hf", tmp_path / "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "neither a dataset of save_to_disk nor Parquet files" in run("hf", tmp_path / "empty", "--out", out)
    assert not out.exists()


def test_columns_of_hf_that_are_not_clear_are_one_error(hf, tmp_path):
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table
    from datasets import Image as ImageFeature

    out, classes = tmp_path / "d", ClassLabel(names=list(CLASSES))
    images = [image for image, _ in GOOD]
    two = Features({"left": ImageFeature(), "right": ImageFeature(), "label": classes})
    Table.from_dict({"left": images, "right": images, "label": [0, 1] * 6}, features=two).save_to_disk(tmp_path / "two")
    assert "several columns of images, left, right: its name is --image" in run("hf", tmp_path / "two", "--out", out)
    labels = Features({"image": ImageFeature(), "fine": classes, "coarse": classes})
    Table.from_dict({"image": images, "fine": [0, 1] * 6, "coarse": [0, 1] * 6}, features=labels).save_to_disk(
        tmp_path / "l"
    )
    assert "several columns of class labels, fine, coarse: its name is --label" in run(
        "hf", tmp_path / "l", "--out", out
    )
    none = Features({"text": Value("string"), "label": classes})
    Table.from_dict({"text": ["a"] * 12, "label": [0, 1] * 6}, features=none).save_to_disk(tmp_path / "none")
    assert "no column of images, but text, label" in run("hf", tmp_path / "none", "--out", out)
    save(tmp_path / "unlabelled", classes, [0, 1] * 5 + [-1, None])
    error = run("hf", tmp_path / "unlabelled", "--out", out)
    assert "2 items cannot be used" in error
    assert "train[10]: its label is -1, and classes have the numbers 0 to 1: leave items without a label out" in error
    assert "train[11]: its label is None" in error
    assert not out.exists()


def test_names_in_a_column_of_text_are_classes(hf, tmp_path):
    from datasets import Value

    save(tmp_path / "text", Value("string"), ["dog", "cat"] * 6)
    data.make_hf(tmp_path / "d", tmp_path / "text")
    assert open_dataset(tmp_path / "d").class_names == ("cat", "dog")


def test_damaged_files_of_hf_are_one_error_and_nothing_is_written(hf, tmp_path):
    (arrow,) = hf.glob("*.arrow")
    whole = arrow.read_bytes()
    for keep in (
        10,
        len(whole) // 2,
        len(whole) - 20,
        len(whole) - 8,
    ):  # the last one cuts only the mark of the end off
        arrow.write_bytes(whole[:keep])
        assert "cannot be read" in run("hf", hf, "--out", tmp_path / "d")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.parquet").write_bytes(whole[:500])
    assert "cannot be read" in run("hf", tmp_path / "p", "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_parquet_of_two_configurations_is_refused(tmp_path):
    pytest.importorskip("datasets")
    for folder in ("large", "small"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train-00000-of-00001.parquet").touch()
    assert "files of the split 'train' in" in run("hf", tmp_path, "--out", tmp_path / "d")


@pytest.fixture
def shard(tmp_path) -> Path:
    pytest.importorskip("webdataset")
    return pack(tmp_path / "a.tar")


def pack(path: Path, **changes: Any) -> Path:
    """Write a shard; a change is the files of one sample."""
    with tarfile.open(path, "w") as archive:
        for number, (image, label) in enumerate(GOOD):
            encoded = io.BytesIO()
            image.save(encoded, "png")
            sample = {"png": encoded.getvalue(), "cls": str(label).encode()}
            for suffix, content in changes.get(f"s{number}", sample).items():
                add(archive, f"{number:03}.{suffix}", content)
    return path


def test_a_damaged_shard_is_one_error_and_nothing_is_written(shard, tmp_path):
    whole = shard.read_bytes()
    header = whole.index(b"005.png")
    blocks = whole.rstrip(b"\0")
    damaged = {
        "cut in a file": whole[: header + 600],
        "cut in a header": whole[: header + 100],
        "cut after a file": whole[:header],
        "a damaged header": whole[:header] + b"x" * 300 + whole[header + 300 :],
        "no tar file": b"x" * 2000,
        "empty": b"",
        "two files in one": blocks + bytes(-len(blocks) % 512) + bytes(1024) + whole,
    }
    for name, content in damaged.items():
        shard.write_bytes(content)
        error = run("webdataset", shard, "--out", tmp_path / "d")
        assert f"the shard {shard} is damaged" in error, name
        assert "copy or download it again" in error, name
    with tarfile.open(shard, "w:gz") as archive:
        add(archive, "0.cls", b"1")
    assert "it is compressed, so unpack it to a .tar file" in run("webdataset", shard, "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_wrong_shards_are_one_error(shard, tmp_path):
    out = tmp_path / "d"
    png = {"png": GOOD[0][0].tobytes(), "cls": b"1"}
    cases: dict[str, dict[str, Any]] = {
        r"it has no label, but png: the suffix is --label": {"s0": {"png": b""}},
        r"it has no image, but txt, cls: the suffix is --image": {"s0": {"txt": b"", "cls": b"1"}},
        r"it has several images, left.png, right.jpg: the suffix is --image": {
            "s0": {"left.png": b"", "right.jpg": b""}
        },
        r"a.tar/000 cannot be used: the png cannot be read: cannot identify image file": {"s0": png},
        r"a.tar/000 cannot be used: its json cannot be read": {"s0": {"png": b"", "json": b"{"}},
        r"a.tar/004: its class 'two' is not a class of training": {"s4": {"png": b"", "cls": b"two"}},
    }
    encoded = io.BytesIO()
    GOOD[0][0].save(encoded, "png")
    for expected, change in cases.items():
        for sample in change.values():
            for suffix in set(sample) & {"png", "left.png", "right.jpg"}:
                sample[suffix] = sample[suffix] or encoded.getvalue()
        pack(shard, **change)
        options = ["--class-names", "a,b"] if "'two'" in expected else []
        assert expected in run("webdataset", shard, "--out", out, *options)
    assert "1 of 3 shards do not exist" in run("webdataset", f"{tmp_path}/{{a,b,a}}.tar", "--out", out)
    assert "is there twice" in run("webdataset", f"{tmp_path}/{{a,a}}.tar", "--out", out)
    assert "there are no shards" in run("webdataset", f"{tmp_path}/*.tgz", "--out", out)
    assert "is a URL" in run("webdataset", "https://host/a.tar", "--out", out)
    assert "is a URL" in run("webdataset", "pipe:cat a.tar", "--out", out)
    assert not out.exists()


def test_bad_samples_of_shards_are_left_out_if_asked(shard, tmp_path):
    pack(shard, s4={"txt": b"no image"}, s6={"png": b"no image", "cls": b"1"})
    sizes = data.make_webdataset(tmp_path / "d", shard, skip_bad=True)
    assert sum(sizes.values()) == len(GOOD) - 2


@pytest.mark.parametrize(("command", "module"), [("hf", "datasets"), ("webdataset", "webdataset.shardlists")])
def test_a_missing_library_is_an_error_with_the_extra(command, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert f'is not installed: pip install -e ".[{command}]"' in run(command, tmp_path, "--out", tmp_path / "d")


@pytest.mark.parametrize(("command", "module"), [("hf", "datasets"), ("webdataset", "webdataset")])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("import no_such_dependency", "cannot be imported (No module named 'no_such_dependency')"),
        ("raise ImportError('numpy is too new\\nfor this')", "cannot be imported (numpy is too new)"),
        (None, "is not installed"),  # a folder of this name is no library
    ],
)
def test_a_library_that_cannot_be_imported_tells_its_own_error(
    command, module, content, problem, tmp_path, monkeypatch
):
    (tmp_path / module).mkdir()
    if content is not None:
        (tmp_path / module / "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].__path__ = [str(tmp_path / module)]
    monkeypatch.syspath_prepend(tmp_path)
    assert f'{problem}: pip install -e ".[{command}]"' in run(command, tmp_path, "--out", tmp_path / "d")
