"""The accuracy and the predictions of each class as tables for a terminal, and a warning of a model that says only one.

Not here: the numbers (`evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from options import Message, Option

FEW_CLASSES, WORST = 12, 5  # up to so many classes all are listed, else so many with the lowest accuracies
LONGEST = 30  # characters of a name
MISSING = "–"
BALANCED = "balanced accuracy"


def classes_of(split: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the scores of the classes of a split; none where the model is not tested, or by an earlier version."""
    return split.get("classes") or []


def worst_first(scores: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Order the classes by their lowest accuracy, the worst first.

    Args:
        scores: the scores of the classes, as `evaluate` has them, by split or by model.

    Returns:
        The names of the classes that have samples, those with equal accuracies in the order of the dataset.
    """
    lowest: dict[str, float] = {}
    for of_classes in scores.values():
        for score in of_classes:
            lowest[score["class"]] = min(score["accuracy"], lowest.get(score["class"], 100.0))
    return sorted(lowest, key=lambda name: lowest[name])


def class_table(splits: Mapping[str, Mapping[str, Any]], where_all: str) -> str:
    """Write the accuracy of each class on each split as a table for a terminal.

    Args:
        splits: the ``splits`` of the result of `evaluate`.
        where_all: where all classes are listed, for the last line if there are more than 12 and the table has the worst
            five.

    Returns:
        The table, in which each cell is the accuracy in % and the number of samples; empty without scores.
    """
    scores = {name: classes_of(split) for name, split in splits.items() if classes_of(split)}
    if not scores:
        return ""
    names = worst_first(scores)
    left_out = 0
    if len(names) > FEW_CLASSES:
        names, left_out = names[:WORST], len(names) - WORST
    else:  # in the order of the dataset
        names = [score["class"] for score in max(scores.values(), key=len)]
        names += [one["class"] for of_split in scores.values() for one in of_split if one["class"] not in names]
        names = list(dict.fromkeys(names))
    by_name = {split: {score["class"]: score for score in of_split} for split, of_split in scores.items()}
    title = f"the {WORST} worst classes, in %" if left_out else "by class, in %"
    rows = [[title, *scores]]
    rows += [[_short(name), *(_cell(by_name[split].get(name)) for split in scores)] for name in names]
    rows += [[BALANCED, *(f"{splits[split]['balanced_accuracy']:.2f}" for split in scores)]]
    if left_out:
        rows.append([f"{left_out} more classes: {where_all}", *[""] * len(scores)])
    return _aligned(rows)


def prediction_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Write how often the model predicts each class, beside how frequent the class is, as a table for a terminal.

    Args:
        splits: the ``splits`` of the result of `evaluate`.

    Returns:
        The table, in which each cell is the share of the predictions and that of the samples, both in %. Of more than
        12 classes it has the five that are predicted most. It is empty without shares.
    """
    shares = {name: split["predictions"] for name, split in splits.items() if split.get("predictions")}
    if not shares:
        return ""
    names = list(dict.fromkeys(name for of_split in shares.values() for name in of_split))
    title = "share of the predictions (of the images), in %"
    if len(names) > FEW_CLASSES:
        names = sorted(names, key=lambda name: -max(of_split.get(name, 0.0) for of_split in shares.values()))[:WORST]
        title = f"the {WORST} classes predicted most: {title}"
    columns = []
    for split, of_split in shares.items():
        samples = {score["class"]: score["samples"] for score in classes_of(splits[split])}
        total = max(1, sum(samples.values()))
        columns.append([f"{of_split.get(name, 0.0):.1f} ({100 * samples.get(name, 0) / total:.1f})" for name in names])
    return _aligned([[title, *shares], *([_short(name), *cells] for name, *cells in zip(names, *columns, strict=True))])


def _aligned(rows: list[list[str]]) -> str:
    """Write rows of cells in columns, the first of which may be wide."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.ljust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines)


def _cell(score: Mapping[str, Any] | None) -> str:
    return MISSING if score is None else f"{score['accuracy']:.2f} of {score['samples']}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def one_class_warning(result: Mapping[str, Any]) -> Message | None:
    """Warn of a model that says one class for every image of a split that has images of several classes.

    Args:
        result: the dictionary that `evaluate` returns, or the totals of a report's model.

    Returns:
        The warning; None where there is no such split.
    """
    constant: dict[str, list[str]] = {}
    for name, split in result["splits"].items():
        if len(classes_of(split)) > 1 and split.get("only_prediction") is not None:
            constant.setdefault(split["only_prediction"], []).append(name)
    if not constant:
        return None
    said = ", and ".join(f"{answer!r} for every image of {', '.join(names)}" for answer, names in constant.items())
    return Message(
        f"warning: the model says {said}, so its accuracy only tells how frequent the class is: train it longer, or "
        "with another ",
        Option("lr"),
        ", and the teacher of unbalanced data with ",
        Option("class_weights", "balanced"),
    )
