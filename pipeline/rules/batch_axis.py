"""The batch axis of activations, for an ε that differs between images.

An activation has its batch at axis k if the size of that axis is a multiple N·r of the N images, and index i belongs to
image i // r: the windows of an image, or its heads, may be folded into the batch. An unknown axis is None, and then an
ε for each image is refused, as a wrong axis would silently give a wrong ε.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from numbers import Integral
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.rules.table import tensors

T: Any = torch.Tensor
Axes = dict[int, int | None]  # by the id of a tensor that carries relevance


def batch_axis_after(axes: Axes, samples: int, func: Any, args: Any, kwargs: Any, output: Tensor) -> int | None:
    """Return the batch axis of an output of ``func``; None if it is unknown.

    Args:
        axes: the batch axis of each argument that carries relevance.
        samples: the number of images.
        func: the torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: the output.
    """
    if None in axes.values() or not output.dim() or not samples:
        return None
    follow = _FOLLOW.get(func, _same_shape)
    try:
        axis = follow(_Call(axes, samples, args, kwargs, output))
    except (IndexError, KeyError, TypeError, ValueError):  # an unknown form of the call
        return None
    return axis if axis is not None and output.shape[axis] % samples == 0 else None


class _Call:
    def __init__(self, axes: Axes, samples: int, args: Any, kwargs: Any, output: Tensor):
        self.axes, self.samples, self.args, self.kwargs, self.output = axes, samples, args, kwargs, output

    @property
    def carrying(self) -> list[Tensor]:
        return [tensor for tensor in (*tensors(self.args), *tensors(self.kwargs)) if id(tensor) in self.axes]

    def get(self, position: int, *names: str) -> Any:
        """Return an argument by its position or one of its names; None for a missing one."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    @property
    def input(self) -> Tensor:
        value = self.args[0] if self.args else self.get(0, "input", "self", "x")
        if not isinstance(value, Tensor):
            raise TypeError("not a tensor")
        return value

    @property
    def axis(self) -> int:
        """The batch axis of the first argument, which alone carries relevance, or like the others."""
        return self.axes[id(self.input)]  # type: ignore[return-value]

    def dims(self, position: int, *names: str) -> list[int]:
        """Return an argument that is one axis, a sequence of axes, or several arguments, counted from the left."""
        value = self.get(position, *names)
        values = value if isinstance(value, tuple | list) else [value, *self.args[position + 1 :]]
        return [dim % self.input.dim() for dim in values]

    def dim(self, position: int, default: int | None = None) -> int:
        value = self.get(position, "dim", "axis")
        return (default if value is None else value) % self.input.dim()  # type: ignore[operator]


def axis_of_the_written(samples: int, input: Tensor, index: Any, value: Tensor, batch_axis: int | None) -> int | None:
    """Return the batch axis of a tensor into which a value with a batch axis was written at an index; None if it is
    unknown."""
    if batch_axis is None:
        return None
    plain = input.detach()
    part, axes = plain[index], []
    for axis in range(input.dim()):
        within = batch_axis_after({id(plain): axis}, samples, T.__getitem__, (plain, index), {}, part)
        if within is not None and within - part.dim() == batch_axis - value.dim():
            axes.append(axis)
    return _agreed(axes)


def _agreed(values: list[int]) -> int | None:
    return values[0] if values and len(set(values)) == 1 else None


def _same_shape(call: _Call) -> int | None:
    """Follow an unknown operation: it keeps the axis if it keeps the shape."""
    carrying, input = call.carrying, call.input
    alone = len(carrying) == 1 and carrying[0] is input
    return call.axis if alone and call.output.shape == input.shape else None


def _broadcast(call: _Call) -> int | None:
    """Follow broadcasting, which aligns shapes at their right ends."""
    from_right = _agreed([call.axes[id(tensor)] - tensor.dim() for tensor in call.carrying])  # type: ignore[operator]
    return None if from_right is None else from_right + call.output.dim()


def _rows(call: _Call) -> int | None:
    """Follow a layer for (N, C, ...)."""
    return 0 if call.axis == 0 and call.output.shape[0] == call.input.shape[0] else None


