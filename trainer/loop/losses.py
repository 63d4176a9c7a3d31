"""How far a student's heatmaps are from the teacher's: one table of losses, and the pyramid that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from options import Lazy, Registry
from trainer.errors import TrainingError

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = Lazy("torch"), Lazy("torch.nn.functional")

SMALLEST_SIDE = 8
KL_FLOOR = 1e-3  # of a map's mean |relevance|: added to each value, so that no logarithm is infinite
VALUES = (1, 2, 3)  # the dimensions of a sample's map


MapLoss = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
# Each takes the maps (N, C, H, W) and the mean |relevance| (N,) of both, and returns (N,).
MAP_LOSSES: Registry[MapLoss] = Registry("map_loss", TrainingError)


def heatmap_loss(
    student: Tensor, teacher: Tensor, resolution: int = 1, *, kind: str = "l1", pyramid: bool = True
) -> Tensor:
    """The distance ``kind`` of `MAP_LOSSES` between two maps (N, C, H, W), over a pyramid: (N,), one for each sample.

    The default is the geometric-mean L1 of Bassi et al., arXiv 2407.09788: both maps are divided by
    ``g = sqrt(mean|S| · mean|T|)`` of the sample, and the mean absolute difference is taken. The geometric mean keeps
    a student from winning by an all-zero or an exploding map. In place of it

    - ``mse`` and ``huber`` (δ = 1) take the mean square, and the mean Huber loss, of the same differences over g;
    - ``cosine`` is 1 − the cosine similarity of the two maps, which sees no scale;
    - ``kl`` is KL(T ‖ S) of |relevance|, normalised to sum 1 over C, H, W: it sees neither scale nor sign.

    Distances are taken at full resolution and after 2×2, 4×4, … average pooling of the raw maps while the smaller
    side is at least 8, and averaged over these levels; without ``pyramid``, at the first level alone. A teacher's maps
    that were average-pooled by ``resolution`` begin the pyramid at their level.

    Equal maps cost 0. A teacher's map of zeros, as from a logit behind a closed ReLU, explains nothing and has no
    scale: its loss is 0, and so is its gradient. Losses and gradients of a student's map of zeros are finite.

    Raises ValueError for an unknown ``kind``, and for maps whose shapes do not fit.
    """
    MAP_LOSSES.check(kind)
    if resolution > 1:
        student = F.avg_pool2d(student, resolution)
    if student.shape != teacher.shape:
        raise ValueError(f"the student's maps are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")
    distance, levels = MAP_LOSSES[kind], []
    while True:
        s, t = student.abs().mean(VALUES), teacher.abs().mean(VALUES)
        levels.append(torch.where(t > 0, distance(student, teacher, s, t), 0))
        if not pyramid or min(student.shape[2:]) // 2 < SMALLEST_SIDE:
            return torch.stack(levels).mean(0)
        student, teacher = F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 2)


@MAP_LOSSES.add("l1")
def _l1(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean absolute difference of the maps, over the geometric mean of their mean |relevance|."""
    return (student - teacher).abs().mean(VALUES) / _geometric_mean(s, t)


@MAP_LOSSES.add("cosine")
def _cosine(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return 1 − the cosine similarity, which ignores the scale."""
    # Any factor does, so the student's has no gradient. Maps of mean 1 have a norm of at least 1, so that only the
    # norm of a map of zeros is clamped: its gradient points to the teacher's map and is no longer than any other's.
    a, b = _over(student, _not_zero(s.detach())), _over(teacher, _not_zero(t))
    norms = [torch.linalg.vector_norm(maps, dim=VALUES).clamp_min(1) for maps in (a, b)]
    return 1 - (a * b).sum(VALUES) / (norms[0] * norms[1])


@MAP_LOSSES.add("mse")
def _mse(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean squared difference of the maps, each over the same geometric mean as in ``l1``."""
    return _over(student - teacher, _geometric_mean(s, t)).square().mean(VALUES)


@MAP_LOSSES.add("huber")
def _huber(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean Huber loss (δ = 1) of the maps, each over the same geometric mean as in ``l1``."""
    difference = _over(student - teacher, _geometric_mean(s, t))
    return F.huber_loss(difference, torch.zeros_like(difference), reduction="none").mean(VALUES)


@MAP_LOSSES.add("kl")
def _kl(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the KL divergence of |relevance|, normalised to sum 1, which ignores scale and sign."""
    q, p = (_over(maps.abs(), _not_zero(size)) + KL_FLOOR for maps, size in ((student, s), (teacher, t)))
    q, p = (_over(maps, maps.mean(VALUES)) for maps in (q, p))
    return (p * (p / q).log()).mean(VALUES)  # p and q sum to the number of values, hence the mean


def _geometric_mean(s: Tensor, t: Tensor) -> Tensor:
    """(N,): sqrt(s · t), and never 0."""
    tiny = _tiny(s)
    return (s.clamp_min(tiny) * t.clamp_min(tiny)).sqrt()


def _not_zero(size: Tensor) -> Tensor:
    """(N,): the size of a map, and 1 for a map of zeros, which stays one when it is divided."""
    return torch.where(size > _tiny(size), size, 1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny ** 0.5  # the product of two of them is not 0 yet


def _over(maps: Tensor, sizes: Tensor) -> Tensor:
    return maps / sizes.view(-1, 1, 1, 1)
