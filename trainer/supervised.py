"""Supervised training: teachers behind their debiasing front, and the ERM baseline (front ``none``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data import Location, open_dataset
from pipeline import ModelConfig
from pipeline.networks.debias import DEBIAS
from pipeline.networks.models import OWN
from pipeline.networks.segmenters import build_segmenter
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, check_augmentations
from trainer.loop.methods import moves
from trainer.loop.training import TEACHER, Material, train
from trainer.run_dir import check_free
from trainer.settings import split_options, total_steps
from trainer.stream.stream import labelled_source


def train_teacher(
    data: Location,
    out: str | Path,
    *,
    arch: str = "small-cnn",
    arch_options: dict[str, Any] | None = None,
    debias: str = "grayscale",
    segmenter: str | None = None,
    bias_free: bool | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    **options: Any,
) -> dict[str, Any]:
    """Train a classifier with cross-entropy on the train split alone and save it in ``out``; or continue it.

    1,000 steps unless ``steps`` or ``epochs`` is given. ``bias_free`` None means: for our own networks
    (`pipeline.networks.models.OWN`) only. The last weights are kept; no other split is looked at.
    ``debias="segmenter"`` needs a ``segmenter``, which is what `build_segmenter` takes.
    ``options`` are fields of `trainer.settings.Settings` and
    `trainer.settings.Runtime`. Returns the result that it writes.

    Raises DatasetError, ModelError, FileExistsError, TrainingError, TrainingInterrupted.
    """
    asked = {**locals(), **options}  # all that it was told, by the names that the command line has for it
    check_free(Path(out))
    dataset = open_dataset(data)
    split = dataset.split("train")
    steps = total_steps(len(split), batch_size, steps, epochs, default=1000)
    settings, runtime = split_options(options, loss={"erm": 1.0}, steps=steps, batch_size=batch_size)
    check_augmentations(settings.augment, None, split.image_shape, moves(settings.loss))
    if BACKGROUND in settings.augment and split.masks is None:
        raise TrainingError(f"--augment {BACKGROUND} needs 'masks' in the train split of {data}, which has none")
    if debias not in DEBIAS:
        raise TrainingError(f"unknown --debias '{debias}': choose one of {', '.join(DEBIAS)}")
    if debias == "mask" and split.masks is None:
        raise TrainingError(f"--debias mask needs 'masks' in the train split of {data}, which has none")
    if (debias == "segmenter") != (segmenter is not None):
        raise TrainingError(
            "--debias segmenter needs --segmenter: give torchvision:lraspp_mobilenet_v3_large, a file or "
            "package.module:function"
            if segmenter is None
            else f"--segmenter {segmenter} is of --debias segmenter, and this is --debias {debias}: leave one out"
        )
    frozen = None if segmenter is None else build_segmenter(segmenter, split.image_shape)
    split.verify()
    config = ModelConfig(
        kind="teacher",
        arch=arch,
        arch_options=arch_options or {},
        bias_free=arch in OWN if bias_free is None else bias_free,
        debias=debias,
        segmenter=segmenter,
        class_names=dataset.class_names,
        image_shape=split.image_shape,
        dataset={"name": dataset.name, "fingerprint": split.fingerprint},
        training=settings.to_dict(),
    )
    material = Material(source=labelled_source(split), paths={"data": str(data)})
    return train(out, config, material, settings, runtime, asked, purpose=TEACHER, segmenter=frozen)
