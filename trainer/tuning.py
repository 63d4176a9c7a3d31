"""Choose a student's optimizer and learning rate by short trainings, on the biased data and the store alone.

Successive halving (Jamieson and Talwalkar, AISTATS 2016): all candidates train for a few steps, the better half of them
for twice as many, and so on until one is left. Each trial is a whole training with its own schedule, and all have the
same seed, so that they see the same samples, draws and ε.
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
from trainer.errors import TrainingError
from trainer.loop.interruption import TrainingInterrupted
from trainer.loop.methods import of_store
from trainer.loop.optim import FINE, RATES
from trainer.run_dir import FAILURE_FILE, TUNING, Run, differences, read_lines, write_json
from trainer.settings import Runtime, Settings, StudentOptions

log = logging.getLogger(__name__)

Train = Callable[..., dict[str, Any]]

OPTIMIZERS = ("muon", "adam")
FACTORS = (1.0, 1 / 3, 3.0)  # of the usual rate
LEAST_STEPS = 30  # of a trial
READINGS, AVERAGED = 20, 5  # of the training loss in a trial, and the last of them
CHOICE_FILE, OPTIONS_FILE, TRIALS_FILE = "choice.json", "options.json", "trials.jsonl"
NOT_OF_TRIALS = {"tune", "out", *(field.name for field in dataclasses.fields(Runtime))}  # options that change no loss


@dataclass(frozen=True)
class Candidate:
    """An optimizer and its peak learning rate."""

    optimizer: str
    lr: float

    def __str__(self) -> str:
        return f"{self.optimizer} with the rate {self.lr:g}"


@dataclass(frozen=True)
class Trial:
    """A short training of a candidate.

    loss: None where it exploded. disagrees: the share of images before random backgrounds, in %, on which the student
    does not say what its teacher says; None where this cannot be told. seconds: in all. seconds_of_steps: without the
    start and the end.
    """

    candidate: Candidate
    steps: int
    loss: float | None
    disagrees: float | None
    seconds: float
    seconds_of_steps: float

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Return the less, the better: first what ranks students by their accuracy without the bias best.

        See docs/results/choosing.md: before backgrounds, the loss alone ranks nothing.
        """
        return self.loss is None, self.disagrees or 0.0, self.loss or 0.0

    @property
    def found(self) -> str:
        """Return the numbers that count, for the log."""
        if self.loss is None:
            return "the loss exploded"
        if self.disagrees is None:
            return f"loss {self.loss:.3f}"
        return f"loss {self.loss:.3f}, {self.disagrees:.1f} % other answers before random backgrounds"


@dataclass(frozen=True)
class Rung:
    """How many candidates train for how many steps."""

    candidates: int
    steps: int


def tune(options: StudentOptions, settings: Settings, train: Train) -> Candidate:
    """Find the optimizer and the rate with which the student comes nearest to its teacher in short trainings.

    Where the teacher sees nothing outside the dataset's masks, the share of the images before random backgrounds counts
    on which a student does not say what its teacher says. Elsewhere it is the loss: that on the validation store, where
    there is one, or the mean of the last losses of the trial.

    An interrupted search is resumed by the same call, and one that has ended is not repeated.

    Args:
        options: those of the student, with ``tune``, the seconds that the search may take. An optimizer or a rate
            that they name stays as it is.
        settings: what the options mean.
        train: `train_student`.

    Returns:
        The best candidate. ``out`` has it in ``tuning/choice.json``, and all trials in ``tuning/trials.jsonl``.

    Raises:
        TrainingError: there is nothing to choose, too little time, several processes, every trial has failed, or the
            folder has a search with other options.
        TrainingInterrupted: SIGTERM or Ctrl-C stopped a trial.
    """
    assert options.tune is not None
    candidates, folder = _candidates(options, settings), Path(options.out) / TUNING
    _claim(folder, options)
    choice = folder / CHOICE_FILE
    if choice.exists():
        chosen = json.loads(choice.read_text())
        return Candidate(**chosen["candidate"])
    trials = _Trials(folder, options, settings, train)
    rungs = _rungs(trials, candidates, options, settings)
    ranked = _halve(trials, candidates, rungs, options.tune)
    best = ranked[0]
    if best.loss is None:
        raise TrainingError(
            Message("the loss of every trial became too large: give a smaller ", Option("lr"), f"; see {folder}")
        )
    write_json(choice, {**dataclasses.asdict(best), "seconds_of_search": trials.seconds})
    log.info(
        f"{options.out}: chose {best.candidate} ({best.found}) after {trials.seconds:.0f} seconds of trials; the usual "
        f"is {candidates[0]}; all trials are in {folder / TRIALS_FILE}"
    )
    return best.candidate


