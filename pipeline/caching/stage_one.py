"""Stage one: run the teacher over a dataset split once and write its explanations to a store, shard by shard.

One task computes one shard, on threads of this process or on the workers of a Dask cluster (`cluster.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from torch import nn
from tqdm import tqdm

from data import Dataset, DatasetError, Split, open_dataset
from data.storage import Location, absolute
from options import Message, Option, renamed, takes
from pipeline.batch import explain_batch
from pipeline.caching.batches import Batches, BatchSize, fitting
from pipeline.caching.cluster import connected, on_every_worker, run_on_cluster
from pipeline.caching.draws import CLASS_POLICY, epsilons, target_classes, usual_draws
from pipeline.caching.first_look import FirstLook, first_look
from pipeline.caching.options import CachingOptions
from pipeline.device import as_input, pick_device, place, small_numbers_are_zero
from pipeline.errors import ModelError, RelevanceError
from pipeline.explainers import EXPLAINERS
from pipeline.log_level import log_level
from pipeline.networks.classifier import Classifier, versions
from pipeline.networks.debias import Debias
from pipeline.networks.heads import decisive_head, head_arrays, head_parameters
from pipeline.networks.own_teachers import BACKBONE, tensor_hashes
from pipeline.networks.segmenters import FILES
from pipeline.networks.sources import ImageShape
from pipeline.networks.teachers import Brought, Teacher, absolute_teacher, as_teacher, load_teacher
from pipeline.networks.zero_shot import ZeroShot
from pipeline.threads import cpu_threads
from teacher_cache import (
    COMPRESSORS,
    Cache,
    CacheError,
    CacheInfo,
    Claims,
    DatasetInfo,
    ExplainerInfo,
    Shard,
    TeacherInfo,
    average_pool,
    choose_compression,
    claim_writing,
    create_cache,
    head_sha256,
    open_cache,
    plan_storage,
)

log = logging.getLogger(__name__)

# While one thread computes, the other reads and writes; more would keep more shards in memory and compute no faster.
THREADS = 2
# Tasks given to Dask's threads at once. The more there are, the more each costs: 0.5 ms of 1,000, 0.8 ms of 10,000,
# and 100,000, as many as ImageNet has shards, did not end in five minutes, as measured with tasks that do nothing.
AT_ONCE = 1000
LOOKED_AT = 16  # samples that are explained before anything is written
ZEROS_ACCEPTED = 0.01  # share of a store's maps that may be zero without a warning
SHARED_PAUSE = 1.0  # seconds between two looks at what the others still do
# A network file system may show one machine what another one wrote only after its attribute cache expired (NFS: 60 s).
PAUSES_BEFORE_MISSED = (0, 1, 4, 15, 45)  # seconds


@dataclass(frozen=True)
class CacheSummary:
    """What a run of `cache_explanations` did."""

    path: str
    samples: int
    shards: int
    computed_shards: int


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute shards of a store; it can be pickled, and is a key.

    ``data``, ``teacher`` and ``out`` are absolute paths or URLs. ``device`` is chosen by the process that computes.
    ``segmenter`` and ``debias`` are as in `load_teacher`, ``batch_size`` as in `cache_explanations`.
    """

    data: Location
    teacher: str | Brought
    teacher_factory: str | None
    segmenter: str | None
    out: Location
    info: CacheInfo = field(hash=False)
    batch_size: BatchSize
    device: str
    debias: Debias | None = field(default=None, compare=False)  # the teacher's identity in ``info`` has it


