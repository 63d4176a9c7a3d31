"""What the reader of Waterbirds promises, on a miniature of the published folder and of CUB's masks."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cli import main
from data import DatasetError, make_waterbirds, open_dataset
from trainer import evaluate
from trainer.reproduction import profiles

SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
HEADER = ["img_id", "img_filename", "y", "split", "place", "place_filename"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """metadata.csv with 24 birds of 40×30, each in its own colour; a bird fills the middle of its mask."""
    root = tmp_path_factory.mktemp("published")
    rows = []
    for number in range(24):
        species = SPECIES[number % 2]
        name = f"{species}/{species[4:]}_{number:04}_{796111 + number}.jpg"
        for folder, suffix in (("birds", ".jpg"), ("segmentations", ".png")):
            (root / folder / species).mkdir(parents=True, exist_ok=True)
            path = (root / folder / name).with_suffix(suffix)
            if folder == "birds":
                Image.new("RGB", (40, 30), (8 * number, 64, 200 - 8 * number)).save(path, quality=95)
            else:
                mask = np.zeros((30, 40), np.uint8)
                mask[6:24, 10:30] = 255
                mask[0:3] = 100  # an unsure edge, as CUB's have
                Image.fromarray(mask).save(path)
        rows.append([number + 1, name, number % 2, number % 3, number // 2 % 2, f"/f/forest/{number:08}.jpg"])
    with open(root / "birds" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return root / "birds", root / "segmentations"


def test_splits_labels_and_the_four_groups_are_the_published_ones(published, tmp_path):
    sizes = make_waterbirds(tmp_path / "d", *published, size=20)
    assert sizes == {"train": 8, "validation": 8, "test": 8}
    dataset = open_dataset(tmp_path / "d")
    assert dataset.class_names == ("landbird", "waterbird")
    assert [dataset.group_name(group) for group in range(4)] == [
        "landbird on land",
        "landbird on water",
        "waterbird on land",
        "waterbird on water",
    ]
    for part, name in enumerate(("train", "validation", "test")):
        split, numbers = dataset.split(name), np.arange(part, 24, 3)
        assert split.labels[:].tolist() == (numbers % 2).tolist()
        assert split.groups[:].tolist() == (2 * (numbers % 2) + numbers // 2 % 2).tolist()
        reds = split.images[:][:, 0, 10, 10].astype(int)
        assert np.abs(reds - 8 * numbers).max() <= 4, "in the order of the file, each the bird that it names"


def test_masks_are_cubs_squeezed_with_the_picture(published, tmp_path):
    make_waterbirds(tmp_path / "d", *published, size=20)
    expected = np.zeros((20, 20), bool)
    expected[4:16, 5:15] = True
    for mask in open_dataset(tmp_path / "d").split("train").masks[:, 0]:
        assert set(np.unique(mask)) == {0, 255}
        assert not (mask > 0)[~expected].any(), "not where the bird covers half a pixel"
        assert (mask > 0)[5:15, 6:14].all()


def test_without_masks_there_are_none_and_a_limit_keeps_the_first(published, tmp_path):
    make_waterbirds(tmp_path / "whole", published[0], size=20)
    command = ["make-data", "waterbirds", "--waterbirds", str(published[0]), "--out", str(tmp_path / "few")]
    result = CliRunner().invoke(main, [*command, "--size", "20", "--limit", "3"])
    assert result.exit_code == 0, result.output
    assert "train 3, validation 3, test 3" in result.output
    whole, few = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "few")
    assert whole.split("test").masks is None
    assert np.array_equal(few.split("test").images[:], whole.split("test").images[:3])


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "birds/metadata.csv").unlink(), r"there is no .*metadata.csv: .*waterbird_complete95"),
        (lambda root: replace(root / "birds/metadata.csv", "place,", "where,"), "has no column place: "),
        (
            lambda root: replace(root / "birds/metadata.csv", "796112.jpg,1,", "796112.jpg,2,"),
            r"metadata.csv, line 3: y is '2', and not one of 0 \(landbird\), 1 \(waterbird\)",
        ),
        (lambda root: (root / "birds/metadata.csv").write_bytes(b"\xff\xfe\x00"), "is not a CSV file"),
        (
            lambda root: [path.unlink() for path in (root / "birds" / SPECIES[0]).iterdir()],
            r"there is no .*_0000_796111.jpg, .* and 7 more: unpack http",
        ),
        (
            lambda root: [path.unlink() for path in sorted((root / "segmentations" / SPECIES[1]).iterdir())[:2]],
            r"there is no .*_0001_796112.png, .*_0003_796114.png: give masks=FOLDER, the folder segmentations",
        ),
        (
            lambda root: [path.write_bytes(b"\xff\xd8") for path in (root / "birds" / SPECIES[0]).iterdir()],
            r"the image .*\.jpg cannot be read",
        ),
        (
            lambda root: [path.write_bytes(b"\x89PNG") for path in (root / "segmentations" / SPECIES[0]).iterdir()],
            r"the image .*\.png cannot be read .*: unpack the folder segmentations",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_nothing_is_left(published, tmp_path, spoil, words):
    for folder, name in zip(published, ("birds", "segmentations"), strict=True):
        shutil.copytree(folder, tmp_path / name)
    spoil(tmp_path)
    with pytest.raises(DatasetError, match=words):
        make_waterbirds(tmp_path / "d", tmp_path / "birds", tmp_path / "segmentations", size=20)
    assert not (tmp_path / "d").exists()


def test_the_table_has_the_test_split_its_worst_group_and_group_dro(published, tmp_path, monkeypatch):
    birds, masks = published
    tiny = dataclasses.replace(
        profiles.WATERBIRDS["gpu"],
        data={"size": 16},
        teacher={**profiles.WATERBIRDS["gpu"].teacher, "arch": "small-cnn", "steps": 2, "batch_size": 8},
        student={
            **profiles.WATERBIRDS["gpu"].student,
            "arch": "small-cnn",
            "steps": 2,
            "batch_size": 8,
            "snapshots": 1,
        },
        of_row={},
        draws=1,
    )
    monkeypatch.setitem(profiles.WATERBIRDS, "gpu", tiny)
    command = ["reproduce", "waterbirds", "--waterbirds", str(birds), "--masks", str(masks), "--device", "cpu"]
    out = tmp_path / "r"
    result = CliRunner().invoke(main, [*command, "--out", str(out), "--seeds", "1", "--methods", "lrp,group-dro,erm"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (out / "stores").iterdir()] == ["teacher-flex-train.zarr"]  # validation is unbiased
    head, _, *rows = (out / "report" / "table.md").read_text().splitlines()
    assert head.startswith("|  | test | worst group | on object | less its teacher's: test |")
    assert [row.split(" | ")[0] for row in rows] == [
        "| teacher", "| ERM", "| LRP distillation", "| GroupDRO, told the groups",
    ]  # fmt: skip
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for line in results:
        scores = evaluate(out / "data.zarr", out / line["model"], device="cpu")
        assert line["test"] == scores["splits"]["test"]["accuracy"]
        assert line["worst_group"] == scores["worst_group"]
        assert {group["group"] for group in line["groups"]} == {
            "landbird on land", "landbird on water", "waterbird on land", "waterbird on water",
        }  # fmt: skip
    for name in ("curves", "groups", "heatmaps"):
        assert (out / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
