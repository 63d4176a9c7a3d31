"""What a student can match, side by side: a method is its loss for each sample, and what it needs for that.

To add one is to write a function here. Not here: how maps are made (`pipeline.explainers`) and compared (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from options import Lazy, Message, Option, Registry
from pipeline.explainers import EXPLAINERS
from trainer.errors import TrainingError
from trainer.loop.augmentation import BACKGROUND

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from pipeline import Forward
else:
    torch, F = Lazy("torch"), Lazy("torch.nn.functional")

Target = Mapping[str, "Tensor"]  # of a batch, on the device: what the methods need, by name
Compare = Callable[["Tensor", "Tensor"], "Tensor"]  # the student's maps and the teacher's (N, C, h, w) to a loss (N,)
TEMPERATURE = 3.0
# of ISNet, as in its authors' code: ε, the decay of global weighted rank pooling, and the sum of |relevance| that is
# natural to a heatmap, between which and which there is no loss
ISNET_EPSILON, GWRP_DECAY, NATURAL_RELEVANCE, TINY = 0.01, 0.9, (1.0, 25.0), 1e-10
# what a name alone stands for, where that is no method by itself
SUMS = {"rrr": {"erm": 1.0, "rrr": 0.01}, "isnet": {"erm": 0.3, "isnet": 0.7}}


@dataclass(frozen=True)
class Method:
    """``loss(forward, target, compare)`` is (N,), one number for each sample, of one forward pass of the student.

    ``needs``: entries of `target`, from the store (heatmaps, teacher_logits, features), the dataset (labels, masks) or
    the training (group_weights). Where images get other backgrounds, it also has ``repainted``, 1 for those that did.
    ``explainers``: of which of them the stored heatmaps may be; none where it needs no heatmaps. ``explains``: the
    explainer that the student is traced with where that is not said by a store.
    ``moves``: the augmentations under which what it needs stays right, as it is moved along or does not change.
    """

    name: str
    loss: Callable[[Forward, Target, Compare], Tensor]
    needs: tuple[str, ...]
    explainers: tuple[str, ...] = ()
    explains: str | None = None
    moves: tuple[str, ...] = ()


METHODS: Registry[Method] = Registry("method", TrainingError)


def method(name: str, **declared: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter the function below as a method."""

    def enter(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, loss, **declared)
        return loss

    return enter


_LRP = ("flex", "cp-lrp", "epsilon-plus", "gamma")
_HIDDEN_LRP = tuple(name for name, explainer in EXPLAINERS.items() if explainer.stride is not None)


@method("attention", needs=("heatmaps",), explainers=("attention",), moves=("flip",))
@method("grad-cam", needs=("heatmaps",), explainers=("grad-cam",), moves=("flip",))
@method("hidden-lrp", needs=("heatmaps",), explainers=_HIDDEN_LRP)
@method("input-gradient", needs=("heatmaps",), explainers=("input-gradient",), moves=("flip", "shift"))
@method("gradient-x-input", needs=("heatmaps",), explainers=("gradient-x-input",), moves=("flip", "shift", "crop"))
@method("lrp", needs=("heatmaps",), explainers=_LRP, moves=("flip", "shift", "crop"))
def explanation(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the difference of the student's map and the stored one, for the class and ε of the draw (Bassi et al.,
    arXiv 2407.09788).

    The store's explainer decides the kind of map. An input gradient is no share of the logit, so the area of a crop has
    no meaning for it.
    """
    maps = forward.maps(target["target_class"], target["epsilon"], create_graph=torch.is_grad_enabled())
    return compare(maps, target["heatmaps"])


@method("complete-lrp", needs=("heatmaps", "teacher_logits"), explainers=_LRP)
def complete_explanation(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the difference of LRP maps that are completed, in proportion to |relevance|, by the share of the logit
    that they miss.

    The missing share is what ε absorbs, and what biases and batch norms add, which is much in a teacher that has them.
    Both maps then sum to the logit, so a student that matches them has the teacher's outputs too, with biases of its
    own or without. Not from the paper; measured in docs/results/coloured-mnist.md.
    """
    classes = target["target_class"]
    ours = forward.maps(classes, target["epsilon"], create_graph=torch.is_grad_enabled())
    theirs = target["heatmaps"]
    logits = [of.gather(1, classes[:, None])[:, 0] for of in (forward.logits, target["teacher_logits"])]
    pooled = ours.shape[2:].numel() // theirs.shape[2:].numel()  # the values of which one stored value is the mean
    return compare(_completed(ours, logits[0]), _completed(theirs, logits[1], pooled))