@takes(CachingOptions)
def cache_explanations(
    data: Location, teacher: str | Path | Brought | nn.Module, out: Location, **options: Any
) -> CacheSummary:
    """Write the teacher's heatmaps of a split to a store, or resume a store that is unfinished.

    Each draw of a sample is a class, an ε and a heatmap; all draws share one forward pass. ``draws`` None is 4, or up
    to 8 for fewer than 5,000 samples, and 1 for attention, whose maps know neither class nor ε. Dask runs one task for
    each shard; a shard is written whole, then committed. The draws depend on the seed and the sample alone, the
    heatmaps on nothing else but float rounding (bit for bit at equal batch size). Memory does not grow with the number
    of samples.

    ``batch_size`` may be ``auto``: each process, or worker of a cluster, then finds the largest power of two that its
    memory holds, see `Batches`. One process writes a store at a time; with ``share`` several divide the shards, and
    each returns when the store is complete. The workers of a cluster must find ``data``, ``teacher`` and ``out`` where
    this process does; each computes one shard at a time, with the threads that its environment allows PyTorch.

    Args:
        data: a dataset.
        teacher: the folder of a teacher; an `nn.Module` that maps images, float32 (N, C, H, W) in [0, 1], to logits
            (N, K), with its preprocessing inside, behind the front ``debias``; an `OwnTeacher`, which also has weights,
            a front, a preprocessing or a class map; or a vision-language teacher, `ZeroShot`.
        out: the store.

    Returns:
        What was computed.

    Raises:
        DatasetError, ModelError, CacheError, RelevanceError: an input or option is wrong, or every map is zero.
        FileExistsError: ``out`` holds something else.
        ClusterError: the Dask cluster cannot be used, or was lost.
    """
    asked = CachingOptions(data=data, teacher=as_teacher(teacher), out=out, **options)
    with (
        nullcontext() if asked.scheduler is None else connected(asked.scheduler) as client,
        nullcontext() if client is not None else cpu_threads(asked.threads, pick_device(asked.device)),
    ):
        # the workers' device may be one that this machine does not have
        info, head = _plan(asked, asked.device if client is None else "cpu")
        cache = create_cache(out, info, head)
        job = Job(
            data=absolute(data),
            teacher=absolute_teacher(asked.teacher),
            teacher_factory=asked.teacher_factory,
            debias=asked.debias,
            segmenter=_absolute_segmenter(asked.segmenter),
            out=absolute(out),
            info=info,
            batch_size=asked.batch_size,
            device=asked.device,
        )
        with (
            claim_writing(cache, share=asked.share) as claims,
            tqdm(total=info.dataset.samples, unit="image", desc=f"explaining {asked.split}", disable=None) as bar,
        ):
            try:
                if not cache.committed().any():  # a store that is resumed was looked at when it was begun
                    _tell_first_look(job, client)
                if client is None:
                    computed = _run_here(job, cache, claims, asked.share, bar)
                else:
                    missing = _missing(cache, bar)
                    run_on_cluster(client, partial(compute_shard, job), missing, str(job.out), bar.update)
                    computed = len(missing)
            finally:
                forget(job)
                if client is not None:
                    on_every_worker(client, forget, job)
    _check_zeros(_open_complete(out, PAUSES_BEFORE_MISSED if computed and asked.scheduler is not None else (0,)))
    return CacheSummary(str(out), info.dataset.samples, info.shards, computed)


def _load(
    teacher: str | Path | Brought,
    class_names: Sequence[str],
    image_shape: ImageShape,
    teacher_factory: str | None,
    segmenter: str | None,
    debias: Debias | None,
) -> Teacher:
    """Load the teacher as `load_teacher` does; its errors name the option ``teacher_factory``."""
    try:
        return load_teacher(
            teacher, class_names, image_shape, student_factory=teacher_factory, segmenter=segmenter, debias=debias
        )
    except ModelError as error:
        raise ModelError(renamed(error, {"student_factory": "teacher_factory"})) from error


def _absolute_segmenter(segmenter: str | None) -> str | None:
    return str(absolute(segmenter)) if segmenter is not None and segmenter.endswith(FILES) else segmenter


def _tell_first_look(job: Job, client: Any) -> None:
    """Log the numbers of a first look at the maps, and warn where they are too low; a worker of a cluster looks."""
    looks: list[FirstLook | None] = []
    if client is None:
        looks.append(_look(job))
    else:
        run_on_cluster(client, partial(_look, job), [0], str(job.out), looks.append)
    for look in looks:
        if look is not None:
            log.info(look.line())
            for warning in look.warnings():
                log.warning(warning)


