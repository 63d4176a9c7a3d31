"""What `report` promises: one page that needs nothing else, whose numbers are those of the other commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import save_clip
from scipy.stats import spearmanr

import trainer.results.comparison as comparison
from cli import main
from data import DatasetError, DatasetWriter, make_coloured_mnist, open_dataset
from pipeline import ModelError, RelevanceError, ZeroShot, explain, load_classifier
from pipeline.device import as_input
from trainer import evaluate, train_student, train_teacher, write_report
from trainer.results.comparison import compare
from trainer.results.report import render

CHROMIUM = Path("/usr/bin/chromium")
MADE = {"command": "python cli.py report", "date": "2026-01-01", "versions": {"torch": "2"}, "revision": None}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """Elements of a page: it fails where they are not nested as they should be."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is there twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attrs for name, attrs in self.elements if name == tag]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(dataset, cache, validation_cache, tmp_path_factory) -> list[Path]:
    """An ERM baseline, a teacher and a student, in this order."""
    folder = tmp_path_factory.mktemp("runs")
    train_teacher(dataset, folder / "erm", debias="none", steps=8, batch_size=64)
    train_teacher(dataset, folder / "grey", steps=30, batch_size=64, log_steps=5)
    options = {"validation_cache": validation_cache, "steps": 6, "batch_size": 32, "log_steps": 2}
    train_student(dataset, cache, folder / "student", **options)
    return [folder / "erm", folder / "grey", folder / "student"]


@pytest.fixture(scope="module")
def found(runs) -> comparison.Comparison:
    return compare(runs, samples=3)


@pytest.fixture(scope="module")
def page(found) -> str:
    return render(found, MADE)


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """A dataset of two classes with masks, without groups, and one test split alone."""
    path = tmp_path_factory.mktemp("masked") / "data.zarr"
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for name in ("train", "odd"):
            masks = np.zeros((20, 1, 12, 20), np.uint8)
            masks[:, :, 3:9, 5:12] = 1
            images = rng.integers(0, 256, (20, 3, 12, 20), dtype=np.uint8)
            writer.write_split(name, images=images, labels=np.arange(20) % 2, masks=masks)
        writer.finish(class_names=["<b>&\"a'", "$b^2$"])
    return path


# --- the page -----------------------------------------------------------------------------------------------


def test_the_command_writes_one_page_whole_and_replaces_none(runs, tmp_path, monkeypatch):
    out = tmp_path / "new" / "report.html"
    result = run(*runs, "--samples", 1, "--out", out)
    assert result.exit_code == 0, result.output
    size = out.stat().st_size
    expected = f"{out}: 3 models on iid, ood, shift, {size / 1e6:.1f} MB; heatmaps compared with grey's"
    assert result.output.splitlines()[-1] == expected
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert f"python cli.py report {runs[0]} {runs[1]} {runs[2]} --samples 1 --out {out}" in out.read_text()
    monkeypatch.setattr("trainer.results.report.compare", None)  # refused before anything is measured
    again = run(*runs, "--out", out)
    assert (again.exit_code, "choose another --out" in again.output, out.stat().st_size) == (1, True, size)


def test_the_page_is_well_formed_and_every_id_is_there_once(page):
    parsed = Page(page)
    ids = Counter(attrs["id"] for _, attrs in parsed.elements if "id" in attrs)
    assert max(ids.values()) == 1
    for target in re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', page):
        assert target in ids
    assert {"html", "head", "body", "main", "nav", "h1"} <= {tag for tag, _ in parsed.elements}
    for image in parsed.all("img"):
        assert image["alt"]


