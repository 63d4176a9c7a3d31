"""Compare two checkouts of this project: do the same commands give the same bytes of dataset, store and weights?

    python benchmarks/compare_checkouts.py OLD NEW --work FOLDER

Each checkout runs its own ``cli.py``, on the CPU with one thread and with small sizes. NEW also goes on with what OLD
left unfinished, and repeats OLD's trainings from their ``config.yaml``. The exit code is 1 if anything differs.
OLD's results stay in FOLDER, so that the next comparison with OLD computes NEW's only. They hold for one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from PIL import Image

STORE = "cache-explanations --data {digits} --teacher {teacher}"
STUDENT = "train-student --data {digits} --cache {store} --steps 20"
MASKED = "train-student --data {shapes} --steps 20"
# By the name of the result: a command, in which {NAME} is the result of another one above it.
COMMANDS = {
    "digits": "make-data coloured-mnist --limit 600 --seed 1",
    "teacher": "train-teacher --data {digits} --steps 60 --checkpoint-steps 10 --seed 1",
    "store": f"{STORE} --draws 32",  # so many draws make a shard small: five shards hold the 600 samples
    "store-validation": f"{STORE} --split validation --draws 2 --seed 2",
    "store-int8": f"{STORE} --explainer gradient-x-input --precision int8 --draws 2",
    "store-features": f"{STORE} --draws 2 --features --codec zstd --resolution 2 --epsilon-range 0.1 1 --batch-size 50",
    "student": f"{STUDENT} --validation-cache {{store-validation}} --steps 60 --checkpoint-steps 10 --snapshots 2",
    "student-lrp": f"{STUDENT} --method lrp --arch small-resnet --no-bias-free --head free --accumulate 2 --seed 3",
    "student-complete-lrp": f"{STUDENT} --method complete-lrp --map-loss cosine --flat",
    "student-loss": f"{STUDENT} --loss lrp=1,output=0.1",
    "student-erm": "train-student --data {digits} --steps 20 --method erm",
    "student-group-dro": "train-student --data {digits} --steps 20 --method group-dro",
    "student-augment": f"{STUDENT} --augment flip,shift",
    "student-muon": f"{STUDENT} --optimizer muon --schedule cosine --warmup 5 --weight-decay 0.01",
    "student-sgd": f"{STUDENT} --optimizer sgd --momentum 0.5 --schedule constant --clip-norm 0.5",
    "student-ema": f"{STUDENT} --ema 0.9",
    "student-float64": f"{STUDENT} --precision float64",
    "student-int8": "train-student --data {digits} --cache {store-int8} --epochs 1",
    "student-features": "train-student --data {digits} --cache {store-features} --steps 20 --method features",
    "shapes": "make-data image-folder --train {photos}/train --test ood={photos}/ood --masks {photos}/masks --size 32",
    "mask-teacher": "train-teacher --data {shapes} --debias mask --steps 20 --augment crop",
    "mask-store": "cache-explanations --data {shapes} --teacher {mask-teacher} --draws 2",
    "mask-student": f"{MASKED} --cache {{mask-store}} --mask-target --augment background",
    "mask-student-rrr": f"{MASKED} --method rrr --augment background",
    "mask-student-isnet": f"{MASKED} --method isnet",
}
ALWAYS = {"make": "", "train": "--batch-size 32 --log-steps 5 --device cpu", "cache": "--device cpu"}
# By the name of the result: the file after which OLD is stopped, the signal and the exit code. NEW then goes on.
STOPPED = dict.fromkeys(["teacher", "student"], ("checkpoints/step-*.pt", signal.SIGTERM, 128 + signal.SIGTERM))
STOPPED["store"] = ("commits/c.*", signal.SIGKILL, -signal.SIGKILL)
REPEATED = ["teacher", "student", "student-muon", "mask-student"]  # by NEW, with OLD's config.yaml
# A run's protocol of the machine and of the clock, and checkpoints, of which only the names are compared.
UNCOMPARED = (".lock", "starts.jsonl", "tensorboard/")
# Fields that hold versions, times and the path of the result itself.
VOLATILE = {"versions", "written_by", "seconds", "seconds_waiting", "samples_per_second", "waiting", "out"}
# Prints the files that modules come from, and the versions of the libraries on which bytes depend.
PROBE = """import json, sys, importlib.metadata as installed, cli, trainer
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps([files, {name: installed.version(name) for name in ("torch", "numpy", "zarr", "numcodecs")}]))"""


def environment() -> dict[str, str]:
    """Return the variables for a command: one thread, no GPU, no other path to import from, no bytecode written."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def sources(checkout: Path) -> list[Path]:
    """Return the Python files that a command of the checkout can import."""
    packages = [path.parent for path in checkout.glob("*/__init__.py")]
    return sorted([*checkout.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))])


