"""The paper's table in one command: make and test what `plan` lists, and write tables and pictures of it.

A second call resumes an interrupted one: a stage whose product is complete is finished. The quickstart is a small one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import DatasetError, open_dataset
from data.storage import PARTIAL, Folder
from options import Message, Option, takes
from pipeline import cache_explanations
from pipeline.device import pick_device
from pipeline.networks.checkpoints import read_weights
from pipeline.networks.classifier import versions
from pipeline.networks.models import build_network, call_function
from teacher_cache import CacheError, check_complete, open_cache
from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.reproduction.options import ReproduceOptions
from trainer.reproduction.plan import Stage, before, chosen, factory_of, plan
from trainer.reproduction.profiles import Options, Profile, with_arch
from trainer.results.evaluation import evaluate, evaluate_snapshots
from trainer.results.pictures import curves_picture, groups_picture, heatmap_picture
from trainer.results.tables import latex, markdown, summarise
from trainer.run_dir import LOCK_FILE, NEW_FOLDER, Run, differences, lock, revision, write_json
from trainer.supervised import train_teacher

MARKER = "reproduce.json"
CURVE_IMAGES = 2000  # of each test split
_START = ("weights", "init")  # options whose value is a file of weights, or a function that returns its path
_FUNCTION = re.compile(r"[\w.]+:\w+")
TOLD = 5  # differences in an error
OF_SPLITS = ("on_object", "interval", "samples", "classes", "only_prediction", "predictions")  # recorded of each split

Result = dict[str, Any]


@takes(ReproduceOptions)
def reproduce(
    out: str | Path,
    profile: Profile,
    methods: Sequence[str] | None = None,
    *,
    sources: Mapping[str, str | Path] | None = None,
    echo: Callable[[str], None] = print,
    **options: Any,
) -> list[Result]:
    """Make a benchmark's data, teachers, stores and the students of every row in a folder; test and tabulate them.

    A later call on the same folder may have more ``methods`` and ``seeds``; finished stages stay. A model is tested
    once, after its training. The curves come after all trainings, and nothing is chosen by either.

    Args:
        out: the folder: new, empty, or an earlier reproduction.
        profile: the sizes, an entry of `trainer.reproduction.profiles`.
        methods: rows of the benchmark, or ``all``; its usual rows if None.
        sources: paths of the original files, by the parameters of the benchmark's ``make``.
        echo: takes a line of progress.

    Returns:
        The lines of ``results.jsonl``, one for each model: ``method``, ``title``, ``seed``, ``arch``; the accuracy in %
        on each test split by its name, and the ``gap``; ``worst_group``, all ``groups``, and ``on_object``,
        ``interval``, ``samples``, ``classes`` and ``only_prediction`` of each split, as `evaluate` returns them;
        ``steps``, ``batch_size``, ``loss``, ``beside_teacher`` (see `trainer.loop.excess`), the ``seconds`` of its
        training and of the ``stages`` before it; the ``published`` numbers.

    Raises:
        FileExistsError: the folder holds anything else.
        TrainingError: the folder holds a reproduction of another profile, or another process uses it; or a stage
            cannot be trained. The stages raise further errors.
    """
    settings = ReproduceOptions(out=out, methods=None if methods is None else tuple(methods), **options)
    out, profile = Path(out), with_arch(profile, settings.arch)
    stages = plan(profile, chosen(profile, methods), settings.seeds)
    _check_networks(profile, settings.device)
    with _claimed(out, profile) as state:
        job = _Job(out, profile, sources or {}, settings.device, state, echo)
        results, points = (_kept(out, f"{name}.jsonl") for name in ("results", "curves"))
        tested = {result["model"] for result in results}
        models = [stage for stage in stages if stage.row is not None]
        if state["reported"] == sorted(tested) and tested >= {stage.path for stage in models}:
            echo(
                f"the reproduction in {out} is finished: ask for more methods or seeds to extend it; to run it again, "
                "remove the folder or choose another one"
            )
            return results
        results = _make_all(job, stages, results)
        echo(f"[{len(stages) + 1}/{len(stages) + 1}] the report: tables and pictures")
        _report(job, results, points)
        return results


@dataclass(frozen=True)
class _Job:
    """A reproduction at work. ``state``: what its marker file records, which changes."""

    out: Path
    profile: Profile
    sources: Mapping[str, str | Path]
    device: str
    state: dict[str, Any]
    echo: Callable[[str], None]


def _make_all(job: _Job, stages: Sequence[Stage], results: list[Result]) -> list[Result]:
    """Make and test what is missing; return the results of all models in the order of the table."""
    tested = {result["model"] for result in results}
    for number, stage in enumerate(stages, start=1):
        if not _finished(job.out / stage.path):
            job.echo(f"[{number}/{len(stages) + 1}] {stage.says}")
            with _timed(job, stage.path):
                _make(job, stage)
        if stage.row is not None and stage.path not in tested:
            results = _in_order(job.profile, [*results, _test(job, stage)])
            _write_results(job, results)
    return results


def _report(job: _Job, results: Sequence[Result], points: list[Result]) -> None:
    with _timed(job, "report"):
        _draw(job, results, _test_snapshots(job, results, points))
    job.state["reported"] = sorted(result["model"] for result in results)
    write_json(job.out / MARKER, job.state)


# --- the folder ---------------------------------------------------------------------------------------------


@contextmanager
def _claimed(out: Path, profile: Profile) -> Iterator[dict[str, Any]]:
    """Claim a reproduction's folder and yield its state, new or as recorded. Other processes are refused."""
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
    if not out.is_dir() or any(not entry.name.endswith(PARTIAL) and entry.name != LOCK_FILE for entry in out.iterdir()):
        raise FileExistsError(Message(f"{out} exists and is not empty", NEW_FOLDER))


