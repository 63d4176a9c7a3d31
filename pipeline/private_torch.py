"""The private and undocumented parts of PyTorch that this project uses; other modules import them from here.

A comment says why each is needed. It works in every release that setup.cfg allows, unless the comment names another
one. `tests/test_private_torch.py` tests each by name, so a release of PyTorch that changes one fails there first.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.data._utils import collate as _collate

# ATen's operators, which our own autograd functions call. The backward operators have no public functions, and the
# public forward functions dispatch a second time, or do not return the statistics. Those of `torch` itself are not
# documented; their calls take half the time of the same operators in `torch.ops`.
aten_convolution: Any = torch.convolution
convolution_backward: Any = torch.ops.aten.convolution_backward
threshold_backward: Any = torch.ops.aten.threshold_backward
silu_backward: Any = torch.ops.aten.silu_backward
hardswish_backward: Any = torch.ops.aten.hardswish_backward
hardtanh_backward: Any = torch.ops.aten.hardtanh_backward
gelu_backward: Any = torch.ops.aten.gelu_backward
native_batch_norm: Any = torch.native_batch_norm
native_layer_norm: Any = torch.native_layer_norm
native_batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward
batch_norm_update_stats: Any = torch.ops.aten.batch_norm_update_stats

# A reshape whose result is no view for autograd, so that the output of our own autograd function may be changed in
# place. All public reshapes return views.
unsafe_view: Any = torch.ops.aten._unsafe_view

# The number of the backward pass that runs in this thread, or -1. No public function tells apart two backward passes
# through one graph.
current_backward_pass: Any = torch._C._current_graph_task_id

# The base class of all norms over the batch, those of other libraries too. The public classes share no public base.
# `_check_input_dim` of a derived class checks the number of dimensions of the input.
BatchNormBase = nn.modules.batchnorm._BatchNorm

# Names of autograd nodes that return their input. `DistributedDataParallel` adds this one to the graph behind a model.
NODES_THAT_RETURN_THEIR_INPUT = frozenset({"_DDPSinkBackward"})

# Parts of messages: a library beneath PyTorch, or the C library, has no memory left. PyTorch then raises a plain
# RuntimeError. Only CUDA's allocator raises torch.OutOfMemoryError.
OUT_OF_MEMORY_MESSAGES = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)

# The collate function of a DataLoader and its table of types. PyTorch documents both, in this private module.
collate: Any = _collate.collate
default_collate_fn_map: dict[Any, Any] = _collate.default_collate_fn_map

# The first words of the plain ValueError that a batch norm in training raises for a single value in each channel.
ONE_VALUE_PER_CHANNEL_MESSAGE = "Expected more than 1 value per channel"


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Return whether hooks are registered on a tensor (`Tensor.register_hook`). No public attribute tells."""
    return bool(tensor._backward_hooks)


def compiler_is_loaded() -> bool:
    """Return whether PyTorch's compiler is imported, without which nothing is compiled. That import takes a second or
    two, and `torch.compiler` has no function that tells without it."""
    return "torch._dynamo" in sys.modules


def is_view(tensor: Tensor) -> bool:
    """Return whether a tensor is a view for autograd, as the output of `F.linear` is in some releases."""
    return tensor._is_view()


def base_of(view: Tensor) -> Tensor | None:
    """Return the tensor whose memory a view shows; None for other tensors. An in-place operation on a view changes the
    place of its base in the graph, and autograd then makes new nodes for the base and for all of its views."""
    return view._base


def running_checkpoint() -> Any:
    """Find the innermost checkpointed block (`torch.utils.checkpoint`, not reentrant) that this thread runs forward.

    The backward pass calls the block's attribute ``recompute_fn``, which may be replaced. The public alternative,
    ``context_fn``, belongs to the caller of `checkpoint`. PyTorch 2.8 and later tell by the hooks for saved tensors.
    Earlier releases do not, so that the block is looked up on the stack.

    Returns:
        The block, which takes new attributes, or None outside of one.
    """
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top_hooks is None:
        return _checkpoint_on_the_stack()
    hooks = top_hooks(True)
    cells = getattr(hooks[0], "__closure__", None) if hooks else None
    return next((cell.cell_contents for cell in cells or () if hasattr(cell.cell_contents, "recompute_fn")), None)


def saved_tensors_go_elsewhere() -> bool:
    """Return whether hooks take the tensors that autograd saves in this thread, such as those of a checkpointed block
    or of `torch.autograd.graph.save_on_cpu`; in PyTorch up to 2.7, whether it is a checkpointed block."""
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return running_checkpoint() is not None if top_hooks is None else bool(top_hooks(True))


def _checkpoint_on_the_stack() -> Any:
    """Find the block as a local variable of the generator that `checkpoint` runs, in PyTorch up to 2.7."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            generator = frame.f_locals.get("gen")
            if generator is not None and generator.gi_frame is not None:
                return generator.gi_frame.f_locals.get("new_frame")
        frame = frame.f_back
    return None
