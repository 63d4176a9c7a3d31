"""Networks that return more than a tensor, and networks for grey images."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pipeline import Classifier, ModelError, build_network, explain, save_plain
from pipeline.networks.layers import take_channels
from pipeline.networks.outputs import as_returned, logits_of, take_logits

CLASSES, SHAPE = 3, (3, 16, 16)


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dictionary whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Outputs(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


class Returning(nn.Module):
    def __init__(self, output: Callable[[Tensor, Tensor], Any], in_training: bool = False):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)
        self.output, self.in_training = output, in_training

    def forward(self, images: Tensor) -> Any:
        maps = F.relu(self.conv(images))
        logits = self.last(maps.mean((2, 3)))
        return logits if self.in_training and not self.training else self.output(logits, maps)


TAKEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "Hugging Face": lambda y, x: ModelOutput(loss=None, logits=y, hidden_states=(x,)),
    "a dictionary": lambda y, x: {"features": x, "logits": y},
    "torchvision's segmenters": lambda y, x: {"out": y, "aux": 2 * y},
    "a named tuple": lambda y, x: Outputs(y, 2 * y),
    "an object": lambda y, x: types.SimpleNamespace(logits=y),
    "a tuple of one": lambda y, x: (y,),
    "a tuple with features": lambda y, x: (y, x.mean((2, 3)), x),
    "a list, features first": lambda y, x: [x, y],
    "a dictionary with another name": lambda y, x: {"prediction": y, "features": x},
}
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "two logits": (lambda y, x: (y, 2 * y), "a tuple"),
    "two by name": (lambda y, x: {"a": y, "b": 2 * y}, "a dict with 'a', 'b'"),
    "none": (lambda y, x: (x, x), "a tuple"),
    "nothing": (lambda y, x: None, "a NoneType"),
    "a number": (lambda y, x: 3, "a int"),
    "an empty dictionary": (lambda y, x: {}, "a dict"),
}


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], str]:
    def enter(build: Callable[[], nn.Module]) -> str:
        module = types.ModuleType("written_by_a_user")
        module.build = lambda num_classes: build()
        monkeypatch.setitem(sys.modules, "written_by_a_user", module)
        return "written_by_a_user:build"

    return enter


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("what", TAKEN)
def test_an_output_that_holds_logits_is_taken_and_explained_and_no_name_changes(factory, what, in_training):
    own = Returning(TAKEN[what], in_training)
    name = factory(lambda: own)
    names = list(own.state_dict())
    network, _ = build_network(name, CLASSES, SHAPE, free_of_biases=False, factory=name)
    assert network is own
    assert list(network.state_dict()) == names
    same = Returning(lambda y, x: y)
    same.load_state_dict(own.state_dict())
    images = torch.rand(2, *SHAPE)
    for model in (network, Classifier(network)):
        for mode in (False, True):
            logits, heatmaps = explain(model.train(mode), images, torch.tensor([0, 2]), 0.1)
            expected, of_same = explain(same.train(mode), images, torch.tensor([0, 2]), 0.1)
            assert torch.equal(logits, expected)
            assert torch.equal(heatmaps, of_same)


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_an_output_in_which_the_logits_are_not_clear_is_named(factory, what, in_training):
    output, words = REFUSED[what]
    name = factory(lambda: Returning(output, in_training))
    with pytest.raises(ModelError, match=f"returns {words} for 2 images and 3 classes.*one tensor"):
        build_network(name, CLASSES, SHAPE, free_of_biases=False, factory=name)
    with pytest.raises(ModelError, match=f"returns {words}.*(N, 3)"):
        logits_of(output(torch.ones(2, 3), torch.ones(2, 8, 4, 4)), CLASSES)


def test_logits_of_another_number_of_classes_are_refused_by_their_shape(factory):
    name = factory(lambda: Returning(lambda y, x: {"logits": y}))
    with pytest.raises(ModelError, match=r"returns \(2, 3\) for 2 images and 5 classes"):
        build_network(name, 5, SHAPE, free_of_biases=False, factory=name)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_in_training_mode_are_taken(factory, arch):
    side = 32 if arch == "googlenet" else 299
    name = factory(lambda: torchvision.models.get_model(arch, weights=None, num_classes=CLASSES, init_weights=False))
    network, _ = build_network(name, CLASSES, (3, side, side), free_of_biases=False, factory=name)
    assert network.train()(torch.rand(2, 3, side, side)).shape == (2, CLASSES)


def test_the_file_of_a_network_holds_nothing_of_ours(tmp_path):
    network = Returning(TAKEN["a dictionary"])
    network.output = returned
    take_logits(network, CLASSES)
    take_logits(network, CLASSES)
    assert len(network._forward_hooks) == 1
    save_plain(tmp_path / "model.pt", Classifier(network, image_shape=SHAPE))
    assert b"pipeline" not in (tmp_path / "model.pt").read_bytes()
    images = torch.rand(2, *SHAPE)
    logits = network.eval()(images)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(images)["logits"], logits)
    assert torch.equal(as_returned(network)(images)["logits"], logits)


def returned(logits: Tensor, maps: Tensor) -> dict[str, Tensor]:
    return {"logits": logits}


GREY = [
    "resnet18",
    "mobilenet_v3_small",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "squeezenet1_1",
    "googlenet",
    "efficientnet_b0",
]


@pytest.mark.parametrize("arch", GREY)
def test_networks_of_torchvision_take_grey_images(arch):
    network, _ = build_network(arch, CLASSES, (1, 64, 64), free_of_biases=False)
    assert network.eval()(torch.rand(2, 1, 64, 64)).shape == (2, CLASSES)


def test_a_grey_image_has_the_output_that_it_has_in_three_channels():
    network = torchvision.models.resnet18(num_classes=CLASSES).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        expected = network(images.expand(-1, 3, -1, -1))
        assert take_channels(network, 1) == "conv1"
        torch.testing.assert_close(network(images), expected)
        assert take_channels(network, 1) is None
        assert take_channels(network, 3) == "conv1"
        torch.testing.assert_close(network(images.expand(-1, 3, -1, -1)), expected)


class Late(nn.Module):
    """Registers a convolution of three channels before the one that receives the image."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.stem = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.gate(self.stem(images)).mean((2, 3))


def test_the_convolution_that_receives_the_image_is_changed():
    network = Late()
    assert take_channels(network, 1, (16, 16)) == "stem"
    assert network(torch.rand(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("network", "channels", "words"),
    [
        (nn.Conv2d(3, 8, 3), 4, "a first convolution of 3 channels .* take 4"),
        (nn.Conv2d(5, 8, 3), 1, "a first convolution of 5 channels"),
        (nn.Linear(3, 8), 1, "no convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), 1, "computes its weights from other parameters"),
    ],
)
def test_a_network_that_cannot_take_other_channels_is_refused(network, channels, words):
    with pytest.raises(ModelError, match=words):
        take_channels(nn.Sequential(network), channels)
