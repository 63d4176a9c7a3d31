"""What optimisers, schedules and the average of weights promise: the steps asked for, and restored bit for bit."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer import TrainingError
from trainer.loop.optim import OPTIMIZERS, SCHEDULES, make_ema, make_optimizer, make_schedule

STEPS = 10


def small_model(seed=0):
    """A convolution, a norm with statistics, a frozen layer: what a student has."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    model[3].requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


class Training:
    """A model and all that moves it, one step after another."""

    def __init__(self, optimizer="adam", schedule="one-cycle", ema=None, seed=0, **options):
        self.model = small_model(seed)
        self.optimizer = make_optimizer(self.model, optimizer, 0.1, **options)
        self.schedule = make_schedule(self.optimizer, schedule, STEPS, lr=0.1)
        self.ema = make_ema(self.model, ema) if ema else None

    def train(self, first, stop):
        for step in range(first, stop):
            images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(images).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            if self.ema:
                self.ema.update_parameters(self.model)

    def parts(self):
        return [part for part in (self.model, self.optimizer, self.schedule, self.ema) if part]

    def state(self):
        return [part.state_dict() for part in self.parts()]

    def load(self, states):
        for part, state in zip(self.parts(), states, strict=True):
            part.load_state_dict(state)


def equal(a, b):
    """Bit for bit, and of the same types."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_that_was_saved_and_restored_equals_an_uninterrupted_one_bit_for_bit(optimizer, schedule, ema):
    options = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "weight_decay": 0.01, "momentum": 0.99}
    uninterrupted = Training(**options)
    uninterrupted.train(0, STEPS)
    for stopped in (0, 1, 4, STEPS - 1):
        first = Training(**options)
        first.train(0, stopped)
        saved = io.BytesIO()
        torch.save(first.state(), saved)
        saved.seek(0)
        second = Training(**options, seed=1)
        assert not equal(second.state(), first.state())
        second.load(torch.load(saved, weights_only=True))
        second.train(stopped, STEPS)
        assert equal(second.state(), uninterrupted.state())


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_default_is_pytorchs_adam_with_its_one_cycle_schedule_and_nothing_else(optimizer):
    found = Training(optimizer)
    found.train(0, STEPS)
    expected = Training(optimizer)
    trained = [parameter for parameter in expected.model.parameters() if parameter.requires_grad]
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    expected.optimizer = plain(trained, 0.1, weight_decay=0, fused=True)
    expected.schedule = torch.optim.lr_scheduler.OneCycleLR(expected.optimizer, 0.1, total_steps=STEPS)
    expected.train(0, STEPS)
    assert equal(found.state(), expected.state())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sgd_keeps_the_momentum_that_was_asked_for_under_every_schedule(schedule):
    training = Training("sgd", schedule, momentum=0.99)
    weight = training.model[0].weight
    expected, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(STEPS):
        (lr,) = training.schedule.get_last_lr()
        training.train(step, step + 1)
        velocity = 0.99 * velocity + weight.grad
        expected -= lr * velocity
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_and_kernels_alone(optimizer):
    model = small_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moves = make_optimizer(model, optimizer, 0.1, momentum=0, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that nothing else moves them
    moves.step()
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name == "0.weight":  # 3.weight is frozen
            # what Adam adds to the gradient it divides by its size
            expected = expected - 0.1 * (expected.sign() if optimizer == "adam" else 0.5 * expected)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_in_one_group_where_nothing_divides_them():
    assert len(make_optimizer(small_model(), "sgd", 0.1).param_groups) == 1
    assert len(make_optimizer(nn.Linear(3, 2, bias=False), "sgd", 0.1, weight_decay=0.1).param_groups) == 1
    assert len(make_optimizer(small_model(), "sgd", 0.1, weight_decay=0.1).param_groups) == 2


def rates(schedule, steps, warmup, optimizer="adam"):
    """The learning rate of each step, for a peak of 1."""
    moves = make_optimizer(nn.Linear(1, 1), optimizer, 1)
    plan = make_schedule(moves, schedule, steps, lr=1, warmup=warmup)
    found = []
    for _ in range(steps):
        found += plan.get_last_lr()
        moves.step()
        plan.step()
    return found, plan.get_last_lr()[0]


@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    steps=st.integers(2, 60),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_the_rate_rises_for_warmup_steps_to_its_peak_and_never_again(schedule, optimizer, steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    found, after = rates(schedule, steps, warmup, optimizer)
    rising, falling = found[:warmup], found[max(0, warmup - 1) :]
    assert all(0 < a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    if warmup:
        assert rising[-1] == pytest.approx(1, abs=1e-6)
    elif schedule != "one-cycle":  # which begins a step past its peak then
        assert found[0] == 1
    if schedule == "constant":
        assert set(falling) == {1}
        return
    assert len(set(falling)) == len(falling) - (warmup > 0 and schedule == "cosine")
    assert (after if schedule == "cosine" else found[-1]) == pytest.approx(0, abs=1e-5)


def test_a_linear_warmup_and_a_cosine_are_those_of_pytorch():
    moves = make_optimizer(nn.Linear(1, 1), "sgd", 1)
    plans = torch.optim.lr_scheduler
    rise = plans.LinearLR(moves, start_factor=1 / 4, total_iters=3)
    fall = plans.CosineAnnealingLR(moves, T_max=16)
    plan = plans.SequentialLR(moves, [rise, fall], milestones=[4])
    expected = []
    for _ in range(20):
        expected += plan.get_last_lr()
        moves.step()
        plan.step()
    assert rates("cosine", 20, 4)[0] == pytest.approx(expected)
    assert rates("constant", 20, 4)[0] == pytest.approx([1 / 4, 2 / 4, 3 / 4] + [1] * 17)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_of_one_step_has_a_schedule(schedule):
    for warmup in (None, 0):
        assert 0 < rates(schedule, 1, warmup)[0][0] <= 1


def test_the_average_of_weights_is_the_formula_and_its_statistics_are_the_models():
    training, expected = Training(ema=0.75), None
    for step in range(STEPS):
        training.train(step, step + 1)
        weights = [parameter.detach().double() for parameter in training.model.parameters()]
        if expected is None:
            expected = weights
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, weights, strict=True)]
    average = training.ema.module
    for found, value, own in zip(average.parameters(), expected, training.model.parameters(), strict=True):
        torch.testing.assert_close(found.detach().double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(found, own) == (not own.requires_grad)  # an average, and a copy of what is frozen
    for found, own in zip(average.buffers(), training.model.buffers(), strict=True):
        assert torch.equal(found, own)
    assert type(average) is type(training.model)


def test_a_training_is_not_changed_by_an_average_of_its_weights():
    plain, averaged = Training(), Training(ema=0.9)
    for training in (plain, averaged):
        training.train(0, STEPS)
    assert equal(plain.state(), averaged.state()[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr must be a positive number, got -1$"),
        ({"lr": 0}, "lr must be a positive number, got 0$"),
        ({"lr": math.inf}, "lr must be a positive number, got inf$"),
        ({"lr": math.nan}, "lr must be a positive number, got nan$"),
        ({"momentum": 1}, "momentum must be at least 0 and less than 1, got 1$"),
        ({"momentum": -0.1}, "momentum must be at least 0 and less than 1, got -0.1$"),
        ({"momentum": math.nan}, "momentum must be at least 0 and less than 1, got nan$"),
        ({"weight_decay": -1e-4}, "weight_decay must be a number of at least 0, got -0.0001$"),
        ({"weight_decay": math.inf}, "weight_decay must be a number of at least 0, got inf$"),
        ({"optimizer": "adagrad"}, "unknown optimizer 'adagrad': choose one of adam, adamw, muon, sgd[.]$"),
        ({"schedule": "step"}, "unknown schedule 'step': choose one of one-cycle, cosine, constant[.]$"),
        ({"warmup": 10}, "warmup must be at least 0 and less than the 10 steps of the training, got 10$"),
        ({"warmup": -1}, "warmup must be at least 0 and less than the 10 steps of the training, got -1$"),
        ({"ema": 0}, "ema must be more than 0 and less than 1, got 0$"),
        ({"ema": 1}, "ema must be more than 0 and less than 1, got 1$"),
        ({"ema": math.nan}, "ema must be more than 0 and less than 1, got nan$"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_option_and_value(options, message):
    def make(lr=0.1, optimizer="sgd", schedule="one-cycle", warmup=None, ema=0.9, **others):
        model = small_model()
        make_schedule(make_optimizer(model, optimizer, lr, **others), schedule, STEPS, lr=lr, warmup=warmup)
        make_ema(model, ema)

    make()
    with pytest.raises(TrainingError, match=message):
        make(**options)
