"""A user's file of weights, loaded into a network of any library: which tensors of the file belong to which of it.

Not here: what a file is that holds no weights (`weight_files.py`), and our own run folders (`classifier.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from options import did_you_mean
from pipeline.errors import ModelError
from pipeline.networks.layers import COLOURS, for_channels, last_layer, outputs_of_last_layer
from pipeline.networks.weight_files import SAFETENSORS, ZIP, file_fault, reason_of

INDEX = ".index.json"  # of Hugging Face: which of several files, the shards, has which tensor
IN_FOLDERS = (  # of our trainings and of Hugging Face; the first ones are preferred
    "weights.pt", "model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}",
)  # fmt: skip
SHARD = re.compile(r"-\d+-of-(\d+)\.\w+$")  # the end of a shard's name
PARTS = ("state_dict", "model", "module", "network", "net", "model_state_dict")  # the first ones are preferred
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # in names, at any place
SECOND_MOMENT = "running_second_moment"  # of a `ScaleNorm`, in the files of bias-free networks
STATISTICS = ("running_mean", "running_var", SECOND_MOMENT)  # buffers that a training fills in
MOST = 3  # names that a line lists
DEPTH = 3  # of dictionaries in a file


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did.

    Attributes:
        file: the name of the file.
        loaded: the number of tensors that were loaded.
        part: the keys under which the file holds them, joined by dots; empty for a plain state dict.
        prefix: what was taken off the names in the file.
        replaced: the names of last layers whose weights are not loaded.
        classes: the number of classes that the last layer has in the file; None if the file has no last layer.
        changed: sentences on tensors that were changed to fit.
        missing: names in the network that the file lacks.
        unexpected: names in the file that the network lacks.
    """

    file: str
    loaded: int
    part: str = ""
    prefix: str = ""
    replaced: tuple[str, ...] = ()
    classes: int | None = None
    new_classes: int = 0
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines for the user."""
        source = f"{self.file}{f', under {self.part}' if self.part else ''}"
        without = f"; their names lost the prefix '{self.prefix}'" if self.prefix else ""
        lines = [f"loaded {self.loaded} tensors of {source}{without}"]
        for name in self.replaced:
            in_file = "missing in the file" if self.classes is None else f"{self.classes} classes in the file"
            lines.append(f"replaced: '{name}' ({in_file}, {self.new_classes} here); its weights are not loaded")
        lines += self.changed
        of_last = tuple(f"{name}." for name in self.replaced)
        missing = [name for name in self.missing if not name.startswith(of_last)] if of_last else self.missing
        if missing:
            lines.append(f"missing in the file, left as the network was built: {_listed(missing)}")
        if self.unexpected:
            lines.append(f"unexpected in the file, not loaded: {_listed(self.unexpected)}")
        return lines


@dataclass(frozen=True)
class Weights:
    """The result of `read_weights`.

    Attributes:
        path: the file, or the index of the shards.
        files: the files with the tensors: the file itself, or the shards.
        state_dicts: the state dicts, the outer ones first, each with the keys that lead to it. The tensors are on the
            CPU; they are mapped from the file, and take no memory, if its format allows this.
    """

    path: Path
    files: tuple[Path, ...]
    state_dicts: tuple[tuple[tuple[str, ...], dict[str, Tensor]], ...]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the bytes of all files, one after another."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()

    @property
    def bias_free(self) -> bool:
        """Whether they are of a network without any bias, such as our bias-free ones."""
        longest = max((tensors for _, tensors in self.state_dicts), key=len, default={})
        return bool(longest) and _is_bias_free(longest)


def read_weights(path: str | Path) -> Weights:
    """Read a file of weights. No code of the file runs.

    The file is one of `torch.save` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) or of safetensors (``.safetensors``), or
    the index of Hugging Face's shards (``.index.json``). It holds a state dict, or dictionaries with state dicts in
    them.

    Args:
        path: the file, or a folder of one of our trainings or of Hugging Face.

    Raises:
        ModelError: it is no file of weights, it is damaged, it would run code, or a file is missing.
    """
    path = _weights_file(Path(path))
    weights = (
        _read_shards(path) if path.name.endswith(INDEX) else Weights(path, (path,), tuple(_state_dicts(_read(path))))
    )
    for _, tensors in weights.state_dicts:
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ModelError(
                    f"the weights {path} do not load: '{name}' is on the device meta, where it has no values: save the "
                    "state_dict of the network on the CPU"
                )
    return weights


def load_checkpoint(network: nn.Module, weights: Weights, num_classes: int) -> CheckpointReport:
    """Load a file of weights into a network, in place. An error leaves the network as it is.

    The state dict and the prefix are taken with which most names and shapes fit the network; names of wrappers
    (`WRAPPERS`) do not count. Where several fit equally, the moving average is taken (a key that contains ``ema``),
    then the first of `PARTS`.

    Changed to fit: a last layer for another number of classes, or one that the file lacks, keeps the network's values.
    A first convolution for 3 channels is summed where the network takes 1, and divided by 3 and repeated where the file
    has 1. Tensors are cast to the dtype of the network. A file of a bias-free network, see `bias_free`, gives zero
    biases and means.

    Args:
        network: the network.
        weights: the file of weights, see `read_weights`.
        num_classes: the number of the network's logits.

    Returns:
        The report.

    Raises:
        ModelError: the file holds no network, or more than the last layer is missing or has another shape.
    """
    fit = _best_fit(network, weights)
    last = _last_layers(network, fit, num_classes)
    loading = _Loading(network, fit, last_layer(network, num_classes))
    for name, target in loading.targets.items():
        if not _of(name, last.names):
            loading.take(name, target)
    unexpected = [name for name in fit.tensors if name not in fit.names.values() and name not in loading.moments]
    more = _more_than(network, fit, unexpected, last_layer(network, num_classes))
    if loading.wrong or loading.lacking or not loading.values or more:
        raise _of_another_network(weights.path, network, loading, unexpected, more)
    network.load_state_dict(loading.values, strict=False)
    return CheckpointReport(
        file=weights.path.name,
        loaded=len(loading.values) - loading.zeros,
        part=fit.part,
        prefix=fit.removed,
        replaced=last.names,
        classes=last.classes,
        new_classes=num_classes,
        changed=tuple(loading.changes()),
        missing=(*(name for name in loading.targets if _of(name, last.names) and name not in fit.names), *loading.left),
        unexpected=tuple(unexpected),
    )


def classes_in(network: nn.Module, weights: Weights, num_classes: int) -> int | None:
    """Return the number of classes that the last layer of a network has in a file; None if the file lacks that layer.

    Args:
        network: the network, of the file's architecture.
        weights: as in `load_checkpoint`.
        num_classes: the number of the network's logits, which may differ from the file's.

    Raises:
        ModelError: the file holds no network.
    """
    name = last_layer(network, num_classes)
    return None if name is None else _outputs_in(_best_fit(network, weights), name)


def _is_bias_free(names: Iterable[str]) -> bool:
    last = {name.rpartition(".")[2] for name in names}
    return SECOND_MOMENT in last or not any("bias" in name for name in last)


# --- the file -------------------------------------------------------------------------------------------------------


def _weights_file(path: Path) -> Path:
    """Return the file of weights that a path means: itself, or the one in a folder of a training or of Hugging Face."""
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    names = [name for name in IN_FOLDERS if not name.endswith(INDEX)]
    raise ModelError(f"the folder {path} has no {', '.join(names[:-1])} or {names[-1]}: give the file")


def _read_shards(index: Path) -> Weights:
    """Join the tensors of the shards that an index of Hugging Face lists."""
    remedy = "give the index that save_pretrained wrote beside the shards"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except OSError as error:
        raise ModelError(f"the weights {index} cannot be read ({error.strerror}): {remedy}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(
            f"the weights {index} do not load: {index.name} has no weight_map of names and shards; {remedy}"
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"the weights {index} do not load: the shard {name!r} is no name of a file; {remedy}")
        if not (index.parent / name).exists():
            raise ModelError(
                f"the weights {index} lack the shard {name}, one of {len(shards)}: fetch it into {index.parent}"
            )
        content = _read(index.parent / name)
        tensors |= next((state for keys, state in _state_dicts(content) if not keys), {})
        if missing := [tensor for tensor, shard in listed.items() if shard == name and tensor not in tensors]:
            raise ModelError(
                f"the weights {index} do not load: the shard {name} lacks {missing[0]!r}, which the index lists; fetch "
                "all files again"
            )
    return Weights(index, tuple(index.parent / name for name in shards), (((), tensors),) if tensors else ())


def _read(path: Path) -> Any:
    """Return what a file holds.

    Raises:
        ModelError: it is no file of weights, it is damaged, or it would run code.
    """
    fault = file_fault(path)
    if fault is not None:
        raise ModelError(f"the weights {path} do not load: {path.name} is {fault}")
    try:
        if path.suffix == SAFETENSORS:
            return load_file(path)
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of TorchScript archives, which the error below names
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for a file that is cut or foreign
        raise ModelError(f"the weights {path} do not load: {reason_of(error, path)}") from error


# plain values that trainings save beside the weights: options, paths, and numbers of NumPy
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def _state_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the state dicts in a file, the outer ones first, each with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield keys, tensors
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _state_dicts(value, (*keys, key))


# --- which tensor is which ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """A state dict in a file, and the names of the network's tensors that it has.

    ``names`` is from the network's names to the file's; ``fitting`` counts those with the same shape.
    """

    keys: tuple[str, ...]
    prefix: str  # without wrappers
    added: str  # in front of the names, in the network
    tensors: dict[str, Tensor]
    names: dict[str, str]
    fitting: int

    @property
    def part(self) -> str:
        return ".".join(self.keys)

    @property
    def rank(self) -> tuple[bool, int]:
        """How a fit is preferred to others that are as good; the smaller one is."""
        names = [*self.keys, self.prefix]
        is_average = any("ema" in re.split(r"[._]", name.lower()) for name in names)
        known = min((PARTS.index(key) for key in self.keys if key in PARTS), default=len(PARTS))
        return not is_average, known

    @property
    def removed(self) -> str:
        """What the names lost, wrappers too."""
        return next((key.removesuffix(name) for name, key in self.names.items() if key.endswith(name)), "")

    def values(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensors[key]) for name, key in self.names.items())


def _best_fit(network: nn.Module, weights: Weights) -> _Fit:
    """Return the state dict of a file, and the prefixes, with which most of a network's names and shapes fit."""
    own, path = _tensors(network), weights.path
    fits = [fit for keys, tensors in weights.state_dicts for fit in _fits(own, keys, tensors)]
    if not fits:
        raise ModelError(
            f"the weights {path} do not load: {path.name} holds no tensors by name; it must hold a state_dict, the "
            "tensors of a network by their names"
        )
    most = max((fit.fitting, len(fit.names)) for fit in fits)
    fits = [fit for fit in fits if (fit.fitting, len(fit.names)) == most]
    best = min(fits, key=lambda fit: fit.rank)
    rivals = [fit for fit in fits if fit.rank == best.rank and fit is not best]
    for rival in rivals if best.fitting else []:
        if any(not _equal(best.tensors[best.names[n]], value) for n, value in rival.values() if n in best.names):
            raise ModelError(
                f"the weights {path} hold several networks that fit, {_source(best)} and {_source(rival)}: save one of "
                "them alone"
            )
    return best


