"""Muon: orthogonalised momentum for the matrices and kernels of a network, AdamW for its other parameters.

With it, deep students match heatmaps in a fraction of the steps (docs/results/fashion-on-textures.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

MOMENTUM, BETAS, RMS = 0.95, (0.95, 0.999), 0.2  # RMS: of a step at a learning rate of 1, about that of Adam's
ITERATIONS, COEFFICIENTS, TINY = 5, (3.4445, -4.7750, 2.0315), 1e-7


class Muon(AdamW):
    """Move each matrix by the orthogonal matrix that is nearest to its Nesterov momentum.

    Jordan et al., https://kellerjordan.github.io/posts/muon, 2024: a kernel (out, in, h, w) is the matrix (out,
    in·h·w). Steps are scaled as in Liu et al., arXiv 2502.16982, equation 4, so that Adam's learning rates fit.
    `torch.optim.Muon` takes matrices alone, and orthogonalises in bfloat16.

    Args:
        groups: parameter groups; a ``weight_decay`` in one is decoupled from the gradient.
        lr: the learning rate.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float):
        parts = []
        for group in groups:
            for orthogonal in (True, False):
                chosen = [p for p in group["params"] if is_matrix(p) is orthogonal]
                if chosen:
                    parts.append({**group, "params": chosen, "orthogonal": orthogonal})
        super().__init__(parts, lr, betas=BETAS, weight_decay=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step; return the loss that ``closure``, where there is one, computes first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW expects it in every state
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] += 1
                buffer = state["momentum_buffer"]
                buffer.mul_(MOMENTUM).add_(parameter.grad)
                direction = orthogonalised(parameter.grad.add(buffer, alpha=MOMENTUM).flatten(1))
                length = RMS * math.sqrt(max(direction.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * length)
                parameter.grad = None  # so that AdamW does not change it
        super().step()
        return loss


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter, as a matrix (out, rest), has two sides of more than 1."""
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) > 1


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U·Vᵀ of the singular value decomposition U·S·Vᵀ of a matrix.

    Five iterations of Newton and Schulz, with a polynomial that is steep at 0, leave singular values from 0.7 to 1.2.

    Args:
        matrix: floating (m, n).

    Returns:
        The orthogonalised matrix, of the same shape and dtype.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
