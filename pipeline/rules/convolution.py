"""Convolution: linear, so its rule is its gradient; the nodes are here for speed."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.rules.table import PassState, last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.relevance import Trace


class _ConvolutionInputGrad(Function):
    """The input gradient of a convolution as a function (g, weight) → gradient.

    It is bilinear, so its own backward is one convolution and one weight-gradient kernel, where PyTorch's
    double backward of convolution takes several times that (pytorch issue 22577).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(g, weight)
        return torch.ops.aten.convolution_backward(g, x, weight, None, *options, [True, False, False])[0]

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        dg = torch.ops.aten.convolution(v, weight, None, *ctx.options) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[2]:
            mask = [False, True, False]
            dw = torch.ops.aten.convolution_backward(g, v, weight, None, *ctx.options, mask)[1]
        return dg, None, dw, None


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: PassState,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        ctx.state, ctx.options = state, options
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight)
        return torch.ops.aten.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.state.epsilon is not None:
            return None, _ConvolutionInputGrad.apply(g, x.detach(), weight, ctx.options), *[None] * 3
        mask = list(ctx.needs_input_grad[1:4])
        grads = torch.ops.aten.convolution_backward(g, x, weight, ctx.bias_sizes, *ctx.options, mask)
        return None, *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), None


def _convolve(
    trace: Trace, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    require_constant(trace, func, weight, bias)
    return _Convolution.apply(trace.state, x, weight, bias, options)


def _n_tuple(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, Integral) else list(value)


@rule_for(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    trace: Trace,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dims = weight.dim() - 2
    stride, dilation = _n_tuple(stride, dims), _n_tuple(dilation, dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # the surplus row or column goes to the end, as in PyTorch
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            input = F.pad(input, [p for total in reversed(totals) for p in (0, total % 2)])
        padding = [total // 2 for total in totals]
    options = (stride, _n_tuple(padding, dims), dilation, False, [0] * dims, groups)
    return _convolve(trace, func, input, weight, bias, options)


@rule_for(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    trace: Trace,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    dims = weight.dim() - 2
    stride, padding, dilation = (_n_tuple(value, dims) for value in (stride, padding, dilation))
    options = (stride, padding, dilation, True, _n_tuple(output_padding, dims), groups)
    return _convolve(trace, func, input, weight, bias, options)
