"""Ask a student before random backgrounds, which its teacher does not see: does it still say what its teacher says?

A test of what the student uses, without labels and without an unbiased image. It covers backgrounds of any kind, where
the tests of a dataset have some kinds alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from options import Message, Option
from pipeline.device import as_input, as_mask
from trainer.loop.augmentation import BACKGROUND
from trainer.loop.collapse import some_samples
from trainer.loop.repainting import REPAINTED, repaint
from trainer.loop.step import predictions
from trainer.settings import Settings
from trainer.stream.stream import Source

CPU = torch.device("cpu")
LOST = 3.0  # points of agreement, from which on a student is said to use the background
TIMES = 3  # as many errors before other backgrounds as without, from which on more images are repainted
REPAINTED_MORE = 1 / 2  # of the samples (docs/results/choosing.md)


def same_answers(
    model: nn.Module,
    source: Source,
    settings: Settings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, Any]:
    """Compare a student's answers with its teacher's, for images as they are and before random backgrounds.

    Args:
        model: a `Classifier` on the device; its modes are the same afterwards.
        source: samples with their ``masks`` and the ``teacher_logits`` of a teacher that sees nothing outside of them.
        settings: those of the training.
        device: where the model is.
        autocast: makes the context of a forward pass.

    Returns:
        The number of ``samples``, up to 512, and the share of them, in %, on which student and teacher say the same:
        ``as_they_are`` and ``other_backgrounds``.
    """
    samples, same = 0, torch.zeros(2, dtype=torch.int64)
    for batch in some_samples(source):
        images, masks, n = batch["images"], batch.pop("masks"), len(batch["images"])
        at = {"seed": settings.seed, "step": settings.steps, "first": samples, "of": samples + n}
        others = repaint(as_input(images, CPU), as_mask(masks, CPU), share=1, **at)
        others = others.mul(255).round().to(torch.uint8).contiguous()
        answers = batch["teacher_logits"].argmax(1)
        for place, shown in enumerate((images, others)):
            said = predictions(model, {**batch, "images": shown}, settings, device, autocast)
            same[place] += (said == answers).sum()
        samples += n
    as_they_are, other_backgrounds = (100 * count / samples for count in same.tolist())
    return {"samples": samples, "as_they_are": as_they_are, "other_backgrounds": other_backgrounds}


def share_to_repaint(found: dict[str, Any]) -> float:
    """Return the share of the images that should get another background.

    A student that knows the images as they are, and not before other backgrounds, has little to learn from the former:
    half of them are repainted. One that still learns both needs the images as they are, so a quarter is.

    Args:
        found: what `same_answers` returns.
    """
    plain, others = (100 - found[name] for name in ("as_they_are", "other_backgrounds"))
    return REPAINTED_MORE if others - plain >= LOST and others >= TIMES * plain else REPAINTED


def immunity_line(found: dict[str, Any]) -> str:
    """Write what `same_answers` found as one line for the log."""
    return (
        f"before random backgrounds, the student says what its teacher says on {found['other_backgrounds']:.1f} % of "
        f"{found['samples']:,} training images, and on {found['as_they_are']:.1f} % of them as they are"
    )


def background_warning(found: dict[str, Any], settings: Settings) -> Message | None:
    """Warn of a student that uses the background, where it was shown no others in training."""
    if BACKGROUND in settings.augment or found["as_they_are"] - found["other_backgrounds"] < LOST:
        return None
    return Message(f"{immunity_line(found)}: it uses the background; try ", Option("augment", BACKGROUND))
