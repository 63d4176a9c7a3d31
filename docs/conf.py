"""The site: pip install -e ".[docs]" && sphinx-build -W docs site"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, math
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "Explanation distillation"
copyright = "the authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # of files of the code, which pages link to beside them
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_title = "Explanation distillation"
exclude_patterns = ["_build"]
default_role = "py:obj"  # docstrings name functions in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"


def _as_written(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose: a bar in them is an absolute value, and a star no emphasis."""
    lines[:] = [line.replace("|", r"\|") if "``" not in line else _outside_literals(line) for line in lines]


def _outside_literals(line: str) -> str:
    parts = line.split("``")
    return "``".join(part.replace("|", r"\|") if number % 2 == 0 else part for number, part in enumerate(parts))


def _mathml(translator: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw by themselves: the site asks no other one for a script."""
    translator.body.append(convert(node.astext(), display="inline" if isinstance(node, math) else "block"))
    raise SkipNode


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_written)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
