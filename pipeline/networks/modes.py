"""The modes of a network: training, evaluation, and settled, in which it learns what it will compute in evaluation.

Not here: how a settled network's norms compute, which is up to the pass (`pipeline.relevance.Trace`).
"""

from __future__ import annotations

from torch import nn

from pipeline.networks.homogeneous import ScaleNorm
from pipeline.private_torch import BatchNormBase

NORMS = (BatchNormBase, ScaleNorm)  # over the batch


def settle(model: nn.Module) -> None:
    """Put all of a network but its norms over the batch in evaluation mode, until its ``train`` or ``eval`` is called.

    In a pass that renormalises (`Trace`) it then computes what it will compute in evaluation, without dropout and
    without the noise of a batch's statistics, and it still learns.
    """
    for module in model.modules():
        if not isinstance(module, NORMS):
            module.training = False


def is_settled(model: nn.Module) -> bool:
    """Return whether a network is as `settle` leaves it: in evaluation mode, and its norms in training mode."""
    return not model.training and any(module.training for module in model.modules() if isinstance(module, NORMS))
