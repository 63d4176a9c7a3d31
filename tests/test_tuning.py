"""The search for an optimizer and a rate before a training."""

import json
import math
import signal

import pytest

from trainer import TrainingError, train_student
from trainer.loop.interruption import TrainingInterrupted
from trainer.run_dir import read_lines
from trainer.settings import Settings, StudentOptions
from trainer.tuning import LEAST_STEPS, Candidate, Rung, plan, rungs_of, tune

LRP = {"lrp": 1.0}


class Trainings:
    """In place of `train_student`: the loss of a training is that of its rate, and each takes a moment."""

    def __init__(self, losses=lambda optimizer, lr, steps: lr, stop_at=None, explodes=(), agrees=None):
        self.made, self._losses, self._stop_at, self._explodes = [], losses, stop_at, explodes
        self._agrees = agrees

    def __call__(self, out, optimizer, lr, steps, **options):
        if len(self.made) == self._stop_at:
            raise TrainingInterrupted("stopped", signal.SIGTERM)
        self.made.append({"optimizer": optimizer, "lr": lr, "steps": steps, **options})
        out.mkdir(parents=True)
        if (optimizer, lr) in self._explodes:
            (out / "failure.json").write_text("{}")
            raise TrainingError("the loss became 1e9")
        (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9}')
        answers = None if self._agrees is None else {"other_backgrounds": self._agrees(optimizer, lr)}
        loss = self._losses(optimizer, lr, steps)
        return {"validation_loss": loss, "seconds": 1e-4 * steps, "same_answers": answers}


def searched(out, trainings, **options):
    options = {"tune": 10.0, "steps": 3000, "arch": "small-cnn", **options}
    given = StudentOptions(data="d", cache="c", out=out, **options)
    return tune(given, Settings.of(given, LRP, options["steps"]), trainings)


def test_a_search_halves_the_candidates_and_doubles_their_steps():
    assert rungs_of(6, 50) == [Rung(6, 50), Rung(3, 100), Rung(2, 200)]
    assert rungs_of(2, 50) == [Rung(2, 50)]
    assert rungs_of(1, 50) == []


@pytest.mark.parametrize("per_trial", [0.0, 2.0])
@pytest.mark.parametrize("seconds", [20.0, 60.0, 100.0, 400.0, 5000.0])
def test_a_plan_fits_into_its_time_and_no_trial_is_longer_than_the_training(seconds, per_trial):
    rungs = plan(6, seconds, 0.1, per_trial, longest=1000)
    takes = sum(rung.candidates * (0.1 * rung.steps + per_trial) for rung in rungs)
    assert takes <= seconds + 1e-6
    assert all(LEAST_STEPS <= rung.steps <= 1000 for rung in rungs)
    assert rungs[0].candidates >= 2
    if seconds == 400:  # it is used
        assert takes > 0.9 * seconds
        assert rungs[0].candidates == 6


def test_less_time_means_fewer_candidates_and_at_last_none():
    counts = [len(rungs) and rungs[0].candidates for s in (70, 40, 7, 5) if (rungs := plan(6, s, 0.1, 0, 1000)) or True]
    assert counts == [6, 4, 2, 0]


def test_the_candidate_with_the_lowest_loss_of_the_longest_trials_is_chosen_and_noted(tmp_path):
    def losses(optimizer, lr, steps):  # the best of short trials is not the best of long ones
        best = ("adam", 4e-3) if steps < 200 else ("muon", 1e-2)
        return 0.1 if (optimizer, lr) == best else 0.5

    trainings = Trainings(losses)
    assert searched(tmp_path, trainings) == Candidate("muon", 1e-2)
    trials = read_lines(tmp_path / "tuning" / "trials.jsonl")
    assert len(trials) == len(trainings.made) == 12  # a probe, and rungs of 6, 3 and 2
    assert max(trial["steps"] for trial in trials) <= 3000
    choice = json.loads((tmp_path / "tuning" / "choice.json").read_text())
    assert (choice["candidate"], choice["loss"]) == ({"optimizer": "muon", "lr": 1e-2}, 0.1)
    assert not (tmp_path / "tuning" / "trial").exists()
    assert searched(tmp_path, trainings) == Candidate("muon", 1e-2)  # without further trials
    assert len(trainings.made) == 12


def test_the_answers_before_other_backgrounds_count_before_the_loss(tmp_path):
    def agrees(optimizer, lr):
        return 90.0 if optimizer == "adam" else 80.0

    assert searched(tmp_path, Trainings(agrees=agrees)) == Candidate("adam", 1.3e-3)  # and its loss among equals
    choice = json.loads((tmp_path / "tuning" / "choice.json").read_text())
    assert (choice["disagrees"], choice["loss"]) == (10.0, 1.3e-3)


