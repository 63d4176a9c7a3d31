"""What the commands promise for a dataset that has masks, or groups, in some of its splits alone."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import trainer.results.show
from cli import main
from data import DatasetWriter, open_dataset
from pipeline import ModelError, cache_explanations
from pipeline.networks.debias import DEBIAS, needs_masks
from trainer import evaluate, show_explanations, train_student, train_teacher, write_report
from trainer.reproduction import profiles
from trainer.reproduction.sweep import plan_sweep, sweep_table, train_students
from trainer.results.comparison import compare
from trainer.results.evaluation import bias_warning, evaluate_snapshots
from trainer.results.pictures import Grid, curves_picture, groups_picture, heatmap_picture
from trainer.results.tables import latex, markdown, summarise, text

SAMPLES = 24


def written(path: Path, masked: tuple[str, ...], grouped: tuple[str, ...], splits: tuple[str, ...]) -> Path:
    """A dataset of two classes, the brighter on the left or on the right, with masks and groups of some splits."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for name in splits:
            labels = np.arange(SAMPLES) % 2
            images = rng.integers(0, 100, (SAMPLES, 3, 16, 16), dtype=np.uint8)
            masks = np.zeros((SAMPLES, 1, 16, 16), np.uint8)
            for sample, label in enumerate(labels):
                columns = slice(2, 7) if label else slice(9, 14)
                images[sample, :, 4:12, columns] += 150
                masks[sample, :, 4:12, columns] = 255
            arrays: dict[str, Any] = {"images": images, "labels": labels}
            arrays |= {"masks": masks} if name in masked else {}
            arrays |= {"groups": np.arange(SAMPLES) // 2 % 2} if name in grouped else {}
            writer.write_split(name, **arrays)
        writer.finish(name="sides", class_names=["right", "left"], group_names=["day", "night"])
    return path


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> Path:
    """Masks of train, validation and iid, groups of train and ood; shift has neither."""
    path = tmp_path_factory.mktemp("partly") / "data.zarr"
    splits = ("train", "validation", "iid", "ood", "shift")
    return written(path, ("train", "validation", "iid"), ("train", "ood"), splits)


@pytest.fixture(scope="module")
def untestable(tmp_path_factory) -> Path:
    """Masks of train and validation alone."""
    path = tmp_path_factory.mktemp("untestable") / "data.zarr"
    return written(path, ("train", "validation"), (), ("train", "validation", "iid", "ood"))


@pytest.fixture(scope="module")
def models(partly, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    train_teacher(partly, folder / "masked", debias="mask", steps=6, batch_size=8, snapshots=2)
    train_teacher(partly, folder / "erm", debias="none", steps=6, batch_size=8, snapshots=2)
    cache_explanations(partly, folder / "masked", folder / "train.zarr", draws=1)
    train_student(partly, folder / "train.zarr", folder / "student", steps=3, batch_size=8)
    return {name: folder / name for name in ("masked", "erm", "student")}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def lines_about(words: str, output: str) -> list[str]:
    return [line for line in output.splitlines() if words in line]


# --- evaluate -----------------------------------------------------------------------------------------------


def test_evaluate_tells_a_mask_teachers_accuracy_on_the_splits_with_masks_and_none_elsewhere(partly, models, caplog):
    result = evaluate(partly, models["masked"], device="cpu")
    assert result["iid"] == result["splits"]["iid"]["accuracy"] is not None
    assert result["splits"]["iid"]["on_object"] == pytest.approx(100)
    assert (result["ood"], result["shift"], result["gap"], result["worst_group"]) == (None, None, None, None)
    for name in ("ood", "shift"):
        assert result["splits"][name] == {
            "accuracy": None,
            "interval": None,
            "samples": SAMPLES,
            "worst_group": None,
            "worst_class_in_group": None,
            "groups": [],
            "on_object": None,
        }
    assert bias_warning(result) is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the splits 'ood' and 'shift' have no masks, which the front of {models['masked']} needs")
    assert "test its student" in said
    assert "add masks" in said


def test_a_model_that_needs_no_masks_is_tested_everywhere_and_on_the_object_where_there_are_masks(
    partly, models, caplog
):
    for name in ("erm", "student"):
        result = evaluate(partly, models[name], device="cpu")
        splits = result["splits"]
        assert all(split["accuracy"] is not None for split in splits.values())
        assert 0 < splits["iid"]["on_object"] < 100
        assert splits["ood"]["on_object"] is splits["shift"]["on_object"] is None
        assert [group["group"] for group in splits["ood"]["groups"]] == ["day", "night"]
        assert splits["iid"]["groups"] == splits["shift"]["groups"] == []
        assert result["worst_group"] == splits["ood"]["worst_group"]
    assert not caplog.records


def test_evaluate_prints_a_dash_for_a_split_without_masks_and_names_it_once(partly, models):
    said = run("evaluate", "--data", partly, "--teacher", models["masked"])
    assert said.exit_code == 0, said.output
    (iid, ood, shift), by_class = said.stdout.splitlines()[:3], said.stdout.splitlines()[3:]
    assert re.match(r"iid +\d+\.\d\d %  \[", iid)
    assert ood.split() == ["ood", "–", "not", "tested", "on", str(SAMPLES), "samples", "without", "masks"]
    assert shift.split()[:2] == ["shift", "–"]
    assert by_class[1].split() == ["by", "class,", "in", "%", "iid"]
    assert len(lines_about("have no masks", said.stderr)) == 1
    as_json = run("evaluate", "--data", partly, "--teacher", models["masked"], "--json")
    assert json.loads(as_json.stdout)["splits"]["ood"]["accuracy"] is None
    assert len(lines_about("have no masks", as_json.stderr)) == 1


def test_a_mask_teacher_without_any_test_split_to_be_tested_on_is_refused_with_the_remedy(untestable, models):
    said = run("evaluate", "--data", untestable, "--model", models["masked"])
    assert said.exit_code == 1
    words = " ".join(said.output.split())
    assert f"the splits 'iid' and 'ood' have no masks, which the front of {models['masked']} needs" in words
    assert "test its student" in words
    assert "add masks to a test split" in words
    assert run("evaluate", "--data", untestable, "--model", models["student"]).exit_code == 0


@pytest.mark.parametrize("front", list(DEBIAS))
def test_the_fronts_that_fail_without_masks_are_those_that_say_so(front):
    images = torch.rand(2, 3, 4, 4)
    if needs_masks(front):
        with pytest.raises(ModelError, match="masks"):
            DEBIAS[front](images, None)
    else:
        assert DEBIAS[front](images, None).shape == images.shape


def test_a_biased_teacher_is_told_by_the_splits_that_it_is_tested_on():
    splits = {"iid": {"accuracy": 90.0}, "ood": {"accuracy": None}, "shift": {"accuracy": 60.0}}
    told = bias_warning({"kind": "teacher", "iid": 90.0, "splits": splits})
    assert "loses 30.0 points from iid to shift" in str(told)
    splits["shift"]["accuracy"] = None
    assert bias_warning({"kind": "teacher", "iid": 90.0, "splits": splits}) is None
    splits["iid"]["accuracy"] = None
    assert bias_warning({"kind": "teacher", "iid": None, "splits": splits}) is None


# --- show-explanations --------------------------------------------------------------------------------------


def test_the_column_of_a_mask_teacher_is_empty_where_there_are_no_masks_and_the_others_are_drawn(
    partly, models, tmp_path, monkeypatch
):
    grids: list[Grid] = []
    draw = trainer.results.show.grid_picture
    monkeypatch.setattr(
        trainer.results.show, "grid_picture", lambda grid, *given: (grids.append(grid), draw(grid, *given))
    )
    columns = [value for name in ("masked", "student") for value in ("--model", models[name])]
    out = tmp_path / "p.png"
    said = run("show-explanations", "--data", partly, *columns, "--split", "ood", "--samples", 3, "--out", out)
    assert said.exit_code == 0, said.output
    (grid,) = grids
    for _, masked, student in grid.cells:
        assert (masked.content, masked.below) == (None, "no map: the split has no masks")
        assert student.content is not None
    told = lines_about("the split 'ood' has no masks", said.output)
    assert len(told) == 1
    assert "the front of masked needs" in told[0]
    assert Image.open(out).size[0] > 0


def test_a_store_is_shown_where_its_teacher_cannot_be(partly, models, tmp_path):
    """A store may be of images whose masks were left out of the dataset's copy."""
    grids: list[Grid] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.results.show, "grid_picture", lambda grid, *_: grids.append(grid))
        cache_explanations(partly, models["erm"], tmp_path / "ood.zarr", split="ood", draws=1)
        options = {"models": [models["masked"]], "caches": [tmp_path / "ood.zarr"], "split": "ood", "samples": 2}
        show_explanations(partly, tmp_path / "p.png", **options)
    assert [[cell.content is None for cell in row] for row in grids[0].cells] == [[False, True, False]] * 2


def test_a_picture_without_any_map_is_refused_with_the_split_that_has_masks(partly, models, tmp_path):
    out = tmp_path / "p.png"
    said = run("show-explanations", "--data", partly, "--model", models["masked"], "--split", "shift", "--out", out)
    assert said.exit_code == 1
    words = " ".join(said.output.split())
    assert "the split 'shift' has no masks, which the front of masked needs" in words
    assert "give --split iid, which has masks" in words
    assert "a student" in words
    assert not out.exists()


# --- report -------------------------------------------------------------------------------------------------


def test_a_report_tells_what_each_model_can_be_tested_on(partly, models, tmp_path):
    out = tmp_path / "r.html"
    said = run("report", *models.values(), "--data", partly, "--samples", 2, "--out", out)
    assert said.exit_code == 0, said.output
    assert len(lines_about("the splits 'ood' and 'shift' have no masks", said.output)) == 1
    assert "heatmaps compared with masked's" in said.output
    page = out.read_text()
    assert "the splits 'ood' and 'shift' have no masks, which the front of masked needs" in html.unescape(page)
    accuracies = dict(zip(models, page.split("<tr data-model=")[1:], strict=True))
    told = {
        name: re.findall(r'data-split="(\w+)"(?: data-accuracy="([\d.]+)")?', row) for name, row in accuracies.items()
    }
    for name, model in models.items():
        expected = evaluate(partly, model)["splits"]
        told_of = {split: float(value) if value else None for split, value in told[name][:3]}
        assert told_of == {split: expected[split]["accuracy"] for split in expected}
    assert "None" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", re.sub(r"<(pre|style|script).*?</\1>|base64,[^\"]*", "", page, flags=re.DOTALL))


