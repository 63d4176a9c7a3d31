"""A network behind its debiasing front, and its files. Teachers, baselines and students are all classifiers.

Not here: the fronts (`debias.py`), and the networks (`models.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from data.storage import Folder
from options import Message, Option
from pipeline.errors import ModelError
from pipeline.networks.checkpoints import Weights
from pipeline.networks.debias import NONE, Debias, front_names, functions_in, uses_segmenter
from pipeline.networks.fronts import Front, permitted_front, table_front
from pipeline.networks.heads import HeadSpec, attach_head
from pipeline.networks.homogeneous import BiasFreeReport
from pipeline.networks.layers import last_layer
from pipeline.networks.models import build_network, check_factory
from pipeline.networks.preprocessing import Preprocess, PreprocessSpec
from pipeline.networks.segmenters import FILES, TORCHVISION, Segmenter, build_segmenter
from pipeline.networks.sources import ImageShape
from pipeline.networks.weight_files import load_weights
from pipeline.rules import stop_relevance

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.pt"  # of a saved model, in its folder


class Classifier(nn.Module):
    """A network behind its front and preprocessing: images (N, C, H, W) in [0, 1], masks (N, 1, H, W) → logits (N, K).

    Args:
        network: the network.
        debias: the front, or names of fronts in `DEBIAS` with commas between them.
        bias_free_report: what `bias_free` did to the network, if it is in its bias-free form.
        image_shape: (C, H, W) of the images that the classifier was built for.
        segmenter: a network that makes the masks from the images.
        preprocessing: what the network expects of its images.
    """

    def __init__(
        self,
        network: nn.Module,
        debias: str | Front = NONE,
        bias_free_report: BiasFreeReport | None = None,
        image_shape: ImageShape | None = None,
        segmenter: Segmenter | None = None,
        preprocessing: PreprocessSpec | None = None,
    ):
        super().__init__()
        self.network, self.bias_free_report = network, bias_free_report
        self.front = debias if isinstance(debias, Front) else table_front(debias)
        self.image_shape = image_shape
        self.segmenter = segmenter
        self.preprocess = None if preprocessing is None else Preprocess(preprocessing)
        self.input_shape = (
            image_shape if preprocessing is None or image_shape is None else preprocessing.input_shape(image_shape)
        )
        self._frozen: tuple[nn.Module, ...] = ()

    @property
    def debias(self) -> str:
        """The names of the front."""
        return self.front.text

    @property
    def needs_masks(self) -> bool:
        """Whether the front needs the masks of a dataset."""
        return self.front.needs_masks and self.segmenter is None

    def to(self, *args: Any, **kwargs: Any) -> Classifier:
        """Move the parameters as `nn.Module.to` does, and try the user's own functions of the front there."""
        super().to(*args, **kwargs)
        if (parameter := next(self.parameters(), None)) is not None:
            self.front.try_on(parameter.device)
        return self

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        if self.segmenter is not None:
            masks = self.segmenter(stop_relevance(images))
        images = self.front(images, masks)
        return self.network(images if self.preprocess is None else self.preprocess(images))

    def freeze_backbone(self, num_classes: int) -> None:
        """Let the last layer alone learn. All other layers keep their parameters and stay in evaluation mode.

        Raises:
            ModelError: the network does not end in a linear layer or a 1×1 convolution.
        """
        name = last_layer(self.network, num_classes)
        if name is None:
            raise ModelError(
                Message(
                    "this network ends in neither a linear layer nor a 1×1 convolution that could learn alone: leave ",
                    Option("freeze_backbone", True), " out",
                )
            )  # fmt: skip
        last = self.network.get_submodule(name)
        self.network.requires_grad_(False)
        last.requires_grad_(True)
        self._frozen = tuple(module for module in self.network.modules() if module is not last)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self


