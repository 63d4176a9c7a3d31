"""Explanations side by side: which relevance models and stores give to the same images, in one picture.

Not here: how the picture is drawn (`pictures.py`), and numbers on how good explanations are (`evaluation.py`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import Dataset, DatasetError, Location, Split, open_dataset
from data.storage import absolute
from options import Call, Message, Option, did_you_mean, takes
from pipeline import Classifier, ModelConfig, ModelError, RelevanceError
from pipeline.batch import explain_batch
from pipeline.caching.batches import Batches, fitting
from pipeline.device import pick_device, place
from pipeline.explainers import EXPLAINERS
from pipeline.networks.classifier import read_config, versions
from pipeline.networks.debias import functions_in
from pipeline.networks.models import is_factory
from pipeline.networks.own_teachers import OwnTeacher
from pipeline.networks.segmenters import TORCHVISION
from pipeline.networks.teachers import Brought, absolute_teacher
from teacher_cache import Cache, CacheError, open_cache
from teacher_cache.pairing import check_paired
from trainer.results.evaluation import lacks_masks, load_with, no_masks
from trainer.results.options import PREDICTED, TRUE, OwnCode, ShowOptions
from trainer.results.pictures import Cell, Grid, grid_picture, rows_of
from trainer.run_dir import NEW_FOLDER

log = logging.getLogger(__name__)

MOST_SAMPLES, MOST_COLUMNS = 100, 40  # the limits of a PNG of Matplotlib, which is 2¹⁶ pixels high and wide at most
AT_ONCE = 16  # samples of a batch; fewer where the memory does not hold them
SHOWN = 0.98  # of the values of a picture that are not zero: larger ones are all drawn in the darkest colours
UNIT = "relevance, in units of its map's mean |relevance|: red speaks for the class, blue against it"


@dataclass(frozen=True)
class Samples:
    """The samples of a picture.

    Attributes:
        dataset: their dataset.
        split: their split.
        rows: their indices, int64 (n,).
        labels: their true classes, int64 (n,).
        targets: the classes that models explain, int64 (n,); None for the class that each model predicts.
    """

    dataset: Dataset
    split: Split
    rows: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None


@takes(ShowOptions)
def show_explanations(data: Location, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write a PNG: a row for each sample of a split, with its image and the heatmap of each model and each store.

    The column of a teacher whose front needs masks is empty where the split has none, and the log says so. A store
    shows the first draw of each sample that it has; the class and the ε are below it. Below each map is the
    class with the largest logit and its probability by softmax, in bold red where it is not the true class.

    Maps are summed over channels. Each is divided by its own mean |relevance|, over the positions that have any: maps
    of different networks, explainers and ε have no common unit (a network with all logits doubled decides the same and
    has maps twice as large). So maps can be compared in where relevance is, how it is spread and of which sign, but not
    in how much there is. Positions without relevance, such as black ones, do not count, or maps with many of them would
    outshine the others. After that one scale, symmetric about zero, holds for the whole picture. It ends where 98 % of
    all values that are not zero lie within; larger values have the colours of its ends.

    Args:
        data: a dataset.
        out: the PNG file to write.

    Returns:
        What the picture shows: the options, the ``samples`` and the titles of the ``columns``. The PNG has it too, as
        JSON under "Description".

    Raises:
        DatasetError: there is no such dataset, split, sample or class.
        ModelError: a model cannot be loaded, or does not fit the dataset, or the split lacks the masks that all columns
            need.
        CacheError: a store is of another dataset or split, or is damaged.
        RelevanceError: an option is wrong, or the explainer cannot explain a model.
        FileExistsError: ``out`` exists.
    """
    settings = ShowOptions(data=data, out=out, **options)
    _check_out(Path(out))
    _check_columns(settings)
    samples = _pick(open_dataset(data), settings)
    stores = [_open_store(cache, samples) for cache in settings.caches]
    loaded = [load_shown(model, samples.dataset, code) for model, code in own_code(settings.models, settings)]
    _tell_empty(loaded, len(stores), samples)
    device = pick_device(settings.device)
    columns = [_model_column(model, samples, settings, device) for model, _ in loaded]
    columns += [_store_column(store, samples) for store in stores]

    titles = _column_titles([title for _, title in loaded], stores, settings)
    record = _record(samples, settings, titles)
    images = rows_of(samples.split.images, samples.rows).astype(np.float32) / 255
    grid = Grid(
        cells=[[Cell(image), *maps] for image, *maps in zip(images, *columns, strict=True)],
        column_titles=["image", *titles],
        row_titles=_row_titles(samples),
        title=f"{samples.split.name} of {samples.dataset.name}: {_subtitle(settings)}",
        limit=common_limit([cell.content for column in columns for cell in column]),
        unit=UNIT,
    )
    grid_picture(grid, out, json.dumps(record))
    return record


