"""A ReLU has the map of `F.relu` by whatever name it is called, or it is refused by name; so with its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import RelevanceError, explain, stop_relevance

Activation = Callable[[Tensor], Tensor]


def in_place(change: Callable[[Tensor], Any]) -> Activation:
    def activation(z: Tensor) -> Tensor:
        z = z * 1
        change(z)
        return z

    return activation


def assigned(z: Tensor) -> None:
    z[z < 0] = 0


def assigned_halves(z: Tensor) -> None:
    z[:, :3] = F.relu(z[:, :3])
    z[:, 3:] = z[:, 3:] * (z[:, 3:] > 0)


def part_by_module(z: Tensor) -> None:
    z[:, :1] = F.relu(z[:, :1])
    nn.ReLU(inplace=True)(z[:, 1:])


def times_mask(z: Tensor) -> None:
    z *= z > 0


def without_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        mask = (z > 0).to(z)
    return z * mask


def collected(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    mask = z > 0
    out[mask] = z[mask]
    return out


def written_mask(z: Tensor) -> Tensor:
    mask = torch.zeros_like(z)
    mask[z.detach() > 0] = 1
    return z * mask


def through_views(z: Tensor) -> Tensor:
    mask = (z.flatten(1) > 0).view(z.shape)
    return (z.flatten(1) * mask.flatten(1)).view(z.shape)


def halves(z: Tensor) -> Tensor:
    first, second = (part * (part > 0) for part in z.chunk(2, 1))
    return torch.cat([first, second], 1)


SPELLINGS: dict[str, Activation] = {
    "clamp": lambda z: z.clamp(min=0),
    "clamp_min": lambda z: torch.clamp_min(z, 0.0),
    "clamp by a tensor": lambda z: z.clamp(min=torch.zeros(1)),
    "clip": lambda z: torch.clip(z, 0),
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "maximum of zero": lambda z: torch.maximum(torch.tensor(0.0, dtype=z.dtype), z),
    "maximum of more zeros": lambda z: torch.maximum(z, z.new_zeros(1, 1, *z.shape))[0, 0],
    "max": lambda z: torch.max(z, torch.zeros_like(z)),
    "max by name": lambda z: z.max(other=z.new_zeros(())),
    "fmax": lambda z: torch.fmax(z, torch.zeros(())),
    "maximum of its multiple": lambda z: torch.maximum(z, 0 * z),
    "minimum": lambda z: -torch.minimum(-z, torch.zeros_like(z)),
    "min": lambda z: -(-z).min(torch.zeros(())),
    "fmin": lambda z: z - torch.fmin(z, torch.zeros(())),
    "difference of minimum": lambda z: z - torch.minimum(z, torch.zeros_like(z)),
    "difference of clamp": lambda z: z - z.clamp(max=0),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "where of zeros": lambda z: torch.where(z >= 0, z, torch.zeros_like(z)),
    "where below": lambda z: torch.where(z < 0, 0 * z, z),
    "where as a method": lambda z: z.where(z > 0, 0.0),
    "masked fill": lambda z: z.masked_fill(z < 0, 0),
    "masked fill of not": lambda z: z.masked_fill(~(z > 0), 0.0),
    "masked fill in place": in_place(lambda z: z.masked_fill_(z <= 0, 0)),
    "times a boolean mask": lambda z: z * (z > 0),
    "a boolean mask times": lambda z: (z > 0) * z,
    "times a float mask": lambda z: z * (z > 0).float(),
    "times a mask of its type": lambda z: torch.mul(z, (z > 0).type_as(z)),
    "times an integer mask": lambda z: z * z.gt(0).long(),
    "times a mask without gradient": without_gradient,
    "times a detached mask": lambda z: z * (z.detach() > 0),
    "times a mask of data": lambda z: z * (z.data > 0).to(z.dtype),
    "times one less the mask": lambda z: z * (1 - (z < 0).to(z.dtype)),
    "times two masks": lambda z: z * ((z > -1) & (z > 0)),
    "times in place": in_place(lambda z: z.mul_(z > 0)),
    "augmented assignment": in_place(times_mask),
    "over a mask": lambda z: z / torch.where(z > 0, 1.0, float("inf")),
    "mask written": written_mask,
    "mask of views": through_views,
    "mask of halves": halves,
    "halves of a mask": lambda z: torch.cat(
        [a * b for a, b in zip(z.split(2, 1), (z > 0).split(2, 1), strict=True)], 1
    ),
    "channels of a mask": lambda z: torch.stack(
        [a * b for a, b in zip(z.unbind(1), (z > 0).unbind(1), strict=True)], 1
    ),
    "expanded mask": lambda z: z * (z > 0).expand_as(z),
    "halfway to the absolute value": lambda z: torch.lerp(z, z.abs(), 0.5),
    "mask of a clone": lambda z: z * (z.clone() > 0),
    "threshold": lambda z: F.threshold(z, 0.0, 0.0),
    "threshold in place": in_place(lambda z: F.threshold(z, 0, 0, inplace=True)),
    "threshold module": nn.Threshold(0, 0),
    "absolute value": lambda z: (z + z.abs()) / 2,
    "absolute value first": lambda z: 0.5 * (abs(z) + z),
    "halves of the absolute value": lambda z: 0.5 * z + 0.5 * z.abs(),
    "less the negative part": lambda z: z - (z - z.abs()) / 2,
    "sign": lambda z: z * (torch.sign(z) + 1) / 2,
    "sign, summed": lambda z: (z + z * z.sign()) / 2,
    "sign of the ReLU": lambda z: z * torch.sign(F.relu(z)),
    "heaviside": lambda z: z * torch.heaviside(z, z.new_zeros(())),
    "ceiling": lambda z: z * torch.ceil(z).clamp(0, 1),
    "rounded sigmoid": lambda z: z * torch.sigmoid(z).round(),
    "sign of a quotient": lambda z: z * (z / z.abs() + 1) / 2,
    "assigned": in_place(assigned),
    "assigned in halves": in_place(assigned_halves),
    "collected": collected,
    "amax": lambda z: torch.stack([z, torch.zeros_like(z)]).amax(0),
    "max of a stack": lambda z: torch.stack([torch.zeros_like(z), z], -1).max(-1).values,
    "max of a concatenation": lambda z: torch.cat([z[:, :, None], z.new_zeros(*z.shape[:2], 1, *z.shape[2:])], 2).amax(
        2
    ),
    "amin": lambda z: -torch.stack([-z, torch.zeros_like(z)], 1).amin(1),
    "amax of more": lambda z: torch.stack([z, torch.zeros_like(z), 0.5 * z], -1).amax(-1),
    "relu_": in_place(lambda z: z.relu_()),
    "relu_ of a view": in_place(lambda z: z.view(len(z), -1).relu_()),
    "module in place on a slice": in_place(part_by_module),
    "clamp_ of a view": in_place(lambda z: z.flatten(1).clamp_(min=0)),
    "leaky ReLU of slope 0": lambda z: F.leaky_relu(z, 0.0),
    "hardtanh": lambda z: F.hardtanh(z, 0.0, 1e6),
    "prelu of weight 0": lambda z: F.prelu(z, z.new_zeros(1)),
    "rrelu of slope 0": lambda z: F.rrelu(z, 0.0, 0.0, training=True),
    "softshrink of 0": lambda z: (z + F.softshrink(z, 0.0).abs()) / 2,
}


class Net(nn.Module):
    def __init__(self, activation: Activation, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.conv2, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        self.activation = activation
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.conv1(x))
        return self.head(self.activation(self.conv2(x)).mean((2, 3)))


def map_and_gradients(
    activation: Activation, seed: int, epsilon: Any, rules: str = "flex"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The logits, the map, and the gradient at the weights of a loss on both."""
    model = Net(activation, seed)
    torch.manual_seed(seed + 1)
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    direction = torch.randn_like(images)
    logits, maps = explain(model, images, torch.tensor([0, 2, 1]), epsilon, create_graph=True, rules=rules)
    (maps * direction).sum().square().add(logits.square().sum()).backward()
    return logits.detach(), maps.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(SPELLINGS)),
    st.integers(0, 1000),
    st.lists(st.sampled_from([0.0, 1e-3, 0.1, 2.0]), min_size=3, max_size=3),
)
def test_any_spelling_of_a_relu_has_the_map_and_the_second_order_of_f_relu(name, seed, epsilon):
    values = torch.tensor(epsilon, dtype=torch.float64)
    torch.testing.assert_close(
        map_and_gradients(SPELLINGS[name], seed, values), map_and_gradients(F.relu, seed, values)
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_relu_has_the_map_and_the_second_order_of_f_relu(name):
    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(map_and_gradients(SPELLINGS[name], 0, epsilon), map_and_gradients(F.relu, 0, epsilon))


@pytest.mark.parametrize("rules", ["cp-lrp", "gradient-x-input", "epsilon-plus", "gamma"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_relu_has_the_map_of_f_relu_under_every_rule_set(name, rules):
    if (name, rules) == ("heaviside", "gradient-x-input"):
        pytest.skip("PyTorch has no derivative of it")
    found, expected = (map_and_gradients(a, 0, 0.1, rules) for a in (SPELLINGS[name], F.relu))
    torch.testing.assert_close(found, expected)


# --- relatives of a ReLU ---

RELATIVES: dict[str, tuple[Activation, Activation]] = {
    "ReLU6 of bounds": (lambda z: z.clamp(min=0).clamp(max=0.5), lambda z: F.hardtanh(z, 0.0, 0.5)),
    "ReLU6 of a ReLU": (lambda z: torch.clamp_max(F.relu(z), 0.5), lambda z: z.clamp(0, 0.5)),
    "ReLU6 of extremes": (
        lambda z: torch.min(torch.max(z, torch.tensor(0.0)), torch.tensor(0.5)),
        lambda z: F.hardtanh(z, 0.0, 0.5),
    ),
    "a bound of a tensor": (lambda z: torch.maximum(z, z.new_full((), -0.2)), lambda z: z.clamp(min=-0.2)),
    "leaky ReLU by maximum": (lambda z: torch.maximum(z, 0.1 * z), lambda z: F.leaky_relu(z, 0.1)),
    "leaky ReLU by where": (lambda z: torch.where(z > 0, z, 0.1 * z), lambda z: F.leaky_relu(z, 0.1)),
    "leaky ReLU by a mask": (lambda z: z * (0.1 + 0.9 * (z > 0)), lambda z: F.leaky_relu(z, 0.1)),
    "leaky ReLU by assignment": (in_place(lambda z: leak(z)), lambda z: F.leaky_relu(z, 0.1)),
    "leaky ReLU of two": (lambda z: F.relu(z) - 0.1 * F.relu(-z), lambda z: F.leaky_relu(z, 0.1)),
    "rrelu in evaluation": (lambda z: F.rrelu(z, 0.1, 0.3), lambda z: F.leaky_relu(z, 0.2)),
    "rrelu of one slope": (lambda z: F.rrelu(z, 0.2, 0.2, training=True), lambda z: F.leaky_relu(z, 0.2)),
    "rrelu in place": (in_place(lambda z: F.rrelu(z, 0.1, 0.3, inplace=True)), lambda z: F.leaky_relu(z, 0.2)),
    "absolute value by sign": (lambda z: z * z.sign(), torch.abs),
    "absolute value by maximum": (lambda z: torch.maximum(z, -z), torch.abs),
    "absolute value by where": (lambda z: torch.where(z < 0, -z, z), torch.abs),
    "negative part": (lambda z: torch.minimum(z, z.new_zeros(())), lambda z: -F.relu(-z)),
    "negative part of a difference": (lambda z: z - F.relu(z), lambda z: -F.relu(-z)),
    "hardshrink": (lambda z: z * (z.abs() > 0.3), lambda z: F.hardshrink(z, 0.3)),
    "softshrink": (lambda z: torch.where(z.abs() > 0.1, z - 0.1 * z.sign(), 0.0), lambda z: F.softshrink(z, 0.1)),
    "threshold": (lambda z: torch.where(z > 0.1, z, -0.2), lambda z: F.threshold(z, 0.1, -0.2)),
    "softsign": (lambda z: torch.where(z > 0, F.softsign(z), F.softsign(z)), F.softsign),
    "alpha dropout in evaluation": (lambda z: F.relu(F.alpha_dropout(z, 0.5, False)), F.relu),
    "feature alpha dropout in evaluation": (lambda z: F.relu(F.feature_alpha_dropout(z, 0.5)), F.relu),
}


def leak(z: Tensor) -> None:
    z[z < 0] *= 0.1


@pytest.mark.parametrize("name", RELATIVES)
def test_the_same_activation_has_the_same_map_and_second_order_in_other_words(name):
    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    found, expected = (map_and_gradients(activation, 3, epsilon) for activation in RELATIVES[name])
    torch.testing.assert_close(found, expected)


def test_a_relu_whose_gradient_is_passed_straight_through_has_the_map_of_f_relu():
    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    found, expected = (map_and_gradients(a, 0, epsilon)[1] for a in (lambda z: z + (F.relu(z) - z).detach(), F.relu))
    torch.testing.assert_close(found, expected)


def test_a_prelu_by_where_has_the_gradient_of_a_prelu_at_its_slope():
    gradients = []
    for activation in (lambda z, w: torch.where(z >= 0, z, w * z), lambda z, w: F.prelu(z, w.flatten())):
        slope = torch.full((1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
        model = Net(lambda z, activation=activation, slope=slope: activation(z, slope))
        images = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        maps = explain(model, images, torch.tensor([0, 2]), torch.tensor([0.1, 0.4]).double(), create_graph=True)[1]
        gradients.append((maps.detach(), *torch.autograd.grad(maps.square().sum(), [slope, model.conv1.weight])))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_residual_connection_around_a_relu_is_a_sum_of_both():
    pairs = [(lambda z: z + F.relu(z), lambda z: z + torch.where(z > 0, z, 0.0))]
    pairs += [(lambda z: 2 * z - F.relu(z), lambda z: 2 * z - torch.maximum(z, torch.zeros(())))]
    for plain, other in pairs:
        torch.testing.assert_close(map_and_gradients(plain, 0, 0.1), map_and_gradients(other, 0, 0.1))


# --- refused by name ---


REFUSED: dict[str, tuple[Activation, str]] = {
    "mask of another activation": (lambda z: z * (z.roll(1, 1) > 0), r"Tensor\.mul with a step function of the image"),
    "mask of a mean": (lambda z: z * (z > z.mean()), r"Tensor\.mul with a step function"),
    "gate of a mean": (lambda z: torch.where(z.mean(1, keepdim=True) > 0, z, 0.0), r"torch\.where with a step"),
    "fill by another": (lambda z: z.masked_fill(z.flip(1) < 0, 0), r"masked_fill with a step"),
    "selection by a mask": (
        lambda z: z.flatten(1)[:, (z > 0).flatten(1).any(0)].mean(1).expand(4, 4, -1).mT,
        r"getitem",
    ),
    "indices of a mask": (lambda z: z * 0 + z[(z > 0).nonzero(as_tuple=True)].mean(), r"getitem__ with a step"),
    "gather by a mask": (lambda z: torch.stack([0 * z, z], 1).gather(1, (z > 0).long()[:, None])[:, 0], r"gather with"),
    "one of two": (lambda z: z * F.one_hot(z.argmax(1), z.shape[1]).movedim(-1, 1), r"Tensor\.mul with a step"),
    "einsum with a mask": (lambda z: torch.einsum("nchw,nchw->nchw", z, (z > 0).to(z)), r"einsum with a step function"),
    "step of another, added": (lambda z: z + (z.mean(1, keepdim=True) > 0), r"Tensor\.add with a step function"),
    "codes of a book": (lambda z: z + (torch.eye(6)[z.argmax(1)].movedim(-1, 1) - z).detach(), r"sub with a step"),
    "rounding before a layer": (
        lambda z: z + F.conv2d(z.round(), torch.ones(6, 6, 1, 1).to(z)),
        r"with a step function",
    ),
    "whole part": (lambda z: z * torch.frac(z), r"no relevance rule for torch\.frac"),
    "masked scatter": (lambda z: z.masked_scatter(z < 0, torch.zeros_like(z)), r"masked_scatter"),
    "index_put": (
        lambda z: z.index_put(((z < 0).nonzero(as_tuple=True)), torch.zeros((), dtype=z.dtype)),
        r"index_put",
    ),
    "copysign": (lambda z: (z + torch.copysign(z, torch.ones(()))) / 2, r"no relevance rule for torch\.copysign"),
    "hypot": (lambda z: (z + torch.hypot(z, 0 * z)) / 2, r"no relevance rule for torch\.hypot"),
    "topk with zeros": (
        lambda z: torch.stack([z, 0 * z.detach()], -1).topk(1, -1).values[..., 0],
        r"topk over constants and activations",
    ),
    "max_pool with zeros": (
        lambda z: F.max_pool1d(torch.stack([z, torch.zeros_like(z)], -1).flatten(0, 3)[:, None], 2)[:, 0].view(z.shape),
        r"max_pool1d over constants and activations",
    ),
    "custom function": (lambda z: OwnReLU.apply(z), "which hides from the tracer"),
}


class OwnReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


def hidden(change: Callable[[Tensor], Any]) -> Activation:
    def activation(z: Tensor) -> Tensor:
        z = z * 1
        with torch.no_grad():
            change(z)
        return z

    return activation


def with_data(z: Tensor) -> None:
    z.data = F.relu(z.data)


REFUSED |= {
    "clamp_ without gradients": (
        hidden(lambda z: z.clamp_(min=0)),
        r"clamp_ that changes an activation where autograd",
    ),
    "relu_ of detached values": (
        in_place(lambda z: z.detach().relu_()),
        r"relu_ that changes an activation through its",
    ),
    "assignment to data": (in_place(lambda z: z.data.__setitem__(z < 0, 0)), r"setitem__ that changes an activation"),
    "other data": (in_place(with_data), r"that changes an activation where autograd does not see it"),
    "sign_": (in_place(lambda z: z.sign_()), r"no relevance rule for torch\.Tensor\.sign_"),
    "mask of the other half": (
        lambda z: torch.cat([z.chunk(2, 1)[1] * (z > 0).chunk(2, 1)[0], F.relu(z[:, :3])], 1),
        r"Tensor\.mul with a step function",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_function_that_no_rule_takes_is_refused_by_name_with_the_remedy(name):
    activation, text = REFUSED[name]
    model = Net(activation)
    model.activation = lambda z: activation(z) if z.shape[1] == 6 else F.relu(z)
    with pytest.raises(RelevanceError, match=text) as error:
        explain(model, torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1]), 0.1)
    assert "F.relu" in str(error.value) or "rule_for" in str(error.value) or "torch.maximum" in str(error.value)


def test_logits_of_signs_alone_are_refused_as_step_functions():
    model = Net(torch.sign)
    with pytest.raises(RelevanceError, match="through step functions alone"):
        explain(model, torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1]), 0.1)


def test_a_step_function_is_a_constant_where_relevance_is_stopped():
    images, targets = torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1])

    def gated(mask_of: Callable[[Tensor], Tensor]) -> nn.Module:
        return Net(lambda z: F.relu(z) * stop_relevance(mask_of(z)) if z.shape[1] == 6 else F.relu(z))

    model = gated(lambda z: z.mean((2, 3), keepdim=True) > 0)
    with torch.no_grad():
        mask = model.conv1(images).mean((2, 3), keepdim=True) > 0
    expected = explain(gated(lambda z: mask), images, targets, 0.1)[1]
    assert torch.equal(explain(model, images, targets, 0.1)[1], expected)


def test_masks_that_do_not_depend_on_the_image_are_constants_as_ever():
    images, targets = torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1])
    mask = torch.rand(6, 6) > 0.5

    def masked(z: Tensor) -> Tensor:
        rows = torch.arange(z.shape[2], device=z.device)
        z = torch.where((rows > 2)[:, None] & mask[: z.shape[2], : z.shape[3]], z, z.new_zeros(()))
        noise = torch.zeros_like(z).uniform_(0.5, 1) > 0.1  # a dropout in which all stays
        return F.relu(z.masked_fill(rows == 0, 0.0)) * noise * (torch.ones_like(z) > 0) * (z.new_ones(1) >= 1)

    def multiplied(z: Tensor) -> Tensor:
        rows = torch.arange(z.shape[2])
        kept = ((rows > 2)[:, None] & mask[: z.shape[2], : z.shape[3]]).to(z)
        return F.relu(z * kept * (rows != 0))

    found, expected = (explain(Net(a), images, targets, 0.1)[1] for a in (masked, multiplied))
    torch.testing.assert_close(found, expected)


