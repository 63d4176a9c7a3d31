"""What norms synchronised over processes promise: many processes learn what one with all their samples does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks as job
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pipeline import ModelError, ScaleNorm, Trace, bias_free, explain, synchronise_batch_norm
from pipeline.networks.fading import fading, set_remaining
from pipeline.rules.batch_norm import moments
from trainer import heatmap_loss
from trainer.loop.distributed import Ranks, connect

SAMPLES = 6
EVEN = {1: [6], 2: [3, 3], 3: [2, 2, 2]}
UNEVEN = {1: [6], 2: [5, 1], 3: [3, 1, 2]}
ONE_WITHOUT = {1: [6], 2: [6, 0], 3: [2, 4, 0]}
COUNTS = [2, 3]  # of processes


def batch_norms() -> nn.Module:
    """Behind a convolution and not, with and without parameters, running statistics and a momentum, over 1×1 too."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 10),
    )


def scale_norms() -> nn.Module:
    return bias_free(batch_norms())[0]


def fading_norms() -> nn.Module:
    model = fading(batch_norms())
    set_remaining(model, 0.4)
    return model


NORMS = (batch_norms, scale_norms, fading_norms)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """In double precision, with parameters and statistics that matter."""
    torch.manual_seed(0)
    model = make().double().train()
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data.uniform_(*((-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)))
    return model


def batch(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, classes, an ε for each image, and a teacher's maps."""
    torch.manual_seed(1)
    images = torch.rand(SAMPLES, 3, side, side).double()
    epsilon = torch.linspace(0.05, 0.5, SAMPLES).double()
    return images, torch.arange(SAMPLES), epsilon, torch.randn(SAMPLES, 3, side, side).double()


Results = dict[str, Any]


def training(
    ranks: Ranks,
    make: Any,
    shares: Any = EVEN,
    rules: str | None = "flex",
    side: int = 8,
    without: int = 0,
) -> Results:
    """Three steps of SGD on heatmaps and labels; ``rules`` None: on labels alone. ``without`` images have ε = 0."""
    model = filled(make)
    synchronise_batch_norm(model)
    images, classes, epsilon, teacher = batch(side)
    epsilon[:without] = 0
    sizes = shares[ranks.ranks]
    mine = slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
    sgd = torch.optim.SGD(model.parameters(), 1e-3)
    found: Results = {}
    for step in range(3):
        sgd.zero_grad()
        outputs: Results = {}
        if rules is None:
            logits = outputs["logits"] = model(images[mine])
            loss = F.cross_entropy(logits, classes[mine], reduction="sum")
        else:
            trace = Trace(model, images[mine], rules)
            logits, maps = trace.logits, trace.heatmaps(classes[mine], epsilon[mine], create_graph=True)
            outputs = {"logits": logits, "maps": maps}
            loss = F.cross_entropy(logits, classes[mine], reduction="sum") + heatmap_loss(maps, teacher[mine]).sum()
        # with equal shares the mean over the samples of this process
        loss = loss * ranks.ranks / SAMPLES
        loss.backward()
        ranks.average_gradients(model.parameters())
        if step == 0:
            found = outputs | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
            found = {name: value.detach().clone() for name, value in found.items()}
        sgd.step()
    return found | model.state_dict()


def second_derivative(ranks: Ranks, make: Any) -> Results:
    """Of the logits twice by PyTorch, with no relevance: ‖gradient‖² of the mean loss by the parameters."""
    model = filled(make)
    synchronise_batch_norm(model)
    images, classes, *_ = batch(8)
    share = SAMPLES // ranks.ranks
    mine = images[share * ranks.rank : share * (ranks.rank + 1)].requires_grad_()
    labels = classes[share * ranks.rank : share * (ranks.rank + 1)]
    loss = F.cross_entropy(model(mine), labels, reduction="sum") + 0.1 * model(mine).square().sum()
    (at_images,) = torch.autograd.grad(loss, mine, create_graph=True)
    (at_images.square().sum() * ranks.ranks).backward()
    ranks.average_gradients(model.parameters())
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"at the images": at_images.detach(), **gradients}


def collectives(ranks: Ranks, make: Any) -> Results:
    """How many operations of the norms a forward pass takes, its relevance, the way back, and an evaluation."""
    model = filled(make)
    synchronise_batch_norm(model)
    images, classes, epsilon, _ = batch(8)
    counted: list[int] = []
    all_reduce = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    try:
        counted.append(0)
        logits, maps = explain(model, images, classes, epsilon, create_graph=True)
        counted.append(0)
        (maps.square().sum() + logits.square().sum()).backward()
        counted.append(0)
        explain(model.eval(), images, classes, epsilon, create_graph=True)[1].square().sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return {"collectives": torch.tensor(counted)}


