"""Products, quotients and powers of tensors that depend on the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pipeline.rules.linear import StopRelevance
from pipeline.rules.node import node, share, stabilised_quotient, written
from pipeline.rules.table import PassState, require_constant, rule_for, tensors

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

T: Any = torch.Tensor


def shared(trace: Tracer, *factors: Any) -> list[Any]:
    """Return the factors; those that depend on the image get equal shares of the relevance."""
    carrying = [trace.carries(factor) if isinstance(factor, Tensor) else False for factor in factors]
    if sum(carrying) < 2:
        return list(factors)
    fraction = 1 / sum(carrying)
    return [
        share(trace.state, factor, fraction) if carries else factor
        for factor, carries in zip(factors, carrying, strict=True)
    ]


class _Product(Function):
    """a · b, elementwise, of which each gets half of the relevance. One may be smaller, such as the gates of channels:
    then the half is a factor of the smaller one."""

    @staticmethod
    def forward(ctx: Any, state: PassState, a: Tensor, b: Tensor) -> Tensor:
        ctx.state = state
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if ctx.state.epsilon is None:
            gradients = g * b, g * a
        elif b.numel() < g.numel():
            gradients = g * (b / 2), (g * a).sum_to_size(b.shape) / 2
        elif a.numel() < g.numel():
            gradients = (g * b).sum_to_size(a.shape) / 2, g * (a / 2)
        else:
            half = g / 2
            gradients = half * b, half * a
        return None, *(d.sum_to_size(x.shape).to(x.dtype) for d, x in zip(gradients, (a, b), strict=True))


_ELEMENTWISE: set[Any] = {torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply}


@rule_for(
    *_ELEMENTWISE, torch.matmul, T.matmul, T.__matmul__,
    T.__rmatmul__, torch.mm, T.mm, torch.bmm, T.bmm, torch.mv, T.mv,
    torch.outer, T.outer, torch.ger, T.ger, torch.inner, T.inner, torch.dot, T.dot, torch.kron, T.kron, torch.tensordot,
)  # fmt: skip
def product(trace: Tracer, func: Any, input: Any, other: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Give half of the relevance to each of two activations (AttnLRP, ICML 2024, eq. 7: uniform rule).

    If only one factor depends on the image, the product is linear in it, and it gets all relevance.
    """
    for name in [name for name in kwargs if name in ("mat2", "vec", "vec2", "tensor", "tensor2", "b")]:
        other = kwargs.pop(name)
    if func in _ELEMENTWISE and all(isinstance(factor, Tensor) and trace.carries(factor) for factor in (input, other)):
        return _Product.apply(trace.state, input, other)
    return func(*shared(trace, input, other), *args, **kwargs)


