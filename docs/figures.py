"""Draw the figures of how-it-works.md and architecture.md as SVG files in docs/images.

python docs/figures.py                 all figures; trains a small teacher and two students on a part of COLOURED MNIST
python docs/figures.py architecture    the named figures only; this one needs no training

Run it by hand after a change to the content of a figure. It takes minutes on a CPU. The same machine and releases give
the same files. The background is white on dark pages too, because white stands for zero in maps.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # import the packages of this checkout

from data import make_coloured_mnist, open_dataset  # noqa: E402
from pipeline import cache_explanations, explain, load_classifier  # noqa: E402
from trainer import train_student, train_teacher  # noqa: E402
from trainer.loop.losses import heatmap_loss  # noqa: E402
from trainer.results.show import common_limit, in_units  # noqa: E402

COLOURS = "RdBu_r"  # as in trainer/results/pictures.py: red supports the class, blue contradicts it
INK, MUTED, BOX, BLUE = "#222222", "#666666", "#f1f3f6", "#2b6cb0"
LIMIT, STEPS = 12_000, (3, 600)  # training images; steps of the early and of the late student
SEVEN, EPSILON, BATCH = 7, 0.1, 128
LOOK = {
    "svg.fonttype": "path", "svg.hashsalt": "figures", "font.family": "DejaVu Sans", "font.size": 9,
    "mathtext.fontset": "dejavusans", "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


@dataclass(frozen=True)
class Explained:
    """Test images and the networks that explain them; the figures show the first image.

    ``images`` is float32 (N, 3, 28, 28) in [0, 1]. Students are in training mode, as in the loss: their norms are over
    the batch.
    """

    images: torch.Tensor
    teacher: torch.nn.Module
    students: tuple[torch.nn.Module, ...]

    def maps(self, model: torch.nn.Module, target_class: int, epsilon: float) -> torch.Tensor:
        """Explain the first image for one class and one ε: (3, 28, 28)."""
        classes = torch.full((len(self.images),), target_class)
        return explain(model, self.images, classes, epsilon)[1][0].detach()


def trained(work: Path) -> Explained:
    """Make the dataset, teacher, store and students in a folder, and load them."""
    data, store = work / "data.zarr", work / "store.zarr"
    make_coloured_mnist(data, limit=LIMIT)
    train_teacher(data, work / "teacher", steps=400)
    cache_explanations(data, work / "teacher", store)
    for steps in STEPS:
        train_student(data, store, work / f"student-{steps}", steps=steps)
    return opened(work)


def opened(work: Path) -> Explained:
    """Load the images and networks of a folder that `trained` has filled."""
    split = open_dataset(work / "data.zarr").split("iid")
    first = int(np.flatnonzero(np.asarray(split.labels[:]) == SEVEN)[0])
    images = torch.from_numpy(np.asarray(split.images[first : first + BATCH])).float() / 255
    students = tuple(load_classifier(work / f"student-{steps}")[0].train() for steps in STEPS)
    return Explained(images, load_classifier(work / "teacher")[0], students)


def two_stages(seven: Explained) -> Figure:
    """Draw the way from biased images to the loss: stage one above, stage two below."""
    figure = Figure(figsize=(7.6, 4.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 76), ylim=(-3, 38))
    axis.set_axis_off()
    above, below, side = 27.0, 10.0, 9.0
    grey = seven.images[0].mean(0, keepdim=True)
    grey = (grey / grey.max()).expand(3, -1, -1)
    student = seven.students[-1]
    picture(axis, 8, 18.5, side, seven.images[0], "biased images:\neach class has its colour")
    picture(axis, 25, above, side, grey, "behind the front: no colour")
    block(axis, 40, above, 11, "teacher", "trained with labels")
    picture(axis, 55, above, side, seven.maps(seven.teacher, SEVEN, EPSILON), "its heatmap $T$")
    block(axis, 69.5, above, 11, "store", "of all images")
    block(axis, 30, below, 15, "student", "last layer: the teacher's")
    picture(axis, 48.5, below, side, seven.maps(student, SEVEN, EPSILON), "its heatmap $S$")
    block(axis, 69.5, below, 11, "loss", r"mean $|S/g - T/g|$")
    arrow(axis, (12.8, 20), (20.2, above - 0.5))
    arrow(axis, (12.8, 17), (22.2, below + 0.5))
    arrow(axis, (29.8, above), (34.2, above))
    arrow(axis, (45.8, above), (50.2, above))
    arrow(axis, (59.8, above), (63.7, above))
    arrow(axis, (69.5, above - 3.3), (69.5, below + 3.3))
    axis.text(68.7, 18.5, "$T$, class $t$, $ε$", ha="right", va="center", fontsize=8)
    arrow(axis, (37.8, below), (43.7, below))
    arrow(axis, (53.3, below), (63.7, below))
    axis.plot([69.5, 69.5, 30], [below - 3.3, 1, 1], color=BLUE, linestyle="--", linewidth=1.3)
    arrow(axis, (30, 1), (30, below - 3.3), color=BLUE)
    axis.text(
        50, 0.2, "the loss's gradient, through $S$ and the network", color=BLUE, ha="center", va="top", fontsize=8
    )
    axis.text(1, 35.5, "Stage one: once", weight="bold", fontsize=10)
    axis.text(1, -1.6, "Stage two: any number of students", weight="bold", fontsize=10)
    return figure


def relu(_: Explained) -> Figure:
    """Draw the factor by which a ReLU multiplies relevance, for some ε, beside the gradient's step function."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axis = figure.subplots()
    value = np.linspace(-0.6, 2, 2601)
    output = value.clip(0)
    axis.plot([-0.6, 0, 0, 2], [0, 0, 1, 1], color=INK, linestyle="--", linewidth=1.4)
    axis.text(0.62, 1.02, "plain gradient: a step (ε = 0)", va="bottom")
    for epsilon, shade, place in ((0.01, 0.95, 0.12), (0.1, 0.75, 0.5), (1.0, 0.55, 1.2)):
        color = matplotlib.colormaps["Blues"](shade)
        axis.plot(value, output / (output + epsilon), color=color, linewidth=2)
        axis.annotate(
            f"ε = {epsilon:g}", (place, place / (place + epsilon)), xytext=(6, -4), textcoords="offset points",
            ha="left", va="top", color=color,
        )  # fmt: skip
    axis.set(xlim=(-0.6, 2), ylim=(-0.04, 1.14), yticks=[0, 0.5, 1])
    axis.set_xlabel("what enters the ReLU; right of 0, its output $a$")
    axis.set_ylabel("relevance is multiplied by")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draws(seven: Explained) -> Figure:
    """Draw the teacher's maps of one image, for its class and another class, at some ε."""
    rows, columns = ((SEVEN, "its class: 7"), (2, "another: 2")), (0.01, 0.1, 1.0)
    maps = [[in_units(seven.maps(seven.teacher, row, ε).sum(0).numpy()) for ε in columns] for row, _ in rows]
    limit = common_limit([each for row in maps for each in row])
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.subplots(2, 4)
    show(axes[0, 0], seven.images[0].numpy(), limit)
    axes[0, 0].set_title("image", fontsize=9)
    axes[1, 0].set_axis_off()
    for line, row, (_, name) in zip(axes, maps, rows, strict=True):
        for axis, content in zip(line[1:], row, strict=True):
            show(axis, content, limit)
        line[1].set_ylabel(name)
    for axis, epsilon in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(f"ε = {epsilon:g}", fontsize=9)
    return figure


