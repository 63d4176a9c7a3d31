"""Distil a student in a plain PyTorch loop.

python examples/train_pytorch.py --data DATA.zarr --cache CACHE.zarr --steps 3000 --out student.pt
"""

import argparse

import torch
from accuracy import print_accuracies
from torch.utils.data import DataLoader

from trainer import DistillationLoss, ExplainedStream, build_student

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    student = build_student(options.cache, "small-cnn")
    loss = DistillationLoss(options.cache)
    dataset = ExplainedStream(
        options.data, options.cache, batch_size=options.batch_size, fields=["heatmaps"], seed=options.seed
    )
    loader = DataLoader(dataset, batch_size=None)
    learnt = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=options.steps)

    epochs = -(-options.steps // len(dataset))
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for step, batch in enumerate(loader, epoch * len(dataset)):
            if step == options.steps:
                break
            if step >= options.steps // 2:
                student.eval()  # it learns what it will compute in evaluation, as with train-student
            value = loss(student, batch)
            value.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                print(f"step {step}: loss {value.item():.4f}", flush=True)
    torch.save(student.state_dict(), options.out)
    print_accuracies(student, options.data)
