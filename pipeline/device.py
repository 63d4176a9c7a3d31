"""Where tensors live: the device, how stored images become a network's input, and the allocator on a CPU."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), or any device name of PyTorch's that is usable here.

    For the CPU the allocator is told to `keep_freed_memory`. CUDA is told to compute in full float32: by itself it
    rounds what enters convolutions to TF32, which moves a heatmap where a ReLU opens or closes by it. A training
    chooses its own precision after this.

    Raises ModelError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the device '{name}' cannot be used here ({reason}): choose auto, cpu or cuda") from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        round_to_tf32(False)
    return device


def round_to_tf32(allowed: bool) -> None:
    """Whether CUDA may round what enters convolutions and matrix products to TF32, in this process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to the device, channels last in memory, which is the faster layout for convolutions."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """On the device; the caller does not wait for the copy where the tensor is pinned and the device is CUDA."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(device, non_blocking=device.type == "cuda")


def as_input(images: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Stored images uint8 (N, C, H, W) as a network's input: float32 in [0, 1], channels last in memory."""
    return to_device(images, device).to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def as_mask(masks: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Stored masks uint8 (N, 1, H, W) as float32: 1 on the object, 0 on the background."""
    return to_device(masks, device).ne(0).to(torch.float32)


def keep_freed_memory() -> None:
    """Tell glibc not to hand large freed blocks back to the kernel, where the C library is glibc.

    Activations of some MB are freed and allocated again at every step; without this each of them is mapped
    and zeroed anew, which takes up to a quarter of a student's step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
