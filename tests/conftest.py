"""Small real things that many tests need: a slice of COLOURED MNIST, a teacher trained on it, its store."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import lxt
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import make_coloured_mnist
from pipeline import cache_explanations
from trainer import train_teacher

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start: they run beside each other
torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COLOURED MNIST with 300 samples a split."""
    path = tmp_path_factory.mktemp("data") / "data.zarr"
    make_coloured_mnist(path, seed=0, limit=300)
    return path


@pytest.fixture(scope="session")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "teacher"
    train_teacher(dataset, path, steps=8, batch_size=64)
    return path


@pytest.fixture(scope="session")
def cache(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's heatmaps of the train split, two draws a sample."""
    path = tmp_path_factory.mktemp("caches") / "train.zarr"
    cache_explanations(dataset, teacher, path, draws=2)
    return path


@pytest.fixture(scope="session")
def validation_cache(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "validation.zarr"
    cache_explanations(dataset, teacher, path, split="validation", draws=1)
    return path


def write_idx(path: Path, values: np.ndarray) -> None:
    """An IDX file of bytes, as yann.lecun.com described it."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files as Fashion-MNIST's, of 80 and 40 garments: bright blobs with a dark print."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, samples in (("train", 80), ("t10k", 40)):
        garments = np.zeros((samples, 28, 28), np.uint8)
        garments[:, 4:24, 8:20] = rng.integers(100, 256, (samples, 20, 12))
        garments[:, 12:14, 12:16] = 0
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", garments)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(samples) % 10)
    return folder


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """LXT works on the classes of PyTorch; undone after the test."""

    def patch(rules: str) -> None:
        for name in (
            "lxt.efficient",
            "lxt.efficient.models",
        ):  # which import language models of one transformers release
            package = types.ModuleType(name)
            package.__path__ = [str(Path(lxt.__path__[0]).parent.joinpath(*name.split(".")))]
            monkeypatch.setitem(sys.modules, name, package)
        from lxt.efficient.models.vit_torch import cp_LRP
        from lxt.efficient.rules import divide_gradient

        def attn_lrp_forward(self, query, key, value, need_weights=False):
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k, v = divide_gradient(q, 4), divide_gradient(k, 4), divide_gradient(v, 2)
            out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
            return self.out_proj(out.transpose(1, 2).flatten(2)), None

        for cls in cp_LRP:
            monkeypatch.setattr(cls, "forward", cls.forward)
            monkeypatch.setattr(cls, "original_forward", cls.forward, raising=False)
        for cls, apply in cp_LRP.items():
            if rules == "cp-lrp" or cls is not nn.MultiheadAttention:
                apply(cls)
            else:
                monkeypatch.setattr(cls, "forward", attn_lrp_forward)

    return patch


# --- vision-language models ---

CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
VIT = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7}
TOWERS = {"resnet": RESNET, "vit": VIT, "vit with average pooling": {**VIT, "pool_type": "avg"}}


def small_clip(vision: dict, **changes) -> nn.Module:
    """An open_clip model of random weights, but for those that open_clip begins with zeros."""
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, CLIP_TEXT, **changes).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "weight" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def save_clip(folder: Path, tower: str = "resnet") -> tuple[str, str]:
    """Its configuration and its weights, as open_clip reads them: their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": TOWERS[tower], "text_cfg": CLIP_TEXT}))
    torch.save(small_clip(TOWERS[tower]).state_dict(), folder / "weights.pt")
    return str(config), str(folder / "weights.pt")


@pytest.fixture
def without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage one without its first look, for tests that count what else it runs or says."""
    monkeypatch.setattr("pipeline.caching.stage_one._tell_first_look", lambda job, client: None)
