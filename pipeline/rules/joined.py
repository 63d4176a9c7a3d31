"""The largest of values among which constants are, such as zeros that a concatenation or a padding has added.

``torch.stack([z, zeros]).amax(0)`` is a ReLU. Not here: the largest of an axis in which all values depend on the image
(`linear.py`), and the larger of two tensors (`elementwise.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.rules.linear import LARGEST, WINDOWS
from pipeline.rules.table import Rule

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

T: Any = torch.Tensor
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_OTHER_JOINS = {torch.hstack, torch.vstack, torch.dstack, torch.column_stack, torch.row_stack}
JOINS = {*_CONCATENATIONS, *_OTHER_JOINS, torch.stack, F.pad}
_ALONG_AN_AXIS = {torch.amax, T.amax, torch.max, T.max, torch.amin, T.amin, torch.min, T.min}
_LARGEST = {torch.amax, T.amax, torch.max, T.max}
EXTREMES = LARGEST | WINDOWS | _ALONG_AN_AXIS
REMEDY = "Take the largest of the other values first, and torch.maximum of it and the constant"


class Joined(NamedTuple):
    """Where constants are in a tensor that carries relevance.

    ``axes`` are those along which constants and other values lie beside each other, None for unknown ones;
    ``positions`` those of the constants on the only axis; ``padded`` if they surround the others.
    """

    axes: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    padded: bool = False


def joined_after(func: Any, args: Any, kwargs: Any, carrying: Iterable[Tensor], output: Tensor) -> Joined | None:
    """Return where an operation that joins tensors has put constants; None if there are none."""
    if func is F.pad:
        pads = list(args[1] if len(args) > 1 else kwargs["pad"])
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        axes = [output.dim() - 1 - i // 2 for i, width in enumerate(pads) if width > 0]
        return Joined(tuple(axes), None, padded=True) if axes and mode == "constant" else None
    parts, known = args[0] if args else kwargs["tensors"], {id(tensor) for tensor in carrying}
    if all(id(part) in known for part in parts):
        return None
    if func in _OTHER_JOINS:
        return Joined()
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    dim %= output.dim()
    positions: list[int] = []
    start = 0
    for part in parts:
        size = 1 if func is torch.stack else 0 if part.shape == (0,) else part.shape[dim]
        if id(part) not in known:
            positions += range(start, start + size)
        start += size
    return Joined((dim,), tuple(positions)) if positions else None


def rule_of_extremes(trace: Tracer, func: Any, rule: Rule, input: Tensor, args: Any, kwargs: Any) -> Rule:
    """Return the rule for the largest values of a tensor in which constants are.

    Raises:
        RelevanceError: the constants compete with the others, and it is not known where they are.
    """
    joined = trace.joined(input)
    of_two = any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()) if value is not input)
    if joined is None or of_two or (joined.padded and func in WINDOWS):
        return rule
    dims = _reduced(func, input, args, kwargs)
    if joined.axes is not None and not set(dims) & set(joined.axes):
        return rule
    if func in _ALONG_AN_AXIS and joined.positions is not None and tuple(dims) == joined.axes:
        return _with_the_constants(joined.positions, dims[0])
    raise trace.unknown(func, "over constants and activations side by side", REMEDY)


def _reduced(func: Any, input: Tensor, args: Any, kwargs: Any) -> list[int]:
    """Return the axes along which the largest is looked for; all, if that is not evident."""
    if func in WINDOWS:
        return list(range(2, input.dim())) or list(range(input.dim()))
    later = func in {torch.topk, T.topk, torch.kthvalue, T.kthvalue}
    dim = args[1 + later] if len(args) > 1 + later else kwargs.get("dim", -1 if later else None)
    if dim is None and func in {torch.sort, T.sort}:
        dim = -1
    values = dim if isinstance(dim, tuple | list) else [dim]
    if not values or not all(isinstance(value, int) for value in values):
        return list(range(input.dim()))
    return [value % input.dim() for value in values]


def _with_the_constants(positions: tuple[int, ...], dim: int) -> Rule:
    def rule(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        others = [i for i in range(input.shape[dim]) if i not in set(positions)]
        part = trace.written_out(torch.index_select, input, dim, _indices(others, input.device))
        largest = trace.written_out(func, part, *args, **kwargs)
        constant = func(input.detach().index_select(dim, _indices(positions, input.device)), *args, **kwargs)
        combine = torch.maximum if func in _LARGEST else torch.minimum
        if isinstance(largest, Tensor):
            return trace.written_out(combine, largest, constant)
        values = trace.written_out(combine, largest[0], constant[0])
        return type(largest)((values, func(input.detach(), *args, **kwargs)[1]))

    return rule


def _indices(positions: Iterable[int], device: torch.device) -> Tensor:
    """Return the positions, made on the device, as a recorded step on CUDA takes no values from the CPU."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return torch.cat([torch.arange(start, end, device=device) for start, end in runs])
