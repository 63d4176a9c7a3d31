"""A vision-language teacher end to end, small: its own contrastive training, its store, students of its heatmaps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ALIKE = "student of heatmaps, of the teacher's architecture"
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "tiny_clip.py"


def test_a_clip_that_learns_digits_from_captions_teaches_students(tmp_path):
    command = [sys.executable, BENCHMARK, "--work", tmp_path, "--tower", "vit", "--limit", "300"]
    command += ["--clip-steps", "60", "--steps", "5", "--row", "ERM", "--row", ALIKE, "--row", "student of heatmaps"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=BENCHMARK.parent)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if row := re.match(r"\| vit \| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", line):
            found[row[1]] = [float(score) for score in row.groups()[1:]]
    assert list(found) == ["zero-shot teacher", "ERM", ALIKE, "student of heatmaps"]
    assert min(found["zero-shot teacher"]) > 25  # digits in colours that no caption names; chance is 10
