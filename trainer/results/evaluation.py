"""How good a saved classifier is on every test split: accuracy, gap, worst group, with intervals."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from data import Dataset, DatasetError, Location, Split, open_dataset
from options import Message, Option, takes
from pipeline import Classifier, ModelError, RelevanceError, load_classifier, load_teacher
from pipeline.batch import explain_batch
from pipeline.caching.batches import fitting
from pipeline.device import as_input, as_mask, pick_device, place
from pipeline.networks.sources import ImageShape
from pipeline.networks.teachers import Brought, Teacher
from pipeline.networks.weight_files import load_weights
from trainer.results.by_group import group_mean
from trainer.results.options import EPSILON, EvaluateOptions, OwnCode
from trainer.run_dir import Run

log = logging.getLogger(__name__)

BATCH_SIZE = 512
EXPLAINED, EXPLAINED_AT_ONCE = 500, 64  # images whose relevance is measured
EXPLAINER = "flex"
LARGE_GAP = 5.0  # points; a teacher that loses more is called biased


@takes(EvaluateOptions)
def evaluate(data: Location, model: str | Path | Brought, **options: Any) -> dict[str, Any]:
    """Measure the accuracy of a model on every test split, which are all splits but train and validation.

    Args:
        data: a dataset.
        model: the folder of a teacher or a student, or a vision-language teacher.

    Returns:
        Accuracies in %. ``splits`` has, by the name of a split: ``accuracy``, its 95 % Wilson ``interval``,
        ``samples``, the same for each of its ``groups`` (the values of the dataset's bias attribute), its
        ``worst_group``, ``worst_class_in_group``, the same for the worst class among the samples of one group (None
        without groups), and ``on_object``, the share of the relevance on the object in % (`relevance_on_object`; None
        without masks). ``classes`` has the same as ``groups`` for each class that has samples, in the order of the
        labels, ``balanced_accuracy`` is the mean of their accuracies, and ``only_prediction`` is the class that the
        model says for every image, None if it says several; ``predictions`` is the share of the predictions of each
        class in %. ``group_mean`` has the mean of the accuracies of the groups and their standard deviation, and the
        same of the balanced accuracies (`group_mean`; None with fewer than two groups). On a split without the masks
        that a teacher's front needs, ``accuracy`` and ``interval`` are None, and ``group_mean`` and the four entries of
        the classes are missing; the log names it. At the top: ``iid``, ``ood``, ``shift``, ``gap`` = iid − ood (None
        without such a split, or its accuracy), the worst ``worst_group`` of all, and what the model is: ``dataset``,
        ``model``, ``kind``, ``arch``, ``debias``.

    Raises:
        DatasetError: there is no dataset, or it has no test split.
        ModelError: the model cannot be loaded, or does not fit the dataset, or no test split has the masks that it
            needs.
    """
    settings = EvaluateOptions(data=data, model=model, **options)
    dataset = open_tested(data)
    teacher = load_with(model, dataset, dataset.test_splits[0].image_shape, settings)
    tell_untested([(str(model), teacher.model)], dataset)
    config, device = teacher.config, pick_device(settings.device)
    place(teacher.model, device)
    splits = {}
    for split in dataset.test_splits:
        split.verify()
        if lacks_masks(teacher.model, split):
            splits[split.name] = untested(split)
        else:
            splits[split.name] = score(teacher.model, split, dataset, answers(teacher.model, split, device), device)
    return {
        **summary(splits),
        "dataset": dataset.name,
        "model": str(model),
        "kind": config.kind,
        "arch": config.arch,
        "debias": config.debias,
    }


def load_with(model: str | Path | Brought, dataset: Dataset, image_shape: ImageShape, code: OwnCode) -> Teacher:
    """Load a model for a dataset, with the user's own code that may run. Raises ModelError as `load_teacher` does."""
    return load_teacher(
        model,
        dataset.class_names,
        image_shape,
        student_factory=code.student_factory,
        segmenter=code.segmenter,
        debias=code.debias,
    )


def open_tested(data: Location) -> Dataset:
    """Open a dataset that has a test split. Raises DatasetError."""
    dataset = open_dataset(data)
    if not dataset.test_splits:
        raise DatasetError(f"the dataset {data} has no test split besides train and validation: add one, such as 'ood'")
    return dataset


def lacks_masks(model: Classifier, split: Split) -> bool:
    """Return whether the model cannot be run on the split, which has no masks."""
    return model.needs_masks and split.masks is None


def tell_untested(models: Sequence[tuple[str, Classifier]], dataset: Dataset) -> None:
    """Log the test splits on which a model cannot be tested, because they have no masks.

    Args:
        models: the models with their names.
        dataset: the dataset of the test splits.

    Raises:
        ModelError: no model can be tested on any split.
    """
    tests = dataset.test_splits
    lacking = {name: [split.name for split in tests if lacks_masks(model, split)] for name, model in models}
    if all(len(split_names) == len(tests) for split_names in lacking.values()):
        raise ModelError(
            f"{no_masks(' or '.join(lacking), [split.name for split in tests])}, so nothing can be tested: test its "
            f"student, which needs no masks, or add masks to a test split of {dataset.path} (docs/dataset-layout.md)"
        )
    for name, split_names in lacking.items():
        if split_names:
            log.warning(
                f"{no_masks(name, split_names)}, so it is not tested there: test its student, which needs no masks, "
                f"or add masks to {dataset.path} (docs/dataset-layout.md)"
            )


def no_masks(model: str, split_names: Sequence[str]) -> str:
    """Write why a model cannot be run on some splits, as the beginning of a sentence."""
    *others, last = map(repr, split_names)
    splits = f"splits {', '.join(others)} and {last} have" if others else f"split {last} has"
    return f"the {splits} no masks, which the front of {model} needs"


@dataclass(frozen=True)
class Answers:
    """A model's predictions: the classes, int64 (N,), and their probabilities by softmax, float64 (N,)."""

    classes: np.ndarray
    probabilities: np.ndarray


def score(
    model: Classifier, split: Split, dataset: Dataset, predictions: Answers, device: torch.device
) -> dict[str, Any]:
    """Score the model's predictions on a whole split, as `evaluate` returns it for each split."""
    on_object = None if split.masks is None else relevance_on_object(model, split, device)
    labels = np.asarray(split.labels[:]).astype(np.int64)
    return {
        **group_scores(predictions.classes == labels, labels, split, dataset),
        **class_scores(labels, predictions.classes, dataset.class_names),
        "on_object": on_object,
    }


def class_scores(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Score each class apart.

    Args:
        labels: the true classes, integer (N,).
        predicted: the predicted classes, integer (N,).
        class_names: the names of the classes.

    Returns:
        ``classes``, ``balanced_accuracy``, ``only_prediction`` and ``predictions``, as `evaluate` returns them for a
        split.
    """
    shares = 100 * np.bincount(predicted, minlength=len(class_names)) / len(predicted)
    samples = np.bincount(labels, minlength=len(class_names)).tolist()
    correct = np.bincount(labels[predicted == labels], minlength=len(class_names)).tolist()
    scores = [
        {"class": name, **_proportion(right, many)}
        for name, right, many in zip(class_names, correct, samples, strict=True)
        if many
    ]
    return {
        "balanced_accuracy": float(np.mean([score["accuracy"] for score in scores])),
        "classes": scores,
        "only_prediction": class_names[int(predicted[0])] if (predicted == predicted[0]).all() else None,
        "predictions": dict(zip(class_names, shares.tolist(), strict=True)),
    }


def untested(split: Split) -> dict[str, Any]:
    """Return the score, as `score` does, of a model that cannot be run on the split."""
    names = ("accuracy", "interval", "worst_group", "worst_class_in_group", "on_object")
    return {**dict.fromkeys(names), "samples": len(split), "groups": []}


def summary(splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the totals that `evaluate` returns above the ``splits``, each as `score` returns it."""
    accuracies = {name: splits[name]["accuracy"] if name in splits else None for name in ("iid", "ood", "shift")}
    iid, ood = accuracies["iid"], accuracies["ood"]
    worst_groups = [one["worst_group"] for one in splits.values() if one["worst_group"] is not None]
    return {
        **accuracies,
        "gap": None if iid is None or ood is None else round(iid - ood, 6),
        "worst_group": min(worst_groups, key=lambda group: group["accuracy"], default=None),
        "splits": splits,
    }


def bias_warning(result: dict[str, Any]) -> Message | None:
    """Warn of a biased teacher: its IID accuracy is more than 5 points above that on another test split.

    Args:
        result: the dictionary that `evaluate` returns.

    Returns:
        The warning; None for a student, and for a teacher that is not biased.
    """
    if result["kind"] != "teacher" or result["iid"] is None:
        return None
    accuracies = {name: split["accuracy"] for name, split in result["splits"].items() if split["accuracy"] is not None}
    worst = min(accuracies, key=lambda name: float(accuracies[name]))
    points_lost = result["iid"] - accuracies[worst]
    if points_lost <= LARGE_GAP:
        return None
    return Message(
        f"warning: this teacher loses {points_lost:.1f} points from iid to {worst}, and a biased teacher teaches its "
        "bias: use it as a baseline only, or choose another teacher, another ",
        Option("debias"),
        " or another ",
        Option("prompt"),
    )


def evaluate_snapshots(
    data: Location, model: str | Path, *, images: int, student_factory: str | None = None, device: str = "auto"
) -> Iterator[dict[str, float | None]]:
    """Measure the accuracy of each snapshot of a finished training on a part of each test split.

    Args:
        data: a dataset.
        model: the folder of a training.
        images: every n-th image of a split is used, the same for all snapshots and models, so that there are at least
            this many and less than twice as many; all images of a smaller split.
        student_factory: as in `load_classifier`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Yields:
        ``step``, and the accuracy in % on each test split by its name; None where it has no masks, and the model's
        front needs them.

    Raises:
        DatasetError: there is no dataset.
        ModelError: the model cannot be loaded.
    """
    dataset = open_dataset(data)
    classifier, _ = load_classifier(model, student_factory)
    torch_device = pick_device(device)
    place(classifier, torch_device)
    for step, path in Run(Path(model)).snapshots.items():
        try:
            load_weights(classifier, path)
        except ModelError as error:
            raise ModelError(f"the snapshot {path} does not load ({error}); train the model again") from error
        point: dict[str, float | None] = {"step": step}
        for split in dataset.test_splits:
            if lacks_masks(classifier, split):
                point[split.name] = None
                continue
            every = max(1, len(split) // images)
            correct = predict(classifier, split, torch_device, every) == np.asarray(split.labels[:])[::every]
            point[split.name] = 100 * float(correct.mean())
        yield point


def relevance_on_object(model: Classifier, split: Split, device: torch.device) -> float | None:
    """Measure how much of |relevance| lies within the masks: LRP-Flex of the true class, ε = 0.1.

    Args:
        model: a classifier on the device, in evaluation mode.
        split: a split with masks. Every n-th image is explained, at least 500 if there are so many; images without an
            object or without relevance are left out.
        device: where the model is.

    Returns:
        The mean share over images, in %. None if no image is left, or an operation of the model has no rule.
    """
    assert split.masks is not None
    every, shares = max(1, len(split) // EXPLAINED), []
    for rows in _batches(split, every, fitting(EXPLAINED_AT_ONCE, split.image_shape)):
        images, masks = np.asarray(split.images[rows]), np.asarray(split.masks[rows])
        labels = np.asarray(split.labels[rows]).astype(np.int64)[:, None]
        try:
            batch = explain_batch(model, images, masks, labels, EPSILON, explainer=EXPLAINER, device=device)
        except RelevanceError:
            return None
        sizes = torch.from_numpy(batch.maps[:, 0]).abs().sum(1, keepdim=True)  # (n, 1, h, w)
        objects = as_mask(masks, torch.device("cpu"))
        total = sizes.sum((1, 2, 3))
        known = (total > 0) & objects.any(3).any(2).any(1)
        shares.append(((sizes * objects).sum((1, 2, 3)) / total)[known])
    every_share = torch.cat(shares)
    return 100 * float(every_share.mean()) if len(every_share) else None


def predict(model: Classifier, split: Split, device: torch.device, every: int = 1) -> np.ndarray:
    """Predict the class of every sample, or of every n-th, int64 (N,), by a model in evaluation mode."""
    return answers(model, split, device, every).classes


@torch.no_grad()
def answers(model: Classifier, split: Split, device: torch.device, every: int = 1) -> Answers:
    """Predict the class and its probability of every sample, or of every n-th, by a model in evaluation mode."""
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


def group_scores(correct: np.ndarray, labels: np.ndarray, split: Split, dataset: Dataset) -> dict[str, Any]:
    """Score the answers as a whole, in each group and in the worst pair of a class and a group.

    Args:
        correct: whether each answer is right, bool (N,).
        labels: int64 (N,).
        split, dataset: that of the samples.

    Returns:
        What `evaluate` has for a split, from ``accuracy`` to ``groups``.
    """
    scores, worst_pair, mean = [], None, None
    if split.groups is not None:
        groups = np.asarray(split.groups[:]).astype(np.int64)
        worst_pair = _worst_pair(correct, labels, groups, split, dataset)
        mean = group_mean(groups, labels, correct)
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
        "worst_class_in_group": worst_pair,
        "group_mean": mean,
        "groups": scores,
    }


def _worst_pair(
    correct: np.ndarray, labels: np.ndarray, groups: np.ndarray, split: Split, dataset: Dataset
) -> dict[str, Any]:
    """Score the pair of a class and a group with the lowest accuracy, the worst group of Sagawa et al. (ICLR 2020)."""
    classes = len(dataset.class_names)
    pairs, members, samples = np.unique(classes * groups + labels, return_inverse=True, return_counts=True)
    right = np.bincount(members[correct], minlength=len(pairs))
    worst = int((right / samples).argmin())
    group, label = divmod(int(pairs[worst]), classes)
    return {
        "split": split.name,
        "class": dataset.class_names[label],
        "group": dataset.group_name(group),
        **_proportion(int(right[worst]), int(samples[worst])),
    }


def _score(correct: np.ndarray) -> dict[str, Any]:
    return _proportion(int(correct.sum()), len(correct))


def _proportion(correct: int, samples: int) -> dict[str, Any]:
    low, high = wilson_interval(correct, samples)
    return {"accuracy": 100 * (correct / samples), "interval": [100 * low, 100 * high], "samples": samples}


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the score interval of a proportion (Wilson, JASA 22, 1927), within [0, 1]."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
