"""Debiasing fronts: the first part of a teacher, which hides the shortcut from its network.

A front is a part of the model, so that relevance flows through it back to the pixels that a student sees. Not here:
functions of the user's own, and fronts one after another (`fronts.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import Lazy, Message, Option, Registry
from pipeline.errors import ModelError

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from pipeline import rules
else:
    torch, rules = Lazy("torch"), Lazy("pipeline.rules")
    F = Lazy("torch.nn.functional")

Front = Callable[["Tensor", "Tensor | None"], "Tensor"]  # images (N, C, H, W), masks (N, 1, H, W) → images (N, C, H, W)
Masked = Callable[["Tensor", "Tensor"], "Tensor"]  # a front that needs the masks
Debias = str | Callable[..., Any]  # what a user gives: names with commas between them, or a function
DEBIAS: Registry[Front] = Registry("debias", ModelError)
NONE, SEGMENTER = "none", "segmenter"  # names in `DEBIAS`


def masked(*, hides_background: bool) -> Callable[[Masked], Front]:
    """State that the front below needs masks: without them it raises ModelError.

    Args:
        hides_background: whether the result is the same for every background.
    """

    def mark(front: Masked) -> Front:
        @wraps(front)
        def checked(images: Tensor, masks: Tensor | None) -> Tensor:
            if masks is None:
                raise ModelError(
                    Message(
                        "a teacher with ",
                        Option("debias", front.__name__.replace("_", "-")),
                        " needs the dataset's 'masks', and this split has none: use a dataset with masks, or another "
                        "teacher",
                    )
                )
            return front(images, masks)

        checked.__dict__.update(needs_masks=True, hides_background=hides_background)
        return checked

    return mark


def front_names(debias: str) -> tuple[str, ...]:
    """Return the names of fronts one after another: entries of `DEBIAS`, and functions, which are not imported.

    Args:
        debias: names with commas between them, such as ``mask,grayscale`` or ``mask,package.module:function``.

    Raises:
        ModelError: a name is unknown or missing, or ``none`` stands beside other names.
    """
    names = tuple(name.strip() for name in debias.split(","))
    for name in names:
        if not name:
            raise ModelError(
                Message(
                    Option("debias", debias), " has a comma without a name beside it: give names such as mask,grayscale"
                )
            )
        if not is_function(name):
            DEBIAS.check(name)
    if NONE in names and len(names) > 1:
        raise ModelError(Message(Option("debias", debias), f" has other fronts beside '{NONE}': leave '{NONE}' out"))
    return names


def front_text(debias: Debias) -> str:
    """Return the names of a front as they are stored; of a function its module and name.

    Raises:
        ModelError: it is neither text nor a function at the top of a module.
    """
    if isinstance(debias, str):
        return ",".join(name.strip() for name in debias.split(","))
    name = getattr(debias, "__qualname__", "")
    if not inspect.isfunction(debias) or not name.isidentifier():
        what = f"'{name}'" if name else f"a {type(debias).__name__}"
        raise ModelError(
            Message(
                Option("debias"), f" must be names or a function at the top of a module, got {what}: write a function "
                "with def there",
            )
        )  # fmt: skip
    return f"{_module_name(debias)}:{name}"


def is_function(name: str) -> bool:
    """Return whether a name of a front is a function of the user's own, well spelled or not."""
    return name not in DEBIAS and any(sign in name for sign in ":./")


def functions_in(debias: str) -> tuple[str, ...]:
    """Return the user's own functions among fronts one after another; a name that is not known is none of them."""
    return tuple(name.strip() for name in debias.split(",") if is_function(name))


def needs_masks(debias: str) -> bool:
    """Return whether a front of the table in ``debias`` needs masks; False for any other name."""
    return _any(debias, "needs_masks")


def hides_background(debias: str) -> bool:
    """Return whether a front of the table in ``debias`` hides the background; False for any other name."""
    return _any(debias, "hides_background")


def uses_segmenter(debias: str) -> bool:
    """Return whether a segmentation network makes the masks for these fronts."""
    return SEGMENTER in (name.strip() for name in debias.split(","))


def _any(debias: str, attribute: str) -> bool:
    return any(getattr(DEBIAS.get(name.strip()), attribute, False) for name in debias.split(","))


def _module_name(function: Callable[..., Any]) -> str:
    """Return the module of a function; of a script the name by which it can be imported later."""
    module = sys.modules.get(function.__module__)
    if function.__module__ != "__main__":
        return function.__module__
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    return spec.name if spec is not None else Path(file).stem if file else function.__module__


