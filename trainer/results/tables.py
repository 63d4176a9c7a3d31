"""Tables of results in Markdown, LaTeX and plain text: pure functions, the arithmetic apart from the text."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.reproduction.profiles import Benchmark
from trainer.results.evaluation import wilson_interval

Result = Mapping[str, Any]  # a line of results.jsonl
MISSING = "–"
TOTALS = ("gap", "worst group", "on object", "on stamp")  # columns behind those of the splits, in this order


@dataclass(frozen=True)
class Measured:
    """The mean over seeds and the sample standard deviation (n − 1); None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        mean = f"{self.mean:.2f}".replace("-", "−")
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.2f}"


@dataclass(frozen=True)
class Line:
    """A row of the table. Values are in % or points, by the heading of their column; missing values are left out.

    Attributes:
        title: its name.
        ours: the test splits, the gap IID − OOD, the worst group, and the share of the relevance on the object or the
            stamp.
        to_teacher: the accuracy on each split but IID, less the teacher's.
        published: the published accuracies.
        seconds: the mean time of a training in seconds; None for a row that is not trained.
        note: where the values are from.
        intervals: the 95 % intervals of the mean accuracies for the images of a test, if the benchmark has them.
    """

    title: str
    ours: Mapping[str, Measured]
    to_teacher: Mapping[str, float]
    published: Mapping[str, float]
    seconds: float | None
    note: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measured(values: Sequence[float]) -> Measured:
    """Compute the mean and the spread of at least one value."""
    return Measured(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def summarise(results: Sequence[Result], benchmark: Benchmark) -> list[Line]:
    """Summarise results as the lines of a benchmark's table.

    Args:
        results: the lines of ``results.jsonl``.
        benchmark: the benchmark of the table.

    Returns:
        A line for each method, over its seeds, in the order of the results; then the quoted rows.
    """
    methods: dict[str, list[Result]] = {}
    for result in results:
        methods.setdefault(result["method"], []).append(result)
    return [_line(seeds, methods, benchmark) for seeds in methods.values()] + [
        Line(row.title, {}, {}, _published(row.published), None, row.note) for row in benchmark.quoted
    ]


def _line(seeds: Sequence[Result], methods: Mapping[str, Sequence[Result]], benchmark: Benchmark) -> Line:
    first, last = seeds[0], _last_with_masks(methods, benchmark)
    teacher = methods.get(first["teacher"], ())
    ours = {heading(split): _known(seeds, split) for split in benchmark.tests}
    ours["gap"] = [result["gap"] for result in seeds if result.get("gap") is not None]
    ours["worst group"] = [group["accuracy"] for result in seeds if (group := result.get("worst_group"))]
    shares = [share for result in seeds if (share := result.get("on_object", {}).get(last)) is not None]
    if benchmark.on_stamp:  # of all |relevance|
        ours["on stamp"] = [100 - share for share in shares]
    else:
        ours["on object"] = shares
    return Line(
        title=first["title"],
        ours={name: measured(values) for name, values in ours.items() if values},
        to_teacher={
            heading(split): statistics.fmean(_known(seeds, split)) - statistics.fmean(_known(teacher, split))
            for split in benchmark.tests
            if split != "iid" and _known(seeds, split) and _known(teacher, split)
        },
        published=_published(first["published"]),
        seconds=statistics.fmean(result["seconds"] for result in seeds),
        note=f"measured, {len(seeds)} seed{'s' * (len(seeds) > 1)}; "
        + ("no number quoted" if first["published"] is None else "published numbers as quoted"),
        intervals={
            heading(split): _interval(statistics.fmean(accuracies), first["samples"][split])
            for split in benchmark.tests
            if benchmark.intervals and (accuracies := _known(seeds, split)) and first.get("samples")
        },
    )


def _interval(accuracy: float, samples: int) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of an accuracy in % for so many images, which all seeds share."""
    low, high = wilson_interval(accuracy / 100 * samples, samples)
    return 100 * low, 100 * high


def _last_with_masks(methods: Mapping[str, Sequence[Result]], benchmark: Benchmark) -> str | None:
    """Find the last test split on which a share of the relevance is measured."""
    shares = [result.get("on_object", {}) for seeds in methods.values() for result in seeds]
    return next((split for split in reversed(benchmark.tests) if any(of.get(split) is not None for of in shares)), None)


def _known(results: Sequence[Result], split: str) -> list[float]:
    """List the accuracies on a split, without models that cannot be tested on it."""
    return [result[split] for result in results if result[split] is not None]


def _published(scores: Mapping[str, float] | None) -> dict[str, float]:
    return {heading(name): score for name, score in (scores or {}).items()}


def heading(split: str) -> str:
    """Write a split's name for a table or a picture."""
    return split.upper() if split in ("iid", "ood") else split


@dataclass(frozen=True)
class _Columns:
    """Neighbouring columns of a table: their common heading, their own headings, and the cells of a line."""

    title: str
    names: tuple[str, ...]
    cells: Callable[[Line], Sequence[str]]


def _columns(lines: Sequence[Line]) -> list[_Columns]:
    """List the columns for which a line has a value."""

    def of(title: str, get: Callable[[Line], Mapping[str, Any]], write: Callable[[Any], str]) -> _Columns:
        fullest_first = sorted(map(get, lines), key=len, reverse=True)  # it has the names in their order
        names = tuple(sorted(dict.fromkeys(itertools.chain(*fullest_first)), key=_place))
        return _Columns(title, names, lambda line: [write(get(line)[n]) if n in get(line) else MISSING for n in names])

    columns = (
        of("accuracy", lambda line: line.ours, str),
        of("95 % interval", lambda line: line.intervals, lambda ends: f"{ends[0]:.1f}–{ends[1]:.1f}"),
        of("less its teacher's", lambda line: line.to_teacher, lambda points: f"{points:+.2f}".replace("-", "−")),
        of("published", lambda line: line.published, lambda score: f"{score:.2f}"),
    )
    return [each for each in columns if each.names]


def _place(name: str) -> int:
    """Return the place of a column: the test splits first, in their order."""
    return TOTALS.index(name) if name in TOTALS else -1


def _seconds(line: Line) -> str:
    return MISSING if line.seconds is None else f"{line.seconds:.0f}"


def text(lines: Sequence[Line]) -> str:
    """Write a table for a terminal: without the distance to the teacher, with a note for quoted rows."""
    columns = [each for each in _columns(lines) if each.title != "less its teacher's"]
    header = ["in %"]
    for each in columns:
        first, *others = each.names
        header += [first if each.title == "accuracy" else f"{each.title}: {first}", *others]
    rows = [[*_cells(columns, line)[:-1], "" if line.ours else line.note] for line in lines]
    header += ["seconds", ""]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
        for row in (header, *rows)
    )


