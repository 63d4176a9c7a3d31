"""Train your own network on heatmaps, and compare it with the same network trained on labels.

    python examples/own_model.py --out FOLDER

Copy this file and replace `OwnNetwork` with your network. The network takes float32 images (N, C, H, W) in [0, 1] and
returns logits (N, classes). The script checks that the engine has a rule for each operation. It builds a dataset,
trains a teacher, caches its heatmaps, and trains the network twice. It then prints the accuracies, draws heatmaps, and
exports the student to a file that does not depend on this program. It takes three minutes on one idle core.

On the command line, select the network with ``--student-factory own_model:build`` in the folder of this file.
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

FACTORY = "own_model:build"  # the function `build` of this file


@pipeline.rule_for(torch.asinh)
def asinh_rule(trace: Any, func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Propagate all relevance of asinh(x) to x.

    The import of this file registers the rule. The modified gradient is g · asinh(x) / x. It consists of differentiable
    operations, because the loss differentiates the heatmap. Without this rule, the engine rejects the network.
    """

    def relevance(g: Tensor, x: Tensor) -> Tensor:
        return g * func(x) / (x + 1e-6)  # x is never negative here

    return node(trace.state, func, relevance, x)


class Block(nn.Module):
    """Two convolutions with group norms and SiLU, and a shortcut."""

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
    """A small residual network. It first brightens the dark parts of an image, as astronomers do."""

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
    """Build the network. ``width`` is an even number; ``--arch-option width=16`` sets it."""
    return OwnNetwork(num_classes, image_shape[0], width)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train your own network on labels and on heatmaps.")
    parser.add_argument("--out", type=Path, required=True, help="output folder, which must not exist")
    parser.add_argument("--width", type=int, default=8, help="width of the network, an even number [8]")
    parser.add_argument("--limit", type=int, default=20_000, help="maximum number of images in each split [20000]")
    parser.add_argument("--teacher-steps", type=int, default=500, help="optimizer steps of the teacher [500]")
    parser.add_argument("--erm-steps", type=int, default=150, help="optimizer steps of the network on labels [150]")
    parser.add_argument(
        "--student-steps", type=int, default=400, help="optimizer steps of the student on heatmaps [400]"
    )
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: choose another --out, or remove it first")
    data, teacher, erm, student = (args.out / name for name in ("data.zarr", "teacher", "erm", "student"))

    # 1. Check that the engine has a rule for each operation. Otherwise, the error names the operation.
    images, target_class = torch.rand(4, 3, 28, 28), torch.tensor([0, 3, 3, 9])
    network = build(10, (3, 28, 28), args.width).eval()
    logits, heatmaps = pipeline.explain(network, images, target_class, epsilon=0.1)
    print(f"explained: images {tuple(images.shape)}, logits {tuple(logits.shape)}, heatmaps {tuple(heatmaps.shape)}")

    # 2. Build a dataset in which the colour tells the digit, and train a teacher that cannot see colour.
    make_coloured_mnist(data, limit=args.limit)
    train_teacher(data, teacher, debias="grayscale", steps=args.teacher_steps)

    # 3. Cache the teacher's heatmaps once. Any number of students can learn from them without the teacher.
    caches = {}
    for split in ("train", "validation"):
        caches[split] = args.out / f"{split}-maps.zarr"
        pipeline.cache_explanations(data, teacher, caches[split], split=split)

    # 4. Train the same network twice: unchanged on labels, and in its bias-free form on heatmaps.
    own = {"student_factory": FACTORY, "arch_options": {"width": args.width}}
    train_student(data, None, erm, method="erm", steps=args.erm_steps, **own)
    result = train_student(
        data, caches["train"], student, validation_cache=caches["validation"], steps=args.student_steps, **own
    )
    # Like its teacher, the student is bias-free. Remaining additive terms take a share of the logit from the heatmaps.
    unchanged = sorted({layer.split()[-1].strip("()") for layer in result["bias_free"]["could_not"]})
    print(f"modules with additive terms: {', '.join(unchanged) or 'none'}")

    # 5. Evaluate. OOD: colours that the training split does not contain; shift: the colour of another digit.
    print(f"\n{'accuracy in %':<24}{'IID':>8}{'OOD':>8}{'shift':>8}")
    for title, model, factory in (
        ("teacher, small-cnn", teacher, None),
        ("own network, labels", erm, FACTORY),
        ("own network, heatmaps", student, FACTORY),
    ):
        accuracies = evaluate(data, model, student_factory=factory)
        print(f"{title:<24}" + "".join(f"{accuracies[split]:8.2f}" for split in ("iid", "ood", "shift")))

    # 6. Draw heatmaps for images with a misleading colour.
    picture = args.out / "heatmaps.png"
    show_explanations(data, picture, models=[teacher, erm, student], split="shift", student_factory=FACTORY)

    # 7. Export the student to a file that needs only PyTorch.
    export_path = args.out / "student.pt2"
    difference = pipeline.export_model(student, export_path, "torch-export", student_factory=FACTORY)
    shift = open_dataset(data).split("shift")
    images = torch.from_numpy(shift.images[:10]).float() / 255
    predictions = torch.export.load(export_path).module()(images).argmax(1)
    print(f"\nexported, logits differ by {difference:.1g}; predictions for 10 digits in the colour of another digit:")
    print(f"  {predictions.tolist()}, labels:\n  {shift.labels[:10].tolist()}")
    print(f"\n{picture}: heatmaps of all models\n{export_path}: exported student")


if __name__ == "__main__":
    main()
