"""Following relevance through a forward pass: the rule for each call, and the tensors that depend on the image.

Not here: the rules of the operations (`rules/`), and how relevance is propagated back (`relevance.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from pipeline.errors import RelevanceError
from pipeline.private_torch import NODES_THAT_RETURN_THEIR_INPUT, running_checkpoint
from pipeline.rules import LIKE_THE_SECOND, PassState, RuleSet, StopRelevance, batch_axis_after, tensors

_ASKS_FOR_ITS_NODE = Tensor.grad_fn.__get__  # type: ignore[attr-defined,union-attr]  # checkpointing does, up to 2.13


class Tracer(TorchFunctionMode):
    """Replaces every torch function whose input depends on the image by its rule.

    The metadata of the autograd nodes that rules make hold the state of the pass, the batch axis, and whether the outer
    gradient is needed there. A tensor that depends on the image through another node (a custom autograd function,
    scripted code) escapes the tracer and is refused. The tracer holds no tensor of the graph after the pass.

    Args:
        rules: the rules.
        samples: the number of images.
    """

    def __init__(self, rules: RuleSet, samples: int):
        super().__init__()
        self.rules, self.samples = rules, samples
        self.state = PassState()
        self.latest: tuple[Any, Any] = (None, None)  # the last convolution or linear layer, for a norm that follows it

    def __exit__(self, *error: Any) -> None:
        self.latest = (None, None)
        super().__exit__(*error)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # otherwise a compiled model includes the choice of rules
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _ASKS_FOR_ITS_NODE:
            return func(*args)
        inputs = tensors([args, kwargs])
        carrying = [tensor for tensor in (inputs[:1] if func in LIKE_THE_SECOND else inputs) if self.carries(tensor)]
        if not carrying:
            return func(*args, **kwargs)
        rule = self.rules.rule(func)
        if rule is None:
            output = func(*args, **kwargs)
            if any(tensor.requires_grad for tensor in tensors(output)):
                raise self.unknown(func)
            return output  # a shape, a comparison, a detached copy: no relevance passes
        self._recompute_with_rules()
        axes = {id(tensor): self.batch_axis(tensor) for tensor in carrying}
        outer = any(map(self.outer_gradient_wanted, carrying))
        outer = outer or any(tensor.requires_grad and id(tensor) not in axes for tensor in inputs)
        output = rule(self, func, *args, **kwargs)
        for tensor in tensors(output):
            self.mark(tensor, batch_axis_after(axes, self.samples, func, args, kwargs, tensor), outer)
        return output

    def carries(self, tensor: Tensor) -> bool:
        """Return whether relevance reaches a tensor: rules made it from the image.

        Raises:
            RelevanceError: the tensor depends on the image through a node that no rule made.
        """
        node: Any = tensor.grad_fn
        if node is None or self.state in node.metadata:
            return node is not None
        if node.name() in NODES_THAT_RETURN_THEIR_INPUT and (marked := self._marked_parent(node)) is not None:
            node.metadata[self.state] = marked
            return True
        if self.rules.otherwise is None and (hidden := self._hidden_dependency(node)):
            raise self.unknown(hidden, "which hides from the tracer how its output depends on the image")
        return self.rules.otherwise is not None and self._hidden_dependency(node) is not None

    def batch_axis(self, *carrying: Tensor) -> int | None:
        """Return the batch axis of tensors that carry relevance; None if it is lost, or differs between them."""
        axes = {tensor.grad_fn.metadata.get(self.state, (None,))[0] for tensor in carrying}  # type: ignore
        return axes.pop() if len(axes) == 1 else None

    def outer_gradient_wanted(self, carrying: Tensor) -> bool:
        """Return whether a tensor depends on parameters, or on images that require a gradient."""
        return carrying.grad_fn.metadata.get(self.state, (None, True))[1]  # type: ignore

    def mark(self, tensor: Tensor, batch_axis: int | None, outer: bool) -> None:
        """Record that relevance reaches a tensor, unless a rule stops it there or has recorded it already."""
        node: Any = tensor.grad_fn
        if node is not None and not _stops_relevance(node):
            node.metadata.setdefault(self.state, (batch_axis, outer))

    def written_out(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with the rules active, from a place where they are not: a rule, or a backward pass."""
        with self:
            return function(*args, **kwargs)

    def _marked_parent(self, node: Any) -> Any:
        return next((p.metadata[self.state] for p, _ in node.next_functions if p and self.state in p.metadata), None)

    def _hidden_dependency(self, node: Any) -> str | None:
        """Return the name of a node between an unmarked node and the image, or None if it does not depend on the image.

        `stop_relevance` cuts relevance on purpose, so the search does not pass it. The search ends at parameters, which
        are a few nodes away for a norm's statistics or a normalised weight.
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
        """Return the error for an operation without a rule."""
        name = operation if isinstance(operation, str) else resolve_name(operation) or repr(operation)
        return RelevanceError(
            f"no relevance rule for {name}{' ' * bool(why)}{why}, in {_module_on_the_stack()}: the heatmap "
            "would be wrong. Use an architecture made of convolutions, linear layers, attention, activations, norms, "
            "pooling, sums and products, or enter a rule of your own with pipeline.rule_for"
        )

    def _recompute_with_rules(self) -> None:
        """Have the checkpointed block that is running, if any, recompute its forward pass with the rules in place."""
        block = running_checkpoint()
        if block is not None and not hasattr(block, "explained"):
            block.explained, self.latest = True, (None, None)
            block.recompute_fn = partial(self.written_out, block.recompute_fn)


def _stops_relevance(node: Any) -> bool:
    return node.name() == f"{StopRelevance.__name__}Backward"


def _module_on_the_stack() -> str:
    """Return name and type of the innermost module that is running; the name is that in the outermost one."""
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
