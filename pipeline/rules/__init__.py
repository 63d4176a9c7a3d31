"""What every operation does to relevance: one table from torch functions to rules, beside the formulas.

A rule is called in place of the function during the forward pass and puts into the autograd graph a node
with two behaviours: its backward is the relevance rule while ``state.epsilon`` is set, and the true
gradient otherwise. The rules' own backwards serve the gradient of a loss on heatmaps; a further derivative
raises. Not here: how a pass is run (`relevance.py`) and how relevance is followed (`tracer.py`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
