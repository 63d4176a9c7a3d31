"""Networks by name or by a function of the user's own.

Not here: the debiasing front of a network (`debias.py`), and its last layer (`layers.py`, `heads.py`).
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from options import Message, Option, did_you_mean
from pipeline.errors import ModelError
from pipeline.networks.checkpoints import Weights, load_checkpoint
from pipeline.networks.fading import fading
from pipeline.networks.homogeneous import BiasFreeReport, bias_free
from pipeline.networks.layers import take_channels
from pipeline.networks.outputs import logits_of, take_logits
from pipeline.networks.sources import SOURCES, ImageShape, has_source, split_name
from pipeline.networks.trials import kind_of, remedy_for, trial_images, undisturbed
from pipeline.networks.weight_files import plain_reason
from pipeline.private_torch import BatchNormBase

log = logging.getLogger(__name__)

Options = Mapping[str, Any]
PRETRAINED = "pretrained"  # the parameter of a user's function that tells whether to load weights
TRIED = (2, 128)  # images in training mode: more where a network does not take a few


def architectures() -> list[str]:
    """Return the names of our own networks for small images (`OWN`) and of torchvision's classification models."""
    return [*OWN, *SOURCES["torchvision"].names()]


def small_cnn(num_classes: int, channels: int = 3, width: int = 32, depth: int = 1) -> nn.Sequential:
    """Build three blocks, each of ``depth`` 3×3 convolutions with batch norm and ReLU, and a linear last layer.

    Each block ends in a 2×2 max-pooling. The network is made for 28×28 images and works from 8×8 on. At width 32 and
    depth 1 it has 105,000 parameters.

    Args:
        num_classes: number of logits.
        channels: number of channels of the images.
        width: channels of the first block; the second has twice and the third four times as many.
        depth: convolutions in each block.

    Returns:
        A network (N, channels, H, W) → (N, num_classes), with features of 4·width channels at 3×3 positions.
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
    """Build three stages of ``depth`` residual blocks at full, half and quarter resolution, and a linear last layer.

    This is the ResNet of 6·depth + 2 layers for small images (He et al., CVPR 2016, section 4.2) with another last
    pooling. The network is made for 32×32 images and works from 8×8 on. At width 16 and depth 2 it has 180,000
    parameters.

    Args:
        num_classes: number of logits.
        channels: number of channels of the images.
        width: channels of the first stage; the second has twice and the third four times as many.
        depth: residual blocks in each stage.

    Returns:
        A network (N, channels, H, W) → (N, num_classes), with features of 4·width channels at 3×3 positions, the
        same shape as small-cnn's.
    """
    from torchvision.models.resnet import BasicBlock  # takes a second to import

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
    to_train: bool = True,
    weights: Weights | None = None,
    fades: bool = False,
) -> tuple[nn.Module, BiasFreeReport]:
    """Build a network, and try it once on random images in each mode. Its weights are random, or those of a file.

    Args:
        arch: one of `architectures`, ``timm:NAME``, ``hf:FOLDER`` with the option ``config``, or
            ``package.module:function``, a function of the user's own. The function is called as
            ``function(num_classes=..., **options)``, with ``image_shape`` if it has a parameter of that name, and with
            ``pretrained=False`` if it has a parameter of that name and its weights are loaded afterwards
            (``weights``, or without ``to_train``). It returns an `nn.Module` that maps images, float32 (N, C, H, W) in
            [0, 1], to logits (N, num_classes), or to an output that holds them, see `logits_of`.
        num_classes: number of logits.
        image_shape: (C, H, W) of what the network takes.
        free_of_biases: convert the network to its bias-free form, see `bias_free`.
        options: options of the builder: ``width`` and ``depth`` of our own networks, or keywords of torchvision's.
        factory: the name of the user's function once more. A function is imported only if both names are equal, so
            that a file alone cannot run code.
        to_train: the network is to be trained, so try it in training mode too.
        weights: the weights that the network starts from, see `load_checkpoint`; the log tells what did not fit.
        fades: the form of `fading` instead of the bias-free form.

    Returns:
        The network in training mode, and the report of `bias_free`; the report is empty without ``free_of_biases``.

    Raises:
        ModelError: the architecture is unknown, it has no such option, the network does not take the images, the user's
            function fails, or the weights do not fit.
    """
    check_factory(arch, factory)
    report = BiasFreeReport((), ())
    with current_folder_importable() if is_factory(arch) else nullcontext():
        network, name = _build(
            arch, num_classes, image_shape, options or {}, filled=weights is not None or not to_train
        )
        if weights is not None:
            for line in load_checkpoint(network, weights, num_classes).lines():
                log.info(f"{arch}: {line}")
        try:
            if free_of_biases:
                if any(nn.parameter.is_lazy(buffer) for buffer in network.buffers()):  # which cannot be copied
                    network.eval()(trial_images(2, image_shape))
                with_biases = network
                network, report = bias_free(network)
                network = fading(with_biases) if fades else network
            logits = _logits_of_two(network, image_shape)
        except Exception as error:
            if free_of_biases and _works_with_biases(arch, num_classes, image_shape, options or {}):
                raise _not_bias_free(name, error) from error
            raise _not_taken(name, arch, image_shape, error, network) from error
        _take_output(name, network, logits, 2, num_classes)
        if to_train:
            _try_training(name, network, num_classes, image_shape)
    return network.train(), report


def _take_output(name: str, network: nn.Module, output: object, images: int, num_classes: int, mode: str = "") -> None:
    """Let a network whose output holds its logits return them; raise ModelError where there are none."""
    if not isinstance(output, torch.Tensor):
        with suppress(ModelError):  # the error below tells more
            output = logits_of(output, num_classes)
            take_logits(network, num_classes)
    if not isinstance(output, torch.Tensor) or output.shape != (images, num_classes):
        raise ModelError(
            f"the network of {name} returns {kind_of(output)} for {images} images and {num_classes} classes{mode}: "
            f"it must return logits of shape {(images, num_classes)}{remedy_for(output, num_classes)}"
        )


def _try_training(name: str, network: nn.Module, num_classes: int, image_shape: ImageShape) -> None:
    """Try a network in training mode, and leave it as it was; raise ModelError where it fails or returns no logits."""
    failure: Exception | None = None
    for samples in TRIED:
        try:
            with undisturbed(network), torch.no_grad():
                output = network.train()(trial_images(samples, image_shape))
        except Exception as error:
            failure = failure or error
        else:
            mode = " in training mode, unlike in evaluation mode"
            return _take_output(name, network, output, samples, num_classes, mode)
    assert failure is not None
    raise ModelError(
        f"the network of {name} takes images of shape {image_shape} in evaluation mode, but not in training mode: "
        f"{summary_with_line(failure)}; let its forward work in both modes"
    ) from failure


def is_factory(arch: str) -> bool:
    """Return whether a function of the user's own, ``package.module:function``, builds the network."""
    return ":" in arch and not has_source(arch)


