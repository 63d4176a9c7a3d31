"""The file formats of `export_model`: how a network is written, and how its file is run to check it."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from options import Among, Doc, Heading, Kind, Lazy, Message, Option, OptionSet, Registry
from options.common import CUSTOM_CODE, StudentFactory
from pipeline.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        encode: makes a file's content from a network and some images (N, C, H, W) to trace it with.
        decode: makes a function, images → logits, from a file's content. It may use the network's structure, but not
            its weights.
        weights_alone: the file has the weights alone, for the same network in the library that it is from. It takes
            preprocessed images. Other files take images in [0, 1].
    """

    encode: Callable[[nn.Module, Tensor], bytes]
    decode: Callable[[bytes, nn.Module], Callable[[Tensor], Tensor]]
    weights_alone: bool = False


FORMATS: Registry[Format] = Registry("format", ModelError)


def _to_torch_export(network: nn.Module, images: Tensor) -> bytes:
    """Return a program for ``torch.export.load(FILE).module()(images)``."""
    program = torch.export.export(network, (images,), dynamic_shapes=_any_batch(), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _from_torch_export(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(content)).module()


def _to_onnx(network: nn.Module, images: Tensor) -> bytes:
    """Return a graph for any ONNX runtime, with the input ``images`` and the output ``logits``."""
    _require_onnx()
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _from_onnx(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Run the file by onnx's own evaluator, which is slow and defines the meaning of the file for every runtime."""
    from onnx import load_from_string
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(load_from_string(content))
    return lambda images: torch.from_numpy(evaluator.run(["logits"], {"images": images.numpy()})[0])


def _require_onnx() -> None:
    try:
        for library in ("onnx", "onnxscript"):
            importlib.import_module(library)
    except ImportError as error:
        raise ModelError(
            Message(
                Option("format", "onnx"),
                f" needs {error.name or 'onnx'}, which is not installed: pip install onnx onnxscript, or "
                "pip install -e '.[onnx]' in the checkout",
            )
        ) from None


def _to_state_dict(network: nn.Module, images: Tensor) -> bytes:
    """Return a state dict for ``network.load_state_dict(torch.load(FILE))``, in a network with the same layers."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def _from_state_dict(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    return _filled(network, torch.load(io.BytesIO(content), weights_only=True))


def _filled(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load weights into a copy of the network whose saved weights are 0."""
    network = copy.deepcopy(network)
    for tensor in network.state_dict().values():
        tensor.zero_()
    network.load_state_dict(weights)
    return network


def _to_safetensors(network: nn.Module, images: Tensor) -> bytes:
    """Return a state dict as safetensors, which Hugging Face and timm load; no code can hide in it."""
    from safetensors.torch import save

    return save({name: value.contiguous().clone() for name, value in network.state_dict().items()}, {"format": "pt"})


def _from_safetensors(content: bytes, network: nn.Module) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load

    return _filled(network, load(content))


def _any_batch() -> Any:
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)  # PyTorch 2.6 refuses a size without an upper bound


FORMATS["torch-export"] = Format(_to_torch_export, _from_torch_export)
FORMATS["onnx"] = Format(_to_onnx, _from_onnx)
FORMATS["state-dict"] = Format(_to_state_dict, _from_state_dict, weights_alone=True)
FORMATS["safetensors"] = Format(_to_safetensors, _from_safetensors, weights_alone=True)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OptionSet):
    """The options of ``export``."""

    ERROR: ClassVar[type[Exception]] = ModelError
    HEADING: ClassVar[str] = "Files"

    model: Annotated[str | Path, Kind.FOLDER, Doc("Folder of a student or teacher.")]
    format: Annotated[
        str,
        Among(FORMATS),
        Doc(
            "File format: a .pt2 file for torch.export.load, an ONNX file, or the weights alone as a .pt or a "
            ".safetensors file."
        ),
    ]
    out: Annotated[str | Path, Kind.FOLDER, Doc("File to write.")]
    student_factory: Annotated[StudentFactory, Heading(CUSTOM_CODE)] = None
