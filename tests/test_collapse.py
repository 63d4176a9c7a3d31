"""A training that teaches nothing is noticed: a loss that does not fall, and a network that says one class."""

from __future__ import annotations

import json
import logging
import types

import numpy as np
import pytest
import torch
from torch import nn

from data import DatasetWriter
from pipeline import cache_explanations
from trainer import train_student, train_teacher
from trainer.loop.collapse import Falling, one_class_warning
from trainer.results.by_class import prediction_table
from trainer.results.evaluation import class_scores

SIDE = 12


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """Equal images of two classes, 36 and 24: nothing tells the classes apart."""
    path = tmp_path_factory.mktemp("blank") / "d.zarr"
    with DatasetWriter(path) as writer:
        images = np.full((60, 3, SIDE, SIDE), 90, np.uint8)
        writer.write_split("train", images=images, labels=np.arange(60) % 5 // 3)
        writer.finish(name="blank", class_names=["good", "bad"])
    return path


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Noise of many brightnesses, whose labels are the brightness; and the maps of a teacher that sees it."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    level = rng.integers(20, 230, (64, 1, 1, 1))
    images = (level + rng.integers(-19, 20, (64, 3, SIDE, SIDE))).astype(np.uint8)
    with DatasetWriter(folder / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=(level[:, 0, 0, 0] > 125).astype(np.int64))
        writer.finish(name="noise", class_names=["dark", "bright"])
    cache_explanations(folder / "d.zarr", Brightness(), folder / "c.zarr", device="cpu")
    return folder


class Brightness(nn.Module):
    """Says bright from a mean of 0.5 on, by its bias; its maps are equal weights."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3 * SIDE**2, 2)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[-9.0], [9.0]]) / (3 * SIDE**2) * torch.ones(2, 3 * SIDE**2))
            self.last.bias.copy_(torch.tensor([4.5, -4.5]))

    def forward(self, images):
        return self.last(images.flatten(1))


def student(noise, out, **options):
    settings = {"steps": 100, "batch_size": 8, "head": "free", "arch_options": {"width": 4}, "method": "lrp"}
    return train_student(noise / "d.zarr", noise / "c.zarr", out, **{**settings, **options})


def warnings(caplog, word):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING and word in one.getMessage()]


# --- real trainings ---------------------------------------------------------------------------------------------------


def test_a_teacher_that_says_one_class_is_warned_of_with_the_shares_in_its_result(blank, tmp_path, caplog):
    result = train_teacher(blank, tmp_path / "t", steps=100, batch_size=12, arch_options={"width": 4}, debias="none")
    (warning,) = warnings(caplog, "collapsed")
    assert "says 'good' for 100% of 60 training images, and 60% are of this class" in warning
    assert "class_weights='balanced'" in warning
    assert result["predictions"] == {
        "samples": 60,
        "predicted": {"good": 100.0},
        "labels": {"good": pytest.approx(60), "bad": pytest.approx(40)},
    }
    assert json.loads((tmp_path / "t" / "result.json").read_text())["predictions"] == result["predictions"]


def test_a_student_that_learns_nothing_is_told_once_that_its_loss_does_not_fall(noise, tmp_path, caplog):
    result = student(noise, tmp_path / "s", lr=1e-9)
    (warning,) = warnings(caplog, "heatmap loss")
    assert "after 100 of 100 steps" in warning
    assert "inspect_cache()" in warning
    assert set(result["predictions"]) == {"samples", "predicted", "teacher"}
    assert result["predictions"]["samples"] == 64
    assert sum(result["predictions"]["teacher"].values()) == pytest.approx(100)


def test_a_student_that_learns_and_a_short_training_are_not_warned_of(noise, blank, tmp_path, caplog):
    student(noise, tmp_path / "s", lr=0.01)
    assert warnings(caplog, "heatmap loss") == []
    student(noise, tmp_path / "short", steps=99, lr=1e-9)
    train_teacher(blank, tmp_path / "t", steps=99, batch_size=4, arch_options={"width": 4}, debias="none")
    assert warnings(caplog, "heatmap loss") + warnings(caplog, "collapsed") == []


# --- the loss ---------------------------------------------------------------------------------------------------------


def settings_of(steps, kind="l1", loss=("lrp",)):
    return types.SimpleNamespace(steps=steps, map_loss=kind, loss=dict.fromkeys(loss, 1.0), class_weights=None)


def told(settings, losses, progress=None):
    falling = Falling(settings, {} if progress is None else progress)
    name = next(iter(settings.loss))
    said = [(number, falling.add(number, {name: loss})) for number, loss in losses]
    return [(number, str(message)) for number, message in said if message is not None]


def test_a_loss_that_stays_is_told_of_after_a_third_and_not_again():
    ((number, text),) = told(settings_of(600), [(number, 1.9) for number in range(1, 601)])
    assert number == 200
    assert "1.90 after 200 of 600 steps" in text


def test_a_loss_that_comes_down_from_another_scale_to_two_has_not_fallen():
    assert len(told(settings_of(600), [(number, 2 + 50 * 0.9**number) for number in range(1, 601)])) == 1
    assert len(told(settings_of(600, "mse"), [(number, 2 + 50 * 0.9**number) for number in range(1, 601)])) == 0


def test_losses_that_fall_or_are_low_or_compare_no_maps_are_not_told_of():
    falling = [(number, 2 - number / 600) for number in range(1, 601)]
    assert told(settings_of(600), falling) == []
    assert told(settings_of(600), [(number, 0.5) for number, _ in falling]) == []
    assert told(settings_of(600, loss=("erm",)), [(number, 2.0) for number, _ in falling]) == []
    assert told(settings_of(99), [(number, 2.0) for number in range(1, 100)]) == []


def test_single_losses_without_meaning_do_not_decide():
    wild = [(number, 1e9 if number in (7, 195) else 1.9 - number / 400) for number in range(1, 601)]
    assert told(settings_of(600), wild) == []


def test_a_resumed_training_is_told_the_same_and_one_of_an_earlier_version_nothing():
    losses, progress = [(number, 1.9) for number in range(1, 601)], {}
    told(settings_of(600), losses[:150], progress)
    progress = json.loads(json.dumps(progress))
    assert len(told(settings_of(600), losses[150:], progress)) == 1
    assert told(settings_of(600), losses[150:], {}) == []


# --- one class --------------------------------------------------------------------------------------------------------


def test_one_class_is_no_collapse_where_no_other_is_frequent_or_the_network_says_others():
    def said(predicted, expected, steps=100):
        counts = np.array(predicted), np.array(expected)
        return one_class_warning(*counts, ["a", "b"], settings_of(steps), of_teacher=True)

    assert said([100, 0], [94, 6]) is not None
    assert said([100, 0], [96, 4]) is None
    assert said([98, 2], [50, 50]) is None
    assert said([100, 0], [94, 6], steps=99) is None


# --- the shares that evaluate shows -----------------------------------------------------------------------------------


def test_the_share_of_each_predicted_class_stands_beside_its_frequency():
    names = ["a", "b", "c"]
    scores = class_scores(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 2]), names)
    assert scores["predictions"] == {"a": 75.0, "b": 0.0, "c": 25.0}
    lines = prediction_table({"iid": scores, "ood": {"accuracy": None}}).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines] == ["iid", "75.0 (50.0)", "0.0 (50.0)", "25.0 (0.0)"]
    assert prediction_table({"iid": {"accuracy": 3.0}}) == ""


def test_of_many_classes_those_that_are_predicted_most_are_listed():
    names = [f"class {number}" for number in range(30)]
    predicted = np.array([7] * 50 + [9] * 30 + list(range(20)))
    lines = prediction_table({"iid": class_scores(np.arange(100) % 30, predicted, names)}).splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["class 7", "class 9"]
    assert len(lines) == 6
