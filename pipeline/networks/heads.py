"""The last layer of a teacher as a store keeps it, and its frozen copy in a student.

Not here: the layers in front of it (`models.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from options import Message, Option
from pipeline.errors import ModelError
from pipeline.networks.class_map import MappedClasses
from pipeline.networks.layers import last_layer, outputs_of_last_layer
from pipeline.networks.models import error_summary
from pipeline.networks.sources import ImageShape
from pipeline.networks.trials import else_in_logits, evaluating

log = logging.getLogger(__name__)

POOL = "pool."  # prefix of the names of an attention pooling's arrays
POOL_HEADS = POOL + "heads"


@dataclass(frozen=True)
class PoolSpec:
    """The sizes of an `AttentionPool`, which takes maps (N, channels, side, side)."""

    side: int
    channels: int
    heads: int
    outputs: int


@dataclass(frozen=True)
class HeadSpec:
    """The form of the frozen last layer that a student copies from a teacher.

    Attributes:
        features: its input width.
        bias: whether it has a bias.
        normalised: whether its input is divided by its L2 norm first, as before CLIP's text embeddings.
        pool: the teacher's attention pooling in front of both, if it is copied too.
    """

    features: int
    bias: bool
    normalised: bool = False
    pool: PoolSpec | None = None

    @classmethod
    def of(cls, head: Mapping[str, np.ndarray], *, with_pool: bool = False) -> HeadSpec:
        """Return the form of the arrays of `head_arrays`; ``with_pool`` includes their attention pooling.

        Raises:
            ModelError: there is no attention pooling among them.
        """
        weight = head["weight"]
        pool = None
        if with_pool:
            if POOL_HEADS not in head:
                raise ModelError(
                    Message(
                        Option("head", "attention-pool"),
                        " needs a teacher that pools by attention, as the ResNets of CLIP do, and this one does not: "
                        "give ",
                        Option("head", "frozen"),
                    )
                )
            positions, channels = head[POOL + "positional_embedding"].shape
            outputs = len(head[POOL + "c_proj.weight"])
            pool = PoolSpec(round((positions - 1) ** 0.5), channels, int(head[POOL_HEADS].item()), outputs)
        return cls(weight.shape[1], "bias" in head, "norm" in head, pool)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSpec:
        """Build it from the fields of a ``config.json``.

        Raises:
            TypeError: a field is unknown or missing.
        """
        pool = dict(values).get("pool")
        return cls(**{**values, "pool": None if pool is None else PoolSpec(**pool)})


class AttentionPool(nn.Module):
    """The attention pooling of CLIP's ResNets: (N, channels, side, side) → (N, outputs).

    The mean over positions is one more position, and the query (Radford et al., ICML 2021, section 2.4). Parameters
    have the names that OpenAI and open_clip give them, so that their values load.
    """

    def __init__(self, side: int, channels: int, heads: int, outputs: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (N, positions, channels)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        of_heads = [
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, positions, channels of a head)
            for layer, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        ]
        return self.c_proj(F.scaled_dot_product_attention(*of_heads).transpose(1, 2).flatten(1))


def l2_norm(features: int) -> nn.RMSNorm:
    """Return the frozen division of (N, features) by the L2 norm, as PyTorch's RMS norm with a weight of 1/√features.

    For relevance the norm is a constant, as every denominator is (AttnLRP, ICML 2024, prop. 3.4).
    """
    norm = nn.RMSNorm(features, eps=1e-24)
    nn.init.constant_(norm.weight, features**-0.5)
    return norm.requires_grad_(False)


def head_arrays(network: nn.Module, classes: int) -> dict[str, np.ndarray]:
    """Return the last layer of a teacher's network, as float32 arrays.

    Args:
        network: the teacher's network.
        classes: the number K of its logits.

    Returns:
        ``weight`` (K, F), and ``bias`` (K,) if the layer has one. If a norm stands directly in front of it in an
        `nn.Sequential`, as `l2_norm` does, also ``norm`` (F,), the factor of features that are divided by their RMS. If
        the network has a module ``attnpool`` with CLIP's parameters, also these, with the prefix ``pool.``, and the
        number of its heads. Empty if the network does not end in a linear layer or a 1×1 convolution.
    """
    name = last_layer(network, classes)
    if name is None:
        return {}
    head = network.get_submodule(name)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    arrays: dict[str, Any] = {"weight": head.weight.flatten(1), "bias": head.bias}
    parent = network.get_submodule(name.rpartition(".")[0])
    before = [module for module in parent.children() if isinstance(parent, nn.Sequential)][-2:-1]
    if before and isinstance(before[0], nn.RMSNorm):
        arrays["norm"] = before[0].weight
    for module_name, module in network.named_modules():
        if module_name.rpartition(".")[2] == "attnpool" and hasattr(module, "c_proj"):
            arrays |= {POOL + key: value for key, value in module.state_dict().items()}
            arrays[POOL_HEADS] = torch.tensor([getattr(module, "num_heads", getattr(module, "heads", 1))])
    return {key: value.detach().float().cpu().numpy() for key, value in arrays.items() if value is not None}


def head_parameters(network: nn.Module, classes: int) -> list[str]:
    """Return the names of the parameters of the last layer, also of pooled classes; none without one."""
    if isinstance(network, MappedClasses):
        return [f"network.{name}" for name in head_parameters(network.network, network.classes)]
    name = last_layer(network, classes)
    return [] if name is None else [f"{name}.{key}" for key in network.get_submodule(name).state_dict()]


def decisive_head(network: nn.Module, classes: int, image_shape: ImageShape) -> dict[str, np.ndarray]:
    """Return `head_arrays` of a teacher on the CPU; nothing, with a log line, if it does not make the logits alone."""
    head, name = head_arrays(network, classes), last_layer(network, classes)
    besides = None if name is None else else_in_logits(network, name, classes, image_shape)
    if besides is None:
        return head
    log.warning(
        f"the teacher's last layer '{name}' does not make its logits alone ({besides}), so that a copy of it would not "
        "decide a student's: the store has none, and students learn a last layer of their own"
    )
    return {}


def copy_head(network: nn.Module, head: Mapping[str, np.ndarray]) -> None:
    """Copy the teacher's values, the arrays of `head_arrays`, into the frozen layers of `attach_head`."""
    name = last_layer(network, len(head["weight"]))
    assert name is not None  # attach_head put it there
    layer = network.get_submodule(name)
    state = layer.state_dict()
    layer.load_state_dict({key: torch.from_numpy(head[key]).view_as(value) for key, value in state.items()})
    for pool in (module for module in network.modules() if isinstance(module, AttentionPool)):
        pool.load_state_dict({key: torch.from_numpy(head[POOL + key]) for key in pool.state_dict()})


