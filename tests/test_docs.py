"""Every command and every piece of Python in README and docs runs as it stands there (with small sizes)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import save_clip

from cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = {
    "make-data": ("--limit", "120"),
    **dict.fromkeys(["train-teacher", "train-student", "train-students"], ("--steps", "2")),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def save_files(page: Path) -> None:
    """A block that begins with the comment ``# name.py`` or ``# name.yaml`` is that file, in the current folder."""
    for block in [*blocks(page, "python"), *blocks(page, "yaml")]:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", block):
            Path(name[1]).write_text(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_files(page)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "__docs__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, fashion):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.builders.fashion_on_textures.DEBIAN", str(fashion))
    if page.name == "clip.md":
        save_clip(Path("TINY/vit/clip"), "vit")
    save_files(page)
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if line.startswith("python cli.py ") and not {"quickstart", "reproduce"} & {
            *line.split()
        }:  # have no small sizes
            arguments = shlex.split(line)[2:]
            result = CliRunner().invoke(main, [*arguments, *SMALL.get(arguments[0], ())])
            assert result.exit_code == 0, f"{line}\n{result.output}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_ci_runs_the_readmes_own_test_command():
    (found,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("python -m pytest")]
    assert found.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
