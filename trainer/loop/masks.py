"""Whether the masks that a training needs tell an object from its background. Not here: what is done with them."""

from __future__ import annotations

import logging

import numpy as np

from data import Split
from options import Message, Option
from trainer.errors import TrainingError

log = logging.getLogger(__name__)

READ_AT_ONCE = 1024  # masks
EMPTY_ACCEPTED = 0.01  # share of masks without an object before the log tells of them, as of maps of zeros


def check_objects(split: Split, path: str, reason: Option) -> None:
    """Read the masks of a split and count those without an object. The log tells if there are many.

    It also tells if no mask has a background, because the option then changes nothing.

    Args:
        split: A split with masks.
        path: The dataset, for errors.
        reason: The option that needs the masks.

    Raises:
        TrainingError: No mask has an object.
    """
    assert split.masks is not None
    covered = []  # share of each mask's pixels that are object, (N,)
    for start in range(0, len(split), READ_AT_ONCE):
        masks = np.asarray(split.masks[start : start + READ_AT_ONCE])  # (n, 1, H, W) uint8
        covered.append((masks != 0).mean((1, 2, 3)))
    shares = np.concatenate(covered)
    where, correct = f"of the {split.name} split of {path}", "correct the masks (docs/dataset-layout.md)"
    empty = np.flatnonzero(shares == 0)
    if len(empty) == len(shares):
        raise TrainingError(
            Message(
                f"every mask {where} is empty, so there is no object for ", reason,
                f": {correct}, or leave the option out",
            )
        )  # fmt: skip
    if (shares == 1).all():
        log.warning(
            Message(
                f"every mask {where} covers its whole image, so there is no background for ", reason, f": {correct}"
            )
        )
    if len(empty) > EMPTY_ACCEPTED * len(shares):
        first = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        log.warning(
            Message(
                f"{len(empty):,} of {len(shares):,} masks {where} are empty ({len(empty) / len(shares):.1%}, of "
                f"samples {first}), and ", reason, f" takes these images for background: {correct}",
            )
        )  # fmt: skip