def test_nothing_is_loaded_from_anywhere(page):
    parsed = Page(page)
    for tag, attrs in parsed.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in attrs and tag != "a":
                assert attrs[name].startswith(("data:", "#")), (tag, attrs[name])
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    (policy,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_accuracy_of_the_page_is_the_one_that_evaluate_tells(page, dataset, runs):
    told: dict[str, dict[str, float]] = {}
    for _, attrs in Page(page).elements:
        if "data-model" in attrs:
            row = told.setdefault(attrs["data-model"], {})
        if "data-accuracy" in attrs:
            row[attrs["data-split"]] = float(attrs["data-accuracy"])
    for path in runs:
        result = evaluate(dataset, path)
        assert told[path.name] == {name: split["accuracy"] for name, split in result["splits"].items()}
        for split in result["splits"].values():
            assert f">{split['accuracy']:.2f}<small>{split['interval'][0]:.1f} – {split['interval'][1]:.1f}<" in page


def test_names_of_classes_and_models_are_text_and_never_markup(masked, tmp_path):
    train_teacher(masked, tmp_path / "<i>&run", debias="mask", steps=1, batch_size=4)
    text = render(compare([tmp_path / "<i>&run"], masked), MADE)
    Page(text)
    assert "<i>" not in text
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "$b^2$" in text


def test_without_scripts_the_true_class_is_shown(page, found):
    parsed, maps = Page(page), []
    for tag, attrs in parsed.elements:
        if "data-true" in attrs:
            true = attrs["data-true"]
        if tag == "div" and "data-class" in attrs:
            assert ("hidden" in attrs) == (attrs["data-class"] != true)
            maps.append(attrs)
    assert len(maps) == 3 * 3 * 3 * 10  # splits, samples, models, classes
    values = [option["value"] for option in parsed.all("option")]
    assert values == ["true", "says", *map(str, range(10))]
    assert found.explained == tuple(range(10))


def test_the_page_says_where_everything_is_from(page, runs, dataset):
    for path in runs:
        config = json.loads((path / "config.json").read_text())
        for said in (str(path), config["dataset"]["fingerprint"], config["versions"]["torch"]):
            assert said in page
    for split in open_dataset(dataset).test_splits:
        assert split.fingerprint in page
    assert "flex, 2 draws, ε in [0.1, 1.0]" in page
    assert MADE["command"] in page


def test_a_report_of_four_models_stays_moderate(runs, tmp_path):
    shutil.copytree(runs[2], tmp_path / "twin")
    made = write_report([*runs, tmp_path / "twin"], tmp_path / "r.html", samples=6)
    assert made["bytes"] < 5e6


# --- what is measured ---------------------------------------------------------------------------------------


def test_calibration_error_is_that_of_a_slow_oracle():
    rng = np.random.default_rng(0)
    probabilities = np.concatenate([rng.uniform(0.1, 1, 500), np.arange(1, 16) / 15])
    correct = rng.uniform(size=515) < probabilities**2
    error = 0.0
    for number in range(15):
        inside = [place for place, p in enumerate(probabilities) if number / 15 < p <= (number + 1) / 15]
        if inside:
            confidence = sum(probabilities[place] for place in inside) / len(inside)
            accuracy = sum(bool(correct[place]) for place in inside) / len(inside)
            error += len(inside) / 515 * abs(accuracy - confidence)
    found = comparison.calibration(probabilities, correct)
    assert found.error == pytest.approx(100 * error)
    assert found.samples.sum() == 515
    assert comparison.calibration(np.ones(4), np.ones(4, bool)).error == 0


def test_rank_correlation_is_that_of_scipy_with_ties_too():
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 20, 60))
    ours[:, :30], theirs[:, 20:40] = 0, np.round(theirs[:, 20:40])
    expected = [spearmanr(one, other).statistic for one, other in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(comparison.rank_correlation(ours, theirs), expected)


def test_maps_agree_with_themselves_and_images_without_relevance_are_left_out():
    maps = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)
    maps[2] = 0
    found = comparison.agree(maps, 3 * maps, np.arange(10, 15))
    np.testing.assert_allclose(found.cosine, 1)
    np.testing.assert_allclose(found.rank, 1)
    assert (len(found.cosine), found.without, len(found.worst)) == (4, 1, 4)
    assert 12 not in {case.row for case in found.worst}


def test_agreement_is_of_the_true_class_on_evenly_spread_images_and_the_worst_come_first(
    dataset, runs, found, monkeypatch
):
    split = open_dataset(dataset).split("ood")
    rows = np.arange(256) * 300 // 256
    images, labels = as_input(np.asarray(split.images[:])[rows], torch.device("cpu")), split.labels[:][rows]
    maps = [
        explain(load_classifier(path)[0], images, torch.as_tensor(labels).long(), 0.1)[1].sum(1).flatten(1).numpy()
        for path in runs[:2]
    ]
    expected = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(*maps, strict=True)]
    agreement = found.models[0].splits["ood"].agreement
    np.testing.assert_allclose(agreement.cosine, expected, rtol=1e-3, atol=1e-4)
    worst = np.argsort(expected)[:5]
    assert [case.row for case in agreement.worst] == rows[worst].tolist()
    np.testing.assert_allclose([case.cosine for case in agreement.worst], np.sort(expected)[:5], rtol=1e-3, atol=1e-4)


def test_confusions_count_every_sample_of_its_class(found, dataset):
    for split in found.splits:
        labels = open_dataset(dataset).split(split.name).labels[:]
        for model in found.models:
            counted = model.splits[split.name].confusion
            assert counted.sum(1).tolist() == np.bincount(labels, minlength=10).tolist()
            assert 100 * counted.trace() / 300 == pytest.approx(model.splits[split.name].score["accuracy"])


