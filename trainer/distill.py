"""Stage two: a student learns from what a store holds. The teacher's network is neither loaded nor run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import Dataset, Location, Split, open_dataset
from options import Call, Message, Option, Word, takes
from pipeline import ModelConfig
from pipeline.networks.checkpoints import Weights, read_weights
from pipeline.networks.debias import hides_background, uses_segmenter
from pipeline.networks.heads import HeadSpec
from pipeline.networks.models import OWN
from teacher_cache import Cache, CacheError, open_cache, share_of_logits
from teacher_cache.pairing import check_explains, check_same_teacher, open_paired
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, check_augmentations
from trainer.loop.class_weights import class_weights
from trainer.loop.groups import groups_of
from trainer.loop.masks import check_objects
from trainer.loop.methods import METHODS, method_of, missing_from, moves, needs, of_store, parse_terms
from trainer.loop.state import STUDENT, Material, Training
from trainer.loop.training import train
from trainer.run_dir import check_free
from trainer.settings import NO_AUGMENTATION, STUDENT_STEPS, Runtime, Settings, StudentOptions, total_steps
from trainer.start import (
    LITTLE,
    bias_free_by_default,
    completes_by_default,
    fade_biases,
    keeps_biases,
    loads_weights,
    network_of,
    own_bias_free,
)
from trainer.stream.stream import explained_source, labelled_source
from trainer.tuning import tune

log = logging.getLogger(__name__)

REPAINTED_OUTPUT, WEIGHT = "repainted-output", 0.4  # by default, beside 1 of the heatmaps (docs/results/choosing.md)
USUAL = "small-cnn"  # the architecture of a student whose teacher is not one of our own networks


@takes(StudentOptions)
def train_student(data: Location, cache: Location | None, out: str | Path, **options: Any) -> dict[str, Any]:
    """Train a student to match what the teacher's store holds, and save it in ``out``; or resume such a training.

    This is the method of Bassi et al., arXiv 2407.09788, unless another method is named or the store has other maps:
    the loss compares heatmaps alone, and uses neither labels nor outputs. Where the teacher has biases and the student
    has none, it compares completed maps (`complete-lrp`), if those of the teacher sum to half of its logits and more.
    Each step shows one stored draw of each sample. The student explains the same class with the same ε.

    The last layer is the teacher's, copied and frozen, behind a learnt adapter where widths differ. ``bias_free`` None
    means: as the teacher; behind a teacher with biases, `small-cnn` and `small-resnet` have none where they match
    completed maps, or maps that sum to less than half of its logits. A training takes 3,000 steps unless ``steps`` or
    ``epochs`` is given.

    Args:
        data: a dataset.
        cache: the store of its train split; None for methods that need none (erm, group-dro, rrr, isnet).
        out: the folder of the run.

    Returns:
        The result, as ``result.json`` has it.

    Raises:
        DatasetError, CacheError, ModelError, RelevanceError, TrainingError: an input or option is wrong.
        FileExistsError: ``out`` holds something else than an unfinished run.
        TrainingInterrupted: SIGTERM or Ctrl-C stopped the training; a checkpoint is there.
    """
    given = StudentOptions(data=data, cache=cache, out=out, **options)
    check_free(Path(out))
    dataset = open_dataset(data)
    dataset.check_classes()
    chosen = dataclasses.replace(given, arch=_architecture(given))
    weights = None if chosen.init is None else read_weights(chosen.init)
    student = _plan(chosen, dataset, weights)
    train_split = dataset.split("train")
    info = None if student.explained is None else student.explained.info
    map_shape = None if info is None or "heatmaps" not in student.needs else info.map_shape
    check_augmentations(student.settings.augment, map_shape, train_split.image_shape, moves(student.settings.loss))
    config, settings = _config(chosen, student, dataset, weights), student.settings
    if given.tune is not None:
        lr = tune(given, settings, config, train_student)
        given, settings = dataclasses.replace(given, lr=lr, tune=None), dataclasses.replace(settings, lr=lr)
        config = dataclasses.replace(config, training={**config.training, "lr": lr})
    training = Training(
        out=out,
        config=config,
        material=_material(chosen, student, dataset),
        settings=settings,
        runtime=Runtime.of(chosen),
        record=given.record(),
        purpose=STUDENT,
        student_factory=chosen.student_factory,
        weights=weights,
    )
    return train(training)


def _architecture(options: StudentOptions) -> str:
    """Return the name of the student's architecture: by default the teacher's, if it is one of our own."""
    if options.arch is not None or options.student_factory is not None or options.cache is None:
        return options.arch or USUAL
    of_teacher = open_cache(options.cache).info.teacher.arch
    return of_teacher if of_teacher in OWN else USUAL


@dataclass(frozen=True)
class _Plan:
    """What the options mean, checked.

    needs: the names of what the methods need of a batch. batch_fields: these, and what the augmentations need.
    explained, validation: the stores. groups, group_count: for group-dro, the group of each sample. share: of the
    logits, to which the maps of a teacher with biases sum, if maps are matched.
    """

    settings: Settings
    needs: tuple[str, ...]
    batch_fields: tuple[str, ...]
    explained: Cache | None
    validation: Cache | None
    groups: np.ndarray | None
    group_count: int
    share: float | None


def _plan(options: StudentOptions, dataset: Dataset, weights: Weights | None) -> _Plan:
    method, share = options.method, None
    if method is None and options.loss is None and options.cache is not None:
        store = open_cache(options.cache)
        method, share = method_of(store.info.explainer.rule), share_if_needed(store)
        arch = options.student_factory or _architecture(options)
        if method == "lrp" and completes_by_default(store.info.teacher, arch, weights, options, share):
            method = "complete-lrp"
    terms = parse_terms(method, options.loss)
    train_split = dataset.split("train")
    settings = Settings.of(options, terms, total_steps(len(train_split), options, STUDENT_STEPS))
    needed, reason = needs(terms), _method_option(terms)
    if settings.mask_target:
        if "heatmaps" not in needed:
            raise TrainingError(
                Message(Option("mask_target", True), " is for heatmaps, and ", reason, " matches none: leave it out")
            )
        needed, reason = (*dict.fromkeys((*needed, "masks")),), Option("mask_target", True)
    _check_masks(dataset, needed, reason, "train")
    if BACKGROUND in settings.augment:
        _check_masks(dataset, ("masks",), Option("augment", BACKGROUND), "train")
    groups, group_count = groups_of(train_split) if "group_weights" in needed else (None, 0)
    explained, validation = _open_stores(options, settings, dataset, needed)
    if explained is not None:
        if share is None and "heatmaps" in needed:
            share = share_if_needed(explained, completed="complete-lrp" in terms)
        if "complete-lrp" in terms:
            _check_completion(share)
        if _can_repaint(train_split, explained) and options.augment in (None, (BACKGROUND,)):
            settings = _with_other_backgrounds(options, settings)
            needed = (*dict.fromkeys((*needed, *needs(settings.loss))),)
        check_background(settings, explained.info.teacher.debias)
    batch_fields = (*dict.fromkeys((*needed, *(("masks",) if BACKGROUND in settings.augment else ()))),)
    once = np.arange(len(dataset.class_names))  # a wrong option is refused before all answers are read
    if class_weights(options.class_weights, once, dataset.class_names) is not None:
        given = class_weights(options.class_weights, _answers(train_split, explained), dataset.class_names)
        settings = dataclasses.replace(settings, class_weights=given)
        by = "labels" if explained is None else "teacher_logits"
        needed, batch_fields = ((*dict.fromkeys((*names, by)),) for names in (needed, batch_fields))
    if "masks" in batch_fields:
        background = Option("augment", BACKGROUND)
        check_objects(train_split, dataset.path, reason if "masks" in needed else background)
    if "masks" in needed and validation is not None:
        check_objects(dataset.split("validation"), dataset.path, reason)
    return _Plan(settings, needed, batch_fields, explained, validation, groups, group_count, share)


def _with_other_backgrounds(options: StudentOptions, settings: Settings) -> Settings:
    """Add what a student learns by default where other backgrounds change nothing that the teacher says."""
    if options.augment is None:
        settings = dataclasses.replace(settings, augment=(BACKGROUND,))
        log.info(
            Message(
                "a quarter to half of the images get another background, because the teacher sees nothing outside the "
                "masks (",
                Option("augment", NO_AUGMENTATION),
                " keeps the images as they are)",
            )
        )
    method = next(iter(settings.loss))
    if options.method is not None or options.loss is not None or method not in ("lrp", "complete-lrp"):
        return settings
    log.info(
        Message(
            "before these backgrounds, the student matches the teacher's outputs besides its heatmaps (",
            Option("method", method), " matches heatmaps alone)",
        )
    )  # fmt: skip
    return dataclasses.replace(settings, loss={**settings.loss, REPAINTED_OUTPUT: WEIGHT})


def share_if_needed(store: Cache, completed: bool = False) -> float | None:
    """Return the share of the logits to which the maps sum; None where no default and no completion depends on it."""
    return share_of_logits(store) if completed or not store.info.teacher.bias_free else None


def _check_completion(share: float | None) -> None:
    """Warn of maps that carry little of the logits: what completes them is most of them."""
    if share is not None and share < LITTLE:
        log.warning(
            Message(
                f"the teacher's heatmaps sum to {share:.0%} of its logits (median), so completed maps mostly match its "
                "outputs, which the shortcut explains as well: use ", Option("method", "lrp"),
            )
        )  # fmt: skip


def _can_repaint(split: Split, explained: Cache | None) -> bool:
    """Return whether other backgrounds change nothing that the teacher says of an image.

    A segmenter makes masks of its own, so its teacher may see pixels outside of the dataset's.
    """
    if explained is None or split.masks is None:
        return False
    debias = explained.info.teacher.debias
    return hides_background(debias) and not uses_segmenter(debias)


def _answers(split: Split, explained: Cache | None) -> np.ndarray:
    """Read the class that the teacher says for each sample, or, without a store, its label: int64 (n,)."""
    if explained is None:
        return np.asarray(split.labels[:]).astype(np.int64)
    answers, (shape, kind) = [], explained.sample_fields["teacher_logits"]
    for shard in range(explained.info.shards):
        start, stop = explained.info.shard_range(shard)
        logits = np.empty((stop - start, *shape), kind)
        explained.read_samples(shard, {"teacher_logits": logits})
        answers.append(logits.argmax(1))
    return np.concatenate(answers)


def _open_stores(
    options: StudentOptions, settings: Settings, dataset: Dataset, needed: Collection[str]
) -> tuple[Cache | None, Cache | None]:
    """Open the stores of the train and the validation split, where the methods learn from stores."""
    terms = settings.loss
    if not of_store(terms):
        for name, location in (("cache", options.cache), ("validation_cache", options.validation_cache)):
            if location is not None:
                raise TrainingError(
                    Message(_method_option(terms), " learns without a store: leave ", Option(name, location), " out")
                )
        dataset.split("train").verify()
        return None, None
    if options.cache is None:
        remedy = making_a_store(dataset.path, "train", missing_from(terms, None, ()))
        raise TrainingError(Message(_method_option(terms), " needs ", Option("cache"), ": make a store with ", remedy))
    explained = open_paired(options.cache, dataset, "train")
    check_holds(explained, dataset.path, terms)
    if "heatmaps" in needed:
        check_explains(explained)
    if options.validation_cache is None:
        return explained, None
    validation = open_paired(options.validation_cache, dataset, "validation")
    check_same_teacher(explained, validation)
    _check_masks(dataset, needed, Option("mask_target", True), "validation")
    check_holds(validation, dataset.path, terms)
    if "heatmaps" in needed:
        check_explains(validation)
    return explained, validation


def check_background(settings: Settings, debias: str) -> None:
    """Raise TrainingError where a teacher sees what is repainted, and where nothing is that a method needs."""
    sees = Message(
        " needs a teacher that does not see the background, and this one does (", Option("debias", debias), "): "
    )  # fmt: skip
    if BACKGROUND in settings.augment and not hides_background(debias) and not settings.mask_target:
        raise TrainingError(
            Message(
                Option("augment", BACKGROUND), sees, "train one with ", Option("debias", "mask"),
                " or segmenter, or give ", Option("mask_target", True),
            )
        )  # fmt: skip
    if REPAINTED_OUTPUT in settings.loss and BACKGROUND not in settings.augment:
        raise TrainingError(
            Message(
                Option("method", REPAINTED_OUTPUT), " learns from images with other backgrounds: give ",
                Option("augment", BACKGROUND),
            )
        )  # fmt: skip
    if REPAINTED_OUTPUT in settings.loss and not hides_background(debias):
        raise TrainingError(Message(Option("method", REPAINTED_OUTPUT), sees, "leave the method out"))


def _config(options: StudentOptions, student: _Plan, dataset: Dataset, weights: Weights | None) -> ModelConfig:
    """Describe the student's network, and what decides its weights."""
    info = None if student.explained is None else student.explained.info
    validation = None if student.validation is None else student.validation.info
    head = _teachers_head(options, student)
    split = dataset.split("train")
    factory = Option("student_factory", options.student_factory)
    network = network_of(options, factory, weights, split.image_shape)
    if network["start"] is not None and options.teacher_weights:
        network["start"]["teacher_weights"] = True
    bias_free = options.bias_free
    if bias_free is None:
        if student.explained is None:
            bias_free = own_bias_free(network["arch"], weights)
        else:
            of_teacher, loss = student.explained.info.teacher, student.settings.loss
            bias_free = bias_free_by_default(of_teacher, network["arch"], weights, loss, student.share)
        if bias_free and (keeps_biases(weights) or loads_weights(network, len(dataset.class_names), split.image_shape)):
            bias_free = False
            log.info(
                Message(
                    "the student keeps the biases of the weights that it starts from, although its teacher is "
                    "bias-free: its heatmaps do not account for what they add to a logit (",
                    Option("bias_free", True), " lets them fade out while it trains)",
                )
            )  # fmt: skip
    if bias_free:
        fade_biases(network, weights)
    training = {
        **student.settings.to_dict(),
        "cache": info and {key: value for key, value in info.to_dict().items() if key not in ("dataset", "written_by")},
        "validation": validation and {key: validation.to_dict()[key] for key in ("explainer", "storage", "dataset")},
    }
    return ModelConfig(
        **network,
        kind="student",
        bias_free=bias_free,
        debias="none",
        class_names=dataset.class_names,
        image_shape=split.image_shape,
        dataset={"name": dataset.name, "fingerprint": split.fingerprint},
        training=training,
        head=HeadSpec.of(head, with_pool=options.head == "attention-pool") if head else None,
    )


