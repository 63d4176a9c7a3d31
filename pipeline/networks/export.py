"""A trained network as plain PyTorch, and in the formats that other programs read.

Not here: how we keep our own models, which is `classifier.py`.
"""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.networks.classifier import Classifier, load_classifier, write_whole
from pipeline.networks.heads import AttentionPool
from pipeline.networks.homogeneous import ScaleNorm
from pipeline.networks.models import ImageShape, ModelError

BATCHES = (1, 5)  # on which a file is checked: not the size that it is traced with
TOLERANCE = 1e-3  # of the largest logit; other kernels round otherwise


def plain(model: Classifier) -> nn.Module:
    """A copy of the network in evaluation mode that needs nothing of ours: images (N, C, H, W) in [0, 1] → (N, K).

    A `ScaleNorm` becomes the `nn.BatchNorm1d`, ``2d`` or ``3d``, by what it is given in a pass of an image, that is
    the same function in evaluation mode: running mean 0, running variance the running second moment, shift 0. An
    `AttentionPool` becomes a graph of PyTorch's own functions.

    Raises ModelError for a network behind a debiasing front, whose logits are not the network's alone, and for one
    that cannot be copied.
    """
    if model.debias != "none":
        raise ModelError(
            f"this model's network stands behind the front '{model.debias}' and is nothing without it: students, and "
            "teachers with --debias none, can be taken out"
        )
    try:
        network = copy.deepcopy(model.network).eval()
    except Exception as error:
        raise ModelError(f"this model's network cannot be copied: {type(error).__name__}: {error}") from error
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
    """Write the `plain` network, whole or not at all, for ``torch.load(path, weights_only=False)``, on the CPU.

    Who loads it needs PyTorch, torchvision for its architectures, and the module of a factory's own classes.
    Raises ModelError as `plain`, and for a network of classes that cannot be pickled.
    """
    network = plain(model).cpu()
    buffer = io.BytesIO()
    try:
        torch.save(network, buffer)
    except Exception as error:
        raise ModelError(
            f"this model's network cannot be pickled ({error}): define its classes and functions at the top of a module"
        ) from error
    write_whole(Path(path), buffer.getbuffer())


def export_model(model: str | Path, out: str | Path, form: str, *, student_factory: str | None = None) -> float:
    """Write the `plain` network of a saved model to a file in one of `FORMATS`, with a batch of any size.

    The file is read back and compared with the model on some random images before it is put in place. Returns the
    largest difference between their logits. ``student_factory`` as in `load_classifier`.

    Raises ModelError where the network does not fit the format, or the file computes something else than the model,
    and FileExistsError.
    """
    if form not in FORMATS:
        raise ModelError(f"unknown --format '{form}': choose one of {', '.join(FORMATS)}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    classifier, config = load_classifier(model, student_factory)
    network = plain(classifier)
    try:
        content = FORMATS[form].encode(network, _images(2, config.image_shape))
        run = FORMATS[form].decode(content, network)
        difference, largest = _compared(run, classifier, config.image_shape)
    except ModelError:
        raise
    except Exception as error:  # of many kinds: whatever a network does that a format has no words for
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ModelError(
            f"the model {model} cannot be exported as {form}: {type(error).__name__}: {reason}; try another --format"
        ) from error
    if not difference <= TOLERANCE * largest:
        raise ModelError(
            f"{out} was not written: exported as {form}, the model {model} computes something else, with logits that "
            f"differ by up to {difference:.2g}, where the largest is {largest:.2g}; try another --format"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    return difference


def _ranks(network: nn.Module, image_shape: ImageShape | None) -> dict[ScaleNorm, int]:
    """How many dimensions the input of each `ScaleNorm` has, in a pass of an image; 4 where it is not called."""
    ranks = {module: 4 for module in network.modules() if isinstance(module, ScaleNorm)}
    if not ranks:
        return {}
    if image_shape is None:
        raise ModelError("which norm a ScaleNorm becomes is found with an image: give the Classifier its image_shape")

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
    """The largest difference between two models' logits, and the largest logit."""
    batches = [_images(samples, image_shape) for samples in BATCHES]
    logits = [model(images) for images in batches]
    differences = [(run(images) - expected).abs().max() for images, expected in zip(batches, logits, strict=True)]
    return max(differences).item(), max(expected.abs().max() for expected in logits).item()


@dataclass(frozen=True)
class Format:
    """``encode`` a network, with some images to trace it by, as a file; ``decode`` the file as a function of images."""

    encode: Callable[[nn.Module, Tensor], bytes]
    decode: Callable[[bytes, nn.Module], Callable[[Tensor], Tensor]]


def _to_torch_export(network: nn.Module, images: Tensor) -> bytes:
    program = torch.export.export(network, (images,), dynamic_shapes=_any_batch(), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _from_torch_export(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(content)).module()


def _to_onnx(network: nn.Module, images: Tensor) -> bytes:
    _require_onnx()
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _from_onnx(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """By onnx's own evaluator, which is slow and says what the file means, whatever the runtime that it is for."""
    from onnx import load_from_string
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(load_from_string(content))
    return lambda images: torch.from_numpy(evaluator.run(["logits"], {"images": images.numpy()})[0])


def _require_onnx() -> None:
    try:
        for library in ("onnx", "onnxscript"):
            importlib.import_module(library)
    except ImportError as error:
        raise ModelError(
            f"--format onnx needs {error.name or 'onnx'}, which is not installed: pip install onnx onnxscript, or "
            "pip install -e '.[onnx]' in the checkout"
        ) from None


def _to_state_dict(network: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def _from_state_dict(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """In a copy that knows nothing but the file."""
    network = copy.deepcopy(network)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.zero_()
    network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return network


def _any_batch() -> Any:
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)  # PyTorch 2.6 refuses a size without an upper bound


FORMATS = {
    "torch-export": Format(_to_torch_export, _from_torch_export),
    "onnx": Format(_to_onnx, _from_onnx),
    "state-dict": Format(_to_state_dict, _from_state_dict),
}
