"""The heatmap store: layout, writer and reader. Usable alone: it needs NumPy and Zarr, no model and no PyTorch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
