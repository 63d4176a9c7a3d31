"""What a training under torchrun promises: it is the same training, and a process that dies loses nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_resume import ROOT, environment
from test_training import metrics, weights

from cli import main

STEPS = 20


def torchrun(processes: int, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    # a port that is free, on loopback
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return [*launcher, *where, str(ROOT / "cli.py"), *map(str, arguments)]


def student(dataset: Path, cache: Path, out: Path, *more: object) -> list[object]:
    return [
        "train-student", "--data", dataset, "--cache", cache, "--out", out, "--device", "cpu", "--steps", STEPS,
        "--batch-size", 60, "--log-steps", 1, *more,
    ]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)


def alone(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


# What training on heatmaps makes of float rounding grows from step to step (docs/training.md): two
# threads in place of one differ as much as two processes do. In float64 nothing of it is to be seen in 20 steps.
# A digit's stroke is flat, so that max-pooling finds equal values in it, and which of them gets the relevance is a
# matter of the last bit, which on some processors the size of the batch decides: the network has no max-pooling.
PRECISE = ["--precision", "float64", "--lr", "2e-4", "--arch", "small-resnet"]
PRECISE += ["--arch-option", "width=8", "--arch-option", "depth=1"]
SAME = {
    "heatmaps, scale-only norms": (PRECISE, 1e-7),
    "heatmaps, batch norms, a learnt head": (
        [*PRECISE, "--no-bias-free", "--head", "free", "--loss", "lrp=1,output=0.1"],
        1e-6,
    ),
    "outputs, in float32": (["--method", "output", "--ema", "0.9", "--weight-decay", "0.01"], 1e-4),
    "labels, moved images": (["--method", "erm", "--augment", "flip,shift,crop", "--precision", "float64"], 1e-6),
}


@pytest.mark.parametrize("way", SAME)
def test_two_processes_with_half_the_batch_each_have_the_losses_of_one(dataset, cache, tmp_path, way):
    options, tolerance = SAME[way]
    given = {name: student(dataset, cache, tmp_path / name, *options) for name in ("one", "two")}
    if "erm" in options:
        given = {name: [each for each in all_ if each not in ("--cache", cache)] for name, all_ in given.items()}
    one = CliRunner().invoke(main, [str(each) for each in given["one"]])
    two = run(torchrun(2, *given["two"]))
    assert (one.exit_code, two.returncode) == (0, 0), one.output + two.stderr
    assert two.stdout.count("after 20 steps") == 1  # one process speaks
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert max(abs(one - two) for one, two in zip(*losses, strict=True)) < tolerance
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "two").keys()


def test_a_training_goes_on_with_another_number_of_processes(dataset, cache, validation_cache, tmp_path):
    options = [*PRECISE, "--validation-cache", validation_cache, "--checkpoint-steps", 4]
    assert run(alone(*student(dataset, cache, tmp_path / "whole", *options))).returncode == 0
    given = student(dataset, cache, tmp_path / "s", *options)
    process = subprocess.Popen(torchrun(2, *given), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "s" / "checkpoints" / "step-000000008.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.terminate()  # torchrun, which passes it on to its processes
    _, said = process.communicate(timeout=60)
    assert "the same command resumes it" in said
    assert not (tmp_path / "s" / "result.json").exists()
    assert run(alone(*given)).returncode == 0
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "s")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "validation_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(value, weights(tmp_path / "s")[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_job_with_a_sentence_and_a_checkpoint_to_go_on_from(
    dataset, cache, tmp_path, dies
):
    given = student(dataset, cache, tmp_path / "s", "--checkpoint-steps", 2, "--steps", 4000)
    process = subprocess.Popen(torchrun(2, *given), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "s" / "checkpoints" / "step-000000006.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(workers(process.pid)[dies], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(
        r"another process of this job ended .*The same command resumes it from the last checkpoint in", said
    )
    assert "line" not in "".join(re.findall(r"^Traceback.*?cli\.py", said, re.MULTILINE))
    newest = max((tmp_path / "s" / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert state["progress"]["step"] == int(newest.stem.split("-")[1]) >= 6


def workers(launcher: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            status, environ = (folder / "stat").read_text(), (folder / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if status.rpartition(")")[2].split()[1] == str(launcher) and (rank := re.search(rb"\0RANK=(\d+)\0", environ)):
            found[int(rank[1])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def test_a_batch_that_the_processes_cannot_share_is_refused(dataset, cache, tmp_path):
    result = run(torchrun(2, *student(dataset, cache, tmp_path / "s", "--batch-size", 61)))
    assert result.returncode != 0
    assert "--batch-size 61 is not a multiple of the 2 processes that share each batch" in result.stderr
    assert not (tmp_path / "s").exists()


def test_parts_of_a_batch_that_would_differ_from_those_of_one_process_are_refused(dataset, cache, tmp_path):
    given = student(dataset, cache, tmp_path / "s", "--accumulate", 4)
    result = run(torchrun(2, *given))
    assert result.returncode != 0
    assert "--accumulate 4 does not divide the 30 samples of a batch that each of 2 processes has" in result.stderr
