"""What a training loop asks of the other processes of its job, the same few lines for one process as for many.

    torchrun --nproc-per-node 4 ...

Every process runs the loop on its share of each batch. Not here: norms over all shares
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

from pipeline.networks.models import ModelError
from pipeline.networks.processes import LostProcess, collective, lost_process
from trainer.errors import TrainingError
from trainer.stream.stream import Share

__all__ = ["LostProcess", "Ranks", "connect"]

Value = TypeVar("Value")
BUCKET = 2**25  # bytes of gradients in one operation: few waits, and little memory for the copy


@dataclass(frozen=True)
class Ranks(Share):
    """This process among those of the job; by itself, one alone.

    Every method is a collective operation: all processes call the same ones in the same order, with tensors of the
    same shapes. Alone they cost nothing. All raise LostProcess where another process ended or does not answer.
    """

    local_rank: int = 0  # among the processes of this machine
    # for messages between the processes on the CPU, which do not wait for the GPUs
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the mean of all processes' gradients in the place of each.

        A process without a gradient for a parameter counts as 0; where none has one, there is none afterwards.
        """
        parameters = [p for p in parameters if p.requires_grad]
        if self.ranks == 1 or not parameters:
            return
        anywhere = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        self._reduce(anywhere, dist.ReduceOp.MAX)
        wanted = [p for p, is_there in zip(parameters, anywhere.tolist(), strict=True) if is_there]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in wanted if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._reduce(flat)
            flat /= self.ranks
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of floating ``values`` over all processes, of the same shape and detached."""
        if self.ranks == 1:
            return values.detach()
        total = values.detach().clone(memory_format=torch.contiguous_format)
        self._reduce(total)
        return total / self.ranks

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: the same answer in all."""
        if self.ranks == 1:
            return flag
        said = torch.tensor([flag], dtype=torch.uint8)
        self._reduce(said, dist.ReduceOp.MAX)
        return bool(said.item())

    def share(self, value: Value) -> Value:
        """The main process's ``value``, of any type that can be pickled; what the others give is not looked at."""
        if self.ranks == 1:
            return value
        values = [value if self.main else None]
        with collective():
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Every process's ``value``, of any type that can be pickled, by rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        with collective():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.ranks > 1:
            with collective():
                dist.barrier(group=self.control)

    def _reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        with collective():
            dist.all_reduce(values, operation, group=self.control if values.device.type == "cpu" else None)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one type and device, up to BUCKET bytes together."""
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
    """Join the job that torchrun has started, for as long as the context lasts; without torchrun a process is alone.

    Reads RANK, WORLD_SIZE and LOCAL_RANK. Gives this process's `Ranks` and the name of its device: of many processes
    ``auto`` and ``cuda`` give each a GPU of its own, by NCCL; on the CPU they use Gloo. A process that leaves with an
    error leaves the others with LostProcess.

    Raises TrainingError for an environment and ModelError for a device that cannot be right, and LostProcess where
    the others do not come, or a process is lost within.
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
    except dist.DistError as error:  # what NCCL reports late, somewhere else than where it was asked
        raise lost_process(error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """What torchrun's variables say; a process alone where there are none of them.

    Raises TrainingError for a set of them that cannot be right.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environment[name] for name in names if environment.get(name)}
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return Ranks()
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start the job with torchrun, which sets all of them, or unset them to train in one process"
    missing = [name for name in names if name not in given]
    if missing:
        raise TrainingError(f"the environment has {told}, but not {' and '.join(missing)}: {remedy}")
    try:
        rank, ranks, local_rank = (int(given[name]) for name in names)
    except ValueError:
        raise TrainingError(f"the environment has {told}, which are not all whole numbers: {remedy}") from None
    if not (0 <= local_rank <= rank < ranks):
        raise TrainingError(
            f"the environment has {told}, but there must be 0 ≤ LOCAL_RANK ≤ RANK < WORLD_SIZE: {remedy}"
        )
    address = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if ranks > 1 and address:
        raise TrainingError(f"the environment has {told}, but not {' and '.join(address)}: {remedy}")
    return Ranks(rank, ranks, local_rank)


def device_of(ranks: Ranks, device: str, gpus: int) -> str:
    """The device of one of many processes; a process alone has the one it was given.

    ``gpus`` is how many this machine has. Raises ModelError where processes would share a GPU, or have no device.
    """
    if ranks.ranks == 1 or device == "cpu" or (device == "auto" and gpus == 0):
        return device if ranks.ranks == 1 else "cpu"
    if device not in ("auto", "cuda"):
        raise ModelError(
            f"the device '{device}' cannot be that of each of {ranks.ranks} processes: give cuda, for a GPU for each, "
            "or cpu"
        )
    if ranks.local_rank >= gpus:
        raise ModelError(
            f"process {ranks.local_rank} of this machine has no GPU, as there are {gpus}: start no more processes than "
            "GPUs on each machine (torchrun --nproc-per-node), or give the device cpu"
        )
    return f"cuda:{ranks.local_rank}"
