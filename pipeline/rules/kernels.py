"""Convolutions and linear layers as maps that are linear in their input and in their weight: output and gradients.

On a CPU, some of PyTorch's kernels take several times as long as another way to compute the same, for which see
docs/results/second-order.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.private_torch import aten_convolution, convolution_backward, is_view, unsafe_view

Sizes = tuple[int, ...]

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
    def is_slow_in_half(self, x: Tensor) -> bool: ...  # on the device of x, beside float32
    def in_order(self, x: Tensor) -> Tensor: ...  # in the order in memory that all of these read


@dataclass(frozen=True)
class Convolution:
    """A (transposed) convolution; ``options`` are those of ``aten::convolution``."""

    options: tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        form = self._form(x, weight)
        if form == "covers":
            made = F.linear(_rows(x), _rows(weight), bias)
            return unsafe_view(made, [*made.shape, 1, 1])  # no view for autograd, so it may be changed in place
        if form == "pointwise":
            made = _as_map(F.linear(_pixels(x), weight.flatten(1), bias), x)
            return unsafe_view(made, made.shape)
        if form == "scales":
            made = x * weight.flatten().view(1, -1, 1, 1)
            return made if bias is None else made.add_(bias.view(1, -1, 1, 1))
        return aten_convolution(*self._by_channel(x, x, weight), bias, *self.options)

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        stride, padding, dilation = self.options[:3]
        form = self._form(x, weight)
        if form == "covers":
            return (g.flatten(1) @ _rows(weight)).unflatten(1, (*x.shape[2:], -1)).permute(0, 3, 1, 2)
        if form == "pointwise":
            return _as_map(_pixels(g) @ weight.flatten(1), x)
        if form == "scales":
            return g * weight.flatten().view(1, -1, 1, 1)
        if x.shape[1] <= 4 and max(stride) > 1 and max(dilation) == 1 and self._plain(x):
            return _input_grad_by_phases(g, weight, x.shape[2:], stride, padding)
        if max(stride) == 1 and x.shape[2:].numel() > 4 and self._is_depthwise(x, weight):
            # the convolution with flipped kernels takes 0.7 to 0.95 of the time of the kernel for this gradient
            pads = [d * (taps - 1) - p for d, taps, p in zip(dilation, weight.shape[2:], padding, strict=True)]
            if min(pads) >= 0:
                flipped = weight.flip(2, 3)
                return aten_convolution(g, flipped, None, stride, pads, dilation, False, [0, 0], self.options[5])
        g, x, weight = self._by_channel(x, g, x, weight)
        return convolution_backward(g, x, weight, None, *self.options, [True, False, False])[0]

    def weight_grad(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        stride, padding, *rest = self.options
        if max(stride) > 1 == weight.shape[2:].numel() and not any(padding) and self._plain(x):
            # the positions that it reads; for fewer than 16 channels, oneDNN writes past the end of its memory
            x = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)
            return Convolution(([1, 1], padding, *rest)).weight_grad(x, g, weight)
        form, is_small = self._form(x, weight), x.shape[2:].numel() * g.shape[2:].numel() <= SMALL_MAP
        if is_small and weight.shape[2:].numel() == max(stride) == 1 and not any(padding) and self._plain(x):
            form = "pointwise"  # with channels first too, as a copy of so few pixels takes little time
        if form == "pointwise" and x.shape[0] * x.shape[2:].numel() <= MOST_PIXELS:
            return (_pixels(g).T @ _pixels(x)).view(weight.shape)
        if form == "scales" and x.shape[2:].numel() <= LARGE_MAP:
            return (x * g).sum((0, 2, 3)).view(weight.shape)
        depthwise = self._is_depthwise(x, weight)
        if is_small and (depthwise or self._plain(x)):
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

    def _form(self, x: Tensor, weight: Tensor) -> str | None:
        """Tell what this is beside a convolution, on a CPU.

        - "covers": the kernel is as large as the map, so that this is a linear layer.
        - "pointwise": one matrix for all pixels. As a product of matrices, its passes take a tenth to all of the time
          of PyTorch's kernels, a half for most maps below 16×16.
        - "scales": one number for each channel. For maps of one pixel, PyTorch's kernels take many times as long.
        """
        stride, padding, dilation, _, _, groups = self.options
        if any(padding) or not self._on_cpu(x):
            return None
        (height, width), taps = x.shape[2:], (weight.shape[2], weight.shape[3])
        if groups == 1:
            if taps == (height, width) and max(dilation) == 1:
                return "covers"
            pointwise = taps == (1, 1) and max(stride) == 1 and x.is_contiguous(memory_format=torch.channels_last)
            return "pointwise" if pointwise else None
        scales = taps == (1, 1) and self._is_depthwise(x, weight) and (max(stride) == 1 or height == width == 1)
        return "scales" if scales else None

    def _plain(self, x: Tensor) -> bool:
        """Return whether the functions below may be faster than PyTorch's kernels: on a CPU, for plain convolutions."""
        return self._on_cpu(x) and self.options[5] == 1

    def _is_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether this is a convolution of each channel alone, on a CPU."""
        return self._on_cpu(x) and x.shape[1] == weight.shape[0] == self.options[5]

    def _on_cpu(self, x: Tensor) -> bool:
        """Return whether this is a convolution of images on a CPU, and not a transposed one."""
        return x.dim() == 4 and x.is_cpu and not self.options[3]

    def _by_channel(self, image: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of a plain convolution over few positions with channels first on a CPU, whose kernels
        for that layout take half the time of those for channels last."""
        if 1 < image.shape[2:].numel() <= 4 and self._plain(image):
            return tuple(tensor.contiguous() for tensor in given)
        return given

    def bias_grad(self, g: Tensor) -> Tensor:
        return sum_per_channel(g)

    def is_slow_in_half(self, x: Tensor) -> bool:
        return self.options[5] > 1 and x.is_cpu

    def in_order(self, x: Tensor) -> Tensor:
        """Copy a map that has some of the channels of another, which each pass on a CPU would else copy anew."""
        return x.contiguous(memory_format=torch.channels_last) if self._on_cpu(x) and x.stride(1) == 1 else x


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
    outputs = g.flatten(2).permute(2, 1, 0).contiguous()  # (positions, O, N)
    inputs = x.flatten(2).permute(2, 0, 1)  # (positions, N, C)
    pairs = outputs[:, None] @ inputs
    return pairs.view(*g.shape[2:], *x.shape[2:], *pairs.shape[2:])


