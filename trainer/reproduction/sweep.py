"""Many students of one store: a list of options for `train_student`, trained one after another or one on each device.

Each student is trained in a process of its own, so that a failure stops no other.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data import open_dataset
from options import Call, Message, Option, option_fields
from options.fields import check
from options.yaml_file import read_yaml
from teacher_cache import open_cache
from trainer.distill import train_student
from trainer.errors import TrainingError
from trainer.loop.interruption import Interruption, TrainingInterrupted
from trainer.loop.methods import METHODS, of_store
from trainer.results.evaluation import evaluate
from trainer.run_dir import NEW_FOLDER, Run, write_json
from trainer.settings import StudentOptions

PLACES = ("data", "cache", "validation_cache")
OF_SWEEP = {"out", "device"}  # options of the sweep, which no student has
POLL = 0.2  # seconds between two looks at the processes
SCORES = ("iid", "ood", "shift", "gap", "worst_group")


# --- the plan -----------------------------------------------------------------------------------------------


def read_sweep(path: str | Path) -> dict[str, Any]:
    """Read a sweep from a YAML file.

    Returns:
        The options of train-student that all students have and, under ``students``, a list of the options of each.

    Raises:
        TrainingError: the file is not valid YAML, or holds anything else.
    """
    values = read_yaml(path, error=TrainingError)
    if not isinstance(values.get("students", []), list):
        raise TrainingError(f"{path} must hold options, and under 'students' a list of options; see docs/training.md")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def plan_sweep(common: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """List the students of a sweep: every combination where an option has a list of values.

    A student's name is its ``name``, or the values of its own options and of those that have a list. So the name stays
    the same whatever other students there are.

    Args:
        common: options of all students.
        students: further options of each; one student without any if empty.

    Returns:
        The options of each student, by its name.

    Raises:
        TrainingError: an option is unknown, has a wrong type, or two students have the same name.
    """
    planned: dict[str, dict[str, Any]] = {}
    for student in students or [{}]:
        for name, options in _combinations(common, student):
            if name in planned:
                raise TrainingError(f"two students of the sweep are alike, or both called '{name}': give them names")
            planned[name] = options
    return planned


def _combinations(common: Mapping[str, Any], student: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the options of each combination of one entry of the sweep."""
    if not isinstance(student, Mapping):
        raise TrainingError(
            f"a student of the sweep is {student!r}: give options, such as {{arch: resnet18, seed: [0, 1]}}"
        )
    own = {str(key).replace("-", "_"): value for key, value in student.items()}
    options = {**common, **own}
    if unknown := sorted(set(options) - _student_options() - {"name"}):
        raise TrainingError(f"the sweep has options that no student can have: {', '.join(unknown)}")
    for key in PLACES:
        if isinstance(options.get(key), list):
            raise TrainingError(f"the sweep has several values for {key}: all students are of one store")
    if isinstance(options.get("augment"), str):  # as on the command line
        options["augment"] = [name.strip() for name in options["augment"].split(",") if name.strip()]
    lists = {key: value for key, value in options.items() if isinstance(value, list) and key != "augment"}
    for values in itertools.product(*lists.values()):
        one = {**options, **dict(zip(lists, values, strict=True))}
        own_name = str(one.pop("name", ""))
        keys = [key for key in one if key in lists or (key in own and not own_name and key not in PLACES)]
        name = "-".join([*([own_name] if own_name else []), *(_label(key, one[key]) for key in keys)])
        _check(one)
        if one.get("method") in METHODS and not of_store({one["method"]: 1}):  # it ignores the other students' store
            one |= {"cache": None, "validation_cache": None}
        yield _folder_name(name), one


def _check(options: Mapping[str, Any]) -> None:
    """Raise TrainingError for a value that an option cannot have."""
    for field in option_fields(StudentOptions):
        if field.name in options:
            check(field, options[field.name], TrainingError)


def _student_options() -> set[str]:
    return {field.name for field in option_fields(StudentOptions)} - OF_SWEEP