def _source(fit: _Fit) -> str:
    return f"'{'.'.join([*fit.keys, fit.prefix.removesuffix('.')]).strip('.')}'"


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and _dense(first).equal(_dense(second)))


def _fits(own: dict[str, Tensor], keys: tuple[str, ...], tensors: dict[str, Tensor]) -> Iterator[_Fit]:
    """Yield a fit for each prefix that the names in a file, or in the network, may have more than the others."""
    plain = {_unwrapped(name): name for name in own}
    if len(plain) < len(own):
        plain = {name: name for name in own}
    of_file = {_unwrapped(name) or name: name for name in tensors}
    if len(of_file) < len(tensors):
        of_file = {name: name for name in tensors}
    for prefix in _prefixes(of_file, len(plain) / 2):
        without = {name: name.removeprefix(prefix) for name in of_file}
        for more in _prefixes(plain, len(plain) / 2):
            names: dict[str, str] = {}
            # names with the prefix come last, and so go before others
            for name, short in sorted(without.items(), key=lambda pair: pair[0] != pair[1]):
                target = plain.get(more + short, plain.get(short))
                if target is not None:
                    names[target] = of_file[name]
            fitting = sum(_same_shape(own[name], tensors[key]) for name, key in names.items())
            yield _Fit(keys, prefix, more, tensors, names, fitting)


