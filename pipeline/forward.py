"""One forward pass of a classifier, and what an explainer reads off it.

Not here: what maps there are (`explainers.py`), how relevance is propagated (`relevance.py`), and what maps are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import Message, Option
from pipeline.errors import ModelError
from pipeline.explainers import EXPLAINERS
from pipeline.networks.layers import last_layer
from pipeline.networks.trials import kind_of
from pipeline.relevance import Trace


class Forward:
    """One forward pass of a classifier, and what is read off it. The model is left as it was.

    ``logits`` is (N, K), attached to the graph. Without an ``explainer`` it is an ordinary pass without maps.
    images: floating (N, C, H, W); masks: (N, 1, H, W), for a model that takes them. One pass of a model at a time, as
    it is watched by hooks.

    Raises RelevanceError for an explainer that there is not or cannot explain the model, ModelError for a coarse one
    of a network without feature maps.
    """

    trace: Trace  # where the explainer has rules
    feature_maps: Tensor  # (N, C, h, w), where its maps are coarse

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        explainer: str | None = None,
        masks: Tensor | None = None,
    ):
        self._explainer = None if explainer is None else EXPLAINERS.find(explainer)
        call = model if masks is None else partial(model, masks=masks)
        coarse = self._explainer is not None and self._explainer.coarse
        stride = None if self._explainer is None else self._explainer.stride
        seen = _Seen(images, stride)
        with _watched(model, seen, coarse):
            if self._explainer is None or self._explainer.rules is None:
                self.logits: Tensor = call(images)
            else:
                self.trace = Trace(call, images, self._explainer.rules)
                self.logits = self.trace.logits
        if coarse:
            self.feature_maps = seen.feature_maps(str(explainer))
        if not isinstance(self.logits, Tensor) or self.logits.dim() != 2 or len(self.logits) != len(images):
            raise ModelError(
                f"the network returns {kind_of(self.logits)} for {len(images)} images: return logits (N, K)"
            )
        classes = self.logits.shape[1]
        name, last = last_layer(model, classes), seen.entering.get(classes)
        runs = name is not None and last is not None and model.get_submodule(name) is last[0]
        self._last = last if runs else None

    @property
    def features(self) -> Tensor:
        """What enters the last layer, (N, F), attached to the graph; its mean over positions where it has any.

        Raises ModelError where there is no last layer.
        """
        if self._last is None:
            raise ModelError(
                "this network has no features to match, as it does not end in a layer that they could enter: match "
                "something else, or choose another architecture, such as small-cnn or resnet18"
            )
        layer, x = self._last
        if isinstance(layer, nn.Conv2d):
            return x.mean((2, 3))
        return x if x.dim() == 2 else x.flatten(1, -2).mean(1)

    def maps(
        self, target_class: Tensor, epsilon: float | Tensor, *, create_graph: bool = False, keep_graph: bool = False
    ) -> Tensor:
        """The explainer's maps of one class (N,) and ε, a number or (N,), per image; see `Explainer` for their shape.

        With ``create_graph`` they are differentiable with respect to the parameters; ``keep_graph`` allows further
        calls. gradient-x-input, input-gradient and grad-cam ignore ε, attention ignores the class too.
        """
        if self._explainer is None:
            raise ValueError("a pass without an explainer has no maps: give Forward the name of one")
        with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
            return self._explainer.read(self, target_class, epsilon, create_graph=create_graph, keep_graph=keep_graph)


class _Seen:
    """What the hooks of one pass note: what enters layers, and the last activations that have positions.

    With a ``stride``, the last ones that are that many times smaller than what the first layer takes are looked for.
    """

    def __init__(self, images: Tensor, stride: int | None) -> None:
        self._stride = stride
        self.entering: dict[int, tuple[nn.Module, Tensor]] = {}  # by number of outputs, of the layer that came last
        self._samples, self._no_maps = len(images), {(1, 1), tuple(images.shape[2:])}
        self._grids = set(self._no_maps)  # (h, w) of what is (N, C, h, w) for certain
        # by last two sizes: when, and what came last; what came before it, as it may turn out to be within a branch
        self._maps: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        self._learnt: dict[tuple[int, ...], int] = {}  # by sizes: when a layer with parameters last returned such
        self._began: dict[nn.Module, int] = {}
        self._taken: tuple[int, int] | None = None  # (h, w) of what the first layer takes
        self._returned = 0

    def enters(self, layer: nn.Linear | nn.Conv2d, inputs: Any) -> None:
        if inputs:
            outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            self.entering[outputs] = layer, inputs[0]

    def begins(self, module: nn.Module, inputs: Any) -> None:
        self._began[module] = self._returned

    def returns(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        self._returned += 1
        sizes = tuple(output.shape)
        entered = [(tuple(x.shape)[2:], x) for x in inputs if isinstance(x, Tensor) and x.dim() == 4]
        if self._taken is None and isinstance(module, nn.Conv2d) and entered:
            self._taken = entered[0][0][0], entered[0][0][1]
            self._no_maps.add(self._taken)  # images that were resized are images
        if isinstance(module, _CHANNELS_FIRST) and len(sizes) == 4:
            self._grids.update([*(grid for grid, _ in entered), sizes[2:]])
        taken = {grid: (self._returned, x) for grid, x in entered if grid not in self._no_maps}
        if taken and type(module).forward is not nn.Sequential.forward:
            # all that is explained goes through what it takes and what it returns; what is within may be a branch
            began = self._began[module]
            before = {grid: [each for each in seen if each[0] <= began] for grid, seen in self._maps.items()}
            self._maps = {grid: seen for grid, seen in before.items() if seen}
            for grid, each in taken.items():
                self._add(grid, each)
        if len(sizes) == 4 and sizes[2:] != (1, 1) and (1, 1) not in dict(entered):  # one position, repeated
            self._add(sizes[2:], (self._returned, output))
        if len(sizes) > 2 and next(module.parameters(), None) is not None:
            self._learnt[sizes] = self._returned

    def _add(self, grid: tuple[int, ...], each: tuple[int, Tensor]) -> None:
        """Note an activation; without strides only the last one of a grid counts, and the others are let go."""
        self._maps[grid] = [each] if self._stride is None else [*self._maps.get(grid, []), each]

    def feature_maps(self, explainer: str) -> Tensor:
        """The last activation (N, C, h, w) with more than one position that modules hand on to each other.

        With a ``stride`` it is the last one with (h, w) of what the first layer takes, over the stride. Raises
        ModelError where there is none, and where layers behind it learn of positions that lie otherwise, as tokens do:
        then the last one is one of the first.
        """
        candidates = {grid: self._maps[grid][-1] for grid in self._maps.keys() & self._grids}
        if self._stride is not None:
            return self._of_stride(explainer, self._stride, candidates)
        when, maps = max(candidates.values(), default=(0, None), key=lambda each: each[0])
        behind = [sizes for sizes, time in self._learnt.items() if time > when and sizes[2:] not in self._grids]
        if maps is None or any(math.prod(sizes[:-1]) > self._samples for sizes in behind):
            raise ModelError(
                Message(
                    f"the explainer '{explainer}' needs a network that ends in feature maps (N, C, h, w) with more "
                    "than one position, and this one does not, as transformers do not: choose another ",
                    Option("explainer"),
                    ", such as flex or input-gradient, or a convolutional network",
                )
            )
        return maps

    def _of_stride(self, explainer: str, stride: int, candidates: dict[tuple[int, ...], tuple[int, Tensor]]) -> Tensor:
        """Return the last activation of a stride; raise ModelError, with the strides that there are, without it."""
        taken = self._taken or (0, 0)
        for rounded in (math.ceil, math.floor):  # layers pad, or they do not
            grid = tuple(rounded(side / stride) for side in taken)
            if grid in candidates and min(taken) > 0:
                return candidates[grid][1]
        strides = sorted({round(taken[0] / grid[0]) for grid in candidates if grid[0]})
        raise ModelError(
            Message(
                f"the explainer '{explainer}' needs feature maps that are {stride} times smaller than the "
                f"{taken[0]}×{taken[1]} pixels that the network takes, and this network has "
                + (f"those of stride {', '.join(map(str, strides))}" if strides else "none")
                + ": choose another ",
                Option("explainer"),
            )
        )


# modules whose tensors of four axes are (N, C, h, w), in any network; of others, as of a ReLU, it cannot be known
_CHANNELS_FIRST = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)


@contextmanager
def _watched(model: nn.Module, seen: _Seen, maps: bool) -> Iterator[None]:
    """Note what enters layers and, for ``maps``, what all modules return: by hooks, which work in a traced pass too."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                hooks.callback(module.register_forward_pre_hook(seen.enters).remove)
            if maps:
                hooks.callback(module.register_forward_pre_hook(seen.begins).remove)
                hooks.callback(module.register_forward_hook(seen.returns).remove)
        yield


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, h, w) with ``size`` positions: means along a side that gets shorter, bilinear along one that grows.

    So the coarse maps of two networks can be compared. Differentiable.
    """
    height, width = maps.shape[2:]
    maps = F.adaptive_avg_pool2d(maps, (min(height, size[0]), min(width, size[1])))
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
