"""Which of a teacher's classes stand for each class of a dataset, when the teacher knows others.

Not here: the teachers (`own_teachers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from options import Message, Option, did_you_mean, first_line
from pipeline.errors import ModelError
from pipeline.networks.layers import last_layer
from pipeline.networks.sources import ImageShape
from pipeline.networks.trials import else_in_logits
from pipeline.rules import stop_relevance

ClassMap = tuple[tuple[int, ...], ...]  # for each class of the dataset, the indices of the teacher's classes
Given = Mapping[str, Sequence[str | int] | str | int]


def read_class_map(path: str | Path) -> dict[str, list[str | int]]:
    """Read a class map from a YAML or JSON file: ``dataset class: [teacher classes]``, by name or index.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    option = Option("class_map", str(path))
    remedy = ": write a line such as 'dog: [beagle, 207]' for each class of the dataset, in YAML or JSON"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(Message(option, f" cannot be read ({first_line(error)})", remedy)) from None
    if not isinstance(content, dict) or not content:
        raise ModelError(Message(option, " maps no classes", remedy))
    return {
        str(name): list(classes) if isinstance(classes, list | tuple) else [] if classes is None else [classes]
        for name, classes in content.items()
    }


def resolve_class_map(
    given: Given | None, class_names: Sequence[str], teacher_classes: int, teacher_names: Sequence[str] | None
) -> ClassMap | None:
    """Return which of the teacher's classes stand for each class of the dataset; None if they are the same.

    Without a map the classes are the same if their names are, or if the teacher's names are unknown and their number
    is. The same names in another order are mapped by name.

    Args:
        given: the map of the user, by names of the dataset's classes.
        class_names: the dataset's classes.
        teacher_classes: the number of the teacher's logits.
        teacher_names: the teacher's classes; None if they are unknown.

    Raises:
        ModelError: the classes do not map.
    """
    if given is None:
        return _same_classes(class_names, teacher_classes, teacher_names)
    if unknown := [name for name in given if name not in class_names]:
        raise _wrong(
            f"maps '{unknown[0]}', which is no class of the dataset ({', '.join(class_names)})."
            f"{did_you_mean(unknown[0], class_names) or ' Remove it.'}"
        )
    if lacking := [name for name in class_names if name not in given]:
        raise _wrong(f"has no line for the dataset's class '{lacking[0]}': add one with the teacher's classes for it")
    taken: dict[int, str] = {}
    resolved = []
    for name in class_names:
        classes = given[name]
        listed = [classes] if isinstance(classes, str | int) else list(classes)
        indices = tuple(_index(name, one, teacher_classes, teacher_names) for one in listed)
        if not indices:
            raise _wrong(f"maps '{name}' to nothing: give at least one of the teacher's classes")
        for index in indices:
            if index in taken:
                where = f"'{name}' twice" if taken[index] == name else f"'{taken[index]}' and '{name}'"
                raise _wrong(f"maps {where} to the teacher's class {index}: give each class to one only")
            taken[index] = name
        resolved.append(indices)
    same = tuple(resolved) == tuple((index,) for index in range(teacher_classes))
    return None if same else tuple(resolved)


def _same_classes(
    class_names: Sequence[str], teacher_classes: int, teacher_names: Sequence[str] | None
) -> ClassMap | None:
    names = None if teacher_names is None or len(teacher_names) != teacher_classes else list(teacher_names)
    if teacher_classes == len(class_names) and names in (None, list(class_names)):
        return None
    if names is not None and all(name in names for name in class_names):
        return tuple((names.index(name),) for name in class_names)
    known = f"{teacher_classes} classes" + (
        "" if names is None else f" ({', '.join(names[:5])}{', …'[: 3 * (len(names) > 5)]})"
    )
    raise ModelError(
        Message(
            f"the teacher knows {known}, and the dataset has {len(class_names)} ({', '.join(class_names)}): give ",
            Option("class_map"),
            ", a file with a line such as 'dog: [beagle, 207]' for each class of the dataset",
        )
    )


def _index(name: str, one: object, teacher_classes: int, teacher_names: Sequence[str] | None) -> int:
    """Return the index of one of the teacher's classes, given by name or index."""
    names = [] if teacher_names is None else list(teacher_names)
    if isinstance(one, int) and not isinstance(one, bool):
        if not 0 <= one < teacher_classes:
            raise _wrong(f"maps '{name}' to the class {one}: the teacher's classes are 0 to {teacher_classes - 1}")
        return one
    matching = [index for index, known in enumerate(names) if known == str(one)]
    if len(matching) == 1:
        return matching[0]
    if len(matching) > 1:
        raise _wrong(f"maps '{name}' to '{one}', a name that the teacher has {len(matching)} times: give an index")
    if not names:
        raise _wrong(f"maps '{name}' to '{one}', and this teacher's classes have no names: give an index from 0 on")
    raise _wrong(
        f"maps '{name}' to '{one}', which the teacher does not know."
        f"{did_you_mean(str(one), names) or ' Give a name that it has, or an index from 0 on.'}"
    )


def _wrong(text: str) -> ModelError:
    return ModelError(Message(Option("class_map"), " ", text))


class MappedClasses(nn.Module):
    """A network whose classes are pooled: (N, C, H, W) → (N, K), one logit for each class of the dataset.

    A logit is the log-sum-exp of the logits of the teacher's classes, so that softmax gives their joint probability
    among all that are mapped. Relevance is shared among them in proportion to their probabilities, which are
    constants for relevance, as every denominator is.
    """

    def __init__(self, network: nn.Module, class_map: ClassMap, classes: int):
        super().__init__()
        self.network, self.classes = network, classes  # of the network
        teacher_classes = [index for indices in class_map for index in indices]
        pooled = torch.zeros(len(teacher_classes), len(class_map))
        place = 0
        for column, indices in enumerate(class_map):
            pooled[place : place + len(indices), column] = 1
            place += len(indices)
        self.register_buffer("teacher_classes", torch.tensor(teacher_classes), persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)

    teacher_classes: Tensor
    pooled: Tensor

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images).index_select(1, self.teacher_classes)
        constant = stop_relevance(logits)
        within = constant.unsqueeze(2).masked_fill(self.pooled == 0, -torch.inf)
        total = within.logsumexp(1)
        shares = ((within - total.unsqueeze(1)).exp() * self.pooled).sum(2)
        return (logits * shares) @ self.pooled + (total - (constant * shares) @ self.pooled)


def map_classes(network: nn.Module, class_map: ClassMap, teacher_classes: int, input_shape: ImageShape) -> nn.Module:
    """Return the network with one logit for each class of the dataset.

    If each class has one class of the teacher's, and the last layer alone makes the logits, that layer keeps these
    outputs, so that students can copy it. Otherwise `MappedClasses` pools the logits.
    """
    name = last_layer(network, teacher_classes)
    single = all(len(indices) == 1 for indices in class_map)
    if not single or name is None or else_in_logits(network, name, teacher_classes, input_shape) is not None:
        return MappedClasses(network, class_map, teacher_classes)
    layer = network.get_submodule(name)
    rows = torch.tensor([indices[0] for indices in class_map])
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    for key in ("weight", "bias"):
        if (parameter := getattr(layer, key)) is not None:
            setattr(layer, key, nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(rows))
    return network
