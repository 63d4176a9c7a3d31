"""Random backgrounds: the outputs and heatmaps of a teacher that sees the object alone do not depend on them.

As in `augmentation.py`, the background of a sample depends on the seed, the step and the sample's row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.device import to_device

REPAINTED = 1 / 4  # of the samples, by default (docs/results/choosing.md)
GAIN = (0.6, 1.4)  # of a channel
INVERTED = 0.25  # of the samples
WITH_LEAVES = 0.5  # of the textures; the others are of waves
WAVES = 8
SHARPNESS = (0.5, 20.0)  # log-uniform: from soft waves to edges
LEAVES = 40
LARGEST = 0.6  # half a leaf's length, of the longer side of the image
SMALLEST = 1 / 8  # at most
LEAST_CONTRAST = 0.3  # of the colours of leaves

_STREAM = 17  # a random stream of the seed, beside those of trainer.loop.augmentation


def repaint(
    images: Tensor, masks: Tensor, *, seed: int, step: int, first: int, of: int, share: float = REPAINTED
) -> Tensor:
    """Give a share of the images, chosen at random, another background, where their masks are not 1.

    The channels of the old background are permuted and each multiplied by 0.6 to 1.4, and it is inverted in a quarter
    of the samples. Then it is mixed, in any proportion, with a random texture, of waves or of leaves. Partial masks mix
    the image and its new background.

    - Waves are the sum of a colour and of eight plane waves of any colour, direction and phase. They have from half a
      period along a side to a period in two pixels, and are soft to sharp.
    - Leaves are 40 ellipses, rectangles and bars of any colour, place and direction, which hide each other: those on
      top tend to be small. So they have the edges, corners and scales of photographs (dead leaves; Lee, Mumford and
      Huang, IJCV 2001; Baradad et al., NeurIPS 2021, train networks on them).

    Args:
        images: floating (N, C, H, W) in [0, 1].
        masks: (N, 1, H, W) in [0, 1], 1 on the object.
        seed, step, first, of: as in `augmentation.augment`.
        share: the probability that an image gets another background; the others do not change.

    Returns:
        A new tensor of the same shape, dtype and memory layout as ``images``.
    """
    channels = images.shape[1]
    sizes = (7, channels, channels, channels, WAVES * (4 + channels), LEAVES * (6 + channels))
    drawn = np.random.default_rng([seed, _STREAM, step]).random((of, sum(sizes)))[first : first + len(images)]
    chosen = drawn[:, 0] < share
    painted = images.clone()
    for rows, texture in (
        (np.flatnonzero(chosen & (drawn[:, 1] >= WITH_LEAVES)), _waves),
        (np.flatnonzero(chosen & (drawn[:, 1] < WITH_LEAVES)), _leaves),
    ):
        if not len(rows):
            continue
        numbers = to_device(torch.from_numpy(drawn[rows]).to(images.dtype), images.device)
        at = to_device(torch.from_numpy(rows), images.device)
        whole, alone = images[at], numbers.split(sizes, dim=1)
        mixed, inverted = (alone[0][:, i].view(-1, 1, 1, 1) for i in (2, 3))
        old = whole.gather(1, alone[1].argsort(1)[:, :, None, None].expand_as(whole))
        old = torch.where(inverted < INVERTED, 1 - old, old)
        old = old * (GAIN[0] + (GAIN[1] - GAIN[0]) * alone[2])[:, :, None, None]
        background = mixed * old.clamp(0, 1) + (1 - mixed) * texture(alone, images.shape[2:])
        mask = masks[at]
        painted[at] = mask * whole + (1 - mask) * background
    return painted


def _waves(numbers: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return a texture (n, C, *size) in [0, 1] from the numbers of each sample, uniform in [0, 1)."""
    alone, _, _, base, numbers_of_waves, _ = numbers
    (n, channels), (height, width) = base.shape, size
    grey, contrast, sharpness = (alone[:, i].view(-1, 1, 1, 1) for i in (4, 5, 6))
    waves, colours = numbers_of_waves.split([4 * WAVES, WAVES * channels], dim=1)
    colours = 2 * colours.view(n, WAVES, channels) - 1
    colours = torch.lerp(colours, math.sqrt(channels) * colours.mean(2, keepdim=True), grey[:, :, 0])
    texture = base.new_zeros(n, channels, height, width)
    for wave, colour in zip(waves.view(n, WAVES, 4).unbind(1), colours.unbind(1), strict=True):
        frequency, angle, phase, strength = (each.view(n, 1, 1, 1) for each in wave.unbind(1))
        texture += colour[:, :, None, None] * strength * _plane_wave(frequency, angle, phase, height, width)
    texture = torch.tanh(texture * SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** sharpness)
    return (base[:, :, None, None] + texture * contrast / 2).clamp(0, 1)


