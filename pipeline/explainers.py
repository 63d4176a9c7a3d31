"""How a decision can be explained: heatmaps, and the quantities of rival methods, by name.

Stage one explains the teacher with them, the trainers the student, so both are explained alike. Names are known without
PyTorch. Not here: the forward pass (`forward.py`) and how relevance is propagated (`relevance.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from options import Registry
from pipeline.errors import RelevanceError
from pipeline.rules import RULE_SETS

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.forward import Forward


@dataclass(frozen=True)
class Explainer:
    """One way to explain decisions; ``read`` makes the maps of a `Forward`, with the arguments of `Forward.maps`.

    ``rules`` is the rule set that the pass is traced with; None is an ordinary pass, and maps that know neither class
    nor ε. ``coarse`` maps have a value for each position of feature maps, (N, 1, h, w), others are shaped as the
    images. These feature maps are the last ones, or, with a ``stride``, the last ones that are that many times smaller
    than what the network takes.
    """

    read: Callable[..., Tensor]
    rules: str | None
    coarse: bool = False
    stride: int | None = None

    @property
    def sums_to_logit(self) -> bool:
        """Whether a map is a share of the logit, so that its sum has the meaning of a logit."""
        return self.read in (heatmaps, feature_heatmaps)


def heatmaps(forward: Forward, target_class: Tensor, epsilon: float | Tensor, **graph: Any) -> Tensor:
    """Return ``x · G`` by the rule set, see `explain`."""
    return forward.trace.heatmaps(target_class, epsilon, **graph)


def feature_heatmaps(forward: Forward, target_class: Tensor, epsilon: float | Tensor, **graph: Any) -> Tensor:
    """Return Σ_k A_k · G_k, the relevance of each position of feature maps A, with G the modified gradient at A.

    The layers behind A alone are explained. Their maps are less noisy than those of the pixels, and account for more of
    the logit, in deep networks with batch norms. Each position stands for the pixels that it sees (docs/engine.md).
    """
    maps = forward.feature_maps
    return (forward.trace.gradient(target_class, epsilon, at=maps, **graph) * maps).sum(1, keepdim=True)


def input_gradient(forward: Forward, target_class: Tensor, epsilon: float | Tensor, **graph: Any) -> Tensor:
    """Return G alone, the gradient of the logit at the image, by ``gradient-x-input`` (Ross et al., IJCAI 2017)."""
    return forward.trace.gradient(target_class, epsilon, **graph)


def grad_cam(forward: Forward, target_class: Tensor, epsilon: float | Tensor, **graph: Any) -> Tensor:
    """Return Σ_k w_k A_k, with w_k the mean over positions of ∂y[t]/∂A_k, without the final ReLU (Selvaraju et al.,
    ICCV 2017).

    A denotes the last feature maps. Values that the ReLU sets to zero would have no gradient, so that a student could
    not learn its way out of it, and a map of zeros has no scale to be compared at.
    """
    maps = forward.feature_maps
    weights = forward.trace.gradient(target_class, epsilon, at=maps, **graph).mean((2, 3), keepdim=True)
    return (weights * maps).sum(1, keepdim=True)


def attention(forward: Forward, target_class: Tensor, epsilon: float | Tensor, **graph: Any) -> Tensor:
    """Return Σ_k A_k²; it depends on neither class nor ε, so one draw suffices (Zagoruyko and Komodakis, ICLR 2017).

    A denotes the last feature maps.
    """
    return forward.feature_maps.square().sum(1, keepdim=True)


STRIDES = (4, 8, 16, 32)
EXPLAINERS: Registry[Explainer] = Registry("explainer", RelevanceError)
for _rules in RULE_SETS:
    EXPLAINERS[_rules] = Explainer(heatmaps, _rules)
EXPLAINERS["input-gradient"] = Explainer(input_gradient, "gradient-x-input")
EXPLAINERS["grad-cam"] = Explainer(grad_cam, "gradient-x-input", coarse=True)
for _stride in STRIDES:
    EXPLAINERS[f"flex-stride{_stride}"] = Explainer(feature_heatmaps, "flex", coarse=True, stride=_stride)
EXPLAINERS["attention"] = Explainer(attention, None, coarse=True)
