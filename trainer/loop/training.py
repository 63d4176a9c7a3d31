"""The training loop, for teachers and students alike: it reads from top to bottom in the order in which things happen.

python cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN
torchrun --nproc-per-node=2 cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import (
    Classifier,
    Forward,
    ModelConfig,
    ModelError,
    homogeneity_error,
    resize,
    save_plain,
    synchronise_batch_norm,
)
from pipeline.device import as_input, as_mask, pick_device, place, round_to_tf32, to_device
from pipeline.networks.classifier import build_classifier, save_weights
from pipeline.networks.heads import copy_head
from pipeline.networks.segmenters import Segmenter
from pipeline.private_torch import ONE_VALUE_PER_CHANNEL_MESSAGE
from teacher_cache import CacheInfo
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND, augment, augment_masks
from trainer.loop.clock import Clock, Timed
from trainer.loop.cuda_graph import Passes, Recorded
from trainer.loop.distributed import LostProcess, Ranks, connect
from trainer.loop.groups import GroupWeights
from trainer.loop.interruption import Interruption, TrainingInterrupted
from trainer.loop.losses import heatmap_loss
from trainer.loop.methods import METHODS
from trainer.loop.optim import is_moment, make_ema, make_optimizer, make_schedule
from trainer.loop.repainting import repaint
from trainer.loop.watch import Watch
from trainer.run_dir import RunDir
from trainer.settings import PRECISIONS, Runtime, Settings, as_given
from trainer.stream.order import step_samples
from trainer.stream.stream import Batch, Source, read_block, stored_heatmaps, stream

log = logging.getLogger(__name__)

TEACHER, STUDENT, STEP = 0, 1, 2  # purposes of a seed
VALIDATIONS = 5  # times in a training that a model is chosen from
FLOAT = {name: torch.float64 if name == "float64" else torch.float32 for name in PRECISIONS}  # of parameters
PROFILED = {"wait": 1, "warmup": 1, "active": 3}  # steps


@dataclass(frozen=True)
class Material:
    """What a training learns from: samples, the store that their maps come from, the teacher's last layer.

    ``groups``: how many there are in the source's ``groups``. ``validation`` chooses the weights, where it is there.
    ``paths`` say where it all lies, for the record.
    """

    source: Source
    store: CacheInfo | None = None
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: int = 0
    validation: Source | None = None
    paths: Mapping[str, str] = field(default_factory=dict)


def train(
    out: str | Path,
    config: ModelConfig,
    material: Material,
    settings: Settings,
    runtime: Runtime,
    given: Mapping[str, Any],
    *,
    purpose: int,
    student_factory: str | None = None,
    segmenter: Segmenter | None = None,
) -> dict[str, Any]:
    """Train the classifier that ``config`` describes and save it in ``out``; or continue where it was stopped.

    However often it was stopped, by whatever way, the weights are those of a training that was not: bit for bit on a
    CPU, with as many threads. SIGTERM and Ctrl-C write a checkpoint first. Under torchrun every process has its share
    of each batch, and batch norms see all of it. ``given`` are the options as they were given, for ``config.yaml``.
    ``purpose`` is part of the seed of the initial weights. Returns what it writes to ``result.json``.

    Raises TrainingError, ModelError, RelevanceError, FileExistsError, CacheError, DatasetError, TrainingInterrupted.
    """
    with ExitStack() as cleanup:
        # the processes, the device, the network
        ranks, device_name = cleanup.enter_context(connect(runtime.device))
        cleanup.enter_context(_lost_process_said(out))
        device = pick_device(device_name)
        if settings.batch_size % ranks.ranks:
            raise TrainingError(
                f"--batch-size {settings.batch_size}, which all processes share, is no multiple of their number, "
                f"{ranks.ranks}: give one that is"
            )
        of_process = step_samples(material.source.samples, settings.batch_size, ranks.rank, ranks.ranks) // ranks.ranks
        if ranks.ranks > 1 and of_process % settings.accumulate:
            raise TrainingError(
                f"--accumulate {settings.accumulate} does not divide the {of_process} samples of a batch that each of "
                f"{ranks.ranks} processes has, so norms would see other samples than in one: give a divisor"
            )
        autocast, precision = choose_precision(settings.precision, device)
        seed_torch(settings.seed, purpose)
        model = build_classifier(config, student_factory, segmenter)
        if config.head is not None:
            copy_head(model.network, material.head)
        model.to(FLOAT[settings.precision])
        place(model, device)
        _try_out(model, material, settings, device)
        if ranks.ranks > 1:
            synchronise_batch_norm(model)

        # how it learns
        learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(
            model, settings.optimizer, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        schedule = make_schedule(optimizer, settings.schedule, settings.steps, lr=settings.lr, warmup=settings.warmup)
        ema = None if settings.ema is None else make_ema(model, settings.ema)
        averaged: nn.Module = model if ema is None else ema.module
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if ema is not None:
            parts["ema"] = ema
        balance = GroupWeights(material.groups, device, ranks) if material.groups else None
        if balance is not None:
            parts["groups"] = balance
        progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "seconds_waiting": 0.0, "first": None, "best": None}

        # where it was stopped
        run = (
            cleanup.enter_context(closing(RunDir(out, config, as_given(given, settings, runtime))))
            if ranks.main
            else None
        )
        state = None if run is None else _newest(run)
        if ranks.ranks > 1:
            state = ranks.share(state or _state(parts, progress))
        if state is not None:
            try:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise TrainingError(
                    f"the checkpoint in {out} is not of this network and optimizer ({str(error).splitlines()[0]}): was "
                    "the code of --student-factory changed? Choose another --out"
                ) from error
            progress = state["progress"]
        start: int = progress["step"]
        if run is not None:
            how = {"device": processor(device), "processes": ranks.ranks, "threads": torch.get_num_threads()}
            run.begin(start, **{**dataclasses.asdict(runtime), **material.paths, **how}, precision=precision)
            log.info(
                f"{run.path}: {config.arch}, {sum(p.numel() for p in learnt):,} parameters to learn by "
                f"{' + '.join(f'{weight:g}·{name}' for name, weight in settings.loss.items())}; {how['device']}, "
                f"{ranks.ranks} process{'es' * (ranks.ranks > 1)} of {how['threads']} threads, {precision}"
                + (f"; goes on after step {start} of {settings.steps}" if start else "")
            )

        # the loop
        watch = Watch(ranks, settings.loss, progress)
        show = cleanup.enter_context(_display(run, start, settings.steps))
        profiler = cleanup.enter_context(_profiler(run if runtime.profile else None, device))
        interruption = cleanup.enter_context(Interruption())
        batches = stream(
            material.source,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_step=start,
            rank=ranks.rank,
            ranks=ranks.ranks,
            workers=runtime.workers,
            memory_budget=runtime.memory_budget,
            pin_memory=device.type == "cuda",
        )
        timed = Timed(cleanup.enter_context(closing(batches)))
        clock = Clock(progress, timed)
        model.train()
        passes: Passes = partial(_passes, model, material.store, settings, autocast)
        ours = student_factory is None and segmenter is None
        if device.type == "cuda" and ranks.ranks == 1 and (ours if runtime.cuda_graph is None else runtime.cuda_graph):
            passes = Recorded(passes, learnt)
        for step in range(start, settings.steps):
            batch = next(timed)
            size = len(batch["sample"])
            seed_torch(settings.seed, STEP, step, ranks.rank)  # dropout and the like
            moved = {"seed": settings.seed, "step": step, "first": ranks.rank * size, "of": ranks.ranks * size}
            shown = on_device(batch, material.store, settings, device, moved)
            if balance is not None:
                shown["group_weights"] = balance.of_samples(shown["groups"])
            losses = passes(shown)
            if balance is not None:
                balance.update(shown["groups"], losses["group-dro"] / shown["group_weights"])
            ranks.average_gradients(learnt)
            norm = nn.utils.clip_grad_norm_(learnt, settings.clip_norm or math.inf)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update_parameters(model)
            done = progress["step"] = step + 1
            watch.add(done, losses, batch["sample"], norm)
            profiler()

            # what is seen of it
            last = done == settings.steps
            if done % runtime.log_steps == 0 or last:
                show(step=done, **watch.check(run), lr=rate, **clock.lap(ranks.ranks * size))
            if material.validation is not None and (done % math.ceil(settings.steps / VALIDATIONS) == 0 or last):
                loss = validate(averaged, material.validation, material.store, settings, device, ranks)
                show(step=done, validation_loss=loss)
                if not math.isfinite(loss):
                    log.warning(f"{out}: the validation loss of step {done} is {loss}, so its weights are not chosen")
                elif progress["best"] is None or loss < progress["best"]["loss"]:
                    progress["best"] = {"loss": loss, "step": done, "weights": _on_cpu(averaged)}

            # what is kept of it
            if run is not None and is_moment(done, settings.steps, runtime.snapshots):
                run.save_snapshot(done, _on_cpu(averaged))  # before a checkpoint, after which it is not made again
            asked = ranks.agree(interruption.signal is not None)
            due = runtime.checkpoint_steps is not None and done % runtime.checkpoint_steps == 0
            minutes = runtime.checkpoint_minutes or math.inf
            if last or asked or due or ranks.agree(clock.minutes_since_checkpoint() >= minutes):
                watch.check(run)  # what is wrong is not kept
                clock.update()
                if run is not None:
                    run.save_checkpoint(done, _state(parts, progress), runtime.keep_checkpoints)
                clock.checkpointed()
            if asked and not last:
                raise TrainingInterrupted(
                    f"stopped after step {done} of {settings.steps}: the same command goes on from there, in {out}",
                    interruption.signal,
                )

        # what comes of it
        best = progress["best"]
        if best is not None:
            averaged.load_state_dict(best["weights"])
        result = {
            "loss": progress["loss"],
            "validation_loss": None if best is None else best["loss"],
            "kept_step": settings.steps if best is None else best["step"],
            "steps": settings.steps,
            "seconds": progress["seconds"],
            "seconds_waiting": progress["seconds_waiting"],
            "processes": ranks.ranks,
            "precision": precision,
            "bias_free": None,
        }
        if run is not None:
            finished = build_classifier(config, student_factory, segmenter).eval()
            finished.load_state_dict({name: value.cpu() for name, value in averaged.state_dict().items()})
            result["bias_free"] = bias_free_summary(finished, read_block(material.source, 0, 0)["images"][:64])
            save_weights(run.path, finished)
            if config.debias == "none":
                _save_plain(run, finished)
            run.finish(result)
        ranks.wait()
        return result


def _passes(
    model: Classifier,
    store: CacheInfo | None,
    settings: Settings,
    autocast: Callable[[], AbstractContextManager[Any]],
    shown: Batch,
) -> dict[str, Tensor]:
    """The passes forward and backward of a step, in as many parts as were asked for, and the losses as `losses_of`."""
    size = len(shown["images"])
    losses = {name: shown["images"].new_empty(size) for name in settings.loss}
    for first in range(min(settings.accumulate, size)):
        rows = slice(first, None, settings.accumulate)  # neighbours in a batch are neighbours in the store
        with autocast(), _too_few_said(settings):
            of_part = losses_of(model, {name: values[rows] for name, values in shown.items()}, store, settings)
        (weighted(of_part, settings.loss).sum() / size).backward()
        for name, values in of_part.items():
            losses[name][rows] = values.detach()
    return losses


def on_device(
    batch: Batch,
    store: CacheInfo | None,
    settings: Settings,
    device: torch.device,
    moved: Mapping[str, int] | None = None,
) -> Batch:
    """A batch as network and methods take it: images, masks and what is to be matched, decoded, on the device.

    ``moved`` is where the batch stands, the keywords of `augment`; without it nothing is augmented.
    """
    shown = {name: to_device(batch[name], device) for name in _PLAIN & set(batch)}
    shown["images"] = as_input(batch["images"], device)
    if "labels" in batch:
        shown["labels"] = to_device(batch["labels"], device).long()
    if "groups" in batch:
        shown["groups"] = to_device(batch["groups"], device).long()
        shown["group_weights"] = torch.ones(len(shown["groups"]), device=device)
    if "masks" in batch:
        shown["masks"] = as_mask(batch["masks"], device)
    if "heatmaps" in batch:
        assert store is not None
        shown["heatmaps"] = stored_heatmaps(batch["heatmaps"], batch["scale"], store.storage.precision, device)
    if settings.augment and moved is not None:
        shown["images"], maps = augment(shown["images"], shown.get("heatmaps"), settings.augment, **moved)
        if maps is not None:
            shown["heatmaps"] = maps
        if "masks" in shown:
            shown["masks"] = augment_masks(shown["masks"], settings.augment, **moved)
        if BACKGROUND in settings.augment:
            shown["images"] = repaint(shown["images"], shown["masks"], **moved)
    if settings.mask_target and "heatmaps" in shown:
        maps = shown["heatmaps"]
        shown["heatmaps"] = maps * F.adaptive_avg_pool2d(shown["masks"], (maps.shape[2], maps.shape[3])).to(maps.dtype)
    floating = FLOAT[settings.precision]
    return {name: values.to(floating) if values.is_floating_point() else values for name, values in shown.items()}


_PLAIN = {"target_class", "epsilon", "teacher_logits", "features"}  # what needs no more than to be on the device


def losses_of(model: Classifier, shown: Batch, store: CacheInfo | None, settings: Settings) -> dict[str, Tensor]:
    """The loss (n,) of each method and each sample that `on_device` has prepared, of one forward pass."""
    explainer = next((METHODS[name].explains for name in settings.loss if METHODS[name].explains), None)
    if store is not None and "heatmaps" in shown:
        explainer = store.explainer.rule
    forward = Forward(model, shown["images"], explainer, shown.get("masks"))

    def compare(ours: Tensor, theirs: Tensor) -> Tensor:
        assert store is not None
        ours, resolution = ours.to(theirs.dtype), store.storage.resolution
        if store.explainer.map_shape[1:] != store.dataset.image_shape[1:]:  # of another network's feature maps
            ours = resize(ours, (theirs.shape[2], theirs.shape[3]))
        return heatmap_loss(ours, theirs, resolution, kind=settings.map_loss, pyramid=settings.pyramid)

    return {name: METHODS[name].loss(forward, shown, compare) for name in settings.loss}


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss of each sample, (n,)."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum(0)


@torch.no_grad()
def validate(
    model: nn.Module, source: Source, store: CacheInfo | None, settings: Settings, device: torch.device, ranks: Ranks
) -> float:
    """The mean loss over a split, each sample by its first draw; evaluation mode. Each process takes its blocks."""
    assert isinstance(model, Classifier)
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for shard in range(ranks.rank, source.blocks, ranks.ranks):
        block = read_block(source, shard, draw=0)
        for first in range(0, len(block["images"]), settings.batch_size):
            batch = {name: values[first : first + settings.batch_size] for name, values in block.items()}
            total += (
                weighted(losses_of(model, on_device(batch, store, settings, device), store, settings), settings.loss)
                .sum()
                .cpu()
            )
    model.train()
    return float(ranks.mean(total)) * ranks.ranks / source.samples


def _try_out(model: Classifier, material: Material, settings: Settings, device: torch.device) -> None:
    """One sample through network and loss, which fails now where the network has no rule, map or feature for it."""
    some = {name: values[:1] for name, values in read_block(material.source, 0, 0).items()}
    model.eval()
    with torch.no_grad():
        losses_of(model, on_device(some, material.store, settings, device), material.store, settings)
    model.train()


def _save_plain(run: RunDir, model: Classifier) -> None:
    try:
        save_plain(run.path / "model.pt", model)
    except ModelError as error:  # of a network of the user's own, and no reason to lose the training
        log.warning(f"{run.path} gets no model.pt: {error}")


def _newest(run: RunDir) -> dict[str, Any] | None:
    state, damaged = run.checkpoint()
    for path in damaged:
        log.warning(f"{path} is what was a checkpoint and is damaged: an older checkpoint is taken, or none")
    return state


def _state(parts: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """All that a training goes on from."""
    return {**{name: part.state_dict() for name, part in parts.items()}, "progress": dict(progress)}


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """A copy of its weights."""
    return {name: value.cpu().clone() for name, value in model.state_dict().items()}


def seed_torch(*seeds: int) -> None:
    """Seed PyTorch for one purpose, so that a student and its teacher with the same seed start differently."""
    torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


def choose_precision(name: str, device: torch.device) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """What a forward pass is to run in, and what that is, for the log; sets how CUDA multiplies matrices."""
    if name == "auto":
        name = "tf32" if device.type == "cuda" else "float32"
    if device.type == "cuda":
        round_to_tf32(name == "tf32")
    elif name == "tf32":
        raise TrainingError(f"--precision tf32 is of CUDA, and this trains on {device.type}: give float32 or bfloat16")
    if name == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16), "bfloat16 layers, channels last"
    return nullcontext, f"{name}, channels last"


def processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def _lost_process_said(out: str | Path) -> Iterator[None]:
    try:
        yield
    except LostProcess as error:
        raise TrainingError(
            f"{error}: this training ends. The same command goes on from the last checkpoint in {out}"
        ) from error


@contextmanager
def _too_few_said(settings: Settings) -> Iterator[None]:
    """A batch norm has no variance of a single value, as of one sample whose feature maps have one position."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(ONE_VALUE_PER_CHANNEL_MESSAGE):
            raise
        raise TrainingError(
            f"a batch norm of this network sees one value alone, with --batch-size {settings.batch_size} in "
            f"--accumulate {settings.accumulate} parts: give a larger --batch-size, or fewer parts"
        ) from error


