"""The examples run as they stand there (with small sizes), and the notebook's outputs are of a real run."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from data import make_image_folder, open_dataset
from data.builders.coloured_mnist import CLASS_NAMES

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
QUICKSTART, SOLAR_CELLS = NOTEBOOKS = ("quickstart.ipynb", "solar-cells.ipynb")
STEPS = {"TEACHER_STEPS": 2, "ERM_STEPS": 2, "STUDENT_STEPS": 2}
SMALL = {QUICKSTART: {"LIMIT": 120, **STEPS}, SOLAR_CELLS: {"SIZE": 32, "LIMIT": 60, **STEPS}}
PATHS = re.compile(r"(?<![\w.])/(home|root|tmp|Users|usr|opt|var|mnt|private|work)\b|[A-Z]:\\")  # of somebody's machine


class ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter of the tests, whatever is installed as python3."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / name, as_version=4)


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def drawings(notebook: nbformat.NotebookNode) -> int:
    return sum("data" in output for output in outputs(notebook))


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def table(notebook: nbformat.NotebookNode) -> dict[str, tuple[float, ...]]:
    """Accuracies on iid, ood and shift, by model."""
    rows = re.findall(r"^(\w+) +([\d.]+) +([\d.]+) +([\d.]+)(?: +[\d.]+ %)?$", printed(notebook), re.MULTILINE)
    return {title: tuple(map(float, row)) for title, *row in rows}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def call(*command: str, folder: Path) -> str:
    """What a Python program says, started in a folder."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    notebook = read(name)
    cell = parameters(notebook)
    for parameter, size in SMALL[name].items():
        cell.source, found = re.subn(
            rf"^{parameter} = [\d_]+", f"{parameter} = {size}", cell.source, flags=re.MULTILINE
        )
        assert found == 1, parameter
    folders = {folder: str(tmp_path / folder) for folder in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment(**folders))  # raises where a cell does
    assert pictures(notebook) == drawings(read(name)) > 0
    rows = table(notebook)
    assert set(rows) == {"ERM", "teacher", "student"}
    assert all(0 <= accuracy <= 100 for row in rows.values() for accuracy in row)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebooks_outputs_are_there_and_of_one_run_from_top_to_bottom(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell for cell in cells if not cell.outputs]
    assert all("show(" not in cell.source and "print_answers(" not in cell.source for cell in silent)
    assert len(silent) == 2  # the sizes, the imports
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs(notebook))
    assert (EXAMPLES / name).stat().st_size < 600_000


def test_photographs_of_another_licence_are_not_saved_in_a_notebook():
    assert pictures(read(QUICKSTART)) > 0
    assert pictures(read(SOLAR_CELLS)) == 0


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_nothing_of_the_machine_that_it_ran_on(name):
    notebook = read(name)
    texts = [cell.source for cell in notebook.cells] + [printed(notebook), str(notebook.metadata)]
    for output in outputs(notebook):
        for kind, content in output.get("data", {}).items():
            texts.append(content if kind.startswith("text/") else base64.b64decode(content)[:500].decode("latin-1"))
    for text in texts:
        assert not PATHS.search(text), text
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_the_quickstarts_prose_says_what_its_outputs_do():
    rows = table(read(QUICKSTART))
    assert rows["ERM"][0] > 99  # "nearly 100 %"
    assert rows["ERM"][2] < 10  # "worse than guessing"
    assert min(rows["teacher"]) > 95
    behind = [theirs - ours for theirs, ours in zip(rows["teacher"], rows["student"], strict=True)]
    assert max(behind) < 1  # "less than a point behind its teacher on each test"
    answers = re.findall(r"^(\w+)((?: +[a-z]+){10})$", printed(read(QUICKSTART)), re.MULTILINE)
    said = {title: words.split() for title, words in answers}
    assert sum(map(str.__eq__, said["ERM"], CLASS_NAMES)) >= 8  # "for nearly every colour, … the digit of this colour"
    assert set(said["teacher"]) == set(said["student"]) == {"seven"}


def test_the_solar_cells_prose_says_what_its_outputs_do():
    rows = table(read(SOLAR_CELLS))
    assert rows["ERM"][0] > 99.5  # "perfect"
    assert rows["ERM"][2] < 5  # "nearly every answer is wrong"
    assert max(rows["teacher"]) - min(rows["teacher"]) < 0.1  # "as good without the stamp as with it"
    assert max(rows["student"]) - min(rows["student"]) < 1  # "less than a point"


def test_painted_xrays_are_folders_by_source_whose_sources_tell_a_class(tmp_path, caplog):
    call(str(EXAMPLES / "paint_xrays.py"), "--out", "xrays", folder=tmp_path)
    root = tmp_path / "xrays"
    tests = {"iid": root / "iid", "ood": root / "ood"}
    sizes = make_image_folder(
        tmp_path / "d", root / "train", tests, layout="source/class", masks=root / "masks", size=32
    )
    assert sizes == {"train": 1080, "validation": 120, "iid": 300, "ood": 500}
    dataset = open_dataset(tmp_path / "d")
    hospitals = {
        name: {dataset.group_name(group)[-1] for group in split.groups[:]} for name, split in dataset.splits.items()
    }
    assert hospitals == {"train": set("abcd"), "validation": set("abcd"), "iid": set("abcd"), "ood": set("efg")}
    page = " ".join((ROOT / "docs" / "own-images.md").read_text().split())
    for record in caplog.records:  # the page shows what the command says
        assert record.getMessage() in page


def test_an_own_model_is_explained_trained_compared_and_exported(tmp_path):
    small = ("--limit", "120", "--teacher-steps", "2", "--erm-steps", "2", "--student-steps", "2", "--width", "4")
    out = tmp_path / "out"
    said = call(str(EXAMPLES / "own_model.py"), "--out", str(out), *small, folder=tmp_path)
    assert re.findall(r"^(\w[\w, -]+?)  +([\d.]+) +([\d.]+) +([\d.]+)$", said, re.MULTILINE)[2][0] == (
        "own network, heatmaps"
    )
    assert (out / "heatmaps.png").read_bytes()[:4] == b"\x89PNG"
    network = torch.export.load(out / "student.pt2").module()
    assert network(torch.rand(3, 3, 28, 28)).shape == (3, 10)

    # and on the command line, as its docstring says: where the file is
    model = ("--data", str(out / "data.zarr"), "--model", str(out / "student"), "--device", "cpu")
    evaluated = call(str(ROOT / "cli.py"), "evaluate", *model, "--student-factory", "own_model:build", folder=EXAMPLES)
    assert "shift" in evaluated


def test_an_own_model_has_help_and_overwrites_nothing(tmp_path):
    script = str(EXAMPLES / "own_model.py")
    assert "--student-steps" in call(script, "--help", folder=tmp_path)
    refused = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert refused.returncode == 2
    assert "exists: choose another --out" in refused.stderr
