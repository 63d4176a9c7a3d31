"""Options that several commands have, each with its type, bounds and help text. Their defaults are not here.

A dataclass may add further notes: ``seed: Annotated[Seed, Heading("Explanations")] = 0``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from typing_extensions import Doc

from options.fields import Kind

Fit = Literal["crop", "pad", "stretch"]  # how images of another aspect ratio are fitted
CUSTOM_CODE = "Custom code"  # heading of the options that run code of the user

DatasetPlace = Annotated[Any, Kind.LOCATION, Doc("Dataset: a folder or a URL.")]  # a `data.Location`, without Zarr
RunFolder = Annotated[str | Path, Kind.FOLDER, Doc("Output folder: new, empty, or an unfinished run to resume.")]
Device = Annotated[str, Doc("Device: auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, Ge(1), Doc("Number of CPU threads. Default: one for each core that the process may use.")
]
Seed = Annotated[int, Ge(0), Le(2**63 - 1), Doc("Random seed.")]
StudentFactory = Annotated[
    str | None, Doc("Function that builds your own network, as MODULE:FUNCTION. Its code is run.")
]
TeacherFactory = Annotated[
    str | None, Doc("Function that builds the teacher's network, as MODULE:FUNCTION. Its code is run.")
]
Weights = Annotated[
    str | Path | None,
    Kind.PATH,
    Doc("Weights to start from: a file (.pt, .pth, .safetensors) or a Hugging Face folder. Default: random ones."),
]
SavedFront = Annotated[
    Any,
    Doc(
        "Debiasing front that the teacher was trained with, if it has a function of your own, MODULE:FUNCTION. Its "
        "code is run."
    ),
]
SavedSegmenter = Annotated[
    str | None,
    Doc("Segmenter that the teacher was trained with, if it is a file or MODULE:FUNCTION. Its code is run."),
]
