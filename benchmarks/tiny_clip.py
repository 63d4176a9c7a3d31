"""A vision-language teacher end to end, without a download: a tiny CLIP, its store, and students of heatmaps alone.

    pip install -e ".[clip]" && python benchmarks/tiny_clip.py --work FOLDER

Stands in for the published weights, which are trained on pictures of any colour whose captions name what is there: here
MNIST's training digits in random colours, with captions that name the digit and never the colour. The students see
COLOURED MNIST, where the colour tells the digit, and the store. Stopped anywhere, the same command goes on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from report import processor, table
from torch import Tensor, nn
from tqdm import tqdm

from data import DatasetError, make_coloured_mnist, open_dataset
from pipeline import ZeroShot, cache_explanations
from pipeline.networks.zero_shot import preprocessing
from trainer import evaluate, train_student

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "vit": {"image_size": 28, "layers": 4, "width": 96, "head_width": 32, "patch_size": 4},
}
EPSILONS = {"resnet": (0.1, 1.0), "vit": (0.01, 1.0)}  # of deep ReLU networks the coarser maps are matched far better
CAPTIONS = ("a handwritten {}", "the digit {}", "a photo of the number {}", "someone wrote a {}", "{}")
PROMPTS = CAPTIONS[:3]
BATCH_SIZE, LR, WARMUP = 128, 2e-3, 100
TEACHER, ERM = "zero-shot teacher", "ERM"
OWN: dict[str, dict[str, Any]] = {  # of a student built as its teacher
    "resnet": {"head": "attention-pool", "optimizer": "muon", "lr": 4e-3, "batch_size": 64},
    "vit": {"lr": 2e-3},
}
LENGTHS = {"resnet": 2 / 3, "vit": 1 / 2}  # of its training, in those of the others
ALIKE = "student of heatmaps, of the teacher's architecture"
STUDENTS: dict[str, dict[str, Any]] = {  # by title: options of train_student
    ERM: {"method": "erm"},
    ALIKE: {"method": "lrp"},
    "student of heatmaps": {"method": "lrp"},
    "student of completed heatmaps": {"method": "complete-lrp"},
    "student of outputs": {"method": "output"},
}


def vit(num_classes: int) -> nn.Module:
    """A student built as the teacher's transformer, of images as they are."""
    from open_clip.transformer import VisionTransformer

    config = TOWERS["vit"]
    tower = VisionTransformer(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["width"],
        layers=config["layers"],
        heads=config["width"] // config["head_width"],
        mlp_ratio=4.0,
        output_dim=64,
    )
    return nn.Sequential(tower, nn.Linear(64, num_classes))


def resnet(num_classes: int) -> nn.Module:
    """A student built as the teacher's ResNet, without the attention pooling, which is copied."""
    from open_clip.modified_resnet import ModifiedResNet

    config = TOWERS["resnet"]
    side = config["image_size"]
    tower = ModifiedResNet(config["layers"], output_dim=64, heads=8, image_size=side, width=config["width"])
    tower.attnpool = nn.Identity()
    for name, parameter in tower.named_parameters():
        if name.endswith("bn3.weight"):  # which CLIP begins with at 0, where no relevance passes
            nn.init.ones_(parameter)
    larger = nn.Upsample((side, side), mode="bicubic")
    return nn.Sequential(
        larger, tower, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * config["width"], num_classes)
    )


