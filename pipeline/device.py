"""The device: its choice, stored images and masks as tensors on it, and how a CPU keeps memory and computes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from options import first_line
from pipeline.errors import ModelError


def pick_device(name: str) -> torch.device:
    """Return a device, and prepare it.

    On the CPU the allocator is set to `keep_freed_memory`. CUDA is set to compute in full float32. By default it rounds
    the inputs of convolutions to TF32, which changes a heatmap where the rounding opens or closes a ReLU. A training
    chooses its own precision afterwards.

    Args:
        name: ``auto`` for CUDA if this machine has it and the CPU otherwise, or a device name of PyTorch's.

    Raises:
        ModelError: this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"the device '{name}' cannot be used here ({first_line(error)}): choose auto, cpu or cuda"
        ) from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        round_to_tf32(False)
    return device


def round_to_tf32(allowed: bool) -> None:
    """Set whether CUDA may round the inputs of convolutions and matrix products to TF32, in this process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether this is a CPU with instructions for products of bfloat16 matrices (AMX); False if PyTorch is too
    old to tell."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
    return device.type == "cpu" and bool(capabilities().get("amx_bf16"))


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to the device, with channels last in memory, the faster layout for convolutions."""
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy values to the device. A copy of a pinned tensor to CUDA is asynchronous."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(device, non_blocking=device.type == "cuda")


def as_input(images: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Convert stored images, uint8 (N, C, H, W), to a network's input: float32 in [0, 1], channels last in memory."""
    return to_device(images, device).to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def as_mask(masks: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Convert stored masks, uint8 (N, 1, H, W), to float32: 1 on the object, 0 on the background."""
    return to_device(masks, device).ne(0).to(torch.float32)


def keep_freed_memory() -> None:
    """Set glibc, if it is the C library, to keep large freed blocks instead of returning them to the kernel.

    Activations of some MB are freed and allocated again at every step. Without this the kernel maps and zeroes each of
    them again, which takes up to a quarter of a student's step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def small_numbers_are_zero() -> Iterator[None]:
    """Let a CPU compute with 0 in place of float32 below 1e-38, in this thread and in those that it starts meanwhile.

    In a deep network with a large ε, much of the relevance may be that small, and a CPU takes many times as long for
    it (docs/results/clip.md). PyTorch's own threads start at its first large operation.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
