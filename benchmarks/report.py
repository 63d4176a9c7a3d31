"""How the benchmarks print: ratios with their spread, whether a target is met, tables, and on what machine."""

from __future__ import annotations

import platform
import re
from pathlib import Path

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