@dataclass(frozen=True)
class ModelConfig:
    """The configuration that a saved classifier is built from again, and a record of its training.

    Attributes:
        kind: ``"teacher"``, which includes the ERM baseline, or ``"student"``.
        arch: as in `build_network`.
        bias_free: whether the network is in its bias-free form.
        debias: the names of the front, with commas between them: of `DEBIAS`, or functions of the user's own.
        class_names: the classes, in the order of the logits.
        image_shape: (C, H, W) of the images.
        dataset: name and fingerprint of the training split.
        training: the settings of the training.
        head: the teacher's last layer; None for the network's own.
        arch_options: the options of `build_network`.
        segmenter: as in `build_segmenter`.
        preprocessing: what the network expects of its images; None for images in [0, 1].
        start: the weights that the training started from: ``file``, its ``sha256``, and whether the training has a
            ``frozen`` backbone; None for random ones.
        hf_config: the configuration of an ``hf:`` network.
        front_sha256: `Front.sha256`; None for a front of `DEBIAS`.
        format_version: version of these fields.
        versions: versions of the software that made the classifier.
    """

    kind: str
    arch: str
    bias_free: bool
    debias: str
    class_names: tuple[str, ...]
    image_shape: ImageShape
    dataset: dict[str, str]
    training: dict[str, Any]
    head: HeadSpec | None = None
    arch_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    segmenter: str | None = None
    preprocessing: PreprocessSpec | None = None
    start: dict[str, Any] | None = None
    hf_config: dict[str, Any] | None = None
    front_sha256: str | None = None
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def network_options(self) -> dict[str, Any]:
        """The options of `build_network`."""
        return {**self.arch_options, **({} if self.hf_config is None else {"config": self.hf_config})}

    @property
    def input_shape(self) -> ImageShape:
        """(C, H, W) of what the network takes."""
        return self.image_shape if self.preprocessing is None else self.preprocessing.input_shape(self.image_shape)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None or key not in _LATER_FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Check the fields of a ``config.json``, and return them as a configuration.

        Raises:
            ModelError: a field is missing, unknown or wrong, or the format version is another.
        """
        if values.get("format_version") != FORMAT_VERSION:
            raise ModelError(f"its format version is {values.get('format_version')!r}, not {FORMAT_VERSION}")
        values = {"arch_options": {}, "segmenter": None, **dict.fromkeys(_LATER_FIELDS), **values}  # of older files
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(values) != expected:
            raise ModelError(f"its fields differ from the expected ones in {sorted(set(values) ^ expected)}")
        try:
            values["head"] = HeadSpec.from_dict(values["head"]) if values["head"] else None
            values["class_names"] = tuple(values["class_names"])
            if values["preprocessing"] is not None:
                values["preprocessing"] = PreprocessSpec.from_dict(values["preprocessing"])
            values["image_shape"] = tuple(map(int, values["image_shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"its head, class_names, preprocessing or image_shape cannot be read ({error})") from None
        if not isinstance(values["arch"], str):
            raise ModelError(f"its arch is {values['arch']!r}, not a name")
        options = values["arch_options"]
        if not isinstance(options, dict) or not all(isinstance(v, int | float | str) for v in options.values()):
            raise ModelError(f"its arch_options are {options!r}, not names with numbers, switches or words")
        try:
            front_names(values["debias"])
        except (AttributeError, ModelError) as error:
            raise ModelError(
                Message(f"its debias is {values['debias']!r}, which cannot be read (", error, ")")
            ) from None
        if uses_segmenter(values["debias"]) != isinstance(values["segmenter"], str):
            raise ModelError(
                f"its debias is {values['debias']!r} and its segmenter is {values['segmenter']!r}, which do not fit"
            )
        return cls(**values)


# which older files lack, and new ones without a value too
_LATER_FIELDS = ("preprocessing", "start", "hf_config", "front_sha256")


def versions() -> dict[str, str]:
    """Return the versions of the software that decides a result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }


def build_classifier(
    config: ModelConfig,
    student_factory: str | None = None,
    segmenter: Segmenter | None = None,
    *,
    front: Front | None = None,
    to_train: bool = True,
    weights: Weights | None = None,
    fades: bool = False,
) -> Classifier:
    """Build the classifier that a configuration describes, with random weights, or those that it starts from.

    Args:
        config: the configuration.
        student_factory: as in `load_classifier`.
        segmenter: the segmenter that the configuration names, already built.
        front: the front that the configuration names, already built, if it has functions of the user's own.
        to_train: the classifier is to be trained, so check that it can be.
        weights: as in `build_network`.
        fades: as in `build_network`; the mean of the preprocessing fades too.

    Raises:
        ModelError: see `build_network` and `attach_head`.
    """
    classes = len(config.class_names)
    network, report = build_network(
        config.arch,
        classes,
        config.input_shape,
        free_of_biases=config.bias_free,
        options=config.network_options,
        factory=student_factory,
        to_train=to_train,
        weights=weights,
        fades=fades,
    )
    if config.head is not None:
        attach_head(
            network,
            config.head,
            classes,
            config.input_shape,
            adapter_bias=not config.bias_free,
            to_train=to_train,
        )
    classifier = Classifier(
        network, front or config.debias, report, config.image_shape, segmenter, config.preprocessing
    )
    if fades and classifier.preprocess is not None and config.start is not None:
        classifier.preprocess.fade_from(config.start.get("mean", ()))
    if config.start is not None and config.start.get("frozen"):
        classifier.freeze_backbone(classes)
    return classifier


