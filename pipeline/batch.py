"""One batch of stored images through a model, and its maps back as arrays.

Stage one, pictures and evaluation explain with it. Not here: batches that a memory holds (`caching/batches.py`), and
a student's differentiable maps, which the training loop reads off a `Forward` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.device import as_input, as_mask
from pipeline.explainers import Forward


@dataclass(frozen=True)
class BatchExplanation:
    """The result of `explain_batch`: arrays on the CPU, for n images, D maps each and K classes.

    Attributes:
        logits: float32 (n, K).
        classes: the class of each map, int64 (n, D).
        maps: float32 (n, D, C, h, w).
        features: what enters the last layer, float32 (n, F), where it was asked for.
    """

    logits: np.ndarray
    classes: np.ndarray
    maps: np.ndarray
    features: np.ndarray | None = None


def explain_batch(
    model: nn.Module,
    images: np.ndarray,
    masks: np.ndarray | None,
    classes: np.ndarray | Callable[[np.ndarray], np.ndarray],
    epsilon: float | np.ndarray,
    *,
    explainer: str,
    device: torch.device,
    features: bool = False,
) -> BatchExplanation:
    """Explain D classes of each image by one forward pass and D backward passes.

    Args:
        model: a `Classifier`, or any model that `Forward` takes, placed on the device; evaluation mode is the caller's.
        images: stored images, uint8 (n, C, H, W).
        masks: stored masks, uint8 (n, 1, H, W), or None for a model that needs none.
        classes: the classes to explain, int64 (n, D), or a function that chooses them by the logits, float32 (n, K).
        epsilon: one ε for all maps, or floating (n, D).
        explainer: a name of `pipeline.EXPLAINERS`.
        device: where the model is.
        features: also return the deep features.

    Raises:
        RelevanceError: the explainer is unknown or cannot explain the model.
        ModelError: the model lacks masks, feature maps or features that are needed.
        RuntimeError: the memory of the device does not hold the batch.
    """
    masks_input = None if masks is None else as_mask(masks, device)
    with torch.no_grad():  # `Forward` enables gradients where an explainer needs them
        forward = Forward(model, as_input(images, device), explainer, masks_input)
    logits = _array(forward.logits)
    deep_features = _array(forward.features) if features else None
    classes = classes(logits) if callable(classes) else classes
    draws = classes.shape[1]
    heatmaps = np.empty(0, np.float32)
    for draw in range(draws):
        maps = forward.maps(
            torch.from_numpy(np.ascontiguousarray(classes[:, draw])),
            torch.from_numpy(np.ascontiguousarray(epsilon[:, draw])) if isinstance(epsilon, np.ndarray) else epsilon,
            keep_graph=draw + 1 < draws,
        )
        if draw == 0:
            heatmaps = np.empty((len(images), draws, *maps.shape[1:]), np.float32)
        heatmaps[:, draw] = _array(maps)
    return BatchExplanation(logits, classes, heatmaps, deep_features)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