@rule_for(F.bilinear)
def bilinear(trace: Tracer, func: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    require_constant(trace, func, weight, bias)
    return func(*shared(trace, first, second), weight, bias)


@rule_for(T.mul_, T.__imul__)
def product_in_place(trace: Tracer, func: Any, input: Tensor, other: Any) -> Tensor:
    first, second = shared(trace, input, other)
    return func(input, other) if first is input and second is other else written(input, first.clone() * second)


@rule_for(torch.einsum)
def einsum(trace: Tracer, func: Any, *operands: Any) -> Tensor:
    """See `product`; the operands may be behind an equation, in a sequence, or between their axes as lists."""
    if len(operands) == 2 and isinstance(operands[1], tuple | list) and isinstance(operands[0], str):
        operands = (operands[0], *operands[1])
    return func(*shared(trace, *operands))


@rule_for(torch.addmm, T.addmm, torch.baddbmm, T.baddbmm, torch.addbmm, T.addbmm, torch.addcmul, T.addcmul)
def sum_with_product(trace: Tracer, func: Any, input: Tensor, first: Tensor, second: Tensor, **scales: Any) -> Tensor:
    return func(input, *shared(trace, first, second), **scales)


@rule_for(torch.div, T.div, torch.divide, T.divide, torch.true_divide, T.true_divide, T.__truediv__)
def quotient(trace: Tracer, func: Any, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """Give all relevance to the numerator. The denominator is a constant for relevance, but connected in the outer
    gradient (AttnLRP, ICML 2024, prop. 3.4: the identity rule of normalisations)."""
    if rounding_mode is not None:
        raise trace.unknown(func, f"with rounding_mode='{rounding_mode}'")
    if not any(trace.carries(tensor) for tensor in tensors([input])):
        return StopRelevance.apply(trace.state, func(input, other))
    return func(input, _stopped(trace, other))


@rule_for(T.div_, T.divide_, T.true_divide_, T.__itruediv__)
def quotient_in_place(trace: Tracer, func: Any, input: Tensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    if not trace.carries(input):
        raise trace.unknown(func, "of a constant by what depends on the image, in place")
    if rounding_mode is not None:
        raise trace.unknown(func, f"with rounding_mode='{rounding_mode}'")
    return func(input, _stopped(trace, other))


@rule_for(T.__rdiv__, T.__rtruediv__, torch.reciprocal, T.reciprocal, torch.rsqrt, T.rsqrt)
def denominator(trace: Tracer, func: Any, *args: Any) -> Tensor:
    """Treat a denominator as a constant for relevance, see `quotient`."""
    return StopRelevance.apply(trace.state, func(*args))


def _stopped(trace: Tracer, value: Any) -> Any:
    carries = isinstance(value, Tensor) and trace.carries(value)
    return StopRelevance.apply(trace.state, value) if carries else value


@rule_for(torch.pow, T.pow, T.__pow__)
def power(trace: Tracer, func: Any, input: Any, exponent: Any) -> Tensor:
    """Pass the fraction 1/p of the gradient p x^p / x, which conserves relevance (Euler's theorem on homogeneous
    functions). For p = 2 that is the uniform rule on x · x. Negative powers are denominators, see `quotient`."""
    if isinstance(exponent, Tensor) and isinstance(input, Tensor) and not trace.carries(exponent):
        return node(trace.state, func, _power_by_a_weight, input, exponent)
    if not isinstance(exponent, int | float) or exponent == 0:
        raise trace.unknown(func, f"with the exponent {exponent if isinstance(exponent, int | float) else 'a tensor'}")
    if exponent < 0:
        return StopRelevance.apply(trace.state, func(input, exponent))
    return func(share(trace.state, input, 1 / exponent), exponent)


def _power_by_a_weight(g: Tensor, x: Tensor, exponent: Tensor) -> Tensor:
    """Pass g · x^p / x for a learnt exponent, and nothing if it is negative."""
    return torch.where(exponent > 0, g * stabilised_quotient(x**exponent, x, x.new_zeros(())), 0).to(x.dtype)


@rule_for(torch.square, T.square, torch.var, T.var)
def of_degree_two(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `power`."""
    return func(share(trace.state, input, 1 / 2), *args, **kwargs)


@rule_for(torch.sqrt, T.sqrt)
def square_root(trace: Tracer, func: Any, input: Tensor) -> Tensor:
    """See `power`."""
    return func(share(trace.state, input, 2))


@rule_for(torch.var_mean, torch.std_mean)
def with_mean(trace: Tracer, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See `of_degree_two` and `of_degree_one`."""
    spread = func(share(trace.state, input, 1 / 2) if func is torch.var_mean else input, *args, **kwargs)[0]
    return spread, func(input, *args, **kwargs)[1]


@rule_for(
    torch.norm,
    T.norm,
    torch.linalg.vector_norm,
    torch.linalg.norm,
    torch.std,
    T.std,
    F.lp_pool1d,
    F.lp_pool2d,
    F.lp_pool3d,
)
def of_degree_one(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Pass the gradient, which conserves the relevance of a positively homogeneous function, see `power`."""
    return func(*args, **kwargs)
