"""Optimisers, learning-rate schedules and the moving average of weights, by the names that the command line has.

All but Muon are PyTorch's own, and all are restored bit for bit: make them anew with the same values, in the order
optimiser, schedule, average, and then load the ``state_dict()`` of each (a new schedule sets the optimiser's learning
rates).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from options import Lazy, Message, Option, Registry
from trainer.errors import TrainingError

if TYPE_CHECKING:
    import torch.optim.lr_scheduler as lr_scheduler
    import torch.optim.swa_utils as swa_utils
    from torch import nn, optim

    from trainer.loop import muon
else:
    optim, lr_scheduler = Lazy("torch.optim"), Lazy("torch.optim.lr_scheduler")
    swa_utils, muon = Lazy("torch.optim.swa_utils"), Lazy("trainer.loop.muon")


@dataclass(frozen=True)
class Step:
    """What an optimizer is made with. ``fused``: one pass through memory for all that a step does."""

    lr: float
    momentum: float
    fused: bool


# Each takes groups of parameters, as PyTorch's optimizers do, and a `Step`, and returns the optimizer.
OPTIMIZERS: Registry[Callable[[list[dict[str, Any]], Step], optim.Optimizer]] = Registry("optimizer", TrainingError)


@OPTIMIZERS.add("adam")
def _adam(groups: list[dict[str, Any]], step: Step) -> optim.Optimizer:
    """Return Adam (Kingma and Ba, ICLR 2015)."""
    return optim.Adam(groups, step.lr, weight_decay=0, fused=step.fused)


@OPTIMIZERS.add("adamw")
def _adamw(groups: list[dict[str, Any]], step: Step) -> optim.Optimizer:
    """Return AdamW, which is Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""
    return optim.AdamW(groups, step.lr, weight_decay=0, fused=step.fused)


@OPTIMIZERS.add("muon")
def _muon(groups: list[dict[str, Any]], step: Step) -> optim.Optimizer:
    """Return Muon, with orthogonalised momentum for matrices and kernels, and AdamW for other parameters."""
    return muon.Muon(groups, step.lr)


@OPTIMIZERS.add("sgd")
def _sgd(groups: list[dict[str, Any]], step: Step) -> optim.Optimizer:
    """Return stochastic gradient descent with the option ``momentum``."""
    return optim.SGD(groups, step.lr, momentum=step.momentum, fused=step.fused)


# The peak learning rates where none is given. A start from given weights, which are to last, takes a part of them.
RATES = {"adam": 4e-3, "adamw": 4e-3, "muon": 1e-2, "sgd": 1e-2}
FINE = 4  # the divisor

# Each takes an optimizer, the number of steps, the peak learning rate and the steps of the warm-up (or None).
Schedule = Callable[["optim.Optimizer", int, float, "int | None"], "lr_scheduler.LRScheduler"]
SCHEDULES: Registry[Schedule] = Registry("schedule", TrainingError)


@SCHEDULES.add("one-cycle")
def _one_cycle(optimizer: optim.Optimizer, steps: int, lr: float, warmup: int | None) -> lr_scheduler.LRScheduler:
    """Return a rise from a 25th of the peak, by default for 0.3 of the steps, and a fall to a 250,000th."""
    cycle_momentum = not isinstance(optimizer, optim.SGD | muon.Muon)
    if warmup is None:
        return lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=cycle_momentum)
    rising = max(0.0, warmup - 1e-9)  # a rise of exactly one step is divided by its length less one, which is 0
    return lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=rising / steps, cycle_momentum=cycle_momentum
    )


@SCHEDULES.add("cosine")
def _cosine(optimizer: optim.Optimizer, steps: int, lr: float, warmup: int | None) -> lr_scheduler.LRScheduler:
    """Return a straight rise in the warm-up steps, by default none, and a fall to 0 along a cosine."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: rate("cosine", step, steps, warmup or 0))


@SCHEDULES.add("constant")
def _constant(optimizer: optim.Optimizer, steps: int, lr: float, warmup: int | None) -> lr_scheduler.LRScheduler:
    """Return a straight rise in the warm-up steps, by default none, and then the peak."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: rate("constant", step, steps, warmup or 0))


