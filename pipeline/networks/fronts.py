"""The front of a model: names of the table and functions of the user's own, one after another.

Not here: the table and the spelling of the names (`debias.py`), and masks that a segmenter makes (`segmenters.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from options import Message, Option
from pipeline.errors import ModelError, RelevanceError
from pipeline.networks.debias import DEBIAS, Debias, front_names, front_text, functions_in, needs_masks
from pipeline.networks.models import current_folder_importable, error_summary, import_function, summary_with_line
from pipeline.networks.sources import ImageShape
from pipeline.networks.trials import kind_of, trial_images, undisturbed
from pipeline.relevance import Trace

log = logging.getLogger(__name__)
FUNCTION = "debiasing front"  # a noun for errors
MASKS = "masks"  # the parameter of a function that takes masks
ROUNDING = 1e-3  # of values in [0, 1]
TRIED = ("a random image", "a random image of low contrast", "a random image", "a black image", "a white image")


@dataclass(frozen=True, eq=False)
class OwnFront:
    """A function of the user's own as a front.

    Attributes:
        name: ``package.module:function``.
        function: takes images (N, C, H, W) in [0, 1], and where it has a parameter ``masks``, masks (N, 1, H, W).
        takes_masks: whether it has that parameter.
        needs_masks: whether the parameter has no default.
    """

    name: str
    function: Callable[..., Any]
    takes_masks: bool
    needs_masks: bool

    def __call__(self, images: Tensor, masks: Tensor | None) -> Tensor:
        if self.needs_masks and masks is None:
            raise ModelError(
                Message(
                    "a teacher with ", Option("debias", self.name), " needs the dataset's 'masks', and this split has "
                    "none: use a dataset with masks, or another teacher",
                )
            )  # fmt: skip
        output = self.function(images, masks=masks) if self.takes_masks else self.function(images)
        if not isinstance(output, Tensor) or output.shape != images.shape:
            given = f"images of shape {tuple(images.shape)}"
            raise self.wrong(f"returns {kind_of(output)} for {given}", "return one tensor of the shape of the images")
        if output.device != images.device:
            raise self.wrong(
                f"returns a tensor on {output.device} for images on {images.device}",
                "make its tensors on the device of the images, as images.new_tensor does",
            )
        return output

    def wrong(self, problem: str, remedy: str) -> ModelError:
        """Return the error for what the function does."""
        return ModelError(f"the {FUNCTION} '{self.name}' {problem}: {remedy}")


@dataclass(frozen=True, eq=False)
class Front:
    """Fronts one after another: images (N, C, H, W) in [0, 1], masks (N, 1, H, W) or None → images (N, C, H, W).

    Attributes:
        text: their names, with commas between them.
        parts: the fronts in this order.
        needs_masks: whether one of them needs masks.
        sha256: SHA-256 of the text of the user's own functions; None without any.
    """

    text: str
    parts: tuple[Callable[[Tensor, Tensor | None], Tensor], ...]
    needs_masks: bool
    sha256: str | None = None
    image_shape: ImageShape | None = None
    _tried: set[torch.device] = field(default_factory=set)

    def __call__(self, images: Tensor, masks: Tensor | None) -> Tensor:
        for part in self.parts:
            images = part(images, masks)
        return images

    @property
    def own(self) -> tuple[OwnFront, ...]:
        """The user's own functions."""
        return tuple(part for part in self.parts if isinstance(part, OwnFront))

    def try_on(self, device: torch.device) -> None:
        """Try the user's own functions on a device, unless that was done.

        Raises:
            ModelError: a function does not do what a front must do.
        """
        if self.image_shape is None or device in self._tried:
            return
        for part in self.own:
            _try(part, self.image_shape, device)
        self._tried.add(device)


def build_front(debias: Debias, image_shape: ImageShape | None = None) -> Front:
    """Return the front of these names. Functions of the user's own are imported, and tried on images of this shape.

    Args:
        debias: names with commas between them, each of the table `DEBIAS` or a function ``package.module:function``; or
            a function at the top of a module.
        image_shape: (C, H, W) of the images; None for a front without functions of the user's own.

    Raises:
        ModelError: a name is unknown, or a function cannot be imported or does not do what a front must do.
    """
    text = front_text(debias)
    names = front_names(text)
    with current_folder_importable():
        parts = [_own(name, debias) if name in functions_in(text) else DEBIAS[name] for name in names]
        own = [part for part in parts if isinstance(part, OwnFront)]
        front = Front(
            text=text,
            parts=tuple(parts),
            needs_masks=needs_masks(text) or any(part.needs_masks for part in own),
            sha256=_sha256(own) if own else None,
            image_shape=image_shape if own else None,
        )
        front.try_on(torch.device("cpu"))
    return front


