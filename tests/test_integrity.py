"""Integrity: whatever is damaged in a store is named, and never read as if it were right."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from faulty import in_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import HEAD, STORAGE, content, expected, files, filled, info, refusal, same
from zarr.storage import MemoryStore

from cli import main
from data.storage import open_store
from pipeline import EXPLAINERS
from teacher_cache import (
    Cache,
    CacheError,
    check_complete,
    claim_writing,
    continuing,
    create_cache,
    damaged_shards,
    inspect_cache,
    open_cache,
)
from teacher_cache.inspection import NO_SHARES
from terminal.spelling import spell

INFO = info()
WHOLE, REWRITTEN = (files(filled(MemoryStore(), seed=seed).store) for seed in (0, 1))
ANOTHER_STORE = files(filled(MemoryStore(), info(explainer={"seed": 7})).store)
RIGHT = [expected(INFO, shard) for shard in range(INFO.shards)]
DATA = sorted(key for key in WHOLE if "/c." in key)


@st.composite
def damage(draw) -> tuple[dict[str, bytes], int]:
    """A store in which one file of one shard is not what it was, and the shard's number."""
    key = draw(st.sampled_from(DATA))
    raw, kind = WHOLE[key], draw(st.sampled_from(["flip", "cut", "more", "gone", "shard", "version", "store", "array"]))
    other = draw(st.sampled_from(DATA))
    place = draw(st.integers(0, len(raw) - 1))
    new: bytes | None
    if kind == "flip":
        new = raw[:place] + bytes([raw[place] ^ draw(st.integers(1, 255))]) + raw[place + 1 :]
    elif kind == "cut":
        new = raw[:place]
    elif kind == "more":
        new = raw + draw(st.binary(min_size=1, max_size=9))
    elif kind == "gone":
        new = None
    elif kind == "shard":
        new = WHOLE[next(each for each in DATA if each.split("/")[0] == key.split("/")[0] and each != key)]
    elif kind == "version":
        new = REWRITTEN[key]
    elif kind == "store":
        new = ANOTHER_STORE[key]
    else:
        new = WHOLE[other]
    changed = {name: value for name, value in WHOLE.items() if name != key}
    return changed | ({} if new is None else {key: new}), int(key.split("/c.")[1].split(".")[0])


@given(damaged=damage())
@settings(deadline=None, max_examples=250)
def test_a_shard_of_which_anything_is_damaged_is_named_and_never_read_wrong(damaged):
    image, shard = damaged
    cache = open_cache(in_memory(image))
    start, stop = INFO.shard_range(shard)
    said = refusal(lambda: cache.read_shard(shard))
    if said is None:  # what was put there is the same, or is behind the end and not a part of it
        assert same(cache.read_shard(shard), RIGHT[shard])
    else:
        assert f"(samples {start} to {stop - 1}) is " in said
        assert "is damaged: its content is not what was committed" in said or "is not there yet" in said
    assert ("is not there yet" in (said or "")) == (not cache.is_committed(shard)) == (not cache.committed()[shard])
    for draw in range(INFO.explainer.draws):
        try:
            found = cache.read_draw(shard, draw)
        except CacheError:
            continue
        for name, right in open_cache(in_memory(WHOLE)).read_draw(shard, draw).items():
            assert np.array_equal(found[name], right)
    for name, (shape, dtype) in cache.sample_fields.items():
        out = {name: np.empty((stop - start, *shape), dtype)}
        if refusal(lambda out=out: cache.read_samples(shard, out)) is None:
            assert np.array_equal(out[name], getattr(RIGHT[shard], name))
    for other in set(range(INFO.shards)) - {shard}:
        assert same(cache.read_shard(other), RIGHT[other])


def test_every_byte_of_a_shard_counts():
    """Every bit position of every byte, once for each file of a shard: there is no part that nobody checks."""
    for key in [key for key in DATA if "/c.2" in key]:
        for place in range(0, len(WHOLE[key]), 1 if len(WHOLE[key]) < 200 else 7):
            raw = bytearray(WHOLE[key])
            raw[place] ^= 1 << place % 8
            cache = open_cache(in_memory(WHOLE | {key: bytes(raw)}))
            assert refusal(lambda cache=cache: cache.read_shard(2)), (key, place)


