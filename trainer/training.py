"""What every training shares: its length, its seed, its optimiser, and when to stop because the numbers are wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import Classifier, homogeneity_error
from pipeline.device import as_input
from trainer.order import steps_per_epoch
from trainer.stream import Batch

LOG_EVERY = 20  # steps
MAX_STEPS = 10**9


class TrainingError(ValueError):
    """A training that cannot start, or must stop; the text says why and what to change."""


def total_steps(samples: int, batch_size: int, steps: int | None, epochs: float | None, default: int) -> int:
    """The number of optimiser steps: ``steps``, or ``epochs`` passes over the samples, or the default.

    Raises TrainingError for both at once, for less than one step, and for a batch size under 1.
    """
    if batch_size < 1:
        raise TrainingError(f"--batch-size must be at least 1, got {batch_size}")
    if steps is not None and epochs is not None:
        raise TrainingError(f"give --steps ({steps}) or --epochs ({epochs:g}), not both")
    if steps is None and epochs is None:
        return default
    if epochs is not None:
        steps = math.ceil(min(epochs, 1e12) * steps_per_epoch(samples, batch_size)) if epochs > 0 else 0
    assert steps is not None
    if steps > MAX_STEPS:
        raise TrainingError(f"{steps:.3g} steps are more than {MAX_STEPS:,}: give fewer --steps or --epochs")
    if steps < 1:
        given = f"--steps {steps}" if epochs is None else f"--epochs {epochs:g}"
        raise TrainingError(f"{given} is less than one step: give at least 1 step, or more than 0 epochs")
    return steps


def seed_torch(seed: int, purpose: int) -> None:
    """Seed PyTorch for one purpose, so that a student and its teacher with the same seed start differently."""
    torch.manual_seed(int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0]))


TEACHER, STUDENT = 0, 1  # purposes


def optimiser(
    model: nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over what is not frozen, with a one-cycle schedule of peak ``lr``."""
    if not (0 < lr < math.inf):
        raise TrainingError(f"--lr must be a positive number, got {lr:g}")
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    return adam, torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps)


def bias_free_summary(model: Classifier, images: Tensor, device: torch.device) -> dict[str, Any] | None:
    """For ``result.json``: what the bias-free form changed and could not, and how homogeneous the network is.

    ``homogeneity_error`` is max |f(2·x) − 2·f(x)| relative to max |2·f(x)| on some images: near 0, heatmaps account
    for the whole logit. None for a network with its biases.
    """
    report = model.bias_free_report
    if report is None or not (report.changed or report.could_not):
        return None
    return {
        "changed": report.changed,
        "could_not": report.could_not,
        "homogeneity_error": homogeneity_error(model.network, as_input(images, device)),
    }


class Timed:
    """Hands batches on; ``seconds_waiting`` is the time that their consumer has waited for them."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self.seconds_waiting = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds_waiting += time.perf_counter() - started


def finite(loss: torch.Tensor, step: int) -> float:
    """The loss as a number. Raises TrainingError where it is not finite."""
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss became {value} at step {step}: train with a smaller --lr")
    return value
