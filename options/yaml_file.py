"""Options from YAML files in one dialect, for ``--config`` files and for sweeps.

Numbers, true, false and null are those of YAML 1.2: 2e-3 is a number; on, off, yes, no, 2024-01-01 and 012 are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

# The core schema (YAML 1.2.2, § 10.3.2), but numbers with leading zeros, hexadecimal and octal ones are text: by tag,
# the pattern of a whole scalar and the characters that it begins with.
INTEGER = r"(?:0|[1-9][0-9]*)"
NUMBER_STARTS = "-+.0123456789"
EMPTY_VALUES = {"null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]), "merge": ("<<", ["<"])}
TYPED_VALUES = {
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?{INTEGER}", list(NUMBER_STARTS)),
    "float": (
        rf"[-+]?(?:\.[0-9]+|{INTEGER}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list(NUMBER_STARTS),
    ),
}


def read_yaml(
    path: str | Path, *, texts: bool = False, error: Callable[[str], Exception] = ValueError
) -> dict[Any, Any]:
    """Read a mapping of options from a YAML file.

    Args:
        path: the file.
        texts: return every scalar but null as the text that the file has, such as ``"1e-3"`` or ``"true"``, for a
            command line that parses the text by the type of the option.
        error: makes the exception to raise.

    Raises:
        error: the file is not valid YAML, or not a mapping; the text has the path.
    """
    import yaml

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _loader(texts))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise error(f"{path} must hold options by name, one on each line, such as 'steps: 1000'")
    return values


@cache
def _loader(texts: bool) -> type[Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    for tag, (pattern, starts) in (EMPTY_VALUES if texts else EMPTY_VALUES | TYPED_VALUES).items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), starts)
    return Loader
