"""Networks by name or by a function of the user's own, and their last layer.

Not here: what stands in front of a network, and what takes its last layer's place (`classifier.py`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from pipeline.errors import ModelError
from pipeline.networks.homogeneous import BiasFreeReport, bias_free

ImageShape = tuple[int, int, int]
Options = Mapping[str, int | float | bool | str]


def architectures() -> list[str]:
    """Our own (`OWN`), for small images, and every torchvision classification model."""
    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def small_cnn(num_classes: int, channels: int = 3, width: int = 32, depth: int = 1) -> nn.Sequential:
    """Three blocks of ``depth`` times 3×3 convolution, batch norm, ReLU, and 2×2 max-pooling, then one linear layer.

    Made for 28×28 and good from 8×8 on: (N, channels, H, W) to (N, num_classes), with features of
    4·width channels at 3×3 positions. 105,000 parameters at width 32 and depth 1.
    """
    layers: list[tuple[str, nn.Module]] = []
    for block, out in enumerate((width, 2 * width, 4 * width), start=1):
        for layer in range(depth):
            name = f"{block}" if layer == 0 else f"{block}_{layer + 1}"
            layers += [
                (f"conv{name}", nn.Conv2d(channels, out, 3, padding=1, bias=False)),
                (f"norm{name}", nn.BatchNorm2d(out)),
                (f"relu{name}", nn.ReLU(inplace=True)),
            ]
            channels = out
        layers.append((f"pool{block}", nn.MaxPool2d(2)))
    layers += [
        ("pool", nn.AdaptiveAvgPool2d(3)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(9 * channels, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def small_resnet(num_classes: int, channels: int = 3, width: int = 16, depth: int = 2) -> nn.Sequential:
    """Three stages of ``depth`` residual blocks at full, half and quarter resolution, then one linear layer.

    The ResNet for small images, of 6·depth + 2 layers (He et al., CVPR 2016, section 4.2), but for its last pooling:
    (N, channels, H, W) to (N, num_classes), with features of 4·width channels at 3×3 positions, as small-cnn has them.
    Made for 32×32 and good from 8×8 on. 180,000 parameters at width 16 and depth 2.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(channels, width, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width), start=1):
        for block in range(1, depth + 1):
            stride, shortcut = 1, None
            if out != channels:
                stride = 2
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            layers.append((f"block{stage}_{block}", BasicBlock(channels, out, stride, shortcut)))
            channels = out
    layers += [
        ("pool", nn.AdaptiveAvgPool2d(3)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(9 * channels, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


OWN: dict[str, Callable[..., nn.Module]] = {"small-cnn": small_cnn, "small-resnet": small_resnet}


def build_network(
    arch: str,
    num_classes: int,
    image_shape: ImageShape,
    *,
    free_of_biases: bool,
    options: Options | None = None,
    factory: str | None = None,
) -> tuple[nn.Module, BiasFreeReport]:
    """A randomly initialised network for images (C, H, W), tried once on such images.

    ``arch`` is one of `architectures`, or ``package.module:function``, a function of the user's own. That one is
    imported and called only where ``factory`` says the same, which is for the user to say and not for a file. It
    is called as ``function(num_classes=..., **options)``, with ``image_shape`` where it has a parameter of that
    name, and returns an `nn.Module`: images float32 (N, C, H, W) in [0, 1] → logits (N, num_classes). ``options``
    are those of the builder: ``width`` and ``depth`` of ours, or what torchvision's takes.

    With ``free_of_biases`` in its bias-free form; the report says what that changed, and is empty otherwise.
    Raises ModelError for an unknown name (with the nearest ones), options that it does not take, images that it
    cannot take, and whatever goes wrong in a factory.
    """
    check_factory(arch, factory)
    options = options or {}
    name = f"the student factory '{arch}'" if is_factory(arch) else f"the architecture '{arch}'"
    with _current_folder_importable() if is_factory(arch) else nullcontext():
        builder, given = _builder(arch, num_classes, image_shape)
        _check_options(name, builder, given, options)
        name += f" with {', '.join(f'{key}={value!r}' for key, value in options.items())}" if options else ""
        try:
            network = builder(**given, **options)
        except Exception as error:
            if is_factory(arch) or options:
                raise ModelError(
                    f"{name} cannot be built for {num_classes} classes and images of shape {image_shape}: {_why(error)}"
                ) from error
            raise _not_taken(name, arch, image_shape, error) from error
        if not isinstance(network, nn.Module):
            raise ModelError(f"{name} returned {type(network).__name__}: it must return an nn.Module")
        report = BiasFreeReport((), ())
        try:
            if free_of_biases:
                network, report = bias_free(network)
            with torch.no_grad():
                logits = network.eval()(torch.rand(2, *image_shape))
        except Exception as error:
            raise _not_taken(name, arch, image_shape, error) from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    if found != (2, num_classes):
        raise ModelError(
            f"the network of {name} returns {found} for 2 images and {num_classes} classes: "
            f"it must return logits of shape {(2, num_classes)}"
        )
    return network.train(), report


def is_factory(arch: str) -> bool:
    """Whether a network is built by a function of the user's own, ``package.module:function``."""
    return ":" in arch


def check_factory(arch: str, factory: str | None) -> None:
    """Raise ModelError unless the user has named the factory that ``arch`` is, and no other."""
    if factory is None and is_factory(arch):
        raise ModelError(
            f"'{arch}' is a function of somebody's own, whose code runs only where you say so: if you trust it, give "
            f"--student-factory {arch} (train-student, evaluate and export take it), and run where it can be imported"
        )
    if factory is not None and not is_factory(factory):
        raise ModelError(f"--student-factory is given as package.module:function, got '{factory}'")
    if factory is not None and factory != arch:
        raise ModelError(
            f"--student-factory {factory} was given, but the model is built by '{arch}': "
            + (f"give --student-factory {arch} if you trust it" if is_factory(arch) else "leave the option out")
        )


def call_function(name: str, option: str, what: str) -> Any:
    """What the user's own function ``package.module:function`` returns, called without arguments.

    Raises ModelError, with what it is and by which option it is given, for whatever goes wrong.
    """
    with _current_folder_importable():
        function = _import(name, option, what)
        try:
            return function()
        except Exception as error:
            raise ModelError(f"the {what} '{name}' cannot be built: {_why(error)}") from error


def last_layer(network: nn.Module, num_classes: int) -> str | None:
    """Name of the last `nn.Linear` or 1×1 `nn.Conv2d` with ``num_classes`` outputs; None where there is none."""
    names = [name for name, module in network.named_modules() if name and outputs_of_last_layer(module) == num_classes]
    return names[-1] if names else None


def outputs_of_last_layer(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        plain = (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
        return module.out_channels if plain else None
    return None


def _builder(arch: str, num_classes: int, image_shape: ImageShape) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What builds a network, and the arguments that it gets from us."""
    given: dict[str, Any] = {"num_classes": num_classes}
    if is_factory(arch):
        function = _import(arch, "--student-factory", "student factory")
        return function, given | ({"image_shape": image_shape} if "image_shape" in _parameters(function) else {})
    if arch in OWN:
        return OWN[arch], given | {"channels": image_shape[0]}
    if arch not in architectures():
        near = difflib.get_close_matches(arch, architectures(), n=3)
        raise ModelError(
            f"unknown architecture '{arch}': "
            + (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"choose {', '.join(OWN)} or a torchvision model's name"
            )
        )
    # pretrained weights have other classes, and would be downloaded
    given |= {"weights": None, "progress": False}
    if arch in ("googlenet", "inception_v3"):  # one output, as in evaluation
        given |= {"aux_logits": False, "init_weights": True}
    if arch.startswith("vit_"):
        given["image_size"] = image_shape[1]
    if arch.startswith("maxvit"):
        given["input_size"] = image_shape[1:]
    return torchvision.models.get_model_builder(arch), given


def _import(name: str, option: str, what: str) -> Callable[..., Any]:
    """The function ``package.module:function``; ``option`` and ``what`` it is are for the errors."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise ModelError(f"{option} is given as package.module:function, got '{name}'")
    importlib.invalidate_caches()  # the file may be younger than our last look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the {what} '{name}' cannot be imported: {_why(error)}; run where `python -m {module_name}` would find it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, [n for n in dir(module) if callable(getattr(module, n))], n=1)
        raise ModelError(
            f"the {what} '{name}' does not exist: {module_name} has no function '{function_name}'"
            + (f"; did you mean {module_name}:{near[0]}?" if near else "")
        )
    try:
        _parameters(function)
    except (ValueError, TypeError) as error:
        raise ModelError(f"the {what} '{name}' is no Python function ({error})") from error
    return function


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As with ``python -m``. Only for as long as it is needed: it may hold a ``data`` or ``trainer`` of its own."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _check_options(name: str, builder: Callable[..., Any], given: Mapping[str, Any], options: Options) -> None:
    """Raise ModelError for an option that the builder does not take, or that we choose ourselves."""
    takes = _takes(builder)
    for option in options:
        if option in given or (takes is not None and option not in takes):
            others = sorted((takes or set()) - set(given))
            raise ModelError(
                f"{name} takes no option '{option}'"
                + (f": it takes {', '.join(others)}" if others else ": it takes none" if takes is not None else "")
            )


def _takes(builder: Callable[..., Any]) -> set[str] | None:
    """Names of the options that a builder takes; None where it takes any and does not say which.

    A builder of torchvision hands them on to the class that it says it returns, and to helpers of its module: it
    takes their numbers, switches and words that have a default, there or in the builder itself.
    """
    parameters = _parameters(builder)
    named = {name for name, parameter in parameters.items() if parameter.kind in _BY_KEYWORD}
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return named
    function = inspect.unwrap(builder)
    if not (getattr(function, "__module__", None) or "").startswith("torchvision."):
        return None
    module = inspect.getmodule(function)
    helpers = [getattr(module, name, None) for name in function.__code__.co_names]
    returned = inspect.signature(function, eval_str=True).return_annotation
    for source in (returned, *filter(inspect.isfunction, helpers)):
        named |= {
            name
            for name, parameter in inspect.signature(source, eval_str=True).parameters.items()
            if parameter.annotation in _SCALARS
            and (parameter.default is not inspect.Parameter.empty or name in function.__code__.co_consts)
        }
    return named


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SCALARS = {kind for one in (int, float, bool, str) for kind in (one, one | None)}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _not_taken(name: str, arch: str, image_shape: ImageShape, error: Exception) -> ModelError:
    remedy = (
        "it must take float32 images (N, C, H, W) in [0, 1]"
        if is_factory(arch)
        else "use another architecture (small-cnn takes 8×8 and more), or images of the size it needs"
    )
    return ModelError(
        f"{name} does not take images of shape {image_shape} (channels, height, width): {_why(error)}; {remedy}"
    )


def _why(error: BaseException) -> str:
    """The first line of an error, and the line of the user's own code: there is no traceback on the command line."""
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    not_theirs = (__file__, *torch.__path__, *torchvision.__path__, "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{reason and ': '}{reason}{where}"