@small_numbers_are_zero()
def _look(job: Job, shard: int = 0) -> FirstLook | None:
    """Look at the maps of a job, in the process that computes its shards."""
    opened = _opened_for(job)
    with _computing:
        return first_look(opened.model, opened.split, job.info, opened.batches.size, opened.device)


def _run_here(job: Job, cache: Cache, claims: Claims, share: bool, bar: Any) -> int:
    """Compute what is missing on threads of this process, beside others if the work is shared; returns how many."""
    computed = 0

    def task(shard: int) -> int:
        if not claims.take(shard):
            return 0
        try:
            return 0 if share and cache.is_committed(shard) else compute_shard(job, shard)
        finally:
            claims.drop(shard)

    def done(samples: int) -> None:
        nonlocal computed
        computed += samples > 0
        bar.update(samples)

    while missing := _missing(cache, bar):
        before = computed
        run_on_threads(task, missing, done)
        if not share:
            break
        if computed == before:
            time.sleep(SHARED_PAUSE)  # others are at the last ones; where they die, we take them
    return computed


def _missing(cache: Cache, bar: Any) -> list[int]:
    """The shards without a commit record; the bar says how far the others are."""
    missing = np.flatnonzero(~cache.committed()).tolist()
    ranges = map(cache.info.shard_range, missing)
    bar.n = cache.info.dataset.samples - sum(stop - start for start, stop in ranges)
    bar.refresh()
    return missing


def _explainer_info(options: CachingOptions, samples: int, map_shape: tuple[int, int, int]) -> ExplainerInfo:
    """Describe how samples are explained. Raises RelevanceError for draws that would all be alike."""
    class_policy = "none" if EXPLAINERS[options.explainer].rules is None else CLASS_POLICY
    draws = options.draws
    if draws is None:
        draws = 1 if class_policy == "none" else usual_draws(samples)
    if class_policy == "none" and draws > 1:
        raise RelevanceError(
            Message(
                Option("draws", draws), " with ", Option("explainer", options.explainer), ": its maps know neither "
                "class nor ε, so that all draws of a sample are alike; leave ", Option("draws"), " out, or give 1",
            )
        )  # fmt: skip
    low, high = options.epsilon_range
    with np.errstate(over="ignore"):
        if not 0 < np.float32(low) <= np.float32(high) < np.inf:
            raise RelevanceError(
                Message(
                    Option("epsilon_range"), f" must be two numbers 0 < LOW <= HIGH in float32, got {low:g} {high:g}"
                )
            )
    return ExplainerInfo(options.explainer, draws, low, high, class_policy, options.seed, map_shape)


