"""What the dataset layer promises about arrays: they are taken without a loss, or refused with the remedy."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import TensorDataset

from cli import main
from data import DatasetError, DatasetWriter, add_fingerprints, open_dataset
from data.layout import fingerprint, warn_once
from data.storage import open_store
from trainer import train_teacher

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
LABELS = np.arange(20) % 2
MASKS = RNG.integers(0, 2, (20, 1, 16, 16), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _warn_again():
    warn_once.cache_clear()


def write(path: Path, finish: dict[str, Any] | None = None, **arrays: Any) -> Path:
    """A dataset of one split, through the writer."""
    with DatasetWriter(path) as writer:
        writer.write_split("train", **{"images": IMAGES, "labels": LABELS, **arrays})
        writer.finish(**{"class_names": ["a", "b"], **(finish or {})})
    return path


def write_plainly(path: Path, attributes: dict[str, Any] | None = None, **arrays: Any) -> Path:
    """A dataset of one split, as other programs write it: through Zarr, without a fingerprint."""
    root = zarr.create_group(str(path), zarr_format=3)
    group = root.create_group("train")
    for name, values in {"images": IMAGES, "labels": LABELS, **arrays}.items():
        group.create_array(name, data=values)
    kind = "explanation-distillation dataset"
    root.attrs.put({"kind": kind, "format_version": 1, "class_names": ["a", "b"], **(attributes or {})})
    return path


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All messages, except that a dataset has no fingerprint, which is true of each that `write_plainly` makes."""
    return [message for message in caplog.messages if "has no fingerprint" not in message]


def change(path: Path, **changes: Any) -> None:
    """Change fields of a JSON document; None removes one."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


# --- axes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [write, write_plainly], ids=["written", "opened"])
@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((20, 32, 32, 3), "transpose(0, 3, 1, 2)"),
        ((20, 28, 28, 1), "transpose(0, 3, 1, 2)"),
        ((20, 8, 8, 4), "transpose(0, 3, 1, 2)"),
        ((20, 480, 640, 3), "transpose(0, 3, 1, 2)"),
        ((32, 32, 3, 20), "transpose(3, 2, 0, 1)"),
        ((3, 32, 32, 20), "transpose(3, 0, 1, 2)"),
        ((20, 28, 28), "images[:, None]"),
        ((20, 784), "reshape(N, C, H, W)"),
        ((20, 1, 3, 28, 28), "reshape(N, C, H, W)"),
        ((0, 3, 28, 28), "has no samples: leave it out"),
        ((20, 3, 28, 0), "have no pixels"),
    ],
)
def test_images_with_other_axes_are_refused_with_the_transposition(tmp_path, make, shape, remedy):
    labels = np.arange(20 if 20 in shape else 0) % 2
    with pytest.raises(DatasetError, match=r"the split 'train' .* 'images' is uint8") as refused:
        open_dataset(make(tmp_path / "d.zarr", images=np.zeros(shape, np.uint8), labels=labels))
    assert remedy in str(refused.value)
    assert str(tuple(shape)) in str(refused.value)


def test_the_transposition_that_is_advised_makes_a_dataset(tmp_path):
    for number, (shape, axes) in enumerate(
        [((20, 32, 24, 3), (0, 3, 1, 2)), ((32, 24, 3, 20), (3, 2, 0, 1)), ((3, 32, 24, 20), (3, 0, 1, 2))]
    ):
        images = np.zeros(shape, np.uint8)
        with pytest.raises(DatasetError, match=rf"images.transpose\({str(axes)[1:-1]}\)"):
            write(tmp_path / f"{number}.zarr", images=images)
        path = write(tmp_path / f"{number}.zarr", images=images.transpose(axes))
        assert open_dataset(path).split("train").image_shape in ((3, 32, 24), (3, 24, 32))


@pytest.mark.parametrize(
    ("shape", "doubtful"),
    [
        ((20, 3, 32, 3), False),  # 3 columns of RGB pixels
        ((20, 1, 1, 1), False),
        ((20, 2, 28, 28), False),
        ((20, 13, 32, 32), False),  # a satellite's bands
        ((20, 6, 6, 3), True),
        ((20, 12, 1000, 1), True),  # signals of 12 electrodes
        ((20, 13, 4, 4), True),
    ],
)
def test_narrow_images_are_taken_and_doubtful_axes_are_told(tmp_path, caplog, shape, doubtful):
    path = write_plainly(tmp_path / "d.zarr", images=np.full(shape, 7, np.uint8))
    with caplog.at_level(logging.WARNING, logger="data.layout"):
        assert open_dataset(path).split("train").image_shape == shape[1:]
        open_dataset(path)
    assert len(told(caplog)) == doubtful  # once in a process
    assert not doubtful or f"{shape[1]} channels and {shape[3]} columns" in caplog.text


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_images_of_many_channels_and_three_columns_are_taken_if_their_axes_are_named(tmp_path, caplog, dtype):
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 30, 3)).astype(dtype)
    with pytest.raises(DatasetError, match="the channels are the last axis") as refused:
        write(tmp_path / "d.zarr", images=images)
    told_remedy = re.search(r"if these are 12 channels of 30×3 pixels, name the axes: (zarr\..*)", str(refused.value))
    named = eval(told_remedy[1], {"zarr": zarr, "images": images})
    write(tmp_path / "d.zarr", images=named)
    split = open_dataset(tmp_path / "d.zarr").split("train")
    assert np.array_equal(split.images[:], images)
    assert told(caplog) == []
    plain = write_plainly(tmp_path / "e.zarr", images=images.astype(np.uint8))
    with pytest.raises(DatasetError, match="the channels are the last axis"):
        open_dataset(plain)


def test_names_of_axes_are_written_only_where_they_tell_the_order(tmp_path):
    for shape in ((20, 3, 16, 16), (20, 12, 30, 3)):
        path = tmp_path / f"{shape[1]}.zarr"
        named = zarr.create_array({}, data=np.zeros(shape, np.uint8), dimension_names=tuple("nchw"))
        write(path, images=named)
        names = json.loads((path / "train" / "images" / "zarr.json").read_text()).get("dimension_names")
        assert names == (list("nchw") if shape[3] == 3 else None)


def test_training_on_images_with_the_channels_last_is_refused(tmp_path):
    path = write_plainly(tmp_path / "d.zarr", images=np.zeros((20, 32, 32, 3), np.uint8))
    with pytest.raises(DatasetError, match="the channels are the last axis"):
        train_teacher(path, tmp_path / "t", arch="small-resnet", debias="none", steps=1)


# --- values and kinds ------------------------------------------------------------------------------------------------


class TensorOfAnotherLibrary:
    """As TensorFlow has it: a dtype that NumPy does not know, and ``__array__``."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype = values, values.shape, "a dtype of my own"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values

    def __getitem__(self, rows: Any) -> TensorOfAnotherLibrary:
        return TensorOfAnotherLibrary(self.values[rows])


