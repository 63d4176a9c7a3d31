"""What settling promises: in the second half of a training, a student learns what it will compute in evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainer.loop.training
from data import make_coloured_mnist
from pipeline import RULE_SETS, bias_free, cache_explanations, settle
from pipeline.networks.fading import fading, set_remaining
from pipeline.networks.modes import is_settled
from pipeline.networks.trials import evaluating
from pipeline.relevance import Trace
from trainer import DistillationLoss, ExplainedDataset, TrainingError, build_student, train_student, train_teacher

CLASSES, EPSILON = torch.tensor([0, 3, 1, 2, 3, 0]), torch.linspace(0.05, 0.5, 6).double()


def network() -> nn.Module:
    """With norms behind a convolution, a linear layer and neither, with and without γ, β and running statistics."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


def faded() -> nn.Module:
    model = fading(network())
    set_remaining(model, 0.4)
    return model


KINDS = {"batch norms": network, "scale-only norms": lambda: bias_free(network())[0], "fading norms": faded}


def images(seed: int, factor: float = 1.0) -> Tensor:
    return factor * torch.rand(6, 3, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def settled(kind: str) -> nn.Module:
    """In double precision, with parameters that matter and statistics of other images than those of the tests."""
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data.uniform_(*((-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)))
    for seed in range(3):
        model.train()(images(seed, 2.0))
    settle(model)
    return model


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_settled_pass_computes_what_an_evaluation_does_and_updates_the_statistics(kind, rules):
    model = settled(kind)
    first = copy.deepcopy(model[0])
    trace = Trace(model, images(7), rules, renormalise=True)
    with torch.no_grad():
        first(images(7))  # updates the statistics
    torch.testing.assert_close(model[0].state_dict(), first.state_dict())
    expected = Trace(copy.deepcopy(model).eval(), images(7), rules)
    torch.testing.assert_close(trace.logits, expected.logits)
    maps = trace.heatmaps(CLASSES, EPSILON, create_graph=True)
    torch.testing.assert_close(maps, expected.heatmaps(CLASSES, EPSILON, create_graph=True))
    assert maps.abs().max() > 0


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_pass_through_the_statistics_of_the_batch(kind, rules):
    """They are those of a pass by the batch's statistics whose γ and β were changed: γ·r and β + γ·d (Ioffe, 2017)."""
    model = settled(kind)
    twin = copy.deepcopy(model)
    factors = corrections(twin)
    for name, (r, d) in factors.items():
        norm = twin.get_submodule(name)
        if norm.weight is None:
            norm.weight, norm.bias = nn.Parameter(torch.ones_like(r)), nn.Parameter(torch.zeros_like(r))
        if getattr(norm, "bias", None) is not None:
            norm.bias.data += norm.weight * d
        norm.weight.data *= r
    for each, renormalise in ((model, True), (twin, False)):
        trace = Trace(each, images(7), rules, renormalise=renormalise)
        maps = trace.heatmaps(CLASSES, EPSILON, create_graph=True)
        (maps.sin().sum() + trace.logits.square().sum()).backward()
    for name, value in model.named_parameters():
        expected = twin.get_parameter(name).grad
        layer, _, kind_of = name.rpartition(".")
        if layer in factors and kind_of == "weight":
            r, d = factors[layer]
            norm = twin.get_submodule(layer)
            expected = expected * r + (d * norm.bias.grad if getattr(norm, "bias", None) is not None else 0)
        torch.testing.assert_close(value.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


def corrections(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return r and d of each norm, from what enters it in an evaluation with the updated statistics."""
    model, found = copy.deepcopy(model), {}
    _ = Trace(model, images(7), renormalise=True)

    def of_norm(norm: Any, inputs: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        x = inputs[0].transpose(0, 1).flatten(1)
        if hasattr(norm, "running_var"):
            mean, second, running = norm.running_mean, x.var(1, correction=0), norm.running_var
        else:
            mean, running = getattr(norm, "running_mean", x.mean(1)), norm.running_second_moment
            share = getattr(norm, "remaining", torch.zeros(()))
            second = (x - share * x.mean(1, keepdim=True)).square().mean(1)
        inverse = (running + norm.eps).rsqrt()
        return (second + norm.eps).sqrt() * inverse, (x.mean(1) - mean) * inverse

    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(lambda norm, x, name=name: found.update({name: of_norm(norm, x)}))
    with torch.no_grad():
        model.eval()(images(7))
    return found


class Checkpointed(nn.Module):
    """The layers of a sequence, of which all but the last are recomputed in each backward pass."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.layers[:-1], x, use_reentrant=False)
        return self.layers[-1](x)


@pytest.mark.parametrize("renormalise", [False, True], ids=["batch", "running"])
@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_block_is_the_same_and_updates_the_statistics_once(kind, rules, renormalise):
    model, again = settled(kind), Checkpointed(settled(kind))
    for each in (model, again):
        trace = Trace(each, images(7), rules, renormalise=renormalise)
        maps = trace.heatmaps(CLASSES, EPSILON, create_graph=True)
        (maps.sin().sum() + trace.logits.square().sum()).backward()
    counts = [
        name for name in model.state_dict() if name.endswith("num_batches_tracked")
    ]  # PyTorch's own modules count
    for state in (found := again.layers.state_dict(), expected := model.state_dict()):
        for name in counts:
            del state[name]
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_without_settling_a_pass_is_as_it_was(kind):
    model, twin = settled(kind), settled(kind)
    one, other = (Trace(each.eval(), images(7), renormalise=flag) for each, flag in ((model, True), (twin, False)))
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_norm_without_running_statistics_and_a_batch_of_one_value_are_treated_as_ever():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    one, other = (Trace(model, torch.eye(4).reshape(4, 1, 2, 2), renormalise=flag).logits for flag in (True, False))
    torch.testing.assert_close(one, other)
    norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Trace(nn.Sequential(nn.Flatten(), norm), torch.rand(1, 1, 2, 2), renormalise=True)
    assert torch.equal(norm.running_mean, torch.zeros(4))


def test_modes():
    model = network()
    assert not is_settled(model)
    settle(model)
    assert is_settled(model)
    assert [name for name, module in model.named_modules() if module.training] == ["0", "2", "6", "11"]
    modes = {module: module.training for module in model.modules()}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert modes == {module: module.training for module in model.modules()}
    assert not is_settled(model.train())
    assert not is_settled(model.eval())
    settle(model)
    assert not is_settled(model), "norms that were in evaluation mode stay there, as those of a frozen backbone"


# --- trainings --------------------------------------------------------------------------------------------------------


def student(num_classes: int = 10) -> nn.Module:
    """With batch norms and a dropout, for --student-factory."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(288, num_classes),
    )


STUDENT = f"{__name__}:student"
OPTIONS: dict[str, Any] = {"batch_size": 16, "device": "cpu", "student_factory": STUDENT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("settling")
    make_coloured_mnist(path / "d.zarr", limit=64)
    train_teacher(path / "d.zarr", path / "t", steps=2, batch_size=16)
    for split in ("train", "validation"):
        cache_explanations(path / "d.zarr", path / "t", path / f"{split}.zarr", split=split, draws=1)
    return path


def modes_of(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note in which steps the network is settled."""
    noted: list[bool] = []
    passes = trainer.loop.training.forward_backward

    def noting(model: nn.Module, *args: Any) -> Any:
        noted.append(is_settled(model))
        return passes(model, *args)

    monkeypatch.setattr(trainer.loop.training, "forward_backward", noting)
    return noted


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [False] * 3 + [True] * 2),
        ({"loss": "lrp=1,output=0.1"}, [False] * 3 + [True] * 2),
        ({"method": "output"}, [False] * 5),
        ({"method": "erm"}, [False] * 5),
    ],
    ids=["lrp", "lrp and outputs", "output", "erm"],
)
def test_a_training_that_matches_heatmaps_settles_in_the_middle(folder, tmp_path, monkeypatch, options, expected):
    noted = modes_of(monkeypatch)
    cache = None if options == {"method": "erm"} else folder / "train.zarr"
    validation = {} if cache is None else {"validation_cache": folder / "validation.zarr"}
    train_student(folder / "d.zarr", cache, tmp_path / "s", steps=5, **validation, **options, **OPTIONS)
    assert noted == expected, "a validation gives the modes back"


