"""Small real things that many tests need: a slice of COLOURED MNIST, a teacher trained on it, its store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