# --- what is shown ------------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    if out.exists():
        raise FileExistsError(Message(f"{out} exists", NEW_FOLDER))
    if out.suffix.lower() != ".png":
        raise RelevanceError(
            Message(f"the picture is a PNG file, and {out} is no .png: give an ", Option("out"), " that ends in .png")
        )


def _check_columns(settings: ShowOptions) -> None:
    columns = len(settings.models) + len(settings.caches)
    if not columns:
        raise RelevanceError(
            Message("there is nothing to show beside the images: give ", Option("models"), " or ", Option("caches"))
        )
    if columns > MOST_COLUMNS:
        raise RelevanceError(f"{columns} maps beside each other are too many: give {MOST_COLUMNS} at most")


def _pick(dataset: Dataset, settings: ShowOptions) -> Samples:
    """Find the samples to show and the classes to explain. Raises DatasetError, RelevanceError."""
    split = dataset.split(settings.split or next((test.name for test in dataset.test_splits), "train"))
    rows = pick_samples(len(split), settings.samples, split.name)
    labels = np.asarray(split.labels[:])[rows].astype(np.int64)
    if settings.explain == TRUE:
        targets: np.ndarray | None = labels
    elif settings.explain == PREDICTED:
        targets = None
    else:
        targets = np.full(len(rows), _class_number(dataset, settings.explain))
    return Samples(dataset, split, rows, labels, targets)


def pick_samples(count: int, samples: int | Sequence[int], split: str) -> np.ndarray:
    """Pick the samples to show.

    Args:
        count: the number of samples in the split.
        samples: indices, or the number of samples to spread evenly over the split, the first one first.
        split: the name of the split, for errors.

    Returns:
        Indices, int64.

    Raises:
        DatasetError: an index is out of range.
        RelevanceError: a picture has no room for so many samples, or there are none.
    """
    rows = spread(count, samples) if isinstance(samples, int) else np.asarray(samples, np.int64)
    if not 1 <= len(rows) <= MOST_SAMPLES:
        raise RelevanceError(
            Message(f"a picture shows 1 to {MOST_SAMPLES} samples, not {len(rows)}: change ", Option("samples"))
        )
    if len(outside := rows[(rows < 0) | (rows >= count)]):
        raise DatasetError(
            f"there is no sample {outside[0]} in the split '{split}': choose samples from 0 to {count - 1}"
        )
    return rows


def spread(count: int, samples: int) -> np.ndarray:
    """Spread ``samples`` indices evenly over ``count`` samples, the first one first; all if there are fewer. int64."""
    return np.arange(min(samples, count)) * count // max(1, min(samples, count))


def _class_number(dataset: Dataset, name: str) -> int:
    if name not in dataset.class_names:
        some = ", ".join(dataset.class_names[:10]) + (", …" if len(dataset.class_names) > 10 else "")
        near = did_you_mean(name, [TRUE, PREDICTED, *dataset.class_names])
        remedy = near or f" Give {TRUE}, {PREDICTED}, or one of {some}."
        raise DatasetError(Message(Option("explain", name), f": the dataset {dataset.path} has no such class.{remedy}"))
    return dataset.class_names.index(name)


def load_shown(model: str | Path | Brought, dataset: Dataset, code: OwnCode) -> tuple[Classifier, str]:
    """Load a model on the CPU, and return it with the title of its column. Raises ModelError as `load_teacher` does."""
    shape = next(iter(dataset.splits.values())).image_shape
    teacher = load_with(model, dataset, shape, code)
    return teacher.model, str(model) if isinstance(model, Brought) else Path(str(absolute_teacher(model))).name


