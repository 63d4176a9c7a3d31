"""Notice a training that teaches nothing: a heatmap loss that does not fall, and a network that says one class.

Not here: losses that are not finite or explode (`watch.py`), and the test of a finished model (`results/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from options import Call, Message, Option
from trainer.loop.methods import METHODS
from trainer.loop.step import predictions
from trainer.settings import Settings
from trainer.stream.stream import Source, read_block

SHORTEST = 100  # steps of a training that is judged
FALLS = 0.1  # share by which a heatmap loss must fall
WINDOW = 20  # steps whose median loss is compared
# by the kind of loss: its value for maps that have nothing in common, and a value below which it need not fall
LEVELS = {"l1": (2.0, 1.0), "cosine": (1.0, 0.5)}
LOOKED_AT, BLOCKS = 512, 16  # training images at most, from so many blocks
CONSTANT, PRESENT = 0.99, 0.05  # share of the predictions of one class, and of the true or the teacher's other classes


class Falling:
    """Compare the heatmap loss with that of the first steps, after a third of the training and at its end.

    All that it knows is in the progress of the training, so that a resumed training is judged alike.

    Args:
        settings: the losses and the number of steps.
        progress: the progress of the training. The entry ``falling`` has the heatmap losses of the first steps and of
            the last ones, and whether the user was told.
    """

    def __init__(self, settings: Settings, progress: dict[str, Any]):
        self._kind, self._steps = settings.map_loss, settings.steps
        self._method = next((name for name in settings.loss if METHODS[name].explainers), None)
        self._window = min(WINDOW, settings.steps // 10)
        third = settings.steps // 3
        self._moments = {settings.steps, *([third] if third >= SHORTEST else [])}
        self._seen = progress.setdefault("falling", {"first": [], "last": [], "told": False})

    def add(self, number: int, losses: dict[str, float]) -> Message | None:
        """Add the mean loss of each method in a step, counted from 1; return a warning if one is due."""
        if self._method is None or self._steps < SHORTEST:
            return None
        first, last = self._seen["first"], self._seen["last"]
        if number <= self._window:
            first.append(losses[self._method])
        last.append(losses[self._method])
        del last[: -self._window]
        # of a training that an earlier version began, the first losses are not known
        if number not in self._moments or self._seen["told"] or len(first) < self._window:
            return None
        apart, low = LEVELS.get(self._kind, (float("inf"), 0.0))
        before, now = float(np.quantile(first, 0.5)), float(np.quantile(last, 0.5))
        if now <= low or now <= (1 - FALLS) * min(before, apart):
            return None
        self._seen["told"] = True
        meaning = f" ({apart:g} is that of maps with nothing in common)" if self._kind in LEVELS else ""
        return Message(
            f"the heatmap loss is {now:.2f} after {number} of {self._steps} steps, and {before:.2f} after the first "
            f"{self._window}{meaning}, so the student learns little from these maps: see how far they sum to the "
            "logits (",
            Call("inspect_cache"),
            "), give more ",
            Option("steps"),
            ", another ",
            Option("optimizer"),
            " or ",
            Option("lr"),
            ", or make a store with an ",
            Option("epsilon_range"),
            " of larger ε",
        )


def some_samples(source: Source) -> Iterator[dict[str, Tensor]]:
    """Yield batches of up to 512 samples in all, spread over the source."""
    blocks = np.unique(np.linspace(0, source.blocks - 1, min(BLOCKS, source.blocks)).astype(int)).tolist()
    for block in blocks:
        batch = read_block(source, block, 0)
        every = -(-len(batch["images"]) // (LOOKED_AT // len(blocks)))
        yield {name: values[::every] for name, values in batch.items()}


def class_counts(
    model: nn.Module,
    source: Source,
    settings: Settings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the predictions on up to 512 samples, spread over the source.

    Args:
        model: a `Classifier` on the device; its modes are the same afterwards.
        source: samples with their ``labels`` or the ``teacher_logits``, and the masks that a front may need.
        settings: those of the training.
        device: where the model is.
        autocast: makes the context of a forward pass.
        classes: the number of classes.

    Returns:
        The number of samples for which the model says each class, and for which the teacher says it, or, without the
        logits of a teacher, which have its label: int64 (K,) each.
    """
    predicted, expected = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for batch in some_samples(source):
        answers = batch["teacher_logits"].argmax(1) if "teacher_logits" in batch else batch["labels"].long()
        expected += np.bincount(answers.numpy(), minlength=classes)
        said = predictions(model, batch, settings, device, autocast)
        predicted += np.bincount(said.numpy(), minlength=classes)
    return predicted, expected


def shares(counts: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Return the share of each class that occurs, in %."""
    parts = 100 * counts / counts.sum()
    return {name: float(part) for name, part in zip(class_names, parts, strict=True) if part > 0}


def one_class_warning(
    predicted: np.ndarray, expected: np.ndarray, class_names: Sequence[str], settings: Settings, *, of_teacher: bool
) -> Message | None:
    """Warn of a trained network that says one class although there are several.

    Args:
        predicted, expected: the counts of `class_counts`.
        class_names: the names of the classes.
        settings: those of the training.
        of_teacher: whether ``expected`` counts the answers of a teacher and not labels.

    Returns:
        The warning; None for a training of fewer than 100 steps, and where the network says several classes, or no
        other class is expected for at least 5 % of the samples.
    """
    samples, most = int(predicted.sum()), int(predicted.argmax())
    others = np.delete(expected, most) / samples
    if settings.steps < SHORTEST or predicted[most] < CONSTANT * samples or others.max(initial=0) < PRESENT:
        return None
    if of_teacher:
        remedies: tuple[object, ...] = (
            "see whether the maps decide as the teacher does (", Call("inspect_cache"), "), or give more ",
            Option("steps"), ", another ", Option("optimizer"), " or ", Option("lr"),
        )  # fmt: skip
    else:
        remedies = ("give a smaller ", Option("lr"), " or more ", Option("steps"))
    if settings.class_weights is None:
        remedies = (*remedies, ", and for unbalanced data ", Option("class_weights", "balanced"))
    answers = f"its teacher says that of {expected[most] / samples:.0%}" if of_teacher else (
        f"{expected[most] / samples:.0%} are of this class"
    )  # fmt: skip
    return Message(
        f"the network has collapsed to one class: it says {class_names[most]!r} for {predicted[most] / samples:.0%} of "
        f"{samples} training images, and {answers}: ",
        *remedies,
    )
