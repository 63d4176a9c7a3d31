"""Sets of rules by name. Not here: the rules."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.rules.attention import SOFTMAX, constant_softmax
from pipeline.rules.table import RULES, Rule


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


RULE_SETS: dict[str, RuleSet] = {
    rule_set.name: rule_set
    for rule_set in (
        RuleSet("flex", RULES),
        RuleSet("cp-lrp", _with(dict.fromkeys(SOFTMAX, constant_softmax))),
    )
}


def rule_set(rules: str | RuleSet) -> RuleSet:
    """A rule set by name; raises ValueError with all names for one that there is not."""
    if isinstance(rules, RuleSet):
        return rules
    if rules not in RULE_SETS:
        raise ValueError(f"no rules are called '{rules}': choose one of {', '.join(RULE_SETS)}, or give a RuleSet")
    return RULE_SETS[rules]
