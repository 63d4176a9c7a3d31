"""Draw the pictures of solar-cells.md and its results: where a biased network, the teacher and the student look.

python docs/solar_cells.py DATA.zarr ERM TEACHER STUDENT                          of small-cnn
python docs/solar_cells.py DATA.zarr ERM TEACHER STUDENT --explainer flex-stride8 --name pretrained.jpg \
    --factory trainer.reproduction.efficientnet_lite:build                        of pretrained networks

The pictures show photographs of elpv-dataset, so they are written to images/solar-cells/, which has their licence.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # import the packages of this checkout

from data import Split, open_dataset  # noqa: E402
from pipeline import load_classifier  # noqa: E402
from pipeline.batch import explain_batch  # noqa: E402

OUT = ROOT / "docs" / "images" / "solar-cells"
PANELS = (("iid", 1, "defective cells with the stamp, as in training"), ("shift", 0, "functional cells with the stamp"))
DEFECTIVE, EPSILON, EACH = 1, 0.1, 3
BLUR = 1 / 40  # standard deviation of the blur of maps, as a share of the image's side
FULL = 0.995  # share of a map's positions that lie below its strongest colour
QUALITY = 88  # of the JPEG, which is a third of a PNG of photographs


@click.command()
@click.argument("dataset")
@click.argument("models", nargs=3, metavar="ERM TEACHER STUDENT")
@click.option("--explainer", default="flex", help="Explainer of the maps.")
@click.option("--factory", help="Function that builds the networks, as MODULE:FUNCTION.")
@click.option("--name", default="where-they-look.jpg", help="Name of the picture's file.")
@click.option("--cells", multiple=True, type=int, help="Indices of cells: those of iid first, then those of shift.")
def main(
    dataset: str, models: tuple[str, ...], explainer: str, factory: str | None, name: str, cells: tuple[int, ...]
) -> None:
    """Draw the picture."""
    classifiers = [load_classifier(model, factory)[0].eval() for model in models]
    opened = open_dataset(dataset)
    figure = Figure(figsize=(9.2, 6.3))
    panels = figure.subfigures(1, len(PANELS), wspace=0)
    for number, (panel, (test, label, title)) in enumerate(zip(panels, PANELS, strict=True)):
        split = opened.split(test)
        rows = cells[EACH * number : EACH * (number + 1)] or np.flatnonzero(np.asarray(split.labels[:]) == label)[:EACH]
        draw(panel, split, np.asarray(rows), classifiers, opened.class_names, explainer)
        left = 0.13 if number == 0 else 0.05
        panel.subplots_adjust(left=left, right=left + 0.86, top=0.925, bottom=0.085, wspace=0.05, hspace=0.22)
        panel.suptitle(title, fontsize=11, weight="bold", y=0.985)
        if number == 0:
            name_rows(panel)
    buffer = io.BytesIO()
    figure.text(0.5, 0.012, "red speaks for a defect, blue against it", ha="center", fontsize=10)
    figure.savefig(buffer, dpi=120, facecolor="white")
    Image.open(buffer).convert("RGB").save(OUT / name, quality=QUALITY, subsampling=0, optimize=True)


def draw(
    panel: Any, split: Split, rows: np.ndarray, models: list[Any], class_names: tuple[str, ...], explainer: str
) -> None:
    """Draw a column for each cell: its image, and what each model says and looks at."""
    images = np.stack([split.images[int(row)] for row in rows])
    masks = None if split.masks is None else np.stack([split.masks[int(row)] for row in rows])
    labels = [int(split.labels[int(row)]) for row in rows]
    axes = panel.subplots(len(models) + 1, len(rows), squeeze=False)
    for axis, image, label in zip(axes[0], images, labels, strict=True):
        show(axis, image)
        axis.set_xlabel(class_names[label], fontsize=9, labelpad=3)
    classes = np.full((len(rows), 1), DEFECTIVE)
    for line, model in zip(axes[1:], models, strict=True):
        explained = explain_batch(
            model, images, masks, classes, EPSILON, explainer=explainer, device=torch.device("cpu")
        )
        said = explained.logits.argmax(1)
        for axis, image, relevance, answer, label in zip(line, images, explained.maps[:, 0], said, labels, strict=True):
            show(axis, image, relevance.sum(0))
            wrong = answer != label
            look = {"color": "firebrick", "weight": "bold"} if wrong else {}
            axis.set_xlabel(f"says {class_names[answer]}", fontsize=9, labelpad=3, **look)


def show(axis: Any, image: np.ndarray, relevance: np.ndarray | None = None) -> None:
    """Draw an image, uint8 (C, H, W), and over it a map (h, w) in red and blue."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    grey = image.mean(0) / 255
    if relevance is None:
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="lanczos")
        return
    smooth = blurred(relevance, grey.shape)
    strength = np.abs(smooth) / np.quantile(np.abs(smooth), FULL)
    colours = matplotlib.colormaps["RdBu_r"](np.where(smooth > 0, 0.92, 0.08))
    colours[..., 3] = strength.clip(0, 1) ** 1.3 * 0.95
    axis.imshow(0.25 + 0.75 * grey, cmap="gray", vmin=0, vmax=1, interpolation="lanczos")
    axis.imshow(colours, interpolation="bilinear")


def blurred(relevance: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale a map to the shape of its image, and blur it a little, so that single pixels do not hide its regions."""
    sigma = BLUR * max(shape)
    size = 2 * math.ceil(3 * sigma) + 1
    whole = F.interpolate(torch.from_numpy(relevance)[None, None], shape, mode="bilinear", align_corners=False)
    return gaussian_blur(whole, [size, size], [sigma, sigma])[0, 0].numpy()


def name_rows(panel: Any) -> None:
    """Write the names of the rows."""
    names = ("image", "trained as usual\n(ERM)", "teacher\n(stamp masked)", "student\n(no mask)")
    for axis, name in zip(panel.axes[::EACH], names, strict=True):
        axis.set_ylabel(name, fontsize=10, rotation=90, labelpad=6)


if __name__ == "__main__":
    main()
