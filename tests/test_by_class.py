"""What is said of each class: by `evaluate`, its JSON and its table, and by a report."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import trainer
from cli import main
from data import DatasetWriter, open_dataset
from pipeline import load_classifier
from trainer import evaluate, train_teacher, write_report
from trainer.results.by_class import class_table, one_class_warning
from trainer.results.evaluation import class_scores, predict, wilson_interval


def write(path, labels_of, class_names):
    """Noise, whose labels these are by split; the training split has every class."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for split, labels in {"train": np.arange(len(class_names)).repeat(2), **labels_of}.items():
            images = rng.integers(0, 256, (len(labels), 3, 12, 12)).astype(np.uint8)
            writer.write_split(split, images=images, labels=np.asarray(labels))
        writer.finish(name="noise", class_names=class_names)
    return path


def teacher(data, out, says=None):
    """A teacher of two steps. It says the class of this number for every image, if there is one."""
    train_teacher(data, out, steps=2, batch_size=4, debias="none", arch_options={"width": 4})
    if says is not None:
        say(out, says)
    return out


def say(run, number):
    """Make the model of a run folder say one class for every image."""
    weights = torch.load(run / "weights.pt", weights_only=True)
    (head,) = [name for name, values in weights.items() if values.ndim == 2]
    weights[head].zero_()
    weights[head][number] = 1.0  # the features are positive
    torch.save(weights, run / "weights.pt")


def score(accuracy, samples=10):
    return {"accuracy": accuracy, "interval": [0.0, 100.0], "samples": samples}


def result_of(classes, only=None):
    """A split as evaluate returns it, from the accuracy of each class."""
    scores = [{"class": name, **score(accuracy)} for name, accuracy in classes.items()]
    balanced = float(np.mean(list(classes.values())))
    return {**score(50.0), "balanced_accuracy": balanced, "classes": scores, "only_prediction": only}


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_each_class_has_the_accuracy_of_its_own_samples_and_the_balanced_one_is_their_mean():
    labels = np.array([0] * 6 + [2] * 2)
    predicted = np.array([0] * 6 + [0, 2])
    scores = class_scores(labels, predicted, ["good", "crack", "dent"])
    assert [(one["class"], one["accuracy"], one["samples"]) for one in scores["classes"]] == [
        ("good", 100, 6),
        ("dent", 50, 2),
    ]
    assert scores["classes"][1]["interval"] == pytest.approx([100 * bound for bound in wilson_interval(1, 2)])
    assert scores["balanced_accuracy"] == 75
    assert scores["only_prediction"] is None
    assert class_scores(labels, np.full(8, 1), ["good", "crack", "dent"])["only_prediction"] == "crack"


def test_evaluate_scores_each_class_of_each_split_and_its_json_has_all(tmp_path):
    names = [f"class {number}" for number in range(30)]
    data = write(tmp_path / "d", {"iid": np.arange(30).repeat(3), "ood": np.arange(20)}, names)
    run = teacher(data, tmp_path / "t")
    result = evaluate(data, run, device="cpu")
    model, _ = load_classifier(run)
    for name, split in result["splits"].items():
        labels = open_dataset(data).split(name).labels[:]
        correct = predict(model, open_dataset(data).split(name), torch.device("cpu")) == labels
        assert {one["class"]: one["accuracy"] for one in split["classes"]} == pytest.approx(
            {names[label]: 100 * correct[labels == label].mean() for label in np.unique(labels)}
        )
        total = sum(one["accuracy"] * one["samples"] for one in split["classes"]) / split["samples"]
        assert total == pytest.approx(split["accuracy"])
    printed = CliRunner().invoke(main, ["evaluate", "--data", str(data), "--model", str(run), "--json"])
    assert json.loads(printed.stdout) == result


# --- the table --------------------------------------------------------------------------------------------------------


def test_few_classes_are_all_printed_in_the_order_of_the_dataset_beside_the_total(tmp_path):
    data = write(tmp_path / "d", {"iid": [0, 1, 1, 2], "ood": [0, 0, 2]}, ["zebra", "ant", "mole"])
    run = teacher(data, tmp_path / "t", says=2)
    printed = CliRunner().invoke(main, ["evaluate", "--data", str(data), "--model", str(run)])
    assert printed.exit_code == 0, printed.output
    table = printed.stdout.split("\n\n")[1].splitlines()
    assert [re.split(r"\s{2,}", line) for line in table] == [
        ["by class, in %", "iid", "ood"],
        ["zebra", "0.00 of 1", "0.00 of 2"],
        ["ant", "0.00 of 2", "–"],
        ["mole", "100.00 of 1", "100.00 of 1"],
        ["balanced accuracy", "33.33", "50.00"],
    ]


def test_the_table_of_two_classes_has_four_lines_and_of_twelve_fourteen():
    for classes in (2, 12):
        split = result_of({f"class {number}": 50.0 for number in range(classes)})
        assert len(class_table({"iid": split}, "give --json").splitlines()) == classes + 2


