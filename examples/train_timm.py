"""Distil a student by timm's conventions: its model registry, optimizer and scheduler factories.

python examples/train_timm.py --data DATA.zarr --cache CACHE.zarr --steps 3000 --out student.pt
"""

import argparse

import timm
import torch
from accuracy import print_accuracies
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

from pipeline import build_network
from trainer import DistillationLoss, ExplainedStream, build_student


@timm.models.register_model
def small_cnn(pretrained: bool = False, num_classes: int = 10, in_chans: int = 3, **_: object) -> torch.nn.Module:
    return build_network("small-cnn", num_classes, (in_chans, 28, 28), free_of_biases=False)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="small_cnn", help="Any name that timm.create_model knows.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    timm.utils.random_seed(options.seed)
    student = build_student(options.cache, timm.create_model(options.model, num_classes=10), bias_free_form=True)
    loss = DistillationLoss(options.cache)
    dataset = ExplainedStream(
        options.data, options.cache, batch_size=options.batch_size, fields=["heatmaps"], seed=options.seed
    )
    optimizer = create_optimizer_v2(student, opt="adam", lr=4e-3, weight_decay=0.0)
    warmup = int(0.3 * options.steps)  # in updates: an "epoch" has one here
    schedule, steps = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.steps - warmup, warmup_epochs=warmup, warmup_prefix=True,
        warmup_lr=1.6e-4, step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    for step in range(steps):
        if step % len(dataset) == 0:
            dataset.set_epoch(step // len(dataset))
            batches = iter(DataLoader(dataset, batch_size=None))
        if step >= steps // 2:
            student.eval()
        loss(student, next(batches)).backward()
        timm.utils.dispatch_clip_grad(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
    torch.save(student.state_dict(), options.out)
    print_accuracies(student, options.data)
