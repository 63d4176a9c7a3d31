"""What a training that goes wrong promises: it stops, names the step and the samples, and keeps nothing of it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import metrics

import trainer.loop.training
from trainer import TrainingError, train_student
from trainer.loop.distributed import Ranks
from trainer.loop.methods import METHODS
from trainer.loop.step import UNTAUGHT, VANISHED
from trainer.loop.watch import EXPLODED, NAMED, Watch

ADVICE = "choose a smaller lr, a longer warmup or a smaller clip_norm, or check whether these images are damaged"


def watch(weights: dict[str, float] | None = None) -> tuple[Watch, dict]:
    progress = {"first": None}
    return Watch(Ranks(), weights or {"lrp": 1.0}, progress), progress


def add(to: Watch, step: int, losses: list[float], norm: float = 1.0, first_sample: int = 100) -> None:
    samples = torch.arange(first_sample, first_sample + len(losses))
    to.add(step, {"lrp": torch.tensor(losses)}, samples, torch.tensor(norm))


def test_the_last_steps_numbers_are_the_weighted_sum_and_each_of_its_terms():
    observer, progress = watch({"lrp": 2.0, "output": 0.5})
    assert observer.check(None) == {}
    for step, (lrp, output) in enumerate(([9.0, 9.0], [9.0, 9.0]), 1):
        observer.add(step, {"output": torch.tensor([output, 1.0]), "lrp": torch.tensor([lrp, 3.0])}, torch.arange(2),
                     torch.tensor(0.25))  # fmt: skip
    observer.add(
        3, {"output": torch.tensor([4.0, 8.0]), "lrp": torch.tensor([1.0, 2.0])}, torch.arange(2), torch.tensor(7.0)
    )
    assert observer.check(None) == {"loss": 6.0, "gradient_norm": 7.0, "loss_lrp": 1.5, "loss_output": 6.0}
    assert progress == {"first": 2 * 6.0 + 0.5 * 5.0, "living": 1.0, "loss": 6.0}
    assert observer.check(None) == {}


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=20),
    st.data(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e9]),
)
def test_the_worst_samples_are_named_first_and_all_of_them_counted(fine, data, bad):
    row = data.draw(st.integers(0, len(fine)))
    losses = [*fine[:row], bad, *fine[row:]]
    observer, _ = watch()
    add(observer, 1, [1.0] * 3)
    add(observer, 2, losses)
    with pytest.raises(TrainingError) as caught:
        observer.check(None)
    named = str(caught.value).split("of the samples ")[1].split(", the worst first")[0]
    ids = [int(word) for word in named.split(" and ")[0].split(", ")]
    assert ids[0] == 100 + row
    named_losses = [losses[i - 100] for i in ids[1:]]
    assert named_losses == pytest.approx(sorted(fine, reverse=True)[: NAMED - 1], rel=1e-6)
    assert len(ids) == min(NAMED, len(losses))
    assert (f"and {len(losses) - NAMED} more, all in failure.json" in named) == (len(losses) > NAMED)


@pytest.mark.parametrize(
    ("losses", "norm", "words"),
    [
        ([math.nan, 1.0], 1.0, "the loss became nan, from 1 at first, at step 3"),
        ([math.inf, 1.0], 1.0, "the loss became inf, from 1 at first, at step 3"),
        ([1.0, 1.0], math.inf, "the norm of the gradient became inf at step 3"),
        ([1.0, 1.0], math.nan, "the norm of the gradient became nan at step 3"),
        ([2.1 * EXPLODED, 0.0], 1.0, "the loss became 1050, from 1 at first, at step 3"),
    ],
)
def test_what_is_wrong_is_said_with_the_step_and_the_advice_however_late_it_is_looked_at(losses, norm, words):
    observer, _ = watch()
    add(observer, 1, [1.0, 1.0])
    add(observer, 2, [0.9 * EXPLODED, 0.9 * EXPLODED], 1e30)  # much, and not too much
    add(observer, 3, losses, norm, first_sample=40)
    add(observer, 4, [math.nan, math.nan], math.nan, first_sample=70)
    with pytest.raises(TrainingError) as caught:
        observer.check(None)
    assert str(caught.value).startswith(words)
    assert "40" in str(caught.value)
    assert "70" not in str(caught.value)
    assert ADVICE in str(caught.value)


def test_a_first_loss_of_nearly_nothing_may_grow():
    observer, _ = watch()
    add(observer, 1, [0.0])
    add(observer, 2, [0.9])
    assert observer.check(None)["loss"] == pytest.approx(0.9)
    add(observer, 3, [1.1])
    with pytest.raises(TrainingError, match=r"the loss became 1\.1, from 0 at first, at step 3"):
        observer.check(None)


def test_samples_without_a_target_are_no_measure_of_an_explosion():
    """Their loss is 0, whatever the student does: a first batch of them would allow no loss above 1 afterwards."""
    observer, progress = watch()

    def of(step: int, losses: list[float]) -> None:  # a loss of 0 is that of a sample without a target
        untaught = torch.tensor([float(loss == 0) for loss in losses])
        observer.add(step, {"lrp": torch.tensor(losses), UNTAUGHT: untaught}, torch.arange(4), torch.tensor(1.0))
        observer.check(None)

    of(1, [0.0, 0.0, 0.0, 0.0])
    assert progress["first"] is None
    of(2, [0.0, 0.0, 0.0, 2.0])
    assert progress["first"] == 2
    of(3, [0.0, 0.0, 0.0, 0.0])
    of(4, [0.9 * 2 * EXPLODED] * 4)
    with pytest.raises(TrainingError, match="the loss became 550, from 2 at first, at step 5"):
        of(5, [1.1 * 2 * EXPLODED, 0.0, 0.0, 0.0])


def test_a_loss_that_is_no_number_ends_a_training_before_anything_was_taught(tmp_path):
    observer, _ = watch()
    nothing = {"lrp": torch.zeros(4), UNTAUGHT: torch.ones(4)}
    observer.add(1, nothing, torch.arange(4), torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="the norm of the gradient became nan at step 1"):
        observer.check(None)
    observer.add(2, {**nothing, "lrp": torch.full((4,), math.nan)}, torch.arange(4), torch.tensor(1.0))
    with pytest.raises(TrainingError, match="the loss became nan, at step 2"):
        observer.check(None)


def test_a_sample_whose_map_has_vanished_does_not_end_a_training_and_is_told_once(caplog):
    """The loss of a map of zeros is 6e6: in a batch of 100 the mean is 60,000 times the others'."""
    observer, progress = watch()
    dead = torch.zeros(100)
    dead[7] = 1
    for step in (1, 2):
        losses = torch.where(dead > 0, 6e6, 1.0)
        observer.add(step, {"lrp": losses, VANISHED: dead}, torch.arange(100), torch.tensor(1.0))
    assert observer.check(None)["loss"] == pytest.approx(60_001, rel=1e-3)
    assert progress["first"] == pytest.approx(1)
    assert "step 1: the student's heatmaps of 1 samples are zero (among them 7)" in caplog.text
    observer.add(3, {"lrp": losses, VANISHED: dead}, torch.arange(100), torch.tensor(1.0))
    observer.check(None)
    assert len(caplog.messages) == 1
    observer.add(4, {"lrp": torch.full((100,), 1.1 * EXPLODED), VANISHED: dead}, torch.arange(100), torch.tensor(1.0))
    with pytest.raises(TrainingError, match="the loss became 1100, from 1 at first, at step 4"):
        observer.check(None)


