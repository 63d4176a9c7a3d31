"""What a student can match, side by side: a method is its loss for each sample, and what it needs for that.

To add one is to write a function here. Not here: how maps are made (`pipeline.explainers`) and compared (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import EXPLAINERS, Forward
from trainer.errors import TrainingError

Target = Mapping[str, Tensor]  # of a batch, on the device: what the methods need, by name
Compare = Callable[[Tensor, Tensor], Tensor]  # the student's maps and the teacher's (N, C, h, w) to a loss (N,)
TEMPERATURE = 3.0


@dataclass(frozen=True)
class Method:
    """``loss(forward, target, compare)`` is (N,), one number for each sample, of one forward pass of the student.

    ``needs``: entries of `target`, from the store (heatmaps, teacher_logits, features) or the dataset (labels).
    ``explainers``: of which of them the stored heatmaps may be; none where it needs no heatmaps.
    ``moves``: the augmentations under which what it needs stays right, as it is moved along or does not change.
    """

    name: str
    loss: Callable[[Forward, Target, Compare], Tensor]
    needs: tuple[str, ...]
    explainers: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


def method(name: str, **declared: tuple[str, ...]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter the function below as a method."""

    def enter(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, loss, **declared)
        return loss

    return enter


_LRP = ("flex", "cp-lrp", "epsilon-plus", "gamma")


@method("lrp", needs=("heatmaps",), explainers=_LRP, moves=("flip", "shift", "crop"))
@method("gradient-x-input", needs=("heatmaps",), explainers=("gradient-x-input",), moves=("flip", "shift", "crop"))
@method("input-gradient", needs=("heatmaps",), explainers=("input-gradient",), moves=("flip", "shift"))
@method("grad-cam", needs=("heatmaps",), explainers=("grad-cam",), moves=("flip",))
@method("attention", needs=("heatmaps",), explainers=("attention",), moves=("flip",))
def explanation(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """The student's own map of the same class with the same ε is the teacher's (Bassi et al., arXiv 2407.09788).

    What kind of map it is, the store's explainer says. An input gradient is no share of the logit, so the area of
    a crop has no meaning for it.
    """
    maps = forward.maps(target["target_class"], target["epsilon"], create_graph=torch.is_grad_enabled())
    return compare(maps, target["heatmaps"])


@method("complete-lrp", needs=("heatmaps", "teacher_logits"), explainers=_LRP)
def complete_explanation(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Both maps with the share of the explained logit that they do not see, spread in proportion to |relevance|.

    What ε absorbs is such a share, and what biases and batch norms add, which is much in a teacher that has them. As
    both maps then sum to the logit, a student that matches them has the teacher's outputs too, with biases of its own
    or without. Not from the paper; measured in docs/results/coloured-mnist.md.
    """
    classes = target["target_class"]
    ours = forward.maps(classes, target["epsilon"], create_graph=torch.is_grad_enabled())
    theirs = target["heatmaps"]
    logits = [of.gather(1, classes[:, None])[:, 0] for of in (forward.logits, target["teacher_logits"])]
    pooled = ours.shape[2:].numel() // theirs.shape[2:].numel()  # the values of which one stored value is the mean
    return compare(_completed(ours, logits[0]), _completed(theirs, logits[1], pooled))


def _completed(maps: Tensor, logits: Tensor, pooled: int = 1) -> Tensor:
    """Maps (N, C, h, w) whose sum, times ``pooled``, is the logit (N,), but for maps of zeros."""
    missing = logits - pooled * maps.sum((1, 2, 3))
    size = pooled * maps.abs().sum((1, 2, 3))
    return maps + maps.abs() * (missing / size.clamp_min(torch.finfo(maps.dtype).tiny)).view(-1, 1, 1, 1)


@method("features", needs=("features",))
def features(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Mean squared difference of what enters the last layer (hints, Romero et al., ICLR 2015).

    Raises TrainingError where the student has another number of features.
    """
    ours, theirs = forward.features, target["features"]
    if ours.shape != theirs.shape:
        raise TrainingError(
            f"the student has {ours.shape[1]} features, and the store has {theirs.shape[1]} of the teacher's to match "
            "them with: give --head frozen, which puts a learnt adapter between the two, or another --arch"
        )
    return (ours - theirs).square().mean(1)


@method("output", needs=("teacher_logits",))
def output(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """KL divergence from the teacher's outputs at temperature 3, times 9 (Hinton et al., 2015)."""
    ours, theirs = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (forward.logits, target["teacher_logits"]))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


@method("erm", needs=("labels",), moves=("flip", "shift", "crop"))
def erm(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Cross-entropy with the labels: no teacher, and the bias with them."""
    return F.cross_entropy(forward.logits, target["labels"], reduction="none")


def method_of(explainer: str) -> str:
    """The method that matches the maps of an explainer."""
    return next(name for name, method in METHODS.items() if explainer in method.explainers)


def parse_terms(method: str | None, loss: str | None) -> dict[str, float]:
    """The weight of each method: one alone, or a sum such as ``lrp=1,output=0.1``. Raises TrainingError."""
    if method is not None and loss is not None:
        raise TrainingError(
            f"give --method ({method}) or --loss ({loss}), not both: --method {method} is --loss {method}=1"
        )
    terms: dict[str, float] = {}
    for term in (loss if loss is not None else method or "lrp").split(","):
        name, given, weight = (part.strip() for part in term.partition("="))
        if name not in METHODS:
            raise TrainingError(f"no method is called '{name}': choose one of {', '.join(METHODS)}")
        try:
            terms[name] = float(weight) if given else 1.0
        except ValueError:
            terms[name] = float("nan")
        if not 0 < terms[name] < float("inf"):
            raise TrainingError(
                f"--loss {term.strip()}: '{weight}' is no weight; give a positive number, as in lrp=1,output=0.1"
            )
    if loss is not None and len(terms) < len(loss.split(",")):
        raise TrainingError(f"--loss {loss} has a method twice: give each once")
    maps = [name for name in terms if METHODS[name].explainers]
    if len(maps) > 1:
        raise TrainingError(
            f"{' and '.join(maps)} are each a way to match maps, and a store has those of one explainer: give one"
        )
    return terms


def needs(terms: Mapping[str, float]) -> tuple[str, ...]:
    """All that the methods need, by name."""
    return tuple(dict.fromkeys(need for name in terms for need in METHODS[name].needs))


def moves(terms: Mapping[str, float]) -> tuple[str, ...]:
    """The augmentations that every one of the methods allows."""
    return tuple(move for move in METHODS["erm"].moves if all(move in METHODS[name].moves for name in terms))


def missing_from(terms: Mapping[str, float], explainer: str | None, stored: tuple[str, ...]) -> str:
    """What a store lacks for the methods, as options of cache-explanations; empty where it has all.

    ``explainer`` is that of its maps, None where there is no store, and ``stored`` what else it has: teacher_logits,
    features.
    """
    for name in terms:
        if (allowed := METHODS[name].explainers) and explainer not in allowed:
            return f"--explainer {allowed[0]}" + " --features" * ("features" in needs(terms))
    lacking = set(needs(terms)) - {"heatmaps", "labels", *stored}
    if "features" not in lacking:
        return ""
    return "--features" if explainer is None else f"--explainer {explainer} --features"


assert set(EXPLAINERS) == {name for method in METHODS.values() for name in method.explainers}
