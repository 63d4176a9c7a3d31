"""Following relevance through a forward pass: the rule for each call, and the tensors that depend on the image.

Not here: the rules of the operations (`rules/`), and how relevance is propagated back (`relevance.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial, wraps
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from pipeline.errors import RelevanceError
from pipeline.private_torch import (
    NODES_THAT_RETURN_THEIR_INPUT,
    base_of,
    compiler_is_loaded,
    is_view,
    running_checkpoint,
)
from pipeline.rules import LIKE_THE_SECOND, PassState, RuleSet, StopRelevance, batch_axis_after, stop_relevance, tensors
from pipeline.rules.joined import EXTREMES, JOINS, Joined, joined_after, rule_of_extremes
from pipeline.rules.steps import (
    FOLLOWED,
    MOVES,
    NOTHING_KNOWN,
    OF_RELATIVES,
    SHAPES,
    Constant,
    Name,
    Origin,
    Value,
    kind_after,
    rule_of_relatives,
    rule_with_steps,
    unchanged,
    value_after,
    writes,
)

_REMEDY = (
    "Use an architecture made of convolutions, linear layers, attention, activations, norms, pooling, sums and "
    "products, or enter a rule of your own with pipeline.rule_for"
)
_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# they tell nothing of the values; checkpointing asks for the node, up to 2.13
_OF_NO_VALUES: set[Any] = {getattr(Tensor, name).__get__ for name in ("grad_fn", "shape", "ndim", "dtype", "device")}
_OF_NO_VALUES |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
_STOP = f"{StopRelevance.__name__}Backward"


class Mark(NamedTuple):
    """What the metadata of an autograd node say of its output, which carries relevance.

    ``outer``: whether it depends on parameters, or on images that require a gradient. ``values``: what is known of each
    output, by its number.
    """

    batch_axis: int | None
    outer: bool
    values: dict[int, Value]


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Do as `torch.compiler.disable`, whose import takes a second or two, once the compiler is in use."""
    disabled = None

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not compiler_is_loaded():
            return method(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return call


class Tracer(TorchFunctionMode):
    """Replaces every torch function whose input depends on the image by its rule.

    The metadata of the autograd nodes that rules make hold a `Mark`, by the state of the pass. A tensor that depends on
    the image through another node (a custom autograd function, scripted code) escapes the tracer and is refused. What
    depends on the image and carries no relevance, such as a comparison, is followed too, see `rules/steps.py`. The
    tracer holds no tensor of the graph after the pass.

    Args:
        rules: the rules.
        samples: the number of images.
    """

    def __init__(self, rules: RuleSet, samples: int):
        super().__init__()
        self.rules, self.samples = rules, samples
        self.state = PassState()
        self.constants: Any = WeakTensorKeyDictionary()  # to a `Constant`: tensors that depend on the image otherwise
        self._axes_of_views: dict[int, tuple[Any, int | None]] = {}  # by the id, with a weak reference
        self._depth = 0
        self.latest: tuple[Any, Any] = (None, None)  # the last convolution or linear layer, for a norm that follows it

    def __enter__(self) -> Tracer:
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.latest = (None, None)
        self._depth -= 1
        if not self._depth:
            self.constants.clear()
            self._axes_of_views.clear()
        super().__exit__(*error)

    @_uncompiled  # otherwise a compiled model includes the choice of rules
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_NO_VALUES:
            return func(*args, **kwargs)
        inputs = tensors(args)
        if kwargs:
            inputs += tensors(kwargs)
        used = inputs[:1] if func in LIKE_THE_SECOND else inputs
        carrying = [tensor for tensor in used if self.carries(tensor)]
        constants = [tensor for tensor in used if tensor in self.constants] if self.constants else []
        if not carrying and not constants:
            return func(*args, **kwargs)
        self._check_hidden_writing(func, args, carrying)
        if not carrying:
            output = func(*args, **kwargs)
            if constants and func is stop_relevance:
                return output.view_as(output)  # another tensor, of which nothing is known
            self._follow_constants(func, args, kwargs, constants, output)
            return output
        rule = self.rules.rule(func)
        if rule is None:
            output = func(*args, **kwargs)
            if any(tensor.requires_grad for tensor in tensors(output)):
                raise self.unknown(func)
            self._follow_constants(func, args, kwargs, [*carrying, *constants], output)
            return output  # a shape, a comparison, a detached copy: no relevance passes
        self._recompute_with_rules()
        if self.rules.otherwise is None:
            if kwargs.get("out") is not None:
                raise self.unknown(func, "that writes into an argument 'out'")
            steps = [tensor for tensor in constants if self.constants[tensor].kind != "smooth"]
            if steps:
                rule = rule_with_steps(self, func, rule, carrying, steps)
            elif func in EXTREMES and len(carrying) == 1:
                rule = rule_of_extremes(self, func, rule, carrying[0], args, kwargs)
            elif len(carrying) + len(constants) > 1 and func in OF_RELATIVES:
                rule = rule_of_relatives(self, func, rule, args, kwargs, [*carrying, *constants])
        return self._call(rule, func, args, kwargs, carrying, constants, inputs)

    def _check_hidden_writing(self, func: Any, args: Any, carrying: list[Tensor]) -> None:
        """Check that no activation is changed in place behind autograd, which then knows nothing of the change.

        Raises:
            RelevanceError: it is.
        """
        if self.rules.otherwise is not None or not (func == _SETS_DATA or writes(func)):
            return
        hidden = func == _SETS_DATA or not torch.is_grad_enabled()
        if hidden and carrying and carrying[0] is args[0]:
            raise self.unknown(func, "that changes an activation where autograd does not see it")
        if isinstance(args[0], Tensor) and args[0] in self.constants:
            memory = args[0].untyped_storage().data_ptr()
            if any(source.untyped_storage().data_ptr() == memory for source in self.constants[args[0]].sources):
                raise self.unknown(func, "that changes an activation through its detached values")

    def _call(
        self,
        rule: Callable[..., Any],
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        carrying: list[Tensor],
        constants: list[Tensor],
        inputs: list[Tensor],
    ) -> Any:
        """Call a rule, and mark what it returns."""
        sources = [*carrying, *constants]
        marks = [self._mark_of(tensor) for tensor in carrying]
        axes = {id(t): None if mark is None else mark.batch_axis for t, mark in zip(carrying, marks, strict=True)}
        outer = any(mark is None or mark.outer for mark in marks)
        outer = outer or any(tensor.requires_grad and id(tensor) not in axes for tensor in inputs)
        values = self._values(func, args, kwargs, sources)
        bases = [(view, base, view._version, self._mark_of(base)) for view, base in _with_base(carrying)]
        output = rule(self, func, *args, **kwargs)
        outputs = tensors(output)
        for position, tensor in enumerate(outputs):
            axis = batch_axis_after(axes, self.samples, func, args, kwargs, tensor)
            self.mark(tensor, axis, outer, None if values is None else values(tensor, position))
        for view, base, version, mark in bases:
            if view._version != version and mark is not None:
                self.mark(base, mark.batch_axis, outer=True)
        if func is not stop_relevance:
            self._follow_constants(func, args, kwargs, sources, outputs)
        return output

    def carries(self, tensor: Tensor) -> bool:
        """Return whether relevance reaches a tensor: rules made it from the image.

        Raises:
            RelevanceError: the tensor depends on the image through a node that no rule made.
        """
        node: Any = tensor.grad_fn
        if node is None or self.state in node.metadata:
            return node is not None
        if (mark := self._mark_of_remade_view(tensor)) is not None:
            node.metadata[self.state] = mark
            return True
        if node.name() in NODES_THAT_RETURN_THEIR_INPUT and (marked := self._marked_parent(node)) is not None:
            node.metadata[self.state] = marked
            return True
        if self.rules.otherwise is None and (hidden := self._hidden_dependency(node)):
            raise self.unknown(hidden, "which hides from the tracer how its output depends on the image")
        return self.rules.otherwise is not None and self._hidden_dependency(node) is not None

    def batch_axis(self, *carrying: Tensor) -> int | None:
        """Return the batch axis of tensors that carry relevance; None if it is lost, or differs between them."""
        marks = [self._mark_of(tensor) for tensor in carrying]
        axes = {None if mark is None else mark.batch_axis for mark in marks}
        return axes.pop() if len(axes) == 1 else None

    def outer_gradient_wanted(self, carrying: Tensor) -> bool:
        """Return whether a tensor depends on parameters, or on images that require a gradient."""
        mark = self._mark_of(carrying)
        return mark is None or mark.outer

    def names(self, carrying: Tensor) -> tuple[Name, ...]:
        """Return the names of the values of a tensor that carries relevance."""
        return ((carrying.grad_fn, carrying.output_nr), *self._value_of(carrying).names)

    def origins(self, tensor: Tensor) -> Mapping[Name, Origin]:
        """Return the tensors of which a tensor is an elementwise function, by name; itself first, if it carries."""
        if self._mark_of(tensor) is None:
            return self.constants[tensor].value.origins if tensor in self.constants else {}
        itself = Origin(TensorWeakRef(tensor), unchanged)
        return {**dict.fromkeys(self.names(tensor), itself), **self._value_of(tensor).origins}

    def kind(self, tensor: Any) -> str | None:
        """Return the kind of a tensor that depends on the image and carries no relevance, see `Constant`."""
        return self.constants[tensor].kind if isinstance(tensor, Tensor) and tensor in self.constants else None

    def joined(self, carrying: Tensor) -> Joined | None:
        """Return where constants are among the values of a tensor that carries relevance."""
        return self._value_of(carrying).joined

    def is_bounded(self, carrying: Tensor) -> bool:
        """Return whether a ReLU, or another bound, has made a tensor that carries relevance."""
        return self._value_of(carrying).bounded

    def mark(self, tensor: Tensor, batch_axis: int | None, outer: bool, value: Value | None = None) -> None:
        """Record that relevance reaches a tensor, unless a rule stops it there or has recorded it already."""
        node: Any = tensor.grad_fn
        if node is not None and not _stops_relevance(node):
            mark = node.metadata.setdefault(self.state, Mark(batch_axis, outer, {}))
            mark.values.setdefault(tensor.output_nr, value or NOTHING_KNOWN)
            if is_view(tensor):
                self._axes_of_views[id(tensor)] = (ref(tensor), mark.batch_axis)
            if self.constants and tensor in self.constants:  # an operation in place has written what carries into it
                del self.constants[tensor]

    def written_out(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function with the rules active, from a place where they are not: a rule, or a backward pass."""
        with self:
            return function(*args, **kwargs)

    def _mark_of(self, tensor: Tensor) -> Mark | None:
        node: Any = tensor.grad_fn
        return None if node is None else node.metadata.get(self.state)

    def _value_of(self, carrying: Tensor) -> Value:
        mark = self._mark_of(carrying)
        return NOTHING_KNOWN if mark is None else mark.values.get(carrying.output_nr, NOTHING_KNOWN)

    def _mark_of_remade_view(self, tensor: Tensor) -> Mark | None:
        """Return the mark of a view that got another node when operations with rules changed its base in place."""
        base, (view, axis) = base_of(tensor), self._axes_of_views.get(id(tensor), (None, None))
        if base is None or view is None or view() is not tensor or self._mark_of(base) is None:
            return None
        node: Any = tensor.grad_fn
        return Mark(axis, True, {}) if node.next_functions[0][0] is base.grad_fn else None

    def _values(
        self, func: Any, args: Any, kwargs: Any, sources: list[Tensor]
    ) -> Callable[[Tensor, int], Value] | None:
        """Return a function that tells what is known of an output of a call, whose arguments it may have changed; None
        if nothing is."""
        if self.rules.otherwise is not None or func not in FOLLOWED:
            return None
        carrying = [tensor for tensor in sources if self._mark_of(tensor) is not None]
        if func in JOINS:
            return lambda output, position: Value(joined=joined_after(func, args, kwargs, carrying, output))
        origins = {id(tensor): self.origins(tensor) for tensor in sources}
        names = self.names(carrying[0]) if len(sources) == len(carrying) == 1 else ()
        constants = {self.joined(tensor) for tensor in carrying}
        joined = constants.pop() if len(constants) == 1 else None

        def value(output: Tensor, position: int) -> Value:
            known = value_after(func, args, kwargs, origins, names, output, position)
            if joined is None:
                return known
            return replace(known, joined=Joined(padded=joined.padded) if func in MOVES else joined)

        return value

    def _follow_constants(self, func: Any, args: Any, kwargs: Any, sources: list[Tensor], output: Any) -> None:
        """Record the outputs that depend on the image, although they carry no relevance."""
        if not sources or func in SHAPES or self.rules.otherwise is not None:
            return
        changed = args[:1] if func is Tensor.__setitem__ else tensors(output)
        changed = [tensor for tensor in changed if self._mark_of(tensor) is None]
        if not changed:
            return
        known = [self.constants[tensor] for tensor in sources if tensor in self.constants]
        carrying = [tensor for tensor in sources if tensor not in self.constants]
        values = self._values(func, args, kwargs, sources)
        for position, tensor in enumerate(changed):
            is_step = tensor in self.constants and self.constants[tensor].kind == "step"
            kinds = [*(constant.kind for constant in known), *(["smooth"] if carrying else [])]
            kind = "step" if is_step else kind_after(func, kinds, tensor)
            if kind is not None:
                its_sources = (*carrying, *(source for constant in known for source in constant.sources))
                value = NOTHING_KNOWN if values is None else values(tensor, position)
                self.constants[tensor] = Constant(kind, value, its_sources[:4])

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

    def unknown(self, operation: Callable[..., Any] | str, why: str = "", remedy: str = _REMEDY) -> RelevanceError:
        """Return the error for an operation without a rule."""
        name = operation if isinstance(operation, str) else resolve_name(operation) or repr(operation)
        return RelevanceError(
            f"no relevance rule for {name}{' ' * bool(why)}{why}, in {_module_on_the_stack()}: the heatmap "
            f"would be wrong. {remedy}"
        )

    def _recompute_with_rules(self) -> None:
        """Have the checkpointed block that is running, if any, recompute its forward pass with the rules in place."""
        block = running_checkpoint()
        if block is not None and not hasattr(block, "explained"):
            block.explained, self.latest = True, (None, None)
            block.recompute_fn = partial(self._recomputed, block.recompute_fn)

    def _recomputed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.state.recomputing = True
        try:
            return self.written_out(function, *args, **kwargs)
        finally:
            self.state.recomputing = False


def _with_base(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the views among tensors, each with its base."""
    return [(tensor, base) for tensor in tensors if (base := base_of(tensor)) is not None]


def _stops_relevance(node: Any) -> bool:
    return node.name() == _STOP


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
