"""What trainings promise where masks have no object, or no background: no loss is NaN, and the user is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import DatasetWriter
from pipeline import cache_explanations
from trainer import TrainingError, train_student, train_teacher

SAMPLES = 32
TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 16}
STUDENTS: dict[str, dict[str, Any]] = {
    "mask_target": {"mask_target": True},
    "pooled maps": {"mask_target": True, "pooled": True},
    "rrr": {"method": "rrr"},
    "isnet": {"method": "isnet"},
    "background": {"method": "erm", "augment": ("background",)},
}
every_use = pytest.mark.parametrize("use", STUDENTS)


def dataset(path: Path, empty: int = 0, full: int = 0) -> Path:
    """So many masks without an object, then so many without a background; the others have both."""
    rng = np.random.default_rng(0)
    masks = np.zeros((SAMPLES, 1, 16, 16), np.uint8)
    masks[:, :, 4:12, 4:12] = 255
    masks[:empty] = 0
    masks[empty : empty + full] = 255
    with DatasetWriter(path) as writer:
        images = rng.integers(0, 256, (SAMPLES, 3, 16, 16), dtype=np.uint8)
        writer.write_split("train", images=images, labels=np.arange(SAMPLES) % 2, masks=masks)
        writer.finish(class_names=["a", "b"])
    return path


def student(data: Path, out: Path, use: str) -> float:
    """Train a student in one of these ways; returns its loss."""
    options = dict(STUDENTS[use])
    cache = None
    if "mask_target" in options:
        train_teacher(data, out / "teacher", debias="none", steps=1, batch_size=16)
        cache = out / "cache.zarr"
        cache_explanations(data, out / "teacher", cache, draws=1, resolution=4 if options.pop("pooled", False) else 1)
    result = train_student(data, cache, out / "student", **options, **TRAIN)
    weights_loss = json.loads((out / "student" / "result.json").read_text())["loss"]
    assert weights_loss == result["loss"]
    return float(result["loss"])


@every_use
def test_masks_without_any_object_are_refused_with_the_option_that_needs_them(tmp_path, use):
    data = dataset(tmp_path / "d.zarr", empty=SAMPLES)
    option = {"background": "augment='background'", "rrr": r"method=erm\+rrr", "isnet": r"method=erm\+isnet"}
    needs = option.get(use, "mask_target=True")
    with pytest.raises(TrainingError, match=f"every mask of the train split of .* is empty.* for {needs}: correct"):
        student(data, tmp_path, use)
    assert not (tmp_path / "student").exists()


@every_use
@pytest.mark.parametrize(("empty", "full"), [(8, 8), (0, SAMPLES), (20, 4), (SAMPLES - 1, 1)])
def test_no_loss_is_nan_with_empty_and_full_masks_and_the_user_is_told(tmp_path, caplog, use, empty, full):
    data = dataset(tmp_path / "d.zarr", empty, full)
    assert math.isfinite(student(data, tmp_path, use))
    told = (
        f"{empty} of {SAMPLES} masks of the train split" if empty else "covers its whole image, so there is no backgr"
    )
    assert told in caplog.text


def test_a_mask_teacher_refuses_masks_without_any_object(tmp_path):
    data = dataset(tmp_path / "d.zarr", empty=SAMPLES)
    with pytest.raises(TrainingError, match=r"every mask .* is empty.* for debias='mask'"):
        train_teacher(data, tmp_path / "t", debias="mask", **TRAIN)
    assert not (tmp_path / "t").exists()


def test_nothing_is_said_of_ordinary_objects(tmp_path, caplog):
    student(dataset(tmp_path / "d.zarr"), tmp_path, "rrr")
    assert "mask" not in caplog.text
