"""What the quickstart promises, at a small size; its accuracies are in docs/results/quickstart.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer import TrainingError
from trainer import quickstart as module
from trainer.quickstart import PAPER, Sizes, quickstart, table

TINY = Sizes(limit=120, teacher_steps=3, erm_steps=3, student_steps=3, draws=2)


def test_it_writes_results_and_picture_and_the_second_time_says_it_is_finished(tmp_path):
    said: list[str] = []
    results = quickstart(tmp_path / "q", TINY, said.append)
    assert json.loads((tmp_path / "q" / "results.json").read_text()) == results
    assert [row["method"] for row in results] == ["teacher", "ERM", "LRP distillation"]
    for row in results:
        assert all(0 <= row[key] <= 100 for key in ("iid", "ood", "shift"))
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert (tmp_path / "q" / "report" / "heatmaps.png").read_bytes()[:4] == b"\x89PNG"
    assert len(said) == 5

    lines = table(results).splitlines()
    assert len(lines) == 4
    for line, (method, published) in zip(lines[1:], PAPER.items(), strict=True):
        assert line.startswith(method)
        assert all(f"{value:.2f}" in line for value in published)

    assert quickstart(tmp_path / "q", TINY, said.append) == results
    assert "finished" in said[-1]
    with pytest.raises(TrainingError, match="choose another --out"):
        quickstart(tmp_path / "q", Sizes(), said.append)


@pytest.mark.parametrize("broken", ["train_teacher", "cache_explanations", "train_student", "heatmap_picture"])
def test_interrupted_anywhere_it_continues(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, broken, fail)
        with pytest.raises(KeyboardInterrupt):
            quickstart(tmp_path / "q", TINY, lambda _: None)
    finished = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("result.json")}
    quickstart(tmp_path / "q", TINY, lambda _: None)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert (tmp_path / "q" / "results.json").exists()
