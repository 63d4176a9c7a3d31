"""Step functions of the image, such as ``z > 0``: how they are followed, and the rule of operations that use them.

A ReLU may be written ``z * (z > 0)``, ``torch.where(z > 0, z, 0)`` or ``(z + z.abs()) / 2``. Autograd passes the step
function there, without ε. `Value` records of which tensors a value is an elementwise function, so that the identity
rule of activations applies to it. Not here: the tracer, which keeps these records (`tracer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RelevanceError
from pipeline.rules.activations import ACTIVATIONS, BOUNDS
from pipeline.rules.elementwise import EXTREMES_OF_TWO, elementwise
from pipeline.rules.joined import JOINS, Joined
from pipeline.rules.linear import LIKE_THE_SECOND, SELECTIONS
from pipeline.rules.node import written
from pipeline.rules.relu import RELU
from pipeline.rules.table import Rule, rule_for, tensors

if TYPE_CHECKING:
    from torch.utils.weak import TensorWeakRef

    from pipeline.tracer import Tracer

T: Any = torch.Tensor
Name = Hashable  # of a value: an output of an autograd node, or a function of other names
Curve = Callable[[Tensor], Tensor]  # values of the origin → values of its function
MOST_ORIGINS = 8


class Origin(NamedTuple):
    """A tensor of which another is an elementwise function, and that function."""

    tensor: TensorWeakRef | None
    curve: Curve


@dataclass(frozen=True)
class Value:
    """What is known of the values of a tensor: their ``names``, the ``origins`` of which they are functions, where
    constants are among them, and whether a ReLU or another bound has made them."""

    names: tuple[Name, ...] = ()
    origins: Mapping[Name, Origin] = field(default_factory=dict)
    joined: Joined | None = None
    bounded: bool = False


NOTHING_KNOWN = Value()


class Constant(NamedTuple):
    """A tensor that depends on the image, and no relevance passes through it.

    ``kind``: "smooth", as a detached copy; "selection", as the indices of the largest values; "step", as a comparison.
    ``sources`` carry relevance, and it was computed from them.
    """

    kind: str
    value: Value
    sources: tuple[Tensor, ...]


def functions(names: str) -> set[Any]:
    """Return the torch functions, the methods and the in-place methods of names that spaces separate."""
    places = [(place, name) for name in names.split() for place in (torch, T, F)]
    places += [(place, f"{name}_") for name in names.split() for place in (torch, T)]
    return {getattr(place, name) for place, name in places if hasattr(place, name)}


def _operators(names: str) -> set[Any]:
    return {getattr(T, f"__{name}__") for name in names.split() if hasattr(T, f"__{name}__")}


SUMS = functions("add sub subtract rsub lerp") | _operators("add radd iadd sub rsub isub")
QUOTIENTS = functions("div divide true_divide") | _operators("truediv")
OF_RELATIVES = {*SUMS, *QUOTIENTS, *EXTREMES_OF_TWO}  # see `rule_of_relatives`
_STEPS = functions("sign sgn heaviside floor round ceil trunc fix floor_divide") | _operators("floordiv rfloordiv")
ELEMENTWISE = {elementwise, *ACTIVATIONS, *RELU, *SUMS, *QUOTIENTS, *EXTREMES_OF_TWO, *_STEPS, T.data.__get__}
ELEMENTWISE |= functions(
    "mul multiply pow square sqrt neg negative positive reciprocal rsqrt addcmul where masked_fill nan_to_num dropout "
    "gt ge lt le eq ne greater greater_equal less less_equal not_equal isclose signbit "
    "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not "
    "clone contiguous detach to type type_as float double half bfloat16 bool int long byte cpu cuda requires_grad_"
)
ELEMENTWISE |= _operators(
    "mul rmul imul itruediv rtruediv rdiv pow rpow neg pos abs invert and or xor rand ror rxor iand ior ixor "
    "gt ge lt le eq ne mod"
)
_ASSIGNMENTS = _operators("iadd isub imul itruediv idiv ipow iand ior ixor ifloordiv imod") | {T.__setitem__}
_OF_OTHER_THINGS = {
    getattr(T, f"{name}_") for name in ("requires_grad", "detach", "share_memory", "squeeze", "unsqueeze")
}
_OF_OTHER_THINGS |= {T.t_, T.transpose_}
_SAME_VALUES = {*LIKE_THE_SECOND, *functions("clone contiguous detach cpu cuda"), T.data.__get__}
_RESHAPES = functions(
    "flatten unflatten reshape view view_as reshape_as ravel squeeze unsqueeze expand expand_as broadcast_to"
)
MOVES = {*_RESHAPES, T.__getitem__, T.T.__get__, T.mT.__get__} | functions(
    "permute transpose swapaxes t movedim moveaxis chunk split unbind select narrow flip roll rot90 repeat tile"
)
FOLLOWED = {*ELEMENTWISE, *MOVES, *JOINS, T.__setitem__}  # those of whose outputs a `Value` tells something
_RANKING = functions(
    "argmax argmin argsort topk sort max min median nanmedian kthvalue mode cummax cummin "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices"
)
_GUARDS = functions("isnan isinf isfinite isposinf isneginf")  # they tell of no value that a map has
# they use the shape and the type of their argument alone
SHAPES = functions("new_empty new_zeros new_ones new_full new_empty_strided empty_like zeros_like ones_like full_like")
SHAPES |= functions("new_tensor rand_like randn_like randint_like")


@rule_for(*(func for func in functions("sign sgn heaviside floor round ceil trunc fix") if func.__name__[-1] != "_"))
def step(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return a constant, which only an operation on the same activation may use, see `rule_with_steps`."""
    plain = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    output = func(*plain, **{n: v.detach() if isinstance(v, Tensor) else v for n, v in kwargs.items()})
    trace.constants[output] = Constant("step", NOTHING_KNOWN, ())  # the tracer adds the rest
    return output


