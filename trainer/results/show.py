"""Explanations side by side: which relevance models and stores give to the same images, in one picture.

Not here: how it is drawn (`pictures.py`), and any number of how good explanations are (`evaluation.py`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import Dataset, DatasetError, Location, Split, open_dataset
from data.storage import absolute
from pipeline import Classifier, Forward, ModelConfig, ModelError, RelevanceError, ZeroShot, load_teacher
from pipeline.caching.batches import Batches
from pipeline.device import as_input, as_mask, pick_device, place
from pipeline.explainers import EXPLAINERS
from pipeline.networks.classifier import read_config, versions
from pipeline.networks.models import is_factory
from pipeline.networks.segmenters import TORCHVISION
from pipeline.networks.teachers import absolute_teacher
from teacher_cache import Cache, CacheError, open_cache
from trainer.distill import check_paired
from trainer.results.evaluation import EPSILON
from trainer.results.pictures import Cell, grid_picture, rows_of

SAMPLES = 8
MOST_SAMPLES, MOST_COLUMNS = 100, 40  # as many as a PNG of Matplotlib, 2¹⁶ pixels high and wide, has room for
AT_ONCE = 16  # samples that go through a model; fewer where its memory does not hold them
TRUE, PREDICTED = "true", "predicted"
SHOWN = 0.98  # of the values of a picture that are not zero: the largest are all drawn in the darkest colours


def show_explanations(
    data: Location,
    out: str | Path,
    *,
    models: Sequence[str | Path | ZeroShot] = (),
    caches: Sequence[Location] = (),
    split: str | None = None,
    samples: int | Sequence[int] = SAMPLES,
    explain: str = TRUE,
    epsilon: float = EPSILON,
    explainer: str = "flex",
    student_factory: str | None = None,
    segmenter: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Write a PNG: a row for each sample of a split, with its image and the heatmap of each model and each store.

    ``samples`` are indices, or how many, spread evenly over the split, which is the first test split unless given, or
    train where there is none. Models explain the ``true`` class, the one ``predicted`` by each, or the class of a name,
    with ``epsilon``, by a name of `pipeline.EXPLAINERS`. A store shows the first draw of each sample, of the class and
    the ε below it, where its shard is committed. Below each map is the class with the largest logit, and its
    probability by softmax; in bold red where it is not the true one.

    Maps are summed over channels, and each is divided by its own mean |relevance|, over the positions that have any:
    maps of different networks, explainers and ε have no common unit (a network with all logits doubled decides the
    same and has maps twice as large), so that where relevance is, how it is spread and of which sign can be compared
    between maps, and how much there is cannot. Positions without any, as on black, do not count, or the maps that have
    many would outshine those that have none. After that one scale, symmetric about zero, holds for the whole picture:
    it ends where 98 % of all values that are not zero lie within, and larger ones have the colours of its ends.

    ``student_factory`` and ``segmenter`` as in `load_teacher`, for those of the models that need them. Returns all
    that was asked for, with the ``columns``' titles, which the PNG has too, as JSON under "Description".

    Raises DatasetError, ModelError, CacheError, RelevanceError; FileExistsError for an ``out`` that is there.
    """
    out = Path(out)
    _check_out(out)
    if not models and not caches:
        raise RelevanceError("there is nothing to show beside the images: give a --model or a --cache, or several")
    if not 0 <= epsilon < math.inf:
        raise RelevanceError(f"--epsilon must be 0 or more, and finite, got {epsilon}")
    EXPLAINERS.find(explainer)
    dataset = open_dataset(data)
    chosen = dataset.split(split or next((test.name for test in dataset.test_splits), "train"))
    rows = pick_samples(len(chosen), samples, chosen.name)
    if len(models) + len(caches) > MOST_COLUMNS:
        raise RelevanceError(f"{len(models) + len(caches)} maps beside each other are too many: give {MOST_COLUMNS}")
    named = _class_to_explain(dataset, explain)
    stores = [_open_store(cache, dataset, chosen) for cache in caches]
    loaded = [load_shown(model, dataset, *code) for model, code in own_code(models, student_factory, segmenter)]

    torch_device = pick_device(device)
    labels = np.asarray(chosen.labels[:])[rows].astype(np.int64)
    targets = labels if explain == TRUE else None if named is None else np.full(len(rows), named)
    columns = []
    for model, _ in loaded:
        place(model, torch_device)
        maps = _explained(model, chosen, rows, targets, explainer, epsilon, torch_device)
        columns.append([_cell(dataset.class_names, *each) for each in zip(labels.tolist(), *maps, strict=True)])
        model.cpu()
    columns += [_stored(store, rows, labels, dataset.class_names) for store in stores]

    titles = distinct([title for _, title in loaded], models)
    titles += distinct([Path(str(cache)).name for cache in caches], caches)
    rules = [None] * len(loaded) + [store.info.explainer.rule for store in stores]
    titles = [title if rule is None else f"{title} ({rule})" for title, rule in zip(titles, rules, strict=True)]
    asked = {
        "data": str(absolute(data)), "split": chosen.name, "fingerprint": chosen.fingerprint,
        "samples": rows.tolist(), "models": [str(absolute_teacher(model)) for model in models],
        "caches": [str(absolute(cache)) for cache in caches], "columns": titles, "explain": explain,
        "epsilon": epsilon, "explainer": explainer, "versions": versions(),
    }  # fmt: skip
    limit = common_limit([cell.content for column in columns for cell in column])
    images = rows_of(chosen.images, rows).astype(np.float32) / 255
    grid_picture(
        [[Cell(image), *maps] for image, *maps in zip(images, *columns, strict=True)],
        ["image", *titles],
        _row_titles(dataset, chosen, rows, labels),
        f"{chosen.name} of {dataset.name}: {_told(explainer, explain, epsilon, bool(models), bool(caches))}",
        limit,
        "relevance, in units of its map's mean |relevance|: red speaks for the class, blue against it",
        out,
        json.dumps(asked),
    )
    return asked