def markdown(lines: Sequence[Line]) -> str:
    """Write a table in Markdown."""
    columns = _columns(lines)
    header = [""]
    for each in columns:
        header += each.names if each.title == "accuracy" else [f"{each.title}: {name}" for name in each.names]
    header += ["seconds of training", "source"]
    rows = [header, ["---"] * len(header), *(_cells(columns, line) for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def latex(lines: Sequence[Line]) -> str:
    """Write a LaTeX ``tabular``, which needs the package booktabs alone."""
    columns = _columns(lines)
    rows = [" & ".join(map(escape, _cells(columns, line))) + r" \\" for line in lines]
    titles, rules, at = "", [], 2
    for each in columns:
        title = r"in \%" if each.title == "accuracy" else escape(each.title)
        titles += rf" & \multicolumn{{{len(each.names)}}}{{c}}{{{title}}}"
        rules.append(rf"\cmidrule(lr){{{at}-{at + len(each.names) - 1}}}")
        at += len(each.names)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{tabular}{l" + "r" * (at - 1) + "l}",
            r"\toprule",
            titles + r" & training & \\",
            " ".join(rules),
            "".join(f" & {escape(name)}" for each in columns for name in each.names) + r" & in s & \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _cells(columns: Sequence[_Columns], line: Line) -> list[str]:
    return [line.title, *(cell for each in columns for cell in each.cells(line)), _seconds(line), line.note]


def escape(words: str) -> str:
    """Escape plain text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in words)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "ε": r"$\varepsilon$",
}
