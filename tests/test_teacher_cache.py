"""What the heatmap store promises, without any model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache import (
    CacheError,
    CacheInfo,
    DatasetInfo,
    ExplainerInfo,
    Shard,
    StorageInfo,
    TeacherInfo,
    check_complete,
    create_cache,
    head_sha256,
    open_cache,
    plan_storage,
)

CLASSES = ("a", "b", "c")
HEAD = {"weight": np.arange(12, dtype=np.float32).reshape(3, 4)}


def info(samples: int = 10, draws: int = 2, shard: int = 4, **explainer) -> CacheInfo:
    return CacheInfo(
        explainer=ExplainerInfo(**{
            "rule": "flex", "draws": draws, "epsilon_low": 0.01, "epsilon_high": 1.0,
            "class_policy": "top-or-other", "seed": 0, **explainer,
        }),
        teacher=TeacherInfo("small-cnn", "grayscale", True, "0" * 64, CLASSES, head_sha256(HEAD)),
        dataset=DatasetInfo("mine", "train", "1" * 64, samples, (3, 6, 5)),
        storage=StorageInfo("float16", "blosc-zstd-3-bitshuffle", shard, 2),
        written_by={"zarr": "3"},
    )  # fmt: skip


def content(samples: int, draws: int = 2, seed: int = 0) -> Shard:
    rng = np.random.default_rng(seed)
    return Shard(
        heatmaps=rng.standard_normal((samples, draws, 3, 6, 5)).astype(np.float32) * 1e-7,
        target_class=rng.integers(0, 3, (samples, draws)),
        epsilon=rng.random((samples, draws)).astype(np.float32),
        teacher_logits=rng.standard_normal((samples, 3)).astype(np.float32),
    )


def filled(path: Path) -> list[Shard]:
    cache = create_cache(path, info(), HEAD)
    shards = [content(4, seed=1), content(4, seed=2), content(2, seed=3)]
    for number, shard in enumerate(shards):
        cache.write_shard(number, shard)
    return shards


def test_what_is_written_is_read_to_half_precision_of_each_maps_largest_value(tmp_path):
    written = filled(tmp_path / "c.zarr")
    cache = open_cache(tmp_path / "c.zarr")
    check_complete(cache)
    assert cache.info == info()
    assert np.array_equal(cache.head["weight"], HEAD["weight"])
    for number, expected in enumerate(written):
        found = cache.read_shard(number)
        largest = np.abs(expected.heatmaps).max(axis=(2, 3, 4), keepdims=True)
        assert (np.abs(found.heatmaps - expected.heatmaps) <= largest * 2**-11).all()
        for field in ("target_class", "epsilon", "teacher_logits"):
            assert np.array_equal(getattr(found, field), getattr(expected, field))


def test_one_draw_a_sample_is_read_as_chosen(tmp_path):
    filled(tmp_path / "c.zarr")
    cache = open_cache(tmp_path / "c.zarr")
    whole, chosen = cache.read_shard(0), cache.read_shard(0, np.array([1, 0, 0, 1]))
    assert chosen.heatmaps.shape == (4, 1, 3, 6, 5)
    for sample, draw in enumerate([1, 0, 0, 1]):
        assert np.array_equal(chosen.heatmaps[sample, 0], whole.heatmaps[sample, draw])
        assert chosen.target_class[sample, 0] == whole.target_class[sample, draw]
        assert chosen.epsilon[sample, 0] == whole.epsilon[sample, draw]


def test_maps_of_zeros_and_of_any_magnitude_survive(tmp_path):
    cache = create_cache(tmp_path / "c.zarr", info(samples=3, draws=1, shard=4), HEAD)
    shard = content(3, draws=1)
    shard.heatmaps[0] = 0
    shard.heatmaps[1] *= 1e30
    shard.heatmaps[2] *= 1e-20
    cache.write_shard(0, shard)
    found = open_cache(tmp_path / "c.zarr").read_shard(0).heatmaps
    largest = np.abs(shard.heatmaps).max(axis=(2, 3, 4), keepdims=True)
    assert (np.abs(found - shard.heatmaps) <= largest * 2**-11).all()


def test_maps_of_negative_zeros_are_as_intact_as_others(tmp_path):
    cache = create_cache(tmp_path / "c.zarr", info(samples=4, draws=1), HEAD)
    shard = content(4, draws=1)
    cache.write_shard(0, Shard(shard.heatmaps * 0 * -1, shard.target_class, shard.epsilon, shard.teacher_logits))
    assert (open_cache(tmp_path / "c.zarr").read_shard(0).heatmaps == 0).all()


def test_an_uncommitted_shard_does_not_exist_for_a_reader(tmp_path):
    cache = create_cache(tmp_path / "c.zarr", info(), HEAD)
    cache.write_shard(1, content(4))
    cache._arrays["heatmaps"][0:4] = 1  # written, and stopped before its commit record
    reader = open_cache(tmp_path / "c.zarr")
    assert reader.committed().tolist() == [False, True, False]
    with pytest.raises(CacheError, match=r"shard 0 of .* \(samples 0 to 3\) is not there yet"):
        reader.read_shard(0)
    with pytest.raises(CacheError, match="incomplete: 1 of 3 shards"):
        check_complete(reader)


@pytest.mark.parametrize("array", ["heatmaps", "target_class", "epsilon", "scale", "teacher_logits"])
def test_a_damaged_shard_is_named_and_never_read(tmp_path, array):
    filled(tmp_path / "c.zarr")
    file = next(f for f in (tmp_path / "c.zarr" / array / "c" / "1").rglob("*") if f.is_file())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 0x55
    file.write_bytes(bytes(raw))
    cache = open_cache(tmp_path / "c.zarr")
    cache.read_shard(0)
    with pytest.raises(CacheError, match=r"shard 1 of .* is damaged"):
        cache.read_shard(1)


def test_a_shard_that_vanished_is_named(tmp_path):
    filled(tmp_path / "c.zarr")
    next(f for f in (tmp_path / "c.zarr" / "heatmaps" / "c" / "2").rglob("*") if f.is_file()).unlink()
    with pytest.raises(CacheError, match=r"shard 2 of .* is damaged"):
        open_cache(tmp_path / "c.zarr").read_shard(2)


def test_not_finite_maps_are_refused(tmp_path):
    cache = create_cache(tmp_path / "c.zarr", info(), HEAD)
    shard = content(4)
    shard.heatmaps[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(CacheError, match="not finite"):
        cache.write_shard(0, shard)
    assert not cache.committed().any()


def test_arrays_of_wrong_shapes_and_shards_that_there_are_not_are_refused(tmp_path):
    cache = create_cache(tmp_path / "c.zarr", info(), HEAD)
    for wrong in (content(3), content(4, draws=1)):
        with pytest.raises(ValueError, match="shard 0 holds arrays of shapes"):
            cache.write_shard(0, wrong)
    for shard in (-1, 3):
        with pytest.raises(IndexError, match=f"no shard {shard}: the store has 3"):
            cache.read_shard(shard)
    assert not cache.committed().any()


def test_the_same_settings_open_the_store_and_others_are_refused(tmp_path):
    filled(tmp_path / "c.zarr")
    other_versions = dataclasses.replace(info(), written_by={"zarr": "4"})
    assert create_cache(tmp_path / "c.zarr", other_versions).committed().all()
    with pytest.raises(CacheError, match=r"explainer\.draws: 2, 3.*explainer\.seed: 0, 5"):
        create_cache(tmp_path / "c.zarr", info(draws=3, seed=5))


def change_attributes(path: Path, change: dict) -> None:
    meta = path / "zarr.json"
    attributes = json.loads(meta.read_text())
    attributes["attributes"].update(change)
    meta.write_text(json.dumps(attributes))


def test_a_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    created = []
    create_array = zarr.Group.create_array

    def failing(self, name, **options):
        created.append(name)
        if len(created) == 4:
            raise OSError("the power is gone")
        return create_array(self, name, **options)

    with monkeypatch.context() as patched:
        patched.setattr(zarr.Group, "create_array", failing)
        with pytest.raises(OSError, match="the power is gone"):
            create_cache(tmp_path / "c.zarr", info(), HEAD)
    assert list(tmp_path.iterdir()) == []
    assert not create_cache(tmp_path / "c.zarr", info(), HEAD).committed().any()
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


def test_of_two_that_create_a_store_at_once_one_does_and_both_use_it(tmp_path, monkeypatch):
    rename = Path.rename

    def slower(self, target):
        monkeypatch.undo()
        create_cache(tmp_path / "c.zarr", info(), HEAD).write_shard(0, content(4))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slower)
    assert create_cache(tmp_path / "c.zarr", info(), HEAD).committed().tolist() == [True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


@pytest.mark.parametrize("harm", ["removed", "chunk removed", "cut"])
def test_a_damaged_last_layer_is_refused(tmp_path, harm):
    filled(tmp_path / "c.zarr")
    chunk = tmp_path / "c.zarr" / "head" / "weight" / "c" / "0" / "0"
    if harm == "removed":
        shutil.rmtree(tmp_path / "c.zarr" / "head")
    elif harm == "chunk removed":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:5])
    with pytest.raises(CacheError, match="damaged"):
        open_cache(tmp_path / "c.zarr")


def test_a_commit_record_that_was_cut_is_none(tmp_path):
    filled(tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / "commits" / "c" / "1" / "0").write_bytes(b"")
    assert open_cache(tmp_path / "c.zarr").committed().tolist() == [True, False, True]


def test_a_shard_that_is_written_again_is_not_there_until_it_is_whole(tmp_path, monkeypatch):
    filled(tmp_path / "c.zarr")
    cache = open_cache(tmp_path / "c.zarr", writable=True)

    def fail(stored):
        raise OSError("the power is gone")

    monkeypatch.setattr("teacher_cache.store._digest", fail)
    with pytest.raises(OSError, match="the power is gone"):
        cache.write_shard(1, content(4, seed=9))
    monkeypatch.undo()
    assert open_cache(tmp_path / "c.zarr").committed().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "else"}, "no heatmap store"),
        ({"format_version": 9}, "store format version 9, this program reads version 1"),
        ({"explainer": {"rule": "flex"}}, "attribute 'explainer' has fields"),
        ({"teacher": None}, "attribute 'teacher' has fields"),
        ({"written_by": 5}, "'written_by' is 5"),
        ({"storage": {**dataclasses.asdict(info().storage), "shard_samples": 0}}, "a size under 1"),
        ({"storage": {**dataclasses.asdict(info().storage), "shard_samples": "4"}}, "'storage.shard_samples' is '4'"),
        ({"dataset": {**dataclasses.asdict(info().dataset), "samples": 11}}, "its attributes promise"),
    ],
)
def test_foreign_attributes_are_refused_with_a_reason(tmp_path, change, message):
    create_cache(tmp_path / "c.zarr", info(), HEAD)
    change_attributes(tmp_path / "c.zarr", change)
    with pytest.raises(CacheError, match=message):
        open_cache(tmp_path / "c.zarr")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"zarr_format": 3}'])
@pytest.mark.parametrize("file", ["zarr.json", "heatmaps/zarr.json", "commits/zarr.json"])
def test_broken_metadata_is_refused(tmp_path, file, text):
    filled(tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / file).write_text(text)
    with pytest.raises(CacheError, match=r"c\.zarr"):
        open_cache(tmp_path / "c.zarr")


def test_a_path_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError, match="choose another --out"):
            create_cache(tmp_path / name, info(), HEAD)
        with pytest.raises(CacheError, match="no heatmap store"):
            open_cache(tmp_path / name)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["notes.txt"]


@given(draws=st.integers(1, 64), side=st.integers(1, 512), channels=st.integers(1, 4))
@settings(deadline=None)
def test_planned_shards_are_bounded_and_made_of_whole_chunks(draws, side, channels):
    plan = plan_storage(draws, (channels, side, side))
    assert 1 <= plan.chunk_samples <= plan.shard_samples <= 1024
    assert plan.shard_samples % plan.chunk_samples == 0
    assert plan.shard_samples == 1 or plan.shard_samples * draws * channels * side * side * 2 <= 2**25


def test_reading_heatmaps_needs_no_pytorch():
    code = "import sys, teacher_cache; sys.exit('torch' in sys.modules or 'pipeline' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
