"""The first and the last layer of a network: which they are, and how the first takes other channels.

Not here: what replaces the last layer (`heads.py`), and where weights come from (`checkpoints.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.errors import ModelError
from pipeline.networks.trials import trial_images, undisturbed

COLOURS = 3


def last_layer(network: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last `nn.Linear` or 1×1 `nn.Conv2d` with ``num_classes`` outputs; None without any."""
    names = [name for name, module in network.named_modules() if name and outputs_of_last_layer(module) == num_classes]
    return names[-1] if names else None


def outputs_of_last_layer(module: nn.Module) -> int | None:
    """Return the number of outputs of an `nn.Linear` or a plain 1×1 `nn.Conv2d`; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        plain = (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
        return module.out_channels if plain else None
    return None


def take_channels(network: nn.Module, channels: int, size: tuple[int, int] = (224, 224)) -> str | None:
    """Change the first convolution of a network in place, so that it takes grey images in place of colours, or back.

    From 3 channels to 1 its weights are summed over the channels: a grey image then has the output that it had when it
    was repeated in 3 channels. From 1 channel to 3 they are divided by 3 and repeated. Behind a preprocessing with a
    mean and a standard deviation for each channel the sum is exact only if these are equal.

    Args:
        network: takes images of 1 or 3 channels.
        channels: the channels that it shall take.
        size: (H, W) of images that it takes. A pass tells which convolution receives them, if several could.

    Returns:
        The name of the changed convolution; None if the first convolution takes ``channels`` already.

    Raises:
        ModelError: no convolution takes 1 or 3 channels, ``channels`` is another number, or the weights are computed
            from other parameters.
    """
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convolutions.values()), None)
    if first is not None and first.in_channels == channels:
        return None
    before = COLOURS if channels == 1 else 1
    names = [name for name, conv in convolutions.items() if conv.groups == 1 and conv.in_channels == before]
    if channels not in (1, COLOURS) or not names:
        takes = "no convolution" if first is None else f"a first convolution of {first.in_channels} channels"
        raise ModelError(
            f"the network has {takes} and cannot be changed to take {channels}: only 3 channels become 1, or 1 becomes "
            "3; build it for these images"
        )
    name = names[0] if len(names) == 1 else _receives_images(network, names, before, size) or names[0]
    conv = convolutions[name]
    if parametrize.is_parametrized(conv, "weight") or not isinstance(conv.weight, nn.Parameter):
        raise ModelError(
            f"the network's first convolution '{name}' computes its weights from other parameters and cannot be "
            f"changed to take {channels} channels: build the network for these images"
        )
    weight = nn.Parameter(for_channels(conv.weight.detach(), channels), requires_grad=conv.weight.requires_grad)
    conv.weight, conv.in_channels = weight, channels
    return name


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """Return the weights (O, C, h, w) of a first convolution for 1 in place of 3 channels, or 3 in place of 1."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return (weight / COLOURS).repeat(1, COLOURS, 1, 1)


@torch.no_grad()
def _receives_images(network: nn.Module, names: list[str], channels: int, size: tuple[int, int]) -> str | None:
    """Return which of these layers receives an image first; None where the network does not take the image."""
    called: list[str] = []
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: called.append(name))
        for name in names
    ]
    try:
        with undisturbed(network):
            network.eval()(trial_images(2, (channels, *size)))
    except Exception:  # of many types: a network may need another size
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return called[0] if called else None