def attach_head(
    network: nn.Module,
    head: HeadSpec,
    num_classes: int,
    image_shape: ImageShape,
    *,
    adapter_bias: bool,
    to_train: bool = True,
) -> None:
    """Replace the last layer of a network by a frozen layer of the teacher's shape and the network's own kind.

    If the network's feature width differs, a learnt adapter stands in front of the frozen layer, and an
    `nn.Sequential` of both replaces the last layer. The adapter is a 1×1 convolution in front of a convolution. In
    front of a linear layer that takes a flattened map of several positions it is a 1×1 convolution on these positions,
    if the teacher's width is a multiple of their number. Otherwise it is a linear layer. (Behind global average pooling
    a 1×1 convolution in front of the pooling is the same function as that linear layer, at a higher cost.)

    If the head's features are normalised, the division by their norm stands between adapter and frozen layer. If the
    head has a ``pool``, that replaces the network's last adaptive average pooling: a learnt 1×1 convolution to the
    pooling's channels, average pooling or repetition to its side, and the frozen pooling (Bassi et al., arXiv
    2407.09788, for CLIP's ResNets).

    Args:
        network: the student's network, changed in place.
        head: the form of the teacher's last layer.
        num_classes: number of logits.
        image_shape: (C, H, W) of the images.
        adapter_bias: whether the adapter has a bias.
        to_train: the network is to be trained. The frozen layer must then make its logits: nothing but pooling may
            follow.

    Raises:
        ModelError: the network does not end in a linear layer or a 1×1 convolution, lacks the pooling to replace, fails
            with another module in that place, or computes other logits than that layer.
    """
    name = _replaceable_layer(network, head, num_classes, image_shape)
    _replace_last_layer(network, name, head, num_classes, image_shape, adapter_bias)
    try:
        _pass(network, image_shape)
        besides = else_in_logits(network, name, num_classes, image_shape) if to_train else None
    except Exception as error:
        raise _head_error(
            f"this student does not work with the teacher's last layer in place of its own '{name}' "
            f"({error_summary(error)}): its forward must only call '{name}', or let the student keep its own"
        ) from error
    if besides is not None:
        raise _head_error(
            f"this student's last layer '{name}' does not make its logits alone ({besides}), so that the teacher's "
            f"layer in its place would not decide them: return the output of '{name}', or let the student keep its own"
        )


