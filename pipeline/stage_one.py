"""Stage one: run the teacher over a dataset split once and write its heatmaps to a store, shard by shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from tqdm import tqdm

from data import Split, open_dataset
from pipeline.classifier import Classifier, check_fits, load_classifier, versions, weights_sha256
from pipeline.device import as_input, as_mask, pick_device, place
from pipeline.draws import CLASS_POLICY, epsilons, target_classes
from pipeline.models import last_linear
from pipeline.relevance import Trace
from pipeline.rules import RelevanceError, rule_set
from teacher_cache import (
    CacheInfo,
    DatasetInfo,
    ExplainerInfo,
    Shard,
    TeacherInfo,
    create_cache,
    head_sha256,
    plan_storage,
)


@dataclass(frozen=True)
class CacheSummary:
    """What a run of `cache_explanations` did."""

    path: str
    samples: int
    shards: int
    computed_shards: int


def cache_explanations(
    data: str | Path,
    teacher: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    draws: int = 4,
    epsilon_range: tuple[float, float] = (0.01, 1.0),
    explainer: str = "flex",
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
) -> CacheSummary:
    """Write the teacher's heatmaps of a split to a store, or continue one that was interrupted.

    Each of the ``draws`` of a sample is a class, an ε and a heatmap; all share one forward pass. ``explainer``
    names a rule set (`pipeline.RULE_SETS`), which students of the store use too. Dask runs one task a shard; a
    shard is written whole, then committed. The draws depend on the seed and the sample alone, the heatmaps on
    nothing else but float rounding (bit for bit at equal batch size).

    Shards that are damaged are computed anew. Raises DatasetError, ModelError, CacheError, FileExistsError,
    RelevanceError.
    """
    low, high = epsilon_range
    with np.errstate(over="ignore"):
        if not 0 < np.float32(low) <= np.float32(high) < np.inf:
            raise RelevanceError(
                f"--epsilon-range must be two numbers 0 < LOW <= HIGH in float32, got {low:g} {high:g}"
            )
    for name, value in (("--draws", draws), ("--batch-size", batch_size)):
        if value < 1:
            raise RelevanceError(f"{name} must be at least 1, got {value}")
    rule_set(explainer)
    dataset = open_dataset(data)
    chosen = dataset.split(split)
    chosen.verify()
    model, config = load_classifier(teacher)
    check_fits(config, dataset.class_names, chosen.image_shape, teacher)
    head = _head_arrays(model, len(config.class_names))
    info = CacheInfo(
        explainer=ExplainerInfo(explainer, draws, low, high, CLASS_POLICY, seed),
        teacher=TeacherInfo(
            arch=config.arch,
            debias=config.debias,
            bias_free=config.bias_free,
            weights_sha256=weights_sha256(teacher),
            class_names=config.class_names,
            head_sha256=head_sha256(head),
        ),
        dataset=DatasetInfo(dataset.name, split, chosen.fingerprint, len(chosen), chosen.image_shape),
        storage=plan_storage(draws, chosen.image_shape),
        written_by=versions(),
    )
    torch_device = pick_device(device)
    place(model, torch_device)
    _explain_one(model, chosen, explainer, torch_device)
    cache = create_cache(out, info, head)
    missing = np.flatnonzero(~cache.committed()).tolist()

    def task(shard: int) -> None:
        cache.write_shard(shard, explain_shard(model, chosen, info, shard, batch_size, torch_device))
        start, stop = info.shard_range(shard)
        bar.update(stop - start)

    # one task at a time where torch itself uses every core; on a GPU a second one reads and compresses meanwhile
    workers = 1 if torch_device.type == "cpu" else 2
    there = len(chosen) - sum(stop - start for start, stop in map(info.shard_range, missing))
    with tqdm(total=len(chosen), initial=there, unit="image", desc=f"explaining {split}", disable=None) as bar:
        tasks = [delayed(task, pure=False)(shard) for shard in missing]
        compute(tasks, scheduler="threads", num_workers=workers)
    return CacheSummary(str(out), len(chosen), cache.info.shards, len(missing))


def explain_shard(
    model: Classifier, split: Split, info: CacheInfo, shard: int, batch_size: int, device: torch.device
) -> Shard:
    """Compute the content of one shard: the teacher, in evaluation mode, over its samples in batches."""
    start, stop = info.shard_range(shard)
    explainer = info.explainer
    epsilon = epsilons(explainer.epsilon_low, explainer.epsilon_high, explainer.seed, explainer.draws, start, stop)
    images = np.asarray(split.images[start:stop])
    masks = None if split.masks is None else np.asarray(split.masks[start:stop])
    heatmaps = np.empty((stop - start, explainer.draws, *split.image_shape), np.float32)
    logits, targets = [], []
    for first in range(0, stop - start, batch_size):
        rows = slice(first, min(first + batch_size, stop - start))
        batch_masks = None if masks is None else as_mask(masks[rows], device)
        trace = Trace(partial(model, masks=batch_masks), as_input(images[rows], device), explainer.rule)
        logits.append(trace.logits.detach().float().cpu().numpy())
        targets.append(
            target_classes(logits[-1].argmax(1), logits[-1].shape[1], explainer.seed, explainer.draws, start + first)
        )
        for draw in range(explainer.draws):
            maps = trace.heatmaps(
                torch.from_numpy(targets[-1][:, draw]),
                torch.from_numpy(epsilon[rows, draw]),
                keep_graph=draw + 1 < explainer.draws,
            )
            heatmaps[rows, draw] = maps.float().cpu().numpy()
    if not heatmaps.any():
        raise RelevanceError(
            f"every heatmap of samples {start} to {stop - 1} is zero, so there is nothing to learn from: the teacher's "
            "logits do not depend on the images (train it again, with a smaller --lr), or --epsilon-range is far above "
            "its activations"
        )
    return Shard(heatmaps, np.concatenate(targets), epsilon, np.concatenate(logits))


def _explain_one(model: Classifier, split: Split, rules: str, device: torch.device) -> None:
    """Raise RelevanceError now, before anything is written, for a network that cannot be explained."""
    masks = None if split.masks is None else as_mask(np.asarray(split.masks[:1]), device)
    Trace(partial(model, masks=masks), as_input(np.asarray(split.images[:1]), device), rules)


def _head_arrays(model: Classifier, classes: int) -> dict[str, np.ndarray]:
    """The parameters of the teacher's last layer; none where it does not end in a linear one."""
    name = last_linear(model.network, classes)
    if name is None:
        return {}
    head = model.network.get_submodule(name)
    return {key: value.detach().float().cpu().numpy() for key, value in head.named_parameters()}