def _plan(options: CachingOptions, device_name: str) -> tuple[CacheInfo, dict[str, np.ndarray]]:
    """Describe the store, and read the teacher's last layer. All inputs are checked, and nothing is written.

    The first samples are explained now: a network that cannot be explained is refused, the shape of its maps and the
    width of its features are seen, and the codec is chosen by them.
    """
    dataset = open_dataset(options.data)
    dataset.check_classes()
    split = dataset.split(options.split)
    explainer = _explainer_info(options, len(split), (0, 0, 0))  # the shape of a map is not known yet
    split.verify()
    shape, device = split.image_shape, pick_device(device_name)
    teacher = _load(
        options.teacher, dataset.class_names, shape, options.teacher_factory, options.segmenter, options.debias
    )
    _check_masks(teacher.model, options, dataset)
    classes, input_shape = len(teacher.config.class_names), teacher.config.input_shape
    head_of = head_arrays if isinstance(options.teacher, ZeroShot) else partial(decisive_head, image_shape=input_shape)
    head = head_of(teacher.model.network, classes)
    of_head = head_parameters(teacher.model.network, classes)
    place(teacher.model, device)
    plan = partial(plan_storage, explainer.draws, shape, options.precision, resolution=options.resolution)
    info = CacheInfo(
        explainer=dataclasses.replace(explainer, map_shape=shape),
        teacher=TeacherInfo(
            arch=teacher.config.arch,
            debias=teacher.config.debias,
            bias_free=teacher.config.bias_free,
            weights_sha256=teacher.sha256,
            class_names=teacher.config.class_names,
            head_sha256=head_sha256(head),
        ),
        dataset=DatasetInfo(dataset.name, options.split, split.fingerprint, len(split), shape),
        storage=plan(features=int(options.features)),
        written_by=versions() | teacher.record | {BACKBONE: ",".join(tensor_hashes(teacher.model.network, of_head))},
    )
    maps, width = _explain_first(teacher.model, split, info, device)
    plan = partial(plan, map_shape=maps.shape[2:], features=width)
    plan()  # refuses a resolution that such maps do not have
    codec = _choose_codec(options.codec, options.out, average_pool(maps, options.resolution), options.precision)
    explainer = dataclasses.replace(explainer, map_shape=maps.shape[2:])
    return dataclasses.replace(info, explainer=explainer, storage=plan(codec=codec)), head


def _check_masks(model: Classifier, options: CachingOptions, dataset: Dataset) -> None:
    """Raise ModelError if the teacher's front needs masks, and the split has none."""
    if model.needs_masks and dataset.split(options.split).masks is None:
        masked = [Option("split", name) for name, split in dataset.splits.items() if split.masks is not None]
        remedy = ["give ", masked[0], ", which has masks, or add "] if masked else ["add "]
        raise ModelError(
            Message(
                f"the split '{options.split}' has no masks, which the front of {options.teacher} needs: ", *remedy,
                f"masks to {dataset.path} (docs/dataset-layout.md)",
            )
        )  # fmt: skip


def _explain_first(model: Classifier, split: Split, info: CacheInfo, device: torch.device) -> tuple[np.ndarray, int]:
    """Explain the first samples: their maps, float32 (n, D, C, h, w), and the width of the features, 0 without any.

    Raises RelevanceError where every map is zero although the network sees something, or something is not finite.
    """
    images = np.asarray(split.images[:LOOKED_AT])
    masks = None if split.masks is None else np.asarray(split.masks[:LOOKED_AT])
    batches = Batches(fitting(LOOKED_AT, split.image_shape), given=False)
    first = explain_shard(model, images, masks, info, 0, batches, device)
    if not (np.isfinite(first.heatmaps).all() and np.isfinite(first.teacher_logits).all()):
        raise RelevanceError(
            Message(
                f"the logits or heatmaps of samples 0 to {len(images) - 1} are not finite, because the teacher "
                "overflows or its weights are not finite: give other weights, or train it with a smaller ",
                Option("lr"),
            )
        )  # fmt: skip
    visible = masks if model.needs_masks else None
    if model.segmenter is not None:
        visible = model.segmenter(as_input(images, device)).cpu().numpy()
    seen = images if visible is None else images * (visible != 0)
    if seen.any() and not first.heatmaps.any():  # maps of black images are zero, whatever the teacher
        raise RelevanceError(
            Message(
                f"every heatmap of samples 0 to {len(images) - 1} is zero, so there is nothing to learn from: the "
                "teacher's logits do not depend on the images (train it again, with a smaller ", Option("lr"), "), or ",
                Option("epsilon_range"), " is far above its activations",
            )
        )  # fmt: skip
    return first.heatmaps, 0 if first.features is None else first.features.shape[1]


def _choose_codec(codec: str, out: Location, maps: np.ndarray, precision: str) -> str:
    """Choose the codec by the first maps, float32 (n, D, C, h, w), unless it is named in full or the store has one."""
    if codec not in ("auto", *COMPRESSORS):
        return codec
    with suppress(CacheError):
        codec_of_store = open_cache(out).info.storage.codec
        if codec == "auto" or codec_of_store.startswith(f"blosc-{codec}-{COMPRESSORS[codec].level}-"):
            return codec_of_store
    flat = maps.reshape(-1, *maps.shape[2:])
    return str(choose_compression(flat, precision, None if codec == "auto" else codec))


