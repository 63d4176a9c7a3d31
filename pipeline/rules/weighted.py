"""Convolution and linear layers, alone or with the norm that directly follows them.

They are linear, so their rule is their gradient, and the nodes exist for speed. A norm over the batch is the affine map
``k·z + shift`` in the relevance pass, with k = γ / σ connected in the outer gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import current_backward_pass, has_gradient_hooks
from pipeline.rules.kernels import Convolution, Layer, Linear, channels, sum_per_channel
from pipeline.rules.products import shared
from pipeline.rules.table import last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.rules.batch_norm import Norm
    from pipeline.tracer import Tracer

# The gradient of a weight has two parts: the loss is differentiated through the relevance pass, and then through the
# forward pass. The first part is always complete when the second reaches a layer. The layer keeps it as `Pending`, and
# the weight gets one gradient, by one kernel over both parts if that is faster. Autograd guarantees the order, as the
# relevance node depends on an output of the forward node: ``link``, an empty tensor.


class Pending:
    """Parts of a weight's gradient, for the running backward pass; those of a pass that ended early are dropped."""

    def __init__(self) -> None:
        self.backward_pass = -1
        self.parts: list[Any] = []  # (input, output gradient) pairs, or weight gradients

    def add(self, part: Any) -> None:
        self.parts = [*self.take(), part]
        self.backward_pass = current_backward_pass()

    def take(self) -> list[Any]:
        parts, self.parts = self.parts, []
        return parts if self.backward_pass == current_backward_pass() else []


def _on_weight(layer: Layer, g: Tensor, weight: Tensor) -> bool:
    """Return whether the rows of the weight are the channels of g, and k is cheaper to apply to the weight."""
    rows_are_channels = not layer.options[3] if isinstance(layer, Convolution) else g.dim() == 2
    return weight.numel() < g.numel() and rows_are_channels


def _input_grad(layer: Layer, g: Tensor, weight: Tensor, k: Tensor | None, x: Tensor) -> Tensor:
    if k is not None and _on_weight(layer, g, weight):
        weight = _scaled_rows(weight, k)
    elif k is not None:
        g = g * channels(k, g)
    return layer.input_grad(g, weight, x)


class _WeightedRelevance(Function):
    """The input gradient of a layer as a function (g, weight, k) → gradient; k (C,) scales g, or is None.

    It is linear in each argument, so its own backward pass is one layer and one weight-gradient kernel. PyTorch's
    double backward of a convolution takes several times as long (pytorch issue 22577).
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        weight: Tensor,
        k: Tensor | None,
        link: Tensor,
        x: Tensor,
        layer: Layer,
        pending: Pending | None,
    ) -> Tensor:
        ctx.layer, ctx.pending = layer, pending
        ctx.save_for_backward(g, weight, k, link)
        return _input_grad(layer, g, weight, k, x)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, weight, k, link = ctx.saved_tensors
        layer, pending = ctx.layer, ctx.pending
        dk = None
        if k is not None and _on_weight(layer, g, weight):
            dg = layer.output(v, _scaled_rows(weight, k))
            dscaled = layer.weight_grad(v, g, weight)
            dk = (dscaled * weight).flatten(1).sum(1)
            if pending is not None:
                pending.add(_scaled_rows(dscaled, k))
        else:
            dg = layer.output(v, weight)
            if k is not None:
                dk = sum_per_channel(g * dg)
                dg *= channels(k, g)
            if pending is not None:
                scaled = g if k is None else g * channels(k, g)
                is_small = _is_small(weight, v, scaled)
                pending.add((v, scaled) if is_small else layer.weight_grad(v, scaled, weight))
        return dg, None, dk, torch.zeros_like(link), *[None] * 3


def _is_small(weight: Tensor, x: Tensor, g: Tensor) -> bool:
    """Return whether a part of the weight's gradient takes less memory as a pair, and one kernel may do for two."""
    return x.numel() + g.numel() < weight.numel()


def _scaled_rows(weight: Tensor, k: Tensor) -> Tensor:
    return weight * k.view(-1, *[1] * (weight.dim() - 1))


