"""Additive terms that fade out while a pretrained network is trained, until it is the bias-free form of itself.

Removed at once, they take what the weights know with them: no layer gets the inputs that it was trained for. Faded out
over many steps, the layers adapt. Not here: the bias-free form (`homogeneous.py`), and when terms fade
(`trainer.loop.training`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.networks.homogeneous import WITH_BIAS, ScaleNorm, copy_of, scale_norm_like
from pipeline.networks.preprocessing import Preprocess
from pipeline.networks.processes import Processes
from pipeline.private_torch import BatchNormBase
from pipeline.rules.batch_norm import fading_norm, scale_norm


class FadingNorm(ScaleNorm):
    """A batch norm that becomes a `ScaleNorm`: γ · z / sqrt(E[z²] + eps) + r·β with z = x − r·μ, (N, C, ...).

    r is ``remaining``: at 1 this is the batch norm, at 0 the `ScaleNorm`. Its names in a ``state_dict`` are those of
    the `ScaleNorm`, and ``bias``, ``running_mean`` and ``remaining`` besides. For relevance r·μ and r·β are constants.
    """

    running_mean: Tensor
    remaining: Tensor
    processes: Processes | None = None
    has_faded = False  # remaining == 0, which on a GPU would have to wait for the device

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("remaining", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        together = self.processes if self.processes is not None and self.processes.count > 1 else None
        options = (self.running_second_moment, self.training, self.momentum, self.eps, together)
        if self.has_faded:
            return scale_norm(x, self.weight, *options)
        return fading_norm(x, self.weight, self.bias, self.running_mean, self.remaining, *options)


class _Fading(nn.Module):
    """The parametrization of a bias that fades out."""

    remaining: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("remaining", torch.ones(()))

    def forward(self, bias: Tensor) -> Tensor:
        return self.remaining * bias


def fading(model: nn.Module) -> nn.Module:
    """Copy a network into a form that computes the same, and whose additive terms `set_remaining` fades out.

    It fades what `bias_free` removes: the shifts and means of batch norms, and the biases of convolutions and linear
    layers. Biases that other parametrizations compute are left as they are.
    """
    model = copy_of(model)
    layers = list(model.modules())  # each once, also one that the network has under several names
    norms = {module: _fading_norm_like(module) for module in layers if isinstance(module, BatchNormBase)}
    if model in norms:
        return norms[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in norms:
            model.set_submodule(name, norms[module])
    for module in layers:
        if isinstance(module, WITH_BIAS) and module._parameters.get("bias") is not None:
            parametrize.register_parametrization(module, "bias", _Fading())
    return model


def set_remaining(model: nn.Module, share: float) -> None:
    """Set the share of the additive terms that remains, in [0, 1], in all modules of a network of `fading`."""
    for module in model.modules():
        if isinstance(module, FadingNorm | _Fading):
            module.remaining.fill_(share)
            if isinstance(module, FadingNorm):
                module.has_faded = share == 0
        elif isinstance(module, Preprocess) and module.fading_mean is not None:
            module.mean.copy_(share * module.fading_mean)


def bias_free_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the bias-free form that a network of `fading` becomes; of others their own."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FadingNorm):
            added: tuple[str, ...] = ("bias", "running_mean", "remaining")
        elif isinstance(module, WITH_BIAS) and _fades(module):
            added = ("parametrizations.bias.original", "parametrizations.bias.0.remaining")
        else:
            continue
        for key in added:
            del state[f"{name}.{key}" if name else key]
    return state


def _fades(layer: Any) -> bool:
    return parametrize.is_parametrized(layer, "bias") and isinstance(layer.parametrizations.bias[0], _Fading)


def _fading_norm_like(norm: nn.Module) -> FadingNorm:
    """Return a norm that computes what a batch norm computes."""
    assert isinstance(norm, BatchNormBase)
    scale = scale_norm_like(norm)
    fade = FadingNorm(norm.num_features, norm.eps, norm.momentum or 0.1).to(scale.weight).train(norm.training)
    fade.weight = scale.weight
    if norm.bias is not None:
        fade.bias.data.copy_(norm.bias.data)
    if norm.running_mean is not None and norm.running_var is not None:
        fade.running_mean.copy_(norm.running_mean)
        fade.running_second_moment.copy_(norm.running_var)
    return fade