def save_weights(directory: Path, model: nn.Module) -> None:
    """Write ``weights.pt`` atomically."""
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    write_whole(directory / WEIGHTS_FILE, buffer.getbuffer())  # a full disk is an OSError here, and not in torch.save


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, and flush it to the disk."""
    Folder(path.parent).write(path.name, content)


def read_config(directory: Path) -> ModelConfig:
    """Read the configuration of a saved classifier, or of an unfinished training.

    Raises:
        ModelError: the folder has no ``config.json`` of a classifier.
    """
    hint = "give the output folder of a teacher's or a student's training"
    if directory.is_file() and (directory.parent / CONFIG_FILE).exists():
        raise ModelError(f"no model at {directory}: it is a file; give its folder, {directory.parent}")
    try:
        values = json.loads((directory / CONFIG_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"no model at {directory}: there is no config.json; {hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ModelError(f"no model at {directory}: its config.json is not JSON; {hint}") from None
    try:
        return ModelConfig.from_dict(values if isinstance(values, dict) else {})
    except ModelError as error:
        raise ModelError(f"{directory} holds no model that this program can read: {error}; {hint}") from None


def load_classifier(
    directory: str | Path,
    student_factory: str | None = None,
    segmenter: str | None = None,
    debias: Debias | None = None,
) -> tuple[Classifier, ModelConfig]:
    """Load a saved teacher or student, in evaluation mode on the CPU. No code from its files runs.

    Args:
        directory: the output folder of its training.
        student_factory: the function ``package.module:function`` that built a student of the user's own. It runs only
            if it is the one that the configuration names.
        segmenter: the teacher's segmenter, if that is a function or a file. It runs only if the configuration names the
            same one. A segmenter of torchvision's needs no naming.
        debias: the front, if it has functions of the user's own. They run only if they are those that the configuration
            names.

    Returns:
        The classifier and its configuration.

    Raises:
        ModelError: the folder holds no classifier, its training is unfinished, its factory, segmenter or front was not
            given, or its weights do not fit.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not (directory / WEIGHTS_FILE).exists():
        raise ModelError(f"the training of {directory} is unfinished: there is no weights.pt; train it again")
    try:
        check_factory(config.arch, student_factory)
        segmenter_spec = _permitted_segmenter(config.segmenter, segmenter)
        front = permitted_front(config.debias, debias, config.image_shape)
    except ModelError as error:
        raise ModelError(Message(f"the model {directory} was not loaded: ", error)) from None
    remedy = f"train it again{f', or give the {student_factory} that it was made with' if student_factory else ''}"
    try:
        built = None if segmenter_spec is None else build_segmenter(segmenter_spec, config.image_shape, weights=False)
        model = build_classifier(config, student_factory, built, front=front, to_train=False)
    except (ModelError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            Message(f"the model that the config.json in {directory} describes cannot be built (", error, f"); {remedy}")
        ) from error
    try:
        load_weights(model, directory / WEIGHTS_FILE)
    except ModelError as error:
        raise ModelError(f"the weights in {directory} do not load ({error}); {remedy}") from error
    if front.sha256 != config.front_sha256:
        log.warning(
            f"the code of {' and '.join(functions_in(config.debias))} has changed since the training of {directory}: "
            "train it again if the front returns other images now"
        )
    return model.eval(), config


def _permitted_segmenter(used: str | None, segmenter: str | None) -> str | None:
    """Return the segmenter to build: the ``used`` one of torchvision's, or the user's code that the user has named."""
    if used is None:
        if segmenter is not None:
            raise ModelError(
                Message(Option("segmenter", segmenter), " was given, but it has no segmenter: leave the option out")
            )
        return None
    if used.startswith(TORCHVISION):
        if segmenter not in (None, used):
            raise ModelError(
                Message(
                    Option("segmenter", segmenter), f" was given, but it was made with {used}: leave the option out"
                )
            )
        return used
    if segmenter is None or (segmenter != used and not (Path(segmenter).suffix == Path(used).suffix in FILES)):
        raise ModelError(
            Message(
                f"its segmenter is '{used}', whose code runs only where you say so: if you trust it, give ",
                Option("segmenter", used),
                f", not {segmenter}" if segmenter else "",
            )
        )
    return segmenter


def weights_sha256(directory: str | Path) -> str:
    """Return the identity of a saved model: the SHA-256 of its ``weights.pt``."""
    return hashlib.sha256((Path(directory) / WEIGHTS_FILE).read_bytes()).hexdigest()


def check_fits(config: ModelConfig, class_names: tuple[str, ...], image_shape: ImageShape, where: str | Path) -> None:
    """Check that a saved model was made for these classes and for images of this shape.

    Raises:
        ModelError: it was made for others.
    """
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
