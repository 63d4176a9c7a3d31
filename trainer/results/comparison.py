"""Any number of models measured side by side, on the same test splits: all that a report shows, as plain data.

Not here: what is seen of it (`report.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import Dataset, DatasetError, Location, Split, open_dataset
from data.storage import absolute
from pipeline import Classifier, Forward, ModelConfig, ModelError, RelevanceError, ZeroShot, load_teacher
from pipeline.caching.batches import Batches
from pipeline.device import as_input, as_mask, pick_device, place
from pipeline.networks.classifier import read_config
from pipeline.networks.teachers import Teacher, absolute_teacher
from trainer.loop.methods import METHODS
from trainer.results.evaluation import EPSILON, Answers, answers, open_tested, score, summary
from trainer.results.show import distinct, in_units, own_code, spread

SAMPLES, MOST_SAMPLES = 6, 50
BINS = 15  # of the probability, as in Guo et al.
COMPARED = 256  # images of a split whose maps are compared, at most
WORST = 5
FEW_CLASSES, FREQUENT = 12, 5  # up to so many classes all are explained, else so many of the most frequent ones
EXPLAINER = "flex"
AT_ONCE = 32

Model = str | Path | ZeroShot


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities are what they say. ``error`` is the expected calibration error, in %.

    By bins of the probability p of the class that the model says, (b/15, (b+1)/15]: ``samples`` int64 (15,), their mean
    ``probability`` and the ``accuracy`` of them, in [0, 1], float64 (15,), nan where there are none. The error is the
    mean over samples of |accuracy − probability| of their bins (Guo et al., ICML 2017, equation 3).
    """

    samples: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray
    error: float


@dataclass(frozen=True)
class Case:
    """A sample on which maps differ: both (h, w), in units of their own mean |relevance|, the reference's second."""

    row: int
    cosine: float
    rank: float
    maps: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How alike a model's maps and the reference's are, of the true class, summed over channels.

    ``cosine`` and ``rank``, Spearman's correlation over the positions, float64 (n,), of the samples that have some
    relevance in both maps; of ``without`` others one has none. ``worst``: those of the lowest cosine, it first.
    """

    cosine: np.ndarray
    rank: np.ndarray
    without: int
    worst: tuple[Case, ...]


@dataclass(frozen=True)
class Explained:
    """What a model says of a sample, with which probability; its map (h, w) of some classes, in units of its own."""

    says: int
    probability: float
    maps: dict[int, np.ndarray]


@dataclass(frozen=True)
class OnSplit:
    """A model on a split. ``score`` is what `evaluate` has of it, ``confusion`` int64 (K, K): true, then said.

    ``gallery`` is of the split's ``rows``. ``agreement`` is None of what there is nothing to compare with.
    """

    score: dict[str, Any]
    confusion: np.ndarray
    calibration: Calibration
    gallery: tuple[Explained, ...]
    agreement: Agreement | None


@dataclass(frozen=True)
class Curve:
    """Of a training: steps and the loss at them, and the same of the validation split; what the loss is."""

    loss: str
    steps: np.ndarray
    losses: np.ndarray
    validation_steps: np.ndarray
    validation_losses: np.ndarray


@dataclass(frozen=True, eq=False)
class ModelReport:
    """All of a model. ``totals`` is what `evaluate` has at the top. ``unexplained``: why it has no maps, where so.

    ``origin`` is all that is known of where it is from.
    """

    title: str
    config: ModelConfig
    totals: dict[str, Any]
    splits: dict[str, OnSplit]
    curve: Curve | None
    unexplained: str | None
    origin: dict[str, Any]

    @property
    def what(self) -> str:
        """What kind of model it is, in a few words."""
        if not self.config.training:
            return "vision-language teacher"
        if self.config.kind == "teacher":
            front = self.config.debias
            return "trained on labels, no front (ERM)" if front == "none" else f"teacher, front {front}"
        return f"student, {loss_name(self.config)}"


@dataclass(frozen=True)
class SplitReport:
    """A split. ``rows`` int64 (n,) are in the gallery; ``images`` uint8 (C, H, W) by row, of the worst cases too."""

    name: str
    samples: int
    fingerprint: str
    has_masks: bool
    rows: np.ndarray
    labels: np.ndarray  # int64 (N,), of all of it
    groups: dict[int, str]
    images: dict[int, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Models on the test splits of a dataset. ``reference`` is the place of the model that others are compared with.

    ``explained``: the classes of which there is a map everywhere in the gallery.
    """

    dataset: str
    path: str
    class_names: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    models: tuple[ModelReport, ...]
    reference: int | None
    explained: tuple[int, ...]

    def others(self) -> list[ModelReport]:
        """The models that are compared with the reference."""
        return [model for place, model in enumerate(self.models) if place != self.reference]