class Column:
    """As pandas has it after a split in random order: slices go by label."""

    iloc = None

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def to_numpy(self) -> np.ndarray:
        return self.values

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.values[::-1][rows]


class NamedDtype:
    """As some storage libraries have it: the dtype is a name."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype = values, values.shape, str(values.dtype)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.values[rows]


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": NamedDtype(IMAGES), "labels": NamedDtype(LABELS), "masks": NamedDtype(MASKS)},
        {"images": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)},
        {"images": torch.from_numpy(IMAGES).requires_grad_(False).to(memory_format=torch.channels_last)},
        {"images": list(torch.from_numpy(IMAGES)), "labels": list(torch.from_numpy(LABELS))},
        {"images": list(IMAGES), "labels": LABELS.tolist(), "groups": LABELS.tolist()},
        {"images": IMAGES.tolist(), "labels": tuple(LABELS.tolist())},
        {"labels": torch.from_numpy(LABELS).bool()},
        {"labels": LABELS == 1, "groups": LABELS == 1},
        {"images": TensorOfAnotherLibrary(IMAGES), "labels": TensorOfAnotherLibrary(LABELS)},
        {"labels": Column(LABELS), "groups": Column(LABELS)},
        {"images": IMAGES.astype(np.int64)},
        {"images": torch.from_numpy(IMAGES).int()},
        {"images": IMAGES.astype(">u2")},
        {"images": np.asfortranarray(IMAGES)},
        {"images": np.repeat(IMAGES, 2, axis=0)[::2]},
        {"masks": MASKS.astype(bool)},
        {"masks": torch.from_numpy(MASKS).bool()},
        {"masks": MASKS.astype(np.int64)},
        {"masks": MASKS.astype(bool).tolist()},
    ],
    ids=[str(number) for number in range(19)],
)
def test_tensors_lists_booleans_and_other_integers_make_the_dataset_that_arrays_make(tmp_path, arrays):
    expected = {"images": IMAGES, "labels": LABELS, "groups": LABELS, "masks": MASKS}
    split = open_dataset(write(tmp_path / "d.zarr", **arrays)).split("train")
    for name in ("images", "labels", *arrays):
        assert np.array_equal(getattr(split, name)[:], expected[name]), name
        assert getattr(split, name).dtype == expected[name].dtype
    assert split.fingerprint == fingerprint({name: expected[name] for name in {"images", "labels", *arrays}})
    split.verify()


def test_integer_labels_keep_their_dtype(tmp_path):
    for dtype in (np.int8, np.uint16, np.int32):
        path = write(tmp_path / f"{np.dtype(dtype)}.zarr", labels=LABELS.astype(dtype))
        assert open_dataset(path).split("train").labels.dtype == dtype


@pytest.mark.parametrize(
    ("arrays", "remedy"),
    [
        ({"images": IMAGES / 255}, r"from 0 to 1: \(images \* 255\).round\(\).astype"),
        ({"images": torch.rand(20, 3, 16, 16)}, r"from .* to .*: \(images \* 255\)"),
        ({"images": IMAGES.astype(np.float32)}, r"from 0 to 255: images.round\(\).astype\(np.uint8\)"),
        ({"images": RNG.standard_normal((20, 3, 16, 16))}, "run from -.* to .*, so undo their normalisation"),
        ({"images": np.full((20, 3, 16, 16), np.nan)}, "if they run from 0 to 1"),
        ({"images": torch.zeros(20, 3, 16, 16, dtype=torch.bfloat16)}, "cannot be made a NumPy array"),
        ({"images": IMAGES > 100}, r"images.astype\(np.uint8\) \* 255"),
        ({"images": IMAGES.astype(np.int16) - 1}, "int16 with values from -1 to 254, which uint8 does not hold"),
        ({"images": IMAGES.astype(np.uint16) * 16}, "uint16 with values from 0 to 4080"),
        ({"images": IMAGES.astype(complex)}, "'images' is complex128"),
        ({"images": [IMAGES[0], IMAGES[1, :, :8]]}, "cannot be made a NumPy array"),
        ({"images": ["a.png", "b.png"]}, "'images' is <U5"),
        ({"images": [Image.new("RGB", (16, 16))] * 20}, r"transpose\(0, 3, 1, 2\)"),
        ({"images": TensorDataset(torch.from_numpy(IMAGES))}, "is a TensorDataset, .*of a PyTorch Dataset"),
        ({"images": iter(IMAGES)}, "which has no shape, dtype and slices of rows"),
        ({"images": None}, "is a NoneType"),
        ({"images": [], "labels": []}, "the split has no samples: leave it out, or add some"),
        ({"labels": np.eye(2)[LABELS]}, r"one-hot vectors.* labels.argmax\(1\)"),
        ({"labels": np.eye(2, dtype=int)[LABELS]}, r"one-hot vectors"),
        ({"labels": LABELS[:, None]}, r"labels\[:, 0\]"),
        ({"labels": LABELS.astype(float)}, r"labels.astype\(np.int64\)"),
        ({"labels": LABELS[:19]}, r"'labels' is int64 \(19,\), expected integers \(20,\): there are 20 images"),
        ({"labels": np.array(["cat", "dog"])[LABELS]}, r"np.unique\(labels, return_inverse=True\)"),
        ({"groups": ["x"] * 20}, r"np.unique\(groups"),
        ({"groups": np.zeros((20, 3))}, r"groups.argmax\(1\)"),
        ({"masks": MASKS[:, 0]}, r"masks\[:, None\]"),
        ({"masks": MASKS.transpose(0, 2, 3, 1)}, r"masks.transpose\(0, 3, 1, 2\)"),
        ({"masks": np.repeat(MASKS, 3, axis=1)}, r"masks.max\(1, keepdims=True\)"),
        ({"masks": MASKS[:, :, :8]}, "of its height and width"),
        ({"masks": MASKS.astype(np.float32)}, r"\(masks > 0.5\).astype\(np.uint8\)"),
        ({"masks": MASKS.astype(np.int32) * 300}, r"from 0 to 300, which uint8 does not hold: \(masks != 0\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_remedy(tmp_path, arrays, remedy):
    with pytest.raises(DatasetError, match=rf"(?s)the split 'train' for .*{remedy}"):
        write(tmp_path / "d.zarr", **arrays)
    assert not (tmp_path / "d.zarr").exists()


def test_a_split_that_was_refused_half_way_can_be_written_again(tmp_path):
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        with pytest.raises(DatasetError, match="does not hold"):
            writer.write_split("train", images=IMAGES.astype(np.int16) - 1, labels=LABELS)
        writer.write_split("train", images=IMAGES, labels=LABELS)
        writer.finish(class_names=["a", "b"])
    write(tmp_path / "other.zarr")
    assert {file.relative_to(tmp_path / "d.zarr") for file in (tmp_path / "d.zarr").rglob("*")} == {
        file.relative_to(tmp_path / "other.zarr") for file in (tmp_path / "other.zarr").rglob("*")
    }
    open_dataset(tmp_path / "d.zarr").split("train").verify()


def test_images_of_zeros_and_ones_are_told_to_be_nearly_black(tmp_path, caplog):
    write(tmp_path / "d.zarr", images=(IMAGES > 100).astype(np.uint8))
    assert "'images' has no value over 1, so it is nearly black" in caplog.text
    caplog.clear()
    write(tmp_path / "black.zarr", images=IMAGES * 0)
    write(tmp_path / "other.zarr")
    assert not told(caplog)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [write, write_plainly], ids=["written", "opened"])
def test_two_classes_of_one_name_are_refused(tmp_path, make):
    names = {"class_names": ["cat", "cat"]}
    with pytest.raises(DatasetError, match="has several classes called 'cat': give each its own name"):
        open_dataset(make(tmp_path / "d.zarr", names))


def test_one_class_is_told_and_cannot_be_trained_on(tmp_path, caplog):
    path = write(tmp_path / "d.zarr", {"class_names": ["only"]}, labels=LABELS * 0)
    assert "has one class, so nothing can be learnt from it" in caplog.text
    caplog.clear()
    open_dataset(write_plainly(tmp_path / "foreign.zarr", {"class_names": ["only"]}, labels=LABELS * 0))
    assert "has one class, so nothing can be learnt from it" in caplog.text
    with pytest.raises(DatasetError, match="has one class, 'only', so there is nothing to tell apart"):
        train_teacher(path, tmp_path / "t", steps=1)


@pytest.mark.parametrize("groups", [LABELS + 1, LABELS - 1])
def test_groups_without_a_name_are_refused_by_the_writer_and_told_when_a_dataset_is_opened(tmp_path, caplog, groups):
    names = {"group_names": ["x", "y"]}
    words = f"groups run from {groups.min()} to {groups.max()}, but there are 2 group names"
    with pytest.raises(DatasetError, match=words):
        write(tmp_path / "w.zarr", names, groups=groups)
    open_dataset(write_plainly(tmp_path / "d.zarr", names, groups=groups))
    assert words in caplog.text
    caplog.clear()
    open_dataset(write_plainly(tmp_path / "right.zarr", names, groups=LABELS))
    open_dataset(write_plainly(tmp_path / "unnamed.zarr", groups=groups))
    assert not told(caplog)


# --- foreign Zarr ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill_value": None}, "has the fill_value null, and Zarr format 3 requires a value: write 0"),
        ({"codecs": []}, "has no codecs"),
        ({"codecs": [{"name": "bytes"}, {"name": "mine"}]}, "mine"),
        ({"data_type": "uint7"}, "uint7"),
        ({"data_type": ...}, "lacks data_type"),
        ({"shape": ..., "codecs": ...}, "lacks shape, codecs"),
        ({"shape": "large"}, "cannot be read by Zarr"),
        ({"chunk_grid": {"name": "hexagons"}}, "cannot be read by Zarr"),
        ({"chunk_key_encoding": 7}, "cannot be read by Zarr"),
        ({"zarr_format": 2}, "has zarr_format 2, expected 3"),
        ({"node_type": "group"}, "describes a group, expected an array"),
    ],
)
@pytest.mark.parametrize("array", ["images", "labels"])
def test_a_flaw_of_a_foreign_array_is_named_by_its_document_in_one_line(tmp_path, array, changes, message):
    path = write_plainly(tmp_path / "d.zarr")
    for name in {array, "labels"}:  # two at once: Zarr reads them at the same time, and tells of the second later
        change(path / "train" / name / "zarr.json", **changes)
    command = [sys.executable, "cli.py", "train-teacher", "--data", path, "--steps", "1", "--out", tmp_path / "t"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"the split 'train' of {path} cannot be opened: train/{array}/zarr.json" in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"zarr_format": 3}'])
@pytest.mark.parametrize("key", ["zarr.json", "train/zarr.json", "train/labels/zarr.json"])
def test_a_document_that_is_none_is_named(tmp_path, key, text):
    path = write_plainly(tmp_path / "d.zarr")
    (path / key).write_text(text)
    with pytest.raises(DatasetError, match=f"{path}.*: {key} "):
        open_dataset(path)


@pytest.mark.parametrize("array", ["images", "labels"])
def test_a_chunk_that_cannot_be_decoded_is_named_by_its_array_and_rows(tmp_path, array):
    for path in (write(tmp_path / "w.zarr"), write_plainly(tmp_path / "p.zarr")):
        chunk = next(file for file in (path / "train" / array / "c").rglob("*") if file.is_file())
        chunk.write_bytes(chunk.read_bytes()[:10])
        with pytest.raises(DatasetError, match=f"damaged: rows 0 to 19 of the array 'train/{array}' cannot be read"):
            open_dataset(path).split("train").verify()


def test_a_missing_chunk_is_named_by_its_array(tmp_path, caplog):
    path = write(tmp_path / "w.zarr")
    shutil.rmtree(path / "train" / "images" / "c")
    with pytest.raises(DatasetError, match="1 of 1 chunks of 'train/images' are missing"):
        open_dataset(path).split("train").verify()
    path = write_plainly(tmp_path / "p.zarr")
    open_dataset(path)
    assert not told(caplog)
    shutil.rmtree(path / "train" / "images" / "c")
    open_dataset(path)  # without a fingerprint, a chunk of zeros looks the same: Zarr does not store it
    assert "1 of 1 chunks of 'train/images' are missing, and are read as 0" in caplog.text


@pytest.mark.parametrize("what", ["group", "array"])
def test_zarr_format_2_is_called_that_and_the_advised_command_converts_it(tmp_path, what):
    path, kind = tmp_path / "d.zarr", "explanation-distillation dataset"
    if what == "array":
        zarr.create_array(str(path), data=IMAGES, zarr_format=2)
    else:
        attributes = {"kind": kind, "format_version": 1, "class_names": ["a", "b"]}
        group = zarr.create_group(str(path), zarr_format=2, attributes=attributes).create_group("train")
        group.create_array("images", data=IMAGES, fill_value=0)
        group.create_array("labels", data=LABELS, fill_value=0)
    with pytest.raises(DatasetError, match=rf"it is of Zarr format 2, so convert it with `zarr migrate v3 {path}`"):
        open_dataset(path)
    migrate = pytest.importorskip("zarr.metadata.migrate_v3")
    migrate.migrate_v2_to_v3(input_store=open_store(path, writable=True))  # as `zarr migrate v3 PATH` calls it
    if what == "group":
        assert np.array_equal(open_dataset(path).split("train").images[:], IMAGES)
    else:
        with pytest.raises(DatasetError, match=r"zarr\.json describes an array, expected a group"):
            open_dataset(path)


def test_an_array_of_format_2_in_a_group_of_format_3_is_called_that(tmp_path):
    path = write_plainly(tmp_path / "d.zarr")
    shutil.rmtree(path / "train" / "images")
    zarr.create_array(str(path / "train" / "images"), data=IMAGES, zarr_format=2)
    with pytest.raises(DatasetError, match=r"train/images is of Zarr format 2, .*`zarr migrate v3 .*/train/images`"):
        open_dataset(path)


def test_a_zip_file_is_called_that_and_opens_as_the_store_that_is_advised(tmp_path):
    path = tmp_path / "d.zip"
    with zarr.storage.ZipStore(path, mode="w") as store:
        write_plainly_into = zarr.create_group(store, zarr_format=3)
        group = write_plainly_into.create_group("train")
        group.create_array("images", data=IMAGES)
        group.create_array("labels", data=LABELS)
        kind = "explanation-distillation dataset"
        write_plainly_into.attrs.put({"kind": kind, "format_version": 1, "class_names": ["a", "b"]})
    with pytest.raises(DatasetError, match=r"it is a file, so unpack it, or give Python's zarr\.storage\.ZipStore"):
        open_dataset(path)
    dataset = open_dataset(zarr.storage.ZipStore(path, mode="r"))
    assert np.array_equal(dataset.split("train").images[:], IMAGES)


def test_consolidated_metadata_does_not_hide_what_changed_after_it(tmp_path):
    path = write_plainly(tmp_path / "d.zarr")
    zarr.consolidate_metadata(str(path))
    change(path / "train" / "zarr.json", attributes={"fingerprint": "0" * 64})
    assert open_dataset(path).split("train").fingerprint == "0" * 64


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_foreign_dataset_is_given_its_fingerprint_and_is_not_read_whole_again(tmp_path, monkeypatch):
    path = write_plainly(tmp_path / "d.zarr")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    expected = fingerprint({"images": IMAGES, "labels": LABELS})
    assert add_fingerprints(path) == {"train": expected}
    changed = [file for file, content in before.items() if file.read_bytes() != content]
    assert changed == [path / "train" / "zarr.json"]
    assert add_fingerprints(path) == {"train": expected}

    def read_whole(*arguments: Any) -> None:
        raise AssertionError("the dataset is read whole")

    monkeypatch.setattr("data.layout.fingerprint", read_whole)
    assert open_dataset(path).split("train").fingerprint == expected


def test_a_wrong_fingerprint_is_refused_and_kept(tmp_path):
    path = write_plainly(tmp_path / "d.zarr")
    change(path / "train" / "zarr.json", attributes={"fingerprint": "0" * 64, "note": "mine"})
    before = (path / "train" / "zarr.json").read_bytes()
    with pytest.raises(DatasetError, match="was changed after it was made"):
        add_fingerprints(path)
    assert (path / "train" / "zarr.json").read_bytes() == before
    change(path / "train" / "zarr.json", attributes={"note": "mine"})
    add_fingerprints(path)
    assert json.loads((path / "train" / "zarr.json").read_text())["attributes"]["note"] == "mine"


def test_a_dataset_that_is_read_whole_at_every_start_names_the_command_that_ends_it(tmp_path, capfd):
    path = write_plainly(tmp_path / "d.zarr")
    train = ["train-teacher", "--data", str(path), "--steps", "1", "--batch-size", "4"]
    told = f"add one with python cli.py add-fingerprints --data {path}\n"
    before = CliRunner().invoke(main, [*train, "--out", str(tmp_path / "t")])
    assert (before.output + capfd.readouterr().err).count(told) == 1
    added = CliRunner().invoke(main, ["add-fingerprints", "--data", str(path)])
    digest = fingerprint({"images": IMAGES, "labels": LABELS})
    assert added.output == f"{path}: train {digest[:12]}…\n", added.output
    after = CliRunner().invoke(main, [*train, "--out", str(tmp_path / "u")])
    assert after.exit_code == 0
    assert "add-fingerprints" not in after.output + capfd.readouterr().err


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_fingerprint_is_replaced(tmp_path, empty):
    path = write_plainly(tmp_path / "d.zarr")
    change(path / "train" / "zarr.json", attributes={"fingerprint": empty})
    expected = add_fingerprints(path)
    assert json.loads((path / "train" / "zarr.json").read_text())["attributes"] == {"fingerprint": expected["train"]}


def test_a_dataset_that_cannot_be_written_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    def read_whole(*arguments: Any) -> None:
        raise AssertionError("the dataset is read whole")

    monkeypatch.setattr("data.layout.fingerprint", read_whole)
    path = write_plainly(tmp_path / "d.zarr")
    with pytest.raises(OSError, match="is read-only: open it for writing, or copy the dataset first"):
        add_fingerprints(zarr.storage.LocalStore(path, read_only=True))

    def deny(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path / "train"))

    monkeypatch.setattr("data.storage.Folder.write", deny)
    result = CliRunner().invoke(main, ["add-fingerprints", "--data", str(path)])
    assert (result.exit_code, result.output) == (1, f"Error: {path / 'train'}: Permission denied\n")


def test_a_dataset_that_is_being_written_gets_no_fingerprint(tmp_path):
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=IMAGES, labels=LABELS)
        result = CliRunner().invoke(main, ["add-fingerprints", "--data", str(tmp_path / "d.zarr")])
        writer.finish(class_names=["a", "b"])
    assert result.exit_code == 1
    assert "was not finished, or is still being written" in result.output