def test_a_student_whose_maps_have_all_vanished_ends_the_training():
    observer, _ = watch()
    add(observer, 1, [1.0, 1.0])
    observer.add(2, {"lrp": torch.full((2,), 6e6), VANISHED: torch.ones(2)}, torch.arange(2), torch.tensor(1.0))
    with pytest.raises(TrainingError, match=r"heatmaps of 100% of the samples became zero .* at step 2"):
        observer.check(None)


def test_a_student_that_begins_with_half_of_its_maps_goes_on_until_half_of_those_have_vanished(caplog):
    observer, progress = watch()

    def of(step: int, living: int) -> None:
        dead = (torch.arange(100) >= living).float()
        observer.add(step, {"lrp": dead * 6e6 + 1, VANISHED: dead}, torch.arange(100), torch.tensor(1.0))
        observer.check(None)

    of(1, 52)
    of(2, 48)
    of(3, 27)
    assert progress["first"] == pytest.approx(1)
    assert "heatmaps of 48 samples are zero" in caplog.text
    assert "with so many, the network may be made for larger images" in caplog.text
    with pytest.raises(TrainingError, match=r"heatmaps of 74% of the samples became zero .* at step 4"):
        of(4, 26)


def test_the_first_loss_is_that_of_the_living_samples():
    """Else one dead sample at the start would allow any loss afterwards."""
    observer, _ = watch()
    dead = torch.tensor([1.0, 0.0, 0.0])
    observer.add(1, {"lrp": torch.tensor([6e6, 1.0, 1.0]), VANISHED: dead}, torch.arange(3), torch.tensor(1.0))
    add(observer, 2, [5000.0] * 3)
    with pytest.raises(TrainingError, match="from 1 at first, at step 2"):
        observer.check(None)


