"""What is tried before a training writes anything: the end of the network, both modes, the batches of the training."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trainer.loop.state
import trainer.loop.training
from pipeline import ModelError, build_network
from pipeline.networks.classifier import build_classifier, load_classifier
from pipeline.networks.heads import HeadSpec, attach_head, decisive_head
from pipeline.networks.trials import undisturbed
from trainer import TrainingError, train_student
from trainer.loop.interruption import TrainingInterrupted

SHAPE = (3, 28, 28)
CLASSES = 10


class Ending(nn.Module):
    """A network of the user's own, whose ``ending`` turns its features (N, 16) and the images into its output."""

    def __init__(self, ending: Callable[[Ending, Tensor, Tensor], object]):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16)
        self.other, self.last = nn.Linear(16, CLASSES), nn.Linear(16, CLASSES)
        self.norm_of_logits = nn.BatchNorm1d(CLASSES, affine=False)
        self.temperature, self.zero = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.added = nn.Parameter(torch.zeros(CLASSES))
        self.register_buffer("scale", torch.tensor(0.5))
        self.ending = ending

    def forward(self, x):
        return self.ending(self, F.relu(self.norm(self.conv(x))).mean((2, 3)), x)


def other_than_last(net: Ending, z: Tensor) -> Tensor:
    return F.linear(z, net.other.weight, net.other.bias)