def table_front(debias: str) -> Front:
    """Return the front of these names, all of the table `DEBIAS`. No code of the user's own runs.

    Raises:
        ModelError: a name is unknown, or a function of the user's own.
    """
    if functions := functions_in(debias):
        raise ModelError(f"the front '{functions[0]}' is a function of your own: give what build_front returns for it")
    return build_front(debias)


def permitted_front(used: str, debias: Debias | None, image_shape: ImageShape) -> Front:
    """Return the front of a saved model. Its functions are imported only if the user has named them.

    Args:
        used: the front that the model was trained with.
        debias: the front, or its functions, that the user has named.
        image_shape: (C, H, W) of the images.

    Raises:
        ModelError: a function of the front was not named, or another front was.
    """
    functions, text = functions_in(used), None if debias is None else front_text(debias)
    if not functions:
        if text not in (None, used):
            raise ModelError(
                Message(Option("debias", text), f" was given, but its front is '{used}': leave the option out")
            )
        return table_front(used)
    if text is None or not set(functions) <= set(functions_in(text)):
        several = len(functions) > 1
        raise ModelError(
            Message(
                f"its front has the function{'s' * several} {' and '.join(map(repr, functions))}, whose code runs only "
                f"where you say so: if you trust {'them' if several else 'it'}, give ", Option("debias", used),
                f", not {text}," if text else "", f" and run where {'they' if several else 'it'} can be imported",
            )
        )  # fmt: skip
    return build_front(debias if callable(debias) and text == used else used, image_shape)


def tell_unexplainable(front: Front) -> None:
    """Log an operation of the user's own functions through which no relevance passes, before a long training."""
    if front.image_shape is None:
        return
    images, masks = _samples(front.image_shape, torch.device("cpu"))
    weights = trial_images(len(images), front.image_shape)
    for part in front.own:

        def total(images: Tensor, part: OwnFront = part) -> Tensor:
            return (part(images, masks if part.takes_masks else None) * weights).flatten(1).sum(1, keepdim=True)

        try:
            with undisturbed(nn.Module()), current_folder_importable():
                Trace(total, images).heatmaps(torch.zeros(len(images), dtype=torch.long), 0.1)
        except (RelevanceError, RuntimeError) as error:
            log.warning(
                Message(
                    f"no heatmaps will be made of a teacher behind the {FUNCTION} '{part.name}' (", error,
                    "; pipeline.stop_relevance makes a part of a front a constant for relevance)",
                )
            )  # fmt: skip


def _own(name: str, debias: Debias) -> OwnFront:
    function = debias if callable(debias) else import_function(name, "debias", FUNCTION, "calls it")
    if isinstance(function, type):
        raise ModelError(f"the {FUNCTION} '{name}' is a class: give a function that takes images and returns images")
    signature = inspect.signature(function)
    masks = signature.parameters.get(MASKS)
    takes_masks = masks is not None and masks.kind in (masks.KEYWORD_ONLY, masks.POSITIONAL_OR_KEYWORD)
    try:
        signature.bind(None, **({MASKS: None} if takes_masks else {}))
    except TypeError:
        raise ModelError(
            f"the {FUNCTION} '{name}' has the parameters {signature}, and is called with images, or with images and "
            f"{MASKS}: call its parameters so, and give others a default"
        ) from None
    return OwnFront(name, function, takes_masks, takes_masks and masks is not None and masks.default is masks.empty)


