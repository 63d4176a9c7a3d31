"""What every operation does to relevance: one table from torch functions to rules, beside the formulas.

A rule is called in place of the function during the forward pass and puts into the autograd graph a node
with two behaviours: its backward is the relevance rule while ``state.epsilon`` is set, and the true
gradient otherwise. The rules' own backwards serve the gradient of a loss on heatmaps; a further derivative
raises. Not here: how a pass is run (`relevance.py`) and how relevance is followed (`tracer.py`).
"""

from pipeline.rules import activations, attention, norms, products, relu, weighted  # their rules enter the table
from pipeline.rules.batch_axis import batch_axis_after
from pipeline.rules.batch_norm import joint_batch_norm, scale_norm
from pipeline.rules.linear import LIKE_THE_SECOND, StopRelevance, stop_relevance
from pipeline.rules.rule_sets import RULE_SETS, RuleSet, rule_set
from pipeline.rules.table import RULES, PassState, RelevanceError, rule_for, tensors

__all__ = [
    "LIKE_THE_SECOND",
    "RULES",
    "RULE_SETS",
    "PassState",
    "RelevanceError",
    "RuleSet",
    "StopRelevance",
    "activations",
    "attention",
    "batch_axis_after",
    "joint_batch_norm",
    "norms",
    "products",
    "relu",
    "rule_for",
    "rule_set",
    "scale_norm",
    "stop_relevance",
    "tensors",
    "weighted",
]