def _prefixes(names: Iterable[str], least: float) -> list[str]:
    """Return what at least so many names begin with, up to a dot; the empty text first."""
    counts: dict[str, int] = {}
    for name in names:
        for dot in re.finditer(r"\.", name):
            prefix = name[: dot.end()]
            counts[prefix] = counts.get(prefix, 0) + 1
    return ["", *(prefix for prefix, count in counts.items() if count >= least)]


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _same_shape(own: Tensor, other: Tensor) -> bool:
    return nn.parameter.is_lazy(own) or own.shape == other.shape


def _of(name: str, modules: Iterable[str]) -> bool:
    """Return whether a tensor belongs to one of these modules."""
    return name.startswith(tuple(f"{module}." for module in modules))


# --- the last layer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LastLayers:
    """The last layers that the file lacks or has for other classes, and for how many it has them."""

    names: tuple[str, ...] = ()
    classes: int | None = None


def _last_layers(network: nn.Module, fit: _Fit, num_classes: int) -> _LastLayers:
    """Return the last layer if it has to keep its values, and auxiliary ones (GoogLeNet's, DeiT's) that are alike."""
    name = last_layer(network, num_classes)
    if name is None:
        return _LastLayers(classes=None)
    classes = _outputs_in(fit, name)
    if classes == num_classes:
        return _LastLayers(classes=classes)
    layers = {key: module for key, module in network.named_modules() if outputs_of_last_layer(module) == num_classes}
    if classes is None:
        width = _inputs(layers[name])
        others = [key for key, layer in layers.items() if _outputs_in(fit, key) is None and _inputs(layer) == width]
        siblings = [key for key in others if key.rpartition(".")[0] == name.rpartition(".")[0]]
        return _LastLayers(tuple(siblings))
    return _LastLayers(tuple(key for key in layers if _outputs_in(fit, key) == classes), classes)