def pyramid(seven: Explained) -> Figure:
    """Draw the two maps that the loss compares, divided by g, at every resolution, for an early and a late student."""
    teacher = seven.maps(seven.teacher, SEVEN, EPSILON)
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    early, late = figure.subfigures(2, 1, hspace=0.06)
    for panel, student, steps in zip((early, late), seven.students, STEPS, strict=True):
        maps = seven.maps(student, SEVEN, EPSILON)
        whole = heatmap_loss(maps[None], teacher[None]).item()
        panel.suptitle(
            f"a student after {steps} steps: $L$ = {whole:.2f}, the mean of both resolutions",
            fontsize=10,
            weight="bold",
        )
        grid = panel.subplots(1, 7, width_ratios=(1, 1, 1, 0.12, 1, 1, 1))
        grid[3].set_axis_off()
        for axes, factor in ((grid[:3], 1), (grid[4:], 2)):
            s, t = (F.avg_pool2d(each[None], factor)[0] for each in (maps, teacher))
            g = (s.abs().mean() * t.abs().mean()).sqrt()
            loss = ((s - t).abs().mean() / g).item()
            contents = [(each / g).sum(0).numpy() for each in (s, t, s - t)]
            limit = common_limit([contents[1]])
            for axis, content, name in zip(axes, contents, ("$S/g$", "$T/g$", "$S/g - T/g$"), strict=True):
                show(axis, content, limit)
                axis.set_title(name, fontsize=9)
            side = s.shape[-1]
            axes[1].set_xlabel(f"{side} × {side}")
            axes[2].set_xlabel(f"mean |…| = {loss:.2f}")
    return figure


