"""A network of your own learns from heatmaps, and is compared with itself, trained on labels.

    python examples/own_model.py --out FOLDER

Copy this file and put your network in place of `OwnNetwork`. It takes float32 images (N, C, H, W) in [0, 1] and returns
logits (N, classes). The rest is the order of things: is there a rule for each of its operations, a dataset, a teacher,
its heatmaps, two trainings of the same network, their accuracies, a picture, a file that needs nothing of this program.
Three minutes of an idle core.

On the command line the network is ``--student-factory own_model:build``, given in the folder of this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pipeline
from data import make_coloured_mnist, open_dataset
from pipeline.rules.node import node
from trainer import evaluate, show_explanations, train_student, train_teacher

FACTORY = "own_model:build"  # this file, imported by its name


@pipeline.rule_for(torch.asinh)
def asinh_rule(trace: Any, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A rule for an operation that the engine has none for: entered when this file is imported.

    All relevance of asinh(x) goes to x. The modified gradient is then g · asinh(x) / x, in operations that can be
    differentiated, as the loss on heatmaps is. Without a rule the network is refused.
    """

    def relevance(g: Tensor, x: Tensor) -> Tensor:
        return g * func(x) / (x + 1e-6)  # x is never negative here

    return node(trace.state, func, relevance, x)


class Block(nn.Module):
    """Two convolutions beside a shortcut, with group norms and SiLU."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.GroupNorm(4, out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(4, out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class OwnNetwork(nn.Module):
    """A small residual network that first stretches the dark parts of an image, as astronomers do."""

    def __init__(self, num_classes: int, channels: int, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(
            Block(width, 2 * width), nn.MaxPool2d(2), Block(2 * width, 4 * width), nn.AdaptiveMaxPool2d(3)
        )
        self.classifier = nn.Linear(9 * 4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W) in [0, 1] → (N, num_classes)
        return self.classifier(self.blocks(self.stem(torch.asinh(4 * images))).flatten(1))


def build(num_classes: int, image_shape: tuple[int, int, int], width: int = 8) -> OwnNetwork:
    """The factory; ``width`` is an option, given as ``--arch-option width=16``, an even number."""
    return OwnNetwork(num_classes, image_shape[0], width)


def main() -> None:
    parser = argparse.ArgumentParser(description="A network of your own, trained on labels and on heatmaps.")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--width", type=int, default=8, help="of the network, an even number [8]")
    parser.add_argument("--limit", type=int, default=20_000, help="images of each split [20000]")
    parser.add_argument("--teacher-steps", type=int, default=500, help="[500]")
    parser.add_argument("--erm-steps", type=int, default=150, help="[150]")
    parser.add_argument("--student-steps", type=int, default=400, help="[400]")
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{asked.out} exists: choose another --out, or remove it first")
    data, teacher, erm, student = (asked.out / name for name in ("data.zarr", "teacher", "erm", "student"))

    # 1. Has the engine a rule for all that the network does? This says so in a second, or names what has none.
    images, target_class = torch.rand(4, 3, 28, 28), torch.tensor([0, 3, 3, 9])
    network = build(10, (3, 28, 28), asked.width).eval()
    logits, heatmaps = pipeline.explain(network, images, target_class, epsilon=0.1)
    print(f"explained: images {tuple(images.shape)}, logits {tuple(logits.shape)}, heatmaps {tuple(heatmaps.shape)}")

    # 2. A dataset whose colours tell the digits in training, and a teacher that sees no colour.
    make_coloured_mnist(data, limit=asked.limit)
    train_teacher(data, teacher, debias="grayscale", steps=asked.teacher_steps)

    # 3. Its heatmaps, once. Any number of students learn from them, and none needs the teacher.
    caches = {}
    for split in ("train", "validation"):
        caches[split] = asked.out / f"{split}-maps.zarr"
        pipeline.cache_explanations(data, teacher, caches[split], split=split)

    # 4. The same network twice: as it is, by labels; and by heatmaps alone.
    own = {"student_factory": FACTORY, "arch_options": {"width": asked.width}}
    train_student(data, None, erm, method="erm", steps=asked.erm_steps, **own)
    result = train_student(
        data, caches["train"], student, validation_cache=caches["validation"], steps=asked.student_steps, **own
    )
    # As its teacher, it was made free of biases. With other additive terms, heatmaps account for a part of the logit.
    kept = sorted({layer.split()[-1].strip("()") for layer in result["bias_free"]["could_not"]})
    print(f"not free of additive terms: {', '.join(kept) or 'nothing'}")

    # 5. How well they do. OOD: colours never shown; shift: each digit in the colour of another one.
    print(f"\n{'accuracy in %':<24}{'IID':>8}{'OOD':>8}{'shift':>8}")
    for title, model, factory in (
        ("teacher, small-cnn", teacher, None),
        ("own network, labels", erm, FACTORY),
        ("own network, heatmaps", student, FACTORY),
    ):
        found = evaluate(data, model, student_factory=factory)
        print(f"{title:<24}" + "".join(f"{found[split]:8.2f}" for split in ("iid", "ood", "shift")))

    # 6. Where they look, on images whose colour misleads.
    picture = asked.out / "heatmaps.png"
    show_explanations(data, picture, models=[teacher, erm, student], split="shift", student_factory=FACTORY)

    # 7. A file that needs PyTorch and nothing else.
    exported = asked.out / "student.pt2"
    difference = pipeline.export_model(student, exported, "torch-export", student_factory=FACTORY)
    shift = open_dataset(data).split("shift")
    images = torch.from_numpy(shift.images[:10]).float() / 255
    says = torch.export.load(exported).module()(images).argmax(1)
    print(f"\nexported, logits differ by {difference:.1g}; of 10 digits in the colour of another it says")
    print(f"  {says.tolist()}, and they are\n  {shift.labels[:10].tolist()}")
    print(f"\n{picture}: where each looks\n{exported}: the student")


if __name__ == "__main__":
    main()
