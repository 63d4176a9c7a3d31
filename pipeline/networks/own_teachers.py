"""Teachers that the user brings: a network by its name and a file of weights, or a module of PyTorch's.

Not here: teachers that ``train-teacher`` wrote (`classifier.py`), vision-language teachers (`zero_shot.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from options import Message, Option
from pipeline.errors import ModelError
from pipeline.networks.checkpoints import classes_in, read_weights
from pipeline.networks.class_map import ClassMap, Given, map_classes, resolve_class_map
from pipeline.networks.debias import NONE, SEGMENTER, Debias, front_text, uses_segmenter
from pipeline.networks.fronts import Front, build_front
from pipeline.networks.homogeneous import copy_of
from pipeline.networks.models import build_network, error_summary, is_factory
from pipeline.networks.outputs import logits_of, take_logits
from pipeline.networks.preprocessing import PreprocessSpec
from pipeline.networks.sources import (
    IMAGENET_CLASSES,
    ImageShape,
    class_names_of,
    has_source,
    imagenet_classes,
    preprocessing_of,
    read_hf_config,
)
from pipeline.networks.trials import kind_of, trial_images

log = logging.getLogger(__name__)
HF = "hf:"
BACKBONE = "backbone"  # in a store's record of its origin: `tensor_hashes` of the teacher, with commas
HASH_DIGITS = 10


@dataclass(frozen=True)
class OwnTeacher:
    """A teacher that the user brings. It is hashable, and can be pickled where its network can.

    Attributes:
        network: the name of a network, as in `build_network`, or a module that maps images (N, C, H, W) to logits.
        weights: a file of weights, see `read_weights`; None for a function or a module that has its own, and for
            ``hf:FOLDER``, whose folder has them.
        factory: the function ``package.module:function`` once more, if one builds the network: its code is run.
        debias: the front before the network: names with commas between them, or a function at the top of a module.
        preprocessing: what the network expects of its images; None for what its library says of it.
        class_map: the teacher's classes that stand for each class of the dataset, by name or index; None if they are
            the same.
    """

    network: str | nn.Module
    weights: str | None = None
    factory: str | None = None
    debias: Debias = NONE
    preprocessing: PreprocessSpec | None = None
    class_map: tuple[tuple[str, tuple[str | int, ...]], ...] | None = None
    sha256: str = field(init=False, default="")  # of a module's values, so that copies of it are equal

    def __post_init__(self) -> None:
        if isinstance(self.network, nn.Module):
            _check_values(self.network)
            object.__setattr__(self, "sha256", hash_of(self.network, ()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnTeacher) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        values = (self.weights, self.factory, front_text(self.debias), self.preprocessing, self.class_map, self.sha256)
        return str(self), *values

    def __str__(self) -> str:
        if isinstance(self.network, str):
            return self.network
        kind = type(self.network)
        return f"{kind.__module__}.{kind.__qualname__}"


def _check_values(network: nn.Module) -> None:
    """Raise ModelError for a network with a tensor that has no values yet."""
    for name, value in network.state_dict(keep_vars=True).items():
        is_lazy = nn.parameter.is_lazy(value)
        if is_lazy or (isinstance(value, Tensor) and value.is_meta):
            where = "is of a lazy layer that was never called" if is_lazy else "is on the device meta"
            raise ModelError(
                f"the network {type(network).__name__} has no values yet: '{name}' {where}; give it its weights first, "
                "on the CPU or a GPU"
            )


@dataclass(frozen=True)
class Built:
    """The network of a teacher, in evaluation mode and frozen, with what stands in front of it."""

    network: nn.Module
    front: Front
    preprocessing: PreprocessSpec | None
    sha256: str
    record: dict[str, str]


def build_own(teacher: OwnTeacher, class_names: Sequence[str], image_shape: ImageShape) -> Built:
    """Build the network of a teacher that the user brings.

    Args:
        teacher: the teacher.
        class_names: the dataset's classes.
        image_shape: (C, H, W) of the dataset's images.

    Returns:
        The network, its front, its preprocessing, its identity (a hash of its values and of what stands before and
        behind it), and a record of its origin.

    Raises:
        ModelError: the network or its front cannot be built, it has no weights, does not take the images, or its
            classes do not map.
    """
    front = build_front(teacher.debias, image_shape)
    if uses_segmenter(front.text):
        raise ModelError(
            Message(
                Option("debias", SEGMENTER), " is a front of trained teachers: give ", Option("debias", "mask"),
                " and masks in the dataset, or train a teacher with it",
            )
        )  # fmt: skip
    preprocessing = _preprocessing(teacher, image_shape[0])
    input_shape = image_shape if preprocessing is None else preprocessing.input_shape(image_shape)
    network, classes = _network(teacher, len(class_names), input_shape)
    names = _class_names(teacher, classes)
    given: Given | None = None if teacher.class_map is None else dict(teacher.class_map)
    class_map = resolve_class_map(given, class_names, classes, names)
    if class_map is not None:
        _tell_map(teacher, class_map, class_names, names)
        network = map_classes(network, class_map, classes, input_shape)
    network = network.eval().requires_grad_(False)
    if preprocessing is not None:
        log.info(f"images are {preprocessing} for {teacher}")
    name = HF if str(teacher).startswith(HF) else str(teacher)  # a folder may lie elsewhere on another machine
    own_code = () if front.sha256 is None else (front.sha256,)
    specification = (name, front.text, preprocessing, class_map, *own_code)
    record = {"teacher": str(teacher)}
    if teacher.weights is not None:
        record["weights"] = Path(teacher.weights).name
    return Built(network, front, preprocessing, hash_of(network, specification), record)


def _preprocessing(teacher: OwnTeacher, channels: int) -> PreprocessSpec | None:
    spec = teacher.preprocessing
    if spec is None and isinstance(teacher.network, str) and not is_factory(teacher.network):
        spec = preprocessing_of(teacher.network)
    return None if spec is None else spec.for_channels(channels)


def _network(teacher: OwnTeacher, num_classes: int, input_shape: ImageShape) -> tuple[nn.Module, int]:
    """Return the network in evaluation mode, and the number of its logits."""
    if isinstance(teacher.network, nn.Module):
        network = copy_of(teacher.network).cpu().float()
        return network, _take_logits(network, num_classes, input_shape, str(teacher))
    arch, options = teacher.network, {}
    file = teacher.weights
    if arch.startswith(HF):
        folder = arch.removeprefix(HF)
        options = {"config": read_hf_config(folder)}
        file = file or folder
    if file is None and not is_factory(arch):
        raise ModelError(
            Message(
                f"the network {arch} has random weights, and a teacher must know its classes: give ",
                Option("weights"),
                ", a file of its weights",
            )
        )

    def build(classes: int, **given: Any) -> nn.Module:
        return build_network(
            arch, classes, input_shape, free_of_biases=False, options=options, factory=teacher.factory, **given
        )[0].eval()

    if file is None:  # the function loads them, and knows how many classes they have
        return build(num_classes), num_classes
    network = build(num_classes)
    weights = read_weights(file)
    classes = classes_in(network, weights, num_classes) or num_classes
    return build(classes, weights=weights, to_train=False), classes


def _take_logits(network: nn.Module, num_classes: int, input_shape: ImageShape, name: str) -> int:
    """Let a module that the user gives return its logits alone, and return their number."""
    try:
        with torch.no_grad():
            logits: object = network.eval()(trial_images(2, input_shape))
    except Exception as error:
        raise ModelError(
            f"the network {name} does not take images of shape {input_shape} (channels, height, width): "
            f"{error_summary(error)}; it must take float32 images (N, C, H, W) in [0, 1]"
        ) from error
    if not isinstance(logits, Tensor):
        logits = logits_of(logits, num_classes)
        take_logits(network, logits.shape[-1])
    if logits.dim() != 2:
        raise ModelError(f"the network {name} returns {kind_of(logits)} for 2 images: it must return logits (2, K)")
    return logits.shape[1]


def _class_names(teacher: OwnTeacher, classes: int) -> tuple[str, ...] | None:
    """Return the names of the teacher's classes; ImageNet's for 1,000 classes of an unknown origin."""
    names = None
    if isinstance(teacher.network, str) and has_source(teacher.network):
        names = class_names_of(teacher.network)
    if names is None or len(names) != classes:
        names = imagenet_classes() if classes == IMAGENET_CLASSES else None
    return names


def _tell_map(
    teacher: OwnTeacher, class_map: ClassMap, class_names: Sequence[str], names: Sequence[str] | None
) -> None:
    """Log which classes of the teacher stand for each class of the dataset."""
    for name, indices in zip(class_names, class_map, strict=True):
        listed = ", ".join(str(index) if names is None else f"{names[index]} ({index})" for index in indices[:5])
        more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
        log.info(f"{teacher}: {listed}{more} → {name}")


def hash_of(network: nn.Module, specification: Iterable[object]) -> str:
    """Return the SHA-256 of a network's values by name, and of what else decides its output."""
    digest = hashlib.sha256(json.dumps([str(part) for part in specification]).encode())
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode() + _bytes(value))
    return digest.hexdigest()


def tensor_hashes(network: nn.Module, head: Iterable[str] = ()) -> list[str]:
    """Return a short hash of each weight with more than one dimension, whatever its name, but those of ``head``.

    A network that has all hashes of another one's backbone has its weights.
    """
    left_out = set(head)
    hashes = {
        hashlib.sha256(_bytes(value.float())).hexdigest()[:HASH_DIGITS]
        for name, value in network.state_dict().items()
        if name not in left_out and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    }
    return sorted(hashes)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def class_map_of(given: Mapping[str, Sequence[str | int] | str | int] | None) -> Any:
    """Return a class map in the form that `OwnTeacher` keeps."""
    if given is None:
        return None
    listed = {name: [one] if isinstance(one, str | int) else one for name, one in given.items()}
    return tuple((name, tuple(classes)) for name, classes in listed.items())
