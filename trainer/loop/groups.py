"""Group distributionally robust optimisation: the weights of the groups (Sagawa et al., ICLR 2020).

Not here: the loss that they weight (`methods.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import DatasetError, Split
from options import Message, Option
from trainer.loop.distributed import Ranks

STEP_SIZE = 0.01  # η_q of algorithm 1


def groups_of(split: Split) -> tuple[np.ndarray, int]:
    """Find the group of each sample. A group is a class together with a value of the bias attribute.

    Args:
        split: N samples with ``labels`` and ``groups``.

    Returns:
        The number of the group of each sample, int64 (N,), and the number of groups.

    Raises:
        DatasetError: the split has no ``groups``.
    """
    if split.groups is None:
        raise DatasetError(
            Message(
                f"the split '{split.name}' has no 'groups', which ",
                Option("method", "group-dro"),
                " needs: add them to the dataset, or choose another method",
            )
        )
    pairs = np.stack([np.asarray(split.labels[:]), np.asarray(split.groups[:])]).astype(np.int64)
    unique_pairs, group = np.unique(pairs, axis=1, return_inverse=True)
    return group.reshape(-1).astype(np.int64), unique_pairs.shape[1]


class GroupWeights:
    """The share q of the loss that each group has, (G,); exponentiated gradient ascent moves it to the worst group.

    A step is weighted by the shares after the step before. They are the same in all processes.

    Args:
        groups: the number of groups, G.
        device: where the shares are.
        ranks: the processes of the training.
    """

    def __init__(self, groups: int, device: torch.device, ranks: Ranks):
        self._shares, self._ranks = torch.full((groups,), 1 / groups, device=device), ranks

    def of_samples(self, groups: Tensor) -> Tensor:
        """Return factors (n,) that turn the mean over the samples of all processes into Σ_g q_g · the mean of group g.

        Args:
            groups: the group of each sample of this process, int64 (n,).
        """
        counts = self._sum(torch.bincount(groups, minlength=len(self._shares)).float())
        return (self._shares * counts.sum() / counts.clamp_min(1))[groups]

    def update(self, groups: Tensor, losses: Tensor) -> None:
        """Update the shares after a step.

        Args:
            groups: the group of each sample of this process, int64 (n,).
            losses: their losses without weights, (n,).
        """
        totals = torch.zeros_like(self._shares).index_add_(0, groups, losses.to(self._shares))
        counts = torch.bincount(groups, minlength=len(self._shares)).to(totals)
        totals, counts = self._sum(torch.stack([totals, counts]))
        means = totals / counts.clamp_min(1)
        self._shares = (self._shares.log() + STEP_SIZE * means).softmax(0)

    def _sum(self, values: Tensor) -> Tensor:
        return self._ranks.mean(values) * self._ranks.ranks

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shares, for a checkpoint."""
        return {"shares": self._shares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the shares of a checkpoint."""
        self._shares = state["shares"].to(self._shares)
