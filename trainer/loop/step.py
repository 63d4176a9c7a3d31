"""The arithmetic of one step: a batch becomes what the network takes, its losses and their gradients.

Not here: the optimizer and the order of things, which is the loop (`training.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import Message, Option
from pipeline import Classifier, Forward, resize
from pipeline.device import as_input, as_mask, to_device
from pipeline.networks.trials import evaluating
from pipeline.private_torch import ONE_VALUE_PER_CHANNEL_MESSAGE
from teacher_cache import CacheInfo
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, augment, augment_masks
from trainer.loop.distributed import Ranks
from trainer.loop.losses import VALUES, heatmap_loss
from trainer.loop.methods import METHODS
from trainer.loop.repainting import REPAINTED, repaint
from trainer.settings import PRECISIONS, Settings
from trainer.stream.stream import Batch, Source, read_block, stored_heatmaps

FLOAT = {name: torch.float64 if name == "float64" else torch.float32 for name in PRECISIONS}  # of parameters
VANISHED = "vanished"  # beside the losses: 1 for a sample whose map has vanished
UNTAUGHT = "untaught"  # beside the losses: 1 for a sample whose target is a map of zeros, which teaches nothing
VANISHING = 1e-6  # a student's mean |relevance| over the teacher's, below which its l1 loss exceeds a thousand
UNCHANGED = {"target_class", "epsilon", "teacher_logits", "features"}  # fields that are only moved to the device


def forward_backward(
    model: Classifier,
    store: CacheInfo | None,
    settings: Settings,
    autocast: Callable[[], AbstractContextManager[object]],
    batch: Batch,
) -> dict[str, Tensor]:
    """Run the forward and backward passes of a step, in ``settings.accumulate`` parts; gradients add up in the model.

    Args:
        model: the network, in training or evaluation mode.
        store: the description of the store, None without one.
        settings: the losses and their weights, and the number of parts.
        autocast: makes the context in which each forward pass runs.
        batch: the batch of n samples, as `on_device` returns it.

    Returns:
        The loss of each method and each sample, (n,), detached, and `VANISHED` and `UNTAUGHT` as `losses_of` returns
        them.

    Raises:
        TrainingError: a batch norm sees a single value.
    """
    size = len(batch["images"])
    losses = {name: batch["images"].new_empty(size) for name in (*settings.loss, VANISHED, UNTAUGHT)}
    for first in range(min(settings.accumulate, size)):
        rows = slice(first, None, settings.accumulate)  # neighbours in a batch are neighbours in the store
        with autocast(), _explain_single_values(settings):
            part_losses = losses_of(model, {name: values[rows] for name, values in batch.items()}, store, settings)
        (weighted(part_losses, settings.loss).sum() / size).backward()
        for name, values in part_losses.items():
            losses[name][rows] = values.detach()
    return losses


def on_device(
    batch: Batch,
    store: CacheInfo | None,
    settings: Settings,
    device: torch.device,
    position: Mapping[str, int] | None = None,
    repainted: float = REPAINTED,
) -> Batch:
    """Move a batch to the device, decode it, and augment it where ``position`` is given.

    Args:
        batch: the fields of n samples, as they are stored.
        store: the description of the store that heatmaps come from.
        settings: the augmentations, the precision, and whether maps are multiplied by the masks.
        device: where the network is.
        position: the position of the batch in the training, the keywords of `augment`; None augments nothing.
        repainted: the share of the images that get another background, if the augmentations have it.

    Returns:
        ``images`` (n, C, H, W) in [0, 1], ``masks`` (n, 1, H, W) in [0, 1], ``heatmaps`` (n, C, h, w), ``labels`` and
        ``groups`` int64 (n,), ``group_weights`` (n,) of ones, and the fields of `UNCHANGED`; those that the batch has.
        ``repainted`` (n,), 1 for images that got another background and 0 for others, if the augmentations have it.
        ``class_weights`` (n,), if the settings have weights: that of the teacher's answer, and of the label where the
        batch has no logits of a teacher. Floating tensors have the type of the parameters.
    """
    fields = {name: to_device(batch[name], device) for name in UNCHANGED & set(batch)}
    fields["images"] = as_input(batch["images"], device)
    if "labels" in batch:
        fields["labels"] = to_device(batch["labels"], device).long()
    if settings.class_weights is not None:
        weights = to_device(torch.tensor(settings.class_weights, dtype=FLOAT[settings.precision]), device)
        logits = fields.get("teacher_logits")
        fields["class_weights"] = weights[fields["labels"] if logits is None else logits.argmax(1)]
    if "groups" in batch:
        fields["groups"] = to_device(batch["groups"], device).long()
        fields["group_weights"] = torch.ones(len(fields["groups"]), device=device)
    if "masks" in batch:
        fields["masks"] = as_mask(batch["masks"], device)
    if "heatmaps" in batch:
        assert store is not None
        fields["heatmaps"] = stored_heatmaps(batch["heatmaps"], batch["scale"], store.storage.precision, device)
    if settings.augment and position is not None:
        _augment(fields, settings, position, repainted)
    if settings.mask_target and "heatmaps" in fields:
        maps = fields["heatmaps"]
        masks = F.adaptive_avg_pool2d(fields["masks"], (maps.shape[2], maps.shape[3]))
        fields["heatmaps"] = maps * masks.to(maps.dtype)
    floating = FLOAT[settings.precision]
    return {name: values.to(floating) if values.is_floating_point() else values for name, values in fields.items()}


def _augment(fields: Batch, settings: Settings, position: Mapping[str, int], repainted: float) -> None:
    """Replace images, heatmaps and masks by augmented ones."""
    fields["images"], maps = augment(fields["images"], fields.get("heatmaps"), settings.augment, **position)
    if maps is not None:
        fields["heatmaps"] = maps
    if "masks" in fields:
        fields["masks"] = augment_masks(fields["masks"], settings.augment, **position)
    if BACKGROUND in settings.augment:
        before = fields["images"]
        fields["images"] = repaint(before, fields["masks"], share=repainted, **position)
        fields["repainted"] = (fields["images"] != before).flatten(1).any(1).to(before.dtype)


def losses_of(model: Classifier, batch: Batch, store: CacheInfo | None, settings: Settings) -> dict[str, Tensor]:
    """Compute the loss of each method and each sample, from one forward pass.

    Args:
        model: the network.
        batch: the batch of n samples, as `on_device` returns it.
        store: the description of the store, None without one.
        settings: the methods, and how maps are compared.

    Returns:
        The losses (n,) by the name of the method, multiplied by the ``class_weights`` of the batch, if it has them;
        under `VANISHED` 1 for each sample whose map is zero or nearly so, and 0 for others, (n,), and under `UNTAUGHT`
        the same of samples whose teacher's map is zero.
    """
    forward = forward_of(model, batch, store, settings)
    vanished, untaught = (batch["images"].new_zeros(len(batch["images"])) for _ in range(2))

    def compare(ours: Tensor, theirs: Tensor) -> Tensor:
        assert store is not None
        ours, resolution = ours.to(theirs.dtype), store.storage.resolution
        if store.explainer.map_shape[1:] != store.dataset.image_shape[1:]:  # of another network's feature maps
            ours = resize(ours, store.explainer.map_shape[1:])
        untaught.copy_(theirs.abs().amax(VALUES) == 0)
        vanished.copy_(ours.detach().abs().mean(VALUES) < VANISHING * theirs.abs().mean(VALUES))
        return heatmap_loss(ours, theirs, resolution, kind=settings.map_loss, pyramid=settings.pyramid)

    losses = {name: METHODS[name].loss(forward, batch, compare) for name in settings.loss}
    if "class_weights" in batch:
        losses = {name: values * batch["class_weights"] for name, values in losses.items()}
    return {**losses, VANISHED: vanished, UNTAUGHT: untaught}


def forward_of(model: Classifier, batch: Batch, store: CacheInfo | None, settings: Settings) -> Forward:
    """Run a batch through the network, with the rules of the explainer that the methods or the store need."""
    explainer = next((METHODS[name].explains for name in settings.loss if METHODS[name].explains), None)
    if store is not None and "heatmaps" in batch:
        explainer = store.explainer.rule
    return Forward(model, batch["images"], explainer, batch.get("masks"))


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum (n,) of the losses (n,) of the methods."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum(0)


@torch.no_grad()
def validate(
    model: nn.Module, source: Source, store: CacheInfo | None, settings: Settings, device: torch.device, ranks: Ranks
) -> float:
    """Return the mean loss over a split in evaluation mode, each sample by its first draw; each process takes blocks.

    Args:
        model: a `Classifier`; its modes are the same afterwards.
        source: the samples of the split.
        store: the description of the split's store, None without one.
        settings: the losses, and the size of a batch.
        device: where the network is.
        ranks: the processes that share the work.
    """
    assert isinstance(model, Classifier)
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for number in range(ranks.rank, source.blocks, ranks.ranks):
            block = read_block(source, number, draw=0)
            for first in range(0, len(block["images"]), settings.batch_size):
                part = {name: values[first : first + settings.batch_size] for name, values in block.items()}
                losses = losses_of(model, on_device(part, store, settings, device), store, settings)
                total += weighted(losses, settings.loss).sum().cpu()
    return float(ranks.mean(total)) * ranks.ranks / source.samples


@torch.no_grad()
def predictions(
    model: nn.Module,
    batch: Batch,
    settings: Settings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """Return the class that a model says for each sample of a batch, int64 (n,) on the CPU.

    Args:
        model: a `Classifier` on the device; its modes are the same afterwards.
        batch: n samples as they are stored, with the masks that a front may need. It can be large.
        settings: those of the training.
        device: where the model is.
        autocast: makes the context of a forward pass.
    """
    at_once = -(-settings.batch_size // settings.accumulate)  # as in a step, whose memory sufficed
    said = []
    with evaluating(model):
        for first in range(0, len(batch["images"]), at_once):
            part = {name: values[first : first + at_once] for name, values in batch.items()}
            inputs = on_device(part, None, settings, device)
            with autocast():
                said.append(model(inputs["images"], inputs.get("masks")).argmax(1).cpu())
    return torch.cat(said)


@contextmanager
def _explain_single_values(settings: Settings) -> Iterator[None]:
    """Raise TrainingError where a batch norm sees a single value, such as one sample's feature map of one position."""
    try:
        yield
    except ValueError as error:
        if not str(error).lower().startswith(ONE_VALUE_PER_CHANNEL_MESSAGE.lower()):
            raise
        batch_size, parts = Option("batch_size", settings.batch_size), Option("accumulate", settings.accumulate)
        raise TrainingError(
            Message(
                "a batch norm of this network sees a single value, with ", batch_size, " and ", parts,
                ": choose a larger ", Option("batch_size"), " or a smaller ", Option("accumulate"),
            )
        ) from error  # fmt: skip