def _convolution(call: _Call) -> int | None:
    return _rows(call) if call.input.dim() == call.get(1, "weight").dim() else None


def _kept_but_last(call: _Call) -> int | None:
    """Follow a linear layer."""
    return call.axis if len(call.carrying) == 1 and call.axis < call.input.dim() - 1 else None


def _scatter(call: _Call) -> int | None:
    """Follow the writing at indices of one axis into a tensor of the same number of axes."""
    axis = _agreed([call.axes[id(tensor)] for tensor in call.carrying])  # type: ignore[misc]
    return None if axis == call.dim(1) or any(t.dim() != call.output.dim() for t in call.carrying) else axis


def _diagonal(call: _Call) -> int | None:
    pair = [call.get(2 + i, f"dim{1 + i}") for i in (0, 1)]
    dims = [(i if dim is None else dim) % call.input.dim() for i, dim in enumerate(pair)]
    return None if call.axis in dims else call.axis - sum(dim < call.axis for dim in dims)


def _bilinear(call: _Call) -> int | None:
    axis = _agreed([call.axes[id(tensor)] for tensor in call.carrying])  # type: ignore[misc]
    return axis if axis is not None and axis < call.input.dim() - 1 else None


def _reshape(call: _Call) -> int | None:
    """Follow a reshape, which keeps the order of values: find the axis with as many values in front of it."""
    before = call.input.shape[: call.axis].numel()
    if not call.output.numel() or call.output.numel() != call.input.numel():
        return None
    products = accumulate((1, *call.output.shape), mul)
    for axis, (size, product) in enumerate(zip(call.output.shape, products, strict=False)):
        if product == before and size % call.samples == 0:
            return axis
    return None


def _permute(call: _Call) -> int | None:
    return call.dims(1, "dims").index(call.axis)


def _transpose(call: _Call) -> int | None:
    first, second = (value % call.input.dim() for value in (*call.args[1:], *call.kwargs.values()))
    return {first: second, second: first}.get(call.axis, call.axis)


def _reverse(call: _Call) -> int | None:
    return call.input.dim() - 1 - call.axis


def _matrix_transpose(call: _Call) -> int | None:
    last = call.input.dim() - 1
    return {last: last - 1, last - 1: last}.get(call.axis, call.axis)


def _movedim(call: _Call) -> int | None:
    source, destination = (
        [dim % call.input.dim() for dim in (value if isinstance(value, tuple | list) else [value])]
        for value in (call.get(1, "source"), call.get(2, "destination"))
    )
    order = [dim for dim in range(call.input.dim()) if dim not in source]
    for to, dim in sorted(zip(destination, source, strict=True)):
        order.insert(to, dim)
    return order.index(call.axis)


def _reduce(position: int) -> Callable[[_Call], int | None]:
    def follow(call: _Call) -> int | None:
        if len(call.carrying) > 1 or isinstance(call.get(1, "other"), Tensor):
            return _broadcast(call)  # the larger of two
        value = call.get(position, "dim", "axis")
        dims = [dim % call.input.dim() for dim in (value if isinstance(value, tuple | list) else [value])]
        if call.axis in dims or not dims:
            return None
        return call.axis if call.output.dim() == call.input.dim() else call.axis - sum(dim < call.axis for dim in dims)

    return follow


def _drop(call: _Call) -> int | None:
    """Follow the selection of one index of another axis."""
    dim = call.dim(1, 0)
    return None if dim == call.axis else call.axis - (dim < call.axis)


def _other_axis(position: int, default: int | None = None) -> Callable[[_Call], int | None]:
    """Follow an operation along one axis, which must not be the batch axis."""

    def follow(call: _Call) -> int | None:
        return call.axis if call.dim(position, default) != call.axis and len(call.carrying) == 1 else None

    return follow


def _other_axes(position: int) -> Callable[[_Call], int | None]:
    def follow(call: _Call) -> int | None:
        return None if call.axis in call.dims(position, "dims") else call.axis

    return follow


_INDEX = (Integral, slice, type(None), type(Ellipsis), Tensor)


