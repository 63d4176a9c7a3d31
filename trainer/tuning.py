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
class Rung:
    """How many candidates train for how many steps."""

    candidates: int
    steps: int


def tune(options: StudentOptions, settings: Settings, train: Train) -> Candidate:
    """Find the optimizer and the rate with which the student comes nearest to its teacher in short trainings.

    The loss that counts is that on the validation store, where there is one, and else the mean of the last losses of
    the trial. An interrupted search is resumed by the same call, and one that has ended is not repeated.

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
        return Candidate(chosen["optimizer"], chosen["lr"])
    trials = _Trials(folder, options, settings, train)
    rungs = _rungs(trials, candidates, options, settings)
    ranked = _halve(trials, candidates, rungs, options.tune)
    best, loss = ranked[0]
    if not math.isfinite(loss):
        raise TrainingError(
            Message("the loss of every trial became too large: give a smaller ", Option("lr"), f"; see {folder}")
        )
    write_json(choice, {"optimizer": best.optimizer, "lr": best.lr, "loss": loss, "seconds": trials.seconds})
    log.info(
        f"{options.out}: chose {best}, with a loss of {loss:.3f}, after {trials.seconds:.0f} seconds of trials (the "
        f"usual is {candidates[0]}; all trials are in {folder / TRIALS_FILE})"
    )
    return best


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
    steps = min(LEAST_STEPS, settings.steps)
    probe = trials.make(candidates[0], steps, "how long a trial takes")
    per_step = probe["seconds_of_steps"] / steps
    per_trial = max(0.0, probe["seconds"] - probe["seconds_of_steps"])
    rungs = plan(len(candidates), options.tune - probe["seconds"], per_step, per_trial, settings.steps)
    if not rungs:
        least = probe["seconds"] + 2 * (LEAST_STEPS * per_step + per_trial)
        raise TrainingError(
            Message(
                Option("tune", options.tune),
                f" is too short: two trials of {LEAST_STEPS} steps take about {least:.0f} seconds here, and at least "
                f"as many steps of a training of {settings.steps} are needed",
            )
        )
    return rungs


def _halve(
    trials: _Trials, candidates: Sequence[Candidate], rungs: Sequence[Rung], seconds: float
) -> list[tuple[Candidate, float]]:
    """Make the trials of each rung; return the candidates and losses of the last one that ended in time, best first."""
    total, number = sum(rung.candidates for rung in rungs), 0
    ranked = [(candidate, math.inf) for candidate in candidates]
    for first, rung in enumerate(rungs):
        found = []
        for candidate, _ in ranked[: rung.candidates]:
            if first and trials.seconds > seconds:
                log.info("the time for trials is over: the longest ones that all candidates had decide")
                return ranked
            number += 1
            found.append((candidate, trials.make(candidate, rung.steps, f"trial {number} of {total}")["loss"]))
        ranked = sorted(found, key=lambda pair: pair[1])
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
        return float(sum(trial["seconds"] for trial in self._made()))

    def make(self, candidate: Candidate, steps: int, what: str) -> dict[str, Any]:
        """Train a candidate, unless it was trained for as many steps before.

        Args:
            candidate: the optimizer and rate.
            steps: the length of the trial.
            what: the trial, for the log.

        Returns:
            Its ``loss``, infinite for a loss that exploded, its ``seconds``, and those without start and end,
            ``seconds_of_steps``.
        """
        key = {**dataclasses.asdict(candidate), "steps": steps}
        for made in self._made():
            if key.items() <= made.items():
                return made
        began, folder = time.perf_counter(), self._folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        loss, seconds_of_steps = self._run(candidate, steps, folder)
        shutil.rmtree(folder)
        seconds = time.perf_counter() - began
        trial = {**key, "loss": loss, "seconds": seconds, "seconds_of_steps": seconds_of_steps}
        with (self._folder / TRIALS_FILE).open("a") as file:
            file.write(json.dumps(trial) + "\n")
        log.info(f"{what}: {candidate}, {steps} steps, loss {loss:.3f}")
        return trial

    def _run(self, candidate: Candidate, steps: int, folder: Path) -> tuple[float, float]:
        """Train a candidate in the folder; return its loss, and the seconds of its steps."""
        began, of_trial = time.perf_counter(), self._of_trial(candidate, steps, folder)
        try:
            with _quiet():
                result = self._train(**of_trial)
        except TrainingInterrupted as interrupted:
            raise TrainingInterrupted(
                f"stopped in the search for an optimizer and a rate: the same command goes on with it in "
                f"{self._options.out}",
                interrupted.signum,
            ) from None
        except TrainingError:
            if not (folder / FAILURE_FILE).exists():  # nothing that another rate could change
                raise
            return math.inf, time.perf_counter() - began
        loss = result["validation_loss"]
        if loss is None:
            losses = [line["loss"] for line in Run(folder).metrics if "loss" in line][-AVERAGED:]
            loss = sum(losses) / len(losses)
        return float(loss), float(result["seconds"])

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

    def _made(self) -> list[dict[str, Any]]:
        return read_lines(self._folder / TRIALS_FILE)


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
