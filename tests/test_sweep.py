"""What many students of one store promise: every combination, none lost to another's failure, none trained twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from test_training import weights

from cli import main
from trainer import TrainingError
from trainer.reproduction import sweep
from trainer.reproduction.sweep import plan_sweep, read_sweep

ROOT = Path(__file__).parent.parent
ARCHS, METHODS = st.sampled_from(["small-cnn", "resnet18", "vgg11"]), st.sampled_from(["lrp", "output", "erm"])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# what is planned


@given(
    st.lists(ARCHS, min_size=1, unique=True),
    st.lists(METHODS, min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, unique=True),
)
def test_every_combination_is_planned_once_under_a_name_of_its_own(archs, methods, seeds):
    planned = plan_sweep({"data": "d", "arch": archs, "method": methods}, [{"seed": seeds}])
    combinations = [(one["arch"], one["method"], one["seed"]) for one in planned.values()]
    assert sorted(combinations) == sorted((a, m, s) for a in archs for m in methods for s in seeds)
    assert all(one["data"] == "d" for one in planned.values())


def test_names_say_what_tells_students_apart():
    common = {"data": "d", "lr": 0.1}
    assert list(plan_sweep(common, [])) == ["student"]
    assert list(plan_sweep({"data": Path("d"), "seed": [1, 2]}, [])) == ["seed=1", "seed=2"]
    assert list(plan_sweep({**common, "arch": ["small-cnn", "resnet18"]}, [])) == ["small-cnn", "resnet18"]
    assert list(plan_sweep({**common, "seed": [0, 1]}, [{"arch": "resnet18"}])) == [
        "seed=0-resnet18",
        "seed=1-resnet18",
    ]
    assert list(plan_sweep(common, [{"name": "a / b"}, {"name": "c", "seed": 3}])) == ["a-b", "c"]
    assert list(plan_sweep(common, [{"name": ".."}, {"name": "../c"}])) == ["student", "-c"]
    plan = plan_sweep({**common, "seed": [0, 1]}, [{"name": "a"}, {"name": "b"}])
    assert list(plan) == ["a-seed=0", "a-seed=1", "b-seed=0", "b-seed=1"]
    assert list(plan_sweep(common, [{"student-factory": "mine:f"}, {"student-factory": "mine:g"}])) == ["f", "g"]


def test_what_a_student_says_counts_more_than_what_all_are_told():
    planned = plan_sweep({"data": "d", "seed": [0, 1], "lr": 0.1}, [{"name": "a", "seed": 7, "batch-size": 5}])
    assert planned == {"a": {"data": "d", "seed": 7, "lr": 0.1, "batch_size": 5}}


def test_augmentations_are_one_value_as_a_list_and_as_on_the_command_line():
    for augment in ("flip, shift", ["flip", "shift"]):
        (one,) = plan_sweep({"data": "d", "augment": augment}, []).values()
        assert one["augment"] == ["flip", "shift"]


@pytest.mark.parametrize(
    ("common", "students", "words"),
    [
        ({"stepz": 3}, [], "options that no student can have: stepz"),
        ({}, [{"options": 1, "loss_": 2}], "options that no student can have: loss_, options"),
        ({}, [{"out": "elsewhere"}], "options that no student can have: out"),
        ({"device": "cpu"}, [], "options that no student can have: device"),
        ({"data": ["a", "b"]}, [], "several values for data: all students are of one store"),
        ({}, [{"cache": ["a", "b"]}], "several values for cache: all students are of one store"),
        ({}, ["resnet18"], "a student of the sweep is 'resnet18': give options, such as"),
        ({}, [{"seed": 1}, {"seed": 1}], "two students of the sweep are alike"),
        ({}, [{"name": "a", "seed": 1}, {"name": "a", "seed": 2}], "both called 'a': give them names"),
        ({"seed": [3, 3]}, [], "two students of the sweep are alike"),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused(common, students, words):
    with pytest.raises(TrainingError, match=words):
        plan_sweep(common, students)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"students: [", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"", "must hold options"),
        (b"- arch: resnet18", "must hold options"),
        (b"students: {arch: resnet18}", "under 'students' a list of options"),
    ],
)
def test_a_file_that_is_no_sweep_is_said_with_its_name(tmp_path, text, words):
    (tmp_path / "sweep.yaml").write_bytes(text)
    with pytest.raises(TrainingError, match=f"{tmp_path / 'sweep.yaml'} .*{words}"):
        read_sweep(tmp_path / "sweep.yaml")


def test_numbers_of_a_file_are_those_of_the_command_line(tmp_path):
    (tmp_path / "sweep.yaml").write_text("batch-size: 5\nlr: 2e-3\nema: 0.9\nstudents: [{lr: 1e2, name: 1e-3 of it}]")
    file_options = read_sweep(tmp_path / "sweep.yaml")
    assert file_options == {"batch_size": 5, "lr": 0.002, "ema": 0.9, "students": [{"lr": 100.0, "name": "1e-3 of it"}]}


def test_a_typed_option_replaces_the_one_of_a_sweep_that_excludes_it(tmp_path, monkeypatch):
    planned = {}
    monkeypatch.setattr(sweep, "train_students", lambda out, students, **options: planned.update(students) or [])
    students = [{"name": "a", "steps": 5, "arch": "resnet18"}, {"name": "b", "epochs": 2}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"data": "d", "method": "output", "students": students}))
    line = ["--json", "--out", tmp_path / "s", "--epochs", 1, "--loss", "lrp=1", "--student-factory", "a:b"]
    result = run("train-students", tmp_path / "sweep.yaml", *line)
    assert result.exit_code == 0, result.output
    same = {"data": "d", "epochs": 1.0, "loss": "lrp=1", "student_factory": "a:b"}
    assert planned == {"a": same, "b": same}


# what is trained

QUICK = ["--steps", 2, "--batch-size", 16]


def test_one_that_fails_stops_no_other_and_nothing_is_trained_twice(dataset, cache, tmp_path):
    """Two at once; the file and the options plan the same students, so that either goes on with the other's."""
    options = ["--data", dataset, "--cache", cache, "--out", tmp_path / "s", *QUICK, "--devices", "cpu,cpu", "--json"]
    result = run("train-students", *options, "--arch", "small-cnn", "--arch", "vgg11", "--method", "output")
    assert result.exit_code == 1, result.output
    good, bad = json.loads(result.stdout)
    assert (good["name"], good["steps"]) == ("small-cnn-output", 2)
    assert {"loss", "seconds", "iid", "ood", "shift", "gap"} <= good.keys()
    assert bad["name"] == "vgg11-output"
    assert "'vgg11' does not take images of shape (3, 28, 28)" in bad["error"]
    assert json.loads((tmp_path / "s" / "students.json").read_text()) == [good, bad]
    trained = tmp_path / "s" / "small-cnn-output" / "weights.pt"
    before = trained.stat().st_mtime_ns

    common = {"data": str(dataset), "cache": str(cache), "out": str(tmp_path / "s"), "steps": 2, "batch-size": 16}
    students = {
        "students": [{"arch": "small-cnn", "method": "output"}, {"arch": "small-cnn", "method": "erm", "cache": None}]
    }
    students["students"][0]["name"], students["students"][1]["name"] = "small-cnn-output", "by labels"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(common | students))
    result = run("train-students", tmp_path / "sweep.yaml")
    assert result.exit_code == 0, result.output
    assert trained.stat().st_mtime_ns == before
    assert "1/1 by-labels, on " in result.output
    table = result.stdout.splitlines()
    assert sorted(line.split()[0] for line in table[-2:]) == ["by-labels", "small-cnn-output"]

    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(common | {"steps": 3} | students))
    result = run("train-students", tmp_path / "sweep.yaml")
    assert result.exit_code == 1
    assert "has a student 'small-cnn-output' with other options" in result.output
    assert trained.stat().st_mtime_ns == before


