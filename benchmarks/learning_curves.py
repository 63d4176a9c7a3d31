"""How many images does a student of heatmaps need, and what helps where there are few?

    pip install -e ".[data,benchmarks]" && python benchmarks/learning_curves.py --work FOLDER

Teachers and students learn from the first 500 to 20,000 training images of two datasets of `choosing`, with the bias in
all of them, and are tested on the same images without it. All images are from the training files of MNIST and
Fashion-MNIST: the benchmarks' own tests are not looked at. A training that `results.jsonl` has is not run again.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from choosing import CPU, HIGH, STEPS, WORLDS
from report import processor, read_results, table

from data import Dataset, DatasetWriter, open_dataset
from pipeline import cache_explanations, load_classifier
from trainer import train_student, train_teacher
from trainer.results.charts import COLOURS, INK, MARKERS
from trainer.results.evaluation import predict

SIZES = (500, 1000, 2500, 5000, 20_000)
TESTS = ("iid", "ood", "shift")
ON = ("colours", "textures")
DRAWS, MORE_DRAWS = 2, 8
CHUNK = 1024  # samples of a copy at once


@dataclass(frozen=True)
class Method:
    """How a network learns: options of `train_student`, and the draws of its store; the teacher has no options.

    Attributes:
        options: of `train_student`; None for the teacher.
        draws: of the store.
        from_teacher: whether the student starts from the teacher's weights.
        masks: whether the dataset must have masks.
    """

    options: Mapping[str, Any] | None
    draws: int = DRAWS
    from_teacher: bool = False
    masks: bool = False


_ADAM, _MUON = {"lr": 4e-3}, {"optimizer": "muon", "lr": 1e-2}
METHODS = {
    "teacher": Method(None),
    "ERM": Method({**_ADAM, "method": "erm"}),
    "outputs": Method({**_ADAM, "method": "output"}),
    "LRP": Method(_MUON),
    "LRP, 8 draws": Method(_MUON, draws=MORE_DRAWS),
    "LRP, from the teacher's weights": Method(_MUON, from_teacher=True),
    "LRP, repainted": Method({**_MUON, "augment": ("background",)}, masks=True),
    "LRP, four times the steps": Method({**_MUON, "steps": 4 * STEPS}),
}


def _first(dataset: Dataset, samples: int, path: Path) -> None:
    """Write a copy with the first training images alone."""
    with DatasetWriter(path) as writer:
        for name, split in dataset.splits.items():
            rows = slice(samples if name == "train" else None)
            arrays = {key: getattr(split, key) for key in ("images", "labels", "groups", "masks")}
            writer.write_split(name, **{k: np.asarray(of[rows]) for k, of in arrays.items() if of is not None})
        writer.finish(
            name=dataset.name, class_names=list(dataset.class_names), bias_attribute=dataset.bias_attribute,
            group_names=list(dataset.group_names),
        )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The folder of all files; ``threads`` for each training."""

    work: Path
    threads: int
    sizes: Sequence[int] = field(default=SIZES)

    def dataset(self, world: str, samples: int) -> Dataset:
        path = self.work / world / f"{samples}" / "data.zarr"
        whole = self.work / world / "data.zarr"
        if not whole.exists():
            whole.parent.mkdir(parents=True, exist_ok=True)
            WORLDS[world].make(whole, max(SIZES))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _first(open_dataset(whole), samples, path)
        return open_dataset(path)

    def teacher(self, world: str, samples: int) -> Path:
        folder = self.work / world / f"{samples}" / "teacher"
        if not (folder / "result.json").exists():
            options = {"bias_free": True, **WORLDS[world].teacher, "threads": self.threads}
            train_teacher(self.dataset(world, samples).path, folder, **options)
        return folder

    def student(self, world: str, samples: int, name: str, method: Method) -> Path:
        dataset, folder = self.dataset(world, samples), self.work / world / f"{samples}" / name.replace(" ", "-")
        if (folder / "result.json").exists():
            return folder
        assert method.options is not None
        options = {"steps": STEPS, **WORLDS[world].student, **method.options, "threads": self.threads}
        if options.get("method") == "erm":
            train_student(dataset.path, None, folder, bias_free=True, **options)
            return folder
        teacher = self.teacher(world, samples)
        cache = self.work / world / f"{samples}" / f"cache-{method.draws}.zarr"
        cache_explanations(dataset.path, teacher, cache, epsilon_range=HIGH, draws=method.draws, threads=self.threads)
        if method.from_teacher:
            options |= {"init": teacher, "teacher_weights": True}
        train_student(dataset.path, cache, folder, **options)
        return folder

    def measure(self, world: str, samples: int, name: str, method: Method) -> dict[str, Any]:
        began, dataset = time.perf_counter(), self.dataset(world, samples)
        taught = method.options is None
        folder = self.teacher(world, samples) if taught else self.student(world, samples, name, method)
        model = load_classifier(folder)[0].eval()
        return {
            "world": world,
            "samples": samples,
            "method": name,
            **{test: 100 * _accuracy(model, dataset, test) for test in TESTS},
            "seconds": round(time.perf_counter() - began),
        }


def _accuracy(model: Any, dataset: Dataset, test: str) -> float:
    split = dataset.split(test)
    return float((predict(model, split, CPU) == np.asarray(split.labels[:])).mean())


def lines(results: Sequence[Mapping[str, Any]], world: str) -> list[list[str]]:
    """Write a line for each method: its accuracies on IID, OOD and shift, by the number of images."""
    found = {(r["method"], r["samples"]): r for r in results if r["world"] == world}
    return [
        [name, *(" / ".join(f"{of[t]:.1f}" for t in TESTS) if (of := found.get((name, n))) else "–" for n in SIZES)]
        for name in METHODS
        if any((name, n) in found for n in SIZES)
    ]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the accuracy on OOD over the number of images, a panel for each dataset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, world in zip(figure.subplots(1, len(ON)), ON, strict=True):
        for number, name in enumerate(METHODS):
            rows = sorted((r["samples"], r["ood"]) for r in results if (r["world"], r["method"]) == (world, name))
            if rows:
                colour = INK if name == "teacher" else COLOURS[number % len(COLOURS)]
                axes.plot(*zip(*rows, strict=True), marker=[*MARKERS][number % len(MARKERS)], color=colour, label=name)
        axes.set(
            xscale="log", xlabel="training images", title=world, xticks=SIZES, xticklabels=[f"{n:,}" for n in SIZES]
        )
        axes.minorticks_off()
    figure.axes[0].set_ylabel("accuracy on OOD in %")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--picture", type=click.Path(path_type=Path), help="File of a picture of the curves, such as curves.png.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(work: Path, picture: Path | None, threads: int) -> None:
    """Train each network, and print a table for each dataset."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    bench, file = Bench(work, threads), work / "results.jsonl"
    for world in ON:
        for samples in SIZES:
            has_masks = bench.dataset(world, samples).split("train").masks is not None
            for name, method in METHODS.items():
                done = {(r["world"], r["samples"], r["method"]) for r in read_results(file)}
                if (world, samples, name) in done or (method.masks and not has_masks):
                    continue
                result = bench.measure(world, samples, name, method)
                with file.open("a") as log:
                    log.write(json.dumps(result) + "\n")
                click.echo(f"{world}, {samples:,} images, {name}: {result}")
    results = read_results(file)
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(CPU)}")
    for world in ON:
        print(f"\n{world}\n\n" + table(["IID / OOD / shift", *(f"{n:,}" for n in SIZES)], lines(results, world)))
    if picture is not None:
        draw(results, picture)


if __name__ == "__main__":
    main()
