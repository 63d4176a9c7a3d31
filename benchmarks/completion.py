"""When does it help to complete the maps of a teacher with biases, and does a number of its store tell so?

    pip install -e ".[data,benchmarks]" && python benchmarks/completion.py --work FOLDER

A teacher with biases and batch norms explains logits only in part. A student can match its maps as they are, or
completed by what they miss, with biases of its own or without. Beside the students are two numbers that `inspect-cache`
prints: the median share of the logit that the maps sum to, and the correlation of the two.
The tests are not those of the benchmarks (`worlds.py`). A training that `results.jsonl` has is not run again.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from choosing import TESTS, accuracies
from report import once, processor, read_results, table
from worlds import HIGH, LOW, WORLDS, Place

from pipeline import load_classifier
from teacher_cache import open_cache
from teacher_cache.inspection import inspect_cache

REPAINTED = {"augment": ("background",)}  # where the dataset has masks
METHODS: dict[str, dict[str, Any]] = {
    "as they are, student with biases": {"method": "lrp", "bias_free": False},
    "as they are, student without": {"method": "lrp", "bias_free": True},
    "completed, student with biases": {"method": "complete-lrp", "bias_free": False},
    "completed, student without": {"method": "complete-lrp", "bias_free": True},
    "as they are, student with biases, repainted": {"method": "lrp", "bias_free": False, **REPAINTED},
    "as they are, student without, repainted": {"method": "lrp", "bias_free": True, **REPAINTED},
    "completed, student without, repainted": {"method": "complete-lrp", "bias_free": True, **REPAINTED},
}
RANGES = (LOW, HIGH)
MUON = {"optimizer": "muon", "lr": 1e-2}


def measure(place: Place, epsilon_range: tuple[float, float], options: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test a student."""
    dataset, cache = place.dataset(), place.cache(epsilon_range)
    sums = inspect_cache(open_cache(cache))["maps"]["sums"]
    with place.student(cache, **{"augment": (), **MUON, **options}) as folder:
        teacher, student = (load_classifier(run)[0].eval() for run in (place.teacher(), folder))
    return {
        "sums": sums,
        "teacher": accuracies(teacher, dataset),
        "student": accuracies(student, dataset),
    }


def lines(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Write a line for each store: its sums in both halves of the range of ε, and OOD / shift of each student."""
    written = []
    for world in WORLDS:
        for epsilon_range in RANGES:
            rows = {r["method"]: r for r in results if (r["world"], tuple(r["range"])) == (world, epsilon_range)}
            if not rows:
                continue
            one = next(iter(rows.values()))
            of = [" / ".join(f"{half[key]:.2f}" for half in one["sums"]) for key in ("share", "correlation")]
            teacher = " / ".join(f"{one['teacher'][test]:.1f}" for test in TESTS)
            students = [
                " / ".join(f"{rows[name]['student'][test]:.1f}" for test in TESTS) if name in rows else "–"
                for name in METHODS
            ]
            written.append([world, "{:g}–{:g}".format(*epsilon_range), *of, teacher, *students])
    return written


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--world", "worlds", multiple=True, type=click.Choice([*WORLDS]), help="Dataset. Default: all.")
@click.option("--precision", default="float32", show_default=True, help="Arithmetic of the students.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(work: Path, worlds: Sequence[str], precision: str, threads: int) -> None:
    """Train each student, and print the table."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for world in worlds or WORLDS:
        place = Place(work / world, WORLDS[world], threads, bias_free=False, precision=precision)
        for epsilon_range in reversed(RANGES):
            for method, options in METHODS.items():
                if "augment" in options and place.dataset().split("train").masks is None:
                    continue
                key = {"world": world, "range": epsilon_range, "method": method, "precision": precision}
                once(file, key, partial(measure, place, epsilon_range, options))
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(torch.device('cpu'))}")
    header = ["dataset", "ε", "share of the logit", "correlation", "teacher", *METHODS]
    print(table(header, lines(read_results(file, precision=precision))))


if __name__ == "__main__":
    main()