def compare(
    models: Sequence[Model],
    data: Location | None = None,
    *,
    reference: Model | None = None,
    samples: int = SAMPLES,
    student_factory: str | None = None,
    segmenter: str | None = None,
    device: str = "auto",
) -> Comparison:
    """Measure models on every test split of a dataset, without ``data`` of the one that they were trained on.

    ``reference`` is the model that heatmaps are compared with, one more where it is none of them; without it the
    first teacher behind a debiasing front, or that is a vision-language one. ``samples`` of each split, evenly spread,
    are explained. ``student_factory`` and ``segmenter`` as in `pipeline.load_teacher`.

    Raises DatasetError, ModelError, RelevanceError; OSError.
    """
    models = list(models)
    if reference is not None and _identity(reference) not in map(_identity, models):
        models.insert(0, reference)
    if not models:
        raise ModelError("there is nothing to report on: give the folder of a training, or several, or a --teacher")
    identities = [_identity(model) for model in models]
    if twice := next((model for model in models if identities.count(_identity(model)) > 1), None):
        raise ModelError(f"{twice} was given twice: give each model once")
    if not 1 <= samples <= MOST_SAMPLES:
        raise RelevanceError(f"a report shows 1 to {MOST_SAMPLES} samples of each split, not {samples}")
    dataset = open_tested(recorded_data(models) if data is None else data)
    shape = dataset.test_splits[0].image_shape
    loaded = [
        load_teacher(model, dataset.class_names, shape, student_factory=factory, segmenter=masker)
        for model, (factory, masker) in own_code(models, student_factory, segmenter)
    ]
    compared_with = _reference(identities, loaded, reference)
    titles = distinct([str(each) if isinstance(each, ZeroShot) else each.name for each in identities], models)

    torch_device = pick_device(device)
    explained, prepared = _classes_to_explain(dataset), {}
    for split in dataset.test_splits:
        split.verify()
        prepared[split.name] = _Samples(split, dataset, samples)
    measured: dict[int, ModelReport] = {}
    order = sorted(range(len(models)), key=lambda number: number != compared_with)  # the reference first
    with tqdm(total=len(models) * len(prepared), unit="split", disable=None, desc="report") as bar:
        maps: dict[str, np.ndarray] = {}  # the reference's
        for number in order:
            found = loaded[number]
            place(found.model, torch_device)
            splits, unexplained = {}, None
            for split in dataset.test_splits:
                shown, said = prepared[split.name], answers(found.model, split, torch_device)
                gallery, agreement = _only_said(shown, said), None
                try:
                    gallery = _gallery(found.model, shown, said, explained, torch_device)
                    if compared_with is not None and len(models) > 1:
                        ours = explain_samples(
                            found.model, *shown.compared, shown.labels[shown.compared_rows][:, None], torch_device
                        )[:, 0]
                        if number == compared_with:
                            maps[split.name] = ours
                        elif split.name in maps:
                            agreement = agree(ours, maps[split.name], shown.compared_rows)
                except RelevanceError as error:
                    unexplained = str(error)
                splits[split.name] = OnSplit(
                    score=score(found.model, split, dataset, said, torch_device),
                    confusion=confusion(shown.labels, said.classes, len(dataset.class_names)),
                    calibration=calibration(said.probabilities, said.classes == shown.labels),
                    gallery=gallery,
                    agreement=agreement,
                )
                bar.update()
            found.model.cpu()
            measured[number] = ModelReport(
                title=titles[number],
                config=found.config,
                totals=summary({name: on.score for name, on in splits.items()}),
                splits=splits,
                curve=_curve(models[number], found.config),
                unexplained=unexplained,
                origin=_origin(models[number], found, dataset),
            )
    if compared_with is not None and not maps:
        compared_with = None
    reports = tuple(measured[number] for number in range(len(models)))
    return Comparison(
        dataset=dataset.name,
        path=str(absolute(dataset.path)),
        class_names=dataset.class_names,
        splits=tuple(prepared[split.name].report(reports) for split in dataset.test_splits),
        models=reports,
        reference=compared_with,
        explained=explained,
    )


