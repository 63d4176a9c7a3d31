"""How well a saved classifier does on every test split: accuracy, gap, worst group, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from data import Dataset, DatasetError, Location, Split, open_dataset
from pipeline import Classifier, Forward, RelevanceError, ZeroShot, load_classifier, load_teacher
from pipeline.device import as_input, as_mask, pick_device, place
from trainer.run_dir import Run

BATCH_SIZE = 512
EXPLAINED, EXPLAINED_AT_ONCE = 500, 64  # images whose relevance is measured
LARGE_GAP = 5.0  # points, from which on a teacher is called biased
EPSILON = 0.1  # the middle of the range that a store draws from, unless told otherwise


def evaluate(
    data: Location,
    model: str | Path | ZeroShot,
    *,
    device: str = "auto",
    student_factory: str | None = None,
    segmenter: str | None = None,
) -> dict[str, Any]:
    """Accuracy, in %, of a model on every split that is neither trained nor chosen on.

    ``model`` is the folder of a saved teacher or student, or a vision-language teacher.

    ``splits`` has, by name, ``accuracy``, its 95 % Wilson ``interval``, ``samples``, the same of each of its ``groups``
    (by the dataset's bias attribute) and the ``worst_group`` of them, and as ``on_object``, in %, how much of the
    relevance is on the object (see `relevance_on_object`; None without masks); ``iid``, ``ood``, ``shift`` and
    ``gap`` = iid − ood stand at the top (None without such a split), as does the worst ``worst_group`` of all.
    ``student_factory`` and ``segmenter`` as in `pipeline.load_teacher`.

    Raises DatasetError, ModelError.
    """
    dataset = open_tested(data)
    shape = dataset.test_splits[0].image_shape
    found = load_teacher(model, dataset.class_names, shape, student_factory=student_factory, segmenter=segmenter)
    config, torch_device = found.config, pick_device(device)
    place(found.model, torch_device)
    splits = {}
    for split in dataset.test_splits:
        split.verify()
        splits[split.name] = score(found.model, split, dataset, answers(found.model, split, torch_device), torch_device)
    return {
        **summary(splits),
        "dataset": dataset.name,
        "model": str(model),
        "kind": config.kind,
        "arch": config.arch,
        "debias": config.debias,
    }


def open_tested(data: Location) -> Dataset:
    """A dataset that has something to test on. Raises DatasetError."""
    dataset = open_dataset(data)
    if not dataset.test_splits:
        raise DatasetError(f"the dataset {data} has no test split besides train and validation: add one, such as 'ood'")
    return dataset


@dataclass(frozen=True)
class Answers:
    """What a model says of samples: the class, int64 (N,), and its probability by softmax, float64 (N,)."""

    classes: np.ndarray
    probabilities: np.ndarray


def score(model: Classifier, split: Split, dataset: Dataset, said: Answers, device: torch.device) -> dict[str, Any]:
    """What `evaluate` returns of one split, by what the model said of all of it."""
    on_object = None if split.masks is None else relevance_on_object(model, split, device)
    return {**_summary(said.classes == np.asarray(split.labels[:]), split, dataset), "on_object": on_object}


def summary(splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `evaluate` has at the top, by what `score` returned of each split, and the ``splits`` themselves."""
    accuracies = {name: splits[name]["accuracy"] if name in splits else None for name in ("iid", "ood", "shift")}
    iid, ood = accuracies["iid"], accuracies["ood"]
    worst = [found["worst_group"] for found in splits.values() if found["worst_group"] is not None]
    return {
        **accuracies,
        "gap": None if iid is None or ood is None else round(iid - ood, 6),
        "worst_group": min(worst, key=lambda group: group["accuracy"], default=None),
        "splits": splits,
    }


def bias_warning(result: dict[str, Any]) -> str | None:
    """What to say of a teacher that is biased itself, by what `evaluate` returns; None of others.

    Its accuracy on iid is more than 5 points above that on another test split: students learn its reasons, biases too.
    """
    if result["kind"] != "teacher" or result["iid"] is None:
        return None
    worst = min(result["splits"], key=lambda name: float(result["splits"][name]["accuracy"]))
    behind = result["iid"] - result["splits"][worst]["accuracy"]
    if behind <= LARGE_GAP:
        return None
    return (
        f"warning: this teacher loses {behind:.1f} points from iid to {worst}, and a biased teacher teaches its bias: "
        "use it as a baseline only, or choose another one, its --debias or its --prompt"
    )


def evaluate_snapshots(
    data: Location, model: str | Path, *, images: int, device: str = "auto"
) -> Iterator[dict[str, float]]:
    """The snapshots of a finished training: ``step``, and the accuracy, in %, on each test split by its name.

    Not on all of it but on every n-th image, so that it is at least ``images`` of them and less than twice as many (all
    where there are fewer): the same ones for every snapshot and model.

    Raises DatasetError, ModelError.
    """
    dataset = open_dataset(data)
    classifier, _ = load_classifier(model)
    torch_device = pick_device(device)
    place(classifier, torch_device)
    for step, path in Run(Path(model)).snapshots.items():
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        point: dict[str, float] = {"step": step}
        for split in dataset.test_splits:
            every = max(1, len(split) // images)
            correct = predict(classifier, split, torch_device, every) == np.asarray(split.labels[:])[::every]
            point[split.name] = 100 * float(correct.mean())
        yield point


def relevance_on_object(model: Classifier, split: Split, device: torch.device) -> float | None:
    """How much of |relevance|, in %, lies within the masks: LRP-Flex of the true class, ε = 0.1; a mean over images.

    Of every n-th image, as in `evaluate_snapshots`, at least 500 where there are so many, but none without an object or
    without relevance. None where there is nothing to take a mean of, or an operation of the model has no rule.
    """
    assert split.masks is not None
    every, shares = max(1, len(split) // EXPLAINED), []
    for rows in _batches(split, every, EXPLAINED_AT_ONCE):
        masks = as_mask(np.asarray(split.masks[rows]), device)
        labels = torch.as_tensor(np.asarray(split.labels[rows]), device=device)
        try:
            forward = Forward(model, as_input(np.asarray(split.images[rows]), device), "flex", masks)
            sizes = forward.maps(labels, EPSILON).abs().sum(1, keepdim=True)
        except RelevanceError:
            return None
        total = sizes.sum((1, 2, 3))
        some = (total > 0) & masks.any(3).any(2).any(1)
        shares.append(((sizes * masks).sum((1, 2, 3)) / total)[some])
    found = torch.cat(shares)
    return 100 * float(found.mean()) if len(found) else None


def predict(model: Classifier, split: Split, device: torch.device, every: int = 1) -> np.ndarray:
    """The predicted class of every sample, or of every n-th, int64 (N,); the model in evaluation mode."""
    return answers(model, split, device, every).classes


@torch.no_grad()
def answers(model: Classifier, split: Split, device: torch.device, every: int = 1) -> Answers:
    """What the model, in evaluation mode, says of every sample, or of every n-th."""
    classes, probabilities = [], []
    for rows in _batches(split, every, BATCH_SIZE):
        masks = None if split.masks is None else as_mask(np.asarray(split.masks[rows]), device)
        logits = model(as_input(np.asarray(split.images[rows]), device), masks)
        classes.append(logits.argmax(1).cpu().numpy())
        probabilities.append(logits.cpu().double().softmax(1).amax(1).numpy())
    return Answers(np.concatenate(classes), np.concatenate(probabilities))


def _batches(split: Split, every: int, size: int) -> Iterator[slice]:
    for start in range(0, len(split), size * every):
        yield slice(start, start + size * every, every)


def _summary(correct: np.ndarray, split: Split, dataset: Dataset) -> dict[str, Any]:
    scores = []
    if split.groups is not None:
        groups = np.asarray(split.groups[:])
        scores = [
            {
                "split": split.name,
                "group": dataset.group_name(int(group)),
                **_score(correct[groups == group]),
            }
            for group in np.unique(groups)
        ]
    return {
        **_score(correct),
        "worst_group": min(scores, key=lambda score: score["accuracy"], default=None),
        "groups": scores,
    }


def _score(correct: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return {"accuracy": 100 * float(correct.mean()), "interval": [100 * low, 100 * high], "samples": len(correct)}


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion (Wilson, JASA 22, 1927), within [0, 1]."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
