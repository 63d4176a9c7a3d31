"""What the layers' own nodes promise, against PyTorch's double backward and finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_gradients_are_finite_differences
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline import ScaleNorm, Trace, explain
from pipeline.rules.kernels import Convolution, Linear
from trainer import heatmap_loss


def targets(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 3


def teacher_maps(images: Tensor) -> Tensor:
    return torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(1))


def by_the_engine(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return explain(model, images, targets(images), 0.0, create_graph=True)[1]


def by_pytorch(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient×Input, which is what ε = 0 gives on ReLU networks whose norms do not use the batch's statistics."""
    leaf = images.clone().requires_grad_()
    logits = model(leaf).gather(1, targets(images)[:, None]).sum()
    return leaf * torch.autograd.grad(logits, leaf, create_graph=True)[0]


def assert_both_agree(model: nn.Module, images: Tensor) -> None:
    """Heatmaps, and the gradient of a loss on them at every parameter."""
    found, expected = (copy.deepcopy(model) for _ in range(2))
    maps = [maps_of(twin, images) for maps_of, twin in ((by_the_engine, found), (by_pytorch, expected))]
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-12)
    for heatmaps in maps:
        (heatmaps * teacher_maps(images)).sum().backward()
    largest = max(p.grad.abs().max() for p in expected.parameters() if p.grad is not None).clamp_min(1e-9)
    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad / largest for p in (mine, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10, msg=name)


class Ends(nn.Module):
    """A layer for 2 channels, a ReLU, and a linear layer with 3 outputs."""

    def __init__(self, layer: nn.Module, images: Tensor):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.last = nn.Linear(layer.double().eval()(images).flatten(1).shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(x)).flatten(1))


def settled(norm: nn.Module) -> nn.Module:
    """A norm in evaluation mode that does something."""
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.uniform_(*((-0.3, 0.3) if "mean" in name or "bias" in name else (0.5, 2)))
    return norm.eval()


