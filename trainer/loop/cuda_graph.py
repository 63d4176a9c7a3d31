"""The forward and backward passes of a step, recorded once as a CUDA graph and replayed at every later step.

A student's step is some thousand small kernels, which a GPU finishes long before Python launches the next ones. Not
here: what the passes compute (`step.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from options import first_line
from trainer.stream.stream import Batch

log = logging.getLogger(__name__)

WARMUP = 3  # steps before the recording: libraries choose their kernels, and allocate memory, in the first
Passes = Callable[[Batch], dict[str, Tensor]]


class Recorded:
    """Passes that are recorded after `WARMUP` calls; a call with a batch replays the recording.

    A replay launches the same kernels on the same memory, into which the batch is copied; random numbers come from
    PyTorch's generator as it is seeded then. What the passes decide in Python is decided once, in the recording. A
    batch of other shapes is run without the recording. Passes that cannot be recorded, such as those that wait for a
    number from the device, are always run without one, and the log says so.

    Args:
        passes: takes a batch, adds gradients to ``learnt`` and returns tensors.
        learnt: the parameters that are trained.
    """

    def __init__(self, passes: Passes, learnt: Sequence[nn.Parameter]):
        self._passes, self._learnt = passes, learnt
        self._seen = 0
        self._refused = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Batch = {}  # which the recorded kernels read
        self._outputs: dict[str, Tensor] = {}  # which they write, as they do the gradients
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self._graph is None and not self._refused:
            self._seen += 1
            if self._seen <= WARMUP:
                return self._beside(batch)
            self._record(batch)
        if self._graph is None or _layout(batch) != _layout(self._inputs):
            return self._passes(batch)
        for name, values in batch.items():
            self._inputs[name].copy_(values)
        self._graph.replay()
        for parameter, gradient in zip(self._learnt, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: values.clone() for name, values in self._outputs.items()}

    def _beside(self, batch: Batch) -> dict[str, Tensor]:
        """Run the passes on a stream of their own, as PyTorch asks of those before a recording."""
        stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            outputs = self._passes(batch)
        main.wait_stream(stream)
        for values in (*outputs.values(), *(p.grad for p in self._learnt if p.grad is not None)):
            values.record_stream(main)
        return outputs

    def _record(self, batch: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        inputs = {name: values.clone() for name, values in batch.items()}
        try:
            # the threads that read the data pin memory meanwhile, which would break a recording of all threads
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self._passes(inputs)
        except RuntimeError as error:
            log.warning(
                f"a step cannot be recorded as a CUDA graph ({first_line(error)}): it runs without one, which is slower"
            )
            self._refused = True
            for parameter in self._learnt:
                parameter.grad = None
            return
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        self._gradients = [parameter.grad for parameter in self._learnt]


def _layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of each field."""
    return {name: (values.shape, values.dtype) for name, values in batch.items()}
