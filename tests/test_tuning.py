"""The search for a learning rate before a training."""

import dataclasses
import json
import math
import signal

import pytest

from pipeline import ModelConfig
from trainer import TrainingError, train_student
from trainer.loop.interruption import TrainingInterrupted
from trainer.run_dir import read_lines
from trainer.settings import Settings, StudentOptions
from trainer.tuning import LEAST_STEPS, Rung, plan, rungs_of, tune

LRP = {"lrp": 1.0}
RATES = (1e-2, 3.3e-3, 3e-2, 1e-3)  # of muon, the usual one first


class Trainings:
    """In place of `train_student`: the loss of a training is that of its rate, and each takes a moment."""

    def __init__(self, losses=lambda lr, steps: lr, stop_at=None, explodes=()):
        self.made, self._losses, self._stop_at, self._explodes = [], losses, stop_at, explodes

    def __call__(self, out, lr, steps, **options):
        if len(self.made) == self._stop_at:
            raise TrainingInterrupted("stopped", signal.SIGTERM)
        self.made.append({"lr": lr, "steps": steps, **options})
        out.mkdir(parents=True)
        if lr in self._explodes:
            (out / "failure.json").write_text("{}")
            raise TrainingError("the loss became 1e9")
        (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9}')
        return {"validation_loss": self._losses(lr, steps), "seconds": 1e-4 * steps}


def config(settings):
    return ModelConfig(
        arch="small-cnn", arch_options={}, preprocessing=None, hf_config=None, start=None, kind="student",
        bias_free=True, debias="none", class_names=("a", "b"), image_shape=(1, 8, 8), dataset={},
        training=settings.to_dict(), head=None,
    )  # fmt: skip


def searched(out, trainings, **options):
    options = {"tune": 10.0, "steps": 3000, "arch": "small-cnn", **options}
    given = StudentOptions(data="d", cache="c", out=out, **options)
    settings = Settings.of(given, LRP, options["steps"])
    return tune(given, settings, config(settings), trainings)


def test_a_search_halves_the_rates_and_doubles_their_steps():
    assert rungs_of(6, 50) == [Rung(6, 50), Rung(3, 100), Rung(2, 200)]
    assert rungs_of(2, 50) == [Rung(2, 50)]
    assert rungs_of(1, 50) == []


@pytest.mark.parametrize("per_trial", [0.0, 2.0])
@pytest.mark.parametrize("seconds", [20.0, 60.0, 100.0, 400.0, 5000.0])
def test_a_plan_fits_into_its_time_and_no_trial_is_longer_than_the_training(seconds, per_trial):
    rungs = plan(6, seconds, 0.1, per_trial, longest=1000)
    takes = sum(rung.rates * (0.1 * rung.steps + per_trial) for rung in rungs)
    assert takes <= seconds + 1e-6
    assert all(LEAST_STEPS <= rung.steps <= 1000 for rung in rungs)
    assert rungs[0].rates >= 2
    if seconds == 400:  # it is used
        assert takes > 0.9 * seconds
        assert rungs[0].rates == 6


@pytest.mark.parametrize(("seconds", "rates"), [(70, 6), (40, 4), (7, 2), (5, 0)])
def test_less_time_means_fewer_rates_and_at_last_none(seconds, rates):
    rungs = plan(6, seconds, 0.1, 0, 1000)
    assert (rungs[0].rates if rungs else 0) == rates


def test_the_rate_with_the_lowest_loss_of_the_longest_trials_is_chosen_and_noted(tmp_path):
    def losses(lr, steps):  # the best of short trials is not the best of long ones
        best, second = (3.3e-3, 3e-2) if steps < 1000 else (3e-2, 3.3e-3)
        return {best: 0.1, second: 0.2}.get(lr, 0.5)

    trainings = Trainings(losses)
    assert searched(tmp_path, trainings) == 3e-2
    assert {made["lr"] for made in trainings.made} == set(RATES)
    trials = read_lines(tmp_path / "tuning" / "trials.jsonl")
    assert len(trials) == len(trainings.made) == 1 + 4 + 2  # with the probe
    assert max(trial["steps"] for trial in trials) <= 3000
    choice = json.loads((tmp_path / "tuning" / "choice.json").read_text())
    assert (choice["lr"], choice["loss"]) == (3e-2, 0.1)
    assert not (tmp_path / "tuning" / "trial").exists()
    assert searched(tmp_path, trainings) == 3e-2  # without further trials
    assert len(trainings.made) == 7


def test_an_interrupted_search_is_resumed_without_the_trials_that_were_made(tmp_path):
    with pytest.raises(TrainingInterrupted, match=f"the same command resumes it in {tmp_path}") as stopped:
        searched(tmp_path, Trainings(stop_at=3))
    assert stopped.value.signum == signal.SIGTERM
    trainings = Trainings()
    assert searched(tmp_path, trainings) == min(RATES)
    assert len(trainings.made) == 7 - 3


