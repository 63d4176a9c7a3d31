"""Operations whose relevance rule is PyTorch's own backward, and the stop of relevance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from pipeline.rules.table import PassState, rule_for, tensors

if TYPE_CHECKING:
    from pipeline.relevance import Trace


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
    T.__rmatmul__, torch.mm, T.mm, torch.bmm, T.bmm, torch.einsum,
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
