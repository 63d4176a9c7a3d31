"""A network behind its debiasing front, and how it is kept on disk. Teachers, baselines and students are all this.

The front is a part of the module, so that relevance flows through it back to the pixels that a student sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import zarr
from torch import Tensor, nn

from pipeline.homogeneous import BiasFreeReport
from pipeline.models import ImageShape, ModelError, build_network, last_linear
from pipeline.rules import stop_relevance

FORMAT_VERSION = 1


def grayscale(images: Tensor, masks: Tensor | None) -> Tensor:
    """The mean of the channels divided by its spatial maximum: neither hue nor brightness tells the class.

    (N, C, H, W) to the same shape, every channel alike. The maximum is a constant for relevance; else the
    result would not change with the brightness and the relevance of every image would sum to 0.
    """
    mean = images.mean(dim=1, keepdim=True)
    brightest = stop_relevance(mean).amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
    return (mean / brightest).expand(-1, images.shape[1], -1, -1)


def mask(images: Tensor, masks: Tensor | None) -> Tensor:
    """The image with its background set to 0, by the dataset's masks (N, 1, H, W) in {0, 1}."""
    if masks is None:
        raise ModelError("a teacher with --debias mask needs the dataset's 'masks', and this split has none")
    return images * masks


def none(images: Tensor, masks: Tensor | None) -> Tensor:
    """The image as it is: a biased baseline, or a student."""
    return images


DEBIAS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"grayscale": grayscale, "mask": mask, "none": none}


class Classifier(nn.Module):
    """``network`` behind the front called ``debias``: images (N, C, H, W) in [0, 1], masks (N, 1, H, W) → (N, K).

    ``bias_free_report`` says what was done to the network, where it is in its bias-free form.
    """

    def __init__(self, network: nn.Module, debias: str = "none", bias_free_report: BiasFreeReport | None = None):
        super().__init__()
        self.network, self.debias, self.bias_free_report = network, debias, bias_free_report

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        return self.network(DEBIAS[self.debias](images, masks))


@dataclass(frozen=True)
class HeadSpec:
    """The frozen last layer copied from a teacher: its input width and whether it has a bias."""

    features: int
    bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a saved classifier again, and what it was trained on."""

    kind: str  # "teacher", which includes the ERM baseline, or "student"
    arch: str
    bias_free: bool
    debias: str
    class_names: tuple[str, ...]
    image_shape: ImageShape
    dataset: dict[str, str]  # name and fingerprint of the training split
    training: dict[str, Any]
    head: HeadSpec | None = None
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises ModelError where the fields are not those of this format version."""
        if values.get("format_version") != FORMAT_VERSION:
            raise ModelError(f"its format version is {values.get('format_version')!r}, not {FORMAT_VERSION}")
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(values) != expected:
            raise ModelError(f"its fields differ from the expected ones in {sorted(set(values) ^ expected)}")
        values = dict(values)
        try:
            values["head"] = HeadSpec(**values["head"]) if values["head"] else None
            values["class_names"] = tuple(values["class_names"])
            values["image_shape"] = tuple(map(int, values["image_shape"]))
        except (TypeError, ValueError) as error:
            raise ModelError(f"its head, class_names or image_shape cannot be read ({error})") from None
        if values["debias"] not in DEBIAS:
            raise ModelError(f"its debias is {values['debias']!r}, not one of {', '.join(DEBIAS)}")
        return cls(**values)


def versions() -> dict[str, str]:
    """Of what decides a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }


def build_classifier(config: ModelConfig) -> Classifier:
    """The classifier that the configuration describes, freshly initialised."""
    network, report = build_network(
        config.arch, len(config.class_names), config.image_shape, free_of_biases=config.bias_free
    )
    if config.head is not None:
        attach_head(network, config.head, len(config.class_names), adapter_bias=not config.bias_free)
    return Classifier(network, config.debias, report)


def attach_head(network: nn.Module, head: HeadSpec, num_classes: int, *, adapter_bias: bool) -> None:
    """Put a frozen last layer of the teacher's shape in place of the network's own.

    Where the network's feature width differs, a learnt linear adapter stands in front of it. Raises
    ModelError where the network does not end in a linear layer.
    """
    name = last_linear(network, num_classes)
    if name is None:
        raise ModelError(
            "this student's architecture does not end in a linear layer, so the teacher's cannot take its place: "
            "choose another --arch, such as small-cnn or resnet18"
        )

    own = network.get_submodule(name)
    assert isinstance(own, nn.Linear)
    replacement: nn.Module = nn.Linear(head.features, num_classes, bias=head.bias).requires_grad_(False)
    if own.in_features != head.features:
        replacement = nn.Sequential(nn.Linear(own.in_features, head.features, bias=adapter_bias), replacement)
    network.set_submodule(name, replacement)


def save_weights(directory: Path, model: nn.Module) -> None:
    """Write ``weights.pt``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    partial = directory / "weights.pt.partial"
    partial.write_bytes(buffer.getbuffer())  # a full disk is an OSError here, and not in torch.save
    partial.replace(directory / "weights.pt")


def load_classifier(directory: str | Path) -> tuple[Classifier, ModelConfig]:
    """A saved teacher or student, in evaluation mode on the CPU; no code from the files is run.

    Raises ModelError where the folder is missing, holds none, or its training was not finished.
    """
    directory = Path(directory)
    hint = "give the --out folder of train-teacher or train-student"
    try:
        values = json.loads((directory / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"no model at {directory}: there is no config.json; {hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ModelError(f"no model at {directory}: its config.json is not JSON; {hint}") from None
    try:
        config = ModelConfig.from_dict(values if isinstance(values, dict) else {})
    except ModelError as error:
        raise ModelError(f"{directory} holds no model that this program can read: {error}; {hint}") from None
    if not (directory / "weights.pt").exists():
        raise ModelError(f"the training of {directory} was not finished: there is no weights.pt; train it again")
    try:
        model = build_classifier(config)
    except (ModelError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the config.json in {directory} describes no model ({error}); train it again") from error
    try:
        model.load_state_dict(torch.load(directory / "weights.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise ModelError(f"the weights in {directory} do not load ({type(error).__name__}); train it again") from error
    return model.eval(), config


def weights_sha256(directory: str | Path) -> str:
    """Identity of a saved model: the SHA-256 of its ``weights.pt``."""
    return hashlib.sha256((Path(directory) / "weights.pt").read_bytes()).hexdigest()


def check_fits(config: ModelConfig, class_names: tuple[str, ...], image_shape: ImageShape, where: str | Path) -> None:
    """Raise ModelError unless a saved model was made for these classes and this shape of images."""
    if config.class_names != class_names:
        raise ModelError(
            f"the model {where} knows the classes {', '.join(config.class_names)}, the dataset has "
            f"{', '.join(class_names)}: use a model that was trained on this dataset's classes"
        )
    if config.image_shape != image_shape:
        raise ModelError(
            f"the model {where} takes images of shape {config.image_shape}, the dataset's are {image_shape}: "
            "use a model that was trained on images of this shape"
        )
