"""A training step's forward and backward passes, recorded once as a CUDA graph and replayed at every step after.

A student's step is some thousand small kernels, which a GPU is through with long before Python has asked for the next
ones. Not here: what a step does (`training.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.stream.stream import Batch

log = logging.getLogger(__name__)

WARMUP = 3  # steps that are run as they are: libraries choose their kernels, and take their memory, at the first
Passes = Callable[[Batch], dict[str, Tensor]]


class Recorded:
    """Calls ``passes(batch)``, which leaves gradients with ``learnt`` and returns tensors, of which it keeps a record.

    A replay launches the same kernels on the same memory with another batch in place; random numbers are those of
    PyTorch's generator as it is seeded then. What the passes decide in Python is decided once, in the recording. A
    batch of other shapes is run as it is, and so are all if the passes cannot be recorded, as where they wait for a
    number from the device; the log says so.
    """

    def __init__(self, passes: Passes, learnt: Sequence[nn.Parameter]):
        self._passes, self._learnt = passes, learnt
        self._seen = 0
        self._refused = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: Batch = {}  # what the recorded kernels read, and what they write
        self._found: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self._graph is None and not self._refused:
            self._seen += 1
            if self._seen <= WARMUP:
                return self._beside(batch)
            self._record(batch)
        if self._graph is None or _layout(batch) != _layout(self._given):
            return self._passes(batch)
        for name, values in batch.items():
            self._given[name].copy_(values)
        self._graph.replay()
        for parameter, gradient in zip(self._learnt, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: values.clone() for name, values in self._found.items()}

    def _beside(self, batch: Batch) -> dict[str, Tensor]:
        """The passes on a stream of their own, as PyTorch asks of those before a recording."""
        stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            found = self._passes(batch)
        main.wait_stream(stream)
        for values in (*found.values(), *(p.grad for p in self._learnt if p.grad is not None)):
            values.record_stream(main)
        return found

    def _record(self, batch: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        given = {name: values.clone() for name, values in batch.items()}
        try:
            # the threads that read the data pin memory meanwhile, which would end a recording that all threads share
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = self._passes(given)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning(f"a step cannot be recorded as a CUDA graph ({reason}), which is faster: it is run as it is")
            self._refused = True
            for parameter in self._learnt:
                parameter.grad = None
            return
        self._graph, self._given, self._found = graph, given, found
        self._gradients = [parameter.grad for parameter in self._learnt]


def _layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (values.shape, values.dtype) for name, values in batch.items()}
