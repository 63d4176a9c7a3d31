"""Files of weights as people have them, loaded into networks of any library, and errors for those that do not fit."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline import Classifier, ModelError, bias_free, build_network
from pipeline.networks import checkpoints
from pipeline.networks.checkpoints import CheckpointReport, classes_in, read_weights
from pipeline.networks.classifier import save_weights

State = dict[str, Tensor]


def small_vit(classes: int, side: int = 16) -> nn.Module:
    return torchvision.models.VisionTransformer(side, 8, 2, 2, 16, 32, num_classes=classes)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "mobilenet": lambda classes: torchvision.models.mobilenet_v3_small(num_classes=classes),
    "vit": small_vit,
    "small-cnn": lambda classes: build_network("small-cnn", classes, (3, 16, 16), free_of_biases=False)[0],
}


class Backbone(nn.Module):
    """A network whose layers have names with a prefix, as Hugging Face's have."""

    def __init__(self, classes: int):
        super().__init__()
        resnet = torchvision.models.resnet18(num_classes=classes)
        self.resnet, self.classifier = resnet, nn.Sequential(nn.Flatten(), resnet.fc)
        resnet.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.resnet(images))


def load_checkpoint(network: nn.Module, path: Path, num_classes: int) -> CheckpointReport:
    return checkpoints.load_checkpoint(network, read_weights(path), num_classes)


