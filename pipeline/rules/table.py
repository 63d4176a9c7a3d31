"""The type of a rule, the table of rules, and the tools that all rules share. Not here: any rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipeline.errors import RelevanceError

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


@dataclass(eq=False)
class PassState:
    """The state that the nodes of one traced forward pass share during a backward pass.

    The state belongs to the pass and not to a thread, so that several threads can propagate relevance, and autograd's
    own threads on CUDA see it. It must never hold a tensor of the graph, which would be a reference cycle.

    Attributes:
        epsilon: the stabiliser (N,) of the relevance pass in progress; None for the true gradient.
        uniform: its value if all are equal, else None.
        recomputing: whether a checkpointed block is run again, so that norms do not update their running statistics.
    """

    epsilon: Tensor | None = None
    uniform: float | None = None
    recomputing: bool = False
    _shaped: dict[Any, Tensor] = field(default_factory=dict)  # ε as activations have needed it in this pass

    def end(self) -> None:
        """End a relevance pass."""
        self.epsilon = None
        self._shaped.clear()

    def momentum(self, momentum: float) -> float:
        """Return with which weight a norm in this pass takes the batch into its running statistics."""
        return 0.0 if self.recomputing else momentum

    def epsilon_like(self, activation: Tensor, batch_axis: int | None) -> Tensor:
        """Return the ε of each sample, shaped to broadcast over an activation with its batch at ``batch_axis``.

        Raises:
            RelevanceError: ε differs between samples, and the activation has no batch axis.
        """
        shape = () if self.uniform is not None or batch_axis is None else (activation.shape, batch_axis)
        key = activation.dtype, activation.device, shape
        if key not in self._shaped:
            self._shaped[key] = self._epsilon_like(activation, batch_axis)
        return self._shaped[key]

    def _epsilon_like(self, activation: Tensor, batch_axis: int | None) -> Tensor:
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
        parts = activation.shape[batch_axis] // samples  # in each sample, such as the windows of an image
        return self.epsilon.to(activation.dtype).repeat_interleave(parts).view(shape)


Rule = Callable[..., Any]  # (trace, func, *args, **kwargs of the call that it replaces) → the result of func
RULES: dict[Callable[..., Any], Rule] = {}


def rule_for(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Enter the decorated rule in the table, for these torch functions."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


class _Refuse(Function):
    """A value whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("the gradient of a loss on heatmaps cannot be differentiated once more")


def last_derivative(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate a `Function.backward` that must not be differentiated, so that every attempt raises an error.

    (`once_differentiable` misses `autograd.grad` with explicit inputs.)
    """

    def wrapper(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, v)
        with torch.no_grad():
            gradients = backward(ctx, v)
        inputs = [tensor for tensor in (v, *ctx.saved_tensors) if tensor is not None and tensor.requires_grad]
        if inputs:
            return tuple(None if gradient is None else _Refuse.apply(gradient, *inputs) for gradient in gradients)
        return gradients

    return wrapper


def require_constant(trace: Tracer, func: Any, *weights: Any) -> None:
    """Check that the weights, which a rule treats as constants, do not depend on the image.

    Raises:
        RelevanceError: they do.
    """
    if any(trace.carries(tensor) for tensor in tensors(weights)):
        raise trace.unknown(func, "with weights that depend on the image")


_CONTAINERS = (tuple, list, dict)


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, _CONTAINERS):
        return []
    flat: list[Tensor] = []
    for item in value:
        if isinstance(item, Tensor):
            flat.append(item)
        elif isinstance(item, _CONTAINERS) and item:
            flat += tensors(item)
    return flat
