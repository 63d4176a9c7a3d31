"""Choose a student's learning rate by short trainings, on the biased data and the store alone.

Successive halving (Jamieson and Talwalkar, AISTATS 2016): all rates train for a few steps, the better half of them for
twice as many, and so on until one is left. Each trial is a whole training with its own schedule, and all have the same
seed, so that they see the same samples, draws and ε. The optimizer is not chosen: the one that is ahead after a hundred
steps is not the one that is better in the end (docs/results/choosing.md).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options import Message, Option
from pipeline import ModelConfig
from pipeline.networks.classifier import CONFIG_FILE
from trainer.errors import TrainingError
from trainer.loop.interruption import TrainingInterrupted
from trainer.loop.methods import of_store
from trainer.run_dir import FAILURE_FILE, TUNING, Run, differences, read_lines, with_other_options, write_json
from trainer.settings import Settings, StudentOptions

log = logging.getLogger(__name__)

Train = Callable[..., dict[str, Any]]

FACTORS = (1.0, 1 / 3, 3.0, 0.1)  # of the usual rate
LEAST_STEPS = 30  # of a trial
READINGS, AVERAGED = 20, 5  # of the training loss in a trial, and the last of them
CHOICE_FILE, TRIALS_FILE = "choice.json", "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """A short training with a rate.

    loss: None where it exploded. seconds: in all. seconds_of_steps: without the start and the end.
    """

    lr: float
    steps: int
    loss: float | None
    seconds: float
    seconds_of_steps: float

    @property
    def rank(self) -> float:
        """The less, the better."""
        return math.inf if self.loss is None else self.loss


@dataclass(frozen=True)
class Rung:
    """How many rates train for how many steps."""

    rates: int
    steps: int


def tune(options: StudentOptions, settings: Settings, config: ModelConfig, train: Train) -> float:
    """Find the learning rate with which the student comes nearest to its teacher in short trainings.

    The loss that counts is that on the validation store, where there is one, or the mean of the last losses of the
    trial. An interrupted search is resumed by the same call, and one that has ended is not repeated.

    Args:
        options: those of the student, with ``tune``, the seconds that the search may take.
        settings: what the options mean.
        config: describes the student and what it learns from; a search of another one is not resumed.
        train: `train_student`.

    Returns:
        The best rate. ``out`` has it in ``tuning/choice.json``, and all trials in ``tuning/trials.jsonl``.

    Raises:
        TrainingError: the rate is given, there is too little time, there are several processes, every trial has failed,
            or the folder has a search with other options.
        TrainingInterrupted: SIGTERM or Ctrl-C stopped a trial.
    """
    assert options.tune is not None
    rates, folder = _rates(options, settings), Path(options.out) / TUNING
    _claim(folder, config)
    choice = folder / CHOICE_FILE
    if choice.exists():
        return float(json.loads(choice.read_text())["lr"])
    trials = _Trials(folder, options, settings, train)
    best = _halve(trials, rates, _rungs(trials, rates, options, settings), options.tune)[0]
    if best.loss is None:
        raise TrainingError(
            Message("the loss of every trial became too large: give a smaller ", Option("lr"), f"; see {folder}")
        )
    write_json(choice, {**dataclasses.asdict(best), "seconds_of_search": trials.seconds})
    log.info(
        f"{options.out}: the rate {best.lr:g} has the lowest loss, {best.loss:.3f}, after {trials.seconds:.0f} seconds "
        f"of trials; the usual rate is {rates[0]:g}; all trials are in {folder / TRIALS_FILE}"
    )
    return best.lr


def _rates(options: StudentOptions, settings: Settings) -> list[float]:
    """List the rates that are tried, the usual one first; raise TrainingError where none can be."""
    given = Option("tune", options.tune)
    if not of_store(settings.loss):
        names = "+".join(settings.loss)
        raise TrainingError(
            Message(given, f" compares how well students match a store, and {names} uses none: leave it out")
        )
    if options.lr is not None:
        raise TrainingError(
            Message(given, " chooses the learning rate: leave it or ", Option("lr", options.lr), " out")
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            Message(given, " works in one process: tune there, and give the processes the ", Option("lr"), " it chose")
        )
    if settings.steps < LEAST_STEPS:
        raise TrainingError(
            Message(
                f"a training of {settings.steps} steps is too short for trials of {LEAST_STEPS}: leave ", given, " out"
            )
        )
    return [float(f"{settings.lr * factor:.2g}") for factor in FACTORS]


def rungs_of(rates: int, steps: int) -> list[Rung]:
    """List the rungs of a search that begins with so many steps: half the rates, twice the steps."""
    rungs = []
    while rates > 1:
        rungs.append(Rung(rates, steps))
        rates, steps = math.ceil(rates / 2), 2 * steps
    return rungs


def plan(rates: int, seconds: float, per_step: float, per_trial: float, longest: int) -> list[Rung]:
    """Return the rungs that fit into the time, with as many rates and then as many steps as possible.

    Args:
        rates: those that there are.
        seconds: the time that is left.
        per_step, per_trial: the seconds of a step, and of a trial beside its steps.
        longest: the steps of the training itself, which no trial exceeds.

    Returns:
        The rungs; none where two rates do not fit.
    """
    for count in range(rates, 1, -1):
        units = rungs_of(count, 1)
        trials = sum(rung.rates for rung in units)
        weight = sum(rung.rates * rung.steps for rung in units)
        steps = min(int((seconds - trials * per_trial) / (weight * per_step)), longest // units[-1].steps)
        if steps >= LEAST_STEPS:
            return rungs_of(count, steps)
    return []


def _claim(folder: Path, config: ModelConfig) -> None:
    """Make the folder of the search, or raise TrainingError where it has one with other options."""
    file, plain = folder / CONFIG_FILE, config.to_dict()
    differing = differences(json.loads(file.read_text()), plain) if file.exists() else []
    if differing:
        raise with_other_options(f"{folder} holds a search", differing)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, plain)


def _rungs(trials: _Trials, rates: Sequence[float], options: StudentOptions, settings: Settings) -> list[Rung]:
    """Measure the time of a trial, and plan the search by it."""
    assert options.tune is not None
    probe = trials.make(rates[0], LEAST_STEPS, "how long a trial takes")
    per_step = probe.seconds_of_steps / LEAST_STEPS
    per_trial = max(0.0, probe.seconds - probe.seconds_of_steps)
    rungs = plan(len(rates), options.tune - probe.seconds, per_step, per_trial, settings.steps)
    if not rungs:
        least = 3 * probe.seconds
        raise TrainingError(
            Message(
                Option("tune", options.tune),
                f" is too short: three trials of {LEAST_STEPS} steps take about {least:.0f} seconds here",
            )
        )
    return rungs


def _halve(trials: _Trials, rates: Sequence[float], rungs: Sequence[Rung], seconds: float) -> list[Trial]:
    """Make the trials of each rung; return those of the last one that ended in time, the best first."""
    total, number = sum(rung.rates for rung in rungs), 0
    ranked: list[Trial] = []
    for rung in rungs:
        made: list[Trial] = []
        left = [trial.lr for trial in ranked] or rates
        for lr in left[: rung.rates]:
            if ranked and trials.seconds > seconds:
                log.info("the time for trials is over: the longest ones that all rates had decide")
                return ranked
            number += 1
            made.append(trials.make(lr, rung.steps, f"trial {number} of {total}"))
        ranked = sorted(made, key=lambda trial: trial.rank)
    return ranked


class _Trials:
    """The trials of a search, each of which is made once.

    Args:
        folder: of the search.
        options, settings, train: as `tune` has them.
    """

    def __init__(self, folder: Path, options: StudentOptions, settings: Settings, train: Train):
        self._folder, self._options, self._settings, self._train = folder, options, settings, train

    @property
    def seconds(self) -> float:
        """The seconds of all trials, also of those before an interruption."""
        return sum(trial.seconds for trial in self._made())

    def make(self, lr: float, steps: int, what: str) -> Trial:
        """Train with a rate, unless that was done for as many steps before; ``what`` names the trial in the log."""
        for made in self._made():
            if (made.lr, made.steps) == (lr, steps):
                return made
        began, folder = time.perf_counter(), self._folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        result = self._train_in(folder, lr, steps)
        shutil.rmtree(folder)
        seconds = time.perf_counter() - began
        trial = Trial(lr, steps, result.get("loss"), seconds, result.get("seconds", seconds))
        with (self._folder / TRIALS_FILE).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
        found = "the loss exploded" if trial.loss is None else f"loss {trial.loss:.3f}"
        log.info(f"{what}: rate {lr:g}, {steps} steps, {found}")
        return trial

    def _train_in(self, folder: Path, lr: float, steps: int) -> dict[str, Any]:
        """Train with a rate; return the result with the ``loss`` that counts, or nothing if it exploded."""
        options = {field.name: getattr(self._options, field.name) for field in dataclasses.fields(self._options)}
        warmup = options["warmup"] and options["warmup"] * steps // self._settings.steps
        options |= {"out": folder, "lr": lr, "steps": steps, "epochs": None, "warmup": warmup, "tune": None}
        options |= {"log_steps": max(1, steps // READINGS), "snapshots": 0, "profile": False}
        try:
            with _quiet():
                result = self._train(**options)
        except TrainingInterrupted as interrupted:
            raise TrainingInterrupted(
                f"stopped in the search for a learning rate: the same command resumes it in {self._options.out}",
                interrupted.signum,
            ) from None
        except TrainingError:
            if not (folder / FAILURE_FILE).exists():  # nothing that another rate could change
                raise
            return {}
        last = [line["loss"] for line in Run(folder).metrics if "loss" in line][-AVERAGED:]
        loss = result["validation_loss"]
        return {**result, "loss": sum(last) / len(last) if loss is None else loss}

    def _made(self) -> list[Trial]:
        return [Trial(**line) for line in read_lines(self._folder / TRIALS_FILE)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the logs of a training quiet, all of which the training itself repeats, but for errors."""
    loggers = [logging.getLogger(name) for name in ("trainer", "pipeline")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