def own_code(models: Sequence[str | Path | Brought], code: OwnCode) -> list[tuple[str | Path | Brought, OwnCode]]:
    """Give each model the code that it needs; all of it if no model needs it, so that `load_teacher` refuses it."""
    configs = [None if isinstance(model, Brought) else _config(model) for model in models]
    saved = [not isinstance(model, Brought) for model in models]
    built = [of and (config is None or is_factory(config.arch)) for of, config in zip(saved, configs, strict=True)]
    masked = [
        of and (config is None or (config.segmenter is not None and not config.segmenter.startswith(TORCHVISION)))
        for of, config in zip(saved, configs, strict=True)
    ]
    fronted = [
        of and (config is None or bool(functions_in(config.debias))) for of, config in zip(saved, configs, strict=True)
    ]
    taken = any(isinstance(model, OwnTeacher) and model.debias == code.debias for model in models)
    return [
        (
            model,
            OwnCode(
                student_factory=code.student_factory if built[place] or not any(built) else None,
                segmenter=code.segmenter if masked[place] or not any(masked) else None,
                debias=code.debias if fronted[place] or not (any(fronted) or taken) else None,
            ),
        )
        for place, model in enumerate(models)
    ]


def _config(directory: str | Path) -> ModelConfig | None:
    """Read a model's configuration; None where that fails, which `load_classifier` explains."""
    try:
        return read_config(Path(directory))
    except (OSError, ModelError):
        return None


def _tell_empty(models: Sequence[tuple[Classifier, str]], stores: int, samples: Samples) -> None:
    """Log the models whose columns are empty, because the split has no masks. Raises ModelError if all columns are."""
    dataset, split = samples.dataset, samples.split
    empty = [title for model, title in models if lacks_masks(model, split)]
    if not empty:
        return
    reason = no_masks(" and ".join(empty), [split.name])
    if len(empty) < len(models) or stores:
        log.warning(f"{reason}, so its column is empty: show a split with masks, or add masks to {dataset.path}")
        return
    candidates = [*dataset.test_splits, *dataset.splits.values()]
    masked = [other.name for other in candidates if other.masks is not None]
    remedy = ["give ", Option("split", masked[0]), ", which has masks, or "] if masked else ["give "]
    raise ModelError(Message(f"{reason}, so there is no map to show: ", *remedy, "a student, which needs none"))


def _open_store(location: Location, samples: Samples) -> Cache:
    """Open a store of the split, complete or not. Raises CacheError."""
    cache, split = open_cache(location), samples.split.name
    stored = cache.info.dataset.split
    if stored != split and stored in samples.dataset.splits:
        raise CacheError(
            Message(
                f"the store {location} explains the split '{stored}', and the samples are of '{split}': give ",
                Option("split", stored),
                f", or a store of '{split}'",
            )
        )
    check_paired(cache, samples.dataset, split)
    return cache


# --- columns ------------------------------------------------------------------------------------------------


def _model_column(model: Classifier, samples: Samples, settings: ShowOptions, device: torch.device) -> list[Cell]:
    """Explain the samples by a model, which is on the CPU before and after. Raises RelevanceError, ModelError."""
    split, rows, targets = samples.split, samples.rows, samples.targets
    if lacks_masks(model, split):
        return [Cell(None, "no map: the split has no masks")] * len(rows)

    def explain(batch: slice) -> tuple[np.ndarray, np.ndarray]:
        explained = explain_batch(
            model,
            rows_of(split.images, rows[batch]),
            None if split.masks is None else rows_of(split.masks, rows[batch]),
            (lambda logits: logits.argmax(1)[:, None]) if targets is None else targets[batch, None],
            settings.epsilon,
            explainer=settings.explainer,
            device=device,
        )
        return explained.maps[:, 0], explained.logits

    place(model, device)
    batches = Batches(fitting(AT_ONCE, split.image_shape), given=False).run(len(rows), explain)
    model.cpu()
    maps, logits = map(np.concatenate, zip(*batches, strict=True))
    class_names = samples.dataset.class_names
    return [_cell(class_names, *each) for each in zip(samples.labels.tolist(), maps, logits, strict=True)]


def _store_column(cache: Cache, samples: Samples) -> list[Cell]:
    """Read the first draws of the samples that a store has.

    Raises CacheError where it has none of them, or a shard is damaged.
    """
    info, rows, class_names = cache.info, samples.rows, samples.dataset.class_names
    cells = [Cell(None, "not in the store yet")] * len(rows)
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
            cells[position] = _cell(class_names, samples.labels[position], maps, logits, note)
    if all(cell.content is None for cell in cells):
        raise CacheError(
            Message(
                f"the store {cache.path} is incomplete, and has none of the samples {', '.join(map(str, rows[:8]))}: "
                "run ",
                Call("cache_explanations", {"out": cache.path}),
                " again with its other options, or choose samples that it has",
            )
        )
    return cells