@given(
    side=st.integers(1, 6),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    norm=st.sampled_from([None, nn.BatchNorm2d, ScaleNorm]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_convolution_equals_pytorchs_double_backward(
    side, kernel, stride, padding, dilation, groups, bias, norm, seed
):
    torch.manual_seed(seed)
    if side + 2 * padding < dilation * (kernel - 1) + 1:
        return
    images = torch.randn(2, 2, side, side + 1).double()
    layers: list[nn.Module] = [nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias)]
    layers += [settled(norm(4))] if norm else []
    assert_both_agree(Ends(nn.Sequential(*layers), images).double().eval(), images)


@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.just((1, 1)) | st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.just((1, 1)) | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.integers(1, 2),
    channels=st.integers(1, 5),
    depthwise=st.booleans(),
    channels_last=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_what_replaces_a_kernel_of_convolution_equals_it(
    sides, kernel, stride, padding, dilation, channels, depthwise, channels_last
):
    """For images of few channels, maps of few positions, kernels of one pixel and of one channel."""
    outputs = [
        (side + 2 * p - dilation * (k - 1) - 1) // s + 1
        for side, k, s, p in zip(sides, kernel, stride, padding, strict=True)
    ]
    if min(outputs) < 1:
        return
    made = channels if depthwise else 4
    shapes = ((3, channels, *sides), (made, 1 if depthwise else channels, *kernel), (3, made, *outputs))
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, g = (torch.randn(*shape).double().contiguous(memory_format=memory) for shape in shapes)
    groups = channels if depthwise else 1
    layer = Convolution((list(stride), list(padding), [dilation] * 2, False, [0, 0], groups))
    expected = torch.ops.aten.convolution_backward(g, x, weight, [made], *layer.options, [True, True, False])
    torch.testing.assert_close(layer.output(x, weight), torch.ops.aten.convolution(x, weight, None, *layer.options))
    torch.testing.assert_close(layer.input_grad(g, weight, x), expected[0])
    torch.testing.assert_close(layer.weight_grad(x, g, weight), expected[1])


@pytest.mark.parametrize("channels", [3, 4, 8, 12])
def test_strides_over_large_maps_of_few_channels_do_not_end_the_process(channels):
    """oneDNN writes past the end of its memory for this weight gradient (PyTorch 2.14.1, channels last, one thread)."""
    shapes = ((2, channels, 64, 64), (16, channels, 1, 1), (2, 16, 32, 32))
    x, weight, g = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
    layer = Convolution(([2, 2], [0, 0], [1, 1], False, [0, 0], 1))
    exact = layer.weight_grad(x.double(), g.double(), weight.double()).float()
    torch.testing.assert_close(layer.weight_grad(x, g, weight), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_a_linear_layer_equals_pytorchs_in_every_order_of_its_rows_and_is_no_view(order):
    of = torch.randn(3, 4, 5, dtype=torch.float64).permute(order)
    layer, weight = Linear(), torch.randn(6, of.shape[-1], dtype=torch.float64)
    bias, back = torch.randn(6, dtype=torch.float64), torch.randn(of.shape[-1], 7, dtype=torch.float64).T
    made = layer.output(of, weight, bias)
    torch.testing.assert_close(made, F.linear(of.contiguous(), weight, bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.input_grad(of, back.T, of), of.contiguous() @ back.T, rtol=0, atol=1e-12)
    assert not made._is_view()
    if order[-1] == 2:  # no row was moved
        assert made.stride()[:2] == tuple(6 * stride // 5 for stride in of.stride()[:2])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("side", [2, 6])
def test_a_convolution_of_no_images_has_gradients_of_zero(groups, kernel, side):
    x = torch.zeros(0, 4, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(4, 4 // groups, kernel, kernel)
    layer = Convolution(([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], groups))
    assert layer.output(x, weight).shape == layer.input_grad(x, weight, x).shape == x.shape
    assert torch.equal(layer.weight_grad(x, x, weight), torch.zeros_like(weight))


def test_a_kernel_that_is_larger_than_the_map_is_refused_as_by_pytorch():
    for layer in (nn.Conv2d(2, 4, 2, dilation=2), nn.Conv2d(2, 4, 3)):
        with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
            explain(nn.Sequential(layer, nn.Flatten()), torch.rand(1, 2, 2, 2), torch.tensor([0]), 0.1)


def without(parameter: str, norm: nn.Module) -> nn.Module:
    settled(norm).register_parameter(parameter, None)
    return norm


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (2, 5)),
    "many weights": (lambda: nn.Conv2d(2, 32, 3, padding=1), (2, 2, 2)),
    "many weights and a norm": (lambda: nn.Sequential(nn.Conv2d(2, 32, 3), settled(nn.BatchNorm2d(32))), (2, 3, 3)),
    "linear and norm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 4), settled(nn.BatchNorm1d(4))), (2, 5)),
    "linear on tokens and a norm over these": (  # as many tokens as features
        lambda: nn.Sequential(nn.Linear(5, 4), settled(nn.BatchNorm1d(4))),
        (4, 5),
    ),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1), settled(nn.BatchNorm1d(4))), (2, 7)),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2, 1, 1), settled(nn.BatchNorm3d(4))), (2, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 5, 1, 2, groups=4), (4, 6, 5)),
    "depthwise, uneven": (lambda: nn.Conv2d(4, 4, (3, 5), (2, 1), (0, 3), (1, 2), groups=4), (4, 7, 8)),
    "depthwise, steps past the border": (lambda: nn.Conv2d(4, 4, 5, 3, 2, 2, groups=4), (4, 12, 10)),
    "depthwise and norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 7, 2, 3, groups=4, bias=False), settled(nn.BatchNorm2d(4))),
        (4, 8, 8),
    ),
    "two outputs of each channel": (lambda: nn.Conv2d(4, 8, 5, 1, 2, groups=4), (4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), (2, 4, 4)),
    "transposed and norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, 2), settled(nn.BatchNorm2d(4))),
        (2, 4, 4),
    ),
    "norm first": (lambda: nn.Sequential(settled(nn.BatchNorm2d(2)), nn.Conv2d(2, 4, 3)), (2, 4, 4)),
    "norm with a shift alone": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), without("weight", nn.BatchNorm2d(4))),
        (2, 4, 4),
    ),
    "norm with a scale alone": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), without("bias", nn.BatchNorm2d(4))),
        (2, 4, 4),
    ),
    "norm first, with a shift alone": (
        lambda: nn.Sequential(without("weight", nn.BatchNorm2d(2)), nn.Conv2d(2, 4, 3)),
        (2, 4, 4),
    ),
    "norm first, with a scale alone": (
        lambda: nn.Sequential(without("bias", nn.BatchNorm2d(2)), nn.Conv2d(2, 4, 3)),
        (2, 4, 4),
    ),
    "norm without weights": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), settled(nn.BatchNorm2d(4, affine=False))),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_equals_pytorchs_double_backward(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    images = torch.randn(3, *shape).double()
    model = Ends(make().double(), images.double()).double().eval()
    assert_both_agree(model, images)
    found, expected = (copy.deepcopy(model) for _ in range(2))
    explain(found, images, targets(images), 0.0, create_graph=True)[0].square().sum().backward()
    expected(images).square().sum().backward()
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


class OutputUsedTwice(nn.Module):
    """The convolution's output goes into the norm and past it, as does the norm's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3, padding=1), settled(nn.BatchNorm2d(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        y = self.norm(z)
        return self.last((F.relu(y) + 0.5 * z + 0.3 * y).mean((2, 3)))


class SameLayerTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 2, 3, padding=1), settled(nn.BatchNorm2d(2)), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.norm(self.conv(x)))
        return self.last(x.mean((2, 3)))


class Concatenated(nn.Module):
    """As in DenseNet: each layer sees all before it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.tensor([]), x, F.relu(self.first(x))], dim=-3)
        y = torch.concat((y, F.relu(self.second(y))), axis=1)
        return self.last(y.mean((2, 3)))


