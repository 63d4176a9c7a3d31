"""Random backgrounds: the outputs and heatmaps of a teacher that sees the object alone do not depend on them.

As in `augmentation.py`, the background of a sample depends on the seed, the step and the sample's row alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.device import to_device

REPAINTED = 1 / 4  # of the samples, by default (docs/results/choosing.md)
WAVES = 8
GAIN = (0.6, 1.4)  # of a channel
INVERTED = 0.25  # of the samples
SHARPNESS = (0.5, 20.0)  # log-uniform: from soft waves to edges

_STREAM = 17  # a random stream of the seed, beside those of trainer.loop.augmentation


def repaint(
    images: Tensor, masks: Tensor, *, seed: int, step: int, first: int, of: int, share: float = REPAINTED
) -> Tensor:
    """Give a share of the images, chosen at random, another background, where their masks are not 1.

    The channels of the old background are permuted and each multiplied by 0.6 to 1.4, and it is inverted in a quarter
    of the samples. Then it is mixed, in any proportion, with a random texture: the sum of a colour and of eight plane
    waves of any colour, direction and phase. The waves have from half a period along a side to a period in two pixels,
    and are soft to sharp. Partial masks mix the image and its new background.

    Args:
        images: floating (N, C, H, W) in [0, 1].
        masks: (N, 1, H, W) in [0, 1], 1 on the object.
        seed, step, first, of: as in `augmentation.augment`.
        share: the probability that an image gets another background; the others do not change.

    Returns:
        A new tensor of the same shape, dtype and memory layout as ``images``.
    """
    n, channels, height, width = images.shape
    drawn = np.random.default_rng([seed, _STREAM, step]).random((of, 6 + (3 + WAVES) * channels + 4 * WAVES))
    numbers = to_device(torch.from_numpy(drawn[first : first + n]).to(images.dtype), images.device)
    alone, order, gain, base, waves, colours = numbers.split(
        [6, channels, channels, channels, 4 * WAVES, WAVES * channels], dim=1
    )
    repainted, mixed, inverted, grey, contrast, sharpness = (each.view(n, 1, 1, 1) for each in alone.unbind(1))

    old = images.gather(1, order.argsort(1).view(n, channels, 1, 1).expand_as(images))
    old = torch.where(inverted < INVERTED, 1 - old, old) * (GAIN[0] + (GAIN[1] - GAIN[0]) * gain)[:, :, None, None]

    colours = 2 * colours.view(n, WAVES, channels) - 1
    grey = grey.view(n, 1, 1)
    colours = (1 - grey) * colours + grey * math.sqrt(channels) * colours.mean(2, keepdim=True)
    texture = torch.zeros_like(images)
    for wave, colour in zip(waves.view(n, WAVES, 4).unbind(1), colours.unbind(1), strict=True):
        frequency, angle, phase, size = (each.view(n, 1, 1, 1) for each in wave.unbind(1))
        texture += colour[:, :, None, None] * size * _plane_wave(frequency, angle, phase, height, width)
    texture = torch.tanh(texture * SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** sharpness)
    texture = base[:, :, None, None] + texture * contrast / 2

    background = mixed * old.clamp(0, 1) + (1 - mixed) * texture.clamp(0, 1)
    return torch.where(repainted < share, masks * images + (1 - masks) * background, images)


def _plane_wave(frequency: Tensor, angle: Tensor, phase: Tensor, height: int, width: int) -> Tensor:
    """Return a cosine (N, 1, height, width) whose parameters, (N, 1, 1, 1), are uniform numbers in [0, 1)."""
    periods = 0.5 * max(height, width) ** frequency / max(height, width)  # to a pixel: 0.5 to a side, up to 0.5
    angle = 2 * math.pi * angle
    rows, columns = (torch.arange(size, device=angle.device, dtype=angle.dtype) + 0.5 for size in (height, width))
    along = angle.cos() * columns.view(1, 1, 1, -1) + angle.sin() * rows.view(1, 1, -1, 1)
    return torch.cos(2 * math.pi * (periods * along + phase))