def _cell(class_names: tuple[str, ...], label: int, maps: np.ndarray, logits: np.ndarray, note: str = "") -> Cell:
    """Make the cell of a map (C, h, w), with the prediction by the logits (K,) and a note below it."""
    content = in_units(maps.sum(0, dtype=np.float64))
    powers = np.exp(logits - logits.max(), dtype=np.float64)
    predicted, probability = int(logits.argmax()), powers.max() / powers.sum()
    below = [f"says {class_names[predicted]}, {100 * probability:.1f} %", *([note] if note else [])]
    if not content.any():
        below.append("no relevance at all")
    return Cell(content, "\n".join(below), wrong=predicted != label)


def in_units(summed: np.ndarray) -> np.ndarray:
    """Divide a map (h, w), summed over channels, by its mean |relevance| over the positions that have any."""
    magnitudes = np.abs(summed[summed != 0])
    return summed / (magnitudes.mean() if len(magnitudes) else 1.0)


def common_limit(maps: Sequence[np.ndarray | None]) -> float:
    """Find the end of the colour scale of maps (h, w): the 98th percentile of |values| but zeros; 1 without any."""
    values = np.concatenate([np.abs(each[each != 0]) for each in maps if each is not None] or [np.empty(0)])
    return float(np.quantile(values, SHOWN)) if len(values) else 1.0


# --- texts --------------------------------------------------------------------------------------------------


def _record(samples: Samples, settings: ShowOptions, titles: Sequence[str]) -> dict[str, Any]:
    return {
        "data": str(absolute(settings.data)), "split": samples.split.name, "fingerprint": samples.split.fingerprint,
        "samples": samples.rows.tolist(), "models": [str(absolute_teacher(model)) for model in settings.models],
        "caches": [str(absolute(cache)) for cache in settings.caches], "columns": titles, "explain": settings.explain,
        "epsilon": settings.epsilon, "explainer": settings.explainer, "versions": versions(),
    }  # fmt: skip


def _subtitle(settings: ShowOptions) -> str:
    """Describe the maps, for the picture's title."""
    if not settings.models:
        return "maps as they are stored"
    explain, explainer = settings.explain, settings.explainer
    classes = {TRUE: "the true class", PREDICTED: "the class that each model says"}
    of_class = f", for {classes.get(explain, repr(explain))}" if _knows_class(explainer) else ""
    with_epsilon = f", ε {settings.epsilon:g}" if _knows_epsilon(explainer) else ""
    return f"maps by {explainer}{of_class}{with_epsilon}" + ("; of stores, see below each" if settings.caches else "")


def _knows_class(explainer: str) -> bool:
    return EXPLAINERS.find(explainer).rules is not None


def _knows_epsilon(explainer: str) -> bool:
    return EXPLAINERS.find(explainer).rules not in (None, "gradient-x-input")


def _row_titles(samples: Samples) -> list[str]:
    """Write the true class of each sample, its group if there is one, and its index."""
    dataset, split, rows = samples.dataset, samples.split, samples.rows
    titles = [[dataset.class_names[label]] for label in samples.labels.tolist()]
    if split.groups is not None:
        groups = np.asarray(split.groups[:])[rows].tolist()
        titles = [[*title, dataset.group_name(group)] for title, group in zip(titles, groups, strict=True)]
    return ["\n".join([*title, f"sample {row}"]) for title, row in zip(titles, rows.tolist(), strict=True)]


def _column_titles(model_titles: Sequence[str], stores: Sequence[Cache], settings: ShowOptions) -> list[str]:
    names = distinct([Path(str(cache)).name for cache in settings.caches], settings.caches)
    titles = [f"{name} ({store.info.explainer.rule})" for name, store in zip(names, stores, strict=True)]
    return [*distinct(model_titles, settings.models), *titles]


def distinct(titles: Sequence[str], locations: Sequence[Any]) -> list[str]:
    """Replace titles that occur more than once by their locations."""
    times = Counter(titles)
    return [title if times[title] == 1 else str(where) for title, where in zip(titles, locations, strict=True)]