def picture(axis: Any, x: float, y: float, side: float, content: torch.Tensor, below: str) -> None:
    """Draw an image (3, h, w) in [0, 1], or a map, in a square centred on a point of the diagram."""
    h = side / 2
    inset = axis.inset_axes((x - h, y - h, side, side), transform=axis.transData)
    is_map = bool((content < 0).any())
    values = in_units(content.sum(0).numpy()) if is_map else content.numpy()
    show(inset, values, common_limit([values]) if is_map else 1.0)
    axis.text(x, y - h - 0.7, below, ha="center", va="top", fontsize=8)


def block(axis: Any, x: float, y: float, width: float, name: str, below: str) -> None:
    """Draw a box centred on a point of the diagram."""
    corner, shape = (x - width / 2, y - 3), "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch(corner, width, 6, boxstyle=shape, facecolor=BOX, edgecolor=MUTED))
    axis.text(x, y + 1.1, name, ha="center", va="center", weight="bold", fontsize=10)
    axis.text(x, y - 1.3, below, ha="center", va="center", fontsize=7.5)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draw a straight arrow between two points of the diagram."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.3, "color": color, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **look))


def show(axis: Any, content: np.ndarray, limit: float) -> None:
    """Draw an image (3, h, w) in [0, 1], or a map (h, w) with colours from −``limit`` to ``limit``."""
    axis.set(xticks=[], yticks=[])
    if content.ndim == 3:
        axis.imshow(content.transpose(1, 2, 0), interpolation="none")
    else:
        axis.imshow(content, cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="none")


PACKAGES = {  # colour of the boxes of a package in `architecture`
    "data": "#dff0e0", "teacher_cache": "#fdebd0", "pipeline": "#dce9f7", "trainer": "#ece6f5",
}  # fmt: skip
COLUMNS, ABOVE, MIDDLE, BELOW = (9.5, 29.5, 49.5, 69.5, 89.5), 54.0, 33.0, 14.0  # centres of boxes in `architecture`
NETWORK = "networks/\nforward.py\nrelevance.py, rules/"
STAGE_ONE = (  # package, name, files, content that the box passes on
    ("data", "dataset", "DATA.zarr\ndata/layout.py", "images: uint8\n(N, C, H, W)"),
    ("pipeline", "shard", "caching/stage_one.py\nbatches.py, draws.py", "images (n, C, H, W);\nD draws: class t, ε"),
    ("pipeline", "teacher", NETWORK, "maps (n, D, C, H, W)\nfloat32; logits (n, K)"),
    ("teacher_cache", "codec", "codec.py", "float16, bfloat16 or int8,\ncompressed"),
    ("teacher_cache", "heatmap store", "CACHE.zarr\nstore.py, layout.py", "one commit record\nfor each shard"),
)
STAGE_TWO = (
    ("trainer", "order, stream", "stream/order.py\nstream/stream.py", "one draw of each sample,\nas stored"),
    (
        "trainer",
        "batch on device",
        "loop/step.py\nloop/augmentation.py",
        "images, maps (B, C, H, W)\nfloat32; t, ε (B,)",
    ),
    ("pipeline", "student", NETWORK, "its maps for\nthe same t, ε"),
    ("trainer", "loss", "loop/methods.py\nloop/losses.py", "(B,): one number\nfor each sample"),
    ("trainer", "optimizer", "loop/optim.py", "new weights"),
)
RESULTS = (
    ("trainer", "report, tables", "results/", "tables, pictures, report.html"),
    ("trainer", "evaluation", "results/evaluation.py", "accuracy, worst group, gap"),
    ("trainer", "run folder", "RUN/\nrun_dir.py", "weights, checkpoints,\nmetrics"),
)


