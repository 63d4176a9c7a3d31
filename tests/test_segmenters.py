"""What a teacher behind a segmenter promises: it sees objects alone, and only it needs the segmenter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from cli import main
from data import DatasetWriter
from pipeline import ModelError, cache_explanations, explain, load_classifier
from pipeline.networks.segmenters import Segmenter, build_segmenter
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_student, train_teacher
from trainer.distill import _can_repaint

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # people have such files
SHAPE = (3, 16, 16)
SOURCE = """
from torch import nn

class Bright(nn.Module):  # objects are brighter than the background
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.mix.weight, 1 / 3)
        nn.init.constant_(self.mix.bias, -0.5)

    def forward(self, images):
        return self.mix(images)

def bright():
    return Bright()

def no_module():
    return 3

def broken():
    raise RuntimeError("no such file: weights.bin")

def colours():
    return nn.Identity()

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
"""


@pytest.fixture
def of_own(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a module of the user's own."""
    (tmp_path / "ownseg.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(of_own) -> dict[str, Path]:
    """The same network as files."""
    network = build_segmenter("ownseg:bright", SHAPE).network
    samples = torch.rand(2, *SHAPE)
    exported = torch.export.export(network, (samples,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, of_own / "seg.pt2")
    torch.jit.trace(network, samples).save(str(of_own / "seg.pt"))
    return {suffix: of_own / f"seg{suffix}" for suffix in (".pt2", ".pt")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Bright squares, upright or lying, on a dark background whose side tells the class."""
    path = tmp_path_factory.mktemp("data") / "data.zarr"
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for name in ("train", "iid"):
            labels = np.arange(128) % 2
            images = rng.integers(0, 60, (128, *SHAPE), dtype=np.uint8)
            for image, label in zip(images, labels, strict=True):
                image[:, :, slice(0, 3) if label else slice(13, 16)] += 40
                image[:, 5:11, 7:9] = 250
                if label:
                    image[:, 7:9, 5:11] = 250
            writer.write_split(name, images=images, labels=labels)
        writer.finish(name="squares", class_names=["bar", "cross"])
    return path


def test_an_object_is_where_one_logit_is_positive_or_where_the_largest_is_not_the_backgrounds():
    class Given(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, images):
            return {"out": self.logits}

    one = torch.tensor([[-1.0, 2.0], [0.5, -3.0]])[None, None]
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    images = torch.zeros(1, 3, 2, 2)
    assert torch.equal(Segmenter(Given(one))(images), expected)
    three = torch.cat([torch.zeros_like(one), one - 5, one], 1)
    assert torch.equal(Segmenter(Given(three))(images), expected)


def test_files_and_functions_give_the_same_masks(of_own, files):
    images = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = (images.mean(1, keepdim=True) > 0.5).float()
    for spec in ("ownseg:bright", *map(str, files.values())):
        assert torch.equal(build_segmenter(spec, SHAPE)(images), expected)


@pytest.mark.parametrize("spec", ["ownseg:bright", "seg.pt2", "seg.pt"])
def test_a_teacher_behind_it_sees_the_object_alone_and_a_student_needs_neither(data, of_own, files, spec):
    train_teacher(data, "t", debias="segmenter", segmenter=spec, steps=40, batch_size=32)
    model, config = load_classifier("t", segmenter=spec)
    assert config.segmenter == spec
    images = torch.rand(4, *SHAPE)
    _, maps = explain(model, images, torch.tensor([0, 1, 0, 1]), 0.1)
    outside = (images.mean(1, keepdim=True) <= 0.5).expand_as(maps)
    assert not maps[outside].any()
    assert maps.any()
    assert evaluate(data, "t", segmenter=spec)["iid"] == 100
    fresh = build_segmenter(spec, SHAPE).state_dict()
    for name, value in fresh.items():
        assert torch.equal(model.segmenter.state_dict()[name], value), "it is not trained"
    cache_explanations(data, "t", "c", draws=2, segmenter=spec)
    assert open_cache("c").info.teacher.debias == "segmenter"
    train_student(data, "c", "s", steps=3, batch_size=32)
    assert load_classifier("s")[1].segmenter is None
    assert 0 <= evaluate(data, "s")["iid"] <= 100


def test_images_without_an_object_have_maps_of_zeros_and_are_no_error(data, of_own):
    train_teacher(data, "t", debias="segmenter", segmenter="ownseg:bright", steps=2, batch_size=32)
    with DatasetWriter("dark.zarr") as writer:
        images = np.full((20, *SHAPE), 40, np.uint8)
        images[18:, :, 4:8] = 250
        writer.write_split("train", images=images, labels=np.arange(20) % 2)
        writer.finish(name="dark", class_names=["bar", "cross"])
    cache_explanations("dark.zarr", "t", "c", draws=1, segmenter="ownseg:bright")
    maps = open_cache("c").read_shard(0).heatmaps
    assert not maps[:18].any()
    assert maps[18:].any()


def test_code_of_somebodys_own_runs_only_where_the_user_names_it(data, of_own):
    train_teacher(data, "t", debias="segmenter", segmenter="ownseg:bright", steps=2, batch_size=32)
    for given, words in (
        (None, "give segmenter='ownseg:bright'$"),
        ("ownseg:colours", "give segmenter='ownseg:bright', not ownseg:colours"),
    ):
        with pytest.raises(ModelError, match=words):
            load_classifier("t", segmenter=given)
    command = ["cache-explanations", "--data", str(data), "--teacher", "t", "--out", "c"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "give --segmenter ownseg:bright" in result.output
    assert not Path("c").exists()
    result = CliRunner().invoke(main, [*command, "--segmenter", "ownseg:bright"])
    assert result.exit_code == 0, result.output
    train_teacher(data, "plain", debias="none", steps=2, batch_size=32)
    with pytest.raises(ModelError, match="it has no segmenter: leave the option out"):
        load_classifier("plain", segmenter="ownseg:bright")


def test_one_of_torchvisions_is_saved_with_the_teacher(data, of_own, monkeypatch):
    """With random weights in place of those that would be fetched."""
    import torchvision

    real = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, weights=None, **options: real(name, weights=None, weights_backbone=None, num_classes=21),
    )
    monkeypatch.setattr("pipeline.networks.segmenters.SHORTER_SIDE", 32)
    spec = "torchvision:lraspp_mobilenet_v3_large"
    train_teacher(data, "t", debias="segmenter", segmenter=spec, steps=2, batch_size=16)
    first, second = (load_classifier("t")[0] for _ in range(2))
    images = torch.rand(4, *SHAPE)
    assert torch.equal(first.segmenter(images), second.segmenter(images)), "its weights are the saved ones"
    assert set(torch.unique(first.segmenter(images)).tolist()) <= {0.0, 1.0}


def test_weights_that_cannot_be_fetched_are_named_with_where_to_put_them(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(ModelError, match=r"fetch https://\S+lraspp_mobilenet_v3_large\S+\.pth .* into .*checkpoints"):
        build_segmenter("torchvision:lraspp_mobilenet_v3_large", (3, 64, 64))


def test_what_is_no_segmenter_is_refused_with_what_would_be(of_own):
    (of_own / "cut.pt2").write_bytes(b"PK\x03\x04")
    torch.save({"weight": torch.zeros(3)}, of_own / "weights.pt")
    for spec, words in {
        "lraspp": "unknown segmenter 'lraspp': give torchvision:lraspp_mobilenet_v3_large",
        "torchvision:resnet18": "torchvision has no segmentation network 'resnet18'",
        "nowhere.pt2": "the segmenter nowhere.pt2 cannot be read",
        "cut.pt2": "the segmenter cut.pt2 does not load",
        "weights.pt": "for weights alone a package.module:function",
        "ownseg:nothing": "ownseg has no function 'nothing'",
        "nomodule:x": "the segmenter 'nomodule:x' cannot be imported",
        "ownseg:no_module": "returned int: it must return an nn.Module",
        "ownseg:broken": "cannot be built: RuntimeError: no such file: weights.bin",
        "ownseg:flat": "does not take images",
    }.items():
        with pytest.raises(ModelError, match=words):
            build_segmenter(spec, SHAPE)


def test_segmenter_and_debias_go_together_or_not_at_all(data, of_own):
    with pytest.raises(TrainingError, match="debias='segmenter' needs segmenter"):
        train_teacher(data, "t", debias="segmenter")
    with pytest.raises(TrainingError, match="is for debias='segmenter', and this is debias='grayscale'"):
        train_teacher(data, "t", segmenter="ownseg:bright")
    assert not Path("t").exists()
    train_teacher(data, "t", debias="segmenter", segmenter="ownseg:bright", steps=1, batch_size=32)
    config = json.loads(Path("t/config.json").read_text())
    Path("t/config.json").write_text(json.dumps(config | {"segmenter": None}))
    with pytest.raises(ModelError, match="its debias is 'segmenter' and its segmenter is None"):
        load_classifier("t")


def test_images_are_not_repainted_unasked_where_a_segmenter_makes_other_masks_than_the_dataset():
    split = SimpleNamespace(masks=np.zeros(1))
    stores = [SimpleNamespace(info=SimpleNamespace(teacher=SimpleNamespace(debias=d))) for d in ("mask", "segmenter")]
    assert [_can_repaint(split, store) for store in stores] == [True, False]