def _plane_wave(frequency: Tensor, angle: Tensor, phase: Tensor, height: int, width: int) -> Tensor:
    """Return a cosine (N, 1, height, width) whose parameters, (N, 1, 1, 1), are uniform numbers in [0, 1)."""
    periods = 0.5 * max(height, width) ** frequency / max(height, width)  # to a pixel: 0.5 to a side, up to 0.5
    rows, columns = _pixels(angle, height, width)
    along, _ = _turned(columns, rows, angle)
    return torch.cos(2 * math.pi * (periods * along + phase))


def _leaves(numbers: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return a texture (n, C, *size) in [0, 1] from the numbers of each sample, uniform in [0, 1)."""
    alone, _, _, base, _, numbers_of_leaves = numbers
    (n, channels), (height, width) = base.shape, size
    grey, contrast, scale = (alone[:, i].view(-1, 1, 1) for i in (4, 5, 6))
    leaves, colours = numbers_of_leaves.split([6 * LEAVES, channels * LEAVES], dim=1)
    side = max(height, width)
    smallest = (SMALLEST * side) ** scale  # from a pixel on
    rows, columns = (values[0] for values in _pixels(base, height, width))
    top = torch.zeros(n, height, width, dtype=torch.int64, device=base.device)  # the leaf that is seen, 0 for none
    for leaf, one in enumerate(leaves.view(n, LEAVES, 6).unbind(1)):
        x, y, length, angle, narrow, kind = (each.view(n, 1, 1) for each in one.unbind(1))
        length = smallest * (LARGEST * side / smallest) ** (length * (1 - leaf / LEAVES))
        along, across = _turned(columns - x * width, rows - y * height, angle)
        along, across = along / length, across / (length * (0.2 + 0.8 * narrow))
        ellipse, rectangle = along.square() + across.square() < 1, torch.maximum(along.abs(), across.abs()) < 0.9
        shape = torch.where(kind < 0.4, ellipse, torch.where(kind < 0.85, rectangle, across.abs() < 0.25))
        top = torch.where(shape, leaf + 1, top)
    colours = torch.cat([base, colours], dim=1).view(n, LEAVES + 1, channels)
    colours = torch.lerp(colours, colours.mean(2, keepdim=True), grey)
    colours = 0.5 + (colours - 0.5) * (LEAST_CONTRAST + (1 - LEAST_CONTRAST) * contrast)
    seen = colours.gather(1, top.view(n, -1, 1).expand(-1, -1, channels))
    return seen.view(n, height, width, channels).permute(0, 3, 1, 2)


def _pixels(like: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows (1, 1, height, 1) and columns (1, 1, 1, width) of the pixels' centres, in pixels."""
    rows, columns = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5 for size in (height, width))
    return rows.view(1, 1, -1, 1), columns.view(1, 1, 1, -1)


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates in axes that are turned by an angle, in turns."""
    cos, sin = torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)
    return cos * x + sin * y, cos * y - sin * x
