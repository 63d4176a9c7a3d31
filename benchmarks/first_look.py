"""Does the first look at a teacher's maps tell how good their student gets? Settings of teacher, explainer and ε.

    pip install -e ".[data,benchmarks,pretrained]" && python benchmarks/first_look.py --work FOLDER

Each setting has a store and a student of the teacher's architecture, on the solar cells with a stamp. All students of
an architecture learn with the same options. Two things were chosen before any result: the number in question is
`decides` at the worse end of the range of ε, and the student's score is its balanced accuracy on OOD, on which one
class alone has 50 %. The other numbers and scores are printed beside them. A setting that `results.jsonl` has is not
run again.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from report import once, processor, read_results, spearman, table

from data import Dataset, make_solar_cells, open_dataset
from pipeline import cache_explanations, load_classifier, load_teacher
from pipeline.caching.first_look import DECIDES, STABLE, first_look
from teacher_cache import open_cache
from trainer import train_student, train_teacher
from trainer.reproduction.efficientnet_lite import FACTORY, MEAN, STD, weights
from trainer.results.charts import COLOURS, FAINT, INK, MARKERS
from trainer.results.evaluation import class_scores, predict

CPU, SIZE, DRAWS, LOOKED_AT_ONCE = torch.device("cpu"), 64, 2, 16
LOW, MIDDLE, HIGH, HIGHEST = (0.01, 0.1), (0.05, 0.2), (0.1, 1.0), (1.0, 10.0)  # ranges of ε
LITE0 = {"mean": (MEAN,), "std": (STD,)}
SHARED: dict[str, Any] = {
    "augment": ("flip",),
    "optimizer": "adam",
    "class_weights": "balanced",
    "threads": 1,
    "device": "cpu",
}


@dataclass(frozen=True)
class Family:
    """An architecture, and how its teachers and its students learn: options of `train_teacher` and `train_student`."""

    of_both: dict[str, Any]
    of_teacher: dict[str, Any]
    of_student: dict[str, Any]
    pretrained: bool = False


def _small(arch: str) -> Family:
    both = {"arch": arch, "arch_options": {"width": 16, "depth": 1}}
    return Family(both, {"batch_size": 64, "lr": 4e-3}, {"batch_size": 32, "lr": 4e-3})


FAMILIES = {
    "small-cnn": _small("small-cnn"),
    "small-resnet": _small("small-resnet"),
    "EfficientNet-Lite0": Family(LITE0, {"batch_size": 32, "lr": 7e-4}, {"batch_size": 32, "lr": 1e-3}, True),
}


@dataclass(frozen=True)
class Setting:
    """A teacher, by its architecture and whether it is bias-free, and how it is explained."""

    family: str
    bias_free: bool
    explainer: str
    epsilon_range: tuple[float, float]

    @property
    def teacher(self) -> str:
        return f"{self.family}, {'bias-free' if self.bias_free else 'with biases'}"

    @property
    def name(self) -> str:
        low, high = self.epsilon_range
        return f"{self.teacher}, {self.explainer}, ε {low:g}–{high:g}"


SETTINGS = [
    *(Setting("small-cnn", True, *how) for how in (("flex", LOW), ("flex", HIGH), ("epsilon-plus", LOW))),
    *(Setting("small-cnn", True, *how) for how in (("gamma", LOW), ("gradient-x-input", LOW), ("flex-stride4", HIGH))),
    *(Setting("small-cnn", False, *how) for how in (("flex", LOW), ("flex", HIGH), ("gradient-x-input", LOW))),
    *(Setting("EfficientNet-Lite0", True, *how) for how in (("flex", LOW), ("flex-stride8", MIDDLE))),
    *(Setting("EfficientNet-Lite0", False, *how) for how in (("flex", LOW), ("flex-stride8", MIDDLE))),
    *(Setting("small-resnet", True, *how) for how in (("flex", LOW), ("flex", HIGH))),
    *(Setting("small-resnet", False, *how) for how in (("flex", LOW), ("flex", HIGH))),
    *(Setting("small-cnn", bias_free, "flex", HIGHEST) for bias_free in (True, False)),
    *(Setting("small-cnn", False, *how) for how in (("flex-stride4", HIGH), ("epsilon-plus", LOW))),
    *(Setting("small-resnet", bias_free, "flex-stride4", HIGH) for bias_free in (True, False)),
]
NUMBERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "decides, worse end": lambda look: min(look["decides"]),
    "decides, mean of both ends": lambda look: float(np.mean(look["decides"])),
    "correlation, worse end": lambda look: min(look["correlation"]),
    "correlation, mean of both ends": lambda look: float(np.mean(look["correlation"])),
    "stable, worse end": lambda look: min(look["stable"]),
    "stable, mean of both ends": lambda look: float(np.mean(look["stable"])),
}
SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "balanced accuracy": lambda result: result["student"]["balanced_accuracy"],
    "balanced accuracy, less the teacher's": lambda result: (
        result["student"]["balanced_accuracy"] - result["teacher"]["balanced_accuracy"]
    ),
    "accuracy": lambda result: result["student"]["accuracy"],
    "accuracy, less the teacher's": lambda result: result["student"]["accuracy"] - result["teacher"]["accuracy"],
    "agreement with the teacher": lambda result: result["student"]["agreement"],
}


@dataclass(frozen=True)
class Bench:
    """The folder of all files, the dataset in it, and how long teachers and students learn."""

    work: Path
    dataset: Dataset
    teacher_steps: int
    student_steps: int

    def factory(self, setting: Setting, option: str) -> dict[str, str]:
        """Name the user's function under an option, for networks that are not ours."""
        return {option: FACTORY} if FAMILIES[setting.family].pretrained else {}

    def teacher(self, setting: Setting) -> Path:
        """Train the teacher behind the mask, unless it is there; a bias-free pretrained one fades its biases."""
        folder, family = self.work / "teachers" / _slug(setting.teacher), FAMILIES[setting.family]
        if not (folder / "result.json").exists():
            start = {"weights": weights()} if family.pretrained else {}
            options = family.of_both | family.of_teacher | start | self.factory(setting, "teacher_factory") | SHARED
            train_teacher(
                self.dataset.path, folder, bias_free=setting.bias_free, debias="mask", steps=self.teacher_steps,
                **options,
            )  # fmt: skip
        return folder

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Make the store, take the first look, train the student and test it. The store and student are removed."""
        family, teacher = FAMILIES[setting.family], self.teacher(setting)
        cache, folder = (self.work / kind / _slug(setting.name) for kind in ("stores", "students"))
        cache_explanations(
            self.dataset.path, teacher, cache, explainer=setting.explainer, epsilon_range=setting.epsilon_range,
            draws=DRAWS, threads=1, device="cpu", **self.factory(setting, "teacher_factory"),
        )  # fmt: skip
        split, names = self.dataset.split("train"), self.dataset.class_names
        code = self.factory(setting, "student_factory")
        model = load_teacher(teacher, names, split.image_shape, **code).model
        look = first_look(model, split, open_cache(cache).info, LOOKED_AT_ONCE, CPU)
        if look is None or look.decides is None:
            raise click.ClickException(f"{setting.name}: no map has relevance, or sums mean no logit")
        start = {"init": weights()} if family.pretrained else {}
        # maps of features: they see beyond the mask, and a flip does not move them exactly
        of_maps = {"mask_target": True, "augment": ()} if "stride" in setting.explainer else {}
        options = SHARED | family.of_both | family.of_student | start | code | of_maps
        train_student(
            self.dataset.path, cache, folder, bias_free=setting.bias_free, steps=self.student_steps, **options
        )
        student, _ = load_classifier(folder, **code)
        test = self.dataset.split("ood")
        labels, of_teacher, of_student = (
            np.asarray(test.labels[:]).astype(np.int64), predict(model, test, CPU), predict(student, test, CPU),
        )  # fmt: skip
        shutil.rmtree(cache)
        shutil.rmtree(folder)
        agreement = 100 * float((of_teacher == of_student).mean())
        return {
            "steps": [self.teacher_steps, self.student_steps],
            "look": asdict(look),
            "teacher": _scores(labels, of_teacher, names),
            "student": _scores(labels, of_student, names) | {"agreement": agreement},
        }


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


def _scores(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    return {
        "accuracy": 100 * float((labels == predicted).mean()),
        "balanced_accuracy": class_scores(labels, predicted, class_names)["balanced_accuracy"],
        "defective": 100 * float((predicted == 1).mean()),
    }


def interval(one: Sequence[float], other: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of Spearman's ρ, by settings drawn with replacement."""
    a, b, generator = np.array(one), np.array(other), np.random.default_rng(0)
    drawn = (generator.integers(len(a), size=len(a)) for _ in range(rounds))
    low, high = np.nanpercentile([spearman(a[rows], b[rows]) for rows in drawn], [2.5, 97.5])
    return float(low), float(high)


