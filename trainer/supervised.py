"""Supervised training: teachers behind their debiasing front, and the ERM baseline (front ``none``)."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from tqdm import tqdm

from data import Location, open_dataset
from pipeline import ModelConfig
from pipeline.classifier import DEBIAS, build_classifier, save_weights
from pipeline.device import as_input, as_mask, pick_device, place, to_device
from trainer.run_dir import RunDir, check_free
from trainer.stream import labelled_source, stream
from trainer.training import (
    LOG_EVERY,
    TEACHER,
    Timed,
    TrainingError,
    bias_free_summary,
    finite,
    optimiser,
    seed_torch,
    total_steps,
)


def train_teacher(
    data: Location,
    out: str | Path,
    *,
    arch: str = "small-cnn",
    debias: str = "grayscale",
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
    """Train a classifier with cross-entropy on the train split alone and save it in ``out``.

    Adam, one-cycle schedule of peak ``lr``; 1,000 steps unless ``steps`` or ``epochs`` is given.
    ``bias_free`` None means: for ``small-cnn`` only. The last weights are kept; no other split is looked at.
    ``workers`` and ``memory_budget`` are those of `trainer.stream.stream` and change no result. Returns the result
    that it writes: last loss, steps, seconds, and how many of these it waited for data.

    Raises DatasetError, ModelError, FileExistsError, TrainingError.
    """
    check_free(Path(out))
    dataset = open_dataset(data)
    train = dataset.split("train")
    steps = total_steps(len(train), batch_size, steps, epochs, default=1000)
    if debias not in DEBIAS:
        raise TrainingError(f"unknown --debias '{debias}': choose one of {', '.join(DEBIAS)}")
    if debias == "mask" and train.masks is None:
        raise TrainingError(f"--debias mask needs 'masks' in the train split of {data}, which has none")
    train.verify()
    config = ModelConfig(
        kind="teacher",
        arch=arch,
        bias_free=arch == "small-cnn" if bias_free is None else bias_free,
        debias=debias,
        class_names=dataset.class_names,
        image_shape=train.image_shape,
        dataset={"name": dataset.name, "fingerprint": train.fingerprint},
        training={"loss": "cross-entropy", "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed},
    )
    torch_device = pick_device(device)
    seed_torch(seed, TEACHER)
    model = build_classifier(config).train()
    place(model, torch_device)
    adam, schedule = optimiser(model, lr, steps)
    run = RunDir(out, config)
    started = time.perf_counter()

    batches = stream(
        labelled_source(train),
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        memory_budget=memory_budget,
        pin_memory=torch_device.type == "cuda",
    )
    with closing(batches):
        timed = Timed(batches)
        bar = tqdm(islice(timed, steps), total=steps, unit="step", desc=f"training {run.path.name}", disable=None)
        for step, batch in enumerate(bar, start=1):
            images = as_input(batch["images"], torch_device)
            masks = as_mask(batch["masks"], torch_device) if "masks" in batch else None
            labels = to_device(batch["labels"], torch_device).long()
            loss = F.cross_entropy(model(images, masks), labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            if step % LOG_EVERY == 0 or step == steps:
                value = finite(loss, step)
                run.log(step=step, loss=value, lr=schedule.get_last_lr()[0])
                bar.set_postfix(loss=f"{value:.3f}")

    save_weights(run.path, model)
    return run.finish(
        loss=value,
        steps=steps,
        seconds=time.perf_counter() - started,
        seconds_waiting=timed.seconds_waiting,
        bias_free=bias_free_summary(model, batch["images"], torch_device),
    )
