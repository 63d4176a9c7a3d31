"""The trial of a training: what would fail at its first step, or at its first validation, fails before it writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from options import Message, Option
from pipeline import Classifier, ModelError, RelevanceError
from pipeline.networks.models import error_summary
from pipeline.networks.trials import undisturbed
from teacher_cache import CacheError
from trainer.errors import TrainingError
from trainer.loop.state import Training
from trainer.loop.step import forward_backward, forward_of, on_device
from trainer.stream.stream import read_block

log = logging.getLogger(__name__)

OURS = (ModelError, RelevanceError, TrainingError, CacheError)  # errors that say what to do


def try_out(
    training: Training,
    model: Classifier,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    batch_samples: int,
) -> None:
    """Pass one sample through the network in evaluation mode, and a step's samples forth and back in training mode.

    The network, its gradients and the random states are the same afterwards, and the network is in training mode.

    Args:
        training: the training, of which samples, store and settings are used.
        model: the network, on the device.
        device: where the network is.
        autocast: makes the context in which each forward pass runs.
        batch_samples: samples of a step in this process.

    Raises:
        ModelError, RelevanceError, TrainingError: the network has no rule, map or feature for a method, nothing to
            learn, or fails in one of the modes.
    """
    material, settings = training.material, training.settings
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"the network of {training.config.arch} has no parameter to learn: let requires_grad be True for some"
        )
    block = read_block(material.source, 0, 0)
    rows = torch.arange(batch_samples) % len(block["images"])  # the first block may be smaller than a batch
    one, batch = (
        on_device({name: values[of] for name, values in block.items()}, material.store, settings, device)
        for of in (rows[:1], rows)
    )
    with undisturbed(model):
        try:
            with torch.no_grad():
                logits = forward_of(model.eval(), one, material.store, settings).logits
        except OURS:
            raise
        except Exception as error:
            raise _failure(training, "evaluation", 1, error) from error
        try:
            forward_backward(model.train(), material.store, settings, autocast, batch)
        except OURS:
            raise
        except Exception as error:
            raise _failure(training, "training", batch_samples, error) from error
    model.train()
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"the network of {training.config.arch} returns logits that are not finite before it has learnt anything: "
            "check its initialisation and its forward"
        )
    if _are_probabilities(logits):
        log.warning(
            f"{training.out}: the network of {training.config.arch} returns probabilities and not logits, so that its "
            "heatmaps vanish where it is sure: return what enters its last softmax"
        )


def _failure(training: Training, mode: str, samples: int, error: Exception) -> ModelError:
    batch_size, accumulate = (Option(name, getattr(training.settings, name)) for name in ("batch_size", "accumulate"))
    of_batches = (", or choose another ", batch_size, " or ", accumulate) if mode == "training" else ()
    return ModelError(
        Message(
            f"the network of {training.config.arch} fails in {mode} mode with {samples} image{'s' * (samples > 1)}, "
            f"{error_summary(error)}: let its forward work in both modes",
            *of_batches,
        )
    )


def _are_probabilities(logits: Tensor) -> bool:
    logits = logits.detach().float()
    return bool(logits.min() >= 0) and bool((logits.sum(1) - 1).abs().max() < 1e-4)
