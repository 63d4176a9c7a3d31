"""Weights of the classes in the cross-entropy, for data in which some classes are rare. No PyTorch.

Not here: the loss that they weight (`methods.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from options import Message, Option
from trainer.errors import TrainingError

NONE, BALANCED = "none", "balanced"
UNBALANCED = 2.0  # a largest class with more than so many times the samples of the smallest one is worth a note


def class_weights(
    option: str | Sequence[str | float] | None, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[float, ...] | None:
    """Compute the weight of each class from an option.

    The mean weight of the training samples is 1, so the learning rate means the same as without weights.

    Args:
        option: ``balanced``, which weights each class by n / (K · n_k) as scikit-learn does, for n samples, of which
            n_k are of the class, and K classes that have samples; or a positive number for each class, in the order of
            ``class_names``, as a text with commas or a sequence; ``none`` or None for no weights.
        labels: the class of each training sample, integer (n,).
        class_names: the names of the classes.

    Returns:
        A weight for each class; None for no weights. A class without a training sample has the weight 1 if balanced.

    Raises:
        TrainingError: the option is something else.
    """
    texts = [text.strip() for text in option.split(",")] if isinstance(option, str) else list(option or ())
    if not texts or texts == [NONE]:
        return None
    counts = np.bincount(labels, minlength=len(class_names)).astype(np.float64)
    if texts == [BALANCED]:
        weights = np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 1.0)
    else:
        numbers = np.array(_numbers(option, texts, class_names))
        weights = numbers * len(labels) / (numbers * counts).sum()
    return tuple(weights.tolist())


def _numbers(
    option: str | Sequence[str | float] | None, texts: Sequence[str | float], class_names: Sequence[str]
) -> list[float]:
    text = option if isinstance(option, str) else ",".join(map(str, texts))
    try:
        numbers = [float(one) for one in texts]
    except (ValueError, TypeError):
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise TrainingError(
            Message(
                Option("class_weights", text),
                f" is neither {NONE} nor {BALANCED} nor a positive number for each class, such as 1,3.5",
            )
        )
    if len(numbers) != len(class_names):
        shortened = ", ".join(class_names[:10]) + ", …" * (len(class_names) > 10)
        raise TrainingError(
            Message(
                Option("class_weights", text),
                f" has {len(numbers)} weights, and the dataset has {len(class_names)} classes: give a weight for each "
                f"of {shortened}, in this order",
            )
        )
    return numbers


def unbalanced_note(labels: np.ndarray, class_names: Sequence[str]) -> Message | None:
    """Write a note on unbalanced training data: the largest class has more than twice the samples of the smallest one.

    Args:
        labels: the class of each training sample, integer (n,).
        class_names: the names of the classes.

    Returns:
        The note; None for balanced data. Classes without a training sample do not count.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    present = np.flatnonzero(counts)
    smallest, largest = (int(present[place]) for place in (counts[present].argmin(), counts[present].argmax()))
    if counts[largest] <= UNBALANCED * counts[smallest]:
        return None
    return Message(
        f"the training split is unbalanced: {counts[largest]} samples of {class_names[largest]!r}, "
        f"{counts[smallest]} of {class_names[smallest]!r}. A network that neglects rare classes can still have a high "
        "accuracy: consider ",
        Option("class_weights", BALANCED),
        ", and look at the accuracy of each class (",
        Option("class_weights", NONE),
        " silences this note)",
    )
