"""How an explanation is made: the relevance engine, teachers, and stage one, which writes heatmaps to a store."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
