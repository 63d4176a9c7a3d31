"""Layers with modified weights: the ε, z⁺ and γ rules, with batch norms merged into the layers before them.

In these rules the layer holds the stabiliser, and activations pass relevance unchanged. The code favours clarity over
speed: the backward pass runs a layer again for each modification of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.networks.processes import Processes
from pipeline.rules.batch_norm import batch_norm, moments
from pipeline.rules.node import input_gradient, node, stabilised_quotient
from pipeline.rules.table import Rule, require_constant
from pipeline.rules.weighted import linear

if TYPE_CHECKING:
    from pipeline.tracer import Tracer


class Modified(NamedTuple):
    """The modified parameters of a layer, for outputs of one sign (+1, −1, or 0 for all)."""

    sign: int
    for_positive: Tensor  # the weights of positive inputs
    for_negative: Tensor
    bias: Tensor | None


Modification = Callable[[Tensor, Tensor | None], list[Modified]]
Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) → z


def epsilon(weight: Tensor, bias: Tensor | None) -> list[Modified]:
    """R_i = Σ_j x_i w_ij R_j / (z_j + ε·sign(z_j)) (Bach et al., PLoS ONE 2015, eq. 58)."""
    return [Modified(0, weight, weight, bias)]


def z_plus(weight: Tensor, bias: Tensor | None) -> list[Modified]:
    """R_i = Σ_j (x_i w_ij)⁺ R_j / (Σ_i (x_i w_ij)⁺ + b_j⁺ + ε) (Bach et al., PLoS ONE 2015: α = 1, β = 0)."""
    return [Modified(0, weight.clamp_min(0), weight.clamp_max(0), None if bias is None else bias.clamp_min(0))]


def gamma(value: float) -> Modification:
    """The γ rule (Montavon et al., LNCS 11700, 2019), generalised for inputs of both signs (Andéol et al., 2021).

    Contributions that have the sign of z_j count 1 + γ times: R_i = Σ_j (c_ij + γ c_ij⁺) R_j / (Σ_i (c_ij + γ c_ij⁺) +
    ε) with c_ij = x_i w_ij and the bias alike where z_j > 0, and with c⁻ in place of c⁺ where z_j < 0.
    """

    def modify(weight: Tensor, bias: Tensor | None) -> list[Modified]:
        more, less = weight + value * weight.clamp_min(0), weight + value * weight.clamp_max(0)
        up, down = (
            (None, None) if bias is None else (bias + value * bias.clamp_min(0), bias + value * bias.clamp_max(0))
        )
        return [Modified(1, more, less, up), Modified(-1, less, more, down)]

    return modify


def _propagate(
    modify: Modification, layer: Layer, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stabiliser: Tensor
) -> Tensor:
    """Return the modified gradient g_i = R_i / x_i of the relevances R_j = z_j g_j."""
    z = layer(x, weight, bias)
    parts = []
    for sign, for_positive, for_negative, modified_bias in modify(weight, bias):
        wanted = g if sign == 0 else torch.where(z * sign > 0, g, 0)
        if for_positive is for_negative:
            total = layer(x, for_positive, modified_bias)
        else:
            total = layer(x.clamp_min(0), for_positive, modified_bias) + layer(x.clamp_max(0), for_negative, None)
        s = wanted * stabilised_quotient(z, total, stabiliser)
        part = input_gradient(lambda x, weight=for_positive: layer(x, weight, None), x, s)  # type: ignore[misc]
        if for_positive is not for_negative:
            negative = input_gradient(lambda x, weight=for_negative: layer(x, weight, None), x, s)  # type: ignore[misc]
            part = torch.where(x < 0, negative, part)
        parts.append(part)
    return sum(parts[1:], parts[0])


_LAYER = "the layer that made this"


def layer_rule(modify: Modification) -> Rule:
    """Return the rule for convolutions and linear layers whose weights ``modify`` changes."""

    def rule(
        trace: Tracer, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor:
        if func is F.linear and trace.carries(weight):
            return linear(trace, func, input, weight, bias)
        require_constant(trace, func, weight, bias)
        state, axis = trace.state, trace.batch_axis(input)
        if axis is not None and not (axis < input.dim() - 1 if func is F.linear else axis == 0):
            axis = None  # the layer mixes values along that axis

        def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *args, **options)

        def relevance(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _propagate(modify, layer, g, x, weight, bias, state.epsilon_like(g, axis))

        output = node(state, layer, relevance, input, weight, bias)
        if input.dim() == weight.dim():
            made: Any = output.grad_fn
            made.metadata[_LAYER] = (modify, func, layer, input, weight, bias)
        return output

    return rule


def merged_batch_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    processes: Processes | None = None,
) -> Tensor:
    """Merge a batch norm with the convolution or linear layer directly before it; others are the affine map.

    The merged layer replaces both in the graph, so that the first layer gets no relevance of its own. The statistics of
    a batch are constants for relevance, and connected in the outer gradient.
    """
    made: Any = input.grad_fn
    if made is None or _LAYER not in made.metadata:
        vectors = (running_mean, running_var, weight, bias)
        return batch_norm(trace, func, input, *vectors, training, momentum, eps, processes)
    require_constant(trace, func, weight, bias)
    modify, of, layer, x, layer_weight, layer_bias = made.metadata[_LAYER]
    state, axis = trace.state, trace.batch_axis(input)
    momentum = state.momentum(momentum)
    if not training:  # buffers that a later step may overwrite
        running_mean, running_var = running_mean.clone(), running_var.clone()  # type: ignore[union-attr]

    def both(x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        options = (training, momentum, eps) if processes is None else (training, momentum, eps, processes)
        return func(layer(x, w, b), running_mean, running_var, scale, shift, *options)

    def relevance(
        g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        if training or running_mean is None or running_var is None:
            mean, var, _ = moments(layer(x, w, b), processes)
        else:
            mean, var = running_mean, running_var
        factor = torch.rsqrt(var + eps) * (1 if scale is None else scale)
        merged_bias = (-mean if b is None else b - mean) * factor + (0 if shift is None else shift)
        return _propagate(modify, layer, g, x, _scaled(of, w, factor), merged_bias, state.epsilon_like(g, axis))

    return node(state, both, relevance, x, layer_weight, layer_bias, weight, bias)


def _scaled(func: Any, weight: Tensor, factor: Tensor) -> Tensor:
    """Multiply weights (out, in, ...), or (in, out/groups, ...) of a transposed convolution, by output channel."""
    if func not in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))
    groups = len(factor) // weight.shape[1]
    by_group = weight.unflatten(0, (groups, -1)) * factor.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return by_group.flatten(0, 1)
