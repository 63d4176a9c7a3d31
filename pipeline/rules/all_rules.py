"""The full table: this module imports every module whose rules enter it. Enter rules of your own by its `rule_for`."""

from pipeline.rules import (
    activations,
    attention,
    batch_norm,
    elementwise,
    linear,
    norms,
    products,
    relu,
    steps,
    weighted,
)
from pipeline.rules.table import RULES, rule_for

__all__ = [
    "RULES",
    "activations",
    "attention",
    "batch_norm",
    "elementwise",
    "linear",
    "norms",
    "products",
    "relu",
    "rule_for",
    "steps",
    "weighted",
]
