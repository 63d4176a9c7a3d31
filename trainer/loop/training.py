"""The training loop of teachers and students: it reads from top to bottom in the order in which things happen.

python cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN
torchrun --nproc-per-node=2 cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from options import Message, Option, first_line
from pipeline import Classifier, ModelError, homogeneity_error, save_plain, synchronise_batch_norm
from pipeline.device import as_input, multiplies_bfloat16, pick_device, place, round_to_tf32, small_numbers_are_zero
from pipeline.networks.classifier import save_weights
from pipeline.networks.fading import bias_free_state, set_remaining
from pipeline.networks.heads import copy_head
from pipeline.networks.own_teachers import BACKBONE
from pipeline.threads import cpu_threads
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND
from trainer.loop.clock import Clock, Timed
from trainer.loop.collapse import SHORTEST, Falling, class_counts, one_class_warning, shares
from trainer.loop.cuda_graph import Passes, Recorded
from trainer.loop.display import display, profiler
from trainer.loop.distributed import LostProcess, Ranks, connect
from trainer.loop.excess import excess, excess_warning
from trainer.loop.groups import GroupWeights
from trainer.loop.immunity import background_warning, immunity_line, same_answers, share_to_repaint
from trainer.loop.interruption import Interruption, TrainingInterrupted
from trainer.loop.optim import is_moment, make_ema, make_optimizer, make_schedule
from trainer.loop.phases import in_evaluation_from, raise_momentum, remaining
from trainer.loop.state import STEP, Loop, State, Training
from trainer.loop.step import FLOAT, forward_backward, on_device, validate
from trainer.loop.trial import try_out
from trainer.loop.watch import Watch
from trainer.run_dir import Run, RunDir
from trainer.start import check_not_teachers
from trainer.stream.order import step_samples
from trainer.stream.stream import read_block, stream

log = logging.getLogger(__name__)

VALIDATIONS = 5  # in a training, at each of which its best weights may change
IMMUNITY_TESTS = 5  # in a training of `SHORTEST` steps or more, at each of which more images may be repainted


def train(training: Training) -> dict[str, Any]:
    """Train a classifier and save it, or resume its training where it was stopped.

    The weights do not depend on how often, and in which way, the training was stopped: bit for bit on a CPU, with the
    same number of threads. SIGTERM and Ctrl-C write a checkpoint first. Under torchrun each process takes its share of
    each batch, and batch norms see the whole batch.

    Args:
        training: what learns from what, and how.

    Returns:
        The content of ``result.json``.

    Raises:
        TrainingError: options that do not fit together, a checkpoint of other code, a loss that is not finite.
        ModelError, RelevanceError: a device, a network or a rule that cannot be used.
        CacheError, DatasetError: data that is damaged.
        FileExistsError: a folder that holds something else.
        TrainingInterrupted: SIGTERM or Ctrl-C, after a checkpoint.
    """
    with ExitStack() as cleanup:
        state = prepare(training, cleanup)
        resume(state, cleanup)
        loop = start(state, cleanup)
        while not state.finished:
            learning_rate = step(state, loop)
            report(state, loop, learning_rate)
            keep(state, loop)
        return finish(state)


def prepare(training: Training, cleanup: ExitStack) -> State:
    """Connect the processes and make the network, the optimizer and all else that learns."""
    settings, material = training.settings, training.material
    ranks, device_name = cleanup.enter_context(connect(training.runtime.device))
    cleanup.enter_context(_explain_lost_processes(training.out))
    device = pick_device(device_name)
    cleanup.enter_context(small_numbers_are_zero())
    cleanup.enter_context(cpu_threads(training.runtime.threads, device))
    batch_samples = _share_batch(training, ranks)
    autocast, precision = choose_precision(settings.precision, device)
    seed_torch(settings.seed, training.purpose)
    begun = Run(Path(training.out)).begun
    model = training.build(to_train=not begun, fades=training.fades)
    if not begun and material.store is not None and not (training.config.start or {}).get("teacher_weights"):
        check_not_teachers(model.network, str(material.store.written_by.get(BACKBONE, "")))
    if training.config.head is not None:
        copy_head(model.network, material.head)
    model.to(FLOAT[settings.precision])
    place(model, device)
    if ranks.ranks > 1:
        synchronise_batch_norm(model)
    try_out(training, model, device, autocast, batch_samples)
    optimizer = make_optimizer(
        model, settings.optimizer, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    return State(
        training=training,
        ranks=ranks,
        device=device,
        precision=precision,
        autocast=autocast,
        batch_samples=batch_samples,
        model=model,
        learnt=[parameter for parameter in model.parameters() if parameter.requires_grad],
        optimizer=optimizer,
        schedule=make_schedule(optimizer, settings.schedule, settings.steps, lr=settings.lr, warmup=settings.warmup),
        ema=None if settings.ema is None else make_ema(model, settings.ema),
        group_weights=GroupWeights(material.groups, device, ranks) if material.groups else None,
    )


def resume(state: State, cleanup: ExitStack) -> None:
    """Open the folder of the run, and load its newest checkpoint where there is one."""
    training, ranks, checkpoint = state.training, state.ranks, None
    if ranks.main:
        state.run = cleanup.enter_context(closing(RunDir(training.out, training.config, training.record)))
        checkpoint = _newest_checkpoint(state.run)
    if ranks.ranks > 1:
        checkpoint = ranks.share(checkpoint or state.state_dict())
    if checkpoint is not None:
        try:
            state.load_state_dict(checkpoint)
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                Message(
                    f"the checkpoint in {training.out} does not fit this network and optimizer ({first_line(error)}): "
                    "if you changed the code of ",
                    Option("student_factory"),
                    ", choose another ",
                    Option("out"),
                )
            ) from error
    if state.run is not None:
        _note_start(state, state.run)


def _note_start(state: State, run: RunDir) -> None:
    """Note in the folder, and in the log, how and from which step the training runs."""
    training, first, processes = state.training, state.progress["step"], state.ranks.ranks
    how = {"device": processor(state.device), "processes": processes, "threads": torch.get_num_threads()}
    paths = training.material.paths
    run.begin(first, **{**dataclasses.asdict(training.runtime), **paths, **how}, precision=state.precision)
    losses = " + ".join(f"{weight:g}·{name}" for name, weight in training.settings.loss.items())
    parameters = sum(parameter.numel() for parameter in state.learnt)
    log.info(
        f"{run.path}: {training.config.arch}, {parameters:,} parameters to learn by {losses}; "
        f"{how['device']}, {processes} process{'es' * (processes > 1)} of {how['threads']} threads, {state.precision}"
        + (f"; resumes after step {first} of {training.settings.steps}" if first else "")
    )
    if not first:
        for note in training.notes:
            log.warning(note)
        if (
            training.material.store is not None
            and training.settings.precision == "auto"
            and multiplies_bfloat16(state.device)
        ):
            log.info(
                Message(
                    "this CPU multiplies matrices in bfloat16: ",
                    Option("precision", "bfloat16"),
                    " can halve the time of a step, and changes single heatmaps by 15 to 40 %",
                )
            )


def start(state: State, cleanup: ExitStack) -> Loop:
    """Start the stream of batches, and what watches, times, shows and interrupts the loop."""
    training, ranks, device = state.training, state.ranks, state.device
    settings, runtime, first = training.settings, training.runtime, state.progress["step"]
    watch = Watch(ranks, settings.loss, state.progress, Falling(settings, state.progress))
    show = cleanup.enter_context(display(state.run, first, settings.steps))
    profile = cleanup.enter_context(profiler(state.run if runtime.profile else None, device))
    interruption = cleanup.enter_context(Interruption())
    batches = stream(
        training.material.source,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_step=first,
        share=ranks,
        workers=runtime.workers,
        memory_budget=runtime.memory_budget,
        pin_memory=device.type == "cuda",
    )
    timed = Timed(cleanup.enter_context(closing(batches)))
    state.model.train(first <= in_evaluation_from(settings, training.material.store))
    raise_momentum(state.model, settings.steps)
    if training.fades:
        _fade(state)
    return Loop(timed, _passes(state), watch, Clock(state.progress, timed), show, profile, interruption)


def step(state: State, loop: Loop) -> float:
    """Make one step of the optimizer; return its learning rate."""
    settings, ranks, number, learnt = state.training.settings, state.ranks, state.progress["step"], state.learnt
    batch, size = next(loop.batches), state.batch_samples
    seed_torch(settings.seed, STEP, number, ranks.rank)  # dropout and the like
    position = {"seed": settings.seed, "step": number, "first": ranks.rank * size, "of": ranks.ranks * size}
    inputs = on_device(
        batch, state.training.material.store, settings, state.device, position, state.progress["repainted"]
    )
    if state.group_weights is not None:
        inputs["group_weights"] = state.group_weights.of_samples(inputs["groups"])
    if state.training.fades and remaining(number - 1, settings.steps) > 0:
        _fade(state)
    if number == in_evaluation_from(settings, state.training.material.store):
        state.model.eval()
        loop.passes = _passes(state)
    losses = loop.passes(inputs)
    if state.group_weights is not None:
        state.group_weights.update(inputs["groups"], losses["group-dro"] / inputs["group_weights"])
    ranks.average_gradients(learnt)
    gradient_norm = nn.utils.clip_grad_norm_(learnt, settings.clip_norm or math.inf)
    learning_rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    state.progress["step"] = number + 1
    loop.watch.add(number + 1, losses, batch["sample"], gradient_norm)
    loop.profile()
    return learning_rate


def report(state: State, loop: Loop, learning_rate: float) -> None:
    """Show the numbers of the step where it is time to, and choose the best weights by the validation split."""
    training, number, progress = state.training, state.progress["step"], state.progress
    settings, material = training.settings, training.material
    if number % training.runtime.log_steps == 0 or state.finished:
        numbers = loop.watch.check(state.run)
        loop.show(step=number, **numbers, lr=learning_rate, **loop.clock.lap(state.ranks.ranks * state.batch_samples))
    asks = BACKGROUND in settings.augment and settings.steps >= SHORTEST and not state.finished
    if asks and is_moment(number, settings.steps, IMMUNITY_TESTS):
        _choose_repainted(state, loop)
    interval = math.ceil(settings.steps / VALIDATIONS)
    if material.validation is None or not (number % interval == 0 or state.finished):
        return
    if training.fades and remaining(number - 1, settings.steps) > 0:
        return
    loss = validate(state.averaged, material.validation, material.store, settings, state.device, state.ranks)
    loop.show(step=number, validation_loss=loss)
    if not math.isfinite(loss):
        log.warning(f"{training.out}: the validation loss of step {number} is {loss}, so its weights are not chosen")
    elif progress["best"] is None or loss < progress["best"]["loss"]:
        progress["best"] = {"loss": loss, "step": number, "weights": _on_cpu(state.averaged.state_dict())}


def keep(state: State, loop: Loop) -> None:
    """Write the snapshot and the checkpoint that are due; raise TrainingInterrupted where a signal has come."""
    training, ranks, run, number = state.training, state.ranks, state.run, state.progress["step"]
    steps, runtime = training.settings.steps, training.runtime
    if run is not None and is_moment(number, steps, runtime.snapshots):
        # first, as a resumed training does not make it again
        run.save_snapshot(number, _on_cpu(bias_free_state(state.averaged)))
    interrupted = ranks.agree(loop.interruption.signal is not None)
    due = runtime.checkpoint_steps is not None and number % runtime.checkpoint_steps == 0
    minutes = runtime.checkpoint_minutes or math.inf
    if state.finished or interrupted or due or ranks.agree(loop.clock.minutes_since_checkpoint() >= minutes):
        loop.watch.check(run)  # no checkpoint is written of weights that have gone wrong
        loop.clock.update()
        if run is not None:
            run.save_checkpoint(number, state.state_dict(), runtime.keep_checkpoints)
        loop.clock.checkpointed()
    if interrupted and not state.finished:
        raise TrainingInterrupted(
            f"stopped after step {number} of {steps}: the same command resumes it in {training.out}",
            loop.interruption.signal,
        )


def finish(state: State) -> dict[str, Any]:
    """Save the classifier with the best weights, or the last ones without validation, and write the result."""
    training, run, progress, averaged = state.training, state.run, state.progress, state.averaged
    best = progress["best"]
    if best is not None:
        averaged.load_state_dict(best["weights"])
    result = {
        "loss": progress["loss"],
        "validation_loss": None if best is None else best["loss"],
        "kept_step": training.settings.steps if best is None else best["step"],
        "steps": training.settings.steps,
        "seconds": progress["seconds"],
        "seconds_waiting": progress["seconds_waiting"],
        "processes": state.ranks.ranks,
        "precision": state.precision,
        "bias_free": None,
        "predictions": None,
        "beside_teacher": None,
        "same_answers": None,
        **({} if training.config.start is None else {"start": training.config.start}),
    }
    if run is not None:
        classifier = training.build().eval()
        classifier.load_state_dict(_on_cpu(bias_free_state(averaged)))
        images = read_block(training.material.source, 0, 0)["images"][:64]
        result["bias_free"] = bias_free_summary(classifier, images)
        save_weights(run.path, classifier)
        if training.config.debias == "none":
            _save_plain(run, classifier)
        result["predictions"] = _predictions(state)
        result["beside_teacher"] = _beside_teacher(state)
        result["same_answers"] = found = _same_answers(state)
        if found is not None:
            warning = background_warning(found, training.settings)
            log.log(logging.WARNING if warning else logging.INFO, warning or immunity_line(found))
        run.finish(result)
    state.ranks.wait()
    return result


# --- the parts of the above -----------------------------------------------------------------------------------------


def _passes(state: State) -> Passes:
    """Return the passes of a step, as a CUDA graph where that is possible; what they do in Python must not change."""
    training, runtime = state.training, state.training.runtime
    passes: Passes = partial(forward_backward, state.model, training.material.store, training.settings, state.autocast)
    own_front = training.front is not None and bool(training.front.own)
    known_code = training.student_factory is None and training.segmenter is None and not own_front
    recorded = known_code if runtime.cuda_graph is None else runtime.cuda_graph
    if state.device.type == "cuda" and state.ranks.ranks == 1 and recorded:
        passes = Recorded(passes, state.learnt)
    return passes


def _fade(state: State) -> None:
    """Let the additive terms fade to what remains of them in the next step."""
    share = remaining(state.progress["step"], state.training.settings.steps)
    for model in (state.model, state.averaged):
        set_remaining(model, share)


def _share_batch(training: Training, ranks: Ranks) -> int:
    """Return the samples of a step in each process; raise TrainingError where the processes cannot share a batch."""
    settings, processes = training.settings, ranks.ranks
    if settings.batch_size % processes:
        raise TrainingError(
            Message(
                Option("batch_size", settings.batch_size),
                f" is not a multiple of the {processes} processes that share each batch: choose a multiple",
            )
        )
    samples = step_samples(training.material.source.samples, settings.batch_size, ranks.rank, processes) // processes
    if processes > 1 and samples % settings.accumulate:
        raise TrainingError(
            Message(
                Option("accumulate", settings.accumulate),
                f" does not divide the {samples} samples of a batch that each of {processes} processes has, so batch "
                "norms would see other samples than in one process: choose a divisor",
            )
        )
    return samples


def choose_precision(name: str, device: torch.device) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """Choose the arithmetic of forward passes; this also sets how CUDA multiplies matrices.

    Args:
        name: one of `trainer.settings.PRECISIONS`.
        device: where the network is.

    Returns:
        What makes the context of a forward pass, and the name of the arithmetic for the log.

    Raises:
        TrainingError: TF32 on a device that is not CUDA.
    """
    if name == "auto":
        name = "tf32" if device.type == "cuda" else "float32"
    if device.type == "cuda":
        round_to_tf32(name == "tf32")
    elif name == "tf32":
        raise TrainingError(
            Message(
                Option("precision", name),
                f" needs CUDA, and this training runs on {device.type}: choose float32 or bfloat16",
            )
        )
    if name == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16), "bfloat16 layers, channels last"
    return nullcontext, f"{name}, channels last"


def seed_torch(*seeds: int) -> None:
    """Seed PyTorch for one purpose, so that a student and its teacher with the same seed start differently."""
    torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


@contextmanager
def _explain_lost_processes(out: str | Path) -> Iterator[None]:
    """Turn LostProcess into a TrainingError that says how to resume."""
    try:
        yield
    except LostProcess as error:
        raise TrainingError(
            f"{error}: this training ends. The same command resumes it from the last checkpoint in {out}"
        ) from error


def _newest_checkpoint(run: RunDir) -> dict[str, Any] | None:
    checkpoint, damaged = run.checkpoint()
    for path in damaged:
        log.warning(f"{path} is a damaged checkpoint: the newest one before it is loaded, if there is any")
    return checkpoint


def processor(device: torch.device) -> str:
    """Return the name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return {name: value.cpu().clone() for name, value in weights.items()}


