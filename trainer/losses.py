"""How far a student's heatmaps are from the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SIDE = 8


def heatmap_loss(student: Tensor, teacher: Tensor, resolution: int = 1) -> Tensor:
    """Geometric-mean L1 over a pyramid (Bassi et al., arXiv 2407.09788), one number for each sample.

    Both maps (N, C, H, W) are divided by ``sqrt(mean|S| · mean|T|)`` of the sample, and the mean absolute
    difference is taken; this at full resolution and after 2×2, 4×4, … average pooling of the raw maps while
    the smaller side is at least 8, and averaged over these levels. Returns (N,), 0 for equal maps. The
    geometric mean keeps a student from winning by an all-zero or an exploding map. A teacher's map of zeros, as
    from a logit behind a closed ReLU, explains nothing and has no scale: its loss is 0, and so is its gradient.

    A teacher's maps that were average-pooled by ``resolution`` begin the pyramid at their level. Raises ValueError
    for maps whose shapes do not fit.
    """
    if resolution > 1:
        student = F.avg_pool2d(student, resolution)
    if student.shape != teacher.shape:
        raise ValueError(f"the student's maps are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")
    levels = []
    while True:
        levels.append(_geometric_l1(student, teacher))
        if min(student.shape[2:]) // 2 < SMALLEST_SIDE:
            return torch.stack(levels).mean(0)
        student, teacher = F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 2)


def _geometric_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,): mean |S − T| / g with g the geometric mean of the two mean absolute values."""
    s, t = student.abs().mean((1, 2, 3)), teacher.abs().mean((1, 2, 3))
    tiny = torch.finfo(student.dtype).tiny ** 0.5  # no division by 0
    g = (s.clamp_min(tiny) * t.clamp_min(tiny)).sqrt()
    return torch.where(t > 0, (student - teacher).abs().mean((1, 2, 3)) / g, 0)