def test_all_files_of_a_shard_in_place_of_anothers_are_noticed():
    """Each fits the other, but the commit record says whose they are."""
    moved = {key.replace("/c.1", "/c.0"): raw for key, raw in WHOLE.items() if "/c.1" in key}
    said = refusal(lambda: open_cache(in_memory(WHOLE | moved)).read_shard(0))
    assert "its commit record is that of another shard or store" in (said or "")
    foreign = {key: raw for key, raw in ANOTHER_STORE.items() if "/c.0" in key}
    said = refusal(lambda: open_cache(in_memory(WHOLE | foreign)).read_shard(0))
    assert "its commit record is that of another shard or store" in (said or "")


def test_a_draw_beside_a_damaged_one_is_still_right():
    (key,) = [key for key in DATA if key.startswith("heatmaps/c.0")]
    raw = bytearray(WHOLE[key])
    raw[-1] ^= 1  # of the last draw
    cache = open_cache(in_memory(WHOLE | {key: bytes(raw)}))
    assert np.array_equal(cache.read_draw(0, 0)["heatmaps"], open_cache(in_memory(WHOLE)).read_draw(0, 0)["heatmaps"])
    assert "is damaged" in (refusal(lambda: cache.read_draw(0, 1)) or "")


def test_damaged_features_are_noticed_and_what_is_beside_them_is_still_right():
    raw = bytearray(WHOLE["features/c.0.0"])
    raw[3] ^= 1
    cache = open_cache(in_memory(WHOLE | {"features/c.0.0": bytes(raw)}))
    features, logits = np.empty((4, 5), np.float32), np.empty((4, 3), np.float32)
    assert "shard 0 of" in (refusal(lambda: cache.read_samples(0, {"features": features})) or "")
    assert list(damaged_shards(cache)) == [0]
    cache.read_samples(0, {"teacher_logits": logits})
    assert np.array_equal(logits, RIGHT[0].teacher_logits)
    assert "is not there yet" in (refusal(lambda: empty().read_samples(0, {"teacher_logits": logits})) or "")


def empty() -> Cache:
    return create_cache(MemoryStore(), INFO, HEAD)


def test_files_that_are_no_commit_records_commit_nothing():
    strange = ["c.-1.0", "c.x.0", "c.0.0.bak", "c.00.0", "c.3.0", "c.1", ".c.1.0.partial", "c.", "notes"]
    image = {key: raw for key, raw in WHOLE.items() if not key.startswith("commits/c")}
    image |= {f"commits/{name}": WHOLE["commits/c.0.0"] for name in strange}
    assert not open_cache(in_memory(image)).committed().any()


@given(
    key=st.sampled_from(sorted(key for key in WHOLE if "/c." not in key)),
    place=st.integers(0, 10**6),
    flip=st.integers(0, 255),
    cut=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_damaged_metadata_is_refused_or_of_no_consequence(key, place, flip, cut):
    raw = WHOLE[key]
    place %= len(raw)
    new = raw[:place] if cut else raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :]
    store = in_memory(WHOLE | {key: new})
    if refusal(lambda: open_cache(store)) is None:
        cache = open_cache(store)
        for shard in np.flatnonzero(cache.committed()).tolist():
            if refusal(lambda shard=shard: cache.read_shard(shard)) is None:
                assert same(cache.read_shard(shard), RIGHT[shard])


def test_what_is_not_there_is_said():
    cache = create_cache(MemoryStore(), INFO, HEAD)
    cache.write_shard(1, content(INFO, 1))
    with pytest.raises(CacheError, match=r"shard 0 of .* \(samples 0 to 3\) is not there yet: run cache_expl"):
        cache.read_shard(0)
    with pytest.raises(CacheError, match="is incomplete: 1 of 3 shards are there; run cache_explanations"):
        check_complete(cache)
    for shard in (-1, 3):
        with pytest.raises(IndexError, match=f"there is no shard {shard}: the store has 3, counted from 0"):
            cache.read_shard(shard)
    for wrong in (content(INFO, 2), content(info(draws=1), 0)):
        with pytest.raises(ValueError, match="shard 0 holds arrays of shapes"):
            cache.write_shard(0, wrong)


# Versions, and attributes of others


def changed(**attributes: object) -> MemoryStore:
    group = json.loads(WHOLE["zarr.json"])
    group["attributes"].update(attributes)
    kept = {key: value for key, value in group["attributes"].items() if value != "removed"}
    return in_memory(WHOLE | {"zarr.json": json.dumps(group | {"attributes": kept}).encode()})