def _read_state(marker: Path, profile: Profile) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(marker.read_text())
        recorded = {**_defaults(), **state["profile"]}  # an earlier version has not recorded all of its fields
    except (ValueError, TypeError, KeyError):
        raise TrainingError(
            Message(f"{marker} is damaged: remove the folder, or choose another ", Option("out"))
        ) from None
    if differing := differences(recorded, dataclasses.asdict(profile)):
        more = f", and {len(differing) - TOLD} more" if len(differing) > TOLD else ""
        raise TrainingError(
            Message(
                f"{marker.parent} holds a reproduction with other options ({'; '.join(differing[:TOLD])}{more}; the "
                "recorded value first): give the same options to resume it, or choose another ",
                Option("out"),
            )
        )
    return state


def _defaults() -> Mapping[str, Any]:
    """Return the profile's fields that have a default, with it."""
    return dataclasses.asdict(Profile("", {}, {}))


def _kept(out: Path, name: str) -> list[Result]:
    """Read the lines of a file, and drop those of models that are no longer there."""
    path = out / name
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in lines if _finished(out / line["model"])]
    except (ValueError, TypeError, KeyError):
        raise TrainingError(f"{path} is damaged: remove it, and run the same command again to rebuild it") from None
    if len(kept) < len(lines):
        _write_lines(out, name, kept)
    return kept


