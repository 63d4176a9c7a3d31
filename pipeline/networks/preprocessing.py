"""What a pretrained network expects of its images, as a module between the debiasing front and the network.

It is a part of the model, so that heatmaps lie on the dataset's own pixels and have the dataset's own size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import Message, Option
from pipeline.errors import ModelError
from pipeline.networks.teacher_options import PreprocessingOptions
from pipeline.rules import stop_relevance

Step = Callable[[Tensor], Tensor]
TINY = 1e-6  # by which rounding may make a product smaller than the whole number that it is
SHORTEST, LONGEST, SQUASH = "shortest", "longest", "squash"  # what is resized to the size: a side, or both
MOST = 5.0  # of a mean or a standard deviation of images in [0, 1]: more is of images in [0, 255]
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class PreprocessSpec:
    """The preprocessing of a network, as ``config.json`` keeps it.

    Attributes:
        mean: subtracted from each channel of images in [0, 1].
        std: by which each channel is divided afterwards.
        size: (height, width) that the network takes; None for the dataset's own size.
        interpolation: one of `INTERPOLATIONS`.
        resize_mode: ``shortest`` resizes the shorter side and cuts the longer one in the middle, ``squash`` resizes
            both sides, ``longest`` resizes the longer side and pads the shorter one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    resize_mode: str = SHORTEST

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessSpec:
        """Build it from the fields of a ``config.json``.

        Raises:
            TypeError, ValueError: a field is unknown, missing or wrong.
        """
        size = values.get("size")
        return cls(
            **{
                **values,
                "mean": tuple(map(float, values["mean"])),
                "std": tuple(map(float, values["std"])),
                "size": None if size is None else (int(size[0]), int(size[1])),
            }
        )

    def input_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of what the network takes, for images (C, H, W)."""
        return image_shape if self.size is None else (image_shape[0], *self.size)

    def for_channels(self, channels: int) -> PreprocessSpec:
        """Return the preprocessing of images with another number of channels; grey images have the channels' mean.

        Raises:
            ModelError: neither is 1, so that no rule tells the values, or a value is none of images in [0, 1].
        """
        self._check()
        mean, std = self.mean, self.std
        if len(mean) == 1 or len(mean) == channels:
            return dataclasses.replace(self, mean=_expanded(mean, channels), std=_expanded(std, channels))
        if channels == 1:
            return dataclasses.replace(self, mean=(sum(mean) / len(mean),), std=(sum(std) / len(std),))
        raise ModelError(
            Message(
                f"the network's images are normalised with {len(mean)} channels, and the dataset's have {channels}: "
                "give ", Option("mean"), " and ", Option("std"), ", one number for each channel",
            )
        )  # fmt: skip

    def _check(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
                raise _no_numbers(name, values)
            if max(map(abs, values)) > MOST:
                raise ModelError(
                    Message(
                        Option(name), f" is of images in [0, 1], got {max(values, key=abs):g}: divide the values of "
                        "images in [0, 255] by 255",
                    )
                )  # fmt: skip
        if (least := min(self.std)) <= 0:
            raise ModelError(Message(Option("std"), f" must be positive, got {least:g}: give the standard deviations"))
        if len(self.mean) != len(self.std):
            raise ModelError(
                Message(
                    Option("mean"), f" has {len(self.mean)} numbers and ", Option("std"), f" {len(self.std)}: give one "
                    "for each channel in both",
                )
            )  # fmt: skip

    def __str__(self) -> str:
        normalised = f"normalised by the mean {_numbers(self.mean)} and the standard deviation {_numbers(self.std)}"
        if self.size is None:
            return normalised
        return f"resized to {self.size[0]}×{self.size[1]} ({self.interpolation}) and {normalised}"


def choose_preprocessing(options: PreprocessingOptions, default: PreprocessSpec | None) -> PreprocessSpec | None:
    """Return the preprocessing that options give, and the default for what they leave out.

    Raises:
        ModelError: a value is no number.
    """
    size = options.input_size
    if options.mean is None and options.std is None and size is None:
        return default
    spec = default or PreprocessSpec((0.0,), (1.0,))
    mean = spec.mean if options.mean is None else _parsed("mean", options.mean)
    std = spec.std if options.std is None else _parsed("std", options.std)
    channels = max(len(mean), len(std))
    if size is not None:
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return dataclasses.replace(
        spec, mean=_expanded(mean, channels), std=_expanded(std, channels), size=spec.size if size is None else size
    )


def _parsed(name: str, values: Sequence[Any] | float) -> tuple[float, ...]:
    listed = values if isinstance(values, tuple | list) else (values,)
    try:
        return tuple(float(value) for value in listed)
    except (TypeError, ValueError):
        raise _no_numbers(name, listed) from None


def _no_numbers(name: str, values: Sequence[Any]) -> ModelError:
    return ModelError(
        Message(Option(name, ",".join(map(str, values))), " must be finite numbers, such as 0.485,0.456,0.406")
    )


def _expanded(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * channels if len(values) == 1 else tuple(values)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


class Preprocess(nn.Module):
    """Resize and normalise images: (N, C, H, W) in [0, 1] → (N, C, *size).

    Images are resized with antialiasing, cropped or padded, clamped and normalised. The result equals that of Pillow's
    transforms up to the rounding of its 8 bits, but it is differentiable, so that relevance reaches the pixels that a
    student sees.

    Args:
        spec: what is done.
        fill: the value of padded pixels.
    """

    mean: Tensor
    std: Tensor
    fading_mean: Tensor | None

    def __init__(self, spec: PreprocessSpec, fill: float = 0.0):
        super().__init__()
        self.register_buffer("fading_mean", None, persistent=False)
        self.size, self.mode, self.resize_mode = spec.size, spec.interpolation, spec.resize_mode
        self.fill = fill
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def fade_from(self, mean: Sequence[float]) -> None:
        """Subtract a mean that `pipeline.networks.fading.set_remaining` fades out."""
        if mean:
            self.register_buffer("fading_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
            assert self.fading_mean is not None
            self.mean = self.fading_mean.clone()

    def forward(self, images: Tensor) -> Tensor:
        for step in self._steps(images.shape[2], images.shape[3], _clip):
            images = step(images)
        return (images - self.mean) / self.std

    def plain(self, height: int, width: int) -> torch.fx.GraphModule:
        """Return the same for images of one size, as a graph of PyTorch's own functions."""
        steps = self._steps(height, width, partial(torch.clamp, min=0, max=1))
        return torch.fx.symbolic_trace(_Chain(steps, self.mean, self.std)).eval()

    def _steps(self, height: int, width: int, clip: Step) -> tuple[Step, ...]:
        """Return the functions that resize images of one size, one after another."""
        if self.size is None or self.size == (height, width):
            return ()
        ratios = [target / side for target, side in zip(self.size, (height, width), strict=True)]
        if self.resize_mode == SQUASH:
            resized = self.size
        else:
            # the longer side is cut to whole pixels in torchvision's Resize, and rounded in open_clip's own
            ratio, whole = (max(ratios), int) if self.resize_mode == SHORTEST else (min(ratios), round)
            resized = (whole(height * ratio + TINY), whole(width * ratio + TINY))
        # like Pillow: one axis after the other, the one that shrinks more first, and clipped after each
        across_first = resized[1] * height <= resized[0] * width
        steps: list[Step] = []
        size = (height, width)
        for after in ((height, resized[1]) if across_first else (resized[0], width), resized):
            if after != size:
                steps += [partial(_interpolate, size=after, mode=self.mode), clip]
            size = after
        for axis, (side, target) in enumerate(zip(resized, self.size, strict=True), start=2):
            if side > target:
                steps.append(partial(torch.narrow, dim=axis, start=round((side - target) / 2), length=target))
            elif side < target:
                before = (target - side) // 2
                pads = (before, target - side - before)
                steps.append(partial(F.pad, pad=pads if axis == 3 else (0, 0, *pads), value=self.fill))
        return tuple(steps)


class _Chain(nn.Module):
    """A chain of functions and the normalisation, without decisions, so that `torch.fx` can trace it."""

    mean: Tensor
    std: Tensor

    def __init__(self, steps: tuple[Step, ...], mean: Tensor, std: Tensor):
        super().__init__()
        self.steps = steps
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        for step in self.steps:
            images = step(images)
        return (images - self.mean) / self.std


def _interpolate(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(images, size, mode=mode, align_corners=False, antialias=True)


def _clip(images: Tensor) -> Tensor:
    """Cut values to [0, 1] by a constant, with the gradient of the identity.

    Interpolation exceeds [0, 1] a little wherever an image is saturated. The gradient of `torch.clamp` is 0 there, and
    white strokes would have no relevance.
    """
    values = stop_relevance(images).detach()
    return images + (values.clamp(0, 1) - values)
