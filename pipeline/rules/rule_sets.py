"""Sets of rules by name. Not here: the rules."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.rules.activations import ACTIVATIONS, activation_passes, hardsigmoid_by_gradient
from pipeline.rules.attention import SOFTMAX, constant_softmax, multi_head_attention, scaled_dot_product_attention
from pipeline.rules.batch_norm import batch_norm, joint_batch_norm, scale_norm, scale_norm_rule
from pipeline.rules.gamma import epsilon, gamma, layer_rule, merged_batch_norm, z_plus
from pipeline.rules.linear import gradient, stop, stop_relevance
from pipeline.rules.table import RULES, RelevanceError, Rule
from pipeline.rules.weighted import convolution, transposed_convolution


@dataclass(frozen=True, eq=False)
class RuleSet:
    """What operations do to relevance: a rule for each torch function, and one for all others or None to refuse them.

    One of your own that differs in a few operations: ``RuleSet("mine", {**RULE_SETS["flex"].rules, F.gelu: my_rule})``.
    """

    name: str
    rules: Mapping[Callable[..., Any], Rule]
    otherwise: Rule | None = None

    def rule(self, function: Callable[..., Any]) -> Rule | None:
        return self.rules.get(function, self.otherwise)


def _with(changes: dict[Any, Rule]) -> Mapping[Callable[..., Any], Rule]:
    """The base table with some changes; what enters the table later is seen too."""
    return ChainMap(changes, RULES)


def _or_gradient(rule: Rule) -> Rule:
    def otherwise_gradient(trace: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return rule(trace, func, *args, **kwargs)
        except RelevanceError:
            return gradient(trace, func, *args, **kwargs)

    return otherwise_gradient


_STANDARD: Any = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: Any = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_RELU: Any = (F.relu, torch.relu, torch.Tensor.relu, F.relu_, torch.relu_, torch.Tensor.relu_)

# the nodes with a second order that PyTorch's own lack, or do slowly
_GRADIENT: dict[Any, Rule] = {
    stop_relevance: stop,
    **dict.fromkeys((F.batch_norm, joint_batch_norm), _or_gradient(batch_norm)),
    scale_norm: _or_gradient(scale_norm_rule),
    F.hardsigmoid: hardsigmoid_by_gradient,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
    **dict.fromkeys(_STANDARD, _or_gradient(convolution)),
    **dict.fromkeys(_TRANSPOSED, _or_gradient(transposed_convolution)),
}


def _layers(convolutions: Rule) -> Mapping[Callable[..., Any], Rule]:
    """A rule for convolutions with the ε rule for linear layers; these hold the stabilisers and activations pass."""
    return _with(
        {
            **dict.fromkeys(_STANDARD + _TRANSPOSED, convolutions),
            F.linear: layer_rule(epsilon),
            **dict.fromkeys((F.batch_norm, joint_batch_norm), merged_batch_norm),
            **dict.fromkeys(_RELU, gradient),
            **dict.fromkeys(ACTIVATIONS, activation_passes),
        }
    )


# flex: LRP-Flex on ReLUs, AttnLRP in transformers. cp-lrp: flex with attention weights as constants.
# gradient-x-input: ε is ignored, no operation is refused, and batch norm is the affine map all the same.
# epsilon-plus, gamma: the z⁺ rule, or the γ rule with γ = 0.25, in convolutions; the ε rule in linear layers.
RULE_SETS: dict[str, RuleSet] = {
    rule_set.name: rule_set
    for rule_set in (
        RuleSet("flex", RULES),
        RuleSet("cp-lrp", _with(dict.fromkeys(SOFTMAX, constant_softmax))),
        RuleSet("gradient-x-input", _GRADIENT, otherwise=gradient),
        RuleSet("epsilon-plus", _layers(layer_rule(z_plus))),
        RuleSet("gamma", _layers(layer_rule(gamma(0.25)))),
    )
}


def rule_set(rules: str | RuleSet) -> RuleSet:
    """A rule set by name; raises RelevanceError with all names for one that there is not."""
    if isinstance(rules, RuleSet):
        return rules
    if rules not in RULE_SETS:
        raise RelevanceError(f"no rules are called '{rules}': choose one of {', '.join(RULE_SETS)}, or give a RuleSet")
    return RULE_SETS[rules]
