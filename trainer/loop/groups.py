"""Group distributionally robust optimisation: which groups count for how much (Sagawa et al., ICLR 2020).

Not here: the loss that is weighted (`methods.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import DatasetError, Split
from trainer.loop.distributed import Ranks

STEP_SIZE = 0.01  # η_q of algorithm 1


def groups_of(split: Split) -> tuple[np.ndarray, int]:
    """The group of each sample, int64 (N,), and their number. A group is a class and a value of the bias attribute.

    Raises DatasetError for a split without ``groups``.
    """
    if split.groups is None:
        raise DatasetError(
            f"the split '{split.name}' has no 'groups', and --method group-dro weighs them: add them to the dataset, "
            "or choose another method"
        )
    pairs = np.stack([np.asarray(split.labels[:]), np.asarray(split.groups[:])]).astype(np.int64)
    found, group = np.unique(pairs, axis=1, return_inverse=True)
    return group.reshape(-1).astype(np.int64), found.shape[1]


class GroupWeights:
    """q, (G,), the share of the loss that each group has; exponentiated gradient ascent makes it that of the worst.

    A step is weighted by the shares that the steps before it have left. It is the same on all processes.
    """

    def __init__(self, groups: int, device: torch.device, ranks: Ranks):
        self._shares, self._ranks = torch.full((groups,), 1 / groups, device=device), ranks

    def of_samples(self, groups: Tensor) -> Tensor:
        """Factors (n,) by which the mean over samples (of all processes) becomes Σ_g q_g · the mean over group g."""
        counts = self._sum(torch.bincount(groups, minlength=len(self._shares)).float())
        return (self._shares * counts.sum() / counts.clamp_min(1))[groups]

    def update(self, groups: Tensor, losses: Tensor) -> None:
        """After a step, by the losses (n,) of this process's samples, unweighted."""
        totals = torch.zeros_like(self._shares).index_add_(0, groups, losses.to(self._shares))
        counts = torch.bincount(groups, minlength=len(self._shares)).to(totals)
        totals, counts = self._sum(torch.stack([totals, counts]))
        means = totals / counts.clamp_min(1)
        self._shares = (self._shares.log() + STEP_SIZE * means).softmax(0)

    def _sum(self, values: Tensor) -> Tensor:
        return self._ranks.mean(values) * self._ranks.ranks

    def state_dict(self) -> dict[str, Tensor]:
        return {"shares": self._shares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._shares = state["shares"].to(self._shares)