def test_maps_are_compared_on_the_splits_that_the_reference_can_explain(partly, models):
    comparison = compare([models["masked"], models["student"]], partly, samples=2)
    student = comparison.models[1]
    assert comparison.reference == 0
    assert student.splits["iid"].agreement is not None
    assert student.splits["ood"].agreement is student.splits["shift"].agreement is None
    assert list(comparison.models[0].splits) == ["iid"]
    assert comparison.models[0].totals["splits"]["ood"]["accuracy"] is None


def test_a_teacher_that_cannot_be_tested_at_all_leaves_the_other_models_of_a_report(untestable, models, tmp_path):
    out = tmp_path / "r.html"
    said = run("report", models["masked"], models["student"], "--data", untestable, "--samples", 2, "--out", out)
    assert said.exit_code == 0, said.output
    assert "no heatmaps compared" in said.output
    comparison = compare([models["masked"], models["student"]], untestable, reference=models["masked"], samples=2)
    assert comparison.reference is None
    assert not comparison.models[0].splits
    assert comparison.models[1].totals["iid"] is not None


def test_a_report_without_any_result_is_refused_and_nothing_is_written(untestable, models, tmp_path):
    with pytest.raises(ModelError, match=r"'iid' and 'ood' have no masks.*test its student"):
        write_report([models["masked"]], tmp_path / "r.html", untestable)
    assert not list(tmp_path.iterdir())


