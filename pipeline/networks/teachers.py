"""Teachers by name: a saved classifier, or a vision-language model that prompts tell the classes.

Not here: how either of them is built (`classifier.py`, `zero_shot.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from options import Message, Option
from pipeline.networks.classifier import Classifier, ModelConfig, check_fits, load_classifier, weights_sha256
from pipeline.networks.models import ImageShape, ModelError
from pipeline.networks.teacher_options import VisionLanguageOptions
from pipeline.networks.zero_shot import PREFIX, ZeroShot, build_zero_shot


@dataclass(frozen=True)
class Teacher:
    """The result of `load_teacher`.

    Attributes:
        model: the classifier, in evaluation mode on the CPU.
        config: its configuration.
        sha256: its identity, see `weights_sha256` and `build_zero_shot`.
        record: facts of its origin that its configuration lacks.
    """

    model: Classifier
    config: ModelConfig
    sha256: str
    record: dict[str, str] = field(default_factory=dict)


def load_teacher(
    teacher: str | Path | ZeroShot,
    class_names: Sequence[str],
    image_shape: ImageShape,
    *,
    student_factory: str | None = None,
    segmenter: str | None = None,
) -> Teacher:
    """Load a saved classifier, or build a vision-language teacher, for a dataset.

    Args:
        teacher: the folder of a saved classifier, or a vision-language teacher.
        class_names: the dataset's classes.
        image_shape: (C, H, W) of the dataset's images.
        student_factory: as in `load_classifier`.
        segmenter: as in `load_classifier`.

    Raises:
        ModelError: the teacher cannot be loaded or built, knows other classes, or takes other images.
    """
    if not isinstance(teacher, ZeroShot):
        model, config = load_classifier(teacher, student_factory, segmenter)
        check_fits(config, tuple(class_names), image_shape, teacher)
        return Teacher(model, config, weights_sha256(teacher))
    for option in (Option("student_factory", student_factory), Option("segmenter", segmenter)):
        if option.value is not None:
            raise ModelError(Message(option, f" was given, but {teacher} has none: leave the option out"))
    network, record = build_zero_shot(teacher, class_names, image_shape)
    sha256 = record.pop("sha256")
    config = ModelConfig(
        kind="teacher",
        arch=str(teacher),
        bias_free=False,
        debias="none",
        class_names=tuple(class_names),
        image_shape=image_shape,
        dataset={},
        training={},
    )
    return Teacher(Classifier(network, image_shape=image_shape).eval(), config, sha256, record)


def absolute_teacher(teacher: str | Path | ZeroShot) -> str | ZeroShot:
    """Return the same teacher with absolute paths, for a process with another working folder."""
    if not isinstance(teacher, ZeroShot):
        return str(Path(teacher).absolute())
    arch, weights = teacher.arch, teacher.pretrained
    return replace(
        teacher,
        arch=str(Path(arch).absolute()) if Path(arch).exists() else arch,
        pretrained=str(Path(weights).absolute()) if weights is not None and Path(weights).exists() else weights,
    )


def parse_teacher(teacher: str | Path, options: VisionLanguageOptions | None = None) -> Path | ZeroShot:
    """Return the teacher of a name: the folder of a saved classifier, or ``clip:ARCH`` with its options.

    Args:
        teacher: the name.
        options: the options of ``clip:ARCH``; a saved classifier has none.

    Raises:
        ModelError: a saved classifier is given options, prompts are given twice, or their file cannot be read.
    """
    options = options or VisionLanguageOptions()
    if not str(teacher).startswith(PREFIX):
        for name, value in vars(options).items():
            if value:
                text = "; ".join(value) if isinstance(value, tuple) else value
                raise ModelError(
                    Message(
                        Option(name, str(text)),
                        " is an option of vision-language teachers, but ",
                        Option("teacher", str(teacher)),
                        " is a folder: leave the option out, or give ",
                        Option("teacher", f"{PREFIX}RN50"),
                        " or another model of open_clip's",
                    )
                )
        return Path(teacher)
    templates = _templates(options)
    class_names = None if options.classes is None else tuple(name.strip() for name in options.classes)
    parsed = ZeroShot(str(teacher).removeprefix(PREFIX), options.pretrained, class_names)
    return replace(parsed, templates=templates) if templates else parsed


def _templates(options: VisionLanguageOptions) -> tuple[str, ...]:
    """Return the prompts that are given, or those of the file."""
    if options.prompts is None:
        return tuple(options.prompt)
    file = Option("prompts", str(options.prompts))
    if options.prompt:
        raise ModelError(Message("give either ", Option("prompt"), " or ", file, ", not both"))
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            Message(file, f" cannot be read ({error}): give a text file with a prompt on each line")
        ) from None
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise ModelError(Message(file, " has no prompt: write one on each line, such as 'a photo of a {}'"))
    return templates
