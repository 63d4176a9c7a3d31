"""What stage one promises: the store does not depend on how, or in how many attempts, it was computed."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import pipeline.forward
import teacher_cache.layout
from data import DatasetWriter, make_coloured_mnist, open_dataset
from pipeline import (
    EXPLAINERS,
    RULE_SETS,
    Classifier,
    Forward,
    ModelError,
    RelevanceError,
    cache_explanations,
    explain,
    load_classifier,
)
from pipeline.caching import stage_one
from pipeline.caching.draws import usual_draws
from pipeline.device import as_input
from teacher_cache import CacheError, check_complete, open_cache, repair
from trainer import train_student, train_teacher

ROOT = Path(__file__).parent.parent
SMALL_SHARDS = "import teacher_cache.layout as layout; layout.MAX_SHARD_SAMPLES = 64; import cli; cli.main()"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 64)


def arrays(path: Path) -> dict[str, np.ndarray]:
    root = zarr.open_group(str(path), mode="r")
    return {name: np.asarray(array[:]) for name, array in root.arrays()}


def assert_equal_bit_for_bit(found: Path, expected: Path) -> None:
    mine, theirs = arrays(found), arrays(expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].tobytes() == theirs[name].tobytes(), name


def test_the_store_holds_what_explain_says(dataset, teacher, cache):
    model, _ = load_classifier(teacher)
    split, store = open_dataset(dataset).split("train"), open_cache(cache)
    shard = store.read_shard(0)
    images = as_input(split.images[:8], torch.device("cpu"))
    for draw in range(2):
        classes, epsilon = (torch.from_numpy(v[:8, draw]) for v in (shard.target_class, shard.epsilon))
        logits, heatmaps = explain(model, images, classes, epsilon)
        scale = heatmaps.abs().amax((1, 2, 3), keepdim=True)
        assert ((heatmaps - torch.from_numpy(shard.heatmaps[:8, draw])).abs() <= 2e-3 * scale).all()
        torch.testing.assert_close(logits, torch.from_numpy(shard.teacher_logits[:8]), rtol=1e-3, atol=1e-4)
    top = shard.teacher_logits.argmax(1)
    assert 0.35 < (shard.target_class == top[:, None]).mean() < 0.65
    assert np.array_equal(store.head["weight"], model.network.head.weight.detach().numpy())
    assert store.info.dataset.fingerprint == split.fingerprint


@pytest.mark.parametrize(("samples", "draws"), [(0, 8), (1, 8), (2500, 8), (2501, 8), (4000, 5), (5000, 4), (10**6, 4)])
def test_few_samples_have_more_draws(samples, draws):
    assert usual_draws(samples) == draws


SMALL_CNNS = [name for name in EXPLAINERS if name not in ("flex-stride16", "flex-stride32")]  # which it has maps for


@pytest.mark.parametrize("explainer", [name for name in SMALL_CNNS if name not in RULE_SETS])
def test_the_store_holds_what_every_explainer_says_and_the_teachers_features(explainer, dataset, teacher, tmp_path):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", explainer=explainer, features=True)
    store, (model, _) = open_cache(tmp_path / "c.zarr"), load_classifier(teacher)
    assert store.info.explainer.rule == explainer
    assert store.info.explainer.draws == (1 if explainer == "attention" else 8)  # of 300 samples
    assert store.info.explainer.class_policy == ("none" if explainer == "attention" else "top-or-other")
    coarse = (1, 7, 7) if explainer == "flex-stride4" else (1, 3, 3)
    assert store.info.map_shape == (coarse if EXPLAINERS[explainer].coarse else (3, 28, 28))
    assert store.info.storage.features == 1152
    shard, images = store.read_shard(0), open_dataset(dataset).split("train").images[:8]
    for draw in range(store.info.explainer.draws):
        classes, epsilon = (torch.from_numpy(v[:8, draw]) for v in (shard.target_class, shard.epsilon))
        forward = Forward(model, as_input(images, torch.device("cpu")), explainer)
        maps = forward.maps(classes, epsilon)
        scale = maps.abs().amax((1, 2, 3), keepdim=True)
        assert ((maps - torch.from_numpy(shard.heatmaps[:8, draw])).abs() <= 2e-3 * scale).all()
    logits, features = (values.detach().numpy() for values in (forward.logits, forward.features))
    np.testing.assert_allclose(shard.teacher_logits[:8], logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shard.features[:8], features, rtol=1e-3, atol=1e-4)
    head = shard.features @ store.head["weight"].T + store.head.get("bias", 0)
    np.testing.assert_allclose(head, shard.teacher_logits, rtol=1e-3, atol=1e-4)


def test_a_store_with_features_equals_one_without_in_all_else(dataset, teacher, cache, tmp_path):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, features=True)
    mine, theirs = arrays(tmp_path / "c.zarr"), arrays(cache)
    assert set(mine) - set(theirs) == {"features"}
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in set(theirs) - {"commits"})
    with pytest.raises(CacheError, match=r"storage\.features: 1152, 0"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2)


def test_features_that_a_teacher_does_not_have_are_refused_before_anything_is_written(
    dataset, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline.forward, "last_layer", lambda model, classes: None)
    with pytest.raises(ModelError, match="no features to match"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", features=True)
    assert not (tmp_path / "c.zarr").exists()


def test_every_sample_takes_one_forward_pass_for_all_its_draws(dataset, teacher, tmp_path, monkeypatch):
    seen = []
    forward = Classifier.forward

    def counting(self, images, masks=None):
        seen.append(len(images))
        return forward(self, images, masks)

    monkeypatch.setattr(Classifier, "forward", counting)
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=3, batch_size=100)
    # some to see whether it can be explained, and how its maps are stored best; a first look, also at shifted images
    assert seen == [16, 60, 60, 100, 100, 100]


def test_draws_are_the_same_and_maps_equal_whatever_the_batch_and_shard_size(
    dataset, teacher, cache, tmp_path, small_shards
):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, batch_size=17)
    mine, theirs = arrays(tmp_path / "c.zarr"), arrays(cache)
    assert len(mine["commits"]) == 5
    for name in ("target_class", "epsilon"):
        assert np.array_equal(mine[name], theirs[name])
    assert np.abs(mine["heatmaps"].astype(np.float32) - theirs["heatmaps"]).max() < 2e-3
    np.testing.assert_allclose(mine["scale"], theirs["scale"], rtol=1e-4)


def test_the_same_command_twice_computes_nothing_the_second_time(dataset, teacher, tmp_path):
    first = cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1)
    second = cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1)
    assert (first.computed_shards, second.computed_shards) == (1, 0)


@pytest.mark.parametrize("options", [{"draws": 2}, {"explainer": "attention", "features": True}], ids=["", "features"])
def test_a_continued_store_equals_an_uninterrupted_one(dataset, teacher, tmp_path, small_shards, monkeypatch, options):
    cache_explanations(dataset, teacher, tmp_path / "whole.zarr", **options)
    explain_shard, calls = stage_one.explain_shard, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:  # the first is to see whether it can be explained
            raise OSError("the power is gone")
        return explain_shard(*args)

    monkeypatch.setattr(stage_one, "explain_shard", failing)
    with pytest.raises(OSError, match="the power is gone"):
        cache_explanations(dataset, teacher, tmp_path / "cut.zarr", **options)
    there = open_cache(tmp_path / "cut.zarr").committed().sum()
    assert there in (2, 3)  # the other thread finishes what it is at
    assert cache_explanations(dataset, teacher, tmp_path / "cut.zarr", **options).computed_shards == 5 - there
    assert_equal_bit_for_bit(tmp_path / "cut.zarr", tmp_path / "whole.zarr")


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("larger") / "data.zarr"
    make_coloured_mnist(path, limit=2000)
    return path


def command(data: Path, teacher: Path, out: Path) -> list[str]:
    paths = ["--data", str(data), "--teacher", str(teacher), "--out", str(out)]
    return [sys.executable, "-c", SMALL_SHARDS, "cache-explanations", *paths]


@pytest.fixture(scope="module")
def whole(larger, teacher, tmp_path_factory) -> Path:
    """The store that the command makes when nothing interrupts it."""
    path = tmp_path_factory.mktemp("whole") / "whole.zarr"
    subprocess.run(command(larger, teacher, path), cwd=ROOT, check=True, capture_output=True)
    return path


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_killed_at_random_moments_and_run_again_the_store_equals_an_uninterrupted_one(
    larger, teacher, whole, tmp_path, sent
):
    cut = tmp_path / "cut.zarr"

    def commits() -> int:
        return len(list(cut.glob("commits/c.*")))

    for attempt in range(4):
        process = subprocess.Popen(
            command(larger, teacher, cut), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        before = commits()
        # the first time while the store is created, then while shards are written
        while process.poll() is None and not (cut.exists() if attempt == 0 else commits() > before):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05 if attempt == 0 else 0.3))
        process.send_signal(sent)
        _, errors = process.communicate()
        assert process.returncode == (-sent if sent == signal.SIGKILL else 1)
        assert "Traceback" not in errors
        if attempt > 0:
            assert commits() > before
        assert_only_whole_shards_can_be_read(cut)
    assert not open_cache(cut).committed().all()
    subprocess.run(command(larger, teacher, cut), cwd=ROOT, check=True, capture_output=True)
    check_complete(open_cache(cut))
    assert_equal_bit_for_bit(cut, whole)
    assert not list(cut.rglob("*.partial"))  # every writer begins by sweeping


def test_a_teacher_that_explains_nothing_is_refused(dataset, teacher, tmp_path):
    with pytest.raises(RelevanceError, match="every heatmap of samples 0 to 15 is zero"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", epsilon_range=(1e30, 1e38))


@pytest.mark.parametrize("black", [slice(8, 12), slice(0, 20)], ids=["a whole shard", "the first ones"])
def test_black_images_have_maps_of_zeros_and_stop_nothing(tmp_path, monkeypatch, black):
    """As X-rays that failed, or empty masks: with large images a shard is one sample."""
    monkeypatch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 4)
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
    images[black] = 0
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=np.arange(24) % 2)
        writer.finish(class_names=["a", "b"])
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", debias="none", steps=2, batch_size=8)
    done = cache_explanations(tmp_path / "d.zarr", tmp_path / "t", tmp_path / "c.zarr", draws=2)
    assert done.computed_shards == 6
    store = open_cache(tmp_path / "c.zarr")
    maps = np.concatenate([store.read_shard(shard).heatmaps for shard in range(6)])
    assert not maps[black].any()
    assert maps[20:].any()


@pytest.mark.parametrize(("black", "told"), [(2, None), (3, r"3 of 200 maps .* \(1\.5%, of samples 0, 1, 2\)")])
def test_more_than_a_hundredth_of_maps_that_are_zero_is_told(tmp_path, caplog, black, told):
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    images[:black] = 0
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=np.arange(200) % 2)
        writer.finish(class_names=["a", "b"])
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", debias="none", steps=2, batch_size=8)
    cache_explanations(tmp_path / "d.zarr", tmp_path / "t", tmp_path / "c.zarr", draws=1)
    warnings = [text for text in caplog.messages if "are zero" in text]
    assert len(warnings) == (told is not None)
    assert told is None or re.search(told, warnings[0])


def test_a_store_in_which_every_map_is_zero_is_refused_by_both_stages(tmp_path):
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        for split in ("train", "validation"):
            writer.write_split(split, images=np.zeros((24, 3, 8, 8), np.uint8), labels=np.arange(24) % 2)
        writer.finish(class_names=["a", "b"])
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", debias="none", steps=2, batch_size=8)
    for _ in range(2):  # the second time, every shard is there
        with pytest.raises(RelevanceError, match=r"every map of the store .*c\.zarr is zero.* images are black"):
            cache_explanations(tmp_path / "d.zarr", tmp_path / "t", tmp_path / "c.zarr", draws=2)
    with pytest.raises(
        CacheError, match=r"every map of the store .*c\.zarr is zero, so there is nothing to learn from"
    ):
        train_student(tmp_path / "d.zarr", tmp_path / "c.zarr", tmp_path / "s", steps=1)
    assert not (tmp_path / "s").exists()


def test_a_store_is_where_the_system_finds_its_path(dataset, teacher, tmp_path, monkeypatch):
    """Behind a link ".." is another folder than the text says; and a path means the same when the process moves on."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path / "here")
    cache_explanations(dataset, teacher, "link/../c.zarr", draws=1)
    store = open_cache("link/../c.zarr")
    monkeypatch.chdir(tmp_path)
    assert store.read_shard(0).heatmaps.any()
    assert (tmp_path / "far" / "c.zarr").is_dir()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match=r"the working directory has vanished: 'c\.zarr'"):
        open_cache("c.zarr")