def test_a_report_of_a_split_on_which_no_model_is_tested_says_so(partly, models, tmp_path):
    write_report([models["masked"]], tmp_path / "r.html", partly, samples=2)
    assert (tmp_path / "r.html").read_text().count("No model is tested on this split.") == 2


# --- tables and pictures of many models ---------------------------------------------------------------------


def result_of(data: Path, model: Path, method: str, teacher: str | None) -> dict[str, Any]:
    """A line of results.jsonl."""
    scores = evaluate(data, model, device="cpu")
    return {
        "method": method, "title": method, "seed": 0, "teacher": teacher, "seconds": 1.0, "published": None,
        **{split: scores["splits"][split]["accuracy"] for split in ("iid", "ood", "shift")},
        "gap": scores["gap"], "worst_group": scores["worst_group"],
        "on_object": {name: split["on_object"] for name, split in scores["splits"].items()},
        "groups": [group for split in scores["splits"].values() for group in split["groups"]],
    }  # fmt: skip


def test_a_table_has_dashes_for_the_splits_without_masks(partly, models):
    results = [
        result_of(partly, models["masked"], "teacher", None),
        result_of(partly, models["student"], "lrp", "teacher"),
    ]
    lines = summarise(results, profiles.BENCHMARKS["fashion-on-textures"])[:2]
    head, _, teacher, student = markdown(lines).splitlines()
    assert head.startswith("|  | IID | OOD | shift | gap | worst group | on object |")
    cells = [cell.strip() for cell in teacher.split("|")[2:8]]
    assert cells == [f"{results[0]['iid']:.2f}", "–", "–", "–", "–", "100.00"]
    cells = [cell.strip() for cell in student.split("|")[2:8]]
    assert "–" not in cells
    assert cells[5] == f"{results[1]['on_object']['iid']:.2f}", "the last split that has masks"
    assert "less its teacher's" not in head, "the teacher has no accuracy to compare with"
    for write in (text, latex):
        assert "None" not in write(lines)
        assert "nan" not in write(lines)


