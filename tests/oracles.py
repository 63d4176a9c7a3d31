"""Slow, obvious versions of what the code does cleverly, written from the formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The matrix (out, in) and the additive term (out,) of an affine layer, one basis vector at a time."""
    size = int(torch.tensor(shape).prod())
    with torch.no_grad():
        shift = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        columns = [layer(row.view(1, *shape)).flatten() - shift for row in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns, dim=1), shift


def lrp_epsilon(layers: list[nn.Module], image: Tensor, target: int, epsilon: float) -> Tensor:
    """LRP-ε of one image (C, H, W) through affine layers with a ReLU after each but the last, from the definition.

    R_i = Σ_j  x_i w_ij / (z_j + ε) · R_j  with z_j = Σ_i x_i w_ij + b_j, over the z_j > 0; at the last layer, from
    the target logit itself, without ε.
    """
    inputs, zs, weights, shape = [], [], [], tuple(image.shape)
    x = image.flatten()
    for number, layer in enumerate(layers):
        weight, shift = dense(layer, shape)
        with torch.no_grad():
            shape = tuple(layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        z = weight @ x + shift
        inputs.append(x)
        zs.append(z)
        weights.append(weight)
        x = z if number == len(layers) - 1 else z.clamp_min(0)
    relevance = torch.zeros_like(zs[-1])
    relevance[target] = zs[-1][target]
    for number in reversed(range(len(layers))):
        last = number == len(layers) - 1
        x, z, weight = inputs[number], zs[number], weights[number]
        below = torch.zeros_like(x)
        for j in range(len(z)):
            if last and j == target:
                below += x * weight[j] / z[j] * relevance[j]
            elif not last and z[j] > 0:
                below += x * weight[j] / (z[j] + epsilon) * relevance[j]
        relevance = below
    return relevance.view_as(image)


def assert_gradients_are_finite_differences(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], moving: Iterable[str], step: float = 1e-6
) -> None:
    """The gradient that ``loss().backward()`` leaves, entry by entry; that of the ``moving`` must not be 0."""
    moving = set(moving)
    loss().backward()
    for name, parameter in parameters.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter)
        for index in range(parameter.numel()):
            flat = parameter.data.view(-1)
            value = flat[index].item()
            flat[index] = value + step
            above = loss().item()
            flat[index] = value - step
            below = loss().item()
            flat[index] = value
            expected.view(-1)[index] = (above - below) / (2 * step)
        if name in moving:
            assert expected.abs().max() > 1e-4, f"{name}: a gradient of 0 shows nothing"
        error = (found - expected).abs().max() / max(expected.abs().max(), 1e-3)
        assert error < 1e-5, (name, float(error))


def folded(model: nn.Module) -> nn.Module:
    """A copy of a VGG with its batch norms folded into the convolutions."""
    model, layers = copy.deepcopy(model), []
    for module in model.features:
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    model.features = nn.Sequential(*layers)
    return model


def heatmap_loss(
    student: Tensor, teacher: Tensor, kind: str = "l1", resolution: int = 1, pyramid: bool = True
) -> float:
    """The loss of one pair of maps (C, H, W), by loops over values and windows."""
    levels, side = [], 1
    while side == 1 or (pyramid and min(teacher.shape[1:]) // side >= 8):
        s, t = _pooled(student, resolution * side), _pooled(teacher, side)
        levels.append(_distance(s, t, kind) if any(t) else 0.0)
        side *= 2
    return sum(levels) / len(levels)


def _distance(s: list[float], t: list[float], kind: str) -> float:
    """The distance of two lists of values, neither of them all zeros."""
    if kind == "cosine":
        product = sum(a * b for a, b in zip(s, t, strict=True))
        return 1 - product / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t))
    if kind == "kl":
        q, p = _distribution(s), _distribution(t)
        return sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    g = (sum(abs(v) for v in s) / len(s) * sum(abs(v) for v in t) / len(t)) ** 0.5
    costs = {
        "l1": abs,
        "mse": lambda d: d * d,
        "huber": lambda d: d * d / 2 if abs(d) <= 1 else abs(d) - 1 / 2,
    }
    return sum(costs[kind](a / g - b / g) for a, b in zip(s, t, strict=True)) / len(s)


def _distribution(values: list[float]) -> list[float]:
    """|values|, a thousandth of their mean added to each, normalised to sum 1."""
    total = sum(abs(v) for v in values)
    return [(abs(v) + total / len(values) / 1000) / (1.001 * total) for v in values]


def _pooled(heatmap: Tensor, side: int) -> list[float]:
    channels, height, width = heatmap.shape
    return [
        heatmap[c, y : y + side, x : x + side].mean().item()
        for c in range(channels)
        for y in range(0, height - side + 1, side)
        for x in range(0, width - side + 1, side)
    ]


def flipped(image: Tensor) -> Tensor:
    """(C, H, W), left and right exchanged, value by value."""
    out, width = torch.zeros_like(image), image.shape[2]
    for c, y, x in _indices(image):
        out[c, y, x] = image[c, y, width - 1 - x]
    return out


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """(C, H, W), moved by whole pixels, value by value; zeros come in."""
    out = torch.zeros_like(image)
    for c, y, x in _indices(image):
        if 0 <= y - down < image.shape[1] and 0 <= x - right < image.shape[2]:
            out[c, y, x] = image[c, y - down, x - right]
    return out


def cropped(image: Tensor, top: float, left: float, side: float, nearest: bool = False) -> Tensor:
    """The box of (C, H, W) from ``top`` and ``left``, in pixels, with ``side`` of each side, resized to (C, H, W)."""
    out = torch.zeros_like(image)
    height, width = image.shape[1:]
    for c, y, x in _indices(image):
        # pixel i reaches from i to i + 1, its value is that of its centre
        v = min(max(top + side * (y + 0.5) - 0.5, 0), height - 1)
        u = min(max(left + side * (x + 0.5) - 0.5, 0), width - 1)
        if nearest:
            out[c, y, x] = image[c, round(v), round(u)]
            continue
        for i, down in ((math.floor(v), math.floor(v) + 1 - v), (math.floor(v) + 1, v - math.floor(v))):
            for j, right in ((math.floor(u), math.floor(u) + 1 - u), (math.floor(u) + 1, u - math.floor(u))):
                if down * right > 0:
                    out[c, y, x] += down * right * image[c, i, j]
    return out


def _indices(image: Tensor) -> Iterable[tuple[int, ...]]:
    return itertools.product(*map(range, image.shape))
