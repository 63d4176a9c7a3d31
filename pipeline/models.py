"""Networks by name, and their last layer. Not here: what stands in front of a network (`classifier.py`)."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import nn

from pipeline.homogeneous import BiasFreeReport, bias_free

ImageShape = tuple[int, int, int]


class ModelError(ValueError):
    """A network that does not exist or does not fit the data; the text names it and what would."""


def architectures() -> list[str]:
    """``small-cnn`` and every torchvision classification model."""
    return ["small-cnn", *torchvision.models.list_models(module=torchvision.models)]


def small_cnn(num_classes: int, channels: int = 3, width: int = 32) -> nn.Sequential:
    """Three blocks of 3×3 convolution, batch norm, ReLU and 2×2 max-pooling, then one linear layer.

    Made for 28×28 and good from 8×8 on: (N, channels, H, W) to (N, num_classes), with features of
    4·width channels at 3×3 positions. 105,000 parameters at width 32.
    """
    layers: list[tuple[str, nn.Module]] = []
    for block, out in enumerate((width, 2 * width, 4 * width), start=1):
        layers += [
            (f"conv{block}", nn.Conv2d(channels, out, 3, padding=1, bias=False)),
            (f"norm{block}", nn.BatchNorm2d(out)),
            (f"relu{block}", nn.ReLU(inplace=True)),
            (f"pool{block}", nn.MaxPool2d(2)),
        ]
        channels = out
    layers += [
        ("pool", nn.AdaptiveAvgPool2d(3)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(9 * channels, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def build_network(
    arch: str, num_classes: int, image_shape: ImageShape, *, free_of_biases: bool
) -> tuple[nn.Module, BiasFreeReport]:
    """A randomly initialised network for images (C, H, W), tried once on such images.

    With ``free_of_biases`` in its bias-free form; the report says what that changed, and is empty otherwise.
    Raises ModelError for an unknown name (with the nearest ones) and for images that it cannot take.
    """
    if arch not in architectures():
        near = difflib.get_close_matches(arch, architectures(), n=3)
        raise ModelError(
            f"unknown architecture '{arch}': "
            + (f"did you mean {' or '.join(near)}?" if near else "choose small-cnn or a torchvision model's name")
        )
    try:
        network = _construct(arch, num_classes, image_shape)
        report = BiasFreeReport((), ())
        if free_of_biases:
            network, report = bias_free(network)
        with torch.no_grad():
            shape = tuple(network.eval()(torch.rand(2, *image_shape)).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the architecture '{arch}' does not take images of shape {image_shape} (channels, height, width): "
            f"{reason}; use another architecture (small-cnn takes 8×8 and more), or images of the size it needs"
        ) from None
    if shape != (2, num_classes):
        raise ModelError(f"the architecture '{arch}' returns {shape} for 2 images and {num_classes} classes")
    return network.train(), report


def _construct(arch: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    if arch == "small-cnn":
        return small_cnn(num_classes, image_shape[0])
    return torchvision.models.get_model(arch, num_classes=num_classes, **_options(arch, image_shape))


def _options(arch: str, image_shape: ImageShape) -> dict[str, Any]:
    """What some torchvision builders need beyond the number of classes."""
    if arch in ("googlenet", "inception_v3"):  # one output, as in evaluation
        return {"aux_logits": False, "init_weights": True}
    if arch.startswith("vit_"):
        return {"image_size": image_shape[1]}
    if arch.startswith("maxvit"):
        return {"input_size": image_shape[1:]}
    return {}


def last_linear(network: nn.Module, num_classes: int) -> str | None:
    """Name of the last layer, the last `nn.Linear` with ``num_classes`` outputs; None where there is none."""
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    return names[-1] if names else None