class _Weighted(Function):
    """norm(layer(x)), or layer(x) without a norm; also ``link``, and k of the norm.

    ``z`` is the layer's output if it has been computed already. ``call.outer`` tells whether the outer gradient is
    needed at x: usually it is not needed at the images.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None = None,
        norm: Norm | None = None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.norm, ctx.pending = call, norm, Pending()
        link = x.new_empty(0)
        k: Tensor | None = None
        saved: list[Tensor | None] = []
        if norm is None or z is None:
            out: Tensor | None = call.layer.output(x, weight, bias)
        else:
            out, k, *saved = norm.output(z, gamma, beta)
        ctx.save_for_backward(x, weight, bias, link, k, z, gamma, *saved)
        return out, link, k

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, dlink: Tensor | None, dk: Tensor | None = None) -> Any:
        x, weight, bias, link, k, z, gamma, *saved = ctx.saved_tensors
        layer: Layer = ctx.call.layer
        if ctx.call.state.epsilon is not None:
            if g is None:
                return (None,) * 8
            if not torch.is_grad_enabled():
                return None, _input_grad(layer, g, weight, k, x), *[None] * 6
            pending = ctx.pending if ctx.needs_input_grad[2] else None
            dx = _WeightedRelevance.apply(g, weight.detach(), k, link, x.detach(), layer, pending)
            return None, dx, *[None] * 6

        wanted = ctx.needs_input_grad
        dgamma = dbeta = None
        if ctx.norm is not None and (g is not None or dk is not None):
            if torch.is_grad_enabled():  # a second derivative passes through z to x too
                z = layer.output(x, weight, bias)
            g, dgamma, dbeta = ctx.norm.backward(g, dk, z, gamma, *saved)
            dbeta = dbeta if wanted[7] else None
        dx = None
        if g is not None and wanted[1] and ctx.call.outer:
            dx = layer.input_grad(g, weight, x)
        dbias = layer.bias_grad(g) if g is not None and wanted[3] else None
        dweight = None
        if wanted[2]:
            parts = [*ctx.pending.take(), *([] if g is None else [(x, g)])]
            dweight = _weight_grad(layer, parts, weight)
            if dweight is not None and dlink is not None and dlink.requires_grad:
                dweight = dweight + dlink.sum()  # adds 0, and raises if it is differentiated again
        return None, dx, dweight, dbias, None, None, dgamma, dbeta


def _weight_grad(layer: Layer, parts: list[Any], weight: Tensor) -> Tensor | None:
    """Add up weight gradients, which are (input, output gradient) pairs or tensors."""
    made = [part for part in parts if isinstance(part, Tensor)]
    pairs = [part for part in parts if not isinstance(part, Tensor)]
    if len(pairs) > 1 and all(_is_small(weight, *pair) for pair in pairs):
        pairs = [tuple(map(torch.cat, zip(*pairs, strict=True)))]
    made += [layer.weight_grad(x, g, weight) for x, g in pairs]
    return sum(made[1:], start=made[0]) if made else None


@dataclass(frozen=True, eq=False)
class _Call:
    """The facts of one call of a layer beside its tensors."""

    state: Any
    layer: Layer
    outer: bool


def weighted(trace: Tracer, func: Any, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call a layer, and remember the call for a norm that may follow."""
    require_constant(trace, func, weight, bias)
    if x.dim() < weight.dim():  # a single sample: the kernels need a batch
        return weighted(trace, func, layer, x.unsqueeze(0), weight, bias).squeeze(0)
    call = _Call(trace.state, layer, trace.outer_gradient_wanted(x))
    x = layer.in_order(x)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32 if layer.is_slow_in_half(x) else torch.get_autocast_dtype(x.device.type)
        given = (x, weight, bias)  # autocast leaves float64 alone
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in given)  # type: ignore
    out, _, _ = _Weighted.apply(call, x, weight, bias)
    trace.latest = out.grad_fn, (call, x, weight, bias)
    return out


def norm_behind(trace: Tracer, norm: Norm, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor | None:
    """Return the norm of a layer's output as one node with the layer; None if ``z`` is no layer's direct output.

    The layer's own node stays for other uses of z. Without any it never runs.
    """
    node, arguments = trace.latest
    if node is None or z.grad_fn is not node:
        return None
    if has_gradient_hooks(z) or z.retains_grad:  # somebody looks at z's gradient, or changes it
        return None
    return _Weighted.apply(*arguments, z.detach(), norm, gamma, beta)[0]


def _n_tuple(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, (int, Integral)) else list(value)  # Integral alone is slow


@rule_for(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    trace: Tracer,
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
    padding = _n_tuple(padding, dims)
    if input.dim() == dims + 2:
        weight, padding = _without_dead_taps(input.shape[2:], weight, stride, padding, dilation)
    layer = Convolution((stride, padding, dilation, False, [0] * dims, groups))
    return weighted(trace, func, layer, input, weight, bias)


def _without_dead_taps(
    sizes: Any, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Return the weight without rows and columns that meet padding alone, as on images smaller than the kernel."""
    if weight.shape[2:].numel() == 1:
        return weight, padding
    if all(size > d * (taps - 1) for size, taps, d in zip(sizes, weight.shape[2:], dilation, strict=True)):
        return weight, padding
    keep = []
    for size, taps, s, p, d in zip(sizes, weight.shape[2:], stride, padding, dilation, strict=True):
        outputs = (size + 2 * p - d * (taps - 1) - 1) // s + 1
        alive = [t for t in range(taps) if any(0 <= o * s - p + t * d < size for o in range(outputs))]
        first, last = (alive[0], alive[-1]) if alive else (0, taps - 1)
        same_outputs = (size + 2 * (p - first * d) - d * (last - first) - 1) // s + 1 == outputs
        keep.append((first, last + 1) if p >= first * d and same_outputs else (0, taps))
    if all(last - first == taps for (first, last), taps in zip(keep, weight.shape[2:], strict=True)):
        return weight, padding
    padding = [p - first * d for (first, _), p, d in zip(keep, padding, dilation, strict=True)]
    return _Cropped.apply(weight, tuple(keep)), padding


class _Cropped(Function):
    """Some taps of a weight. Its gradient has the weight's memory layout, so that an optimizer reads both in one sweep:
    in networks for larger images these are most of the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: tuple[tuple[int, int], ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.keep = (slice(None), slice(None), *(slice(first, last) for first, last in keep))
        return weight[ctx.keep].contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            padding = [p for at, size in zip(ctx.keep[:1:-1], weight.shape[:1:-1], strict=True)
                       for p in (at.start, size - at.stop)]  # fmt: skip
            return F.pad(g, padding), None
        whole = torch.zeros_like(weight)
        whole[ctx.keep] = g
        return whole, None


@rule_for(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    trace: Tracer,
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
    layer = Convolution((stride, padding, dilation, True, _n_tuple(output_padding, dims), groups))
    return weighted(trace, func, layer, input, weight, bias)


@rule_for(F.linear)
def linear(trace: Tracer, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if trace.carries(weight):
        return func(*shared(trace, input, weight), bias)
    return weighted(trace, func, Linear(), input, weight, bias)