@contextmanager
def _display(run: RunDir | None, start: int, steps: int) -> Iterator[Callable[..., None]]:
    """What shows the numbers of a step: metrics.jsonl, TensorBoard, and the bar."""
    if run is None:
        yield lambda **metrics: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    with (
        SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1) as writer,
        tqdm(total=steps, initial=start, unit="step", desc=f"training {run.path.name}", disable=None) as bar,
    ):

        def show(step: int, **metrics: float) -> None:
            run.log(step=step, **metrics)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            bar.update(step - bar.n)
            if "samples_per_second" in metrics:
                rate, waiting = metrics["samples_per_second"], 100 * metrics["waiting"]
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, {rate:.0f} samples/s, {waiting:.1f} % waiting for data"
                )

        yield show


@contextmanager
def _profiler(run: RunDir | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """To be called after each step; writes a trace of the first ones for Perfetto and chrome://tracing."""
    if run is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    (run.path / "profile").mkdir(exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(run.path / "profile" / "trace.json"))
        log.info(f"{run.path / 'profile' / 'trace.json'}: a trace of {PROFILED['active']} steps, for ui.perfetto.dev")

    with profile(activities=activities, schedule=schedule(**PROFILED, repeat=1), on_trace_ready=write) as profiler:
        yield profiler.step


def bias_free_summary(model: Classifier, images: Tensor) -> dict[str, Any] | None:
    """For ``result.json``: what the bias-free form changed and could not, and how homogeneous the network is.

    ``homogeneity_error`` is max |f(2·x) − 2·f(x)| relative to max |2·f(x)| on some images: near 0, heatmaps account
    for the whole logit. None for a network with its biases.
    """
    report = model.bias_free_report
    if report is None or not (report.changed or report.could_not):
        return None
    return {
        "changed": report.changed,
        "could_not": report.could_not,
        "homogeneity_error": homogeneity_error(model.network, as_input(images, torch.device("cpu"))),
    }
