"""Stage one: run the teacher over a dataset split once and write its explanations to a store, shard by shard.

One task computes one shard, on threads of this process or on the workers of a Dask cluster (`cluster.py`).
"""

from __future__ import annotations

import dataclasses
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
from tqdm import tqdm

from data import DatasetError, Split, open_dataset
from data.storage import Location, absolute
from pipeline.batch import explain_batch
from pipeline.caching.batches import DEFAULT_SIZE, Batches, BatchSize
from pipeline.caching.cluster import connected, on_every_worker, run_on_cluster
from pipeline.caching.draws import CLASS_POLICY, epsilons, target_classes
from pipeline.device import as_input, pick_device, place
from pipeline.explainers import find_explainer
from pipeline.networks.classifier import Classifier, versions
from pipeline.networks.heads import head_arrays
from pipeline.networks.models import ModelError
from pipeline.networks.segmenters import FILES
from pipeline.networks.teachers import absolute_teacher, load_teacher
from pipeline.networks.zero_shot import ZeroShot
from pipeline.rules import RelevanceError
from teacher_cache import (
    COMPRESSORS,
    LEVELS,
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

# While one thread computes, the other reads and writes; more would keep more shards in memory and compute no faster.
THREADS = 2
# Tasks given to Dask's threads at once. The more there are, the more each costs: 0.5 ms of 1,000, 0.8 ms of 10,000,
# and 100,000, as many as ImageNet has shards, did not end in five minutes, as measured with tasks that do nothing.
AT_ONCE = 1000
LOOKED_AT = 16  # samples that are explained before anything is written
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
    ``segmenter`` is as in `load_classifier`, ``batch_size`` as in `cache_explanations`.
    """

    data: Location
    teacher: str | ZeroShot
    segmenter: str | None
    out: Location
    info: CacheInfo = field(hash=False)
    batch_size: BatchSize
    device: str


def cache_explanations(
    data: Location,
    teacher: str | Path | ZeroShot,
    out: Location,
    *,
    split: str = "train",
    draws: int | None = None,
    epsilon_range: tuple[float, float] = (0.01, 1.0),
    explainer: str = "flex",
    features: bool = False,
    batch_size: BatchSize = DEFAULT_SIZE,
    seed: int = 0,
    device: str = "auto",
    precision: str = "float16",
    codec: str = "auto",
    resolution: int = 1,
    share: bool = False,
    scheduler: str | None = None,
    segmenter: str | None = None,
) -> CacheSummary:
    """Write the teacher's heatmaps of a split to a store, or continue one that was interrupted.

    Each of the ``draws`` of a sample is a class, an ε and a heatmap; all share one forward pass. None is 4, and 1 for
    attention, whose maps know neither. ``explainer`` is a name of `pipeline.EXPLAINERS`, which students of the store
    use too. With ``features`` the teacher's deep features, what enters its last layer, are stored as well. Dask runs
    one task a shard; a shard is written whole, then committed. The draws depend on the seed and the sample alone, the
    heatmaps on nothing else but float rounding (bit for bit at equal batch size). ``batch_size`` may be ``auto``: then
    each process, or worker of a cluster, finds the largest power of two that its memory holds, see `Batches`.

    Maps are stored with a ``precision`` of `teacher_cache.PRECISIONS`, average-pooled by ``resolution``, and compressed
    with the ``codec``: a compressor, ``lz4`` or ``zstd``, with the shuffle that makes the first maps smallest,
    ``auto``, the default compressor of the precision, or all of it, as in ``blosc-zstd-9-bitshuffle``.

    One process writes a store at a time; with ``share`` several divide the shards between them, and each returns when
    the store is complete.

    ``scheduler`` is the address of a Dask cluster whose workers, on their own ``device``, run the tasks; all of them
    must find ``data``, ``teacher`` and ``out`` where this process does. A worker computes one shard at a time, with
    the threads that its environment allows PyTorch. Shards that the store has a commit record of are not computed
    again. Memory does not grow with the number of samples. ``segmenter`` is as in `load_classifier`.

    Raises DatasetError, ModelError, CacheError, FileExistsError, RelevanceError, ClusterError.
    """
    class_policy = "none" if find_explainer(explainer).rules is None else CLASS_POLICY
    if draws is None:
        draws = 1 if class_policy == "none" else 4
    _check_options(draws, epsilon_range, batch_size, share, scheduler)
    if class_policy == "none" and draws > 1:
        raise RelevanceError(
            f"--draws {draws} with --explainer {explainer}: its maps know neither class nor ε, so that all draws of a "
            "sample are alike; leave --draws out, or give 1"
        )
    settings = partial(ExplainerInfo, explainer, draws, *epsilon_range, class_policy, seed)
    with nullcontext() if scheduler is None else connected(scheduler) as client:
        # the workers' device may be one that this machine does not have
        planning = device if client is None else "cpu"
        info, head = _plan(
            data, teacher, segmenter, out, split, settings, features, (precision, codec, resolution), planning
        )
        cache = create_cache(out, info, head)
        named = str(absolute(segmenter)) if segmenter is not None and segmenter.endswith(FILES) else segmenter
        job = Job(absolute(data), absolute_teacher(teacher), named, absolute(out), info, batch_size, device)
        with (
            claim_writing(cache, share=share) as claims,
            tqdm(total=info.dataset.samples, unit="image", desc=f"explaining {split}", disable=None) as bar,
        ):
            try:
                if client is None:
                    computed = _run_here(job, cache, claims, share, bar)
                else:
                    missing = _missing(cache, bar)
                    run_on_cluster(client, partial(compute_shard, job), missing, str(job.out), bar.update)
                    computed = len(missing)
            finally:
                forget(job)
                if client is not None:
                    on_every_worker(client, forget, job)
    _check_all_there(out, PAUSES_BEFORE_MISSED if computed and scheduler is not None else (0,))
    return CacheSummary(str(out), info.dataset.samples, info.shards, computed)


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


def _check_options(
    draws: int, epsilon_range: tuple[float, float], batch_size: BatchSize, share: bool, scheduler: str | None
) -> None:
    low, high = epsilon_range
    with np.errstate(over="ignore"):
        if not 0 < np.float32(low) <= np.float32(high) < np.inf:
            raise RelevanceError(
                f"--epsilon-range must be two numbers 0 < LOW <= HIGH in float32, got {low:g} {high:g}"
            )
    if draws < 1:
        raise RelevanceError(f"--draws must be at least 1, got {draws}")
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise RelevanceError(f"--batch-size must be at least 1, or auto, got {batch_size}")
    if share and scheduler is not None:
        raise RelevanceError("give --share or --scheduler, not both: a cluster divides the shards by itself")


def _plan(
    data: Location,
    teacher: str | Path | ZeroShot,
    segmenter: str | None,
    out: Location,
    split: str,
    explainer: Callable[..., ExplainerInfo],
    features: bool,
    stored: tuple[str, str, int],
    device: str,
) -> tuple[CacheInfo, dict[str, np.ndarray]]:
    """What the store will say of itself, and the teacher's last layer; all inputs are checked, nothing is written.

    ``explainer`` lacks the maps' shape, ``stored`` is (precision, codec, resolution), as in `cache_explanations`. The
    first samples are explained now: a network that cannot be is refused, the shape of its maps and the width of its
    features are seen, and the codec is chosen by them.
    """
    precision, codec, resolution = stored
    dataset = open_dataset(data)
    chosen = dataset.split(split)
    chosen.verify()
    found = load_teacher(teacher, dataset.class_names, chosen.image_shape, segmenter=segmenter)
    model, config = found.model, found.config
    head = head_arrays(model.network, len(config.class_names))
    torch_device = pick_device(device)
    place(model, torch_device)
    shape = chosen.image_shape
    settings = explainer(map_shape=shape)
    plan = partial(plan_storage, settings.draws, shape, precision, resolution=resolution)
    info = CacheInfo(
        explainer=settings,
        teacher=TeacherInfo(
            arch=config.arch,
            debias=config.debias,
            bias_free=config.bias_free,
            weights_sha256=found.sha256,
            class_names=config.class_names,
            head_sha256=head_sha256(head),
        ),
        dataset=DatasetInfo(dataset.name, split, chosen.fingerprint, len(chosen), shape),
        storage=plan(features=int(features)),
        written_by=versions() | found.record,
    )
    images = np.asarray(chosen.images[:LOOKED_AT])
    masks = None if chosen.masks is None else np.asarray(chosen.masks[:LOOKED_AT])
    first = explain_shard(model, images, masks, info, 0, Batches(LOOKED_AT, given=False), torch_device)
    maps, width = first.heatmaps, 0 if first.features is None else first.features.shape[1]
    shown = masks if config.debias == "mask" else None
    if model.segmenter is not None:
        shown = model.segmenter(as_input(images, torch_device)).cpu().numpy()
    seen = images if shown is None else images * (shown != 0)
    if seen.any() and not maps.any():  # maps of black images are zero, whatever the teacher
        raise RelevanceError(
            f"every heatmap of samples 0 to {len(images) - 1} is zero, so there is nothing to learn from: the "
            "teacher's logits do not depend on the images (train it again, with a smaller --lr), or --epsilon-range is "
            "far above its activations"
        )
    plan = partial(plan, map_shape=maps.shape[2:], features=width)
    plan()  # refuses a resolution that such maps do not have
    codec = _choose_codec(codec, out, average_pool(maps, resolution), precision)
    settings = dataclasses.replace(settings, map_shape=maps.shape[2:])
    return dataclasses.replace(info, explainer=settings, storage=plan(codec=codec)), head


def _choose_codec(codec: str, out: Location, maps: np.ndarray, precision: str) -> str:
    """In full, by the first maps, float32 (n, D, C, h, w), where not given so; a store that is continued keeps its."""
    if codec not in ("auto", *COMPRESSORS):
        return codec
    with suppress(CacheError):
        found = open_cache(out).info.storage.codec
        if codec == "auto" or found.startswith(f"blosc-{codec}-{LEVELS[codec]}-"):
            return found
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


def _check_all_there(out: Location, pauses: Sequence[float]) -> None:
    """Raise CacheError unless this process sees every shard committed, if need be after some pauses in seconds."""
    missed: list[int] = []
    for pause in pauses:
        time.sleep(pause)
        missed = np.flatnonzero(~open_cache(out).committed()).tolist()
        if not missed:
            return
    raise CacheError(
        f"every shard was computed and written, but {len(missed)} of them, shard {missed[0]} first, are not in the "
        f"store {out} as this machine ({platform.node()}) sees it: do the workers see another disk under the same "
        "path? Give an --out that all machines share; the same command computes what is missing"
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


def compute_shard(job: Job, shard: int) -> int:
    """Compute one shard, write and commit it: the task of stage one. Returns the number of its samples.

    The first shard of a job opens what the process needs for all of them, see `_open` for its errors. A process
    computes one shard at a time, as it takes every core or the one GPU, and reads and writes others meanwhile.
    """
    with _opening:
        if job not in _opened:
            _opened.clear()
            _opened[job] = _open(job)
        opened = _opened[job]
    start, stop = job.info.shard_range(shard)
    images = np.asarray(opened.split.images[start:stop])
    masks = None if opened.split.masks is None else np.asarray(opened.split.masks[start:stop])
    with _computing:
        content = explain_shard(opened.model, images, masks, job.info, start, opened.batches, opened.device)
    opened.cache.write_shard(shard, content)
    return stop - start


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
        found = load_teacher(job.teacher, job.info.teacher.class_names, shape, segmenter=job.segmenter)
        cache = open_cache(job.out, writable=True)
    except (DatasetError, ModelError, CacheError) as error:
        raise type(error)(f"{error} ({here}; {remedy})") from error
    if split.fingerprint != job.info.dataset.fingerprint:
        raise DatasetError(
            f"the dataset {job.data}, {here}, is another one: the fingerprint of its split '{split.name}' is "
            f"{split.fingerprint[:12]}…, and not {job.info.dataset.fingerprint[:12]}…; {remedy}"
        )
    if found.sha256 != job.info.teacher.weights_sha256:
        raise ModelError(
            f"the teacher {job.teacher}, {here}, is another one: the SHA-256 of its weights is {found.sha256[:12]}…, "
            f"and not {job.info.teacher.weights_sha256[:12]}…; {remedy}"
        )
    if differences := cache.info.differences(job.info):
        raise CacheError(f"the store {job.out}, {here}, is another one ({'; '.join(differences)}); {remedy}")
    device = pick_device(job.device)
    place(found.model, device)
    batches = Batches.of(job.batch_size, job.info.storage.shard_samples, device)
    return _Opened(found.model, split, cache, batches, device)


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
