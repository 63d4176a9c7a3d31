"""The declared bounds of the dependencies are the releases at which the suite is run."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINTERS = {"mypy", "ruff"}  # they run at their newest releases alone


def _declared() -> list[tuple[str, str]]:
    """Return name and version specifier of every requirement in setup.cfg, those of the extras included."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = [Requirement(line) for text in lists for line in text.split("\n") if line]
    return [(requirement.name, str(requirement.specifier)) for requirement in requirements]


def _pinned() -> dict[str, str]:
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def _same_release(bound: str, pin: str) -> bool:
    parts = [[int(part) for part in release.split(".")] for release in (bound, pin)]
    longest = max(map(len, parts))
    first, second = (release + [0] * (longest - len(release)) for release in parts)
    return first == second


def test_every_dependency_has_one_lower_bound_which_is_the_pinned_release():
    pins = _pinned()
    wrong = []
    for name, specifier in _declared():
        bound = re.fullmatch(r">=([0-9.]+)", specifier)
        if bound is None or (name not in LINTERS and not (name in pins and _same_release(bound[1], pins[name]))):
            wrong.append(f"{name}{specifier}: constraints-lowest.txt has {pins.get(name)}")
    assert wrong == []


def test_every_pinned_release_is_that_of_a_declared_dependency():
    assert set(_pinned()) == {name for name, _ in _declared()} - LINTERS


def test_the_command_for_the_lowest_releases_names_every_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    command = re.search(r'-e "\.\[(.*)]"', (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8"))
    assert command is not None
    assert set(command[1].split(",")) == set(config["options.extras_require"])
