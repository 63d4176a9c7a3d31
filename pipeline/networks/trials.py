"""Trial passes: what a network does in each mode, and whether its last layer makes its logits. They leave it as it was.

Not here: what is done about the answers (`models.py`, `heads.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError

SCALES = (1.0, 30.0)  # of the values that replace a layer's output: some functions change large ones alone
CLOSE = 1e-5  # relative to the largest value: rounding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode; afterwards each module has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Restore a network and all random states after a trial.

    Parameters, buffers, gradients, modes and plain attributes of all modules come back, and the states of the random
    generators of PyTorch, NumPy and Python.
    """
    tensors = [*network.parameters(), *network.buffers()]
    values = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in tensors]
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(m, _attributes(m), dict(m._parameters), dict(m._buffers)) for m in modules]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, plain, parameters, buffers in attributes:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            for name in _attributes(module).keys() - plain.keys():
                del vars(module)[name]
            vars(module).update(plain)
        with torch.no_grad():
            for tensor, value, learnt, gradient in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.requires_grad_(learnt)
                tensor.grad = gradient


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are its author's, and its mode."""
    return {name: value for name, value in vars(module).items() if name not in _OF_PYTORCH}


_OF_PYTORCH = vars(nn.Module()).keys() - {"training"}


def trial_images(samples: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return random images (samples, C, H, W) in [0, 1], without a draw from PyTorch's global generator."""
    return torch.rand(samples, *image_shape, generator=torch.Generator().manual_seed(0))


def kind_of(output: object) -> str:
    """Name an output in an error: its shape, or its type with the keys that it has."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    name = f"a {type(output).__name__}"
    return f"{name} with {', '.join(map(repr, output))}" if isinstance(output, dict) and output else name


def remedy_for(output: object, classes: int) -> str:
    """Return how a network with this output must be changed to return logits; empty where nothing particular is."""
    if isinstance(output, dict) and output:
        key = next((key for key in ("logits", "out") if key in output), next(iter(output), None))
        return f": let its forward return one tensor, such as output[{key!r}]"
    if isinstance(output, tuple | list):
        return ": let its forward return one tensor, such as output[0]"
    if not isinstance(output, Tensor):
        return ": let its forward return one tensor"
    shape = tuple(output.shape[1:])
    if shape == (1,) and classes == 2:
        return ": give each of the two classes a logit, in place of one logit for both"
    if len(shape) > 1 and shape[0] == classes:
        return ": pool and flatten the positions in its forward" if output[0, 0].numel() > 1 else ": flatten them"
    if len(shape) == 1 and shape[0] != classes:
        return ": build its last layer with num_classes outputs"
    return ""


def else_in_logits(network: nn.Module, name: str, classes: int, image_shape: tuple[int, int, int]) -> str | None:
    """Return what makes a network's logits besides the output of its layer ``name``, in words; None for nothing.

    The layer's output is replaced by one value for each class, at every position. The logits must be these values, in
    evaluation mode and in training mode, and no gradient of theirs may reach a parameter or the images. Behind a layer
    with positions, any pooling and a ReLU (SqueezeNet) may follow.

    Args:
        network: takes images (N, C, H, W) on the CPU.
        name: the name of an `nn.Linear`, an `nn.Conv2d`, or an `nn.Sequential` that ends in one.
        classes: the number of logits.
        image_shape: (C, H, W) of the images.

    Raises:
        Exception: whatever the network raises in evaluation mode. What it raises in training mode, where two images may
            be too few, is left to the trial of the training.
    """
    with undisturbed(network):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for training in (False, True):
            network.train(training)
            for scale in SCALES:
                try:
                    reason = _else_once(network, name, classes, trial_images(2, image_shape), scale)
                except Exception:
                    if not training:
                        raise
                    continue
                if reason is not None:
                    return reason + (", in training mode" if training else "")
    return None


def _else_once(network: nn.Module, name: str, classes: int, images: Tensor, scale: float) -> str | None:
    """Replace the output of the layer ``name`` in one pass, as in `else_in_logits`."""
    layer = network.get_submodule(name)
    weights, sizes = torch.rand(2, classes, generator=torch.Generator().manual_seed(1)) + 0.1
    values = torch.where(torch.arange(classes) % 2 == 0, scale, -scale) * sizes
    values = values.bfloat16().float()  # so that half precision rounds them to themselves
    ranks: list[int] = []

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        ranks.append(output.dim())
        last = module[-1] if isinstance(module, nn.Sequential) else module
        axis = 1 if isinstance(last, nn.Conv2d) else output.dim() - 1
        shape = [classes if i == axis else 1 for i in range(output.dim())]
        return values.to(output).view(shape).expand_as(output).clone()

    images.requires_grad_(True)
    hook = layer.register_forward_hook(replace)
    try:
        with torch.enable_grad():
            logits = network(images.clone())
    finally:
        hook.remove()
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
        raise ModelError(f"its output is {kind_of(logits)}")
    if not ranks:
        return f"its forward does not call '{name}'"
    others = _with_gradient(network, images, (logits.float() * weights).sum())
    if others:
        return f"{others[0]} changes them too"
    logits = logits.detach().float()
    if _is(logits, values) or (max(ranks) > 2 and _is(logits, values.relu())):
        return None
    return _what_follows(logits, values)


def _with_gradient(network: nn.Module, images: Tensor, scalar: Tensor) -> list[str]:
    """Return what a scalar depends on: the names of parameters, the last one first, or else the images."""
    if not scalar.requires_grad:
        return []
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    of_images, *gradients = torch.autograd.grad(scalar, [images, *parameters.values()], allow_unused=True)
    names = [f"'{name}'" for name, grad in zip(parameters, gradients, strict=True) if grad is not None and grad.any()]
    if not names and of_images is not None and of_images.any():
        return ["a path around it"]
    return names[::-1]


def _what_follows(logits: Tensor, values: Tensor) -> str:
    """Say which function makes the logits (N, K) of the values (K,)."""
    one, factor = torch.ones(len(logits)), (logits[0] @ values) / (values @ values)
    if logits.min() >= 0 and _is(logits.sum(1), one):
        return "a softmax follows it"
    if logits.max() <= 0 and _is(logits.exp().sum(1), one):
        return "a log-softmax follows it"
    if _is(logits, values.sigmoid()):
        return "a sigmoid follows it"
    if abs(factor) > CLOSE and _is(logits, factor * values):
        return f"it is multiplied by {factor:.4g}"
    return "something follows it or is added to it"


def _is(logits: Tensor, values: Tensor) -> bool:
    return bool((logits - values).abs().max() <= CLOSE * values.abs().max())
