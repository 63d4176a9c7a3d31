"""One table of what users do wrong with networks, weights, classes, data and loops of their own: one clear error each.

Each row has a call in Python, the words that its error must contain, and the same in the shell where there is a door.
Not here: wrong values of single options (`test_cli.py`), and what a file without weights is called
(`test_weight_files.py`).
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import NETWORKS, load_checkpoint, noise, prefixed, written
from test_four_doors import CLASSES, GOOD, SIZE, TO_FLOAT, pixels, with_item
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torchvision.transforms import v2
from transformers import AutoConfig, AutoModelForImageClassification

from cli import main
from data import DatasetError, from_arrays, from_torch, open_dataset
from pipeline import ModelError, OwnTeacher, PreprocessSpec, RelevanceError, build_network, cache_explanations
from pipeline.networks.class_map import resolve_class_map
from pipeline.networks.teachers import load_teacher
from teacher_cache import CacheError
from trainer import DistillationLoss, ExplainedStream, TrainingError, build_student, train_teacher

ERRORS = (CacheError, DatasetError, ModelError, RelevanceError, TrainingError)
SHAPE = (3, 28, 28)
NEW = "new"  # the output, of which nothing may be left


class World(NamedTuple):
    """What a row works with: an empty current folder, a dataset, its store, and a batch of both."""

    folder: Path
    dataset: Path
    store: Path
    batch: dict[str, Tensor]


class Wrong(NamedTuple):
    """A row: a call in Python, the words of its error, and the same in the shell, if it has a door there."""

    call: Callable[[World], object]
    words: str
    line: Callable[[World], str] | None = None


@pytest.fixture(scope="module")
def batch(dataset: Path, cache: Path) -> dict[str, Tensor]:
    return next(iter(ExplainedStream(dataset, cache, batch_size=16)))


@pytest.fixture
def world(tmp_path, monkeypatch, dataset, cache, batch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield World(tmp_path / "work", dataset, cache, batch)
    for name in ("mine", "broken", "leaving"):
        sys.modules.pop(name, None)


OWN = f"cache-explanations --data {{}} --draws 1 --out {NEW}"


def small(world: World, classes: int = 10) -> str:
    """Write the weights of a small network."""
    network, _ = build_network("small-cnn", classes, SHAPE, free_of_biases=False)
    return str(written(world.folder, network.state_dict(), "small.pt"))


# --- files of weights -----------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the file ran",)


def script(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # which newer releases of PyTorch give
        torch.jit.script(nn.Linear(2, 2)).save(folder / "script.pt")
    return folder / "script.pt"


def raw(content: bytes, name: str = "w.pt") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def state_of(name: str, **changes: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return written(folder, NETWORKS[name](3).state_dict() | changes)

    return write


def without(*names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        state = {k: v for k, v in NETWORKS["resnet18"](3).state_dict().items() if not k.startswith(names)}
        return written(folder, state)

    return write


def two_networks(folder: Path) -> Path:
    state = NETWORKS["resnet18"](3).state_dict()
    return written(folder, {"student": state, "teacher": noise(state)})


def two_prefixes(folder: Path) -> Path:
    state = NETWORKS["resnet18"](3).state_dict()
    return written(folder, {**prefixed(state, "online."), **prefixed(noise(state), "target.")})


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "text")
    return buffer.getvalue()


def index_of(folder: Path, weight_map: dict[str, str], tensors: Any = True) -> Path:
    """Write an index of shards, and the shards with the tensors that it lists, some of them, or none."""
    for shard in sorted(set(weight_map.values())) if tensors else ():
        names = [name for name, file in weight_map.items() if file == shard and (tensors is True or name in tensors)]
        save_file({name: torch.ones(300) for name in names}, folder / shard)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def cut_shard(folder: Path) -> Path:
    path, shard = index_of(folder, {"a": "model-1-of-1.safetensors"}), folder / "model-1-of-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return path


def evil_shard(folder: Path) -> Path:
    written(folder, {"a": Evil()}, "pytorch_model-1-of-1.bin")
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "pytorch_model-1-of-1.bin"}}))
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another architecture": (state_of("mobilenet"), r"of another network than ResNet: .*give weights of this arch"),
    "a deeper network": (
        lambda folder: written(folder, torchvision.models.resnet34(num_classes=3).state_dict()),
        r"of another network than ResNet: it has more layers than the network, such as 'layer1.2.conv1.weight'",
    ),
    "a deeper network in a checkpoint": (
        lambda folder: written(
            folder, {"model": prefixed(torchvision.models.resnet34(num_classes=3).state_dict(), "module.")}
        ),
        r"it has more layers than the network, such as 'module.layer1.2.conv1.weight'",
    ),
    "biases that the network lacks": (
        state_of("resnet18", **{"conv1.bias": torch.ones(64)}),
        r"it has 'conv1.bias', which the network's layer 'conv1' lacks",
    ),
    "a wider network": (
        lambda folder: written(folder, torchvision.models.wide_resnet50_2(num_classes=3).state_dict()),
        "of another network than ResNet",
    ),
    "a transformer": (state_of("vit"), "none of its 32 names is one of the network's"),
    "two layers are missing": (
        without("fc", "layer4.1.conv2"),
        r"lacks 1 of the network's 122 tensors, such as 'layer4.1.conv2.weight'",
    ),
    "a layer with another name": (
        lambda folder: written(
            folder, {k.replace("layer4.0", "layer4_0"): v for k, v in NETWORKS["resnet18"](3).state_dict().items()}
        ),
        r"such as 'layer4.0.conv1.weight', and has .* Did you mean layer4_0.conv1.weight",
    ),
    "statistics are missing": (without("bn1.running_var"), "lacks 1 .*'bn1.running_var'"),
    "another kernel": (
        state_of("resnet18", **{"conv1.weight": torch.ones(64, 3, 3, 3)}),
        r"'conv1.weight' has shape \(64, 3, 3, 3\) and must have \(64, 3, 7, 7\)",
    ),
    "four channels": (
        state_of("resnet18", **{"conv1.weight": torch.ones(64, 4, 7, 7)}),
        r"\(64, 4, 7, 7\) and must have \(64, 3, 7, 7\); only 3 channels become 1",
    ),
    "integers": (
        state_of("resnet18", **{"conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}),
        "'conv1.weight' is int8 and must be float32",
    ),
    "two networks": (two_networks, "several networks that fit, 'student' and 'teacher': save one"),
    "two networks by prefix": (two_prefixes, "several networks that fit, 'online' and 'target': save one"),
    "no file": (lambda folder: folder / "none.pt", r"not readable \(No such file"),
    "an empty folder": (lambda folder: folder, "has no weights.pt, model.safetensors or pytorch_model.bin"),
    "code": (lambda folder: written(folder, {"model": Evil()}), "which could run code: save the state_dict"),
    "a whole network": (
        lambda folder: written(folder, nn.Linear(2, 2)),
        "holds a pickled torch.nn.modules.linear.Linear, which could run code",
    ),
    "TorchScript": (script, r"is a TorchScript archive, .* save the state_dict\(\)"),
    "a pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "is a Git LFS pointer"),
    "a web page": (raw(b"<!DOCTYPE html><html></html>"), "is a web page"),
    "an archive of something else": (raw(zip_of("a.txt")), "is a zip archive and no file of torch.save"),
    "an optimizer": (
        lambda folder: written(folder, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1).state_dict()),
        "holds no tensors by name",
    ),
    "a list": (lambda folder: written(folder, [torch.ones(2)]), "holds no tensors by name"),
    "a tensor": (lambda folder: written(folder, torch.ones(2)), "holds no tensors by name"),
    "nothing": (lambda folder: written(folder, {}), "holds no tensors by name"),
    "safetensors by another name": (
        lambda folder: written(folder, {"a": torch.ones(2)}, "w.safetensors").rename(folder / "w.pth"),
        "is a safetensors file: rename it to w.safetensors",
    ),
    "a cut file": (
        lambda folder: raw(written(folder, NETWORKS["small-cnn"](3).state_dict()).read_bytes()[:-500])(folder),
        "is cut: its end is missing",
    ),
    "an empty file": (raw(b""), "w.pt is empty: fetch it again"),
    "half a file of safetensors": (
        lambda folder: raw(
            written(folder, NETWORKS["small-cnn"](3).state_dict(), "a.safetensors").read_bytes()[:9000], "w.safetensors"
        )(folder),
        "w.safetensors is cut: .* bytes of it are missing; fetch it again",
    ),
    "safetensors with other names": (
        lambda folder: written(folder, {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, "w.safetensors"),
        "none of its 2 names is one of the network's",
    ),
    "JSON": (raw(b'{"conv1.weight": [1, 2]}', "w.pt"), "is text and not weights, and begins with '{"),
    "JSON as safetensors": (raw(b'{"conv1.weight": [1, 2]}', "w.safetensors"), "is text and not weights"),
    "tensors on a device without values": (
        lambda folder: written(folder, NETWORKS["resnet18"](3).to("meta").state_dict()),
        "'conv1.weight' is on the device meta, where it has no values: save the state_dict of the network on the CPU",
    ),
    "the weights of our own training as code": (
        lambda folder: written(folder, {"state_dict": {"conv1.weight": Evil()}}), "which could run code",
    ),
    "an index without its shards": (
        lambda folder: index_of(folder, {"conv1.weight": "model-00002-of-00002.safetensors"}, tensors=False),
        "lack the shard model-00002-of-00002.safetensors, one of 1: fetch it into",
    ),
    "a shard without what the index lists": (
        lambda folder: index_of(folder, {"a": "model-1-of-1.safetensors", "b": "model-1-of-1.safetensors"}, ("a",)),
        "the shard model-1-of-1.safetensors lacks 'b', which the index lists; fetch all files again",
    ),
    "a shard that was cut": (cut_shard, "model-1-of-1.safetensors is cut: .* fetch it again"),
    "a shard that would run code": (evil_shard, "holds a pickled .*which could run code"),
    "a shard outside of the folder": (
        lambda folder: index_of(folder, {"a": "../w.safetensors"}, tensors=False), "'../w.safetensors' is no name of a"
    ),
    "an index of nothing": (raw(b"{}", "model.safetensors.index.json"), "has no weight_map of names and shards"),
    "an index that is cut": (raw(b'{"weight_map": {', "model.safetensors.index.json"), "has no weight_map"),
    "an index of a list": (raw(b'{"weight_map": [1]}', "model.safetensors.index.json"), "has no weight_map"),
    "no index": (lambda folder: folder / "model.safetensors.index.json", r"cannot be read \(No such file"),
    "one shard of several": (
        lambda folder: written(
            folder, {"conv1.weight": torch.ones(64, 3, 7, 7)}, "model-00001-of-00003.safetensors"
        ),
        "it is one of 3 shards: give the folder or the index",
    ),
    "a folder with an index that lacks a shard": (
        lambda folder: index_of(folder, {"a": "model-00001-of-00001.safetensors"}, tensors=False).parent,
        "lack the shard model-00001-of-00001.safetensors",
    ),
}  # fmt: skip


def of_file(write: Callable[[Path], Path], words: str) -> Wrong:
    """Load a file into a network of torchvision, in Python and by ``--weights``."""
    return Wrong(
        lambda world: load_checkpoint(NETWORKS["resnet18"](3), write(world.folder), 3),
        words,
        lambda world: f"{OWN.format(world.dataset)} --teacher resnet18 --input-size 32 --weights {write(world.folder)}",
    )


def of_start(line: str) -> Wrong:
    """Start a training from a pickle that would run code."""

    def command(world: World) -> str:
        return line.format(data=world.dataset, store=world.store, file=written(world.folder, {"model": Evil()}))

    return Wrong(
        lambda world: train_teacher(world.dataset, NEW, weights=written(world.folder, {"model": Evil()}), steps=1),
        "holds a pickled .*, which could run code: save the state_dict",
        command,
    )


STARTS = {
    "a teacher from code": of_start("train-teacher --data {data} --weights {file} --steps 1 --out new"),
    "a student from code": of_start("train-student --data {data} --cache {store} --init {file} --steps 1 --out new"),
    "a baseline from code": of_start("train-student --method erm --data {data} --init {file} --steps 1 --out new"),
    "the test of a teacher of code": of_start("evaluate --data {data} --teacher small-cnn --weights {file}"),
}


# --- teachers by name -----------------------------------------------------------------------------------------------


def of_teacher(options: dict[str, Any], words: str, line: str) -> Wrong:
    """Load a teacher of the user's own; ``line`` is the part of the command that differs."""

    def call(world: World) -> object:
        prepare(world)
        return load_teacher(OwnTeacher(**options), open_dataset(world.dataset).class_names, SHAPE)

    def command(world: World) -> str:
        prepare(world)
        return f"{OWN.format(world.dataset)} {line}"

    return Wrong(call, words, command)


RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "num_labels": 10}
PROCESSORS = {  # folders whose preprocessing is wrong
    "sizeless": {"size": {}},
    "sized": {"size": "224"},
    "cropped": {"do_center_crop": True, "crop_size": {"side": 224}},
    "words": {"image_mean": ["a", "b", "c"], "image_std": [0.2, 0.2, 0.2]},
    "unscaled": {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
    "listed": {"resample": [3]},
}


def prepare(world: World) -> None:
    """Write files of weights, and folders that are nearly those of Hugging Face."""
    torch.save({"fc.weight": torch.zeros(10, 3)}, "w.pth")
    small(world)
    configs = {
        "code": {"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}},
        "typeless": {"architectures": ["ResNetForImageClassification"]},
        "language": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1},
        "weightless": {"model_type": "resnet"},
        "nameless": {**RESNET, "id2label": ["cat", "dog"]},
        **dict.fromkeys(PROCESSORS, RESNET),
    }
    for name, config in configs.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
    for name in ("code", "typeless", "language"):
        torch.save({}, Path(name, "pytorch_model.bin"))
    network = AutoModelForImageClassification.from_config(AutoConfig.for_model(**RESNET))
    for name in ("nameless", *PROCESSORS):
        torch.save(network.state_dict(), Path(name, "pytorch_model.bin"))
    for name, processor in PROCESSORS.items():
        Path(name, "preprocessor_config.json").write_text(json.dumps(processor))
    Path("code", "evil.py").write_text("raise SystemExit('ran')")
    for name in ("empty", "cut", "list"):
        Path(name).mkdir()
    Path("cut", "config.json").write_text("{")
    Path("list", "config.json").write_text("[1]")


SMALL = {"network": "small-cnn", "weights": "small.pt"}
TEACHERS = {
    "an unknown front": of_teacher(
        {**SMALL, "debias": "greyscale"}, "unknown (--)?debias 'greyscale'",
        "--teacher small-cnn --weights small.pt --debias greyscale",
    ),
    "a front of trained teachers": of_teacher(
        {**SMALL, "debias": "segmenter"}, "is a front of trained teachers",
        "--teacher small-cnn --weights small.pt --debias segmenter",
    ),
    "random weights": of_teacher(
        {"network": "torchvision:resnet18"}, "has random weights, and a teacher must know its classes: give .*weights",
        "--teacher torchvision:resnet18",
    ),
    "a name that timm lacks": of_teacher(
        {"network": "timm:resnet1b"}, "has no network 'resnet1b'.*Did you mean resnet1", "--teacher timm:resnet1b",
    ),
    "a name that torchvision lacks": of_teacher(
        {"network": "resnet1b", "weights": "w.pth"}, "unknown architecture 'resnet1b'.*Did you mean resnet1",
        "--teacher resnet1b --weights w.pth",
    ),
    "a library that nobody knows": of_teacher(
        {"network": "keras:resnet50", "factory": "keras:resnet50"}, "the factory 'keras:resnet50' cannot be imported",
        "--teacher keras:resnet50",
    ),
    "no folder": of_teacher(
        {"network": "hf:nowhere"}, "hf:nowhere is no folder of a Hugging Face model", "--teacher hf:nowhere",
    ),
    "a folder without config": of_teacher(
        {"network": "hf:empty"}, "no folder of a Hugging Face model: empty/config.json cannot be read",
        "--teacher hf:empty",
    ),
    "a config that is cut": of_teacher({"network": "hf:cut"}, "config.json is not JSON", "--teacher hf:cut"),
    "a config that is a list": of_teacher({"network": "hf:list"}, "has no model_type", "--teacher hf:list"),
    "a config without a type": of_teacher({"network": "hf:typeless"}, "has no model_type", "--teacher hf:typeless"),
    "a language model": of_teacher(
        {"network": "hf:language"},
        "^(Error: )?the model type 'gpt2' has no image classifier.*without code of its own$",
        "--teacher hf:language",
    ),
    "a model with code of its own": of_teacher(
        {"network": "hf:code"},
        "^(Error: )?the model type 'mine' has no image classifier.*without code of its own$",
        "--teacher hf:code",
    ),
    "classes without numbers": of_teacher(
        {"network": "hf:nameless"}, "has classes that are not readable: id2label", "--teacher hf:nameless"
    ),
    **{
        f"a preprocessing that is wrong: {name}": of_teacher(
            {"network": f"hf:{name}"}, f"hf:{name} has a preprocessing that is not readable: {name}/prep",
            f"--teacher hf:{name}",
        )
        for name in ("sizeless", "sized", "cropped", "listed")
    },
    "a mean of words": of_teacher({"network": "hf:words"}, "must be finite numbers", "--teacher hf:words"),
    "a mean of 0 to 255": of_teacher(
        {"network": "hf:unscaled"}, "divide the values of images", "--teacher hf:unscaled"
    ),
    "a folder without weights": of_teacher(
        {"network": "hf:weightless"}, "has no weights.pt, model.safetensors or pytorch_model.bin: give the file",
        "--teacher hf:weightless",
    ),
    "a name without a function": of_teacher(
        {"network": "mine:", "factory": "mine:"}, "must be package.module:function, got 'mine:'", "--teacher mine:",
    ),
    "a mean without a deviation for each channel": of_teacher(
        {**SMALL, "preprocessing": PreprocessSpec((0.5, 0.5, 0.5), (0.2, 0.2))}, "mean has 3 numbers and .*std 2: give",
        "--teacher small-cnn --weights small.pt --mean 0.5,0.5,0.5 --std 0.2,0.2",
    ),
    "a mean of other channels": of_teacher(
        {**SMALL, "preprocessing": PreprocessSpec((0.5, 0.5), (0.2, 0.2))},
        "normalised with 2 channels, and the dataset's have 3: give .*mean and .*std, one number for each channel",
        "--teacher small-cnn --weights small.pt --mean 0.5,0.5 --std 0.2,0.2",
    ),
    "weights of another architecture": of_teacher(
        {"network": "small-cnn", "weights": "w.pth"}, "of another network than Sequential",
        "--teacher small-cnn --weights w.pth",
    ),
}  # fmt: skip
TEACHERS |= {
    "no such teacher": Wrong(
        lambda world: load_teacher("nowhere", CLASSES, SHAPE),
        "no model at nowhere",
        lambda world: f"{OWN.format(world.dataset)} --teacher nowhere",
    ),
    "a teacher that is a number": Wrong(
        lambda world: load_teacher(3, CLASSES, SHAPE), "a teacher is a folder, .*got int"
    ),
    "a class in place of a network": Wrong(
        lambda world: load_teacher(nn.Linear, CLASSES, SHAPE), "a teacher is a folder, .*got type"
    ),
}


# --- modules in Python ----------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A network that returns what a function makes of its maps (N, 8, 26, 26) and its logits (N, K)."""

    def __init__(self, output: Callable[[Tensor, Tensor], object], classes: int = 10, channels: int = 3):
        super().__init__()
        self.conv, self.last, self.output = nn.Conv2d(channels, 8, 3), nn.Linear(8, classes), output

    def forward(self, images: Tensor) -> Any:
        maps = self.conv(images).relu()
        return self.output(maps, self.last(maps.mean((2, 3))))


def of_module(network: Callable[[], nn.Module], words: str) -> Wrong:
    return Wrong(lambda world: cache_explanations(world.dataset, network(), NEW, draws=1), words)


MODULES = {
    "features in place of logits": of_module(
        lambda: Returns(lambda maps, logits: maps), r"returns \(2, 8, 26, 26\) for 2 images: it must return logits"
    ),
    "pooled features in place of logits": of_module(
        lambda: Returns(lambda maps, logits: maps.mean((2, 3))), "the teacher knows 8 classes, and the dataset has 10"
    ),
    "a number": of_module(lambda: Returns(lambda maps, logits: logits.mean()), r"returns \(\) for 2 images: it must"),
    "other classes": of_module(
        lambda: Returns(lambda maps, logits: logits, classes=4),
        "knows 4 classes, .* give class_map, a file with a line",
    ),
    "two logits": of_module(lambda: Returns(lambda maps, logits: (logits, 2 * logits)), "a tuple.*one tensor"),
    "nothing": of_module(lambda: Returns(lambda maps, logits: None), "NoneType"),
    "a network of grey images": of_module(
        lambda: Returns(lambda maps, logits: logits, channels=1), r"does not take images of shape \(3, 28, 28\)"
    ),
    "a network that raises": of_module(lambda: Returns(lambda maps, logits: 1 / 0), "ZeroDivisionError: division by"),
    "logits that are not finite": of_module(lambda: Returns(lambda maps, logits: logits * torch.nan), "not finite"),
    "a lazy network": of_module(
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "'1.weight' is of a lazy layer that was never called"
    ),
    "a network without values": of_module(
        lambda: Returns(lambda maps, logits: logits).to("meta"),
        "has no values yet: 'conv.weight' is on the device meta",
    ),
}


# --- functions that build a network ---------------------------------------------------------------------------------

MINE = """
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def build(num_classes):
    return Tiny(num_classes)


def features(num_classes):
    return nn.Conv2d(3, num_classes, 3)


def without_classes():
    return Tiny(10)


def of_class(num_classes):
    return Tiny


def nothing(num_classes):
    return "a network"


def wrong(num_classes):
    return Tiny(num_classes + 1)


def pair(num_classes):
    class Pair(Tiny):
        def forward(self, x):
            logits = super().forward(x)
            return logits, 2 * logits

    return Pair(num_classes)


def raises(num_classes):
    return {}["key"]


def late(num_classes):
    class Late(Tiny):
        def forward(self, x):
            raise ZeroDivisionError("in the forward pass")

    return Late(num_classes)


def small_images_only(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


not_callable = 5
instance = Tiny(10)
"""


def of_function(name: str, words: str) -> Wrong:
    """Name a function of the module ``mine``, or of another one."""

    def write() -> None:
        Path("mine.py").write_text(MINE)
        Path("broken.py").write_text("def build(:\n")
        Path("leaving.py").write_text("raise SystemExit(3)\n")

    def call(world: World) -> object:
        write()
        return build_network(name, 10, SHAPE, free_of_biases=False, factory=name)

    def line(world: World) -> str:
        write()
        return f"train-teacher --data {world.dataset} --steps 1 --out new --teacher-factory {name}"

    return Wrong(call, f"{re.escape(name)}.*{words}" if "got" not in words else words, line)


FUNCTIONS = {
    "nowhere_module:build": "cannot be imported: ModuleNotFoundError.*python -m nowhere_module",
    "broken:build": "cannot be imported: SyntaxError",
    "leaving:build": r"cannot be imported: SystemExit: 3 \(leaving.py, line 1\)",
    "mine:biuld": r"has no function 'biuld'\. Did you mean build",
    "mine:not_callable": "has no function 'not_callable'",
    "mine:nothing": "returned str: it must return an nn.Module",
    "mine:of_class": r"returned the class Tiny: it must call it, Tiny\(num_classes\)",
    "mine:wrong": r"returns \(2, 11\) for 2 images and 10 classes: it must return logits of shape \(2, 10\)",
    "mine:features": r"returns \(2, 10, 26, 26\) for 2 images and 10 classes.*pool and flatten",
    "mine:pair": "returns a tuple for 2 images",
    "mine:raises": r"KeyError: 'key' \(mine.py, line \d+\)",
    "mine:late": r"ZeroDivisionError: in the forward pass \(mine.py, line \d+\)",
    "mine:small_images_only": r"does not take images of shape \(3, 28, 28\).*must take float32 images",
    "mine:without_classes": "must take num_classes=10, with which it is called",
    "mine:": "must be package.module:function, got 'mine:'",
    ":build": "must be package.module:function, got ':build'",
    "mine:build:again": "must be package.module:function, got 'mine:build:again'",
    "builtins:dict": "is not a Python function",
    "mine:instance": "is a network and no function: give a function that builds a new one",
    "mine.py:build": r"got 'mine.py:build'\. Did you mean mine:build\?",
    "./mine:build": r"Did you mean mine:build\?",
    "nets/mine.py:build": r"Did you mean nets.mine:build\?",
    "mine:build()": r"Did you mean mine:build\?",
}


# --- classes --------------------------------------------------------------------------------------------------------


def of_map(classes: Any, words: str) -> Wrong:
    """Map the classes a, b and c of a teacher to cat and dog."""
    return Wrong(lambda world: resolve_class_map(classes, ("cat", "dog"), 3, ("a", "b", "c")), words)


def of_map_file(text: str | None, words: str) -> Wrong:
    """Give a file with a map of a teacher's 10 classes without names to those of COLOURED MNIST."""

    def write(world: World) -> str:
        if text is not None:
            Path("map.yaml").write_text(text)
        return small(world)

    def call(world: World) -> object:
        from pipeline import parse_teacher
        from pipeline.networks.teacher_options import OwnTeacherOptions

        teacher = parse_teacher("small-cnn", own=OwnTeacherOptions(weights=write(world), class_map="map.yaml"))
        return load_teacher(teacher, open_dataset(world.dataset).class_names, SHAPE)

    def line(world: World) -> str:
        return f"{OWN.format(world.dataset)} --teacher small-cnn --weights {write(world)} --class-map map.yaml"

    return Wrong(call, words, line)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(**changes: Any) -> str:
    """Return a map of the digits with changes, as YAML; None leaves a line out."""
    lines = {**dict(zip(DIGITS, range(10), strict=True)), **changes}
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)