def check_factory(arch: str, factory: str | None) -> None:
    """Check that the user has named the function that builds the network, and no other.

    Raises:
        ModelError: ``arch`` is a function and ``factory`` is not the same, or ``arch`` is not a function.
    """
    if factory is None and is_factory(arch):
        raise ModelError(
            Message(
                f"the model is built by '{arch}', whose code runs only where you say so: if you trust it, give ",
                Option("student_factory", arch),
                " and run where it can be imported",
            )
        )
    if factory is not None and not is_factory(factory):
        raise _not_a_function("student_factory", factory)
    if factory is not None and factory != arch:
        wrong = Message(Option("student_factory", factory), f" was given, but the model is built by '{arch}': ")
        if is_factory(arch):
            raise ModelError(Message(wrong, "give ", Option("student_factory", arch), " if you trust it"))
        raise ModelError(Message(wrong, "leave the option out"))


def call_function(name: str, option: str, what: str) -> Any:
    """Call the user's own function ``package.module:function`` without arguments, and return its result.

    Args:
        name: the function.
        option: the Python name of the option that named it, for errors.
        what: a noun for the function, for errors.

    Raises:
        ModelError: the function cannot be imported, or raises an exception.
    """
    with current_folder_importable():
        function = import_function(name, option, what)
        try:
            return function()
        except ModelError:
            raise  # it names its remedy
        except Exception as error:
            raise ModelError(f"the {what} '{name}' cannot be built: {summary_with_line(error)}") from error


def error_summary(error: BaseException) -> str:
    """Return the type of an error and the first line of its text, cut to 300 characters; see `plain_reason`."""
    return plain_reason(error)