def trained(network: nn.Module) -> nn.Module:
    """Give a network other values than any initialisation does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.rand(tensor.shape, generator=generator) + 0.05)
    return network


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged(network: nn.Module) -> State:
    return AveragedModel(network).state_dict()


def noise(state: State) -> State:
    return {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in state.items()}


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda n: n.state_dict(),
    "DataParallel": lambda n: nn.DataParallel(n).state_dict(),
    "compiled": lambda n: torch.compile(n).state_dict(),
    "compiled DataParallel": lambda n: prefixed(n.state_dict(), "module._orig_mod."),
    "Lightning": lambda n: {"state_dict": prefixed(n.state_dict(), "model."), "epoch": 3, "loops": {"fit": {"a": 1}}},
    "Lightning, another attribute, a metric": lambda n: {
        "state_dict": {**prefixed(n.state_dict(), "student.net."), "loss.weight": torch.ones(3)}
    },
    "backbone": lambda n: prefixed(n.state_dict(), "backbone."),
    "encoder of a model of a module": lambda n: {"model": prefixed(n.state_dict(), "module.model.encoder.")},
    "timm": lambda n: {"state_dict": noise(n.state_dict()), "state_dict_ema": n.state_dict(), "arch": "x"},
    "DeiT": lambda n: {
        "model": noise(n.state_dict()),
        "model_ema": n.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "optimizer": torch.optim.SGD(n.parameters(), 0.1, momentum=0.9).state_dict(),
        "best": np.float64(0.5),
    },
    "average": averaged,
    "average in a checkpoint": lambda n: {"model": noise(n.state_dict()), "ema": averaged(n)},
    "average beside the network": lambda n: {
        "state_dict": {**prefixed(noise(n.state_dict()), "model."), **prefixed(n.state_dict(), "ema_model.")}
    },
    "two levels": lambda n: {"network": {"state_dict": n.state_dict()}},
    "half": lambda n: {name: v.half() if v.is_floating_point() else v for name, v in n.state_dict().items()},
    "double": lambda n: {name: v.double() if v.is_floating_point() else v for name, v in n.state_dict().items()},
    "without counts": lambda n: {k: v for k, v in n.state_dict().items() if "num_batches" not in k},
}


def written(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous().clone() for key, value in content.items()}, folder / name)
    else:
        torch.save(content, folder / name)
    return folder / name


def assert_same(first: nn.Module, second: nn.Module, side: int = 16, tolerance: float = 0.0) -> None:
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(first.eval()(images), second.eval()(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_as_libraries_write_it_loads(tmp_path, name, how):
    source, network = trained(NETWORKS[name](3)), NETWORKS[name](3)
    path = written(tmp_path, WRAPPED[how](source))
    report = load_checkpoint(network, path, 3)
    assert_same(network, source, tolerance=1e-2 if how == "half" else 1e-6)
    assert report.replaced == ()
    assert report.classes == 3
    assert "weights.pth" in report.lines()[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_safetensors_load(tmp_path, name):
    source, network = trained(NETWORKS[name](3)), NETWORKS[name](3)
    load_checkpoint(network, written(tmp_path, source.state_dict(), "w.safetensors"), 3)
    assert_same(network, source)


@pytest.mark.parametrize("prefix", ["", "resnet.", "model.", "module.model."])
def test_a_backbone_alone_loads_into_a_network_with_a_prefix_of_its_own(tmp_path, prefix):
    source, network = trained(Backbone(3)), Backbone(2)
    last = network.classifier[1].weight.clone()
    report = load_checkpoint(network, written(tmp_path, prefixed(source.resnet.state_dict(), prefix)), 2)
    assert report.replaced == ("classifier.1",)
    assert report.classes is None
    assert "replaced: 'classifier.1' (missing in the file, 2 here)" in "\n".join(report.lines())
    assert network.classifier[1].weight.equal(last)
    assert network.resnet.conv1.weight.equal(source.resnet.conv1.weight)


def test_a_backbone_and_a_last_layer_of_ones_own_beside_it(tmp_path):
    source, network = trained(Backbone(3)), torchvision.models.resnet18(num_classes=3)
    state = {
        **prefixed(source.resnet.state_dict(), "backbone."),
        "fc.weight": source.classifier[1].weight.detach(),
        "fc.bias": source.classifier[1].bias.detach(),
    }
    load_checkpoint(network, written(tmp_path, state), 3)
    assert_same(network, source)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_plain_file_loads_into_a_wrapped_network_and_wrappers_within_do_not_count(tmp_path, wrap):
    source, network = trained(NETWORKS["small-cnn"](3)), NETWORKS["small-cnn"](3)
    load_checkpoint(wrap(network), written(tmp_path, source.state_dict()), 3)
    assert_same(network, source)
    vgg, other = trained(torchvision.models.vgg11(num_classes=3)), torchvision.models.vgg11(num_classes=3)
    state = {k.replace("features.", "features.module."): v for k, v in vgg.state_dict().items()}
    load_checkpoint(other, written(tmp_path, state), 3)
    assert other.features[0].weight.equal(vgg.features[0].weight)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "fc"), ("mobilenet", "classifier.3"), ("vit", "heads.head")])
def test_a_last_layer_for_other_classes_keeps_its_random_weights_and_is_named(tmp_path, name, last):
    source, network = trained(NETWORKS[name](7)), NETWORKS[name](2)
    before = network.get_submodule(last).weight.clone()
    path = written(tmp_path, source.state_dict())
    assert classes_in(network, read_weights(path), 2) == 7
    report = load_checkpoint(network, path, 2)
    assert report.replaced == (last,)
    assert report.classes == 7
    assert f"replaced: '{last}' (7 classes in the file, 2 here)" in "\n".join(report.lines())
    assert network.get_submodule(last).weight.equal(before)
    first = next(iter(source.state_dict()))
    assert network.state_dict()[first].equal(source.state_dict()[first])


def test_auxiliary_classifiers_are_replaced_with_the_last_layer_and_may_be_too_many(tmp_path):
    def build(classes: int, aux: bool) -> nn.Module:
        return torchvision.models.googlenet(num_classes=classes, aux_logits=aux, init_weights=False)

    source = trained(build(7, True))
    path = written(tmp_path, source.state_dict())
    report = load_checkpoint(build(7, False), path, 7)
    assert all(name.startswith("aux") for name in report.unexpected)
    assert report.unexpected
    assert "unexpected in the file, not loaded: 'aux1.conv.conv.weight'" in "\n".join(report.lines())
    assert load_checkpoint(build(2, True), path, 2).replaced == ("aux1.fc2", "aux2.fc2", "fc")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "vit"])
def test_a_first_layer_is_summed_for_grey_images_and_shared_out_for_colours(tmp_path, name):
    from pipeline.networks.layers import take_channels

    colour, grey = trained(NETWORKS[name](3)), NETWORKS[name](3)
    layer = take_channels(grey, 1)
    report = load_checkpoint(grey, written(tmp_path, colour.state_dict()), 3)
    images = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        expected = colour.eval()(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.eval()(images), expected, rtol=1e-5, atol=1e-5)
        assert f"'{layer}.weight' takes 3 channels in the file and 1 here" in "\n".join(report.lines())
        back = NETWORKS[name](3)
        report = load_checkpoint(back, written(tmp_path, grey.state_dict(), "grey.pth"), 3)
        torch.testing.assert_close(back.eval()(images.expand(-1, 3, -1, -1)), expected, rtol=1e-5, atol=1e-5)
        assert "divided by 3 and repeated" in "\n".join(report.lines())


@pytest.mark.parametrize("bias", [False, True])
def test_the_weights_of_our_own_trainings_load_and_bias_free_ones_stay_bias_free(tmp_path, bias):
    network = trained(build_network("small-cnn", 3, (3, 16, 16), free_of_biases=not bias)[0])
    save_weights(tmp_path, Classifier(network))
    assert read_weights(tmp_path).path == tmp_path / "weights.pt"
    assert read_weights(tmp_path).bias_free is not bias
    fresh = NETWORKS["small-cnn"](3)
    report = load_checkpoint(fresh, tmp_path, 3)
    assert_same(fresh, network, tolerance=1e-5)
    assert report.prefix == "network."
    if not bias:
        assert "biases and means are zero" in "\n".join(report.lines())
        assert report.unexpected == ()
        exact = build_network("small-cnn", 3, (3, 16, 16), free_of_biases=True)[0]
        load_checkpoint(exact, tmp_path, 3)
        assert_same(exact, network)


def test_casts_are_told_once(tmp_path):
    source = trained(NETWORKS["small-cnn"](3)).double()
    lines = load_checkpoint(NETWORKS["small-cnn"](3), written(tmp_path, source.state_dict()), 3).lines()
    assert [line for line in lines if "cast" in line] == ["cast: 17 tensors from float64 to float32"]


def test_quantised_tensors_are_cast(tmp_path):
    source, network = trained(NETWORKS["small-cnn"](3)), NETWORKS["small-cnn"](3)
    weight = source.conv1.weight.detach()
    state = source.state_dict() | {"conv1.weight": torch.quantize_per_tensor(weight, 0.001, 0, torch.qint8)}
    report = load_checkpoint(network, written(tmp_path, state), 3)
    assert (network.conv1.weight - weight).abs().max() < 0.05
    assert "qint8 to float32" in "\n".join(report.lines())


def test_a_shared_tensor_that_the_file_has_once_is_not_missing(tmp_path):
    def build() -> nn.Module:
        network = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), last=nn.Linear(4, 3)))
        network.b.weight = network.a.weight
        return network

    source, network = trained(build()), build()
    state = source.state_dict()
    del state["b.weight"]
    load_checkpoint(network, written(tmp_path, state, "w.safetensors"), 3)
    assert network.b.weight.equal(source.a.weight)


def test_a_deeper_network_of_our_own_is_not_taken_for_a_shallower_one(tmp_path):
    for arch in ("small-cnn", "small-resnet"):
        deep = build_network(arch, 3, (3, 16, 16), free_of_biases=False, options={"depth": 3})[0]
        network = build_network(arch, 3, (3, 16, 16), free_of_biases=False)[0]
        with pytest.raises(ModelError, match="it has more layers than the network"):
            load_checkpoint(network, written(tmp_path, deep.state_dict()), 3)


def test_biases_do_not_get_lost_in_a_bias_free_network_without_norms(tmp_path):
    vgg = torchvision.models.vgg11(num_classes=3)
    with pytest.raises(ModelError, match="the network is bias-free: let it keep its biases"):
        load_checkpoint(bias_free(vgg)[0], written(tmp_path, vgg.state_dict()), 3)


def test_positions_of_another_image_size_are_named_and_not_interpolated(tmp_path):
    path = written(tmp_path, small_vit(3, side=32).state_dict())
    with pytest.raises(ModelError, match=r"'encoder.pos_embedding' has shape .*images of another size"):
        load_checkpoint(small_vit(3), path, 3)


def test_the_weights_of_a_network_with_biases_do_not_go_into_a_bias_free_one(tmp_path):
    path = written(tmp_path, NETWORKS["small-cnn"](3).state_dict())
    with pytest.raises(ModelError, match="the network is bias-free: let it keep its biases"):
        load_checkpoint(bias_free(NETWORKS["small-cnn"](3))[0], path, 3)


def test_a_file_of_which_the_last_layer_alone_is_missing_must_have_something_else(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ModelError, match="none of its 2 names"):
        load_checkpoint(network, written(tmp_path, nn.BatchNorm2d(3, track_running_stats=False).state_dict()), 3)


@pytest.mark.parametrize("end", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_checkpoint_in_several_shards_loads(tmp_path, end, given):
    source, network = trained(NETWORKS["resnet18"](3)), NETWORKS["resnet18"](3)
    stem, weight_map = "model" if end == "safetensors" else "pytorch_model", {}
    for number in range(3):
        shard = dict(list(source.state_dict().items())[number::3])
        weight_map |= dict.fromkeys(shard, written(tmp_path, shard, f"{stem}-{number + 1:05}-of-00003.{end}").name)
    index = tmp_path / f"{stem}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    report = load_checkpoint(network, tmp_path if given == "folder" else index, 3)
    assert_same(network, source)
    assert report.loaded == len(weight_map) == 122
    assert index.name in report.lines()[0]
    whole = b"".join((tmp_path / name).read_bytes() for name in sorted(set(weight_map.values())))
    assert read_weights(index).sha256 == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("old", [False, True])
def test_tensors_of_a_device_that_is_not_here_load(tmp_path, monkeypatch, old):
    source, network = trained(NETWORKS["small-cnn"](3)), NETWORKS["small-cnn"](3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(source.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    assert b"cuda:7" in (tmp_path / "w.pt").read_bytes()
    load_checkpoint(network, tmp_path / "w.pt", 3)
    assert_same(network, source)


def test_a_folder_of_hugging_face_means_its_weights(tmp_path):
    source, network = trained(NETWORKS["small-cnn"](3)), NETWORKS["small-cnn"](3)
    written(tmp_path, source.state_dict(), "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    load_checkpoint(network, tmp_path, 3)
    assert_same(network, source)
