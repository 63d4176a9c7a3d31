"""The losses of a running training: their means for the log, and an error where the numbers go wrong.

They are read every so many steps only, because reading a number from a GPU waits for all its work before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from options import Message, Option
from trainer.errors import TrainingError
from trainer.loop.collapse import Falling
from trainer.loop.distributed import Ranks
from trainer.loop.step import UNTAUGHT, VANISHED, weighted
from trainer.run_dir import RunDir

log = logging.getLogger(__name__)

EXPLODED = 1000.0  # times the first loss
DEAD = 0.5  # of the share of living samples in the first step: a step with no more of them has no loss to trust
MANY = 0.1  # of the samples of a step
NAMED = 8  # samples that an error names


@dataclass(frozen=True)
class Step:
    """The numbers of a step in this process, which has n of its samples.

    losses: the mean loss of each of T methods, (T,). sample_losses: the weighted sum of the losses of each sample,
    (n,). samples: their indices, int64 (n,). gradient_norm: the norm before clipping, a scalar. vanished: 1 for
    a sample whose map has vanished, else 0, (n,). untaught: the same of a sample whose target is a map of zeros, (n,).
    """

    number: int
    losses: Tensor
    sample_losses: Tensor
    samples: Tensor
    gradient_norm: Tensor
    vanished: Tensor
    untaught: Tensor

    @property
    def of_living(self) -> Tensor:
        """Return the shares of living and of taught samples, and the sums of their losses over the number of all.

        A living sample is one whose map has not vanished, and a taught one is living and has a target.
        """
        living = 1 - self.vanished.to(self.sample_losses)
        taught = living * (1 - self.untaught.to(living))
        losses = [torch.where(part > 0, self.sample_losses, 0).mean() for part in (living, taught)]
        return torch.stack([living.mean(), taught.mean(), *losses])


class Watch:
    """Keep the ``first`` loss, the share of ``living`` samples then, and the last ``loss``, in a training's progress.

    Args:
        ranks: the processes of the training, which read the same numbers.
        weights: the weight of each method's loss.
        progress: has the key ``first``, None before the first step with a sample that is taught.
        falling: warns of a heatmap loss that does not fall; None warns of nothing.
    """

    def __init__(
        self, ranks: Ranks, weights: Mapping[str, float], progress: dict[str, Any], falling: Falling | None = None
    ):
        self._ranks, self._weights, self._progress, self._falling = ranks, weights, progress, falling
        self._recent: list[Step] = []
        self._told = False

    def add(self, number: int, losses: Mapping[str, Tensor], samples: Tensor, gradient_norm: Tensor) -> None:
        """Add a step, without reading its numbers.

        Args:
            number: the number of the step, from 1.
            losses: the loss (n,) of each sample, by method, and `VANISHED` and `UNTAUGHT` as `losses_of` returns them;
                by default none.
            samples: the index of each sample, int64 (n,).
            gradient_norm: the norm of the gradient before clipping, a scalar.
        """
        losses = {name: values.detach() for name, values in losses.items()}
        means = torch.stack([losses[name].mean() for name in self._weights])
        sample_losses = weighted(losses, self._weights)
        vanished, untaught = (losses.get(name, torch.zeros_like(sample_losses)) for name in (VANISHED, UNTAUGHT))
        self._recent.append(Step(number, means, sample_losses, samples, gradient_norm.detach(), vanished, untaught))

    def check(self, run: RunDir | None) -> dict[str, float]:
        """Read the numbers of the steps that were added since the last call.

        Args:
            run: the folder of the run, None in all processes but the main one.

        Returns:
            ``loss``, ``gradient_norm`` and, of several methods, ``loss_<method>`` of the last step, over all processes;
            nothing where no step was added.

        Raises:
            TrainingError: the loss or the gradient of a step is not finite, or the loss has exploded. The first such
                step is described in ``failure.json``. A sample whose map has vanished, whose loss is a number without
                meaning, does not count for the explosion unless half of those that lived in the first step are like it.
                Neither does a sample whose target is a map of zeros, whose loss says nothing about others, while there
                are others.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return {}
        rows = [torch.cat([step.losses, step.gradient_norm[None].to(step.losses), step.of_living]) for step in recent]
        numbers = self._ranks.mean(torch.stack(rows)).cpu()
        for step, (*losses, norm, living, taught, of_living, of_taught) in zip(recent, numbers.tolist(), strict=True):
            loss = sum(weight * loss for weight, loss in zip(self._weights.values(), losses, strict=True))
            counted = loss
            is_dead = living <= DEAD * self._progress.setdefault("living", living or 1.0)
            if not is_dead:
                counted = of_taught / taught if taught else of_living / living
            self._progress["loss"] = loss
            if self._progress["first"] is None and (taught or is_dead):
                self._progress["first"] = counted
            first = self._progress["first"]
            if not math.isfinite(loss + norm) or (first is not None and counted > EXPLODED * max(first, 1e-3)):
                self._fail(step, loss, norm, run, vanished=1 - living if is_dead else 0)
            if living < 1 and not self._told:
                self._tell(step, 1 - living)
            by_method = dict(zip(self._weights, losses, strict=True))
            if len(by_method) == 1:  # of the samples that are taught and whose map has not vanished
                by_method = {name: counted / weight for name, weight in self._weights.items()}
            warning = None if self._falling is None else self._falling.add(step.number, by_method)
            if warning is not None and self._ranks.main:
                log.warning(warning)
        last_step = {"loss": loss, "gradient_norm": norm}
        if len(losses) > 1:
            last_step |= {f"loss_{name}": loss for name, loss in zip(self._weights, losses, strict=True)}
        return last_step

    def _tell(self, step: Step, share: float) -> None:
        """Log once which samples' maps have vanished, and what it means for this share of them."""
        self._told = True
        parts = self._ranks.gather(step.samples[step.vanished.cpu() > 0].tolist())
        samples = [str(sample) for part in parts for sample in part]
        many = "; with so many, the network may be made for larger images, and it learns from the others alone"
        if self._ranks.main:
            log.warning(
                f"step {step.number}: the student's heatmaps of {len(samples)} samples are zero (among them "
                f"{', '.join(samples[:NAMED])}), so that their losses are very large and say nothing: this is harmless "
                f"for a few samples, such as black images{many if share > MANY else ''}"
            )

    def _fail(self, step: Step, loss: float, norm: float, run: RunDir | None, vanished: float) -> None:
        parts = self._ranks.gather((step.samples.tolist(), step.sample_losses.float().cpu().tolist()))
        samples = [pair for part in parts for pair in zip(*part, strict=True)]
        first = self._progress["first"]
        samples.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)  # the worst first
        if run is not None:
            run.fail(
                step=step.number, loss=loss, first_loss=first, gradient_norm=norm,
                samples=[sample for sample, _ in samples], losses=[loss for _, loss in samples],
            )  # fmt: skip
        problem = f"the loss became {loss:.4g}," + ("" if first is None else f" from {first:.4g} at first,")
        if math.isfinite(loss) and not math.isfinite(norm):
            problem = f"the norm of the gradient became {norm}"
        elif vanished:
            problem = f"the student's heatmaps of {vanished:.0%} of the samples became zero (the loss is {loss:.4g})"
        worst = ", ".join(str(sample) for sample, _ in samples[:NAMED])
        more = f" and {len(samples) - NAMED} more, all in failure.json" if len(samples) > NAMED else ""
        raise TrainingError(
            Message(
                f"{problem} at step {step.number}, in a batch of the samples {worst}{more}, the worst first: choose a "
                "smaller ", Option("lr"), ", a longer ", Option("warmup"), " or a smaller ", Option("clip_norm"),
                ", or check whether these images are damaged",
            )
        )  # fmt: skip