def train_clip(data: Path, tower: str, out: Path, steps: int, seed: int = 0) -> None:
    """Train a model of ``tower`` contrastively; writes ``config.json`` and ``weights.pt`` as open_clip reads them."""
    import open_clip

    config = {"embed_dim": 64, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = open_clip.CLIP(**config)
    tokenizer = open_clip.get_tokenizer("RN50", context_length=TEXT["context_length"])
    train = open_dataset(data).split("train")
    digits = torch.from_numpy(np.asarray(train.images[:]).max(1, keepdims=True) > 0)  # (N, 1, 28, 28), as painted
    labels = np.asarray(train.labels[:])
    captions = tokenizer([text.format(name) for name in open_dataset(data).class_names for text in CAPTIONS])
    preprocess = preprocessing(model)

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0}], LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=min(0.3, WARMUP / steps))
    model.train()
    with tqdm(range(steps), desc=f"tiny CLIP, {tower}", unit="step", disable=None) as bar:
        for _ in bar:
            rows = rng.integers(0, len(digits), BATCH_SIZE)
            colours = torch.from_numpy(_colours(rng, len(rows)))
            images = preprocess(digits[rows].float() * colours[:, :, None, None])
            texts = labels[rows] * len(CAPTIONS) + rng.integers(0, len(CAPTIONS), len(rows))
            embedded = model.encode_text(captions, normalize=True)[texts]  # each caption once
            seen = model.encode_image(images, normalize=True)
            loss = _contrastive(seen, embedded, model.logit_scale.exp(), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), out / "weights.pt")


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Any colour that is not near black: float32 (count, 3), the brightest channel at least 0.3."""
    colours = rng.random((count, 3))
    brightest = colours.max(1, keepdims=True)
    return (colours / brightest * rng.uniform(0.3, 1, (count, 1))).astype(np.float32)


def _contrastive(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """CLIP's loss in both directions; all captions of the same digit are right for an image, in equal parts."""
    logits = scale * images @ texts.T
    same = (labels[:, None] == labels).float()
    same = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def _run(
    work: Path, tower: str, clip_steps: int, steps: int, chosen: tuple[str, ...], limit: int | None
) -> list[list[Any]]:
    data, folder = work / "data.zarr", work / tower
    try:
        open_dataset(data)
    except DatasetError:
        make_coloured_mnist(data, limit=limit)
    if not (folder / "clip" / "weights.pt").exists():
        train_clip(data, tower, folder / "clip", clip_steps)
    teacher = ZeroShot(str(folder / "clip" / "config.json"), str(folder / "clip" / "weights.pt"), templates=PROMPTS)
    cache_explanations(data, teacher, folder / "store.zarr", epsilon_range=EPSILONS[tower], batch_size=256)
    found = {TEACHER: evaluate(data, teacher)}
    for title, options in STUDENTS.items():
        if chosen and title not in chosen:
            continue
        own = {**OWN[tower], "student_factory": f"tiny_clip:{tower}"} if title == ALIKE else {}
        out = folder / re.sub("[ ,']+", "-", title)
        store = None if title == ERM else folder / "store.zarr"
        if not (out / "result.json").exists():
            length = max(1, round(steps * {ERM: 1 / 5, ALIKE: LENGTHS[tower]}.get(title, 1)))
            train_student(data, store, out, **{"steps": length, "lr": 6e-3, **options, **own})
        found[title] = evaluate(data, out, student_factory=own.get("student_factory"))
    return [
        [tower, title, *(f"{scores[split]:.2f}" for split in ("iid", "ood", "shift"))]
        for title, scores in found.items()
    ]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Everything is kept here.")
@click.option("--tower", "towers", multiple=True, type=click.Choice(list(TOWERS)), help="Both unless given.")
@click.option(
    "--clip-steps", default=1000, show_default=True, type=click.IntRange(1), help="Of the teacher's training."
)
@click.option("--steps", default=3000, show_default=True, type=click.IntRange(1), help="Of a student's training.")
@click.option("--row", "rows", multiple=True, type=click.Choice(list(STUDENTS)), help="All unless given.")
@click.option("--limit", type=click.IntRange(1), help="At most so many samples of each split.")
def main(
    work: Path, towers: tuple[str, ...], clip_steps: int, steps: int, rows: tuple[str, ...], limit: int | None
) -> None:
    lines = [line for tower in towers or TOWERS for line in _run(work, tower, clip_steps, steps, rows, limit)]
    click.echo(table(["image tower", "", "IID", "OOD", "shift"], lines))
    click.echo("\n" + processor(torch.device("cpu")))


if __name__ == "__main__":
    main()
