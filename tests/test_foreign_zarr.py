"""Zarr stores as xarray, Dask, tensorstore and zarr-python leave them: the values that are meant, or a refusal."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, TransposeCodec, ZstdCodec

from data import DatasetError, DatasetWriter, open_dataset
from data.layout import warn_once
from data.storage import open_store

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
LABELS = np.arange(20) % 2
MASKS = RNG.integers(0, 2, (20, 1, 16, 16), dtype=np.uint8)
ATTRIBUTES = {"kind": "explanation-distillation dataset", "format_version": 1, "class_names": ["a", "b"]}
MIGRATED = "(pip install 'zarr[cli]'). Before that, {}write 0 for each fill_value that is null in its .zarray files"


@pytest.fixture(autouse=True)
def _warn_again():
    warn_once.cache_clear()


def make(path: Path, arrays: dict[str, Any] | None = None, split: str = "train", **options: Any) -> Path:
    """A dataset of one split through plain Zarr. Options are those of ``images`` in `zarr.create_array`."""
    group = zarr.open_group(str(path), mode="a", zarr_format=3, attributes=ATTRIBUTES).create_group(split)
    for name, values in {"images": IMAGES, "labels": LABELS, **(arrays or {})}.items():
        group.create_array(name, data=values, **(options if name == "images" else {}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as error:
        open_dataset(path)
    return str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (2, 3, 16, 16), "shards": (8, 3, 16, 16)},
        {"chunks": (2, 3, 16, 16), "shards": {"shape": (6, 3, 16, 16), "index_location": "start"}},
        {"chunks": (7, 2, 5, 16)},
        {"filters": [TransposeCodec(order=(3, 1, 2, 0))], "chunks": (6, 3, 16, 16)},
        {"compressors": GzipCodec()},
        {"compressors": ZstdCodec(level=9, checksum=True)},
        {"compressors": None},
        *({"compressors": BloscCodec(cname=name)} for name in ("lz4", "lz4hc", "blosclz", "zlib", "zstd")),
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"dimension_names": ("sample", "band", "y", "x")},
        {"attributes": {"scale_factor": 1.0, "add_offset": 0}},
        {"attributes": {"scale_factor": [np.float32(1 / 255).item()], "_Unsigned": "true"}},
    ],
)
def test_however_a_foreign_array_is_stored_its_values_are_read_without_a_word(tmp_path, caplog, options):
    dataset = open_dataset(make(tmp_path / "d.zarr", **options))
    assert np.array_equal(dataset.split("train").images[:], IMAGES)
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [">i8", ">u2", "<u8", "|i1"])
def test_labels_of_any_integer_type_and_byte_order_are_read(tmp_path, dtype):
    labels = LABELS.astype(dtype)
    group = zarr.open_group(str(make(tmp_path / "d.zarr")), mode="r+")["train"]
    serializer = BytesCodec(endian="big") if dtype[0] == ">" else "auto"
    group.create_array("labels", data=labels, serializer=serializer, overwrite=True)
    assert np.array_equal(open_dataset(tmp_path / "d.zarr").split("train").labels[:], LABELS)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("images", {"scale_factor": 0.5, "add_offset": 100.0}),
        ("images", {"scale_factor": 1 / 255, "add_offset": 1.0}),
        ("images", {"add_offset": "100"}),
        ("images", {"scale_factor": "NaN"}),
        ("images", {"scale_factor": [2.0]}),
        ("images", {"_Unsigned": "false"}),
        ("labels", {"add_offset": -1}),
        ("labels", {"scale_factor": 1 / 255}),
        ("labels", {"_Unsigned": "true"}),
        ("masks", {"add_offset": 1.0}),
        ("groups", {"scale_factor": 3}),
    ],
)
def test_attributes_by_which_other_values_are_meant_are_refused_when_opened_and_when_copied(tmp_path, name, attributes):
    path = make(tmp_path / "d.zarr", {"masks": MASKS, "groups": LABELS})
    train = zarr.open_group(str(path), mode="r+")["train"]
    train[name].attrs.put(attributes)
    assert f"'{name}' is {train[name].dtype} with the attributes {attributes}, by which other" in refusal(path)
    copied = {"images": IMAGES, "labels": LABELS, name: zarr.open_array(str(path), path=f"train/{name}")}
    with (
        pytest.raises(DatasetError, match="by which other values are meant"),
        DatasetWriter(tmp_path / "w.zarr") as writer,
    ):
        writer.write_split("train", **copied)


@pytest.mark.parametrize("names", [("batch", "y", "x", "channel"), ("N", "H", "W", "C"), ("c", "n", "rows", "cols")])
@pytest.mark.parametrize("how", ["dimension_names", "_ARRAY_DIMENSIONS"])
def test_channels_that_are_another_axis_by_name_are_refused_with_the_transposition(tmp_path, names, how):
    square = IMAGES[:, :, :3, :3]  # no size tells the axes
    options = {how: names} if how == "dimension_names" else {"attributes": {how: names}}
    text = refusal(make(tmp_path / "d.zarr", {"images": square}, **options))
    axes = (1, 0, 2, 3) if names[0] == "c" else (0, 3, 1, 2)
    assert f"'images' has the dimensions {', '.join(names)}, expected samples, channels, rows, columns" in text
    assert f"images.transpose{axes}, or correct these names" in text


def test_columns_before_rows_by_name_are_told(tmp_path, caplog):
    open_dataset(make(tmp_path / "d.zarr", dimension_names=("sample", "channel", "x", "y")))
    assert "images.transpose(0, 1, 3, 2), or correct these names" in caplog.text


@pytest.mark.parametrize("name", ["labels", "masks", "groups"])
def test_missing_chunks_of_every_array_are_told(tmp_path, caplog, name):
    path = make(tmp_path / "d.zarr", {"masks": MASKS, "groups": LABELS})
    shutil.rmtree(path / "train" / name / "c")
    open_dataset(path)
    assert f"1 of 1 chunks of 'train/{name}' are missing, and are read as 0" in caplog.text


def test_missing_shards_are_counted_as_files(tmp_path, caplog):
    path = make(tmp_path / "d.zarr", chunks=(2, 3, 16, 16), shards=(8, 3, 16, 16))
    shutil.rmtree(path / "train" / "images" / "c" / "1")
    open_dataset(path)
    assert "1 of 3 shards of 'train/images' are missing" in caplog.text


def test_a_split_without_metadata_of_its_group_is_not_left_out_in_silence(tmp_path):
    path = make(make(tmp_path / "d.zarr"), split="validation", arrays={"images": IMAGES[::-1]})
    (path / "validation" / "zarr.json").unlink()  # tensorstore writes none
    text = refusal(path)
    assert f"{path} cannot be opened: validation/zarr.json is missing beside validation/images" in text
    (path / "validation" / "zarr.json").write_text(text[text.index("{") : text.index("}") + 1])
    assert set(open_dataset(path).splits) == {"train", "validation"}


def test_a_split_behind_a_broken_link_is_not_left_out_in_silence(tmp_path):
    path = make(tmp_path / "d.zarr")
    (path / "validation").symlink_to(tmp_path / "nowhere")
    assert f"validation is a link to {tmp_path / 'nowhere'}, which does not exist" in refusal(path)
    make(tmp_path / "other.zarr", {"images": IMAGES[::-1]})
    (path / "validation").unlink()
    (path / "validation").symlink_to(tmp_path / "other.zarr" / "train")
    assert np.array_equal(open_dataset(path).split("validation").images[:], IMAGES[::-1])


def test_two_splits_of_the_same_samples_are_told(tmp_path, caplog):
    path = make(tmp_path / "d.zarr")
    (path / "validation").symlink_to("train")
    open_dataset(path)
    assert f"the splits 'train' and 'validation' of {path} hold the same samples" in caplog.text


@pytest.mark.parametrize("what", ["group", "validation", "masks", "groups", "images"])
@pytest.mark.parametrize("consolidated", [False, True])
def test_format_2_is_called_that_and_the_remedy_converts_null_fill_values_too(tmp_path, what, consolidated):
    path, arrays = tmp_path / "d.zarr", {"masks": MASKS, "groups": LABELS}
    everything = {"images": IMAGES, "labels": LABELS, **arrays}
    place = {"group": path, "validation": path / "validation"}.get(what, path / "train" / what)
    if what in ("group", "validation"):
        if what == "validation":
            make(path, arrays)
        group = zarr.create_group(str(place), zarr_format=2, attributes=ATTRIBUTES if what == "group" else {})
        inner = group.create_group("train") if what == "group" else group
        for name, values in everything.items():
            inner.create_array(name, data=values, fill_value=None)
        if consolidated:
            zarr.consolidate_metadata(str(place), zarr_format=2)
    elif consolidated:
        pytest.skip("an array has no consolidated metadata")
    else:
        make(path, arrays)
        shutil.rmtree(place)
        zarr.create_array(str(place), data=everything[what], zarr_format=2, fill_value=None)
    text = refusal(path)
    assert f"of Zarr format 2, so convert it with `zarr migrate v3 {place}`" in text
    assert text.endswith(MIGRATED.format("remove its .zmetadata, and " if consolidated else ""))
    migrate = pytest.importorskip("zarr.metadata.migrate_v3")
    (place / ".zmetadata").unlink(missing_ok=True)
    for document in place.rglob(".zarray"):
        document.write_text(json.dumps(json.loads(document.read_text()) | {"fill_value": 0}))
    migrate.migrate_v2_to_v3(input_store=open_store(place, writable=True))
    for split in open_dataset(path).splits.values():
        for name, values in everything.items():
            assert np.array_equal(getattr(split, name)[:], values)


@pytest.mark.parametrize("names", [[0, 1], "a,b", {"a": 0}])
def test_class_names_that_are_no_list_of_names_are_told_with_what_is_there(tmp_path, names):
    path = make(tmp_path / "d.zarr")
    zarr.open_group(str(path), mode="r+").attrs["class_names"] = names
    assert f"has class_names {names!r}: make it a list of names" in refusal(path)


@pytest.mark.parametrize("key", ["class_names", "group_names"])
@pytest.mark.parametrize("name", ["\udce9", "two\nlines"])
def test_names_that_cannot_be_printed_are_refused(tmp_path, key, name):
    path = make(tmp_path / "d.zarr")
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"][key] = ["a", name]
    (path / "zarr.json").write_text(json.dumps(document))
    text = refusal(path)
    assert "which cannot be printed: rename it" in text
    assert text.isprintable()


def test_what_else_lies_in_a_dataset_is_ignored(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = make(tmp_path / "d.zarr", {"sample": np.arange(20)})  # a coordinate, as xarray writes it
    zarr.open_group(str(path), mode="r+").create_array("time", data=np.arange(3))
    zarr.open_group(str(path), mode="r+")["train"].create_group("thumbnails").create_array("images", data=IMAGES)
    (path / "README.md").write_text("mine")
    (path / "notes").mkdir()
    assert list(open_dataset(path).splits) == ["train"]
    assert not caplog.messages
