"""Attention, written out as products, a softmax and linear layers, each with its own rule.

The fused kernels have no second derivative. The uniform rule on both products and the gradient of the softmax make
AttnLRP (Achtibat et al., ICML 2024, section 3.3). A stop at the softmax makes CP-LRP (Ali et al., ICML 2022), in which
relevance passes through the values alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.rules.linear import StopRelevance
from pipeline.rules.table import rule_for

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

T: Any = torch.Tensor

SOFTMAX: set[Any] = {F.softmax, torch.softmax, T.softmax, F.softmin}


@rule_for(*SOFTMAX)
def softmax(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Pass R_i = x_i (R_i − s_i Σ_j R_j), which is gradient times input (AttnLRP, ICML 2024, prop. 3.1)."""
    return func(*args, **kwargs)


def constant_softmax(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Treat attention weights as constants for relevance, connected in the outer gradient (CP-LRP, ICML 2022)."""
    return StopRelevance.apply(trace.state, func(*args, **kwargs))


@rule_for(F.scaled_dot_product_attention)
def scaled_dot_product_attention(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return trace.written_out(_attention, *args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `F.scaled_dot_product_attention`: (..., L, E), (..., S, E), (..., S, F) → (..., L, F)."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        scores = _masked(scores, _causal(scores))
    if attn_mask is not None:
        scores = _masked(scores, attn_mask)
    return F.dropout(F.softmax(scores, -1), dropout_p) @ value


def _causal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask: a boolean one is true for the keys that take part, others are added to the scores."""
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


@rule_for(F.multi_head_attention_forward)
def multi_head_attention(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Any:
    return trace.written_out(_multi_head_attention, *args, **kwargs)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward`: (L, N, E), (S, N, E'), (S, N, E'') → (L, N, E), or all without N."""
    unbatched = query.dim() == 2
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal says what attn_mask holds, and needs it")
    if unbatched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    _, samples, width = query.shape
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, samples, width)])
        v = torch.cat([v, bias_v.expand(1, samples, width)])
    # (length, N, width) → (N, heads, length, width of a head)
    q, k, v = (x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    k = k if static_k is None else static_k.unflatten(0, (samples, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (samples, num_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # (N, heads, L, S)
    added = scores.shape[-1] - key.shape[0] if static_k is None else int(add_zero_attn)
    if is_causal and key_padding_mask is None and not need_weights:  # the only case in which PyTorch uses the hint
        scores, attn_mask = _masked(scores, _causal(scores)), None
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            if mask.dim() == 3:  # (N · heads, L, S)
                mask = mask.unflatten(0, (samples, num_heads))
            scores = _masked(scores, ~_extended(mask, added) if mask.dtype == torch.bool else _extended(mask, added))
    attention = F.dropout(F.softmax(scores, -1), dropout_p, training)
    output = (attention @ v).permute(2, 0, 1, 3).flatten(2)
    output = F.linear(output, out_proj_weight, out_proj_bias)
    weights_out = (attention.mean(1) if average_attn_weights else attention) if need_weights else None
    if unbatched:
        return output.squeeze(1), None if weights_out is None else weights_out.squeeze(0)
    return output, weights_out


def _extended(mask: Tensor, added: int) -> Tensor:
    """Extend a mask by the keys that were added, which all take part."""
    return F.pad(mask, (0, added)) if added else mask