def _write_lines(out: Path, name: str, lines: Sequence[Result]) -> None:
    Folder(out).write(name, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _finished(product: Path) -> bool:
    """Tell whether a stage's dataset, store or training is complete."""
    if product.suffix != ".zarr":
        return Run(product).finished
    try:
        if product.parent.name == "stores":
            check_complete(open_cache(product))
        else:
            open_dataset(product)
    except (DatasetError, CacheError):
        return False
    return True


@contextmanager
def _timed(job: _Job, name: str) -> Iterator[None]:
    """Add to the seconds of a stage, which may be interrupted and resumed."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = job.state["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 1)
        write_json(job.out / MARKER, job.state)


# --- the stages ---------------------------------------------------------------------------------------------


def _check_networks(profile: Profile, device: str) -> None:
    """Raise ModelError for networks that cannot be built and a device that cannot be used, before anything is made."""
    pick_device(device)
    side = profile.data.get("size", profile.table.size)
    channels = profile.data.get("channels", profile.table.channels)
    for of in (profile.teacher, profile.student):
        factory = of.get("teacher_factory") or of.get("student_factory")
        build_network(
            factory or of["arch"],
            10,
            (channels, side, side),
            free_of_biases=bool(profile.teacher["bias_free"]),
            options=of.get("arch_options"),
            factory=factory,
        )
        options = _with_paths(of)
        for name in _START:
            if options.get(name) is not None:
                read_weights(options[name])


def _with_paths(options: Options) -> dict[str, Any]:
    """Replace functions that return the path of a file of weights, MODULE:FUNCTION, by the path."""
    functions = {name: options[name] for name in _START if _FUNCTION.fullmatch(str(options.get(name)))}
    return {**options, **{name: call_function(value, name, "file of weights") for name, value in functions.items()}}


def _make(job: _Job, stage: Stage) -> None:
    path, options, device = job.out / stage.path, _with_paths(stage.options), job.device
    if stage.kind == "data":
        job.profile.table.make(path, **job.sources, **options)
        return
    data, *others = (job.out / needed.path for needed in stage.needs)
    if stage.kind == "teacher":
        train_teacher(others[0] if others else data, path, device=device, **options)
    elif stage.kind == "store":
        (teacher,) = others
        cache_explanations(data, teacher, path, device=device, **options)
    else:
        cache, validation_cache = (*others, None, None)[:2]
        if options.get("teacher_weights"):
            options["init"] = job.out / options["init"]
        train_student(data, cache, path, validation_cache=validation_cache, device=device, **options)


def _test(job: _Job, stage: Stage) -> Result:
    """Test a trained model and return its line. No other test of the model is made."""
    table, run = job.profile.table, Run(job.out / stage.path)
    result = run.result
    assert stage.row is not None
    assert result is not None
    row, (data, *_) = table.rows[stage.row], stage.needs
    factory = factory_of(job.profile, stage.row)
    scores = evaluate(job.out / data.path, run.path, student_factory=factory, device=job.device)
    return {
        "model": stage.path,
        "method": stage.row,
        "title": row.title,
        "seed": stage.seed,
        "arch": scores["arch"],
        "teacher": row.teacher,
        **{split: scores["splits"][split]["accuracy"] for split in table.tests},
        **{key: scores[key] for key in ("gap", "worst_group")},
        **{key: {name: split.get(key) for name, split in scores["splits"].items()} for key in OF_SPLITS},
        "groups": [group for split in scores["splits"].values() for group in split["groups"]],
        "steps": result["steps"],
        "batch_size": run.config.training["batch_size"],
        "loss": result["loss"],
        "beside_teacher": result.get("beside_teacher"),
        "seconds": round(result["seconds"], 1),
        "stages": {path: job.state["seconds"].get(path, 0.0) for path in before(stage)},
        "published": row.published,
    }


def _test_snapshots(job: _Job, results: Sequence[Result], points: list[Result]) -> list[Result]:
    """Add the points of models that have snapshots to those of the curves, and remove the snapshots."""
    out = job.out
    models = {result["model"]: Run(out / result["model"]).snapshots for result in results}
    drawn = {point["model"] for point in points}
    with tqdm(total=sum(map(len, models.values())), unit="snapshot", desc="curves", disable=None) as bar:
        for result in results:
            model, files = result["model"], models[result["model"]]
            if files and model not in drawn:
                about = {key: result[key] for key in ("model", "method", "title", "seed")}
                data, factory, device = out / "data.zarr", factory_of(job.profile, result["method"]), job.device
                for point in evaluate_snapshots(
                    data, out / model, images=CURVE_IMAGES, student_factory=factory, device=device
                ):
                    points.append({**about, **point, "used_for": "a picture; nothing was chosen by it"})
                    bar.update()
                points = _in_order(job.profile, points)
                _write_lines(out, "curves.jsonl", points)
            for file in files.values():
                file.unlink()
    return points


def _in_order(profile: Profile, lines: Sequence[Result]) -> list[Result]:
    """Sort lines by the rows of the table, then by seed. Lines of one model keep their order."""
    place = {row: index for index, row in enumerate(profile.table.rows)}
    return sorted(lines, key=lambda line: (place.get(line["method"], len(place)), line["seed"]))


def _write_results(job: _Job, results: Sequence[Result]) -> None:
    _write_lines(job.out, "results.jsonl", results)
    lines = summarise(results, job.profile.table)
    for name, content in (("table.md", markdown(lines)), ("table.tex", latex(lines))):
        Folder(job.out).write(f"report/{name}", content.encode())


def _draw(job: _Job, results: Sequence[Result], points: Sequence[Result]) -> None:
    out, report, tests = job.out, job.out / "report", job.profile.table.tests
    first = {result["title"]: out / result["model"] for result in reversed(results)}  # of the first seed
    models = {title: first[title] for title in dict.fromkeys(result["title"] for result in results)}
    harder = tuple(split for split in tests if split != "iid")
    factories = {result["title"]: factory_of(job.profile, result["method"]) for result in results}
    heatmap_picture(open_dataset(out / "data.zarr"), harder, models, report / "heatmaps.png", factories)
    groups_picture(results, harder, report / "groups.png")
    if points:
        curves_picture(points, tests, report / "curves.png")
