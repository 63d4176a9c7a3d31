"""Where the batch axis is, for an ε that differs between images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

T: Any = torch.Tensor


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
