"""Muon: momentum that is orthogonalised, for the matrices and kernels of a network; AdamW for the rest of it.

Deep students match heatmaps in a fraction of the steps with it (docs/results/fashion-on-textures.md).
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
    """Parameters with two sides of more than 1 move by the nearest orthogonal matrix to their Nesterov momentum.

    Jordan et al., https://kellerjordan.github.io/posts/muon, 2024: a kernel (out, in, h, w) is the matrix (out,
    in·h·w). Steps are scaled as in Liu et al., arXiv 2502.16982, equation 4, so that Adam's learning rates fit.
    `torch.optim.Muon` takes matrices alone, and orthogonalises in bfloat16. ``weight_decay`` is decoupled.
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
                    state["step"] = torch.zeros(())  # which AdamW's states have, and look for
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] += 1
                buffer = state["momentum_buffer"]
                buffer.mul_(MOMENTUM).add_(parameter.grad)
                direction = orthogonalised(parameter.grad.add(buffer, alpha=MOMENTUM).flatten(1))
                length = RMS * math.sqrt(max(direction.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * length)
                parameter.grad = None  # so that AdamW leaves it alone
        super().step()
        return loss


def is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) > 1


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of the singular value decomposition U·S·Vᵀ: every singular value near 1, (m, n) to (m, n).

    By five iterations of Newton and Schulz, of a polynomial that is steep at 0, with singular values from 0.7 to 1.2.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
