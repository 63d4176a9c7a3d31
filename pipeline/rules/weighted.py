"""Convolution and linear layers, alone or with the norm that directly follows them.

They are linear, so their rule is their gradient, and the nodes exist for speed. A norm over the batch is the affine map
``k·z + shift`` in the relevance pass, with k = γ / σ connected in the outer gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import (
    aten_convolution,
    convolution_backward,
    current_backward_pass,
    has_gradient_hooks,
    is_view,
    unsafe_view,
)
from pipeline.rules.products import shared
from pipeline.rules.table import last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.rules.batch_norm import Norm
    from pipeline.tracer import Tracer

SMALL_MAP = 16  # pairs of an input and an output position
MOST_PIXELS = 4096  # of pointwise convolutions for whose weight gradient a product of matrices is faster
LARGEST_TAPS = 9  # of depthwise kernels for whose weight gradient PyTorch's kernel is fast
LARGE_MAP, MUCH_WORK = 64, 5e5  # pixels, and multiplications of a sample, for the weight gradient of larger ones


class Layer(Protocol):
    """A map that is linear in its input and in its weight, as three functions of tensors."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor: ...  # uses the shape of x alone
    def weight_grad(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor: ...  # uses the shape of weight
    def bias_grad(self, g: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Convolution:
    """A (transposed) convolution; ``options`` are those of ``aten::convolution``."""

    options: tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._covers(x, weight):
            made = F.linear(_rows(x), _rows(weight), bias)
            return unsafe_view(made, [*made.shape, 1, 1])  # no view for autograd, so it may be changed in place
        if self._is_pointwise(x, weight):
            made = _as_map(F.linear(_pixels(x), weight.flatten(1), bias), x)
            return unsafe_view(made, made.shape)
        return aten_convolution(*self._by_channel(x, x, weight), bias, *self.options)

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        stride, padding, dilation = self.options[:3]
        if self._covers(x, weight):
            return (g.flatten(1) @ _rows(weight)).unflatten(1, (*x.shape[2:], -1)).permute(0, 3, 1, 2)
        if self._is_pointwise(x, weight):
            return _as_map(_pixels(g) @ weight.flatten(1), x)
        if self._plain(x) and x.shape[1] <= 4 and max(stride) > 1 and max(dilation) == 1:
            return _input_grad_by_phases(g, weight, x.shape[2:], stride, padding)
        g, x, weight = self._by_channel(x, g, x, weight)
        return convolution_backward(g, x, weight, None, *self.options, [True, False, False])[0]

    def weight_grad(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        if self._is_pointwise(x, weight) and x.shape[0] * x.shape[2:].numel() <= MOST_PIXELS:
            return (_pixels(g).T @ _pixels(x)).view(weight.shape)
        depthwise = self._is_depthwise(x, weight)
        if x.shape[2:].numel() * g.shape[2:].numel() <= SMALL_MAP and (depthwise or self._plain(x)):
            pairs = _pairs_by_channel(x, g) if depthwise else _pairs(x, g)
            return _weight_grad_by_positions(pairs, weight, *self.options[:3])
        if depthwise and weight[0].numel() > LARGEST_TAPS and len(x):
            if x.shape[2:].numel() <= LARGE_MAP:
                return _weight_grad_of_samples(x, g, weight, *self.options[:3])
            if weight.numel() * g.shape[2:].numel() >= MUCH_WORK:
                samples = zip(x.split(1), g.split(1), strict=True)
                each = [_weight_grad_of_samples(*sample, weight, *self.options[:3]) for sample in samples]
                return torch.stack(each).sum(0)
        return convolution_backward(g, x, weight, None, *self.options, [False, True, False])[1]

    def _covers(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether the kernel is as large as the map, so that this is a linear layer."""
        _, padding, dilation = self.options[:3]
        return self._plain(x) and not any(padding) and max(dilation) == 1 and x.shape[2:] == weight.shape[2:]

    def _is_pointwise(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether this is one matrix for all pixels. As a product of matrices, its passes take a tenth to all of
        the time of PyTorch's kernels, a half for most maps below 16×16."""
        stride, padding, _ = self.options[:3]
        one_pixel = weight.shape[2:].numel() == max(stride) == 1 and not any(padding)
        return self._plain(x) and one_pixel and x.is_contiguous(memory_format=torch.channels_last)

    def _plain(self, x: Tensor) -> bool:
        """Return whether the functions below may be faster than PyTorch's kernels: on a CPU, for plain convolutions."""
        return self._on_cpu(x) and self.options[5] == 1

    def _is_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether this is a convolution of each channel alone, on a CPU."""
        return self._on_cpu(x) and x.shape[1] == weight.shape[0] == self.options[5]

    def _on_cpu(self, x: Tensor) -> bool:
        """Return whether this is a convolution of images on a CPU, and not a transposed one."""
        return x.dim() == 4 and x.device.type == "cpu" and not self.options[3]

    def _by_channel(self, image: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of a plain convolution over few positions with channels first on a CPU, whose kernels
        for that layout take half the time of those for channels last."""
        if self._plain(image) and 1 < image.shape[2:].numel() <= 4:
            return tuple(tensor.contiguous() for tensor in given)
        return given

    def bias_grad(self, g: Tensor) -> Tensor:
        return sum_per_channel(g)


def _input_grad_by_phases(g: Tensor, weight: Tensor, sizes: Any, stride: Any, padding: Any) -> Tensor:
    """Return the input gradient (N, C, H, W) of a convolution with strides, as one ordinary convolution of g.

    The positions of the input fall into phases, one for each place within a stride, and every phase has taps of its
    own. They become the channels of a convolution without strides, which are then interleaved again. For the few
    channels of an image this takes half the time of the kernel (sub-pixel convolution, Shi et al., CVPR 2016).
    """
    taps = [-(-size // s) for size, s in zip(weight.shape[2:], stride, strict=True)]  # of one phase
    more = [t * s - size for t, s, size in zip(taps, stride, weight.shape[2:], strict=True)]
    by_phase = (
        F.pad(weight, (0, more[1], 0, more[0])).unflatten(3, (taps[1], stride[1])).unflatten(2, (taps[0], stride[0]))
    )
    by_phase = by_phase.permute(1, 3, 5, 0, 2, 4).flip(4, 5).flatten(0, 2)  # (C·phases, channels of g, *taps)
    first = [p // s for p, s in zip(padding, stride, strict=True)]  # stride that touches the input
    count = [(p + size - 1) // s + 1 - f for p, size, s, f in zip(padding, sizes, stride, first, strict=True)]
    before = [t - 1 - f for t, f in zip(taps, first, strict=True)]
    after = [c + t - 1 - b - size for c, t, b, size in zip(count, taps, before, g.shape[2:], strict=True)]
    pads = [max(b, a, 0) for b, a in zip(before, after, strict=True)]
    out = aten_convolution(
        g, by_phase.contiguous(memory_format=torch.channels_last), None, [1, 1], pads, [1, 1], False, [0, 0], 1
    )
    for axis in (0, 1):
        out = out.narrow(2 + axis, pads[axis] - before[axis], count[axis])
    # (N, C·phases, rows, columns) to (N, C, rows·stride, columns·stride)
    out = out.unflatten(1, (-1, stride[0], stride[1])).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    for axis in (0, 1):
        out = out.narrow(2 + axis, padding[axis] - first[axis] * stride[axis], sizes[axis])
    return out.contiguous(memory_format=torch.channels_last)


def _rows(values: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N, H·W·C), without a copy if it is channels last."""
    return values.permute(0, 2, 3, 1).flatten(1)


def _pixels(values: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N·H·W, C), without a copy if it is channels last."""
    return values.permute(0, 2, 3, 1).flatten(0, 2)


def _as_map(pixels: Tensor, like: Tensor) -> Tensor:
    """Return (N·H·W, C) as (N, C, H, W), channels last."""
    return pixels.view(len(like), *like.shape[2:], pixels.shape[1]).permute(0, 3, 1, 2)


def _pairs(x: Tensor, g: Tensor) -> Tensor:
    """Return the products of all channels of an output and an input position, summed over the samples: (rows, columns,
    height, width, O, C)."""
    pairs = _rows(g).T @ _rows(x)
    return pairs.view(*g.shape[2:], g.shape[1], *x.shape[2:], x.shape[1]).permute(0, 1, 3, 4, 2, 5)


def _pairs_by_channel(x: Tensor, g: Tensor) -> Tensor:
    """Return the products of each channel with itself: (rows, columns, height, width, C, 1)."""
    outputs, inputs = (values.flatten(2).transpose(1, 2) for values in (g, x))  # (N, positions, C)
    pairs = (outputs[:, :, None] * inputs[:, None]).sum(0)
    return pairs.view(*g.shape[2:], *x.shape[2:], x.shape[1], 1)


def _weight_grad_by_positions(pairs: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return the weight's gradient (O, C, kh, kw) of a convolution over small maps from all pairs of an output and an
    input position, each of which belongs to one tap or none. The kernel takes three to twelve times as long, mostly for
    padding."""
    rows, columns, height, width = pairs.shape[:4]
    made = weight.new_zeros((weight.shape[0], *weight.shape[2:], weight.shape[1]))
    for a, b, i, j in product(range(rows), range(columns), range(height), range(width)):
        down, along = i + padding[0] - a * stride[0], j + padding[1] - b * stride[1]
        tap = down // dilation[0], along // dilation[1]
        on_taps = down % dilation[0] == 0 and along % dilation[1] == 0
        if on_taps and 0 <= tap[0] < weight.shape[2] and 0 <= tap[1] < weight.shape[3]:
            made[:, tap[0], tap[1]] += pairs[a, b, i, j]
    return made.permute(0, 3, 1, 2)


def _weight_grad_of_samples(x: Tensor, g: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return the weight's gradient (C, 1, kh, kw) of a depthwise convolution as one depthwise convolution of all
    inputs, whose kernels are their output gradients, and in which stride and dilation change places. For 5×5 and 7×7
    taps, the kernel for this gradient takes two to six times as long in float32, and more in bfloat16."""
    (samples, width), rest = x.shape[:2], (dilation, padding, stride, False, [0, 0])
    inputs, kernels = (values.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1) for values in (x, g))  # (N·C, H, W)
    made = aten_convolution(inputs[None], kernels[:, None], None, *rest, samples * width)[0]
    return made[:, : weight.shape[2], : weight.shape[3]].unflatten(0, (samples, width)).sum(0)[:, None]


@dataclass(frozen=True)
class Linear:
    """``x Wᵀ + b`` over the last axis."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made = _by_rows(x, lambda rows: F.linear(rows, weight, bias))
        # of more than two axes it is a view in some releases, which may not be changed in place behind a node of ours
        return unsafe_view(made, made.shape) if is_view(made) else made

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return _by_rows(g, lambda rows: rows @ weight)

    def weight_grad(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        return g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def bias_grad(self, g: Tensor) -> Tensor:
        return g.flatten(0, -2).sum(0)


def _by_rows(x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply the last axis of x by a matrix, in the order in which the rows lie in memory.

    Of rows in another order, such as those of a batch whose first two axes were exchanged for an attention, PyTorch
    makes a product for each position, which reads the matrix as often.
    """
    if x.dim() < 3 or x.is_contiguous():
        return multiply(x)
    order = sorted(range(x.dim() - 1), key=lambda axis: -x.stride()[axis])
    made = multiply(x.permute(*order, -1).contiguous())
    return made.permute(*(order.index(axis) for axis in range(x.dim() - 1)), -1)


def channels(value: Tensor, like: Tensor) -> Tensor:
    """Shape a vector (C,) to broadcast over ``like``, (N, C, ...)."""
    return value.view(1, -1, *[1] * (like.dim() - 2))


def sum_per_channel(value: Tensor) -> Tensor:
    return value.sum([0, *range(2, value.dim())])


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
                pending.add((v, g if k is None else g * channels(k, g)))
        return dg, None, dk, torch.zeros_like(link), *[None] * 3


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
    if len(pairs) > 1 and sum(x.numel() + g.numel() for x, g in pairs) < 2 * weight.numel():
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
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
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
    return [int(value)] * dims if isinstance(value, Integral) else list(value)


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