def assert_only_whole_shards_can_be_read(path: Path) -> None:
    try:
        store = open_cache(path)
    except CacheError as error:  # it was being created
        said = str(error)
        assert "no heatmap store at" in said or "is not finished" in said or "last layer" in said
        return
    for shard in np.flatnonzero(store.committed()):
        store.read_shard(int(shard))  # checks the checksum


def test_a_store_of_other_settings_or_another_teacher_is_not_continued(dataset, teacher, cache, tmp_path):
    with pytest.raises(CacheError, match=r"explainer\.draws: 2, 5"):
        cache_explanations(dataset, teacher, cache, draws=5)
    train_teacher(dataset, tmp_path / "other", steps=2, batch_size=32, seed=1)
    with pytest.raises(CacheError, match=r"teacher\.weights_sha256"):
        cache_explanations(dataset, tmp_path / "other", cache, draws=2)


def test_a_teacher_of_other_classes_or_sizes_is_refused(teacher, tmp_path):
    for name, shape, classes in (("size", (3, 32, 32), open_classes(teacher)), ("classes", (3, 28, 28), ["a", "b"])):
        writer = DatasetWriter(tmp_path / name)
        writer.write_split("train", images=np.zeros((4, *shape), np.uint8), labels=np.zeros(4, np.int64))
        writer.finish(name=name, class_names=list(classes))
        with pytest.raises(ModelError, match="use a model that was trained on"):
            cache_explanations(tmp_path / name, teacher, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def open_classes(teacher: Path) -> tuple[str, ...]:
    return load_classifier(teacher)[1].class_names


@pytest.mark.parametrize("limits", [(1.0, 0.1), (1e-60, 1.0), (0.1, 1e39)])
def test_an_epsilon_range_that_is_none_is_refused(dataset, teacher, tmp_path, limits):
    with pytest.raises(RelevanceError, match="0 < LOW <= HIGH in float32, got"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", epsilon_range=limits)
    assert not (tmp_path / "c.zarr").exists()


def test_a_teacher_that_sees_masked_images_has_no_relevance_on_the_background(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 1, 16, 16), np.uint8)
    masks[:, :, 4:12, 4:12] = 255
    images = rng.integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    labels = np.arange(40) % 2
    images[labels == 1, :, 6:10, 6:10] = 255
    writer = DatasetWriter(tmp_path / "data.zarr")
    for split in ("train", "ood"):
        writer.write_split(split, images=images, labels=labels, masks=masks)
    writer.finish(name="masked", class_names=["dark", "bright"])
    train_teacher(tmp_path / "data.zarr", tmp_path / "t", debias="mask", steps=4, batch_size=20)
    cache_explanations(tmp_path / "data.zarr", tmp_path / "t", tmp_path / "c.zarr", draws=2)
    maps = open_cache(tmp_path / "c.zarr").read_shard(0).heatmaps
    outside = np.broadcast_to(masks[:, None] == 0, maps.shape)
    assert (maps[outside] == 0).all()
    assert (maps[~outside] != 0).any()


def test_stage_one_runs_on_every_device(dataset, teacher, cache, tmp_path, device):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, device=device)
    mine, theirs = arrays(tmp_path / "c.zarr"), arrays(cache)
    assert np.array_equal(mine["epsilon"], theirs["epsilon"])
    assert (mine["target_class"] == theirs["target_class"]).mean() > 0.99


