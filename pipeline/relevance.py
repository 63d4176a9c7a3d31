"""The relevance engine: heatmaps of any PyTorch model by LRP, differentiable once more.

One forward pass in which a `Tracer` puts the rules' nodes into the autograd graph, then one backward pass for
each heatmap. The model is neither changed nor wrapped. Not here: what an operation does to relevance (`rules/`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import RelevanceError
from pipeline.rules import RuleSet, rule_set
from pipeline.tracer import Tracer

Model = Callable[[Tensor], Tensor]


def explain(
    model: Model,
    images: Tensor,
    target_class: Tensor,
    epsilon: float | Tensor,
    create_graph: bool = False,
    rules: str | RuleSet = "flex",
) -> tuple[Tensor, Tensor]:
    """Heatmaps ``x · G`` of one class per image: LRP-Flex (Bassi et al., arXiv 2407.09788), or other rules by name.

    G is the gradient of the logit ``y[target_class]`` at the image with every ReLU of output ``a`` passing
    on ``a / (a + ε)`` of it in place of the step function; on ReLU networks ε = 0 is Gradient×Input. Batch norm
    is the affine map ``γ / σ``. Other activations, products, attention and norms of single samples follow AttnLRP
    (Achtibat et al., ICML 2024). The model, any callable made of torch operations, is run as it is (train or eval
    mode included) and left as it is.

    Args:
        model: maps images to logits (N, K).
        images: (N, C, H, W), or any other floating (N, ...).
        target_class: (N,) integers in [0, K).
        epsilon: a number ≥ 0, or one for each image, (N,).
        create_graph: make the heatmaps differentiable with respect to the parameters (and to ``images``
            where they require a gradient). Ordinary gradients of the logits are unaffected.
        rules: what operations do to relevance: one of `RULE_SETS` by name, or a `RuleSet` of your own.

    Returns:
        logits (N, K) and heatmaps, shaped and typed as ``images``: one signed value for each input channel.

    Raises:
        RelevanceError: an operation of the model has no rule; names the operation and the module.
        ValueError: shapes, classes, ε or rules that cannot be right.
    """
    trace = Trace(model, images, rules)
    heatmaps = trace.heatmaps(target_class, epsilon, create_graph=create_graph)
    return (trace.logits if create_graph else trace.logits.detach()), heatmaps


class Trace:
    """One forward pass of a model over images, from which any number of heatmaps are propagated back.

    ``logits`` is (N, K), attached to the graph. The draws of a sample share one trace.
    """

    def __init__(self, model: Model, images: Tensor, rules: str | RuleSet = "flex"):
        if not images.is_floating_point() or images.dim() < 2:
            raise ValueError(
                f"images must be floating-point with shape (N, ...), got {images.dtype} "
                f"{tuple(images.shape)}; divide uint8 images by 255 first"
            )
        tracer = Tracer(rule_set(rules), len(images))
        self.state = tracer.state
        with torch.inference_mode(False), torch.enable_grad():
            if images.is_inference():
                images = images.clone()
            self._asked_for_images = images.requires_grad
            self._images = images if images.requires_grad else images.detach().requires_grad_()
            entry = self._images.clone()  # the model may change what it is given
            tracer.mark(entry, batch_axis=0, outer=self._asked_for_images)
            with tracer:
                self.logits = model(entry)
        self._check_logits(tracer)

    def heatmaps(
        self,
        target_class: Tensor,
        epsilon: float | Tensor,
        *,
        create_graph: bool = False,
        keep_graph: bool = False,
    ) -> Tensor:
        """The heatmaps of one class and ε per image; see `explain`. ``keep_graph`` allows further calls."""
        gradient = self.gradient(target_class, epsilon, create_graph=create_graph, keep_graph=keep_graph)
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
            return (self._images if self._asked_for_images else self._images.detach()) * gradient

    def gradient(
        self,
        target_class: Tensor,
        epsilon: float | Tensor,
        *,
        at: Tensor | None = None,
        create_graph: bool = False,
        keep_graph: bool = False,
    ) -> Tensor:
        """The modified gradient G alone, at the images or ``at`` an activation of this pass, shaped as that is.

        Raises RelevanceError where the logits do not depend on the activation.
        """
        target_class = _checked_classes(target_class, *self.logits.shape).to(self.logits.device)
        with torch.inference_mode(False):
            one_hot = torch.zeros_like(self.logits).scatter_(1, target_class.clone()[:, None], 1)
        return self.pull_back(one_hot, epsilon, at=at, create_graph=create_graph, keep_graph=keep_graph)

    def pull_back(
        self,
        cotangent: Tensor,
        epsilon: float | Tensor,
        *,
        at: Tensor | None = None,
        create_graph: bool = False,
        keep_graph: bool = False,
    ) -> Tensor:
        """As `gradient`, of Σ_k cotangent[k] · y[k], (N, K), in place of one logit.

        A cotangent that depends on the logits is held where it is; with ``create_graph`` it is differentiated too.
        """
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        if self.state.epsilon is not None:
            raise RuntimeError("this trace is propagating relevance already: use a trace of its own for each thread")
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
            values, self.state.uniform = _checked_epsilon(epsilon, len(self.logits))
            if self.state.uniform is None:
                self.state.epsilon = values.clone().to(self.logits.device, wide)
            else:
                self.state.epsilon = self.logits.new_full((len(self.logits),), self.state.uniform, dtype=wide)
            try:
                (gradient,) = torch.autograd.grad(
                    self.logits,
                    self._images if at is None else at,
                    cotangent,
                    create_graph=create_graph,
                    retain_graph=create_graph or keep_graph,
                    allow_unused=True,
                    materialize_grads=at is None,  # the image of a model that looks at nothing has none
                )
            finally:
                self.state.epsilon = None
        if gradient is None:
            raise RelevanceError(
                "the gradient is asked at an activation that the logits do not depend on: it is beside the way from "
                "the image to them, or a norm that is no module took its layer's place"
            )
        return gradient

    def _check_logits(self, tracer: Tracer) -> None:
        samples = tracer.samples
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 2 or len(self.logits) != samples:
            got = tuple(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise ValueError(f"the model must return logits of shape ({samples}, K), got {got}")
        if not tracer.carries(self.logits):
            raise RelevanceError(
                "the logits do not depend on the image by any operation that autograd recorded: "
                "does the model run under torch.no_grad, or detach its input?"
            )


def _checked_classes(target_class: Tensor, samples: int, classes: int) -> Tensor:
    target_class = torch.as_tensor(target_class)
    if target_class.shape != (samples,) or target_class.is_floating_point():
        raise ValueError(
            f"target_class must hold one integer for each of the {samples} images, "
            f"got {target_class.dtype} {tuple(target_class.shape)}"
        )
    if not _recorded(target_class):
        outside = target_class[(target_class < 0) | (target_class >= classes)]
        if len(outside):
            raise ValueError(f"target_class {outside[0].item()} is outside the model's {classes} classes")
    return target_class.long()


def _checked_epsilon(epsilon: float | Tensor, samples: int) -> tuple[Tensor, float | None]:
    """ε as (N,), and the number that it is where it is one for all, as far as that is known."""
    values = epsilon if isinstance(epsilon, Tensor) else torch.as_tensor(epsilon, dtype=torch.float64)
    if values.dim() == 0:
        values = values.expand(samples)
    if values.shape != (samples,):
        raise ValueError(f"epsilon must be a number or have shape ({samples},), got {tuple(values.shape)}")
    if _recorded(values):
        return values, None
    wrong = values[~((values >= 0) & values.isfinite())]
    if len(wrong):
        raise ValueError(f"epsilon must be 0 or more, and finite, got {wrong[0].item()}")
    if not bool((values == values[:1]).all()):
        return values, None
    return values, float(values[0]) if samples else 0.0


def _recorded(values: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which holds no numbers yet, so that none can be looked at."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()
