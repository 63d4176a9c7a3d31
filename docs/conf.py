"""Configure the documentation site: pip install -e ".[docs]" && sphinx-build -W docs site"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, math
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "Explanation distillation"
copyright = "Explanation Distillation contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/; tests/test_docs.py checks all
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_title = "Explanation distillation"
exclude_patterns = ["_build"]
default_role = "py:obj"  # docstrings name functions in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"  # Args sections add shapes and units
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False  # the signature has the type
maximum_signature_line_length = 88  # a longer signature has one parameter a line


def _as_written(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape the bars of a docstring outside literals: a bar means an absolute value, not a substitution."""
    lines[:] = [line.replace("|", r"\|") if "``" not in line else _outside_literals(line) for line in lines]


def _outside_literals(line: str) -> str:
    """Escape the bars of a line that has literals in double backticks."""
    parts = line.split("``")
    return "``".join(part.replace("|", r"\|") if number % 2 == 0 else part for number, part in enumerate(parts))


def _mathml(translator: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers render without a script from another site."""
    translator.body.append(convert(node.astext(), display="inline" if isinstance(node, math) else "block"))
    raise SkipNode


def setup(app: Any) -> None:
    """Connect the hooks; Sphinx calls this function."""
    app.connect("autodoc-process-docstring", _as_written)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