def test_why_a_student_failed_is_told_in_flags_to_a_shell_and_in_python_to_python(dataset, cache, tmp_path):
    line = ["--data", dataset, "--cache", cache, "--out", tmp_path / "a", "--devices", "cpu", "--seed", 0]
    result = run("train-students", *line, "--steps", 2, "--epochs", 1)
    assert result.exit_code == 1, result.output
    flags = "give --steps 2 or --epochs 1.0, not both"
    assert result.stdout.splitlines()[-1].split(maxsplit=1) == ["seed=0", f"failed: {flags}"]
    assert (tmp_path / "a" / "seed=0.error").read_text() == flags
    assert json.loads((tmp_path / "a" / "students.json").read_text()) == [{"name": "seed=0", "error": flags}]

    options = {"data": str(dataset), "cache": str(cache), "steps": 2, "epochs": 1.0}
    (row,) = sweep.train_students(tmp_path / "b", plan_sweep(options, []), devices=["cpu"])
    assert row["error"] == "give steps=2 or epochs=1.0, not both"
    assert (tmp_path / "b" / "student.error").read_text() == row["error"]


def test_stopped_by_a_signal_it_leaves_checkpoints_and_the_same_command_goes_on(dataset, cache, tmp_path):
    out = tmp_path / "s"
    command = [
        *(sys.executable, str(ROOT / "cli.py"), "train-students", "--data", str(dataset), "--cache", str(cache)),
        *("--out", str(out), "--steps", "1000", "--batch-size", "16", "--method", "output", "--log-steps", "1"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        log, patience = out / "output" / "metrics.jsonl", time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert f"stopped with 0 of 1 students finished in {out}: run the same command again to resume" in stderr
    (checkpoint,) = (out / "output" / "checkpoints").iterdir()
    at = int(checkpoint.stem.partition("-")[2])
    assert 0 < at < 1000

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    starts = [json.loads(line)["step"] for line in (out / "output" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, at]
    assert weights(out / "output")


def test_a_finished_student_of_another_store_at_the_same_path_is_not_tabulated(
    dataset, cache, validation_cache, tmp_path
):
    plan = plan_sweep({"data": str(dataset), "cache": str(tmp_path / "c.zarr"), "steps": 1}, [{"name": "a"}])
    shutil.copytree(cache, tmp_path / "c.zarr")
    sweep._claim(tmp_path / "s", plan)
    sweep._claim(tmp_path / "s", plan)
    shutil.rmtree(tmp_path / "c.zarr")
    shutil.copytree(validation_cache, tmp_path / "c.zarr")
    with pytest.raises(TrainingError, match=r"student .a. with other options .learns_from: .*choose another out"):
        sweep._claim(tmp_path / "s", plan)


def test_values_of_other_types_are_refused_by_name():
    for options, words in (
        ({"steps": "10"}, "steps must be int or None, got '10'"),
        ({"pyramid": "no"}, "pyramid must be bool, got 'no'"),
        ({"warmup": 0.5}, "warmup must be int or None, got 0.5"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"lr": "0.002"}, "lr must be float or None, got '0.002'"),
        ({"bias_free": "false"}, "bias_free must be bool or None, got 'false'"),
    ):
        with pytest.raises(TrainingError, match=words):
            plan_sweep({"data": "d", **options}, [])


def test_a_student_by_labels_leaves_the_store_to_the_others():
    planned = plan_sweep({"data": "d", "cache": "c", "method": ["lrp", "erm"]}, [])
    assert {name: options["cache"] for name, options in planned.items()} == {"lrp": "c", "erm": None}


def test_with_a_validation_store_the_table_has_the_excess_over_the_teacher(dataset, cache, validation_cache, tmp_path):
    options = ["--data", dataset, "--cache", cache, "--validation-cache", validation_cache, *QUICK]
    result = run("train-students", *options, "--out", tmp_path / "s", "--seed", 0)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "s" / "students.json").read_text())
    found = json.loads((tmp_path / "s" / "seed=0" / "result.json").read_text())["beside_teacher"]
    assert row["excess"] == found["excess"]
    header, line = result.stdout.splitlines()
    assert header.split() == ["student", "loss", "excess", "iid", "ood", "shift", "gap", "seconds"]
    assert line.split()[2] == f"{found['excess']:.2f}"