CLASS_MAPS = {
    "no map": of_map(
        None, r"the teacher knows 3 classes \(a, b, c\), and the dataset has 2 \(cat, dog\): give class_map"
    ),
    "an unknown class of the dataset": of_map(
        {"cat": ["a"], "cow": ["b"]}, "maps 'cow', which is no class of the dataset"
    ),
    "not every class": of_map({"cat": ["a"]}, "has no line for the dataset's class 'dog'"),
    "an unknown class of the teacher": of_map(
        {"cat": ["a"], "dog": ["d"]}, "maps 'dog' to 'd', which the teacher does not know"
    ),
    "an index outside": of_map(
        {"cat": ["a"], "dog": [3]}, "maps 'dog' to the class 3: the teacher's classes are 0 to 2"
    ),
    "a class for two": of_map({"cat": ["a"], "dog": [0]}, "maps 'cat' and 'dog' to the teacher's class 0"),
    "a class twice": of_map({"cat": ["a", 0], "dog": ["b"]}, "maps 'cat' twice to the teacher's class 0"),
    "no classes": of_map({"cat": ["a"], "dog": []}, "maps 'dog' to nothing"),
    "a file that is not there": of_map_file(None, r"map.yaml.* cannot be read \(.*No such file.*write a line such as"),
    "an empty file": of_map_file("", "maps no classes: write a line such as"),
    "a list": of_map_file("- zero\n- one\n", "maps no classes: write a line such as"),
    "no YAML": of_map_file("zero: [1\n", "cannot be read"),
    "no text": of_map_file("zero: \0\n", "cannot be read"),
    "a misspelt class": of_map_file(digits(zero=None, zer0=0), r"maps 'zer0'.*Did you mean zero"),
    "a line too few": of_map_file(digits(nine=None), "has no line for the dataset's class 'nine'"),
    "a name of no class": of_map_file(digits(nine="beagle"), "and this teacher's classes have no names: give an index"),
    "an index too large": of_map_file(digits(nine=10), "maps 'nine' to the class 10: the teacher's classes are 0 to 9"),
    "an index below 0": of_map_file(digits(nine=-1), "maps 'nine' to the class -1: the teacher's classes are 0 to 9"),
    "half an index": of_map_file(digits(nine=8.5), "maps 'nine' to '8.5'"),
    "an index of two": of_map_file(digits(nine=8), "maps 'eight' and 'nine' to the teacher's class 8"),
    "lists in lists": of_map_file(digits(nine="[[9]]"), r"maps 'nine' to '\[9\]'"),
    "an empty line": of_map_file(digits(nine=" "), "maps 'nine' to 'None'|maps 'nine' to nothing"),
    "a dictionary": of_map_file(digits(nine="{a: 9}"), "maps 'nine' to"),
}


