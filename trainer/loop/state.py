"""What a training has: the description that it starts from, and the parts of one that runs.

Not here: what is done with them (`training.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from options import Message
from pipeline import Classifier, ModelConfig
from pipeline.networks.checkpoints import Weights
from pipeline.networks.classifier import build_classifier
from pipeline.networks.fronts import Front
from pipeline.networks.segmenters import Segmenter
from teacher_cache import CacheInfo
from trainer.loop.clock import Clock, Timed
from trainer.loop.cuda_graph import Passes
from trainer.loop.distributed import Ranks
from trainer.loop.groups import GroupWeights
from trainer.loop.interruption import Interruption
from trainer.loop.repainting import REPAINTED
from trainer.loop.watch import Watch
from trainer.run_dir import RunDir
from trainer.settings import Runtime, Settings
from trainer.stream.stream import Source

TEACHER, STUDENT, STEP = 0, 1, 2  # purposes of a seed
START = {"step": 0, "seconds": 0.0, "seconds_waiting": 0.0, "first": None, "best": None, "repainted": REPAINTED}


@dataclass(frozen=True)
class Material:
    """What a training learns from.

    source: the samples. store: describes the store of their heatmaps. head: the teacher's last layer, to be copied.
    groups: the number of groups in the source's ``groups``. validation: the samples that choose the weights to keep.
    answers: the images with the teacher's logits, by which a collapse is noticed; None where the source has labels.
    It has masks too where the teacher sees nothing outside of them.
    compared: images of the validation split with labels and the teacher's logits, by which a leak is noticed.
    paths: where all of it lies, for the record.
    """

    source: Source
    store: CacheInfo | None = None
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: int = 0
    validation: Source | None = None
    answers: Source | None = None
    compared: Source | None = None
    paths: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """One training: what learns from what, and how.

    out: the folder of the run. config: describes the classifier. record: the options as the user gave them, for
    ``config.yaml``. purpose: `TEACHER` or `STUDENT`, a part of the seed of the initial weights. student_factory,
    segmenter, front: code and a network that the classifier is built with. weights: those that it starts from. notes:
    what the log tells when the training starts, but not when it is resumed.
    """

    out: str | Path
    config: ModelConfig
    material: Material
    settings: Settings
    runtime: Runtime
    record: Mapping[str, Any]
    purpose: int
    student_factory: str | None = None
    segmenter: Segmenter | None = None
    front: Front | None = None
    weights: Weights | None = None
    notes: tuple[Message, ...] = ()

    @property
    def fades(self) -> bool:
        """Whether the additive terms of the weights that it starts from fade out."""
        return "fades" in (self.config.start or {})

    def build(self, *, to_train: bool = False, fades: bool = False) -> Classifier:
        """Build the classifier, with random weights, or those that it starts from if it is to be trained."""
        weights = self.weights if to_train else None
        return build_classifier(
            self.config,
            self.student_factory,
            self.segmenter,
            front=self.front,
            to_train=to_train,
            weights=weights,
            fades=fades,
        )


@dataclass
class State:
    """A running training: where it runs, the parts that a step changes, and how far it has come.

    batch_samples: samples of a step in this process. learnt: the parameters that are trained. run: the folder of the
    run, None in all processes but the main one.
    """

    training: Training
    ranks: Ranks
    device: torch.device
    precision: str
    autocast: Callable[[], AbstractContextManager[Any]]
    batch_samples: int
    model: Classifier
    learnt: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler
    ema: AveragedModel | None
    group_weights: GroupWeights | None
    run: RunDir | None = None
    progress: dict[str, Any] = field(default_factory=lambda: {**START})

    @property
    def averaged(self) -> nn.Module:
        """The network whose weights are kept: the moving average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return bool(self.progress["step"] >= self.training.settings.steps)

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        optional = {"ema": self.ema, "groups": self.group_weights}
        return {**parts, **{name: part for name, part in optional.items() if part is not None}}

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {**{name: part.state_dict() for name, part in self._parts.items()}, "progress": dict(self.progress)}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint; raise KeyError, RuntimeError or ValueError where it is of other parts."""
        for name, part in self._parts.items():
            part.load_state_dict(checkpoint[name])
        self.progress.update(checkpoint["progress"])  # one of an earlier version has fewer entries


@dataclass
class Loop:
    """What the loop works with: batches, the passes of a step, and what watches, times, shows and interrupts it.

    ``passes`` are others once the network is in evaluation mode.
    """

    batches: Timed
    passes: Passes
    watch: Watch
    clock: Clock
    show: Callable[..., None]
    profile: Callable[[], None]
    interruption: Interruption
