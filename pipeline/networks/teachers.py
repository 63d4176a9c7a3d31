"""Teachers by name: a saved classifier, a network of the user's own, or a vision-language model with prompts.

Not here: how any of them is built (`classifier.py`, `own_teachers.py`, `zero_shot.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from options import Message, Option, OptionSet
from pipeline.errors import ModelError
from pipeline.networks.class_map import read_class_map
from pipeline.networks.classifier import (
    CONFIG_FILE,
    Classifier,
    ModelConfig,
    check_fits,
    load_classifier,
    weights_sha256,
)
from pipeline.networks.debias import NONE, Debias, front_text, functions_in
from pipeline.networks.fronts import Front, table_front
from pipeline.networks.models import is_factory
from pipeline.networks.own_teachers import HF, OwnTeacher, build_own, class_map_of
from pipeline.networks.preprocessing import choose_preprocessing
from pipeline.networks.sources import ImageShape, has_source, preprocessing_of
from pipeline.networks.teacher_options import OwnTeacherOptions, VisionLanguageOptions
from pipeline.networks.zero_shot import PREFIX, ZeroShot, build_zero_shot

Brought = ZeroShot | OwnTeacher  # teachers that train-teacher did not write


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
    teacher: str | Path | Brought | nn.Module,
    class_names: Sequence[str],
    image_shape: ImageShape,
    *,
    student_factory: str | None = None,
    segmenter: str | None = None,
    debias: Debias | None = None,
) -> Teacher:
    """Load a saved classifier, or build a teacher that the user brings, for a dataset.

    Args:
        teacher: the folder of a saved classifier; a network of the user's own, or a module; or a vision-language
            teacher.
        class_names: the dataset's classes.
        image_shape: (C, H, W) of the dataset's images.
        student_factory: as in `load_classifier`; or the function that an `OwnTeacher` names, which is then trusted.
        segmenter: as in `load_classifier`.
        debias: of a saved classifier as in `load_classifier`; of a network or module the front, as in `OwnTeacher`.

    Raises:
        ModelError: the teacher cannot be loaded or built, knows other classes, or takes other images.
    """
    teacher = behind(as_teacher(teacher), debias)
    if not isinstance(teacher, Brought):
        model, config = load_classifier(teacher, student_factory, segmenter, debias)
        check_fits(config, tuple(class_names), image_shape, teacher)
        return Teacher(model, config, _identity(weights_sha256(teacher), model.front))
    if isinstance(teacher, OwnTeacher) and student_factory is not None and student_factory == teacher.network:
        teacher, student_factory = replace(teacher, factory=student_factory), None
    for option in (Option("student_factory", student_factory), Option("segmenter", segmenter)):
        if option.value is not None:
            raise ModelError(Message(option, f" was given, but {teacher} has none: leave the option out"))
    if isinstance(teacher, OwnTeacher):
        built = build_own(teacher, class_names, image_shape)
        network, preprocessing, front = built.network, built.preprocessing, built.front
        sha256, record = built.sha256, built.record
    else:
        network, record = build_zero_shot(teacher, class_names, image_shape)
        sha256, preprocessing, front = record.pop("sha256"), None, table_front(NONE)
    config = ModelConfig(
        kind="teacher",
        arch=str(teacher),
        bias_free=False,
        debias=front.text,
        front_sha256=front.sha256,
        class_names=tuple(class_names),
        image_shape=image_shape,
        dataset={},
        training={},
        preprocessing=preprocessing,
    )
    model = Classifier(network, front, image_shape=image_shape, preprocessing=preprocessing).eval()
    return Teacher(model, config, sha256, record)


def _identity(weights: str, front: Front) -> str:
    """Return the identity of a saved teacher by that of its weights, and of the user's own functions in its front."""
    return weights if front.sha256 is None else hashlib.sha256(f"{weights} {front.sha256}".encode()).hexdigest()


def behind(teacher: str | Path | Brought, debias: Debias | None) -> str | Path | Brought:
    """Return a network of the user's own with this front. A saved classifier, which has its own, is returned as it is.

    Raises:
        ModelError: the teacher has another front, or none can stand before it.
    """
    if debias is None or not isinstance(teacher, Brought):
        return teacher
    text = front_text(debias)
    if isinstance(teacher, OwnTeacher) and front_text(teacher.debias) in (NONE, text):
        return replace(teacher, debias=debias)
    other = f"its front is '{front_text(teacher.debias)}'" if isinstance(teacher, OwnTeacher) else "it has none"
    raise ModelError(Message(Option("debias", text), f" was given for {teacher}, but {other}: leave the option out"))


