"""Any number of models measured side by side on the same test splits: all that a report shows, as plain data.

Not here: how it is shown (`report.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import Dataset, DatasetError, Location, Split, open_dataset
from data.storage import absolute
from options import Message, Option, takes
from pipeline import Classifier, ModelConfig, ModelError, RelevanceError
from pipeline.batch import explain_batch
from pipeline.caching.batches import Batches, fitting
from pipeline.device import pick_device, place
from pipeline.networks.teachers import Brought, Teacher, absolute_teacher
from trainer.loop.methods import METHODS
from trainer.results.evaluation import (
    Answers,
    answers,
    lacks_masks,
    load_with,
    no_masks,
    open_tested,
    score,
    summary,
    tell_untested,
    untested,
)
from trainer.results.options import EPSILON, CompareOptions
from trainer.results.show import distinct, in_units, own_code, spread
from trainer.run_dir import RESULT_FILE, STARTS_FILE, Run

BINS = 15  # of the probability, as in Guo et al.
COMPARED = 256  # images of a split whose maps are compared, at most
WORST = 5
FEW_CLASSES, FREQUENT = 12, 5  # up to so many classes all are explained, else so many of the most frequent ones
EXPLAINER = "flex"
AT_ONCE = 32

Model = str | Path | Brought


@dataclass(frozen=True)
class Calibration:
    """How far probabilities agree with accuracies, by bins (b/15, (b+1)/15] of the probability of the predicted class.

    Attributes:
        samples: the number of samples in each bin, int64 (15,).
        probability: their mean probability, float64 (15,); nan in an empty bin.
        accuracy: their accuracy in [0, 1], float64 (15,); nan in an empty bin.
        error: the expected calibration error in %: the mean over samples of |accuracy − probability| of their bins (Guo
            et al., ICML 2017, equation 3).
    """

    samples: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray
    error: float


@dataclass(frozen=True)
class Case:
    """A sample on which maps differ. ``maps``: the model's and the reference's (h, w), in units of their own means."""

    row: int
    cosine: float
    rank: float
    maps: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How alike the maps of a model and of the reference are, for the true class, summed over channels.

    Attributes:
        cosine: of each sample that has relevance in both maps, float64 (n,).
        rank: Spearman's correlation over the positions, float64 (n,).
        without: the number of samples without relevance in one of the maps.
        worst: the samples of the lowest cosine, the lowest first.
    """

    cosine: np.ndarray
    rank: np.ndarray
    without: int
    worst: tuple[Case, ...]


@dataclass(frozen=True)
class Explained:
    """A model's prediction for a sample, its probability, and maps (h, w) by class, in units of their own means."""

    says: int
    probability: float
    maps: dict[int, np.ndarray]


@dataclass(frozen=True)
class OnSplit:
    """The measurements of a model on a split.

    Attributes:
        score: the result of `evaluate` for this split.
        confusion: int64 (K, K), the true class first and the predicted one second.
        calibration: how far probabilities agree with accuracies.
        gallery: the explained samples, those of `SplitReport.rows`.
        agreement: how alike the maps and the reference's are; None without a reference.
    """

    score: dict[str, Any]
    confusion: np.ndarray
    calibration: Calibration
    gallery: tuple[Explained, ...]
    agreement: Agreement | None


@dataclass(frozen=True)
class Curve:
    """The name of a training's loss, the steps at which it was logged, the losses, and those of the validation."""

    loss: str
    steps: np.ndarray
    losses: np.ndarray
    validation_steps: np.ndarray
    validation_losses: np.ndarray


@dataclass(frozen=True, eq=False)
class ModelReport:
    """The measurements of a model.

    Attributes:
        title: its name on the page.
        config: its configuration.
        totals: the top level of the result of `evaluate`.
        splits: its measurements by split. A split on which it cannot be tested is missing.
        curve: the losses of its training; None without a training.
        unexplained: why it has no maps; None where it has.
        untested: why it is not tested on some splits; None where it is tested on all of them.
        origin: all that is recorded of it, for JSON.
    """

    title: str
    config: ModelConfig
    totals: dict[str, Any]
    splits: dict[str, OnSplit]
    curve: Curve | None
    unexplained: str | None
    untested: str | None
    origin: dict[str, Any]

    @property
    def what(self) -> str:
        """The kind of the model, in a few words."""
        if not self.config.training:
            return "vision-language teacher"
        if self.config.kind == "teacher":
            front = self.config.debias
            return "trained on labels, no front (ERM)" if front == "none" else f"teacher, front {front}"
        return f"student, {loss_name(self.config)}"


