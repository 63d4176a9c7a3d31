"""What CONTRIBUTING.md shows: its diffs fit the code, and each entry works once its diff is applied."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "options", "pipeline", "teacher_cache", "terminal", "trainer")
HELP = {  # command → names that its help lists
    "train-student": ("logits", "charbonnier", "nadam", "linear", "absolute-gradient", "--cooldown"),
    "train-teacher": ("green",),
    "cache-explanations": ("gamma-half", "absolute-gradient", "lz4hc", "int16"),
    "make-data": ("patched-mnist",),
}
TABLES = {  # page → names that its tables list
    "training.md": ("logits", "charbonnier", "nadam", "linear", "absolute-gradient"),
    "engine.md": ("gamma-half", "absolute-gradient"),
    "backgrounds.md": ("green",),
    "cache-layout.md": ("lz4hc", "int16"),
    "overview.md": ("patched-mnist",),
}
USES = """
import torch
import zarr
from data import open_dataset
from data.builders.patched_mnist import make_patched_mnist
from pipeline import cache_explanations, explain
from teacher_cache import open_cache
from trainer import train_student, train_teacher

print(make_patched_mnist("D.zarr", limit=40), open_dataset("D.zarr").name)
train_teacher("D.zarr", "T", debias="green", schedule="linear", steps=2, batch_size=16)
cache_explanations("D.zarr", "T", "G.zarr", explainer="gamma-half", codec="lz4hc", precision="int16")
assert open_cache("G.zarr").info.storage.codec.startswith("blosc-lz4hc-9-")
assert zarr.open_group("G.zarr", mode="r")["heatmaps"].dtype == "int16"
cache_explanations("D.zarr", "T", "A.zarr", explainer="absolute-gradient")
own = dict(steps=2, batch_size=16, optimizer="nadam", schedule="linear", warmup=1, map_loss="charbonnier")
train_student("D.zarr", "G.zarr", "S", **own, loss="lrp=1,logits=0.1")
train_student("D.zarr", "A.zarr", "B", **own)
images = torch.rand(2, 3, 4, 4)
heatmaps = explain(lambda x: torch.atan(x).flatten(1), images, torch.tensor([0, 47]), 0.1)[1]
assert heatmaps.abs().sum() > 0
"""


def apply(diff: str, folder: Path) -> None:
    """Apply a diff whose hunks have no numbers: their old lines must stand once in the file."""
    for path, hunks in re.findall(r"^\+\+\+ b/(\S+)\n((?:(?!\+\+\+ b/).*\n)+)", diff, re.MULTILINE):
        file = folder / path
        text = file.read_text() if file.exists() else ""
        for hunk in hunks.split("@@\n")[1:]:
            old, new = (
                "".join(line[1:] or "\n" for line in hunk.splitlines(keepends=True) if line[0] in signs)
                for signs in (" -", " +")
            )
            assert not file.exists() or text.count(old) == 1, f"CONTRIBUTING.md changes {path} where it has no\n{old}"
            text = text.replace(old, new) if old else new
        file.write_text(text)


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the code with every diff applied."""
    folder = tmp_path_factory.mktemp("changed")
    for package in (*PACKAGES, "docs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cli.py", folder)
    for diff in re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL):
        apply(diff, folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", HELP)
def test_what_the_diffs_enter_is_in_the_help(changed, command):
    page = run(changed, "cli.py", command, "--help")
    for name in HELP[command]:
        assert name in page


def test_what_the_diffs_enter_is_in_the_tables_of_the_docs(changed):
    run(changed, "docs/tables.py")
    for page, names in TABLES.items():
        for name in names:
            assert f"| `{name}` |" in (changed / "docs" / page).read_text()


def test_what_the_diffs_enter_works(changed):
    assert "{'train': 40, 'iid': 40, 'shift': 40} patched-mnist" in run(changed, "-c", USES)