def test_the_gallery_has_the_maps_of_explain(dataset, runs, found):
    split = open_dataset(dataset).split("shift")
    assert found.splits[2].rows.tolist() == [0, 100, 200]
    images = as_input(np.asarray(split.images[:])[[0, 100, 200]], torch.device("cpu"))
    for model, path in zip(found.models, runs, strict=True):
        classifier, _ = load_classifier(path)
        logits, maps = explain(classifier, images, torch.tensor([4, 4, 4]), 0.1)
        for cell, of_logits, of_maps in zip(model.splits["shift"].gallery, logits, maps.sum(1).numpy(), strict=True):
            assert cell.says == int(of_logits.argmax())
            assert cell.probability == pytest.approx(float(of_logits.softmax(0).max()), abs=1e-5)
            some = np.abs(of_maps[of_maps != 0]).mean()
            np.testing.assert_allclose(cell.maps[4], of_maps / some, rtol=1e-2, atol=1e-3)


def test_curves_are_what_the_trainings_logged(found, runs, page):
    erm, grey, student = (model.curve for model in found.models)
    assert grey.steps.tolist() == [5, 10, 15, 20, 25, 30]
    assert len(grey.validation_steps) == 0
    assert student.validation_steps.tolist() == [2, 4, 6]
    assert (erm.loss, student.loss) == ("erm", "lrp")
    logged = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    assert student.losses.tolist() == [line["loss"] for line in logged if "loss" in line]
    assert page.count('aria-label="Loss ') == 2  # what has another unit has axes of its own


def test_many_classes_have_a_list_of_confusions_and_the_most_frequent_ones_to_choose_from(tmp_path):
    rng, labels = (
        np.random.default_rng(0),
        np.concatenate([np.arange(30), [7] * 6, [3] * 5, [29] * 4, [0] * 3, [1] * 2]),
    )
    images = rng.integers(0, 256, (50, 3, 12, 12), dtype=np.uint8)
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        for name in ("train", "test"):
            writer.write_split(name, images=images, labels=labels)
        writer.finish(class_names=[f"class{number}" for number in range(30)])
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", steps=1, batch_size=4)
    found = compare([tmp_path / "t"], tmp_path / "d.zarr", samples=50)
    assert found.explained == (7, 3, 29, 0, 1)
    for cell, label in zip(found.models[0].splits["test"].gallery, labels.tolist(), strict=True):
        assert set(cell.maps) == {label, cell.says, 7, 3, 29, 0, 1}
    text = render(found, MADE)
    Page(text)
    assert "most frequent errors" in text
    assert 'class="matrix"' not in text


# --- what is compared with what -----------------------------------------------------------------------------


def test_the_reference_is_the_first_teacher_with_a_front_or_a_vision_language_one(
    dataset, runs, teacher, found, tmp_path
):
    erm, grey, student = runs
    assert found.reference == 1
    assert found.models[1].splits["iid"].agreement is None
    clip = ZeroShot(*save_clip(tmp_path / "clip"), templates=("the digit {}",))
    options = {"data": dataset, "samples": 1}
    assert compare([erm, clip, grey], **options).reference == 1
    assert compare([erm, student], **options).reference is None
    assert compare([grey, erm], **options, reference=erm).reference == 1
    outside = compare([erm], **options, reference=grey)
    assert ([model.title for model in outside.models], outside.reference) == (["grey", "erm"], 0)
    assert "no heatmaps compared" in run(erm, "--samples", 1, "--out", tmp_path / "r.html").output


def test_a_vision_language_teacher_is_named_by_the_command(dataset, runs, tmp_path):
    config, weights = save_clip(tmp_path / "clip")
    named = ["--teacher", f"clip:{config}", "--pretrained", weights, "--prompt", "the digit {}"]
    result = run(runs[2], *named, "--samples", 1, "--out", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "r.html").read_text()
    Page(text)
    assert "vision-language teacher" in text
    assert "the digit seven" in text  # its prompts, in the provenance


def test_relevance_on_the_object_is_shown_where_there_are_masks_and_only_there(masked, page, tmp_path):
    train_teacher(masked, tmp_path / "t", debias="mask", steps=1, batch_size=4)
    with_masks = render(compare([tmp_path / "t"], masked), MADE)
    assert 'id="object"' in with_masks
    share = evaluate(masked, tmp_path / "t")["splits"]["odd"]["on_object"]
    assert f"<td>{share:.1f}</td>" in with_masks
    assert 'id="object"' not in page


