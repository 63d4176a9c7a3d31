"""What the bias-free form of a network promises."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from pipeline import (
    ModelError,
    ScaleNorm,
    architectures,
    bias_free,
    build_network,
    explain,
    homogeneity_error,
    load_classifier,
)


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "vgg11_bn", "densenet121", "alexnet", "regnet_x_400mf"])
def test_a_relu_network_becomes_positively_homogeneous(name):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64)
    biased = build_network(name, 10, (3, 64, 64), free_of_biases=False)[0].train()
    with torch.no_grad():  # biases and statistics that matter
        for parameter_name, parameter in biased.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
        biased(images)
    network, report = bias_free(biased)
    assert homogeneity_error(biased, images) > 1e-2
    assert homogeneity_error(network, images) < 1e-4
    assert report.changed
    assert report.could_not == ()
    assert not any(n.endswith("bias") for n, _ in network.named_parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def test_the_original_is_untouched_and_its_scales_are_kept():
    model = torchvision.models.resnet18(num_classes=10)
    model.bn1.weight.data.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    network, _ = bias_free(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(network.bn1, ScaleNorm)
    assert torch.equal(network.bn1.weight, model.bn1.weight)


def test_what_cannot_be_made_homogeneous_is_named():
    _, report = bias_free(torchvision.models.mobilenet_v3_small(num_classes=10))
    assert any("Hardswish" in line for line in report.could_not)
    _, report = bias_free(torchvision.models.vit_b_32(num_classes=10, image_size=64))
    assert any("LayerNorm" in line for line in report.could_not)
    assert any("GELU" in line for line in report.could_not)
    network, report = bias_free(nn.BatchNorm2d(3))
    assert isinstance(network, ScaleNorm)


def test_mode_type_and_frozen_scales_carry_over_and_a_shared_norm_stays_shared():
    norm = nn.BatchNorm2d(4)
    norm.weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), norm).double().eval()
    network, report = bias_free(model)
    assert network[1] is network[3]
    assert not network[1].training
    assert not network[1].weight.requires_grad
    assert network[1].running_second_moment.dtype == torch.float64
    assert len(report.changed) == 3
    network[0].train()
    homogeneity_error(network, torch.rand(2, 3, 4, 4).double())
    assert [module.training for module in network] == [True, False, False, False]


def norm_of(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula, plainly."""
    return x * (weight / (x.square().mean((0, 2, 3)) + eps).sqrt()).view(1, -1, 1, 1)


def test_scale_norm_equals_its_formula_with_first_and_second_derivatives():
    torch.manual_seed(0)
    norm = ScaleNorm(3, eps=1e-3).double()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), norm_of(x, norm.weight, 1e-3))

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    inputs = (x, norm.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_scale_norm_evaluates_with_running_second_moments():
    norm = ScaleNorm(2, momentum=0.25)
    x = torch.randn(8, 2, 3, 3) * 3
    norm.train()(x)
    expected = 0.75 + 0.25 * x.square().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_second_moment, expected)
    torch.testing.assert_close(norm.eval()(x), x / (expected + norm.eps).sqrt().view(1, 2, 1, 1))
    torch.testing.assert_close(norm.running_second_moment, expected)


def test_a_bias_free_teacher_behind_its_front_explains_its_whole_logit(dataset, teacher):
    from data import open_dataset
    from pipeline.device import as_input

    model, _ = load_classifier(teacher)
    images = as_input(open_dataset(dataset).split("ood").images[:6], torch.device("cpu"))
    targets = torch.arange(6)
    logits, heatmaps = explain(model, images, targets, 0.0)
    torch.testing.assert_close(heatmaps.sum((1, 2, 3)), logits[range(6), targets], rtol=1e-3, atol=1e-3)


def test_neither_hue_nor_brightness_reaches_a_teacher_that_sees_grayscale(teacher):
    model, _ = load_classifier(teacher)
    digit = (torch.rand(1, 1, 28, 28) > 0.7).float()
    colours = torch.tensor([[1.0, 0, 0], [0.1, 0.02, 0.3], [0.004, 0.004, 0]]).view(3, 3, 1, 1)
    logits = model(digit * colours)
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2])
    assert torch.isfinite(model(torch.zeros(1, 3, 28, 28))).all()


