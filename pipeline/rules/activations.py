"""Elementwise activations: the identity rule."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.private_torch import gelu_backward, hardswish_backward, hardtanh_backward, is_view, silu_backward
from pipeline.rules.elementwise import elementwise
from pipeline.rules.node import (
    Kept,
    input_gradient,
    node,
    node_with_gradient,
    stabilised,
    stabilised_quotient,
    written,
)
from pipeline.rules.relu import BoundedReLURelevance
from pipeline.rules.table import last_derivative, require_constant, rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

T: Any = torch.Tensor

ACTIVATIONS: set[Any] = {
    F.relu6, F.hardtanh, F.hardtanh_, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.mish, F.softplus,
    F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, torch.selu, torch.selu_, torch.celu, torch.celu_,
    F.sigmoid, torch.sigmoid, torch.sigmoid_, T.sigmoid, T.sigmoid_, torch.special.expit,
    F.tanh, torch.tanh, torch.tanh_, T.tanh, T.tanh_,
    torch.clamp, torch.clamp_, T.clamp, T.clamp_, torch.clip, torch.clip_, T.clip, T.clip_,
    torch.clamp_min, torch.clamp_min_, T.clamp_min, T.clamp_min_,
    torch.clamp_max, torch.clamp_max_, T.clamp_max, T.clamp_max_,
    F.prelu, torch.prelu, T.prelu, F.threshold, torch.threshold, torch.threshold_,
    F.hardshrink, torch.hardshrink, T.hardshrink, F.softshrink, F.tanhshrink, F.softsign,
    torch.abs, T.abs, T.__abs__, torch.abs_, T.abs_, torch.absolute, T.absolute, T.absolute_,
}  # fmt: skip


OF_TWO_BOUNDS: set[Any] = {
    F.hardtanh, F.hardtanh_, torch.clamp, torch.clamp_, T.clamp, T.clamp_, torch.clip, torch.clip_, T.clip, T.clip_,
}  # fmt: skip
BOUNDS: set[Any] = {
    *OF_TWO_BOUNDS, F.relu6, torch.clamp_min, torch.clamp_min_, T.clamp_min, T.clamp_min_, torch.clamp_max,
    torch.clamp_max_, T.clamp_max, T.clamp_max_,
}  # fmt: skip


def _hardtanh_backward(g: Tensor, x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return hardtanh_backward(g, x, min_val, max_val)


# g · f'(x); torch.clamp has no operator for it
GRADIENTS: dict[Any, Any] = {
    F.relu6: partial(_hardtanh_backward, min_val=0.0, max_val=6.0),
    F.hardtanh: _hardtanh_backward,
    F.hardtanh_: _hardtanh_backward,
    F.silu: silu_backward,
    F.hardswish: hardswish_backward,
    F.gelu: gelu_backward,
}


_KEEP_ZERO = {F.silu, F.hardswish, F.gelu}


@rule_for(*ACTIVATIONS)
def activation(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pass g · f(x) / (x + ε·sign(x)): x gets all relevance of f(x) (Achtibat et al., AttnLRP, ICML 2024, eq. 9).

    On a ReLU this is LRP-Flex. If f(0) is not 0, as for a sigmoid, ε bounds the share of a small x. A bound of what is
    bounded already, as in ``F.relu(x).clamp(max=6)``, makes one activation of both, which has ε once.
    """
    continues = func in BOUNDS and trace.is_bounded(input) and _keeps_zero(func, args, kwargs)
    return identity_rule(trace, func, input, args, kwargs, stabiliser=not continues)


def _keeps_zero(func: Any, args: Any, kwargs: Any) -> bool:
    bounds = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(bound.numel() != 1 or bound.is_cuda for bound in bounds):
        return False
    return not func(torch.zeros(1), *args, **kwargs).item()


def _bound_of_relu(func: Any, args: Any, kwargs: Any) -> float | None:
    """Return the bound of a function that is min(max(x, 0), bound), such as ReLU6; None for others."""
    if func is F.relu6:
        return 6.0
    named = {name.removesuffix("_val"): value for name, value in kwargs.items()}
    bounds = {**dict(zip(("min", "max"), args, strict=False)), **named} if func in OF_TWO_BOUNDS else {}
    least, most = bounds.get("min"), bounds.get("max")
    if isinstance(least, int | float) and isinstance(most, int | float) and least == 0 < most:
        return float(most)
    return None


def _gradient(function: Any, operator: Any, x: Tensor, g: Tensor) -> Tensor:
    """Return `input_gradient`, by PyTorch's operator for it if one is given, which cannot be differentiated itself."""
    if operator is None or torch.is_grad_enabled():
        return input_gradient(function, x, g)
    return operator(g, x)


