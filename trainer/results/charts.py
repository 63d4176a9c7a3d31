"""Charts of a report, by Matplotlib, as SVG that takes its ink, font and colours from the page that it stands in.

Charts are small, as a page puts several side by side. Not here: what they show (`report.py`).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Okabe and Ito's colours, which all kinds of colour vision tell apart; black is the page's ink, yellow comes last
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # and as characters
SIZE = (4.2, 3.0)  # inches
INK, FAINT = "#000000", "#808080"
MOST_POINTS = 300  # of a line


@dataclass(frozen=True)
class Line:
    """Points that belong together, of the model ``number``; ``low`` and ``high`` are the ends of its intervals."""

    number: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    style: str = "line"  # or "points", "points on a line"


@dataclass(frozen=True)
class Chart:
    """Lines over common axes. ``ticks``: names of the places 0, 1, … of the horizontal axis."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    x_limits: tuple[float | None, float | None] = (None, None)
    y_limits: tuple[float | None, float | None] = (None, None)
    ticks: Sequence[str] = field(default=())
    logarithmic: bool = False
    diagonal: bool = False


def colour_of(number: int) -> str:
    """Name the colour of a model in the CSS of the page."""
    return f"var(--model-{number % len(COLOURS)})"


def marker_of(number: int) -> str:
    """Return the sign of a model, a character. Colour and sign together differ for the first 49 models."""
    return list(MARKERS.values())[_marker(number)]


def _marker(number: int) -> int:
    return (number + number // len(COLOURS)) % len(MARKERS)


def draw(chart: Chart, prefix: str) -> str:
    """Draw a chart as an ``<svg>`` element, whose ids begin with ``prefix``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10, "axes.titlesize": 11}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        for message in ("Glyph .* missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message, UserWarning)  # the page draws texts by its own fonts
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        if chart.diagonal:
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        for line in chart.lines:
            _draw_line(axes, line)
        axes.set_title(_plain(chart.title))
        axes.set_xlabel(_plain(chart.x))
        axes.set_ylabel(_plain(chart.y))
        if chart.ticks:
            axes.set_xticks(range(len(chart.ticks)), [_plain(tick) for tick in chart.ticks])
        if chart.logarithmic:
            axes.set_yscale("log")
            values = np.concatenate([line.y for line in chart.lines])
            wide = values.max() > 100 * values.min()
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(*chart.x_limits)
        axes.set_ylim(*chart.y_limits)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _of_page(buffer.getvalue(), prefix)


def _draw_line(axes: Any, line: Line) -> None:
    marker = list(MARKERS)[_marker(line.number)]
    look = {"color": COLOURS[line.number % len(COLOURS)], "linewidth": 1.8, "markersize": 6}
    if line.low is not None and line.high is not None:
        ends = np.stack([line.y - line.low, line.high - line.y]).clip(0)
        axes.errorbar(line.x, line.y, ends, fmt=marker, capsize=3, **look)
    elif line.style == "points":
        axes.plot(line.x, line.y, linestyle="", marker=marker, markeredgecolor=INK, markeredgewidth=0.8, **look)
    else:
        kept = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), MOST_POINTS)).astype(int))
        x, y = line.x[kept], line.y[kept]
        every = 1 if line.style == "points on a line" else max(1, len(kept) // 6)
        axes.plot(x, y, marker=marker, markevery=(every // 2, every), **look)


def _plain(text: str) -> str:
    """Escape dollars, which begin a formula in Matplotlib."""
    return text.replace("$", r"\$")


def _of_page(svg: str, prefix: str) -> str:
    """Turn Matplotlib's file into an element of the page: unique ids, the ink and the colours of the page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"| version="[\d.]+"', "", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = svg.replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--model-{number})")
    return re.sub(r"\n\s*", "\n", svg).replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
