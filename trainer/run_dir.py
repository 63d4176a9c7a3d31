"""The folder of one training: its configuration first, metrics and checkpoints on the way, ``result.json`` last.

Every file is written whole or not at all; a line of a log may be cut off, and is then dropped by who continues.
"""

from __future__ import annotations

import fcntl
import io
import json
import re
import subprocess
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from data.storage import PARTIAL, Folder
from pipeline import ModelConfig, ModelError
from pipeline.networks.classifier import versions
from trainer.errors import TrainingError

FILES = {
    *(
        "config.json",
        "config.yaml",
        "starts.jsonl",
        "metrics.jsonl",
        "failure.json",
        "weights.pt",
        "model.pt",
        "result.json",
    ),
    *(".lock", "checkpoints", "snapshots", "tensorboard", "profile"),
}


class RunDir:
    """One training's folder, claimed for this process as long as that lives; close it after the last look at it.

    Found unfinished, with the same configuration, it is continued: `checkpoint` is what from. With another
    configuration and without any checkpoint it begins anew, as nothing is lost. ``given`` are the options of its first
    start, which ``config.yaml`` has for a command that repeats it.

    Raises FileExistsError for a path that holds anything else, TrainingError for an unfinished training with another
    configuration, and for one that another process is at.
    """

    def __init__(self, out: str | Path, config: ModelConfig, given: Mapping[str, Any]):
        self.path = Path(out)
        check_free(self.path)
        self._folder = Folder(self.path)
        self._folder.make()
        self._lock = lock(self.path, "training")
        try:
            check_free(self.path)  # again, as somebody may have finished it just now
            self._folder.sweep()
            found = self.path / "config.json"
            differing = differences(json.loads(found.read_text()), config.to_dict()) if found.exists() else []
            if differing and self.checkpoints():
                raise TrainingError(
                    f"{self.path} holds an unfinished training with other options ({'; '.join(differing)}; its "
                    "first, this command's second): give the same ones to continue it, or choose another --out"
                )
            if differing or not found.exists():
                write_json(found, config.to_dict())
            if differing or not (self.path / "config.yaml").exists():
                again = f"python cli.py train-{config.kind} --config {self.path / 'config.yaml'} --out ANOTHER"
                text = f"# To train it once more: {again}\n{yaml.safe_dump(dict(given), sort_keys=False)}"
                self._folder.write("config.yaml", text.encode())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    # --- checkpoints ------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """What is there of them, the oldest first."""
        found = (self.path / "checkpoints").glob("step-*.pt")
        return sorted(path for path in found if re.fullmatch(r"step-\d{9,}\.pt", path.name))

    def checkpoint(self) -> tuple[dict[str, Any] | None, list[Path]]:
        """The newest one that can be read, None where there is none; and the newer ones, which are damaged.

        These are given another name, so that they do not count among the last ones that stay.
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
        """Write one, then remove all but the last ``keep``."""
        self._save(f"checkpoints/step-{step:09}.pt", state)
        for path in self.checkpoints()[:-keep]:
            path.unlink()

    def save_snapshot(self, step: int, weights: dict[str, Any]) -> None:
        """Keep the weights of a step; see `snapshots`."""
        self._save(f"snapshots/step-{step:09}.pt", weights)

    def _save(self, name: str, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._folder.write(name, buffer.getbuffer())

    # --- logs and results -------------------------------------------------------------------------------

    def begin(self, step: int, **how: Any) -> None:
        """Note in ``starts.jsonl`` how the training goes on, and from which step, and forget what came after that."""
        metrics = self.path / "metrics.jsonl"
        kept = []
        for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
            try:
                values = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if values["step"] <= step:
                kept.append(line)
        self._folder.write("metrics.jsonl", "".join(f"{line}\n" for line in kept).encode())
        for name in ("weights.pt", "model.pt", "failure.json"):
            (self.path / name).unlink(missing_ok=True)
        for at, path in snapshots(self.path).items():
            if at > step:
                path.unlink()
        with (self.path / "starts.jsonl").open("a") as file:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"step": step, "time": when, **how, **versions(), "revision": revision()}) + "\n")

    def log(self, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def fail(self, **failure: Any) -> None:
        """Write ``failure.json``: what a training that had to stop knows of why."""
        write_json(self.path / "failure.json", failure)

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, which makes the training finished."""
        write_json(self.path / "result.json", result)


def snapshots(path: Path) -> dict[int, Path]:
    """The files with the weights that a training had on its way, by step, the first one first."""
    return {int(file.stem.removeprefix("step-")): file for file in sorted((path / "snapshots").glob("step-*.pt"))}


def check_free(path: Path) -> None:
    """Raise FileExistsError unless a training may write here: nothing, an empty folder, an unfinished training."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if "result.json" in names and "config.json" in names:
        raise FileExistsError(f"{path} holds a finished training: choose another --out, or remove it first")
    there = {name for name in names if not (name.startswith(".") and name.endswith(PARTIAL))} - {".lock"}
    if there and ("config.json" not in there or there - FILES or not _is_config(path / "config.json")):
        raise FileExistsError(f"{path} exists and is not empty: choose another --out, or remove it first")


def _is_config(path: Path) -> bool:
    """Whether a training wrote this file."""
    try:
        ModelConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, ModelError):
        return False
    return True


def lock(folder: Path, at_work: str) -> BinaryIO:
    """Claim a folder for as long as the file that this returns is open, or this process lives.

    Raises TrainingError, which says that another process is ``at_work`` there.
    """
    file = (folder / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TrainingError(
            f"another process is {at_work} in {folder}: let it finish, or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def differences(found: Any, given: Any, name: str = "") -> list[str]:
    """What is not alike in two records, as ``name: found, given``; ``versions`` do not count."""
    found, given = (json.loads(json.dumps(values)) for values in (found, given))
    if not (isinstance(found, dict) and isinstance(given, dict)):
        return [] if found == given else [f"{name}: {found!r}, {given!r}"]
    lines: list[str] = []
    for key in sorted({*found, *given} - ({"versions"} if not name else set())):
        lines += differences(found.get(key), given.get(key), f"{name}.{key}" if name else key)
    return lines


def revision() -> str | None:
    """The git revision that this program runs from, with a + where files differ from it; None where there is none."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder)]
    try:  # not that of a repository in whose folder this program is merely installed
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10, check=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    Folder(path.parent).write(path.name, (json.dumps(values, indent=2) + "\n").encode())
