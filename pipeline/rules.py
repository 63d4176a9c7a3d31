"""What every operation does to relevance: one table from torch functions to rules, beside the formulas.

A rule is called in place of the function during the forward pass and puts into the autograd graph a node
with two behaviours: its backward is the relevance rule while ``state.epsilon`` is set, and the true
gradient otherwise. The rules' own backwards serve the gradient of a loss on heatmaps; a further derivative
raises. Not here: how a pass is run and how relevance is followed (`relevance.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

if TYPE_CHECKING:
    from pipeline.relevance import Trace


class RelevanceError(ValueError):
    """The model's operations do not allow a correct heatmap; the text names the operation and the module."""


@dataclass(eq=False)
class PassState:
    """What the nodes of one traced forward pass know of the backward pass that runs through them.

    ``epsilon`` is the (N,) stabiliser of the relevance pass in progress, or None: true gradient; ``uniform`` is its
    value where all are equal, else None. The nodes of one pass share one object, so passes in other threads, and
    autograd's own threads on CUDA, see what belongs to them. It must never hold a tensor of the graph (that
    would be a reference cycle).
    """

    epsilon: Tensor | None = None
    uniform: float | None = None

    def epsilon_like(self, activation: Tensor, batch_axis: int | None) -> Tensor:
        """The pass's ε, one per sample, shaped to broadcast over an activation with its batch at ``batch_axis``."""
        assert self.epsilon is not None
        if self.uniform is not None:
            return activation.new_full((), self.uniform)
        if batch_axis is None or activation.shape[batch_axis] != len(self.epsilon):
            raise RelevanceError(
                f"in an activation of shape {tuple(activation.shape)} the batch of {len(self.epsilon)} images is "
                "no longer an axis of its own, so epsilon cannot differ between images: give one for all"
            )
        shape = [1] * activation.dim()
        shape[batch_axis] = -1
        return self.epsilon.to(activation.dtype).view(shape)


Rule = Callable[..., Any]  # (trace, func, *args, **kwargs of the call it stands in for) → what func would return
RULES: dict[Callable[..., Any], Rule] = {}


