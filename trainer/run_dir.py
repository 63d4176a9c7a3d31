"""The files of a run folder, which only this module knows by name: `Run` reads them, `RunDir` writes them.

A training writes its configuration first, metrics and checkpoints on the way, and ``result.json`` last. Every file is
written whole or not at all. The last line of a log may be incomplete; readers drop it.
"""

from __future__ import annotations

import fcntl
import io
import json
import re
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from data.storage import PARTIAL, Folder
from options import Message, Option
from pipeline import ModelConfig, ModelError
from pipeline.networks.classifier import CONFIG_FILE, WEIGHTS_FILE, read_config, versions
from trainer.errors import TrainingError

OPTIONS_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
MODEL_FILE = "model.pt"
RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
CHECKPOINTS, SNAPSHOTS, TENSORBOARD, PROFILE = "checkpoints", "snapshots", "tensorboard", "profile"
TUNING = "tuning"  # trials that a training may begin with
FILES = {
    *(CONFIG_FILE, OPTIONS_FILE, STARTS_FILE, METRICS_FILE, FAILURE_FILE, WEIGHTS_FILE, MODEL_FILE, RESULT_FILE),
    *(LOCK_FILE, CHECKPOINTS, SNAPSHOTS, TENSORBOARD, PROFILE, TUNING),
}
NEW_FOLDER = Message(": choose another ", Option("out"), ", or remove it first")


@dataclass(frozen=True)
class Run:
    """Read the files of a run folder, which may be unfinished or absent. Every look reads the file again."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the training has ended and written its result."""
        return (self.path / RESULT_FILE).exists()

    @property
    def begun(self) -> bool:
        """Whether the training has a checkpoint, which may be damaged."""
        return any((self.path / CHECKPOINTS).glob("step-*.pt"))

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model. Raises ModelError where the folder has none that can be read."""
        return read_config(self.path)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the training; None while it is unfinished, or where the file is damaged."""
        try:
            result = json.loads((self.path / RESULT_FILE).read_text())
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) else None

    @property
    def datasets(self) -> list[str]:
        """Where the dataset of the last start may be: at its path, also relative to the parent of the run folder."""
        data = self.starts[-1].get("data") if self.starts else None
        if not isinstance(data, str):
            return []
        return [data] if "://" in data or Path(data).is_absolute() else [data, str(self.path.absolute().parent / data)]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics log, each with its ``step``."""
        return read_lines(self.path / METRICS_FILE)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """A record of each start: the step from which it went on, the time, the options and the versions."""
        return read_lines(self.path / STARTS_FILE)

    @property
    def snapshots(self) -> dict[int, Path]:
        """The files with the weights at some steps of the training, by step in ascending order."""
        files = sorted((self.path / SNAPSHOTS).glob("step-*.pt"))
        return {int(file.stem.removeprefix("step-")): file for file in files}


class RunDir:
    """Claim a run folder for this process and write its files. Close it after the last use.

    An unfinished run with the same configuration is resumed from its `checkpoint`. An unfinished run with another
    configuration and without a checkpoint is started anew, as nothing is lost.

    Args:
        out: the folder: new, empty, or an unfinished run to resume.
        config: what decides the weights.
        options: the options of this start. ``config.yaml`` records those of the first start, for a command that
            repeats the training.

    Raises:
        FileExistsError: the path holds anything else.
        TrainingError: the folder holds an unfinished run with another configuration, or another process uses it.
    """

    def __init__(self, out: str | Path, config: ModelConfig, options: Mapping[str, Any]):
        self.path = Path(out)
        check_free(self.path)
        self._folder = Folder(self.path)
        self._folder.make()
        self._lock = lock(self.path, "training")
        try:
            check_free(self.path)  # again, as somebody may have finished it just now
            self._folder.sweep()
            self._write_config(config, options)
        except BaseException:
            self.close()
            raise

    def _write_config(self, config: ModelConfig, options: Mapping[str, Any]) -> None:
        recorded, file = self.path / CONFIG_FILE, self.path / OPTIONS_FILE
        differing = differences(json.loads(recorded.read_text()), config.to_dict()) if recorded.exists() else []
        if differing and self.checkpoints():
            raise with_other_options(f"{self.path} holds an unfinished training", differing)
        if differing or not recorded.exists():
            write_json(recorded, config.to_dict())
        if differing or not file.exists():
            remedy = f"give this file to the command train-{config.kind} as its config, and another folder as out"
            text = f"# To repeat this training, {remedy}.\n{yaml.safe_dump(dict(options), sort_keys=False)}"
            self._folder.write(OPTIONS_FILE, text.encode())

    def close(self) -> None:
        """Release the folder for other processes."""
        self._lock.close()

    # --- checkpoints ------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """List the checkpoints, the oldest first."""
        files = (self.path / CHECKPOINTS).glob("step-*.pt")
        return sorted(path for path in files if re.fullmatch(r"step-\d{9,}\.pt", path.name))

    def checkpoint(self) -> tuple[dict[str, Any] | None, list[Path]]:
        """Read the newest checkpoint that is intact, and rename the damaged ones.

        A renamed checkpoint does not count among those that are kept.

        Returns:
            The state of the checkpoint, None where there is none, and the paths of the newer, damaged ones.
        """
        damaged: list[Path] = []
        for path in reversed(self.checkpoints()):
            try:
                with zipfile.ZipFile(path) as file:  # torch.load looks at no checksum
                    if file.testzip() is None:
                        state = torch.load(path, map_location="cpu", weights_only=True)
                        if {"model", "progress"} <= set(state):
                            return state, damaged
            except OSError:
                raise
            except Exception:  # zipfile and torch raise many kinds for a file that is cut or foreign
                pass
            damaged.append(path.rename(path.with_suffix(".damaged")))
        return None, damaged

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint, then remove all but the newest ``keep``."""
        self._save(f"{CHECKPOINTS}/step-{step:09}.pt", state)
        for path in self.checkpoints()[:-keep]:
            path.unlink()

    def save_snapshot(self, step: int, weights: dict[str, Any]) -> None:
        """Write the weights of a step, which `Run.snapshots` finds."""
        self._save(f"{SNAPSHOTS}/step-{step:09}.pt", weights)

    def _save(self, name: str, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._folder.write(name, buffer.getbuffer())

    # --- logs and results -------------------------------------------------------------------------------

    def begin(self, step: int, **how: Any) -> None:
        """Record a start in the log of starts, and remove what an interrupted run wrote after this step.

        Args:
            step: the step from which the training goes on; 0 for a new one.
            how: what else to record.
        """
        kept = [json.dumps(line) for line in Run(self.path).metrics if line["step"] <= step]
        self._folder.write(METRICS_FILE, "".join(f"{line}\n" for line in kept).encode())
        for name in (WEIGHTS_FILE, MODEL_FILE, FAILURE_FILE):
            (self.path / name).unlink(missing_ok=True)
        for at, path in Run(self.path).snapshots.items():
            if at > step:
                path.unlink()
        with (self.path / STARTS_FILE).open("a") as file:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"step": step, "time": when, **how, **versions(), "revision": revision()}) + "\n")

    def log(self, **metrics: Any) -> None:
        """Append a line to the metrics log."""
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def fail(self, **failure: Any) -> None:
        """Record why the training had to stop."""
        write_json(self.path / FAILURE_FILE, failure)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, which marks the training as finished."""
        write_json(self.path / RESULT_FILE, result)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log, which are JSON objects; none where there is no file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last line of a process that was killed
            continue
    return [line for line in lines if isinstance(line, dict)]


def check_free(path: Path) -> None:
    """Raise FileExistsError unless the path is new, an empty folder, or an unfinished run to resume."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if {RESULT_FILE, CONFIG_FILE} <= names:
        raise FileExistsError(Message(f"{path} holds a finished training", NEW_FOLDER))
    others = {name for name in names if not (name.startswith(".") and name.endswith(PARTIAL))} - {LOCK_FILE, TUNING}
    if others and (CONFIG_FILE not in others or others - FILES or not _is_config(path / CONFIG_FILE)):
        raise FileExistsError(Message(f"{path} exists and is not empty", NEW_FOLDER))


