"""The whole method in one command: a small reproduction with a teacher, a biased classifier and a distilled student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.reproduction.profiles import PROFILES, Profile
from trainer.reproduction.reproduce import reproduce
from trainer.run_dir import write_json


def quickstart(
    out: str | Path, profile: Profile = PROFILES["quickstart"], echo: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Reproduce a small table in minutes on a CPU, and write the results to ``results.json``.

    Args:
        out: the folder: new, empty, or an earlier quickstart.
        profile: the sizes.
        echo: takes a line of progress.

    Returns:
        The results, as `reproduce` returns them, and with its errors.
    """
    results = reproduce(out, profile, seeds=1, echo=echo)
    write_json(Path(out) / "results.json", results)
    return results
