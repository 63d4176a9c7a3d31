"""The options of stage one. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from options import Among, Doc, Ge, Gt, Heading, InsteadOf, Kind, Le, Message, Option, OptionSet
from options.common import CUSTOM_CODE, DatasetPlace, Device, SavedSegmenter, Seed, TeacherFactory, Threads
from pipeline.errors import RelevanceError
from pipeline.explainers import EXPLAINERS
from teacher_cache.codec import COMPRESSORS, PRECISIONS, Compression, unknown_codec
from teacher_cache.errors import CacheError

_COMPRESSORS = ", ".join(f"{name} ({compressor.note})" for name, compressor in COMPRESSORS.items())
_AUTO = ", ".join(f"{precision.compressor} for {name}" for name, precision in PRECISIONS.items())


@dataclass(frozen=True, kw_only=True)
class CachingOptions(OptionSet):
    """The options of ``cache-explanations``."""

    ERROR: ClassVar[type[Exception]] = RelevanceError
    HEADING: ClassVar[str] = "Files"

    data: DatasetPlace
    teacher: Annotated[
        Any,
        Kind.TEACHER,
        Doc(
            "Teacher: a folder that train-teacher wrote; a network of your own with its weights, such as "
            "resnet50, timm:NAME or hf:FOLDER; or a vision-language model clip:ARCH. ARCH is a name of open_clip, a "
            "configuration (.json), or a folder with a configuration and weights."
        ),
    ]
    split: Annotated[str, Doc("Split to explain.")] = "train"
    out: Annotated[Any, Kind.LOCATION, Doc("Heatmap store: new, or an unfinished one to resume.")]
    teacher_factory: Annotated[TeacherFactory, Heading(CUSTOM_CODE)] = None
    segmenter: Annotated[SavedSegmenter, Heading(CUSTOM_CODE)] = None
    debias: Annotated[
        Any,
        Heading(CUSTOM_CODE),
        Doc("Front of your own network; or of a saved teacher, if it has a function of your own. Its code is run."),
    ] = None
    explainer: Annotated[
        str,
        Among(EXPLAINERS),
        Heading("Explanations"),
        Doc("Explainer (see docs/engine.md). Students of the store use the same one."),
    ] = "flex"
    draws: Annotated[
        int | None,
        Ge(1),
        Le(10_000),
        Heading("Explanations"),
        Doc("Number of heatmaps per sample, each for one class and one ε."),
    ] = None
    epsilon_range: Annotated[
        tuple[float, float], Gt(0), Heading("Explanations"), Doc("Range from which ε is drawn log-uniformly.")
    ] = (0.1, 1.0)
    seed: Annotated[Seed, Heading("Explanations")] = 0
    precision: Annotated[
        str,
        Among(PRECISIONS),
        Heading("Storage"),
        Doc(
            "Precision of the stored heatmaps. int8 takes less than half the space of float16 (see "
            "docs/results/storage.md)."
        ),
    ] = "float16"
    codec: Annotated[
        str,
        Among(COMPRESSORS, or_else=("auto", "blosc-COMPRESSOR-LEVEL-SHUFFLE")),
        Heading("Storage"),
        Doc(
            f"Compressor: {_COMPRESSORS}, or a full codec such as blosc-zstd-9-bitshuffle. A compressor alone takes "
            f"the shuffle that makes the first heatmaps smallest. auto means {_AUTO}."
        ),
    ] = "auto"
    resolution: Annotated[
        int,
        Ge(1),
        Heading("Storage"),
        Doc(
            "Factor by which heatmaps are average-pooled before they are stored. Students are compared at this "
            "resolution and at coarser ones."
        ),
    ] = 1
    features: Annotated[
        bool, Heading("Storage"), Doc("Store the teacher's deep features too, for the method features.")
    ] = False
    device: Annotated[Device, Heading("Run")] = "auto"
    threads: Annotated[Threads, Heading("Run")] = None
    batch_size: Annotated[
        Any,
        Kind.BATCH_SIZE,
        Heading("Run"),
        Doc(
            "Images per batch. Default: 128, and on a CPU fewer if the images are large. auto means the largest power "
            "of two that fits into a GPU's memory, and on a CPU the default."
        ),
    ] = None
    share: Annotated[
        bool, Heading("Run"), Doc("Divide the shards with other processes that write the same store with this option.")
    ] = False
    scheduler: Annotated[
        str | None,
        Heading("Run"),
        InsteadOf("share"),
        Doc(
            "Address of a Dask scheduler whose workers run the command, such as tcp://10.0.0.1:8786. They must see the "
            "same paths. Default: run on this machine."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size not in (None, "auto") and (isinstance(self.batch_size, str) or self.batch_size < 1):
            raise RelevanceError(Message(Option("batch_size"), f" must be at least 1, or auto, got {self.batch_size}"))
        if self.codec not in (names := ("auto", *COMPRESSORS)):
            try:
                Compression.parse(self.codec)
            except CacheError:
                raise RelevanceError(unknown_codec(self.codec, names)) from None
        if self.share and self.scheduler is not None:
            raise RelevanceError(
                Message(
                    "give ", Option("share", True), " or ", Option("scheduler"),
                    ", not both: a cluster divides the shards by itself",
                )
            )  # fmt: skip
        if self.threads is not None and self.scheduler is not None:
            raise RelevanceError(
                Message(
                    "give ", Option("threads", self.threads), " or ", Option("scheduler"),
                    ", not both: start the workers of the cluster with OMP_NUM_THREADS",
                )
            )  # fmt: skip