def _inputs(layer: nn.Module) -> int | None:
    return getattr(layer, "in_features", getattr(layer, "in_channels", None))


def _outputs_in(fit: _Fit, module: str) -> int | None:
    """Return the outputs of a layer in the file, by the first axis of its largest tensor; None where it has none."""
    tensors = [value for name, value in fit.values() if _of(name, [module]) and value.dim() > 1]
    return max(tensors, key=Tensor.numel).shape[0] if tensors else None


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass
class _Loading:
    """The values to load into a network, as `take` collects them, and what does not fit."""

    network: nn.Module
    fit: _Fit
    last: str | None
    values: dict[str, Tensor] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # what differs, by name
    lacking: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # buffers that the constructor computes
    moments: list[str] = field(default_factory=list)  # names in the file that stand for variances
    zeros: int = 0
    casts: dict[str, int] = field(default_factory=dict)
    first_layers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.targets = _tensors(self.network)
        self._parameters = dict(self.network.named_parameters(remove_duplicate=False))
        self._shared = {id(self.targets[name]) for name in self.fit.names}
        norms = [name for name in self.fit.tensors if name.endswith(SECOND_MOMENT)]
        self._is_bias_free = _is_bias_free([*self.fit.names.values(), *norms])

    def take(self, name: str, own: Tensor) -> None:
        """Take the value of one tensor of the network from the file, changed to fit."""
        if name not in self.fit.names:
            self._without(name, own)
            return
        value = _dense(self.fit.tensors[self.fit.names[name]])
        if not _same_shape(own, value):
            channels = self._channels(name, own, value)
            if channels is None:
                self.wrong[name] = f"has shape {tuple(value.shape)} and must have {tuple(own.shape)}"
                return
            value = for_channels(value.to(own.dtype), channels)
            before = COLOURS if channels == 1 else 1
            how = "summed over the channels" if channels == 1 else "divided by 3 and repeated"
            self.first_layers.append(
                f"first layer: '{name}' takes {before} channels in the file and {channels} here, so that its weights "
                f"were {how}"
                + (" (exact behind a preprocessing with one mean and one deviation)" if channels == 1 else "")
            )
        if own.is_floating_point() != value.is_floating_point() or value.is_complex():
            self.wrong[name] = f"is {_dtype(value)} and must be {_dtype(own)}"
            return
        if value.dtype != own.dtype or self.fit.tensors[self.fit.names[name]].is_quantized:
            kind = f"{_dtype(self.fit.tensors[self.fit.names[name]])} to {_dtype(own)}"
            self.casts[kind] = self.casts.get(kind, 0) + 1
        self.values[name] = value.to(own.dtype)

    def _without(self, name: str, own: Tensor) -> None:
        """Take what stands for a tensor that the file lacks."""
        module, _, kind = name.rpartition(".")
        weight = self.fit.names.get(f"{module}.weight")
        if id(own) in self._shared:
            return  # it is a tensor of the file by another name
        moment = f"{(weight or '').removesuffix('weight')}{SECOND_MOMENT}"
        if kind == "running_var" and moment in self.fit.tensors:
            self.values[name] = self.fit.tensors[moment].to(own.dtype)
            self.moments.append(moment)
        elif (kind == "running_mean" and moment in self.fit.tensors) or (
            kind == "bias" and weight is not None and (self._is_bias_free or module == self.last)
        ):
            self.values[name] = torch.zeros_like(own.detach())
            self.zeros += 1
        elif name in self._parameters or kind in STATISTICS:
            self.lacking.append(name)
        elif kind != "num_batches_tracked":
            self.left.append(name)

    def _channels(self, name: str, own: Tensor, value: Tensor) -> int | None:
        """Return the channels of a first convolution that takes 1 in place of 3, or 3 in place of 1; else None."""
        module_name, _, kind = name.rpartition(".")
        module = self.network.get_submodule(module_name)
        if kind != "weight" or not isinstance(module, nn.Conv2d) or module.groups != 1 or value.dim() != 4:
            return None
        sizes = (value.shape[1], own.shape[1])
        same = own.shape[:1] + own.shape[2:] == value.shape[:1] + value.shape[2:]
        return own.shape[1] if same and sizes in ((COLOURS, 1), (1, COLOURS)) else None

    def changes(self) -> Iterator[str]:
        yield from self.first_layers
        for kind, number in self.casts.items():
            yield f"cast: {number} tensor{'s' * (number > 1)} from {kind}"
        if self.zeros:
            yield f"the file has no biases where this network has some: {self.zeros} biases and means are zero"