# --- views ---

IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], Activation]] = {
    "times": (lambda z: z[:, :2].mul_(2), lambda z: torch.cat([2 * z[:, :2], z[:, 2:]], 1)),
    "augmented": (lambda z: double(z), lambda z: torch.cat([2 * z[:, :2], z[:, 2:]], 1)),
    "added": (lambda z: z[:, 1].add_(z[:, 0]), lambda z: torch.cat([z[:, :1], z[:, :1] + z[:, 1:2], z[:, 2:]], 1)),
    "relu_": (lambda z: z[:, :2].relu_(), lambda z: torch.cat([F.relu(z[:, :2]), z[:, 2:]], 1)),
    "F.relu": (lambda z: F.relu(z[:, 1:], inplace=True), lambda z: torch.cat([z[:, :1], F.relu(z[:, 1:])], 1)),
    "relu_ of a view of a view": (
        lambda z: z.flatten(1)[:, :10].relu_(),
        lambda z: torch.cat([F.relu(z.flatten(1)[:, :10]), z.flatten(1)[:, 10:]], 1).view(z.shape),
    ),
    "silu": (
        lambda z: F.silu(z.transpose(0, 1)[0], inplace=True),
        lambda z: torch.cat([F.silu(z[:, :1]), z[:, 1:]], 1),
    ),
    "gate": (
        lambda z: z[:, 2:].mul_(torch.sigmoid(z[:, :2].mean(1, keepdim=True))),
        lambda z: torch.cat([z[:, :2], z[:, 2:] * torch.sigmoid(z[:, :2].mean(1, keepdim=True))], 1),
    ),
    "mask": (lambda z: z[:, 2:].mul_(z[:, 2:] > 0), lambda z: torch.cat([z[:, :2], F.relu(z[:, 2:])], 1)),
    "masked_fill_": (
        lambda z: z[:, 2:].masked_fill_(z[:, 2:] < 0, 0),
        lambda z: torch.cat([z[:, :2], F.relu(z[:, 2:])], 1),
    ),
    "assigned to a view": (
        lambda z: z[:, 2:].__setitem__((slice(None), 0), F.relu(z[:, 0])),
        lambda z: torch.cat([z[:, :2], F.relu(z[:, :1]), z[:, 3:]], 1),
    ),
}


