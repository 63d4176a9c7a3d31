"""A trained network as a plain PyTorch module, and as a file for other programs.

Not here: the formats (`formats.py`), and the files of our own models (`classifier.py`).
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from options import Message, Option, takes
from pipeline.errors import ModelError
from pipeline.networks.classifier import Classifier, ModelConfig, load_classifier, read_config, write_whole
from pipeline.networks.debias import NONE
from pipeline.networks.formats import FORMATS, ExportOptions
from pipeline.networks.heads import AttentionPool
from pipeline.networks.homogeneous import ScaleNorm, copy_of
from pipeline.networks.layers import last_layer
from pipeline.networks.models import build_network, error_summary
from pipeline.networks.outputs import as_returned
from pipeline.networks.sources import HF_CONFIG, ImageShape, hf_config_of

BATCHES = (1, 5)  # sizes that a file is checked with; it is traced with another size
TOLERANCE = 1e-3  # relative to the largest logit, as other kernels round differently


def plain(model: Classifier, *, preprocessed: bool = False) -> nn.Module:
    """Copy the network of a classifier into one that needs none of our code, in evaluation mode.

    A `ScaleNorm` becomes the `nn.BatchNorm1d`, ``2d`` or ``3d`` that computes the same in evaluation mode: running mean
    0, running variance the running second moment, shift 0. A forward pass tells the number of its dimensions. An
    `AttentionPool` and the preprocessing become graphs of PyTorch's own functions.

    Args:
        model: the classifier.
        preprocessed: leave the preprocessing out, for a network that takes preprocessed images.

    Returns:
        The network: images (N, C, H, W) in [0, 1] → logits (N, K).

    Raises:
        ModelError: a debiasing front stands before the network, which is useless without it, or the network cannot be
            copied.
    """
    _check_no_front(model.debias)
    try:
        network = copy_of(model.network).eval()
    except Exception as error:
        raise ModelError(
            f"this model's network cannot be copied: {error_summary(error)}; let copy.deepcopy take it"
        ) from error
    for name, module in list(network.named_modules()):
        if isinstance(module, AttentionPool):  # as a graph of PyTorch's own, which is pickled with its code
            network.set_submodule(name, _traced(module))
    norms = {norm: _batch_norm_like(norm, rank) for norm, rank in _ranks(network, model.input_shape).items()}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if name and module in norms:
            network.set_submodule(name, norms[module])
    if isinstance(network, ScaleNorm):
        network = norms[network]
    if model.preprocess is None or preprocessed:
        return network
    assert model.image_shape is not None  # a classifier with a preprocessing has one
    before = model.preprocess.cpu().plain(*model.image_shape[1:])
    return nn.Sequential(OrderedDict(preprocess=before, network=network)).eval()


def _check_no_front(debias: str) -> None:
    if debias != NONE:
        raise ModelError(
            Message(
                f"this model's network stands behind the front '{debias}' and is useless without it: export a "
                "student, or a teacher with ",
                Option("debias", NONE),
            )
        )


def library_form(network: nn.Module, config: ModelConfig, student_factory: str | None) -> nn.Module:
    """Return the network in the form that its library or its author's function builds, so that these load its weights.

    An adapter and the frozen layer behind it become one linear layer, and biases that are not there become 0. A network
    that has no such form, as one with an attention pooling, is returned as it is.
    """
    classes = len(config.class_names)
    try:
        fresh, _ = build_network(
            config.arch,
            classes,
            config.input_shape,
            free_of_biases=False,
            options=config.network_options,
            factory=student_factory,
            to_train=False,
        )
    except ModelError:
        return network
    weights, values = network.state_dict(), fresh.state_dict()
    name = last_layer(fresh, classes)
    if config.head is not None and (config.head.normalised or config.head.pool is not None):
        return network
    if name is not None and config.head is not None:
        own = fresh.get_submodule(name)
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        weights |= {f"{name}.{key}": value for key, value in _affine(network.get_submodule(name), own).items()}
    lacking = values.keys() - weights.keys()
    zeros = {key: torch.zeros_like(values[key]) for key in lacking if key.endswith(_ZERO)}
    try:
        fresh.load_state_dict(weights | zeros)
    except RuntimeError:  # of names or shapes
        return network
    return fresh.eval()


_ZERO = ("bias", "running_mean", "num_batches_tracked")  # endings of values that a bias-free network lacks


@torch.no_grad()
def _affine(module: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """Return weight and bias of the linear layer ``own`` that computes what a module does, if that is affine."""
    assert isinstance(own, nn.Linear | nn.Conv2d)
    width = own.in_features if isinstance(own, nn.Linear) else own.in_channels
    inputs = torch.cat([torch.zeros(1, width), torch.eye(width)]).double()
    copied = copy_of(module).double()
    outputs = copied(inputs if isinstance(own, nn.Linear) else inputs[:, :, None, None]).flatten(1)
    weight = (outputs[1:] - outputs[0]).T.float().reshape(own.weight.shape)
    return {"weight": weight} if own.bias is None else {"weight": weight, "bias": outputs[0].float()}


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

    Beside the weights alone of an ``hf:`` network its ``config.json`` is written, if there is none, so that
    ``from_pretrained`` loads the folder if the file is called ``model.safetensors``.
    """
    settings = ExportOptions(model=model, out=out, format=format, **options)
    out = Path(out)
    if out.exists():
        raise FileExistsError(Message(f"{out} exists: choose another ", Option("out"), ", or remove it first"))
    _check_no_front(read_config(Path(model)).debias)  # before it asks to run code
    classifier, config = load_classifier(model, settings.student_factory)
    weights_alone = FORMATS[format].weights_alone
    network = plain(classifier, preprocessed=weights_alone)
    if weights_alone:
        network = library_form(network, config, settings.student_factory)
    try:
        shape = config.input_shape if weights_alone else config.image_shape
        content = FORMATS[format].encode(network, _images(2, shape))
        run = FORMATS[format].decode(content, network)
        before = classifier.preprocess if weights_alone and classifier.preprocess is not None else nn.Identity()
        difference, largest = _compared(lambda images: run(before(images)), classifier, config.image_shape)
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
    if weights_alone and config.hf_config is not None and not (out.parent / HF_CONFIG).exists():
        write_whole(out.parent / HF_CONFIG, hf_config_of(network, config.class_names).encode())
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