ENDINGS = {
    "a softmax": (lambda n, z, x: n.last(z).softmax(1), "a softmax follows it"),
    "a softmax of large logits": (lambda n, z, x: (20 * n.last(z)).softmax(1), "a softmax follows it"),
    "a log-softmax": (lambda n, z, x: n.last(z).log_softmax(1), "a log-softmax follows it"),
    "a sigmoid": (lambda n, z, x: n.last(z).sigmoid(), "a sigmoid follows it"),
    "two averaged heads": (lambda n, z, x: (other_than_last(n, z) + n.last(z)) / 2, "'other.bias' changes them too"),
    "a learned temperature of 1": (lambda n, z, x: n.last(z) * n.temperature, "'temperature' changes them too"),
    "a constant temperature": (lambda n, z, x: n.last(z) * n.scale, "it is multiplied by 0.5"),
    "a cap of large logits": (lambda n, z, x: 30 * (n.last(z) / 30).tanh(), "something follows it or is added"),
    "a bias of 0": (lambda n, z, x: n.last(z) + n.added, "'added' changes them too"),
    "a residual that begins at 0": (lambda n, z, x: n.last(z) + n.zero * other_than_last(n, z), "'zero' changes"),
    "the images": (lambda n, z, x: n.last(z) + x.mean((1, 2, 3))[:, None], "a path around it changes them too"),
    "a batch norm": (lambda n, z, x: n.norm_of_logits(n.last(z)), "something follows .* in training mode"),
    "another output in training": (lambda n, z, x: n.last(z) * (2 if n.training else 1), "by 2, in training mode"),
    "dropout of logits": (lambda n, z, x: F.dropout(n.last(z), 0.5, n.training), "in training mode"),
    "a ReLU": (lambda n, z, x: n.last(z).relu(), "something follows it"),
    "other places": (lambda n, z, x: n.last(z).flip(1), "something follows it"),
    "its weights alone": (lambda n, z, x: F.linear(z, n.last.weight), "does not call 'last'"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_student_whose_logits_are_not_those_of_the_frozen_layer_is_refused_with_the_reason(ending):
    network = Ending(ENDINGS[ending][0])
    with pytest.raises(ModelError, match=r"'last' does not make its logits alone \(.*head='free'\)") as caught:
        attach_head(network, HeadSpec(16, True), CLASSES, SHAPE, adapter_bias=False)
    assert caught.match(ENDINGS[ending][1])


FINE = {
    "the layer": lambda n, z, x: n.last(z),
    "a copy": lambda n, z, x: n.last(z).clone().view(len(z), -1) + 0 * n.added,
    "half precision inside": lambda n, z, x: n.last(z).bfloat16().float(),
    "the mean of several calls": lambda n, z, x: torch.stack([n.last(z), n.last(2 * z)]).mean(0),
    "the mean over positions": lambda n, z, x: n.last(n.conv(x).flatten(2).mT).mean(1),
    "dropout in front": lambda n, z, x: n.last(F.dropout(z, 0.5, n.training)),
}


@pytest.mark.parametrize("ending", FINE)
@pytest.mark.parametrize("features", [16, 20])
def test_a_student_whose_logits_are_those_of_the_layer_takes_the_head(ending, features):
    network = Ending(FINE[ending])
    attach_head(network, HeadSpec(features, True), CLASSES, SHAPE, adapter_bias=True)
    assert network.training


@pytest.mark.parametrize(("ending", "decides"), [("the layer", True), ("a softmax", False)])
def test_the_last_layer_of_a_teacher_is_kept_for_students_only_if_it_makes_the_logits(ending, decides, caplog):
    network = Ending({**FINE, "a softmax": ENDINGS["a softmax"][0]}[ending])
    assert bool(decisive_head(network, CLASSES, SHAPE)) == decides
    assert ("a softmax follows it), so that a copy of it" in caplog.text) != decides


class Counting(nn.Module):
    """A network that changes all kinds of state in training: buffers, parameters, attributes, random generators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3, CLASSES)
        self.register_buffer("replaced", torch.zeros(1))
        self.passes, self.seen = 0, False

    def forward(self, x):
        if self.training:
            self.replaced, self.passes, self.seen, self.new = self.replaced + 1, self.passes + 1, True, 1
            with torch.no_grad():
                self.last.weight.add_(random.random() + np.random.rand())
        return self.last(F.dropout(self.norm(x).mean((2, 3)), 0.5, self.training))


def state_of(network: nn.Module) -> tuple:
    values = {name: value.clone() for name, value in network.state_dict().items()}
    own = {name: value for name, value in vars(network).items() if not name.startswith("_")}
    return values, own, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def same(first: tuple, second: tuple) -> bool:
    tensors = all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    return tensors and torch.equal(first[2], second[2]) and first[1] == second[1] and first[3:] == second[3:]


def test_a_trial_leaves_the_network_and_every_random_state_as_it_was():
    network = Counting()
    before = state_of(network)
    with undisturbed(network):
        network.train()(torch.rand(2, *SHAPE)).sum().backward()
        network.eval()
        assert not same(before, state_of(network))
    assert same(before, state_of(network))
    assert network.last.weight.grad is None
    attach_head(network, HeadSpec(3, True), CLASSES, SHAPE, adapter_bias=False)
    assert (network.passes, network.seen, float(network.replaced)) == (0, False, 0.0)


# training mode


@pytest.fixture
def factory(monkeypatch):
    """Names the function that builds a network, as a user's module has it."""

    def enter(build: Callable[..., object]) -> str:
        module = types.ModuleType("written_by_a_user")
        module.build = lambda num_classes: build(num_classes)
        monkeypatch.setitem(sys.modules, "written_by_a_user", module)
        return "written_by_a_user:build"

    return enter


def only_in_training(output: Callable[[Tensor], object]) -> Callable[[int], nn.Module]:
    return lambda classes: Ending(lambda n, z, x: output(n.last(z)) if n.training else n.last(z))


IN_TRAINING = {
    "a dictionary": (only_in_training(lambda y: {"a": y, "b": y}), r"a dict with 'a', 'b' .* such as output\['a'\]"),
    "a list": (only_in_training(lambda y: [y, y]), "a list for 2 images and 10 classes in training mode"),
    "another shape": (only_in_training(lambda y: y[:, :3]), r"returns \(2, 3\) for 2 images .* in training mode"),
    "one more axis": (only_in_training(lambda y: y[..., None]), r"returns \(2, 10, 1\) .* flatten them"),
    "an error": (only_in_training(lambda y: 1 / 0), r"but not in training mode: ZeroDivisionError.*, line \d+"),
}


@pytest.mark.parametrize("what", IN_TRAINING)
def test_a_network_that_returns_no_logits_in_training_mode_is_refused_when_it_is_built(factory, what):
    build, message = IN_TRAINING[what]
    name = factory(build)
    with pytest.raises(ModelError, match=message):
        build_network(name, CLASSES, (3, 32, 32), free_of_biases=False, factory=name)
    build_network(name, CLASSES, (3, 32, 32), free_of_biases=False, factory=name, to_train=False)


NOTHING_WRITTEN = {
    "a multiple of 4": (lambda y: y.view(-1, 4, CLASSES).flatten(0, 1), {}, "with 25 images.*batch_size=25"),
    "a part of 1": (lambda y: F.batch_norm(y, None, None, training=True), {"accumulate": 25}, "norm .* accumulate=25"),
    "another batch": (lambda y: y if len(y) in (2, 16) else y[1:], {}, r"returns \(24, 10\) for 25 images"),
    "a gradient": (lambda y: Raising.apply(y), {}, "in training mode with 25 images, ZeroDivisionError"),
}  # fmt: skip


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        raise ZeroDivisionError


@pytest.mark.parametrize("what", NOTHING_WRITTEN)
def test_training_mode_is_tried_with_the_batches_of_the_training_before_anything_is_written(
    dataset, tmp_path, factory, what
):
    output, options, message = NOTHING_WRITTEN[what]
    name = factory(only_in_training(output))
    with pytest.raises((ModelError, TrainingError), match=message):
        train_student(
            dataset, None, tmp_path / "s", method="erm", steps=2, batch_size=25, student_factory=name, **options
        )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda k: Ending, "returned the class Ending: it must call it"),
        (lambda k: Ending(FINE["the layer"]).half(), "float32 on the CPU, .*'temperature' is float16 on cpu"),
        (lambda k: Ending(FINE["the layer"]).to("meta"), "'temperature' is float32 on meta"),
        (lambda k: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Wide()), "has no parameter to learn"),
        (lambda k: Ending(lambda n, z, x: n.last(z) * torch.nan), "logits that are not finite"),
        (lambda k: Ending(lambda n, z, x: n.last(z.squeeze())), r"returns \(10,\) for 1 images"),
        (lambda k: torchvision.models.resnet18(num_classes=1000), r"returns \(2, 1000\).*with num_classes outputs"),
        (lambda k: nn.Sequential(nn.Conv2d(3, k, 3)), r"returns \(2, 10, 26, 26\).*pool and flatten"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_trained_is_refused_with_the_remedy(dataset, tmp_path, factory, build, message):
    with pytest.raises(ModelError, match=message):
        train_student(dataset, None, tmp_path / "s", method="erm", steps=2, student_factory=factory(build))
    assert not (tmp_path / "s").exists()


class Wide(nn.Module):
    def forward(self, x):
        return x.repeat(1, 4)[:, :CLASSES]


def test_one_output_for_two_classes_is_told_to_be_two(factory):
    name = factory(lambda k: nn.Sequential(nn.Flatten(), nn.Linear(2352, 1)))
    with pytest.raises(ModelError, match="give each of the two classes a logit"):
        build_network(name, 2, SHAPE, free_of_biases=False, factory=name)


def test_a_function_without_num_classes_is_told_that_it_gets_it(monkeypatch):
    module = types.ModuleType("written_by_a_user")
    module.build = lambda n: None
    monkeypatch.setitem(sys.modules, "written_by_a_user", module)
    with pytest.raises(ModelError, match="must take num_classes=10, with which it is called"):
        build_network("written_by_a_user:build", 10, SHAPE, free_of_biases=False, factory="written_by_a_user:build")


WRAPPED = {
    "DataParallel": lambda k: nn.DataParallel(Ending(FINE["the layer"])),
    "frozen layers": lambda k: frozen(Ending(FINE["the layer"])),
    "lazy layers": lambda k: nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(k)
    ),
    "input changed in place": lambda k: Ending(lambda n, z, x: n.last(F.relu(n.conv(x.mul_(2))).mean((2, 3)))),
}


