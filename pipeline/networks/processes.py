"""The processes of a torch.distributed job as a norm sees them: sums over all of them, which autograd follows.

Not here: how the processes find one another, and what a training loop asks of them (`trainer/loop/distributed.py`).
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


class LostProcess(RuntimeError):
    """A collective operation failed, as another process of the job ended or did not answer."""


def lost_process(error: RuntimeError) -> LostProcess:
    """What a collective operation's error means, in one sentence without the place in the C++ code."""
    reason = re.sub(r"^(\[[^]]*] )+", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    return LostProcess(
        f"another process of this job ended or did not answer ({reason.split('. ')[0]}): see what that one reported, "
        "and start the job again"
    )


@contextmanager
def collective() -> Iterator[None]:
    """Around a collective operation and nothing else: its errors become LostProcess.

    Gloo's are plain RuntimeErrors, which only the place where they come from tells from other mistakes.
    """
    try:
        yield
    except RuntimeError as error:
        raise lost_process(error) from error


class _Total(Function):
    """The sum over all processes; its gradient is the sum of theirs.

    A collective operation must be met by all processes in the same order. In a forward pass this is the order of the
    model's calls. In a backward pass autograd runs, of the nodes that are ready, the one made last, in one thread for
    each device: the same order in every process where the same nodes were made. Which norms' nodes there are and which
    of them run follows from the model and from what requires a gradient, not from values (a ReLU's node has another
    relevance at ε = 0, but behind the same norm); hence no norm may decide by its values whether to ask the others.
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
    """Those of a process group; None is all there are, and the one there is without torch.distributed."""

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def total(self, value: Tensor) -> Tensor:
        """The sum of every process's ``value``, all of one shape."""
        return _Total.apply(value, self.group)

    def rows(self, value: Tensor) -> Tensor:
        """Every process's ``value``, (processes, *shape): a sum too, so that it has the same gradient."""
        rank, nothing = dist.get_rank(self.group), torch.zeros_like(value)
        return self.total(torch.stack([value if row == rank else nothing for row in range(self.count)]))
