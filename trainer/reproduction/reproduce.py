"""The paper's table in one command: what `plan` lists is made, tested, and told in tables and pictures.

Whatever stops it, the same command goes on: a stage is finished when its product is. Quickstart is a small one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import DatasetError, open_dataset
from data.storage import PARTIAL, Folder
from pipeline import cache_explanations
from pipeline.device import pick_device
from pipeline.networks.classifier import versions
from pipeline.networks.models import build_network
from teacher_cache import CacheError, check_complete, open_cache
from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.reproduction.plan import Stage, before, chosen, plan
from trainer.reproduction.profiles import Profile
from trainer.results.evaluation import evaluate, evaluate_snapshots
from trainer.results.pictures import curves_picture, groups_picture, heatmap_picture
from trainer.results.tables import latex, markdown, summarise
from trainer.run_dir import differences, lock, revision, snapshots, write_json
from trainer.supervised import train_teacher

MARKER = "reproduce.json"
CURVE_IMAGES = 2000  # of each test split
TOLD = 5  # differences, at most

Result = dict[str, Any]


def reproduce(
    out: str | Path,
    profile: Profile,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 1,
    sources: Mapping[str, str | Path] | None = None,
    device: str = "auto",
    echo: Callable[[str], None] = print,
) -> list[Result]:
    """Make a benchmark's data, teachers, stores and every row's students in ``out``; test and tabulate them.

    ``methods`` are rows of the benchmark (`trainer.reproduction.profiles`), its usual ones unless given, or
    ``all``. A later call on the same folder may have more of them and more ``seeds``; what is finished stays. A
    model is tested once, when its training has ended; the curves come after all trainings, and nothing is chosen by
    either. ``sources`` are where the original files lie that the data are made of, by the names that the
    benchmark's ``make`` has for them.

    Returns what is in ``results.jsonl``, a line for each model: ``method``, ``title``, ``seed``, ``arch``; in % the
    accuracy on each test split by its name, and the ``gap``; ``worst_group``, all ``groups``, and of each split
    ``on_object``, as of `evaluate`; ``steps``, ``batch_size``, ``loss``, the ``seconds`` of its training and those of
    the ``stages`` before it; the ``published`` numbers.

    Raises FileExistsError for a folder that holds anything else, TrainingError for one of another profile and one that
    another process is at, and what its stages raise.
    """
    out = Path(out)
    stages = plan(profile, chosen(profile, methods), seeds)
    _try_out(profile, device)
    with _claimed(out, profile) as state:
        results, points = (_kept(out, f"{name}.jsonl") for name in ("results", "curves"))
        tested = {result["model"] for result in results}
        models = [stage for stage in stages if stage.row is not None]
        if state["reported"] == sorted(tested) and tested >= {stage.path for stage in models}:
            echo(
                f"it is finished in {out}: ask for more methods or seeds, or remove the folder or choose another --out "
                "to run it again"
            )
            return results

        total = len(stages) + 1
        for number, stage in enumerate(stages, start=1):
            if not _finished(out / stage.path):
                echo(f"[{number}/{total}] {stage.says}")
                with _timed(out, state, stage.path):
                    _make(out, profile, stage, sources or {}, device)
            if stage.row is not None and stage.path not in tested:
                results = _in_order(profile, [*results, _test(out, profile, stage, state, device)])
                _write_results(out, profile, results)

        echo(f"[{total}/{total}] the report: tables and pictures")
        with _timed(out, state, "report"):
            points = _test_snapshots(out, profile, results, points, device)
            _draw(out, profile, results, points)
        state["reported"] = sorted(result["model"] for result in results)
        write_json(out / MARKER, state)
        return results


# --- the folder ---------------------------------------------------------------------------------------------


@contextmanager
def _claimed(out: Path, profile: Profile) -> Iterator[dict[str, Any]]:
    """The state of a reproduction in ``out``, new or found there, as long as no other process is at it."""
    _check_ours(out)
    Folder(out).make()
    with closing(lock(out, "at work")):
        _check_ours(out)
        marker = out / MARKER
        if marker.exists():
            yield _read_state(marker, profile)
            return
        state: dict[str, Any] = {
            "profile": dataclasses.asdict(profile),
            "versions": versions(),
            "revision": revision(),
            "seconds": {},
            "reported": [],
        }
        write_json(marker, state)
        yield state


def _check_ours(out: Path) -> None:
    if not out.exists() or (out / MARKER).exists():
        return
    if not out.is_dir() or any(not entry.name.endswith(PARTIAL) and entry.name != ".lock" for entry in out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out, or remove it first")


def _read_state(marker: Path, profile: Profile) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(marker.read_text())
        found = state["profile"]
    except (ValueError, TypeError, KeyError):
        raise TrainingError(f"{marker} is damaged: remove the folder, or choose another --out") from None
    if differing := differences(found, dataclasses.asdict(profile)):
        more = f", and {len(differing) - TOLD} more" if len(differing) > TOLD else ""
        raise TrainingError(
            f"{marker.parent} holds a reproduction with other sizes ({'; '.join(differing[:TOLD])}{more}; its first, "
            "this command's second): give the same ones to continue it, or choose another --out"
        )
    return state


def _kept(out: Path, name: str) -> list[Result]:
    """The lines of a file, without those of models that are no longer there."""
    path = out / name
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in lines if _finished(out / line["model"])]
    except (ValueError, TypeError, KeyError):
        raise TrainingError(f"{path} is damaged: remove it, and the same command makes it again") from None
    if len(kept) < len(lines):
        _write_lines(out, name, kept)
    return kept


def _write_lines(out: Path, name: str, lines: Sequence[Result]) -> None:
    Folder(out).write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _finished(product: Path) -> bool:
    """Whether a stage's dataset, store or training is there and complete."""
    if product.suffix != ".zarr":
        return (product / "result.json").exists()
    try:
        if product.parent.name == "stores":
            check_complete(open_cache(product))
        else:
            open_dataset(product)
    except (DatasetError, CacheError):
        return False
    return True