def test_of_many_classes_the_worst_five_are_printed_the_worst_first_and_where_all_are():
    accuracies = {f"class {number}": 50.0 + number % 50 for number in range(1000)}
    iid = result_of({**accuracies, "class 7": 3.0, "class 900": 2.0})
    ood = result_of({**accuracies, "class 400": 1.0, "class 7": 60.0})
    lines = class_table({"iid": iid, "ood": ood}, "give --json").splitlines()
    assert lines[0].startswith("the 5 worst classes, in %")
    assert [line.split("  ")[0] for line in lines[1:6]] == ["class 400", "class 900", "class 7", "class 0", "class 50"]
    assert re.split(r"\s{2,}", lines[1]) == ["class 400", "50.00 of 10", "1.00 of 10"]
    assert lines[6].startswith("balanced accuracy")
    assert lines[7] == "995 more classes: give --json"
    assert len(lines) == 8


def test_long_names_and_classes_that_only_a_later_split_has_keep_the_columns():
    long = "a class with a very long name that would move every other column"
    lines = class_table({"iid": result_of({"b": 1.0}), "ood": result_of({long: 2.0, "c": 3.0})}, "").splitlines()
    assert {line.split("  ")[0] for line in lines[1:4]} == {"b", "a class with a very long name…", "c"}
    assert max(map(len, lines)) < 70
    starts = [line.index("of 10") for line in lines if line.count("of 10") == 1 and "–" not in line[:45]]
    assert len(set(starts)) <= 1


def test_results_of_earlier_versions_and_untested_splits_have_no_table():
    assert class_table({"iid": score(50.0), "ood": {"accuracy": None}}, "") == ""


# --- the warning ------------------------------------------------------------------------------------------------------


def test_a_model_that_says_one_class_for_every_image_is_named_with_the_splits(tmp_path):
    data = write(tmp_path / "d", {"iid": [0, 1, 1, 2], "ood": [0, 0, 2]}, ["zebra", "ant", "mole"])
    run = teacher(data, tmp_path / "t", says=1)
    printed = CliRunner().invoke(main, ["evaluate", "--data", str(data), "--model", str(run)])
    said = " ".join(printed.stderr.split())
    assert "warning: the model says 'ant' for every image of iid, ood," in said
    assert "--class-weights balanced" in said
    quiet = CliRunner().invoke(main, ["evaluate", "--data", str(data), "--model", str(run), "--json"])
    assert "says 'ant'" in quiet.stderr
    assert json.loads(quiet.stdout)["splits"]["iid"]["only_prediction"] == "ant"


def test_splits_with_different_single_answers_are_told_apart():
    splits = {"iid": result_of({"a": 1.0, "b": 2.0}, only="a"), "ood": result_of({"a": 1.0, "b": 2.0}, only="b")}
    assert "says 'a' for every image of iid, and 'b' for every image of ood" in str(
        one_class_warning({"splits": splits})
    )


def test_a_split_of_one_class_and_a_model_that_says_several_are_not_warned_of():
    right = {"iid": result_of({"a": 100.0}, only="a"), "ood": result_of({"a": 1.0, "b": 2.0})}
    assert one_class_warning({"splits": right}) is None
    assert one_class_warning({"splits": {"iid": score(50.0), "ood": {"accuracy": None}}}) is None


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_report_shows_the_accuracy_of_each_class_and_warns_of_one_class(tmp_path):
    data = write(tmp_path / "d", {"iid": [0, 1, 1, 2], "ood": [0, 0, 2]}, ["<zebra>", "ant", "mole"])
    runs = [teacher(data, tmp_path / "t"), tmp_path / "u"]
    shutil.copytree(runs[0], runs[1])
    say(runs[1], 2)
    write_report(runs, tmp_path / "r.html", data, samples=1, device="cpu")
    page = (tmp_path / "r.html").read_text()
    expected = [
        one["accuracy"]
        for name in ("iid", "ood")
        for classes in zip(*(evaluate(data, run)["splits"][name]["classes"] for run in runs), strict=True)
        for one in classes
    ]
    assert [float(value) for value in re.findall(r'data-class-accuracy="([\d.]+)"', page)] == pytest.approx(expected)
    assert page.count("balanced accuracy</th>") == 2
    assert " u: the model says &#39;mole&#39; for every image of iid, ood," in page
    assert "<zebra>" not in page


def test_a_report_of_many_classes_lists_the_twenty_worst_and_where_all_are(tmp_path):
    names = [f"class {number}" for number in range(50)]
    data = write(tmp_path / "d", {"iid": np.arange(50).repeat(2)}, names)
    run = teacher(data, tmp_path / "t", says=3)
    write_report([run], tmp_path / "r.html", data, samples=1, device="cpu")
    page = (tmp_path / "r.html").read_text()
    shown = [float(value) for value in re.findall(r'data-class-accuracy="([\d.]+)"', page)]
    assert shown == [0.0] * 20
    assert "lists the other 30 too" in page


def test_the_command_prints_no_table_for_a_result_without_classes(monkeypatch):
    split = {**score(90.0), "worst_group": None, "on_object": None}
    result = {"kind": "student", "iid": 90.0, "gap": None, "splits": {"iid": split}}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: result)
    printed = CliRunner().invoke(main, ["evaluate", "--data", "d.zarr", "--model", "t"])
    assert printed.exit_code == 0
    assert "by class" not in printed.output
