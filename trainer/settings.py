"""What a training is told: what decides its weights, and how it is run. Data only; what they mean is elsewhere."""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from trainer.errors import TrainingError
from trainer.loop.losses import MAP_LOSSES
from trainer.stream.order import steps_per_epoch

MAX_STEPS = 10**9
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float64")


@dataclass(frozen=True)
class Settings:
    """What decides the weights, besides data, store and network; it is in ``config.json`` under ``training``.

    loss: the weight of each method (`trainer.loop.methods`). batch_size: samples of a step, over all processes.
    lr (the peak), optimizer, momentum, weight_decay, schedule, warmup (steps), ema (decay): see `trainer.loop.optim`.
    clip_norm: gradients are scaled down to it, None for not at all. accumulate: parts that a batch is shown in.
    augment: names of `trainer.loop.augmentation`. map_loss, pyramid: how maps are compared (`trainer.loop.losses`).
    mask_target: the teacher's map is 0 outside the dataset's mask.
    precision: float32, tf32 (in the matrix products of CUDA), bfloat16 (layers, while heatmaps and parameters stay in
    float32), float64 (all, to compare trainings); auto is tf32 on CUDA and float32 elsewhere.
    """

    loss: Mapping[str, float]
    steps: int
    batch_size: int = 128
    lr: float = 4e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    warmup: int | None = None
    clip_norm: float | None = None
    ema: float | None = None
    accumulate: int = 1
    augment: tuple[str, ...] = ()
    map_loss: str = "l1"
    pyramid: bool = True
    mask_target: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (("--batch-size", self.batch_size), ("--accumulate", self.accumulate)):
            if value < 1:
                raise TrainingError(f"{option} must be at least 1, got {value}")
        if self.map_loss not in MAP_LOSSES:
            raise TrainingError(f"unknown --map-loss '{self.map_loss}': choose one of {', '.join(MAP_LOSSES)}")
        if self.precision not in PRECISIONS:
            raise TrainingError(f"unknown --precision '{self.precision}': choose one of {', '.join(PRECISIONS)}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise TrainingError(f"--clip-norm must be a positive number, got {self.clip_norm:g}")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "loss": dict(self.loss), "augment": list(self.augment)}


@dataclass(frozen=True)
class Runtime:
    """How a training is run, which decides nothing of its result but rounding.

    device: auto, cpu, cuda, cuda:N. workers, memory_budget: see `trainer.stream.stream.stream`. checkpoint_steps,
    checkpoint_minutes: how often there is a checkpoint, None for not by that; the last keep_checkpoints stay.
    log_steps: every so many steps there is a line in ``metrics.jsonl``. profile: write a trace of some steps.
    cuda_graph: whether a step is recorded and replayed on CUDA, by one process; None is for networks of our own and of
    torchvision. snapshots: at so many moments, evenly spread and the last step among them, the weights are kept (the
    averaged ones, where there is an average).
    """

    device: str = "auto"
    workers: int = 2
    memory_budget: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep_checkpoints: int = 2
    log_steps: int = 20
    profile: bool = False
    cuda_graph: bool | None = None
    snapshots: int = 0

    def __post_init__(self) -> None:
        if self.snapshots < 0:
            raise TrainingError(f"--snapshots must be at least 0, got {self.snapshots}")
        for option in ("checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "log_steps"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise TrainingError(f"--{option.replace('_', '-')} must be more than 0, got {value:g}")


def check_types(options: Mapping[str, Any], *kinds: Any) -> None:
    """Raise TrainingError for a value that is not of the type that a field or parameter of its name has."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for name, value in options.items():
        allowed = get_args(hints.get(name)) or (hints.get(name),)
        plain = tuple(get_origin(each) or each for each in allowed if each is not Any)
        if not plain or None in plain or get_origin(hints[name]) in (tuple, collections.abc.Mapping, dict):
            continue
        plain = (*plain, int) if float in plain else plain
        if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
            named = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in plain)
            raise TrainingError(f"--{name.replace('_', '-')} is {value!r}, which is no {named}")


def split_options(options: Mapping[str, Any], **settled: Any) -> tuple[Settings, Runtime]:
    """Options by name, each to where it belongs. Raises TypeError for one that neither has, TrainingError."""
    check_types({**options, **settled}, Settings, Runtime)
    of_runtime = {field.name for field in dataclasses.fields(Runtime)}
    runtime = Runtime(**{name: value for name, value in options.items() if name in of_runtime})
    return Settings(**{name: value for name, value in options.items() if name not in of_runtime}, **settled), runtime


def as_given(given: Mapping[str, Any], settings: Settings, runtime: Runtime) -> dict[str, Any]:
    """The options of a training as they were given, and the rest as it is taken to be; plain values, for YAML.

    Text that could be read as something else in ``arch_options`` is in quotes, as on the command line.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(one) for one in value]
        finite = isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value))
        return value if finite else str(value)

    taken = {**dataclasses.asdict(settings), **dataclasses.asdict(runtime)}
    for of_students in ("loss", "map_loss", "pyramid", "mask_target"):  # which teachers have no options for
        del taken[of_students]
    options = {
        name: plain(value) for name, value in {**taken, **given}.items() if name not in ("options", "arch_options")
    }
    of_arch = {name: _as_text(value) for name, value in (given.get("arch_options") or {}).items()}
    return {**options, "arch_options": of_arch} if of_arch else options


def _as_text(value: Any) -> Any:
    try:
        json.loads(value)
    except (TypeError, ValueError):
        return value
    return json.dumps(value)


def total_steps(samples: int, batch_size: int, steps: int | None, epochs: float | None, default: int) -> int:
    """The number of optimizer steps: ``steps``, or ``epochs`` passes over the samples, or the default.

    Raises TrainingError for both at once, for less than one step, and for a batch size under 1.
    """
    if batch_size < 1:
        raise TrainingError(f"--batch-size must be at least 1, got {batch_size}")
    if steps is not None and epochs is not None:
        raise TrainingError(f"give --steps ({steps}) or --epochs ({epochs:g}), not both")
    if steps is None and epochs is None:
        return default
    if epochs is not None:
        steps = math.ceil(min(epochs, 1e12) * steps_per_epoch(samples, batch_size)) if epochs > 0 else 0
    assert steps is not None
    if steps > MAX_STEPS:
        raise TrainingError(f"{steps:.3g} steps are more than {MAX_STEPS:,}: give fewer --steps or --epochs")
    if steps < 1:
        given = f"--steps {steps}" if epochs is None else f"--epochs {epochs:g}"
        raise TrainingError(f"{given} is less than one step: give at least 1 step, or more than 0 epochs")
    return steps