def make_optimizer(
    model: nn.Module, name: str, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> optim.Optimizer:
    """One of `OPTIMIZERS` over the parameters that require a gradient.

    ``momentum`` is SGD's (with PyTorch's update, not Nesterov's). ``weight_decay`` shrinks tensors of more than one
    dimension alone: not biases, nor the scales of norms. It is decoupled from the gradient in ``adamw`` and ``muon``,
    and added to it in the others.

    Raises TrainingError for an unknown name, ``lr`` not positive, ``momentum`` outside [0, 1), ``weight_decay`` < 0.
    """
    OPTIMIZERS.check(name)
    _check_lr(lr)
    if not 0 <= momentum < 1:
        raise TrainingError(Message(Option("momentum"), f" must be at least 0 and less than 1, got {momentum:g}"))
    if not 0 <= weight_decay < math.inf:
        raise TrainingError(Message(Option("weight_decay"), f" must be a number of at least 0, got {weight_decay:g}"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if weight_decay:
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]
        groups = [group for group in groups if group["params"]]
    # one pass through memory for all that a step does, which on a CPU takes half the time
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return OPTIMIZERS[name](groups, Step(lr, momentum, fused))


def make_schedule(
    optimizer: optim.Optimizer, name: str, steps: int, *, lr: float, warmup: int | None = None
) -> lr_scheduler.LRScheduler:
    """One of `SCHEDULES` of peak ``lr`` over ``steps`` steps; its ``step()`` is called after each of the optimiser's.

    ``warmup`` is the number of steps in which the rate rises, the last of them at its peak: by default 0 in ``cosine``,
    which then falls to 0 after the last step, and ``constant``. These rise in a straight line. ``one-cycle`` is
    PyTorch's OneCycleLR: it rises from a 25th of the peak, by default for 0.3 of the steps, and falls to a 250,000th.
    It moves Adam's β₁ from 0.95 to 0.85 and back. SGD's momentum stays the one that was asked for: PyTorch would put
    0.85 to 0.95 in its place, and the 0.99 of Bassi et al., arXiv 2407.09788, is not that; and so does Muon's.

    Raises TrainingError for an unknown name, ``lr`` not positive, and ``warmup`` that is negative or not less than
    ``steps``.
    """
    SCHEDULES.check(name)
    _check_lr(lr)
    if warmup is not None and not 0 <= warmup < steps:
        raise TrainingError(
            Message(
                Option("warmup"), f" must be at least 0 and less than the {steps} steps of the training, got {warmup}"
            )
        )
    return SCHEDULES[name](optimizer, steps, lr, warmup)


def rate(name: str, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step, counted from 0, in ``cosine`` or ``constant``: a part of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    return (1 + math.cos(math.pi * min(1, (step - warmup) / (steps - warmup)))) / 2


def make_ema(model: nn.Module, decay: float) -> swa_utils.AveragedModel:
    """The exponential moving average of the model's weights; call ``update_parameters(model)`` after each step.

    The first update copies the weights, each later one leaves ``decay`` of the average and takes 1 − ``decay`` of the
    model's. Buffers, such as the running statistics of norms, are the model's own of the last update, copied. The
    averaged model is ``.module``, of the type of ``model`` (which is bare, not wrapped for several processes).

    Raises TrainingError for a ``decay`` that is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise TrainingError(Message(Option("ema"), f" must be more than 0 and less than 1, got {decay:g}"))
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))


def is_moment(step: int, steps: int, count: int) -> bool:
    """Whether a step, counted from 1, is one of ``count`` that are evenly spread, the last one among them."""
    return step * count // steps > (step - 1) * count // steps


def _check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise TrainingError(Message(Option("lr"), f" must be a positive number, got {lr:g}"))
