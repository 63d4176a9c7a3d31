"""Elementwise functions that no single torch function computes, and the larger or smaller of two tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.private_torch import is_view
from pipeline.rules.node import node, stabilised_quotient
from pipeline.rules.table import rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

T: Any = torch.Tensor

EXTREMES_OF_TWO: set[Any] = {
    torch.maximum, T.maximum, torch.minimum, T.minimum, torch.fmax, T.fmax, torch.fmin, T.fmin,
    torch.max, T.max, torch.min, T.min,
}  # fmt: skip
_LARGEST = {torch.maximum, T.maximum, torch.fmax, T.fmax, torch.max, T.max}


@rule_for(*EXTREMES_OF_TWO)
def extreme(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pass the gradient: the largest of an axis, or of two activations, gets all relevance.

    The larger of an activation and a constant is a `clamp`, and a ReLU if the constant is 0.
    """
    other = args[0] if args else kwargs.get("other")
    if not isinstance(other, Tensor) or trace.carries(input) == trace.carries(other):
        return func(input, *args, **kwargs)
    activation, bound = (input, other) if trace.carries(input) else (other, input)
    shape = torch.broadcast_shapes(activation.shape, bound.shape)
    if shape != activation.shape:
        activation = trace.written_out(torch.broadcast_to, activation, shape)
    return trace.written_out(torch.clamp, activation, **{"min" if func in _LARGEST else "max": bound})


def elementwise(base: Tensor, value: Tensor, batch_axis: int | None) -> Tensor:
    """Return ``value``, which is an elementwise function of ``base`` with the batch at an axis; rules replace this."""
    return value


@rule_for(elementwise)
def elementwise_identity(
    trace: Tracer, func: Any, base: Tensor, value: Tensor, batch_axis: int | None, stabiliser: bool = True
) -> Tensor:
    """Pass g · f(x) / (x + ε·sign(x)), see `pipeline.rules.activations.activation`."""
    state = trace.state

    def relevance(g: Tensor, x: Tensor, value: Tensor) -> Tensor:
        epsilon = state.epsilon_like(x, batch_axis) if stabiliser else x.new_zeros(())
        return g * stabilised_quotient(value.to(x.dtype), x, epsilon)

    # the node keeps both, and the model may change in place its own output, and the base of a view
    base = base.clone() if is_view(base) else base
    return node(state, lambda x, value: value.clone(), relevance, base, value)


def elementwise_passes(trace: Tracer, func: Any, base: Tensor, value: Tensor, batch_axis: int | None) -> Tensor:
    """Pass g · f(x) / x, see `pipeline.rules.activations.activation_passes`."""
    return elementwise_identity(trace, func, base, value, batch_axis, stabiliser=False)
