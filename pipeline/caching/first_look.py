"""Two numbers on the maps of a store, before a student is trained: do their sums decide, and are they stable?

A student without additive terms has logits that are the sums of its maps. If the sums of the teacher's maps do not
decide as the teacher does, such a student that matches these maps cannot decide so either. And a map that changes when
the image is moved by a pixel is noise. docs/results/first-look.md measures what the numbers predict. Nothing is written
to the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        ignores_epsilon: whether the maps are the same at both ends of the range of ε.
    """

    epsilons: tuple[float, ...]
    images: int
    compared: int
    decides: tuple[float, ...] | None
    correlation: tuple[float, ...] | None
    stable: tuple[float, ...]
    ignores_epsilon: bool = False

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
                    "student without biases that matches such maps decides no better: use ",
                    *self._remedies(epsilon),
                )
            )
        if min(self.stable) < STABLE:
            cosine, epsilon = min(zip(self.stable, self.epsilons, strict=True))
            warnings.append(
                Message(
                    "the maps are largely noise: when the image is shifted by one pixel, the map changes so much that "
                    f"the cosine of the two is {cosine:.2f} at ε = {epsilon:g}: use ",
                    *self._remedies(epsilon),
                )
            )
        return warnings

    def _remedies(self, worst: float) -> tuple[str | Option, ...]:
        """Name what may help, of which one is another range if this ε is the worst one."""
        remedies = ("another ", Option("explainer"), " or a teacher trained with ", Option("bias_free", True))
        if self.ignores_epsilon:
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

    def look(part: slice) -> _Seen:
        of_part = None if masks is None else masks[part]
        return _look_twice(model, images[part], of_part, ends, info=info, device=device)

    at_once = min(batch_size, LOOKED_AT, info.storage.shard_samples)  # as in stage one itself, whose memory suffices
    seen = _Seen(*map(np.concatenate, zip(*Batches(at_once, given=False).run(len(images), look), strict=True)))
    compared = seen.compared
    if not compared.any():
        return None
    ignores_epsilon = bool(seen.same.all())
    of_ends = slice(1 if ignores_epsilon else len(ends))
    differences, cosines = seen.differences[compared, of_ends].T, seen.cosines[compared, of_ends].T  # (E, n)
    decides = correlation = None
    if explainer.sums_to_logit:
        decides = tuple(float((of_epsilon > 0).mean()) for of_epsilon in differences)
        correlation = tuple(_uncentred(of_epsilon, seen.margins[compared]) for of_epsilon in differences)
    stable = tuple(float(np.quantile(of_epsilon, 0.5)) for of_epsilon in cosines)
    return FirstLook(
        ends[of_ends], len(split), int(compared.sum()), decides, correlation, stable, ignores_epsilon and len(ends) > 1
    )


class _Seen(NamedTuple):
    """What is kept of the maps of n images at E ends of the range of ε.

    Attributes:
        margins: the logit of the top class less that of the runner-up, float64 (n,).
        differences: the same of the sums of their maps, float64 (n, E).
        cosines: of the map of the top class and that of the shifted image, float64 (n, E).
        compared: whether everything is finite, no map is empty and the logits differ, bool (n,).
        same: whether the maps are the same at both ends, bool (n,); False for one end.
    """

    margins: np.ndarray
    differences: np.ndarray
    cosines: np.ndarray
    compared: np.ndarray
    same: np.ndarray


def _look_twice(
    model: nn.Module,
    images: np.ndarray,
    masks: np.ndarray | None,
    ends: Sequence[float],
    *,
    info: CacheInfo,
    device: torch.device,
) -> _Seen:
    """Explain the two top classes of n images at the ends of the range of ε, and the top class after a shift."""
    epsilon = np.tile(np.array(ends, np.float32), (len(images), 1))

    def two_top(logits: np.ndarray) -> np.ndarray:
        return np.argsort(-logits, 1, kind="stable")[:, :2].repeat(len(ends), 1)

    how: dict[str, Any] = {"explainer": info.explainer.rule, "device": device}
    batch = explain_batch(model, images, masks, two_top, np.tile(epsilon, (1, 2)), **how)
    maps = batch.maps.reshape(len(images), 2, len(ends), *batch.maps.shape[2:])
    shifted_masks = None if masks is None else _shift(masks)
    top = batch.classes[:, : len(ends)]
    shifted = explain_batch(model, _shift(images), shifted_masks, top, epsilon, **how).maps  # (n, E, C, H, W)
    two = -np.sort(-batch.logits, 1)[:, :2].astype(np.float64)
    margins = two[:, 0] - two[:, 1]
    every = (1, 2, 3, 4, 5)
    finite = np.isfinite(batch.logits).all(1) & np.isfinite(maps).all(every) & np.isfinite(shifted).all((1, 2, 3, 4))
    sums = maps.sum((3, 4, 5), dtype=np.float64)
    same = (maps[:, :, 0] == maps[:, :, 1]).all((1, 2, 3, 4)) if len(ends) > 1 else np.zeros(len(images), np.bool_)
    cosines = _cosines(maps[:, 0], shifted, info.storage.resolution, not EXPLAINERS[info.explainer.rule].coarse)
    return _Seen(margins, sums[:, 0] - sums[:, 1], cosines, finite & maps.any(every) & (margins > 0), same)


def _shift(images: np.ndarray) -> np.ndarray:
    """Shift images (n, C, H, W) by one pixel to the right; the first column is repeated."""
    return np.concatenate([images[..., :1], images[..., :-1]], -1)


def _uncentred(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two differences if each pair is seen in both orders, so that their means are 0."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def _cosines(maps: np.ndarray, shifted: np.ndarray, resolution: int, pixels: bool) -> np.ndarray:
    """Return the cosines (n, E) of maps (n, E, C, H, W) and those of shifted images, moved back and average-pooled.

    Maps of features, not ``pixels``, are not moved back: a pixel is a small part of their positions.
    """
    height, width = (min(GRID, max(1, size // resolution)) for size in maps.shape[-2:])
    if pixels:
        maps, shifted = maps[..., :-1], shifted[..., 1:]
    one, other = (
        F.adaptive_avg_pool2d(torch.from_numpy(each.astype(np.float64)).flatten(0, 1), (height, width)).flatten(1)
        for each in (maps, shifted)
    )
    return F.cosine_similarity(one, other, eps=1e-300).numpy().reshape(maps.shape[:2])