# --- preprocessing --------------------------------------------------------------------------------------------------


def of_preprocessing(options: dict[str, Any], words: str) -> Wrong:
    flags = " ".join(f"--{name}={','.join(map(str, values))}" for name, values in options.items())
    return Wrong(
        lambda world: train_teacher(world.dataset, NEW, **options, steps=1),
        words,
        lambda world: f"train-teacher --data {world.dataset} --steps 1 --out new {flags}",
    )


PREPROCESSING = {
    "words": of_preprocessing({"mean": ("a",)}, "mean[= ]'?a'? must be finite numbers"),
    "no numbers at all": of_preprocessing({"mean": ()}, "mean.* must be finite numbers"),
    "no finite number": of_preprocessing({"mean": ("nan",)}, "mean[= ]'?nan'? must be finite numbers"),
    "an infinite deviation": of_preprocessing({"std": ("inf",)}, "std[= ]'?inf'? must be finite numbers"),
    "a deviation of 0": of_preprocessing({"std": (0.0,)}, "std must be positive, got 0"),
    "a deviation below 0": of_preprocessing({"std": (0.2, -0.2, 0.2)}, "std must be positive, got -0.2"),
    "values of images in [0, 255]": of_preprocessing(
        {"mean": (123.7, 116.3, 103.5)}, r"got 123.7: divide the values of images in \[0, 255\] by 255"
    ),
    "other channels": of_preprocessing({"mean": (0.5,) * 4}, "normalised with 4 channels, and the dataset's have 3"),
    "a mean and a deviation of other channels": of_preprocessing(
        {"mean": (0.5,) * 3, "std": (0.2,) * 2}, "mean has 3 numbers and .*std 2: give one for each channel in both"
    ),
}


