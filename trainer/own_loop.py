"""What a training loop of the user's own needs besides its data: the student, and the loss of a batch.

Not here: the batches (`trainer.stream.explained`), and our own loop (`trainer.loop.training`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from data import Location
from options import Call, Message, Option
from pipeline import Classifier, bias_free, build_network
from pipeline.networks.heads import HeadSpec, attach_head, copy_head
from teacher_cache import CacheInfo, check_complete, open_cache
from trainer.distill import check_background, check_holds, making_a_store, share_if_needed
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, check_augmentations
from trainer.loop.methods import method_of, missing_from, moves, needs, of_store, parse_terms
from trainer.loop.step import VANISHED, losses_of, on_device, weighted
from trainer.settings import Settings
from trainer.start import bias_free_by_default

OF_A_DRAW = ("heatmaps", "scale", "target_class", "epsilon")  # fields of a batch that only have a meaning together
OF_ONE_NUMBER = {  # fields with one number for each sample, and their types; float64 and other integers work too
    "scale": torch.float32,
    "epsilon": torch.float32,
    "target_class": torch.int64,
    "labels": torch.int64,
    "groups": torch.int64,
}
REMEDY = "pass the batches of ExplainedDataset or ExplainedStream on as they are"


def build_student(
    cache: Location, network: str | nn.Module = "small-cnn", *, bias_free_form: bool | None = None, **options: Any
) -> nn.Module:
    """Build the student that `train_student` trains: a network with the teacher's last layer, copied and frozen.

    Args:
        cache: the store.
        network: the name of an architecture, or a network of your own that returns logits (N, K). It is copied.
        bias_free_form: remove every additive term. None means False for a network of your own, and for an architecture
            as the teacher; behind a teacher with biases, small-cnn and small-resnet have none where its maps sum to
            less than half of its logits.
        options: options of the architecture, such as ``width=64``.

    Returns:
        A network that takes float images (N, C, H, W) in [0, 1] and returns logits (N, K).

    Raises:
        CacheError: the store cannot be used.
        ModelError: the network cannot be built, or the teacher's last layer cannot replace its own.
    """
    store = open_cache(cache)
    classes, image_shape = len(store.info.teacher.class_names), store.info.dataset.image_shape
    if isinstance(network, str):
        free = bias_free_form
        if free is None:
            free = bias_free_by_default(store.info.teacher, network, None, {"lrp": 1}, share_if_needed(store))
        network, _ = build_network(network, classes, image_shape, free_of_biases=free, options=options)
    else:
        free = bool(bias_free_form)
        network = bias_free(network)[0] if free else copy.deepcopy(network)
    attach_head(network, HeadSpec.of(store.head), classes, image_shape, adapter_bias=not free)
    copy_head(network, store.head)
    return network


class DistillationLoss(nn.Module):
    """The loss of a student on a batch of `ExplainedDataset` or `ExplainedStream`, as `train_student` computes it.

    The class and the ε of each sample are those of the draw in the batch; the rule, the pooling and the precision of
    the maps are those of the store. It has no parameters. ``parts`` holds, after each call, the mean loss of each
    method, detached, and under ``vanished`` the share of samples whose student's map is zero or nearly so.

    Args:
        cache: the store; None for methods that need none (erm, rrr, isnet).
        method: as in `train_student`; None matches the maps of the store.
        loss: a weighted sum of methods, such as ``lrp=1,output=0.1``, instead of one method.
        map_loss, pyramid, mask_target: as in `train_student`.
        augment: augmentations that move images, heatmaps and masks together, while gradients are on.
        seed: the seed of the augmentations.

    Raises:
        CacheError: the store cannot be used, or lacks what the method needs.
        TrainingError: options that are wrong or do not fit together.
    """

    def __init__(
        self,
        cache: Location | None = None,
        *,
        method: str | None = None,
        loss: str | None = None,
        map_loss: str = "l1",
        pyramid: bool = True,
        mask_target: bool = False,
        augment: Collection[str] = (),
        seed: int = 0,
    ):
        super().__init__()
        store = None if cache is None else open_cache(cache)
        if method is None and loss is None and store is not None:
            method = method_of(store.info.explainer.rule)
        terms = parse_terms(method, loss)
        self.settings = Settings(
            loss=terms, steps=1, map_loss=map_loss, pyramid=pyramid, mask_target=mask_target, augment=tuple(augment),
            seed=seed,
        )  # fmt: skip
        self.store: CacheInfo | None = None
        self.parts: dict[str, Tensor] = {}
        self._calls = 0
        self._needed = _fields(self.settings)
        if of_store(terms):
            if store is None:
                make = making_a_store("DATA.zarr", "train", missing_from(terms, None, ()))
                raise TrainingError(Message(_named(terms), " needs ", Option("cache"), ": make a store with ", make))
            check_complete(store)
            check_holds(store, "DATA.zarr", terms)
            check_background(self.settings, store.info.teacher.debias)
            shape = store.info.map_shape if "heatmaps" in self._needed else None
            check_augmentations(self.settings.augment, shape, store.info.dataset.image_shape, moves(terms))
            self.store = store.info

    def forward(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of a batch.

        The student can be in evaluation mode, and gradients can then be off, for validation. Autocast to bfloat16
        works.

        Args:
            student: images (N, C, H, W) in [0, 1] → logits (N, K), possibly in DistributedDataParallel. It decides the
                device; floats are float64 for a float64 student, and float32 for others.
            batch: the fields of N samples, as they are stored, on any device.

        Returns:
            The mean of the weighted losses of the samples, ().

        Raises:
            TrainingError: the batch lacks a field or was changed, the student computes in half precision, or it is in
                training mode and gradients are off.
            ModelError, RelevanceError: the student returns no logits, or has an operation without a rule.
        """
        device, settings = self._placed(student)
        self._check(batch)
        fields = {name: batch[name] for name in self._needed}
        learns = torch.is_grad_enabled()
        position = self._next_position(len(fields["images"])) if settings.augment and learns else None
        model = Classifier(student)  # which takes masks, and does nothing with them; the student keeps its modes
        model.training = student.training
        losses = losses_of(model, on_device(fields, self.store, settings, device, position), self.store, settings)
        self.parts = {name: losses[name].detach().mean() for name in (*settings.loss, VANISHED)}
        return weighted(losses, settings.loss).mean()

    @property
    def vanished(self) -> float:
        """The share of the last batch's samples whose student's map is zero or nearly so."""
        return float(self.parts[VANISHED])

    def _placed(self, student: nn.Module) -> tuple[torch.device, Settings]:
        """Return the device of the student, and the settings in its precision."""
        if student.training and not torch.is_grad_enabled():
            raise TrainingError(
                "gradients are off (torch.no_grad or torch.inference_mode), and the student is in training mode: turn "
                "them on to train, or call student.eval() to validate"
            )
        first = next((parameter for parameter in student.parameters() if parameter.is_floating_point()), None)
        if first is None:
            raise TrainingError("the student has no parameter to learn: give the network, and not its output")
        kind = first.device.type
        half = first.dtype in (torch.float16, torch.bfloat16)
        if half or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16):
            where = f"the student's parameters are {first.dtype}" if half else "autocast to torch.float16 is on"
            raise TrainingError(
                f"{where}, in which relevance overflows and vanishes: keep the parameters in float32, and use autocast "
                "to bfloat16 or none"
            )
        return first.device, replace(self.settings, precision="float64" if first.dtype == torch.float64 else "float32")

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        """Raise TrainingError unless the batch has what the methods need, as it is stored."""
        if not isinstance(batch, Mapping):
            raise TrainingError(f"the batch is a {type(batch).__name__} and not a dictionary: {REMEDY}")
        if missing := [name for name in self._needed if name not in batch]:
            raise TrainingError(
                Message(
                    f"the batch has no {' and no '.join(map(repr, missing))}, which ", _named(self.settings.loss),
                    f" needs: {REMEDY}",
                )
            )  # fmt: skip
        for name in self._needed:
            if not isinstance(batch[name], Tensor):
                raise TrainingError(
                    f"the field '{name}' of the batch is a {type(batch[name]).__name__} and not a tensor: {REMEDY}"
                )
        images = batch["images"]
        if images.dtype != torch.uint8:
            raise TrainingError(
                Message(
                    f"the images of the batch are {images.dtype} and not torch.uint8, so they were changed after their "
                    "heatmaps were made: pass them on as they are, normalise in the student, and augment with ",
                    Option("augment"),
                    " of the loss",
                )
            )
        if self.store is not None:
            _check_shapes(batch, self.store)
        _check_values({name: batch[name] for name in self._needed})
        if "epsilon" in self._needed and self.store is not None:
            _check_epsilon(batch["epsilon"], self.store)

    def _next_position(self, size: int) -> dict[str, int]:
        """Return the position of this call in the augmentations; processes augment their own rows."""
        ready = dist.is_available() and dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)
        self._calls += 1
        return {"seed": self.settings.seed, "step": self._calls - 1, "first": rank * size, "of": ranks * size}

    def get_extra_state(self) -> int:
        """Return the number of augmented batches, so that a resumed training continues its augmentations."""
        return self._calls

    def set_extra_state(self, state: int) -> None:
        """Set the number of augmented batches."""
        self._calls = state