def _dense(value: Tensor) -> Tensor:
    value = value.dequantize() if value.is_quantized else value
    return value if value.layout == torch.strided else value.to_dense()


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# --- errors ---------------------------------------------------------------------------------------------------------


def _more_than(network: nn.Module, fit: _Fit, unexpected: list[str], last: str | None) -> str:
    """Say what makes a file one of a larger network, of which the network is a part; empty if nothing does.

    Layers beside others of a numbered series are no auxiliary heads, nor is a bias of a layer that lacks it.
    """
    modules = {_unwrapped(name): module for name, module in network.named_modules()}
    own = {_unwrapped(name) for name in _tensors(network)}
    with_parameters = {name for name in modules if any(_of(tensor, [name]) for tensor in own)}
    series = {(name.rpartition(".")[0], _stem(name)) for name in with_parameters if name and not _holds(name, last)}
    for key in unexpected:
        name = _unwrapped(key).removeprefix(fit.prefix)
        module, _, kind = (fit.added + name).rpartition(".")
        if module in with_parameters and kind in ("weight", "bias", *STATISTICS) and f"{module}.weight" in own:
            return f"it has '{key}', which the network's layer '{module}' lacks"
        parts = module.split(".")
        prefixes = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        first = next((prefix for prefix in prefixes if prefix not in modules), None)
        numbered = first is not None and _stem(first) is not None and (first.rpartition(".")[0], _stem(first)) in series
        if first is not None and numbered and not _holds(first, last):
            return f"it has more layers than the network, such as '{key}'"
    return ""