def _material(options: StudentOptions, student: _Plan, dataset: Dataset) -> Material:
    """Join the samples with what the stores hold of them."""
    split, explained, validation = dataset.split("train"), student.explained, student.validation
    seen = ("masks",) if _can_repaint(split, explained) else ()
    paths = {"data": options.data, "cache": options.cache, "validation_cache": options.validation_cache}
    if explained is None:
        source = labelled_source(split, student.groups)
    else:
        source = explained_source(split, explained, student.batch_fields)
    return Material(
        source=source,
        store=None if explained is None else explained.info,
        head=_teachers_head(options, student),
        groups=student.group_count,
        validation=None
        if validation is None
        else explained_source(dataset.split("validation"), validation, student.needs),
        answers=None if explained is None else explained_source(split, explained, ("teacher_logits", *seen)),
        compared=None
        if validation is None
        else explained_source(dataset.split("validation"), validation, ("teacher_logits", "labels")),
        paths={name: str(path) for name, path in paths.items() if path is not None},
    )


def _teachers_head(options: StudentOptions, student: _Plan) -> Mapping[str, np.ndarray]:
    return {} if student.explained is None or options.head == "free" else student.explained.head


def _method_option(terms: Mapping[str, float]) -> Option:
    return Option("method", Word("+".join(terms)))