def _sha256(parts: list[OwnFront]) -> str:
    """Return the SHA-256 of the text of functions; of what is no function of Python's, of its module."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\n{_source(part)}\n".encode())
    return digest.hexdigest()


def _source(part: OwnFront) -> str:
    for source in (part.function, sys.modules.get(part.name.partition(":")[0])):
        try:
            return inspect.getsource(source)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return ""


# --- trial ----------------------------------------------------------------------------------------------------------


def _samples(image_shape: ImageShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the images of `TRIED`, (5, C, H, W) in [0, 1], and their masks, (5, 1, H, W): a box, all, none, a box."""
    images = trial_images(len(TRIED), image_shape)
    images[1] = 0.4 + 0.2 * images[1]
    images[3], images[4] = 0, 1
    masks = torch.zeros(len(TRIED), 1, *image_shape[1:])
    masks[:, :, image_shape[1] // 4 : -(-image_shape[1] // 2), image_shape[2] // 4 : -(-image_shape[2] // 2)] = 1
    masks[1], masks[2] = 1, 0
    return images.to(device), masks.to(device)


def _try(front: OwnFront, image_shape: ImageShape, device: torch.device) -> None:
    """Try a function with masks and without, as it takes them; raise ModelError where it is no front."""
    images, masks = _samples(image_shape, device)
    random_states = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with random_states, undisturbed(nn.Module()):
        if front.takes_masks:
            _try_once(front, images, masks)
        if not front.needs_masks:
            _try_once(front, images, None)


def _try_once(front: OwnFront, images: Tensor, masks: Tensor | None) -> None:
    def run(images: Tensor, masks: Tensor | None = masks) -> Tensor:
        try:
            return front(images, masks)
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            with_masks = "" if masks is None else f" and {MASKS} (N, 1, H, W)"
            raise front.wrong(
                f"does not take images of shape {tuple(images.shape)} on {images.device}: {summary_with_line(error)}",
                f"it must take float32 images (N, C, H, W) in [0, 1]{with_masks}",
            ) from error

    with torch.no_grad():
        before, masks_before = images.clone(), torch.empty(0) if masks is None else masks.clone()
        output = run(images)
        if not torch.equal(before, images) or not (masks is None or torch.equal(masks_before, masks)):
            raise front.wrong("changes its input in place", "compute new tensors, or change images.clone()")
        _check_values(front, images, output)
        if not torch.equal(output, run(images)):
            raise front.wrong(
                "returns other images for the same input in a second call",
                "draw nothing at random and keep nothing between calls, so that heatmaps belong to one image",
            )
        for number, name in enumerate(TRIED):
            alone = run(images[number : number + 1], None if masks is None else masks[number : number + 1])
            if (alone[0] - output[number]).abs().max() > ROUNDING:
                raise front.wrong(
                    f"returns {name} differently beside other images than alone",
                    "treat each image alone, such as by dim=(1, 2, 3) in a mean or a maximum",
                )
    _check_gradient(front, images, run)


def _check_values(front: OwnFront, images: Tensor, output: Tensor) -> None:
    if output.dtype != images.dtype:
        raise front.wrong(f"returns {output.dtype} for {images.dtype}", "return floating-point images in [0, 1]")
    for name, values in zip(TRIED, output, strict=True):
        if not values.isfinite().all():
            worst = values[~values.isfinite()][0].item()
            raise front.wrong(
                f"returns {worst} for {name}", "return finite values, such as by a clamp before a division"
            )
    low, high = output.min().item(), output.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise front.wrong(
            f"returns values from {low:.4g} to {high:.4g} for images in [0, 1]",
            "return images in [0, 1], such as by clamp(0, 1), and leave a normalisation to mean and std",
        )


def _check_gradient(front: OwnFront, images: Tensor, run: Callable[[Tensor], Tensor]) -> None:
    """Raise ModelError where no relevance can pass through a function to the pixels."""
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.clone().requires_grad_()
        output = run(pixels.clone())
        gradient = None
        if output.requires_grad:
            weights = trial_images(len(images), (images.shape[1], images.shape[2], images.shape[3])).to(images.device)
            try:
                (gradient,) = torch.autograd.grad((output * weights).sum(), pixels, allow_unused=True)
            except RuntimeError as error:
                raise front.wrong(
                    f"cannot be differentiated ({error_summary(error)})", "compute without changes in place"
                ) from error
    if gradient is None or not gradient.any():
        raise front.wrong(
            "returns images without a gradient to the pixels, so that no relevance could pass through it",
            "compute with PyTorch's operations, and multiply the images by what rounding or a comparison makes of them",
        )
