"""Supervised training: teachers behind their debiasing front, and the ERM baseline (front ``none``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data import Dataset, Location, Split, open_dataset
from options import Message, Option, renamed, takes
from pipeline import ModelConfig, ModelError
from pipeline.networks.checkpoints import Weights, read_weights
from pipeline.networks.debias import SEGMENTER, uses_segmenter
from pipeline.networks.fronts import Front, build_front, tell_unexplainable
from pipeline.networks.segmenters import build_segmenter
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, check_augmentations
from trainer.loop.class_weights import class_weights, unbalanced_note
from trainer.loop.masks import check_objects
from trainer.loop.methods import moves
from trainer.loop.state import TEACHER, Material, Training
from trainer.loop.training import train
from trainer.run_dir import check_free
from trainer.settings import TEACHER_STEPS, Runtime, Settings, TeacherOptions, total_steps
from trainer.start import fade_biases, keeps_biases, network_of, own_bias_free
from trainer.stream.stream import labelled_source


@takes(TeacherOptions)
def train_teacher(data: Location, out: str | Path, **options: Any) -> dict[str, Any]:
    """Train a classifier with cross-entropy on the train split alone, and save it in ``out``; or resume its training.

    A training takes 1,000 steps unless ``steps`` or ``epochs`` is given. ``bias_free`` None means: for our own networks
    (`pipeline.networks.models.OWN`) only. The last weights are kept, and no other split is read, unless ``validation``
    is set. Unbalanced training data without ``class_weights`` is logged.

    Args:
        data: a dataset.
        out: the folder of the run.

    Returns:
        The result, as ``result.json`` has it.

    Raises:
        DatasetError, ModelError, TrainingError: an input or option is wrong.
        FileExistsError: ``out`` holds something else than an unfinished run.
        TrainingInterrupted: SIGTERM or Ctrl-C stopped the training; a checkpoint is there.
    """
    chosen = TeacherOptions(data=data, out=out, **options)
    check_free(Path(out))
    dataset = open_dataset(data)
    dataset.check_classes()
    split = dataset.split("train")
    labels = np.asarray(split.labels[:]).astype(np.int64)
    weights = class_weights(chosen.class_weights, labels, dataset.class_names)
    settings = Settings.of(chosen, {"erm": 1.0}, total_steps(len(split), chosen, TEACHER_STEPS), weights)
    check_augmentations(settings.augment, None, split.image_shape, moves(settings.loss))
    front = build_front(chosen.debias, split.image_shape)
    _check_front(chosen, front, split)
    validation = _validation_split(chosen, front, dataset) if chosen.validation else None
    segmenter = None if chosen.segmenter is None else build_segmenter(chosen.segmenter, split.image_shape)
    split.verify()
    if needing := _needing_masks(chosen, front):
        check_objects(split, dataset.path, needing[0])
    start = None if chosen.weights is None else read_weights(chosen.weights)
    network, bias_free = _network(chosen, split, start)
    tell_unexplainable(front)
    note = unbalanced_note(labels, dataset.class_names) if chosen.class_weights is None else None
    config = ModelConfig(
        **network,
        kind="teacher",
        bias_free=bias_free,
        debias=front.text,
        front_sha256=front.sha256,
        segmenter=chosen.segmenter,
        class_names=dataset.class_names,
        image_shape=split.image_shape,
        dataset={"name": dataset.name, "fingerprint": split.fingerprint},
        training=settings.to_dict()
        | ({} if validation is None else {"validation": {"dataset": {"fingerprint": validation.fingerprint}}}),
    )
    training = Training(
        out=out,
        config=config,
        material=Material(
            source=labelled_source(split),
            validation=None if validation is None else labelled_source(validation),
            paths={"data": str(data)},
        ),
        settings=settings,
        runtime=Runtime.of(chosen),
        record=chosen.record(),
        purpose=TEACHER,
        segmenter=segmenter,
        front=front,
        student_factory=chosen.teacher_factory,
        weights=start,
        notes=() if note is None else (note,),
    )
    try:
        return train(training)
    except ModelError as error:
        raise ModelError(renamed(error, {"student_factory": "teacher_factory"})) from error


def _network(options: TeacherOptions, split: Split, weights: Weights | None) -> tuple[dict[str, Any], bool]:
    """Return the fields of a `ModelConfig` that describe the network, and whether it is bias-free."""
    factory = Option("teacher_factory", options.teacher_factory)
    network = network_of(options, factory, weights, split.image_shape)
    if options.freeze_backbone:
        if network["start"] is None and options.teacher_factory is None:
            raise TrainingError(
                Message(
                    Option("freeze_backbone", True), " would train the last layer on top of random weights: give ",
                    Option("weights"), " too",
                )
            )  # fmt: skip
        network["start"] = {**(network["start"] or {}), "frozen": True}
    bias_free = own_bias_free(network["arch"], weights) if options.bias_free is None else options.bias_free
    if bias_free and options.freeze_backbone and keeps_biases(weights):
        raise TrainingError(
            Message(
                Option("bias_free", True), " lets the biases of the weights fade out while the network adapts, and ",
                Option("freeze_backbone", True), " keeps the network as it is: leave one of the two out",
            )
        )  # fmt: skip
    if bias_free:
        fade_biases(network, weights)
    return network, bias_free


def _needing_masks(options: TeacherOptions, front: Front) -> list[Option]:
    """Return the options that need masks."""
    needing = [Option("augment", BACKGROUND)] if BACKGROUND in options.augment else []
    return needing + ([Option("debias", front.text)] if _needs_dataset_masks(front) else [])


def _needs_dataset_masks(front: Front) -> bool:
    """Return whether the front needs the dataset's masks; with ``segmenter`` in it, the network makes them."""
    return front.needs_masks and not uses_segmenter(front.text)


def _validation_split(options: TeacherOptions, front: Front, dataset: Dataset) -> Split:
    """Return the split that selects the weights; raise TrainingError or DatasetError where it cannot."""
    if "validation" not in dataset.splits:
        raise TrainingError(
            Message(
                Option("validation", True), f" needs a split 'validation', and {dataset.path} has none: add one, or "
                "leave the option out",
            )
        )  # fmt: skip
    split = dataset.split("validation")
    if _needs_dataset_masks(front) and split.masks is None:
        raise TrainingError(
            Message(
                Option("debias", front.text), f" needs 'masks' in the validation split of {dataset.path}, which "
                "has none: add them, or leave ", Option("validation", True), " out",
            )
        )  # fmt: skip
    split.verify()
    return split


def _check_front(options: TeacherOptions, front: Front, split: Split) -> None:
    """Raise TrainingError where the front or an augmentation needs masks that are missing, or a segmenter."""
    if (needing := _needing_masks(options, front)) and split.masks is None:
        raise TrainingError(Message(needing[0], f" needs 'masks' in the train split of {options.data}, which has none"))
    if uses_segmenter(front.text) != (options.segmenter is not None):
        if options.segmenter is None:
            raise TrainingError(
                Message(
                    Option("debias", front.text), " needs ", Option("segmenter"),
                    ": give torchvision:lraspp_mobilenet_v3_large, a file or package.module:function",
                )
            )  # fmt: skip
        raise TrainingError(
            Message(
                Option("segmenter", options.segmenter), " is for ", Option("debias", SEGMENTER), ", and this is ",
                Option("debias", front.text), ": leave one out",
            )
        )  # fmt: skip