def looks_trained(network: nn.Module) -> bool:
    """Return whether a network's norms have other values than any initialisation gives them."""
    for module in network.modules():
        if not isinstance(module, _NORMS):
            continue
        values = [getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
        if any(isinstance(value, torch.Tensor) and bool((value != value.flatten()[0]).any()) for value in values):
            return True
    return False


_NORMS = (BatchNormBase, nn.LayerNorm, nn.GroupNorm)


def _build(
    arch: str, num_classes: int, image_shape: ImageShape, options: Options, *, filled: bool = False
) -> tuple[nn.Module, str]:
    """Build a network with these options; return it and its name, with the options, for errors.

    If its weights are ``filled`` in afterwards, a function of the user's own need not load any.
    """
    name = f"the factory '{arch}'" if is_factory(arch) else f"the architecture '{arch}'"
    builder, arguments = _builder(arch, num_classes, image_shape)
    if filled and is_factory(arch) and PRETRAINED in inspect.signature(builder).parameters:
        arguments |= {PRETRAINED: False}
        options = {key: value for key, value in options.items() if key != PRETRAINED}
    _check_options(name, arch, builder, arguments, options)
    of_user = [f"{key}={value!r}" for key, value in options.items() if not isinstance(value, Mapping)]
    with_options = f" with {', '.join(of_user)}" if of_user else ""
    try:
        network = builder(**arguments, **options)
    except ModelError:
        raise  # it names its remedy
    except Exception as error:
        if (option := _unexpected_keyword(error)) in options:
            raise _unknown_option(name, str(option), arch, builder, arguments, summary_with_line(error)) from error
        if is_factory(arch) and option == "num_classes":
            raise ModelError(
                f"{name} must take num_classes={num_classes}, with which it is called: {summary_with_line(error)}"
            ) from error
        if is_factory(arch) or options:
            raise ModelError(
                f"{name}{with_options} cannot be built for {num_classes} classes and images of shape {image_shape}: "
                f"{summary_with_line(error)}"
            ) from error
        raise _not_taken(name, arch, image_shape, error) from error
    if not isinstance(network, nn.Module):
        returned, remedy = type(network).__name__, "it must return an nn.Module"
        if isinstance(network, type) and issubclass(network, nn.Module):
            returned, remedy = f"the class {network.__name__}", f"it must call it, {network.__name__}(num_classes)"
        raise ModelError(f"{name}{with_options} returned {returned}: {remedy}")
    if image_shape[0] == 1 and not is_factory(arch) and arch not in OWN:
        take_channels(network, 1, image_shape[1:])
    return network, name + with_options


def _builder(arch: str, num_classes: int, image_shape: ImageShape) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that builds a network, and the arguments that we choose for it."""
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if is_factory(arch):
        function = import_function(arch, "student_factory", "factory")
        if "image_shape" in inspect.signature(function).parameters:
            arguments["image_shape"] = image_shape
        return function, arguments
    if arch in OWN:
        return OWN[arch], arguments | {"channels": image_shape[0]}
    prefix, name = split_name(arch)
    names = [] if prefix != "torchvision" else SOURCES[prefix].names()  # the others say themselves what they lack
    if names and name not in names:
        raise ModelError(
            f"unknown architecture '{arch}': choose {', '.join(OWN)}, a torchvision model, timm:NAME or hf:FOLDER."
            f"{did_you_mean(name, [*OWN, *names])}"
        )
    of_library = SOURCES[prefix].builder(name, num_classes, image_shape)
    return of_library.function, of_library.arguments


def import_function(name: str, option: str, what: str, does: str = "builds a new one") -> Callable[..., Any]:
    """Import the function ``package.module:function``.

    Args:
        name: as in `call_function`.
        option: as in `call_function`.
        what: as in `call_function`.
        does: says in the error for a network in place of a function how a function would use it.

    Raises:
        ModelError: it cannot be imported, does not exist, or is no Python function.
    """
    module_name, _, function_name = name.partition(":")
    is_path = module_name.endswith(".py") or "/" in module_name or module_name.startswith(".")
    if not module_name or not function_name.isidentifier() or is_path:
        raise _not_a_function(option, name)
    importlib.invalidate_caches()  # the file may be younger than our last look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the {what} '{name}' cannot be imported: {summary_with_line(error)}; run where `python -m {module_name}` "
            "would find it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"the {what} '{name}' does not exist: {module_name} has no function '{function_name}'."
            f"{did_you_mean(function_name, functions) or ' Give the name of one that it has.'}"
        )
    if isinstance(function, nn.Module):
        raise ModelError(f"the {what} '{name}' is a network and no function: give a function that {does}")
    try:
        inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise ModelError(f"the {what} '{name}' is not a Python function ({error}): write one that calls it") from error
    return function


def _not_a_function(option: str, name: str) -> ModelError:
    path, colon, function = name.removesuffix("()").rpartition(":" if ":" in name else ".")
    module = path.removesuffix(".py").replace("\\", "/").removeprefix("./").strip("/").replace("/", ".")
    near = f". Did you mean {module}:{function}?" if module and function.isidentifier() and colon else ""
    return ModelError(Message(Option(option), f" must be package.module:function, got '{name}'{near}"))


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let modules of the current folder be imported, as ``python -m`` does.

    Only for as long as it is needed: the folder may have a ``data`` or ``trainer`` of its own.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


# --- options of a builder -------------------------------------------------------------------------------------------


def _check_options(
    name: str, arch: str, builder: Callable[..., Any], arguments: Mapping[str, Any], options: Options
) -> None:
    """Raise ModelError for an option that we choose ourselves, or that the builder's signature rules out.

    A builder that takes any keyword rules out none. It raises TypeError when it is called.
    """
    names, complete = _option_names(builder)
    for option in options:
        if option in arguments or (complete and option not in names):
            raise _unknown_option(name, option, arch, builder, arguments)


def _unknown_option(
    name: str, option: str, arch: str, builder: Callable[..., Any], arguments: Mapping[str, Any], reason: str = ""
) -> ModelError:
    """Return the error for an option that a builder does not take; it lists the options that signatures name."""
    names, complete = _option_names(builder)
    others = ", ".join(sorted(names - set(arguments)))
    if complete:
        remedy = f"it takes {others or 'none'}"
    elif is_factory(arch):
        remedy = f"{reason or 'it is set already'}; leave the option out"
    else:
        remedy = f"it takes {others}, and what the documentation of {arch} lists"
    return ModelError(f"{name} takes no option '{option}': {remedy}")


def _option_names(builder: Callable[..., Any]) -> tuple[set[str], bool]:
    """Return the options of a builder that signatures name, and whether it takes no others.

    A builder of torchvision hands its ``**kwargs`` on, to helpers of its module that take any keyword too and to the
    class of the network that it returns: their numbers, switches and words with a default are options as well. Most of
    these classes raise TypeError for other keywords. A class that ignores them takes no others.
    """
    parameters = inspect.signature(builder).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD}
    if not _takes_any_keyword(builder):
        return names, True
    if not (getattr(builder, "__module__", None) or "").startswith("torchvision."):
        return names, False
    network_class = inspect.signature(builder, eval_str=True).return_annotation
    functions = inspect.getmembers(inspect.getmodule(builder), inspect.isfunction)
    helpers = [function for name, function in functions if name.startswith("_") and _takes_any_keyword(function)]
    for source in (network_class, *helpers):
        names |= {
            name
            for name, parameter in inspect.signature(source, eval_str=True).parameters.items()
            if parameter.annotation in _SCALARS and parameter.default is not inspect.Parameter.empty
        }
    return names, _takes_any_keyword(network_class)


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SCALARS = {kind for one in (int, float, bool, str) for kind in (one, one | None)}


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _unexpected_keyword(error: Exception) -> str | None:
    """Return the keyword that a call did not take, if that is the error."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    return match[1] if match else None


# --- errors ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits_of_two(network: nn.Module, image_shape: ImageShape) -> Any:
    return network.eval()(torch.rand(2, *image_shape))


def _works_with_biases(arch: str, num_classes: int, image_shape: ImageShape, options: Options) -> bool:
    try:
        _logits_of_two(_build(arch, num_classes, image_shape, options)[0], image_shape)
    except Exception:  # the error of the bias-free form tells as much
        return False
    return True


def _not_bias_free(name: str, error: Exception) -> ModelError:
    return ModelError(
        Message(
            f"{name} does not run in its bias-free form: {summary_with_line(error)}. With its biases it runs: give ",
            Option("bias_free", False),
        )
    )


def _not_taken(
    name: str, arch: str, image_shape: ImageShape, error: Exception, network: nn.Module | None = None
) -> ModelError:
    remedy = "use another architecture (small-cnn takes 8×8 and more), or images of the size that it needs"
    first = None if network is None else next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if is_factory(arch):
        remedy = "it must take float32 images (N, C, H, W) in [0, 1]"
    elif first is not None and first.in_channels != image_shape[0]:
        remedy = f"give images of {first.in_channels} channels, which it takes, or of 1"
    for key, parameter in [] if network is None else network.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            remedy = f"return it in float32 on the CPU, where it is converted and moved later: '{key}' is {kind} on "
            remedy += str(parameter.device)
            break
    return ModelError(
        f"{name} does not take images of shape {image_shape} (channels, height, width): {summary_with_line(error)}; "
        f"{remedy}"
    )


def summary_with_line(error: BaseException) -> str:
    """Return an error's summary and the line of the user's own code: the command line shows no traceback."""
    torchvision = importlib.util.find_spec("torchvision")  # without its import
    folders = [] if torchvision is None else torchvision.submodule_search_locations or []
    not_theirs = (os.path.join(os.path.dirname(__file__), ""), *torch.__path__, *folders, "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return error_summary(error) + where