def _save_plain(run: RunDir, model: Classifier) -> None:
    try:
        save_plain(run.path / "model.pt", model)
    except ModelError as error:  # of a network of the user's own, and no reason to lose the training
        log.warning(f"{run.path}: no model.pt is written, because {error}")


def _predictions(state: State) -> dict[str, Any]:
    """Return the share of each class in the predictions on some training samples, and warn of a collapse."""
    training, material = state.training, state.training.material
    names, answers = training.config.class_names, material.answers or material.source
    counts = class_counts(state.averaged, answers, training.settings, state.device, state.autocast, len(names))
    warning = one_class_warning(*counts, names, training.settings, of_teacher=material.answers is not None)
    if warning is not None:
        log.warning(warning)
    predicted, expected = counts
    return {
        "samples": int(predicted.sum()),
        "predicted": shares(predicted, names),
        "labels" if material.answers is None else "teacher": shares(expected, names),
    }


def _beside_teacher(state: State) -> dict[str, Any] | None:
    """Return the accuracies of student and teacher on the validation split, and warn of a student that knows more."""
    training, compared = state.training, state.training.material.compared
    if compared is None:
        return None
    found = excess(state.averaged, compared, training.settings, state.device, state.autocast)
    warning = excess_warning(found)
    if warning is not None:
        log.warning(warning)
    return found


