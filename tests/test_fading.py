"""What fading promises: a network as it was, then its bias-free form, and a training that ends in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import trainer.loop.training
from data import make_coloured_mnist
from pipeline import RULE_SETS, Classifier, bias_free, cache_explanations, explain, load_classifier
from pipeline.networks.classifier import read_config
from pipeline.networks.fading import bias_free_state, fading, set_remaining
from pipeline.networks.preprocessing import PreprocessSpec
from trainer import evaluate, train_student, train_teacher
from trainer.loop.phases import remaining

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "vgg11_bn, with biases": lambda: torchvision.models.vgg11_bn(num_classes=5, dropout=0),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, dropout=0),
}


def pretrained(name: str) -> nn.Module:
    """A network in double precision whose norms have statistics and shifts."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    network.train()(images())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_has_faded_at_the_start(name, training):
    network = pretrained(name)
    faded = fading(network).train(training)
    network.train(training)
    torch.testing.assert_close(faded(images()), network(images()))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_has_faded_at_the_end_and_the_weights_are_those_of_the_bias_free_form(name):
    network = pretrained(name)
    faded, (expected, _) = fading(network), bias_free(network)
    set_remaining(faded, 0.0)
    torch.testing.assert_close(faded.train()(images()), expected.train()(images()))
    expected.load_state_dict(bias_free_state(faded))
    torch.testing.assert_close(faded.eval()(images()), expected.eval()(images()))


class Twice(nn.Module):
    """A layer and a norm under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second, self.again = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.norm(self.first(x)).relu())).mean((2, 3))


@pytest.mark.parametrize("make", [Twice, lambda: nn.BatchNorm2d(3)], ids=["shared modules", "a norm alone"])
def test_modules_with_several_names_and_a_network_that_is_a_norm_fade_once(make):
    torch.manual_seed(0)
    network = make().double()
    network.train()(images())
    faded, (expected, _) = fading(network), bias_free(network)
    torch.testing.assert_close(faded.eval()(images()), network.eval()(images()))
    set_remaining(faded, 0.5)
    if isinstance(faded, Twice):
        torch.testing.assert_close(faded.first.bias, 0.5 * network.first.bias)
        assert faded.norm is faded.again
    set_remaining(faded, 0.0)
    torch.testing.assert_close(faded.train()(images()), expected.train()(images()))
    expected.load_state_dict(bias_free_state(faded))
    torch.testing.assert_close(faded.eval()(images()), expected.eval()(images()))


def norm_of(x: Tensor, gamma: Tensor, beta: Tensor, share: float) -> Tensor:
    """The formula, plainly."""
    z = x - share * x.mean((0, 2, 3), keepdim=True)
    scale = gamma / (z.square().mean((0, 2, 3)) + 1e-3).sqrt()
    return z * scale.view(1, -1, 1, 1) + share * beta.view(1, -1, 1, 1)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_fading_norm_equals_its_formula_with_first_and_second_derivatives(share):
    torch.manual_seed(0)
    norm = fading(nn.BatchNorm2d(3, eps=1e-3).double())
    set_remaining(norm, share)
    x = torch.rand(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = {} if share == 0 else {"bias": beta}

    def call(x: Tensor, gamma: Tensor, *beta: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": gamma, **dict(zip(bias, beta, strict=True))}, x)

    inputs = (x, gamma, *bias.values())
    torch.testing.assert_close(call(*inputs), norm_of(x, gamma, beta, share))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    for given, expected in zip(
        torch.autograd.grad(call(*inputs).pow(3).sum(), inputs),
        torch.autograd.grad(norm_of(x, gamma, beta, share).pow(3).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fading_norm_averages_its_statistics_and_evaluates_with_them(dtype):
    norm = fading(nn.BatchNorm2d(2, momentum=0.25))
    set_remaining(norm, 0.5)
    x = (torch.rand(8, 2, 4, 4) + 1).to(dtype)
    norm.train()(x)
    mean = x.float().mean((0, 2, 3))
    second = (x.float() - 0.5 * mean.view(1, 2, 1, 1)).square().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.25 * mean)
    torch.testing.assert_close(norm.running_second_moment, 0.75 + 0.25 * second)
    z = x - 0.5 * norm.running_mean.view(1, 2, 1, 1)
    expected = z / (norm.running_second_moment + 1e-5).sqrt().view(1, 2, 1, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(norm.eval()(x).float(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_maps_and_their_gradients_in_between_are_those_of_the_formulas():
    """The subtracted mean and the shift take no relevance. Through the statistics passes a gradient all the same."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)]
    network = fading(nn.Sequential(*layers).double())
    set_remaining(network.train(), 0.4)
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, x)
    conv, norm, _, _, linear = network

    def plainly(rows: Tensor) -> Tensor:
        inputs = rows.detach().requires_grad_()
        pre = F.conv2d(inputs, conv.weight, conv.bias)
        subtracted = 0.4 * pre.mean((0, 2, 3), keepdim=True)
        second = (pre - subtracted).square().mean((0, 2, 3), keepdim=True)
        scale = norm.weight.view(1, -1, 1, 1) / (second + norm.eps).sqrt()
        z = (pre - subtracted) * scale + 0.4 * norm.bias.view(1, -1, 1, 1)
        a = z.relu()
        g = linear.weight[[0, 1, 1]].view_as(a)
        at_z = g * (a / (a + 0.1))
        return inputs * F.conv_transpose2d(at_z * scale, conv.weight)

    _, maps = explain(network, x, torch.tensor([0, 1, 1]), 0.1, create_graph=True)
    torch.testing.assert_close(maps, plainly(x))
    loss = maps.square().sum()
    given = torch.autograd.grad(loss, [conv.weight, norm.weight])
    expected = torch.autograd.grad(plainly(x).square().sum(), [conv.weight, norm.weight])
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("rules", "share"),  # the other rules merge a batch norm with its layer, and no fading one
    [("flex", 1.0), ("gradient-x-input", 1.0), *((rules, 0.0) for rules in RULE_SETS if rules != "cp-lrp")],
)
def test_maps_are_those_of_the_network_as_it_was_and_of_its_bias_free_form(rules, share):
    network = pretrained("resnet18")
    faded = fading(network)
    set_remaining(faded, share)
    expected = network if share else bias_free(network)[0]
    target = torch.tensor([0, 1, 2, 3])
    for model in (faded, expected):
        model.train()
    _, given = explain(faded, images(), target, 0.1, rules=rules)
    _, maps = explain(expected, images(), target, 0.1, rules=rules)
    torch.testing.assert_close(given, maps)