def test_pictures_of_a_table_leave_out_what_cannot_be_told(partly, models, tmp_path):
    points = [
        {"title": name, "seed": 0, **point}
        for name in ("masked", "erm")
        for point in evaluate_snapshots(partly, models[name], images=10, device="cpu")
    ]
    assert {point["ood"] for point in points if point["title"] == "masked"} == {None}
    assert all(point["iid"] is not None for point in points)
    curves_picture(points, ("iid", "ood", "shift"), tmp_path / "curves.png")
    heatmap_picture(open_dataset(partly), ("iid", "ood"), models, tmp_path / "heatmaps.png")
    results = [result_of(partly, models[name], name, None) for name in ("masked", "erm", "student")]
    groups_picture(results, ("ood", "shift"), tmp_path / "groups.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "groups.png", "heatmaps.png"]
    groups_picture(results[:1], ("ood", "shift"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_sweep_on_masks_of_the_training_images_alone_is_tabulated(untestable, models, tmp_path):
    cache_explanations(untestable, models["masked"], tmp_path / "c.zarr", draws=1)
    common = {"data": str(untestable), "cache": str(tmp_path / "c.zarr"), "steps": 1, "batch_size": 8}
    rows = train_students(tmp_path / "s", plan_sweep(common, []), devices=["cpu"], echo=lambda _: None)
    assert rows[0]["iid"] is not None
    assert "failed" not in sweep_table(rows)


# --- stage one ----------------------------------------------------------------------------------------------


def test_stage_one_refuses_a_split_without_masks_for_a_mask_teacher_before_anything_is_written(
    partly, models, tmp_path
):
    out = tmp_path / "new" / "c.zarr"
    said = run("cache-explanations", "--data", partly, "--teacher", models["masked"], "--split", "ood", "--out", out)
    assert said.exit_code == 1
    words = " ".join(said.output.split())
    assert f"the split 'ood' has no masks, which the front of {models['masked']} needs" in words
    assert re.search(r"give --split (train|validation|iid), which has masks", words)
    assert not out.parent.exists()