def _fields(settings: Settings) -> tuple[str, ...]:
    """Return the fields of a batch that the methods and the augmentations need."""
    needed = set(needs(settings.loss))
    if "group_weights" in needed:
        raise TrainingError(
            Message(
                Option("method", "group-dro"), " keeps the weights of the groups over a whole training: use ",
                Call("train_student", {"method": "group-dro"}), ", or another method",
            )
        )  # fmt: skip
    if settings.mask_target and "heatmaps" not in needed:
        raise TrainingError(
            Message(
                Option("mask_target", True), " is for heatmaps, and ", _named(settings.loss),
                " matches none: leave it out",
            )
        )  # fmt: skip
    if settings.mask_target or BACKGROUND in settings.augment:
        needed.add("masks")
    draw = OF_A_DRAW if "heatmaps" in needed else ()
    return ("images", *draw, *sorted(needed - {"heatmaps"}))


def _check_shapes(batch: Mapping[str, Tensor], store: CacheInfo) -> None:
    """Raise TrainingError where the shapes of images or heatmaps are not those of the store."""
    shapes = {"images": store.dataset.image_shape, "heatmaps": store.map_shape}
    for name, expected in shapes.items():
        if name in batch and tuple(batch[name].shape[1:]) != tuple(expected):
            raise TrainingError(
                f"the {name} of the batch are {tuple(batch[name].shape[1:])}, and those of the store "
                f"{tuple(expected)}: {REMEDY}"
            )


