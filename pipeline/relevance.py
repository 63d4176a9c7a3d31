"""The relevance engine: heatmaps of any PyTorch model by LRP, differentiable once more.

A `Tracer` puts the rules' nodes into the autograd graph during one forward pass, and each heatmap is one backward
pass. The model is neither changed nor wrapped. Not here: the rules of the operations (`rules/`).
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
    """Explain one class of each image by a heatmap ``x · G``: LRP-Flex (Bassi et al., arXiv 2407.09788) or other rules.

    G is the gradient of the logit ``y[target_class]`` at the image, computed with modified ReLUs: a ReLU with output
    ``a`` multiplies the gradient by ``a / (a + ε)`` instead of the step function. On ReLU networks ε = 0 is
    Gradient×Input. Batch norm is the affine map ``γ / σ``. Other activations, products, attention and norms of single
    samples follow AttnLRP (Achtibat et al., ICML 2024). The model runs in its present mode, training or evaluation, and
    is not changed.

    Args:
        model: a callable made of torch operations: images → logits (N, K).
        images: (N, C, H, W), or any other floating (N, ...).
        target_class: integers in [0, K), (N,).
        epsilon: a number ≥ 0, or one for each image, (N,).
        create_graph: make the heatmaps differentiable with respect to the parameters, and to ``images`` if they
            require a gradient. Ordinary gradients of the logits are not affected.
        rules: the rules of the operations: the name of one of `RULE_SETS`, or a `RuleSet` of your own.

    Returns:
        The logits (N, K), and the heatmaps, with the shape and dtype of ``images``: one signed value for each input
        channel.

    Raises:
        RelevanceError: an operation of the model has no rule; the text names the operation and the module.
        ValueError: shapes, classes or ε are wrong.
    """
    trace = Trace(model, images, rules)
    heatmaps = trace.heatmaps(target_class, epsilon, create_graph=create_graph)
    return (trace.logits if create_graph else trace.logits.detach()), heatmaps


class Trace:
    """One forward pass of a model over images, for any number of heatmaps. The draws of a sample share one trace.

    Args:
        model: as in `explain`.
        images: as in `explain`.
        rules: as in `explain`.

    Attributes:
        logits: (N, K), attached to the graph.
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
                through_steps = tracer.kind(self.logits) == "step"
        self._check_logits(tracer, through_steps)

    def heatmaps(
        self,
        target_class: Tensor,
        epsilon: float | Tensor,
        *,
        create_graph: bool = False,
        keep_graph: bool = False,
    ) -> Tensor:
        """Return the heatmaps of one class and ε per image, see `explain`. ``keep_graph`` allows further calls."""
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
        """Return the modified gradient G alone, at the images or at an activation of this pass.

        Args:
            target_class: as in `explain`.
            epsilon: as in `explain`.
            at: the activation; None for the images. The gradient has its shape.
            create_graph: as in `explain`.
            keep_graph: allow further calls.

        Raises:
            RelevanceError: the logits do not depend on the activation.
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
        """Return the modified gradient of Σ_k cotangent[k] · y[k] instead of one logit, see `gradient`.

        Args:
            cotangent: (N, K). If it depends on the logits, it is a constant in this pass all the same. With
                ``create_graph`` the result is differentiable with respect to it.
            epsilon: as in `explain`.
            at: as in `gradient`.
            create_graph: as in `explain`.
            keep_graph: as in `gradient`.

        Raises:
            RelevanceError: the logits do not depend on the activation.
        """
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        if self.state.epsilon is not None:
            raise RuntimeError("this trace is propagating relevance already: use one trace in each thread")
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
                    materialize_grads=at is None,  # zeros for a model that ignores its images
                )
            finally:
                self.state.end()
        if gradient is None:
            raise RelevanceError(
                "the logits do not depend on the activation whose gradient is needed: it lies on no path from the "
                "image to them, or a norm that is not a module replaced its layer; choose another explainer"
            )
        return gradient

    def _check_logits(self, tracer: Tracer, through_steps: bool) -> None:
        samples = tracer.samples
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 2 or len(self.logits) != samples:
            returned = tuple(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise ValueError(f"the model must return logits of shape ({samples}, K), got {returned}")
        if through_steps:
            raise RelevanceError(
                "the logits depend on the image through step functions alone, such as comparisons or torch.sign, which "
                "carry no relevance: use activations with a gradient"
            )
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
    """Return ε as (N,), and the one number that it is for all samples, or None if it differs or is not known yet."""
    if epsilon is None:
        raise ValueError(
            f"epsilon must be a number or have shape ({samples},), got None: give that of the teacher's maps"
        )
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
    """Return whether a CUDA graph is being recorded: then the tensor has no values yet."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()
