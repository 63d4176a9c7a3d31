"""What the datasets of background bias promise; COCO-on-Places and Waterbirds have files of their own."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DatasetError, make_fashion_on_textures, open_dataset
from data.builders.backgrounds import Scenes, free_share, tied_groups, write_on_backgrounds
from data.builders.fashion_on_textures import BIASING, CLASS_NAMES, UNSEEN
from pipeline import Classifier, ModelConfig, build_network, explain
from trainer import evaluate


@pytest.fixture(scope="module")
def textures(fashion, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("textures") / "data.zarr"
    make_fashion_on_textures(path, fashion, size=32)
    return path


def test_the_background_is_the_classs_own_unseen_or_another_classs():
    labels = np.repeat(np.arange(5), 200)
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "iid"):
        assert np.array_equal(tied_groups(split, labels, 5, 3, rng), labels)
    assert set(tied_groups("ood", labels, 5, 3, rng)) == {5, 6, 7}
    shift = tied_groups("shift", labels, 5, 3, rng)
    assert not (shift == labels).any()
    for label in range(5):
        assert set(shift[labels == label]) == set(range(5)) - {label}, "every other class's background occurs"
    with pytest.raises(ValueError, match="test2"):
        tied_groups("test2", labels, 5, 3, rng)


@pytest.mark.parametrize("share", [0, 0.001, 0.25, 0.3333, 1])
def test_the_unbiased_share_is_exact_and_its_values_are_equally_likely(share):
    tied = np.full(2000, -1)
    freed = free_share(tied, share, 4, np.random.default_rng(0))
    assert (tied == -1).all()
    counts = np.bincount(freed[freed != -1], minlength=4)
    assert counts.sum() == round(share * 2000)
    assert np.abs(counts - share * 500).max() <= 4 * (share * 500) ** 0.5


def test_objects_are_pasted_as_opaque_as_they_are_and_masked_where_they_hide_all(tmp_path):
    opacity = np.zeros((16, 16), np.uint8)
    opacity[4:12, 4:12] = 255
    opacity[4, 4:12] = 51  # a fifth
    scenes = Scenes(
        labels=np.array([0, 1]),
        groups=np.array([0, 1]),
        cut_out=lambda sample: (np.full((3, 16, 16), 200 + sample, np.uint8), opacity),
        background=lambda sample: np.full((3, 16, 16), 100, np.uint8),
    )
    sizes = write_on_backgrounds(
        tmp_path / "d", {"train": scenes, "ood": scenes}, 16, name="n", class_names=["a", "b"], group_names=["c", "d"]
    )
    assert sizes == {"train": 2, "ood": 2}
    dataset = open_dataset(tmp_path / "d")
    split = dataset.split("ood")
    assert dataset.bias_attribute == "background"
    image, mask = split.images[1], split.masks[1][0]
    assert (image[:, 5:12, 4:12] == 201).all()
    assert (mask[5:12, 4:12] == 255).all()
    assert (image[:, 4, 4:12] == 120).all()
    assert not mask[4].any(), "what shines through an edge is no part of the mask"
    outside = np.ones((16, 16), bool)
    outside[4:12, 4:12] = False
    assert (image[:, outside] == 100).all()
    assert not mask[outside].any()


def test_fashion_on_textures_has_the_layouts_splits(textures):
    dataset = open_dataset(textures)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 72,
        "validation": 8,
        "iid": 40,
        "ood": 40,
        "shift": 40,
    }
    assert dataset.group_names == (*BIASING, *UNSEEN)
    for name, split in dataset.splits.items():
        labels, groups = split.labels[:], split.groups[:]
        assert split.image_shape == (3, 32, 32)
        assert (groups == labels).all() == (name in ("train", "validation", "iid"))
        covered = (split.masks[:] > 0).mean((1, 2, 3))
        assert covered.min() > 0.02
        assert covered.max() < 0.6
        assert np.unique(split.masks[:]).tolist() == [0, 255]


def test_tests_show_the_same_garments_on_other_backgrounds(textures):
    dataset = open_dataset(textures)
    iid, ood, shift = (dataset.split(name) for name in ("iid", "ood", "shift"))
    for other in (ood, shift):
        assert np.array_equal(iid.masks[:], other.masks[:])
        shown = iid.masks[:] > 0
        assert np.array_equal(iid.images[:] * shown, other.images[:] * shown)
        behind = ~shown & np.ones_like(iid.images[:], bool)
        assert (iid.images[:] != other.images[:])[behind].mean() > 0.5


def test_a_dark_print_on_a_garment_belongs_to_it(textures):
    """Rows of the mask have no gap between its first and its last pixel: the garments here are convex."""
    for mask in open_dataset(textures).split("train").masks[:, 0] > 0:
        for row in mask[mask.any(1)]:
            first, last = np.flatnonzero(row)[[0, -1]]
            assert row[first : last + 1].all()


def test_the_same_seed_gives_the_same_dataset_and_another_one_another(textures, fashion, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        make_fashion_on_textures(tmp_path / name, fashion, size=32, seed=seed)
    first, same, other = (open_dataset(path).splits for path in (textures, tmp_path / "same", tmp_path / "other"))
    for split in first:
        assert first[split].fingerprint == same[split].fingerprint != other[split].fingerprint


def test_an_unbiased_share_of_the_training_garments_is_on_any_classs_photograph(textures, fashion, tmp_path):
    for name, share in (("none", 0), ("half", 0.5)):
        make_fashion_on_textures(tmp_path / name, fashion, size=32, unbiased_share=share)
    default, none, half = (open_dataset(path) for path in (textures, tmp_path / "none", tmp_path / "half"))
    for name, split in default.splits.items():
        assert none.split(name).fingerprint == split.fingerprint
        assert (half.split(name).fingerprint == split.fingerprint) == (name not in ("train", "validation"))
    before, after = default.split("train"), half.split("train")
    changed = after.groups[:] != after.labels[:]
    assert 24 < changed.sum() <= 36
    assert after.groups[:].max() < len(BIASING), "no photograph of ood"
    behind = np.repeat(after.masks[:] == 0, 3, axis=1)
    for sample, (old, new) in enumerate(zip(before.images[:], after.images[:], strict=True)):
        assert (old[behind[sample]] != new[behind[sample]]).any() == changed[sample]
    assert np.array_equal(before.masks[:], after.masks[:])
    builders = [
        json.loads((path / "zarr.json").read_text())["attributes"]["builder"] for path in (textures, tmp_path / "half")
    ]
    assert [builder.get("unbiased_share") for builder in builders] == [None, 0.5]


def test_without_an_unbiased_share_the_numbers_are_those_of_earlier_versions(textures):
    """Not the pixels, which the releases of Pillow and its decoders may change."""
    splits = open_dataset(textures).splits
    digests = {
        name: hashlib.sha256(b"".join(array[:].tobytes() for array in (split.labels, split.groups))).hexdigest()[:16]
        for name, split in splits.items()
    }
    assert digests == {
        "train": "bbb4f582c81f6a73",
        "validation": "fd3ccbf6206a2888",
        "iid": "74d6ba89376360b1",
        "ood": "beac93b447fb980c",
        "shift": "5161ad1c4d342073",
    }


def test_torchvisions_folders_and_unpacked_files_are_read_too(textures, fashion, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    make_fashion_on_textures(tmp_path / "d", tmp_path, size=32)
    assert open_dataset(tmp_path / "d").split("train").fingerprint == open_dataset(textures).split("train").fingerprint


def test_a_limit_keeps_the_first_samples(textures, fashion, tmp_path):
    make_fashion_on_textures(tmp_path / "d", fashion, size=32, limit=5)
    few, all_of_them = open_dataset(tmp_path / "d"), open_dataset(textures)
    for name, split in few.splits.items():
        assert np.array_equal(split.images[:], all_of_them.split(name).images[:5])


def damaged(folder: Path, fashion: Path, name: str, content: bytes | None) -> Path:
    folder.mkdir()
    for file in fashion.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


def test_wrong_files_are_named_and_nothing_is_left(fashion, tmp_path):
    labels = "train-labels-idx1-ubyte.gz"
    cut = (fashion / labels).read_bytes()[:-10]
    cases = {
        "missing": (damaged(tmp_path / "a", fashion, labels, None), "train-labels-idx1-ubyte"),
        "cut": (damaged(tmp_path / "b", fashion, labels, cut), "train-labels-idx1-ubyte.gz cannot be read"),
        "foreign": (damaged(tmp_path / "c", fashion, labels, b"<html>"), "does not begin as an IDX file"),
        "another": (
            damaged(tmp_path / "d", fashion, labels, (fashion / "t10k-labels-idx1-ubyte.gz").read_bytes()),
            "do not belong together: train has 80 garments, and 40 labels up to 9",
        ),
        "none": (tmp_path / "e", "no Fashion-MNIST in"),
    }
    for folder, message in cases.values():
        with pytest.raises(DatasetError, match=message):
            make_fashion_on_textures(tmp_path / "out", folder, size=32)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="size=8 is too small"):
        make_fashion_on_textures(tmp_path / "out", fashion, size=8)
    with pytest.raises(DatasetError, match=r"download=True needs a folder .* fashion_mnist=FOLDER"):
        make_fashion_on_textures(tmp_path / "out", download=True)


def saved(path: Path, network, image_shape, debias: str) -> Path:
    config = ModelConfig(
        kind="teacher",
        arch="small-cnn",
        bias_free=True,
        debias=debias,
        class_names=tuple(CLASS_NAMES),
        image_shape=image_shape,
        dataset={},
        training={},
    )
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save(Classifier(network, debias).state_dict(), path / "weights.pt")
    return path


def test_the_share_of_relevance_on_the_object_is_counted_and_all_of_it_behind_a_mask(textures, tmp_path):
    dataset = open_dataset(textures)
    split = dataset.split("shift")
    torch.manual_seed(0)
    network, _ = build_network("small-cnn", 10, split.image_shape, free_of_biases=True)
    plain, masked = (
        evaluate(textures, saved(tmp_path / debias, network, split.image_shape, debias), device="cpu")
        for debias in ("none", "mask")
    )
    for name in ("iid", "ood", "shift"):
        assert masked["splits"][name]["on_object"] == pytest.approx(100)
    shares = []
    for image, mask, label in zip(split.images[:], split.masks[:], split.labels[:], strict=True):
        x = torch.from_numpy(image[None] / np.float32(255))
        relevance = explain(network.eval(), x, torch.tensor([label]), 0.1)[1][0].abs().sum(0)
        shares.append(float(relevance[mask[0] > 0].sum() / relevance.sum()))
    assert plain["splits"]["shift"]["on_object"] == pytest.approx(100 * np.mean(shares), rel=1e-4)