def _check_masks(dataset: Dataset, needed: Collection[str], reason: Option, split: str) -> None:
    """Raise TrainingError where masks are needed of a split that has none."""
    if "masks" in needed and dataset.split(split).masks is None:
        raise TrainingError(
            Message(
                reason,
                f" needs 'masks' in the {split} split of {dataset.path}, which has none: add them to the dataset "
                "(docs/dataset-layout.md), or leave the option out",
            )
        )


def making_a_store(data: str, split: str, options: dict[str, Any]) -> Call:
    """Return the call that makes a store with these options."""
    known = {"data": data, "teacher": Word("TEACHER"), "split": split}
    return Call("cache_explanations", {**known, **options, "out": Word("NEW.zarr")})


def check_holds(cache: Cache, data: str, terms: Mapping[str, float]) -> None:
    """Raise CacheError, with the call that makes another store, unless the store has what the methods need."""
    info = cache.info
    lacking = missing_from(terms, info.explainer.rule, tuple(cache.sample_fields))
    if lacking:
        needed = [f"maps of {' or '.join(METHODS[name].explainers)}" for name in terms if METHODS[name].explainers]
        needed += ["the teacher's features"] if "features" in needs(terms) else []
        has = f"maps of {info.explainer.rule}" + (" and features" if "features" in cache.sample_fields else "")
        raise CacheError(
            Message(
                _method_option(terms),
                f" needs {' and '.join(needed)}, and the store {cache.path} has {has}: make one with ",
                making_a_store(data, info.dataset.split, lacking),
            )
        )