def double(z: Tensor) -> None:
    z[:, :2] *= 2


@pytest.mark.parametrize("rules", ["flex", "gamma"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operation_in_place_on_a_view_is_seen_by_its_base_and_by_other_views(name, rules):
    change, written_out = IN_PLACE[name]

    def changed(z: Tensor) -> Tensor:
        z = z * 1
        other = z[:, 1:3].transpose(2, 3)  # made before, and used behind
        change(z)
        return F.relu(torch.cat([z, other.transpose(2, 3)], 1)[:, : z.shape[1]] + z[:, :1] * 0.5)

    def expected(z: Tensor) -> Tensor:
        z = written_out(z)
        return F.relu(torch.cat([z, z[:, 1:3]], 1)[:, : z.shape[1]] + z[:, :1] * 0.5)

    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    found, wanted = (map_and_gradients(activation, 1, epsilon, rules) for activation in (changed, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["relu_", "gate", "mask", "silu"])
def test_second_order_of_an_operation_in_place_on_a_view_equals_finite_differences(name):
    torch.manual_seed(0)
    model = Net(in_place(IN_PLACE[name][0]), seed=4)
    images, targets = torch.randn(2, 2, 4, 4).double(), torch.tensor([0, 2])
    epsilon = torch.tensor([0.1, 0.5], dtype=torch.float64)

    def loss() -> Tensor:
        return explain(model, images, targets, epsilon, create_graph=True)[1].square().sum()

    weights = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    oracles.assert_gradients_are_finite_differences(loss, dict(model.named_parameters()), moving=weights)


WRITTEN: dict[str, Activation] = {
    "index_copy": lambda z: torch.zeros_like(z).index_copy(1, torch.arange(z.shape[1]), z),
    "index_add": lambda z: torch.index_add(torch.zeros_like(z), 1, torch.arange(z.shape[1]), z),
    "index_add_": lambda z: torch.zeros_like(z).index_add_(1, torch.arange(z.shape[1]), z),
    "scatter": lambda z: torch.zeros_like(z).scatter(1, indices(z), z),
    "scatter_": lambda z: torch.zeros_like(z).scatter_(1, indices(z), z),
    "scatter_add": lambda z: (0.5 * z).scatter_add(1, indices(z), 0.5 * z),
    "index_fill": lambda z: F.pad(z, (1, 0)).index_fill(3, torch.tensor([0]), 0.0)[..., 1:],
    "sorted back": lambda z: sorted_back(z),
}


def indices(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1]).view(1, -1, 1, 1).expand_as(z)


def sorted_back(z: Tensor) -> Tensor:
    values, order = z.sort(1)
    return torch.zeros_like(z).scatter(1, order, values)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_at_indices_keeps_its_relevance_and_the_batch(name):
    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    found = map_and_gradients(lambda z: F.relu(WRITTEN[name](z)), 0, epsilon)
    torch.testing.assert_close(found, map_and_gradients(F.relu, 0, epsilon))


def test_what_is_written_into_slices_of_a_canvas_keeps_the_batch():
    def shifted(z: Tensor) -> Tensor:
        canvas = torch.zeros(z.shape, dtype=z.dtype)
        canvas[:, ::2, :, 1:] = z[:, ::2, :, :-1]
        canvas[:, 1::2, 1:] = z[:, 1::2, :-1]
        return F.relu(canvas)

    def padded(z: Tensor) -> Tensor:
        parts = F.pad(z, (1, 0))[..., :-1], F.pad(z, (0, 0, 1, 0))[:, :, :-1]
        even = (torch.arange(z.shape[1]) % 2 == 0)[:, None, None]
        return F.relu(torch.where(even, *parts))

    epsilon = torch.tensor([0.05, 0.5, 0.1], dtype=torch.float64)
    found, wanted = (map_and_gradients(activation, 1, epsilon) for activation in (shifted, padded))
    torch.testing.assert_close(found, wanted)


def test_no_constant_that_a_pass_followed_stays_in_memory():
    import gc
    import weakref

    seen = []

    def masked(z: Tensor) -> Tensor:
        mask = z > 0
        seen.extend([weakref.ref(mask), weakref.ref(z)])
        return (z + z.abs()) / 2 + z * mask

    model, images = Net(masked), torch.randn(3, 2, 6, 6).double()
    gc.collect()
    gc.disable()
    try:
        logits, maps = explain(model, images, torch.tensor([0, 1, 2]), 0.1, create_graph=True)
        maps.sum().backward()
        seen += [weakref.ref(logits), weakref.ref(maps)]
        del logits, maps
        assert [ref() for ref in seen] == [None] * len(seen)
    finally:
        gc.enable()


def test_statistics_of_activations_may_be_kept_in_buffers():
    mean = torch.zeros(6, dtype=torch.float64)

    def centred(z: Tensor) -> Tensor:
        if z.shape[1] != 6:
            return F.relu(z)
        with torch.no_grad():
            mean.mul_(0.9).add_(z.detach().mean((0, 2, 3)), alpha=0.1)
            mean.clamp_(-1, 1)
        z.detach().requires_grad_()
        return F.relu(z - mean.view(1, -1, 1, 1))

    images, targets = torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 2, 1])
    found = explain(Net(centred), images, targets, 0.1)[1]
    kept = mean.clone()
    expected = explain(
        Net(lambda z: F.relu(z - kept.view(1, -1, 1, 1)) if z.shape[1] == 6 else F.relu(z)), images, targets, 0.1
    )[1]
    assert kept.any()
    torch.testing.assert_close(found, expected)
