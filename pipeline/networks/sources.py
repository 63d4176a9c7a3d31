"""Libraries whose networks a name with a prefix builds: ``torchvision:resnet50``, ``timm:NAME``, ``hf:FOLDER``.

Each tells what its networks take as options, how images are preprocessed for its published weights, and how their
classes are called. Nothing is downloaded. Not here: our own networks and functions of the user's own (`models.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from options import Message, Option, did_you_mean, first_line, import_problem
from pipeline.errors import ModelError
from pipeline.networks.preprocessing import INTERPOLATIONS, SHORTEST, SQUASH, PreprocessSpec

ImageShape = tuple[int, int, int]
HF_CONFIG, HF_PROCESSOR = "config.json", "preprocessor_config.json"  # in a Hugging Face folder
IMAGENET_CLASSES = 1000
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as Hugging Face writes them


@dataclass(frozen=True)
class Builder:
    """A function that builds a network, and the arguments that are not the user's to choose."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A library that has networks by name.

    Attributes:
        names: returns all names, without the prefix; empty where a name is a folder.
        builder: for a name, a number of classes and the shape (C, H, W) that the network takes.
        preprocessing: of the published weights of a name; None if it is unknown.
        class_names: of the published weights of a name; None if they are unknown.
    """

    names: Callable[[], list[str]]
    builder: Callable[[str, int, ImageShape], Builder]
    preprocessing: Callable[[str], PreprocessSpec | None]
    class_names: Callable[[str], tuple[str, ...] | None]


def split_name(arch: str) -> tuple[str, str]:
    """Return the prefix of a network's name, and the name in that library; a plain name is torchvision's."""
    prefix, colon, name = arch.partition(":")
    return (prefix, name) if colon and prefix in SOURCES else ("torchvision", arch)


def has_source(arch: str) -> bool:
    """Return whether a name has the prefix of a library."""
    return arch.partition(":")[0] in SOURCES and ":" in arch


def preprocessing_of(arch: str) -> PreprocessSpec | None:
    """Return the preprocessing of the published weights of a network; None if the name is of no library.

    Raises:
        ModelError: the library is missing, or a folder's preprocessing cannot be read.
    """
    prefix, name = split_name(arch)
    return SOURCES[prefix].preprocessing(name)


def class_names_of(arch: str) -> tuple[str, ...] | None:
    """Return the classes of the published weights of a network; None if they are unknown."""
    prefix, name = split_name(arch)
    return SOURCES[prefix].class_names(name)


def imagenet_classes() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet, as torchvision spells them."""
    weights = torchvision_models().get_model_weights("resnet18")
    return tuple(next(iter(weights)).meta["categories"])


# --- torchvision ----------------------------------------------------------------------------------------------------


def torchvision_models() -> Any:
    """Import ``torchvision.models``, which takes a second or two."""
    from torchvision import models

    return models


def _torchvision_names() -> list[str]:
    return torchvision_models().list_models(module=torchvision_models())


def _torchvision_builder(name: str, num_classes: int, input_shape: ImageShape) -> Builder:
    # published weights have other classes, and would be downloaded
    arguments: dict[str, Any] = {"num_classes": num_classes, "weights": None, "progress": False}
    if name in ("googlenet", "inception_v3"):  # one output, as in evaluation
        arguments |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        arguments["image_size"] = input_shape[1]
    if name.startswith("maxvit"):
        arguments["input_size"] = input_shape[1:]
    return Builder(torchvision_models().get_model_builder(name), arguments)


def _torchvision_preprocessing(name: str) -> PreprocessSpec | None:
    if name not in _torchvision_names():
        return None
    transforms = torchvision_models().get_model_weights(name).DEFAULT.transforms()
    size = transforms.crop_size[0]
    interpolation = transforms.interpolation.value
    return PreprocessSpec(tuple(transforms.mean), tuple(transforms.std), (size, size), interpolation)


def _torchvision_classes(name: str) -> tuple[str, ...] | None:
    if name not in _torchvision_names():
        return None
    return tuple(torchvision_models().get_model_weights(name).DEFAULT.meta["categories"])


# --- timm -----------------------------------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        problem = import_problem(error, "timm")
        raise ModelError(f"a timm: network needs timm, which {problem}: pip install timm") from None
    return timm


def _timm_config(name: str) -> Any:
    """Return timm's record of published weights, or None for a network that has none. Raises for an unknown name."""
    timm = _timm()
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise ModelError(
            f"timm {timm.__version__} has no network '{name}': give a name of timm.list_models()."
            f"{did_you_mean(plain, timm.list_models())}"
        )
    return timm.models.get_pretrained_cfg(name)


def _timm_builder(name: str, num_classes: int, input_shape: ImageShape) -> Builder:
    config = _timm_config(name)
    arguments = {"model_name": name, "num_classes": num_classes, "in_chans": input_shape[0], "pretrained": False}
    if config is not None and config.fixed_input_size:
        arguments["img_size"] = input_shape[1:]
    return Builder(_timm().create_model, arguments)


def _timm_preprocessing(name: str) -> PreprocessSpec | None:
    config = _timm_config(name)
    if config is None:
        return None
    return PreprocessSpec(
        mean=tuple(config.mean),
        std=tuple(config.std),
        size=(config.input_size[1], config.input_size[2]),
        interpolation=config.interpolation if config.interpolation in INTERPOLATIONS else "bilinear",
        resize_mode=SQUASH if config.crop_mode == "squash" else SHORTEST,
    )