def _completed(maps: Tensor, logits: Tensor, pooled: int = 1) -> Tensor:
    """Maps (N, C, h, w) whose sum, times ``pooled``, is the logit (N,), but for maps of zeros.

    What completes a map that is almost 0 has no gradient, as its slope, logit / size², overflows.
    """
    missing = logits - pooled * maps.sum((1, 2, 3))
    size = pooled * maps.abs().sum((1, 2, 3))
    tiny = torch.finfo(maps.dtype).tiny
    small = (size <= tiny**0.5).view(-1, 1, 1, 1)
    spread = maps.abs() * (missing / torch.where(small[:, 0, 0, 0], 1, size)).view(-1, 1, 1, 1)
    with torch.no_grad():
        factor = missing / size.clamp_min(tiny)
        constant = maps.abs() * torch.where(factor.isfinite(), factor, 0).view(-1, 1, 1, 1)
    return maps + torch.where(small, constant, spread)


@method("features", needs=("features",))
def features(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the mean squared difference of the inputs of the last layer (hints, Romero et al., ICLR 2015).

    Raises:
        TrainingError: the student has another number of features.
    """
    ours, theirs = forward.features, target["features"]
    if ours.shape != theirs.shape:
        raise TrainingError(
            Message(
                f"the student has {ours.shape[1]} features, and the store has {theirs.shape[1]} features of the "
                "teacher: give ",
                Option("head", "frozen"),
                ", which puts a learnt adapter between the two, or another ",
                Option("arch"),
            )
        )
    return (ours - theirs).square().mean(1)


@method("output", needs=("teacher_logits",))
def output(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the KL divergence from the teacher's outputs at temperature 3, times 9 (Hinton et al., 2015)."""
    ours, theirs = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (forward.logits, target["teacher_logits"]))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


