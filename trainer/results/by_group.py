"""The accuracy of a model as the mean over the groups of a split, such as hospitals, with its spread between them.

Not here: the accuracy of each group and the worst group (`evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def group_mean(groups: np.ndarray, labels: np.ndarray, correct: np.ndarray) -> dict[str, Any] | None:
    """Average accuracies over groups, each of which counts the same, whatever its size.

    Args:
        groups: the group of each sample, integer (N,).
        labels: the true classes, integer (N,).
        correct: whether the prediction is right, bool (N,).

    Returns:
        ``groups``, the number of groups that have samples; ``accuracy``, the mean of their accuracies in %, and
        ``deviation``, the sample standard deviation (n − 1) of these in points; ``balanced_accuracy`` and
        ``balanced_deviation``, the same for the balanced accuracies, of which each is the mean over the classes that
        the group has. None if fewer than two groups have samples.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    if not len(group_of) or not group_of.max():
        return None
    classes = int(labels.max()) + 1
    cells, cell_of = np.unique(group_of * classes + labels, return_inverse=True)  # the classes that a group has
    accuracies = 100 * _means(group_of, correct)
    balanced = _means(cells // classes, 100 * _means(cell_of, correct))
    return {
        "groups": len(accuracies),
        "accuracy": float(accuracies.mean()),
        "deviation": float(accuracies.std(ddof=1)),
        "balanced_accuracy": float(balanced.mean()),
        "balanced_deviation": float(balanced.std(ddof=1)),
    }


def _means(place_of: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of the values that have each place, float64 (places,)."""
    return np.bincount(place_of, values) / np.bincount(place_of)


def group_mean_line(split: Mapping[str, Any]) -> str:
    """Write the mean over groups for a terminal, without the balanced accuracy if it is the same.

    Args:
        split: one of the ``splits`` of the result of `evaluate`.

    Returns:
        The line; empty for a split without groups, or with one, and for a result of an earlier version.
    """
    mean = split.get("group_mean")
    if mean is None:
        return ""
    line = f"{'  group mean':<12}{mean['accuracy']:7.2f} %  ± {mean['deviation']:.2f} over {mean['groups']} groups"
    balanced = f"{mean['balanced_accuracy']:.2f} % ± {mean['balanced_deviation']:.2f}"
    same = balanced == f"{mean['accuracy']:.2f} % ± {mean['deviation']:.2f}"
    return line if same else f"{line}; balanced accuracy {balanced}"
