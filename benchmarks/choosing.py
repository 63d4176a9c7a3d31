"""Which number, of the biased validation split alone, tells how good a student is without the bias?

    pip install -e ".[data,benchmarks]" && python benchmarks/choosing.py --work FOLDER

On three datasets, students learn from one teacher by recipes that differ in their loss, their range of ε, optimizer,
length, biases and architecture. Each is measured on the biased validation split, and tested on splits without the
bias. These are not the tests of the benchmarks (`worlds.py`). A training that `results.jsonl` has is not run again.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from report import once, processor, read_results, spearman, table
from torch import Tensor
from worlds import HIGH, LOW, STEPS, WIDE, WORLDS, Place

from data import Dataset
from pipeline import Classifier, explain, load_classifier
from pipeline.device import as_input, as_mask
from trainer.loop.losses import heatmap_loss
from trainer.loop.repainting import repaint
from trainer.results.evaluation import predict

CPU = torch.device("cpu")
TESTS, MEASURED, AT_ONCE = ("ood", "shift"), 1000, 100
EPSILONS = (0.1, 1.0)  # at which the maps of all students are compared


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a student learns: options of `train_student`, and the ε of its store."""

    epsilon_range: tuple[float, float] = HIGH
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = False  # whether the dataset must have masks


_ADAM, _MUON = {"optimizer": "adam", "lr": 4e-3}, {"optimizer": "muon", "lr": 1e-2}
RECIPES = {
    "adam, low ε": Recipe(LOW, _ADAM),
    "adam, high ε": Recipe(HIGH, _ADAM),
    "adam, wide ε": Recipe(WIDE, _ADAM),
    "muon, low ε": Recipe(LOW, _MUON),
    "muon, high ε": Recipe(HIGH, _MUON),
    "muon, high ε, a quarter of the steps": Recipe(HIGH, {**_MUON, "steps": STEPS // 4}),
    "adam, low ε, a quarter of the steps": Recipe(LOW, {**_ADAM, "steps": STEPS // 4}),
    "adam, high ε, a tenth of the rate": Recipe(HIGH, {"optimizer": "adam", "lr": 4e-4}),
    "muon, high ε, with biases": Recipe(HIGH, {**_MUON, "bias_free": False}),
    "muon, high ε, wider": Recipe(HIGH, {**_MUON, "arch_options": {"width": 48}}),
    "muon, high ε, and outputs": Recipe(HIGH, {**_MUON, "loss": "lrp=1,output=0.1"}),
    "muon, high ε, repainted": Recipe(HIGH, {**_MUON, "augment": ("background",)}, masks=True),
    "outputs": Recipe(HIGH, {**_ADAM, "method": "output"}),
    "features": Recipe(HIGH, {**_ADAM, "method": "features"}),
}


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What teacher and student say of n biased images, and their maps: by ε, of the label and of another class."""

    labels: Tensor  # (n,)
    teacher: Tensor  # logits (n, K)
    student: Tensor
    teacher_maps: Mapping[tuple[float, str], Tensor]  # (n, C, H, W)
    student_maps: Mapping[tuple[float, str], Tensor]
    recoloured: Tensor  # the student's logits for recoloured images
    repainted: Tensor | None  # and for images before other backgrounds


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return the mean over the samples of the rank correlation of two maps."""
    ranks = [maps.flatten(1).argsort(1).argsort(1).float() for maps in (one, other)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    return float(F.cosine_similarity(*centred, dim=1).mean())


def _excess(seen: Seen) -> float:
    return float((_right(seen.student, seen.labels) - _right(seen.teacher, seen.labels)).mean())


def _right_where_wrong(seen: Seen) -> float:
    wrong = _right(seen.teacher, seen.labels) == 0
    return float(_right(seen.student, seen.labels)[wrong].mean()) if wrong.any() else 0.0


def _loss(epsilon: float, of: str, seen: Seen) -> float:
    return float(heatmap_loss(seen.student_maps[epsilon, of], seen.teacher_maps[epsilon, of]).mean())


def _rank(epsilon: float, of: str, seen: Seen) -> float:
    return -_rank_correlation(seen.student_maps[epsilon, of], seen.teacher_maps[epsilon, of])


def _sums(epsilon: float, seen: Seen) -> float:
    """Return how far the sums of the student's maps are from the teacher's, per unit of the teacher's."""
    ours, theirs = (maps[epsilon, "label"].sum((1, 2, 3)) for maps in (seen.student_maps, seen.teacher_maps))
    return float((ours - theirs).abs().mean() / theirs.abs().mean())


def _disagreement(seen: Seen) -> float:
    return float((seen.student.argmax(1) != seen.teacher.argmax(1)).float().mean())


def _output_distance(seen: Seen) -> float:
    ours, theirs = seen.student.log_softmax(1), seen.teacher.log_softmax(1)
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


def _recoloured(seen: Seen) -> float:
    return float((seen.recoloured.argmax(1) != seen.student.argmax(1)).float().mean())


def _repainted(seen: Seen) -> float | None:
    if seen.repainted is None:
        return None
    return float((seen.repainted.argmax(1) != seen.teacher.argmax(1)).float().mean())


NUMBERS: dict[str, Callable[[Seen], float | None]] = {  # the larger, the worse a student is expected to be
    "excess over the teacher": _excess,
    "right where the teacher is wrong": _right_where_wrong,
    "disagrees with the teacher": _disagreement,
    "distance of the outputs": _output_distance,
    **{f"heatmap loss, ε = {e:g}": partial(_loss, e, "label") for e in EPSILONS},
    **{f"heatmap loss of another class, ε = {e:g}": partial(_loss, e, "other") for e in EPSILONS},
    **{f"rank correlation of the maps, ε = {e:g}": partial(_rank, e, "label") for e in EPSILONS},
    **{f"distance of the sums, ε = {e:g}": partial(_sums, e) for e in EPSILONS},
    "changes its mind when recoloured": _recoloured,
    "disagrees when repainted": _repainted,
}


def _recolour(images: Tensor) -> Tensor:
    """Exchange and dim the colour channels of each image at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(images), 3, generator=generator).argsort(1)
    gains = 0.4 + 0.6 * torch.rand(len(images), 3, 1, 1, generator=generator)
    return images.gather(1, order[:, :, None, None].expand_as(images)) * gains


def look(teacher: Classifier, student: Classifier, dataset: Dataset) -> Seen:
    """Explain up to a thousand images of the validation split by teacher and student."""
    split, parts = dataset.split("validation"), []
    rng = np.random.default_rng(0)
    for first in range(0, min(MEASURED, len(split)), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        images = as_input(torch.from_numpy(np.asarray(split.images[rows])), CPU)
        masks = None if split.masks is None else as_mask(torch.from_numpy(np.asarray(split.masks[rows])), CPU)
        labels = torch.from_numpy(np.asarray(split.labels[rows]).astype(np.int64))
        classes = len(dataset.class_names)
        others = (labels + torch.from_numpy(rng.integers(1, classes, len(labels)))) % classes
        part: dict[str, Any] = {"labels": labels}
        for who, model in (("teacher", teacher), ("student", student)):
            network = partial(model, masks=masks) if who == "teacher" else model
            for of, target in (("label", labels), ("other", others)):
                for epsilon in EPSILONS:
                    logits, part[who, epsilon, of] = explain(network, images, target, epsilon)
            part[who] = logits
        with torch.no_grad():
            part["recoloured"] = student(_recolour(images))
            if masks is not None:
                at = {"seed": 0, "step": 0, "first": first, "of": MEASURED, "share": 0.5}
                part["repainted"] = student(repaint(images, masks, **at))
        parts.append(part)
    joined = {name: torch.cat([part[name] for part in parts]).detach() for name in parts[0]}
    maps = {
        who: {name[1:]: values for name, values in joined.items() if name[0] == who} for who in ("teacher", "student")
    }
    return Seen(
        joined["labels"], joined["teacher"], joined["student"], maps["teacher"], maps["student"], joined["recoloured"],
        joined.get("repainted"),
    )  # fmt: skip


# --- trainings --------------------------------------------------------------------------------------------------------


def accuracies(model: Classifier, dataset: Dataset, tests: Sequence[str] = TESTS) -> dict[str, float]:
    """Return the accuracy on each test in %."""
    return {
        name: 100 * float((predict(model, split, CPU) == np.asarray(split.labels[:])).mean())
        for name, split in ((name, dataset.split(name)) for name in tests)
    }


def measure(place: Place, recipe: Recipe) -> dict[str, Any]:
    """Train, measure and test the student."""
    dataset = place.dataset()
    with place.student(place.cache(recipe.epsilon_range), **{"augment": (), **recipe.options}) as folder:
        teacher, student = (load_classifier(run)[0].eval() for run in (place.teacher(), folder))
    seen = look(teacher, student, dataset)
    return {
        "numbers": {number: of(seen) for number, of in NUMBERS.items()},
        "validation": {"teacher": 100 * float(_right(seen.teacher, seen.labels).mean()),
                       "student": 100 * float(_right(seen.student, seen.labels).mean())},
        "teacher": accuracies(teacher, dataset),
        "student": accuracies(student, dataset),
    }  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def correlations(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Write a line for each number: its ρ with the accuracy on OOD and shift, in each world, and the mean over them."""
    for number in NUMBERS:
        cells, means = [], []
        for test in TESTS:
            of_worlds = []
            for world in WORLDS:
                rows = [r for r in results if r["world"] == world and r["numbers"][number] is not None]
                if len(rows) > 2:
                    values = [-row["numbers"][number] for row in rows]
                    of_worlds.append(spearman(values, [row["student"][test] for row in rows]))
                    cells.append(f"{of_worlds[-1]:.2f}")
                else:
                    cells.append("–")
            means.append(float(np.nanmean(of_worlds)) if of_worlds else float("nan"))
        yield [number, *cells, *(f"{mean:.2f}" for mean in means)]


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--world", "only", type=click.Choice([*WORLDS]), help="Measure one dataset alone.")
@click.option("--precision", default="float32", show_default=True, help="Arithmetic of the students.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(work: Path, only: str | None, precision: str, threads: int) -> None:
    """Train each student, and print the two tables."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for world in [only] if only else WORLDS:
        place = Place(work / world, WORLDS[world], threads, precision=precision)
        has_masks = place.dataset().split("train").masks is not None
        for name, recipe in RECIPES.items():
            if has_masks or not recipe.masks:
                once(file, {"world": world, "recipe": name, "precision": precision}, partial(measure, place, recipe))
    results = read_results(file, precision=precision)
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(CPU)}")
    header = [f"{test}, {world}" for test in TESTS for world in WORLDS]
    print(table(["ρ", *header, *(f"{test}, mean" for test in TESTS)], list(correlations(results))))
    lines = []
    for r in sorted(results, key=lambda r: (r["world"], -r["student"]["ood"])):
        excess = f"{100 * r['numbers']['excess over the teacher']:+.1f}"
        of_tests = [f"{r[who][test]:.1f}" for who in ("student", "teacher") for test in TESTS]
        lines.append([r["world"], r["recipe"], f"{r['validation']['student']:.1f}", excess, *of_tests])
    print(table(["dataset", "recipe", "validation", "excess", *TESTS, *(f"teacher, {t}" for t in TESTS)], lines))


if __name__ == "__main__":
    main()
