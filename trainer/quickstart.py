"""The whole story in one command: data, a teacher, a classifier that cheats, and its distilled sibling."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import DatasetError, make_coloured_mnist, open_dataset
from pipeline import cache_explanations
from teacher_cache import CacheError, check_complete, open_cache
from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.evaluation import evaluate
from trainer.pictures import heatmap_picture
from trainer.run_dir import write_json
from trainer.supervised import train_teacher

# Bassi et al., arXiv 2407.09788: IID, OOD, shift, in %
PAPER = {"teacher": (98.6, 98.7, 98.7), "ERM": (100.0, 16.93, 0.18), "LRP distillation": (99.2, 98.2, 98.3)}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults were chosen for some minutes on two CPU cores."""

    seed: int = 0
    limit: int | None = None
    teacher_steps: int = 800
    erm_steps: int = 300
    student_steps: int = 1000
    draws: int = 4


def quickstart(
    out: str | Path, sizes: Sizes | None = None, echo: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Train a teacher and an ERM baseline on COLOURED MNIST, cache, distil a student, evaluate all three.

    Writes ``results.json`` and ``report/heatmaps.png`` in ``out`` and returns the results: ``method``,
    ``iid``, ``ood``, ``shift`` and ``gap`` in %, and the ``seconds`` of each stage. Run again it continues
    with the first stage that is not finished.

    Raises FileExistsError for a folder that holds anything else, TrainingError for one of other sizes.
    """
    sizes = sizes or Sizes()
    out = Path(out)
    state = _claim(out, sizes)
    if (out / "results.json").exists():
        echo(f"quickstart is finished in {out}: remove the folder, or choose another --out, to run it again")
        results: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
        return results

    data = out / "coloured-mnist.zarr"
    teacher, erm, student = out / "teacher", out / "erm", out / "student"
    caches = {split: out / f"{split}-cache.zarr" for split in ("train", "validation")}

    def stage(name: str, what: str, products: tuple[Path, ...], run: Callable[[], object]) -> None:
        if all(_finished(product) for product in products):
            return
        echo(what)
        started = time.perf_counter()
        try:
            run()
        finally:  # an interrupted stage goes on, and its time adds up
            spent = state["seconds"].get(name, 0.0) + time.perf_counter() - started
            state["seconds"][name] = round(spent, 1)
            write_json(out / "quickstart.json", state)

    def make_caches() -> None:
        for split, path in caches.items():
            cache_explanations(data, teacher, path, split=split, draws=sizes.draws, seed=sizes.seed)

    stage(
        "make-data",
        "1/5 COLOURED MNIST: in training, the colour tells the digit",
        (data,),
        lambda: make_coloured_mnist(data, sizes.seed, sizes.limit),
    )
    stage(
        "train-teacher",
        "2/5 the teacher, which sees no colour",
        (teacher,),
        lambda: train_teacher(data, teacher, steps=sizes.teacher_steps, seed=sizes.seed),
    )
    stage(
        "train-erm",
        "3/5 the ERM baseline, which learns from the biased images and their labels",
        (erm,),
        lambda: train_teacher(data, erm, debias="none", steps=sizes.erm_steps, seed=sizes.seed),
    )
    stage(
        "cache-explanations",
        "4/5 stage one: the teacher's heatmaps, written to a store",
        tuple(caches.values()),
        make_caches,
    )
    stage(
        "train-student",
        "5/5 stage two: the student, which learns from the biased images and the heatmaps alone",
        (student,),
        lambda: train_student(
            data,
            caches["train"],
            student,
            validation_cache=caches["validation"],
            steps=sizes.student_steps,
            seed=sizes.seed,
        ),
    )

    rows = {
        "teacher": (teacher, ["train-teacher"]),
        "ERM": (erm, ["train-erm"]),
        "LRP distillation": (student, ["cache-explanations", "train-student"]),
    }
    results = []
    for method, (model, stages) in rows.items():
        scores = evaluate(data, model)
        results.append(
            {
                "method": method,
                **{key: scores[key] for key in ("iid", "ood", "shift", "gap", "worst_group")},
                "seconds": {name: state["seconds"].get(name, 0.0) for name in stages},
            }
        )
    models = {"teacher": teacher, "student": student, "ERM": erm}
    heatmap_picture(open_dataset(data), ("ood", "shift"), models, out / "report" / "heatmaps.png")
    write_json(out / "results.json", results)
    return results


def _finished(product: Path) -> bool:
    """Whether a stage's dataset, training or store is there and complete."""
    if product.suffix != ".zarr":
        return (product / "result.json").exists()
    try:
        if product.name.endswith("-cache.zarr"):
            check_complete(open_cache(product))
        else:
            open_dataset(product)
    except (DatasetError, CacheError):
        return False
    return True


def table(results: list[dict[str, Any]]) -> str:
    """The results as a text table, beside the paper's."""
    lines = [
        f"{'accuracy in %':<18}{'IID':>8}{'OOD':>8}{'shift':>8}"
        f"   {'paper: IID':>10}{'OOD':>8}{'shift':>8}{'seconds':>11}"
    ]
    for row in results:
        ours = "".join(f"{row[key]:8.2f}" for key in ("iid", "ood", "shift"))
        iid, ood, shift = PAPER[row["method"]]
        lines.append(
            f"{row['method']:<18}{ours}   {iid:10.2f}{ood:8.2f}{shift:8.2f}{sum(row['seconds'].values()):11.0f}"
        )
    return "\n".join(lines)


def _claim(out: Path, sizes: Sizes) -> dict[str, Any]:
    """The state of a quickstart in ``out``, new or found there."""
    marker = out / "quickstart.json"
    if marker.exists():
        try:
            state: dict[str, Any] = json.loads(marker.read_text())
        except ValueError:
            raise TrainingError(f"{marker} is damaged: remove the folder {out}, or choose another --out") from None
        if state.get("sizes") != asdict(sizes):
            raise TrainingError(
                f"{out} holds a quickstart with {state.get('sizes')}, this one has {asdict(sizes)}: "
                "choose another --out"
            )
        return state
    if out.exists() and (not out.is_dir() or {entry.name for entry in out.iterdir()} - {f"{marker.name}.partial"}):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    state = {"sizes": asdict(sizes), "seconds": {}}
    write_json(marker, state)
    return state
