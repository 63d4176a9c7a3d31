"""Pictures: what models look at, how accurate they become as they learn, and on which groups.

Not here: what is measured and which samples are shown.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from data import Dataset, Split
from data.storage import Folder
from options import Message
from pipeline import Classifier, load_classifier
from pipeline.batch import explain_batch
from trainer.results.evaluation import lacks_masks
from trainer.results.fonts import legible
from trainer.results.options import EPSILON
from trainer.results.tables import MISSING, heading
from trainer.run_dir import NEW_FOLDER

CPU = torch.device("cpu")
DPI = 130
SIDE = 1.7  # inches, of a picture in a grid
FEWEST_COLUMNS = 4  # of images: with two classes, two of each
COLOURS = "RdBu_r"  # diverging, and told apart by all kinds of colour vision
ENDS, TICKS = (0.004, 0.9995), (0.01, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # of an axis of accuracies


@dataclass(frozen=True)
class Cell:
    """One picture of a grid and the text below it, which is bold and red if it is ``wrong``.

    content: an image, float32 (C, H, W) in [0, 1], or a heatmap, (h, w); None for an empty place.
    """

    content: np.ndarray | None
    below: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Grid:
    """Rows of cells with their titles.

    limit: heatmaps are drawn on the scale from −limit to limit. unit: the text below the bar of that scale.
    """

    cells: Sequence[Sequence[Cell]]
    column_titles: Sequence[str]
    row_titles: Sequence[str]
    title: str
    limit: float
    unit: str


def heatmap_picture(
    dataset: Dataset,
    split_names: tuple[str, ...],
    models: Mapping[str, str | Path],
    out: str | Path,
    factories: Mapping[str, str | None] | None = None,
) -> None:
    """Write a PNG: some images of each class (ten at most) from each split, and each model's heatmaps of their class.

    Heatmaps are summed over the channels; red speaks for the class, blue against it, each map on its own scale. Below
    each map is the model's prediction.

    Args:
        dataset: the dataset of the splits.
        split_names: the splits to show.
        models: the folders of saved models by the titles of their rows.
        out: the file to write; an existing one is overwritten.
        factories: the functions of the user's own that built models, as in `load_classifier`, by the same titles.
    """
    from matplotlib.figure import Figure

    loaded = {title: load_classifier(path, (factories or {}).get(title))[0] for title, path in models.items()}
    classes, rows = min(10, len(dataset.class_names)), len(models) + 1
    each = max(1, FEWEST_COLUMNS // classes)
    width = max(1.15 * classes * each + 1.4, 6.4)  # of the title at least
    figure = Figure(figsize=(width, 1.32 * rows * len(split_names) + 0.6), layout="constrained")
    with legible([*dataset.class_names, *split_names, *models], out) as drawable:
        for panel, name in zip(figure.subfigures(len(split_names), 1, squeeze=False).flat, split_names, strict=True):
            panel.suptitle(
                f"{drawable(name)}: image, and relevance for its true class (red for, blue against)", fontsize=10
            )
            _draw_split(panel, dataset, name, classes, each, loaded, drawable)
        _save(figure, out)


def _draw_split(
    panel: Any,
    dataset: Dataset,
    split_name: str,
    classes: int,
    each: int,
    models: Mapping[str, Classifier],
    drawable: Callable[[str], str],
) -> None:
    """Draw a split's images, ``each`` of each class, and below them each model's heatmaps."""
    split, class_names = dataset.split(split_name), [drawable(name) for name in dataset.class_names]
    picked = _of_each_class(split, classes, each)
    labels = np.asarray(split.labels[:])[picked].astype(np.int64)
    images = rows_of(split.images, picked)
    masks = None if split.masks is None else rows_of(split.masks, picked)
    axes = panel.subplots(len(models) + 1, len(picked), squeeze=False)
    _row_title(axes[0, 0], "image")
    for column, image in enumerate(images.astype(np.float32) / 255):
        _draw(axes[0, column], Cell(image, class_names[labels[column]]))
    for row, (title, model) in enumerate(models.items(), start=1):
        _row_title(axes[row, 0], drawable(title))
        if lacks_masks(model, split):
            for axis in axes[row]:
                _draw(axis, Cell(None, "no masks"), ratio=images.shape[2] / images.shape[3])
            continue
        batch = explain_batch(model, images, masks, labels[:, None], EPSILON, explainer="flex", device=CPU)
        for column, heatmap in enumerate(batch.maps[:, 0].sum(1)):
            predicted = int(batch.logits[column].argmax())
            cell = Cell(heatmap, f"says {class_names[predicted]}", wrong=predicted != labels[column])
            _draw(axes[row, column], cell, np.abs(heatmap).max() or 1.0)


def grid_picture(grid: Grid, out: str | Path, description: str) -> None:
    """Write a PNG of a grid, with the bar of its scale at the bottom.

    Args:
        grid: what to draw.
        out: the file to write.
        description: a text that the file contains as its "Description".

    Raises:
        FileExistsError: the file exists.
    """
    below = [cell.below for row in grid.cells for cell in row]
    texts = [grid.title, grid.unit, *grid.column_titles, *grid.row_titles, *below]
    with legible(texts, out) as drawable:
        draw_grid(grid, out, description, drawable)


def draw_grid(grid: Grid, out: str | Path, description: str, drawable: Callable[[str], str]) -> None:
    """Write a PNG as `grid_picture` does, one of many inside of one `legible`, which gives ``drawable``."""
    cells = [[dataclasses.replace(cell, below=drawable(cell.below)) for cell in row] for row in grid.cells]
    column_titles, row_titles = (list(map(drawable, each)) for each in (grid.column_titles, grid.row_titles))
    title, unit = drawable(grid.title), drawable(grid.unit)
    _save(_grid_figure(Grid(cells, column_titles, row_titles, title, grid.limit, unit)), out, description)


def _grid_figure(grid: Grid) -> Any:
    """Draw a grid."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    height, width = next(cell.content for row in grid.cells for cell in row if cell.content is not None).shape[-2:]
    cells = [[dataclasses.replace(cell, below=_wrapped(cell.below, 26)) for cell in row] for row in grid.cells]
    titles, row_titles = ([_wrapped(each, 22) for each in texts] for texts in (grid.column_titles, grid.row_titles))
    lines = max(cell.below.count("\n") + 1 for row in cells for cell in row)
    row_height = SIDE * max(height / width, 0.4) + 0.17 * lines + 0.1
    titles_height = 0.17 * max(each.count("\n") + 1 for each in titles) + 0.1
    across = SIDE * len(titles) + 0.1 + 0.075 * max(len(line) for each in row_titles for line in each.split("\n"))
    text, bar_text = (_wrapped(each, int(across / 0.08)) for each in (grid.title, grid.unit))
    top, bottom = (0.19 * (each.count("\n") + 1) for each in (text, bar_text))
    parts = (top + titles_height + row_height * len(cells), 0.5 + bottom)
    figure = Figure(figsize=(across, sum(parts)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=parts).flat
    upper.suptitle(text, fontsize=10)
    axes = upper.subplots(len(cells), len(titles), squeeze=False)
    for axis, each in zip(axes[0], titles, strict=True):
        axis.set_title(each, fontsize=9)
    for line, row, name in zip(axes, cells, row_titles, strict=True):
        line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        for axis, cell in zip(line, row, strict=True):
            _draw(axis, cell, grid.limit, height / width)
    scale = ScalarMappable(Normalize(-grid.limit, grid.limit), COLOURS)
    bar = lower.add_axes((0.15, 1 - 0.2 / parts[1], 0.7, 0.13 / parts[1]))
    lower.colorbar(scale, bar, orientation="horizontal", extend="both")
    bar.tick_params(labelsize=8)
    bar.set_xlabel(bar_text, fontsize=8)
    return figure


def _wrapped(text: str, width: int) -> str:
    """Wrap each line of a text at ``width`` characters, and escape dollars, which begin a formula in Matplotlib."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n")).replace("$", r"\$")


def _draw(axis: Any, cell: Cell, limit: float = 1.0, ratio: float = 1.0) -> None:
    """Draw one cell of a grid. A heatmap's colours run from −``limit`` to ``limit``; ``ratio`` is height to width."""
    axis.set_xticks([])
    axis.set_yticks([])
    if cell.content is None:
        axis.spines[:].set_visible(False)
        axis.set_box_aspect(ratio)
    elif cell.content.ndim == 2:
        axis.imshow(cell.content, cmap=COLOURS, vmin=-limit, vmax=limit)
    elif len(cell.content) == 3:
        axis.imshow(cell.content.transpose(1, 2, 0))
    else:  # one channel, or channels that are not red, green and blue
        axis.imshow(cell.content.mean(0), cmap="gray", vmin=0, vmax=1)
    axis.set_xlabel(
        cell.below,
        fontsize=8,
        color="firebrick" if cell.wrong else "black",
        weight="bold" if cell.wrong else "normal",
    )


def curves_picture(points: Sequence[Mapping[str, Any]], splits: Sequence[str], out: str | Path) -> None:
    """Write a PNG: accuracy against steps, a panel for each test split and a line for each method.

    Lines are means over seeds, bands reach from the lowest to the highest seed. The axis is the logit of the accuracy,
    which shows the differences near 100 % too.

    Args:
        points: each with the ``title`` of the method, ``seed``, ``step``, and the accuracy in % on each split, or None.
        splits: the test splits.
        out: the file to write; an existing one is overwritten.
    """
    with legible([*(point["title"] for point in points), *splits], out) as drawable:
        _save(_curves_figure(points, splits, drawable), out)


def _curves_figure(points: Sequence[Mapping[str, Any]], splits: Sequence[str], drawable: Callable[[str], str]) -> Any:
    """Draw the accuracies of `curves_picture`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(point["title"] for point in points))
    figure = Figure(figsize=(3 + 3.5 * len(splits), 4.6), layout="constrained")
    axes = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axis, split in zip(axes, splits, strict=True):
        for index, title in enumerate(titles):
            by_step: dict[int, list[float]] = {}
            for point in points:
                if point["title"] == title and point[split] is not None:
                    share = min(max(point[split] / 100, ENDS[0]), ENDS[1])  # neither end of a logit axis is finite
                    by_step.setdefault(point["step"], []).append(share)
            steps = sorted(by_step)
            look = {"color": colormaps["tab10"](index % 10), "linestyle": ("-", "--", ":")[index // 10 % 3]}
            means = [statistics.fmean(by_step[step]) for step in steps]
            axis.plot(steps, means, label=drawable(title), marker=".", linewidth=1.6, **look)
            lowest, highest = ([bound(by_step[step]) for step in steps] for bound in (min, max))
            axis.fill_between(steps, lowest, highest, color=look["color"], alpha=0.15, linewidth=0)
        axis.set_title(drawable(heading(split)))
        axis.set_xlabel("steps")
        axis.set_xlim(left=0)
        axis.set_yscale("logit")
        axis.set_yticks(TICKS, [f"{100 * tick:g}" for tick in TICKS])
        axis.set_yticks([], minor=True)
        axis.set_ylim(*ENDS)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy in %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("As they learn, on a part of the test images; nothing was chosen by it", fontsize=10)
    return figure


def groups_picture(results: Sequence[Mapping[str, Any]], splits: Sequence[str], out: str | Path) -> None:
    """Write a PNG: the accuracy of each method on each group of the splits, means over seeds.

    Groups that are colours are sorted, the darkest first. A split without groups is left out; without any split, no
    file is written.

    Args:
        results: each with the ``title`` of the method and its ``groups``, which have ``split``, ``group`` (a name, or a
            colour as #rrggbb) and ``accuracy`` in %.
        splits: the test splits.
        out: the file to write; an existing one is overwritten.
    """
    groups = [group["group"] for result in results for group in result["groups"]]
    splits = [split for split in splits if any(g["split"] == split for result in results for g in result["groups"])]
    if not splits:
        return
    with legible([*(result["title"] for result in results), *splits, *groups], out) as drawable:
        _save(_groups_figure(results, splits, drawable), out)


def _groups_figure(results: Sequence[Mapping[str, Any]], splits: Sequence[str], drawable: Callable[[str], str]) -> Any:
    """Draw the accuracies of `groups_picture`."""
    from matplotlib.colors import is_color_like, to_rgb
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(result["title"] for result in results))
    scores: dict[tuple[str, str, str], list[float]] = {}
    for result in results:
        for group in result["groups"]:
            scores.setdefault((group["split"], group["group"], result["title"]), []).append(group["accuracy"])
    colours = all(group.startswith("#") and is_color_like(group) for _, group, _ in scores)
    figure = Figure(figsize=(2.5 + 6.5 * len(splits), 1.5 + 0.36 * len(titles)), layout="constrained")
    axes = figure.subplots(2, len(splits), squeeze=False, height_ratios=(1 if colours else 0.01, len(titles)))
    for (swatches, axis), split in zip(axes.T, splits, strict=True):
        groups = list(dict.fromkeys(group for of, group, _ in scores if of == split))
        groups = sorted(groups, key=_luminance) if colours else groups
        of_all = [[scores.get((split, group, title), [np.nan]) for group in groups] for title in titles]
        values = np.array([[statistics.fmean(of_group) for of_group in of_title] for of_title in of_all])
        swatches.set_title(f"{drawable(split)}: accuracy in % by {'colour' if colours else 'group'}", fontsize=10)
        if colours:
            swatches.imshow([[to_rgb(colour) for colour in groups]], aspect="auto")
            swatches.set_xticks([])
            swatches.set_yticks([])
        else:
            swatches.set_axis_off()
        axis.imshow(values, cmap="YlOrRd_r", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value < 35 else "black"
            text = MISSING if np.isnan(value) else f"{value:.1f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(len(groups)), map(drawable, groups), fontsize=7, rotation=30)
        names = [drawable(title) if split == splits[0] else "" for title in titles]
        axis.set_yticks(range(len(titles)), names, fontsize=9)
        axis.tick_params(length=0)
    return figure


def _luminance(colour: str) -> float:
    """Compute the luminance of #rrggbb by the weights of ITU-R BT.709."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _save(figure: Any, out: str | Path, description: str | None = None) -> None:
    """Write a PNG, whole or not at all. A picture with a description overwrites no other file."""
    out, buffer = Path(out), io.BytesIO()
    metadata = None if description is None else {"Description": description}
    figure.savefig(buffer, dpi=DPI, format="png", metadata=metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not Folder(out.parent).write(out.name, buffer.getbuffer(), exclusive=description is not None):
        raise FileExistsError(Message(f"{out} exists", NEW_FOLDER))


def _row_title(axis: object, title: str) -> None:
    axis.set_ylabel(textwrap.fill(title, 14, break_long_words=False), fontsize=9)  # type: ignore[attr-defined]


def _of_each_class(split: Split, classes: int, each: int) -> np.ndarray:
    labels = np.asarray(split.labels[:])
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(classes)])


def rows_of(array: zarr.Array, rows: np.ndarray) -> np.ndarray:
    """Read some rows of an array of a dataset, in the order of ``rows``."""
    return np.stack([np.asarray(array[row]) for row in rows.tolist()])
