"""Does a student lose accuracy, or a step stability, if its layers compute in bfloat16?

    pip install -e ".[data,benchmarks]" && python benchmarks/precision.py --work FOLDER

The same students, of several seeds, in float32 and in bfloat16, on datasets whose tests are not those of the published
benchmarks (`worlds.py`). A spike is a step whose loss is more than twice that of the step before, after a tenth of the
training. A training that `results.jsonl` has is not run again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from choosing import TESTS, accuracies
from report import once, processor, read_results, table
from worlds import HIGH, STEPS, WORLDS, Place

from pipeline import load_classifier

PRECISIONS = ("float32", "bfloat16")


def measure(place: Place, precision: str, seed: int) -> dict[str, Any]:
    """Train and test a student."""
    place = replace(place, precision=precision)
    with place.student(place.cache(HIGH), seed=seed, log_steps=1) as folder:
        result = json.loads((folder / "result.json").read_text())
        lines_of_steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        student = load_classifier(folder)[0].eval()
    losses = [line["loss"] for line in lines_of_steps if "loss" in line][STEPS // 10 :]
    return {
        "spikes": sum(later > 2 * before for before, later in pairwise(losses)),
        "loss": float(np.mean(losses[-STEPS // 10 :])),
        "training_seconds": result["seconds"],
        "student": accuracies(student, place.dataset()),
    }


def lines(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Write a line for each dataset and precision, with the means over the seeds and their lowest and highest."""
    written = []
    for world in WORLDS:
        for precision in PRECISIONS:
            rows = [r for r in results if (r["world"], r["precision"]) == (world, precision)]
            if not rows:
                continue
            of_tests = [[row["student"][test] for row in rows] for test in TESTS]
            cells = [f"{np.mean(of):.2f} ({min(of):.2f}–{max(of):.2f})" for of in of_tests]
            means = [f"{np.mean([row[key] for row in rows]):.3g}" for key in ("loss", "spikes", "training_seconds")]
            written.append([world, precision, str(len(rows)), *cells, *means])
    return written


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--world", "only", type=click.Choice([*WORLDS]), help="Measure one dataset alone.")
@click.option("--seeds", default=3, show_default=True, help="Students of each precision.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(work: Path, only: str | None, seeds: int, threads: int) -> None:
    """Train each student, and print the table."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for world in [only] if only else WORLDS:
        place = Place(work / world, WORLDS[world], threads)
        for seed in range(seeds):
            for precision in PRECISIONS:
                key = {"world": world, "precision": precision, "seed": seed}
                once(file, key, partial(measure, place, precision, seed))
    print(f"PyTorch {torch.__version__}, Python {platform.python_version()}, {processor(torch.device('cpu'))}")
    header = ["dataset", "precision", "seeds", *TESTS, "loss at the end", "spikes", "seconds"]
    print(table(header, lines(read_results(file))))


if __name__ == "__main__":
    main()
