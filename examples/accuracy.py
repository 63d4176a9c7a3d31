"""Accuracy of a student on the test splits, for the training loops beside this file."""

import torch
from torch import nn

from data import open_dataset


@torch.no_grad()
def print_accuracies(student: nn.Module, data: str) -> None:
    """Print the accuracy on each test split, in percent."""
    student.eval()
    for split in open_dataset(data).test_splits:
        images, labels = torch.from_numpy(split.images[:]), torch.from_numpy(split.labels[:])
        predicted = torch.cat([student(part / 255).argmax(1) for part in images.split(500)])
        print(f"{split.name}: {100 * (predicted == labels).float().mean():.2f} %")