# --- images ---------------------------------------------------------------------------------------------------------


def of_images(channels: int, words: str) -> Wrong:
    """Give images of other channels than a network of ImageNet takes."""

    def write(world: World) -> Path:
        from data import DatasetWriter

        rng = np.random.default_rng(0)
        with DatasetWriter(world.folder / "images") as writer:
            images, labels = rng.integers(0, 256, (8, channels, 32, 32), np.uint8), np.arange(8) % 2
            writer.write_split("train", images=images, labels=labels)
            writer.finish(name="images", class_names=CLASSES)
        return world.folder / "images"

    def call(world: World) -> object:
        weights = written(world.folder, NETWORKS["resnet18"](2).state_dict())
        teacher = OwnTeacher("resnet18", str(weights), preprocessing=PreprocessSpec((0.5,), (0.2,)))
        return cache_explanations(write(world), teacher, NEW, draws=1)

    def line(world: World) -> str:
        weights = written(world.folder, NETWORKS["resnet18"](2).state_dict())
        return f"{OWN.format(write(world))} --teacher resnet18 --weights {weights} --mean 0.5 --std 0.2"

    return Wrong(call, words, line)


IMAGES = {
    "two channels": of_images(2, r"of shape \(2, \d+, \d+\).*give images of 3 channels, which it takes, or of 1$"),
    "four channels": of_images(4, r"of shape \(4, \d+, \d+\).*give images of 3 channels, which it takes, or of 1$"),
}