def _candidates(options: StudentOptions, settings: Settings) -> list[Candidate]:
    """List what is tried, the usual choice first; raise TrainingError where nothing can be."""
    given = Option("tune", options.tune)
    if not of_store(settings.loss):
        names = "+".join(settings.loss)
        raise TrainingError(
            Message(given, f" compares how well students match a store, and {names} uses none: leave it out")
        )
    if options.optimizer is not None and options.lr is not None:
        raise TrainingError(
            Message(given, " has nothing to choose: leave ", Option("optimizer"), " or ", Option("lr"), " out")
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            Message(
                given, " works in one process: tune there, and give the processes the ", Option("optimizer"), " and ",
                Option("lr"), " that it chose",
            )
        )  # fmt: skip
    usual = settings.optimizer
    others = [] if options.optimizer is not None else [name for name in OPTIMIZERS if name != usual]
    if options.lr is not None:
        return [Candidate(name, options.lr) for name in (usual, *others)]
    fine = FINE if options.init is not None else 1
    rates = {usual: settings.lr, **{name: RATES[name] / fine for name in others}}
    return [Candidate(name, float(f"{rate * factor:.2g}")) for factor in FACTORS for name, rate in rates.items()]


def rungs_of(candidates: int, steps: int) -> list[Rung]:
    """List the rungs of a search that begins with so many steps: half the candidates, twice the steps."""
    rungs = []
    while candidates > 1:
        rungs.append(Rung(candidates, steps))
        candidates, steps = math.ceil(candidates / 2), 2 * steps
    return rungs