def statistics(ranks: Ranks) -> Results:
    """Of a channel whose values are far from 0 for their spread, in float32; the processes' means differ."""
    values = 1e3 + 1e-2 * torch.randn(12, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[: 12 // ranks.ranks] += 4e-2
    model = nn.BatchNorm1d(1, eps=0.0, momentum=1.0).train()
    synchronise_batch_norm(model)
    share = 12 // ranks.ranks
    model(values[share * ranks.rank : share * (ranks.rank + 1)].float())
    return {"variance": model.running_var, "expected": values.float().double().var((0, 2))}


CASES: dict[str, Callable[[Ranks], Results]] = {
    f"{make.__name__}, {rules}": partial(training, make=make, rules=rules)
    for make in NORMS
    for rules in ("flex", "cp-lrp", "gradient-x-input", "epsilon-plus", "gamma", None)
}
# the relevance of the first process then goes through other nodes than that of the others, in all branches
CASES["resnet, ε of 0 in one process"] = partial(training, make=resnet, side=28, without=3)
for make in NORMS:
    name = make.__name__
    CASES |= {
        f"{name}, uneven shares": partial(training, make=make, shares=UNEVEN),
        f"{name}, uneven shares, gamma": partial(training, make=make, shares=UNEVEN, rules="gamma"),
        f"{name}, a process without samples": partial(training, make=make, shares=ONE_WITHOUT, rules=None),
        f"{name}, ε of 0 in one process": partial(training, make=make, without=3),
        f"{name}, twice differentiated": partial(second_derivative, make=make),
    }


def _all_cases(directory: str) -> None:
    with connect("cpu") as (ranks, _):
        for case, function in CASES.items():
            torch.save(function(ranks), Path(directory) / f"{case}.{ranks.rank}.pt")
        for make in NORMS:
            torch.save(collectives(ranks, make), Path(directory) / f"{make.__name__}.collectives.{ranks.rank}.pt")
        torch.save(statistics(ranks), Path(directory) / f"statistics.{ranks.rank}.pt")


@pytest.fixture(scope="module", params=COUNTS, ids=lambda count: f"{count} processes")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Results]]:
    directory = tmp_path_factory.mktemp("ranks")
    assert job.run(request.param, _all_cases, str(directory)) == [0] * request.param
    return lambda case: [torch.load(directory / f"{case}.{rank}.pt") for rank in range(request.param)]


def plain(function: Callable[[Ranks], Results], monkeypatch: pytest.MonkeyPatch) -> Results:
    """What a process alone gets with PyTorch's and the project's own norms."""
    monkeypatch.setitem(globals(), "synchronise_batch_norm", lambda model: None)
    return function(Ranks())


@pytest.mark.parametrize("case", CASES)
def test_many_processes_learn_what_one_with_all_their_samples_does(results, case, monkeypatch):
    found, expected = results(case), plain(CASES[case], monkeypatch)
    for name, value in expected.items():
        values = [each[name] for each in found]
        assert value.abs().max() > 0 or "bias" in name, f"{name}: zeros show nothing"
        if name in ("logits", "maps", "at the images"):
            values = [torch.cat(values)]
        for each in values:
            assert each.shape == value.shape
            error = (each - value).abs().max() / value.abs().max().clamp_min(1e-3)
            assert error < 1e-9, (name, float(error))
    assert all(each.keys() == expected.keys() for each in found)


def test_all_processes_hold_the_same_bits(results):
    for case in CASES:
        first, *others = results(case)
        for other in others:
            assert all(
                torch.equal(other[n], v) for n, v in first.items() if n not in ("logits", "maps", "at the images")
            )


@pytest.mark.parametrize("make", NORMS)
def test_a_norm_takes_one_operation_in_each_direction_and_none_in_evaluation(results, make):
    norms = sum("Norm" in type(module).__name__ for module in make())
    for found in results(f"{make.__name__}.collectives"):
        assert found["collectives"].tolist() == [norms, norms, 0]


def test_a_small_variance_far_from_zero_is_kept(results):
    for found in results("statistics"):
        torch.testing.assert_close(found["variance"].double(), found["expected"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("make", NORMS)
def test_alone_a_synchronised_norm_is_the_plain_one(make):
    model = filled(make)
    twin = copy.deepcopy(model)
    synchronise_batch_norm(twin)
    images, classes, epsilon, _ = batch(8)
    for each in (model, twin):
        explain(each, images, classes, epsilon, create_graph=True)[1].square().sum().backward()
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("make", [*NORMS, resnet])
def test_parameters_names_modules_and_copies_stay_as_they_were(make):
    model = filled(make)
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    synchronise_batch_norm(model)
    synchronise_batch_norm(model)  # once more changes nothing
    after = copy.deepcopy(model).state_dict()
    assert list(after) == list(tensors)
    assert all(value is tensors[name] for name, value in model.state_dict(keep_vars=True).items())
    assert dict(model.named_modules()) == modules
    filled(make).load_state_dict(after)


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def test_a_norm_that_may_do_more_is_refused_by_name_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(NormWithActivation(3), ScaleNorm(3)))
    with pytest.raises(ModelError, match=r"'1\.0' \(NormWithActivation\)"):
        synchronise_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_moments_are_those_of_the_values():
    z = torch.randn(4, 3, 5).double()
    mean, var, count = moments(z)
    torch.testing.assert_close(mean, z.mean((0, 2)))
    torch.testing.assert_close(var, z.var((0, 2), correction=0))
    assert count == 20
