"""The options of a training: what decides its weights, and how it is run. Data only, without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from options import Among, Doc, Ge, Gt, Heading, InsteadOf, Kind, Le, Lt, Message, Metavar, Option, OptionSet, Separated
from options.common import DatasetPlace, Device, RunFolder, Seed, StudentFactory, TeacherFactory, Threads, Weights
from pipeline.errors import ModelError
from pipeline.networks.debias import DEBIAS, Debias, front_names, front_text
from pipeline.networks.teacher_options import PreprocessingOptions
from trainer.errors import TrainingError
from trainer.loop.augmentation import AUGMENTATIONS
from trainer.loop.losses import MAP_LOSSES
from trainer.loop.methods import METHODS, of_store
from trainer.loop.optim import FINE, OPTIMIZERS, RATES, SCHEDULES

MAX_STEPS = 10**9
NO_AUGMENTATION = "none"
TEACHER_STEPS, STUDENT_STEPS = 1000, 3000  # where neither steps nor epochs is given
Precision = Literal["auto", "float32", "tf32", "bfloat16", "float64"]
PRECISIONS = get_args(Precision)
Head = Literal["frozen", "attention-pool", "free"]
_RATES = ", ".join(f"{rate:g} ({name})" for name, rate in RATES.items())
ClassWeights = Annotated[
    str | tuple[str | float, ...] | None,
    Heading("Training"),
    Separated(),
    Doc(
        "Weight of each class in the loss, for unbalanced data: none, balanced (samples / (classes · samples of "
        "the class)), or a number for each class in the dataset's order, such as 1,3.5. With a heatmap store, the "
        "class of a sample is the teacher's answer."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Network(OptionSet):
    """The network that is trained."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Network"

    arch: Annotated[
        str,
        Kind.ARCHITECTURE,
        Doc("Architecture: small-cnn, small-resnet, the name of a torchvision model, timm:NAME, or hf:FOLDER."),
    ] = "small-cnn"
    arch_options: Annotated[dict[str, Any] | None, Doc("Option of the architecture, such as width=64. Repeatable.")] = (
        None
    )
    bias_free: Annotated[bool | None, Doc("Remove every additive term from the network, such as its biases.")] = None


