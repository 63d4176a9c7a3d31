"""What docs/architecture.md promises: each package imports only the packages that its table allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| `(\w+(?:/|\.py))` \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
)
PACKAGES = {name.strip("/").removesuffix(".py") for name, _ in ROWS}
IMPORT = re.compile(r"""^\s*(?:from|import) (\w+)|Lazy\("(\w+)""", re.MULTILINE)


def test_the_table_names_every_package():
    assert {
        "cli",
        *(file.parent.name for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests"),
    } == PACKAGES


@pytest.mark.parametrize(("name", "allowed"), ROWS, ids=[name for name, _ in ROWS])
def test_a_package_imports_only_what_the_table_allows(name, allowed):
    permitted = {*re.findall(r"`(\w+)`", allowed), name.strip("/").removesuffix(".py")}
    for file in [ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py*"):
        if file.suffix in (".py", ".pyi"):
            imported = {first or second for first, second in IMPORT.findall(file.read_text())} & PACKAGES
            assert imported <= permitted, file
