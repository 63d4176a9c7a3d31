"""Frozen segmentation networks, which make masks from the images of a dataset that has none.

Not here: what a mask does to the image (`debias.py`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.networks.models import call_function, error_summary
from pipeline.networks.sources import ImageShape, torchvision_models
from pipeline.networks.weight_files import file_fault, plain_reason

TORCHVISION = "torchvision:"
FILES = (".pt", ".pth", ".ts", ".pt2")
SHORTER_SIDE = 520  # of the images that torchvision's segmentation networks were trained and evaluated with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in their training


class Segmenter(nn.Module):
    """A frozen network: images (N, 3, H, W) in [0, 1] → masks (N, 1, H, W), 1 on the object and 0 elsewhere.

    Args:
        network: returns logits (N, K, h, w), or a dictionary with them as ``out``, as torchvision's networks do. With
            one logit the object is where it is positive. With several the first class is the background, and the
            object is where another class has the largest logit.
        prepare: preprocesses the images.
    """

    def __init__(self, network: nn.Module, prepare: Callable[[Tensor], Tensor] = lambda images: images):
        super().__init__()
        self.network, self.prepare = network, prepare
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Segmenter:
        """Keep the network in evaluation mode, whatever the mode of the teacher around it."""
        self.training = mode
        if not isinstance(self.network, torch.fx.GraphModule):  # a program of torch.export has one mode
            self.network.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        output = self.network(self.prepare(images))
        logits = output["out"] if isinstance(output, dict) else output
        logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        on_object = logits > 0 if logits.shape[1] == 1 else logits.argmax(1, keepdim=True) != 0
        return on_object.to(images.dtype)


def build_segmenter(spec: str, image_shape: ImageShape, *, weights: bool = True) -> Segmenter:
    """Build or load the segmentation network that the user names, and try it once on two random images.

    Args:
        spec: ``torchvision:NAME``, a network of torchvision's, trained on the 20 classes of Pascal VOC and run at a
            shorter side of 520; a file of `torch.export.save` (``.pt2``) or `torch.jit.save` (``.pt``, ``.pth``,
            ``.ts``); or ``package.module:function``, a function of the user's own that returns an `nn.Module`. Files
            and functions run code of the user's own, so `load_classifier` loads them only if the user names them.
        image_shape: (C, H, W) of the images.
        weights: load torchvision's weights, which are downloaded unless they are cached. Without, the network gets
            random weights, to be replaced by saved ones.

    Raises:
        ModelError: there is no such segmenter, it does not load, or it does not return the logits that `Segmenter`
            takes.
    """
    name = f"the segmenter '{spec}'"
    if spec.startswith(TORCHVISION):
        segmenter = Segmenter(_of_torchvision(spec.removeprefix(TORCHVISION), weights), _as_torchvision)
    elif spec.endswith(FILES):
        segmenter = Segmenter(_of_file(Path(spec)))
    elif ":" in spec:
        network = call_function(spec, "segmenter", "segmenter")
        if not isinstance(network, nn.Module):
            raise ModelError(f"{name} returned {type(network).__name__}: it must return an nn.Module")
        segmenter = Segmenter(network)
    else:
        raise ModelError(
            f"unknown segmenter '{spec}': give torchvision:{_names()[-1]} or another of torchvision's "
            f"({', '.join(_names()[:-1])}), a file ({', '.join(FILES)}), or package.module:function"
        )
    segmenter.train()
    shape = (2, *image_shape)
    try:
        masks = segmenter(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
        fits = masks.shape == (2, 1, *image_shape[1:])
    except Exception as error:
        raise ModelError(
            f"{name} must take images {shape} in [0, 1] and return logits (N, K, h, w), or a dictionary with them as "
            f"'out', but it does not take images like these: {error_summary(error)}"
        ) from error
    if not fits:
        raise ModelError(
            f"{name} makes masks of shape {tuple(masks.shape)} for images {shape}: it must make one mask an image"
        )
    return segmenter


def _names() -> list[str]:
    return list(torchvision_models().list_models(module=torchvision_models().segmentation))


def _of_torchvision(name: str, weights: bool) -> nn.Module:
    if name not in _names():
        raise ModelError(f"torchvision has no segmentation network '{name}': choose one of {', '.join(_names())}")
    if not weights:
        return torchvision_models().get_model(name, weights=None, weights_backbone=None, num_classes=21)
    trained = torchvision_models().get_model_weights(name).DEFAULT
    try:
        return torchvision_models().get_model(name, weights=trained)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ModelError(
            f"the weights of torchvision's {name} are not here and cannot be fetched ({error}): fetch {trained.url} "
            f"on a machine with a network, and put the file into {folder}"
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
    if (fault := file_fault(path)) is not None:
        raise ModelError(f"the segmenter {path} does not load: it is {fault}")
    try:
        if path.suffix == ".pt2":
            exported: Any = torch.export.load(content)
            return exported.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, which a reader cannot change
            return torch.jit.load(content, map_location="cpu")
    except Exception as error:  # torch raises many types for a file that is cut or foreign
        raise ModelError(
            f"the segmenter {path} does not load ({plain_reason(error)}): give a file of torch.export.save (.pt2) or "
            "torch.jit.save, or for weights alone a package.module:function that builds the network and loads them"
        ) from error