def test_what_remains_falls_to_nothing_in_half_of_the_steps():
    assert [remaining(step, 10) for step in range(10)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("start") / "weights.pt"
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    network.train()(torch.rand(8, 3, 32, 32))
    torch.save(network.state_dict(), path)
    return path


def test_a_teacher_and_a_student_that_start_from_weights_end_bias_free(tmp_path, start):
    make_coloured_mnist(tmp_path / "d.zarr", limit=64)
    options = {"arch": "resnet18", "bias_free": True, "batch_size": 16, "input_size": 32}
    train_teacher(tmp_path / "d.zarr", tmp_path / "t", weights=start, steps=6, **options)
    cache_explanations(tmp_path / "d.zarr", tmp_path / "t", tmp_path / "c.zarr", explainer="flex-stride8", draws=1)
    result = train_student(tmp_path / "d.zarr", tmp_path / "c.zarr", tmp_path / "s", init=start, steps=4, **options)
    for run in ("t", "s"):
        model, config = load_classifier(tmp_path / run)
        assert config.preprocessing.mean == (0, 0, 0)
        assert config.start["mean"] == pytest.approx([0.485, 0.456, 0.406])
        assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
        x = torch.rand(3, 3, 32, 32)
        torch.testing.assert_close(model.eval().network(2 * x), 2 * model.network(x), rtol=1e-3, atol=1e-4)
    assert result["bias_free"]["homogeneity_error"] < 1e-3
    assert evaluate(tmp_path / "d.zarr", tmp_path / "s")["splits"]["ood"]["samples"] == 64


def test_a_bias_free_network_that_only_takes_the_size_of_its_preprocessing_finishes():
    """As VGG does, whose poolings leave nothing of 28×28: the training had ended in a traceback."""
    network, report = bias_free(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    spec = PreprocessSpec((0.0,), (0.5,), size=(32, 32))
    model = Classifier(network, bias_free_report=report, image_shape=(3, 28, 28), preprocessing=spec)
    summary = trainer.loop.training.bias_free_summary(model, torch.full((2, 3, 28, 28), 99, dtype=torch.uint8))
    assert summary is not None
    assert summary["homogeneity_error"] < 1e-6


def test_an_interrupted_training_resumes_its_fading(tmp_path, start, monkeypatch):
    make_coloured_mnist(tmp_path / "d.zarr", limit=64)
    options = {"arch": "resnet18", "bias_free": True, "batch_size": 16, "input_size": 32, "ema": 0.5, "device": "cpu"}
    whole = tmp_path / "whole"
    train_teacher(tmp_path / "d.zarr", whole, weights=start, steps=8, snapshots=4, **options)
    step = trainer.loop.training.step

    def stopped(state, loop):
        if state.progress["step"] == 3:
            raise KeyboardInterrupt
        return step(state, loop)

    monkeypatch.setattr(trainer.loop.training, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(
            tmp_path / "d.zarr", tmp_path / "cut", weights=start, steps=8, snapshots=4, checkpoint_steps=1, **options
        )
    monkeypatch.setattr(trainer.loop.training, "step", step)
    train_teacher(
        tmp_path / "d.zarr", tmp_path / "cut", weights=start, steps=8, snapshots=4, checkpoint_steps=1, **options
    )
    one, other = (torch.load(run / "weights.pt", weights_only=True) for run in (whole, tmp_path / "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert read_config(whole) == read_config(tmp_path / "cut")


def test_weights_are_chosen_among_those_whose_terms_have_faded(tmp_path, start, monkeypatch):
    make_coloured_mnist(tmp_path / "d.zarr", limit=64)
    losses = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(trainer.loop.training, "validate", lambda *_: next(losses))
    result = train_teacher(
        tmp_path / "d.zarr", tmp_path / "t", weights=start, steps=10, arch="resnet18", bias_free=True, batch_size=16,
        input_size=32, validation=True,
    )  # fmt: skip
    assert result["kept_step"] in (6, 8, 10)
    assert next(losses, None) is None