class OneByOne(nn.Module):
    """The layers see single images, without a batch axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.back, self.last = nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 5, 3), nn.Linear(125, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(F.relu(self.back(F.relu(self.conv(image)))).flatten()) for image in x])


@pytest.mark.parametrize("model", [OutputUsedTwice, SameLayerTwice, Concatenated, OneByOne])
def test_outputs_and_weights_may_be_used_more_than_once(model):
    torch.manual_seed(0)
    assert_both_agree(model().double().eval(), torch.randn(3, 2, 5, 5).double())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ScaleNorm])
@pytest.mark.parametrize("side", [2, 7])  # more weights than activations, and fewer: other kernels
def test_a_norm_in_training_behind_a_convolution_equals_finite_differences(norm, side):
    torch.manual_seed(0)
    images = torch.rand(3, 2, side, side).double()
    layers = [nn.Conv2d(2, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False), norm(4)]
    model = Ends(nn.Sequential(*layers), images).double().train()
    epsilon = torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64)

    def loss() -> Tensor:
        maps = explain(model, images, targets(images), epsilon, create_graph=True)[1]
        return heatmap_loss(maps, teacher_maps(images)).sum()

    parameters = dict(model.named_parameters())
    assert_gradients_are_finite_differences(loss, parameters, [name for name in parameters if name.endswith("weight")])


def test_gradients_of_many_heatmaps_of_one_trace_add_up():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images).double().train()
    draws = [(torch.tensor([0, 1]), 0.1), (torch.tensor([2, 0]), 0.5)]

    def gradients(*chosen: tuple[Tensor, float]) -> list[Tensor]:
        trace = Trace(model, images)
        maps = [trace.heatmaps(*draw, create_graph=True) for draw in chosen]
        sum((heatmaps * teacher_maps(images)).sum() for heatmaps in maps).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return grads

    for both, first, second in zip(gradients(*draws), gradients(draws[0]), gradients(draws[1]), strict=True):
        torch.testing.assert_close(both, first + second)


def test_a_backward_pass_may_be_repeated_where_the_graph_is_kept():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images).double().train()
    loss = explain(model, images, targets(images), 0.1, create_graph=True)[1].square().sum()
    first = torch.autograd.grad(loss, model.layer.parameters(), retain_graph=True)
    alone = torch.autograd.grad(loss, model.layer[0].weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, model.layer.parameters())
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(alone, first[0])


def test_a_backward_pass_that_stopped_early_leaves_nothing_to_the_next():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images).double().train()
    loss = explain(model, images, targets(images), 0.1, create_graph=True)[1].square().sum()
    torch.autograd.grad(loss, model.last.weight, retain_graph=True)  # passes the convolution on its way

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError

    handle = model.last.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    expected = explain(model, images, targets(images), 0.1, create_graph=True)[1].square().sum()
    parameters = [model.layer[0].weight, model.last.weight]
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ScaleNorm])
def test_a_hook_between_a_layer_and_its_norm_changes_the_gradient_as_in_pytorch(norm):
    torch.manual_seed(0)
    images = torch.rand(2, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), settled(norm(4))), images).double().eval()
    model.layer[0].register_forward_hook(lambda module, given, z: z.register_hook(lambda g: 0.1 * g) and None)
    assert_both_agree(model, images)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ScaleNorm])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_second_derivative_of_the_logits_is_pytorchs(norm, mode):
    torch.manual_seed(0)
    images = torch.rand(3, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), settled(norm(4))), images).double().train(mode == "train")
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]

    def second(logits: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(logits.square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), weights)

    expected = second(model(images))
    torch.testing.assert_close(second(explain(model, images, targets(images), 0.1, create_graph=True)[0]), expected)


def test_a_backward_pass_for_some_parameters_leaves_nothing_to_the_next_one():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 4, 4).double()
    model = Ends(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images).double().train()
    logits, heatmaps = explain(model, images, targets(images), 0.1, create_graph=True)
    weight = model.layer[0].weight
    (expected,) = torch.autograd.grad(logits.square().sum(), weight, retain_graph=True)
    torch.autograd.grad(heatmaps.square().sum(), model.last.weight, retain_graph=True)  # weighs losses, say
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), weight)[0], expected)


def most_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes of tensors that a step holds at once, beside those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_a_step_on_small_layers_holds_three_times_what_a_supervised_step_does():
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model, images = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 3)), torch.rand(500, 1, 8, 8)
    supervised = most_bytes(lambda: model(images).sum().backward())
    assert most_bytes(lambda: by_the_engine(model, images).square().sum().backward()) < 3 * supervised


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("epsilon", [(0.0, 0.1), (0.1, 0.0)])
def test_a_mixed_batch_with_an_epsilon_of_zero_is_finite_where_gradients_are_large(epsilon):
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1], [-1, 1], [1, 1], [0, 0]]))
        model[2].weight.fill_(1e4)
    images = torch.tensor([[1.0, 1.0], [2.0, 0.5]])
    _, heatmaps = explain(model, images, torch.tensor([0, 1]), torch.tensor(epsilon), create_graph=True)
    with torch.autograd.detect_anomaly():  # raises where any gradient is NaN on its way
        heatmaps.square().sum().backward()
    assert torch.isfinite(heatmaps).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("change", ["running_mean", "running_var", "weight", "bias"])
def test_a_norm_for_another_number_of_channels_is_refused(change):
    norm = nn.BatchNorm2d(4)
    setattr(norm, change, nn.Parameter(torch.ones(3)) if change in ("weight", "bias") else torch.ones(3))
    images = torch.rand(2, 2, 4, 4)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(RuntimeError, match=f"{change} should contain 4 elements"):
        explain(model, images, targets(images), 0.1)