@contextmanager
def _timed(out: Path, state: dict[str, Any], name: str) -> Iterator[None]:
    """Adds to the seconds of a stage, which may be interrupted and go on."""
    started = time.perf_counter()
    try:
        yield
    finally:
        spent = state["seconds"].get(name, 0.0) + time.perf_counter() - started
        state["seconds"][name] = round(spent, 1)
        write_json(out / MARKER, state)


# --- the stages ---------------------------------------------------------------------------------------------


def _try_out(profile: Profile, device: str) -> None:
    """What is wrong with the networks and the device is said before anything is made."""
    pick_device(device)
    side = profile.data.get("size", profile.table.size)
    for of in (profile.teacher, profile.student):
        build_network(
            of["arch"],
            10,
            (3, side, side),
            free_of_biases=bool(profile.teacher["bias_free"]),
            options=of.get("arch_options"),
        )


def _make(out: Path, profile: Profile, stage: Stage, sources: Mapping[str, str | Path], device: str) -> None:
    path, options = out / stage.path, stage.options
    if stage.kind == "data":
        profile.table.make(path, **sources, **options)
        return
    data, *others = (out / needed.path for needed in stage.needs)
    if stage.kind == "teacher":
        train_teacher(data, path, device=device, **options)
    elif stage.kind == "store":
        (teacher,) = others
        cache_explanations(data, teacher, path, device=device, **options)
    else:
        cache, validation_cache = (*others, None, None)[:2]
        train_student(data, cache, path, validation_cache=validation_cache, device=device, **options)


def _test(out: Path, profile: Profile, stage: Stage, state: dict[str, Any], device: str) -> Result:
    """The line of a trained model. This is the one look that it gets at the test splits."""
    assert stage.row is not None
    row, (data, *_) = profile.table.rows[stage.row], stage.needs
    path = out / stage.path
    scores = evaluate(out / data.path, path, device=device)
    told = json.loads((path / "config.json").read_text())["training"]
    result = json.loads((path / "result.json").read_text())
    return {
        "model": stage.path,
        "method": stage.row,
        "title": row.title,
        "seed": stage.seed,
        "arch": scores["arch"],
        "teacher": row.teacher,
        **{split: scores["splits"][split]["accuracy"] for split in profile.table.tests},
        **{key: scores[key] for key in ("gap", "worst_group")},
        "on_object": {name: split["on_object"] for name, split in scores["splits"].items()},
        "groups": [group for split in scores["splits"].values() for group in split["groups"]],
        "steps": result["steps"],
        "batch_size": told["batch_size"],
        "loss": result["loss"],
        "seconds": round(result["seconds"], 1),
        "stages": {path: state["seconds"].get(path, 0.0) for path in before(stage)},
        "published": row.published,
    }


def _test_snapshots(
    out: Path, profile: Profile, results: Sequence[Result], points: list[Result], device: str
) -> list[Result]:
    """The points of the curves, with those of the models that have snapshots, which then are removed."""
    models = {result["model"]: snapshots(out / result["model"]) for result in results}
    drawn = {point["model"] for point in points}
    with tqdm(total=sum(map(len, models.values())), unit="snapshot", desc="curves", disable=None) as bar:
        for result in results:
            model, files = result["model"], models[result["model"]]
            if files and model not in drawn:
                about = {key: result[key] for key in ("model", "method", "title", "seed")}
                for point in evaluate_snapshots(out / "data.zarr", out / model, images=CURVE_IMAGES, device=device):
                    points.append({**about, **point, "used_for": "a picture; nothing was chosen by it"})
                    bar.update()
                points = _in_order(profile, points)
                _write_lines(out, "curves.jsonl", points)
            for file in files.values():
                file.unlink()
    return points


def _in_order(profile: Profile, lines: Sequence[Result]) -> list[Result]:
    """That of the table, and of the seeds in a row; the steps of a training stay as they come."""
    place = {row: index for index, row in enumerate(profile.table.rows)}
    return sorted(lines, key=lambda line: (place.get(line["method"], len(place)), line["seed"]))


def _write_results(out: Path, profile: Profile, results: Sequence[Result]) -> None:
    _write_lines(out, "results.jsonl", results)
    lines = summarise(results, profile.table)
    for name, content in (("table.md", markdown(lines)), ("table.tex", latex(lines))):
        Folder(out).write(f"report/{name}", content.encode())


def _draw(out: Path, profile: Profile, results: Sequence[Result], points: Sequence[Result]) -> None:
    report = out / "report"
    first = {result["title"]: out / result["model"] for result in reversed(results)}  # of the first seed
    models = {title: first[title] for title in dict.fromkeys(result["title"] for result in results)}
    tests = profile.table.tests
    harder = tuple(split for split in tests if split != "iid")
    heatmap_picture(open_dataset(out / "data.zarr"), harder, models, report / "heatmaps.png")
    groups_picture(results, harder, report / "groups.png")
    if points:
        curves_picture(points, tests, report / "curves.png")
