"""What the datasets promise."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DatasetError, DatasetWriter, layout, make_coloured_mnist, open_dataset
from data.builders import idx
from data.builders.coloured_mnist import BIASING_COLOURS


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def colours(images: np.ndarray) -> np.ndarray:
    """The colour of each digit, (N, 3)."""
    return images.max(axis=(2, 3))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full") / "data.zarr"
    make_coloured_mnist(path)
    return path


def test_splits_have_the_published_sizes_and_types(full):
    dataset = open_dataset(full)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 55000,
        "validation": 5000,
        "iid": 10000,
        "ood": 10000,
        "shift": 10000,
    }
    for split in dataset.splits.values():
        assert split.images.dtype == np.uint8
        assert split.image_shape == (3, 28, 28)
        assert zarr.open_group(str(full)).metadata.zarr_format == 3
    assert dataset.bias_attribute == "colour"
    assert dataset.class_names[7] == "seven"


def test_train_and_validation_are_mnists_training_images_each_once(full):
    dataset = open_dataset(full)
    digits = np.concatenate([dataset.split(name).images[:].max(1) > 0 for name in ("train", "validation")])
    original = idx.read_mnist("train")[0] > 127
    order = np.lexsort(np.packbits(digits.reshape(60000, -1), axis=1).T)
    expected = np.lexsort(np.packbits(original.reshape(60000, -1), axis=1).T)
    assert np.array_equal(digits[order], original[expected])


def test_the_colour_is_as_published_in_every_split(full):
    dataset = open_dataset(full)
    test_digits, test_labels = idx.read_mnist("t10k")
    for name, split in dataset.splits.items():
        labels, groups, images = split.labels[:], split.groups[:], split.images[:]
        shown = colours(images)
        on = images.max(1) > 0
        assert np.array_equal(images, on[:, None] * shown[:, :, None, None]), "one colour on black"
        if name in ("train", "validation", "iid"):
            assert np.array_equal(shown, BIASING_COLOURS[labels])
            assert np.array_equal(groups, labels)
        if name == "shift":
            assert np.array_equal(shown, BIASING_COLOURS[groups])
            assert not (groups == labels).any()
            assert all(len(np.unique(groups[labels == label])) == 9 for label in range(10))
        if name == "ood":
            distances = ((shown[:, None].astype(int) - BIASING_COLOURS.astype(int)) ** 2).sum(2)
            assert distances.min() > 2500
            assert len(np.unique(shown, axis=0)) == 10
            assert len(np.unique(np.stack([labels, groups]), axis=1).T) == 100, "every colour on every class"
        if name in ("iid", "ood", "shift"):
            assert np.array_equal(labels, test_labels)
            assert np.array_equal(on, test_digits > 127)


def test_group_names_are_the_colours(full):
    dataset = open_dataset(full)
    assert dataset.group_name(-1) == "-1"
    assert dataset.group_name(99) == "99"
    split = dataset.split("ood")
    red, green, blue = colours(split.images[:1])[0]
    assert dataset.group_name(int(split.groups[0])) == f"#{red:02x}{green:02x}{blue:02x}"


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_coloured_mnist(tmp_path / name, seed=seed, limit=200)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    prints = [open_dataset(tmp_path / name).split("ood").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_limit_keeps_the_first_samples(full, tmp_path):
    make_coloured_mnist(tmp_path / "small", limit=50)
    for name, split in open_dataset(tmp_path / "small").splits.items():
        assert np.array_equal(split.images[:], open_dataset(full).split(name).images[:50])


def test_a_dataset_without_an_unbiased_share_is_that_of_earlier_versions(tmp_path):
    make_coloured_mnist(tmp_path / "d", limit=200, unbiased_share=0)
    fingerprints = {name: split.fingerprint[:16] for name, split in open_dataset(tmp_path / "d").splits.items()}
    assert fingerprints == {
        "train": "a8bb86c3b210802d",
        "validation": "cfca14fd38ca00b9",
        "iid": "e67ef20fe3a67b06",
        "ood": "1d75836ef1a56f55",
        "shift": "e691e278ae6bf583",
    }
    make_coloured_mnist(tmp_path / "default", limit=200)
    assert files(tmp_path / "d") == files(tmp_path / "default")
    assert "unbiased_share" not in zarr.open_group(str(tmp_path / "d")).attrs["builder"]


def test_an_unbiased_share_of_the_training_images_has_any_classs_colour(full, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_coloured_mnist(tmp_path / name, limit=2000, unbiased_share=0.3, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert zarr.open_group(str(tmp_path / "a")).attrs["builder"]["unbiased_share"] == 0.3
    dataset, without = open_dataset(tmp_path / "a"), open_dataset(full)
    train = dataset.split("train")
    labels, groups, images = train.labels[:], train.groups[:], train.images[:]
    assert np.array_equal(colours(images), BIASING_COLOURS[groups])
    counts = np.bincount(groups[groups != labels], minlength=10)
    assert 500 < counts.sum() < 600, "a tenth of the 600 keeps its colour by chance"
    assert counts.min() > 25
    kept = groups == labels
    assert np.array_equal(images[kept], without.split("train").images[:2000][kept])
    validation = dataset.split("validation")
    assert 500 < (validation.groups[:] != validation.labels[:]).sum() < 600
    for name in ("iid", "ood", "shift"):
        assert np.array_equal(dataset.split(name).images[:], without.split(name).images[:2000])
    other = open_dataset(tmp_path / "c").split("train")
    assert not np.array_equal(other.groups[:] == other.labels[:], kept)


def test_an_altered_or_missing_mnist_file_is_refused(tmp_path):
    shutil.copytree(idx.MNIST_DIR, tmp_path / "mnist")
    altered = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    altered.write_bytes(gzip.compress(gzip.decompress(altered.read_bytes())[:-1] + b"\x05"))
    with pytest.raises(DatasetError, match="is not the original: its SHA-256"):
        idx.read_mnist("t10k", tmp_path / "mnist")
    altered.unlink()
    with pytest.raises(DatasetError, match="missing: restore it"):
        idx.read_mnist("t10k", tmp_path / "mnist")


def by_hand(path: Path, **changes) -> Path:
    """A dataset made with nothing but Zarr, as docs/dataset-layout.md describes it."""
    root = zarr.create_group(str(path), zarr_format=3)
    arrays = {
        "images": np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8),
        "labels": np.arange(12) % 2,
        **changes.pop("arrays", {}),
    }
    for name in ("train", "ood"):
        group = root.create_group(name)
        for key, values in arrays.items():
            if values is not None:
                group.create_array(key, data=values)
    kind = "explanation-distillation dataset"
    root.attrs.put({"kind": kind, "format_version": 1, "class_names": ["a", "b"], **changes})
    return path


def test_a_dataset_made_by_hand_in_the_documented_layout_opens(tmp_path):
    masks = np.ones((12, 1, 16, 16), np.uint8)
    dataset = open_dataset(by_hand(tmp_path / "mine.zarr", arrays={"masks": masks, "groups": np.arange(12)}))
    assert dataset.name == "mine"
    assert dataset.split("train").masks is not None
    assert dataset.test_splits[0].name == "ood"
    other = open_dataset(by_hand(tmp_path / "other.zarr", arrays={"masks": masks * 0}))
    assert other.split("train").fingerprint != dataset.split("train").fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "something"}, "no dataset of ours"),
        ({"format_version": 2}, "format version 2, this program reads version 1"),
        ({"group_names": None}, "has group_names None: make it a list of names"),
        ({"class_names": []}, "no attribute 'class_names'"),
        ({"class_names": ["only"]}, "labels run from 0 to 1, but there are 1 class names"),
        ({"arrays": {"labels": None}}, "has no array 'labels'"),
        ({"arrays": {"labels": np.zeros(3, int)}}, r"'labels' is int64 \(3,\), expected integers \(12,\)"),
        ({"arrays": {"groups": np.zeros(12)}}, "'groups' is float64"),
        ({"arrays": {"images": np.zeros((12, 3, 16, 16))}}, "'images' is float64"),
        ({"arrays": {"masks": np.zeros((12, 16, 16), np.uint8)}}, "'masks' is uint8"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(by_hand(tmp_path / "broken.zarr", **changes))


def test_a_dataset_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    for step in ("write_split", "finish"):

        def fail(*args, **kwargs):
            with pytest.raises(DatasetError, match="was not finished, or is still being written"):
                open_dataset(tmp_path / "data.zarr")
            raise OSError("the power is gone")

        with monkeypatch.context() as patched:
            patched.setattr(DatasetWriter, step, fail)
            with pytest.raises(OSError, match="the power is gone"):
                make_coloured_mnist(tmp_path / "data.zarr", limit=20)
        assert list(tmp_path.iterdir()) == []
    make_coloured_mnist(tmp_path / "data.zarr", limit=20)
    assert [path.name for path in tmp_path.iterdir()] == ["data.zarr"]


def test_what_a_killed_writer_left_is_refused_and_made_anew(tmp_path):
    code = (
        "import os, signal, sys; from data import DatasetWriter, make_coloured_mnist\n"
        "def killed(self, **attributes): os.kill(os.getpid(), signal.SIGKILL)\n"
        "DatasetWriter.finish = killed; make_coloured_mnist(sys.argv[1], limit=20)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "data.zarr"], env=environment)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / "data.zarr" / "train" / f".zarr.json.{'0f' * 16}.partial").write_text("{")
    with pytest.raises(DatasetError, match="was not finished"):
        open_dataset(tmp_path / "data.zarr")
    make_coloured_mnist(tmp_path / "data.zarr", limit=20)
    make_coloured_mnist(tmp_path / "other.zarr", limit=20)
    assert files(tmp_path / "data.zarr") == files(tmp_path / "other.zarr")


@pytest.mark.parametrize("place", ["notes/n.txt", "train/photo.png", "train/images/c/notes.txt", "train/.mine.partial"])
def test_a_writer_removes_only_what_a_writer_wrote(tmp_path, place):
    split = {"images": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.zeros(4, np.int64)}
    DatasetWriter(tmp_path / "d.zarr").write_split("train", **split)  # left unfinished
    mine = tmp_path / "d.zarr" / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=f"was not finished, and holds {place}, which is no part of one"):
        DatasetWriter(tmp_path / "d.zarr")
    assert files(tmp_path) == before
    mine.unlink()
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", **split)
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
    assert mine.read_text() == "mine"


def test_two_writers_do_not_mix(tmp_path, monkeypatch):
    split = {"images": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.zeros(4, np.int64)}
    first = DatasetWriter(tmp_path / "d.zarr")
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 1)  # which runs, and is not the first one
        with pytest.raises(FileExistsError, match="is being written by process"):
            DatasetWriter(tmp_path / "d.zarr")
    with DatasetWriter(tmp_path / "d.zarr") as second:  # the same process began anew
        second.write_split("train", **split)
        with pytest.raises(DatasetError, match="was taken over by another process"), first:
            first.write_split("train", **split)
        second.finish(class_names=["a"])
    open_dataset(tmp_path / "d.zarr").split("train").verify()


class Rows:
    """Rows that exist when they are asked for, and note what was asked."""

    def __init__(self, shape: tuple[int, ...], dtype: str, most: int):
        self.shape, self.dtype, self.asked, self._most = shape, np.dtype(dtype), [], most

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.asked.append((rows.start, rows.stop))
        assert np.prod((rows.stop - rows.start, *self.shape[1:])) * self.dtype.itemsize <= self._most
        numbers = np.arange(rows.start, rows.stop).reshape(-1, *[1] * (len(self.shape) - 1))
        return np.broadcast_to(numbers % 7, (len(numbers), *self.shape[1:])).astype(self.dtype)


def test_a_split_is_read_once_in_order_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 2**14)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2**11)
    monkeypatch.setattr(layout, "MAX_CHUNKS", 8)
    samples, shape = 1000, (3, 8, 8)
    arrays = {
        "images": Rows((samples, *shape), "uint8", 2**14),
        "labels": Rows((samples,), "int64", 2**14),
        "masks": Rows((samples, 1, 8, 8), "uint8", 2**14),
    }
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", **arrays)
        writer.finish(class_names=list("abcdefg"))
    for array in arrays.values():
        assert [start for start, _ in array.asked] == [0, *(stop for _, stop in array.asked[:-1])]
        assert array.asked[-1][1] == samples
    split = open_dataset(tmp_path / "d.zarr").split("train")
    assert (split.images.chunks[0], split.images.shards[0]) == (8, 64)
    assert len(list((tmp_path / "d.zarr" / "train" / "images" / "c").iterdir())) == -(-samples // 64)
    assert np.array_equal(
        split.images[5:700], np.broadcast_to(np.arange(5, 700).reshape(-1, 1, 1, 1) % 7, (695, *shape))
    )
    split.verify()


@given(samples=st.integers(1, 10**7), side=st.integers(1, 2048), channels=st.integers(1, 4))
@settings(deadline=None)
def test_chunks_are_powers_of_two_of_bounded_size_and_number(samples, side, channels):
    images = np.broadcast_to(np.uint8(0), (samples, channels, side, side))
    chunk, *shard = layout._chunk_rows(images)
    image = channels * side * side
    whole = shard[0] if shard else chunk
    assert all(rows & (rows - 1) == 0 for rows in (chunk, whole))
    assert chunk == 1 or chunk * image <= layout.CHUNK_BYTES
    assert whole == 1 or whole * image <= layout.SHARD_BYTES
    assert -(-samples // whole) <= max(4096, samples * image // (layout.SHARD_BYTES // 2) + 1)
    assert layout._chunk_rows(np.broadcast_to(np.int64(0), samples))[0] <= 65536


def test_the_fingerprint_is_that_of_all_bytes_in_the_order_of_names(tmp_path):
    arrays = {
        "images": np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8),
        "labels": np.arange(12) % 2,
        "groups": np.arange(12, dtype=">i2"),
    }
    expected = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = array.astype(array.dtype.newbyteorder("<"))
        expected.update(f"{name} {array.dtype.str} {array.shape};".encode() + array.tobytes())
    opened = open_dataset(by_hand(tmp_path / "hand.zarr", arrays={"groups": arrays["groups"]}))
    with DatasetWriter(tmp_path / "written.zarr") as writer:
        writer.write_split("train", **arrays)
        writer.finish(class_names=["a", "b"])
    assert opened.split("train").fingerprint == expected.hexdigest()
    assert open_dataset(tmp_path / "written.zarr").split("train").fingerprint == expected.hexdigest()


@pytest.mark.parametrize("kind", ["numpy", "memmap", "zarr", "dask", "h5py"])
def test_a_split_is_written_from_any_kind_of_array(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    labels: Any = np.arange(40, dtype=np.int32) % 4
    given_images: Any = images
    if kind == "memmap":
        np.save(tmp_path / "images.npy", images)
        given_images = np.load(tmp_path / "images.npy", mmap_mode="r")
    elif kind == "zarr":
        given_images, labels = (zarr.array(array, chunks=7) for array in (images, labels))
    elif kind == "dask":
        dask_array = pytest.importorskip("dask.array")
        given_images, labels = (dask_array.from_array(array, chunks=7) for array in (images, labels))
    elif kind == "h5py":
        file = pytest.importorskip("h5py").File(tmp_path / "data.h5", "w")
        given_images, labels = file.create_dataset("images", data=images), file.create_dataset("labels", data=labels)
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=given_images, labels=labels)
        writer.finish(class_names=list("abcd"))
    split = open_dataset(tmp_path / "d.zarr").split("train")
    assert np.array_equal(split.images[:], images)
    assert split.labels.dtype == np.int32
    split.verify()


@pytest.mark.parametrize("harm", ["removed", "cut", "changed"])
@pytest.mark.parametrize("array", ["images", "labels"])
def test_a_damaged_split_is_named(tmp_path, array, harm):
    make_coloured_mnist(tmp_path / "data.zarr", limit=20)
    chunk = next(file for file in (tmp_path / "data.zarr" / "ood" / array / "c").rglob("*") if file.is_file())
    if harm == "removed":
        chunk.unlink()
    elif harm == "cut":
        chunk.write_bytes(chunk.read_bytes()[:10])
    else:
        root = zarr.open_group(str(tmp_path / "data.zarr"), mode="r+")
        root[f"ood/{array}"][0] = root[f"ood/{array}"][1] + 1
    with pytest.raises(DatasetError, match=r"damaged"):
        open_dataset(tmp_path / "data.zarr").split("ood").verify()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"zarr_format": 3}'])
@pytest.mark.parametrize("file", ["zarr.json", "ood/images/zarr.json"])
def test_broken_metadata_is_refused(tmp_path, file, text):
    make_coloured_mnist(tmp_path / "data.zarr", limit=20)
    (tmp_path / "data.zarr" / file).write_text(text)
    with pytest.raises(DatasetError, match=r"data\.zarr"):
        open_dataset(tmp_path / "data.zarr").split("ood").verify()


def test_a_writer_takes_only_what_can_be_opened(tmp_path):
    images, labels = np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64)
    for wrong in (
        {"images": images.astype(np.float32), "labels": labels},
        {"images": images[:, :0], "labels": labels},
        {"images": images, "labels": labels[:3]},
        {"images": images},
        {"images": images, "label": labels},
    ):
        with DatasetWriter(tmp_path / "d.zarr") as writer, pytest.raises(DatasetError):
            writer.write_split("train", **wrong)
    with DatasetWriter(tmp_path / "d.zarr") as writer:
        writer.write_split("train", images=images, labels=labels + 2)
        with pytest.raises(DatasetError, match="is written already"):
            writer.write_split("train", images=images, labels=labels)
        for name in ("", "a/b", "a\\b", "..", "/train", "train/", "zarr.json", "a.partial"):
            with pytest.raises(DatasetError, match=r"no split of .* can be called"):
                writer.write_split(name, images=images, labels=labels)
        with pytest.raises(DatasetError, match="labels run from 2 to 2, but there are 2 class names"):
            writer.finish(class_names=["a", "b"])


@pytest.mark.parametrize("occupied", ["file", "folder", "dataset"])
def test_nothing_that_exists_is_overwritten(tmp_path, occupied):
    out = tmp_path / "data.zarr"
    if occupied == "file":
        out.write_text("mine")
    elif occupied == "folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        make_coloured_mnist(out, limit=10)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="choose another out"):
        make_coloured_mnist(out, limit=10)
    assert files(tmp_path) == before


def test_a_url_that_became_a_path_is_refused_and_not_taken_for_a_folder():
    for url in ("s3://bucket/data.zarr", "memory://data.zarr"):
        with pytest.raises(OSError, match="was a URL before it became a pathlib"):
            open_dataset(Path(url))