# --- datasets -------------------------------------------------------------------------------------------------------


def image_of(values: Any, label: Any = 1) -> list[Any]:
    return with_item((values, label))


class Shuffled(Dataset):
    """A dataset whose fourth item is another one at each read, in one of three ways."""

    def __init__(self, way: str):
        self.way, self.rng = way, np.random.default_rng(0)

    def __len__(self):
        return len(GOOD)

    def __getitem__(self, number):
        image, label = GOOD[number]
        if number != 3:
            return image, label
        if self.way == "label":
            return image, int(self.rng.integers(1000))
        if self.way == "crop":
            return image.crop((0, 0, int(self.rng.integers(4, 16)), 16)), label
        return Image.fromarray(self.rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)), label


class Failing(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        return {}["no such key"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(GOOD)


def augmented() -> Dataset:
    return torchvision.datasets.FakeData(40, (3, 20, 24), 3, v2.RandomHorizontalFlip())


def normalised() -> Dataset:
    transform = v2.Compose([TO_FLOAT, v2.Normalize([0.5] * 3, [0.2] * 3)])
    return torchvision.datasets.FakeData(40, (3, 20, 24), 3, transform)


def two_lists_of_classes() -> Dataset:
    first, second = (TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)) for _ in range(2))
    first.classes, second.classes = ["a", "b"], ["b", "a"]
    return ConcatDataset([first, second])


