"""What a student promises that leaves: the same function, in plain PyTorch, and in files that others read."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from cli import main
from pipeline import (
    ModelConfig,
    ModelError,
    ScaleNorm,
    bias_free,
    build_network,
    export_model,
    load_classifier,
    plain,
    save_plain,
)
from pipeline.networks.classifier import Classifier, build_classifier, save_weights
from pipeline.networks.export import library_form
from pipeline.networks.formats import FORMATS, Format
from pipeline.networks.heads import HeadSpec

SHAPE = (3, 28, 28)
BATCHES = (1, 5)

STUDENTS = {
    "small-cnn": {"arch": "small-cnn", "bias_free": True, "head": HeadSpec(90, False), "arch_options": {"width": 12}},
    "resnet18": {"arch": "resnet18", "bias_free": False},
}


def used(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """In evaluation mode, with weights and statistics that matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ScaleNorm | nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(-1, 2)
        model.train()(torch.rand(8, *shape))
        model(3 * torch.rand(8, *shape) + 1)
    return model.eval()


def save(path: Path, **values) -> Path:
    names = tuple(f"c{i}" for i in range(10))
    values = {"debias": "none", "class_names": names, "image_shape": SHAPE, "dataset": {}, "training": {}} | values
    config = ModelConfig("student", **values)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    save_weights(path, used(build_classifier(config)))
    return path


@pytest.fixture(scope="module", params=STUDENTS)
def student(request, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("student") / request.param, **STUDENTS[request.param])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "s", arch="small-cnn", bias_free=True, arch_options={"width": 2})


