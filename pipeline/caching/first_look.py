"""Two numbers that say, before a student is trained, whether it can learn from the maps of a store.

A student without additive terms has logits that are the sums of its maps. If the sums of the teacher's maps do not
decide as the teacher does, a student that matches these maps cannot decide so either. And a map that changes when the
image is moved by a pixel is noise. Nothing is written to the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Split
from options import Message, Option
from pipeline.batch import explain_batch
from pipeline.caching.batches import Batches
from pipeline.explainers import EXPLAINERS
from teacher_cache import CacheInfo

LOOKED_AT = 64  # images at most, evenly spread over the split
FEWEST = 16  # images, of which a warning can be right
DECIDES, STABLE = 0.75, 0.6  # below which the maps are warned of
GRID = 8  # positions of a side to which maps are average-pooled before they are compared


@dataclass(frozen=True)
class FirstLook:
    """What a first look at some images saw, at each ε of ``epsilons``.

    Attributes:
        epsilons: the ends of the range of ε; one of them if both give the same maps.
        images: the number of images of the split.
        compared: the number of images whose maps are compared: those with relevance, and with a runner-up.
        decides: the share of these images for which the sum of the map of the top class is larger than that of the
            runner-up; None for an explainer whose sums mean no logit.
        correlation: the correlation of the differences of the sums and of the logits, with each pair of classes in both
            orders; None as for ``decides``.
        stable: the median cosine of the map of the top class and that of the image shifted by a pixel.
    """

    epsilons: tuple[float, ...]
    images: int
    compared: int
    decides: tuple[float, ...] | None
    correlation: tuple[float, ...] | None
    stable: tuple[float, ...]

    def line(self) -> str:
        """Write the numbers as one line for the log."""
        *firsts, last = (f"{epsilon:g}" for epsilon in self.epsilons)
        at = "".join(f"{first} and " for first in firsts) + last
        parts = []
        if self.decides is not None and self.correlation is not None:
            parts.append(
                f"their sums decide between the two top classes as the teacher does on {_listed(self.decides, '.0%')} "
                f"of the images (correlation with the logits {_listed(self.correlation, '.2f')})"
            )
        parts.append(f"after a shift by one pixel they agree by {_listed(self.stable, '.2f')} (median cosine)")
        return f"a first look at the maps of {self.compared} of {self.images:,} images, at ε = {at}: {'; '.join(parts)}"

    def warnings(self) -> list[Message]:
        """Write a sentence, with the remedies, for each number that is too low."""
        if self.compared < FEWEST:
            return []
        warnings = []
        if self.decides is not None and min(self.decides) < DECIDES:
            share, epsilon = min(zip(self.decides, self.epsilons, strict=True))
            warnings.append(
                Message(
                    f"the maps do not decide as the teacher does: their sums agree with its choice between the two top "
                    f"classes on {share:.0%} of {self.compared} images at ε = {epsilon:g} (50% is chance), and a "
                    "student that matches such maps decides no better: use ",
                    *self._remedies(epsilon),
                )
            )
        if min(self.stable) < STABLE:
            cosine, epsilon = min(zip(self.stable, self.epsilons, strict=True))
            warnings.append(
                Message(
                    "the maps are largely noise: when the image is shifted by one pixel, the map changes so much that "
                    f"the cosine of the two is {cosine:.2f} at ε = {epsilon:g}: use a coarser ",
                    Option("resolution"),
                    ", ",
                    *self._remedies(epsilon),
                )
            )
        return warnings

    def _remedies(self, worst: float) -> tuple[str | Option, ...]:
        """Name what may help, of which one is another range if this ε is the worst one."""
        remedies = ("another ", Option("explainer"), " or a teacher trained with ", Option("bias_free", True))
        if len(self.epsilons) == 1:
            return remedies
        size = "larger" if worst == self.epsilons[0] else "smaller"
        return ("an ", Option("epsilon_range"), f" of {size} ε, ", *remedies)


def _listed(values: Sequence[float], form: str) -> str:
    return " and ".join(format(value, form) for value in values)


def first_look(
    model: nn.Module, split: Split, info: CacheInfo, batch_size: int, device: torch.device
) -> FirstLook | None:
    """Explain the two top classes of up to 64 images, at both ends of the range of ε, and the top class once more
    after a shift by one pixel.

    Args:
        model: the teacher on the device, in evaluation mode.
        split: the images, and the masks that a teacher's front may need.
        info: how the store's maps are made.
        batch_size: images at once; fewer where the memory does not hold them.
        device: where the model is.

    Returns:
        The numbers; None for an explainer of the last feature maps, to which they do not apply, and where no map of
        these images has relevance.
    """
    explainer = EXPLAINERS[info.explainer.rule]
    if explainer.coarse and explainer.stride is None:
        return None
    rows = slice(None, None, -(-len(split) // LOOKED_AT))
    images = np.asarray(split.images[rows])
    masks = None if split.masks is None else np.asarray(split.masks[rows])
    ends = tuple(dict.fromkeys((info.explainer.epsilon_low, info.explainer.epsilon_high)))

    def explain(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_part = None if masks is None else masks[part]
        return _explain_twice(model, images[part], of_part, ends, explainer=info.explainer.rule, device=device)

    batches = Batches(min(batch_size, LOOKED_AT), given=False)
    logits, maps, shifted = map(np.concatenate, zip(*batches.run(len(images), explain), strict=True))
    if len(ends) > 1 and np.array_equal(maps[:, :, 0], maps[:, :, 1]):  # the explainer ignores ε
        ends, maps, shifted = ends[:1], maps[:, :, :1], shifted[:, :1]
    two = -np.sort(-logits, 1)[:, :2].astype(np.float64)
    finite = (
        np.isfinite(logits).all(1) & np.isfinite(maps).all((1, 2, 3, 4, 5)) & np.isfinite(shifted).all((1, 2, 3, 4))
    )
    compared = finite & maps.any((1, 2, 3, 4, 5)) & (two[:, 0] > two[:, 1])
    if not compared.any():
        return None
    maps, shifted, margins = maps[compared], shifted[compared], (two[:, 0] - two[:, 1])[compared]
    height, width = (min(GRID, max(1, size // info.storage.resolution)) for size in maps.shape[-2:])
    decides = correlation = None
    if explainer.sums_to_logit:
        sums = maps.sum((3, 4, 5), dtype=np.float64)  # (n, 2, E)
        differences = (sums[:, 0] - sums[:, 1]).T  # (E, n)
        decides = tuple(float((of_epsilon > 0).mean()) for of_epsilon in differences)
        correlation = tuple(_uncentred(of_epsilon, margins) for of_epsilon in differences)
    stable = tuple(
        _median_cosine(maps[:, 0, end], shifted[:, end], (height, width), not explainer.coarse)
        for end in range(len(ends))
    )
    return FirstLook(ends, len(split), len(maps), decides, correlation, stable)


def _explain_twice(
    model: nn.Module,
    images: np.ndarray,
    masks: np.ndarray | None,
    ends: Sequence[float],
    *,
    explainer: str,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Explain n images at E ends of the range of ε, and once more after a shift by one pixel.

    Returns:
        The logits (n, K); the maps of the two top classes (n, 2, E, C, H, W); the maps of the same top class of the
        shifted images (n, E, C, H, W); all float32.
    """
    epsilon = np.tile(np.array(ends, np.float32), (len(images), 1))

    def two_top(logits: np.ndarray) -> np.ndarray:
        return np.argsort(-logits, 1, kind="stable")[:, :2].repeat(len(ends), 1)

    how: dict[str, Any] = {"explainer": explainer, "device": device}
    batch = explain_batch(model, images, masks, two_top, np.tile(epsilon, (1, 2)), **how)
    maps = batch.maps.reshape(len(images), 2, len(ends), *batch.maps.shape[2:])
    shifted_masks = None if masks is None else _shift(masks)
    shifted = explain_batch(model, _shift(images), shifted_masks, batch.classes[:, : len(ends)], epsilon, **how)
    return batch.logits, maps, shifted.maps


def _shift(images: np.ndarray) -> np.ndarray:
    """Shift images (n, C, H, W) by one pixel to the right; the first column is repeated."""
    return np.concatenate([images[..., :1], images[..., :-1]], -1)


def _uncentred(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two differences if each pair is seen in both orders, so that their means are 0."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def _median_cosine(maps: np.ndarray, shifted: np.ndarray, side: tuple[int, int], pixels: bool) -> float:
    """Return the median cosine of maps (n, C, H, W) and those of shifted images, moved back and average-pooled.

    Maps of features, not ``pixels``, are not moved back: a pixel is a small part of their positions.
    """
    if pixels:
        maps, shifted = maps[..., :-1], shifted[..., 1:]
    one, other = (
        F.adaptive_avg_pool2d(torch.from_numpy(each.astype(np.float64)), side).flatten(1) for each in (maps, shifted)
    )
    return float(F.cosine_similarity(one, other, eps=1e-300).median())