def test_a_resumed_training_is_settled_where_the_whole_one_is(folder, tmp_path, monkeypatch):
    paths = folder / "d.zarr", folder / "train.zarr"
    train_student(*paths, tmp_path / "whole", steps=8, **OPTIONS)
    step = trainer.loop.training.step
    for stop in (4, 6):  # before the step in which it settles, and behind it

        def stopped(state, loop, stop=stop):
            if state.progress["step"] == stop:
                raise KeyboardInterrupt
            return step(state, loop)

        monkeypatch.setattr(trainer.loop.training, "step", stopped)
        cut = tmp_path / f"cut-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train_student(*paths, cut, steps=8, checkpoint_steps=1, **OPTIONS)
        monkeypatch.setattr(trainer.loop.training, "step", step)
        train_student(*paths, cut, steps=8, checkpoint_steps=1, **OPTIONS)
        one, other = (torch.load(run / "weights.pt", weights_only=True) for run in (tmp_path / "whole", cut))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_loss_of_a_settled_student_in_a_loop_of_ones_own_is_that_of_an_evaluation(folder):
    network, loss = build_student(folder / "train.zarr", student()), DistillationLoss(folder / "train.zarr")
    samples = ExplainedDataset(folder / "d.zarr", folder / "train.zarr")
    batch = torch.utils.data.default_collate([samples[number] for number in range(16)])
    network.train()
    loss(network, batch).backward()
    settle(network)
    found = loss(network, batch)
    found.backward()
    assert is_settled(network)
    with torch.no_grad():
        assert float(found.detach()) == pytest.approx(float(loss(network.eval(), batch)), rel=1e-5)
    settle(network.train())
    with torch.no_grad(), pytest.raises(TrainingError, match="gradients are off"):
        loss(network, batch)
