"""Logits from a network that returns more than a tensor: a dictionary, a tuple, or the output of another library.

Not here: what becomes of a network that returns no logits at all (`models.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.networks.trials import kind_of, remedy_for

NAMES = ("logits", "out")  # of logits in the outputs of Hugging Face's and torchvision's networks


def logits_of(output: object, num_classes: int) -> Tensor:
    """Return the logits in an output.

    A tensor is taken as it is. Of a dictionary, a named tuple or an object, ``logits`` is taken, or else ``out``. This
    includes the ``ModelOutput`` of Hugging Face and the outputs of torchvision's networks with auxiliary classifiers.
    Of other dictionaries, tuples and lists the only tensor of shape (N, num_classes) is taken.

    Args:
        output: what a network returned.
        num_classes: the number of logits.

    Returns:
        The logits; of any shape, if they have one of the two names.

    Raises:
        ModelError: several tensors could be the logits, or none.
    """
    if isinstance(output, Tensor):
        return output
    for name in NAMES:
        part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(part, Tensor):
            return part
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, tuple | list):
        parts = output
    fitting = [p for p in parts if isinstance(p, Tensor) and p.dim() == 2 and p.shape[1] == num_classes]
    if len(fitting) == 1:
        return fitting[0]
    raise ModelError(
        f"the network returns {kind_of(output)}, in which {len(fitting) or 'no'} tensors have the shape of logits "
        f"(N, {num_classes}){remedy_for(output, num_classes)}"
    )


def take_logits(network: nn.Module, num_classes: int) -> None:
    """Let a network return the logits of its output, in place: by a hook, so that names in its state dict stay.

    A second call changes nothing. `as_returned` undoes it.
    """
    if not _hooks(network):
        network.register_forward_hook(_TakeLogits(num_classes))


def as_returned(network: nn.Module) -> nn.Module:
    """Let a network return again what its own forward returns, in place, and return the network."""
    for key in _hooks(network):
        del network._forward_hooks[key]
    return network


@dataclass(frozen=True)
class _TakeLogits:
    """A forward hook that replaces an output by its logits."""

    num_classes: int

    def __call__(self, module: nn.Module, inputs: object, output: object) -> Tensor:
        return logits_of(output, self.num_classes)


def _hooks(network: nn.Module) -> list[int]:
    return [key for key, hook in network._forward_hooks.items() if isinstance(hook, _TakeLogits)]