def _is_config(path: Path) -> bool:
    """Tell whether a training wrote this file."""
    try:
        ModelConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, ModelError):
        return False
    return True


def lock(folder: Path, activity: str) -> BinaryIO:
    """Claim a folder until the returned file is closed, or this process ends.

    Args:
        folder: an existing folder.
        activity: what another process would be doing there, for the error: "another process is ``activity`` in …".

    Raises:
        TrainingError: another process has claimed the folder.
    """
    file = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TrainingError(
            Message(
                f"another process is {activity} in {folder}: wait until it has finished, or choose another ",
                Option("out"),
            )
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def differences(recorded: Any, current: Any, name: str = "") -> list[str]:
    """Compare two records, apart from their ``versions``.

    Returns:
        A line for each difference: ``name: recorded value, current value``.
    """
    recorded, current = (json.loads(json.dumps(values)) for values in (recorded, current))
    if not (isinstance(recorded, dict) and isinstance(current, dict)):
        return [] if recorded == current else [f"{name}: {recorded!r}, {current!r}"]
    lines: list[str] = []
    for key in sorted({*recorded, *current} - ({"versions"} if not name else set())):
        lines += differences(recorded.get(key), current.get(key), f"{name}.{key}" if name else key)
    return lines


def with_other_options(holder: str, differing: Sequence[str]) -> TrainingError:
    """Return the error for a folder that holds something of other options, whose `differences` are given."""
    return TrainingError(
        Message(
            f"{holder} with other options ({'; '.join(differing)}; the recorded value first): give the same options to "
            "resume it, or choose another ",
            Option("out"),
        )
    )


def revision() -> str | None:
    """Return the git revision of this program, with a + where files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder)]
    try:  # ignores a repository in which this program is merely installed
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10, check=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    Folder(path.parent).write(path.name, (json.dumps(values, indent=2) + "\n").encode())