def _replaceable_layer(network: nn.Module, head: HeadSpec, num_classes: int, image_shape: ImageShape) -> str:
    """Return the name of the last layer, or raise ModelError if the teacher's layer cannot replace it."""
    name = last_layer(network, num_classes)
    if name is None:
        raise _head_error(
            f"this student ends in neither a linear layer nor a 1×1 convolution with {num_classes} outputs, so the "
            "teacher's last layer cannot replace it: choose another network, such as small-cnn or resnet18, or let "
            "the student keep its own"
        )
    own = network.get_submodule(name)
    if _run_last(network, num_classes, image_shape) not in (own, None):
        raise _head_error(
            f"this student's layers with {num_classes} outputs run in another order than they are registered in, so it "
            f"is not clear that '{name}' is its last: register the last one last in __init__, or let the student keep "
            "its own"
        )
    if head.normalised and isinstance(own, nn.Conv2d):
        raise _head_error(
            "this student ends in a 1×1 convolution, but the teacher's last layer takes features that are pooled and "
            "then normalised: choose another network, such as small-cnn or resnet18, or let the student keep its own"
        )
    return name


def _head_error(text: str) -> ModelError:
    """Return an error whose remedy is a last layer of the student's own."""
    return ModelError(Message(f"{text} (", Option("head", "free"), ")"))


def _replace_last_layer(
    network: nn.Module, name: str, head: HeadSpec, num_classes: int, image_shape: ImageShape, adapter_bias: bool
) -> None:
    """Put the adapter, the norm and the frozen layer in place of the layer ``name``, and the pooling in its place."""
    own = network.get_submodule(name)
    if head.pool is not None:
        adapter: nn.Module | None = None
        frozen: nn.Module = nn.Linear(head.features, num_classes, bias=head.bias)
        _attach_pool(network, own, head.pool, image_shape, adapter_bias)
    else:
        adapter, frozen = _adapter_and_head(network, own, head, num_classes, image_shape, adapter_bias)
    frozen.requires_grad_(False)
    parts = [adapter, l2_norm(head.features) if head.normalised else None, frozen]
    layers = [part for part in parts if part is not None]
    network.set_submodule(name, nn.Sequential(*layers) if len(layers) > 1 else frozen)