def kind_after(func: Any, kinds: Iterable[str], output: Tensor) -> str | None:
    """Return the kind of a `Constant` that is computed from tensors that carry relevance, or from constants."""
    kinds = set(kinds)
    if func in _GUARDS:
        return None
    if not output.is_floating_point() and not output.is_complex():
        ranked = func in _RANKING or (kinds == {"selection"} and output.dtype != torch.bool)
        return "selection" if ranked else "step"
    return "step" if func in _STEPS or kinds & {"selection", "step"} else "smooth"


def value_after(
    func: Any, args: Any, kwargs: Any, origins: Mapping[int, Any], names: Iterable[Name], output: Tensor, position: int
) -> Value:
    """Return what is known of an output of ``func``.

    Args:
        func: the torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        origins: by the id of an argument that depends on the image, itself and its origins.
        names: the names of the only one of these arguments.
        output: the output.
        position: its position among the outputs.
    """
    fills = func is T.__setitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
    if fills or (func in ELEMENTWISE and func not in MOVES):
        sources = {id(tensor): tensor for tensor in (*tensors(args), *tensors(kwargs)) if id(tensor) in origins}
        if any(tensor.shape != output.shape for tensor in sources.values()):
            return NOTHING_KNOWN
        first, *others = (origins[key] for key in sources)
        common = [name for name in first if all(name in other for other in others)][:MOST_ORIGINS]
        its_origins = {n: Origin(first[n].tensor, _composed(func, args, kwargs, origins, n)) for n in common}
        return Value(origins=its_origins, bounded=func in BOUNDS or func in RELU)
    if func in MOVES and len(origins) == 1 and args and id(args[0]) in origins:
        moved = _moved(func, args, kwargs, output, position)
        if moved is not None:
            same = tuple(map(moved, names))
            its_origins = {moved(name): Origin(None, origin.curve) for name, origin in origins[id(args[0])].items()}
            return Value(same, {name: origin for name, origin in its_origins.items() if name not in same})
    return NOTHING_KNOWN


class _Reshaped(NamedTuple):
    """The name of values in another shape, and in the same order."""

    name: Name
    was: tuple[int, ...]
    shape: tuple[int, ...]


def _moved(func: Any, args: Any, kwargs: Any, output: Tensor, position: int) -> Callable[[Name], Name] | None:
    """Return the function from the name of an input to that of an output; None if the arguments cannot be named."""
    shape, was = tuple(output.shape), tuple(args[0].shape)
    if func in _RESHAPES and output.numel() == args[0].numel():

        def reshaped(name: Name) -> Name:
            if not isinstance(name, _Reshaped):
                return name if shape == was else _Reshaped(name, was, shape)
            return name.name if shape == name.was else _Reshaped(name.name, name.was, shape)

        return reshaped
    how = _how(args[1:], kwargs)
    return None if how is None else lambda name: (func, name, how, position)


