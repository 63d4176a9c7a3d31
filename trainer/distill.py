"""Stage two: a student learns from stored heatmaps alone. The teacher's network is neither loaded nor run."""

from __future__ import annotations

import math
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import Dataset, Location, Split, open_dataset
from pipeline import Classifier, ModelConfig, Trace, explain
from pipeline.classifier import HeadSpec, build_classifier, copy_head, save_weights
from pipeline.device import as_input, pick_device, place, to_device
from teacher_cache import Cache, CacheError, CacheInfo, check_complete, open_cache
from trainer.losses import heatmap_loss
from trainer.run_dir import RunDir, check_free
from trainer.stream import Batch, explained_source, read_block, stored_heatmaps, stream
from trainer.training import (
    LOG_EVERY,
    STUDENT,
    Timed,
    bias_free_summary,
    finite,
    optimiser,
    seed_torch,
    total_steps,
)

GRADIENT_NORM = 1.0
VALIDATIONS = 5  # times in a training that a model is chosen from


def train_student(
    data: Location,
    cache: Location,
    out: str | Path,
    *,
    validation_cache: Location | None = None,
    arch: str = "small-cnn",
    bias_free: bool | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    device: str = "auto",
    workers: int = 2,
    memory_budget: int | None = None,
) -> dict[str, Any]:
    """Train a student to make its own LRP heatmaps match the stored ones and save it in ``out``.

    The method of Bassi et al., arXiv 2407.09788. The loss is on heatmaps alone: no label and no output is looked
    at. Each step shows one stored draw of each sample, explained by the student for the same class with the same ε.
    The teacher's last layer is copied and frozen, behind a learnt adapter where widths differ. Adam, one-cycle
    schedule of peak ``lr``, gradients clipped to norm 1; 3,000 steps unless ``steps`` or ``epochs`` is given.
    ``bias_free`` None means: as the teacher. With ``validation_cache`` the weights of the lowest heatmap loss on the
    validation split are kept, without it the last ones. ``workers`` and ``memory_budget`` are those of
    `trainer.stream.stream` and change no result. Returns the result that it writes.

    Raises DatasetError, CacheError, ModelError, FileExistsError, RelevanceError, TrainingError.
    """
    check_free(Path(out))
    dataset = open_dataset(data)
    explained = _open_paired(cache, dataset, "train")
    validation = None if validation_cache is None else _open_paired(validation_cache, dataset, "validation")
    if validation is not None:
        _check_validation(explained, validation)
    train = dataset.split("train")
    info = explained.info
    steps = total_steps(len(train), batch_size, steps, epochs, default=3000)
    head = explained.head
    config = ModelConfig(
        kind="student",
        arch=arch,
        bias_free=info.teacher.bias_free if bias_free is None else bias_free,
        debias="none",
        class_names=dataset.class_names,
        image_shape=train.image_shape,
        dataset={"name": dataset.name, "fingerprint": train.fingerprint},
        training={
            "loss": "heatmaps",
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "cache": {key: value for key, value in info.to_dict().items() if key != "dataset"},
        },
        head=HeadSpec(head["weight"].shape[1], "bias" in head) if head else None,
    )
    torch_device = pick_device(device)
    seed_torch(seed, STUDENT)
    model = build_classifier(config)
    if head:
        copy_head(model, head)
    place(model, torch_device)
    # fails now where a rule is missing
    Trace(model.eval(), as_input(np.asarray(train.images[:1]), torch_device), info.explainer.rule)
    model.train()
    adam, schedule = optimiser(model, lr, steps)
    run = RunDir(out, config)
    started = time.perf_counter()

    best_loss, best_step, best_weights = float("inf"), 0, None
    batches = stream(
        explained_source(train, explained),
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        memory_budget=memory_budget,
        pin_memory=torch_device.type == "cuda",
    )
    with closing(batches):
        timed = Timed(batches)
        bar = tqdm(islice(timed, steps), total=steps, unit="step", desc=f"distilling {run.path.name}", disable=None)
        for step, batch in enumerate(bar, start=1):
            loss = _losses(model, batch, info, torch_device, create_graph=True).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            adam.step()
            schedule.step()
            if step % LOG_EVERY == 0 or step == steps:
                value = finite(loss, step)
                run.log(step=step, loss=value, lr=schedule.get_last_lr()[0])
                bar.set_postfix(loss=f"{value:.3f}")
            if validation is not None and (step % math.ceil(steps / VALIDATIONS) == 0 or step == steps):
                validation_loss = _validate(model, dataset.split("validation"), validation, batch_size, torch_device)
                run.log(step=step, validation_loss=validation_loss)
                if validation_loss < best_loss:
                    best_loss, best_step = validation_loss, step
                    best_weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}

    if best_weights is not None:
        model.load_state_dict(best_weights)
    save_weights(run.path, model)
    return run.finish(
        loss=value,
        validation_loss=None if best_weights is None else best_loss,
        kept_step=steps if best_weights is None else best_step,
        steps=steps,
        seconds=time.perf_counter() - started,
        seconds_waiting=timed.seconds_waiting,
        bias_free=bias_free_summary(model, batch["images"], torch_device),
    )