def _label(key: str, value: Any) -> str:
    return f"{key}={value}" if not isinstance(value, str) else value.rpartition(":")[2]


def _folder_name(name: str) -> str:
    """Make a name one that can be a folder within the sweep's folder, and is not hidden."""
    return re.sub(r"[^\w.=-]+", "-", name).lstrip(".") or "student"


# --- the trainings ------------------------------------------------------------------------------------------


def train_students(
    out: str | Path,
    students: Mapping[str, Mapping[str, Any]],
    *,
    devices: Sequence[str] | None = None,
    echo: Callable[[str], None] = print,
    spell: Callable[[Option | Call], str] = str,
) -> list[dict[str, Any]]:
    """Train students, test each of them, and tabulate them in ``students.json``.

    A second call resumes the sweep: finished students stay, interrupted ones are resumed.

    Args:
        out: the folder of the students' folders.
        students: the options of each student by its name, as `plan_sweep` returns them.
        devices: train one student at a time on each; every CUDA device, or the CPU, if None.
        echo: takes a line of progress.
        spell: spells the options in the error of a student: as in Python by default, as flags for a command line. It
            is sent to the student's process, so it must be possible to pickle it.

    Returns:
        A row for each student: ``name``, ``loss``, ``validation_loss``, ``steps``, ``seconds``, ``seconds_waiting``,
        and of `evaluate` ``iid``, ``ood``, ``shift``, ``gap`` and ``worst_group``; or its ``name`` and ``error``.

    Raises:
        TrainingError: the folder has other students of the same names.
        TrainingInterrupted: a signal stopped the sweep.
    """
    out = Path(out)
    plan = {name: {"device": "auto", **options} for name, options in students.items()}
    plan = json.loads(json.dumps(plan, default=str))  # as the file has it
    if devices is not None and not devices:
        raise TrainingError(
            Message(Option("devices"), " names no device: give some, such as cuda:0,cuda:1, or leave the option out")
        )
    _claim(out, plan)
    if devices is None:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    _train_all(out, plan, devices, echo, spell)
    rows = [_row(out, name, plan[name]) for name in plan]
    write_json(out / "students.json", rows)
    return rows


def _train_all(
    out: Path,
    plan: Mapping[str, dict[str, Any]],
    devices: Sequence[str],
    echo: Callable[[str], None],
    spell: Callable[[Option | Call], str],
) -> None:
    """Train the unfinished students, one at a time on each device. Raises TrainingInterrupted."""
    context = multiprocessing.get_context("spawn")
    waiting = [name for name in plan if not Run(out / name).finished]
    total, free_devices = len(waiting), list(devices)
    running: dict[str, tuple[Any, str]] = {}
    with Interruption() as interruption:
        while waiting or running:
            while waiting and free_devices and interruption.signal is None:
                name, device = waiting.pop(0), free_devices.pop(0)
                echo(f"{total - len(waiting)}/{total} {name}, on {device}")
                _error_file(out, name).unlink(missing_ok=True)
                options = {**plan[name], "device": device}
                process = context.Process(target=_train_one, args=(out / name, options, len(devices) > 1, spell))
                process.start()
                running[name] = process, device
            for name, (process, device) in list(running.items()):
                process.join(POLL)
                if process.exitcode is not None:
                    free_devices.append(device)
                    del running[name]
            if interruption.signal is not None:
                _stop([process for process, _ in running.values()])
                finished = sum(Run(out / name).finished for name in plan)
                raise TrainingInterrupted(
                    f"stopped with {finished} of {len(plan)} students finished in {out}: run the same command again "
                    "to resume",
                    interruption.signal,
                )


def _stop(processes: Sequence[Any]) -> None:
    """Ask the processes to write a checkpoint and end, and wait for them."""
    for process in processes:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join()


