"""A module that is imported when it is first used, so that names and defaults are known without PyTorch."""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stands for a module: ``torch = Lazy("torch")`` imports it at the first attribute.

    Unlike `importlib.util.LazyLoader` it leaves `sys.modules` alone, so that a module that nobody uses is not there.
    """

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)  # the next use costs what it does of a module
        return value
