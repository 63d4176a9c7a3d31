"""Frozen segmentation networks: the masks of a teacher that has none, made from its images.

Not here: what a mask does to the image (`classifier.py`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.networks.models import ImageShape, call_function

TORCHVISION = "torchvision:"
FILES = (".pt", ".pth", ".ts", ".pt2")
SHORTER_SIDE = 520  # that torchvision's segmentation networks were trained and are measured at
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, that they were trained with


class Segmenter(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to masks (N, 1, H, W) in {0, 1}, 1 on the object. It is never trained.

    ``network`` returns logits (N, K, h, w), or a dictionary with them as ``out``, as torchvision's do: an object is
    where the single logit is positive, or where the class of the largest is not the first, which is the background.
    ``prepare`` is done to the images first.
    """

    def __init__(self, network: nn.Module, prepare: Callable[[Tensor], Tensor] = lambda images: images):
        super().__init__()
        self.network, self.prepare = network, prepare
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Segmenter:
        """It stays in evaluation mode, whatever the teacher around it does."""
        self.training = mode
        if not isinstance(self.network, torch.fx.GraphModule):  # what torch.export wrote knows one mode
            self.network.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found = self.network(self.prepare(images))
        logits = found["out"] if isinstance(found, dict) else found
        logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        on_object = logits > 0 if logits.shape[1] == 1 else logits.argmax(1, keepdim=True) != 0
        return on_object.to(images.dtype)


def build_segmenter(spec: str, image_shape: ImageShape, *, weights: bool = True) -> Segmenter:
    """The segmentation network that the user names, tried once on images (C, H, W).

    - ``torchvision:NAME``: one of torchvision's, trained on the 20 classes of Pascal VOC, at a shorter side of 520.
      With ``weights`` they are fetched where they are not there yet; without, it is built to be given weights.
    - a file of `torch.export.save` (``.pt2``) or `torch.jit.save` (``.pt``, ``.pth``, ``.ts``).
    - ``package.module:function``: what this function of the user's own returns, an `nn.Module`.

    All but the first run code of the user's own; a saved teacher may name one, and `load_classifier` then waits for
    the user to name it too. Raises ModelError where there is none, or it does not return what `Segmenter` says.
    """
    name = f"the segmenter '{spec}'"
    if spec.startswith(TORCHVISION):
        segmenter = Segmenter(_of_torchvision(spec.removeprefix(TORCHVISION), weights), _as_torchvision)
    elif spec.endswith(FILES):
        segmenter = Segmenter(_of_file(Path(spec)))
    elif ":" in spec:
        network = call_function(spec, "--segmenter", "segmenter")
        if not isinstance(network, nn.Module):
            raise ModelError(f"{name} returned {type(network).__name__}: it must return an nn.Module")
        segmenter = Segmenter(network)
    else:
        raise ModelError(
            f"no segmenter is called '{spec}': give torchvision:{_names()[-1]} or another of torchvision's "
            f"({', '.join(_names()[:-1])}), a file ({', '.join(FILES)}), or package.module:function"
        )
    segmenter.train()
    shape = (2, *image_shape)
    try:
        masks = segmenter(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
        fits = masks.shape == (2, 1, *image_shape[1:])
    except Exception as error:
        raise ModelError(
            f"{name} does not take images {shape} in [0, 1] and return logits (N, K, h, w), or such as 'out' of a "
            f"dictionary: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not fits:
        raise ModelError(f"{name} gives masks of shape {tuple(masks.shape)} for images {shape}: one mask an image")
    return segmenter


def _names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models.segmentation))


def _of_torchvision(name: str, weights: bool) -> nn.Module:
    if name not in _names():
        raise ModelError(f"torchvision has no segmentation network '{name}': choose one of {', '.join(_names())}")
    if not weights:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
    trained = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torchvision.models.get_model(name, weights=trained)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ModelError(
            f"the weights of torchvision's {name} are not here and cannot be fetched ({error}): fetch {trained.url} "
            f"where there is a network, and put the file into {folder}"
        ) from None


def _as_torchvision(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    factor = SHORTER_SIDE / min(images.shape[2:])
    size = [round(side * factor) for side in images.shape[2:]]
    return (F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True) - mean) / std


def _of_file(path: Path) -> nn.Module:
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise ModelError(f"the segmenter {path} cannot be read ({error.strerror}): give the path of the file") from None
    try:
        if path.suffix == ".pt2":
            exported: Any = torch.export.load(content)
            return exported.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that it is deprecated is for who writes such files
            return torch.jit.load(content, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a file that is cut or foreign
        raise ModelError(
            f"the segmenter {path} does not load ({type(error).__name__}): give a file of torch.export.save (.pt2) or "
            "torch.jit.save; weights alone are no network, for them write a package.module:function"
        ) from error
