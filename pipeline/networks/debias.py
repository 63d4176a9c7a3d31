"""Debiasing fronts: the first part of a teacher, which hides the shortcut from its network.

A front is a part of the model, so that relevance flows through it back to the pixels that a student sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from options import Lazy, Message, Option, Registry
from pipeline.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline import rules
else:
    torch, rules = Lazy("torch"), Lazy("pipeline.rules")

Front = Callable[["Tensor", "Tensor | None"], "Tensor"]  # images (N, C, H, W), masks (N, 1, H, W) → images (N, C, H, W)
DEBIAS: Registry[Front] = Registry("debias", ModelError)
MASKED = ("mask", "segmenter")  # fronts that need masks


@DEBIAS.add("grayscale")
def grayscale(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the mean of the channels divided by its spatial maximum, so that neither hue nor brightness is left.

    The result is (N, C, H, W) with equal channels. The maximum is a constant for relevance. Otherwise the result would
    not change with the brightness, and the relevance of every image would sum to 0.
    """
    mean = images.mean(dim=1, keepdim=True)
    brightest = rules.stop_relevance(mean).amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
    return (mean / brightest).expand(-1, images.shape[1], -1, -1)


@DEBIAS.add("mask")
def mask(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the images with the background set to 0 by the array ``masks`` of the dataset, (N, 1, H, W) in {0, 1}.

    Raises:
        ModelError: there are no masks.
    """
    if masks is None:
        raise ModelError(
            Message(
                "a teacher with ",
                Option("debias", "mask"),
                " needs the dataset's 'masks', and this split has none: use a dataset with masks, or another teacher",
            )
        )
    return images * masks


@DEBIAS.add("segmenter")
def segmenter(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the images as `mask` does, by the masks of a frozen segmentation network inside the teacher."""
    return mask(images, masks)


@DEBIAS.add("none")
def none(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the images unchanged, for a biased baseline or a student."""
    return images