@method("repainted-output", needs=("teacher_logits",))
def repainted_output(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the loss of `output` for images that got another background in this step, and 0 for others.

    A random background tells nothing of what the teacher says, so its outputs cannot be learnt from there. Not from the
    paper; measured in docs/results/choosing.md.
    """
    repainted = target.get("repainted")
    return output(forward, target, compare) * (0 if repainted is None else repainted)


@method("erm", needs=("labels",), moves=("flip", "shift", "crop"))
def erm(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the cross-entropy with the labels; there is no teacher, and the student learns the bias."""
    return F.cross_entropy(forward.logits, target["labels"], reduction="none")


@method("group-dro", needs=("labels", "group_weights"), moves=("flip", "shift", "crop"))
def group_dro(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the cross-entropy, weighted so that the group with the largest loss counts most (Sagawa et al., ICLR
    2020).

    A group is a class and a value of ``groups``; `trainer.loop.groups` has the weights.
    """
    return target["group_weights"] * F.cross_entropy(forward.logits, target["labels"], reduction="none")


@method("rrr", needs=("masks",), explains="gradient-x-input", moves=("flip", "shift", "crop"))
def right_for_the_right_reasons(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return the squared gradient of Σ_k log p_k at the image, summed outside the mask (Ross et al., IJCAI 2017).

    This is the second of the three terms of equation 1; cross-entropy is the first. Batch norms are the affine maps
    that they are in evaluation.
    """
    slope = 1 - forward.logits.shape[1] * forward.logits.softmax(1)  # of Σ_k log p_k, at the logits
    gradient = forward.trace.pull_back(slope, 0.0, create_graph=torch.is_grad_enabled())
    return ((1 - target["masks"]) * gradient).square().sum((1, 2, 3))


@method("isnet", needs=("masks",), explains="flex", moves=("flip", "shift", "crop"))
def background_relevance(forward: Forward, target: Target, compare: Compare) -> Tensor:
    """Return ISNet's loss of LRP-Flex relevance outside the mask, and of too much or too little of it inside (Bassi et
    al., Nature Communications 2024).

    Volume 15, article 291, equations 5 to 10, in the stochastic form of Faster ISNet (arXiv 2401.08409): one logit of
    each sample is explained, chosen at random. Cross-entropy is added to it.
    """
    samples, classes = forward.logits.shape
    chosen = torch.randint(classes, (samples,), device=forward.logits.device)
    maps = forward.maps(chosen, ISNET_EPSILON, create_graph=torch.is_grad_enabled()).abs()
    object_, background = target["masks"], 1 - target["masks"]
    inside = (maps * object_).sum((1, 2, 3))
    mean_inside = inside / (object_.sum((1, 2, 3)) * maps.shape[1]).clamp_min(1)
    outside = (maps / mean_inside.clamp_min(TINY).view(-1, 1, 1, 1) * background).flatten(2)
    ranked = outside.sort(2, descending=True).values
    weights = GWRP_DECAY ** torch.arange(ranked.shape[2], device=ranked.device, dtype=ranked.dtype)
    pooled = (ranked * weights).sum(2) / weights.sum()
    of_background = pooled.log1p().mean(1)  # −log(1 − x / (x + 1))
    low, high = NATURAL_RELEVANCE
    too_little, too_much = (1 - inside / low).clamp_min(0), ((inside - high) / low).clamp_min(0)
    # beyond low + high the square becomes a line of the same value, as in Faster ISNet
    return of_background + too_little.square() + torch.where(too_much > 1, 1 + low * (too_much - 1), too_much.square())


def method_of(explainer: str) -> str:
    """The method that matches the maps of an explainer."""
    return next(name for name, method in METHODS.items() if explainer in method.explainers)


def parse_terms(method: str | None, loss: str | None) -> dict[str, float]:
    """The weight of each method: one alone, or a sum such as ``lrp=1,output=0.1``. Raises TrainingError."""
    if method is not None and loss is not None:
        same = ",".join(f"{name}={weight:g}" for name, weight in SUMS.get(method, {method: 1}).items())
        raise TrainingError(
            Message(
                "give ",
                Option("method", method),
                " or ",
                Option("loss", loss),
                ", not both: ",
                Option("method", method),
                " is ",
                Option("loss", same),
            )
        )
    if loss is None and method in SUMS:
        return dict(SUMS[method])
    terms: dict[str, float] = {}
    for term in (loss if loss is not None else method or "lrp").split(","):
        name, equals, weight = (part.strip() for part in term.partition("="))
        METHODS.check(name)
        try:
            terms[name] = float(weight) if equals else 1.0
        except ValueError:
            terms[name] = float("nan")
        if not 0 < terms[name] < float("inf"):
            raise TrainingError(
                Message(
                    Option("loss", term.strip()),
                    f": '{weight}' is not a weight. Give a positive number, as in lrp=1,output=0.1.",
                )
            )
    if loss is not None and len(terms) < len(loss.split(",")):
        raise TrainingError(Message(Option("loss", loss), " has a method twice: give each once"))
    maps = [name for name in terms if METHODS[name].explainers or METHODS[name].explains]
    if len(maps) > 1:
        raise TrainingError(
            f"{' and '.join(maps)} each explain the student in their own way, and a step explains it in one: give one"
        )
    return terms


def needs(terms: Mapping[str, float]) -> tuple[str, ...]:
    """All that the methods need, by name."""
    return tuple(dict.fromkeys(need for name in terms for need in METHODS[name].needs))


def of_store(terms: Mapping[str, float]) -> set[str]:
    """What the methods need of a store; they learn without one where it is nothing."""
    return set(needs(terms)) & {"heatmaps", "teacher_logits", "features"}


def moves(terms: Mapping[str, float]) -> tuple[str, ...]:
    """The augmentations that every one of the methods allows; another background changes nothing that any needs."""
    return (*(move for move in METHODS["erm"].moves if all(move in METHODS[name].moves for name in terms)), BACKGROUND)


def missing_from(terms: Mapping[str, float], explainer: str | None, stored: tuple[str, ...]) -> dict[str, Any]:
    """Tell the options of `cache_explanations` for a store that has what this one lacks for the methods.

    Args:
        terms: the weight of each method.
        explainer: the explainer of the store's maps; None where there is no store.
        stored: what else the store has: teacher_logits, features.

    Returns:
        The options by name; empty where the store lacks nothing.
    """
    for name in terms:
        if (allowed := METHODS[name].explainers) and explainer not in allowed:
            return {"explainer": allowed[0]} | ({"features": True} if "features" in needs(terms) else {})
    lacking = of_store(terms) - {"heatmaps", *stored}
    if "features" not in lacking:
        return {}
    return ({} if explainer is None else {"explainer": explainer}) | {"features": True}
