"""The losses of a training as it runs: their means for the log, and when to stop because the numbers are wrong.

Looked at every so many steps, as a look at a number on a GPU waits for all that was asked of it before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import TrainingError
from trainer.loop.distributed import Ranks
from trainer.run_dir import RunDir

EXPLODED = 1000.0  # times the first loss
NAMED = 8  # samples in an error


@dataclass(frozen=True)
class Step:
    """``losses``: of each method, mean over this process's samples, (T,); ``of_samples``: their weighted sum, (n,)."""

    number: int
    losses: Tensor
    of_samples: Tensor
    samples: Tensor
    gradient_norm: Tensor


class Watch:
    """Keeps the ``first`` loss, and the latest ``loss`` that was looked at, in the training's progress."""

    def __init__(self, ranks: Ranks, weights: Mapping[str, float], progress: dict[str, Any]):
        self._ranks, self._weights, self._progress = ranks, weights, progress
        self._recent: list[Step] = []

    def add(self, number: int, losses: Mapping[str, Tensor], samples: Tensor, gradient_norm: Tensor) -> None:
        """One step: the loss (n,) of each method and each sample, the samples' numbers, the norm before clipping."""
        losses = {name: values.detach() for name, values in losses.items()}
        of_samples = torch.stack([weight * losses[name] for name, weight in self._weights.items()]).sum(0)
        means = torch.stack([losses[name].mean() for name in self._weights])
        self._recent.append(Step(number, means, of_samples, samples, gradient_norm.detach()))

    def check(self, run: RunDir | None) -> dict[str, float]:
        """The numbers of the last step since the last look, as all processes see them; nothing where there is none.

        Raises TrainingError at the first step whose loss or gradient is not finite, or whose loss has exploded; what
        is known of it is then in ``failure.json``.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return {}
        numbers = torch.stack([torch.cat([step.losses, step.gradient_norm[None].to(step.losses)]) for step in recent])
        numbers = self._ranks.mean(numbers).cpu()
        for step, (*losses, norm) in zip(recent, numbers.tolist(), strict=True):
            loss = sum(weight * loss for weight, loss in zip(self._weights.values(), losses, strict=True))
            self._progress["loss"] = loss
            if self._progress["first"] is None:
                self._progress["first"] = loss
            if not math.isfinite(loss + norm) or loss > EXPLODED * max(self._progress["first"], 1e-3):
                self._fail(step, loss, norm, run)
        found = {"loss": loss, "gradient_norm": norm}
        if len(losses) > 1:
            found |= {f"loss_{name}": loss for name, loss in zip(self._weights, losses, strict=True)}
        return found

    def _fail(self, step: Step, loss: float, norm: float, run: RunDir | None) -> None:
        of_all = self._ranks.gather((step.samples.tolist(), step.of_samples.float().cpu().tolist()))
        samples = [pair for part in of_all for pair in zip(*part, strict=True)]
        first = self._progress["first"]
        samples.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)  # the worst first
        if run is not None:
            run.fail(
                step=step.number, loss=loss, first_loss=first, gradient_norm=norm,
                samples=[sample for sample, _ in samples], losses=[loss for _, loss in samples],
            )  # fmt: skip
        what = f"the loss became {loss:.4g}, from {first:.4g} at first,"
        if math.isfinite(loss) and not math.isfinite(norm):
            what = f"the norm of the gradient became {norm}"
        worst = ", ".join(str(sample) for sample, _ in samples[:NAMED])
        more = f" and {len(samples) - NAMED} more, all in failure.json" if len(samples) > NAMED else ""
        raise TrainingError(
            f"{what} at step {step.number}, in a batch of the samples {worst}{more}, the worst first: train with a "
            "smaller --lr, a longer --warmup or a smaller --clip-norm, or look whether these images are damaged"
        )