class Dim(torch.nn.Module):
    """A student whose ReLUs are all closed for dark images, and whose maps of them are zero."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Linear(8, classes)
        torch.nn.init.uniform_(self.conv.weight, 0.1, 0.3)

    def forward(self, x):
        return self.head((self.conv(x) - 0.5).relu().mean((2, 3)))


def test_a_training_with_one_dark_image_goes_on_by_plain_lrp(dataset, cache, tmp_path, monkeypatch, caplog):
    module = types.ModuleType("dim_student")
    module.build = lambda num_classes: Dim(num_classes)
    monkeypatch.setitem(sys.modules, "dim_student", module)
    real = trainer.loop.training.on_device

    def on_device(batch, *arguments):
        fields = real(batch, *arguments)
        if "sample" in batch:
            fields["images"][batch["sample"] == 5] *= 0.01
        return fields

    monkeypatch.setattr(trainer.loop.training, "on_device", on_device)
    options = {"steps": 24, "batch_size": BATCH, "log_steps": 1, "lr": 1e-4, "student_factory": "dim_student:build"}
    train_student(dataset, cache, tmp_path / "s", bias_free=False, **options)
    losses = [line["loss"] for line in metrics(tmp_path / "s")]
    assert max(losses) > EXPLODED * losses[0]
    assert sum(loss > EXPLODED for loss in losses) == 2  # once in each of two epochs
    assert "heatmaps of 1 samples are zero (among them 5)" in caplog.text


# in a training

WRONG = {
    "a loss that is NaN": lambda losses, row: torch.where(row, math.nan, losses),
    "an infinite loss": lambda losses, row: torch.where(row, math.inf, losses),
    "an exploding loss": lambda losses, row: torch.where(row, 1e7 * losses, losses),
    "an infinite gradient": lambda losses, row: torch.where(row, _Infinite.apply(losses), losses),
}


class _Infinite(torch.autograd.Function):
    """The same values, and an infinite gradient."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


STEP, BATCH = 6, 25


@pytest.fixture
def spoil(monkeypatch):
    """At STEP the loss of one sample of its batch goes a WRONG way; gives the steps' samples, as they were shown."""

    def arrange(name, what):
        shown: list[list[int]] = []
        real_device, real = trainer.loop.training.on_device, METHODS[name].loss

        def on_device(batch, *arguments):
            if "sample" in batch:  # not where the network is tried out
                shown.append(batch["sample"].tolist())
            return real_device(batch, *arguments)

        def loss(forward, target, compare):
            losses = real(forward, target, compare)
            row = torch.zeros(len(losses), dtype=torch.bool)
            if len(losses) == BATCH:  # not one, with which the network is tried out
                row[17] = len(shown) == STEP
            return WRONG[what](losses, row) if row.any() else losses

        monkeypatch.setattr(trainer.loop.training, "on_device", on_device)
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], loss=loss))
        return shown

    return arrange


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", ["lrp", "erm"])
def test_a_training_stops_at_the_sample_that_spoils_it_and_keeps_nothing_of_that(
    dataset, cache, tmp_path, spoil, name, what
):
    """Though it is looked at every 9 steps: what comes after the bad step is neither blamed nor kept."""
    shown = spoil(name, what)
    options = {"steps": 20, "batch_size": BATCH, "log_steps": 9, "checkpoint_steps": 4, "method": name}
    with pytest.raises(TrainingError, match=rf"at step {STEP}, in a batch of the samples") as caught:
        train_student(dataset, None if name == "erm" else cache, tmp_path / "s", **options)
    assert STEP <= len(shown) <= 9
    failure = json.loads((tmp_path / "s" / "failure.json").read_text())
    batch = shown[STEP - 1]
    assert (failure["step"], sorted(failure["samples"])) == (STEP, sorted(batch))
    assert len(failure["losses"]) == BATCH
    named = str(caught.value).split("of the samples ")[1]
    assert named.startswith(", ".join(map(str, failure["samples"][:NAMED])) + f" and {BATCH - NAMED} more, all in")
    if what == "an infinite gradient":
        assert failure["gradient_norm"] in (math.inf, -math.inf) or math.isnan(failure["gradient_norm"])
        assert failure["losses"] == sorted(failure["losses"], reverse=True)
    else:
        assert failure["samples"][0] == batch[17]
    assert ADVICE in str(caught.value)
    assert [path.name for path in (tmp_path / "s" / "checkpoints").iterdir()] == ["step-000000004.pt"]
    assert metrics(tmp_path / "s") == []
    assert not {"result.json", "weights.pt"} & {path.name for path in (tmp_path / "s").iterdir()}


def test_a_training_that_failed_goes_on_from_before_the_failure_and_forgets_it(dataset, cache, tmp_path, monkeypatch):
    options = {"steps": 8, "batch_size": BATCH, "log_steps": 2, "checkpoint_steps": 2}
    with monkeypatch.context() as patched:
        shown: list[int] = []
        real = METHODS["lrp"].loss

        def loss(forward, target, compare):
            shown.append(1)
            losses = real(forward, target, compare)
            return losses * (math.nan if len(shown) == 6 else 1)  # the first tries the network out: step 5

        patched.setitem(METHODS, "lrp", dataclasses.replace(METHODS["lrp"], loss=loss))
        with pytest.raises(TrainingError, match="at step 5"):
            train_student(dataset, cache, tmp_path / "s", **options)
    assert (tmp_path / "s" / "failure.json").exists()
    train_student(dataset, cache, tmp_path / "s", **options)
    assert not (tmp_path / "s" / "failure.json").exists()
    assert [line["step"] for line in metrics(tmp_path / "s")] == [2, 4, 6, 8]
    starts = [json.loads(line)["step"] for line in (tmp_path / "s" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 4]