# --- what is compared ---------------------------------------------------------------------------------------


def recorded_data(models: Sequence[Model]) -> Location:
    """The dataset that trainings say they learnt from, if it is still what it was.

    Raises DatasetError where they say different ones, or it is not there; ModelError for a folder without a training.
    """
    runs = {Path(model): read_config(Path(model)) for model in models if not isinstance(model, ZeroShot)}
    if not runs:
        raise DatasetError("a vision-language teacher knows no dataset: give --data")
    first, wanted = next((run, config.dataset["fingerprint"]) for run, config in runs.items())
    for run, config in runs.items():
        if config.dataset["fingerprint"] != wanted:
            raise DatasetError(
                f"{first} was trained on the dataset with the fingerprint {wanted[:12]}, {run} on another, "
                f"{config.dataset['fingerprint'][:12]}: give --data, the one to compare them on"
            )
    named = [data for run in runs for data in _recorded(run)]
    for data in dict.fromkeys(named):
        try:
            if open_dataset(data).split("train").fingerprint == wanted:
                return data
        except DatasetError:
            continue
    where = f"at {named[0]}, as when it was trained" if named else "named in its starts.jsonl"
    raise DatasetError(
        f"the dataset that {first} was trained on (fingerprint {wanted[:12]}) is not {where}: give --data, the dataset "
        "to compare on"
    )


def _recorded(run: Path) -> list[str]:
    """Where its dataset was when it was last begun: as it was given, and beside the training's folder."""
    try:
        data = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [data] if "://" in data or Path(data).is_absolute() else [data, str(run.absolute().parent / data)]


def _identity(model: Model) -> Path | ZeroShot:
    """By which a model is known to be the same."""
    return model if isinstance(model, ZeroShot) else Path(model).resolve()


def _reference(identities: Sequence[Path | ZeroShot], loaded: Sequence[Teacher], asked: Model | None) -> int | None:
    """The place of the model whose heatmaps the others' are compared with; None without one that is free of bias."""
    if asked is not None:
        return identities.index(_identity(asked))
    for number, found in enumerate(loaded):
        if found.config.kind == "teacher" and (found.config.debias != "none" or not found.config.training):
            return number
    return None


def _classes_to_explain(dataset: Dataset) -> tuple[int, ...]:
    classes = len(dataset.class_names)
    if classes <= FEW_CLASSES:
        return tuple(range(classes))
    times = sum(np.bincount(np.asarray(split.labels[:]), minlength=classes) for split in dataset.test_splits)
    return tuple(np.argsort(-np.asarray(times), kind="stable")[:FREQUENT].tolist())


class _Samples:
    """A split's samples that are explained, read once: those of the gallery, and those that are compared."""

    def __init__(self, split: Split, dataset: Dataset, samples: int):
        self.split, self.dataset = split, dataset
        self.labels = np.asarray(split.labels[:]).astype(np.int64)
        self.rows, self.compared_rows = (spread(len(split), many) for many in (samples, COMPARED))
        self.shown, self.compared = self._read(self.rows), self._read(self.compared_rows)

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        masks = None if self.split.masks is None else np.asarray(self.split.masks.oindex[rows])
        return np.asarray(self.split.images.oindex[rows]), masks

    def report(self, models: Sequence[ModelReport]) -> SplitReport:
        """With the images of the worst cases of all models."""
        found = [model.splits[self.split.name].agreement for model in models]
        worst = {case.row for agreement in found if agreement is not None for case in agreement.worst}
        images = dict(zip(self.rows.tolist(), self.shown[0], strict=True))
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


def confusion(labels: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """How often samples of a class were said to be of which, int64 (K, K)."""
    return np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)


