"""What a training starts from: a network by name or function, random or given weights, and their preprocessing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from options import Message, Option
from pipeline import ModelConfig, ModelError
from pipeline.networks.checkpoints import Weights
from pipeline.networks.classifier import read_config
from pipeline.networks.models import OWN, build_network, is_factory, looks_trained
from pipeline.networks.own_teachers import HF, tensor_hashes
from pipeline.networks.preprocessing import PreprocessSpec, choose_preprocessing
from pipeline.networks.sources import ImageShape, preprocessing_of, read_hf_config
from teacher_cache import TeacherInfo
from trainer.errors import TrainingError
from trainer.loop.methods import moves
from trainer.loop.phases import FADING
from trainer.settings import NO_AUGMENTATION, StudentOptions, TeacherOptions

log = logging.getLogger(__name__)

LITTLE = 0.5  # of the logits: maps that sum to less say little of what their teacher does (docs/results/choosing.md)


def network_of(
    options: TeacherOptions | StudentOptions, factory: Option, weights: Weights | None, image_shape: ImageShape
) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` that describe the network and what it starts from.

    Args:
        options: the options of the training.
        factory: the option with the user's own function, and its value or None.
        weights: the weights that it starts from; None for random ones.
        image_shape: (C, H, W) of the images.

    Raises:
        TrainingError: options exclude each other.
        ModelError: the folder of the network cannot be read, or the preprocessing does not fit.
    """
    if factory.value is not None and options.arch != "small-cnn":
        raise TrainingError(Message("give ", Option("arch", options.arch), " or ", factory, ", not both"))
    arch = factory.value or options.arch
    assert arch is not None, "a student's is chosen before"
    hf_config = read_hf_config(arch.removeprefix(HF)) if arch.startswith(HF) else None
    trained = None if weights is None else _training_of(weights)
    default = None
    if trained is not None:
        default = trained.preprocessing
    elif not is_factory(arch) and (weights is not None or hf_config is not None):
        default = preprocessing_of(arch)
    spec = choose_preprocessing(options, default)
    if spec is not None:
        spec = spec.for_channels(image_shape[0])
        log.info(f"images are {spec} for {arch}")
    if hf_config is not None and weights is None:
        log.info(f"{arch} starts from random weights, not from those in its folder")
    return {
        "arch": arch,
        "arch_options": options.arch_options or {},
        "preprocessing": spec,
        "hf_config": hf_config,
        "start": None if weights is None else {"file": weights.path.name, "sha256": weights.sha256},
    }


def _training_of(weights: Weights) -> ModelConfig | None:
    """Return the configuration of the training of ours that the weights are from; None for other weights."""
    try:
        return read_config(weights.path.parent)
    except ModelError:
        return None


def fade_biases(network: dict[str, Any], weights: Weights | None) -> None:
    """Let what a bias-free network starts from lose its additive terms step by step, and the mean of its images too.

    Args:
        network: the fields of `network_of`, changed in place.
        weights: the weights that it starts from.
    """
    if not keeps_biases(weights):
        return
    spec: PreprocessSpec | None = network["preprocessing"]
    network["start"]["fades"] = True
    if spec is not None:
        network["start"]["mean"] = list(spec.mean)
        network["preprocessing"] = dataclasses.replace(spec, mean=(0.0,) * len(spec.mean))
    log.info(
        f"the biases of the given weights fade out in the first {FADING:.0%} of the steps, because heatmaps do not "
        "account for what they add to a logit"
    )


def keeps_biases(weights: Weights | None) -> bool:
    """Return whether the weights have biases, so that the network keeps them unless it is asked not to."""
    return weights is not None and not weights.bias_free


def own_bias_free(arch: str, weights: Weights | None) -> bool:
    """Return whether a network is bias-free by default, where no teacher tells: our own networks are."""
    return arch in OWN and not keeps_biases(weights)


def bias_free_by_default(
    teacher: TeacherInfo, arch: str, weights: Weights | None, terms: Mapping[str, float], share: float | None
) -> bool:
    """Return whether a student is bias-free by default: as its teacher is.

    If the teacher has biases, a student that is one of our own networks is bias-free nevertheless where it learns from
    completed maps, and from maps that carry little of the logits: it learned the rest from the shortcut otherwise
    (docs/results/choosing.md).

    Args:
        teacher: of the store.
        arch: of the student.
        weights: that the student starts from; None for random ones.
        terms: the weight of each method that it learns by.
        share: of the logits, to which the maps that it learns from sum; None where there are none.
    """
    if teacher.bias_free or not own_bias_free(arch, weights):
        return teacher.bias_free
    if "complete-lrp" in terms:
        return True
    if share is None or share >= LITTLE:
        return False
    log.info(
        Message(
            f"the student has no biases, although its teacher has: the teacher's heatmaps sum to {share:.0%} of its "
            "logits (median), and a student with biases learns the rest from the shortcut (",
            Option("bias_free", False), " gives it biases)",
        )
    )  # fmt: skip
    return True


def completes_by_default(
    teacher: TeacherInfo, arch: str, weights: Weights | None, options: StudentOptions, share: float | None
) -> bool:
    """Return whether a student of LRP maps matches them completed by default.

    It does if its teacher has biases and most of the logits is in the maps nevertheless, and if the student has no
    biases of its own, and learns from maps that are neither masked nor moved (docs/results/choosing.md). The arguments
    are those of `bias_free_by_default`.
    """
    bias_free = own_bias_free(arch, weights) if options.bias_free is None else options.bias_free
    moved = set(options.augment or ()) - {NO_AUGMENTATION, *moves({"complete-lrp": 1})}
    if teacher.bias_free or not bias_free or options.mask_target or moved or share is None or share < LITTLE:
        return False
    log.info(
        Message(
            f"the teacher has biases, and its heatmaps sum to {share:.0%} of its logits (median): the student, which "
            "has no biases, matches completed maps (", Option("method", "lrp"), " takes them as they are)",
        )
    )  # fmt: skip
    return True


def loads_weights(network: Mapping[str, Any], classes: int, image_shape: ImageShape) -> bool:
    """Return whether the user's own function, of the fields of `network_of`, returns a network that was trained.

    The function is called once more than a training needs, and PyTorch's random state stays as it was.
    """
    if not is_factory(network["arch"]):
        return False
    spec = network["preprocessing"]
    with torch.random.fork_rng():
        built, _ = build_network(
            network["arch"],
            classes,
            image_shape if spec is None else spec.input_shape(image_shape),
            free_of_biases=False,
            options=network["arch_options"],
            factory=network["arch"],
        )
    return looks_trained(built)


def check_not_teachers(network: nn.Module, teacher: str) -> None:
    """Raise ModelError for a student that starts from all weights of its teacher's backbone.

    Args:
        network: the student's network.
        teacher: `tensor_hashes` of the teacher's backbone, with commas between them; empty if they are unknown.
    """
    teachers = set(filter(None, teacher.split(",")))
    if teachers and teachers <= set(tensor_hashes(network)):
        raise ModelError(
            Message(
                "the student would start from the weights of its teacher, and the result would be the teacher's "
                "network, not what was learnt from heatmaps: give other weights or none, or ",
                Option("teacher_weights", True),
                " if you want this",
            )
        )
