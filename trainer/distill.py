"""Stage two: a student learns from what a store holds. The teacher's network is neither loaded nor run."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data import Dataset, Location, open_dataset
from pipeline import ModelConfig
from pipeline.networks.heads import HeadSpec
from pipeline.networks.models import OWN
from teacher_cache import Cache, CacheError, check_complete, open_cache
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, check_augmentations
from trainer.loop.groups import groups_of
from trainer.loop.methods import METHODS, method_of, missing_from, moves, needs, of_store, parse_terms
from trainer.loop.training import STUDENT, Material, Training, train
from trainer.run_dir import check_free
from trainer.settings import split_options, total_steps
from trainer.stream.stream import explained_source, labelled_source


def train_student(
    data: Location,
    cache: Location | None,
    out: str | Path,
    *,
    validation_cache: Location | None = None,
    method: str | None = None,
    loss: str | None = None,
    arch: str = "small-cnn",
    arch_options: dict[str, Any] | None = None,
    student_factory: str | None = None,
    head: str = "frozen",
    bias_free: bool | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    clip_norm: float | None = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Train a student to match what the teacher's store holds, and save it in ``out``; or continue such a training.

    The method of Bassi et al., arXiv 2407.09788, unless another one is named or the store has other maps: the loss is
    on heatmaps alone, and no label and no output is looked at. Each step shows one stored draw of each sample,
    explained by the student for the same class with the same ε. ``method`` is one of `trainer.loop.methods.METHODS`;
    ``loss`` a sum of some, as in ``lrp=1,output=0.1``. Those that learn from the dataset alone (``erm``, ``group-dro``,
    ``rrr``, ``isnet``) need no ``cache`` (None).

    The network is ``arch`` with ``arch_options``, or what ``student_factory`` (``package.module:function``) returns.
    Its last layer is the teacher's, copied and frozen, behind a learnt adapter where widths differ; ``head="free"``
    leaves it its own. ``bias_free`` None means: as the teacher. 3,000 steps unless ``steps`` or ``epochs`` is given.
    With ``validation_cache`` the weights of the lowest loss on the validation split are kept, without it the last
    ones. ``options`` are fields of `trainer.settings.Settings` and `trainer.settings.Runtime`. Returns the result that
    it writes.

    Raises DatasetError, CacheError, ModelError, FileExistsError, RelevanceError, TrainingError, TrainingInterrupted.
    """
    asked = {**locals(), **options}  # all that it was told, by the names that the command line has for it
    check_free(Path(out))
    dataset = open_dataset(data)
    if method is None and loss is None and cache is not None:
        method = method_of(open_cache(cache).info.explainer.rule)
    terms = parse_terms(method, loss)
    train_split = dataset.split("train")
    steps = total_steps(len(train_split), batch_size, steps, epochs, default=3000)
    settings, runtime = split_options(options, loss=terms, steps=steps, batch_size=batch_size, clip_norm=clip_norm)
    if student_factory is not None and arch != "small-cnn":
        raise TrainingError(f"give --arch ({arch}) or --student-factory ({student_factory}), not both")
    if head not in ("frozen", "attention-pool", "free"):
        raise TrainingError(f"--head is frozen, attention-pool or free, not '{head}'")
    wanted = needs(terms)
    if settings.mask_target:
        if "heatmaps" not in wanted:
            raise TrainingError(
                f"--mask-target is of heatmaps, and --method {'+'.join(terms)} matches none: leave it out"
            )
        wanted = (*dict.fromkeys((*wanted, "masks")),)
    _check_masks(dataset, wanted, "--mask-target" if settings.mask_target else f"--method {'+'.join(terms)}", "train")
    shown = wanted
    if BACKGROUND in settings.augment:
        shown = (*dict.fromkeys((*wanted, "masks")),)
        _check_masks(dataset, shown, f"--augment {BACKGROUND}", "train")
    groups, of_groups = groups_of(train_split) if "group_weights" in wanted else (None, 0)
    explained = validation = None
    if not of_store(terms):
        for option, given in (("--cache", cache), ("--validation-cache", validation_cache)):
            if given is not None:
                raise TrainingError(f"--method {'+'.join(terms)} learns without a store: leave {option} {given} out")
        train_split.verify()
    elif cache is None:
        raise TrainingError(
            f"--method {'+'.join(terms)} needs --cache: make a store with "
            f"{_command(dataset, 'train', missing_from(terms, None, ()))}"
        )
    else:
        explained = _open_paired(cache, dataset, "train")
        _check_holds(explained, dataset, terms)
        debias = explained.info.teacher.debias
        if BACKGROUND in settings.augment and debias not in ("mask", "segmenter") and not settings.mask_target:
            raise TrainingError(
                f"--augment {BACKGROUND} needs a teacher that sees none, and this one does (--debias {debias}): "
                "train one with --debias mask or segmenter, or give --mask-target"
            )
        if validation_cache is not None:
            validation = _open_paired(validation_cache, dataset, "validation")
            _check_validation(explained, validation)
            _check_masks(dataset, wanted, "--mask-target", "validation")
            _check_holds(validation, dataset, terms)
    info = None if explained is None else explained.info
    map_shape = None if info is None or "heatmaps" not in wanted else info.map_shape
    check_augmentations(settings.augment, map_shape, train_split.image_shape, moves(terms))

    layer = {} if explained is None or head == "free" else explained.head
    if bias_free is None:
        bias_free = info.teacher.bias_free if info else arch in OWN and student_factory is None
    decided = {
        **settings.to_dict(),
        "cache": info and {key: value for key, value in info.to_dict().items() if key not in ("dataset", "written_by")},
        "validation": validation
        and {key: validation.info.to_dict()[key] for key in ("explainer", "storage", "dataset")},
    }
    config = ModelConfig(
        kind="student",
        arch=student_factory or arch,
        arch_options=arch_options or {},
        bias_free=bias_free,
        debias="none",
        class_names=dataset.class_names,
        image_shape=train_split.image_shape,
        dataset={"name": dataset.name, "fingerprint": train_split.fingerprint},
        training=decided,
        head=HeadSpec.of(layer, with_pool=head == "attention-pool") if layer else None,
    )
    paths = {"data": data, "cache": cache, "validation_cache": validation_cache}
    material = Material(
        source=labelled_source(train_split, groups)
        if explained is None
        else explained_source(train_split, explained, shown),
        store=info,
        head=layer,
        groups=of_groups,
        validation=None if validation is None else explained_source(dataset.split("validation"), validation, wanted),
        paths={name: str(path) for name, path in paths.items() if path is not None},
    )
    training = Training(out, config, material, settings, runtime, asked, STUDENT, student_factory=student_factory)
    return train(training)