def test_a_rate_whose_loss_explodes_is_never_chosen(tmp_path):
    assert searched(tmp_path / "one", Trainings(explodes=[1e-3])) == 3.3e-3
    with pytest.raises(TrainingError, match="every trial became too large: give a smaller lr"):
        searched(tmp_path / "all", Trainings(explodes=RATES))


def test_an_error_that_no_rate_could_mend_ends_the_search(tmp_path):
    def fails(**options):
        raise TrainingError("no such file")

    with pytest.raises(TrainingError, match="no such file"):
        searched(tmp_path, fails)


def test_a_search_that_takes_longer_than_planned_ends_after_a_rung(tmp_path, monkeypatch):
    made = Trainings()
    monkeypatch.setattr("trainer.tuning._Trials.seconds", property(lambda trials: len(made.made) / 0.49))
    assert searched(tmp_path, made) == min(RATES)
    assert len(made.made) == 1 + 4


def test_other_optimizers_and_given_weights_have_rates_of_their_own(tmp_path):
    for name, options, most in (
        ("sgd", {"optimizer": "sgd"}, 3e-2),
        ("large", {"arch": "resnet18"}, 1.2e-2),
        ("given", {"init": tmp_path}, 7.5e-3),
    ):
        trainings = Trainings()
        searched(tmp_path / name, trainings, **options)
        assert max(made["lr"] for made in trainings.made) == most


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 1e-3}, "tune=10.0 chooses the learning rate: leave it or lr=0.001 out"),
        ({"tune": 1e-4}, "tune=0.0001 is too short: three trials of 30 steps take about 0 seconds here"),
        ({"steps": 20}, "a training of 20 steps is too short for trials of 30: leave tune=10.0 out"),
    ],
)
def test_what_cannot_be_searched_is_said(tmp_path, options, error):
    with pytest.raises(TrainingError, match=error):
        searched(tmp_path, Trainings(), **options)


def test_methods_without_a_store_and_several_processes_are_refused(tmp_path, monkeypatch):
    given = StudentOptions(data="d", out=tmp_path, tune=10.0, arch="small-cnn")
    settings = Settings.of(given, {"erm": 1.0}, 100)
    with pytest.raises(TrainingError, match="erm uses none: leave it out"):
        tune(given, settings, config(settings), Trainings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="works in one process: tune there, and give the processes the lr it chose"):
        searched(tmp_path, Trainings())


def test_a_search_of_other_options_is_not_resumed(tmp_path):
    searched(tmp_path, Trainings(), batch_size=32)
    searched(tmp_path, Trainings(), batch_size=32, threads=1, tune=20.0)  # which change no loss
    differing = "training.batch_size: 32, 64; the recorded value first"
    with pytest.raises(TrainingError, match=f"search with other options .{differing}"):
        searched(tmp_path, Trainings(), batch_size=64)


def test_a_search_of_other_data_at_the_same_place_is_not_resumed(tmp_path):
    given = StudentOptions(data="d", cache="c", out=tmp_path, tune=10.0, steps=3000, arch="small-cnn")
    settings = Settings.of(given, LRP, 3000)
    first, second = (dataclasses.replace(config(settings), dataset={"fingerprint": name}) for name in ("one", "two"))
    tune(given, settings, first, Trainings())
    with pytest.raises(TrainingError, match=r"dataset.fingerprint: 'one', 'two'"):
        tune(given, settings, second, Trainings())


def test_a_training_begins_with_its_search_and_records_what_it_found(dataset, cache, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"steps": 60, "batch_size": 16, "threads": 1, "log_steps": 1}
    result = train_student(dataset, cache, tmp_path / "tuned", **options, tune=600.0)
    choice = json.loads((tmp_path / "tuned" / "tuning" / "choice.json").read_text())
    trials = read_lines(tmp_path / "tuned" / "tuning" / "trials.jsonl")
    assert all(math.isfinite(trial["loss"]) for trial in trials)
    assert len({trial["loss"] for trial in trials}) == len(trials) == 4 + 2  # the probe is the first of them
    assert [message for message in caplog.messages if "has the lowest loss" in message]
    assert sum("parameters to learn" in message for message in caplog.messages) == 1  # trials are quiet
    again = train_student(dataset, cache, tmp_path / "given", **options, lr=choice["lr"])
    assert again["loss"] == result["loss"]
    recorded = (tmp_path / "tuned" / "config.yaml").read_text()
    assert f"lr: {choice['lr']}" in recorded
    assert "tune: null" in recorded
