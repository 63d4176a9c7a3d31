"""Whether a student uses the background is told by its answers before random ones, and decides how many it is shown."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer.loop.step
import trainer.loop.training
from data import DatasetWriter
from pipeline import Classifier, cache_explanations, load_classifier
from trainer import train_student, train_teacher
from trainer.loop.immunity import background_warning, same_answers, share_to_repaint
from trainer.loop.repainting import REPAINTED, repaint
from trainer.settings import Settings
from trainer.stream.stream import Source


class Ground(nn.Module):
    """Says the class that the pixel in the corner is, or, for the object, the one in the middle."""

    def __init__(self, place: tuple[int, int]):
        super().__init__()
        self.place = place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = (255 * images).round().long()[:, 0, self.place[0], self.place[1]]
        return nn.functional.one_hot(values.clamp(0, 2), 3).float()


def test_a_student_that_uses_the_background_does_not_say_the_same_before_others():
    classes = np.random.default_rng(0).integers(0, 3, 200)
    images, masks = np.zeros((200, 1, 5, 5), np.uint8), np.zeros((200, 1, 5, 5), np.uint8)
    images[:] = classes[:, None, None, None]
    masks[:, :, 2, 2] = 255
    fields = {"images": images, "masks": masks, "teacher_logits": np.eye(3, dtype=np.float32)[classes]}

    def read(block: int, out: dict[str, np.ndarray]) -> None:
        for name, values in fields.items():
            out[name][...] = values[50 * block : 50 * block + 50]

    source = Source(200, 50, {name: (values.shape[1:], values.dtype) for name, values in fields.items()}, read)
    settings = Settings(loss={"output": 1.0}, steps=1, batch_size=32)
    found = {}
    for name, place in (("object", (2, 2)), ("background", (0, 0))):
        student = Classifier(Ground(place))
        found[name] = same_answers(student, source, settings, torch.device("cpu"), nullcontext)
    assert found["object"] == {"samples": 200, "as_they_are": 100.0, "other_backgrounds": 100.0}
    assert background_warning(found["object"], settings) is None
    leak = found["background"]
    assert (leak["samples"], leak["as_they_are"]) == (200, 100.0)
    assert leak["other_backgrounds"] < 60
    warning = background_warning(leak, settings)
    assert f"{leak['other_backgrounds']:.1f} % of 200 training images, and on 100.0 % of them as they are" in str(
        warning
    )
    assert "augment='background'" in str(warning)
    repainted = Settings(loss={"output": 1.0}, steps=1, augment=("background",))
    assert background_warning(leak, repainted) is None


def agreement(as_they_are: float, other_backgrounds: float) -> dict[str, Any]:
    return {"samples": 500, "as_they_are": as_they_are, "other_backgrounds": other_backgrounds}


@pytest.mark.parametrize(
    ("as_they_are", "other_backgrounds", "share"),
    [(20, 15, 0.25), (85, 75, 0.25), (90.6, 88.9, 0.25), (99, 80, 0.5), (99.8, 90, 0.5), (99.8, 98, 0.25)],
    ids=["knows nothing yet", "learns both", "has learnt both", "uses it", "uses it a little", "immune"],
)
def test_half_of_the_images_are_repainted_where_others_are_known_as_they_are_alone(
    as_they_are, other_backgrounds, share
):
    assert share_to_repaint(agreement(as_they_are, other_backgrounds)) == share


@pytest.fixture
def scenes(tmp_path) -> tuple[Path, Path]:
    """A dataset with masks, and the store of a teacher that sees nothing outside of them."""
    masks = np.zeros((24, 1, 16, 16), np.uint8)
    masks[:, :, 4:12, 4:12] = 255
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    data, cache = tmp_path / "data.zarr", tmp_path / "cache.zarr"
    with DatasetWriter(data) as writer:
        writer.write_split("train", images=images, labels=np.arange(24) % 2, masks=masks)
        writer.finish(name="scenes", class_names=["one", "two"])
    train_teacher(data, tmp_path / "teacher", debias="mask", steps=2, batch_size=8)
    cache_explanations(data, tmp_path / "teacher", cache, draws=1)
    return data, cache


def test_the_share_rises_once_is_written_down_and_goes_on_after_an_interruption(scenes, tmp_path, monkeypatch, caplog):
    run, shares = tmp_path / "student", {}
    found, broken = agreement(99, 80), [True]

    def painted(images: torch.Tensor, masks: torch.Tensor, *, step: int, share: float, **at: int) -> torch.Tensor:
        if step == 90 and broken.pop():
            raise OSError("the power fails")
        shares[step] = share
        return repaint(images, masks, step=step, share=share, **at)

    monkeypatch.setattr(trainer.loop.step, "repaint", painted)
    monkeypatch.setattr(trainer.loop.training, "same_answers", lambda *_: found)
    options = {"method": "output", "steps": 100, "batch_size": 8, "checkpoint_steps": 40, "log_steps": 20}
    with caplog.at_level("INFO", logger="trainer"), pytest.raises(OSError, match="power"):
        train_student(*scenes, run, **options)
    assert "from step 20 on, 50% of the images get another background" in caplog.text
    found, broken[:] = agreement(99, 98), [False]
    with caplog.at_level("INFO", logger="trainer"):
        train_student(*scenes, run, **options)
    assert caplog.text.count("% of the images get another background") == 1
    assert [shares[step] for step in range(100)] == [REPAINTED] * 20 + [0.5] * 80
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = {line["step"]: line["repainted"] for line in lines if "repainted" in line}
    assert chosen == dict.fromkeys(range(20, 100, 20), 0.5)


def test_to_ask_the_student_in_the_course_of_its_training_changes_nothing_else(scenes, tmp_path, monkeypatch):
    options = {"method": "output", "steps": 100, "batch_size": 8}
    options |= {"arch": "small-resnet", "arch_options": {"width": 8, "depth": 1}, "bias_free": False}
    weights = []
    for name in ("asked", "left alone"):
        train_student(*scenes, tmp_path / name, **options)
        weights.append(load_classifier(tmp_path / name)[0].state_dict())
        monkeypatch.setattr(trainer.loop.training, "_choose_repainted", lambda *_: None)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
