"""What trainings on unbalanced data promise: weights of the classes, a validation split, and a note."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import trainer.loop.training
from cli import main
from data import DatasetWriter, open_dataset
from pipeline import cache_explanations, load_classifier
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_student, train_teacher
from trainer.loop.class_weights import class_weights
from trainer.loop.interruption import TrainingInterrupted
from trainer.loop.step import forward_backward, losses_of, on_device
from trainer.settings import Settings

NAMES = ("good", "crack", "dent")
COUNTS = (80, 10, 20)


def write(path, counts=COUNTS, splits=("train", "validation", "ood"), masks=("train", "validation", "ood")):
    """Noise in which a faint square tells the class; the classes have these numbers of samples in each split."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for split in splits:
            labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
            images = rng.integers(0, 256, (len(labels), 3, 12, 12)).astype(np.uint8)
            for row, label in enumerate(labels):
                images[row, label, 3:9, 3:9] = 220
            arrays = {"masks": np.ones((len(labels), 1, 12, 12), np.uint8)} if split in masks else {}
            writer.write_split(split, images=images, labels=labels, **arrays)
        writer.finish(name="parts", class_names=list(NAMES[: len(counts)]))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("parts") / "d")


def train(data, out, **options):
    options = {"steps": 4, "batch_size": 30, "debias": "none", "arch_options": {"width": 4}, **options}
    return train_teacher(data, out, **options)


def config_of(run) -> dict:
    return json.loads((run / "config.json").read_text())["training"]


def weights_of(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "weights.pt", weights_only=True)


# --- students ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(parts, tmp_path_factory):
    """The store of a teacher whose answers are not the labels."""
    folder = tmp_path_factory.mktemp("explained")
    train(parts, folder / "t", steps=30, class_weights="3,1,2")
    cache_explanations(parts, folder / "t", folder / "c.zarr", draws=2, device="cpu")
    return folder / "c.zarr"


def student(data, store, out, **options):
    return train_student(data, store, out, **{"steps": 3, "batch_size": 16, "arch_options": {"width": 4}, **options})


def answers_of(store) -> np.ndarray:
    cache = open_cache(store)
    return np.concatenate([cache.read_shard(shard).teacher_logits.argmax(1) for shard in range(cache.info.shards)])


def test_a_student_balances_the_answers_of_its_teacher_and_not_the_labels(parts, explained, tmp_path):
    answers = answers_of(explained)
    assert (answers != open_dataset(parts).split("train").labels[:]).any()
    student(parts, explained, tmp_path / "s", class_weights="balanced")
    assert config_of(tmp_path / "s")["class_weights"] == pytest.approx(class_weights("balanced", answers, NAMES))


@pytest.mark.parametrize("method", ["lrp", "complete-lrp", "output"])
def test_weights_of_ones_change_no_student_and_others_do(parts, explained, tmp_path, method):
    for name, option in (("none", None), ("ones", "1,1,1"), ("others", "1,9,3")):
        student(parts, explained, tmp_path / name, method=method, class_weights=option)
    none, ones, others = (weights_of(tmp_path / name) for name in ("none", "ones", "others"))
    assert all(torch.equal(none[key], ones[key]) for key in none)
    assert not all(torch.equal(none[key], others[key]) for key in none)
    assert "class_weights" not in config_of(tmp_path / "none"), "the record is that of earlier versions"


def test_a_student_without_a_store_balances_the_labels(parts, tmp_path):
    student(parts, None, tmp_path / "s", method="erm", class_weights="balanced")
    assert config_of(tmp_path / "s")["class_weights"] == pytest.approx([110 / (3 * n) for n in COUNTS])


def test_a_sample_of_a_store_has_the_weight_of_its_teachers_answer():
    batch = {
        "images": torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
        "labels": torch.tensor([0, 0, 0]),
        "teacher_logits": torch.tensor([[0.0, 1, 2], [0, 2, 1], [2, 1, 0]]),
    }
    settings = Settings(loss={"output": 1.0}, steps=1, class_weights=(0.5, 3.0, 1.25))
    assert on_device(batch, None, settings, torch.device("cpu"))["class_weights"].tolist() == [1.25, 3.0, 0.5]


@pytest.mark.parametrize("option", ["auto", "1,2"])
def test_wrong_weights_of_a_student_are_refused_before_anything_is_read_or_written(
    parts, explained, tmp_path, monkeypatch, option
):
    monkeypatch.setattr("trainer.distill._answers", lambda *_: pytest.fail("the answers were read"))
    with pytest.raises(TrainingError, match="class_weights="):
        student(parts, explained, tmp_path / "s", class_weights=option)
    assert not (tmp_path / "s").exists()


# --- the weights ------------------------------------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(3), COUNTS)
    expected = [len(labels) / (3 * samples) for samples in COUNTS]  # compute_class_weight("balanced", …)
    for option in ("balanced", ("balanced",)):
        assert class_weights(option, labels, NAMES) == pytest.approx(expected)


