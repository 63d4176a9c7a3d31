"""The processes of a distributed training: the same few calls for one process as for many.

    torchrun --nproc-per-node 4 ...

Each process runs the loop on its share of each batch. Not here: batch norms over all shares
(`pipeline/networks/synchronised.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.networks.processes import LostProcess, collective, lost_process
from trainer.errors import TrainingError
from trainer.stream.stream import Share

__all__ = ["LostProcess", "Ranks", "connect"]

Value = TypeVar("Value")
BUCKET = 2**25  # bytes of gradients in one operation: few operations, and little memory for the copy


@dataclass(frozen=True)
class Ranks(Share):
    """This process and the others of the job; by default, a single process.

    Every method is a collective operation: all processes call the same ones in the same order, with tensors of the
    same shapes. In a single process they cost nothing. All raise LostProcess where another process has ended or does
    not answer.

    local_rank: counts the processes of this machine from 0. control: for messages between the processes on the CPU,
    which do not wait for the GPUs.
    """

    local_rank: int = 0
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process writes the files that only one process writes."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over all processes.

        A process without a gradient for a parameter counts as 0; where no process has one, there is none afterwards.

        Args:
            parameters: the same ones in all processes, on the CPU or on a GPU.
        """
        parameters = [p for p in parameters if p.requires_grad]
        if self.ranks == 1 or not parameters:
            return
        anywhere = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        self._reduce(anywhere, dist.ReduceOp.MAX)
        averaged = [p for p, is_there in zip(parameters, anywhere.tolist(), strict=True) if is_there]
        for parameter in averaged:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in averaged if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._reduce(flat)
            flat /= self.ranks
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of floating ``values`` over all processes, of the same shape, detached."""
        if self.ranks == 1:
            return values.detach()
        total = values.detach().clone(memory_format=torch.contiguous_format)
        self._reduce(total)
        return total / self.ranks

    def agree(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: the same answer in all."""
        if self.ranks == 1:
            return flag
        anywhere = torch.tensor([flag], dtype=torch.uint8)
        self._reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere.item())

    def share(self, value: Value) -> Value:
        """Return the ``value`` of the main process, of any type that can be pickled; those of others are ignored."""
        if self.ranks == 1:
            return value
        values = [value if self.main else None]
        with collective():
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Return the ``value`` of every process, of any type that can be pickled, by rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        with collective():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.ranks > 1:
            with collective():
                dist.barrier(group=self.control)

    def _reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        with collective():
            dist.all_reduce(values, operation, group=self.control if values.device.type == "cpu" else None)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Group neighbours of one dtype and device, up to BUCKET bytes together."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        alike = buckets and (gradient.dtype, gradient.device) == (buckets[-1][0].dtype, buckets[-1][0].device)
        if not alike or size + gradient.nbytes > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets


@contextmanager
def connect(device: str = "auto") -> Iterator[tuple[Ranks, str]]:
    """Join the job that torchrun has started, while the context lasts; without torchrun the process is a single one.

    Reads RANK, WORLD_SIZE and LOCAL_RANK. Where a process leaves the context by an error, the others get LostProcess.

    Args:
        device: ``auto`` and ``cuda`` give each of many processes a GPU of its own, with NCCL as the backend; with
            ``cpu`` it is Gloo. A single process may also have ``cuda:N``.

    Yields:
        The `Ranks` of this process, and the name of its device.

    Raises:
        TrainingError: the variables of the environment are not those that torchrun sets.
        ModelError: the device cannot be that of this process.
        LostProcess: other processes do not join, or one is lost in the context.
    """
    ranks = ranks_of(os.environ)
    device = device_of(ranks, device, torch.cuda.device_count() if device != "cpu" else 0)
    if ranks.ranks == 1:
        yield ranks, device
        return
    backend = "gloo" if device == "cpu" else "nccl"
    if backend == "nccl":
        torch.cuda.set_device(device)
    try:
        with collective():
            dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.ranks)
            control: Any = dist.new_group(backend="gloo")
        yield replace(ranks, control=control), device
    except dist.DistError as error:  # NCCL may report it late, in a later operation
        raise lost_process(error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Read the ranks from torchrun's variables; without them the process is a single one.

    Args:
        environment: the variables of the environment.

    Returns:
        The ranks, without the group for messages.

    Raises:
        TrainingError: some variables are missing, or their values do not fit together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: environment[name] for name in names if environment.get(name)}
    if not {"RANK", "WORLD_SIZE"} & set(variables):
        return Ranks()
    values = ", ".join(f"{name}={value}" for name, value in variables.items())
    remedy = "start the job with torchrun, which sets all of them, or unset them to train in one process"
    missing = [name for name in names if name not in variables]
    if missing:
        raise TrainingError(f"the environment has {values}, but not {' and '.join(missing)}: {remedy}")
    try:
        rank, ranks, local_rank = (int(variables[name]) for name in names)
    except ValueError:
        raise TrainingError(f"the environment has {values}, which are not all whole numbers: {remedy}") from None
    if not (0 <= local_rank <= rank < ranks):
        raise TrainingError(
            f"the environment has {values}, but there must be 0 ≤ LOCAL_RANK ≤ RANK < WORLD_SIZE: {remedy}"
        )
    address = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if ranks > 1 and address:
        raise TrainingError(f"the environment has {values}, but not {' and '.join(address)}: {remedy}")
    return Ranks(rank, ranks, local_rank)


def device_of(ranks: Ranks, device: str, gpus: int) -> str:
    """Choose the device of this process; a single process gets ``device`` itself.

    Args:
        ranks: this process and the others.
        device: ``auto``, ``cuda`` or ``cpu``.
        gpus: the number of GPUs of this machine.

    Returns:
        ``cpu``, or ``cuda:N`` with a GPU that no other process of this machine has.

    Raises:
        ModelError: processes would share a GPU, or this one would have none.
    """
    if ranks.ranks == 1 or device == "cpu" or (device == "auto" and gpus == 0):
        return device if ranks.ranks == 1 else "cpu"
    if device not in ("auto", "cuda"):
        raise ModelError(
            f"the device '{device}' cannot be that of each of {ranks.ranks} processes: choose cuda, for a GPU for "
            "each, or cpu"
        )
    if ranks.local_rank >= gpus:
        raise ModelError(
            f"process {ranks.local_rank} of this machine has no GPU, as there are {gpus}: start no more processes than "
            "GPUs on each machine (torchrun --nproc-per-node), or choose the device cpu"
        )
    return f"cuda:{ranks.local_rank}"