def _losses(model: Classifier, batch: Batch, info: CacheInfo, device: torch.device, *, create_graph: bool) -> Tensor:
    """The heatmap loss of each sample, (N,), between the student's maps and the stored ones."""
    teacher = stored_heatmaps(batch["heatmaps"], batch["scale"], info.storage.precision, device)
    images = as_input(batch["images"], device)
    classes, epsilon = (to_device(batch[key], device) for key in ("target_class", "epsilon"))
    _, student = explain(model, images, classes, epsilon, create_graph=create_graph, rules=info.explainer.rule)
    return heatmap_loss(student, teacher, info.storage.resolution)


def _validate(model: Classifier, split: Split, cache: Cache, batch_size: int, device: torch.device) -> float:
    """The mean heatmap loss over the validation split, each sample by its first draw; evaluation mode."""
    model.eval()
    total = 0.0
    source = explained_source(split, cache)
    for shard in range(source.blocks):
        block = read_block(source, shard, draw=0)
        for first in range(0, len(block["images"]), batch_size):
            batch = {name: values[first : first + batch_size] for name, values in block.items()}
            total += _losses(model, batch, cache.info, device, create_graph=False).sum().item()
    model.train()
    return total / len(split)


def _open_paired(path: Location, dataset: Dataset, split: str) -> Cache:
    """Open a complete store of one split of this very dataset, or raise CacheError."""
    cache = open_cache(path)
    info = cache.info.dataset
    if info.split != split:
        raise CacheError(
            f"the store {path} explains the split '{info.split}', the {split} split is needed: "
            f"make one with cache-explanations --split {split}"
        )
    expected = dataset.split(split).fingerprint
    if info.fingerprint != expected:
        raise CacheError(
            f"the store {path} was made from another dataset ('{info.name}', fingerprint {info.fingerprint[:12]}) "
            f"than {dataset.path} ('{dataset.name}', fingerprint {expected[:12]}): use the dataset that it was made "
            "from, or make a store of this one with cache-explanations"
        )
    if cache.info.teacher.class_names != dataset.class_names:
        raise CacheError(
            f"the store {path} knows the classes {', '.join(cache.info.teacher.class_names)}, the dataset has "
            f"{', '.join(dataset.class_names)}: give the dataset the names that it had when the store was made"
        )
    check_complete(cache)
    dataset.split(split).verify()
    return cache


def _check_validation(train: Cache, validation: Cache) -> None:
    """Raise CacheError unless the validation store explains the same teacher in the same way, and is intact."""
    for field in ("rule", "epsilon_low", "epsilon_high", "class_policy"):
        asked, given = getattr(train.info.explainer, field), getattr(validation.info.explainer, field)
        if asked != given:
            raise CacheError(
                f"the store {validation.path} was made with explainer.{field} {given!r}, {train.path} with {asked!r}: "
                "make both with the same options"
            )
    ours, theirs = train.info.teacher.weights_sha256, validation.info.teacher.weights_sha256
    if ours != theirs:
        raise CacheError(
            f"the store {validation.path} explains another teacher (weights {theirs[:12]}) than {train.path} "
            f"(weights {ours[:12]}): make both with the same --teacher"
        )
    for shard in range(validation.info.shards):
        validation.read_shard(shard)
