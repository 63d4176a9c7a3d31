"""In the second half of a training that matches maps, a student is in evaluation mode, and learns all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainer.loop.training
from data import make_coloured_mnist
from pipeline import RULE_SETS, bias_free, cache_explanations
from pipeline.networks.fading import fading, set_remaining
from pipeline.relevance import Trace
from trainer import DistillationLoss, ExplainedDataset, build_student, train_student, train_teacher

CLASSES, EPSILON = torch.tensor([0, 3, 1, 2, 3, 0]), torch.linspace(0.05, 0.5, 6).double()


def network() -> nn.Module:
    """With norms behind a convolution, a linear layer and neither, with and without γ, β and running statistics."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
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


def trained(kind: str) -> nn.Module:
    """In double precision, with parameters that matter and statistics of other images than those of the tests."""
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data.uniform_(*((-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)))
    for seed in range(3):
        model.train()(images(seed, 2.0))
    return model


class Checkpointed(nn.Module):
    """The layers of a sequence, of which all but the last are recomputed in each backward pass."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.layers[:-1], x, use_reentrant=False)
        return self.layers[-1](x)


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_block_is_the_same_and_updates_the_statistics_once(kind, rules):
    model, again = trained(kind), Checkpointed(trained(kind))
    for each in (model, again):
        trace = Trace(each, images(7), rules)
        maps = trace.heatmaps(CLASSES, EPSILON, create_graph=True)
        (maps.sin().sum() + trace.logits.square().sum()).backward()
    counts = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]  # by PyTorch's own modules
    for state in (found := again.layers.state_dict(), expected := model.state_dict()):
        for name in counts:
            del state[name]
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


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
    """Note in which steps the network is in training mode."""
    noted: list[bool] = []
    passes = trainer.loop.training.forward_backward

    def noting(model: nn.Module, *args: Any) -> Any:
        noted.append(model.training)
        return passes(model, *args)

    monkeypatch.setattr(trainer.loop.training, "forward_backward", noting)
    return noted


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True] * 3 + [False] * 2),
        ({"loss": "lrp=1,output=0.1"}, [True] * 3 + [False] * 2),
        ({"method": "output"}, [True] * 5),
        ({"method": "erm"}, [True] * 5),
    ],
    ids=["lrp", "lrp and outputs", "output", "erm"],
)
def test_training_mode_ends_in_the_middle_of_a_training_that_matches_heatmaps(
    folder, tmp_path, monkeypatch, options, expected
):
    noted = modes_of(monkeypatch)
    cache = None if options == {"method": "erm"} else folder / "train.zarr"
    validation = {} if cache is None else {"validation_cache": folder / "validation.zarr"}
    train_student(folder / "d.zarr", cache, tmp_path / "s", steps=5, **validation, **options, **OPTIONS)
    assert noted == expected, "a validation gives the modes back"


def test_a_resumed_training_has_the_modes_of_the_whole_one(folder, tmp_path, monkeypatch):
    paths = folder / "d.zarr", folder / "train.zarr"
    train_student(*paths, tmp_path / "whole", steps=8, **OPTIONS)
    step = trainer.loop.training.step
    for stop in (4, 6):  # before the step in which training mode ends, and behind it

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


def test_in_a_loop_of_ones_own_a_student_in_evaluation_mode_learns(folder):
    network, loss = build_student(folder / "train.zarr", student()).eval(), DistillationLoss(folder / "train.zarr")
    samples = ExplainedDataset(folder / "d.zarr", folder / "train.zarr")
    batch = torch.utils.data.default_collate([samples[number] for number in range(16)])
    statistics = network[1].running_mean.clone()
    loss(network, batch).backward()
    assert network[0].weight.grad.abs().max() > 0
    assert torch.equal(network[1].running_mean, statistics)