def test_a_class_without_training_samples_does_not_change_the_weights_of_the_others():
    labels = np.repeat([0, 2], [30, 10])
    assert class_weights("balanced", labels, NAMES) == pytest.approx([40 / 60, 1, 40 / 20])


@pytest.mark.parametrize("option", ["1,8,4", " 2, 16 ,8", (1, 8, 4), ("1", "8", "4"), [0.5, 4.0, 2.0]])
def test_numbers_count_by_their_ratio_and_have_the_mean_1_over_the_training_samples(option):
    labels = np.repeat(np.arange(3), COUNTS)
    weights = np.array(class_weights(option, labels, NAMES))
    assert weights / weights[0] == pytest.approx([1, 8, 4])
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize("option", [None, "none", ("none",)])
def test_no_weights_are_none(option):
    assert class_weights(option, np.array([0, 1]), NAMES[:2]) is None


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("auto", "class_weights='auto' is neither none nor balanced nor a positive number"),
        ("1,2", "has 2 weights, and the dataset has 3 classes.*good, crack, dent, in this order"),
        ("1,0,2", "positive number"),
        ("1,-1,2", "positive number"),
        ("1,nan,2", "positive number"),
        ("1,inf,2", "positive number"),
        ("balanced,1,2", "positive number"),
        ("1,,2", "positive number"),
    ],
)
def test_other_weights_are_refused_before_anything_is_written(parts, tmp_path, option, error):
    with pytest.raises(TrainingError, match=error):
        train(parts, tmp_path / "t", class_weights=option)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_loss_of_a_sample_is_its_cross_entropy_times_the_weight_of_its_class(precision, monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.int16)
    weights = (0.5, 3.0, 1.25)
    batch = {"images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8), "labels": labels}
    settings = Settings(loss={"erm": 1.0}, steps=1, class_weights=weights, precision=precision)
    target = on_device(batch, None, settings, torch.device("cpu"))
    assert target["class_weights"].dtype == getattr(torch, precision)
    forward = type("Forward", (), {"logits": logits.to(getattr(torch, precision))})
    monkeypatch.setattr("trainer.loop.step.forward_of", lambda *_: forward)
    losses = losses_of(None, target, None, settings)["erm"]
    weight = torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels.long(), weight=weight, reduction="none")
    assert torch.allclose(losses.double(), expected)


def test_weights_reach_the_training_and_its_record_and_ones_change_nothing(parts, tmp_path):
    for name, option in (("none", None), ("ones", "1,1,1"), ("balanced", "balanced")):
        train(parts, tmp_path / name, class_weights=option)
    none, ones, balanced = (weights_of(tmp_path / name) for name in ("none", "ones", "balanced"))
    assert all(torch.equal(none[key], ones[key]) for key in none)
    assert not all(torch.equal(none[key], balanced[key]) for key in none)
    assert "class_weights" not in config_of(tmp_path / "none"), "the record is that of earlier versions"
    assert config_of(tmp_path / "balanced")["class_weights"] == pytest.approx([110 / (3 * n) for n in COUNTS])


def test_parts_of_a_batch_have_the_weights_of_their_own_samples(parts, tmp_path):
    train(parts, tmp_path / "t")
    split, gradients = open_dataset(parts).split("train"), []
    batch = {"images": torch.from_numpy(split.images[:30]), "labels": torch.from_numpy(split.labels[:30])}
    for accumulate in (1, 4):
        model, _ = load_classifier(tmp_path / "t")  # in evaluation mode, so that norms do not see the parts
        settings = Settings(
            loss={"erm": 1.0}, steps=1, accumulate=accumulate, class_weights=(0.5, 4.0, 2.0), precision="float64"
        )
        inputs = on_device(batch, None, settings, torch.device("cpu"))
        forward_backward(model.double(), None, settings, nullcontext, inputs)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-9)


def test_balanced_weights_find_the_rare_class_that_a_plain_teacher_neglects(tmp_path):
    data = write(tmp_path / "d", counts=(190, 10))
    recalls = []
    for name in ("none", "balanced"):
        train(data, tmp_path / name, class_weights=name, steps=20, batch_size=100)
        score = evaluate(data, tmp_path / name, device="cpu")["splits"]["ood"]
        recalls.append(score["classes"][1]["accuracy"])
    assert recalls[1] > recalls[0] + 20


def test_the_command_takes_weights_and_its_config_repeats_the_training(parts, tmp_path):
    command = ["train-teacher", "--data", str(parts), "--debias", "none", "--arch-option", "width=4", "--steps", "3"]
    for name, options in (("a", ["--class-weights", "1,2,4.5"]), ("b", ["--class-weights", "balanced"])):
        first = CliRunner().invoke(main, [*command, *options, "--out", str(tmp_path / name)])
        assert first.exit_code == 0, first.output
        config = tmp_path / name / "config.yaml"
        again = CliRunner().invoke(
            main, ["train-teacher", "--config", str(config), "--out", str(tmp_path / f"{name}2")]
        )
        assert again.exit_code == 0, again.output
        assert config_of(tmp_path / name) == config_of(tmp_path / f"{name}2")


