"""How many images does a student of heatmaps need, and what helps where there are few?

    pip install -e ".[data,benchmarks]" && python benchmarks/learning_curves.py --work FOLDER

Teachers and students learn from the first 500 to 20,000 training images of two datasets, with the bias in all of them,
and all are tested on the same images. These are not the tests of the benchmarks (`worlds.py`). A training that
`results.jsonl` has is not run again.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from choosing import accuracies
from report import once, processor, read_results, table
from worlds import HIGH, STEPS, WORLDS, Place

from pipeline import load_classifier
from trainer.results.charts import COLOURS, INK, MARKERS

SIZES = (500, 1000, 2500, 5000, 20_000)
TESTS = ("iid", "ood", "shift")
ON = ("colours", "textures")
DRAWS, MORE_DRAWS = 2, 8
CPU = torch.device("cpu")


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


_ADAM, _MUON = {"optimizer": "adam", "lr": 4e-3}, {"optimizer": "muon", "lr": 1e-2}
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


def measure(place: Place, method: Method) -> dict[str, float]:
    """Train and test a network."""
    dataset = place.dataset()
    if method.options is None:
        return accuracies(load_classifier(place.teacher())[0].eval(), dataset, TESTS)
    supervised = method.options.get("method") == "erm"
    options = {"augment": (), **method.options, **({"bias_free": True} if supervised else {})}
    if method.from_teacher:
        options |= {"init": place.teacher(), "teacher_weights": True}
    with place.student(None if supervised else place.cache(HIGH, method.draws), **options) as folder:
        return accuracies(load_classifier(folder)[0].eval(), dataset, TESTS)


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

    figure = Figure(figsize=(11, 4), layout="constrained")
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
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--method", "methods", multiple=True, type=click.Choice([*METHODS]), help="Method. Default: all.")
@click.option("--samples", "sizes", multiple=True, type=click.Choice(SIZES), help="Training images. Default: all.")
@click.option("--picture", type=click.Path(path_type=Path), help="File of a picture of the curves, such as curves.png.")
@click.option("--precision", default="float32", show_default=True, help="Arithmetic of the students.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(
    work: Path,
    methods: Sequence[str],
    sizes: Sequence[int],
    picture: Path | None,
    precision: str,
    threads: int,
) -> None:
    """Train each network, and print a table for each dataset."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for name, world, samples in product(methods or METHODS, ON, sizes or SIZES):
        method = METHODS[name]
        whole = Place(work / world, WORLDS[world], threads, samples=max(SIZES), precision=precision)
        place = replace(whole, folder=work / world / f"{samples}", samples=samples, whole=whole)
        if place.dataset().split("train").masks is not None or not method.masks:
            key = {"world": world, "samples": samples, "method": name, "precision": precision}
            once(file, key, partial(measure, place, method))
    results = read_results(file, precision=precision)
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(CPU)}")
    for world in ON:
        print(f"\n{world}\n\n" + table(["IID / OOD / shift", *(f"{n:,}" for n in SIZES)], lines(results, world)))
    if picture is not None:
        draw(results, picture)


if __name__ == "__main__":
    main()
