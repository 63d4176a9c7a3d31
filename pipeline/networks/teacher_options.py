"""The options of teachers that `train-teacher` did not write, known without PyTorch. Not here: what they make
(`teachers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from options import Doc, Heading, InsteadOf, Kind, OptionSet, Separated
from pipeline.errors import ModelError

OWN_TEACHER = "Your own teacher"


@dataclass(frozen=True, kw_only=True)
class VisionLanguageOptions(OptionSet):
    """The weights of a vision-language teacher, and the prompts that tell it the classes."""

    ERROR: ClassVar[type[Exception]] = ModelError
    HEADING: ClassVar[str] = "Vision-language teacher"

    pretrained: Annotated[
        str | None, Doc("Weights of a clip:ARCH teacher: a pretrained tag of open_clip, or a checkpoint file.")
    ] = None
    classes: Annotated[
        tuple[str, ...] | None,
        Doc("Class names for the prompts, in the dataset's order. Default: the dataset's class names."),
        Separated(";"),
    ] = None
    prompt: Annotated[
        tuple[str, ...],
        Doc("Prompt with {} for the class name, such as 'a photo of a {}'. Several prompts are averaged."),
    ] = ()
    prompts: Annotated[
        str | Path | None, Doc("Text file with one prompt per line."), Kind.PATH, InsteadOf("prompt")
    ] = None


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(OptionSet):
    """What a network expects of its images, if its library does not tell."""

    ERROR: ClassVar[type[Exception]] = ModelError
    HEADING: ClassVar[str] = "Preprocessing"

    mean: Annotated[
        tuple[Any, ...] | None,
        Doc(
            "Mean of the network's training images in [0, 1], of each channel or one for all, such as "
            "0.485,0.456,0.406. Default: that of its library, if the network starts from weights, or that of the "
            "training, if they are the weights of one of our trainings."
        ),
        Separated(),
    ] = None
    std: Annotated[
        tuple[Any, ...] | None,
        Doc("Standard deviation of the network's training images, as for the mean."),
        Separated(),
    ] = None
    input_size: Annotated[
        Any,
        Kind.IMAGE_SIZE,
        Doc(
            "Size to which images are resized for the network. Default: as for the mean, and otherwise the dataset's "
            "size."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OwnTeacherOptions(PreprocessingOptions):
    """What a network of the user's own needs to be a teacher."""

    weights: Annotated[
        str | Path | None,
        Kind.PATH,
        Heading(OWN_TEACHER),
        Doc("Weights of your own network: a file (.pt, .pth, .safetensors) or a Hugging Face folder."),
    ] = None
    debias: Annotated[
        str | None,
        Heading(OWN_TEACHER),
        Doc(
            "Debiasing front of your own network, as for the command train-teacher. Default: none. If a saved teacher "
            "has a front of your own, name its MODULE:FUNCTION here. Its code is run."
        ),
    ] = None
    class_map: Annotated[
        str | Path | None,
        Kind.PATH,
        Heading(OWN_TEACHER),
        Doc(
            "YAML or JSON file with the classes of your own network for each class of the dataset: dog: [beagle, 207]."
        ),
    ] = None
