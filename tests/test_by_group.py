"""What is said of all groups together: by `evaluate`, its JSON and its lines, and by a report."""

from __future__ import annotations

import json
import re
import statistics

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import trainer
from cli import main
from data import DatasetWriter, open_dataset
from pipeline import load_classifier
from trainer import evaluate, train_teacher, write_report
from trainer.results.by_group import group_mean, group_mean_line
from trainer.results.evaluation import predict

HOSPITALS = ["north", "south", "west"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dataset with tests of three hospitals, of one hospital, and without groups, and a teacher of two steps."""
    root, rng = tmp_path_factory.mktemp("groups"), np.random.default_rng(0)
    groups = {
        "train": [0, 1] * 8,
        "iid": [0] * 12 + [1] * 4,
        "ood": [0] * 9 + [1] * 2 + [2] * 5,
        "one": [2] * 16,
        "none": None,
    }
    with DatasetWriter(root / "d") as writer:
        for split, of_split in groups.items():
            images = rng.integers(0, 256, (16, 3, 12, 12)).astype(np.uint8)
            given_groups = {} if of_split is None else {"groups": np.array(of_split)}
            writer.write_split(split, images=images, labels=rng.integers(0, 2, 16), **given_groups)
        writer.finish(class_names=["ill", "well"], bias_attribute="hospital", group_names=HOSPITALS)
    train_teacher(root / "d", root / "t", steps=2, batch_size=4, debias="none", arch_options={"width": 4})
    return root


def slowly(groups, labels, correct):
    """The mean and the deviation of the accuracies and of the balanced accuracies, group by group."""
    plain, balanced = [], []
    for group in sorted(set(groups)):
        rows = [row for row, other in enumerate(groups) if other == group]
        plain.append(100 * statistics.fmean(correct[row] for row in rows))
        classes = {labels[row] for row in rows}
        recalls = [100 * statistics.fmean(correct[r] for r in rows if labels[r] == label) for label in classes]
        balanced.append(statistics.fmean(recalls))
    return [f(values) for values in (plain, balanced) for f in (statistics.fmean, statistics.stdev)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=40))
def test_each_group_counts_the_same_and_each_class_of_a_group_in_the_balanced_accuracy(rows):
    groups, labels, correct = np.array(rows, np.int64).reshape(-1, 3).T
    mean = group_mean(groups * 100, labels, correct.astype(bool))
    if len(set(groups)) < 2:
        assert mean is None
        return
    assert mean.pop("groups") == len(set(groups))
    assert list(mean) == ["accuracy", "deviation", "balanced_accuracy", "balanced_deviation"]
    assert list(mean.values()) == pytest.approx(slowly(groups, labels, correct))


def test_evaluate_has_the_mean_of_splits_with_several_groups_and_its_json_too(run):
    result = evaluate(run / "d", run / "t", device="cpu")
    model, _ = load_classifier(run / "t")
    for name, split in result["splits"].items():
        stored = open_dataset(run / "d").split(name)
        labels = stored.labels[:]
        correct = predict(model, stored, torch.device("cpu")) == labels
        if name in ("iid", "ood"):
            expected = slowly(stored.groups[:].tolist(), labels.tolist(), correct)
            assert list(split["group_mean"].values())[1:] == pytest.approx(expected)
            accuracies = [group["accuracy"] for group in split["groups"]]
            assert split["group_mean"]["accuracy"] == pytest.approx(statistics.fmean(accuracies))
            assert split["group_mean"]["groups"] == len(accuracies)
        else:
            assert split["group_mean"] is None
    printed = CliRunner().invoke(main, ["evaluate", "--data", str(run / "d"), "--model", str(run / "t"), "--json"])
    assert json.loads(printed.stdout) == result


def test_the_command_prints_the_mean_below_the_split_with_the_worst_group(run):
    splits = evaluate(run / "d", run / "t", device="cpu")["splits"]
    printed = CliRunner().invoke(main, ["evaluate", "--data", str(run / "d"), "--model", str(run / "t")])
    lines = printed.stdout.splitlines()
    (ood,) = [number for number, line in enumerate(lines) if line.startswith("ood ")]
    worst = splits["ood"]["worst_group"]
    assert f"worst group {worst['group']} {worst['accuracy']:.2f} % of {worst['samples']}" in lines[ood]
    assert lines[ood + 1] == group_mean_line(splits["ood"])
    assert lines[ood + 1].startswith("  group mean ")
    assert lines[ood + 1].index(" %") == lines[ood].index(" %")
    assert len(re.findall("^  group mean", printed.stdout, re.MULTILINE)) == 2


def test_the_balanced_accuracy_is_written_where_it_differs():
    mean = {"groups": 3, "accuracy": 81.2, "deviation": 5.1, "balanced_accuracy": 81.2, "balanced_deviation": 5.1}
    assert group_mean_line({"group_mean": mean}) == "  group mean  81.20 %  ± 5.10 over 3 groups"
    mean |= {"balanced_accuracy": 70.0, "balanced_deviation": 6.0}
    assert group_mean_line({"group_mean": mean}).endswith("over 3 groups; balanced accuracy 70.00 % ± 6.00")


def test_a_result_of_an_earlier_version_is_printed_without_the_mean(monkeypatch):
    worst = {"split": "ood", "group": "north", "accuracy": 80.0, "interval": [70.0, 90.0], "samples": 5}
    split = {"accuracy": 90.0, "interval": [89.0, 91.0], "samples": 9, "worst_group": worst, "on_object": None}
    result = {"kind": "student", "iid": None, "gap": None, "splits": {"ood": split}}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: result)
    printed = CliRunner().invoke(main, ["evaluate", "--data", "d.zarr", "--model", "t"])
    assert printed.exit_code == 0, printed.output
    assert "worst group north" in printed.output
    assert "group mean" not in printed.output


def test_a_report_has_the_mean_of_the_splits_with_several_groups(run):
    write_report([run / "t"], run / "r.html", run / "d", samples=1, device="cpu")
    page = (run / "r.html").read_text()
    splits = evaluate(run / "d", run / "t", device="cpu")["splits"]
    means = [splits[name]["group_mean"] for name in ("iid", "ood")]
    expected = [f"{mean['accuracy']:.1f} ± {mean['deviation']:.1f}, {mean['groups']} groups" for mean in means]
    assert re.findall(r"<small>([\d.]+ ± [\d.]+, \d groups)</small>", page) == expected
