"""What training, evaluation and saved models promise."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import trainer.loop.training
from data import make_coloured_mnist, open_dataset
from pipeline import ModelError, cache_explanations, load_classifier
from pipeline.networks.classifier import save_weights
from teacher_cache import CacheError, open_cache
from trainer import TrainingError, build_student, evaluate, raise_momentum, train_student, train_teacher
from trainer.loop import display
from trainer.loop.distributed import Ranks
from trainer.results.evaluation import predict, wilson_interval
from trainer.run_dir import revision
from trainer.settings import Settings
from trainer.stream.stream import explained_source

ROOT = Path(__file__).parent.parent


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
        train_student(data, path, tmp_path / name, steps=5, batch_size=64, device="cpu")
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


@pytest.fixture(scope="module")
def stores_of_biases(dataset, tmp_path_factory) -> dict[str, Path]:
    """Stores of a teacher with biases whose maps are nearly its logits, and of one whose logits are mostly a bias."""
    folder = tmp_path_factory.mktemp("biases")
    stores = {}
    for name, added in (("much", 0.0), ("little", 50.0)):
        teacher, stores[name] = folder / f"{name}-teacher", folder / name
        train_teacher(dataset, teacher, arch="small-cnn", bias_free=False, steps=8, batch_size=64)
        model = load_classifier(teacher)[0]
        for of_model, values in model.state_dict().items():
            if of_model.endswith(("bias", "running_mean")):
                values.fill_(added if of_model == "network.head.bias" else 0)
        save_weights(teacher, model)
        cache_explanations(dataset, teacher, stores[name], draws=1, epsilon_range=(1e-3, 1e-3))
    return stores


@pytest.mark.parametrize(
    ("store", "options", "method", "bias_free"),
    [
        ("much", {}, "complete-lrp", True),
        ("much", {"bias_free": False}, "lrp", False),
        ("much", {"method": "lrp"}, "lrp", False),
        ("much", {"augment": ("flip",)}, "lrp", False),
        ("much", {"arch": "resnet18", "batch_size": 4}, "lrp", False),
        ("much", {"arch": "resnet18", "batch_size": 4, "bias_free": True}, "complete-lrp", True),
        ("much", {"method": "complete-lrp"}, "complete-lrp", True),
        ("little", {}, "lrp", True),
        ("little", {"bias_free": False}, "lrp", False),
        ("little", {"method": "output"}, "output", False),
        ("little", {"arch": "resnet18", "batch_size": 4}, "lrp", False),
    ],
)
def test_what_a_student_of_a_teacher_with_biases_matches_and_whether_it_has_biases(
    dataset, stores_of_biases, tmp_path, caplog, store, options, method, bias_free
):
    caplog.set_level("INFO")
    train_student(dataset, stores_of_biases[store], tmp_path / "s", **{"steps": 1, "batch_size": 32, **options})
    config = load_classifier(tmp_path / "s")[1]
    assert (config.training["loss"], config.bias_free) == ({method: 1.0}, bias_free)
    chosen = "method" not in options
    assert ("matches completed maps" in caplog.text) == (chosen and method == "complete-lrp")
    assert ("the student has no biases, although its teacher has" in caplog.text) == (store == "little" and bias_free)


@pytest.mark.parametrize("store", ["much", "little"])
def test_build_student_has_the_same_default(stores_of_biases, store):
    biases = [name for name, _ in build_student(stores_of_biases[store]).named_parameters() if "bias" in name]
    assert any(not name.startswith("head.") for name in biases) == (store == "much")


@pytest.mark.parametrize(("store", "warned"), [("much", False), ("little", True)])
def test_completed_maps_that_are_mostly_completion_are_warned_of(
    dataset, stores_of_biases, tmp_path, caplog, store, warned
):
    train_student(dataset, stores_of_biases[store], tmp_path / "s", steps=1, batch_size=32, method="complete-lrp")
    assert ("completed maps mostly match its outputs" in caplog.text) == warned


def test_a_convolution_at_the_end_gives_its_values_to_a_linear_layer_and_takes_those_of_one(dataset, cache, tmp_path):
    train_teacher(dataset, tmp_path / "t", arch="squeezenet1_1", steps=1, batch_size=8)
    cache_explanations(dataset, tmp_path / "t", tmp_path / "c.zarr", draws=1)
    train_student(dataset, tmp_path / "c.zarr", tmp_path / "linear", steps=2, batch_size=32)
    head = open_cache(tmp_path / "c.zarr").head
    assert head["weight"].shape == (10, 512)
    assert all(np.array_equal(weights(tmp_path / "linear")[f"network.head.1.{key}"], head[key]) for key in head)

    train_student(dataset, cache, tmp_path / "conv", arch="squeezenet1_1", steps=2, batch_size=8)
    weight = weights(tmp_path / "conv")["network.classifier.1.1.weight"]
    assert np.array_equal(weight.flatten(1), open_cache(cache).head["weight"])


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

    monkeypatch.setattr(trainer.loop.training, "validate", fake)
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
    validation_loss = trainer.loop.training.validate(
        student, source, store.info, settings, torch.device("cpu"), Ranks()
    )
    assert abs(validation_loss - result["validation_loss"]) < 1e-4


def test_the_same_seed_gives_the_same_weights(dataset, cache, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_student(dataset, cache, tmp_path / name, steps=3, batch_size=32, seed=seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not torch.equal(a["network.conv1.weight"], c["network.conv1.weight"])


def test_threads_and_memory_change_speed_and_nothing_else(dataset, cache, tmp_path):
    for name, options in (("a", {"workers": 1, "memory_budget": 0}), ("b", {"workers": 3})):
        options["device"] = "cpu"  # bit for bit
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
    with pytest.raises(CacheError, match="has the classes zero, one"):
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
    with pytest.raises(TrainingError, match="smaller lr"):
        train_teacher(dataset, tmp_path / "t", lr=1e38, steps=30, batch_size=32)
    assert not (tmp_path / "t" / "result.json").exists()
    train_teacher(dataset, tmp_path / "t", steps=2, batch_size=32)  # an unfinished training may be started again


def test_a_finished_training_is_not_overwritten(dataset, teacher):
    before = weights(teacher)
    with pytest.raises(FileExistsError, match="holds a finished training: choose another out"):
        train_teacher(dataset, teacher, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arch": "resnet81"}, ModelError, "unknown architecture 'resnet81'.*Did you mean resnet18"),
        ({"arch": "alexnet"}, ModelError, r"'alexnet' does not take images of shape \(3, 28, 28\)"),
        ({"debias": "mask"}, TrainingError, "debias='mask' needs 'masks'"),
        (
            {"debias": "blur"},
            TrainingError,
            "unknown debias 'blur': choose one of grayscale, mask, mask-mean, mask-blur, mask-background-mean, "
            "mask-background-blur, segmenter, none",
        ),
        ({"steps": 3, "epochs": 1}, TrainingError, "not both"),
        ({"steps": 0}, TrainingError, "steps must be at least 1, got 0"),
        ({"epochs": 0.0}, TrainingError, "epochs must be more than 0, got 0"),
        ({"batch_size": 0}, TrainingError, "batch_size must be at least 1, got 0"),
        ({"lr": -1.0}, TrainingError, "lr must be more than 0, got -1"),
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
    result = evaluate(dataset, teacher, device="cpu")
    model, _ = load_classifier(teacher)
    opened = open_dataset(dataset)
    for name in ("iid", "ood", "shift"):
        split = opened.split(name)
        correct = predict(model, split, torch.device("cpu")) == split.labels[:]
        groups = split.groups[:]
        by_group = {opened.group_name(g): 100 * correct[groups == g].mean() for g in np.unique(groups)}
        assert result[name] == pytest.approx(100 * correct.mean())
        groups_of = {group["group"]: group["accuracy"] for group in result["splits"][name]["groups"]}
        assert groups_of == pytest.approx(by_group)
        worst = result["splits"][name]["worst_group"]
        assert worst["accuracy"] == pytest.approx(min(by_group.values()))
        assert by_group[worst["group"]] == pytest.approx(worst["accuracy"])
        labels = split.labels[:]
        by_pair = {
            (opened.class_names[label], opened.group_name(group)): 100 * correct[here].mean()
            for label in range(10)
            for group in np.unique(groups)
            if (here := (labels == label) & (groups == group)).any()
        }
        pair = result["splits"][name]["worst_class_in_group"]
        assert pair["split"] == name
        assert pair["accuracy"] == pytest.approx(min(by_pair.values()))
        assert by_pair[pair["class"], pair["group"]] == pytest.approx(pair["accuracy"])
        assert pair["accuracy"] <= worst["accuracy"]
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


def test_the_folder_has_all_that_a_training_was_told_and_what_it_ran_on(dataset, cache, tmp_path):
    out = tmp_path / "s"
    train_student(dataset, cache, out, steps=3, batch_size=16, log_steps=1, profile=True, momentum=0.5, seed=7)
    config = json.loads((out / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(Settings)} - {"class_weights"} <= config["training"].keys()
    assert {"momentum": 0.5, "seed": 7, "loss": {"lrp": 1.0}}.items() <= config["training"].items()
    assert config["versions"]["torch"] == torch.__version__
    (start,) = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    assert {"step": 0, "processes": 1, "data": str(dataset), "cache": str(cache)}.items() <= start.items()
    assert start["revision"] == revision()
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", start["revision"])
    assert json.loads((out / "result.json").read_text())["steps"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.load(out / "model.pt", weights_only=False)
    assert exported is not None


def test_without_tensorboard_a_process_says_once_that_it_writes_no_events(dataset, tmp_path, monkeypatch, caplog):
    display._note_no_tensorboard.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("tensorboard.", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # any import of it fails
    with caplog.at_level(logging.INFO):
        train_teacher(dataset, tmp_path / "t", steps=3, batch_size=16, log_steps=1)
        train_teacher(dataset, tmp_path / "second", steps=1, batch_size=16)
    assert caplog.text.count("no TensorBoard events are written, because the package tensorboard is not installed") == 1
    assert not (tmp_path / "t" / "tensorboard").exists()
    assert [line["step"] for line in metrics(tmp_path / "t")] == [1, 2, 3]


def test_tensorboard_shows_the_numbers_of_the_metrics(dataset, cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_student(dataset, cache, tmp_path / "s", loss="lrp=1,output=1", steps=3, batch_size=16, log_steps=1)
    events = EventAccumulator(str(tmp_path / "s" / "tensorboard")).Reload()
    lines = metrics(tmp_path / "s")
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step"}
    for name in events.Tags()["scalars"]:
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)


def test_a_profile_is_a_trace_with_events(dataset, tmp_path):
    train_teacher(dataset, tmp_path / "t", steps=6, batch_size=8, profile=True)
    trace = json.loads((tmp_path / "t" / "profile" / "trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


def test_the_averaged_weights_are_the_moving_average_of_every_step(dataset, tmp_path):
    options = {"steps": 4, "batch_size": 16, "checkpoint_steps": 1, "keep_checkpoints": 9, "device": "cpu"}
    train_teacher(dataset, tmp_path / "t", ema=0.7, **options)
    states = [
        torch.load(path, weights_only=True)["model"] for path in sorted((tmp_path / "t" / "checkpoints").iterdir())
    ]
    assert len(states) == 4
    for name, _ in load_classifier(tmp_path / "t")[0].named_parameters():
        average = states[0][name]
        for state in states[1:]:
            average = 0.7 * average + 0.3 * state[name]
        torch.testing.assert_close(weights(tmp_path / "t")[name], average, rtol=1e-6, atol=1e-7)
        assert not torch.equal(states[0][name], states[3][name])


SGD = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "steps": 1, "device": "cpu"}


def test_a_batch_shown_in_parts_is_learnt_as_the_whole(dataset, cache, tmp_path, monkeypatch):
    (tmp_path / "without_norms.py").write_text(
        "from torch import nn\n\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),\n"
        "                         nn.Linear(72, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for parts in (1, 3, 40):
        train_student(
            dataset, cache, tmp_path / str(parts), student_factory="without_norms:net", accumulate=parts,
            batch_size=32, lr=0.1, clip_norm=None, **SGD,
        )  # fmt: skip
    for parts in (3, 40):
        for name, value in weights(tmp_path / "1").items():
            torch.testing.assert_close(weights(tmp_path / str(parts))[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias_free", [False, True])
def test_norms_that_average_over_longer_than_the_training_describe_the_network_that_it_ends_with(
    dataset, tmp_path, monkeypatch, caplog, bias_free
):
    (tmp_path / "with_norms.py").write_text(
        "from torch import nn\n\n"
        "def net(num_classes, momentum):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, num_classes))\n\n"
        "def fast(num_classes): return net(num_classes, 0.1)\n\n"
        "def slow(num_classes): return net(num_classes, 0.001)\n\n"
        "def all_batches(num_classes): return net(num_classes, None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level("INFO")
    told = []
    for name in ("fast", "slow", "all_batches"):
        caplog.clear()
        options = {"teacher_factory": f"with_norms:{name}", "bias_free": bias_free}
        train_teacher(dataset, tmp_path / name, steps=20, batch_size=16, device="cpu", **options)
        told.append("momentum 0.1 in this training, not 0.001" in caplog.text)
    assert told == [False, True, False]
    fast, slow = weights(tmp_path / "fast"), weights(tmp_path / "slow")
    assert fast.keys() == slow.keys()
    assert any("running" in key for key in fast)
    assert all(torch.equal(fast[key], slow[key]) for key in fast)


def test_the_longer_a_training_the_longer_its_norms_may_average():
    for steps, momentum in ((10, 0.1), (500, 0.1), (1000, 0.05), (5000, 0.01), (100_000, 0.01)):
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.01), torch.nn.BatchNorm2d(3, momentum=0.5))
        raise_momentum(network, steps)
        assert [norm.momentum for norm in network] == [momentum, 0.5]


def test_clipping_bounds_the_update(dataset, cache, tmp_path):
    train_student(dataset, cache, tmp_path / "before", batch_size=16, **{**SGD, "lr": 1e-30})
    train_student(dataset, cache, tmp_path / "after", batch_size=16, lr=1.0, clip_norm=0.01, **SGD)
    names = [name for name, _ in load_classifier(tmp_path / "after")[0].named_parameters()]
    before, after = (weights(tmp_path / name) for name in ("before", "after"))
    moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).norm().item()
    assert metrics(tmp_path / "after")[0]["gradient_norm"] > 0.01  # that before it is clipped
    assert 0.0099 < moved < 0.010001


@pytest.mark.parametrize(
    ("amx", "precision", "method", "said"),
    [
        (True, "auto", "lrp", True),
        (False, "auto", "lrp", False),
        (True, "float32", "lrp", False),
        (True, "auto", "erm", False),
    ],
)
def test_a_student_of_maps_is_told_that_its_cpu_is_faster_in_bfloat16(
    dataset, cache, tmp_path, monkeypatch, caplog, amx, precision, method, said
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    store = None if method == "erm" else cache
    with caplog.at_level("INFO"):
        train_student(dataset, store, tmp_path / "s", method=method, steps=1, precision=precision, device="cpu")
    assert ("precision='bfloat16' can halve the time of a step" in caplog.text) == said


def test_augmentation_is_the_same_every_time_and_changes_what_is_learnt(dataset, cache, tmp_path):
    for name, augment in (("a", ("flip", "shift", "crop")), ("b", ("flip", "shift", "crop")), ("c", ())):
        train_student(dataset, cache, tmp_path / name, steps=2, batch_size=16, augment=augment)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not torch.equal(a["network.conv1.weight"], c["network.conv1.weight"])


def test_bfloat16_trains_on_a_cpu_and_tf32_is_refused_there(dataset, cache, tmp_path):
    options = {"steps": 2, "batch_size": 16, "device": "cpu"}
    result = train_student(dataset, cache, tmp_path / "s", precision="bfloat16", **options)
    assert result["precision"].startswith("bfloat16")
    assert np.isfinite(result["loss"])
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "s").values())
    words = "precision='tf32' needs CUDA, and this training runs on cpu: choose float32 or bfloat16"
    with pytest.raises(TrainingError, match=words):
        train_student(dataset, cache, tmp_path / "t", precision="tf32", **options)
    assert not (tmp_path / "t").exists()


def test_a_batch_norm_of_a_single_value_is_said_with_what_to_do(dataset, cache, tmp_path):
    options = {"arch": "resnet18", "bias_free": False, "steps": 1, "method": "output"}
    for how, words in (
        ({"batch_size": 1}, "batch_size=1 and"),
        ({"batch_size": 2, "accumulate": 2}, "and accumulate=2"),
    ):
        with pytest.raises(TrainingError, match=f"a single value.*{words}.*choose a larger batch_size"):
            train_student(dataset, cache, tmp_path / "s", **options, **how)