def _check_masks(dataset: Dataset, wanted: Collection[str], option: str, split: str) -> None:
    """Raise TrainingError where masks are wanted of a split that has none."""
    if "masks" in wanted and dataset.split(split).masks is None:
        raise TrainingError(
            f"{option} needs 'masks' in the {split} split of {dataset.path}, which has none: add them to the dataset "
            "(docs/dataset-layout.md), or leave the option out"
        )


def _command(dataset: Dataset, split: str, options: str) -> str:
    """The command that makes a store with these options."""
    command = f"python cli.py cache-explanations --data {shlex.quote(dataset.path)} --teacher TEACHER --split {split}"
    return " ".join([command, *options.split(), "--out NEW.zarr"])


def _check_holds(cache: Cache, dataset: Dataset, terms: dict[str, float]) -> None:
    """Raise CacheError, with the command that makes another one, unless the store has what the methods need."""
    info = cache.info
    lacking = missing_from(terms, info.explainer.rule, tuple(cache.sample_fields))
    if lacking:
        wanted = [f"maps of {' or '.join(METHODS[name].explainers)}" for name in terms if METHODS[name].explainers]
        wanted += ["the teacher's features"] if "features" in needs(terms) else []
        has = f"maps of {info.explainer.rule}" + (" and features" if "features" in cache.sample_fields else "")
        raise CacheError(
            f"--method {'+'.join(terms)} needs {' and '.join(wanted)}, and the store {cache.path} has {has}: make one "
            f"with {_command(dataset, info.dataset.split, lacking)}"
        )


def _open_paired(path: Location, dataset: Dataset, split: str) -> Cache:
    """Open a complete store of one split of this very dataset, or raise CacheError."""
    cache = open_cache(path)
    check_paired(cache, dataset, split)
    check_complete(cache)
    dataset.split(split).verify()
    return cache


def check_paired(cache: Cache, dataset: Dataset, split: str) -> None:
    """Raise CacheError unless a store, complete or not, is of one split of this very dataset."""
    info, path = cache.info.dataset, cache.path
    if info.split != split:
        raise CacheError(
            f"the store {path} explains the split '{info.split}', the {split} split is needed: "
            f"make one with cache-explanations --split {split}"
        )
    expected = dataset.split(split).fingerprint
    if info.fingerprint != expected:
        raise CacheError(
            f"the store {path} was made from another dataset ('{info.name}', fingerprint {info.fingerprint[:12]}) "
            f"than {dataset.path} ('{dataset.name}', fingerprint {expected[:12]}): use the dataset that it was made "
            "from, or make a store of this one with cache-explanations"
        )
    if cache.info.teacher.class_names != dataset.class_names:
        raise CacheError(
            f"the store {path} knows the classes {', '.join(cache.info.teacher.class_names)}, the dataset has "
            f"{', '.join(dataset.class_names)}: give the dataset the names that it had when the store was made"
        )


def _check_validation(train: Cache, validation: Cache) -> None:
    """Raise CacheError unless the validation store explains the same teacher in the same way, and is intact."""
    for field in ("rule", "epsilon_low", "epsilon_high", "class_policy"):
        asked, given = getattr(train.info.explainer, field), getattr(validation.info.explainer, field)
        if asked != given:
            raise CacheError(
                f"the store {validation.path} was made with explainer.{field} {given!r}, {train.path} with {asked!r}: "
                "make both with the same options"
            )
    ours, theirs = train.info.teacher.weights_sha256, validation.info.teacher.weights_sha256
    if ours != theirs:
        raise CacheError(
            f"the store {validation.path} explains another teacher (weights {theirs[:12]}) than {train.path} "
            f"(weights {ours[:12]}): make both with the same --teacher"
        )
    for shard in range(validation.info.shards):
        validation.read_shard(shard)