def _same_answers(state: State) -> dict[str, Any] | None:
    """Return how often the student says what its teacher says, also before other backgrounds, if that can be told."""
    answers = state.training.material.answers
    if answers is None or "masks" not in answers.fields:
        return None
    return same_answers(state.averaged, answers, state.training.settings, state.device, state.autocast)


def _choose_repainted(state: State, loop: Loop) -> None:
    """Choose the share of the images that get other backgrounds by what the student has learnt, if that can be told."""
    found = state.ranks.share(_same_answers(state) if state.ranks.main else None)
    if found is None:
        return
    number, share = state.progress["step"], max(state.progress["repainted"], share_to_repaint(found))
    loop.show(step=number, **{name: found[name] for name in ("as_they_are", "other_backgrounds")}, repainted=share)
    if share != state.progress["repainted"] and state.ranks.main:
        log.info(f"{immunity_line(found)}: from step {number} on, {share:.0%} of the images get another background")
    state.progress["repainted"] = share


def bias_free_summary(model: Classifier, images: Tensor) -> dict[str, Any] | None:
    """Summarise what the bias-free form changed and could not change, for ``result.json``.

    Args:
        model: the classifier, on the CPU.
        images: uint8 (N, C, H, W). ``homogeneity_error`` is measured on what the network takes of them: max |f(2·x) −
            2·f(x)| relative to max |2·f(x)|. Near 0, heatmaps account for the whole logit.

    Returns:
        ``changed``, ``could_not`` and ``homogeneity_error``; None for a network with its biases.
    """
    report = model.bias_free_report
    if report is None or not (report.changed or report.could_not):
        return None
    taken = as_input(images, torch.device("cpu"))
    return {
        "changed": report.changed,
        "could_not": report.could_not,
        "homogeneity_error": homogeneity_error(
            model.network, taken if model.preprocess is None else model.preprocess(taken)
        ),
    }