def _train_one(out: Path, options: dict[str, Any], quiet: bool, spell: Callable[[Option | Call], str]) -> None:
    """Train a student in this process, which is its own. An error is written to ``OUT.error``."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of a terminal goes to all processes; the parent passes it on
    try:
        train_student(**{"cache": None, **options}, out=out)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        _error_file(out.parent, out.name).write_text(Message(error).spell(spell) or type(error).__name__)
        if not isinstance(error, ValueError | OSError):
            raise
        sys.exit(1)


def _error_file(out: Path, name: str) -> Path:
    return out / f"{name}.error"


# --- results ------------------------------------------------------------------------------------------------


def _row(out: Path, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Test a finished student; return its row of the table."""
    row: dict[str, Any] = {"name": name}
    result = Run(out / name).result
    if result is None:
        error = _error_file(out, name)
        return {**row, "error": error.read_text() if error.exists() else "its process ended without an error message"}
    scores: Mapping[str, Any] = dict.fromkeys(SCORES)
    if open_dataset(options["data"]).test_splits:
        scores = evaluate(options["data"], out / name, student_factory=options.get("student_factory"))
    of_training = {key: result[key] for key in ("loss", "validation_loss", "steps", "seconds", "seconds_waiting")}
    beside = {"excess": (result.get("beside_teacher") or {}).get("excess")}
    return {**row, **of_training, **beside, **{key: scores[key] for key in SCORES}}


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as a text table, the student with the highest OOD accuracy first.

    With validation stores it has the ``excess`` over the teacher, see `trainer.loop.excess`.
    """
    width = max(len("student"), *(len(row["name"]) for row in rows))
    compared = any(row.get("excess") is not None for row in rows)
    columns = (*(("excess",) if compared else ()), "iid", "ood", "shift", "gap")
    lines = [f"{'student':<{width}}{'loss':>10}" + "".join(f"{name:>8}" for name in columns) + f"{'seconds':>10}"]
    for row in sorted(rows, key=lambda row: (row.get("ood") is None, -(row.get("ood") or 0.0))):
        if "error" in row:
            lines.append(f"{row['name']:<{width}}  failed: {row['error']}")
            continue
        scores = "".join(f"{'–' if row[name] is None else format(row[name], '.2f'):>8}" for name in columns)
        lines.append(f"{row['name']:<{width}}{row['loss']:>10.4f}{scores}{row['seconds']:>10.0f}")
    return "\n".join(lines)


# --- the folder ---------------------------------------------------------------------------------------------


def _claim(out: Path, plan: Mapping[str, Any]) -> None:
    """Record the plan in ``sweep.json``. Students may be added later, but none of a recorded name may change."""
    marker = out / "sweep.json"
    recorded: dict[str, Any] = {}
    if marker.exists():
        try:
            recorded = json.loads(marker.read_text())
        except ValueError:
            raise TrainingError(
                Message(f"{marker} is damaged: choose another ", Option("out"), f", or remove {out}")
            ) from None
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(Message(f"{out} exists and is not empty", NEW_FOLDER))
    current = {name: {**options, "learns_from": _learns_from(options)} for name, options in plan.items()}
    for name, options in current.items():
        if name in recorded and recorded[name] != options:
            keys = [key for key in {**recorded[name], **options} if recorded[name].get(key) != options.get(key)]
            differing = "; ".join(f"{key}: {recorded[name].get(key)!r}, {options.get(key)!r}" for key in keys)
            raise TrainingError(
                Message(
                    f"{out} has a student '{name}' with other options ({differing}; the recorded value first): give "
                    "the same options, or choose another ",
                    Option("out"),
                )
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(marker, {**recorded, **current})


def _learns_from(options: Mapping[str, Any]) -> dict[str, str]:
    """Identify the data and the stores, so that others at the same paths are noticed."""
    dataset = open_dataset(options["data"])
    identities = {"train": dataset.split("train").fingerprint}
    for key in ("cache", "validation_cache"):
        if options.get(key) is not None:
            identities[key] = f"{open_cache(options[key]).info.identity(0):08x}"
    return identities
