"""Which explainer has the best maps by Quantus's metrics, and so which should be the teacher's default?

    pip install -e ".[data,quality]" && python benchmarks/quality.py --work FOLDER

The metrics are Quantus's implementations (LGPL-3.0-or-later, called and not copied). The maps are ours. Four networks
of one architecture are explained on OOD images: the teacher, which sees the object alone; a student of its flex maps;
an ERM baseline, which learnt the background; and ERM with other backgrounds, which learnt the object and no map. For
the last two it is known where relevance belongs. Two controls, noise and the image itself, show what a metric is
worth. The tests are not those of the benchmarks (`worlds.py`). What `results.jsonl` has is not measured again.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import quantus
import torch
from quantus.functions.similarity_func import correlation_spearman
from report import once, processor, read_results, table
from torch import Tensor, nn
from worlds import HIGH, STEPS, WORLDS, Place

from data import Dataset, DatasetWriter, open_dataset
from pipeline import Classifier, explain, load_classifier
from pipeline.device import as_input, as_mask
from pipeline.networks.homogeneous import ScaleNorm
from trainer import train_student, train_teacher
from trainer.loop.repainting import repaint

CPU, AT_ONCE = torch.device("cpu"), 50
ON, TEACHER, ERM, OTHERS = ("grounds", "textures"), "teacher", "ERM", "ERM, other backgrounds"
MUON = {"optimizer": "muon", "lr": 1e-2}
LONGER = 1000  # steps, as the object alone is harder to learn
REPAINTED = 1000  # images at once, and OOD images that show how far a network depends on backgrounds
FLIPS, RUNS, SUBSET = 8, 30, 0.1  # flips of a channel; the subset is a share of all values
NOISE, NOISES = 0.02, 3  # of the images, in [0, 1]


# --- maps -------------------------------------------------------------------------------------------------------------


class Subject(nn.Module):
    """A classifier with the masks of its images, which Quantus does not hand on: (N, C, H, W) → logits (N, K)."""

    masks: Tensor

    def __init__(self, classifier: Classifier, masks: Tensor):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("masks", masks)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images, self.masks)


Maps = Callable[[Subject, Tensor, Tensor], Tensor]  # of images (N, C, H, W) and classes (N,): (N, C, H, W)


def _relevance(rules: str, epsilon: float, model: Subject, images: Tensor, classes: Tensor) -> Tensor:
    return explain(model, images, classes, epsilon, rules=rules)[1]


def _noise(model: Subject, images: Tensor, classes: Tensor) -> Tensor:
    return torch.randn_like(images)


def _image(model: Subject, images: Tensor, classes: Tensor) -> Tensor:
    """Return what the network sees, as if each value had a gradient of 1."""
    return model.classifier.front(images, model.masks)


CONTROLS: dict[str, Maps] = {"noise": _noise, "the image": _image}
MAPS: dict[str, Maps] = {
    **{f"flex, ε = {epsilon:g}": partial(_relevance, "flex", epsilon) for epsilon in (0.01, 0.1, 1.0)},
    "gradient-x-input": partial(_relevance, "gradient-x-input", 0.0),
    "gamma, ε = 0.1": partial(_relevance, "gamma", 0.1),
    "epsilon-plus, ε = 0.1": partial(_relevance, "epsilon-plus", 0.1),
    **CONTROLS,
}


# --- metrics ----------------------------------------------------------------------------------------------------------


def _reset(norm: ScaleNorm) -> None:
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.running_second_moment.fill_(1)


@dataclass(frozen=True)
class Case:
    """Up to `AT_ONCE` images, the class that the network says of each, and the maps of these classes."""

    model: Subject
    images: np.ndarray  # (n, C, H, W) float32 in [0, 1]
    classes: np.ndarray  # (n,) int64
    masks: np.ndarray  # (n, 1, H, W) bool
    maps: np.ndarray  # (n, C, H, W) float32
    explain: Callable[..., np.ndarray]
    num_classes: int

    def call(self, metric: quantus.Metric, maps: np.ndarray | None = None, **options: Any) -> Any:
        """Apply a metric of Quantus to the maps, or to others."""
        return metric(
            model=self.model, x_batch=self.images, y_batch=self.classes, a_batch=self.maps if maps is None else maps,
            s_batch=self.masks, explain_func=self.explain, channel_first=True, batch_size=len(self.images), **options,
        )  # fmt: skip

    @cached_property
    def flipped(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean probability, (n,), while values are set to 0, the most relevant first, and the least relevant first.

        Quantus's own area under the curve needs ``numpy.trapz``, which NumPy 2.4 does not have.
        """
        at_once = self.images[0, 0].size // FLIPS
        metric = quantus.PixelFlipping(features_in_step=at_once, perturb_baseline=0.0, **PLAIN)
        most, least = (np.mean(self.call(metric, maps, softmax=True), 1) for maps in (self.maps, -self.maps))
        return most, least

    @cached_property
    def randomised(self) -> np.ndarray:
        """Rank correlations with the maps of the network when all its weights are random: signed, and sizes, (n, 2)."""
        metric = quantus.MPRT(_signed_and_sizes, skip_layers=True, **PLAIN)
        # MPRT resets the modules that have this method, as batch norms do
        with mock.patch.object(ScaleNorm, "reset_parameters", _reset, create=True):
            *_, last = self.call(metric).values()
        return np.array(last)


