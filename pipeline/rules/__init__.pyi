from .all_rules import RULES, rule_for
from .batch_axis import batch_axis_after
from .batch_norm import joint_batch_norm, scale_norm
from .linear import LIKE_THE_SECOND, StopRelevance, stop_relevance
from .rule_sets import RULE_SETS, RuleSet, rule_set
from .table import PassState, tensors

__all__ = [
    "LIKE_THE_SECOND",
    "RULES",
    "RULE_SETS",
    "PassState",
    "RuleSet",
    "StopRelevance",
    "batch_axis_after",
    "joint_batch_norm",
    "rule_for",
    "rule_set",
    "scale_norm",
    "stop_relevance",
    "tensors",
]