def frozen(network: Ending) -> nn.Module:
    network.conv.requires_grad_(False)
    return network


@pytest.mark.parametrize("what", WRAPPED)
@pytest.mark.parametrize("bias_free", [False, True])
def test_networks_as_people_write_them_are_trained(dataset, cache, tmp_path, factory, what, bias_free):
    name = factory(WRAPPED[what])
    train_student(
        dataset, cache, tmp_path / "s", steps=2, batch_size=25, student_factory=name, bias_free=bias_free
    )  # fmt: skip
    assert (tmp_path / "s" / "result.json").exists()


def test_probabilities_in_place_of_logits_are_told(dataset, tmp_path, factory, caplog):
    name = factory(lambda k: Ending(ENDINGS["a softmax"][0]))
    train_student(dataset, None, tmp_path / "s", method="erm", steps=1, student_factory=name)
    assert "returns probabilities and not logits" in caplog.text


def test_a_model_and_an_unfinished_training_from_before_the_trial_stay_usable(
    dataset, cache, tmp_path, factory, monkeypatch
):
    """A student with a softmax at its end, as earlier versions accepted it."""
    name = factory(lambda k: Ending(ENDINGS["a softmax"][0]))
    options = {"steps": 4, "batch_size": 25, "student_factory": name, "checkpoint_steps": 2}

    def unchecked(config, student_factory, segmenter, **others):
        return build_classifier(config, student_factory, segmenter, to_train=False)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.loop.state, "build_classifier", unchecked)
        patched.setattr(trainer.loop.training, "finish", interrupted)
        with pytest.raises(TrainingInterrupted):
            train_student(dataset, cache, tmp_path / "s", **options)
    with pytest.raises(ModelError, match="a softmax follows it"):
        train_student(dataset, cache, tmp_path / "new", **options)
    train_student(dataset, cache, tmp_path / "s", **options)
    load_classifier(tmp_path / "s", name)


def interrupted(state: object) -> None:
    raise TrainingInterrupted("stopped", 15)


@settings(max_examples=5, deadline=None)
@given(batch_size=st.integers(2, 40), accumulate=st.integers(1, 3))
def test_the_trial_changes_no_byte_of_the_weights(dataset, tmp_path_factory, batch_size, accumulate):
    def weights(trial: Callable[..., None]) -> bytes:
        path: Path = tmp_path_factory.mktemp("run") / "s"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trainer.loop.training, "try_out", trial)
            options = {"steps": 2, "batch_size": batch_size, "accumulate": accumulate, "arch_options": {"width": 4}}
            train_student(dataset, None, path, method="erm", **options)
        return (path / "weights.pt").read_bytes()

    def without_trial(training, model, device, autocast, samples) -> None:
        model.train()

    assert weights(trainer.loop.training.try_out) == weights(without_trial)
