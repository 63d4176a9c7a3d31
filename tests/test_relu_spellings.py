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

from pipeline import RULE_SETS, RelevanceError, explain, stop_relevance

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
    "where below": lambda z: torch.where(0 > z, 0 * z, z),
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
    "assigned": in_place(assigned),
    "assigned in halves": in_place(assigned_halves),
    "collected": collected,
    "amax": lambda z: torch.stack([z, torch.zeros_like(z)]).amax(0),
    "max of a stack": lambda z: torch.stack([torch.zeros_like(z), z], -1).max(-1).values,
    "max of a concatenation": lambda z: torch.cat([z[:, :, None], z.new_zeros(*z.shape[:2], 1, *z.shape[2:])], 2).amax(2),
    "amin": lambda z: -torch.stack([-z, torch.zeros_like(z)], 1).amin(1),
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
    torch.testing.assert_close(map_and_gradients(SPELLINGS[name], seed, values), map_and_gradients(F.relu, seed, values))


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
