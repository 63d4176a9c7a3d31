"""What changes in the course of a training beside the weights: biases fade, norms forget faster, training mode ends.

Data and functions of the step alone, so that a resumed training is in the same phase. Not here: how terms fade
(`pipeline.networks.fading`).
"""

from __future__ import annotations

import logging
import math

from torch import nn

from pipeline.explainers import EXPLAINERS
from pipeline.networks.homogeneous import NORMS
from teacher_cache import CacheInfo
from trainer.loop.methods import needs
from trainer.settings import Settings

FADING = 0.5  # share of the steps in which the additive terms of given weights fade out
IN_TRAINING_MODE = 0.5  # share of the steps, of a student that matches maps of rules

log = logging.getLogger(__name__)


def remaining(step: int, steps: int) -> float:
    """Return the share of the additive terms that remains in a step, counted from 0, of a network that loses them."""
    return max(0.0, 1 - step / (FADING * steps))


def in_evaluation_from(settings: Settings, store: CacheInfo | None) -> int:
    """Return the step, counted from 0, from which on a network is in evaluation mode; the number of steps for never."""
    if store is None or "heatmaps" not in needs(settings.loss) or EXPLAINERS.find(store.explainer.rule).rules is None:
        return settings.steps
    return math.ceil(IN_TRAINING_MODE * settings.steps)


def raise_momentum(model: nn.Module, steps: int) -> None:
    """Let the running statistics of norms reach back over a fiftieth of the steps at most, or over ten steps.

    Norms of networks that were trained for millions of steps average over hundreds (EfficientNet, MobileNetV3) or
    thousands (MNASNet). After a training of some hundred steps they would describe networks that it has left behind.
    Norms that forget faster stay as they are.

    Args:
        model: a network, whose norms' momentum is changed in place.
        steps: of the training.
    """
    least = min(0.1, 50 / steps)
    changed = set()
    for module in model.modules():
        if isinstance(module, NORMS) and module.momentum and module.momentum < least:
            changed.add(module.momentum)
            module.momentum = least
    if changed:
        log.info(
            f"the running statistics of norms have the momentum {least:.2g} in this training, not "
            f"{' or '.join(f'{momentum:.2g}' for momentum in sorted(changed))}, which is for longer ones"
        )