# --- the note ---------------------------------------------------------------------------------------------------------


def notes(caplog) -> list[str]:
    return [text for record in caplog.records if "split is unbalanced" in (text := record.getMessage())]


def test_unbalanced_data_without_weights_is_said_once_with_the_remedy(parts, tmp_path, caplog):
    train(parts, tmp_path / "t")
    (note,) = notes(caplog)
    assert "80 samples of 'good', 10 of 'crack'" in note
    assert "class_weights='balanced'" in note


@pytest.mark.parametrize("option", ["none", "balanced", "1,1,1"])
def test_who_chose_weights_is_told_nothing(parts, tmp_path, caplog, option):
    train(parts, tmp_path / "t", class_weights=option)
    assert notes(caplog) == []


def test_data_with_at_most_twice_the_samples_are_balanced(tmp_path, caplog):
    train(write(tmp_path / "d", counts=(40, 20, 30)), tmp_path / "t")
    assert notes(caplog) == []


def test_the_note_of_the_command_names_its_flag(parts, tmp_path):
    options = ["--data", str(parts), "--debias", "none", "--arch-option", "width=4", "--steps", "2"]
    told = CliRunner().invoke(main, ["train-teacher", *options, "--out", str(tmp_path / "t")])
    assert told.output.count("--class-weights balanced") == 1


# --- the validation split ---------------------------------------------------------------------------------------------


def test_the_teachers_weights_with_the_lowest_validation_loss_are_kept_and_printed(parts, tmp_path, monkeypatch):
    losses, kept = iter([0.5, 0.3, 0.4, 0.9, 0.8]), {}

    def fake(model, *_):
        loss = next(losses)
        kept[loss] = {name: value.clone() for name, value in model.state_dict().items()}
        return loss

    monkeypatch.setattr(trainer.loop.training, "validate", fake)
    options = ["--data", str(parts), "--debias", "none", "--arch-option", "width=4", "--steps", "10", "--validation"]
    done = CliRunner().invoke(main, ["train-teacher", *options, "--out", str(tmp_path / "t")])
    assert done.exit_code == 0, done.output
    assert "weights of step 4 kept, validation loss 0.3000" in done.output
    result = json.loads((tmp_path / "t" / "result.json").read_text())
    assert (result["validation_loss"], result["kept_step"]) == (0.3, 4)
    saved = weights_of(tmp_path / "t")
    assert all(torch.equal(saved[name], kept[0.3][name]) for name in saved)
    lines = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == [0.5, 0.3, 0.4, 0.9, 0.8]


@pytest.mark.parametrize("debias", ["none", "mask"])
def test_a_teachers_validation_loss_is_its_weighted_cross_entropy_on_the_validation_split(parts, tmp_path, debias):
    result = train(parts, tmp_path / "t", debias=debias, validation=True, class_weights="balanced", steps=1)
    model, _ = load_classifier(tmp_path / "t")
    split = open_dataset(parts).split("validation")
    images, masks = torch.from_numpy(split.images[:]) / 255, torch.from_numpy(split.masks[:]).float()
    weight = torch.tensor(config_of(tmp_path / "t")["class_weights"])
    with torch.no_grad():
        losses = F.cross_entropy(
            model.eval()(images, masks), torch.from_numpy(split.labels[:]).long(), weight=weight, reduction="none"
        )
    assert result["validation_loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_without_validation_the_last_weights_are_kept_and_no_other_split_is_read(parts, tmp_path):
    assert train(parts, tmp_path / "t")["validation_loss"] is None
    assert "validation" not in config_of(tmp_path / "t")
    only_train = write(tmp_path / "d", splits=("train",))
    train(only_train, tmp_path / "u")


def test_an_interrupted_teacher_with_validation_and_weights_ends_like_an_uninterrupted_one(
    parts, tmp_path, monkeypatch
):
    options = {"validation": True, "class_weights": "balanced", "steps": 10}
    train(parts, tmp_path / "whole", **options)
    keep = trainer.loop.training.keep

    def interrupt(state, loop):
        keep(state, loop)
        if state.progress["step"] == 5:
            raise TrainingInterrupted("stop", 15)

    monkeypatch.setattr(trainer.loop.training, "keep", interrupt)
    with pytest.raises(TrainingInterrupted):
        train(parts, tmp_path / "parts", checkpoint_steps=1, **options)
    monkeypatch.undo()
    train(parts, tmp_path / "parts", **options)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_validation_needs_a_split_and_the_masks_of_the_front(tmp_path):
    data = write(tmp_path / "d", splits=("train",))
    with pytest.raises(TrainingError, match="validation=True needs a split 'validation'"):
        train(data, tmp_path / "t", validation=True)
    data = write(tmp_path / "e", masks=("train",))
    with pytest.raises(TrainingError, match="needs 'masks' in the validation split"):
        train(data, tmp_path / "t", validation=True, debias="mask")
    train(data, tmp_path / "u", validation=True, debias="none")
