"""What a training that is stopped promises: the same command goes on, and the weights are those of one that was not."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import metrics, weights

import trainer.loop.training
from data.storage import Folder
from trainer import TrainingError, train_student, train_teacher
from trainer.loop.interruption import TrainingInterrupted
from trainer.loop.optim import is_moment
from trainer.run_dir import Run, RunDir

ROOT = Path(__file__).parent.parent
STEPS = 10
EVERYTHING = {
    "optimizer": "sgd", "momentum": 0.5, "weight_decay": 1e-3, "schedule": "cosine", "warmup": 3, "ema": 0.9,
    "accumulate": 3, "augment": ("flip", "shift", "crop"),
}  # fmt: skip
WAYS = {
    "the default": {},
    "everything at once": EVERYTHING,
    "muon": {"optimizer": "muon"},
    "adamw, constant": {"optimizer": "adamw", "schedule": "constant", "weight_decay": 0.01},
    "dropout": {"arch": "squeezenet1_1", "method": "output"},
    "batch norm and a free head": {"bias_free": False, "head": "free", "loss": "lrp=1,output=0.1"},
}


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def numbers(path: Path) -> list[dict]:
    """The metrics without what the clock says."""
    return [
        {key: value for key, value in line.items() if key not in ("samples_per_second", "waiting")}
        for line in metrics(path)
    ]


@pytest.fixture
def stop_after(monkeypatch):
    """A training gets a SIGTERM while it makes the step that is arranged, counted from 1; 0 is none."""
    real, arranged = trainer.loop.training.seed_torch, [0]

    def seed(*seeds: int) -> None:
        if len(seeds) > 2 and seeds[1] == trainer.loop.training.STEP and seeds[2] == arranged[0] - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*seeds)

    monkeypatch.setattr(trainer.loop.training, "seed_torch", seed)
    return lambda step: arranged.__setitem__(0, step)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_stopped_anywhere_ends_with_the_weights_of_one_that_was_not(
    dataset, cache, validation_cache, tmp_path, stop_after, way
):
    options = {"steps": STEPS, "batch_size": 60, "log_steps": 1, "validation_cache": validation_cache, **WAYS[way]}
    if "arch" in options:
        options |= {"batch_size": 12, "validation_cache": None}
    train_student(dataset, cache, tmp_path / "whole", **options)
    for step in (1, 6):
        out = tmp_path / f"stopped-{step}"
        stop_after(step)
        with pytest.raises(TrainingInterrupted, match=f"stopped after step {step} of {STEPS}"):
            train_student(dataset, cache, out, **options)
        assert not (out / "result.json").exists()
        stop_after(0)
        train_student(dataset, cache, out, **options)
        assert same(out, tmp_path / "whole")
        assert numbers(out) == numbers(tmp_path / "whole")
        assert [json.loads(line)["step"] for line in (out / "starts.jsonl").read_text().splitlines()] == [0, step]
        ours, theirs = (json.loads((path / "result.json").read_text()) for path in (out, tmp_path / "whole"))
        for key in ("loss", "validation_loss", "kept_step", "steps"):
            assert ours[key] == theirs[key]


def test_a_training_stopped_after_every_step_ends_the_same(dataset, tmp_path, stop_after):
    train_teacher(dataset, tmp_path / "whole", steps=5, batch_size=50)
    for step in range(1, 5):
        stop_after(step)
        with pytest.raises(TrainingInterrupted):
            train_teacher(dataset, tmp_path / "t", steps=5, batch_size=50)
    stop_after(0)
    train_teacher(dataset, tmp_path / "t", steps=5, batch_size=50)
    assert same(tmp_path / "t", tmp_path / "whole")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def student(dataset: Path, cache: Path, out: Path, *more: object) -> list[str]:
    return command(
        "train-student", "--data", dataset, "--cache", cache, "--out", out, "--device", "cpu", "--steps", 120,
        "--batch-size", 16, "--checkpoint-steps", 3, *more,
    )  # fmt: skip


def newest(out: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in (out / "checkpoints").glob("step-*.pt")), default=0)


def lines_of(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def run_until(arguments: list[str], reached, signum: int) -> tuple[int, str]:
    """Start a command, send it a signal once ``reached()``, and return its exit code and what it said."""
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    while not reached() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signum)
    return process.wait(60), process.stderr.read()


def test_kill_9_at_any_moment_then_the_same_command_gives_the_same_weights(dataset, cache, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(student(dataset, cache, whole), env=environment(), check=True, capture_output=True)
    # while it sets out, at a step, while it writes checkpoints, at its end
    starts = out / "starts.jsonl"
    moments = [
        lambda: out.exists(),
        lambda: starts.exists(),
        lambda: newest(out) >= 6,
        lambda: newest(out) >= 60 or (newest(out) >= 15 and any((out / "checkpoints").glob(".step-*"))),
        lambda: newest(out) >= 90,
        lambda: newest(out) == 120,
        lambda: (out / "weights.pt").exists(),
    ]
    for moment in moments:
        code, _ = run_until(student(dataset, cache, out), moment, signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0, 1)  # 0 where it was quicker, and 1 as it is finished since
    last = subprocess.run(student(dataset, cache, out), env=environment(), capture_output=True, text=True)
    assert last.returncode == 0 or "holds a finished training" in last.stderr
    assert same(out, whole)
    assert len(starts.read_text().splitlines()) > 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(dataset, cache, tmp_path, signum):
    out = tmp_path / "s"
    arguments = student(dataset, cache, out, "--log-steps", 1)
    code, said = run_until(arguments, lambda: lines_of(out / "metrics.jsonl") >= 3, signum)
    assert code == 128 + signum
    assert "the same command resumes it" in said
    assert "Traceback" not in said
    assert f"stopped after step {newest(out)} of 120" in said
    step = newest(out)
    result = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"resumes after step {step} of 120" in result.stderr


def test_checkpoints_come_every_so_many_steps_and_the_last_ones_stay(dataset, tmp_path):
    train_teacher(dataset, tmp_path / "t", steps=11, batch_size=20, checkpoint_steps=2, keep_checkpoints=3)
    assert [path.name for path in sorted((tmp_path / "t" / "checkpoints").iterdir())] == [
        f"step-{step:09}.pt" for step in (8, 10, 11)
    ]


def test_checkpoints_come_every_so_many_minutes(dataset, tmp_path, monkeypatch):
    saved = []
    real = RunDir.save_checkpoint
    monkeypatch.setattr(
        RunDir, "save_checkpoint", lambda run, step, *more: (saved.append(step), real(run, step, *more))
    )
    train_teacher(dataset, tmp_path / "a", steps=4, batch_size=20, checkpoint_minutes=1e-9)
    train_teacher(dataset, tmp_path / "b", steps=4, batch_size=20, checkpoint_minutes=1e9)
    assert saved == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("ema", [None, 0.7])
def test_snapshots_are_the_weights_of_their_steps_also_when_stopped_on_the_way(dataset, tmp_path, stop_after, ema):
    options = {"steps": 7, "batch_size": 50, "ema": ema}
    moments = [3, 5, 7]  # of three in seven steps
    train_teacher(
        dataset, tmp_path / "whole", **options, snapshots=3, checkpoint_steps=1, keep_checkpoints=9, log_steps=1
    )
    assert list(Run(tmp_path / "whole").snapshots) == moments
    for step, path in Run(tmp_path / "whole").snapshots.items():
        state = torch.load(tmp_path / "whole" / "checkpoints" / f"step-{step:09}.pt", weights_only=True)
        found = torch.load(path, weights_only=True)
        for name, value in found.items():
            assert torch.equal(value, state["model"][name] if ema is None else state["ema"][f"module.{name}"])

    for step in (4, 6):  # the second time from a checkpoint before a snapshot that is there already
        stop_after(step)
        with pytest.raises(TrainingInterrupted):
            train_teacher(dataset, tmp_path / "t", **options, snapshots=3)
    (tmp_path / "t" / "checkpoints" / "step-000000006.pt").unlink()
    torch.save({}, tmp_path / "t" / "snapshots" / "step-000000006.pt")  # of no step of this training: it is forgotten
    stop_after(0)
    train_teacher(dataset, tmp_path / "t", **options, snapshots=3)
    assert list(Run(tmp_path / "t").snapshots) == moments
    for step, path in Run(tmp_path / "t").snapshots.items():
        whole = torch.load(Run(tmp_path / "whole").snapshots[step], weights_only=True)
        found = torch.load(path, weights_only=True)
        assert found.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in found.items())
    last = torch.load(Run(tmp_path / "t").snapshots[7], weights_only=True)
    assert all(torch.equal(value, last[name]) for name, value in weights(tmp_path / "t").items())


@given(steps=st.integers(1, 200), count=st.integers(0, 300))
def test_moments_are_as_many_as_asked_evenly_spread_and_end_with_the_last_step(steps, count):
    moments = [step for step in range(1, steps + 1) if is_moment(step, steps, count)]
    assert moments == sorted({math.ceil(k * steps / count) for k in range(1, count + 1)})
    assert len(moments) == min(steps, count)
    assert moments[-1:] == [steps] * (count > 0)


@pytest.mark.parametrize("damage", ["cut", "a byte", "empty"])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(dataset, tmp_path, stop_after, caplog, damage):
    train_teacher(dataset, tmp_path / "whole", steps=6, batch_size=50)
    stop_after(4)
    with pytest.raises(TrainingInterrupted):
        train_teacher(dataset, tmp_path / "t", steps=6, batch_size=50, checkpoint_steps=2, keep_checkpoints=9)
    newest = tmp_path / "t" / "checkpoints" / "step-000000004.pt"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes({"cut": raw[: len(raw) // 2], "a byte": raw, "empty": b""}[damage])
    stop_after(0)
    train_teacher(dataset, tmp_path / "t", steps=6, batch_size=50)
    assert "step-000000004.damaged is a damaged checkpoint" in caplog.text
    assert same(tmp_path / "t", tmp_path / "whole")
    assert [json.loads(line)["step"] for line in (tmp_path / "t" / "starts.jsonl").read_text().splitlines()] == [0, 2]


def test_an_unfinished_training_is_not_continued_with_other_options(dataset, cache, tmp_path, stop_after):
    stop_after(3)
    with pytest.raises(TrainingInterrupted):
        train_student(dataset, cache, tmp_path / "s", steps=6, batch_size=50)
    stop_after(0)
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    for change, message in (
        ({"lr": 1e-3}, r"training\.lr: 0\.01, 0\.001"),
        ({"steps": 7}, r"training\.steps: 6, 7"),
        ({"method": "output"}, r"training\.loss\.lrp: 1\.0, None"),
        ({"arch": "resnet18"}, r"arch: 'small-cnn', 'resnet18'"),
        ({"seed": 1}, r"training\.seed: 0, 1"),
    ):
        with pytest.raises(TrainingError, match=f"other options .*{message}.*choose another out"):
            train_student(dataset, cache, tmp_path / "s", **{"steps": 6, "batch_size": 50, **change})
        assert before == {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    # how it is run is no such option
    train_student(dataset, cache, tmp_path / "s", steps=6, batch_size=50, workers=1, log_steps=1, keep_checkpoints=1)


def test_two_trainings_do_not_share_a_folder(dataset, tmp_path):
    out = tmp_path / "t"
    arguments = command("train-teacher", "--data", dataset, "--out", out, "--steps", 100000, "--batch-size", 8)
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    try:
        while not (out / "starts.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(TrainingError, match="another process is training in"):
            train_teacher(dataset, out, steps=3)
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_ends_a_training_with_its_last_checkpoint_whole(dataset, tmp_path, monkeypatch):
    real, written = Folder.write, []

    def write(self, key, value, **more):
        if key.startswith("checkpoints/") and len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), key)
        if key.startswith("checkpoints/"):
            written.append(key)
        return real(self, key, value, **more)

    with monkeypatch.context() as full:
        full.setattr(Folder, "write", write)
        with pytest.raises(OSError, match="No space left"):
            train_teacher(dataset, tmp_path / "t", steps=6, batch_size=50, checkpoint_steps=1)
    train_teacher(dataset, tmp_path / "whole", steps=6, batch_size=50)
    train_teacher(dataset, tmp_path / "t", steps=6, batch_size=50, checkpoint_steps=1)
    assert [json.loads(line)["step"] for line in (tmp_path / "t" / "starts.jsonl").read_text().splitlines()] == [0, 2]
    assert same(tmp_path / "t", tmp_path / "whole")


def test_a_line_that_was_cut_off_and_those_after_the_checkpoint_are_dropped(dataset, tmp_path, stop_after):
    train_teacher(dataset, tmp_path / "whole", steps=5, batch_size=50, log_steps=1)
    stop_after(2)
    with pytest.raises(TrainingInterrupted):
        train_teacher(dataset, tmp_path / "t", steps=5, batch_size=50, log_steps=1)
    with (tmp_path / "t" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 7}\n{"step": 4, "lo')
    stop_after(0)
    train_teacher(dataset, tmp_path / "t", steps=5, batch_size=50, log_steps=1)
    assert numbers(tmp_path / "t") == numbers(tmp_path / "whole")


def test_a_finished_training_killed_before_its_result_is_finished_without_a_step(dataset, tmp_path):
    train_teacher(dataset, tmp_path / "t", steps=4, batch_size=50)
    shutil.copytree(tmp_path / "t", tmp_path / "u")
    for name in ("result.json", "weights.pt"):
        (tmp_path / "u" / name).unlink()
    train_teacher(dataset, tmp_path / "u", steps=4, batch_size=50)
    assert same(tmp_path / "t", tmp_path / "u")
    assert metrics(tmp_path / "t") == metrics(tmp_path / "u")


def test_damaged_and_foreign_checkpoints_never_take_the_place_of_whole_ones(dataset, tmp_path, stop_after):
    stop_after(5)
    options = {"steps": 9, "batch_size": 50, "checkpoint_steps": 1, "keep_checkpoints": 1}
    with pytest.raises(TrainingInterrupted):
        train_teacher(dataset, tmp_path / "t", **options)
    stop_after(2)
    folder = tmp_path / "t" / "checkpoints"
    (folder / "step-000000005.pt").write_bytes(b"cut")
    (folder / "step-zzz.pt").write_bytes(b"mine")
    torch.save({"a": 1}, folder / "step-000000007.pt")  # a file of torch's, and no checkpoint
    with pytest.raises(TrainingInterrupted):
        train_teacher(dataset, tmp_path / "t", **options)
    assert {path.name for path in folder.iterdir()} == {
        "step-000000002.pt", "step-zzz.pt", "step-000000005.damaged", "step-000000007.damaged",
    }  # fmt: skip


def test_a_validation_loss_that_is_no_number_chooses_nothing(dataset, cache, validation_cache, tmp_path, monkeypatch):
    losses = iter([float("nan"), 0.5, float("nan"), 0.7, 0.6])
    monkeypatch.setattr(trainer.loop.training, "validate", lambda *_: next(losses))
    result = train_student(dataset, cache, tmp_path / "s", validation_cache=validation_cache, steps=5, batch_size=50)
    assert (result["kept_step"], result["validation_loss"]) == (2, 0.5)