def _pairs_by_channel(x: Tensor, g: Tensor) -> Tensor:
    """Return the products of each channel with itself: (rows, columns, height, width, C, 1)."""
    outputs, inputs = (values.flatten(2).transpose(1, 2) for values in (g, x))  # (N, positions, C)
    pairs = (outputs[:, :, None] * inputs[:, None]).sum(0)
    return pairs.view(*g.shape[2:], *x.shape[2:], x.shape[1], 1)


def _weight_grad_by_positions(pairs: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return the weight's gradient (O, C, kh, kw) of a convolution over small maps from all pairs of an output and an
    input position, each of which belongs to one tap or none. The kernel takes three to twelve times as long, mostly for
    padding."""
    taps = _taps_of_pairs(tuple(pairs.shape[:4]), tuple(weight.shape[2:]), *map(tuple, (stride, padding, dilation)))
    made = taps.to(pairs) @ pairs.flatten(0, 3).flatten(1)
    return made.view(*weight.shape[2:], *pairs.shape[4:]).permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


@lru_cache(256)
def _taps_of_pairs(sizes: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Return 1 where a tap connects a pair of an output and an input position, else 0: (taps, pairs).

    Args:
        sizes: rows and columns of the output, and of the input.
        kernel, stride, padding, dilation: of the convolution, down and along.
    """
    made = torch.zeros(*kernel, *sizes)
    for output in product(range(sizes[0]), range(sizes[1])):
        for tap in product(range(kernel[0]), range(kernel[1])):
            at = [o * s + t * d - p for o, s, t, d, p in zip(output, stride, tap, dilation, padding, strict=True)]
            if 0 <= at[0] < sizes[2] and 0 <= at[1] < sizes[3]:
                made[(*tap, *output, *at)] = 1
    return made.flatten(0, 1).flatten(1)


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

    def is_slow_in_half(self, x: Tensor) -> bool:
        return False

    def in_order(self, x: Tensor) -> Tensor:
        return x


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
