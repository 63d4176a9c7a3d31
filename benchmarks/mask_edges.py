"""How much of the relevance on an object lies at the edge of its mask: teachers behind each fill, and their students.

    python benchmarks/mask_edges.py --data DATA.zarr TEACHER STUDENT

A pixel of the object is at the edge if one of its eight neighbours belongs to the background. Maps are LRP-Flex of the
true class at ε = 0.1, as `evaluate` takes them. Shares are means over the images that have relevance on their object.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from report import table
from torch import Tensor

from data import Split, open_dataset
from pipeline import explain, load_classifier
from pipeline.device import as_input, as_mask
from pipeline.networks.classifier import Classifier
from pipeline.rules import stop_relevance

CPU, EPSILON, AT_ONCE = torch.device("cpu"), 0.1, 100


def edges(masks: Tensor) -> Tensor:
    """Return the pixels of the object that touch the background, (N, 1, H, W) in {0, 1}."""
    return masks * F.max_pool2d(1 - masks, 3, stride=1, padding=1)


def behind_constant(model: Classifier, images: Tensor, masks: Tensor) -> Tensor:
    """Return the logits of a classifier whose fill is a constant for relevance."""
    fill = stop_relevance(model.front(images, masks))
    return model.network(images * masks + (1 - masks) * fill)


def measure(model: Classifier, split: Split, samples: int, constant: bool) -> tuple[float, float, float, float]:
    """Return four shares in %: the edge's of the object's pixels and of its |relevance|, the object's of all
    |relevance|, and the sum of the map by the logit, which is the median over images.
    """
    of_pixels, of_relevance, on_object, of_logit = [], [], [], []
    step = max(1, len(split) // samples)
    rows = np.arange(0, len(split), step)
    for start in range(0, len(rows), AT_ONCE):
        chosen = rows[start : start + AT_ONCE]
        images = as_input(np.asarray(split.images.oindex[chosen]), CPU)
        masks = as_mask(np.asarray(split.masks.oindex[chosen]), CPU)
        labels = torch.from_numpy(np.asarray(split.labels.oindex[chosen]).astype(np.int64))

        def run(x: Tensor, masks: Tensor = masks) -> Tensor:
            return behind_constant(model, x, masks) if constant else model(x, masks)

        logits, maps = explain(run, images, labels, EPSILON)[:2]
        sizes, edge = maps.abs().sum(1, keepdim=True), edges(masks)
        total, inside = sizes.sum((1, 2, 3)), (sizes * masks).sum((1, 2, 3))
        known = inside > 0
        of_pixels.append((edge.sum((1, 2, 3)) / masks.sum((1, 2, 3)))[known])
        of_relevance.append(((sizes * edge).sum((1, 2, 3)) / inside)[known])
        on_object.append((inside / total)[known])
        of_logit.append((maps.sum((1, 2, 3)) / logits.gather(1, labels[:, None])[:, 0])[known])
    means = [100 * float(torch.cat(each).mean()) for each in (of_pixels, of_relevance, on_object)]
    return means[0], means[1], means[2], 100 * float(torch.cat(of_logit).median())


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--samples", default=1000, help="Images of each test split.")
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(data: Path, samples: int, models: tuple[Path, ...]) -> None:
    rows = []
    for path in models:
        model = load_classifier(path)[0].eval()
        fills = (False, True) if model.debias.startswith("mask-") and "background" not in model.debias else (False,)
        for constant in fills:
            for split in open_dataset(data).test_splits:
                pixels, relevance, on_object, logit = measure(model, split, samples, constant)
                name = f"{path}, its fill a constant" if constant else str(path)
                shares = (f"{value:.1f} %" for value in (pixels, relevance, on_object, logit))
                rows.append([name, split.name, *shares, f"{relevance / pixels:.2f}"])
    header = ["model", "split", "edge of object's pixels", "edge of object's relevance", "on object", "map of logit"]
    print(table([*header, "relevance by pixels"], rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