def _as_tensor(item: Any) -> Any:
    """Return a list of numbers, in a tuple of indices, as the tensor that it stands for."""
    numbers = isinstance(item, list) and item and all(type(value) is int for value in item)
    return torch.tensor(item) if numbers else item


def _getitem(call: _Call) -> int | None:
    index = tuple(map(_as_tensor, call.args[1])) if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(item, bool) or not isinstance(item, _INDEX) for item in index):
        return None  # a mask, or a sequence, which indexes like a tensor
    advanced = [item for item in index if isinstance(item, Tensor)]
    if advanced and (len(advanced) > 1 or advanced[0].dtype == torch.bool or any(isinstance(i, int) for i in index)):
        return None
    used = sum(item is not None and item is not Ellipsis for item in index)
    rest: list[Any] = [slice(None)] * (call.input.dim() - used)
    at = next((i for i, item in enumerate(index) if item is Ellipsis), len(index))
    dim = position = 0
    for item in (*index[:at], *rest, *index[at + 1 :]):
        if item is None:
            position += 1
            continue
        if dim == call.axis:
            size = call.input.shape[dim]
            return position if isinstance(item, slice) and item.indices(size) == (0, size, 1) else None
        dim += 1
        position += item.dim() if isinstance(item, Tensor) else isinstance(item, slice)
    return None


def _cat(call: _Call) -> int | None:
    axis = _agreed([call.axes[id(tensor)] for tensor in call.carrying])  # type: ignore[misc]
    dim = call.get(1, "dim", "axis") or 0
    return None if axis == dim % call.output.dim() else axis


def _stack(call: _Call) -> int | None:
    axis = _agreed([call.axes[id(tensor)] for tensor in call.carrying])  # type: ignore[misc]
    dim = (call.get(1, "dim", "axis") or 0) % call.output.dim()
    return None if axis is None else axis + (dim <= axis)


def _repeat(call: _Call) -> int | None:
    sizes = call.get(1, "repeats", "dims", "sizes")
    sizes = sizes if isinstance(sizes, tuple | list) else call.args[1:]
    from_right = call.axis - call.input.dim()
    return from_right + call.output.dim() if -from_right > len(sizes) or sizes[from_right] == 1 else None


def _repeat_interleave(call: _Call) -> int | None:
    if call.get(2, "dim") is None or (call.dim(2) == call.axis and not isinstance(call.get(1, "repeats"), int)):
        return None
    return call.axis  # parts of the same image stay next to each other


def _pad(call: _Call) -> int | None:
    widths = call.get(1, "pad")
    from_right = call.input.dim() - 1 - call.axis
    return None if any(widths[2 * from_right : 2 * from_right + 2]) else call.axis


def _matmul(call: _Call) -> int | None:
    return _product(call, call.input, call.get(1, "other", "mat2"))


def _reversed_matmul(call: _Call) -> int | None:
    return _product(call, call.args[1], call.input)


def _product(call: _Call, left: Tensor, right: Tensor) -> int | None:
    """Follow (..., n, k) @ (..., k, m), which sums over k and keeps the other axes, counted from the right."""
    if left.dim() < 2 or right.dim() < 2:
        return None
    from_ends = []
    for tensor, summed in ((left, -1), (right, -2)):
        if id(tensor) in call.axes:
            from_ends.append(call.axes[id(tensor)] - tensor.dim())  # type: ignore[operator]
            if from_ends[-1] == summed:
                return None
    from_right = _agreed(from_ends)
    return None if from_right is None else from_right + call.output.dim()


def _sum_with_product(call: _Call) -> int | None:
    addend, left, right = call.input, call.get(1, "mat1", "batch1"), call.get(2, "mat2", "batch2")
    axis = _product(call, left, right) if {id(left), id(right)} & set(call.axes) else None
    if id(addend) not in call.axes:
        return axis
    added = call.axes[id(addend)] - addend.dim() + call.output.dim()  # type: ignore[operator]
    return added if axis in (None, added) and not ({id(left), id(right)} & set(call.axes) and axis is None) else None