def _attach_pool(
    network: nn.Module, own: nn.Module, pool: PoolSpec, image_shape: ImageShape, adapter_bias: bool
) -> None:
    """Replace the adaptive average pooling in front of the layer ``own`` by an adapter and an `AttentionPool`."""
    poolings: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: poolings.append((name, inputs[0])))
        for name, module in network.named_modules()
        if isinstance(module, nn.AdaptiveAvgPool2d) and name
    ]
    _pass(network, image_shape)
    for hook in hooks:
        hook.remove()
    if not isinstance(own, nn.Linear) or not poolings:
        raise ModelError(
            Message(
                "this student has no adaptive average pooling (nn.AdaptiveAvgPool2d) in front of a last linear layer "
                "that the teacher's attention pooling could replace: give ",
                Option("head", "frozen"),
                ", or choose another network, such as small-cnn, small-resnet or resnet18",
            )
        )
    name, pool_input = poolings[-1]
    frozen = AttentionPool(pool.side, pool.channels, pool.heads, pool.outputs).requires_grad_(False)
    adapter = nn.Conv2d(pool_input.shape[1], pool.channels, 1, bias=adapter_bias)
    network.set_submodule(name, nn.Sequential(adapter, nn.AdaptiveAvgPool2d(pool.side), frozen))


def _adapter_and_head(
    network: nn.Module, own: nn.Module, head: HeadSpec, num_classes: int, image_shape: ImageShape, adapter_bias: bool
) -> tuple[nn.Module | None, nn.Module]:
    """Return the adapter, if the layer ``own`` has another input width than the head, and the layer to freeze."""
    if isinstance(own, nn.Conv2d):
        frozen: nn.Module = nn.Conv2d(head.features, num_classes, 1, bias=head.bias)
        if own.in_channels == head.features:
            return None, frozen
        return nn.Conv2d(own.in_channels, head.features, 1, bias=adapter_bias), frozen
    assert isinstance(own, nn.Linear)
    frozen = nn.Linear(head.features, num_classes, bias=head.bias)
    if own.in_features == head.features:
        return None, frozen
    channels, height, width = _flattened_map(network, own, image_shape)
    positions = height * width
    if positions > 1 and head.features % positions == 0:
        convolution = nn.Conv2d(channels, head.features // positions, 1, bias=adapter_bias)
        return nn.Sequential(nn.Unflatten(1, (channels, height, width)), convolution, nn.Flatten()), frozen
    return nn.Linear(own.in_features, head.features, bias=adapter_bias), frozen


def _flattened_map(network: nn.Module, layer: nn.Linear, image_shape: ImageShape) -> ImageShape:
    """Return (C, h, w) of the flattened map that a layer takes in a forward pass; (in_features, 1, 1) without one."""
    layer_inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: layer_inputs.extend(inputs))
    with _Flattenings(layer.in_features) as flattenings:
        _pass(network, image_shape)
    hook.remove()
    for flat, shape in reversed(flattenings.maps):
        if any(torch.equal(flat, x) for x in layer_inputs):
            return shape
    return layer.in_features, 1, 1


def _run_last(network: nn.Module, num_classes: int, image_shape: ImageShape) -> nn.Module | None:
    """Return the layer with ``num_classes`` outputs that a forward pass calls last."""
    called: list[nn.Module] = []
    candidates = [module for module in network.modules() if outputs_of_last_layer(module) == num_classes]
    hooks = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in candidates]
    _pass(network, image_shape)
    for hook in hooks:
        hook.remove()
    return called[-1] if called else None


@torch.no_grad()
def _pass(network: nn.Module, image_shape: ImageShape) -> Tensor:
    """Return the logits of two images in evaluation mode; the modes and PyTorch's random state stay as they are."""
    with evaluating(network):
        logits: Tensor = network(torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)))
    return logits


class _Flattenings(TorchFunctionMode):
    """Records each tensor (N, features) that a change of shape alone makes of an (N, C, h, w), and its (C, h, w)."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.maps: list[tuple[Tensor, ImageShape]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RESHAPES and output.ndim == 2 and output.shape[1] == self.features:
            batch, *shape = (*args, *(kwargs or {}).values())[0].shape
            if len(shape) == 3 and batch == len(output):
                self.maps.append((output, (shape[0], shape[1], shape[2])))
        return output


_RESHAPES = {torch.flatten, torch.reshape, Tensor.flatten, Tensor.reshape, Tensor.view}
