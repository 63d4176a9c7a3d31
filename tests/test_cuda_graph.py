"""A step recorded as a CUDA graph does what the step itself does."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer import evaluate, train_student, train_teacher
from trainer.loop.cuda_graph import WARMUP, Recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are of CUDA")
STEPS = WARMUP + 4


def losses_and_gradients(passes, model, batches):
    found = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        losses = passes(batch)["loss"]
        found.append((losses, *[parameter.grad.clone() for parameter in model.parameters()]))
        model.zero_grad()
    return found


@pytest.fixture
def learner():
    """A network with random numbers and its passes, and batches of two sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 3)).cuda()

    def passes(batch):
        losses = F.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")
        losses.mean().backward()
        return {"loss": losses.detach()}

    sizes = [8] * STEPS + [5, 8]
    batches = [{"images": torch.randn(n, 6).cuda(), "labels": torch.randint(3, (n,)).cuda()} for n in sizes]
    return model, passes, batches


def test_replays_have_the_losses_gradients_and_random_numbers_of_the_passes(learner):
    model, passes, batches = learner
    recorded = Recorded(passes, list(model.parameters()))
    torch.testing.assert_close(
        losses_and_gradients(recorded, model, batches), losses_and_gradients(passes, model, batches)
    )
    assert recorded._graph is not None


def test_passes_that_wait_for_a_number_are_run_as_they_are_and_it_is_said(learner, caplog):
    model, passes, batches = learner

    def waiting(batch):
        return passes(batch) if batch["images"].sum().item() else {}

    recorded = Recorded(waiting, list(model.parameters()))
    with caplog.at_level(logging.WARNING):
        found = losses_and_gradients(recorded, model, batches)
    torch.testing.assert_close(found, losses_and_gradients(passes, model, batches))
    assert recorded._graph is None
    assert "cannot be recorded as a CUDA graph" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arch": "resnet18", "precision": "bfloat16"},
        {"arch": "resnet18", "loss": "lrp=1,output=0.1", "optimizer": "muon", "ema": 0.9},
        {"method": "complete-lrp", "accumulate": 2},
        {"augment": ("shift",)},
        {"arch": "convnext_tiny"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "lrp",
)
def test_a_student_learns_the_same_from_replays(dataset, cache, tmp_path, options, caplog):
    found = {}
    for graph in (False, True):
        out = tmp_path / str(graph)
        # of momentum alone, as Adam makes much of gradients that are rounding
        given = {"optimizer": "sgd", "lr": 1e-2, "precision": "float32", **options}
        train_student(dataset, cache, out, steps=STEPS, batch_size=32, log_steps=1, cuda_graph=graph, **given)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[graph] = [line["loss"] for line in lines if "loss" in line]
    assert "cannot be recorded" not in caplog.text
    assert found[True] == pytest.approx(found[False], rel=2e-2)


def test_a_teacher_learns_from_replays(dataset, tmp_path, caplog):
    train_teacher(dataset, tmp_path / "t", steps=60, batch_size=64, cuda_graph=True)
    assert "cannot be recorded" not in caplog.text
    assert evaluate(dataset, tmp_path / "t")["splits"]["ood"]["accuracy"] > 50
