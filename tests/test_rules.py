"""What each rule promises: its formula, its second order, conservation, and agreement with other libraries."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import pipeline.rules
from pipeline import RULE_SETS, RelevanceError, RuleSet, Trace, explain, rule_for, stop_relevance
from pipeline.rules import RULES
from pipeline.rules.batch_axis import batch_axis_after

ROOT = Path(__file__).parents[1]
T: Any = torch.Tensor


def test_a_new_process_has_every_rule():
    for module in pkgutil.iter_modules(pipeline.rules.__path__, "pipeline.rules."):
        importlib.import_module(module.name)  # those in which rules may be, whether or not the table imports them
    code = "from pipeline.rules import RULES; print(*sorted({rule.__module__ for rule in RULES.values()}))"
    line = [sys.executable, "-c", code]
    modules = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert modules == sorted({rule.__module__ for rule in RULES.values() if rule.__module__.startswith("pipeline.")})


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Between(nn.Module):
    """An operation on tokens (N, 4, 6) between two linear layers."""

    def __init__(self, operation: Callable[..., Tensor], bias: bool = True, parameters: int = 0):
        super().__init__()
        self.operation = operation
        self.first = nn.Linear(5, 6, bias=bias)
        self.weights = nn.ParameterList([torch.rand(6) + 0.5 for _ in range(parameters)])
        with torch.no_grad():
            size = operation(torch.rand(2, 4, 6), *self.weights).flatten(1).shape[1]
        self.last = nn.Linear(size, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x), *self.weights).flatten(1))


def tokens(samples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, classes and an ε for each."""
    torch.manual_seed(0)
    images = torch.randn(samples, 4, 5, dtype=torch.float64)
    return images, torch.arange(samples) % 3, torch.linspace(0.05, 0.5, samples, dtype=torch.float64)


def attend(x: Tensor, **options: Any) -> Tensor:
    q, k, v = x.unflatten(2, (2, 3)).transpose(1, 2), x.flip(1).unflatten(2, (2, 3)).transpose(1, 2), x[:, None, :, :4]
    return F.scaled_dot_product_attention(q, k, v.expand(-1, 2, -1, -1), **options)


def gated(x: Tensor) -> Tensor:
    return F.glu(x, dim=-1)


def overwritten(function):
    def changed(x):
        y = x * 1
        function(y)
        return y

    return changed


def gated_in_place(x: Tensor) -> Tensor:
    x = x * 1
    x *= torch.sigmoid(x.mean(1, keepdim=True))
    return x


