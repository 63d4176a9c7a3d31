"""Options of the commands and functions that evaluate, show and report models. No PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from options import Among, Doc, Ge, Heading, Kind, Le, OptionSet
from options.common import CUSTOM_CODE, DatasetPlace, Device, Fit, SavedFront, SavedSegmenter, StudentFactory
from pipeline import EXPLAINERS, RelevanceError

EPSILON = 0.1  # ε of a map: the middle of the range from which a store draws by default
TRUE, PREDICTED = "true", "predicted"  # classes to explain that are not a class by its name


@dataclass(frozen=True, kw_only=True)
class OwnCode(OptionSet):
    """The user's own code that builds networks. It runs only if these options name it."""

    ERROR = RelevanceError
    HEADING = CUSTOM_CODE

    student_factory: StudentFactory = None
    segmenter: SavedSegmenter = None
    debias: SavedFront = None


@dataclass(frozen=True, kw_only=True)
class Running(OptionSet):
    """How a command is run."""

    ERROR = RelevanceError
    HEADING = "Run"

    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(OwnCode, Running):
    """Options of `evaluate`."""

    HEADING = "Files"

    data: DatasetPlace
    model: Annotated[
        Any, Kind.TEACHER, Doc("Folder of a teacher or a student, or clip:ARCH for a vision-language model.")
    ]


@dataclass(frozen=True, kw_only=True)
class ShowOptions(OwnCode, Running):
    """Options of `show_explanations`."""

    HEADING = "Explanations"

    data: Annotated[DatasetPlace, Heading("Files")]
    models: Annotated[
        tuple[Any, ...],
        Kind.TEACHER,
        Heading("Files"),
        Doc("Folders of teachers or students. Each is one column of the picture."),
    ] = ()
    caches: Annotated[
        tuple[Any, ...],
        Kind.LOCATION,
        Heading("Files"),
        Doc("Heatmap stores of the split. The first draws of each are one column of the picture."),
    ] = ()
    out: Annotated[str | Path, Kind.FOLDER, Heading("Files"), Doc("PNG file to write.")]
    split: Annotated[
        str | None,
        Heading("Samples"),
        Doc("Split of the samples. Default: the first test split, or train if there is none."),
    ] = None
    samples: Annotated[
        int | Sequence[int],
        Heading("Samples"),
        Doc("Number of samples, spread evenly over the split, or a list of their indices, from 0 on."),
    ] = 8
    explain: Annotated[
        str,
        Doc("Class to explain: true (the true class), predicted (each model's prediction), or the name of a class."),
    ] = TRUE
    epsilon: Annotated[float, Ge(0), Doc("ε of the models' heatmaps.")] = EPSILON
    explainer: Annotated[
        str,
        Among(EXPLAINERS),
        Doc("Explainer for the models (see docs/engine.md). Heatmaps of a store are shown as they are stored."),
    ] = "flex"


@dataclass(frozen=True, kw_only=True)
class CompareOptions(OwnCode, Running):
    """Options of `compare`, which `write_report` hands on."""

    HEADING = "Comparison"

    reference: Annotated[
        Any,
        Kind.TEACHER,
        Doc(
            "Model to whose heatmaps the heatmaps of the others are compared. Default: the first teacher with a "
            "debiasing front, or the first vision-language model."
        ),
    ] = None
    samples: Annotated[
        int, Ge(1), Le(50), Heading("Samples"), Doc("Number of samples of each split in the gallery.")
    ] = 6


@dataclass(frozen=True, kw_only=True)
class ReportOptions(CompareOptions):
    """Options of `write_report`."""

    HEADING = "Files"

    data: Annotated[
        Any, Kind.LOCATION, Doc("Dataset: a folder or a URL. Default: the dataset of the models' trainings.")
    ] = None
    out: Annotated[str | Path, Kind.FOLDER, Doc("HTML file to write.")]


@dataclass(frozen=True, kw_only=True)
class PredictOptions(OwnCode, Running):
    """Options of `predict`."""

    HEADING = "Explanations"

    model: Annotated[
        str | Path, Kind.FOLDER, Heading("Files"), Doc("Folder of a student, of a teacher or of a biased baseline.")
    ]
    images: Annotated[
        Any, Kind.PATH, Heading("Files"), Doc("Image files, and folders with images at any depth: one path or several.")
    ]
    fit: Annotated[
        Fit | None,
        Heading("Images"),
        Doc(
            "How images of another aspect ratio are fitted to the model: crop cuts out the middle, pad adds black "
            "margins, stretch squeezes. Default: as in the dataset of the training, or crop if that is not there."
        ),
    ] = None
    explain: Annotated[bool, Doc("Explain each prediction by a heatmap of the predicted class.")] = False
    epsilon: Annotated[float, Ge(0), Doc("ε of the heatmaps.")] = EPSILON
    explainer: Annotated[str, Among(EXPLAINERS), Doc("Explainer of the heatmaps (see docs/engine.md).")] = "flex"


@dataclass(frozen=True, kw_only=True)
class WriteOptions(PredictOptions):
    """Options of `write_predictions`."""

    HEADING = "Output"

    out: Annotated[
        str | Path,
        Kind.FOLDER,
        Doc("CSV file to write. The pictures of the explanations go to a folder beside it."),
    ]
    probabilities: Annotated[bool, Doc("Add a column with the probability of each class.")] = False