def section(name: str, **fields: object) -> dict[str, object]:
    return {name: {**dataclasses.asdict(getattr(INFO, name)), **fields}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "else"}, "no heatmap store at .*: its 'kind' is 'else'; make one with"),
        ({"format_version": 1}, "store format version 1, this program reads version 3: use the program that wrote it"),
        ({"format_version": 2}, "store format version 2, this program reads version 3"),
        ({"format_version": 4}, "store format version 4, this program reads version 3"),
        ({"format_version": "removed"}, "store format version None"),
        ({"notes": 1}, "it has attributes that this program does not know: notes"),
        ({"explainer": {"rule": "flex"}}, "its attribute 'explainer' has fields \\['rule'\\], expected"),
        ({"explainer": "removed"}, "its attribute 'explainer' has fields"),
        ({"teacher": None}, "its attribute 'teacher' has fields"),
        (section("teacher", more=1), "its attribute 'teacher' has fields .*'more'"),
        (section("teacher", bias_free=1), "'teacher.bias_free' is 1, expected"),
        (section("teacher", class_names=[]), "'teacher.class_names' is \\(\\), expected names of classes"),
        (section("teacher", class_names=["a", 2, "c"]), "'teacher.class_names' is"),
        (section("teacher", head_sha256="0"), "the teacher's last layer in the store .* is damaged or missing"),
        ({"written_by": 5}, "'written_by' is 5, expected names and versions"),
        (section("explainer", seed=True), "'explainer.seed' is True, expected"),
        (section("explainer", epsilon_low=True), "'explainer.epsilon_low' is True, expected"),
        (section("explainer", draws=0), "a size under 1"),
        (section("storage", shard_samples=0), "a size under 1"),
        (section("storage", resolution=0), "a size under 1"),
        (section("storage", resolution=7), "its maps are empty: \\(3, 6, 5\\), average-pooled by 7"),
        (section("storage", features=-1), "'storage.features' is -1, expected a width, or 0 for none"),
        (section("storage", features=True), "'storage.features' is True, expected"),
        (section("storage", features=4), "is damaged: features/zarr.json says .* its attributes promise"),
        (section("storage", features=0), "is damaged: commits/zarr.json says .* its attributes promise"),
        (section("explainer", map_shape=[1, 2]), "'explainer.map_shape' is \\(1, 2\\), expected three sizes"),
        (section("explainer", map_shape=[1, 2, 0]), "'explainer.map_shape' is \\(1, 2, 0\\), expected three sizes"),
        (section("explainer", map_shape=None), "'explainer.map_shape' is None"),
        (section("explainer", map_shape=[1, 2, 2]), "is damaged: heatmaps/zarr.json says .* its attributes promise"),
        (section("storage", shard_samples="4"), "'storage.shard_samples' is '4'"),
        (section("storage", chunk_samples=3), "its shards are no whole number of chunks"),
        (section("storage", precision="float8"), "its precision is 'float8', this program knows float16, bfloat16"),
        (section("storage", codec="gzip-1"), "unknown codec 'gzip-1'"),
        (section("dataset", samples=11), "is damaged: heatmaps/zarr.json says .* its attributes promise"),
        (section("dataset", image_shape=[3, 6]), "has no sizes of images"),
        (section("dataset", image_shape=[3, 6, "5"]), "has no sizes of images"),
        (section("storage", precision="bfloat16"), "its attributes promise"),
        (section("storage", chunk_samples=4), "its attributes promise"),
    ],
)
def test_foreign_attributes_are_refused_with_a_reason(change, message):
    with pytest.raises(CacheError, match=message):
        open_cache(changed(**change))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", '{"zarr_format": 3}', "\xff"])
@pytest.mark.parametrize("key", ["zarr.json", "heatmaps/zarr.json", "commits/zarr.json", "head/weight/zarr.json"])
def test_metadata_that_is_none_is_refused(key, text):
    with pytest.raises(CacheError, match=r"no heatmap store at|is damaged|not finished, or damaged"):
        open_cache(in_memory(WHOLE | {key: text.encode("latin-1")}))


def test_the_same_settings_open_the_store_and_others_are_refused():
    store = in_memory(WHOLE)
    other_versions = dataclasses.replace(INFO, written_by={"zarr": "4"})
    assert create_cache(store, other_versions, HEAD).committed().all()
    with pytest.raises(CacheError, match=r"explainer\.draws: 2, 3.*storage\.precision: 'float16', 'int8'"):
        create_cache(store, info(draws=3, precision="int8"), HEAD)
    assert files(store) == WHOLE


def test_a_path_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError, match="choose another out"):
            create_cache(tmp_path / name, INFO, HEAD)
        with pytest.raises(CacheError, match="no heatmap store"):
            open_cache(tmp_path / name)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["notes.txt"]


def test_reading_heatmaps_needs_no_pytorch():
    code = "import sys, teacher_cache; sys.exit('torch' in sys.modules or 'pipeline' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


