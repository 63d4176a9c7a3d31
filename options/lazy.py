"""Import a module when it is first used, so that names and defaults are known without PyTorch."""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stand for a module: ``torch = Lazy("torch")`` imports it when its first attribute is read.

    Unlike `importlib.util.LazyLoader` it leaves `sys.modules` alone, so that an unused module is not in there.
    """

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)  # the next use is as fast as that of a module
        return value