def test_two_processes_that_share_divide_the_shards_and_one_alone_is_refused_beside_them(
    larger, teacher, whole, tmp_path
):
    shared = tmp_path / "shared.zarr"
    share = [*command(larger, teacher, shared), "--share"]
    processes = [subprocess.Popen(share, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while not list(shared.glob("commits/c.*")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.001)
    alone = subprocess.run(command(larger, teacher, shared), cwd=ROOT, capture_output=True, text=True)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (
        alone.returncode == 1 and "another process is writing" in alone.stderr
    ) or "from an earlier run" in alone.stdout
    assert_equal_bit_for_bit(shared, whole)
    summaries = [re.search(r"in 32 shards(?:, (\d+) of them from an earlier run)?", output) for output in outputs]
    assert sum(32 - int(match.group(1) or 0) for match in summaries if match) == 32  # none was computed twice


def test_maps_are_stored_as_asked_and_a_continued_store_keeps_its_codec(dataset, teacher, tmp_path, monkeypatch):
    kinds = {"plain": {}, "small": {"precision": "int8", "resolution": 2}, "full": {"codec": "blosc-zstd-1-shuffle"}}
    stores = {}
    for name, options in kinds.items():
        cache_explanations(dataset, teacher, tmp_path / name, draws=1, **options)
        stores[name] = open_cache(tmp_path / name)
    codecs = {name: store.info.storage.codec for name, store in stores.items()}
    assert codecs["plain"].startswith("blosc-lz4-")
    assert codecs["small"].startswith("blosc-zstd-")
    assert codecs["full"] == "blosc-zstd-1-shuffle"
    maps = {name: store.read_shard(0).heatmaps for name, store in stores.items()}
    assert maps["small"].shape == (300, 1, 3, 14, 14)
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(maps["plain"][:, 0]), 2)
    largest = pooled.abs().amax((1, 2, 3), keepdim=True)
    assert ((torch.from_numpy(maps["small"][:, 0]) - pooled).abs() <= 0.02 * largest).all()
    open_cache(tmp_path / "full", writable=True).uncommit(0)
    assert cache_explanations(dataset, teacher, tmp_path / "full", draws=1).computed_shards == 1
    with monkeypatch.context() as patch:  # another device rounds otherwise, and chooses otherwise by the first maps
        patch.setattr(stage_one, "choose_compression", lambda *_: "blosc-zstd-3-noshuffle")
        cache_explanations(dataset, teacher, tmp_path / "zstd", draws=1, codec="zstd")
    open_cache(tmp_path / "zstd", writable=True).uncommit(0)
    assert cache_explanations(dataset, teacher, tmp_path / "zstd", draws=1, codec="zstd").computed_shards == 1
    for other in ("lz4", "blosc-zstd-9-noshuffle"):
        with pytest.raises(CacheError, match=r"storage\.codec: 'blosc-zstd-3-noshuffle', 'blosc-"):
            cache_explanations(dataset, teacher, tmp_path / "zstd", draws=1, codec=other)
    with pytest.raises(CacheError, match=r"storage\.precision: 'float16', 'bfloat16'"):
        cache_explanations(dataset, teacher, tmp_path / "full", draws=1, precision="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"codec": "gzip"},
            "unknown codec 'gzip': choose one of auto, lz4, zstd, or blosc-COMPRESSOR-LEVEL-SHUFFLE with",
        ),
        ({"codec": "zsdt"}, r"Did you mean zstd\?$"),
        ({"codec": "blosc-lz4-5-shufle"}, r"Did you mean .*\bblosc-lz4-5-shuffle\b"),
        ({"precision": "float64"}, "unknown precision 'float64': choose one of float16, bfloat16, int8"),
        ({"resolution": 40}, "resolution=40 leaves nothing of maps of 28×28"),
        ({"resolution": 2, "explainer": "grad-cam"}, "resolution=2 leaves a single number of maps of 3×3: choose 1$"),
        ({"draws": 2, "explainer": "attention"}, "draws=2 with explainer='attention': its maps know neither class"),
        ({"draws": 0, "explainer": "attention"}, "draws must be at least 1 and at most 10000, got 0"),
        ({"share": True, "scheduler": "tcp://127.0.0.1:1"}, "share=True or scheduler, not both"),
    ],
)
def test_ways_of_storing_that_there_are_not_are_refused_before_anything_is_written(
    dataset, teacher, tmp_path, options, message
):
    with pytest.raises((CacheError, RelevanceError), match=message):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", **options)
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("explainer", RULE_SETS)
def test_every_rule_set_makes_a_store_whose_students_use_it_too(explainer, dataset, tmp_path):
    train_teacher(dataset, tmp_path / "teacher", arch="mobilenet_v3_small", debias="none", steps=2, batch_size=32)
    cache_explanations(dataset, tmp_path / "teacher", tmp_path / "store", draws=1, explainer=explainer)
    cache = open_cache(tmp_path / "store")
    assert cache.info.explainer.rule == explainer
    shard = cache.read_shard(0)
    model, _ = load_classifier(tmp_path / "teacher")
    images = as_input(np.asarray(open_dataset(dataset).split("train").images[:4]), torch.device("cpu"))
    classes, epsilons = torch.from_numpy(shard.target_class[:4, 0]), torch.from_numpy(shard.epsilon[:4, 0])
    _, expected = explain(model, images, classes, epsilons, rules=explainer)
    torch.testing.assert_close(
        torch.from_numpy(shard.heatmaps[:4, 0]), expected, rtol=1e-2, atol=1e-2 * expected.abs().max()
    )

    result = train_student(dataset, tmp_path / "store", tmp_path / "student", arch="small-cnn", steps=2, batch_size=16)
    assert np.isfinite(result["loss"])


def test_an_unknown_explainer_is_refused_before_anything_is_written(dataset, teacher, tmp_path):
    with pytest.raises(RelevanceError, match="unknown explainer 'lrp': choose one of flex"):
        cache_explanations(dataset, teacher, tmp_path / "store", explainer="lrp")
    assert not (tmp_path / "store").exists()


def test_what_inspect_cache_takes_out_the_same_command_computes_anew(dataset, teacher, tmp_path, small_shards):
    out = tmp_path / "c.zarr"
    cache_explanations(dataset, teacher, out, draws=1)
    before = arrays(out)
    (out / "heatmaps" / "c.2.0.0.0.0").unlink()
    (out / "commits" / "c.4.0").write_bytes(b"")
    assert open_cache(out).committed().tolist() == [True, True, True, True, False]
    assert list(repair(open_cache(out, writable=True))) == [2]
    assert cache_explanations(dataset, teacher, out, draws=1).computed_shards == 2
    assert all(before[name].tobytes() == values.tobytes() for name, values in arrays(out).items())