def run_on_threads(task: Callable[[int], int], shards: Sequence[int], done: Callable[[int], object]) -> None:
    """Run ``task(shard)`` on two threads for every shard, and tell ``done`` each result, one at a time.

    When it ends, by whatever way, no thread is at work any more.
    """
    counting = threading.Lock()

    def counted(shard: int) -> None:
        result = task(shard)
        with counting:
            done(result)

    one = delayed(counted, pure=False, traverse=False)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(shards), AT_ONCE):
            compute([one(shard) for shard in shards[first : first + AT_ONCE]], scheduler="threads", pool=pool)


def _open_complete(out: Location, pauses: Sequence[float]) -> Cache:
    """Open the store. Raise CacheError unless every shard is committed, if need be after some pauses in seconds."""
    missed: list[int] = []
    for pause in pauses:
        time.sleep(pause)
        cache = open_cache(out)
        missed = np.flatnonzero(~cache.committed()).tolist()
        if not missed:
            return cache
    raise CacheError(
        Message(
            f"every shard was computed and written, but {len(missed)} of them, shard {missed[0]} first, are not in the "
            f"store {out} as this machine ({platform.node()}) sees it: do the workers see another disk under the same "
            "path? Give an ",
            Option("out"),
            " that all machines share; the same command computes what is missing",
        )
    )


def _check_zeros(cache: Cache) -> None:
    """Warn if many maps of a complete store are zero; raise RelevanceError if all are."""
    zero = np.concatenate([scale == 0 for scale in cache.scales()])  # (N, D)
    reasons = (
        "the images are black, or their masks are empty, or the teacher's logits do not depend on them (train it "
        "again, with a smaller ",
        Option("lr"),
        "), or ",
        Option("epsilon_range"),
        " is far above its activations",
    )
    if zero.all():
        raise RelevanceError(
            Message(f"every map of the store {cache.path} is zero, so there is nothing to learn from: ", *reasons)
        )
    if zero.mean() > ZEROS_ACCEPTED:
        samples = np.flatnonzero(zero.any(1))
        log.warning(
            Message(
                f"{zero.sum():,} of {zero.size:,} maps of the store {cache.path} are zero ({zero.mean():.1%}, of "
                f"samples {', '.join(map(str, samples[:5]))}{', …' if len(samples) > 5 else ''}), and students learn "
                "nothing from them: ",
                *reasons,
            )
        )


@dataclass(frozen=True)
class _Opened:
    """What a process keeps between the shards of a job."""

    model: Classifier
    split: Split
    cache: Cache
    batches: Batches
    device: torch.device


_opening, _computing = threading.Lock(), threading.Lock()
_opened: dict[Job, _Opened] = {}  # at most one: the last model is gone before the next one takes its memory


@small_numbers_are_zero()
def compute_shard(job: Job, shard: int) -> int:
    """Compute one shard, write and commit it: the task of stage one. Returns the number of its samples.

    The first shard of a job opens what the process needs for all of them, see `_open` for its errors. A process
    computes one shard at a time, as it takes every core or the one GPU, and reads and writes others meanwhile.
    """
    opened = _opened_for(job)
    start, stop = job.info.shard_range(shard)
    images = np.asarray(opened.split.images[start:stop])
    masks = None if opened.split.masks is None else np.asarray(opened.split.masks[start:stop])
    with _computing:
        content = explain_shard(opened.model, images, masks, job.info, start, opened.batches, opened.device)
    opened.cache.write_shard(shard, content)
    return stop - start


def _opened_for(job: Job) -> _Opened:
    """Return what the process keeps for a job; the first call opens it."""
    with _opening:
        if job not in _opened:
            _opened.clear()
            _opened[job] = _open(job)
        return _opened[job]


