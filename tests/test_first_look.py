"""Stage one says, before a student is trained, whether the maps decide as the teacher does and are stable."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import data
from cli import main
from pipeline import cache_explanations
from pipeline.caching import first_look as module
from teacher_cache import open_cache

SIDE = 12


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """Images of many brightnesses, 80 for training: plain, but for a little noise."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("smooth") / "d.zarr"
    level = rng.integers(20, 230, (80, 1, 1, 1))
    images = (level + rng.integers(-9, 10, (80, 3, SIDE, SIDE))).astype(np.uint8)
    with data.DatasetWriter(path) as writer:
        writer.write_split("train", images=images, labels=(level[:, 0, 0, 0] > 125).astype(np.int64))
        writer.finish(name="smooth", class_names=["dark", "bright"])
    return path


class Linear(nn.Module):
    """A last layer on the pixels."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.last = nn.Linear(3 * SIDE**2, 2, bias=bias is not None)
        with torch.no_grad():
            self.last.weight.copy_(weight)
            if bias is not None:
                self.last.bias.copy_(torch.tensor(bias))

    def forward(self, images):
        return self.last(images.flatten(1))


def even():
    """The weights of a mean: the logits are (−mean, mean) of the image."""
    return torch.ones(2, 3 * SIDE**2) / (3 * SIDE**2) * torch.tensor([[-1.0], [1.0]])


def told(dataset, teacher, out, caplog, **options):
    caplog.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        cache_explanations(dataset, teacher, out, draws=1, device="cpu", **options)
    lines = [record.getMessage() for record in caplog.records if "a first look" in record.getMessage()]
    return lines, [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_maps_whose_sums_are_the_logits_decide_as_the_teacher_and_nothing_is_warned_of(smooth, tmp_path, caplog):
    lines, warnings = told(smooth, Linear(even()), tmp_path / "c", caplog)
    assert len(lines) == 1
    assert "40 of 80 images, at ε = 0.1 and 1" not in lines[0]  # a linear network has no ε: both ends are alike
    assert "40 of 80 images, at ε = 0.1: their sums decide" in lines[0]
    assert "on 100% of the images (correlation with the logits 1.00)" in lines[0]
    assert "agree by 1.00" in lines[0]
    assert warnings == []


def test_maps_of_a_teacher_whose_bias_decides_are_warned_of_in_one_sentence(smooth, tmp_path, caplog):
    teacher = Linear(even(), bias=(0.5, -0.5))  # bright from a mean of 0.5 on, and every sum says bright
    lines, warnings = told(smooth, teacher, tmp_path / "c", caplog)
    (warning,) = warnings
    assert "the maps do not decide as the teacher does" in warning
    for remedy in ("bias_free=True", "explainer"):
        assert remedy in warning
    share = float(lines[0].split(" on ")[1].split("%")[0])
    bright = np.asarray(data.open_dataset(smooth).split("train").images[::2]).mean((1, 2, 3)) > 127.5
    assert share == pytest.approx(100 * bright.mean(), abs=0.5)


def test_maps_that_change_with_a_pixel_are_warned_of(smooth, tmp_path, caplog):
    rough = even() * torch.where(torch.rand(3 * SIDE**2, generator=torch.Generator().manual_seed(0)) > 0.5, 9, -7)
    lines, warnings = told(smooth, Linear(rough), tmp_path / "c", caplog)
    (warning,) = warnings
    assert "shifted by one pixel" in warning
    assert "explainer" in warning
    assert "on 100% of the images" in lines[0]


def test_the_command_says_the_line_and_spells_the_remedies_as_flags(dataset, tmp_path):
    from trainer import train_teacher

    train_teacher(dataset, tmp_path / "t", steps=1, batch_size=4, bias_free=False)
    command = ["cache-explanations", "--data", str(dataset), "--teacher", str(tmp_path / "t"), "--draws", "1"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("a first look at the maps of 60 of 300 images") == 1


def test_a_look_says_nothing_when_a_store_is_resumed_or_finished(smooth, tmp_path, caplog):
    out = tmp_path / "c"
    assert len(told(smooth, Linear(even()), out, caplog)[0]) == 1
    assert told(smooth, Linear(even()), out, caplog)[0] == []  # finished
    open_cache(out, writable=True).uncommit(0)
    assert len(told(smooth, Linear(even()), out, caplog)[0]) == 1  # there is one shard: begun anew


def test_a_look_changes_no_byte_of_the_store(smooth, tmp_path, monkeypatch, caplog):
    told(smooth, Linear(even(), bias=(0.5, -0.5)), tmp_path / "looked", caplog)
    monkeypatch.setattr("pipeline.caching.stage_one.first_look", lambda *_: None)
    assert told(smooth, Linear(even(), bias=(0.5, -0.5)), tmp_path / "not", caplog) == ([], [])
    contents = [
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "looked", tmp_path / "not")
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("explainer", ["attention", "grad-cam"])
def test_coarse_maps_have_neither_number(dataset, teacher, tmp_path, caplog, explainer):
    assert told(dataset, teacher, tmp_path / "c", caplog, explainer=explainer)[0] == []


def test_maps_of_strided_features_have_both_numbers(dataset, teacher, tmp_path, caplog):
    ((line,), _) = told(dataset, teacher, tmp_path / "c", caplog, explainer="flex-stride4", epsilon_range=(0.01, 0.01))
    assert "at ε = 0.01: their sums decide" in line  # a bias-free network's sums do, at any of its layers
    share, correlation = (float(line.split(word)[1].split(end)[0]) for word, end in ((" on ", "%"), ("logits ", ")")))
    assert share > 90
    assert correlation > 0.95
    assert "median cosine" in line


def test_gradients_have_no_sum_that_means_a_logit(dataset, teacher, tmp_path, caplog):
    ((line,), _) = told(dataset, teacher, tmp_path / "c", caplog, explainer="input-gradient")
    assert "sums" not in line
    assert "median cosine" in line


def test_both_ends_of_the_range_are_looked_at_whatever_the_batch_size(dataset, teacher, tmp_path, caplog):
    lines = [told(dataset, teacher, tmp_path / str(size), caplog, batch_size=size)[0] for size in (7, 300)]
    assert lines[0] == lines[1]
    assert "at ε = 0.1 and 1" in lines[0][0]


def test_few_images_are_no_reason_to_warn():
    look = module.FirstLook((0.1,), 9, 9, (0.5,), (0.0,), (0.1,))
    assert look.warnings() == []
    assert len(module.FirstLook((0.1,), 99, 50, (0.5,), (0.0,), (0.1,)).warnings()) == 2