def load_shown(
    model: str | Path | ZeroShot, dataset: Dataset, student_factory: str | None, segmenter: str | None
) -> tuple[Classifier, str]:
    """A model on the CPU, and what its column is called. Raises ModelError as `load_teacher` does."""
    shape = next(iter(dataset.splits.values())).image_shape
    found = load_teacher(model, dataset.class_names, shape, student_factory=student_factory, segmenter=segmenter)
    return found.model, str(model) if isinstance(model, ZeroShot) else Path(str(absolute_teacher(model))).name


def pick_samples(there: int, samples: int | Sequence[int], split: str) -> np.ndarray:
    """The indices of the samples to show, int64: those given, or so many that are spread evenly, the first one first.

    Raises DatasetError for one that there is not, and RelevanceError for more than a picture has room for.
    """
    rows = spread(there, samples) if isinstance(samples, int) else np.asarray(samples, np.int64)
    if not 1 <= len(rows) <= MOST_SAMPLES:
        raise RelevanceError(f"a picture shows 1 to {MOST_SAMPLES} samples, not {len(rows)}: give fewer, or others")
    if len(outside := rows[(rows < 0) | (rows >= there)]):
        raise DatasetError(
            f"there is no sample {outside[0]} in the split '{split}': give a --sample from 0 to {there - 1}"
        )
    return rows


def spread(there: int, samples: int) -> np.ndarray:
    """Indices of so many samples, spread evenly, the first one first; of all where there are fewer. int64."""
    return np.arange(min(samples, there)) * there // max(1, min(samples, there))


def in_units(summed: np.ndarray) -> np.ndarray:
    """A map (h, w), summed over channels, divided by its mean |relevance| over the positions that have any."""
    some = np.abs(summed[summed != 0])
    return summed / (some.mean() if len(some) else 1.0)


