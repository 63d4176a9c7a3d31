"""Whether a heatmap store belongs to a dataset, and two stores to each other."""

from __future__ import annotations

from data.layout import Dataset
from data.storage import Location
from options import Call, Message, Option
from teacher_cache.errors import CacheError
from teacher_cache.store import Cache, check_complete, open_cache


def open_paired(path: Location, dataset: Dataset, split: str) -> Cache:
    """Open a complete store of one split of this dataset.

    Raises:
        CacheError: there is no such store, it is incomplete, or it does not belong to the split of the dataset.
        DatasetError: the dataset has no such split, or the split is damaged.
    """
    cache = open_cache(path)
    check_paired(cache, dataset, split)
    check_complete(cache)
    dataset.split(split).verify()
    return cache


def check_paired(cache: Cache, dataset: Dataset, split: str) -> None:
    """Raise CacheError unless a store, complete or not, explains one split of this dataset."""
    info, path = cache.info.dataset, cache.path
    if info.split != split:
        remedy = Call("cache_explanations", {"split": split})
        raise CacheError(
            Message(
                f"the store {path} explains the split '{info.split}', the {split} split is needed: make one with ",
                remedy,
            )
        )
    expected = dataset.split(split).fingerprint
    if info.fingerprint != expected:
        raise CacheError(
            Message(
                f"the store {path} was made from another dataset ('{info.name}', fingerprint {info.fingerprint[:12]}) "
                f"than {dataset.path} ('{dataset.name}', fingerprint {expected[:12]}): use the dataset that it was "
                "made from, or make a store of this one with ",
                Call("cache_explanations"),
            )
        )
    if cache.info.teacher.class_names != dataset.class_names:
        raise CacheError(
            f"the store {path} has the classes {', '.join(cache.info.teacher.class_names)}, the dataset has "
            f"{', '.join(dataset.class_names)}: give the dataset the names that it had when the store was made"
        )


def check_explains(cache: Cache) -> None:
    """Raise CacheError if every map of a complete store is zero. Scales are read up to the first one above zero."""
    if not any(scale.any() for scale in cache.scales()):
        raise CacheError(
            Message(
                f"every map of the store {cache.path} is zero, so there is nothing to learn from: check that the "
                "images are not black and that the teacher's logits depend on them, then make another store with ",
                Call("cache_explanations"),
            )
        )


def check_same_teacher(train: Cache, validation: Cache) -> None:
    """Raise CacheError unless two stores explain one teacher in the same way, and the second is intact."""
    for field in ("rule", "epsilon_low", "epsilon_high", "class_policy"):
        expected, actual = getattr(train.info.explainer, field), getattr(validation.info.explainer, field)
        if expected != actual:
            raise CacheError(
                f"the store {validation.path} was made with explainer.{field} {actual!r}, {train.path} with "
                f"{expected!r}: make both with the same options"
            )
    expected, actual = train.info.teacher.weights_sha256, validation.info.teacher.weights_sha256
    if expected != actual:
        raise CacheError(
            Message(
                f"the store {validation.path} explains another teacher (weights {actual[:12]}) than {train.path} "
                f"(weights {expected[:12]}): make both with the same ",
                Option("teacher"),
            )
        )
    for shard in range(validation.info.shards):
        validation.read_shard(shard)
