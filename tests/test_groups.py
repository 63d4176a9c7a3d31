"""What group DRO promises: the shares of algorithm 1 of Sagawa et al., and that the worst group comes to count most."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DatasetError, DatasetWriter, open_dataset
from trainer import train_student
from trainer.loop.distributed import Ranks
from trainer.loop.groups import STEP_SIZE, GroupWeights, groups_of

CPU = torch.device("cpu")


def dataset_of(path: Path, labels: list[int], groups: list[int] | None) -> Path:
    with DatasetWriter(path) as writer:
        images = np.zeros((len(labels), 3, 8, 8), np.uint8)
        given = {} if groups is None else {"groups": np.array(groups)}
        writer.write_split("train", images=images, labels=np.array(labels), **given)
        writer.finish(class_names=["a", "b"])
    return path


def test_a_group_is_a_class_and_a_value_of_the_bias_attribute_that_occur_together(tmp_path):
    split = open_dataset(dataset_of(tmp_path / "d", [0, 1, 0, 1, 1], [7, 7, 3, 7, 9])).split("train")
    groups, number = groups_of(split)
    assert number == 4
    assert groups.tolist() == [1, 2, 0, 2, 3]


def test_a_split_without_groups_is_refused(tmp_path):
    path = dataset_of(tmp_path / "d", [0, 1], None)
    with pytest.raises(DatasetError, match="has no 'groups'"):
        train_student(path, None, tmp_path / "s", method="group-dro")
    assert not (tmp_path / "s").exists()


def test_the_mean_weighted_loss_is_the_sum_of_shares_times_mean_losses_of_groups():
    weights = GroupWeights(3, CPU, Ranks())
    groups, losses = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([1.0, 2.0, 6.0, 5.0, 0.5, 0.1])
    shares = [1 / 3] * 3
    for _ in range(3):
        means = [3.0, 5.0, 0.3]
        found = (weights.of_samples(groups) * losses).mean()
        assert float(found) == pytest.approx(sum(q * mean for q, mean in zip(shares, means, strict=True)), rel=1e-5)
        weights.update(groups, losses)
        shares = [q * math.exp(STEP_SIZE * mean) for q, mean in zip(shares, means, strict=True)]
        shares = [q / sum(shares) for q in shares]


def test_a_group_that_a_batch_does_not_have_keeps_its_weight_beside_the_others():
    weights = GroupWeights(3, CPU, Ranks())
    weights.update(torch.tensor([0, 1]), torch.tensor([2.0, 2.0]))
    shares = weights.state_dict()["shares"]
    assert shares[0] == shares[1] > shares[2] > 0
    assert float(shares.sum()) == pytest.approx(1)


def test_shares_survive_a_checkpoint():
    first, second = (GroupWeights(2, CPU, Ranks()) for _ in range(2))
    first.update(torch.tensor([0, 1]), torch.tensor([4.0, 1.0]))
    second.load_state_dict(first.state_dict())
    groups = torch.tensor([0, 1, 1])
    assert torch.equal(first.of_samples(groups), second.of_samples(groups))