# Quantus would divide all maps by one maximum, that of the whole batch
PLAIN: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True, "return_aggregate": False}


def _faithfulness(case: Case) -> np.ndarray:
    size = round(SUBSET * case.images[0].size)
    metric = quantus.FaithfulnessCorrelation(nr_runs=RUNS, subset_size=size, perturb_baseline=0.0, **PLAIN)
    return case.call(metric)


def _flipping(case: Case) -> np.ndarray:
    return case.flipped[0]


def _flipping_both(case: Case) -> np.ndarray:
    return case.flipped[1] - case.flipped[0]


def _localisation(metric: type[quantus.Metric], case: Case) -> np.ndarray:
    sizes = np.abs(case.maps).sum(1, keepdims=True)  # of a pixel; signed channels may cancel
    return case.call(metric(**PLAIN), sizes)


def _signed_and_sizes(one: np.ndarray, other: np.ndarray, batched: bool) -> np.ndarray:
    """Return the rank correlations of two maps and of their sizes, (n, 2)."""
    pairs = ((one, other), (np.abs(one), np.abs(other)))
    return np.stack([correlation_spearman(*pair, batched=batched) for pair in pairs], axis=1)


def _randomised(column: int, case: Case) -> np.ndarray:
    return case.randomised[:, column]


def _other_class(case: Case) -> np.ndarray:
    metric = quantus.RandomLogit(correlation_spearman, num_classes=case.num_classes, **PLAIN)
    return case.call(metric)


def _sensitivity(case: Case) -> np.ndarray:
    return case.call(quantus.AvgSensitivity(nr_samples=NOISES, lower_bound=NOISE, **PLAIN))


@dataclass(frozen=True)
class Metric:
    """A score of each image.

    Attributes:
        of: the scores by Quantus, (n,).
        better: whether more (+1) or less (−1) is better.
        behind_masks: whether it means anything for a network that sees the object alone.
        sign: whether its sign counts. A map that changes its sign alone has kept its shape, and the mean of
            correlations of both signs would hide it.
    """

    of: Callable[[Case], np.ndarray]
    better: int
    behind_masks: bool = True
    sign: bool = True


MASS = "mass in mask"
METRICS = {
    "faithfulness correlation": Metric(_faithfulness, 1),
    "flipping, most first": Metric(_flipping, -1),
    "flipping, least − most first": Metric(_flipping_both, 1),
    MASS: Metric(partial(_localisation, quantus.RelevanceMassAccuracy), 1, behind_masks=False),
    "pointing game": Metric(partial(_localisation, quantus.PointingGame), 1, behind_masks=False),
    "random weights, size of ρ": Metric(partial(_randomised, 0), -1, sign=False),
    "random weights, ρ of sizes": Metric(partial(_randomised, 1), -1, behind_masks=False),
    "another class, size of ρ": Metric(_other_class, -1, sign=False),
    "sensitivity": Metric(_sensitivity, -1),
}
LOCALISATION = {MASS, "pointing game"}


# --- networks ---------------------------------------------------------------------------------------------------------


