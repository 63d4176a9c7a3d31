"""What the benchmarks share: ratios with their spread, targets, rank correlations, tables, results, the machine."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]"


def verdict(value: float, target: float | None, at_least: bool = False) -> list[str]:
    """The last two cells of a line: the target and whether it is met."""
    if target is None:
        return ["", ""]
    met = value >= target if at_least else value <= target
    return [f"{'≥' if at_least else '≤'} {target:g}", "yes" if met else "no"]


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation, in which equal values share their mean rank; NaN if all are equal."""
    ranks = []
    for values in (one, other):
        _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if any(np.ptp(of_one) == 0 for of_one in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def once(file: Path, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> None:
    """Measure, and add the result with its key and its seconds to a file, unless the file has one with this key."""
    plain = json.loads(json.dumps(key))
    if any(plain.items() <= row.items() for row in read_results(file)):
        return
    began = time.perf_counter()
    result = json.dumps({**key, **measure(), "seconds": round(time.perf_counter() - began)}, ensure_ascii=False)
    with file.open("a") as lines:
        lines.write(result + "\n")
    print(result, flush=True)


def read_results(file: Path, **key: Any) -> list[dict[str, Any]]:
    """Read the results with this key that a benchmark has added to a file, one JSON object in each line.

    Returns:
        The results; none without the file.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if key.items() <= row.items()]