@dataclass(frozen=True, kw_only=True)
class Length(OptionSet):
    """How long a training takes."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Training"

    steps: Annotated[int | None, Ge(1), Doc("Number of optimizer steps.")] = None
    epochs: Annotated[
        float | None,
        InsteadOf("steps"),
        Gt(0),
        Doc("Number of passes over the training data, instead of a number of steps."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Learning(OptionSet):
    """How a network learns. See `trainer.loop.optim` for what the names mean."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Training"

    batch_size: Annotated[int, Ge(1), Doc("Samples per step, in all processes together.")] = 128
    accumulate: Annotated[
        int, Ge(1), Doc("Number of micro-batches into which each batch is split, to save memory.")
    ] = 1
    lr: Annotated[
        float | None,
        Gt(0),
        Doc(f"Peak learning rate. Default: {_RATES}; a quarter of it for a start from given weights."),
    ] = None
    optimizer: Annotated[str, Among(OPTIMIZERS), Doc("Optimizer.")] = "adam"
    momentum: Annotated[float, Ge(0), Lt(1), Doc("Momentum of the optimizer sgd.")] = 0.9
    weight_decay: Annotated[float, Ge(0), Doc("Weight decay. It does not apply to biases and norms.")] = 0.0
    schedule: Annotated[str, Among(SCHEDULES), Doc("Learning-rate schedule.")] = "one-cycle"
    warmup: Annotated[int | None, Ge(0), Doc("Warm-up steps, in which the learning rate rises.")] = None
    clip_norm: Annotated[float | None, Gt(0), Doc("Maximum gradient norm. Default: no clipping.")] = None
    ema: Annotated[
        float | None,
        Gt(0),
        Lt(1),
        Doc("Decay of an exponential moving average of the weights, such as 0.999. Default: no average."),
    ] = None
    augment: Annotated[
        tuple[str, ...],
        Among(AUGMENTATIONS),
        Separated(),
        Doc(
            "Augmentations, such as flip,crop. flip, shift and crop move the image and its heatmap together. "
            "background repaints the image outside the masks."
        ),
    ] = ()
    precision: Annotated[Precision, Doc("Floating-point precision. auto means tf32 on CUDA and float32 elsewhere.")] = (
        "auto"
    )
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Comparison(OptionSet):
    """How a student's heatmaps are compared with the teacher's."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Loss"

    map_loss: Annotated[str, Among(MAP_LOSSES), Doc("Distance between two heatmaps.")] = "l1"
    pyramid: Annotated[bool, Doc("Compare heatmaps at several resolutions, or at full resolution only.")] = True
    mask_target: Annotated[bool, Doc("Set the teacher's heatmaps to 0 outside the dataset's masks.")] = False


@dataclass(frozen=True, kw_only=True)
class Settings(Comparison, Learning):
    """What decides the weights, besides data, store and network; ``config.json`` has it under ``training``.

    loss: the weight of each method of `trainer.loop.methods`. steps: the number of optimizer steps. class_weights: the
    weight of each class in the loss; None for no weights.
    """

    lr: Annotated[float, Gt(0)] = RATES["adam"]
    loss: Mapping[str, float]
    steps: int
    class_weights: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        options: OptionSet,
        loss: Mapping[str, float],
        steps: int,
        class_weights: tuple[float, ...] | None = None,
    ) -> Settings:
        """Take the settings out of a command's options. The other arguments are what the options mean.

        Options without a value that depend on a dataset or store are those of a training without either.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"loss", "steps", "class_weights"}
        others = {n: getattr(options, n) for n in names if hasattr(options, n)}
        others["augment"] = tuple(name for name in others["augment"] or () if name != NO_AUGMENTATION)
        if others["optimizer"] is None:
            others["optimizer"] = _usual_optimizer(options, loss)
        if others["lr"] is None:
            given = any(getattr(options, name, None) is not None for name in ("init", "weights"))
            others["lr"] = RATES.get(others["optimizer"], RATES["adam"]) / (FINE if given else 1)
        return cls(loss=loss, steps=steps, class_weights=class_weights, **others)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON. ``class_weights`` is left out if there are none, as in earlier versions."""
        plain = {**dataclasses.asdict(self), "loss": dict(self.loss), "augment": list(self.augment)}
        weights = plain.pop("class_weights")
        return plain if weights is None else {**plain, "class_weights": list(weights)}


def _usual_optimizer(options: Any, loss: Mapping[str, float]) -> str:
    """Return Muon for our own networks that learn from a store; on a CPU, orthogonalising wide matrices takes long."""
    from pipeline.networks.models import OWN

    return "muon" if of_store(loss) and options.student_factory is None and options.arch in OWN else "adam"


@dataclass(frozen=True, kw_only=True)
class Runtime(OptionSet):
    """How a training is run. This changes its result by no more than rounding.

    cuda_graph: None means on, unless a network is the user's own code. snapshots: of the averaged weights, where there
    is an average.
    """

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Run"

    device: Device = "auto"
    threads: Threads = None
    workers: Annotated[int, Ge(1), Doc("Number of threads that read data.")] = 2
    memory_budget: Annotated[
        int | None,
        Kind.SIZE,
        Doc(
            "Memory for decoded data, such as 4GB. Default: half of the free memory. Data that fits is read once. Two "
            "windows of samples, usually at most 512 MiB, are always in memory."
        ),
    ] = None
    checkpoint_steps: Annotated[int | None, Ge(1), Doc("Number of steps between two checkpoints.")] = None
    checkpoint_minutes: Annotated[
        float | None, Gt(0), Le(math.inf), Doc("Number of minutes between two checkpoints, or inf.")
    ] = 10.0
    keep_checkpoints: Annotated[int, Ge(1), Doc("Number of checkpoints to keep, the newest ones.")] = 2
    log_steps: Annotated[int, Ge(1), Doc("Number of steps between two lines of metrics.jsonl.")] = 20
    profile: Annotated[bool, Doc("Write a PyTorch profiler trace of the first steps.")] = False
    cuda_graph: Annotated[
        bool | None,
        Doc("Record a step as a CUDA graph and replay it, which is faster. Default: on for built-in networks."),
    ] = None
    snapshots: Annotated[int, Ge(0), Doc("Number of snapshots of the weights, evenly spread over the training.")] = 0

    @classmethod
    def of(cls, options: OptionSet) -> Runtime:
        """Take these options out of a command's."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class _Trained(OptionSet):
    """What all trainings share."""

    def record(self) -> dict[str, Any]:
        """Return the options as plain values for ``config.yaml``, with which the command repeats the training.

        Text in ``arch_options`` that could be read as another type is quoted, as on the command line.
        """
        options = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        arch_options: Mapping[str, Any] = options.pop("arch_options") or {}
        texts = {name: _as_text(value) for name, value in arch_options.items()}
        return {**options, "arch_options": texts} if texts else options


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(_Trained, PreprocessingOptions, Network, Length, Learning, Runtime):
    """The options of ``train-teacher``."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Files"

    data: DatasetPlace
    out: RunFolder
    debias: Annotated[
        Debias,
        Among(DEBIAS, or_else=("MODULE:FUNCTION",), several=True),
        Heading("Debiasing"),
        Doc(
            "Debiasing front of the teacher. grayscale hides hue and brightness, mask and segmenter hide the "
            "background, mask-mean and mask-blur fill it with the object's colours, mask-background-mean and "
            "mask-background-blur with its own, none trains the ERM baseline. MODULE:FUNCTION is a front of your own, "
            "whose code is run. Several fronts are applied in order: mask,grayscale."
        ),
    ] = "grayscale"
    segmenter: Annotated[
        str | None,
        Heading("Debiasing"),
        Doc(
            "Segmentation network for the debiasing front segmenter: torchvision:NAME, a file (.pt2, .pt), or "
            "MODULE:FUNCTION. The code of a file or function is run."
        ),
    ] = None
    weights: Annotated[Weights, Heading("Network")] = None
    freeze_backbone: Annotated[
        bool, Heading("Network"), Doc("Train the last layer alone, on top of the weights to start from.")
    ] = False
    teacher_factory: Annotated[TeacherFactory, Heading("Network"), InsteadOf("arch")] = None
    class_weights: ClassWeights = None
    validation: Annotated[
        bool,
        Heading("Training"),
        Doc(
            "Keep the weights with the lowest loss on the validation split, which is computed five times. Default: "
            "keep the last weights."
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.debias, str):
            try:
                front_names(self.debias)
            except ModelError as error:
                raise TrainingError(Message(error)) from None

    def record(self) -> dict[str, Any]:
        """Return the options as plain values, a function as its module and name."""
        return {**super().record(), "debias": front_text(self.debias)}


@dataclass(frozen=True, kw_only=True)
class StudentOptions(_Trained, Comparison, PreprocessingOptions, Network, Length, Learning, Runtime):
    """The options of ``train-student``."""

    ERROR: ClassVar[type[Exception]] = TrainingError
    HEADING: ClassVar[str] = "Files"

    data: DatasetPlace
    cache: Annotated[
        Any,
        Kind.LOCATION,
        Doc("Heatmap store of the train split. The methods erm, group-dro, rrr and isnet need none."),
    ] = None
    validation_cache: Annotated[
        Any,
        Kind.LOCATION,
        Doc(
            "Heatmap store of the validation split. With it, the run keeps the weights with the lowest validation "
            "loss, and warns you of a student that has probably learnt the bias; without it, the last weights."
        ),
    ] = None
    out: RunFolder
    method: Annotated[
        str | None,
        Among(METHODS),
        Heading("Loss"),
        Doc(
            "Training method. Default: match the heatmaps of the store. Where the teacher has biases and the student "
            "has none, they are completed if they sum to at least half of the logits. For images that get other "
            "backgrounds, the student also matches the teacher's outputs."
        ),
    ] = None
    loss: Annotated[
        str | None,
        Heading("Loss"),
        InsteadOf("method"),
        Doc("Weighted sum of methods, such as lrp=1,output=0.1, instead of one method."),
    ] = None
    head: Annotated[
        Head,
        Heading("Network"),
        Doc(
            "Last layer of the student: frozen is the teacher's, attention-pool is the teacher's with the attention "
            "pooling in front of it (CLIP ResNets), free is the student's own."
        ),
    ] = "frozen"
    student_factory: Annotated[StudentFactory, Heading("Network"), InsteadOf("arch")] = None
    init: Annotated[Weights, Heading("Network")] = None
    arch: Annotated[
        str | None,
        Kind.ARCHITECTURE,
        Heading("Network"),
        Doc(
            "Architecture: small-cnn, small-resnet, the name of a torchvision model, timm:NAME, or hf:FOLDER. Default: "
            "the teacher's, if that is small-cnn or small-resnet, and else small-cnn."
        ),
    ] = None  # type: ignore[assignment]  # a name, once the teacher is known
    optimizer: Annotated[
        str | None,
        Among(OPTIMIZERS),
        Heading("Training"),
        Doc(
            "Optimizer. Default: muon for small-cnn and small-resnet that learn from a store, adam for other networks."
        ),
    ] = None  # type: ignore[assignment]  # a name, once the network is known
    augment: Annotated[
        tuple[str, ...] | None,
        Among(AUGMENTATIONS, or_else=(NO_AUGMENTATION,)),
        Heading("Training"),
        Separated(),
        Doc(
            "Augmentations, such as flip,crop. flip, shift and crop move the image and its heatmap together. "
            "background repaints the image outside the masks. Default: background if the dataset has masks and the "
            "teacher sees nothing outside of them. none means no augmentation."
        ),
    ] = None  # type: ignore[assignment]  # the names, once dataset and teacher are known
    tune: Annotated[
        float | None,
        Gt(0),
        Metavar("SECONDS"),
        Heading("Training"),
        Doc("First choose the learning rate by short trainings, which take about this long. Default: no such search."),
    ] = None
    teacher_weights: Annotated[
        bool, Heading("Network"), Doc("Allow the student to start from the weights of its own teacher.")
    ] = False
    class_weights: ClassWeights = None
    clip_norm: Annotated[float | None, Gt(0), Heading("Training"), Doc("Maximum gradient norm.")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.augment or ()
        for name in names:
            if name != NO_AUGMENTATION:
                AUGMENTATIONS.check(name)
            elif len(names) > 1:
                given = Option("augment", ",".join(names))
                raise TrainingError(Message(given, f" has '{NO_AUGMENTATION}' beside others: leave it out"))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return value
    finite = isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value))
    return value if finite else str(value)


def _as_text(value: Any) -> Any:
    try:
        json.loads(value)
    except (TypeError, ValueError):
        return value
    return json.dumps(value)


def total_steps(samples: int, options: Any, default: int) -> int:
    """Return the number of optimizer steps that the options ask for.

    Args:
        samples: the number of samples of the training split.
        options: has ``steps``, ``epochs`` and ``batch_size``, as `TeacherOptions` and `StudentOptions` do.
        default: the number of steps where the options have neither ``steps`` nor ``epochs``.

    Raises:
        TrainingError: both are given, or they make less than one step or more than `MAX_STEPS`.
    """
    from trainer.stream.order import steps_per_epoch

    steps, epochs = options.steps, options.epochs
    if steps is not None and epochs is not None:
        raise TrainingError(Message("give ", Option("steps", steps), " or ", Option("epochs", epochs), ", not both"))
    if steps is None and epochs is None:
        return default
    if epochs is not None:
        steps = math.ceil(min(epochs, 1e12) * steps_per_epoch(samples, options.batch_size))
    if steps > MAX_STEPS:
        raise TrainingError(
            Message(
                f"{steps:.3g} steps are more than {MAX_STEPS:,}: give fewer ", Option("steps"), " or ", Option("epochs")
            )
        )
    return int(steps)
