"""A student that knows more than its teacher is noticed, by the labels of biased images alone."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer.loop.training
from data import make_coloured_mnist, open_dataset
from pipeline import Classifier, cache_explanations, load_classifier
from teacher_cache import open_cache
from trainer import train_student, train_teacher
from trainer.loop.excess import excess, excess_warning
from trainer.settings import Settings
from trainer.stream.stream import Source


class Brightness(nn.Module):
    """Says the class that the image's one value is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((255 * images).round().long()[:, 0, 0, 0], 3).float()


def compare(student: Any, teacher: Any, labels: Any) -> dict[str, Any]:
    """Compare answers given as lists, in blocks of four samples and batches of three."""
    images = np.array(student, np.uint8)[:, None, None, None]
    fields = {"images": images, "labels": np.array(labels), "teacher_logits": np.eye(3, dtype=np.float32)[teacher]}

    def read(block: int, out: dict[str, np.ndarray]) -> None:
        for name, values in fields.items():
            out[name][...] = values[4 * block : 4 * block + 4]

    source = Source(len(labels), 4, {name: (values.shape[1:], values.dtype) for name, values in fields.items()}, read)
    settings = Settings(loss={"output": 1.0}, steps=1, batch_size=3)
    return excess(Classifier(Brightness()), source, settings, torch.device("cpu"), nullcontext)


def test_it_is_the_paired_difference_of_the_accuracies_and_has_its_standard_error():
    rng = np.random.default_rng(0)
    labels, student, teacher = rng.integers(0, 3, (3, 90))
    student[:40], teacher[:30] = labels[:40], labels[:30]
    found = compare(student, teacher, labels)
    gains = (student == labels).astype(float) - (teacher == labels)
    assert found == pytest.approx(
        {
            "samples": 90,
            "student": 100 * np.mean(student == labels),
            "teacher": 100 * np.mean(teacher == labels),
            "excess": 100 * gains.mean(),
            "standard_error": 100 * gains.std() / 90**0.5,
        }
    )


@pytest.mark.parametrize(
    ("more", "less", "warned"),
    [(9, 0, True), (3, 0, False), (12, 3, True), (12, 8, False), (0, 9, False), (0, 0, False)],
    ids=["much", "little", "much more than less", "more by chance", "worse", "equal"],
)
def test_only_an_excess_that_is_no_chance_is_told(more, less, warned):
    labels = np.zeros(200, int)
    student, teacher = labels.copy(), labels.copy()
    teacher[:more], student[more : more + less] = 1, 1
    found = compare(student, teacher, labels)
    warning = excess_warning(found)
    assert (warning is not None) == warned
    if warned:
        assert (
            f"{found['student']:.1f} % of the 200 validation images, and its teacher on {found['teacher']:.1f} %"
            in str(warning)
        )


def test_a_student_that_mends_a_small_share_of_its_teachers_errors_is_not_told():
    found = {"samples": 100_000, "student": 83.0, "teacher": 80.0, "excess": 3.0, "standard_error": 0.1}
    assert excess_warning(found) is None
    assert excess_warning({**found, "student": 84.5, "excess": 4.5}) is not None
    assert excess_warning({**found, "student": 100.0, "teacher": 100.0, "excess": 0.0, "standard_error": 0.0}) is None


@pytest.mark.parametrize("augment", [(), ("flip",)], ids=["", "flip"])
def test_a_training_with_a_validation_store_records_it_and_warns(tmp_path, monkeypatch, caplog, augment):
    data = tmp_path / "d.zarr"
    make_coloured_mnist(data, limit=64)
    train_teacher(data, tmp_path / "t", steps=20, batch_size=16, device="cpu")
    for split in ("train", "validation"):
        cache_explanations(data, tmp_path / "t", tmp_path / f"{split}.zarr", split=split, draws=1, device="cpu")
    options = {"steps": 3, "batch_size": 16, "device": "cpu", "augment": augment, "class_weights": "balanced"}
    stores = {"cache": tmp_path / "train.zarr", "validation_cache": tmp_path / "validation.zarr"}
    with caplog.at_level(logging.WARNING, logger="trainer"):
        found = train_student(data, out=tmp_path / "s", **stores, **options)["beside_teacher"]
    assert "knows" not in caplog.text
    assert "learnt the bias" not in caplog.text
    split = open_dataset(data).split("validation")
    labels, images = np.asarray(split.labels[:]), torch.from_numpy(np.asarray(split.images[:])).float() / 255
    with torch.no_grad():
        answers = load_classifier(tmp_path / "s")[0].eval()(images).argmax(1).numpy()
    logits = np.empty((64, 10), np.float32)
    open_cache(stores["validation_cache"]).read_samples(0, {"teacher_logits": logits})
    assert found["student"] == pytest.approx(100 * np.mean(answers == labels))
    assert found["teacher"] == pytest.approx(100 * np.mean(logits.argmax(1) == labels))
    assert json.loads((tmp_path / "s" / "result.json").read_text())["beside_teacher"] == found
    leak = {"samples": 64, "student": 90.0, "teacher": 80.0, "excess": 10.0, "standard_error": 3.0}
    monkeypatch.setattr(trainer.loop.training, "excess", lambda *_: leak)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        train_student(data, out=tmp_path / "leaks", **stores, **options)
    assert "90.0 % of the 64 validation images, and its teacher on 80.0 %" in caplog.text
    del stores["validation_cache"]
    assert train_student(data, out=tmp_path / "alone", **stores, **options)["beside_teacher"] is None
