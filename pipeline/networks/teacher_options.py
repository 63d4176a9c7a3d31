"""The options of a vision-language teacher, known without PyTorch. Not here: what they make (`teachers.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from options import Doc, InsteadOf, Kind, OptionSet, Separated
from pipeline.errors import ModelError


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