# inspect-cache


@pytest.fixture
def path(tmp_path) -> Path:
    filled(tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def inspect(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["inspect-cache", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def harm(path: Path, key: str) -> None:
    raw = bytearray((path / key).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / key).write_bytes(raw)


def test_inspect_cache_shows_what_a_store_is_in_aligned_lines(path):
    lines = inspect(path).splitlines()
    shown = {line[:12].strip(): line[12:] for line in lines}
    assert all(line[11] == " " and line[12] != " " for line in lines)
    assert shown["store"] == str(path)
    assert shown["teacher"].startswith("small-cnn without biases, debiasing grayscale")
    assert shown["explainer"] == "flex, 2 draws a sample, ε from 0.01 to 1, classes top-or-other, seed 0"
    assert shown["dataset"].startswith("mine, split train: 10 images of 3 × 6 × 5")
    assert shown["state"] == "complete: 3 of 3 shards, 10 of 10 samples"
    assert "times smaller than the maps in float32" in shown["size"]
    assert shown["storage"].startswith("float16, blosc-lz4-5-bitshuffle, 5 features a sample, shards of 4 samples")
    assert "zeros" in shown["maps"]
    assert "explain the top class, ε from" in shown["draws"]


def test_inspect_cache_shows_coarse_maps_and_what_they_do_not_explain(tmp_path):
    explainer = {"rule": "attention", "class_policy": "none", "map_shape": (1, 3, 2)}
    of = info(draws=1, explainer=explainer, features=0)
    assert "--features" not in spell(continuing(filled(tmp_path / "c.zarr", of)))
    shown = {line[:12].strip(): line[12:] for line in inspect(tmp_path / "c.zarr").splitlines()}
    assert shown["explainer"].startswith("attention, maps of 1 × 3 × 2, 1 draws a sample, ")
    assert "features" not in shown["storage"]
    assert shown["draws"].startswith("ε from ")
    assert json.loads(inspect(tmp_path / "c.zarr", "--json"))["raw_bytes"] == 10 * 1 * 3 * 2 * 4


@pytest.mark.parametrize(
    ("resolution", "explainer"), [(1, {}), (2, {}), (1, {"rule": "flex-stride8", "map_shape": (3, 6, 6)})]
)
def test_inspect_cache_says_how_much_of_the_logit_the_maps_sum_to_by_epsilon(tmp_path, resolution, explainer):
    of = info(
        samples=12, image_shape=(3, 48, 48) if explainer else (3, 6, 6), resolution=resolution, explainer=explainer
    )
    cache = create_cache(tmp_path / "c.zarr", of, HEAD)
    for shard in range(of.shards):
        random = content(of, shard)
        epsilon = np.where(np.arange(2) == 0, np.float32(0.02), np.float32(0.5)) + np.zeros((4, 1), np.float32)
        logits = np.take_along_axis(random.teacher_logits, random.target_class, 1)
        parts = logits * [[0.9, 0.25]]
        maps = np.full((4, 2, 3, 6, 6), 1 / 108) * parts[..., None, None, None]
        cache.write_shard(shard, dataclasses.replace(random, heatmaps=maps.astype(np.float32), epsilon=epsilon))
    low, high = inspect_cache(open_cache(tmp_path / "c.zarr"))["maps"]["sums"]
    assert (low["epsilon_low"], low["epsilon_high"], low["maps"]) == (0.01, pytest.approx(0.1), 12)
    assert (low["share"], high["share"]) == (pytest.approx(0.9, rel=1e-3), pytest.approx(0.25, rel=1e-3))
    assert (low["correlation"], high["correlation"]) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))
    shown = {line[:12].strip(): line[12:] for line in inspect(tmp_path / "c.zarr").splitlines()}
    assert shown["sums"] == (
        "90% of the logit, correlation 1.00, with ε from 0.01 to 0.1; "
        "25% of the logit, correlation 1.00, with ε from 0.1 to 1"
    )


def test_the_explainers_whose_maps_are_no_shares_of_the_logit_are_those_of_the_registry():
    assert set(NO_SHARES) == {name for name, explainer in EXPLAINERS.items() if not explainer.sums_to_logit}


@pytest.mark.parametrize(
    "explainer", [{"rule": "input-gradient"}, {"rule": "attention", "class_policy": "none", "map_shape": (1, 3, 2)}]
)
def test_inspect_cache_says_nothing_of_sums_that_mean_no_logit(tmp_path, explainer):
    filled(tmp_path / "c.zarr", info(draws=1, explainer=explainer))
    assert "sums" not in {line[:12].strip() for line in inspect(tmp_path / "c.zarr").splitlines()}


def test_inspect_cache_counts_what_there_is(path):
    found = json.loads(inspect(path, "--json"))
    assert found["bytes"] == sum(len(raw) for raw in files(path).values())
    assert found["raw_bytes"] == 10 * 2 * 3 * 6 * 5 * 4
    assert found["complete"]
    maps = np.concatenate([shard.heatmaps for shard in RIGHT])
    assert found["maps"]["zeros"] == pytest.approx((maps == 0).mean(), abs=0.02)
    assert found["maps"]["largest"] == pytest.approx(np.abs(maps).max())
    for shard in range(3):
        open_cache(path, writable=True).uncommit(shard)
    assert "0.0% done: 0 of 3 shards, 0 of 10 samples" in inspect(path)
    assert inspect_cache(open_cache(path))["maps"] is None


def test_inspect_cache_verifies_repairs_and_the_shards_can_be_written_again(path):
    assert inspect(path, "--verify").endswith("0 of 3 shards are damaged\n")
    harm(path, "heatmaps/c.1.0.0.0.0")
    (path / "epsilon" / "c.2.0").unlink()
    assert "complete" in inspect(path)
    shown = inspect(path, "--verify", code=1)
    assert f"shard 1 of {path} (samples 4 to 7) is damaged" in shown
    assert f"shard 2 of {path} (samples 8 to 9) is damaged" in shown
    assert "2 of 3 shards are damaged" in shown
    found = json.loads(inspect(path, "--verify", "--json", code=1))
    assert [(each["shard"], each["samples"]) for each in found["damaged"]] == [(1, [4, 8]), (2, [8, 10])]
    repaired = inspect(path, "--repair")
    assert "state       40.0% done: 1 of 3 shards" in repaired
    same = "--explainer flex --seed 0 --precision float16 --codec blosc-lz4-5-bitshuffle --resolution 1 --features"
    assert f"cache-explanations --split train --draws 2 --epsilon-range 0.01 1.0 {same} --out {path}," in repaired
    moved = path.rename(path.with_name("my store.zarr"))
    assert shlex.split(spell(continuing(open_cache(moved))))[-2:] == ["--out", str(moved)]
    moved.rename(path)
    assert inspect(path, "--verify").endswith("0 of 1 shards are damaged\n")
    cache = create_cache(path, INFO, HEAD)
    assert cache.committed().tolist() == [True, False, False]
    for shard in (1, 2):
        cache.write_shard(shard, content(INFO, shard))
    assert files(path) == WHOLE


def test_nobody_repairs_what_another_one_is_writing(path):
    harm(path, "scale/c.1.0")
    with claim_writing(open_cache(path, writable=True)):
        assert "another process is writing" in inspect(path, "--repair", code=1)
    assert open_cache(path).committed().all()


def test_inspect_cache_of_nothing_is_one_sentence(tmp_path):
    assert inspect(tmp_path / "no.zarr", code=1).startswith(f"Error: no heatmap store at {tmp_path / 'no.zarr'}")


def test_a_disk_that_cannot_read_one_shard_is_damage_and_a_network_that_is_gone_is_not(monkeypatch):
    cache = filled(MemoryStore())
    read_shard = cache.read_shard

    def failing(number: int):
        def read(shard: int):
            if shard == 1:
                raise OSError(number, "broken", "heatmaps/c.1")
            return read_shard(shard)

        return read

    monkeypatch.setattr(cache, "read_shard", failing(5))
    assert list(damaged_shards(cache)) == [1]
    monkeypatch.setattr(cache, "read_shard", failing(110))
    with pytest.raises(OSError, match="broken"):
        damaged_shards(cache)


def test_a_damaged_last_layer_is_mended_by_the_writer(path):
    shutil.rmtree(path / "head")
    with pytest.raises(CacheError, match=r"the teacher's last layer in the store .* is damaged or missing"):
        open_cache(path)
    create_cache(path, INFO, HEAD)
    assert files(path) == WHOLE
    assert INFO.storage == STORAGE


def test_a_writer_of_a_store_of_other_settings_in_the_same_place_commits_nothing_that_is_read():
    """The store was made anew, with another seed, under a process that goes on writing the old one."""
    store = open_store(MemoryStore())
    old = create_cache(store, INFO, HEAD)
    for key, raw in ANOTHER_STORE.items():
        if "/c." not in key:
            store.write(key, raw)
    old.write_shard(0, content(INFO, 0))
    said = refusal(lambda: open_cache(store).read_shard(0))
    assert "its commit record is that of another shard or store" in (said or "")
