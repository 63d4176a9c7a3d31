"""Norms of single samples. Their scale is a constant for relevance, and connected in the outer gradient.

The centring is a linear map of the sample, and relevance passes through it (AttnLRP, ICML 2024, prop. 3.4, as a
modified gradient), so that a norm without a shift conserves relevance. Not here: norms over the batch
(`batch_norm.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import native_layer_norm
from pipeline.rules.linear import stop_relevance
from pipeline.rules.node import node
from pipeline.rules.table import last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


class _ThroughNorm(Function):
    """g · w / σ with σ² = E[(x − E[x])²] + eps, centred; or, not ``centred``, with σ² = E[x²] + eps."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        dims: Any,
        eps: float,
        centred: bool,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if statistics is None:
            mean = x.mean(dims, keepdim=True) if centred else x.new_zeros(())
            # `Tensor.var` takes eight times as long on a CPU
            inverse = torch.rsqrt((x - mean if centred else x).square().mean(dims, keepdim=True) + eps)
        else:
            mean, inverse = statistics
        ctx.dims, ctx.centred = dims, centred
        ctx.save_for_backward(g, x, weight, mean, inverse)
        scaled = (g if weight is None else g * weight) * inverse
        return scaled.sub_(scaled.mean(dims, keepdim=True)) if centred else scaled

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, inverse = ctx.saved_tensors
        along = (v - v.mean(ctx.dims, keepdim=True) if ctx.centred else v) * inverse
        products = along * g
        dweight = None
        if weight is not None:
            dweight = products.sum_to_size(weight.shape) if ctx.needs_input_grad[2] else None
            along, products = along.mul_(weight), products.mul_(weight)
        # dσ⁻¹/dx = −(x − E[x]) / (n σ³)
        dx = (mean - x).mul_(products.mean(ctx.dims, keepdim=True) * inverse.square())
        return along, dx, dweight, *[None] * 4


def _through(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dims: Any,
    eps: float,
    centred: bool = True,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pass g back through w · (x − E[x]) / σ: first the scale, then the centring. ``statistics``: E[x] and 1/σ, if they
    are known."""
    single = torch.promote_types(x.dtype, torch.float32)  # squares overflow half precision
    weight = None if weight is None else weight.to(single)
    if statistics is not None and statistics[1].dtype != single:
        statistics = None
    return _ThroughNorm.apply(g.to(single), x.to(single), weight, dims, eps, centred, statistics).to(x.dtype)


@rule_for(F.layer_norm, torch.layer_norm)
def layer_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    require_constant(trace, func, weight, bias)
    shape = list(normalized_shape)
    dims = list(range(-len(shape), 0))

    output, mean, inverse = native_layer_norm(input, shape, weight, bias, eps)
    statistics = mean.detach(), inverse.detach()

    def relevance(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _through(g, x, weight, dims, eps, statistics=statistics)

    return node(trace.state, lambda *_: output, relevance, input, weight, bias)


@rule_for(F.rms_norm, torch.rms_norm)
def rms_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    require_constant(trace, func, weight)
    shape = list(normalized_shape)
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps

    def function(x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, weight, eps)

    def relevance(g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        return _through(g, x, weight, dims, eps, centred=False)

    return node(trace.state, function, relevance, input, weight)


@rule_for(F.group_norm, torch.group_norm)
def group_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    require_constant(trace, func, weight, bias)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    def relevance(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is not None:
            g = g * weight.view(1, -1, *[1] * (x.dim() - 2))
        grouped = (len(x), num_groups, -1)
        return _through(g.reshape(grouped), x.reshape(grouped), None, -1, eps).view(x.shape)

    return node(trace.state, function, relevance, input, weight, bias)


@rule_for(F.instance_norm)
def instance_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Treat it as a group norm of single channels, or, in evaluation with running statistics, as a batch norm."""
    if not use_input_stats:
        return trace.written_out(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        func(input.detach(), running_mean, running_var, momentum=momentum)  # to update them
    return group_norm(trace, F.group_norm, input, input.shape[1], weight, bias, eps)


@rule_for(F.normalize)
def normalize(
    trace: Tracer, func: Any, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    def written_out(x: Tensor) -> Tensor:
        return x / stop_relevance(x).norm(p, dim, keepdim=True).clamp_min(eps)

    return trace.written_out(written_out, input)


@rule_for(F.cosine_similarity)
def cosine_similarity(trace: Tracer, func: Any, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Treat it as the scalar product of normalised vectors."""

    def written_out(x1: Tensor, x2: Tensor) -> Tensor:
        x1, x2 = (x / stop_relevance(x).norm(dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
        return (x1 * x2).sum(dim)

    return trace.written_out(written_out, x1, x2)


@rule_for(F.local_response_norm)
def local_response_norm(
    trace: Tracer, func: Any, input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    def written_out(x: Tensor) -> Tensor:
        squares = F.pad(stop_relevance(x).square().unsqueeze(1).flatten(3), (0, 0, size // 2, (size - 1) // 2))
        means = F.avg_pool2d(squares, (size, 1), stride=1).view(x.shape)
        return x / (means * alpha + k) ** beta

    return trace.written_out(written_out, input)
