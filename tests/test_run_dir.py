"""What the reader of a run folder promises: all that is complete, and nothing that is not."""

from __future__ import annotations

import json

import pytest

from options import Message
from pipeline import ModelError
from trainer import TrainingError, train_teacher
from trainer.run_dir import Run, check_free, differences, lock


def test_the_reader_finds_what_the_training_wrote(dataset, tmp_path):
    out = tmp_path / "t"
    result = train_teacher(dataset, out, steps=4, batch_size=16, log_steps=1, snapshots=2, lr=1e-3)
    run = Run(out)
    assert run.finished
    assert run.result == json.loads(json.dumps(result))
    assert (run.config.kind, run.config.training["lr"]) == ("teacher", 1e-3)
    assert [line["step"] for line in run.metrics if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in run.starts] == [0]
    assert list(run.snapshots) == [2, 4]


def test_of_a_folder_without_a_run_there_is_nothing(tmp_path):
    run = Run(tmp_path / "nothing")
    assert (run.finished, run.result, run.metrics, run.starts, run.snapshots) == (False, None, [], [], {})
    with pytest.raises(ModelError, match="no model at"):
        run.config  # noqa: B018


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_result_is_none_and_damaged_lines_are_dropped(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n{{"st')
    assert Run(tmp_path).result is None
    assert Run(tmp_path).metrics == [{"step": 1}, {"step": 2}]


def test_errors_name_the_option_as_data(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError) as error:
        check_free(tmp_path)
    with lock(tmp_path, "at work"), pytest.raises(TrainingError) as locked:
        lock(tmp_path, "at work")
    for caught in (error, locked):
        (message,) = caught.value.args
        assert isinstance(message, Message)
        assert [option.name for option in message.options] == ["out"]
        assert "choose another --out" in message.spell(lambda piece: f"--{piece}")
        assert "choose another out" in str(caught.value)


def test_differences_name_both_values_and_ignore_versions():
    one = {"versions": {"a": 1}, "x": (1, 2), "y": {"z": 1.0, "w": 0}}
    other = {"versions": {"a": 2}, "x": [1, 2], "y": {"z": 2.0}, "new": True}
    assert differences(one, other) == ["new: None, True", "y.w: 0, None", "y.z: 1.0, 2.0"]