def check_imports(python: str, checkout: Path) -> dict[str, str]:
    """Check that a checkout's commands import its own modules, and return the versions of the libraries they use.

    Raises:
        click.ClickException: A module comes from elsewhere, or cannot be imported.
    """
    names = {"cli", "trainer", *(path.relative_to(checkout).parts[0].removesuffix(".py") for path in sources(checkout))}
    process = subprocess.run([python, "-c", PROBE], cwd=checkout, env=environment(), capture_output=True, text=True)
    if process.returncode:
        raise click.ClickException(f"{checkout} cannot be imported:\n{process.stderr}")
    files, versions = json.loads(process.stdout)
    for module, file in files.items():
        if module.partition(".")[0] in names and file and not Path(file).resolve().is_relative_to(checkout):
            raise click.ClickException(f"in {checkout}, Python imports {module} from {file}: uninstall or rename that")
    return versions


def words(name: str, side: Path) -> list[str]:
    """Return the words of a command, without ``--out``, that reads the results in the folder of one side."""
    command = f"{COMMANDS[name]} {ALWAYS[COMMANDS[name].partition('-')[0]]}"
    places = {name: side / name for name in COMMANDS} | {"photos": side.parent / "photos"}
    return [word.format_map(places) for word in command.split()]


def start(python: str, checkout: Path, arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Start a command of a checkout; what it prints goes to ``OUT.log.partial``."""
    with out.with_name(f"{out.name}.log.partial").open("wb") as log:
        command = [python, "cli.py", *arguments, "--out", str(out)]
        return subprocess.Popen(command, cwd=checkout, env=environment(), stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], out: Path, expected: int = 0) -> str | None:
    """Wait for a command, and return the last line of its log if its exit code is not the expected one.

    Otherwise rename the log to ``OUT.log``, which marks the result as complete.
    """
    code = process.wait()
    log = out.with_name(f"{out.name}.log.partial")
    if code != expected:
        return f"exit code {code}: {(log.read_text(errors='replace').strip() or 'no output').splitlines()[-1]}"
    log.rename(out.with_name(f"{out.name}.log"))
    return None


def run_old(python: str, checkout: Path, name: str, side: Path, stopped: bool = False) -> None:
    """Make a result with OLD in the folder ``side``, unless it is there already.

    With ``stopped``, the command is stopped as `STOPPED` says, and its unfinished result is ``NAME-stopped``.

    Raises:
        click.ClickException: The command fails, or ends before it can be stopped.
    """
    out = side / (f"{name}-stopped" if stopped else name)
    if out.with_name(f"{out.name}.log").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    process, expected = start(python, checkout, words(name, side), out), 0
    if stopped:
        pattern, signum, expected = STOPPED[name]
        while process.poll() is None and not any(out.glob(pattern)):
            time.sleep(0.001)
        process.send_signal(signum)
    error = finish(process, out, expected)
    if error:
        raise click.ClickException(f"{checkout} could not make {out.name}: {error}")


def first_difference(old: Any, new: Any, *, name: str = "") -> str | None:
    """Return the first field or tensor in which two parsed files differ; None if they are equal bit for bit."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = (dict(enumerate(values)) for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [key for key in {**old, **new} if key not in VOLATILE]:
            pair, field = (old.get(key, "missing"), new.get(key, "missing")), f"{name}.{key}".strip(".")
            if difference := first_difference(*pair, name=field):
                return difference
        return None
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return None if type(old) is type(new) and old == new else f"{name} is {old!r} in OLD, {new!r} in NEW"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{name} is {old.dtype} {tuple(old.shape)} in OLD, {new.dtype} {tuple(new.shape)} in NEW"
    bits = [tensor.reshape(-1).view(torch.uint8).reshape(max(1, tensor.numel()), -1) for tensor in (old, new)]
    count = int((bits[0] != bits[1]).any(dim=1).sum())
    return f"{count} of the {old.numel()} values of {name} differ" if count else None


def compare_files(old: Path, new: Path) -> str | None:
    """Return the first difference of two files, but for versions, times and the folder; None if there is none."""
    contents = old.read_bytes(), new.read_bytes()
    if old.parent.name == "checkpoints" or contents[0] == contents[1]:
        return None
    if old.suffix == ".pt":
        models = [torch.load(path, map_location="cpu", weights_only=path.name != "model.pt") for path in (old, new)]
        states = [model.state_dict() if isinstance(model, torch.nn.Module) else model for model in models]
        hashes = " and ".join(hashlib.sha256(content).hexdigest()[:12] for content in contents)
        return first_difference(*states) or f"the tensors are equal, but the files are not (SHA-256 {hashes})"
    if old.suffix == ".yaml":
        return first_difference(*(yaml.safe_load(content.replace(b"/new/", b"/old/")) for content in contents))
    if old.suffix == ".jsonl":
        return first_difference(*([json.loads(line) for line in content.splitlines()] for content in contents))
    if old.name in ("config.json", "result.json") or b'"written_by"' in contents[0]:
        return first_difference(*map(json.loads, contents))
    return "its bytes differ" if len(contents[0]) == len(contents[1]) else "its size differs"


def compare_results(old: Path, new: Path) -> tuple[int, str | None]:
    """Return the number of files that two results share, and the first difference; None if there is none."""
    files = [{str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} for top in (old, new)]
    old_names, new_names = ({name for name in names if not name.startswith(UNCOMPARED)} for names in files)
    telling = ("weights.pt", "heatmaps/")  # before what follows from them: model.pt, commits
    both = sorted(old_names & new_names, key=lambda name: (not name.startswith(telling), name))
    unequal = (f"{name}: {text}" for name in both if (text := compare_files(old / name, new / name)))
    single = (f"{name} is in {'OLD' if name in old_names else 'NEW'} only" for name in sorted(old_names ^ new_names))
    return len(both), next(chain(unequal, single), None if both else "there are no files")


def check_resumed(stopped: Path, out: Path) -> str | None:
    """Return what NEW did again although OLD had done it before it was stopped; None if NEW went on from there."""
    if (out / "starts.jsonl").exists():
        step = json.loads((out / "starts.jsonl").read_text().splitlines()[-1])["step"]
        return None if step else "NEW began at step 0 again"
    shards = [path.relative_to(stopped) for path in stopped.glob("commits/c.*")]
    again = [str(path) for path in shards if (stopped / path).stat().st_mtime_ns != (out / path).stat().st_mtime_ns]
    if again or len(shards) == len(list(out.glob("commits/c.*"))):
        return f"NEW wrote {again[0]} again" if again else "OLD was complete when it was stopped: give --fresh"
    return None


def checks(python: str, checkouts: tuple[Path, Path], work: Path) -> Iterator[tuple[str, int, str | None]]:
    """Run every command with OLD and NEW, then let NEW resume OLD's unfinished results and repeat its trainings.

    Yields:
        The name of the check, the number of files that were compared, and the first difference; None if there is none.
    """
    old, new = work / "old", work / "new"

    def run_new(name: str, out: Path, arguments: list[str]) -> tuple[int, str | None]:
        error = finish(start(python, checkouts[1], arguments, out), out)
        return (0, error) if error else compare_results(old / name, out)

    for name in COMMANDS:
        run_old(python, checkouts[0], name, old)
        yield f"{name}: {COMMANDS[name].split(' --')[0]}", *run_new(name, new / name, words(name, new))
    for name in STOPPED:
        run_old(python, checkouts[0], name, old, stopped=True)
        stopped = old / f"{name}-stopped"
        out = Path(shutil.copytree(stopped, new / stopped.name))  # which keeps the times of the files
        files, difference = run_new(name, out, words(name, old))
        yield f"{name}: OLD begins, NEW completes", files, difference or check_resumed(stopped, out)
    for name in REPEATED:
        arguments = [COMMANDS[name].split()[0], "--config", str(old / name / "config.yaml")]
        yield f"{name}: NEW repeats OLD's config.yaml", *run_new(name, new / f"{name}-repeated", arguments)


def draw_photos(folder: Path) -> None:
    """Draw discs and squares of 32×32 pixels before a background that tells which, and masks."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:32, :32]
    for split, label, number in [*product(["train"], [0, 1], range(48)), *product(["ood"], [0, 1], range(8))]:
        down, across = (np.abs(axis - rng.integers(8, 24)) for axis in (rows, columns))
        mask = np.maximum(down, across) < 6 if label else down**2 + across**2 < 40
        image = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        image[..., label if split == "train" else 1 - label] += 64
        image[mask] = rng.integers(128, 256, 3)
        for top, pixels in ((folder, image), (folder / "masks", mask.astype(np.uint8) * 255)):
            path = top / split / ("disc", "square")[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def prepare(work: Path, fresh: bool, made_by: dict[str, Any]) -> None:
    """Drop NEW's results from the work folder, and OLD's too if ``fresh`` or if other code or commands made them.

    Raises:
        click.UsageError: The folder holds something else.
    """
    mark = work / "compared.json"
    if work.exists() and any(work.iterdir()) and not mark.exists():
        raise click.UsageError(f"{work} holds other files: choose another --work")
    stale = fresh or not mark.exists() or json.loads(mark.read_text()) != made_by
    for name in ("new", "photos", *(["old"] if stale else [])):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in ("old", "new"):
        (work / name).mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(made_by, indent=2))
    draw_photos(work / "photos")


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the results of both.")
@click.option("--python", default=sys.executable, help="Interpreter for both checkouts.  [default: this one]")
@click.option("--fresh", is_flag=True, help="Compute OLD's results again.")
def main(old: Path, new: Path, work: Path, python: str, fresh: bool) -> None:
    """Compare what the commands of two checkouts, OLD and NEW, write. The exit code is 1 if anything differs."""
    old, new, work = old.resolve(), new.resolve(), work.resolve()
    versions, _ = check_imports(python, old), check_imports(python, new)
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources(old))).hexdigest()
    prepare(work, fresh, {"work": str(work), "code": code, "versions": versions, "commands": [COMMANDS, ALWAYS]})
    differing, began = 0, time.monotonic()
    for check, files, difference in checks(python, (old, new), work):
        differing += difference is not None
        click.echo(f"{'DIFFERS' if difference else 'same':8} {files:3} files  {check:48} {difference or ''}".rstrip())
    click.echo(f"{differing or 'no'} checks differ, {time.monotonic() - began:.0f} s")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