def common_limit(maps: Sequence[np.ndarray | None]) -> float:
    """Where the colours of maps (h, w) end: at the 98th percentile of all |values| that are not zero; 1 without any."""
    values = np.concatenate([np.abs(each[each != 0]) for each in maps if each is not None] or [np.empty(0)])
    return float(np.quantile(values, SHOWN)) if len(values) else 1.0


def _check_out(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    if out.suffix.lower() != ".png":
        raise RelevanceError(f"--out {out} is no .png, and that is how the picture is written: give such a name")


def _class_to_explain(dataset: Dataset, explain: str) -> int | None:
    """The number of the class that is given by name; None where it is the true or the predicted one."""
    if explain in (TRUE, PREDICTED):
        return None
    if explain not in dataset.class_names:
        near = difflib.get_close_matches(explain, [TRUE, PREDICTED, *dataset.class_names], n=3)
        some = ", ".join(dataset.class_names[:10]) + (", …" if len(dataset.class_names) > 10 else "")
        raise DatasetError(
            f"--explain {explain}: the dataset {dataset.path} has no such class: "
            + (f"did you mean {', '.join(near)}?" if near else f"give {TRUE}, {PREDICTED}, or one of {some}")
        )
    return dataset.class_names.index(explain)


def own_code(
    models: Sequence[str | Path | ZeroShot], student_factory: str | None, segmenter: str | None
) -> list[tuple[str | Path | ZeroShot, tuple[str | None, str | None]]]:
    """Each model with the options that it needs; with all of them where none does, to be refused as in `evaluate`."""
    saved = [not isinstance(model, ZeroShot) for model in models]
    configs = [None if isinstance(model, ZeroShot) else _config(model) for model in models]
    built = [of and (config is None or is_factory(config.arch)) for of, config in zip(saved, configs, strict=True)]
    masked = [
        of and (config is None or (config.segmenter is not None and not config.segmenter.startswith(TORCHVISION)))
        for of, config in zip(saved, configs, strict=True)
    ]
    return [
        (
            model,
            (
                student_factory if built[place] or not any(built) else None,
                segmenter if masked[place] or not any(masked) else None,
            ),
        )
        for place, model in enumerate(models)
    ]


def _config(directory: str | Path) -> ModelConfig | None:
    """None for what cannot be read, of which `load_classifier` says why."""
    try:
        return read_config(Path(directory))
    except (OSError, ModelError):
        return None


def _open_store(location: Location, dataset: Dataset, split: Split) -> Cache:
    """A store of this split, complete or not. Raises CacheError."""
    cache = open_cache(location)
    found = cache.info.dataset.split
    if found != split.name and found in dataset.splits:
        raise CacheError(
            f"the store {location} explains the split '{found}', and samples of '{split.name}' are to be shown: give "
            f"--split {found}, or a store of '{split.name}'"
        )
    check_paired(cache, dataset, split.name)
    return cache


def _explained(
    model: Classifier,
    split: Split,
    rows: np.ndarray,
    targets: np.ndarray | None,
    explainer: str,
    epsilon: float,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """A model's maps (n, C, h, w) of the classes ``targets`` (n,), or of those that it says, and its logits (n, K)."""

    def explain(batch: slice) -> tuple[np.ndarray, np.ndarray]:
        images = as_input(rows_of(split.images, rows[batch]), device)
        masks = None if split.masks is None else as_mask(rows_of(split.masks, rows[batch]), device)
        with torch.no_grad():  # what needs a graph makes one
            forward = Forward(model, images, explainer, masks)
        logits = forward.logits.detach()
        classes = logits.argmax(1).cpu() if targets is None else torch.from_numpy(targets[batch])
        maps = forward.maps(classes, epsilon).detach().float()
        return maps.cpu().numpy(), logits.float().cpu().numpy()

    maps, logits = map(np.concatenate, zip(*Batches(AT_ONCE, given=False).run(len(rows), explain), strict=True))
    return maps, logits


def _stored(cache: Cache, rows: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> list[Cell]:
    """A store's column: the first draws of the samples ``rows`` (n,) that it has, whose classes are ``labels`` (n,).

    Raises CacheError where it has none of them, or a shard is damaged.
    """
    info, cells = cache.info, [Cell(None, "not in the store yet")] * len(rows)
    shards = rows // info.storage.shard_samples
    of_class, with_epsilon = _knows_class(info.explainer.rule), _knows_epsilon(info.explainer.rule)
    for shard in sorted(set(shards.tolist())):
        if not cache.is_committed(shard):
            continue
        content, (start, _) = cache.read_shard(shard), info.shard_range(shard)
        for position in np.flatnonzero(shards == shard).tolist():
            row = rows[position] - start
            note = f"map of {class_names[content.target_class[row, 0]]}" if of_class else ""
            note += f", ε {content.epsilon[row, 0]:.2g}" if with_epsilon else ""
            maps, logits = content.heatmaps[row, 0], content.teacher_logits[row]
            cells[position] = _cell(class_names, labels[position], maps, logits, note)
    if all(cell.content is None for cell in cells):
        raise CacheError(
            f"the store {cache.path} is incomplete, and has none of the samples {', '.join(map(str, rows[:8]))} to be "
            "shown yet: run the cache-explanations command that made it again, or give a --sample that it has"
        )
    return cells


def _cell(class_names: tuple[str, ...], label: int, maps: np.ndarray, logits: np.ndarray, note: str = "") -> Cell:
    """A map (C, h, w), summed over channels and in units of its own mean, with what the logits (K,) say below it."""
    content = in_units(maps.sum(0, dtype=np.float64))
    powers = np.exp(logits - logits.max(), dtype=np.float64)
    says, share = int(logits.argmax()), powers.max() / powers.sum()
    below = [f"says {class_names[says]}, {100 * share:.1f} %", *([note] if note else [])]
    if not content.any():
        below.append("no relevance at all")
    return Cell(content, "\n".join(below), wrong=says != label)


def _told(explainer: str, explain: str, epsilon: float, models: bool, caches: bool) -> str:
    """What is shown, for the picture's title."""
    if not models:
        return "maps as they are stored"
    classes = {TRUE: "the true class", PREDICTED: "the class that each model says"}
    of_class = f", for {classes.get(explain, repr(explain))}" if _knows_class(explainer) else ""
    with_epsilon = f", ε {epsilon:g}" if _knows_epsilon(explainer) else ""
    return f"maps by {explainer}{of_class}{with_epsilon}" + ("; of stores, see below each" if caches else "")


def _knows_class(explainer: str) -> bool:
    return EXPLAINERS.find(explainer).rules is not None


def _knows_epsilon(explainer: str) -> bool:
    return EXPLAINERS.find(explainer).rules not in (None, "gradient-x-input")


def _row_titles(dataset: Dataset, split: Split, rows: np.ndarray, labels: np.ndarray) -> list[str]:
    """Of each sample the true class, the group where there is one, and which it is."""
    titles = [[dataset.class_names[label]] for label in labels.tolist()]
    if split.groups is not None:
        groups = np.asarray(split.groups[:])[rows].tolist()
        titles = [[*title, dataset.group_name(group)] for title, group in zip(titles, groups, strict=True)]
    return ["\n".join([*title, f"sample {row}"]) for title, row in zip(titles, rows.tolist(), strict=True)]


def distinct(titles: Sequence[str], locations: Sequence[Any]) -> list[str]:
    """Of those that have the same name, all of the path as it was given."""
    times = Counter(titles)
    return [title if times[title] == 1 else str(where) for title, where in zip(titles, locations, strict=True)]