def _check_values(fields: Mapping[str, Tensor]) -> None:
    """Raise TrainingError where a field lacks samples, or its numbers are of another kind than those of the datasets.

    A single ε would pass for that of every sample, and one in half precision would be another than the teacher's.
    """
    samples = len(fields["images"])
    if not samples:
        raise TrainingError("the batch has no sample: leave empty batches out")
    for name, values in fields.items():
        expected = OF_ONE_NUMBER.get(name)
        if values.shape[:1] != (samples,) or not (expected is None or _is_one_number(values, expected)):
            kind = f"of {samples} samples, as 'images' is" if expected is None else f"{expected} ({samples},)"
            raise TrainingError(
                f"the field '{name}' of the batch is {values.dtype} {tuple(values.shape)} and not {kind}: {REMEDY}"
            )


def _is_one_number(values: Tensor, expected: torch.dtype) -> bool:
    """Return whether each sample has one number, of the expected type or of one that holds the same values."""
    floating = values.dtype.is_floating_point
    wide = values.dtype in (torch.float32, torch.float64) if floating else not values.dtype.is_complex
    return values.dim() == 1 and floating == expected.is_floating_point and wide


def _check_epsilon(epsilon: Tensor, store: CacheInfo) -> None:
    """Raise TrainingError where an ε is not in the range of the store."""
    low, high = store.explainer.epsilon_low, store.explainer.epsilon_high
    lowest, highest = (float(value) for value in epsilon.detach().aminmax())
    if not (low * (1 - 1e-5) <= lowest and highest <= high * (1 + 1e-5)):  # nor where one is not a number
        raise TrainingError(
            f"the batch has an ε of {highest if low <= lowest else lowest:g}, and the store's are from {low:g} to "
            f"{high:g}: {REMEDY}, so that teacher and student have the same ε"
        )


def _named(terms: Mapping[str, float]) -> Option:
    return Option("method", "+".join(terms))
