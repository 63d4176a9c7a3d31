"""ReLU, and ReLU with an upper bound: LRP-Flex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import threshold_backward
from pipeline.rules.table import PassState, last_derivative, rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


def _shared_out(g: Tensor, a: Tensor, epsilon: Tensor) -> Tensor:
    """Return g / (a + ε) in one new tensor: another tensor of this size costs more than the arithmetic."""
    wide = torch.float32 if a.dtype == torch.float16 else a.dtype  # 1 / ε overflows float16
    out = a.to(wide) + epsilon.to(wide).clamp_min(torch.finfo(wide).tiny ** 0.8)  # g times its reciprocal is finite
    return torch.div(g, out, out=out)


class _ReLURelevance(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, epsilon: Tensor) -> Tensor:
        scaled = _shared_out(g, a, epsilon)
        ctx.save_for_backward(scaled, a, epsilon)
        return (scaled * a).to(a.dtype)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        scaled, a, epsilon = ctx.saved_tensors
        share = _shared_out(v, a, epsilon)
        dg = (share * a).to(a.dtype)
        # d/da a/(a+ε) = ε/(a+ε)²; where a = 0 it does not matter, as the ReLU's own gradient is 0 there
        return dg, share.mul_(epsilon).mul_(scaled).to(a.dtype), None  # another order could be infinity times 0


def _where_above(value: Tensor, x: Tensor, bound: float) -> Tensor:
    """Return a value where x is above the bound, and 0 elsewhere, in the memory layout of x."""
    return threshold_backward(value.expand_as(x), x, bound, grad_input=torch.empty_like(x))


class BoundedReLURelevance(Function):
    """g · f(x) / (max(x, 0) + ε) of f(x) = min(max(x, 0), bound)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, epsilon: Tensor, bound: float) -> Tensor:
        a = x.clamp_min(0)
        scaled = _shared_out(g, a, epsilon)
        ctx.bound = bound
        ctx.save_for_backward(scaled, x, epsilon)
        return a.clamp_max_(bound).mul_(scaled)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        scaled, x, epsilon = ctx.saved_tensors
        a = x.clamp_min(0)
        share = _shared_out(v, a, epsilon)
        dg = a.clamp_max_(ctx.bound).mul_(share)
        # d/dx f(x)/(x+ε) = ε/(x+ε)², −bound/(x+ε)² above the bound, and 0 below 0
        slope = _where_above(epsilon, x, 0).sub_(_where_above(epsilon + ctx.bound, x, ctx.bound))
        return dg, share.mul_(slope).mul_(scaled).to(a.dtype), None, None  # another order could be infinity times 0


class _ReLU(Function):
    """In a relevance pass g · a / (a + ε) (Bassi et al., arXiv 2407.09788, LRP-Flex)."""

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
            return None, threshold_backward(g, a, 0), None, None
        epsilon = ctx.state.epsilon_like(a, ctx.batch_axis)
        if torch.is_grad_enabled():
            return None, _ReLURelevance.apply(g, a, epsilon), None, None
        return None, _shared_out(g, a, epsilon).mul_(a).to(a.dtype), None, None


RELU: set[Any] = {F.relu, torch.relu, torch.Tensor.relu, F.relu_, torch.relu_, torch.Tensor.relu_}


@rule_for(F.relu, torch.relu, torch.Tensor.relu)
def relu(trace: Tracer, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _ReLU.apply(trace.state, input, inplace, trace.batch_axis(input))


@rule_for(F.relu_, torch.relu_, torch.Tensor.relu_)
def relu_(trace: Tracer, func: Any, input: Tensor) -> Tensor:
    return relu(trace, func, input, inplace=True)