def forget(job: Job) -> None:
    """Let go of what the process kept for a job: its model, on its GPU, above all."""
    _opened.pop(job, None)


def _open(job: Job) -> _Opened:
    """Open dataset, teacher and store, and check that they are the job's: another machine may see another disk.

    Raises DatasetError, ModelError or CacheError that names the machine, the path and what differs.
    """
    here, remedy = f"as {platform.node()} sees it", "every machine must see the same files under the same path"
    try:
        split = open_dataset(job.data).split(job.info.dataset.split)
        shape = job.info.dataset.image_shape
        with log_level("pipeline.networks", logging.WARNING):  # notes were logged when the store was planned
            class_names = job.info.teacher.class_names
            teacher = _load(job.teacher, class_names, shape, job.teacher_factory, job.segmenter, job.debias)
        cache = open_cache(job.out, writable=True)
    except (DatasetError, ModelError, CacheError) as error:
        raise type(error)(Message(error, f" ({here}; {remedy})")) from error
    if split.fingerprint != job.info.dataset.fingerprint:
        raise DatasetError(
            f"the dataset {job.data}, {here}, is another one: the fingerprint of its split '{split.name}' is "
            f"{split.fingerprint[:12]}…, and not {job.info.dataset.fingerprint[:12]}…; {remedy}"
        )
    if teacher.sha256 != job.info.teacher.weights_sha256:
        raise ModelError(
            f"the teacher {job.teacher}, {here}, is another one: the SHA-256 of its weights is {teacher.sha256[:12]}…, "
            f"and not {job.info.teacher.weights_sha256[:12]}…; {remedy}"
        )
    if differences := cache.info.differences(job.info):
        raise CacheError(f"the store {job.out}, {here}, is another one ({'; '.join(differences)}); {remedy}")
    device = pick_device(job.device)
    place(teacher.model, device)
    batches = Batches.of(job.batch_size, job.info.storage.shard_samples, split.image_shape, device)
    return _Opened(teacher.model, split, cache, batches, device)


def explain_shard(
    model: Classifier,
    images: np.ndarray,
    masks: np.ndarray | None,
    info: CacheInfo,
    start: int,
    batches: Batches,
    device: torch.device,
) -> Shard:
    """The content of a shard whose first sample is ``start``: the teacher, in evaluation mode, over its batches.

    images: uint8 (n, C, H, W); masks: uint8 (n, 1, H, W) or None. Whatever shape ``info`` gives to maps and features,
    they have the teacher's. Raises RelevanceError where ``batches`` are too large for the memory.
    """
    stop = start + len(images)
    explainer = info.explainer
    epsilon = epsilons(explainer.epsilon_low, explainer.epsilon_high, explainer.seed, explainer.draws, start, stop)
    heatmaps = np.empty(0, np.float32)

    def explain(rows: slice) -> tuple[np.ndarray, ...]:
        """Logits, classes and, where they are stored, features of a batch; its maps go into ``heatmaps``."""
        nonlocal heatmaps

        def classes(logits: np.ndarray) -> np.ndarray:
            first = start + rows.start
            return target_classes(logits.argmax(1), logits.shape[1], explainer.seed, explainer.draws, first)

        batch = explain_batch(
            model,
            images[rows],
            None if masks is None else masks[rows],
            classes,
            epsilon[rows],
            explainer=explainer.rule,
            device=device,
            features=bool(info.storage.features),
        )
        if not heatmaps.size:
            heatmaps = np.empty((stop - start, *batch.maps.shape[1:]), np.float32)
        heatmaps[rows] = batch.maps
        return batch.logits, batch.classes, *(() if batch.features is None else (batch.features,))

    logits, targets, *features = map(np.concatenate, zip(*batches.run(stop - start, explain), strict=True))
    return Shard(heatmaps, targets, epsilon, logits, features[0] if features else None)