def setting_table(results: Sequence[dict[str, Any]]) -> str:
    """Write a line for each setting, the best student first."""
    lines = []
    for result in sorted(results, key=SCORES["balanced accuracy"], reverse=True):
        setting, look = Setting(**result["setting"]), result["look"]
        low, high = setting.epsilon_range
        pairs = [" / ".join(format(value, ".2f") for value in look[name]) for name in ("decides", "correlation")]
        stable = " / ".join(format(value, ".2f") for value in look["stable"])
        of_teacher, of_student = (f"{result[who]['balanced_accuracy']:.1f}" for who in ("teacher", "student"))
        student = result["student"]
        accuracies = f"{student['accuracy']:.1f} of {result['teacher']['accuracy']:.1f}"
        said = [f"{student['agreement']:.1f}", f"{student['defective']:.0f}"]
        lines.append(
            [setting.teacher, setting.explainer, f"{low:g}–{high:g}", *pairs, stable, of_student, of_teacher,
             accuracies, *said]
        )  # fmt: skip
    header = ["teacher", "explainer", "ε", "decides", "correlation", "stable", "student, balanced", "teacher, balanced"]
    return table([*header, "student's accuracy", "agreement", "% said defective"], lines)


def correlation_table(results: Sequence[dict[str, Any]]) -> str:
    """Write Spearman's ρ of each number with each score; the first column with its interval."""
    lines = []
    for name, number in NUMBERS.items():
        values, cells = [number(result["look"]) for result in results], []
        for place, score in enumerate(SCORES.values()):
            scores = [score(result) for result in results]
            ends = interval(values, scores) if place == 0 else None
            cells.append(f"{spearman(values, scores):.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""))
        lines.append([name, *cells])
    return table([f"ρ over {len(results)} settings", *SCORES], lines)


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the students' balanced accuracy over two of the numbers; a colour is a teacher, a sign an explainer."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    settings = [Setting(**result["setting"]) for result in results]
    teachers = sorted({setting.teacher for setting in settings})
    explainers = list(dict.fromkeys(setting.explainer for setting in settings))
    signs = dict(zip(explainers, [*MARKERS, "*"], strict=False))
    panels = (
        ("decides, worse end", "share of images on which the sums\nof the maps decide as the teacher", DECIDES),
        ("stable, worse end", "cosine of the maps before and\nafter a shift by one pixel", STABLE),
    )
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, (name, label, threshold) in zip(both, panels, strict=True):
            values = [NUMBERS[name](result["look"]) for result in results]
            scores = [SCORES["balanced accuracy"](result) for result in results]
            for setting, x, y in zip(settings, values, scores, strict=True):
                colour = COLOURS[teachers.index(setting.teacher)]
                axes.plot(x, y, signs[setting.explainer], color=colour, markersize=8, markeredgecolor=INK)
            axes.axvline(threshold, color=FAINT, linestyle=":")
            axes.axhline(50, color=FAINT, linestyle="--")
            axes.set_title(f"Spearman's ρ = {spearman(values, scores):.2f}")
            axes.set_xlabel(f"{label} (worse ε)")
            axes.grid(color=FAINT, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        both[0].set_ylabel("student's balanced accuracy on OOD in %")
        colours = [Line2D([], [], color=COLOURS[i], marker="o", linestyle="", label=n) for i, n in enumerate(teachers)]
        shapes = [Line2D([], [], color=FAINT, marker=signs[n], linestyle="", label=n) for n in explainers]
        figure.legend(handles=[*colours, *shapes], loc="outside right upper", frameon=False)
        figure.savefig(file, dpi=120)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--only", default="", help="Measure only settings whose name contains this text, such as small-cnn.")
@click.option("--teacher-steps", default=400, show_default=True, type=click.IntRange(1), help="Steps of a teacher.")
@click.option("--student-steps", default=300, show_default=True, type=click.IntRange(1), help="Steps of a student.")
def main(work: Path, only: str, teacher_steps: int, student_steps: int) -> None:
    """Measure each setting, print two tables, and draw `first-look.png`."""
    torch.set_num_threads(1)
    path, file = work / "cells.zarr", work / "results.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make_solar_cells(path, size=SIZE, channels=3)
    bench = Bench(work, open_dataset(path), teacher_steps, student_steps)
    for setting in SETTINGS:
        if only in setting.name:
            once(file, {"setting": asdict(setting)}, partial(bench.measure, setting))
    results = read_results(file)
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(CPU)}, one thread")
    print(setting_table(results), correlation_table(results), sep="\n\n")
    draw(results, work / "first-look.png")


if __name__ == "__main__":
    main()