def _other_backgrounds(dataset: Dataset, path: Path) -> Dataset:
    """Write the training images, each before a background that tells nothing of its class."""
    if not path.exists():
        split, images = dataset.split("train"), []
        for first in range(0, len(split), REPAINTED):
            before, masks = _inputs(dataset, "train", slice(first, first + REPAINTED))
            after = repaint(before, masks, seed=0, step=0, first=first, of=len(split), share=1.0)
            images.append((255 * after).round().to(torch.uint8).numpy())
        with DatasetWriter(path) as writer:
            writer.write_split("train", images=np.concatenate(images), labels=np.asarray(split.labels[:]))
            writer.finish(name=f"{dataset.name}, other backgrounds", class_names=list(dataset.class_names))
    return open_dataset(path)


def _inputs(dataset: Dataset, name: str, rows: slice) -> tuple[Tensor, Tensor]:
    split = dataset.split(name)
    return as_input(np.asarray(split.images[rows]), CPU), as_mask(np.asarray(split.masks[rows]), CPU)


def _teacher(place: Place) -> Path:
    return place.teacher()


def _student(place: Place) -> Path:
    folder = place.folder / "student"
    if not (folder / "result.json").exists():
        options = {"steps": STEPS, "augment": (), **MUON, **place.world.student, "threads": place.threads}
        train_student(place.dataset().path, place.cache(HIGH), folder, **options)
    return folder


def _erm(place: Place, other_backgrounds: bool = False) -> Path:
    dataset, folder = place.dataset(), place.folder / ("other-backgrounds" if other_backgrounds else "erm")
    if other_backgrounds:
        dataset = _other_backgrounds(dataset, place.folder / "other-backgrounds.zarr")
    if not (folder / "result.json").exists():
        longer = {"steps": LONGER, **MUON} if other_backgrounds else {"steps": STEPS}
        options = {"debias": "none", **longer, **place.world.student, "threads": place.threads}
        train_teacher(dataset.path, folder, **options)
    return folder


NETWORKS: dict[str, Callable[[Place], Path]] = {
    TEACHER: _teacher,
    "student": _student,
    ERM: _erm,
    OTHERS: partial(_erm, other_backgrounds=True),
}