def batches(shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    return [torch.rand(samples, *shape) for samples in BATCHES]


# plain PyTorch


class Norms(nn.Module):
    """A norm of each rank, one of them used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.norm3d, self.norm2d, self.norm1d = nn.BatchNorm3d(2), nn.BatchNorm2d(6, eps=0.1), nn.BatchNorm1d(6)
        self.again, self.unused, self.head = self.norm1d, nn.BatchNorm2d(5), nn.Linear(6, 10)

    def forward(self, x):  # (N, 3, 4, 4)
        x = self.norm3d(torch.stack([x, x * x], 1)).flatten(1, 2)
        x = self.norm1d(self.norm2d(x).flatten(2))
        return self.head(self.again(x.mean(2)))


@pytest.mark.parametrize("name", ["norms", "small-cnn", "resnet18", "norm"])
def test_the_plain_network_is_the_same_function_in_torchs_own_layers(name):
    shape = (3, 4, 4) if name.startswith("norm") else SHAPE
    if name.startswith("norm"):
        network, _ = bias_free(Norms() if name == "norms" else nn.BatchNorm2d(3))
    else:
        network, _ = build_network(name, 10, SHAPE, free_of_biases=True)
    model = used(Classifier(network, image_shape=shape), shape).train()
    before = copy.deepcopy(model.state_dict())
    found = plain(model)
    kinds = {type(module).__module__.partition(".")[0] for module in found.modules() if not isinstance(module, Norms)}
    assert kinds <= {"torch", "torchvision"}
    assert not any(module.training for module in found.modules())
    assert model.training  # and the model itself is left as it was
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    for images in batches(shape):
        torch.testing.assert_close(found(images), model(images), rtol=1e-5, atol=1e-5)


def test_norms_keep_their_rank_scale_and_second_moment():
    network, _ = bias_free(Norms())
    model = used(Classifier(network, image_shape=(3, 4, 4)), (3, 4, 4))
    found = plain(model)
    assert [type(n) for n in (found.norm3d, found.norm2d, found.norm1d)] == [
        nn.BatchNorm3d,
        nn.BatchNorm2d,
        nn.BatchNorm1d,
    ]
    assert found.again is found.norm1d
    assert isinstance(found.unused, nn.BatchNorm2d)
    assert found.norm2d.eps == 0.1
    assert torch.equal(found.norm2d.weight, network.norm2d.weight)
    assert torch.equal(found.norm2d.running_var, network.norm2d.running_second_moment)
    assert not found.norm2d.running_mean.any()
    assert not found.norm2d.bias.any()


def test_the_rank_of_a_norm_is_not_guessed():
    with pytest.raises(ModelError, match="give the Classifier its image_shape"):
        plain(Classifier(bias_free(Norms())[0]))


@pytest.mark.parametrize("debias", ["grayscale", "mask"])
def test_a_network_is_not_taken_out_from_behind_its_front(tmp_path, debias):
    network, _ = build_network("small-cnn", 10, SHAPE, free_of_biases=True)
    with pytest.raises(ModelError, match=f"stands behind the front '{debias}'"):
        plain(Classifier(network, debias, image_shape=SHAPE))


LOAD = """
import sys, torch
sys.modules |= dict.fromkeys(["cli", "data", "pipeline", "teacher_cache", "trainer"])  # importing them is an error
images, logits = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(torch.load(sys.argv[1], weights_only=False)(images), logits, rtol=1e-5, atol=1e-5)
"""


def test_a_saved_network_loads_where_nothing_of_ours_is_installed(student, tmp_path):
    model, _ = load_classifier(student)
    save_plain(tmp_path / "student.pt", model)
    images = torch.rand(5, *SHAPE)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
    command = [sys.executable, "-I", "-c", LOAD, tmp_path / "student.pt", tmp_path / "expected.pt"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_saved_network_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    model, _ = load_classifier(tiny)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_plain(tmp_path / "student.pt", model)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_pickled_or_copied_is_said(tiny, tmp_path):
    model, _ = load_classifier(tiny)
    model.network.mine = lambda: None
    with pytest.raises(ModelError, match=r"cannot be pickled .* at the top of a module"):
        save_plain(tmp_path / "student.pt", model)
    model.network.mine = (value for value in ())
    with pytest.raises(ModelError, match="cannot be copied"):
        plain(model)


# files


def run(form: str, path: Path, images: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """What a user of the file gets; the network is there to be filled with a state-dict."""
    if form == "torch-export":
        return torch.export.load(path).module()(images)
    if form == "onnx":
        return torch.from_numpy(onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})[0])
    network.load_state_dict(load_file(path) if form == "safetensors" else torch.load(path, weights_only=True))
    return network(images)


@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_student_is_the_same_function_at_every_batch_size(student, tmp_path, form):
    out = tmp_path / "exported" / "student.pt2"
    difference = export_model(student, out, form)
    assert difference < 1e-4
    assert [file.name for file in out.parent.iterdir()] == ["student.pt2"]  # nothing beside it, weights neither
    model, config = load_classifier(student)
    fresh = plain(build_classifier(config))
    if FORMATS[form].weights_alone:
        fresh = library_form(fresh, config, None)
    with torch.no_grad():
        for images in batches():
            torch.testing.assert_close(run(form, out, images, fresh), model(images), rtol=1e-4, atol=1e-4)


def test_a_state_dict_fits_torchvisions_own_network(tmp_path):
    path = save(tmp_path / "s", arch="resnet18", bias_free=False)
    export_model(path, tmp_path / "weights.pt", "state-dict")
    network = torchvision.models.resnet18(num_classes=10).eval()
    network.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(network(images), load_classifier(path)[0](images))


def build_vit(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return torchvision.models.VisionTransformer(image_shape[1], 7, 1, 2, 16, 32, num_classes=num_classes)


def build_swin(num_classes: int) -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [1, 2], [4, 4], num_classes=num_classes)


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
@pytest.mark.parametrize("build", [build_vit, build_swin])
def test_transformers_are_exported(form, build):
    network = used(build(10, SHAPE) if build is build_vit else build(10))
    content = FORMATS[form].encode(network, torch.rand(2, *SHAPE))
    with torch.no_grad():
        for images in batches():
            if form == "onnx":
                found = torch.from_numpy(onnxruntime.InferenceSession(content).run(None, {"images": images.numpy()})[0])
            else:
                found = torch.export.load(io.BytesIO(content)).module()(images)
            torch.testing.assert_close(found, network(images), rtol=1e-4, atol=1e-4)


def test_a_file_that_computes_something_else_is_not_put_in_place(tiny, tmp_path, request):
    honest = FORMATS["state-dict"]

    def careless(network: nn.Module, images: torch.Tensor) -> bytes:
        network.head.weight.data[3] *= 1.01
        return honest.encode(network, images)

    request.addfinalizer(lambda: FORMATS.update({"state-dict": honest}))
    FORMATS["state-dict"] = Format(careless, honest.decode)
    with pytest.raises(ModelError, match="computes other logits, which differ by up to"):
        export_model(tiny, tmp_path / "out.pt", "state-dict")
    FORMATS["state-dict"] = Format(honest.encode, lambda *_: lambda x: x[:, 0, 0, :10] * np.nan)
    with pytest.raises(ModelError, match="differ by up to nan"):
        export_model(tiny, tmp_path / "out.pt", "state-dict")
    assert list(tmp_path.iterdir()) == []


class Decides(nn.Linear):
    """What it does depends on the values of the images."""

    def forward(self, x):
        return super().forward(x if x.sum() > 1 else -x)


def build_deciding(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Decides(3 * 28 * 28, num_classes))


def invoke(*arguments: object):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_the_command_says_how_exact_the_file_is_and_does_not_overwrite_it(tiny, tmp_path):
    out = tmp_path / "student.pt2"
    arguments = ("--model", tiny, "--format", "torch-export", "--out", out)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "its logits differ from the model's by" in result.output
    before = out.read_bytes()
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.output == f"Error: {out} exists: choose another --out, or remove it first\n"
    assert out.read_bytes() == before


def test_what_cannot_be_exported_is_said_and_nothing_is_written(tiny, teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for model, form, message in (
        (tmp_path / "nowhere", "onnx", "no model at"),
        (teacher, "onnx", "stands behind the front 'grayscale'"),
        (tiny, "onnx", "--format onnx needs onnxscript, which is not installed: pip install onnx onnxscript"),
    ):
        result = invoke("--model", model, "--format", form, "--out", out)
        assert (result.exit_code, out.exists()) == (1, False)
        assert message in result.output
    with pytest.raises(ModelError, match="unknown format 'caffe': choose one of torch-export, onnx, state-dict"):
        export_model(tiny, out, "caffe")


def test_a_students_own_class_is_exported_by_name_and_one_that_no_format_can_say_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for name in ("build_swin", "build_deciding"):
        factory = f"{__name__}:{name}"
        config = ModelConfig(
            "student", factory, False, "none", tuple(f"c{i}" for i in range(10)), SHAPE, dataset={}, training={}
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
        save_weights(tmp_path / name, build_classifier(config, factory))
    arguments = ["--format", "torch-export", "--student-factory"]
    model, out = tmp_path / "build_swin", tmp_path / "swin.pt2"
    assert "code runs only where you say so" in invoke("--model", model, "--format", "onnx", "--out", out).output
    assert invoke("--model", model, "--out", out, *arguments, f"{__name__}:build_swin").exit_code == 0
    model, out = tmp_path / "build_deciding", tmp_path / "deciding.pt2"
    result = invoke("--model", model, "--out", out, *arguments, f"{__name__}:build_deciding")
    assert result.exit_code == 1
    assert "cannot be exported as torch-export" in result.output
    assert not out.exists()