def response_norm(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return x * (norm / norm.mean(-1, keepdim=True))


OPERATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "relu6": (lambda x: F.relu6(4 * x), 0),
    "hardtanh": (F.hardtanh, 0),
    "hardtanh from 0": (partial(F.hardtanh, min_val=0, max_val=0.7), 0),
    "clamp from 0": (lambda x: x.clamp(0, 0.7), 0),
    "silu": (F.silu, 0),
    "gelu": (F.gelu, 0),
    "gelu by tanh": (partial(F.gelu, approximate="tanh"), 0),
    "hardswish": (lambda x: F.hardswish(3 * x), 0),
    "hardsigmoid": (F.hardsigmoid, 0),
    "sigmoid": (torch.sigmoid, 0),
    "tanh": (torch.tanh, 0),
    "mish": (F.mish, 0),
    "leaky relu": (partial(F.leaky_relu, negative_slope=0.3), 0),
    "elu": (F.elu, 0),
    "selu": (F.selu, 0),
    "celu": (F.celu, 0),
    "softplus": (F.softplus, 0),
    "prelu": (lambda x, w: F.prelu(x.mT, w), 1),
    "clamp": (lambda x: x.clamp(-0.5, 0.7), 0),
    "in-place": (overwritten(partial(F.silu, inplace=True)), 0),
    "in-place of two bounds": (overwritten(lambda x: x.clamp_(0, 0.7)), 0),
    "in-place hardtanh": (overwritten(lambda x: F.hardtanh(x, 0.0, 0.7, inplace=True)), 0),
    "in-place hardtanh of both signs": (overwritten(partial(F.hardtanh_, max_val=0.7)), 0),
    "in-place of a view": (lambda x: F.hardswish((x * 1).mT, inplace=True).mT, 0),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), 0),
    "gate": (gated, 0),
    "gate in place": (gated_in_place, 0),
    "product of a batch": (lambda x: torch.bmm(x, x.mT), 0),
    "einsum": (lambda x: torch.einsum("b i d, b j d -> b i j", x, x.tanh()), 0),
    "quotient": (lambda x: x / x.norm(dim=-1, keepdim=True), 0),
    "reciprocal square root": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1), 0),
    "normalize": (partial(F.normalize, dim=-1), 0),
    "global response norm": (response_norm, 0),
    "power": (lambda x: x.tanh() ** 2 + x**3, 0),
    "square root": (lambda x: (x.square() + 0.1).sqrt(), 0),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), 2),
    "layer norm of two axes": (lambda x: F.layer_norm(x, (4, 6)), 0),
    "rms norm": (lambda x, w: F.rms_norm(x, (6,), w, 1e-3), 1),
    "group norm": (lambda x, w, b: F.group_norm(x.mT, 3, w, b), 2),
    "instance norm": (lambda x: F.instance_norm(x), 0),
    "local response norm": (lambda x: F.local_response_norm(x, 3, alpha=0.5), 0),
    "softmax": (lambda x: F.softmax(x, -1), 0),
    "attention": (attend, 0),
    "attention with a mask": (partial(attend, attn_mask=torch.ones(4, 4).tril().bool(), scale=0.3), 0),
    "causal attention": (partial(attend, is_causal=True), 0),
    "largest of an axis": (lambda x: x.amax(1), 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_order_of_each_rule_equals_finite_differences(name):
    operation, parameters = OPERATIONS[name]
    images, targets, epsilon = tokens()
    model = Between(operation, parameters=parameters).double()
    check_second_order(model, images, targets, epsilon, "flex")


def check_second_order(model: nn.Module, images: Tensor, targets: Tensor, epsilon: Tensor, rules: str) -> None:
    wanted = torch.randn_like(images)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss() -> Tensor:
        model.load_state_dict(state, strict=False)
        _, heatmaps = explain(model, images, targets, epsilon, create_graph=True, rules=rules)
        return (heatmaps - wanted).square().sum() / 10

    weights = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    oracles.assert_gradients_are_finite_differences(loss, dict(model.named_parameters()), moving=weights)


CONSERVING = [
    "relu6", "silu", "gelu", "hardswish", "tanh", "leaky relu", "elu", "softplus", "sigmoid", "clamp", "in-place",
    "in-place of a view", "quick gelu", "gate", "gate in place", "product of a batch", "einsum", "quotient",
    "reciprocal square root", "normalize", "global response norm", "power", "layer norm of two axes", "rms norm",
    "instance norm", "local response norm", "largest of an axis",
]  # fmt: skip


@pytest.mark.parametrize(
    "change", [lambda x: x.clamp_(0, 0.5), lambda x: F.hardtanh_(x, 0, 0.5), lambda x: F.relu6(x, inplace=True)]
)
def test_the_true_gradient_at_a_bound_is_pytorchs(change):
    at_bounds = torch.tensor([[-1.0, 0.0, 0.5, 6.0, 7.0]]).double().requires_grad_()
    gradients = []
    for logits in (Trace(overwritten(change), at_bounds).logits, overwritten(change)(at_bounds)):
        gradients += torch.autograd.grad(logits.sum(), at_bounds)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", CONSERVING)
def test_relevance_is_conserved_by_each_rule_that_says_so(name):
    operation, parameters = OPERATIONS[name]
    images, targets, _ = tokens()
    model = Between(operation, bias=False, parameters=parameters).double()
    logits, heatmaps = explain(model, images, targets, 1e-12)
    torch.testing.assert_close(heatmaps.sum((1, 2)), logits[range(3), targets], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_image_has_the_epsilon_that_is_its_own(name):
    operation, parameters = OPERATIONS[name]
    images, targets, epsilon = tokens()
    model = Between(operation, parameters=parameters).double()
    together = explain(model, images, targets, epsilon)[1]
    for i in range(3):
        alone = explain(model, images[i : i + 1], targets[i : i + 1], float(epsilon[i]))[1]
        torch.testing.assert_close(together[i], alone[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_logits_and_their_true_gradients_are_those_of_the_model(name):
    operation, parameters = OPERATIONS[name]
    images, targets, epsilon = tokens()
    model = Between(operation, parameters=parameters).double()
    logits, _ = explain(model, images, targets, epsilon, create_graph=True)
    expected = model(images)
    torch.testing.assert_close(logits, expected)
    found = torch.autograd.grad(logits.square().sum(), list(model.parameters()), create_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(found, wanted)
    if name == "hardsigmoid":  # PyTorch has no second derivative of it
        return
    twice = torch.autograd.grad(sum(g.square().sum() for g in found), list(model.parameters()))
    torch.testing.assert_close(
        twice, torch.autograd.grad(sum(g.square().sum() for g in wanted), list(model.parameters()))
    )


@pytest.mark.parametrize(
    "operation", [F.relu6, F.hardtanh, F.silu, F.hardswish, F.hardsigmoid, F.mish, F.leaky_relu, F.elu, F.selu, F.celu]
)
def test_an_activation_in_place_is_the_activation(operation):
    images, targets, epsilon = tokens()
    model = Between(operation).double()
    expected = explain(model, images, targets, epsilon)[1]
    model.operation = partial(operation, inplace=True)
    assert torch.equal(explain(model, images, targets, epsilon)[1], expected)


@pytest.mark.parametrize("operation", [F.relu6, F.silu, F.hardsigmoid])
def test_before_an_activation_in_place_gradients_are_channels_last_as_the_activation_is(operation):
    """The kernel of a batch norm takes ten times as long for tensors of two layouts."""
    head, seen = nn.Conv2d(3, 2, 5).to(memory_format=torch.channels_last), []

    def model(x: Tensor) -> Tensor:
        z = x * 2
        z.register_hook(lambda g: seen.append(g.is_contiguous(memory_format=torch.channels_last)))
        return head(operation(z, inplace=True)).flatten(1)

    images = torch.rand(2, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    _, heatmaps = explain(model, images, torch.tensor([0, 1]), 0.1, create_graph=True)
    heatmaps.square().sum().backward()
    assert seen == [True, True]


@pytest.mark.parametrize("operation", [F.silu, F.gelu, F.hardswish])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_whose_output_is_changed_in_place_is_explained_as_before(operation, inplace):
    if inplace and operation is F.gelu:
        pytest.skip("it has no such form")
    images, targets, epsilon = tokens()
    given = {"inplace": True} if inplace else {}

    def changed(x: Tensor) -> Tensor:
        y = operation(x * 1, **given)
        y += 1
        return y

    gradients = []
    for function in (lambda x: operation(x) + 1, changed):
        torch.manual_seed(1)
        model = Between(function).double()
        heatmaps = explain(model, images, targets, epsilon, create_graph=True)[1]
        gradients.append((heatmaps, *torch.autograd.grad(heatmaps.square().sum(), model.first.weight)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("operation", [F.silu, F.gelu])
def test_no_output_of_an_activation_outlives_the_backward_pass(operation):
    outputs = []

    def noted(x: Tensor) -> Tensor:
        y = operation(x)
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y.mul(2)  # so that nothing but the activation keeps it

    images, targets, epsilon = tokens()
    logits, heatmaps = explain(Between(noted).double(), images, targets, epsilon, create_graph=True)
    output = outputs[-1]
    assert not output.expired()
    (heatmaps.square().sum() + logits.sum()).backward()
    assert output.expired()  # although the logits and the heatmaps are still there


@pytest.mark.parametrize("name", ["gelu", "hardtanh from 0", "clamp from 0"])
def test_the_identity_rule_is_its_formula(name):
    operation, _ = OPERATIONS[name]
    images, targets, epsilon = tokens()
    model = Between(operation).double()
    heatmaps = explain(model, images, targets, epsilon)[1]
    for image, target, value, heatmap in zip(images, targets, epsilon, heatmaps, strict=True):
        x = model.first(image)
        gradient = model.last.weight[target].view(4, 6)
        denominator = x + torch.where(x >= 0, value, -value)
        expected = image * ((gradient * operation(x) / denominator) @ model.first.weight)
        torch.testing.assert_close(heatmap, expected.detach())


def test_both_zeros_have_the_same_sign():
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x * torch.tensor([1.0, -1.0]))

    images = torch.zeros(1, 2, requires_grad=True)  # times -1 this is -0, and the map 0 whatever G is
    _, heatmaps = explain(Scaled(), images, torch.tensor([0]), 0.1, create_graph=True)
    first = torch.autograd.grad(heatmaps.sum(), images)[0][0, 0]
    _, heatmaps = explain(Scaled(), images, torch.tensor([1]), 0.1, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(heatmaps.sum(), images)[0][0, 1], -first)


def test_at_zero_neither_map_nor_gradient_explodes():
    for operation in (F.silu, F.gelu, torch.tanh, F.hardswish):
        model = Between(operation, bias=False)
        images = torch.zeros(2, 4, 5)
        images[1, 0] = 1
        for epsilon in (0.0, 0.01):
            _, heatmaps = explain(model, images, torch.tensor([0, 1]), epsilon, create_graph=True)
            heatmaps.abs().mean().backward()
            assert torch.isfinite(heatmaps).all()
        assert model.first.weight.grad.abs().max() < 1e3


def slow_attention(x: Tensor, key: Tensor, value: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of query, key and value (L, E) from that of the output (L, F): AttnLRP's propositions, in loops."""
    scores = x @ key.T
    weights = torch.softmax(scores, -1)
    output = weights @ value
    r_weights, r_value = torch.zeros_like(weights), torch.zeros_like(value)
    for i in range(len(x)):
        for p in range(value.shape[1]):
            for j in range(len(key)):  # proposition 3.3: half to each factor of each term
                share = weights[i, j] * value[j, p] / output[i, p] * relevance[i, p] / 2
                r_weights[i, j] += share
                r_value[j, p] += share
    r_scores = torch.zeros_like(scores)
    for i in range(len(x)):
        for j in range(len(key)):  # proposition 3.1
            r_scores[i, j] = scores[i, j] * (r_weights[i, j] - weights[i, j] * r_weights[i].sum())
    r_query, r_key = torch.zeros_like(x), torch.zeros_like(key)
    for i in range(len(x)):
        for j in range(len(key)):
            for e in range(x.shape[1]):
                share = x[i, e] * key[j, e] / scores[i, j] * r_scores[i, j] / 2
                r_query[i, e] += share
                r_key[j, e] += share
    return r_query, r_key, r_value


@pytest.mark.parametrize("rules", ["flex", "cp-lrp"])
def test_attention_is_attnlrp_written_out_slowly(rules):
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    readout = torch.randn(5, 3, dtype=torch.float64)
    images = torch.randn(1, 5, 12, dtype=torch.float64)  # query, key and value of 5 tokens side by side

    def model(x: Tensor) -> Tensor:
        q, k, v = (part @ w for part, w in zip(x.chunk(3, -1), weights, strict=True))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
        return (out[:, 0] * readout).sum((1, 2))[:, None]

    heatmap = explain(model, images, torch.tensor([0]), 0.0, rules=rules)[1][0]
    parts = images[0].chunk(3, -1)
    q, k, v = (part @ w for part, w in zip(parts, weights, strict=True))
    output = torch.softmax(q @ k.T, -1) @ v
    relevances = slow_attention(q, k, v, output * readout)
    if rules == "cp-lrp":
        relevances = (0 * relevances[0], 0 * relevances[1], 2 * relevances[2])
    for part, weight, z, relevance, found in zip(
        parts, weights, (q, k, v), relevances, heatmap.chunk(3, -1), strict=True
    ):
        torch.testing.assert_close(found, part * ((relevance / z) @ weight.T))


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(4, 4).triu(1).bool()},
    "added": {"attn_mask": torch.randn(4, 4)},
    "of each head": {"attn_mask": torch.randn(6, 4, 4)},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()},
    "both": {"attn_mask": torch.ones(4, 4).triu(1).bool(), "key_padding_mask": torch.zeros(3, 4).bool()},
    "causal": {"attn_mask": torch.ones(4, 4).triu(1).bool(), "is_causal": True, "need_weights": False},
    "weights of heads": {"average_attn_weights": False},
}
LAYERS = {
    "plain": {},
    "batch second": {"batch_first": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 3},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_multi_head_attention_is_pytorchs_with_all_its_options(layer, mask):
    torch.manual_seed(0)
    options = {"batch_first": True, **LAYERS[layer]}
    attention = nn.MultiheadAttention(6, 2, **options).double().eval()
    nn.init.normal_(attention.out_proj.weight)
    calls = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in MASKS[mask].items()}

    def model(x: Tensor) -> Tensor:
        value = x[..., :3] if layer == "other widths" else x.flip(1)
        x, key, value = (v if options["batch_first"] else v.transpose(0, 1) for v in (x, x * 2, value))
        out, weights = attention(x, key, value, **calls)
        out = out if options["batch_first"] else out.transpose(0, 1)
        return out.flatten(1) if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)

    images, targets, epsilon = torch.randn(3, 4, 6).double(), torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.2, 0.3])
    expected = model(images)
    logits, heatmaps = explain(model, images, targets, epsilon, create_graph=True)
    torch.testing.assert_close(logits, expected)
    assert torch.isfinite(heatmaps).all()
    found = torch.autograd.grad(logits[:, 1].sum(), attention.out_proj.weight, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected[:, 1].sum(), attention.out_proj.weight))


def test_multi_head_attention_without_a_batch_axis_is_pytorchs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2).eval()
    images = torch.randn(1, 4, 6)

    def model(x: Tensor) -> Tensor:
        return attention(x[0], x[0], x[0], key_padding_mask=torch.tensor([False, True, False, False]))[0].mean(0)[None]

    torch.testing.assert_close(explain(model, images, torch.tensor([0]), 0.1)[0], model(images).detach())


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(8, 2, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16)])
def test_the_fast_path_in_evaluation_has_a_second_order_too(layer):
    layer.eval().requires_grad_(False)  # as it must be for that path

    def model(x: Tensor) -> Tensor:
        out = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        return out.mean(1)

    images = torch.randn(2, 4, 8).requires_grad_()
    _, heatmaps = explain(model, images, torch.tensor([0, 1]), 0.1, create_graph=True)
    (gradient,) = torch.autograd.grad(heatmaps.square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


# --- whole models ---


def vision_transformer(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5, **options)
    return fill(model)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return fill(SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5))


