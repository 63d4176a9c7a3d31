"""Sums over the processes of a torch.distributed job, for norms; autograd differentiates them.

Not here: how the processes find one another, and how a training loop uses them (`trainer/loop/distributed.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from options import first_line


class LostProcess(RuntimeError):
    """A collective operation failed, as another process of the job ended or did not answer."""


def lost_process(error: RuntimeError) -> LostProcess:
    """Return the meaning of a collective operation's error in one sentence, without the place in the C++ code."""
    reason = re.sub(r"^(\[[^]]*] )+", "", first_line(error))
    return LostProcess(
        f"another process of this job ended or did not answer ({reason.split('. ')[0]}): see the error of that "
        "process, and start the job again"
    )


@contextmanager
def collective() -> Iterator[None]:
    """Turn the errors of a collective operation into LostProcess.

    Put it around the collective operation alone: Gloo raises plain RuntimeErrors, which look like other mistakes.
    """
    try:
        yield
    except RuntimeError as error:
        raise lost_process(error) from error


class _Total(Function):
    """The sum over all processes; its gradient is the sum of theirs.

    All processes must reach collective operations in the same order. In a forward pass this is the order of the
    model's calls. In a backward pass autograd runs the youngest of the nodes that are ready, in one thread for each
    device, which is the same order in every process that made the same nodes. The nodes of the norms, and the choice of
    those that run, depend on the model and on the tensors that require a gradient, and not on values. (The node of a
    ReLU has another relevance at ε = 0, but it stands behind the same norm.) So no norm may decide by its values
    whether to ask the other processes.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        with collective():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(g, ctx.group), None


@dataclass(frozen=True)
class Processes:
    """The processes of a group. The group None has all processes, or this one alone without torch.distributed."""

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of the ``value`` of every process; all have the same shape."""
        return _Total.apply(value, self.group)

    def rows(self, value: Tensor) -> Tensor:
        """Return the ``value`` of every process, (processes, *shape), as a sum, so that it has the same gradient."""
        rank, nothing = dist.get_rank(self.group), torch.zeros_like(value)
        return self.total(torch.stack([value if row == rank else nothing for row in range(self.count)]))
