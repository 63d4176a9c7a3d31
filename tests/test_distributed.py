"""What a training loop may rely on between its processes, and what happens when one of them is lost."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ranks as job
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline import ModelError, explain, synchronise_batch_norm
from trainer.errors import TrainingError
from trainer.loop import distributed
from trainer.loop.distributed import LostProcess, Ranks, connect, device_of, ranks_of

RANKS = 3


def gradients(rank: int) -> list[Tensor | None]:
    """Of one process: several types and layouts; one that only process 1 has, one that nobody has, and a frozen one."""
    torch.manual_seed(rank)
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    only_one = torch.randn(3) if rank == 1 else None
    return [torch.randn(5, 2), torch.randn(3).double(), image, only_one, None, torch.randn(()), torch.randn(7, 9)]


def parameters(rank: int) -> list[nn.Parameter]:
    given = gradients(rank)
    made = []
    for mine, shaped in zip(given, gradients(1), strict=True):
        made.append(nn.Parameter(torch.zeros(4) if shaped is None else torch.zeros_like(shaped)))
        made[-1].grad = mine
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    frozen.grad = torch.full((2,), float(rank))
    return [*made, frozen]


def assert_averaged(rank: int) -> None:
    mine = parameters(rank)
    everyones = [gradients(r) for r in range(RANKS)]
    layouts = [None if p.grad is None else p.grad.stride() for p in mine]
    RANK.average_gradients(iter(mine))
    for number, parameter in enumerate(mine[:-1]):
        every = [given[number] for given in everyones]
        if all(each is None for each in every):
            assert parameter.grad is None
            continue
        mean = sum(torch.zeros_like(parameter) if each is None else each for each in every) / RANKS
        torch.testing.assert_close(parameter.grad, mean)
        assert layouts[number] in (None, parameter.grad.stride())
    assert torch.equal(mine[-1].grad, torch.full((2,), float(rank)))


RANK = Ranks()  # in a process of a job, its own


def _conversation(bucket: int) -> None:
    global RANK
    distributed.BUCKET = bucket
    with connect("auto" if not torch.cuda.is_available() else "cpu") as (RANK, device):
        rank = int(os.environ["RANK"])
        assert (RANK.rank, RANK.ranks, RANK.local_rank, RANK.main) == (rank, RANKS, rank, rank == 0)
        assert device == "cpu"
        assert_averaged(rank)
        value = torch.tensor([[rank, 1.0]], requires_grad=True)
        mean = RANK.mean(value)
        assert mean.tolist() == [[1, 1]]
        assert not mean.requires_grad
        assert value.tolist() == [[rank, 1]]
        assert [RANK.agree(rank == who) for who in (0, 1, 2, 3)] == [True, True, True, False]
        assert RANK.share({"from": Path("checkpoint"), "rank": rank}) == {"from": Path("checkpoint"), "rank": 0}
        assert RANK.share(None if rank == 0 else "not looked at") is None
        assert RANK.gather(("rank", rank)) == [("rank", 0), ("rank", 1), ("rank", 2)]
        RANK.wait()
    assert not dist.is_initialized()


@pytest.mark.parametrize("bucket", [1, 64, distributed.BUCKET])
def test_processes_average_agree_share_and_gather(bucket):
    assert job.run(RANKS, _conversation, bucket) == [0] * RANKS


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)]
    model = nn.Sequential(*layers).train()
    synchronise_batch_norm(model)
    return model


def _step(ranks: Ranks, model: nn.Module, between: Any = lambda: None) -> None:
    images = torch.rand(2, 3, 8, 8)
    _, heatmaps = explain(model, images, torch.tensor([0, 1]), 0.1, create_graph=True)
    between()
    heatmaps.square().sum().backward()
    ranks.average_gradients(model.parameters())


def _killed(moment: str) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with connect("cpu") as (ranks, _):
        model = _model()
        _step(ranks, model)
        victim = ranks.rank == 1
        if moment == "forward":
            with pytest.raises(
                LostProcess, match=r"^another process of this job ended .*: see the error of that process"
            ):
                die() if victim else _step(ranks, model)
        elif moment == "backward":
            reached = []
            with pytest.raises(LostProcess):
                _step(ranks, model, die if victim else lambda: reached.append("backward"))
            assert reached == ["backward"]
        else:
            operations = {
                "average": lambda: ranks.average_gradients(model.parameters()),
                "mean": lambda: ranks.mean(torch.ones(2)),
                "agree": lambda: ranks.agree(True),
                "share": lambda: ranks.share("value"),
                "gather": lambda: ranks.gather("value"),
                "wait": ranks.wait,
            }
            if victim:
                die()
            for name in [moment, *operations]:  # those that come later do not hang either
                with pytest.raises(LostProcess):
                    operations[name]()


@pytest.mark.parametrize("moment", ["forward", "backward", "average", "mean", "agree", "share", "gather", "wait"])
def test_a_process_that_is_killed_leaves_the_others_with_a_clear_error_at_any_moment(moment):
    assert job.run(RANKS, _killed, moment) == [0, -signal.SIGKILL, 0]


def _mistaken() -> None:
    with connect("cpu") as (ranks, _):
        model = _model()
        with pytest.raises(ValueError, match="outside the model's 10 classes"):
            explain(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 10]), 0.1)
        with pytest.raises(RuntimeError) as caught:  # in all processes, in a norm's own pass: shapes that do not fit
            model(torch.rand(2, 3, 9, 8)).sum().backward()
        assert not isinstance(caught.value, LostProcess)
        ranks.wait()
    assert not dist.is_initialized()


def test_a_mistake_within_a_step_stays_what_it_is():
    assert job.run(2, _mistaken) == [0, 0]


def _one_gives_up() -> None:
    def steps() -> None:
        with connect("cpu") as (ranks, _):
            model = _model()
            _step(ranks, model)
            _step(ranks, model, lambda: 1 / 0 if ranks.rank == 1 else None)

    with pytest.raises(ZeroDivisionError if os.environ["RANK"] == "1" else LostProcess):
        steps()
    assert not dist.is_initialized()


def test_a_process_that_fails_leaves_the_others_with_lost_process():
    assert job.run(RANKS, _one_gives_up) == [0] * RANKS


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}])
def test_one_process_needs_no_other_and_no_torch_distributed(alone, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with connect("cuda:3") as (ranks, device):
        assert ranks == Ranks()
        assert ranks.main
        assert device == "cuda:3"
        assert not dist.is_initialized()
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        ranks.average_gradients([parameter])
        assert parameter.grad.tolist() == [1, 1]
        assert ranks.mean(torch.tensor(2.0)) == 2
        assert [ranks.agree(True), ranks.agree(False), ranks.share("x"), ranks.gather("x")] == [True, False, "x", ["x"]]
        ranks.wait()


MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "1"}, "has RANK=1, but not WORLD_SIZE and LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but not RANK and LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEET}, "LOCAL_RANK=1"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", **MEET}, "WORLD_SIZE=two.* whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_an_environment_that_cannot_be_right_is_refused_with_its_values(variables, told):
    with pytest.raises(TrainingError, match=f"{told}.*torchrun"):
        ranks_of(variables)


@given(ranks=st.integers(1, 9), data=st.data())
def test_what_torchrun_sets_is_understood(ranks, data):
    rank = data.draw(st.integers(0, ranks - 1))
    local = data.draw(st.integers(0, rank))
    variables = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local), **MEET}
    assert ranks_of(variables) == Ranks(rank, ranks, local)


def test_each_of_many_processes_has_a_gpu_of_its_own_or_none_has_one():
    second = Ranks(5, 8, 1)
    assert [device_of(second, name, gpus=4) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert device_of(second, "auto", gpus=0) == "cpu"
    with pytest.raises(ModelError, match="'cuda:3' cannot be that of each of 8 processes"):
        device_of(second, "cuda:3", gpus=4)
    with pytest.raises(ModelError, match="process 1 of this machine has no GPU, as there are 1"):
        device_of(second, "auto", gpus=1)
    with pytest.raises(ModelError, match="as there are 0"):
        device_of(second, "cuda", gpus=0)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.float32, torch.float64]))), st.integers(1, 100))
@settings(max_examples=50)
def test_buckets_hold_every_gradient_once_in_order_and_are_as_few_as_their_size_allows(shapes, limit):
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "BUCKET", limit)
        buckets = distributed._buckets(tensors)
    flat = [tensor for bucket in buckets for tensor in bucket]
    assert len(flat) == len(tensors)
    assert all(mine is theirs for mine, theirs in zip(flat, tensors, strict=True))
    for bucket in buckets:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= limit
    for bucket, following in pairwise(buckets):
        joined = sum(tensor.nbytes for tensor in [*bucket, following[0]])
        assert bucket[0].dtype != following[0].dtype or joined > limit
