"""Norms that in training take their statistics over the batches of all processes of a torch.distributed job.

A job of many processes then learns the same as one process with the whole batch. Not here: the norms' rules and
gradients (`rules/batch_norm.py`), and the averaging of gradients (`trainer/loop/distributed.py`).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.networks.fading import FadingNorm
from pipeline.networks.homogeneous import NORMS, ScaleNorm
from pipeline.networks.processes import Processes
from pipeline.private_torch import BatchNormBase
from pipeline.rules import joint_batch_norm, scale_norm


class SynchronisedBatchNorm(BatchNormBase):
    """A batch norm for (N, C, ...); in evaluation, and in a single process, the plain one."""

    processes: Processes

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.processes.count == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean = var = None
        momentum = self.momentum
        if self.track_running_stats:
            mean, var = self.running_mean, self.running_var
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if momentum is None:  # the average of all batches
                    momentum = 1 / float(self.num_batches_tracked)
        vectors = (mean, var, self.weight, self.bias)
        return joint_batch_norm(input, *vectors, True, momentum or 0.0, self.eps, self.processes)


class SynchronisedScaleNorm(ScaleNorm):
    """A scale-only norm for (N, C, ...); in evaluation, and in a single process, the plain one."""

    processes: Processes

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.processes.count == 1:
            return super().forward(x)
        return scale_norm(x, self.weight, self.running_second_moment, True, self.momentum, self.eps, self.processes)


_SIBLINGS: dict[type[nn.Module], type[SynchronisedBatchNorm | SynchronisedScaleNorm | FadingNorm]] = {
    FadingNorm: FadingNorm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), SynchronisedBatchNorm),
    SynchronisedBatchNorm: SynchronisedBatchNorm,
    **dict.fromkeys((ScaleNorm, SynchronisedScaleNorm), SynchronisedScaleNorm),
}


def synchronise_batch_norm(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Let every batch norm of a model, in training, normalise over the batches of all processes.

    The modules stay the same objects with the same parameters and buffers. Only their class changes, so that
    optimisers, hooks and saved weights are unaffected. In training every process must run the model, and its backward
    passes, equally often. If all processes have equally many samples and average their gradients, then loss, heatmaps,
    gradients and running statistics are those of one process with all samples.

    Args:
        model: the model, changed in place.
        group: the process group; None for all processes.

    Raises:
        ModelError: the class of a norm is unknown, and it may do more than normalise. The model is unchanged then.
    """
    norms: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    for name, norm in norms.items():
        if type(norm) not in _SIBLINGS:
            raise ModelError(
                f"the norm '{name}' ({type(norm).__name__}) cannot be synchronised over processes: only "
                "nn.BatchNorm1d, 2d, 3d, nn.SyncBatchNorm and pipeline.ScaleNorm can; put one of these in its place"
            )
    for norm in norms.values():
        norm.__class__ = _SIBLINGS[type(norm)]
        norm.processes = Processes(group)
