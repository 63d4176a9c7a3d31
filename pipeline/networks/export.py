"""A trained network as a plain PyTorch module, and as a file for other programs.

Not here: the formats (`formats.py`), and the files of our own models (`classifier.py`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from options import Message, Option, takes
from pipeline.errors import ModelError
from pipeline.networks.classifier import Classifier, load_classifier, write_whole
from pipeline.networks.formats import FORMATS, ExportOptions
from pipeline.networks.heads import AttentionPool
from pipeline.networks.homogeneous import ScaleNorm, copy_of
from pipeline.networks.models import ImageShape, error_summary
from pipeline.networks.outputs import as_returned

BATCHES = (1, 5)  # sizes that a file is checked with; it is traced with another size
TOLERANCE = 1e-3  # relative to the largest logit, as other kernels round differently


def plain(model: Classifier) -> nn.Module:
    """Copy the network of a classifier into one that needs none of our code, in evaluation mode.

    A `ScaleNorm` becomes the `nn.BatchNorm1d`, ``2d`` or ``3d`` that computes the same in evaluation mode: running mean
    0, running variance the running second moment, shift 0. A forward pass tells the number of its dimensions. An
    `AttentionPool` becomes a graph of PyTorch's own functions.

    Returns:
        The network: images (N, C, H, W) in [0, 1] → logits (N, K).

    Raises:
        ModelError: a debiasing front stands before the network, which is useless without it, or the network cannot be
            copied.
    """
    if model.debias != "none":
        raise ModelError(
            Message(
                f"this model's network stands behind the front '{model.debias}' and is useless without it: export a "
                "student, or a teacher with ",
                Option("debias", "none"),
            )
        )
    try:
        network = copy_of(model.network).eval()
    except Exception as error:
        raise ModelError(
            f"this model's network cannot be copied: {error_summary(error)}; let copy.deepcopy take it"
        ) from error
    for name, module in list(network.named_modules()):
        if isinstance(module, AttentionPool):  # as a graph of PyTorch's own, which is pickled with its code
            network.set_submodule(name, _traced(module))
    norms = {norm: _batch_norm_like(norm, rank) for norm, rank in _ranks(network, model.image_shape).items()}
    if network in norms:
        return norms[network]
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in norms:
            network.set_submodule(name, norms[module])
    return network


def _traced(pool: AttentionPool) -> torch.fx.GraphModule:
    """Trace an attention pooling, in a form that PyTorch 2.6 can pickle and export to ONNX."""
    traced = torch.fx.symbolic_trace(pool)
    for node in traced.graph.nodes:
        node.type = None  # it cannot pickle an annotation that is text
    for layer in traced.graph.find_nodes(op="call_module", target="q_proj"):  # nor export a linear layer of a slice
        with traced.graph.inserting_before(layer):
            layer.args = (traced.graph.call_method("contiguous", layer.args),)
    traced.recompile()
    return traced


def save_plain(path: str | Path, model: Classifier) -> None:
    """Write the `plain` network atomically, for ``torch.load(path, weights_only=False)``, on the CPU.

    Loading it needs PyTorch, torchvision for an architecture of torchvision's, and the module of a user's own classes.
    A network of the user's own returns what its forward returns, such as a dictionary with the logits.

    Raises:
        ModelError: as in `plain`, or the network cannot be pickled.
    """
    network = as_returned(plain(model).cpu())
    buffer = io.BytesIO()
    try:
        torch.save(network, buffer)
    except Exception as error:
        raise ModelError(
            f"this model's network cannot be pickled ({error}): define its classes and functions at the top of a module"
        ) from error
    write_whole(Path(path), buffer.getbuffer())


@takes(ExportOptions)
def export_model(model: str | Path, out: str | Path, format: str, **options: Any) -> float:
    """Write the `plain` network of a saved model to a file, for batches of any size.

    The file is read again and compared with the model on random images before it gets its name.

    Args:
        model: the folder of the model.
        out: the file, which must not exist.
        format: a name in `FORMATS`.

    Returns:
        The largest difference between the logits of the file and of the model.

    Raises:
        ModelError: the format is unknown or cannot hold the network, or the file computes other logits.
        FileExistsError: ``out`` exists.
    """
    settings = ExportOptions(model=model, out=out, format=format, **options)
    out = Path(out)
    if out.exists():
        raise FileExistsError(Message(f"{out} exists: choose another ", Option("out"), ", or remove it first"))
    classifier, config = load_classifier(model, settings.student_factory)
    network = plain(classifier)
    try:
        content = FORMATS[format].encode(network, _images(2, config.image_shape))
        run = FORMATS[format].decode(content, network)
        difference, largest = _compared(run, classifier, config.image_shape)
    except ModelError:
        raise
    except Exception as error:  # of many types: a network may do what a format cannot express
        raise ModelError(
            Message(
                f"the model {model} cannot be exported as {format}: {error_summary(error)}; try another ",
                Option("format"),
            )
        ) from error
    if not difference <= TOLERANCE * largest:
        raise ModelError(
            Message(
                f"{out} was not written: exported as {format}, the model {model} computes other logits, which differ "
                f"by up to {difference:.2g}, where the largest is {largest:.2g}; try another ",
                Option("format"),
            )
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    return difference


def _ranks(network: nn.Module, image_shape: ImageShape | None) -> dict[ScaleNorm, int]:
    """Return the number of dimensions of each `ScaleNorm`'s input in a forward pass; 4 for one that is not called."""
    ranks = {module: 4 for module in network.modules() if isinstance(module, ScaleNorm)}
    if not ranks:
        return {}
    if image_shape is None:
        raise ModelError("a ScaleNorm cannot be replaced without a trial image: give the Classifier its image_shape")

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, ScaleNorm)
        ranks[norm] = inputs[0].ndim

    hooks = [norm.register_forward_pre_hook(note) for norm in ranks]
    with torch.no_grad():
        network(_images(2, image_shape).to(next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return ranks


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@torch.no_grad()
def _batch_norm_like(norm: ScaleNorm, rank: int) -> nn.Module:
    same = _BATCH_NORMS[rank](norm.weight.numel(), norm.eps, norm.momentum).to(norm.weight)
    assert same.running_var is not None
    same.weight.copy_(norm.weight).requires_grad_(norm.weight.requires_grad)
    same.running_var.copy_(norm.running_second_moment)
    return same.eval()


def _images(samples: int, image_shape: ImageShape) -> Tensor:
    return torch.rand(samples, *image_shape, generator=torch.Generator().manual_seed(samples))


@torch.no_grad()
def _compared(run: Callable[[Tensor], Tensor], model: nn.Module, image_shape: ImageShape) -> tuple[float, float]:
    """Return the largest difference between two models' logits, and the largest logit."""
    batches = [_images(samples, image_shape) for samples in BATCHES]
    logits = [model(images) for images in batches]
    differences = [(run(images) - expected).abs().max() for images, expected in zip(batches, logits, strict=True)]
    return max(differences).item(), max(expected.abs().max() for expected in logits).item()