def activation_passes(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pass g · f(x) / x: the identity rule of rule sets in which the layers hold the stabilisers."""
    return identity_rule(trace, func, input, args, kwargs, stabiliser=False)


class _IdentityRelevance(Function):
    """g · f(x) / d with d = x + ε·sign(x), as in `stabilised_quotient`, with less memory traffic."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, y: Tensor | None, epsilon: Tensor, function: Any, operator: Any
    ) -> Tensor:
        d = stabilised(x, epsilon)
        scaled = g / d
        flat = torch.finfo(x.dtype).eps
        if epsilon.is_cuda or bool((epsilon < flat).any()):
            scaled.masked_fill_(d.abs() < flat, 0)
        share = torch.div(function(x) if y is None else y, d, out=d)
        ctx.function, ctx.operator = function, operator
        ctx.save_for_backward(scaled, x, share)
        return g * share

    @staticmethod
    @last_derivative
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        scaled, x, share = ctx.saved_tensors
        # d/dx f(x)/d = (f'(x) − f(x)/d) / d
        scaled = scaled * v
        dx = _gradient(ctx.function, ctx.operator, x, scaled).addcmul_(scaled, share, value=-1)
        return v * share, dx, *[None] * 4


def identity_rule(trace: Tracer, func: Any, input: Tensor, args: Any, kwargs: Any, stabiliser: bool) -> Tensor:
    require_constant(trace, func, args, kwargs)
    writes = func.__name__.endswith("_")
    inplace = writes or kwargs.get("inplace", False) or any(arg is True for arg in args)  # they have no other boolean
    args = [arg for arg in args if not isinstance(arg, bool)]
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    state, axis, positional, names = trace.state, trace.batch_axis(input), len(args), tuple(kwargs)
    bound = _bound_of_relu(func, args, kwargs)
    operator = (lambda g, x: GRADIENTS[func](g, x, *args, **kwargs)) if func in GRADIENTS else None

    kept = Kept()

    def function(x: Tensor, *options: Any) -> Tensor:
        named = dict(zip(names, options[positional:], strict=True))
        return func(x.clone() if writes else x, *options[:positional], **named)

    def relevance(g: Tensor, x: Tensor, *options: Any) -> Tensor:
        epsilon = state.epsilon_like(x, axis) if stabiliser else x.new_zeros(())
        if bound is not None:
            return BoundedReLURelevance.apply(g, x, epsilon, bound)
        y = kept.output
        if not torch.is_grad_enabled():
            d = stabilised(x, epsilon, signed_zero=stabiliser and func in _KEEP_ZERO)
            return torch.div(function(x, *options) if y is None else y, d, out=d).mul_(g)
        if any(isinstance(option, Tensor) for option in options):
            return g * stabilised_quotient(function(x, *options), x, epsilon)
        return _IdentityRelevance.apply(g, x, y, epsilon, lambda x: function(x, *options), operator)

    options = [*args, *kwargs.values()]
    if operator is not None and not (inplace and is_view(input)):

        def gradient(x: Tensor, g: Tensor) -> Tensor:
            kept.drop()
            return _gradient(lambda x: function(x, *options), operator, x, g)

        flag = {} if writes or not inplace else {"inplace": True}
        output = node_with_gradient(
            state,
            lambda x: func(x, *args, **kwargs, **flag),
            gradient,
            lambda g, x: relevance(g, x, *options),
            input,
            inplace,
        )
        if bound is None:
            kept.keep(output)
        return output
    output = node(state, function, relevance, input.clone() if inplace else input, *options)
    return written(input, output) if inplace else output


@rule_for(F.rrelu, torch.rrelu, torch.rrelu_)
def rrelu(
    trace: Tracer,
    func: Any,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Apply the rule of a leaky ReLU; in training, with the slopes that this pass draws."""
    x = input.clone() if inplace or func is torch.rrelu_ else input
    slope = torch.empty_like(x, requires_grad=False).uniform_(lower, upper) if training else (lower + upper) / 2
    rule = trace.rules.rule(elementwise)
    assert rule is not None
    output = rule(trace, elementwise, x, torch.where(x >= 0, x, x * slope), trace.batch_axis(input))
    return output if x is input else written(input, output)


def hardsigmoid_by_gradient(trace: Tracer, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    """Pass the gradient; PyTorch's own backward pass cannot be differentiated again."""
    output = F.hardtanh(input + 3, 0.0, 6.0) / 6
    return written(input, output) if inplace else output


@rule_for(F.glu)
def glu(trace: Tracer, func: Any, input: Tensor, dim: int = -1) -> Tensor:
    """Write it out: the product of one half with the sigmoid of the other."""
    return trace.written_out(_gated, input, dim)


def _gated(input: Tensor, dim: int) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)