def calibration(probabilities: np.ndarray, correct: np.ndarray) -> Calibration:
    """Of what a model said: the probability of its class, (N,), and whether that was right, (N,)."""
    inner = np.arange(1, BINS) / BINS
    bins = np.searchsorted(inner, probabilities, side="left")  # a bin has its upper end
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
    """LRP-Flex maps, ε = 0.1, of some classes (n, T) of each image, summed over channels: float32 (n, T, H, W).

    images: uint8 (n, C, H, W); masks: uint8 (n, 1, H, W) or None. Raises RelevanceError.
    """

    def explain(batch: slice) -> np.ndarray:
        of_batch = None if masks is None else as_mask(masks[batch], device)
        forward = Forward(model, as_input(images[batch], device), EXPLAINER, of_batch)
        maps = []
        for column in range(classes.shape[1]):
            targets = torch.from_numpy(classes[batch, column].copy()).to(device)
            last = column == classes.shape[1] - 1
            maps.append(forward.maps(targets, EPSILON, keep_graph=not last).detach().sum(1).float().cpu())
        return torch.stack(maps, 1).numpy()

    return np.concatenate(Batches(AT_ONCE, given=False).run(len(images), explain))


def _only_said(shown: _Samples, said: Answers) -> tuple[Explained, ...]:
    """A gallery without maps."""
    return tuple(Explained(int(said.classes[row]), float(said.probabilities[row]), {}) for row in shown.rows)


def _gallery(
    model: Classifier, shown: _Samples, said: Answers, explained: tuple[int, ...], device: torch.device
) -> tuple[Explained, ...]:
    fixed = np.tile(np.asarray(explained, np.int64), (len(shown.rows), 1))
    own = [] if len(explained) == len(shown.dataset.class_names) else [shown.labels, said.classes]
    classes = np.concatenate([*(each[shown.rows][:, None] for each in own), fixed], 1)
    maps = explain_samples(model, *shown.shown, classes, device).astype(np.float64)
    return tuple(
        Explained(each.says, each.probability, dict(zip(of, map(in_units, found), strict=True)))
        for each, of, found in zip(_only_said(shown, said), classes.tolist(), maps, strict=True)
    )


def agree(ours: np.ndarray, theirs: np.ndarray, rows: np.ndarray) -> Agreement:
    """How alike two models' maps (n, H, W) of the samples ``rows`` (n,) are."""
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
    """Of the angles between rows (n, P) of the one and the other, (n,); nan where one is all zero."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((ours * theirs).sum(1) / lengths, -1, 1)


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Spearman's, of rows (n, P) of the one and the other, (n,); nan where the values of one are all alike."""
    ranks = [np.stack([_average_ranks(row) for row in rows]) for rows in (ours, theirs)]
    return cosine(*(of - of.mean(1, keepdims=True) for of in ranks))


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equal values have the mean of theirs."""
    _, inverse, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[inverse]


# --- where it is from ---------------------------------------------------------------------------------------


def loss_name(config: ModelConfig) -> str:
    """What the loss of a training was, in a few words; losses of different names have no common unit."""
    terms = config.training.get("loss", {})
    name = " + ".join(each if weight == 1 else f"{weight:g}·{each}" for each, weight in terms.items())
    maps = any(each in METHODS and METHODS[each].explainers for each in terms)
    how = [config.training.get("map_loss", "l1"), *([] if config.training.get("pyramid", True) else ["flat"])]
    return name + (f" ({', '.join(how)})" if maps and how != ["l1"] else "")


def _curve(model: Model, config: ModelConfig) -> Curve | None:
    """What ``metrics.jsonl`` has of a training; None where there is none."""
    if isinstance(model, ZeroShot):
        return None
    found: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_loss": []}
    for line in _json_lines(Path(model) / "metrics.jsonl"):
        for name, points in found.items():
            if isinstance(line.get(name), int | float) and isinstance(line.get("step"), int):
                points.append((line["step"], line[name]))
    if not found["loss"]:
        return None
    of_train, of_validation = (np.array(points, np.float64).reshape(-1, 2).T for points in found.values())
    return Curve(loss_name(config), *of_train, *of_validation)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be read."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _origin(model: Model, found: Teacher, dataset: Dataset) -> dict[str, Any]:
    """All that is known of a model, for JSON."""
    origin: dict[str, Any] = {"model": str(absolute_teacher(model)), "weights_sha256": found.sha256, **found.record}
    origin["config"] = found.config.to_dict()
    if isinstance(model, ZeroShot):
        return origin
    trained_on = found.config.dataset.get("fingerprint")
    train = dataset.splits.get("train")
    origin["trained_on_this_dataset"] = train is not None and trained_on == train.fingerprint
    for name in ("result.json", "starts.jsonl"):
        lines = _json_lines_or_file(Path(model) / name)
        if lines:
            origin[name] = lines
    return origin


def _json_lines_or_file(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return _json_lines(path)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