FAMILIES = ["convnext_tiny", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2"]
FAMILIES += ["shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vit_b_32", "regnet_y_400mf"]


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families_are_built_by_name(name):
    assert name in architectures()
    network, _ = build_network(name, 7, (3, 224, 224), free_of_biases=False)
    assert network.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.parametrize(("options", "layers", "parameters"), [({}, 14, 180_000), ({"width": 8, "depth": 1}, 8, None)])
@pytest.mark.parametrize("side", [8, 28, 33])
def test_the_small_resnet_has_its_layers_and_is_homogeneous_at_any_size(options, layers, parameters, side):
    network, report = build_network("small-resnet", 7, (2, side, side), free_of_biases=True, options=options)
    shortcuts = 2
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == layers + shortcuts
    assert not report.could_not
    assert homogeneity_error(network, torch.rand(4, 2, side, side)) < 1e-5
    if parameters:
        assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(parameters, rel=0.02)


class Tokens(nn.Module):
    """Patches as tokens, one of PyTorch's own modules, and a head."""

    def __init__(self, body, **options):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        options = {"dropout": 0.0, **options}
        self.body, self.batch_first = body(**options), options.get("batch_first", False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x if self.batch_first else x.transpose(0, 1)
        if isinstance(self.body, nn.MultiheadAttention):
            x = self.body(x, x, x, need_weights=False)[0]
        else:
            x = self.body(x, x) if isinstance(self.body, nn.TransformerDecoder | nn.Transformer) else self.body(x)
        return self.head(x.mean(1 if self.batch_first else 0))


BODIES = {
    "attention": lambda norm_first, **o: nn.MultiheadAttention(16, 2, **o),
    "encoder layer": lambda **o: nn.TransformerEncoderLayer(16, 2, 32, **o),
    "encoder": lambda **o: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **o), 2),
    "decoder": lambda **o: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, **o), 1),
    "transformer": lambda **o: nn.Transformer(16, 2, 1, 1, 32, **o),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_pytorchs_own_transformers_are_built_run_and_explained_bias_free(body, batch_first, norm_first, monkeypatch):
    module = types.ModuleType("transformers_of_mine")
    options = {"batch_first": batch_first, "norm_first": norm_first}
    module.build = lambda num_classes: Tokens(BODIES[body], **options)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = f"{module.__name__}:build"
    torch.manual_seed(0)
    network, report = build_network(name, 4, (3, 16, 16), free_of_biases=True, factory=name)
    assert any("out_proj: bias removed" in line for line in report.changed)
    assert not any(isinstance(m, nn.Linear) and isinstance(m.bias, nn.Parameter) for m in network.modules())
    assert not any(key.endswith(("out_proj.bias", "linear1.bias", "linear2.bias")) for key in network.state_dict())
    images, epsilon = torch.rand(2, 3, 16, 16), torch.tensor([0.1, 0.2])
    for training in (True, False):
        network.train(training)
        with torch.no_grad():
            plain = network(images)
        logits, maps = explain(network, images, torch.tensor([0, 3]), epsilon, create_graph=True)
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
        maps.abs().mean().backward()
        assert torch.isfinite(network.patches.weight.grad).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padding_mask_takes_the_fast_path_of_a_bias_free_encoder_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = bias_free(nn.TransformerEncoder(layer, 2))[0].eval()
    tokens, padding = torch.rand(2, 5, 16), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = encoder(tokens, src_key_padding_mask=padding)  # with gradients, which leaves that path
    with torch.no_grad():
        found = encoder(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(found[0, :4], expected[0, :4])
    torch.testing.assert_close(found[1], expected[1])


def test_a_network_that_its_bias_free_form_breaks_is_told_to_keep_its_biases(monkeypatch):
    class ReadsItsBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.layer.weight.T + self.layer.bias.abs()

    module = types.ModuleType("reader_of_biases")
    module.build = lambda num_classes: ReadsItsBias()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = f"{module.__name__}:build"
    with pytest.raises(ModelError, match=r"does not run in its bias-free form: .*'abs'.*give bias_free=False"):
        build_network(name, 4, (3, 2, 2), free_of_biases=True, factory=name)


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, values):
        return self.factor * values


def scaled(layer: nn.Module, name: str) -> nn.Module:
    parametrize.register_parametrization(layer, name, Scaled())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    for name in ("weight", "bias"):
        prune.l1_unstructured(layer, name, 0.5)
    return layer


PARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the older weight norm": weight_norm,
    "the older spectral norm": spectral_norm,
    "pruning": pruned,
    "a weight of the user's own": lambda layer: scaled(layer, "weight"),
    "a bias of the user's own": lambda layer: scaled(layer, "bias"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRISED)
def test_parametrised_weights_are_no_biases_and_maps_account_for_the_whole_logit(kind):
    torch.manual_seed(0)
    layer = PARAMETRISED[kind](nn.Conv2d(3, 8, 3))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
    network, report = bias_free(model)
    assert report.could_not == ()
    assert report.changed == (
        f"0: bias removed from {type(layer).__name__}",
        "3: bias removed from Linear",
    )
    assert not any("bias" in name for name, _ in network.named_parameters())
    assert model[0].bias is not None
    classes = torch.tensor([0, 1])
    logits, maps = explain(network.double().eval(), torch.rand(2, 3, 12, 12).double(), classes, 0.0)
    torch.testing.assert_close(maps.sum((1, 2, 3)), logits[range(2), classes])
