"""What the quickstart promises, at a small size; its accuracies are in docs/results/quickstart.md.

Where it may be stopped, and what else is in its folder, is the promise of any reproduction: see test_reproduce.py.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from trainer import TrainingError
from trainer.reproduction.profiles import PROFILES, QUOTED, ROWS
from trainer.reproduction.quickstart import quickstart
from trainer.results.tables import summarise, text

QUICK = PROFILES["quickstart"]
TINY = dataclasses.replace(
    QUICK,
    limit=120,
    draws=2,
    teacher={**QUICK.teacher, "steps": 3},
    student={**QUICK.student, "steps": 3},
    of_row={"erm": {"steps": 3}},
)


def test_it_writes_results_and_picture_and_the_second_time_says_it_is_finished(tmp_path):
    said: list[str] = []
    results = quickstart(tmp_path / "q", TINY, said.append)
    assert json.loads((tmp_path / "q" / "results.json").read_text()) == results
    assert [row["title"] for row in results] == ["teacher", "ERM", "LRP distillation"]
    for row in results:
        assert all(0 <= row[key] <= 100 for key in ("iid", "ood", "shift"))
        assert row["seconds"] > 0
        assert all(seconds > 0 for seconds in row["stages"].values())
    assert (tmp_path / "q" / "report" / "heatmaps.png").read_bytes()[:4] == b"\x89PNG"
    assert [line.split()[0] for line in said] == [f"[{number}/7]" for number in range(1, 8)]

    lines = text(summarise(results, QUICK.table)).splitlines()
    assert len(lines) == 1 + 3 + len(QUOTED)
    for line, method in zip(lines[1:4], ("teacher", "erm", "lrp"), strict=True):
        assert line.startswith(ROWS[method].title)
        assert all(f"{value:.2f}" in line for value in ROWS[method].published.values())

    assert quickstart(tmp_path / "q", TINY, said.append) == results
    assert "finished" in said[-1]
    with pytest.raises(TrainingError, match="choose another out"):
        quickstart(tmp_path / "q", QUICK, said.append)


def test_what_it_does_not_need_is_not_stored(tmp_path):
    """No maps but those of LRP, and no features, which only other rows of the table match."""
    from trainer.reproduction.plan import chosen, plan

    stages = plan(QUICK, chosen(QUICK, None), seeds=1)
    stores = [stage.options for stage in stages if stage.kind == "store"]
    assert [(options["explainer"], options["features"]) for options in stores] == [("flex", False)] * 2
