"""The options of stage one. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from options import Among, Doc, Ge, Gt, Heading, Kind, Le, Message, Option, OptionSet
from pipeline.errors import RelevanceError
from pipeline.explainers import EXPLAINERS
from teacher_cache.codec import PRECISIONS

DRAWS = 4  # of each sample, where the explainer knows classes and ε


@dataclass(frozen=True, kw_only=True)
class CachingOptions(OptionSet):
    """The options of ``cache-explanations``."""

    ERROR: ClassVar[type[Exception]] = RelevanceError
    HEADING: ClassVar[str] = "Files"

    data: Annotated[Any, Kind.LOCATION, Doc("Dataset.")]
    teacher: Annotated[
        Any,
        Kind.TEACHER,
        Doc(
            "Teacher: a folder of train-teacher, or a vision-language model clip:ARCH: a name of open_clip, a "
            "configuration (.json), or a folder with one and weights."
        ),
    ]
    split: Annotated[str, Doc("Split to explain.")] = "train"
    out: Annotated[Any, Kind.LOCATION, Doc("Heatmap store: new, or an unfinished one to resume.")]
    segmenter: Annotated[
        str | None,
        Heading("Your own code"),
        Doc("Segmenter of the teacher, if it is a file or a function of your own, whose code is run."),
    ] = None
    explainer: Annotated[
        str,
        Among(EXPLAINERS),
        Heading("Explanations"),
        Doc("Explainer (docs/engine.md). Students of the store use the same one."),
    ] = "flex"
    draws: Annotated[
        int | None, Ge(1), Le(10_000), Heading("Explanations"), Doc("Heatmaps per sample, each of a class and an ε.")
    ] = None
    epsilon_range: Annotated[
        tuple[float, float], Gt(0), Heading("Explanations"), Doc("Range of ε, which is drawn log-uniformly from it.")
    ] = (0.01, 1.0)
    seed: Annotated[int, Ge(0), Le(2**63 - 1), Heading("Explanations"), Doc("Random seed.")] = 0
    precision: Annotated[
        str,
        Among(PRECISIONS),
        Heading("Storage"),
        Doc("Precision of the stored heatmaps. int8 takes less than half of float16 (docs/results/storage.md)."),
    ] = "float16"
    codec: Annotated[
        str,
        Heading("Storage"),
        Doc(
            "Compressor: lz4 (fast) or zstd (small), with the shuffle that makes the first heatmaps smallest; or a "
            "full codec such as blosc-zstd-9-bitshuffle. auto is lz4, and zstd for int8."
        ),
    ] = "auto"
    resolution: Annotated[
        int,
        Ge(1),
        Heading("Storage"),
        Doc("Factor by which stored heatmaps are average-pooled. Students are compared from that resolution on."),
    ] = 1
    features: Annotated[
        bool, Heading("Storage"), Doc("Store the teacher's deep features too, for the method features.")
    ] = False
    device: Annotated[str, Heading("Run"), Doc("Device: auto, cpu, cuda or cuda:N.")] = "auto"
    threads: Annotated[
        int | None, Ge(1), Heading("Run"), Doc("Number of CPU threads of PyTorch, which by default chooses itself.")
    ] = None
    batch_size: Annotated[
        Any,
        Kind.BATCH_SIZE,
        Heading("Run"),
        Doc("Images per batch. auto is the largest power of two that a GPU's memory holds, and 128 on a CPU."),
    ] = 128
    share: Annotated[
        bool, Heading("Run"), Doc("Divide the shards with other processes that write this store with the same option.")
    ] = False
    scheduler: Annotated[
        str | None,
        Heading("Run"),
        Doc(
            "Address of a Dask cluster to run on, such as tcp://10.0.0.1:8786. Its workers must see the same paths. "
            "Default: this machine."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto" and (isinstance(self.batch_size, str) or self.batch_size < 1):
            raise RelevanceError(Message(Option("batch_size"), f" must be at least 1, or auto, got {self.batch_size}"))
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