def _stem(name: str) -> str | None:
    """Return the last part of a name without its number; None if it has none."""
    part = name.rpartition(".")[2]
    stem = part.rstrip("0123456789_")
    return stem if stem != part else None


def _holds(name: str, last: str | None) -> bool:
    """Return whether a module stands beside the last layer, or is above it."""
    return last is not None and (last == name or _of(last, [name]) or _is_beside(name, last))


def _is_beside(name: str, last: str) -> bool:
    parent = last.rpartition(".")[0]
    return bool(parent) and name.rpartition(".")[0] == parent


def _of_another_network(
    path: Path, network: nn.Module, loading: _Loading, unexpected: list[str], more: str
) -> ModelError:
    """Return the error for a file in which more than the last layer is missing, has another shape or is too much."""
    fit = loading.fit
    total, parts, remedy = len(loading.targets), [], "give weights of this architecture"
    if not loading.values and not loading.wrong:
        parts.append(f"none of its {len(fit.tensors)} names is one of the network's")
    elif loading.lacking:
        first = loading.lacking[0]
        parts.append(
            f"it lacks {len(loading.lacking)} of the network's {total} tensors, such as '{first}'"
            + (f", and has {len(unexpected)} others, such as '{unexpected[0]}'" if unexpected else "")
        )
        remedy += "." + did_you_mean(first, unexpected) if did_you_mean(first, unexpected) else ""
        if shard := SHARD.search(path.name):
            remedy = f"it is one of {int(shard[1])} shards: give the folder or the index"
        if all(name.endswith(SECOND_MOMENT) for name in loading.lacking):
            remedy = "its batch norms have means and shifts, and the network is bias-free: let it keep its biases"
    if loading.wrong:
        first, what = next(iter(loading.wrong.items()))
        number = len(loading.wrong)
        others = f", and {number - 1} other{'s do' if number > 2 else ' does'} not fit either" if number > 1 else ""
        parts.append(f"'{first}' {what}{others}")
        if not loading.lacking and any("pos" in name for name in loading.wrong):
            remedy = "the file was made for images of another size: build the network for that size, as positions are "
            remedy += "not interpolated"
        elif not loading.lacking and loading.wrong.keys() <= _first_layers(network):
            remedy = "only 3 channels become 1, and 1 becomes 3: give images of the channels that the file takes"
    if more and not parts:
        parts.append(more)
        if ".bias'" in more or "running_" in more:
            remedy = "the file has biases, and the network is bias-free: let it keep its biases"
    return ModelError(
        f"the weights {path} are of another network than {type(network).__name__}: {'; '.join(parts)}; {remedy}"
    )


def _first_layers(network: nn.Module) -> set[str]:
    first = next((name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), None)
    return set() if first is None else {f"{first}.weight"}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{', '.join(map(repr, names[:MOST]))}{more}"