def as_teacher(teacher: str | Path | Brought | nn.Module) -> str | Path | Brought:
    """Return a module as a teacher that the user brings, and any other teacher as it is.

    Raises:
        ModelError: it is no teacher.
    """
    if isinstance(teacher, nn.Module):
        return OwnTeacher(teacher)
    if not isinstance(teacher, str | Path | Brought):
        raise ModelError(
            f"a teacher is a folder, an nn.Module, an OwnTeacher or a ZeroShot, got {type(teacher).__name__}: give one "
            "of them"
        )
    return teacher


def absolute_teacher(teacher: str | Path | Brought) -> str | Brought:
    """Return the same teacher with absolute paths, for a process with another working folder."""
    if isinstance(teacher, OwnTeacher):
        network = teacher.network
        if isinstance(network, str) and network.startswith(HF):
            network = HF + _absolute(network.removeprefix(HF))
        weights = None if teacher.weights is None else _absolute(teacher.weights)
        return replace(teacher, network=network, weights=weights)
    if isinstance(teacher, ZeroShot):
        pretrained = None if teacher.pretrained is None else _absolute(teacher.pretrained)
        return replace(teacher, arch=_absolute(teacher.arch), pretrained=pretrained)
    assert not isinstance(teacher, Brought)
    return str(Path(teacher).absolute())


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def parse_teacher(
    teacher: str | Path,
    options: VisionLanguageOptions | None = None,
    own: OwnTeacherOptions | None = None,
) -> Path | Brought:
    """Return the teacher of a name: the folder of a saved classifier, a network's name, or ``clip:ARCH``.

    Args:
        teacher: the name.
        options: the options of ``clip:ARCH``; other teachers have none of them.
        own: the options of a network by name, such as ``timm:resnet18``. Other teachers have none of them; of a saved
            classifier, ``debias`` may name the user's own functions, for `load_classifier`.

    Raises:
        ModelError: a teacher is given options that it does not have, or a file of theirs cannot be read.
    """
    options, own = options or VisionLanguageOptions(), own or OwnTeacherOptions()
    name = str(teacher)
    is_clip, is_own = name.startswith(PREFIX), _is_network(name, own)
    if not is_clip:
        _refuse(options, name, "vision-language teachers", Option("teacher", f"{PREFIX}RN50"))
    if not is_own:
        of_saved = not is_clip and own.debias is not None and functions_in(own.debias)  # it names them to let them run
        other = replace(own, debias=None) if of_saved else own
        _refuse(other, name, "networks by their name", Option("teacher", "timm:resnet18"))
    if is_own:
        return _own(name, own)
    if not is_clip:
        return Path(teacher)
    templates = _templates(options)
    class_names = None if options.classes is None else tuple(name.strip() for name in options.classes)
    parsed = ZeroShot(str(teacher).removeprefix(PREFIX), options.pretrained, class_names)
    return replace(parsed, templates=templates) if templates else parsed


def _is_network(name: str, own: OwnTeacherOptions) -> bool:
    """Return whether a teacher's name is that of a network, and not of a folder."""
    if name.startswith(PREFIX) or (Path(name) / CONFIG_FILE).exists():
        return False
    return has_source(name) or is_factory(name) or (own.weights is not None and not Path(name).exists())


def _own(name: str, own: OwnTeacherOptions) -> OwnTeacher:
    default = None if is_factory(name) else preprocessing_of(name)
    return OwnTeacher(
        network=name,
        weights=None if own.weights is None else str(own.weights),
        factory=name if is_factory(name) else None,
        debias=own.debias or NONE,
        preprocessing=choose_preprocessing(own, default),
        class_map=class_map_of(None if own.class_map is None else read_class_map(own.class_map)),
    )


def _refuse(options: OptionSet, teacher: str, kind: str, example: Option) -> None:
    """Raise ModelError for an option of another kind of teacher."""
    for name, value in vars(options).items():
        if value:
            text = "; ".join(map(str, value)) if isinstance(value, tuple) else value
            what = "is a folder" if ":" not in teacher else "is none"
            raise ModelError(
                Message(
                    Option(name, str(text)), f" is an option of {kind}, but ", Option("teacher", teacher), f" {what}: ",
                    "leave the option out, or give ", example, " or another",
                )
            )  # fmt: skip


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