def test_an_interrupted_search_is_resumed_without_the_trials_that_were_made(tmp_path):
    with pytest.raises(TrainingInterrupted, match=f"goes on with it in {tmp_path}") as stopped:
        searched(tmp_path, Trainings(stop_at=5))
    assert stopped.value.signum == signal.SIGTERM
    trainings = Trainings()
    assert searched(tmp_path, trainings).lr == 1.3e-3
    assert len(trainings.made) == 12 - 5


def test_a_candidate_whose_loss_explodes_is_never_chosen(tmp_path):
    assert searched(tmp_path / "one", Trainings(explodes=[("adam", 1.3e-3)])) == Candidate("muon", 3.3e-3)
    every = [("muon", lr) for lr in (1e-2, 3.3e-3, 3e-2)] + [("adam", lr) for lr in (4e-3, 1.3e-3, 1.2e-2)]
    with pytest.raises(TrainingError, match="every trial became too large: give a smaller lr"):
        searched(tmp_path / "all", Trainings(explodes=every))


def test_an_error_that_no_rate_could_mend_ends_the_search(tmp_path):
    def fails(**options):
        raise TrainingError("no such file")

    with pytest.raises(TrainingError, match="no such file"):
        searched(tmp_path, fails)


def test_a_search_that_takes_longer_than_planned_ends_after_a_rung(tmp_path, monkeypatch):
    made = Trainings()
    monkeypatch.setattr("trainer.tuning._Trials.seconds", property(lambda trials: len(made.made) / 0.69))
    assert searched(tmp_path, made).lr == 1.3e-3
    assert len(made.made) == 1 + 6


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        ({"optimizer": "sgd"}, {("sgd", 1e-2), ("sgd", 3.3e-3), ("sgd", 3e-2)}),
        ({"lr": 1e-3}, {("muon", 1e-3), ("adam", 1e-3)}),
        ({"arch": "resnet18", "lr": 1e-3}, {("muon", 1e-3), ("adam", 1e-3)}),
    ],
)
def test_what_the_user_gives_stays_as_it_is(tmp_path, given, tried):
    trainings = Trainings()
    searched(tmp_path, trainings, **given)
    assert {(made["optimizer"], made["lr"]) for made in trainings.made} == tried


def test_a_start_from_given_weights_is_tried_with_smaller_rates(tmp_path):
    trainings = Trainings()
    searched(tmp_path, trainings, init=tmp_path)
    assert max(made["lr"] for made in trainings.made) == 7.5e-3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"optimizer": "adam", "lr": 1e-3}, "tune=10.0 has nothing to choose: leave optimizer or lr out"),
        ({"tune": 1e-4}, "tune=0.0001 is too short: three trials of 30 steps take about 0 seconds here"),
        ({"steps": 20}, "a training of 20 steps is too short for trials of 30: leave tune=10.0 out"),
    ],
)
def test_what_cannot_be_searched_is_said(tmp_path, options, error):
    with pytest.raises(TrainingError, match=error):
        searched(tmp_path, Trainings(), **options)


def test_methods_without_a_store_and_several_processes_are_refused(tmp_path, monkeypatch):
    given = StudentOptions(data="d", out=tmp_path, tune=10.0, arch="small-cnn")
    with pytest.raises(TrainingError, match="erm uses none: leave it out"):
        tune(given, Settings.of(given, {"erm": 1.0}, 100), Trainings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="works in one process: tune there, and give the processes the optimizer"):
        searched(tmp_path, Trainings())


def test_a_search_of_other_options_is_not_gone_on_with(tmp_path):
    searched(tmp_path, Trainings(), batch_size=32)
    searched(tmp_path, Trainings(), batch_size=32, threads=1, tune=20.0)  # which change no loss
    with pytest.raises(TrainingError, match=r"search with other options .batch_size: 32, 64; the recorded value first"):
        searched(tmp_path, Trainings(), batch_size=64)


def test_a_training_begins_with_its_search_and_records_what_it_found(dataset, cache, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"steps": 60, "batch_size": 16, "threads": 1, "log_steps": 1}
    result = train_student(dataset, cache, tmp_path / "tuned", **options, tune=600.0)
    choice = json.loads((tmp_path / "tuned" / "tuning" / "choice.json").read_text())
    trials = read_lines(tmp_path / "tuned" / "tuning" / "trials.jsonl")
    assert all(math.isfinite(trial["loss"]) for trial in trials)
    assert len({trial["loss"] for trial in trials}) == len(trials) == 4 + 2  # the probe is the first of them
    assert [record for record in caplog.messages if "chose" in record]
    assert sum("parameters to learn" in record for record in caplog.messages) == 1  # trials are quiet
    again = train_student(dataset, cache, tmp_path / "given", **options, **choice["candidate"])
    assert again["loss"] == result["loss"]
    recorded = (tmp_path / "tuned" / "config.yaml").read_text()
    assert f"optimizer: {choice['candidate']['optimizer']}" in recorded
    assert "tune: null" in recorded
