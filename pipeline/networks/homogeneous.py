"""Positively homogeneous networks: no additive term anywhere, so that a heatmap accounts for its whole logit.

No heatmap ``x · G`` shows the part of a logit that a bias or the shift of a batch norm adds, and a student that learns
from heatmaps is free to get that part wrong. Without such terms ``f(c·x) = c·f(x)`` for c > 0, relevance is conserved,
and the student inherits the outputs with the explanation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pipeline.networks.trials import evaluating
from pipeline.private_torch import BatchNormBase
from pipeline.rules import scale_norm


class ScaleNorm(nn.Module):
    """Scale-only norm over the batch: ``x · γ / sqrt(E[x²] + eps)``, with running second moments for evaluation.

    It is a batch norm without its mean and shift: (N, C, ...) → the same shape.
    """

    running_second_moment: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_second_moment", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return scale_norm(x, self.weight, self.running_second_moment, self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}"


NORMS = (BatchNormBase, ScaleNorm)  # over the batch


@dataclass(frozen=True)
class BiasFreeReport:
    """The names of the modules that `bias_free` ``changed``, and of those that it ``could_not``, with their type."""

    changed: tuple[str, ...]
    could_not: tuple[str, ...]


def bias_free(model: nn.Module) -> tuple[nn.Module, BiasFreeReport]:
    """Copy a ReLU network into its positively homogeneous form.

    Convolutions and linear layers lose their bias, and batch norms become `ScaleNorm` with the same γ. Other modules
    stay as they are. PyTorch's attention and transformer modules read the biases of their linear layers: those biases
    become zeros that are no parameters and not saved. Parametrised weights (`weight_norm`, `spectral_norm`, pruning)
    are weights, and parametrised biases go with their parameters. The report lists the modules that break homogeneity
    or have parameters of their own. It cannot list an activation that a ``forward`` calls as a function;
    `homogeneity_error` measures that.

    Returns:
        The copy, and the report.
    """
    model = copy_of(model)
    norms = {module: scale_norm_like(module) for module in model.modules() if isinstance(module, BatchNormBase)}
    if model in norms:
        return norms[model], BiasFreeReport((f"{type(model).__name__} to ScaleNorm",), ())
    changed, could_not = [], []
    read = {layer for module in model.modules() for layer in _layers_whose_bias_is_read(module)}
    of_weights = _parametrizations(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in norms:
            model.set_submodule(name, norms[module])
            changed.append(f"{name}: {type(module).__name__} to ScaleNorm")
        elif isinstance(module, WITH_BIAS):
            if module.bias is not None and "bias" not in module._buffers:
                zeros = torch.zeros_like(module.bias.detach())
                changed.append(f"{name}: bias removed from {type(module).__name__}")
                _remove_bias(module)
                if module in read:
                    del module.bias
                    module.register_buffer("bias", zeros, persistent=False)
        elif module in of_weights:
            continue
        elif isinstance(module, _NOT_HOMOGENEOUS) or list(module.parameters(recurse=False)):
            could_not.append(f"{name} ({type(module).__name__})")
    return model, BiasFreeReport(tuple(changed), tuple(could_not))


def _layers_whose_bias_is_read(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module whose fast path of evaluation reads their bias, and fails if it is None (pytorch
    issues 116385 and 143293)."""
    if isinstance(module, nn.MultiheadAttention):
        return [module.out_proj]
    return [module.linear1, module.linear2] if isinstance(module, nn.TransformerEncoderLayer) else []


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a network, also one whose weights a hook computes from others (older weight norms, pruning)."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def _parametrizations(model: nn.Module) -> set[nn.Module]:
    """Return the modules that compute the weights of layers without an additive term of their own."""
    layers = [layer for layer in model.modules() if isinstance(layer, WITH_BIAS) and parametrize.is_parametrized(layer)]
    return {part for layer in layers for part in layer.get_submodule("parametrizations").modules()}


def _remove_bias(layer: nn.Module) -> None:
    """Remove the bias of a layer, whether it is a parameter or computed from others."""
    if parametrize.is_parametrized(layer, "bias"):
        shared = type(layer)  # with the layer that this one is a copy of, which keeps its bias
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(layer, "bias")
    elif "bias_orig" in layer._parameters:
        prune.remove(layer, "bias")
    layer.register_parameter("bias", None)


def scale_norm_like(norm: nn.Module) -> ScaleNorm:
    """Return a scale-only norm with the width, γ, momentum, mode, dtype, device and statistics of a batch norm.

    Its running E[x²] is the variance plus the square of the mean, which is exact as long as no layer before it changes.
    """
    assert isinstance(norm, BatchNormBase)
    scale = ScaleNorm(norm.num_features, norm.eps, norm.momentum or 0.1).train(norm.training)
    for tensor in (norm.weight, norm.running_var):
        if tensor is not None:
            scale.to(tensor)
    if norm.weight is not None:
        scale.weight.data.copy_(norm.weight.data)
        scale.weight.requires_grad_(norm.weight.requires_grad)
    if norm.running_mean is not None and norm.running_var is not None:
        scale.running_second_moment.copy_(norm.running_var + norm.running_mean.square())
    return scale


WITH_BIAS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Bilinear,
)
_NOT_HOMOGENEOUS = (
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.SELU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Softplus,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.MultiheadAttention,
)


@torch.no_grad()
def homogeneity_error(model: nn.Module, images: Tensor) -> float:
    """Return max |f(2·x) − 2·f(x)| / max |2·f(x)| in evaluation mode: 0 up to rounding for a homogeneous network.

    Args:
        model: images → logits.
        images: floating (N, C, H, W).
    """
    with evaluating(model):
        twice, doubled = model(2 * images), 2 * model(images)
    return float((twice - doubled).abs().max() / doubled.abs().max().clamp_min(torch.finfo(images.dtype).tiny))
