"""The node that most rules use. Not here: the nodes that are written for speed (convolution, ReLU, norms)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import is_view, saved_tensors_go_elsewhere
from pipeline.rules.table import PassState


class _Node(Function):
    @staticmethod
    def forward(ctx: Any, state: PassState, relevance: Callable[..., Tensor], output: Tensor, *inputs: Any) -> Tensor:
        ctx.state, ctx.relevance = state, relevance
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rest = [None] * (len(ctx.constants) - 1)
        if ctx.state.epsilon is None:
            return None, None, g, None, *rest
        inputs = [
            constant if saved is None else saved
            for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
        ]
        return None, None, None, ctx.relevance(g, *inputs), *rest


def node(
    state: PassState, function: Callable[..., Tensor], relevance: Callable[..., Tensor], first: Tensor, *others: Any
) -> Tensor:
    """Return ``function(first, *others)``, with two behaviours in the backward pass.

    In a relevance pass ``relevance(g, first, *others)`` is the modified gradient of ``first``, and the others get none.
    In other backward passes the gradient is PyTorch's. ``relevance`` must consist of differentiable torch operations,
    which give the second order, and must hold no tensor of the graph.
    """
    return _Node.apply(state, relevance, function(first, *others), first, *others)


class _Written(Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(target)
        return target.copy_(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, g


def written(target: Tensor, output: Tensor) -> Tensor:
    """Write an output over a tensor of its shape, and return that; its gradient is that of the output.

    It is ``target.copy_(output)`` without the gradient of what ``target`` was before: zeros, with channels first, which
    autograd adds, so that the sum loses its memory layout. Of a view, whose base has gradients too, it is just that.
    """
    return target.copy_(output) if is_view(target) else _Written.apply(target, output)


class _NodeWithGradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: PassState,
        function: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor], Tensor],
        relevance: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        target: Tensor | None,
    ) -> Tensor:
        ctx.state, ctx.gradient, ctx.relevance = state, gradient, relevance
        ctx.save_for_backward(x)
        if target is None:
            return function(x)
        ctx.mark_dirty(target)
        return function(target)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = ctx.gradient(x, g) if ctx.state.epsilon is None else ctx.relevance(g, x)
        return None, None, None, None, dx, None


def node_with_gradient(
    state: PassState,
    function: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor], Tensor],
    relevance: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    inplace: bool = False,
) -> Tensor:
    """Return ``function(x)`` as `node` does, where its gradient ``gradient(x, g)`` is known too.

    A function may change ``x`` in place. Both behaviours then get the values from before it. The result is that of
    `written` with a `node`, in fewer passes over memory.
    """
    given = (x.clone(), x) if inplace else (x, None)
    return _NodeWithGradient.apply(state, function, gradient, relevance, *given)


class Kept:
    """The output of a node, for its relevance pass to read again. It is no saved tensor of the node, as the model may
    change it in place. Then, or where saved tensors go elsewhere, as in a checkpointed block, nothing is kept."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int] | None = None

    def keep(self, output: Tensor) -> None:
        if not saved_tensors_go_elsewhere():
            self._kept = output.detach(), output._version

    def drop(self) -> None:
        """Let go of it, when autograd lets go of the saved tensors."""
        self._kept = None

    @property
    def output(self) -> Tensor | None:
        return self._kept[0] if self._kept is not None and self._kept[0]._version == self._kept[1] else None


def input_gradient(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """Return the gradient ``g · ∂function/∂x`` at x, differentiable if autograd needs that."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # the gradient stops at a view of x, which is connected to x for the second order
        local = x.view_as(x) if create_graph else x.detach().requires_grad_()
        output = function(local)
    return torch.autograd.grad(output, local, g, create_graph=create_graph)[0]


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, state: PassState, x: Tensor, fraction: float) -> Tensor:
        ctx.state, ctx.fraction = state, fraction
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g if ctx.state.epsilon is None else g * ctx.fraction, None


def share(state: PassState, x: Tensor, fraction: float) -> Tensor:
    """Return ``x``; a fraction of the relevance and the whole ordinary gradient pass through it."""
    return _Share.apply(state, x, fraction)


def stabilised(x: Tensor, epsilon: Tensor, signed_zero: bool = False) -> Tensor:
    """Return ``x + ε·sign(x)`` with sign(0) = +1, for both signs of 0; or, with ``signed_zero``, -1 for -0, in one pass
    over memory less, where the quotient is 0 anyway."""
    epsilon = epsilon.clamp_min(torch.finfo(x.dtype).tiny)
    if signed_zero:
        return torch.copysign(epsilon, x).add_(x)
    sign = x + 0  # -0 + 0 = 0
    if x.requires_grad and torch.is_grad_enabled():
        return x + torch.copysign(epsilon, sign)
    return torch.copysign(epsilon, sign, out=sign).add_(x)


def stabilised_quotient(numerator: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
    """Return ``numerator / (x + ε·sign(x))`` with sign(0) = +1, for numbers that are small together.

    If the denominator is below the rounding error of 1, the quotient is a constant for the second order: the slope of a
    quotient of two such small numbers is unbounded rounding noise.
    """
    denominator = stabilised(x, epsilon)
    flat = denominator.abs() < torch.finfo(x.dtype).eps
    numerator, denominator = (torch.where(flat, value.detach(), value) for value in (numerator, denominator))
    return numerator / denominator