def architecture() -> Figure:
    """Draw the way of one image (stage one) and of one batch (stage two) through the files."""
    figure = Figure(figsize=(8.6, 5.0))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(5.5, 63))
    axis.set_axis_off()
    axis.text(1.5, ABOVE + 6, "Stage one: the way of one image through cache-explanations", weight="bold", fontsize=10)
    axis.text(21.5, MIDDLE + 6, "Stage two: the way of one batch through train-student", weight="bold", fontsize=10)
    axis.text(41.5, BELOW + 6, "Results", weight="bold", fontsize=10)
    for row, y, columns in ((STAGE_ONE, ABOVE, COLUMNS), (STAGE_TWO, MIDDLE, COLUMNS), (RESULTS, BELOW, COLUMNS[2:])):
        for (package, name, files, passed_on), x in zip(row, columns, strict=True):
            file_box(axis, x, y, package, name, files, passed_on)
    for left, right in pairwise(COLUMNS):
        arrow(axis, (left + 8, ABOVE), (right - 8, ABOVE))
        arrow(axis, (left + 8, MIDDLE), (right - 8, MIDDLE))
    for left, right in pairwise(COLUMNS[2:]):
        arrow(axis, (right - 8, BELOW), (left + 8, BELOW))
    arrow(axis, (3.2, ABOVE - 4), (3.2, MIDDLE + 4))  # images of the dataset
    axis.plot([96.8, 96.8, 15.8], [ABOVE - 4, 43.2, 43.2], color=INK, linewidth=1.3)  # draws of the store
    arrow(axis, (15.8, 43.2), (15.8, MIDDLE + 4))
    arrow(axis, (96.8, MIDDLE - 4), (96.8, BELOW + 4))  # weights and metrics
    axis.plot([76.5, 76.5, 56.3], [MIDDLE - 4, 24.2, 24.2], color=BLUE, linestyle="--", linewidth=1.3)
    arrow(axis, (56.3, 24.2), (56.3, MIDDLE - 4), color=BLUE)
    axis.text(66.4, 23.6, "gradient of the loss", color=BLUE, ha="center", va="top", fontsize=7)
    legend(axis, 1.5, BELOW + 4)
    return figure


def file_box(axis: Any, x: float, y: float, package: str, name: str, files: str, passed_on: str) -> None:
    """Draw a box of `architecture`: a name, its files, and below it the content that it passes on."""
    shape = "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch((x - 8, y - 4), 16, 8, boxstyle=shape, facecolor=PACKAGES[package], edgecolor=MUTED))
    axis.text(x, y + 2.4, name, ha="center", va="center", weight="bold", fontsize=9)
    axis.text(x, y - 1.3, files, ha="center", va="center", fontsize=6.4, family="DejaVu Sans Mono")
    axis.text(x, y - 4.6, passed_on, ha="center", va="top", fontsize=6.8, color=MUTED)


def legend(axis: Any, x: float, y: float) -> None:
    """Draw the colours of the packages, from a point downwards."""
    for number, (package, color) in enumerate(PACKAGES.items()):
        top = y - 3 * number
        axis.add_patch(FancyBboxPatch((x, top - 2), 3, 2, boxstyle="square,pad=0", facecolor=color, edgecolor=MUTED))
        axis.text(x + 4, top - 1, f"{package}/", va="center", fontsize=7.5, family="DejaVu Sans Mono")


FIGURES = {"two-stages": two_stages, "relu": relu, "draws": draws, "pyramid": pyramid}  # of trained networks
DIAGRAMS = {"architecture": architecture}


def main(names: list[str]) -> None:
    """Draw the named figures, or all of them."""
    torch.manual_seed(0)
    seven = None
    for name in names or [*FIGURES, *DIAGRAMS]:
        if name in FIGURES and seven is None:
            with tempfile.TemporaryDirectory() as work:
                seven = trained(Path(work))
        with matplotlib.rc_context(LOOK):
            figure = DIAGRAMS[name]() if name in DIAGRAMS else FIGURES[name](seven)
            figure.set_facecolor("white")
            out = ROOT / "docs" / "images" / f"{name}.svg"
            figure.savefig(out, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.12)


if __name__ == "__main__":
    main(sys.argv[1:])
