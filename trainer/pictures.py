"""Pictures of heatmaps: the image above what each model looked at."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr

from data import Dataset, Split
from pipeline import explain, load_classifier
from pipeline.device import as_input, as_mask

EPSILON = 0.01
CPU = torch.device("cpu")


def heatmap_picture(
    dataset: Dataset, split_names: tuple[str, ...], models: Mapping[str, str | Path], out: str | Path
) -> None:
    """Write a PNG: of each split one image per class (ten at most), and each model's heatmap of the true class.

    ``models`` maps row titles to saved models. Heatmaps are summed over the channels; red speaks for the
    class, blue against it, each map on its own scale. Below each map is what the model says.
    """
    from matplotlib.figure import Figure

    loaded = {title: load_classifier(path)[0] for title, path in models.items()}
    columns = min(10, len(dataset.class_names))
    rows = len(models) + 1
    figure = Figure(figsize=(1.15 * columns + 1.4, 1.32 * rows * len(split_names) + 0.6), layout="constrained")
    for panel, name in zip(figure.subfigures(len(split_names), 1, squeeze=False).flat, split_names, strict=True):
        split = dataset.split(name)
        picked = _one_per_class(split, columns)
        labels = np.asarray(split.labels[:])[picked]
        images = as_input(_rows(split.images, picked), CPU)
        masks = None if split.masks is None else as_mask(_rows(split.masks, picked), CPU)
        panel.suptitle(f"{name}: image, and relevance for its true class (red for, blue against)", fontsize=10)
        axes = panel.subplots(rows, len(picked), squeeze=False)
        _row_title(axes[0, 0], "image")
        for column, image in enumerate(images):
            axes[0, column].imshow(image.permute(1, 2, 0).numpy())
            axes[0, column].set_xlabel(dataset.class_names[labels[column]], fontsize=8)
        for row, (title, model) in enumerate(loaded.items(), start=1):
            _row_title(axes[row, 0], title)
            logits, maps = explain(partial(model, masks=masks), images, torch.from_numpy(labels), EPSILON)
            for column, heatmap in enumerate(maps.sum(1).numpy()):
                limit = np.abs(heatmap).max() or 1.0
                axes[row, column].imshow(heatmap, cmap="RdBu_r", vmin=-limit, vmax=limit)
                says = int(logits[column].argmax())
                axes[row, column].set_xlabel(
                    f"says {dataset.class_names[says]}",
                    fontsize=8,
                    color="black" if says == labels[column] else "firebrick",
                    weight="normal" if says == labels[column] else "bold",
                )
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _row_title(axis: object, title: str) -> None:
    axis.set_ylabel(title, fontsize=9)  # type: ignore[attr-defined]


def _one_per_class(split: Split, classes: int) -> np.ndarray:
    labels = np.asarray(split.labels[:])
    return np.array([np.flatnonzero(labels == label)[0] for label in range(classes) if (labels == label).any()])


def _rows(array: zarr.Array, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(array[row]) for row in rows.tolist()])
