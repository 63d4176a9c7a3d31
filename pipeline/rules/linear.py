"""Operations whose rule is PyTorch's own backward pass, and the stop of relevance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from pipeline.rules.batch_axis import axis_of_the_written
from pipeline.rules.table import PassState, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


class StopRelevance(Function):
    @staticmethod
    def forward(ctx: Any, state: PassState, x: Tensor) -> Tensor:
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g if ctx.state.epsilon is None else None


def stop_relevance(x: Tensor) -> Tensor:
    """Return ``x`` as a constant for relevance: no relevance passes through it, while ordinary gradients do.

    Use it for statistics and normalisers in a model of your own, such as the maximum that an image is divided by.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(stop_relevance, (x,), x)
    return x


@rule_for(stop_relevance)
def stop(trace: Tracer, func: Any, x: Tensor) -> Tensor:
    return StopRelevance.apply(trace.state, x)


T: Any = torch.Tensor


# the largest of an axis
LARGEST: set[Any] = {
    torch.amax, T.amax, torch.amin, T.amin, torch.aminmax, T.aminmax, torch.topk, T.topk, torch.sort, T.sort,
    torch.msort, T.msort, torch.kthvalue, T.kthvalue, torch.median, T.median, torch.nanmedian, T.nanmedian,
    torch.mode, T.mode, torch.cummax, T.cummax, torch.cummin, T.cummin,
}  # fmt: skip
# the largest of a window
WINDOWS: set[Any] = {
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
    F.fractional_max_pool2d, F.fractional_max_pool3d,
    F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices,
}  # fmt: skip


@rule_for(
    *LARGEST, *WINDOWS,
    # sums and differences: each term keeps its share; a constant term keeps its own, like a bias
    torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__,
    torch.sub, T.sub, T.sub_, T.__sub__, T.__rsub__, T.__isub__, torch.subtract, T.subtract, torch.rsub,
    torch.neg, T.neg, T.__neg__, torch.negative, T.negative, torch.sum, T.sum, torch.mean, T.mean,
    # averages over windows, and interpolation
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.interpolate,
    # other linear maps
    torch.cumsum, T.cumsum, torch.diff, T.diff, torch.nan_to_num, T.nan_to_num, torch.positive, T.positive, T.__pos__,
    torch.trace, T.trace, torch.nansum, T.nansum, torch.nanmean, T.nanmean,
    # moving values
    torch.stack, F.pad, T.masked_fill, torch.masked_fill, T.masked_fill_,
    torch.column_stack, torch.row_stack, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, torch.diag, T.diag,
    torch.diagonal, T.diagonal, torch.diag_embed, T.diag_embed, torch.fliplr, T.fliplr, torch.flipud, T.flipud,
    torch.hsplit, T.hsplit, torch.vsplit, T.vsplit, torch.dsplit, T.dsplit, torch.adjoint, T.adjoint,
    torch.take_along_dim, T.take_along_dim, torch.take, T.take, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d,
    torch.where, T.where, torch.tril, T.tril, torch.triu, T.triu, torch.hstack, torch.vstack, torch.dstack,
    torch.flatten, T.flatten, torch.unflatten, T.unflatten, torch.reshape, T.reshape, T.view, T.view_as,
    torch.ravel, T.ravel, T.reshape_as,
    torch.permute, T.permute, torch.transpose, T.transpose, torch.swapaxes, T.swapaxes, torch.t, T.t,
    torch.movedim, T.movedim, torch.moveaxis, T.moveaxis, T.T.__get__, T.mT.__get__,
    torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze, T.expand, T.expand_as, T.repeat, torch.tile, T.tile,
    torch.repeat_interleave, T.repeat_interleave, torch.broadcast_to, T.broadcast_to,
    torch.chunk, T.chunk, torch.split, T.split, torch.unbind, T.unbind, T.__getitem__, torch.select, T.select,
    torch.tensor_split, T.tensor_split, torch.index_select, T.index_select, torch.gather, T.gather,
    torch.narrow, T.narrow, torch.flip, T.flip, torch.roll, T.roll, torch.rot90, T.rot90,
    F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle, torch.native_channel_shuffle, F.unfold, F.fold, T.unfold,
    # copies and types
    T.contiguous, torch.clone, T.clone, T.to, T.type, T.float, T.double, T.half, T.bfloat16, T.type_as,
    T.cpu, T.cuda, T.requires_grad_,
    # dropout is a fixed mask within one pass
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.dropout_, torch.feature_dropout,
    torch.feature_dropout_, F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.alpha_dropout_,
    torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
)  # fmt: skip
def gradient(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass relevance through linear maps, and to the winner of a max-pooling, as the gradient passes."""
    return func(*args, **kwargs)


SCATTERS: set[Any] = {
    torch.scatter, T.scatter, T.scatter_, torch.scatter_add, T.scatter_add, T.scatter_add_,
    torch.index_add, T.index_add, T.index_add_, torch.index_copy, T.index_copy, T.index_copy_,
    torch.index_fill, T.index_fill, T.index_fill_,
}  # fmt: skip


@rule_for(*SCATTERS)
def scatter(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pass the gradient: values are written or added at indices."""
    if "reduce" in kwargs:
        raise trace.unknown(func, f"with reduce='{kwargs['reduce']}'")
    return func(input, *args, **kwargs)


@rule_for(torch.lerp, T.lerp)
def interpolation(trace: Tracer, func: Any, input: Tensor, end: Tensor, weight: Any) -> Tensor:
    require_constant(trace, func, weight)
    return func(input, end, weight)


@rule_for(F.grid_sample)
def grid_sample(trace: Tracer, func: Any, input: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pass the gradient, as the sampling is linear in the input; a grid that depends on the image has no rule."""
    require_constant(trace, func, grid)
    return func(input, grid, *args, **kwargs)


class _Concatenate(Function):
    """A concatenation whose second derivative splits; PyTorch's own pads each part with zeros again."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.sizes = [0 if part.shape == (0,) else part.shape[dim] for part in parts]  # (0,) fits any other shape
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Split.apply(g, ctx.sizes, ctx.dim)


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return torch.split(g, sizes, dim)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[Tensor | None, ...]:
        return _Concatenate.apply(ctx.dim, *parts), None, None


@rule_for(torch.cat, torch.concat, torch.concatenate)
def concatenation(trace: Tracer, func: Any, tensors: Any, dim: int = 0, axis: int | None = None) -> Tensor:
    return _Concatenate.apply(dim if axis is None else axis, *tensors)


@rule_for(T.__setitem__)
def assignment(trace: Tracer, func: Any, input: Tensor, index: Any, value: Any) -> None:
    """Replace some values of a tensor; the others keep their relevance."""
    axis = trace.batch_axis(input) if trace.carries(input) else None
    if isinstance(value, Tensor) and trace.carries(value):
        written = axis_of_the_written(trace.samples, input, index, value, trace.batch_axis(value))
        if not trace.carries(input):
            axis = written
        elif written is not None and written != axis:
            axis = None
    func(input, index, value)
    trace.mark(input, axis, outer=True)


# functions that select values by indices, such as those of the largest
SELECTIONS: set[Any] = {
    torch.gather, T.gather, torch.index_select, T.index_select, torch.take_along_dim, T.take_along_dim,
    *SCATTERS, T.__getitem__, T.__setitem__, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d,
}  # fmt: skip

# functions that use the values of the first argument, and the shape or type of the second
LIKE_THE_SECOND: set[Any] = {T.view_as, T.reshape_as, T.expand_as, T.type_as, T.to}