def maxvit() -> nn.Module:
    torch.manual_seed(0)
    return fill(MaxVit((32, 32), 4, 4, [8, 8], [1, 1], 4, 0.0, num_classes=5))


def fill(model: nn.Module) -> nn.Module:
    """Nothing is left at 0 or 1, where it would show nothing."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("build", [vision_transformer, swin, maxvit])
def test_transformers_explained_together_equal_explained_alone(build):
    model = build().double()
    side = 16 if build is not maxvit else 32
    images, targets = torch.randn(3, 3, side, side).double(), torch.tensor([0, 3, 1])
    epsilon = torch.tensor([0.0, 0.1, 1.0])
    together = explain(model, images, targets, epsilon)[1]
    for i in range(3):
        alone = explain(model, images[i : i + 1], targets[i : i + 1], float(epsilon[i]))[1]
        assert relative_error(together[i], alone[0]) < 1e-9
    model, images = (value.to(memory_format=torch.channels_last) for value in (model, images))
    assert relative_error(explain(model, images, targets, epsilon)[1], together) < 1e-9


ZOO = ["efficientnet_b0", "mobilenet_v3_small", "convnext_tiny", "regnet_y_400mf", "vit_b_32", "swin_v2_t"]
ZOO += ["timm/resnest14d", "timm/convnextv2_atto", "timm/mobilevit_xxs", "timm/xcit_nano_12_p16_224", "timm/levit_128s"]


@pytest.mark.parametrize("name", ZOO)
def test_unmodified_models_of_every_kind_are_explained_and_trained(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        model = timm.create_model(name[5:], num_classes=5)
        side = model.default_cfg["input_size"][1] if model.default_cfg.get("fixed_input_size") else 64
    else:
        side = 64
        options = {"image_size": side} if name.startswith("vit") else {}
        model = torchvision.models.get_model(name, num_classes=5, **options)
    images, targets, epsilon = torch.randn(2, 3, side, side), torch.tensor([0, 3]), torch.tensor([0.02, 0.2])
    fill(model).train()
    _, heatmaps = explain(model, images, targets, epsilon, create_graph=True)
    assert torch.isfinite(heatmaps).all()
    assert heatmaps.abs().sum() > 0
    heatmaps.abs().mean().backward()
    first = next(model.parameters())
    assert torch.isfinite(first.grad).all()
    assert first.grad.abs().sum() > 0
    assert relative_error(explain(model.eval(), images, targets, epsilon)[0], model(images).detach()) < 1e-4


@pytest.mark.parametrize("rules", [name for name in RULE_SETS if name != "flex"])
def test_second_order_of_a_transformer_equals_finite_differences_under_every_rule_set(rules):
    torch.manual_seed(0)
    model = fill(VisionTransformer(4, 2, 1, 2, 4, 4, num_classes=3)).double()
    images, targets = torch.randn(2, 3, 4, 4).double(), torch.tensor([0, 2])
    epsilon = torch.tensor([0.1, 0.5], dtype=torch.float64)
    wanted = torch.randn_like(images)

    def loss() -> Tensor:
        _, heatmaps = explain(model, images, targets, epsilon, create_graph=True, rules=rules)
        return (heatmaps - wanted).square().sum()

    some = {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.numel() < 100 and "conv" not in n}
    oracles.assert_gradients_are_finite_differences(loss, some, moving=some, step=1e-5)  # a loss of 79 rounds


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding="same")
        self.norm1 = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2, groups=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 4, bias=False)
        self.norm3 = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv(x)))
        x = F.relu(self.norm2(self.up(x)))
        return self.head(F.silu(self.norm3(self.hidden(x.mean((2, 3))))))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("rules", ["epsilon-plus", "gamma"])
def test_second_order_through_merged_batch_norms_equals_finite_differences(rules, mode):
    torch.manual_seed(0)
    model = fill(Merging()).double().train(mode == "train")
    for parameter in model.parameters():
        parameter.data.mul_(2)  # for gradients of a size that shows something
    images, targets = torch.randn(4, 2, 4, 4).double(), torch.tensor([0, 2, 1, 1])
    check_second_order(model, images, targets, torch.linspace(0.1, 0.5, 4).double(), rules)


def test_merged_layers_leave_logits_statistics_and_true_gradients_alone():
    torch.manual_seed(0)
    model = fill(Merging()).train()
    twin = Merging().train()
    twin.load_state_dict(model.state_dict())
    images = torch.randn(4, 2, 4, 4)
    expected = twin(images)
    logits, _ = explain(model, images, torch.tensor([0, 2, 1, 1]), 0.1, rules="gamma", create_graph=True)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    logits.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules", ["epsilon-plus", "gamma"])
def test_layer_rules_are_their_formulas_written_out_slowly(rules):
    torch.manual_seed(0)
    conv, epsilon = nn.Conv2d(2, 3, 3, padding=1).double(), 0.2
    image, readout = torch.randn(2, 4, 4).double(), torch.randn(3, 4, 4).double()

    def model(x: Tensor) -> Tensor:
        return (conv(x) * readout).sum((1, 2, 3))[:, None]

    found = explain(model, image[None], torch.tensor([0]), epsilon, rules=rules)[1][0]
    weight, shift = oracles.dense(conv, image.shape)
    x, expected = image.flatten(), torch.zeros(image.numel(), dtype=torch.float64)
    for w, b, r in zip(weight, shift, readout.flatten(), strict=True):
        z = w @ x + b
        if rules == "epsilon-plus":
            terms, offset = (x * w).clamp_min(0), b.clamp_min(0)
        elif z > 0:
            terms, offset = x * w + 0.25 * (x * w).clamp_min(0), b + 0.25 * b.clamp_min(0)
        else:
            terms, offset = x * w + 0.25 * (x * w).clamp_max(0), b + 0.25 * b.clamp_max(0)
        total = terms.sum() + offset
        expected += terms / (total + (epsilon if total >= 0 else -epsilon)) * z * r
    torch.testing.assert_close(found.flatten(), expected)


# --- other libraries ---

PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-8)]


def vgg() -> nn.Module:
    torch.manual_seed(0)
    model = fill(torchvision.models.vgg11_bn(num_classes=10))
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(), nn.Linear(16, 10))
    return model.eval()


def plain_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("rules", ["epsilon-plus", "gamma"])
@pytest.mark.parametrize("network", ["plain", "vgg11_bn"])
def test_layer_rules_equal_zennits_composites(network, rules, dtype, tolerance):
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus, LayerMapComposite
    from zennit.rules import Epsilon, Gamma, Norm, Pass
    from zennit.types import AvgPool, Convolution

    model = (plain_cnn() if network == "plain" else vgg()).to(dtype)
    images = torch.randn(2, 3, 8, 8, dtype=dtype) if network == "plain" else torch.rand(2, 3, 32, 32, dtype=dtype)
    targets, epsilon = torch.tensor([3, 1]), 1e-3
    _, heatmaps = explain(model, images, targets, epsilon, rules=rules)
    ours = [(nn.GELU, Pass()), (AvgPool, Norm(stabilizer=1e-30))]  # pooling is no denominator here
    peer = model if network == "plain" else oracles.folded(model)  # its own folding leaves a factor of 1/sqrt(1 + eps)
    if rules == "epsilon-plus":
        composite = EpsilonPlus(epsilon=epsilon, stabilizer=epsilon, layer_map=ours)
    else:
        layers = [(nn.ReLU, Pass()), (Convolution, Gamma(0.25, epsilon)), (nn.Linear, Epsilon(epsilon))]
        composite = LayerMapComposite(ours + layers)
    with Gradient(peer, composite) as attributor:
        logits = model(images).detach()
        expected = attributor(images, F.one_hot(targets, logits.shape[1]) * logits)[1]
    assert relative_error(heatmaps, expected) < tolerance


class SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 2), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def test_flex_equals_captums_lrp():
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule

    torch.manual_seed(0)
    model, images, targets = SmallCNN().double(), torch.rand(2, 3, 8, 8).double(), torch.tensor([1, 4])
    found = explain(model, images, targets, 0.1)[1]
    for layer in model.body:
        layer.rule = EpsilonRule(0.1 if isinstance(layer, nn.Conv2d) else 1e-30)
    model.head.rule = EpsilonRule(1e-30)
    assert relative_error(found, LRP(model).attribute(images.requires_grad_(), target=targets).detach()) < 1e-8


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("rules", ["flex", "cp-lrp"])
def test_transformers_equal_lxt(patched, rules, dtype, tolerance):
    model, targets = vision_transformer().to(dtype), torch.tensor([3, 1])
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    logits, heatmaps = explain(model, images, targets, 1e-10, rules=rules)
    patched(rules)
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    torch.testing.assert_close(output, logits)
    (gradient,) = torch.autograd.grad(output[0, 3] + output[1, 1], leaf)
    assert relative_error(heatmaps, images * gradient) < tolerance


# --- sets of rules ---


def test_unknown_rules_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="unknown rules 'lrp': choose one of flex, cp-lrp, gradient-x-input"):
        explain(plain_cnn(), torch.rand(1, 3, 8, 8), torch.tensor([0]), 0.1, rules="lrp")


def test_a_set_of_rules_of_your_own_takes_a_few_lines():
    def halved(trace, func, x, **options):
        return 0.5 * func(x, **options)

    mine = RuleSet("mine", {**RULE_SETS["flex"].rules, F.gelu: halved})
    images, targets = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    model = plain_cnn()
    assert not torch.equal(explain(model, images, targets, 0.1, rules=mine)[1], explain(model, images, targets, 0.1)[1])
    found = explain(model, images, targets, 0.1, rules=mine)[1]
    assert torch.equal(Trace(model, images, mine).heatmaps(targets, 0.1), found)


def test_a_rule_that_enters_the_table_is_seen_in_all_sets_made_from_it():
    model, images = Between(torch.erf), torch.rand(2, 4, 5)
    try:
        rule_for(torch.erf)(RULES[torch.tanh])
        for rules in RULE_SETS:
            assert torch.isfinite(explain(model, images, torch.tensor([0, 1]), 0.1, rules=rules)[1]).all()
    finally:
        del RULES[torch.erf]
    with pytest.raises(RelevanceError, match="erf"):
        explain(model, images, torch.tensor([0, 1]), 0.1)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def written_into_a_buffer(x: Tensor) -> Tensor:
    canvas = torch.zeros_like(x)
    canvas[:, 1:] = x[:, 1:].exp()
    return canvas


@pytest.mark.parametrize(
    "model",
    [
        *(Between(operation, parameters=parameters) for operation, parameters in OPERATIONS.values()),
        Between(Cube.apply),
        Between(written_into_a_buffer),
        Between(lambda x: x * torch.logsumexp(x, -1, keepdim=True)),
    ],
)
def test_gradient_times_input_knows_every_operation_and_no_epsilon(model):
    images, targets, epsilon = tokens()
    model = model.double()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[range(3), targets].sum(), leaf)
    torch.testing.assert_close(explain(model, images, targets, epsilon, rules="gradient-x-input")[1], images * gradient)


@pytest.mark.parametrize("rules", RULE_SETS)
def test_nothing_of_a_pass_stays_in_memory_under_any_rules(rules):
    model, images = nn.Sequential(plain_cnn()[:2], nn.BatchNorm2d(6), vision_transformer_head()), torch.rand(2, 3, 8, 8)
    gc.collect()
    gc.disable()
    try:
        logits, heatmaps = explain(model, images, torch.tensor([0, 1]), 0.1, create_graph=True, rules=rules)
        heatmaps.sum().backward()
        token = nn.Module()  # which lives as long as the graph
        logits.grad_fn.metadata["token"] = token
        seen = [weakref.ref(logits), weakref.ref(heatmaps), weakref.ref(token)]
        del logits, heatmaps, token
        assert [ref() for ref in seen] == [None, None, None]
    finally:
        gc.enable()


def vision_transformer_head() -> nn.Module:
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu")
    return nn.Sequential(
        nn.Conv2d(6, 8, 4, 4), nn.BatchNorm2d(8), nn.Flatten(2), attention, nn.Flatten(), nn.Linear(32, 3)
    )


def test_a_statistic_that_is_divided_by_is_constant_for_relevance_however_it_is_written():
    images, targets, epsilon = tokens()
    model = Between(lambda x: x / stop_relevance(x).square().mean(-1, keepdim=True).sqrt()).double()
    expected = explain(model, images, targets, epsilon)[1]
    for operation in (
        lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
        lambda x: x * (1 / (x * x).mean(-1, keepdim=True) ** 0.5),
        lambda x: x * (x**2).mean(-1, keepdim=True).pow(-0.5),
        lambda x: (x * 1).div_(x.norm(dim=-1, keepdim=True) / 6**0.5),
        lambda x: F.rms_norm(x, (6,), None, 0.0),
    ):
        model.operation = operation
        torch.testing.assert_close(explain(model, images, targets, epsilon)[1], expected)


# --- the batch axis ---


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int]]]:
    step = st.tuples(st.sampled_from(sorted(STEPS)), st.integers(-4, 4), st.integers(-4, 4))
    return draw(st.integers(2, 4)), draw(st.lists(step, min_size=1, max_size=6))


def _dims(x: Tensor, *values: int) -> tuple[int, ...]:
    return tuple(value % x.dim() for value in values)


def _merge(x: Tensor, a: int, b: int) -> tuple[Any, tuple[Any, ...], dict]:
    first = a % max(x.dim() - 1, 1)
    return torch.flatten, (x, first, min(first + 1, x.dim() - 1)), {}


def _split_axis(x: Tensor, a: int, b: int) -> tuple[Any, tuple[Any, ...], dict]:
    dim = a % x.dim()
    divisor = next((d for d in (2, 3, 4) if x.shape[dim] % d == 0 and b % 2), 1)
    sizes = (divisor, x.shape[dim] // divisor) if b > 0 else (x.shape[dim] // divisor, divisor)
    return T.unflatten, (x, dim, sizes), {}


def _rotate(x: Tensor, a: int, b: int) -> tuple[Any, tuple[Any, ...], dict]:
    order = [(i + a) % x.dim() for i in range(x.dim())]
    return (T.permute, (x, *order), {}) if b % 2 else (torch.permute, (x, order), {})


def _index(x: Tensor, a: int, b: int) -> tuple[Any, tuple[Any, ...], dict]:
    items: list[Any] = [slice(None)] * (a % x.dim())
    choices = [0, slice(0, 1), slice(None), None, Ellipsis, torch.tensor([0, 0]), slice(None, None, 2), -1, [0, 0]]
    items = [Ellipsis, choices[b + 4]] if a % 2 and b else [*items, choices[b + 4]]
    return T.__getitem__, (x, tuple(items) if b % 2 or len(items) > 1 else items[0]), {}


def _einsum(x: Tensor, a: int, b: int) -> tuple[Any, tuple[Any, ...], dict]:
    letters = "abcdefghijkl"[: x.dim()]
    result = letters[a % x.dim() :] + letters[: a % x.dim()]
    result = result.replace(letters[b % x.dim()], "") if a > 0 and x.dim() > 1 else result
    return torch.einsum, (f"{' '.join(letters)} -> {result}", x), {}


def _ellipsis(x: Tensor, a: int, b: int) -> tuple[Any, ...]:
    last = torch.eye(x.shape[-1])
    forms: list[tuple[Any, ...]] = [
        ("...i, ij -> ...j", x, last),
        ("i..., i -> i...", x, torch.ones(len(x))),
        ("... -> ...", x),
        ("...i -> i...", x),
        ("...i, ...i", x, torch.ones(x.shape[-1])),
        ("...z, zy", x, last),
        ("...ba", x) if x.dim() > 1 else ("...a", x),
        ("ab, ...b -> ...a", last, x),
    ]
    return forms[(a + 3 * b) % len(forms)]


STEPS: dict[str, Callable[[Tensor, int, int], tuple[Any, tuple[Any, ...], dict]]] = {
    "merge": _merge,
    "split": _split_axis,
    "rotate": _rotate,
    "index": _index,
    "einsum": _einsum,
    "transpose": lambda x, a, b: (torch.transpose, (x, *_dims(x, a, b)), {}),
    "transpose by name": lambda x, a, b: (T.transpose, (x,), {"dim0": a % x.dim(), "dim1": b % x.dim()}),
    "movedim": lambda x, a, b: (torch.movedim, (x, *_dims(x, a, b)), {}),
    "unsqueeze": lambda x, a, b: (torch.unsqueeze, (x, a % (x.dim() + 1)), {}),
    "squeeze": lambda x, a, b: (torch.squeeze, (x, a % x.dim()) if b % 2 else (x,), {}),
    "select": lambda x, a, b: (T.select, (x, a % x.dim(), 0), {}),
    "narrow": lambda x, a, b: (torch.narrow, (x, a % x.dim(), 0, 1), {}),
    "unbind": lambda x, a, b: (T.unbind, (x, a % x.dim()), {}),
    "chunk": lambda x, a, b: (torch.chunk, (x, 2), {"dim": a % x.dim() - x.dim()}),
    "split off": lambda x, a, b: (T.split, (x, 1, a % x.dim()), {}),
    "mean": lambda x, a, b: (T.mean, (x, a % x.dim()), {"keepdim": b % 2 == 0}),
    "sum": lambda x, a, b: (torch.sum, (x, tuple(sorted({a % x.dim(), b % x.dim() - x.dim()}))[:1]), {}),
    "largest": lambda x, a, b: (torch.max, (x, a % x.dim()), {}),
    "norm": lambda x, a, b: (T.norm, (x,), {"dim": a % x.dim() - x.dim()}),
    "roll": lambda x, a, b: (torch.roll, (x, 1), {"dims": a % x.dim()}),
    "flip": lambda x, a, b: (T.flip, (x, [a % x.dim()]) if b % 2 else (x, a % x.dim()), {}),
    "cat": lambda x, a, b: (torch.cat, ([x, x], a % x.dim() - x.dim()), {}),
    "stack": lambda x, a, b: (torch.stack, ([x, x],), {"dim": a % (x.dim() + 1)}),
    "repeat": lambda x, a, b: (T.repeat, (x, *[2 if i == a else 1 for i in range(x.dim() + (b > 2))]), {}),
    "repeat each": lambda x, a, b: (torch.repeat_interleave, (x, 2), {"dim": a % x.dim()}),
    "pad": lambda x, a, b: (F.pad, (x, (0, 1) if b > 0 else (0, 0, 0, 1)) if x.dim() > 1 else (x, (0, 1)), {}),
    "broadcast": lambda x, a, b: (torch.add, (x, torch.zeros([1] * (x.dim() + (a > 2)))), {}),
    "expand": lambda x, a, b: (T.expand, (x, 2, *x.shape), {}),
    "matmul": lambda x, a, b: (torch.matmul, (x, torch.eye(x.shape[-1])), {}),
    "matmul from the left": lambda x, a, b: (torch.matmul, (torch.eye(x.shape[-2 if x.dim() > 1 else -1]), x), {}),
    "linear": lambda x, a, b: (F.linear, (x, torch.eye(x.shape[-1])), {}),
    "flatten all": lambda x, a, b: (torch.reshape, (x, (-1,)), {}),
    "largest two": lambda x, a, b: (torch.topk, (x, min(2, x.shape[a % x.dim()]), a % x.dim()), {}),
    "sort": lambda x, a, b: (T.sort, (x,), {"dim": a % x.dim() - x.dim()}),
    "sort the first axis": lambda x, a, b: (torch.msort, (x,), {}),
    "median": lambda x, a, b: (T.median, (x, a % x.dim()), {"keepdim": b % 2 == 0}),
    "second": lambda x, a, b: (torch.kthvalue, (x, 1, a % x.dim(), b % 2 == 0), {}),
    "sum of those before": lambda x, a, b: (torch.cumsum, (x, a % x.dim()), {}),
    "differences": lambda x, a, b: (T.diff, (x, 1, a % x.dim()), {}),
    "upside down": lambda x, a, b: (torch.flipud, (x,), {}),
    "tensordot": lambda x, a, b: (torch.tensordot, (x, torch.eye(x.shape[a % x.dim()]), ([a % x.dim()], [b % 2])), {}),
    "tensordot of last": lambda x, a, b: (torch.tensordot, (torch.arange(2.0 * len(x)).view(2, -1), x), {"dims": 1}),
    "einsum with an ellipsis": lambda x, a, b: (torch.einsum, _ellipsis(x, a, b), {}),
    "first axes": lambda x, a, b: (T.view, (x.contiguous(), -1, x.shape[-1]), {}),
}


@settings(max_examples=400, deadline=None)
@given(chains())
def test_where_the_batch_axis_is_said_to_be_it_is(chain):
    samples, steps = chain
    base = torch.rand(samples, 2, 3, 4) + 1
    changed = [base + 100 * F.one_hot(torch.tensor(i), samples).view(-1, 1, 1, 1) for i in range(samples)]
    axis: int | None = 0
    for name, a, b in steps:
        if not 0 < base.numel() < 5000 or not base.dim():
            return
        results = []
        for x in (base, *changed):
            func, args, kwargs = STEPS[name](x, a, b)
            output = func(*args, **kwargs)
            results.append(output if isinstance(output, Tensor) else output[0])
            if x is base:
                axis = batch_axis_after({id(x): axis}, samples, func, args, kwargs, results[0])
        base, *changed = results
        if axis is None:
            return
        assert base.shape[axis] % samples == 0
        image = torch.arange(samples).repeat_interleave(base.shape[axis] // samples)
        for i, x in enumerate(changed):
            assert torch.equal(x.movedim(axis, 0)[image != i], base.movedim(axis, 0)[image != i])


@pytest.mark.parametrize("index", [np.array([0, 1]), range(2), ((0, 1),), [0, 1], (np.array([0, 1]), 0)], ids=str)
def test_where_the_batch_axis_is_behind_a_sequence_as_an_index_is_not_guessed(index):
    x = torch.rand(4, 2, 2, 2)
    assert batch_axis_after({id(x): 1}, 2, T.__getitem__, (x, index), {}, x[index]) is None


def test_attention_of_queries_and_keys_that_are_weights_is_explained():
    images, targets, epsilon = tokens()
    query, key = torch.rand(3, 2, 5).double(), torch.rand(3, 4, 5).double()
    maps = explain(lambda x: F.scaled_dot_product_attention(query, key, x).sum(1), images, targets, epsilon)[1]
    attention = F.softmax(query @ key.mT / 5**0.5, -1).sum(1)
    torch.testing.assert_close(maps, images * attention[..., None] * F.one_hot(targets, 5)[:, None])


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (T.__getitem__, lambda x: (x, (slice(None), 0))),
        (T.__getitem__, lambda x: (x, (slice(None), np.int64(0)))),
        (T.__getitem__, lambda x: (x, (Ellipsis, slice(0, 2)))),
        (T.__getitem__, lambda x: (x, (slice(None), torch.tensor([0, 1]), slice(1, None)))),
        (T.__getitem__, lambda x: (x, (slice(None), [1, 0]))),
        (T.__getitem__, lambda x: (x, (slice(None), slice(None), [2, 0, 1]))),
        (torch.rot90, lambda x: (x, 1, [2, 3])),
        (torch.diagonal, lambda x: (x, 0, 1, 2)),
        (F.bilinear, lambda x: (x, x, torch.rand(2, 4, 4))),
        (torch.take_along_dim, lambda x: (x, torch.zeros(5, 2, 3, 1).long(), 3)),
        (T.reshape, lambda x: (x, -1, 2, 6)),
        (T.flatten, lambda x: (x, 0, 1)),
        (T.permute, lambda x: (x, 2, 0, 1, 3)),
        (torch.mean, lambda x: (x, [-2, -1])),
        (torch.stack, lambda x: ([x, x], 1)),
        (torch.cat, lambda x: ([x, x], -1)),
        (torch.einsum, lambda x: ("n h i d, n h j d -> n h i j", x, x)),
        (torch.matmul, lambda x: (x, x.mT)),
        (torch.mul, lambda x: (x, torch.rand(1, 3, 4))),
        (T.chunk, lambda x: (x, 2, -1)),
        (T.repeat_interleave, lambda x: (x, 3, 0)),
    ],
)
def test_the_batch_axis_is_followed_where_it_can_be(func, arguments):
    x = torch.rand(5, 2, 3, 4)
    args = arguments(x)
    output = func(*args)
    assert (
        batch_axis_after({id(x): 0}, 5, func, args, {}, output if isinstance(output, Tensor) else output[0]) is not None
    )
