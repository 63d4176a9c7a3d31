"""The folder of one training: ``config.json`` first, ``metrics.jsonl`` on the way, ``result.json`` last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import ModelConfig


class RunDir:
    """Claims ``out`` for one training. Without a ``result.json`` it is unfinished, and a new training may take it.

    Raises FileExistsError for a path that holds anything else.
    """

    def __init__(self, out: str | Path, config: ModelConfig):
        self.path = Path(out)
        check_free(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", config.to_dict())
        (self.path / "weights.pt").unlink(missing_ok=True)
        (self.path / "metrics.jsonl").write_text("")

    def log(self, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def finish(self, **result: Any) -> dict[str, Any]:
        """Write ``result.json``, which makes the training finished, and return what it says."""
        write_json(self.path / "result.json", result)
        return result


def check_free(path: Path) -> None:
    """Raise FileExistsError unless a training may write here: nothing, an empty folder, an unfinished training."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if "result.json" in names and "config.json" in names:
        raise FileExistsError(f"{path} holds a finished training: choose another --out, or remove it first")
    ours = {"config.json", "metrics.jsonl", "weights.pt", "result.json"}
    parts = {name.removesuffix(".partial") for name in names}
    if "config.json" not in parts or not parts <= ours or not _is_config(path / "config.json"):
        raise FileExistsError(f"{path} exists and is not empty: choose another --out, or remove it first")


def _is_config(path: Path) -> bool:
    """Whether a training wrote this file; it did where only the partial one is there yet."""
    try:
        ModelConfig.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return True
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)