def rule_for(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator that enters a rule in the table for the given torch functions."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


class _Refuse(Function):
    """A value whose gradient nobody may ask for."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("the gradient of a loss on heatmaps cannot be differentiated once more")


def last_derivative(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorator for a `Function.backward` that is not to be differentiated: who tries is refused, on every path.

    (`once_differentiable` lets `autograd.grad` with explicit inputs pass by.)
    """

    def wrapper(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, v)
        inputs = [tensor for tensor in (v, *ctx.saved_tensors) if tensor is not None and tensor.requires_grad]
        if torch.is_grad_enabled() and inputs:
            return tuple(None if gradient is None else _Refuse.apply(gradient, *inputs) for gradient in gradients)
        return gradients

    return wrapper


# --- ReLU: LRP-Flex ---------------------------------------------------------------------------------


class _ReLURelevance(Function):
    """g · a / (a + ε) (Bassi et al., arXiv 2407.09788, LRP-Flex).

    In-place where it can be: a fresh tensor of this size costs more than the arithmetic on it.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, epsilon: Tensor) -> Tensor:
        epsilon = epsilon.clamp_min(torch.finfo(a.dtype).tiny)
        reciprocal = (a + epsilon).reciprocal_()
        ctx.save_for_backward(g, a, epsilon, reciprocal)
        return (a * reciprocal).mul_(g)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, a, epsilon, reciprocal = ctx.saved_tensors
        # d/da a/(a+ε) = ε/(a+ε)²; where a = 0 it does not matter, as the ReLU's own gradient is 0 there
        da = (epsilon * reciprocal).mul_(reciprocal).mul_(v).mul_(g)
        return (a * reciprocal).mul_(v), da, None


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


# --- Convolution: linear, so its rule is its gradient; the node is here for speed ----------------------


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


# --- Norms: affine maps in the relevance pass, their statistics connected in the outer gradient ---------


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


# --- Stop: a constant in the relevance pass, connected in the outer gradient ----------------------------


class StopRelevance(Function):
    @staticmethod
    def forward(ctx: Any, state: PassState, x: Tensor) -> Tensor:
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g if ctx.state.epsilon is None else None


def stop_relevance(x: Tensor) -> Tensor:
    """``x`` as a constant for relevance: none passes through it, while ordinary gradients do.

    For statistics and normalisers in a model of your own, such as the maximum that an image is divided by.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(stop_relevance, (x,), x)
    return x


@rule_for(stop_relevance)
def stop(trace: Trace, func: Any, x: Tensor) -> Tensor:
    return StopRelevance.apply(trace.state, x)


# --- Operations whose relevance rule is PyTorch's own backward -------------------------------------------

T: Any = torch.Tensor


@rule_for(
    # sums and differences: each term keeps its share; a constant term keeps its own, like a bias
    torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__,
    torch.sub, T.sub, T.sub_, T.__sub__, T.__rsub__, T.__isub__,
    torch.neg, T.neg, T.__neg__, torch.sum, T.sum, torch.mean, T.mean,
    # averages over windows, and interpolation
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.interpolate,
    # moving values about
    torch.cat, torch.concat, torch.concatenate, torch.stack, F.pad, T.masked_fill, torch.masked_fill,
    torch.flatten, T.flatten, torch.unflatten, T.unflatten, torch.reshape, T.reshape, T.view, T.view_as,
    torch.permute, T.permute, torch.transpose, T.transpose, torch.swapaxes, T.swapaxes, torch.t, T.t,
    torch.movedim, T.movedim, T.T.__get__, T.mT.__get__,
    torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, T.expand, T.expand_as, T.repeat,
    torch.chunk, T.chunk, torch.split, T.split, torch.unbind, T.unbind, T.__getitem__, torch.select, T.select,
    torch.narrow, T.narrow, torch.flip, T.flip, torch.roll, T.roll,
    F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle,
    # copies and types
    T.contiguous, torch.clone, T.clone, T.to, T.type, T.float, T.double, T.half, T.bfloat16, T.type_as,
    T.cpu, T.cuda, T.requires_grad_,
    # the largest of a window takes all
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
    # dropout is a fixed mask within one pass
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout,
)  # fmt: skip
def gradient(trace: Trace, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear maps, and pooling by the winner: relevance passes as the gradient does."""
    return func(*args, **kwargs)


@rule_for(
    torch.mul, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__, torch.matmul, T.matmul, T.__matmul__,
    T.__rmatmul__, torch.mm, T.mm, torch.bmm, T.bmm, torch.einsum, F.linear,
)  # fmt: skip
def product(trace: Trace, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A product in which one factor alone depends on the image is linear in that factor."""
    if sum(trace.carries(tensor) for tensor in tensors([args, kwargs])) > 1:
        raise trace.unknown(func, "of two factors that both depend on the image")
    return func(*args, **kwargs)


@rule_for(torch.div, T.div, T.div_, torch.true_divide, T.true_divide, T.__truediv__, T.__itruediv__)
def quotient(trace: Trace, func: Any, input: Tensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    """A quotient is linear in its numerator, where the denominator does not depend on the image."""
    if any(trace.carries(tensor) for tensor in tensors([other])):
        raise trace.unknown(func, "by a denominator that depends on the image")
    if rounding_mode is not None:
        raise trace.unknown(func, f"with rounding_mode='{rounding_mode}'")
    return func(input, other)


# of these only the first argument's values are used, of the second its shape or type
LIKE_THE_SECOND: set[Any] = {T.view_as, T.expand_as, T.type_as, T.to}


# --- Where the batch axis is, for an ε that differs between images ----------------------------------------

_PERMUTATIONS: set[Any] = {torch.permute, T.permute}
_TRANSPOSITIONS: set[Any] = {torch.transpose, T.transpose, torch.swapaxes, T.swapaxes}
_REVERSALS: set[Any] = {torch.t, T.t, T.T.__get__}
_RESHAPES: set[Any] = {torch.flatten, T.flatten, torch.unflatten, T.unflatten, torch.reshape, T.reshape, T.view}
_RESHAPES |= {T.view_as, torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, torch.sum, T.sum, torch.mean, T.mean}
_SELECTIONS: set[Any] = {T.__getitem__, torch.select, T.select, torch.narrow, T.narrow, torch.unbind, T.unbind}
_SELECTIONS |= {torch.flip, T.flip, torch.roll, T.roll, torch.movedim, T.movedim, T.mT.__get__, torch.einsum}
_MOVING = _PERMUTATIONS | _TRANSPOSITIONS | _REVERSALS | _RESHAPES | _SELECTIONS


def batch_axis_after(axis: int | None, func: Any, args: Any, kwargs: Any, output: Tensor) -> int | None:
    """Where ``func`` leaves the batch axis that its input has at ``axis``; None where that cannot be told."""
    if axis is None or func not in _MOVING:
        return axis
    if not args or not isinstance(args[0], Tensor):
        return None
    input, rest = args[0], [*args[1:], *kwargs.values()]
    if func in _PERMUTATIONS:
        order = rest[0] if isinstance(rest[0], tuple | list) else rest
        return [dim % input.dim() for dim in order].index(axis)
    if func in _TRANSPOSITIONS:
        first, second = (dim % input.dim() for dim in rest)
        return {first: second, second: first}.get(axis, axis)
    if func in _REVERSALS:
        return input.dim() - 1 - axis
    if axis != 0:
        return None
    if func in _RESHAPES:  # rows stay together where their number stays
        return 0 if output.dim() and output.shape[0] == input.shape[0] else None
    if func is T.__getitem__:
        index = rest[0][0] if isinstance(rest[0], tuple) and rest[0] else rest[0]
        return 0 if index is Ellipsis or (isinstance(index, slice) and index == slice(None)) else None
    return None


def require_constant(trace: Trace, func: Any, *weights: Any) -> None:
    """Raise RelevanceError where what a rule takes for a constant depends on the image."""
    if any(trace.carries(tensor) for tensor in tensors(weights)):
        raise trace.unknown(func, "with weights that depend on the image")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
