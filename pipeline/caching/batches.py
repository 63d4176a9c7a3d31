"""How many samples go through a network at once: a number that was given, or the most that the memory holds.

Not here: what is done with a batch (`stage_one.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from options import Message, Option, first_line
from pipeline.errors import RelevanceError
from pipeline.private_torch import OUT_OF_MEMORY_MESSAGES

T = TypeVar("T")
BatchSize = int | Literal["auto"] | None
DEFAULT_SIZE = 128
PIXELS = 2**19  # of a batch on a CPU, where a network for photographs takes up to 4 kB of memory for a pixel


def fitting(most: int, image_shape: Sequence[int]) -> int:
    """The largest power of two in ``most`` of images (..., H, W) that have `PIXELS` pixels together; at least 1."""
    height, width = image_shape[-2:]
    return _power_of_two(min(most, PIXELS // max(1, height * width)))


def _power_of_two(most: int) -> int:
    """The largest in ``most``, and 1 at least."""
    return int(2 ** (max(1, most).bit_length() - 1))


class Batches:
    """Runs work over samples in batches of ``size``, which is halved where one is too large, unless it was ``given``.

    One of these belongs to one process and device, and is used by one thread at a time: a size that was too large once
    is not tried again.
    """

    def __init__(self, size: int, *, given: bool = True):
        self.size, self.given = size, given

    @classmethod
    def of(cls, batch_size: BatchSize, most: int, image_shape: Sequence[int], device: torch.device) -> Batches:
        """Of the size that was given; of ``auto`` on CUDA, the largest power of two in ``most``, to be halved.

        That is found to fit, or not, by the work itself, as a batch that does not fit fails soon. Elsewhere memory that
        is short is rarely reported, and more slowly had than computed with, so that ``auto`` is the default there: 128,
        and so few images that they have `PIXELS` pixels together.
        """
        if batch_size is not None and batch_size != "auto":
            return cls(batch_size)
        if device.type == "cuda":
            return cls(_power_of_two(most if batch_size == "auto" else min(most, DEFAULT_SIZE)), given=False)
        return cls(fitting(min(most, DEFAULT_SIZE), image_shape), given=False)

    def run(self, samples: int, work: Callable[[slice], T]) -> list[T]:
        """What ``work(rows)`` returns for each batch, in order; the slices are those of all samples, from 0 on.

        Where it runs out of memory it is called again, with half as many of the same samples: what it wrote elsewhere
        must be by row. Nothing of a batch that failed is alive any more when the next one begins.

        Raises RelevanceError, with the size, where the memory does not hold a batch of the size that was given, or, of
        one that may be halved, a single sample.
        """
        results, first = [], 0
        while first < samples:
            rows = slice(first, min(first + self.size, samples))
            try:
                results.append(work(rows))
                first = rows.stop
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            # behind the except clause, as the error holds on to the frames of the batch, and these to its graph
            free_memory()
            tried = rows.stop - rows.start
            if self.given:
                raise RelevanceError(
                    Message(
                        "the memory does not hold a batch of ", Option("batch_size", self.size), f" ({reason}): give ",
                        Option("batch_size", "auto"),
                        ", which finds the largest that fits, or a smaller number; the same command resumes the store",
                    )
                )  # fmt: skip
            if tried == 1:
                raise RelevanceError(
                    Message(
                        f"the memory does not hold a batch of one image, the smallest there is ({reason}): see whether "
                        "other programs use that memory, choose another ",
                        Option("device"),
                        ", or a smaller network",
                    )
                )
            self.size = _power_of_two(tried - 1)
        return results


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a batch was too large for the memory of the device."""
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in OUT_OF_MEMORY_MESSAGES)


def free_memory() -> None:
    """Let go of graphs that nobody holds, and hand the memory that they were in back to the device."""
    gc.collect()  # nodes of a graph may hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
