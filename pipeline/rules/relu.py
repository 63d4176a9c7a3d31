"""ReLU: LRP-Flex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.rules.table import PassState, last_derivative, rule_for

if TYPE_CHECKING:
    from pipeline.relevance import Trace


class _ReLURelevance(Function):
    """g · a / (a + ε) (Bassi et al., arXiv 2407.09788, LRP-Flex).

    In place where it can be: a fresh tensor of this size costs more than the arithmetic on it.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, epsilon: Tensor) -> Tensor:
        epsilon = epsilon.clamp_min(torch.finfo(a.dtype).tiny)
        scaled = a + epsilon
        torch.div(g, scaled, out=scaled)
        ctx.save_for_backward(scaled, a, epsilon)
        return scaled * a

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        scaled, a, epsilon = ctx.saved_tensors  # scaled is g / (a + ε)
        share = a + epsilon
        torch.div(v, share, out=share)
        dg = share * a
        # d/da a/(a+ε) = ε/(a+ε)²; where a = 0 it does not matter, as the ReLU's own gradient is 0 there
        return dg, share.mul_(scaled).mul_(epsilon), None


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, state: PassState, x: Tensor, inplace: bool, batch_axis: int | None) -> Tensor:
        a = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.state, ctx.batch_axis = state, batch_axis
        ctx.save_for_backward(a)
        return a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        if ctx.state.epsilon is None or ctx.state.uniform == 0:  # ε = 0 is the step function
            dx = torch.ops.aten.threshold_backward(g, a, 0)
        else:
            dx = _ReLURelevance.apply(g, a, ctx.state.epsilon_like(a, ctx.batch_axis))
        return None, dx, None, None


@rule_for(F.relu, torch.relu, torch.Tensor.relu)
def relu(trace: Trace, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _ReLU.apply(trace.state, input, inplace, trace.batch_axis(input))


@rule_for(F.relu_, torch.relu_, torch.Tensor.relu_)
def relu_(trace: Trace, func: Any, input: Tensor) -> Tensor:
    return relu(trace, func, input, inplace=True)
