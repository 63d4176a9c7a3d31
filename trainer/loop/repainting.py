"""Random backgrounds: the outputs and heatmaps of a teacher that sees the object alone do not depend on them.

As in `augmentation.py`, the background of a sample depends on the seed, the step and the sample's row alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.device import to_device

REPAINTED = 1 / 4  # of the samples, by default (docs/results/choosing.md)
GAIN = (0.6, 1.4)  # of a channel
INVERTED = 0.25  # of the samples
LEAVES = 40
LARGEST = 0.6  # half a leaf's length, of the longer side of the image
SMALLEST = 1 / 8  # at most, and at least a pixel
NARROWEST = 0.2  # half a leaf's width, of half its length
LEAST_CONTRAST = 0.3
TWO_COLOURS = 0.5  # of the samples
HIDING = 6  # of the old background by leaves of two colours: the power of its share
SOFT = 0.5  # of the samples

_STREAM = 17  # a random stream of the seed, beside those of trainer.loop.augmentation


def repaint(
    images: Tensor, masks: Tensor, *, seed: int, step: int, first: int, of: int, share: float = REPAINTED
) -> Tensor:
    """Give a share of the images, chosen at random, another background, where their masks are not 1.

    The channels of the old background are permuted and each multiplied by 0.6 to 1.4, and it is inverted in a quarter
    of the samples. Then it is mixed, in any proportion, with dead leaves: 40 ellipses, rectangles and bars of any
    colour, place and direction, which hide each other. Those on top tend to be small. So they have the edges, corners
    and scales of photographs (Lee, Mumford and Huang, IJCV 2001; Baradad et al., NeurIPS 2021, train networks on them).
    In half of the samples, the leaves have two colours alone, up to opposite ones such as black and white, and hide
    nearly all of the old background: print, tiles and signs have more contrast than photographs. In half of the
    samples, the edges of leaves are soft, as those of photographs are. Partial masks mix the image and its new
    background.

    Args:
        images: floating (N, C, H, W) in [0, 1].
        masks: (N, 1, H, W) in [0, 1], 1 on the object.
        seed, step, first, of: as in `augmentation.augment`.
        share: the probability that an image gets another background; the others do not change.

    Returns:
        A new tensor of the same shape, dtype and memory layout as ``images``.
    """
    painted, channels = images.clone(), images.shape[1]
    sizes = (10, channels, channels, channels, LEAVES * 6, LEAVES * channels, 2 * channels)
    drawn = np.random.default_rng([seed, _STREAM, step]).random((of, sum(sizes)))[first : first + len(images)]
    chosen = np.flatnonzero(drawn[:, 0] < share)
    if not len(chosen):
        return painted
    rows = to_device(torch.from_numpy(chosen), images.device)
    numbers = to_device(torch.from_numpy(drawn[chosen]).to(images.dtype), images.device)
    alone, order, gain, base, leaves, colours, pair = numbers.split(sizes, dim=1)
    _, mixed, inverted, grey, contrast, scale, two, sharp, away, soft = (
        each.view(-1, 1, 1) for each in alone.unbind(1)
    )

    mask, image = masks[rows], images[rows]
    old = image.gather(1, order.argsort(1)[:, :, None, None].expand_as(image))
    old = torch.where(inverted[..., None] < INVERTED, 1 - old, old)
    old = old * (GAIN[0] + (GAIN[1] - GAIN[0]) * gain)[:, :, None, None]

    colours = torch.cat([base, colours], dim=1).view(-1, LEAVES + 1, channels)
    of_pair = _two_colours(pair.view(-1, 2, channels), grey, away, sharp)
    of_pair = of_pair.gather(1, (colours[..., :1] > 0.5).long().expand_as(colours))
    colours = torch.lerp(colours, colours.mean(2, keepdim=True), grey)
    colours = 0.5 + (colours - 0.5) * (LEAST_CONTRAST + (1 - LEAST_CONTRAST) * contrast)
    colours = torch.where(two < TWO_COLOURS, of_pair, colours)
    mixed = torch.where(two < TWO_COLOURS, mixed.pow(HIDING), mixed)
    height, width = images.shape[2:]
    top = _top_leaves(leaves.view(-1, LEAVES, 6), scale, height, width)
    texture = colours.gather(1, top.flatten(1)[:, :, None].expand(-1, -1, channels))
    texture = texture.view(-1, height, width, channels).permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(texture, 3, 1, 1, count_include_pad=False)
    texture = torch.lerp(texture, blurred, (1 - soft / SOFT).clamp_min(0)[..., None])

    background = torch.lerp(texture, old.clamp(0, 1), mixed[..., None])
    painted[rows] = mask * image + (1 - mask) * background
    return painted


def _two_colours(pair: Tensor, grey: Tensor, away: Tensor, sharp: Tensor) -> Tensor:
    """Draw the colours of pairs, (n, 2, C), towards grey, then the second towards the opposite of the first, then both
    towards 0 or 1 in each channel, each by a share, (n, 1, 1)."""
    pair = torch.lerp(pair, pair.mean(2, keepdim=True), grey)
    first, second = pair[:, :1], pair[:, 1:]
    pair = torch.cat([first, torch.lerp(second, 1 - first, away)], dim=1)
    return torch.lerp(pair, pair.round(), sharp)


def _top_leaves(leaves: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    """Return which leaf is seen at each pixel, int64 (n, height, width), from 1 on and 0 for none.

    Args:
        leaves: place, length, direction, width and kind of each leaf, (n, LEAVES, 6), uniform in [0, 1).
        scale: of the smallest leaves of an image, (n, 1, 1), uniform in [0, 1).
        height, width: in pixels.
    """
    side = max(height, width)
    smallest = (SMALLEST * side) ** scale
    rows, columns = (torch.arange(n, device=leaves.device, dtype=leaves.dtype) + 0.5 for n in (height, width))
    top = torch.zeros(len(leaves), height, width, dtype=torch.int64, device=leaves.device)
    for number, leaf in enumerate(leaves.unbind(1)):
        x, y, length, angle, narrow, kind = (each.view(-1, 1, 1) for each in leaf.unbind(1))
        length = smallest * (LARGEST * side / smallest) ** (length * (1 - number / LEAVES))
        cos, sin = torch.cos(2 * math.pi * angle) / length, torch.sin(2 * math.pi * angle) / length
        right, down = columns - x * width, rows[:, None] - y * height
        along, across = cos * right + sin * down, (cos * down - sin * right) / (NARROWEST + (1 - NARROWEST) * narrow)
        ellipse, rectangle = along.square() + across.square() < 1, torch.maximum(along.abs(), across.abs()) < 0.9
        inside = torch.where(kind < 0.4, ellipse, torch.where(kind < 0.85, rectangle, across.abs() < 0.25))
        top = torch.where(inside, number + 1, top)
    return top