@torch.no_grad()
def facts(model: Classifier, dataset: Dataset) -> dict[str, float]:
    """Return the accuracy on OOD, how often the answer stays before another background, and the masks' area, in %."""
    rows = slice(0, None, max(1, len(dataset.split("ood")) // REPAINTED))
    images, masks = _inputs(dataset, "ood", rows)
    labels = np.asarray(dataset.split("ood").labels[rows])
    others = repaint(images, masks, seed=0, step=1, first=0, of=len(images), share=1.0)
    answers, answers_before_others = (model(each, masks).argmax(1).numpy() for each in (images, others))
    return {
        "accuracy": 100 * float((answers == labels).mean()),
        "same answer": 100 * float((answers == answers_before_others).mean()),
        "masks": 100 * float(masks.mean()),
    }


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(model: Classifier, dataset: Dataset, maps: Maps, images: int) -> dict[str, Any]:
    """Score the maps of evenly spaced OOD images, of the class that the network says: ``scores``, lists by metric."""
    images = min(images, len(dataset.split("ood")))
    every, behind_masks = len(dataset.split("ood")) // images, model.needs_masks
    scores: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}

    def explain_func(model: Subject, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        return maps(model, torch.from_numpy(inputs), torch.from_numpy(targets)).detach().contiguous().numpy()

    for first in range(0, images, AT_ONCE):
        rows = slice(first * every, min(first + AT_ONCE, images) * every, every)
        batch, masks = _inputs(dataset, "ood", rows)
        subject = Subject(model, masks).eval()
        with torch.no_grad():
            classes = subject(batch).argmax(1).numpy()
        torch.manual_seed(first)
        inputs = batch.contiguous().numpy()
        found = explain_func(subject, inputs, classes)
        case = Case(subject, inputs, classes, masks.bool().numpy(), found, explain_func, len(dataset.class_names))
        for name, metric in METRICS.items():
            if metric.behind_masks or not behind_masks:
                np.random.seed(first)  # of which Quantus draws
                with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
                    warnings.simplefilter("ignore")
                    scores[name].append(np.asarray(metric.of(case), np.float64))
    return {"scores": {name: np.concatenate(parts).round(5).tolist() for name, parts in scores.items() if parts}}


# --- tables -----------------------------------------------------------------------------------------------------------


def _interval(values: np.ndarray) -> float:
    """Return half of the 95 % interval of a mean."""
    return 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def _cell(values: np.ndarray, best: np.ndarray | None, better: int) -> str:
    """Write a mean and its interval, bold if it is the best, or the interval of the difference from it includes 0."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    text = f"{known.mean():.2f} ± {_interval(known):.2f}"
    if best is None:
        return text
    differences = better * (best - values)
    differences = differences[np.isfinite(differences)]
    return f"**{text}**" if differences.mean() <= _interval(differences) or not differences.any() else text


def score_table(rows: Mapping[str, Mapping[str, Sequence[float]]], network: str) -> str:
    """Write a line for each explainer, a column for each metric; the controls are never the best."""
    names = [name for name in METRICS if any(name in scores for scores in rows.values())]
    # the background decides for ERM, so less of its relevance in the masks is more faithful
    directions = {name: METRICS[name].better * (-1 if network == ERM and name in LOCALISATION else 1) for name in names}
    columns = []
    for name, better in directions.items():
        values = {maps: np.array(scores[name], np.float64) for maps, scores in rows.items()}
        if not METRICS[name].sign:
            values = {maps: np.abs(each) for maps, each in values.items()}
        columns.append(_column(values, better))
    header = [f"{name} {'↑' if better > 0 else '↓'}" for name, better in directions.items()]
    return table(["maps", *header], [[maps, *(column[maps] for column in columns)] for maps in rows])


def _column(values: Mapping[str, np.ndarray], better: int) -> dict[str, str]:
    ours = [each for maps, each in values.items() if maps not in CONTROLS]
    best = max(ours, key=lambda each: better * np.nanmean(each), default=None)
    return {maps: _cell(each, None if maps in CONTROLS else best, better) for maps, each in values.items()}


def difference_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Write how much more relevance lies in the masks for the network that learnt the object than for ERM."""
    mass = {(r["world"], r["network"], r["maps"]): r["scores"].get(MASS) for r in results}
    worlds = [world for world in ON if all((world, n, maps) in mass for n in (ERM, OTHERS) for maps in MAPS)]
    columns = [
        _column({maps: np.subtract(mass[world, OTHERS, maps], mass[world, ERM, maps]) for maps in MAPS}, 1)
        for world in worlds
    ]
    header = [f"{MASS}, {OTHERS} − {ERM}: {world} ↑" for world in worlds]
    return table(["maps", *header], [[maps, *(column[maps] for column in columns)] for maps in MAPS])


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--world", "only", type=click.Choice(ON), help="Measure one dataset alone.")
@click.option("--images", default=200, show_default=True, type=click.IntRange(2), help="OOD images to explain.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(work: Path, only: str | None, images: int, threads: int) -> None:
    """Score the maps of each network, and print a table for each."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for world in [only] if only else ON:
        place = Place(work / world, WORLDS[world], threads)
        for network, train in NETWORKS.items():
            key = {"world": world, "network": network, "images": images}
            done = {row["maps"] for row in read_results(file, **key)}
            if done >= MAPS.keys():
                continue
            model, dataset = load_classifier(train(place))[0].eval(), place.dataset()
            known = {**key, "facts": facts(model, dataset)}
            for name, maps in MAPS.items():
                once(file, {**known, "maps": name}, partial(measure, model, dataset, maps, images))
    results = read_results(file, images=images)
    print(
        f"PyTorch {torch.__version__}, Quantus {version('quantus')}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, {processor(CPU)}"
    )
    for world in ON:
        for network in NETWORKS:
            rows = [row for row in results if (row["world"], row["network"]) == (world, network)]
            if rows:
                known = ", ".join(f"{name} {value:.1f} %" for name, value in rows[0]["facts"].items())
                scores = {row["maps"]: row["scores"] for row in rows}
                print(f"\n{world}, {network}: {known}\n\n{score_table(scores, network)}")
    print(f"\n{difference_table(results)}")


if __name__ == "__main__":
    main()
