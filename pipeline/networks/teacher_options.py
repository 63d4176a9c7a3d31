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
        str | None, Doc("Weights of a clip:ARCH teacher: a tag of open_clip's, or a checkpoint file.")
    ] = None
    classes: Annotated[
        tuple[str, ...] | None,
        Doc("Names of the classes in prompts, in the dataset's order. Default: the dataset's own names."),
        Separated(";"),
    ] = None
    prompt: Annotated[
        tuple[str, ...],
        Doc("Prompt with {} in place of the class, such as 'a photo of a {}'. Several prompts are averaged."),
    ] = ()
    prompts: Annotated[
        str | Path | None, Doc("Text file with one prompt on each line."), Kind.PATH, InsteadOf("prompt")
    ] = None
