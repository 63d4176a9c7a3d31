"""Many students of one store: a list of options for `train_student`, trained one after another or one on each device.

Each is trained in a process of its own, so that one that fails stops no other.
"""

from __future__ import annotations

import inspect
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from data import open_dataset
from teacher_cache import open_cache
from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.loop.interruption import Interruption, TrainingInterrupted
from trainer.loop.methods import METHODS, of_store
from trainer.results.evaluation import evaluate
from trainer.run_dir import write_json
from trainer.settings import Runtime, Settings, check_types

PLACES = ("data", "cache", "validation_cache")
OF_SWEEP = {"out", "device"}  # which no student has of its own
POLL = 0.2  # seconds between two looks at the processes


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 2e-3 is a number, as on the command line: YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_sweep(path: str | Path) -> dict[str, Any]:
    """A sweep from a YAML file: options of train-student for all, and under ``students`` those of each.

    Raises TrainingError for a file that says anything else.
    """
    try:
        found = yaml.load(Path(path).read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not isinstance(found.get("students", []), list):
        raise TrainingError(f"{path} must hold options, and under 'students' a list of options; see docs/training.md")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def plan_sweep(common: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of each student by its name, with every combination where an option has a list of values.

    A student's name is what it was given, or the options that it has of its own, and those of which there is a list, so
    that it stays the same beside whatever others. Raises TrainingError.
    """
    known = {*inspect.signature(train_student).parameters, *_fields(Settings), *_fields(Runtime)}
    known -= {"options", *OF_SWEEP}
    named: dict[str, dict[str, Any]] = {}
    for student in students or [{}]:
        if not isinstance(student, Mapping):
            raise TrainingError(
                f"a student of the sweep is {student!r}: give options, such as {{arch: resnet18, seed: [0, 1]}}"
            )
        own = {str(key).replace("-", "_"): value for key, value in student.items()}
        options = {**common, **own}
        if unknown := sorted(set(options) - known - {"name"}):
            raise TrainingError(f"the sweep has options that no student can have: {', '.join(unknown)}")
        for key in PLACES:
            if isinstance(options.get(key), list):
                raise TrainingError(f"the sweep has several values for {key}: all students are of one store")
        if isinstance(options.get("augment"), str):  # as on the command line
            options["augment"] = [name.strip() for name in options["augment"].split(",") if name.strip()]
        lists = {key: value for key, value in options.items() if isinstance(value, list) and key != "augment"}
        for values in itertools.product(*lists.values()):
            one = {**options, **dict(zip(lists, values, strict=True))}
            given = str(one.pop("name", ""))
            keys = [key for key in one if key in lists or (key in own and not given and key not in PLACES)]
            name = "-".join([*([given] if given else []), *(_label(key, one[key]) for key in keys)])
            name = re.sub(r"[^\w.=-]+", "-", name).lstrip(".") or "student"  # a folder within the sweep's, and seen
            if name in named:
                raise TrainingError(f"two students of the sweep are alike, or both called '{name}': give them names")
            check_types(one, train_student, Settings, Runtime)
            if one.get("method") in METHODS and not of_store(
                {one["method"]: 1}
            ):  # it has no use for that of the others
                one |= {"cache": None, "validation_cache": None}
            named[name] = one
    return named


def _fields(kind: Any) -> set[str]:
    return set(kind.__dataclass_fields__)


def _label(key: str, value: Any) -> str:
    return f"{key}={value}" if not isinstance(value, str) else value.rpartition(":")[2]


def train_students(
    out: str | Path,
    students: Mapping[str, Mapping[str, Any]],
    *,
    devices: Sequence[str] | None = None,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train every student of `plan_sweep` into ``out/NAME``, test it, and tabulate them in ``out/students.json``.

    ``devices``: at each of them one student at a time; None is every CUDA device, or the CPU. Run again it goes on:
    what is finished stays, what was interrupted continues. Returns a row for each student: ``name``, ``loss``,
    ``seconds``, ``iid``, ``ood``, ``shift``, ``gap``, or what its ``error`` was.

    Raises TrainingError for a folder that has other students of the same names, TrainingInterrupted.
    """
    out = Path(out)
    plan = {name: {"device": "auto", **options} for name, options in students.items()}
    plan = json.loads(json.dumps(plan, default=str))  # as the file has it
    if devices is not None and not devices:
        raise TrainingError("--devices names none: give some such as cuda:0,cuda:1, or leave it out")
    _claim(out, plan)
    if devices is None:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    context = multiprocessing.get_context("spawn")
    waiting = [name for name in plan if not (out / name / "result.json").exists()]
    total, free = len(waiting), list(devices)
    running: dict[str, tuple[Any, str]] = {}
    with Interruption() as interruption:
        while waiting or running:
            while waiting and free and interruption.signal is None:
                name, device = waiting.pop(0), free.pop(0)
                echo(f"{total - len(waiting)}/{total} {name}, on {device}")
                (out / f"{name}.error").unlink(missing_ok=True)
                options = {**plan[name], "device": device}
                process = context.Process(target=_train_one, args=(out / name, options, len(devices) > 1))
                process.start()
                running[name] = process, device
            for name, (process, device) in list(running.items()):
                process.join(POLL)
                if process.exitcode is not None:
                    free.append(device)
                    del running[name]
            if interruption.signal is not None:
                for process, _ in running.values():
                    if process.pid is not None:
                        os.kill(process.pid, signal.SIGTERM)
                for process, _ in running.values():
                    process.join()
                finished = sum((out / name / "result.json").exists() for name in plan)
                raise TrainingInterrupted(
                    f"stopped with {finished} of {len(plan)} students finished in {out}: the same command goes on",
                    interruption.signal,
                )
    rows = [_row(out, name, plan[name]) for name in plan]
    write_json(out / "students.json", rows)
    return rows


def _train_one(out: Path, options: dict[str, Any], quiet: bool) -> None:
    """In a process of its own. What goes wrong is in ``OUT.error``."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C goes to all; the parent passes it on
    try:
        train_student(**{"cache": None, **options}, out=out)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        out.with_name(f"{out.name}.error").write_text(str(error) or type(error).__name__)
        if not isinstance(error, ValueError | OSError):
            raise
        sys.exit(1)


def _row(out: Path, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    try:
        result = json.loads((out / name / "result.json").read_text())
    except FileNotFoundError:
        error = out / f"{name}.error"
        return {**row, "error": error.read_text() if error.exists() else "its process ended without a word"}
    scores: Mapping[str, Any] = dict.fromkeys(("iid", "ood", "shift", "gap", "worst_group"))
    if open_dataset(options["data"]).test_splits:
        scores = evaluate(options["data"], out / name, student_factory=options.get("student_factory"))
    kept = {key: result[key] for key in ("loss", "validation_loss", "steps", "seconds", "seconds_waiting")}
    return {**row, **kept, **{key: scores[key] for key in ("iid", "ood", "shift", "gap", "worst_group")}}


def _claim(out: Path, plan: Mapping[str, Any]) -> None:
    """Note the plan in ``out/sweep.json``; more students may come later, but not others of the same name."""
    marker = out / "sweep.json"
    before: dict[str, Any] = {}
    if marker.exists():
        try:
            before = json.loads(marker.read_text())
        except ValueError:
            raise TrainingError(f"{marker} is damaged: choose another --out, or remove {out}") from None
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another --out, or remove it first")
    noted = {name: {**options, "learns_from": _learns_from(options)} for name, options in plan.items()}
    for name, options in noted.items():
        if name in before and before[name] != options:
            keys = [key for key in {**before[name], **options} if before[name].get(key) != options.get(key)]
            differing = "; ".join(f"{key}: {before[name].get(key)!r}, {options.get(key)!r}" for key in keys)
            raise TrainingError(
                f"{out} has a student '{name}' with other options ({differing}; its first, this command's second): "
                "give the same, or choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(marker, {**before, **noted})


def _learns_from(options: Mapping[str, Any]) -> dict[str, str]:
    """What tells the data and stores at the paths from others that may come to lie there."""
    dataset = open_dataset(options["data"])
    found = {"train": dataset.split("train").fingerprint}
    for key in ("cache", "validation_cache"):
        if options.get(key) is not None:
            found[key] = f"{open_cache(options[key]).info.identity(0):08x}"
    return found


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The students as a text table, the best on unseen bias first."""
    width = max(len("student"), *(len(row["name"]) for row in rows))
    columns = ("iid", "ood", "shift", "gap")
    lines = [f"{'student':<{width}}{'loss':>10}" + "".join(f"{name:>8}" for name in columns) + f"{'seconds':>10}"]
    for row in sorted(rows, key=lambda row: (row.get("ood") is None, -(row.get("ood") or 0.0))):
        if "error" in row:
            lines.append(f"{row['name']:<{width}}  failed: {row['error']}")
            continue
        scores = "".join(f"{'–' if row[name] is None else format(row[name], '.2f'):>8}" for name in columns)
        lines.append(f"{row['name']:<{width}}{row['loss']:>10.4f}{scores}{row['seconds']:>10.0f}")
    return "\n".join(lines)