def _how(args: Any, kwargs: Any) -> str | None:
    """Return arguments as text; None if the text does not tell them from others."""
    return repr((args, kwargs)) if _is_plain(args) and _is_plain(list(kwargs.values())) else None


_PLAIN = (int, float, str, bool, type(None), slice, type(Ellipsis), torch.dtype)


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    return isinstance(value, (tuple, list)) and all(map(_is_plain, value))


class _NotUniformError(Exception):
    """The values of a constant differ between positions, so that no curve holds for all."""


class _NotKnownError(Exception):
    """A CUDA graph is being recorded, so that constants on the GPU have no values yet."""


def _not_uniform(probe: Tensor) -> Tensor:
    raise _NotUniformError


def _composed(func: Any, args: Any, kwargs: Any, origins: Mapping[int, Mapping[Name, Origin]], name: Name) -> Curve:
    """Return the output of ``func`` as a function of one origin; the closure holds no tensor that depends on it."""
    if func in _SAME_VALUES:
        return origins[id(args[0])][name].curve

    def template(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in origins:
                return origins[id(value)][name].curve
            is_kept_by_autograd = func not in SUMS or value.numel() == 1
            return value.detach() if is_kept_by_autograd and not value.requires_grad else _not_uniform
        return type(value)(map(template, value)) if type(value) in (tuple, list) else value

    prepared, named = template(tuple(args)), {key: template(value) for key, value in kwargs.items()}

    def filled(value: Any, probe: Tensor) -> Any:
        if callable(value) and not isinstance(value, Tensor):
            return value(probe)
        if isinstance(value, Tensor):
            if value.is_cuda and torch.cuda.is_current_stream_capturing():
                raise _NotKnownError
            value = value.cpu()
            if not value.numel() or bool((value != value.flatten()[0]).any()):
                raise _NotUniformError
            return value.flatten()[0]
        return type(value)(filled(item, probe) for item in value) if type(value) in (tuple, list) else value

    def curve(probe: Tensor) -> Tensor:
        named_here = {key: filled(value, probe) for key, value in named.items()}
        return func(*filled(prepared, probe), **named_here)

    return curve


def unchanged(probe: Tensor) -> Tensor:
    return probe.clone()


def _shape_of(curve: Curve) -> str:
    """Tell whether a function is "linear", a multiple of a ReLU of ± its argument ("one-sided"), the same for all
    numbers of a sign ("step"), or "other"."""
    try:
        with torch.no_grad():
            above, twice, below, twice_below = curve(torch.tensor([1.0, 2.0, -1.0, -2.0])).tolist()
    except (_NotUniformError, RuntimeError, TypeError, ValueError):
        return "other"
    if (twice, twice_below) == (above, below):
        return "step"
    if (twice, twice_below) != (2 * above, 2 * below):
        return "other"
    return "linear" if above == -below else "one-sided" if (above == 0) != (below == 0) else "other"


def common_base(trace: Tracer, values: list[Tensor], candidates: Iterable[Tensor]) -> Tensor | None:
    """Return the first of the candidates of which all values are elementwise functions, or None."""
    origins = [trace.origins(tensor) for tensor in values]
    for candidate in candidates:
        if all(any(name in its for name in trace.names(candidate)) for its in origins):
            return candidate
    return None


REMEDY = (
    "Use an activation of torch.nn.functional, such as F.relu, or pass the step function (a mask, or an index) through "
    "pipeline.stop_relevance to make it a constant"
)


def rule_with_steps(trace: Tracer, func: Any, rule: Rule, carrying: list[Tensor], steps: list[Tensor]) -> Rule:
    """Return the rule for a call with arguments that are step functions of the image.

    If all arguments are elementwise functions of one activation, so is the output, and the identity rule applies. The
    indices of largest values select as max-pooling does.

    Raises:
        RelevanceError: the step functions are those of another activation.
    """
    constants = [trace.constants[tensor] for tensor in steps]
    if func in SELECTIONS and all(constant.kind == "selection" for constant in constants):
        return rule
    candidates = [*(source for constant in constants for source in constant.sources), *carrying]
    refs = [origin.tensor for tensor in carrying for origin in trace.origins(tensor).values()]
    candidates += [tensor for ref in refs if ref is not None and (tensor := ref()) is not None]
    refusal = partial(trace.unknown, func, "with a step function of the image, such as a mask or an index", REMEDY)
    if func in ELEMENTWISE:
        base = common_base(trace, [*carrying, *steps], candidates)
        if base is None:
            raise refusal()
        return _by_the_identity_rule(base)
    base = common_base(trace, steps, candidates)
    if base is None or func not in (T.__getitem__, T.__setitem__):
        raise refusal()
    return _masked_selection(base, refusal) if func is T.__getitem__ else _masked_assignment(base, refusal)


def rule_of_relatives(trace: Tracer, func: Any, rule: Rule, args: Any, kwargs: Any, sources: list[Tensor]) -> Rule:
    """Return the rule for a sum, a quotient or the larger of two tensors, which may be functions of one activation.

    ``sources`` are those that depend on the image.

    Raises:
        RelevanceError: the output is a ReLU of an activation that is no longer there.
    """
    origins = {id(tensor): trace.origins(tensor) for tensor in sources}
    first, *others = origins.values()
    name = next((name for name in first if all(name in other for other in others)), None)
    if name is None:
        return rule
    try:
        shape = _shape_of(_composed(func, args, kwargs, origins, name))
    except _NotKnownError:
        raise trace.unknown(func, "of an activation and its own function in a recorded step", REMEDY) from None
    if shape == "step" and func in QUOTIENTS:  # such as z / |z|
        return step
    if shape == "linear" or func in QUOTIENTS or (shape == "other" and func in SUMS):
        return rule
    tensor = first[name].tensor
    base = None if tensor is None else tensor()
    carrying = [tensor for tensor in sources if trace.carries(tensor)]
    base = common_base(trace, sources, carrying if base is None else [base, *carrying])
    if base is None:
        raise trace.unknown(func, "that makes a ReLU of an activation which is no longer there", REMEDY)
    return _by_the_identity_rule(base)


def writes(func: Any) -> bool:
    """Return whether a function changes the values of its first argument in place."""
    name = getattr(func, "__name__", "unknown")
    return (name[-1] == "_" and name[-2:] != "__" and func not in _OF_OTHER_THINGS) or func in _ASSIGNMENTS


def _by_the_identity_rule(base: Tensor) -> Rule:
    """Return the rule that gives all relevance of the output to ``base``, of which it is an elementwise function."""

    def rule(trace: Tracer, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        axis, first = trace.batch_axis(base), args[0]
        if not writes(func):
            return _identity(trace, base, func(*args, **kwargs), axis)
        return written(first, _identity(trace, base.clone(), func(first.clone(), *args[1:], **kwargs), axis))

    return rule


def _identity(trace: Tracer, base: Tensor, value: Tensor, axis: int | None) -> Tensor:
    rule = trace.rules.rule(elementwise)
    assert rule is not None
    return rule(trace, elementwise, base, value, axis)


def _masked_selection(base: Tensor, refusal: Callable[[], RelevanceError]) -> Rule:
    """Return the rule of ``z[z > 0]``: the selection of what the identity rule passes."""

    def rule(trace: Tracer, func: Any, input: Tensor, index: Any) -> Tensor:
        if common_base(trace, [input], [base]) is None:
            raise refusal()
        # ``z[z < 0] *= 0.1`` writes back into the input
        output = func(_identity(trace, base.clone(), input.clone(), trace.batch_axis(base)), index)
        origins: dict[Name, Origin] = {("masked", name): Origin(None, unchanged) for name in trace.names(base)}
        trace.mark(output, None, outer=trace.outer_gradient_wanted(input), value=Value(origins=origins))
        return output

    return rule


def _masked_assignment(base: Tensor, refusal: Callable[[], RelevanceError]) -> Rule:
    """Return the rule of ``z[z < 0] = 0``, in which the other values pass relevance by the identity rule."""

    def rule(trace: Tracer, func: Any, input: Tensor, index: Any, value: Any) -> None:
        carries = isinstance(value, Tensor) and trace.carries(value)
        if carries and not any(("masked", name) in trace.origins(value) for name in trace.names(base)):
            raise refusal()
        if not trace.carries(input):
            func(input, index, value)
            trace.mark(input, trace.batch_axis(base) if input.shape == base.shape else None, outer=True)
            return
        if common_base(trace, [input], [base]) is None:
            raise refusal()
        axis = trace.batch_axis(input)
        output = _identity(trace, base.clone(), input.clone(), trace.batch_axis(base)).clone()
        func(output, index, value)
        written(input, output)
        trace.mark(input, axis, outer=True)

    return rule