@DEBIAS.add("grayscale")
def grayscale(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the mean of the channels divided by its spatial maximum, so that neither hue nor brightness is left.

    The result is (N, C, H, W) with equal channels. The maximum is a constant for relevance. Otherwise the result would
    not change with the brightness, and the relevance of every image would sum to 0.
    """
    mean = images.mean(dim=1, keepdim=True)
    brightest = rules.stop_relevance(mean).amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
    return (mean / brightest).expand(-1, images.shape[1], -1, -1)


@DEBIAS.add("mask")
@masked(hides_background=True)
def mask(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images with the background set to 0 by the array ``masks`` of the dataset, (N, 1, H, W) in {0, 1}."""
    return images * masks


@DEBIAS.add("mask-mean")
@masked(hides_background=True)
def mask_mean(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images with the background set to the mean of the object's pixels, for each image and channel.

    The relevance of the fill flows to the pixels that it is the mean of. So do `mask_blur`'s, and a heatmap accounts
    for as much of the logit as it does without a fill. An image without an object becomes black.
    """
    return images * masks + (1 - masks) * _mean(images, masks)


@DEBIAS.add("mask-blur")
@masked(hides_background=True)
def mask_blur(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images with the background set to the object's colours, continued outwards and blurred."""
    return _continued(images * masks, masks)


@DEBIAS.add("mask-background-mean")
@masked(hides_background=False)
def mask_background_mean(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images with the background set to its mean, for each image and channel, which may tell the class.

    The fill is a constant for relevance, so that the student learns nothing of it.
    """
    return images * masks + (1 - masks) * rules.stop_relevance(_mean(images, 1 - masks))


@DEBIAS.add("mask-background-blur")
@masked(hides_background=False)
def mask_background_blur(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images with a strongly blurred background, whose colours may tell the class.

    The background is reduced to 4×4 pixels, each the mean of its part of the background, and scaled up again. It is a
    constant for relevance, as in `mask_background_mean`.
    """
    return images * masks + (1 - masks) * rules.stop_relevance(_blurred(images, 1 - masks))


@DEBIAS.add("segmenter")
@masked(hides_background=True)
def segmenter(images: Tensor, masks: Tensor) -> Tensor:
    """Return the images as `mask` does, by the masks of a frozen segmentation network inside the teacher."""
    return images * masks


@DEBIAS.add("none")
def none(images: Tensor, masks: Tensor | None) -> Tensor:
    """Return the images unchanged, for a biased baseline or a student."""
    return images


def _mean(images: Tensor, part: Tensor) -> Tensor:
    """Return the mean (N, C, 1, 1) of the pixels where ``part``, (N, 1, H, W), is 1, not 0; 0 if there are none."""
    return _divided((images * part).sum(dim=(2, 3), keepdim=True), part.sum(dim=(2, 3), keepdim=True))


def _blurred(images: Tensor, part: Tensor, side: int = 4) -> Tensor:
    """Return the mean colours of ``part``, (N, 1, H, W) in {0, 1}, in side × side fields, scaled up to (N, C, H, W)."""
    share = F.adaptive_avg_pool2d(part, side)
    fields = _divided(F.adaptive_avg_pool2d(images * part, side), share)
    return _up(_continued(fields, share.gt(0).to(images.dtype)), images)


def _continued(colours: Tensor, known: Tensor) -> Tensor:
    """Continue colours to the pixels where they are not known, the more blurred the farther away they are.

    This is the pull-push algorithm (Gortler et al., The Lumigraph, SIGGRAPH 1996). It is defined at any distance, in
    contrast to a filter of limited width. Every colour of the result is a weighted mean of known ones.

    Args:
        colours: (N, C, H, W), 0 where they are not known.
        known: (N, 1, H, W), 1 where they are known, and 0 elsewhere.

    Returns:
        The colours (N, C, H, W), unchanged where they are known; 0 for an image without any known ones.
    """
    if known.shape[2:] == (1, 1):
        return colours
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    means = _divided(F.avg_pool2d(colours, 2, ceil_mode=True), share)
    coarser = _continued(means, share.gt(0).to(colours.dtype))
    return colours + (1 - known) * _up(coarser, colours)


def _divided(sums: Tensor, share: Tensor) -> Tensor:
    """Divide where the share is not 0. Elsewhere the sums are 0, and stay it."""
    return sums / torch.where(share > 0, share, 1)


def _up(images: Tensor, like: Tensor) -> Tensor:
    """Scale images up to the height and width of others."""
    return F.interpolate(images, size=like.shape[2:], mode="bilinear", align_corners=False)
