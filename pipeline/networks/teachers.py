"""Whose decisions are explained: a classifier that was saved, or a vision-language model that is told the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.networks.classifier import Classifier, ModelConfig, check_fits, load_classifier, weights_sha256
from pipeline.networks.models import ImageShape
from pipeline.networks.zero_shot import PREFIX, ZeroShot, build_zero_shot


@dataclass(frozen=True)
class Teacher:
    """What `load_teacher` returns: the classifier in evaluation mode on the CPU, what it is, and its identity.

    ``record`` are facts of its origin beside its configuration, for who wants to know them later.
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
    """A saved classifier by its folder, as `load_classifier` loads it, or a vision-language teacher, for a dataset.

    Raises ModelError as `load_classifier` and `build_zero_shot` do, and where it knows other classes than
    ``class_names``, or takes other images than (C, H, W).
    """
    if not isinstance(teacher, ZeroShot):
        model, config = load_classifier(teacher, student_factory, segmenter)
        check_fits(config, tuple(class_names), image_shape, teacher)
        return Teacher(model, config, weights_sha256(teacher))
    for option, given in (("--student-factory", student_factory), ("--segmenter", segmenter)):
        if given is not None:
            raise ModelError(f"{option} {given} was given, but {teacher} has none: leave the option out")
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
    """The same teacher for a process that runs elsewhere: what it names of the file system, by absolute paths."""
    if not isinstance(teacher, ZeroShot):
        return str(Path(teacher).absolute())
    arch, weights = teacher.arch, teacher.pretrained
    return replace(
        teacher,
        arch=str(Path(arch).absolute()) if Path(arch).exists() else arch,
        pretrained=str(Path(weights).absolute()) if weights is not None and Path(weights).exists() else weights,
    )


def parse_teacher(
    teacher: str | Path,
    *,
    pretrained: str | None = None,
    classes: str | None = None,
    prompts: str | Path | None = None,
    prompt: Sequence[str] = (),
) -> Path | ZeroShot:
    """A teacher as it is named on the command line: a folder, or ``clip:ARCH`` with the options that belong to it.

    ``classes`` are separated by semicolons; ``prompts`` is a file with a template on each line, ``prompt`` are
    templates. Raises ModelError where options do not belong to it, or the file cannot be read.
    """
    given = {"--pretrained": pretrained, "--classes": classes, "--prompts": prompts, "--prompt": "; ".join(prompt)}
    if not str(teacher).startswith(PREFIX):
        for option, value in given.items():
            if value:
                raise ModelError(
                    f"{option} {value} is of vision-language teachers, and --teacher {teacher} is a folder: leave the "
                    f"option out, or give --teacher {PREFIX}RN50 or another of open_clip's models"
                )
        return Path(teacher)
    if prompts is not None and prompt:
        raise ModelError(f"give --prompt ({'; '.join(prompt)}) or --prompts ({prompts}), not both")
    templates = tuple(prompt)
    if prompts is not None:
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"--prompts {prompts} cannot be read ({error}): give a text file, a prompt a line"
            ) from None
        templates = tuple(line.strip() for line in lines if line.strip())
        if not templates:
            raise ModelError(f"--prompts {prompts} has no prompt: write one on each line, as in 'a photo of a {{}}'")
    names = None if classes is None else tuple(name.strip() for name in classes.split(";"))
    made = ZeroShot(str(teacher).removeprefix(PREFIX), pretrained, names)
    return replace(made, templates=templates) if templates else made