def test_a_model_without_rules_is_reported_without_maps(dataset, runs, monkeypatch):
    def none(*given: Any) -> None:
        raise RelevanceError("the operation 'fold' has no rule")

    monkeypatch.setattr(comparison, "explain_samples", none)
    found = compare(runs[:2], dataset, samples=2)
    text = render(found, MADE)
    Page(text)
    assert found.reference is None
    assert "has no maps: the operation &#39;fold&#39; has no rule" in text
    assert found.models[0].totals["iid"] == evaluate(dataset, runs[0])["iid"]


def test_the_dataset_is_the_recorded_one_while_it_is_there_and_the_same(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, place in enumerate(("a.zarr", "b.zarr")):
        make_coloured_mnist(place, seed=seed, limit=40)
        train_teacher(place, f"{place}-run", steps=1, batch_size=8)
    assert comparison.recorded_data([Path("a.zarr-run")]) == "a.zarr"
    with pytest.raises(DatasetError, match=r"b.zarr-run on another, .*: give data"):
        compare([Path("a.zarr-run"), Path("b.zarr-run")])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # it was beside its run
    assert comparison.recorded_data([tmp_path / "a.zarr-run"]) == str(tmp_path / "a.zarr")
    os.rename(tmp_path / "b.zarr", tmp_path / "c.zarr")
    os.rename(tmp_path / "a.zarr", tmp_path / "b.zarr")  # another one in its place
    for run_dir in ("a.zarr-run", "b.zarr-run"):
        with pytest.raises(DatasetError, match=r"is no longer at .*zarr: give data"):
            compare([tmp_path / run_dir])


def refusals(dataset, runs) -> dict[str, tuple[tuple, dict, type[Exception], str]]:
    return {
        "nothing": ((), {}, ModelError, "give the folder of a training"),
        "no run": (("nowhere",), {}, ModelError, "no model at nowhere"),
        "no dataset": ((runs[0],), {"data": "nowhere"}, DatasetError, "no dataset at nowhere"),
        "twice": ((runs[0], runs[0]), {}, ModelError, "is given twice"),
        "no reference": ((runs[0],), {"reference": "nowhere", "data": dataset}, ModelError, "no model at nowhere"),
        "samples": ((runs[0],), {"samples": 51}, RelevanceError, "samples must be at least 1 and at most 50, got 51"),
        "device": ((runs[0],), {"device": "tpu"}, ModelError, "the device 'tpu' cannot be used"),
        "factory": ((runs[0],), {"student_factory": "a:b"}, ModelError, "leave the option out"),
        "clip alone": ((ZeroShot("RN50"),), {}, DatasetError, "knows no dataset: give data"),
    }


@pytest.mark.parametrize("what", refusals("", [""]))
def test_what_cannot_be_reported_is_refused_in_a_sentence_and_nothing_is_written(what, dataset, runs, tmp_path):
    models, options, error, message = refusals(dataset, runs)[what]
    with pytest.raises(error, match=message):
        write_report(models, tmp_path / "r.html", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_an_html_file(runs, tmp_path):
    result = run(runs[0], "--out", tmp_path / "r.pdf")
    assert (result.exit_code, "that ends in .html" in result.output) == (1, True)


# --- in a browser -------------------------------------------------------------------------------------------

DRIVE = """
<script>
const seen = () => [...new Set([...document.querySelectorAll(".map:not([hidden])")].map(m => m.dataset.class))].join();
const select = document.getElementById("explained"), told = [document.getElementById("chooser").hidden];
for (const value of ["7", "says", "true"]) {
  select.value = value;
  select.dispatchEvent(new Event("change"));
  told.push(seen());
}
told.push(document.documentElement.scrollWidth <= window.innerWidth);
document.body.dataset.told = JSON.stringify(told);
</script>
</body>"""


@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no Chromium here")
def test_a_browser_shows_the_class_that_is_chosen_and_has_nothing_to_complain_of(page, found, tmp_path):
    (tmp_path / "r.html").write_text(page.replace("</body>", DRIVE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    options += ["--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "r.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    (told,) = re.findall(r'data-told="([^"]*)"', done.stdout)
    hidden, seven, says, true, fits = json.loads(told.replace("&quot;", '"'))
    cells = [cell for model in found.models for on in model.splits.values() for cell in on.gallery]
    labels = {int(split.labels[row]) for split in found.splits for row in split.rows}
    assert (hidden, seven, fits) == (False, "7", True)
    assert set(map(int, says.split(","))) == {cell.says for cell in cells}
    assert set(map(int, true.split(","))) == labels
