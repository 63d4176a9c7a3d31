"""The relevance engine: heatmaps of any PyTorch model by LRP, differentiable once more.

One forward pass in which a `TorchFunctionMode` puts the rules' nodes (`rules/`) into the autograd graph,
then one backward pass for each heatmap. The model is neither changed nor wrapped. Not here: what an
operation does to relevance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from pipeline.rules import (
    LIKE_THE_SECOND,
    PassState,
    RelevanceError,
    RuleSet,
    StopRelevance,
    batch_axis_after,
    rule_set,
    tensors,
)

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
        self.rules = rule_set(rules)
        self.samples = len(images)
        self.state = PassState()
        with torch.inference_mode(False), torch.enable_grad():
            if images.is_inference():
                images = images.clone()
            self._asked_for_images = images.requires_grad
            self._images = images if images.requires_grad else images.detach().requires_grad_()
            entry = self._images.clone()  # the model may change what it is given
            self.mark(entry, batch_axis=0)
            with _Interceptor(self):
                self.logits = model(entry)
        self._check_logits(len(images))

    def heatmaps(
        self,
        target_class: Tensor,
        epsilon: float | Tensor,
        *,
        create_graph: bool = False,
        keep_graph: bool = False,
    ) -> Tensor:
        """The heatmaps of one class and ε per image; see `explain`. ``keep_graph`` allows further calls."""
        samples, classes = self.logits.shape
        target_class = _checked_classes(target_class, samples, classes).to(self.logits.device)
        epsilon = _checked_epsilon(epsilon, samples)
        if self.state.epsilon is not None:
            raise RuntimeError("this trace is propagating relevance already: use a trace of its own for each thread")
        one_hot = torch.zeros_like(self.logits).scatter_(1, target_class[:, None], 1)
        self.state.uniform = float(epsilon[0]) if samples and bool((epsilon == epsilon[0]).all()) else None
        self.state.epsilon = epsilon.to(self.logits)
        try:
            (gradient,) = torch.autograd.grad(
                self.logits,
                self._images,
                one_hot,
                create_graph=create_graph,
                retain_graph=create_graph or keep_graph,
                materialize_grads=True,
            )
        finally:
            self.state.epsilon = None
        if not create_graph:
            return (self._images * gradient).detach()
        return (self._images if self._asked_for_images else self._images.detach()) * gradient

    # --- following relevance through the forward pass ---
    # The autograd nodes that rules made carry this pass's state in their metadata, with the batch axis. What depends
    # on the image through any other node (a custom autograd function, scripted code) was not seen and is refused.

    def carries(self, tensor: Tensor) -> bool:
        """Whether relevance reaches this tensor: rules made it from the image."""
        node: Any = tensor.grad_fn
        if node is None or self.state in node.metadata:
            return node is not None
        if self.rules.otherwise is None and (hidden := self._hidden_dependency(node)):
            raise self.unknown(hidden, "which hides from the tracer how its output depends on the image")
        return self.rules.otherwise is not None and self._hidden_dependency(node) is not None

    def batch_axis(self, *carrying: Tensor) -> int | None:
        """The axis of the batch in tensors that carry relevance; None where it is lost, or not one for all."""
        axes = {tensor.grad_fn.metadata.get(self.state) for tensor in carrying}  # type: ignore
        return axes.pop() if len(axes) == 1 else None

    def mark(self, tensor: Tensor, batch_axis: int | None) -> None:
        """Note that relevance reaches this tensor, unless a rule ends it there or has noted it already."""
        node: Any = tensor.grad_fn
        if node is not None and not _stops_relevance(node):
            node.metadata.setdefault(self.state, batch_axis)

    def written_out(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function made of operations that have rules, from within a rule."""
        with _Interceptor(self):
            return function(*args, **kwargs)

    def _hidden_dependency(self, node: Any) -> str | None:
        """The name of a node between an unmarked node and the image, if the image is among its ancestors.

        Relevance is cut on purpose at `stop_relevance`, so the search does not pass it. It ends at
        parameters, which is after a few nodes for a norm's statistics or a normalised weight.
        """
        stack: list[Any] = [node]
        seen: set[Any] = set()
        while stack:
            node = stack.pop()
            if node in seen or _stops_relevance(node):
                continue
            seen.add(node)
            for parent, _ in node.next_functions:
                if parent is None:
                    continue
                if self.state in parent.metadata:
                    return node.name()
                stack.append(parent)
        return None

    def unknown(self, operation: Callable[..., Any] | str, why: str = "") -> RelevanceError:
        """The error for an operation without a rule."""
        name = operation if isinstance(operation, str) else resolve_name(operation) or repr(operation)
        return RelevanceError(
            f"no relevance rule for {name}{' ' * bool(why)}{why}, in {_module_on_the_stack()}: the heatmap "
            "would be wrong. Use an architecture made of convolutions, linear layers, attention, activations, norms, "
            "pooling, sums and products, or enter a rule of your own with pipeline.rule_for"
        )

    def _check_logits(self, samples: int) -> None:
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 2 or len(self.logits) != samples:
            got = tuple(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise ValueError(f"the model must return logits of shape ({samples}, K), got {got}")
        if not self.carries(self.logits):
            raise RelevanceError(
                "the logits do not depend on the image by any operation that autograd recorded: "
                "does the model run under torch.no_grad, or detach its input?"
            )


class _Interceptor(TorchFunctionMode):
    """Puts the rule in place of every torch function that touches what depends on the image."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # else a compiled model compiles the choice of rules in
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        trace = self.trace
        looked_at = args[:1] if func in LIKE_THE_SECOND else [args, kwargs]
        carrying = [tensor for tensor in tensors(looked_at) if trace.carries(tensor)]
        if not carrying:
            return func(*args, **kwargs)
        rule = trace.rules.rule(func)
        if rule is None:
            output = func(*args, **kwargs)
            if any(tensor.requires_grad for tensor in tensors(output)):
                raise trace.unknown(func)
            return output  # a shape, a comparison, a detached copy: no relevance passes
        axes = {id(tensor): trace.batch_axis(tensor) for tensor in carrying}
        output = rule(trace, func, *args, **kwargs)
        for tensor in tensors(output):
            trace.mark(tensor, batch_axis_after(axes, trace.samples, func, args, kwargs, tensor))
        return output


def _stops_relevance(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is StopRelevance


def _module_on_the_stack() -> str:
    """Name and type of the innermost module that is running, named as in the outermost one."""
    modules = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return "a function outside any module"
    names = {id(module): name for name, module in modules[-1].named_modules()}
    name = names.get(id(modules[0]), "")
    return f"module '{name}' ({type(modules[0]).__name__})" if name else f"the model ({type(modules[0]).__name__})"


def _checked_classes(target_class: Tensor, samples: int, classes: int) -> Tensor:
    target_class = torch.as_tensor(target_class)
    if target_class.shape != (samples,) or target_class.is_floating_point():
        raise ValueError(
            f"target_class must hold one integer for each of the {samples} images, "
            f"got {target_class.dtype} {tuple(target_class.shape)}"
        )
    outside = target_class[(target_class < 0) | (target_class >= classes)]
    if len(outside):
        raise ValueError(f"target_class {outside[0].item()} is outside the model's {classes} classes")
    return target_class.long()


def _checked_epsilon(epsilon: float | Tensor, samples: int) -> Tensor:
    values = epsilon if isinstance(epsilon, Tensor) else torch.as_tensor(epsilon, dtype=torch.float64)
    if values.dim() == 0:
        values = values.expand(samples)
    if values.shape != (samples,):
        raise ValueError(f"epsilon must be a number or have shape ({samples},), got {tuple(values.shape)}")
    if not (values >= 0).all():
        raise ValueError(f"epsilon must be 0 or more, got {values.min().item()}")
    return values
