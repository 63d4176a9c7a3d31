"""Norms over the batch: affine maps in the relevance pass, their statistics connected in the outer gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from pipeline.rules.table import PassState, last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.relevance import Trace


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """A (C,) vector shaped to broadcast over ``like`` (N, C, ...)."""
    return value.view(1, -1, *[1] * (like.dim() - 2))


def _sum_per_channel(value: Tensor) -> Tensor:
    return value.sum([0, *range(2, value.dim())])


class _NormRelevance(Function):
    """g · γ / σ for batch statistics σ = sqrt(E[(x − μ)²] + eps), whose backward sees σ as a function of x.

    No relevance goes through the statistics, but with σ detached from the outer gradient a student does
    not learn. ``inverse`` is 1/σ (C,); ``mean`` is μ (C,), or None for a norm that does not centre.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, weight, mean, inverse)
        return g * _channels(weight * inverse, g)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, inverse = ctx.saved_tensors
        gv = _sum_per_channel(g * v)
        samples = x.numel() // x.shape[1]
        # d(1/σ)/dx = −(x − μ)/(n σ³)
        slope = gv * weight * inverse**3 / -samples
        dx = x * _channels(slope, x)
        if mean is not None:
            dx -= _channels(slope * mean, x)
        return v * _channels(weight * inverse, v), dx, gv * inverse, None, None


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: PassState,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        ctx.state, ctx.training, ctx.eps = state, training, eps
        # the running statistics are buffers that a later step overwrites: keep what this pass used
        ctx.running = [None if s is None or training else s.clone() for s in (running_mean, running_var)]
        ctx.save_for_backward(x, weight, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        running_mean, running_var = ctx.running
        if ctx.state.epsilon is not None:
            gamma = x.new_ones(x.shape[1]) if weight is None else weight
            if ctx.training:
                dx = _NormRelevance.apply(g, x, gamma, mean, inverse)
            else:
                dx = g * _channels(gamma * torch.rsqrt(running_var + ctx.eps), g)
            return None, dx, *[None] * 7
        mask = list(ctx.needs_input_grad[1:4])
        grads = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, running_mean, running_var, mean, inverse, ctx.training, ctx.eps, mask
        )
        return None, *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *[None] * 5


@rule_for(F.batch_norm)
def batch_norm(
    trace: Trace,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    require_constant(trace, func, weight, bias)
    if training and input.numel() == input.shape[1]:  # as PyTorch does, before the running variance becomes NaN
        raise ValueError(f"expected more than 1 value per channel when training, got input {tuple(input.shape)}")
    return _BatchNorm.apply(trace.state, input, weight, bias, running_mean, running_var, training, momentum, eps)


def scale_norm(
    x: Tensor,
    weight: Tensor,
    running_second_moment: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Scale-only norm ``x · γ / sqrt(E[x²] + eps)``: a batch norm with neither mean nor shift.

    x is (N, C, ...), weight γ and ``running_second_moment`` (C,). In training E[x²] is that of the batch and
    the running one is updated in place; in evaluation it is the running one, and the norm is linear.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(scale_norm, (x,), x, weight, running_second_moment, training, momentum, eps)
    return _scale_norm(PassState(), x, weight, running_second_moment, training, momentum, eps)


def _scale_norm(
    state: PassState, x: Tensor, weight: Tensor, running: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    if training:
        return _ScaleNorm.apply(state, x, weight, running, momentum, eps)
    return x * _channels(weight * torch.rsqrt(running + eps), x)


def _second_moment(x: Tensor) -> Tensor:
    return _sum_per_channel(x.square()) / (x.numel() // x.shape[1])


class _ScaleNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, state: PassState, x: Tensor, weight: Tensor, running: Tensor, momentum: float, eps: float
    ) -> Tensor:
        second_moment = _second_moment(x)
        running.lerp_(second_moment.to(running.dtype), momentum)
        inverse = torch.rsqrt(second_moment + eps)
        ctx.state, ctx.eps = state, eps
        ctx.save_for_backward(x, weight, inverse)
        return x * _channels(weight * inverse, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.state.epsilon is not None:
            return None, _NormRelevance.apply(g, x, weight, None, inverse), *[None] * 4
        if torch.is_grad_enabled():  # a second derivative is wanted, which sees the statistics too
            inverse = torch.rsqrt(_second_moment(x) + ctx.eps)
        gx = _sum_per_channel(g * x)
        samples = x.numel() // x.shape[1]
        dx = g * _channels(weight * inverse, g)
        dx.addcmul_(x, _channels(weight * inverse**3 * gx / samples, x), value=-1)
        return None, dx, gx * inverse, *[None] * 3


@rule_for(scale_norm)
def scale_norm_rule(trace: Trace, func: Any, *args: Any) -> Tensor:
    require_constant(trace, func, *args[1:])
    return _scale_norm(trace.state, *args)