def _timm_classes(name: str) -> tuple[str, ...] | None:
    config = _timm_config(name)
    return imagenet_classes() if config is not None and config.num_classes == IMAGENET_CLASSES else None


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of a Hugging Face folder, with which its network can be built again.

    Raises:
        ModelError: the folder has none.
    """
    config = _read_json(Path(folder) / HF_CONFIG, f"hf:{folder} is no folder of a Hugging Face model")
    if "model_type" not in config:
        raise ModelError(
            f"hf:{folder} is no folder of a Hugging Face model: its {HF_CONFIG} has no model_type; give a folder that "
            "save_pretrained wrote"
        )
    return config


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{what}: {path} cannot be read ({error.strerror}); give a local folder that save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ModelError(f"{what}: {path} is not JSON ({error}); fetch it again") from None
    return content if isinstance(content, dict) else {}


def _hf_network(num_classes: int, channels: int, config: Mapping[str, Any]) -> nn.Module:
    """Build the network of a configuration with random weights. No code of the folder runs."""
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        problem = import_problem(error, "transformers")
        raise ModelError(f"an hf: network needs transformers, which {problem}: pip install transformers") from None
    settings = {key: value for key, value in config.items() if key not in ("model_type", "id2label", "label2id")}
    settings |= {"num_labels": num_classes, "num_channels": channels}
    try:
        of_transformers = AutoConfig.for_model(config["model_type"], **settings)
        network: nn.Module = AutoModelForImageClassification.from_config(of_transformers, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        reason = first_line(error)
        raise ModelError(
            f"the model type '{config['model_type']}' has no image classifier in the installed transformers "
            f"({reason}); give a model of AutoModelForImageClassification without code of its own"
        ) from error
    return network


def hf_config_of(network: Any, class_names: Sequence[str]) -> str:
    """Return the ``config.json`` of a Hugging Face network that knows these classes."""
    config = network.config.to_dict()
    config["architectures"] = [type(network).__name__]
    config["id2label"] = {str(index): name for index, name in enumerate(class_names)}
    config["label2id"] = {name: index for index, name in enumerate(class_names)}
    return json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"


def _hf_builder(name: str, num_classes: int, input_shape: ImageShape) -> Builder:
    return Builder(_hf_network, {"num_classes": num_classes, "channels": input_shape[0]})


def _hf_preprocessing(folder: str) -> PreprocessSpec | None:
    path = Path(folder) / HF_PROCESSOR
    if not path.exists():  # the network alone may still take one size only
        side = read_hf_config(folder).get("image_size")
        return PreprocessSpec((0.0,), (1.0,), (side, side)) if isinstance(side, int) else None
    config = _read_json(path, f"hf:{folder} has a preprocessing that is not readable")
    if config.get("rescale_offset"):
        raise ModelError(f"{path} has a rescale_offset, which is not supported: remove the file, and give mean and std")
    normalised = config.get("do_normalize", True)
    try:
        size, mode = _hf_size(config)
        return PreprocessSpec(
            mean=_listed(config.get("image_mean"), 0.0) if normalised else (0.0,),
            std=_listed(config.get("image_std"), 1.0) if normalised else (1.0,),
            size=size,
            interpolation=RESAMPLE.get(config.get("resample", 2), "bilinear"),
            resize_mode=mode,
        )
    except (TypeError, ValueError, AttributeError, LookupError, StopIteration) as error:
        raise ModelError(
            Message(
                f"hf:{folder} has a preprocessing that is not readable: {path} ({first_line(error)}); fetch it again, ",
                "or remove it and give ",
                *(Option("mean"), ", ", Option("std"), " and ", Option("input_size")),
            )
        ) from None


def _listed(value: Any, default: float) -> tuple[Any, ...]:
    """Return a processor's value for each channel; it may be one number for all."""
    return tuple(value) if isinstance(value, list) and value else (default if value in (None, []) else value,)


def _hf_size(config: Mapping[str, Any]) -> tuple[tuple[int, int] | None, str]:
    """Return the size that a processor makes, and how: the crop's, or else the resized image's."""
    size, crop = config.get("size"), config.get("crop_size")
    if not config.get("do_resize", True) or size is None:
        size = None
    if config.get("do_center_crop") and crop is not None:
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        return (int(crop["height"]), int(crop["width"])), SHORTEST
    if size is None:
        return None, SHORTEST
    if isinstance(size, int):
        return (size, size), SQUASH
    if "height" in size:
        return (int(size["height"]), int(size["width"])), SQUASH
    side = int(size.get("shortest_edge") or next(iter(size.values())))
    return (side, side), SHORTEST


def _hf_classes(folder: str) -> tuple[str, ...] | None:
    names = read_hf_config(folder).get("id2label")
    if not names:
        return None
    try:
        ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError, LookupError):
        raise ModelError(
            f"hf:{folder} has classes that are not readable: id2label of its {HF_CONFIG} must have names by number; "
            "fetch it again"
        ) from None
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered


SOURCES: dict[str, Source] = {
    "torchvision": Source(_torchvision_names, _torchvision_builder, _torchvision_preprocessing, _torchvision_classes),
    "timm": Source(lambda: _timm().list_models(), _timm_builder, _timm_preprocessing, _timm_classes),
    "hf": Source(list, _hf_builder, _hf_preprocessing, _hf_classes),
}