def _einsum(call: _Call) -> int | None:
    """Follow the letter of the batch axis in the equation."""
    equation = call.args[0].replace(" ", "")
    operands = call.args[1] if isinstance(call.args[1], tuple | list) else call.args[1:]
    inputs, arrow, result = equation.partition("->")
    terms = [_spelled_out(term, operand.dim()) for term, operand in zip(inputs.split(","), operands, strict=True)]
    if arrow:
        result = _spelled_out(result, call.output.dim())
    else:  # the axes of the ellipsis, then the letters that occur once
        letters = "".join(terms)
        dots = sorted({letter for letter in letters if not letter.isalpha()})
        result = "".join(dots + sorted(letter for letter in set(letters) - set(dots) if letters.count(letter) == 1))
    names = set()
    for term, operand in zip(terms, operands, strict=True):
        if id(operand) in call.axes:
            letter = term[call.axes[id(operand)]]  # type: ignore[index]
            names.add(letter if term.count(letter) == 1 else "")
    letter = names.pop()
    return result.index(letter) if letter and not names else None


def _spelled_out(term: str, dims: int) -> str:
    """Replace the ellipsis of a term by one sign for each of its axes, which are aligned at their right ends."""
    if "..." not in term:
        return term
    count = dims - len(term) + 3
    return term.replace("...", "".join(chr(ord("9") - i) for i in reversed(range(count))))


def _tensordot(call: _Call) -> int | None:
    """Follow the axes that are not summed: those of the first tensor, then those of the second."""
    left, right, dims = call.input, call.get(1, "other", "b"), call.get(2, "dims")
    if len(call.carrying) != 1:
        return None
    if isinstance(dims, int | None):
        count = 2 if dims is None else dims
        summed = [list(range(left.dim() - count, left.dim())), list(range(count))]
    else:
        summed = [[int(d) for d in (part if isinstance(part, Sequence) else part.tolist())] for part in dims]
    kept = [
        [axis for axis in range(tensor.dim()) if axis not in {dim % tensor.dim() for dim in dims}]
        for tensor, dims in zip((left, right), summed, strict=True)
    ]
    if call.carrying[0] is left:
        return kept[0].index(call.axes[id(left)])  # type: ignore[arg-type]
    return len(kept[0]) + kept[1].index(call.axes[id(right)])  # type: ignore[arg-type]


def _along(position: int, default: int = -1) -> Callable[[_Call], int | None]:
    """Follow an operation along one axis, which may vanish, and which must not be the batch axis."""

    def follow(call: _Call) -> int | None:
        dim = call.dim(position, default)
        if dim == call.axis or len(call.carrying) != 1:
            return None
        return call.axis if call.output.dim() == call.input.dim() else call.axis - (dim < call.axis)

    return follow


_FOLLOW: dict[Any, Callable[[_Call], int | None]] = {}


def _enter(follow: Callable[[_Call], int | None], *functions: Any) -> None:
    _FOLLOW.update(dict.fromkeys(functions, follow))


