"""Notice a student that knows more than its teacher, by the labels of images that neither was trained on.

Whatever a student matches, it is its teacher's. It can be a little better, as noise does not repeat itself, but it can
hardly mend many of the teacher's errors, unless the bias tells it the labels. This needs no unbiased image, and it
shows a leak that heatmaps hide: a few per cent of the relevance can decide.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from options import Call, Message, Option
from trainer.loop.step import predictions
from trainer.settings import Settings
from trainer.stream.stream import Source, read_block

STANDARD_ERRORS, MENDED = 2.0, 0.2  # that an excess has before it is told; MENDED is a share of the teacher's errors


def excess(
    model: nn.Module,
    source: Source,
    settings: Settings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, Any]:
    """Compare the accuracies of a student and its teacher on a split with the bias of the training split.

    Args:
        model: a `Classifier` on the device; its modes are the same afterwards.
        source: the samples, with their ``labels`` and ``teacher_logits``.
        settings: those of the training.
        device: where the model is.
        autocast: makes the context of a forward pass.

    Returns:
        The number of ``samples``, the accuracies of ``student`` and ``teacher`` in %, their difference, the ``excess``,
        in points, and its ``standard_error``, which is that of a paired difference.
    """
    right = torch.zeros(2, dtype=torch.int64)
    apart = 0
    for block in range(source.blocks):
        batch = read_block(source, block, 0)
        labels = batch["labels"].long()
        student = predictions(model, batch, settings, device, autocast) == labels
        teacher = batch["teacher_logits"].argmax(1) == labels
        right += torch.stack([student.sum(), teacher.sum()])
        apart += int((student != teacher).sum())
    samples, (of_student, of_teacher) = source.samples, right.tolist()
    more = of_student - of_teacher
    return {
        "samples": samples,
        "student": 100 * of_student / samples,
        "teacher": 100 * of_teacher / samples,
        "excess": 100 * more / samples,
        "standard_error": 100 * (apart - more**2 / samples) ** 0.5 / samples,
    }


def excess_warning(found: dict[str, Any]) -> Message | None:
    """Warn of a student that is right where its teacher is wrong, by more than chance and by more than noise explains.

    On solar cells, students that used the stamp mended a third of their teacher's errors, and others up to 15 %
    (docs/results/solar-cells.md).
    """
    least = max(STANDARD_ERRORS * found["standard_error"], MENDED * (100 - found["teacher"]))
    if found["excess"] <= 0 or found["excess"] < least:
        return None
    return Message(
        f"the student is right on {found['student']:.1f} % of the {found['samples']:,} validation images, and its "
        f"teacher on {found['teacher']:.1f} %. It can hardly have this from its teacher, so it has probably learnt the "
        "bias: see where it looks (",
        Call("show_explanations"),
        "), and try ",
        Option("augment", "background"),
        " where the dataset has masks, or a start from the teacher's weights (",
        Option("init"),
        " with ",
        Option("teacher_weights", True),
        ")",
    )