SATELLITE = [(np.zeros((8, 8, 12), np.uint8), 0)] * 4
ITEMS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "changes shape": (image_of(Image.new("RGB", (9, 16))), {}, r"train\[7\] has another size.*9×16.*16×16.*size"),
    "augments": (augmented(), {}, r"two reads of train\[\d+\] differ.*leave out its augmentation \(transform\)"),
    "other labels": (Shuffled("label"), {}, r"two reads of train\[3\] differ"),
    "other crops": (Shuffled("crop"), {"size": 8}, r"two reads of train\[3\] differ"),
    "other pixels": (Shuffled("pixels"), {}, r"two reads of train\[3\] differ"),
    "normalised": (normalised(), {}, r"train\[0\] cannot be used: .*so it is normalised: leave out the normalisation"),
    "0 to 255": (image_of(torch.full((3, 16, 16), 254.0)), {}, r"train\[7\].*254 to 254: convert them to uint8"),
    "not finite": (image_of(torch.full((3, 16, 16), torch.nan)), {}, r"train\[7\].*not finite"),
    "large integers": (image_of(np.full((16, 16, 3), 300)), {}, r"train\[7\].*from 300 to 300: scale them to 0 to 255"),
    "negative integers": (image_of(np.full((16, 16, 3), -1)), {}, r"train\[7\].*from -1 to -1"),
    "complex": (image_of(np.zeros((16, 16, 3), complex)), {}, r"train\[7\].*complex128: convert it to uint8"),
    "one axis": (image_of(np.zeros(768, np.uint8)), {}, r"train\[7\].*shape \(768,\): give \(H, W\)"),
    "four axes": (image_of(torch.zeros(1, 3, 16, 16)), {}, r"train\[7\].*shape \(1, 3, 16, 16\)"),
    "many channels": (SATELLITE, {}, r"train\[0\].*1 to 4 channels.*DatasetWriter"),
    "no image": (image_of("cat.jpg"), {}, r"train\[7\].*of type str: give a PIL image, an array or a tensor"),
    "image None": (image_of(None), {}, r"train\[7\].*its image is of type NoneType"),
    "one thing": ([image for image, _ in GOOD], {}, r"train\[0\].*it is of type Image: return \(image, label\)"),
    "a tuple of one": ([(image,) for image, _ in GOOD], {}, r"train\[0\].*tuple of 1: return \(image, label\)"),
    "no such position": (GOOD, {"mask": 2}, r"train\[0\].*tuple of 2, and mask is 2"),
    "a name of a position": (GOOD, {"group": "place"}, r"train\[0\].*tuple of 2, and group is 'place'"),
    "no image key": ([{"foto": 1, "label": 0}], {}, r"train\[0\].*it has no image, but foto, label: its key is image"),
    "no label key": ([{"image": GOOD[0][0]}], {}, r"train\[0\].*it has no label, but image: its key is label"),
    "misspelt key": ([{"image": 1, "lable": 0}], {"label": "label"}, r"'label' is not one of them\. Did you mean lab"),
    "label too large": (image_of(GOOD[0][0], 2), {"class_names": CLASSES}, r"train\[7\]: its label is 2, .* 0 to 1"),
    "label below 0": (image_of(GOOD[0][0], -1), {}, r"train\[7\]: its label is -1, .*leave items without a label out"),
    "label far off": (image_of(GOOD[0][0], 10**6), {}, r"labels of train run to 1000000, and it has 12 items"),
    "label half": (image_of(GOOD[0][0], 0.5), {}, r"train\[7\].*its label is 0.5, and must be a whole number"),
    "label none": (image_of(GOOD[0][0], None), {}, r"train\[7\].*its label is None"),
    "label empty": (image_of(GOOD[0][0], " "), {}, r"train\[7\].*its label is an empty text"),
    "label one-hot": (image_of(GOOD[0][0], torch.eye(3)[1]), {}, r"train\[7\].*shape \(3,\).*argmax"),
    "label dictionary": (image_of(GOOD[0][0], {"boxes": 1}), {}, r"train\[7\].*its label is \{'boxes': 1\}"),
    "names and numbers": (image_of(GOOD[0][0], "cat"), {}, r"train\[7\] is a name, 'cat', .* a number, 1"),
    "raises": (Failing(), {}, r"train\[0\].*reading it raised KeyError: 'no such key'"),
    "streams": (Stream(), {}, r"train is of type Stream, which does not give an item for a number.*list\(dataset\)"),
    "generator": ((item for item in GOOD), {}, r"train is of type generator"),
    "loader": (DataLoader(GOOD), {}, r"train is a DataLoader: give its dataset, loader.dataset"),
    "a dictionary of arrays": ({"image": 1}, {}, r"train is of type dict"),
    "empty": ([], {}, r"train has no items: leave the split out"),
    "one class": ([(image, 0) for image, _ in GOOD], {}, r"items of 1 class: at least two"),
    "mask of another size": (
        [{"image": image, "label": label, "mask": np.ones((9, 16), bool)} for image, label in GOOD], {},
        r"12 items cannot be used.*\n?.*it is 16×16, its mask 16×9",
    ),
    "a mask is missing": (
        [{"image": one, "label": label} | ({} if row == 7 else {"mask": one}) for row, (one, label) in enumerate(GOOD)],
        {}, r"train\[7\]: it has no mask, and others of train have one",
    ),
    "a group is missing": (
        [{"image": image, "label": label, "group": None if row == 7 else 1} for row, (image, label) in enumerate(GOOD)],
        {}, r"train\[7\]: it has no group, and others of train have one",
    ),
    "group too large": (
        [(*item, 2) for item in GOOD], {"group": 2, "group_names": CLASSES}, r"its group is 2, and there are 2 names"
    ),
    "test called train": (GOOD, {"tests": {"train": GOOD}}, r"a test cannot be called train"),
    "tests are a list": (GOOD, {"tests": [GOOD]}, r"tests is of type list: give a dictionary"),
    "tests of other classes": (
        [(image, CLASSES[label]) for image, label in GOOD], {"tests": {"ood": [(GOOD[0][0], "fox")]}},
        r"ood\[0\]: its class 'fox' is not a class of training: cat, dog",
    ),
    "a size of zero": (GOOD, {"size": 0}, r"size must be a number of pixels"),
    "two lists of classes": (two_lists_of_classes(), {}, r"datasets whose classes differ"),
    "names for other classes": (
        torchvision.datasets.FakeData(8, (3, 8, 8), 2), {"class_names": ("a",)}, r"its label is 1, .* 0 to 0",
    ),
}  # fmt: skip
ARRAYS = np.stack([pixels(number) for number in range(12)])
WRONG_ARRAYS: dict[str, tuple[Any, str]] = {
    "normalised": ((ARRAYS / 100 - 1, [0, 1] * 6), r"train\[0\].*so it is normalised"),
    "lengths": ((ARRAYS, [0, 1]), r"train has 12 images, 2 labels: give one of each for each image"),
    "no labels": ({"images": ARRAYS}, r"train is of type dict with images: give \(images, labels\)"),
    "images alone": (ARRAYS, r"train is of type ndarray: give \(images, labels\)"),
    "misspelt": ({"images": ARRAYS, "labels": [0, 1] * 6, "mask": ARRAYS}, r"dict with images, labels, mask"),
    "two axes": ((ARRAYS.reshape(12, -1), [0, 1] * 6), r"images has the shape \(12, 768\): give \(N, H, W\)"),
    "channels": ((np.zeros((12, 16, 16, 7), np.uint8), [0, 1] * 6), r"train\[0\].*1 to 4 channels"),
    "one-hot": ((ARRAYS, np.eye(2)[[0, 1] * 6]), r"train\[0\].*its label has the shape \(2,\).*argmax"),
    "several sizes": (([*ARRAYS[:11], np.zeros((9, 16, 3), np.uint8)], [0, 1] * 6), r"train\[11\] has another size"),
    "masks of another size": (
        {"images": ARRAYS, "labels": [0, 1] * 6, "masks": np.ones((12, 8, 8), bool)}, r"its mask 8×8",
    ),
}  # fmt: skip


def of_items(items: Any, options: dict[str, Any], words: str) -> Wrong:
    return Wrong(lambda world: from_torch(NEW, items, **options, workers=0), words)


def of_arrays(split: Any, words: str) -> Wrong:
    return Wrong(lambda world: from_arrays(out=NEW, train=split), words)


# --- loops of one's own ---------------------------------------------------------------------------------------------


def changed(batch: dict[str, Tensor], **fields: Tensor | None) -> dict[str, Tensor]:
    return {name: values for name, values in {**batch, **fields}.items() if values is not None}


