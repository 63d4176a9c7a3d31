"""What a file that holds no weights, or another model's, is called wherever a user's weights are loaded."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_clip
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from pipeline import ModelError, load_classifier
from pipeline.networks.models import build_network
from pipeline.networks.segmenters import build_segmenter
from pipeline.networks.weight_files import file_fault, plain_reason
from pipeline.networks.zero_shot import ZeroShot, build_zero_shot
from trainer import train_student
from trainer.results.evaluation import evaluate_snapshots

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
SHAPE = (3, 32, 32)


def bytes_of(weights: object, **how: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer, **how)
    return buffer.getvalue()


TENSORS = {"a": torch.arange(300.0), "b": torch.ones(3)}
ZIPPED, SAFE = bytes_of(TENSORS), save(TENSORS)
FAULTS = {
    "empty.pt": (b"", "empty"),
    "zeros.pt": (bytes(4000), "full of zeros"),
    "lfs.pt": (LFS, "Git LFS pointer .* git lfs pull"),
    "lfs.safetensors": (LFS, "Git LFS pointer"),
    "annex.pt": (b"/annex/objects/SHA256E-s1--00.pt\n", "git-annex pointer"),
    "page.pt": (HTML, "a web page"),
    "page.safetensors": (HTML, "a web page"),
    "error.pt": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "error.bin": (b'{"error": "Repository not found"}', "text and not weights, and begins with .*Repository not found"),
    "denied.pth": (b"Access denied", "text .*Access denied"),
    "archive.pt": (gzip.compress(ZIPPED), "gzip archive: unpack it"),
    "keras.pt": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "cut.pt": (ZIPPED[:-100], "cut: its end is missing"),
    "half.pt": (ZIPPED[: len(ZIPPED) // 2], "cut: its end is missing"),
    "safe.pt": (SAFE, "a safetensors file: rename it to safe.safetensors"),
    "zipped.safetensors": (ZIPPED, "a file of torch.save: rename it to zipped.pt"),
    "cut.safetensors": (SAFE[:-100], "cut: 100 bytes of it are missing"),
    "header.safetensors": (SAFE[:50], "cut or damaged in its header"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_holds_no_weights_is_called_what_it_is(tmp_path, name):
    content, words = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(words, str(file_fault(tmp_path / name)))


def test_a_file_of_weights_is_not_blamed(tmp_path):
    old = bytes_of(TENSORS, _use_new_zipfile_serialization=False)
    for name, content in (("a.pt", ZIPPED), ("a.bin", ZIPPED), ("a.safetensors", SAFE), ("old.pt", old)):
        (tmp_path / name).write_bytes(content)
        assert file_fault(tmp_path / name) is None


@given(length=st.integers(0, len(SAFE) - 1))
def test_safetensors_that_were_cut_anywhere_are_found(tmp_path_factory, length):
    path: Path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    path.write_bytes(SAFE[:length])
    assert file_fault(path) is not None


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    config, weights = save_clip(tmp_path_factory.mktemp("clip"), "vit")
    return config, torch.load(weights, weights_only=True)


def clip_error(clip, tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        build_zero_shot(ZeroShot(clip[0], str(tmp_path / name)), ["cat", "dog"], SHAPE)
    assert "weights_only" not in str(caught.value)
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_a_clip_checkpoint_that_is_none_is_called_what_it_is(clip, tmp_path, name):
    content, words = FAULTS[name]
    assert re.search(words, clip_error(clip, tmp_path, name, content))


def test_a_clip_checkpoint_that_does_not_fit_names_the_first_keys_and_shapes(clip, tmp_path):
    weights = clip[1]
    first = next(iter(weights))

    def told(changed: object) -> str:
        return clip_error(clip, tmp_path, "w.pt", bytes_of(changed))

    lacking = {name: value for name, value in weights.items() if not name.startswith("ln_final")}
    assert "they lack 'ln_final.weight' and 1 other; give weights of this model" in told(lacking)
    assert "they have 'extra' besides" in told({**weights, "extra": torch.ones(1)})
    compiled = told({f"_orig_mod.{name}": value for name, value in weights.items()})
    others = len(weights) - 1
    assert f"they lack '{first}' and {others} others, they have '_orig_mod.{first}' and {others} others" in compiled
    assert "all names begin with '_orig_mod.'" in compiled
    wider = {**weights, "ln_final.weight": torch.ones(48), "ln_final.bias": torch.ones(48)}
    assert "'ln_final.weight' has shape (48) and must have (32) and 1 other" in told(wider)
    assert "w.pt holds a list: it must hold a state_dict" in told([1])
    assert "w.pt holds nothing" in told({})
    assert "they have 'model' and 1 other besides" in told({"model": weights, "epoch": 3})


def test_a_pickled_network_is_called_that_and_never_advised_to_be_loaded(clip, tmp_path):
    text = clip_error(clip, tmp_path, "w.pt", bytes_of(torch.nn.Linear(2, 2)))
    assert "holds a pickled torch.nn.modules.linear.Linear" in text
    assert "state_dict()" in text


def test_a_folder_of_open_clip_with_a_pointer_for_weights_is_told(clip, tmp_path):
    model = json.loads(Path(clip[0]).read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    (tmp_path / "open_clip_model.safetensors").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"open_clip_model.safetensors is a Git LFS pointer"):
        build_zero_shot(ZeroShot(str(tmp_path)), ["cat", "dog"], SHAPE)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".ts"])
def test_a_segmenter_that_is_none_is_called_what_it_is(tmp_path, suffix, caplog):
    path = tmp_path / f"segmenter{suffix}"
    for content, words in ((LFS, "Git LFS pointer"), (HTML, "a web page"), (ZIPPED[:-100], "its end is missing")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=rf"segmenter.* does not load: it is .*{words}"):
            build_segmenter(str(path), SHAPE)
    assert not caplog.text


def test_weights_that_are_not_torchscript_are_called_that(tmp_path):
    (tmp_path / "segmenter.pt").write_bytes(ZIPPED)
    with pytest.raises(ModelError, match=r"a file of torch.save and not a TorchScript archive"):
        build_segmenter(str(tmp_path / "segmenter.pt"), SHAPE)


def test_a_saved_model_and_its_snapshots_with_other_weights_are_told(dataset, tmp_path):
    path = tmp_path / "s"
    train_student(dataset, None, path, method="erm", steps=1, snapshots=1)
    shutil.copytree(path, tmp_path / "copy")
    (path / "weights.pt").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"weights.pt is a Git LFS pointer"):
        load_classifier(path)
    (path / "weights.pt").write_bytes(ZIPPED)
    with pytest.raises(ModelError, match=r"they lack 'network.conv1.weight' and 9 others, they have 'a' and 1 other"):
        load_classifier(path)
    next((tmp_path / "copy" / "snapshots").iterdir()).write_bytes(ZIPPED[:-100])
    with pytest.raises(ModelError, match=r"the snapshot .*step-.* does not load \(.* its end is missing"):
        list(evaluate_snapshots(dataset, tmp_path / "copy", images=10))


FACTORY = """
import torch
from torch import nn


def build(num_classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))
    network.load_state_dict(torch.load("mine.pt"))
    return network
"""


def test_the_advice_of_pytorch_to_run_code_does_not_come_through_a_users_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loading_student.py").write_text(FACTORY)
    name = "loading_student:build"
    for content, words in (
        (LFS, "damaged, or no file of weights"),
        (bytes_of(torch.nn.ReLU()), "pickled torch.nn.modules.activation.ReLU"),
        (ZIPPED, "they lack '1.weight' and 1 other, they have 'a' and 1 other besides"),
    ):
        (tmp_path / "mine.pt").write_bytes(content)
        with pytest.raises(ModelError, match=words) as caught:
            build_network(name, 10, SHAPE, free_of_biases=False, factory=name)
        assert "weights_only" not in str(caught.value)


def test_any_advice_of_pytorch_is_left_out():
    assert "weights_only" not in plain_reason(RuntimeError("set `weights_only=False` if you trust it"))
