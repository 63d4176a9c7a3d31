"""What a rule is, the table of rules, and what all rules share. Not here: any rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipeline.errors import RelevanceError

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


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
        samples = len(self.epsilon)
        if batch_axis is None or activation.shape[batch_axis] % samples:
            raise RelevanceError(
                f"in an activation of shape {tuple(activation.shape)} the batch of {samples} images is "
                "no longer an axis of its own, so epsilon cannot differ between images: give one for all"
            )
        shape = [1] * activation.dim()
        shape[batch_axis] = -1
        parts = activation.shape[batch_axis] // samples  # of a sample, such as the windows of an image
        return self.epsilon.to(activation.dtype).repeat_interleave(parts).view(shape)


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


def require_constant(trace: Tracer, func: Any, *weights: Any) -> None:
    """Raise RelevanceError where what a rule takes for a constant depends on the image."""
    if any(trace.carries(tensor) for tensor in tensors(weights)):
        raise trace.unknown(func, "with weights that depend on the image")


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return found
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list | dict):
            found += tensors(item)
    return found
