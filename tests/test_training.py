"""What training, evaluation and saved models promise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import trainer.training
from data import make_coloured_mnist, open_dataset
from pipeline import ModelError, cache_explanations, load_classifier
from teacher_cache import CacheError, open_cache
from trainer import TrainingError, evaluate, train_student, train_teacher
from trainer.distributed import Ranks
from trainer.evaluation import predict, wilson_interval
from trainer.settings import Settings
from trainer.stream import explained_source


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "weights.pt", weights_only=True)


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_student_learns_from_the_two_stores_when_the_teacher_is_gone(dataset, teacher, cache, tmp_path):
    untrained = train_student(dataset, cache, tmp_path / "untrained", steps=1, lr=1e-12, batch_size=300)["loss"]
    moved = tmp_path / "no-teacher-here"
    teacher.rename(moved)
    try:
        result = train_student(dataset, cache, tmp_path / "s", steps=30, batch_size=64)
    finally:
        moved.rename(teacher)
    assert result["loss"] < 0.7 * untrained
    assert result["kept_step"] == 30
    assert [line["step"] for line in metrics(tmp_path / "s")] == [20, 30]


def test_a_student_sees_neither_labels_nor_outputs(dataset, cache, tmp_path):
    """With every label and stored logit changed the same weights come out."""
    blind_data, blind_cache = tmp_path / "blind.zarr", tmp_path / "blind-cache.zarr"
    shutil.copytree(dataset, blind_data)
    shutil.copytree(cache, blind_cache)
    import zarr

    train = zarr.open_group(str(blind_data), mode="r+")["train"]
    train["labels"][:] = 0
    del train.attrs["fingerprint"]  # changed on purpose
    fingerprint = open_dataset(blind_data).split("train").fingerprint
    root = zarr.open_group(str(blind_cache), mode="r+")
    root.attrs["dataset"] = {**root.attrs["dataset"], "fingerprint": fingerprint}
    store = open_cache(blind_cache, writable=True)
    shard = open_cache(cache).read_shard(0)  # the copy's own is refused, as it was committed for another fingerprint
    # the maps as they are stored would be rounded a second time: write what rounds to the same
    store.write_shard(0, type(shard)(shard.heatmaps, shard.target_class, shard.epsilon, shard.teacher_logits * 0 + 7))
    for name, data, path in (("a", dataset, cache), ("b", blind_data, blind_cache)):
        train_student(data, path, tmp_path / name, steps=5, batch_size=64)
    for name, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(value, weights(tmp_path / "b")[name], rtol=1e-3, atol=1e-5)


def test_the_teachers_last_layer_is_copied_and_stays_as_it_was(dataset, teacher, cache, tmp_path):
    train_student(dataset, cache, tmp_path / "s", steps=3, batch_size=64)
    assert torch.equal(weights(tmp_path / "s")["network.head.weight"], weights(teacher)["network.head.weight"])


def test_a_student_of_another_width_gets_an_adapter_before_the_frozen_layer(dataset, teacher, cache, tmp_path):
    train_student(dataset, cache, tmp_path / "s", arch="resnet18", steps=2, batch_size=16)
    student, config = load_classifier(tmp_path / "s")
    adapter, frozen = student.network.fc
    assert adapter.weight.shape == (1152, 512)
    assert adapter.bias is None
    assert config.bias_free
    assert torch.equal(frozen.weight, load_classifier(teacher)[0].network.head.weight)
    assert student(torch.rand(2, 3, 28, 28)).shape == (2, 10)


def test_a_convolution_at_the_end_gives_its_values_to_a_linear_layer_and_takes_those_of_one(dataset, cache, tmp_path):
    train_teacher(dataset, tmp_path / "t", arch="squeezenet1_1", steps=1, batch_size=8)
    cache_explanations(dataset, tmp_path / "t", tmp_path / "c.zarr", draws=1)
    train_student(dataset, tmp_path / "c.zarr", tmp_path / "linear", steps=2, batch_size=32)
    head = open_cache(tmp_path / "c.zarr").head
    assert head["weight"].shape == (10, 512)
    assert all(np.array_equal(weights(tmp_path / "linear")[f"network.head.1.{key}"], head[key]) for key in head)

    train_student(dataset, cache, tmp_path / "conv", arch="squeezenet1_1", steps=2, batch_size=8)
    found = weights(tmp_path / "conv")["network.classifier.1.1.weight"]
    assert np.array_equal(found.flatten(1), open_cache(cache).head["weight"])


def test_a_student_starts_away_from_its_teacher_even_with_the_same_seed(dataset, cache, tmp_path):
    train_teacher(dataset, tmp_path / "t", steps=1, lr=1e-12, batch_size=8, seed=0)
    train_student(dataset, cache, tmp_path / "s", steps=1, lr=1e-12, batch_size=8, seed=0)
    ours, theirs = weights(tmp_path / "s"), weights(tmp_path / "t")
    assert not torch.allclose(ours["network.conv1.weight"], theirs["network.conv1.weight"], atol=1e-3)


def test_the_weights_with_the_lowest_validation_loss_are_kept(dataset, cache, validation_cache, tmp_path, monkeypatch):
    losses = iter([0.9, 0.3, 0.5, 0.7, 0.8])
    states = []

    def fake(model, *_):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(trainer.training, "validate", fake)
    result = train_student(dataset, cache, tmp_path / "s", validation_cache=validation_cache, steps=10, batch_size=32)
    assert result["kept_step"] == 4
    assert result["validation_loss"] == 0.3
    assert all(torch.equal(value, states[1][name]) for name, value in weights(tmp_path / "s").items())


def test_the_validation_loss_is_the_mean_over_the_validation_split(dataset, cache, validation_cache, tmp_path):
    result = train_student(dataset, cache, tmp_path / "s", validation_cache=validation_cache, steps=5, batch_size=70)
    student, _ = load_classifier(tmp_path / "s")
    store = open_cache(validation_cache)
    source = explained_source(open_dataset(dataset).split("validation"), store)
    settings = Settings(loss={"lrp": 1.0}, steps=1, batch_size=33)
    found = trainer.training.validate(student, source, store.info, settings, torch.device("cpu"), Ranks())
    assert abs(found - result["validation_loss"]) < 1e-4


def test_the_same_seed_gives_the_same_weights(dataset, cache, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_student(dataset, cache, tmp_path / name, steps=3, batch_size=32, seed=seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not torch.equal(a["network.conv1.weight"], c["network.conv1.weight"])


def test_threads_and_memory_change_speed_and_nothing_else(dataset, cache, tmp_path):
    for name, options in (("a", {"workers": 1, "memory_budget": 0}), ("b", {"workers": 3})):
        train_teacher(dataset, tmp_path / f"t{name}", steps=3, batch_size=128, **options)
        result = train_student(dataset, cache, tmp_path / f"s{name}", steps=3, batch_size=128, **options)
        assert 0 < result["seconds_waiting"] < result["seconds"]
    for kind in "ts":
        ours, theirs = weights(tmp_path / f"{kind}a"), weights(tmp_path / f"{kind}b")
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_training_runs_on_every_device(dataset, cache, tmp_path, device):
    train_student(dataset, cache, tmp_path / "s", steps=2, batch_size=32, device=device)
    assert evaluate(dataset, tmp_path / "s", device=device)["splits"]["ood"]["samples"] == 300


def test_a_store_that_does_not_belong_is_refused(dataset, teacher, cache, validation_cache, tmp_path):
    out = tmp_path / "s"
    make_coloured_mnist(tmp_path / "other.zarr", seed=9, limit=300)
    with pytest.raises(CacheError, match="was made from another dataset"):
        train_student(tmp_path / "other.zarr", cache, out)
    with pytest.raises(CacheError, match="explains the split 'validation', the train split is needed"):
        train_student(dataset, validation_cache, out)
    train_teacher(dataset, tmp_path / "t", steps=2, batch_size=32, seed=1)
    cache_explanations(dataset, tmp_path / "t", tmp_path / "v.zarr", split="validation", draws=1)
    with pytest.raises(CacheError, match="explains another teacher"):
        train_student(dataset, cache, out, validation_cache=tmp_path / "v.zarr")
    assert not out.exists()


def test_renamed_classes_and_a_validation_store_of_other_options_are_refused(dataset, teacher, cache, tmp_path):
    import zarr

    shutil.copytree(dataset, tmp_path / "renamed.zarr")
    root = zarr.open_group(str(tmp_path / "renamed.zarr"), mode="r+")
    root.attrs["class_names"] = [*root.attrs["class_names"], "ten"]
    with pytest.raises(CacheError, match="knows the classes zero, one"):
        train_student(tmp_path / "renamed.zarr", cache, tmp_path / "s")
    cache_explanations(dataset, teacher, tmp_path / "v.zarr", split="validation", draws=1, epsilon_range=(1, 2))
    with pytest.raises(CacheError, match=r"made with explainer\.epsilon_low 1"):
        train_student(dataset, cache, tmp_path / "s", validation_cache=tmp_path / "v.zarr")
    assert not (tmp_path / "s").exists()


PARTIAL = ".{}." + 32 * "0" + ".partial"


@pytest.mark.parametrize(
    "left", [[], ["metrics.jsonl"], ["metrics.jsonl", "weights.pt", PARTIAL.format("result.json")]]
)
def test_a_training_killed_anywhere_is_started_again(dataset, teacher, tmp_path, left):
    out = tmp_path / "t"
    out.mkdir()
    (out / ("config.json" if left else PARTIAL.format("config.json"))).write_text((teacher / "config.json").read_text())
    for name in left:
        (out / name).write_text("")
    train_teacher(dataset, out, steps=1, batch_size=8)
    load_classifier(out)


def test_an_incomplete_store_is_refused(dataset, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / "commits" / "c.0.0").unlink()
    with pytest.raises(CacheError, match="incomplete: 0 of 1 shards are there"):
        train_student(dataset, tmp_path / "c.zarr", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_damaged_store_stops_the_training_with_the_shards_name(dataset, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "c.zarr")
    file = tmp_path / "c.zarr" / "heatmaps" / "c.0.0.0.0.0"
    raw = bytearray(file.read_bytes())
    for position in range(200, len(raw), 100):  # in every draw
        raw[position] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(CacheError, match=r"shard 0 .* is damaged"):
        train_student(dataset, tmp_path / "c.zarr", tmp_path / "s", steps=3)


def test_a_loss_that_is_not_finite_stops_the_training(dataset, tmp_path):
    with pytest.raises(TrainingError, match="smaller --lr"):
        train_teacher(dataset, tmp_path / "t", lr=1e38, steps=30, batch_size=32)
    assert not (tmp_path / "t" / "result.json").exists()
    train_teacher(dataset, tmp_path / "t", steps=2, batch_size=32)  # an unfinished training may be started again


def test_a_finished_training_is_not_overwritten(dataset, teacher):
    before = weights(teacher)
    with pytest.raises(FileExistsError, match="holds a finished training: choose another --out"):
        train_teacher(dataset, teacher, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arch": "resnet81"}, ModelError, "unknown architecture 'resnet81': did you mean resnet18"),
        ({"arch": "alexnet"}, ModelError, r"'alexnet' does not take images of shape \(3, 28, 28\)"),
        ({"debias": "mask"}, TrainingError, "--debias mask needs 'masks'"),
        ({"debias": "blur"}, TrainingError, "unknown --debias 'blur': choose one of grayscale, mask, none"),
        ({"steps": 3, "epochs": 1}, TrainingError, "not both"),
        ({"steps": 0}, TrainingError, "--steps 0 is less than one step"),
        ({"epochs": 0.0}, TrainingError, "--epochs 0 is less than one step"),
        ({"batch_size": 0}, TrainingError, "--batch-size must be at least 1, got 0"),
        ({"lr": -1.0}, TrainingError, "--lr must be a positive number, got -1"),
        ({"device": "cuda:77"}, ModelError, "the device 'cuda:77' cannot be used here"),
        ({"device": "gpu"}, ModelError, "the device 'gpu' cannot be used here"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_anything_is_written(dataset, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train_teacher(dataset, tmp_path / "t", **change)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "damage",
    [
        *("no folder", "no config", "not JSON", "no weights", "cut weights", "other version"),
        *("debias=foo", "arch=5", "class_names=5", "head=5", "image_shape=abc", "image_shape=-3"),
    ],
)
def test_what_is_no_saved_model_is_said(teacher, tmp_path, damage):
    path = tmp_path / "t"
    shutil.copytree(teacher, path)
    config, file = path / "config.json", path / "weights.pt"
    if damage == "no folder":
        shutil.rmtree(path)
    elif damage == "no config":
        config.unlink()
    elif damage == "not JSON":
        config.write_text("{")
    elif damage == "no weights":
        file.unlink()
    elif damage == "cut weights":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        key, value = damage.split("=") if "=" in damage else ("format_version", 9)
        changed = {"5": 5, "-3": [-3, 28, 28]}.get(value, value)
        config.write_text(json.dumps({**json.loads(config.read_text()), key: changed}))
    with pytest.raises(ModelError, match=str(path)):
        load_classifier(path)


def test_evaluation_counts_what_it_says(dataset, teacher):
    result = evaluate(dataset, teacher)
    model, _ = load_classifier(teacher)
    opened = open_dataset(dataset)
    for name in ("iid", "ood", "shift"):
        split = opened.split(name)
        correct = predict(model, split, torch.device("cpu")) == split.labels[:]
        groups = split.groups[:]
        by_group = {opened.group_name(g): 100 * correct[groups == g].mean() for g in np.unique(groups)}
        assert result[name] == pytest.approx(100 * correct.mean())
        worst = result["splits"][name]["worst_group"]
        assert worst["accuracy"] == pytest.approx(min(by_group.values()))
        assert by_group[worst["group"]] == pytest.approx(worst["accuracy"])
        low, high = result["splits"][name]["interval"]
        assert low <= result[name] <= high
    assert result["gap"] == pytest.approx(result["iid"] - result["ood"])


def test_wilson_interval_agrees_with_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for (successes, trials), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)