_enter(
    _broadcast,
    torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__, torch.sub, T.sub, T.sub_, T.__sub__, T.__rsub__,
    T.__isub__, torch.subtract, T.subtract, torch.rsub, torch.mul, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__,
    torch.multiply, T.multiply, torch.div, T.div, T.div_, torch.divide, T.divide, torch.true_divide, T.true_divide,
    T.__truediv__, T.__itruediv__, torch.where, T.where, torch.masked_fill, T.masked_fill, torch.addcmul, T.addcmul,
    torch.maximum, T.maximum, torch.minimum, T.minimum, T.expand, T.expand_as, torch.broadcast_to, T.broadcast_to,
    torch.fmax, T.fmax, torch.fmin, T.fmin, torch.lerp, T.lerp, torch.clamp, T.clamp, torch.clip, T.clip,
)  # fmt: skip
_enter(
    _rows,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices, F.interpolate, F.batch_norm,
    F.group_norm, torch.group_norm, F.instance_norm, F.local_response_norm, F.pixel_shuffle, F.pixel_unshuffle,
    torch.channel_shuffle, F.unfold, F.fold, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d, F.grid_sample, F.lp_pool1d,
    F.lp_pool2d, F.lp_pool3d, F.fractional_max_pool2d, F.fractional_max_pool3d, torch.native_channel_shuffle,
    F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices,
)  # fmt: skip
_enter(_convolution, torch.conv1d, torch.conv2d, torch.conv3d)
_enter(_convolution, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_enter(_kept_but_last, F.linear)
_enter(_bilinear, F.bilinear)
_enter(
    _reshape,
    torch.flatten, T.flatten, torch.unflatten, T.unflatten, torch.reshape, T.reshape, T.view, T.view_as, T.reshape_as,
    torch.ravel, T.ravel, torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze,
)  # fmt: skip
_enter(_permute, torch.permute, T.permute)
_enter(_transpose, torch.transpose, T.transpose, torch.swapaxes, T.swapaxes)
_enter(_reverse, torch.t, T.t, T.T.__get__)
_enter(_matrix_transpose, T.mT.__get__, torch.adjoint, T.adjoint)
_enter(_movedim, torch.movedim, T.movedim, torch.moveaxis, T.moveaxis)
_enter(_reduce(1), torch.sum, T.sum, torch.mean, T.mean, torch.amax, T.amax, torch.amin, T.amin, torch.max, T.max)
_enter(_reduce(1), torch.min, T.min, torch.var, T.var, torch.std, T.std, torch.var_mean, torch.std_mean)
_enter(_reduce(1), torch.nansum, T.nansum, torch.nanmean, T.nanmean)
_enter(_reduce(2), torch.norm, T.norm, torch.linalg.vector_norm)
_enter(_drop, torch.select, T.select, torch.unbind, T.unbind)
_enter(_other_axis(1), torch.narrow, T.narrow, torch.index_select, T.index_select, torch.gather, T.gather, T.unfold)
_enter(_other_axis(2, 0), torch.chunk, T.chunk, torch.split, T.split, torch.tensor_split, T.tensor_split)
_enter(_other_axis(1, -1), F.glu)
_enter(_other_axes(1), torch.flip, T.flip)
_enter(_other_axes(2), torch.roll, T.roll, torch.rot90, T.rot90)
_enter(
    _scatter,
    torch.scatter, T.scatter, T.scatter_, torch.scatter_add, T.scatter_add, T.scatter_add_,
    torch.index_add, T.index_add, T.index_add_, torch.index_copy, T.index_copy, T.index_copy_,
    torch.index_fill, T.index_fill, T.index_fill_,
)  # fmt: skip
_enter(_diagonal, torch.diagonal, T.diagonal)
_enter(_getitem, T.__getitem__)
_enter(_cat, torch.cat, torch.concat, torch.concatenate)
_enter(_stack, torch.stack)
_enter(_repeat, T.repeat, torch.tile, T.tile)
_enter(_repeat_interleave, torch.repeat_interleave, T.repeat_interleave)
_enter(_pad, F.pad)
_enter(_matmul, torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm, torch.bmm, T.bmm)
_enter(_reversed_matmul, T.__rmatmul__)
_enter(_sum_with_product, torch.addmm, T.addmm, torch.baddbmm, T.baddbmm)
_enter(_einsum, torch.einsum)
_enter(_tensordot, torch.tensordot)
_enter(_along(2), torch.topk, T.topk, torch.kthvalue, T.kthvalue)
_enter(_other_axis(2), torch.take_along_dim, T.take_along_dim)
_enter(_along(1), torch.sort, T.sort, torch.median, T.median, torch.nanmedian, T.nanmedian, torch.mode, T.mode)
_enter(_along(1), torch.cumsum, T.cumsum, torch.cummax, T.cummax, torch.cummin, T.cummin)
_enter(_along(2), torch.diff, T.diff)
_enter(_along(9, 0), torch.msort, T.msort, torch.flipud, T.flipud)
_enter(_along(9, 1), torch.fliplr, T.fliplr)
_enter(lambda call: None, torch.hstack, torch.vstack, torch.dstack, torch.addbmm, T.addbmm)
_enter(lambda call: None, torch.take, T.take, torch.inner, T.inner, torch.outer, T.outer, torch.kron, T.kron, torch.ger)
