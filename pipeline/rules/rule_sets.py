"""Sets of rules by name. Their names are known without PyTorch. Not here: the rules."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from options import Lazy, Registry
from pipeline.errors import RelevanceError

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F

    from pipeline import rules
    from pipeline.rules import activations, attention, batch_norm, elementwise, gamma, linear, relu, weighted
    from pipeline.rules.table import Rule
else:
    torch, F = Lazy("torch"), Lazy("torch.nn.functional")
    rules = Lazy("pipeline.rules")
    activations, attention = Lazy("pipeline.rules.activations"), Lazy("pipeline.rules.attention")
    batch_norm, gamma = Lazy("pipeline.rules.batch_norm"), Lazy("pipeline.rules.gamma")
    elementwise, relu = Lazy("pipeline.rules.elementwise"), Lazy("pipeline.rules.relu")
    linear, weighted = Lazy("pipeline.rules.linear"), Lazy("pipeline.rules.weighted")


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


RULE_SETS: Registry[RuleSet] = Registry("rules", RelevanceError)


@RULE_SETS.defer("flex")
def flex() -> RuleSet:
    """Return LRP-Flex on ReLUs (Bassi et al., arXiv 2407.09788), with AttnLRP in transformers (Achtibat et al., ICML
    2024).
    """
    return RuleSet("flex", rules.RULES)


@RULE_SETS.defer("cp-lrp")
def cp_lrp() -> RuleSet:
    """Return ``flex`` with attention weights as constants, so that relevance flows through the values only, for less
    noisy maps of transformers (Ali et al., ICML 2022).
    """
    return RuleSet("cp-lrp", _with(dict.fromkeys(attention.SOFTMAX, attention.constant_softmax)))


@RULE_SETS.defer("gradient-x-input")
def gradient_x_input() -> RuleSet:
    """Return the true gradient everywhere, with batch norm as an affine map, as a baseline that ignores ε and refuses
    no operation.
    """
    # the nodes with a second order that PyTorch's own lack, or compute slowly
    nodes: dict[Any, Rule] = {
        linear.stop_relevance: linear.stop,
        **dict.fromkeys((F.batch_norm, batch_norm.joint_batch_norm), _or_gradient(batch_norm.batch_norm)),
        batch_norm.scale_norm: _or_gradient(batch_norm.scale_norm_rule),
        batch_norm.fading_norm: _or_gradient(batch_norm.fading_norm_rule),
        F.hardsigmoid: activations.hardsigmoid_by_gradient,
        F.scaled_dot_product_attention: attention.scaled_dot_product_attention,
        F.multi_head_attention_forward: attention.multi_head_attention,
        **dict.fromkeys(_convolutions(), _or_gradient(weighted.convolution)),
        **dict.fromkeys(_transposed(), _or_gradient(weighted.transposed_convolution)),
    }
    return RuleSet("gradient-x-input", nodes, otherwise=linear.gradient)


@RULE_SETS.defer("epsilon-plus")
def epsilon_plus() -> RuleSet:
    """Return the z⁺ rule in convolutions and the ε rule in linear layers, as zennit's ``EpsilonPlus``, for smoother
    maps of convolutional teachers.
    """
    return RuleSet("epsilon-plus", _layers(gamma.layer_rule(gamma.z_plus)))


@RULE_SETS.defer("gamma")
def gamma_quarter() -> RuleSet:
    """Return the γ rule (γ = 0.25) in convolutions and the ε rule in linear layers, for smoother maps of convolutional
    teachers (Montavon et al., 2019).
    """
    return RuleSet("gamma", _layers(gamma.layer_rule(gamma.gamma(0.25))))


def rule_set(rules: str | RuleSet) -> RuleSet:
    """Return a rule set by its name, or the one that is passed in.

    Raises:
        RelevanceError: there is no rule set of this name; the text lists all.
    """
    return rules if isinstance(rules, RuleSet) else RULE_SETS.find(rules)


def _with(changes: dict[Any, Rule]) -> Mapping[Callable[..., Any], Rule]:
    """Return the table with some changes; a rule that enters the table later is seen too."""
    return ChainMap(changes, rules.RULES)


def _or_gradient(rule: Rule) -> Rule:
    def otherwise_gradient(trace: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return rule(trace, func, *args, **kwargs)
        except RelevanceError:
            return linear.gradient(trace, func, *args, **kwargs)

    return otherwise_gradient


def _convolutions() -> tuple[Any, ...]:
    return torch.conv1d, torch.conv2d, torch.conv3d


def _transposed() -> tuple[Any, ...]:
    return torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d


def _layers(convolutions: Rule) -> Mapping[Callable[..., Any], Rule]:
    """Return a rule for convolutions with the ε rule for linear layers; these hold the stabilisers."""
    return _with(
        {
            **dict.fromkeys(_convolutions() + _transposed(), convolutions),
            F.linear: gamma.layer_rule(gamma.epsilon),
            **dict.fromkeys((F.batch_norm, batch_norm.joint_batch_norm), gamma.merged_batch_norm),
            **dict.fromkeys(relu.RELU, linear.gradient),
            **dict.fromkeys(activations.ACTIVATIONS, activations.activation_passes),
            elementwise.elementwise: elementwise.elementwise_passes,
        }
    )
