"""The whole story in one command: a small reproduction, of a teacher, a classifier that cheats, and a distilled one."""

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
    """What `reproduce` does, for a profile of minutes on a CPU; and its results in ``results.json``.

    Raises what `reproduce` does.
    """
    results = reproduce(out, profile, echo=echo)
    write_json(Path(out) / "results.json", results)
    return results