def plan(candidates: int, seconds: float, per_step: float, per_trial: float, longest: int) -> list[Rung]:
    """Return the rungs that fit into the time, with as many candidates and then as many steps as possible.

    Args:
        candidates: those that there are.
        seconds: the time that is left.
        per_step, per_trial: the seconds of a step, and of a trial beside its steps.
        longest: the steps of the training itself, which no trial exceeds.

    Returns:
        The rungs; none where two candidates do not fit.
    """
    for count in range(candidates, 1, -1):
        units = rungs_of(count, 1)
        trials = sum(rung.candidates for rung in units)
        weight = sum(rung.candidates * rung.steps for rung in units)
        steps = min(int((seconds - trials * per_trial) / (weight * per_step)), longest // units[-1].steps)
        if steps >= LEAST_STEPS:
            return rungs_of(count, steps)
    return []


def _claim(folder: Path, options: StudentOptions) -> None:
    """Make the folder of the search, or raise TrainingError where it has one with other options."""
    decides = {name: value for name, value in options.record().items() if name not in NOT_OF_TRIALS}
    file = folder / OPTIONS_FILE
    differing = differences(json.loads(file.read_text()), decides) if file.exists() else []
    if differing:
        raise TrainingError(
            Message(
                f"{folder} holds a search with other options ({'; '.join(differing)}; the recorded value first): give "
                "the same options to go on with it, or choose another ",
                Option("out"),
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, decides)


def _rungs(trials: _Trials, candidates: Sequence[Candidate], options: StudentOptions, settings: Settings) -> list[Rung]:
    """Measure the time of a trial, and plan the search by it."""
    assert options.tune is not None
    given = Option("tune", options.tune)
    if settings.steps < LEAST_STEPS:
        raise TrainingError(
            Message(
                f"a training of {settings.steps} steps is too short for trials of {LEAST_STEPS}: leave ", given, " out"
            )
        )
    probe = trials.make(candidates[0], LEAST_STEPS, "how long a trial takes")
    per_step = probe.seconds_of_steps / LEAST_STEPS
    per_trial = max(0.0, probe.seconds - probe.seconds_of_steps)
    rungs = plan(len(candidates), options.tune - probe.seconds, per_step, per_trial, settings.steps)
    if not rungs:
        least = 3 * probe.seconds
        raise TrainingError(
            Message(given, f" is too short: three trials of {LEAST_STEPS} steps take about {least:.0f} seconds here")
        )
    return rungs


def _halve(trials: _Trials, candidates: Sequence[Candidate], rungs: Sequence[Rung], seconds: float) -> list[Trial]:
    """Make the trials of each rung; return those of the last one that ended in time, the best first."""
    total, number = sum(rung.candidates for rung in rungs), 0
    ranked: list[Trial] = []
    for rung in rungs:
        made: list[Trial] = []
        left = [trial.candidate for trial in ranked] or candidates
        for candidate in left[: rung.candidates]:
            if ranked and trials.seconds > seconds:
                log.info("the time for trials is over: the longest ones that all candidates had decide")
                return ranked
            number += 1
            made.append(trials.make(candidate, rung.steps, f"trial {number} of {total}"))
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

    def make(self, candidate: Candidate, steps: int, what: str) -> Trial:
        """Train a candidate, unless it was trained for as many steps before; ``what`` names the trial in the log."""
        for made in self._made():
            if (made.candidate, made.steps) == (candidate, steps):
                return made
        began, folder = time.perf_counter(), self._folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        result = self._train_in(folder, candidate, steps)
        shutil.rmtree(folder)
        seconds = time.perf_counter() - began
        before_others = result.get("same_answers")
        trial = Trial(
            candidate,
            steps,
            loss=result.get("loss"),
            disagrees=None if before_others is None else 100 - before_others["other_backgrounds"],
            seconds=seconds,
            seconds_of_steps=result.get("seconds", seconds),
        )
        with (self._folder / TRIALS_FILE).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
        log.info(f"{what}: {candidate}, {steps} steps: {trial.found}")
        return trial

    def _train_in(self, folder: Path, candidate: Candidate, steps: int) -> dict[str, Any]:
        """Train a candidate; return the result with the ``loss`` that counts, or nothing if it exploded."""
        try:
            with _quiet():
                result = self._train(**self._of_trial(candidate, steps, folder))
        except TrainingInterrupted as interrupted:
            raise TrainingInterrupted(
                f"stopped in the search for an optimizer and a rate: the same command goes on with it in "
                f"{self._options.out}",
                interrupted.signum,
            ) from None
        except TrainingError:
            if not (folder / FAILURE_FILE).exists():  # nothing that another rate could change
                raise
            return {}
        last = [line["loss"] for line in Run(folder).metrics if "loss" in line][-AVERAGED:]
        loss = result["validation_loss"]
        return {**result, "loss": sum(last) / len(last) if loss is None else loss}

    def _of_trial(self, candidate: Candidate, steps: int, folder: Path) -> dict[str, Any]:
        """Return the options of a trial."""
        options = {field.name: getattr(self._options, field.name) for field in dataclasses.fields(self._options)}
        warmup = options["warmup"] and options["warmup"] * steps // self._settings.steps
        return {
            **options,
            **dataclasses.asdict(candidate),
            "out": folder,
            "steps": steps,
            "epochs": None,
            "warmup": warmup,
            "tune": None,
            "log_steps": max(1, steps // READINGS),
            "snapshots": 0,
            "profile": False,
        }

    def _made(self) -> list[Trial]:
        lines = read_lines(self._folder / TRIALS_FILE)
        return [Trial(**{**line, "candidate": Candidate(**line["candidate"])}) for line in lines]


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