BATCHES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a loop that forgets the ε": (lambda b: changed(b, epsilon=None), "the batch has no 'epsilon'"),
    "an ε of the loop's own": (lambda b: changed(b, epsilon=b["epsilon"] * 0 + 50), "has an ε of 50, and the store's"),
    "an ε that a collate function popped": (
        lambda b: default_collate([{name: b[name][row] for name in b if name != "epsilon"} for row in range(16)]),
        "the batch has no 'epsilon'",
    ),
    "an ε of None": (lambda b: {**b, "epsilon": None}, "'epsilon' of the batch is a NoneType"),
    "one ε as a number": (lambda b: {**b, "epsilon": 0.05}, "'epsilon' of the batch is a float and not a tensor"),
    "one ε as a tensor": (
        lambda b: changed(b, epsilon=torch.tensor(0.05)),
        r"'epsilon' of the batch is .* \(\) and not",
    ),
    "one ε of a batch": (
        lambda b: changed(b, epsilon=b["epsilon"][:1]),
        r"float32 \(1,\) and not torch.float32 \(16,\)",
    ),
    "the ε of a smaller batch": (lambda b: changed(b, epsilon=b["epsilon"][:8]), r"\(8,\) and not torch.float32 \(16,"),
    "the ε of a larger batch": (lambda b: changed(b, epsilon=b["epsilon"].repeat(2)), r"\(32,\) and not .* \(16,\)"),
    "an ε as a column": (lambda b: changed(b, epsilon=b["epsilon"][:, None]), r"\(16, 1\) and not .* \(16,\)"),
    "an ε in half precision": (
        lambda b: changed(b, epsilon=b["epsilon"].half()),
        "torch.float16.* and not torch.float32",
    ),
    "an ε as an integer": (lambda b: changed(b, epsilon=b["epsilon"].long()), "torch.int64 .* and not torch.float32"),
    "an ε as an array": (lambda b: {**b, "epsilon": b["epsilon"].numpy()}, "is a ndarray and not a tensor"),
    "an ε that is no number": (lambda b: changed(b, epsilon=b["epsilon"] / 0 * 0), "has an ε of nan"),
    "an ε of 0": (lambda b: changed(b, epsilon=b["epsilon"] * 0), "has an ε of 0, and the store's"),
    "fewer images": (lambda b: changed(b, images=b["images"][:8]), "of 8 samples, as 'images' is"),
    "one class for all": (
        lambda b: changed(b, target_class=b["target_class"][:1]),
        r"'target_class' .* \(1,\) and not",
    ),
    "one scale for all": (lambda b: changed(b, scale=b["scale"][:1]), r"'scale' .* \(1,\) and not"),
    "no heatmaps": (lambda b: {"images": b["images"], "labels": b["labels"]}, "no 'heatmaps' and no 'scale'"),
    "a tuple": (lambda b: (b["images"], b["labels"]), "is a tuple and not a dictionary"),
    "normalised images": (lambda b: changed(b, images=b["images"] / 255), "torch.float32 and not torch.uint8"),
    "cropped images": (lambda b: changed(b, images=b["images"][..., 2:-2]), r"images of the batch are \(3, 28, 24\)"),
    "pooled heatmaps": (
        lambda b: changed(b, heatmaps=b["heatmaps"][..., ::2]),
        r"heatmaps of the batch are \(3, 28, 14\)",
    ),
}
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "no store": ({"method": "lrp"}, "needs cache: make a store"),
    "a store of other maps": ({"cache": True, "method": "grad-cam"}, "needs maps of grad-cam"),
    "no features": ({"cache": True, "method": "features"}, "features=True"),
    "group-dro": ({"method": "group-dro"}, "another method"),
    "an unknown method": ({"cache": True, "method": "lpr"}, "lrp"),
    "an unknown map loss": ({"cache": True, "map_loss": "l3"}, "l3"),
    "a method that takes no augmentation": (
        {"cache": True, "method": "output", "augment": ["flip"]},
        "not valid",
    ),
    "backgrounds that the teacher sees": (
        {"cache": True, "augment": ["background"]},
        "does not see the background",
    ),
    "masks of no maps": ({"cache": True, "method": "output", "mask_target": True}, "leave it out"),
}


def of_batch(change: Callable[[dict[str, Tensor]], Any], words: str) -> Wrong:
    def call(world: World) -> object:
        return DistillationLoss(world.store)(build_student(world.store), change(world.batch))

    return Wrong(call, f"{words}.*as they are")


def of_loss(options: dict[str, Any], words: str) -> Wrong:
    return Wrong(
        lambda world: DistillationLoss(**{**options, **({"cache": world.store} if "cache" in options else {})}), words
    )


# --- the table ------------------------------------------------------------------------------------------------------

TABLE: dict[str, dict[str, Wrong]] = {
    "file": {what: of_file(*row) for what, row in FILES.items()},
    "start": STARTS,
    "teacher": TEACHERS,
    "module": MODULES,
    "function": {name: of_function(name, words) for name, words in FUNCTIONS.items()},
    "class map": CLASS_MAPS,
    "preprocessing": PREPROCESSING,
    "images": IMAGES,
    "dataset": {what: of_items(*row) for what, row in ITEMS.items()},
    "arrays": {what: of_arrays(*row) for what, row in WRONG_ARRAYS.items()},
    "batch": {what: of_batch(*row) for what, row in BATCHES.items()},
    "loss": {what: of_loss(*row) for what, row in LOSSES.items()},
}
ROWS = {f"{kind}: {what}": row for kind, rows in TABLE.items() for what, row in rows.items()}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_input_is_one_error_of_ours_with_the_remedy_and_runs_and_leaves_nothing(what, world, capsys):
    row = ROWS[what]
    with pytest.raises(ERRORS) as raised:
        row.call(world)
    assert re.search(row.words, str(raised.value), re.DOTALL), str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert "code of the file" not in capsys.readouterr().out
    assert not Path(NEW).exists(), "nothing is half-written"


@pytest.mark.parametrize("what", [what for what, row in ROWS.items() if row.line is not None])
def test_a_wrong_input_in_the_shell_is_one_line_with_the_remedy_and_no_traceback(what, world):
    row = ROWS[what]
    assert row.line is not None
    result = CliRunner().invoke(main, row.line(world).split())
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    error = result.output[result.output.index("Error: ") :].strip()
    assert len(error.splitlines()) == 1, error
    assert re.search(row.words, error), error
    assert "weights_only" not in result.output
    assert "code of the file" not in result.output
    assert not Path(NEW).exists(), "nothing is half-written"


def test_a_file_changes_nothing_in_a_network_that_it_does_not_fit(tmp_path):
    network = NETWORKS["resnet18"](3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for what in ("another architecture", "two layers are missing", "another kernel", "integers"):
        (tmp_path / what).mkdir()
        with pytest.raises(ModelError):
            load_checkpoint(network, FILES[what][0](tmp_path / what), 3)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
