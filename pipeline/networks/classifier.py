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

from data.storage import Folder
from pipeline.networks.heads import HeadSpec, attach_head
from pipeline.networks.homogeneous import BiasFreeReport
from pipeline.networks.models import ImageShape, ModelError, build_network, check_factory
from pipeline.networks.segmenters import FILES, TORCHVISION, Segmenter, build_segmenter
from pipeline.rules import stop_relevance

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.pt"  # of a saved model, in its folder


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


def segmenter(images: Tensor, masks: Tensor | None) -> Tensor:
    """As `mask`, by the masks that a frozen segmentation network makes of the image (`segmenters.py`)."""
    return mask(images, masks)


def none(images: Tensor, masks: Tensor | None) -> Tensor:
    """The image as it is: a biased baseline, or a student."""
    return images


DEBIAS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "grayscale": grayscale,
    "mask": mask,
    "segmenter": segmenter,
    "none": none,
}


class Classifier(nn.Module):
    """``network`` behind the front called ``debias``: images (N, C, H, W) in [0, 1], masks (N, 1, H, W) → (N, K).

    ``bias_free_report`` says what was done to the network, where it is in its bias-free form, and ``image_shape``
    which images (C, H, W) it was built for. With a ``segmenter`` the masks are those that it makes of the images.
    """

    def __init__(
        self,
        network: nn.Module,
        debias: str = "none",
        bias_free_report: BiasFreeReport | None = None,
        image_shape: ImageShape | None = None,
        segmenter: Segmenter | None = None,
    ):
        super().__init__()
        self.network, self.debias, self.bias_free_report = network, debias, bias_free_report
        self.image_shape = image_shape
        self.segmenter = segmenter

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        if self.segmenter is not None:
            masks = self.segmenter(stop_relevance(images))
        return self.network(DEBIAS[self.debias](images, masks))


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a saved classifier again, and what it was trained on.

    ``arch`` and ``arch_options`` are those of `build_network`. Without a ``head`` the last layer is the network's own.
    ``segmenter`` is that of `build_segmenter`.
    """

    kind: str  # "teacher", which includes the ERM baseline, or "student"
    arch: str
    bias_free: bool
    debias: str
    class_names: tuple[str, ...]
    image_shape: ImageShape
    dataset: dict[str, str]  # name and fingerprint of the training split
    training: dict[str, Any]
    head: HeadSpec | None = None
    arch_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    segmenter: str | None = None
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises ModelError where the fields are not those of this format version."""
        if values.get("format_version") != FORMAT_VERSION:
            raise ModelError(f"its format version is {values.get('format_version')!r}, not {FORMAT_VERSION}")
        values = {"arch_options": {}, "segmenter": None, **values}  # which older files do not have
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(values) != expected:
            raise ModelError(f"its fields differ from the expected ones in {sorted(set(values) ^ expected)}")
        try:
            values["head"] = HeadSpec.from_dict(values["head"]) if values["head"] else None
            values["class_names"] = tuple(values["class_names"])
            values["image_shape"] = tuple(map(int, values["image_shape"]))
        except (TypeError, ValueError) as error:
            raise ModelError(f"its head, class_names or image_shape cannot be read ({error})") from None
        if not isinstance(values["arch"], str):
            raise ModelError(f"its arch is {values['arch']!r}, not a name")
        options = values["arch_options"]
        if not isinstance(options, dict) or not all(isinstance(v, int | float | str) for v in options.values()):
            raise ModelError(f"its arch_options are {options!r}, not numbers, switches and words by name")
        if values["debias"] not in DEBIAS:
            raise ModelError(f"its debias is {values['debias']!r}, not one of {', '.join(DEBIAS)}")
        if (values["debias"] == "segmenter") != isinstance(values["segmenter"], str):
            raise ModelError(f"its debias is {values['debias']!r}, and its segmenter {values['segmenter']!r}")
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


def build_classifier(
    config: ModelConfig, student_factory: str | None = None, segmenter: Segmenter | None = None
) -> Classifier:
    """The classifier that the configuration describes, freshly initialised, with the ``segmenter`` that it names.

    ``student_factory`` as in `load_classifier`. Raises ModelError, see `build_network` and `attach_head`.
    """
    network, report = build_network(
        config.arch,
        len(config.class_names),
        config.image_shape,
        free_of_biases=config.bias_free,
        options=config.arch_options,
        factory=student_factory,
    )
    if config.head is not None:
        attach_head(
            network, config.head, len(config.class_names), config.image_shape, adapter_bias=not config.bias_free
        )
    return Classifier(network, config.debias, report, config.image_shape, segmenter)


def save_weights(directory: Path, model: nn.Module) -> None:
    """Write ``weights.pt``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    write_whole(directory / "weights.pt", buffer.getbuffer())  # a full disk is an OSError here, and not in torch.save


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file, whole and on the disk, or not at all."""
    Folder(path.parent).write(path.name, content)


def read_config(directory: Path) -> ModelConfig:
    """What a saved model, or an unfinished training, is. Raises ModelError where the folder holds none."""
    hint = "give the --out folder of train-teacher or train-student"
    try:
        values = json.loads((directory / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"no model at {directory}: there is no config.json; {hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ModelError(f"no model at {directory}: its config.json is not JSON; {hint}") from None
    try:
        return ModelConfig.from_dict(values if isinstance(values, dict) else {})
    except ModelError as error:
        raise ModelError(f"{directory} holds no model that this program can read: {error}; {hint}") from None


def load_classifier(
    directory: str | Path, student_factory: str | None = None, segmenter: str | None = None
) -> tuple[Classifier, ModelConfig]:
    """A saved teacher or student, in evaluation mode on the CPU; no code from the files is run.

    A student that was built by a function of somebody's own is built by it again if ``student_factory``,
    ``package.module:function``, names the same; and so is a teacher's segmenter, be it a function's or in a file, if
    ``segmenter`` does. One of torchvision's needs no naming.

    Raises ModelError where the folder is missing, holds none, its training was not finished, or its factory or
    segmenter was not given.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not (directory / "weights.pt").exists():
        raise ModelError(f"the training of {directory} was not finished: there is no weights.pt; train it again")
    try:
        check_factory(config.arch, student_factory)
        named = _segmenter(config.segmenter, segmenter)
    except ModelError as error:
        raise ModelError(f"the model {directory} was not loaded: {error}") from None
    again = f"train it again{f', or give the {student_factory} that it was made with' if student_factory else ''}"
    try:
        made = None if named is None else build_segmenter(named, config.image_shape, weights=False)
        model = build_classifier(config, student_factory, made)
    except (ModelError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"what the config.json in {directory} describes cannot be built ({error}); {again}") from error
    try:
        model.load_state_dict(torch.load(directory / "weights.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise ModelError(f"the weights in {directory} do not load ({type(error).__name__}); {again}") from error
    return model.eval(), config


def _segmenter(used: str | None, given: str | None) -> str | None:
    """What `build_segmenter` is asked for; raises ModelError unless the user has named the code that would run."""
    if used is None:
        if given is not None:
            raise ModelError(f"--segmenter {given} was given, but it has no segmenter: leave the option out")
        return None
    if used.startswith(TORCHVISION):
        if given not in (None, used):
            raise ModelError(f"--segmenter {given} was given, but it was made with {used}: leave the option out")
        return used
    if given is None or (given != used and not (Path(given).suffix == Path(used).suffix in FILES)):
        raise ModelError(
            f"it was made with the segmenter '{used}', code of somebody's own that runs only where you say so: if you "
            f"trust it, give --segmenter {used}" + (f", not {given}" if given else "")
        )
    return given


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