@dataclass(frozen=True)
class SplitReport:
    """A split. ``rows`` int64 (n,) are the gallery; ``images`` uint8 (C, H, W) by row, also of the worst cases."""

    name: str
    samples: int
    fingerprint: str
    has_masks: bool
    rows: np.ndarray
    labels: np.ndarray  # int64 (N,), of the whole split
    groups: dict[int, str]
    images: dict[int, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Models on the test splits of a dataset.

    Attributes:
        dataset: the name of the dataset.
        path: its path.
        class_names: its classes.
        splits: its test splits.
        models: the measurements of each model.
        reference: the index of the model with which the others are compared; None without one.
        explained: the classes that every sample of the gallery has a map of.
    """

    dataset: str
    path: str
    class_names: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    models: tuple[ModelReport, ...]
    reference: int | None
    explained: tuple[int, ...]

    def others(self) -> list[ModelReport]:
        """List the models that are compared with the reference."""
        return [model for place, model in enumerate(self.models) if place != self.reference]


@takes(CompareOptions)
def compare(models: Sequence[Model], data: Location | None = None, **options: Any) -> Comparison:
    """Measure models on every test split of a dataset.

    Args:
        models: folders of trainings, or vision-language teachers. A ``reference`` that is none of them is put first.
        data: the dataset; that of the trainings if None.

    Returns:
        The measurements. ``samples`` of each split, evenly spread, are explained.

    Raises:
        DatasetError: there is no such dataset, or the trainings are of different ones.
        ModelError: a model cannot be loaded, is given twice, or there is none, or all of them need masks that no test
            split has.
        RelevanceError: an option is wrong.
    """
    settings = CompareOptions(**options)
    models = _models_to_compare(models, settings.reference)
    dataset = open_tested(recorded_data(models) if data is None else data)
    shape = dataset.test_splits[0].image_shape
    teachers = [load_with(model, dataset, shape, code) for model, code in own_code(models, settings)]
    reference = _reference(models, teachers, settings.reference, dataset)
    device = pick_device(settings.device)
    measuring = _Measuring(dataset, settings.samples, device, compares=reference is not None and len(models) > 1)
    titles = distinct(
        [str(each) if isinstance(each, Brought) else each.name for each in map(_identity, models)], models
    )
    tell_untested([(title, teacher.model) for title, teacher in zip(titles, teachers, strict=True)], dataset)
    reports: dict[int, ModelReport] = {}
    order = sorted(range(len(models)), key=lambda number: number != reference)  # the reference first
    with tqdm(total=len(models) * len(dataset.test_splits), unit="split", disable=None, desc="report") as bar:
        for number in order:
            splits, unexplained = measuring.measure(teachers[number], number == reference, bar)
            reports[number] = ModelReport(
                title=titles[number],
                config=teachers[number].config,
                totals=_totals(splits, dataset),
                splits=splits,
                curve=_curve(models[number], teachers[number].config),
                unexplained=unexplained,
                untested=_why_untested(titles[number], teachers[number].model, dataset),
                origin=_origin(models[number], teachers[number], dataset),
            )
    return measuring.comparison(tuple(reports[number] for number in range(len(models))), reference)


# --- what is compared ---------------------------------------------------------------------------------------


def _models_to_compare(models: Sequence[Model], reference: Model | None) -> list[Model]:
    """List the models with the reference. Raises ModelError where there are none, or one is given twice."""
    models = list(models)
    if reference is not None and _identity(reference) not in map(_identity, models):
        models.insert(0, reference)
    if not models:
        raise ModelError(
            Message("there is no model to report: give the folder of a training, or several, or a ", Option("teacher"))
        )
    identities = [_identity(model) for model in models]
    if twice := next((model for model in models if identities.count(_identity(model)) > 1), None):
        raise ModelError(f"the model {twice} is given twice: give each model once")
    return models


def recorded_data(models: Sequence[Model]) -> Location:
    """Find the dataset on which models were trained, if it is unchanged.

    Raises:
        DatasetError: the models were trained on different datasets, or the dataset is no longer there.
        ModelError: a folder holds no training.
    """
    configs = {Path(model): Run(Path(model)).config for model in models if not isinstance(model, Brought)}
    if not configs:
        raise DatasetError(Message("a vision-language teacher knows no dataset: give ", Option("data")))
    first, fingerprint = next((path, config.dataset["fingerprint"]) for path, config in configs.items())
    for path, config in configs.items():
        if config.dataset["fingerprint"] != fingerprint:
            raise DatasetError(
                Message(
                    f"{first} was trained on the dataset with the fingerprint {fingerprint[:12]}, {path} on another, "
                    f"{config.dataset['fingerprint'][:12]}: give ",
                    Option("data"),
                    ", the dataset to compare them on",
                )
            )
    locations = [data for path in configs for data in Run(path).datasets]
    for data in dict.fromkeys(locations):
        try:
            if open_dataset(data).split("train").fingerprint == fingerprint:
                return data
        except DatasetError:
            continue
    where = f"no longer at {locations[0]}" if locations else f"not named in its {STARTS_FILE}"
    raise DatasetError(
        Message(
            f"the dataset on which {first} was trained (fingerprint {fingerprint[:12]}) is {where}: give ",
            Option("data"),
            ", the dataset to compare on",
        )
    )


def _identity(model: Model) -> Path | Brought:
    """Return what two names of one model have in common."""
    return model if isinstance(model, Brought) else Path(model).resolve()


def _reference(
    models: Sequence[Model], teachers: Sequence[Teacher], reference: Model | None, dataset: Dataset
) -> int | None:
    """Find the model whose heatmaps the others' are compared with; None without a teacher that is free of bias.

    A teacher that cannot be tested on any split is the reference only if it is asked for.
    """
    if reference is not None:
        return [_identity(model) for model in models].index(_identity(reference))
    for number, teacher in enumerate(teachers):
        if all(lacks_masks(teacher.model, split) for split in dataset.test_splits):
            continue
        if teacher.config.kind == "teacher" and (teacher.config.debias != "none" or not teacher.config.training):
            return number
    return None


def _totals(splits: dict[str, OnSplit], dataset: Dataset) -> dict[str, Any]:
    """Put the scores of all splits together, as `evaluate` does."""
    tests = dataset.test_splits
    return summary({each.name: splits[each.name].score if each.name in splits else untested(each) for each in tests})


def _why_untested(title: str, model: Classifier, dataset: Dataset) -> str | None:
    split_names = [split.name for split in dataset.test_splits if lacks_masks(model, split)]
    return no_masks(title, split_names) if split_names else None


def _classes_to_explain(dataset: Dataset) -> tuple[int, ...]:
    classes = len(dataset.class_names)
    if classes <= FEW_CLASSES:
        return tuple(range(classes))
    times = sum(np.bincount(np.asarray(split.labels[:]), minlength=classes) for split in dataset.test_splits)
    return tuple(np.argsort(-np.asarray(times), kind="stable")[:FREQUENT].tolist())


class _Samples:
    """Read a split's samples once: those of the gallery, and those whose maps are compared."""

    def __init__(self, split: Split, dataset: Dataset, samples: int):
        self.split, self.dataset = split, dataset
        self.labels = np.asarray(split.labels[:]).astype(np.int64)
        self.rows, self.compared_rows = (spread(len(split), many) for many in (samples, COMPARED))
        self.gallery, self.compared = self._read(self.rows), self._read(self.compared_rows)

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        masks = None if self.split.masks is None else np.asarray(self.split.masks.oindex[rows])
        return np.asarray(self.split.images.oindex[rows]), masks

    def report(self, models: Sequence[ModelReport]) -> SplitReport:
        """Describe the split, with the images of the worst cases of all models."""
        measured = [model.splits[self.split.name] for model in models if self.split.name in model.splits]
        worst = {case.row for on in measured if on.agreement is not None for case in on.agreement.worst}
        images = dict(zip(self.rows.tolist(), self.gallery[0], strict=True))
        compared = self.compared_rows.tolist()
        images |= {row: self.compared[0][compared.index(row)] for row in worst - set(images)}
        groups = {}
        if self.split.groups is not None:
            of_all = np.asarray(self.split.groups[:])
            groups = {row: self.dataset.group_name(int(of_all[row])) for row in images}
        return SplitReport(
            name=self.split.name,
            samples=len(self.split),
            fingerprint=self.split.fingerprint,
            has_masks=self.split.masks is not None,
            rows=self.rows,
            labels=self.labels,
            groups=groups,
            images=images,
        )


# --- what is measured ---------------------------------------------------------------------------------------


class _Measuring:
    """Measure models on the test splits of a dataset, the reference before the others.

    ``compares``: whether maps are compared with those of a reference.
    """

    def __init__(self, dataset: Dataset, samples: int, device: torch.device, *, compares: bool):
        self.dataset, self.device, self.compares = dataset, device, compares
        self.explained = _classes_to_explain(dataset)
        self.samples: dict[str, _Samples] = {}
        self.reference_maps: dict[str, np.ndarray] = {}  # by split, float32 (n, h, w)
        for split in dataset.test_splits:
            split.verify()
            self.samples[split.name] = _Samples(split, dataset, samples)

    def measure(self, teacher: Teacher, is_reference: bool, bar: tqdm) -> tuple[dict[str, OnSplit], str | None]:
        """Measure a model, which is on the CPU before and after.

        Returns:
            Its measurements by split, but for splits without the masks that it needs, and why it has no maps; None
            where it has.
        """
        model, splits, unexplained = teacher.model, {}, None
        place(model, self.device)
        for split in self.dataset.test_splits:
            if lacks_masks(model, split):
                bar.update()
                continue
            samples, predictions = self.samples[split.name], answers(model, split, self.device)
            gallery, agreement = _without_maps(samples, predictions), None
            try:
                gallery = _gallery(model, samples, predictions, self.explained, self.device)
                agreement = self._agreement(model, samples, is_reference)
            except RelevanceError as error:
                unexplained = str(error)
            splits[split.name] = OnSplit(
                score=score(model, split, self.dataset, predictions, self.device),
                confusion=confusion(samples.labels, predictions.classes, len(self.dataset.class_names)),
                calibration=calibration(predictions.probabilities, predictions.classes == samples.labels),
                gallery=gallery,
                agreement=agreement,
            )
            bar.update()
        model.cpu()
        return splits, unexplained

    def _agreement(self, model: Classifier, samples: _Samples, is_reference: bool) -> Agreement | None:
        """Compare the maps with the reference's, or keep those of the reference. Raises RelevanceError."""
        if not self.compares:
            return None
        labels = samples.labels[samples.compared_rows][:, None]
        maps = explain_samples(model, *samples.compared, labels, self.device)[:, 0]
        if is_reference:
            self.reference_maps[samples.split.name] = maps
        elif samples.split.name in self.reference_maps:
            return agree(maps, self.reference_maps[samples.split.name], samples.compared_rows)
        return None

    def comparison(self, reports: tuple[ModelReport, ...], reference: int | None) -> Comparison:
        """Put the measurements of all models together."""
        return Comparison(
            dataset=self.dataset.name,
            path=str(absolute(self.dataset.path)),
            class_names=self.dataset.class_names,
            splits=tuple(self.samples[split.name].report(reports) for split in self.dataset.test_splits),
            models=reports,
            reference=reference if self.reference_maps else None,
            explained=self.explained,
        )


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the samples by their true class and their predicted class, int64 (K, K)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def calibration(probabilities: np.ndarray, correct: np.ndarray) -> Calibration:
    """Measure how far probabilities agree with accuracies.

    Args:
        probabilities: of the predicted classes, float (N,).
        correct: whether the predictions are right, bool (N,).
    """
    inner = np.arange(1, BINS) / BINS
    bins = np.searchsorted(inner, probabilities, side="left")  # a bin contains its upper end
    samples = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        probability, accuracy = (
            np.bincount(bins, weights=np.asarray(values, np.float64), minlength=BINS) / samples
            for values in (probabilities, correct)
        )
    error = np.nansum(samples * np.abs(accuracy - probability)) / samples.sum()
    return Calibration(samples, probability, accuracy, 100 * float(error))


def explain_samples(
    model: Classifier, images: np.ndarray, masks: np.ndarray | None, classes: np.ndarray, device: torch.device
) -> np.ndarray:
    """Explain some classes of each image by LRP-Flex with ε = 0.1.

    Args:
        model: a classifier on the device.
        images: uint8 (n, C, H, W).
        masks: uint8 (n, 1, H, W), or None.
        classes: int64 (n, T).
        device: where the model is.

    Returns:
        Maps, summed over channels: float32 (n, T, H, W).

    Raises:
        RelevanceError: an operation of the model has no rule.
    """

    def explain(rows: slice) -> np.ndarray:
        of_rows = None if masks is None else masks[rows]
        batch = explain_batch(model, images[rows], of_rows, classes[rows], EPSILON, explainer=EXPLAINER, device=device)
        return batch.maps.sum(2)

    return np.concatenate(Batches(fitting(AT_ONCE, images.shape), given=False).run(len(images), explain))


def _without_maps(samples: _Samples, predictions: Answers) -> tuple[Explained, ...]:
    """Make a gallery without maps."""
    return tuple(
        Explained(int(predictions.classes[row]), float(predictions.probabilities[row]), {}) for row in samples.rows
    )


def _gallery(
    model: Classifier, samples: _Samples, predictions: Answers, explained: tuple[int, ...], device: torch.device
) -> tuple[Explained, ...]:
    fixed = np.tile(np.asarray(explained, np.int64), (len(samples.rows), 1))
    every_class = len(explained) == len(samples.dataset.class_names)
    own = [] if every_class else [samples.labels, predictions.classes]
    classes = np.concatenate([*(each[samples.rows][:, None] for each in own), fixed], 1)
    maps = explain_samples(model, *samples.gallery, classes, device).astype(np.float64)
    return tuple(
        Explained(each.says, each.probability, dict(zip(of, map(in_units, of_sample), strict=True)))
        for each, of, of_sample in zip(_without_maps(samples, predictions), classes.tolist(), maps, strict=True)
    )


def agree(ours: np.ndarray, theirs: np.ndarray, rows: np.ndarray) -> Agreement:
    """Compare a model's maps (n, H, W) with the reference's, of the samples ``rows`` (n,)."""
    flat = [maps.reshape(len(maps), -1).astype(np.float64) for maps in (ours, theirs)]
    cosines, ranks = cosine(*flat), rank_correlation(*flat)
    known = np.isfinite(cosines) & np.isfinite(ranks)
    order = np.flatnonzero(known)[np.argsort(cosines[known], kind="stable")][:WORST]
    worst = tuple(
        Case(
            int(rows[at]),
            float(cosines[at]),
            float(ranks[at]),
            (in_units(ours[at].astype(np.float64)), in_units(theirs[at].astype(np.float64))),
        )
        for at in order
    )
    return Agreement(cosines[known], ranks[known], int((~known).sum()), worst)


def cosine(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Compute the cosine of the angle between each row (n, P) and the other's, (n,); nan where one is all zero."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((ours * theirs).sum(1) / lengths, -1, 1)


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Compute Spearman's correlation of each row (n, P) and the other's, (n,); nan where one is constant."""
    ranks = [np.stack([_average_ranks(row) for row in rows]) for rows in (ours, theirs)]
    return cosine(*(of - of.mean(1, keepdims=True) for of in ranks))


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Rank values from 1 on; equal values have the mean of their ranks."""
    _, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[inverse]


# --- where it is from ---------------------------------------------------------------------------------------


def loss_name(config: ModelConfig) -> str:
    """Name the loss of a training in a few words. Losses of different names have no common unit."""
    terms = config.training.get("loss", {})
    name = " + ".join(each if weight == 1 else f"{weight:g}·{each}" for each, weight in terms.items())
    maps = any(each in METHODS and METHODS[each].explainers for each in terms)
    how = [config.training.get("map_loss", "l1"), *([] if config.training.get("pyramid", True) else ["flat"])]
    how = how if maps and how != ["l1"] else []
    how += ["class weights"] if config.training.get("class_weights") else []
    return name + (f" ({', '.join(how)})" if how else "")


def _curve(model: Model, config: ModelConfig) -> Curve | None:
    """Read the losses of a training from its metrics; None where there are none."""
    if isinstance(model, Brought):
        return None
    points: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_loss": []}
    for line in Run(Path(model)).metrics:
        for name, of_name in points.items():
            if isinstance(line.get(name), int | float) and isinstance(line.get("step"), int):
                of_name.append((line["step"], line[name]))
    if not points["loss"]:
        return None
    of_train, of_validation = (np.array(of_name, np.float64).reshape(-1, 2).T for of_name in points.values())
    return Curve(loss_name(config), *of_train, *of_validation)


def _origin(model: Model, teacher: Teacher, dataset: Dataset) -> dict[str, Any]:
    """Collect all that is recorded of a model, for JSON."""
    origin: dict[str, Any] = {"model": str(absolute_teacher(model)), "weights_sha256": teacher.sha256, **teacher.record}
    origin["config"] = teacher.config.to_dict()
    if isinstance(model, Brought):
        return origin
    train = dataset.splits.get("train")
    trained_on = teacher.config.dataset.get("fingerprint")
    origin["trained_on_this_dataset"] = train is not None and trained_on == train.fingerprint
    run = Run(Path(model))
    for name, content in ((RESULT_FILE, run.result), (STARTS_FILE, run.starts)):
        if content:
            origin[name] = content
    return origin
