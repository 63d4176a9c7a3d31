"""People's own networks, weights and preprocessing: as teachers, as starts, and back in the library they are from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from cli import main
from data import open_dataset
from pipeline import ModelError, OwnTeacher, PreprocessSpec, cache_explanations, explain, export_model, load_classifier
from pipeline.networks import checkpoints
from pipeline.networks.checkpoints import read_weights
from pipeline.networks.class_map import MappedClasses, resolve_class_map
from pipeline.networks.classifier import Classifier, build_classifier
from pipeline.networks.preprocessing import Preprocess
from pipeline.networks.sources import preprocessing_of
from pipeline.networks.teachers import load_teacher
from teacher_cache import open_cache
from trainer import TrainingError, evaluate, train_student, train_teacher

IMAGENET = PreprocessSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (32, 32), "bicubic")
STEPS = {"steps": 2, "batch_size": 16}
LOG = "pipeline", "trainer"


class Small(nn.Module):
    """A network as a user writes one, with its preprocessing in its forward."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem((images - 0.5) / 0.25)))
        return self.classifier(x.mean((2, 3)))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own, ``mine``, with a function that loads a file unless it is told not to."""
    torch.manual_seed(3)
    network = _used(Small(10))
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    module = types.ModuleType("mine")

    def build(num_classes: int, pretrained: bool = True) -> nn.Module:
        network = Small(num_classes)
        if pretrained:
            network.load_state_dict(torch.load(tmp_path / "mine.pt", weights_only=True))
        return network

    module.build = build
    module.plain = Small
    monkeypatch.setitem(sys.modules, "mine", module)
    return network


def _used(network: nn.Module) -> nn.Module:
    """Give batch norms other values than their first ones, as a training does."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, 3, 32, 32))
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return network.eval()


def _torchvision_checkpoint(path: Path, classes: int = 10) -> nn.Module:
    torch.manual_seed(1)
    network = _used(torchvision.models.resnet18(num_classes=classes))
    torch.save(network.state_dict(), path)
    return network


def _images(dataset: Path, count: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.asarray(open_dataset(dataset).split("ood").images[:count])).float() / 255


# --- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_vit"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 24, 36), (3, 48, 40)])
def test_heatmaps_behind_preprocessing_are_the_networks_own_pulled_back_by_autograd(arch, shape):
    torch.manual_seed(0)
    size = (32, 32) if arch == "resnet18" else (160, 160)
    spec = PreprocessSpec(IMAGENET.mean, IMAGENET.std, size, "bicubic")
    network = torchvision.models.resnet18(num_classes=3) if arch == "resnet18" else timm.create_model("test_vit")
    classifier = Classifier(network, image_shape=shape, preprocessing=spec).double().eval()
    images, targets = torch.rand(2, *shape).double().requires_grad_(), torch.tensor([0, 1])
    prepared = classifier.preprocess(images)
    _, relevance = explain(network, prepared.detach(), targets, epsilon=0.1)
    (pulled_back,) = torch.autograd.grad(prepared, images, relevance / prepared.detach())
    logits, heatmaps = explain(classifier, images.detach(), targets, epsilon=0.1)
    expected = images.detach() * pulled_back
    torch.testing.assert_close(heatmaps, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(logits, network(prepared.detach()), rtol=0, atol=1e-12)


def test_the_mean_is_a_bias_so_that_maps_equal_those_of_the_network_with_the_normalisation_in_its_first_layer():
    torch.manual_seed(0)
    mean, std = torch.tensor(IMAGENET.mean).double(), torch.tensor(IMAGENET.std).double()
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2)).double()
    folded = nn.Sequential(nn.Conv2d(3, 6, 3), *network[1:]).double()
    with torch.no_grad():
        folded[0].weight.copy_(network[0].weight / std.view(1, 3, 1, 1))
        folded[0].bias.copy_(network[0].bias - (folded[0].weight * mean.view(1, 3, 1, 1)).sum((1, 2, 3)))
    spec = PreprocessSpec(IMAGENET.mean, IMAGENET.std)
    classifier = Classifier(network, image_shape=(3, 8, 8), preprocessing=spec).double()
    images, targets = torch.rand(2, 3, 8, 8).double(), torch.tensor([0, 1])
    (logits, heatmaps), (same_logits, same) = (
        explain(model, images, targets, epsilon=0.1) for model in (classifier, folded)
    )
    torch.testing.assert_close(logits, same_logits, rtol=1e-6, atol=1e-6)  # the buffers are float32 first
    torch.testing.assert_close(heatmaps, same, rtol=1e-6, atol=1e-7)


def test_saturated_pixels_keep_their_relevance_where_interpolation_exceeds_the_range():
    """Strokes of 1 on 0, as binary digits: bicubic interpolation exceeds 1 on all of them."""
    torch.manual_seed(0)
    images = torch.zeros(1, 3, 28, 28)
    images[:, 0, 4:24, 12:16] = 1
    spec = PreprocessSpec((0.5,), (0.25,), (32, 32), "bicubic").for_channels(3)
    network = _used(torchvision.models.resnet18(num_classes=2))
    classifier = Classifier(network, image_shape=(3, 28, 28), preprocessing=spec).eval()
    assert classifier.preprocess(images).max() <= 2
    _, heatmaps = explain(classifier, images, torch.tensor([0]), epsilon=0.1)
    assert heatmaps[:, 0, 4:24, 12:16].count_nonzero() > 70


def test_a_masked_pixel_has_no_relevance_behind_preprocessing():
    network = torchvision.models.resnet18(num_classes=2)
    classifier = Classifier(network, "mask", image_shape=(3, 32, 32), preprocessing=IMAGENET).eval()
    masks = torch.zeros(1, 1, 32, 32)
    masks[:, :, 8:24, 8:24] = 1
    _, heatmaps = explain(lambda x: classifier(x, masks), torch.rand(1, 3, 32, 32), torch.tensor([0]), epsilon=0.1)
    assert heatmaps[:, :, 8:24, 8:24].any()
    assert not (heatmaps * (1 - masks)).any()


def test_a_processor_of_hugging_face_may_have_one_mean_for_all_channels(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": [0.25]}))
    assert preprocessing_of(f"hf:{tmp_path}") == PreprocessSpec((0.5,), (0.25,))


def test_weights_of_a_library_bring_its_preprocessing(dataset, tmp_path):
    _torchvision_checkpoint(tmp_path / "w.pth")
    teacher = OwnTeacher("torchvision:resnet18", str(tmp_path / "w.pth"))
    loaded = load_teacher(teacher, open_dataset(dataset).class_names, (3, 28, 28))
    assert loaded.config.preprocessing == PreprocessSpec(IMAGENET.mean, IMAGENET.std, (224, 224), "bilinear")


# --- each way in, and back out --------------------------------------------------------------------------------------


def _from_torchvision(folder: Path) -> tuple[list[str], list[str], nn.Module]:
    network = _torchvision_checkpoint(folder / "w.pth")
    return ["--teacher", "resnet18", "--weights", str(folder / "w.pth")], ["--arch", "torchvision:resnet18"], network


def _from_timm(folder: Path) -> tuple[list[str], list[str], nn.Module]:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    network = _used(timm.create_model("test_resnet", num_classes=10))
    save_file(network.state_dict(), folder / "w.safetensors")
    return (
        ["--teacher", "timm:test_resnet", "--weights", str(folder / "w.safetensors")],
        ["--arch", "timm:test_resnet"],
        network,
    )


def _from_hf(folder: Path) -> tuple[list[str], list[str], nn.Module]:
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    network = _used(ResNetForImageClassification(config))
    network.save_pretrained(folder / "hf")
    processor = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "do_normalize": True}
    processor |= {"image_mean": list(IMAGENET.mean), "image_std": list(IMAGENET.std)}
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(processor))
    return ["--teacher", f"hf:{folder}/hf"], ["--arch", f"hf:{folder}/hf"], network


def _from_factory(folder: Path) -> tuple[list[str], list[str], nn.Module]:
    network = Small(10)
    network.load_state_dict(torch.load(folder / "mine.pt", weights_only=True))
    return ["--teacher-factory", "mine:build"], ["--student-factory", "mine:plain"], network.eval()


WAYS = {"torchvision": _from_torchvision, "timm": _from_timm, "hf": _from_hf, "factory": _from_factory}


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_of_ones_own_teaches_a_student_that_goes_home(way, dataset, tmp_path, runner, own_module):
    teacher, student, network = WAYS[way](tmp_path)
    small = [] if way == "factory" else ["--input-size", "32"]
    cache, run, out = tmp_path / "cache.zarr", tmp_path / "run", tmp_path / "home" / "model.safetensors"
    runner("cache-explanations", "--data", dataset, *teacher, *small, "--draws", 1, "--out", cache)
    split = open_dataset(dataset).split("train")
    teachers_images = torch.from_numpy(np.asarray(split.images[:8])).float() / 255
    if way != "factory":
        spec = preprocessing_of(student[1])
        teachers_images = Preprocess(dataclasses.replace(spec, size=(32, 32)))(teachers_images)
    with torch.no_grad():
        logits = network.eval()(teachers_images)
    stored = open_cache(cache).read_shard(0).teacher_logits[:8]
    torch.testing.assert_close(torch.from_numpy(stored), getattr(logits, "logits", logits), rtol=1e-4, atol=1e-4)
    runner(
        "train-student",
        "--data",
        dataset,
        "--cache",
        cache,
        *student,
        *small,
        "--steps",
        2,
        "--batch-size",
        16,
        "--out",
        run,
    )
    factory = ["--student-factory", "mine:plain"] if way == "factory" else []
    runner("evaluate", "--data", dataset, "--model", run, *factory)
    runner("export", "--model", run, "--format", "safetensors", *factory, "--out", out)
    classifier, _ = load_classifier(run, "mine:plain" if way == "factory" else None)
    images = _images(dataset)
    with torch.no_grad():
        expected = classifier(images)
        prepared = images if classifier.preprocess is None else classifier.preprocess(images)
        home = _home(way, out)(prepared)
    torch.testing.assert_close(getattr(home, "logits", home), expected, rtol=1e-5, atol=1e-5)


def _home(way: str, weights: Path) -> nn.Module:
    """Load an exported student by the library that its architecture is from."""
    if way == "timm":
        return timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(weights)).eval()
    if way == "hf":
        return AutoModelForImageClassification.from_pretrained(weights.parent).eval()
    from safetensors.torch import load_file

    network = Small(10) if way == "factory" else torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(load_file(weights))
    return network.eval()


@pytest.fixture
def runner(capsys):
    """Run a command of the command line, which must succeed."""
    from click.testing import CliRunner

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_a_stores_logits_are_those_of_the_network_on_preprocessed_images(dataset, tmp_path):
    network = _torchvision_checkpoint(tmp_path / "w.pth")
    teacher = OwnTeacher("resnet18", str(tmp_path / "w.pth"), preprocessing=IMAGENET)
    loaded = load_teacher(teacher, open_dataset(dataset).class_names, (3, 28, 28))
    images = _images(dataset)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), network(Preprocess(IMAGENET)(images)), rtol=1e-5, atol=1e-5)


def test_a_module_in_python_is_a_teacher_and_stays_as_it_was(dataset, tmp_path, own_module):
    before = {name: value.clone() for name, value in own_module.state_dict().items()}
    own_module.train()
    summary = cache_explanations(dataset, own_module, tmp_path / "cache.zarr", draws=1)
    assert summary.samples == 300
    assert own_module.training
    assert all(torch.equal(value, before[name]) for name, value in own_module.state_dict().items())
    again = cache_explanations(dataset, Small(10), tmp_path / "other.zarr", draws=1)
    first, second = (open_cache(tmp_path / name).info.teacher for name in ("cache.zarr", "other.zarr"))
    assert again.samples == 300
    assert first.weights_sha256 != second.weights_sha256


def test_a_hugging_face_folder_in_shards_is_the_same_teacher(dataset, tmp_path):
    _, _, network = _from_hf(tmp_path)
    network.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    (tmp_path / "shards" / "preprocessor_config.json").write_bytes(
        (tmp_path / "hf" / "preprocessor_config.json").read_bytes()
    )
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    names = open_dataset(dataset).class_names
    whole, shards = (load_teacher(OwnTeacher(f"hf:{tmp_path}/{name}"), names, (3, 28, 28)) for name in ("hf", "shards"))
    assert whole.sha256 == shards.sha256


@pytest.mark.parametrize("factory", [None, "mine:build"])
def test_the_factory_of_a_teacher_is_trusted_by_its_option_too(dataset, own_module, factory):
    names = open_dataset(dataset).class_names
    teacher = OwnTeacher("mine:build", factory=factory)
    load_teacher(teacher, names, (3, 28, 28), student_factory="mine:build")
    with pytest.raises(ModelError, match="'mine:plain' was given, but mine:build has none"):
        load_teacher(teacher, names, (3, 28, 28), student_factory="mine:plain")


def test_a_module_in_python_teaches_a_student_that_goes_home(dataset, tmp_path, own_module):
    from safetensors.torch import load_file

    cache, run, out = tmp_path / "cache.zarr", tmp_path / "run", tmp_path / "model.safetensors"
    cache_explanations(dataset, own_module, cache, draws=1)
    train_student(dataset, cache, run, student_factory="mine:plain", **STEPS)
    assert evaluate(dataset, run, student_factory="mine:plain")["splits"]["iid"]["samples"] == 300
    export_model(run, out, "safetensors", student_factory="mine:plain")
    images, home = _images(dataset), Small(10)
    home.load_state_dict(load_file(out))
    with torch.no_grad():
        of_teacher = own_module(torch.from_numpy(np.asarray(open_dataset(dataset).split("train").images[:8])) / 255)
        expected = load_classifier(run, "mine:plain")[0](images)
        torch.testing.assert_close(home.eval()(images), expected, rtol=1e-5, atol=1e-5)
    stored = torch.from_numpy(open_cache(cache).read_shard(0).teacher_logits[:8])
    torch.testing.assert_close(stored, of_teacher, rtol=1e-4, atol=1e-4)


# --- classes --------------------------------------------------------------------------------------------------------


def test_pooled_classes_are_the_log_sum_exp_and_share_relevance_by_their_probabilities():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network = network.double()
    images = torch.rand(2, 3, 8, 8).double()
    mapped = MappedClasses(network, ((0, 3), (2,)), 5).double()
    logits = network(images)
    pooled = torch.stack([logits[:, [0, 3]].logsumexp(1), logits[:, 2]], 1)
    torch.testing.assert_close(mapped(images), pooled)
    _, heatmap = explain(mapped, images, torch.tensor([0, 0]), epsilon=0.1)
    (_, of_0), (_, of_3) = (explain(network, images, torch.tensor([c, c]), epsilon=0.1) for c in (0, 3))
    share = logits[:, [0, 3]].softmax(1)[..., None, None, None]
    torch.testing.assert_close(heatmap, share[:, 0] * of_0 + share[:, 1] * of_3)


def test_an_imagenet_network_teaches_other_classes_by_a_class_map(dataset, tmp_path, caplog):
    _torchvision_checkpoint(tmp_path / "w.pth", classes=1000)
    names = open_dataset(dataset).class_names
    class_map = tuple((name, ("beagle", 208) if place == 0 else (place,)) for place, name in enumerate(names))
    teacher = OwnTeacher("resnet18", str(tmp_path / "w.pth"), preprocessing=IMAGENET, class_map=class_map)
    with caplog.at_level("INFO", "pipeline"):
        loaded = load_teacher(teacher, names, (3, 28, 28))
    assert "beagle (162), Labrador retriever (208) → " + names[0] in caplog.text
    assert loaded.model(_images(dataset)).shape == (4, 10)


def test_single_classes_keep_a_last_layer_that_students_copy(dataset, tmp_path):
    _torchvision_checkpoint(tmp_path / "w.pth", classes=20)
    names = open_dataset(dataset).class_names
    class_map = tuple((name, (19 - place,)) for place, name in enumerate(names))
    teacher = OwnTeacher("resnet18", str(tmp_path / "w.pth"), preprocessing=IMAGENET, class_map=class_map)
    cache_explanations(dataset, teacher, tmp_path / "cache.zarr", draws=1)
    weight = torch.load(tmp_path / "w.pth", weights_only=True)["fc.weight"]
    head = open_cache(tmp_path / "cache.zarr").head
    np.testing.assert_array_equal(head["weight"], weight.flip(0)[:10])


def test_the_same_names_in_another_order_are_mapped_by_name():
    assert resolve_class_map(None, ("cat", "dog"), 2, ("dog", "cat")) == ((1,), (0,))
    assert resolve_class_map(None, ("cat", "dog"), 2, ("cat", "dog")) is None
    assert resolve_class_map(None, ("cat", "dog"), 2, None) is None


def test_a_class_map_is_read_from_yaml_by_name_and_index(dataset, tmp_path, runner):
    _torchvision_checkpoint(tmp_path / "w.pth", classes=1000)
    names = open_dataset(dataset).class_names
    lines = {name: ["beagle", 0] if place == 0 else place for place, name in enumerate(names)}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(lines))
    options = ["--weights", tmp_path / "w.pth", "--input-size", 32, "--class-map", tmp_path / "map.yaml"]
    runner(
        "cache-explanations", "--data", dataset, "--teacher", "resnet18", *options, "--draws", 1,
        "--out", tmp_path / "cache.zarr",
    )  # fmt: skip
    assert open_cache(tmp_path / "cache.zarr").info.teacher.class_names == names


# --- starts ---------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_weights_and_a_frozen_backbone_keeps_them(dataset, tmp_path):
    network = _torchvision_checkpoint(tmp_path / "w.pth")
    options = {"arch": "resnet18", "weights": tmp_path / "w.pth", "input_size": 32, "freeze_backbone": True}
    train_teacher(dataset, tmp_path / "run", **options, **STEPS)
    classifier, config = load_classifier(tmp_path / "run")
    tuned, start = classifier.network.state_dict(), network.state_dict()
    differing = {name for name, value in tuned.items() if not torch.equal(value, start[name])}
    assert differing == {"fc.weight", "fc.bias"}
    assert config.start == {"file": "w.pth", "sha256": config.start["sha256"], "frozen": True}
    assert not config.bias_free


def test_a_frozen_backbone_needs_weights(dataset, tmp_path):
    with pytest.raises(TrainingError, match="would train the last layer on top of random weights"):
        train_teacher(dataset, tmp_path / "run", freeze_backbone=True, **STEPS)


def test_a_frozen_backbone_cannot_adapt_to_biases_that_fade(dataset, tmp_path):
    _torchvision_checkpoint(tmp_path / "w.pth")
    options = {"arch": "resnet18", "weights": tmp_path / "w.pth", "input_size": 32, "freeze_backbone": True}
    with pytest.raises(TrainingError, match=r"bias_free=True lets .* fade out .*freeze_backbone=True keeps"):
        train_teacher(dataset, tmp_path / "run", bias_free=True, **options, **STEPS)
    assert not (tmp_path / "run").exists()


def test_a_student_keeps_the_biases_of_its_start_behind_a_bias_free_teacher(dataset, cache, tmp_path, caplog):
    _torchvision_checkpoint(tmp_path / "w.pth")
    options = {"arch": "resnet18", "init": tmp_path / "w.pth", "input_size": 32, **STEPS}
    with caplog.at_level("INFO", "trainer"):
        result = train_student(dataset, cache, tmp_path / "run", **options)
    classifier, config = load_classifier(tmp_path / "run")
    assert not config.bias_free
    assert isinstance(classifier.network.bn1, nn.BatchNorm2d)
    assert "keeps the biases of the weights that it starts from" in caplog.text
    assert result["start"]["file"] == "w.pth"
    train_student(dataset, cache, tmp_path / "free", bias_free=True, **options)
    assert load_classifier(tmp_path / "free")[1].bias_free


def test_a_student_whose_function_loads_weights_keeps_its_biases_and_needs_no_file_afterwards(
    dataset, cache, tmp_path, own_module
):
    train_student(dataset, cache, tmp_path / "run", student_factory="mine:build", **STEPS)
    (tmp_path / "mine.pt").unlink()
    assert not load_classifier(tmp_path / "run", "mine:build")[1].bias_free
    assert evaluate(dataset, tmp_path / "run", student_factory="mine:build")["iid"] is not None


@pytest.mark.parametrize("classes", [10, 12])
def test_the_teachers_own_weights_are_no_start_unless_they_are_asked_for(dataset, tmp_path, classes):
    _torchvision_checkpoint(tmp_path / "w.pth", classes)
    names = open_dataset(dataset).class_names
    pooled = tuple((name, (place, 10, 11) if place == 0 else (place,)) for place, name in enumerate(names))
    teacher = OwnTeacher(
        "resnet18", str(tmp_path / "w.pth"), preprocessing=IMAGENET, class_map=None if classes == 10 else pooled
    )
    cache_explanations(dataset, teacher, tmp_path / "cache.zarr", draws=1)
    options = {"arch": "resnet18", "init": tmp_path / "w.pth", "input_size": 32, **STEPS}
    with pytest.raises(ModelError, match="would start from the weights of its teacher"):
        train_student(dataset, tmp_path / "cache.zarr", tmp_path / "run", **options)
    result = train_student(dataset, tmp_path / "cache.zarr", tmp_path / "run", teacher_weights=True, **options)
    assert result["start"]["teacher_weights"]


def test_weights_of_a_training_of_ours_bring_its_preprocessing(dataset, tmp_path):
    """Whose mean has faded out, and is not that of the library; a training without any has none."""
    _torchvision_checkpoint(tmp_path / "w.pth")
    options = {"arch": "resnet18", **STEPS}
    train_teacher(
        dataset, tmp_path / "teacher", weights=tmp_path / "w.pth", bias_free=True, input_size=32, std=(0.5,), **options
    )
    train_teacher(dataset, tmp_path / "plain", **options)
    cache_explanations(dataset, tmp_path / "teacher", tmp_path / "cache.zarr", draws=1)
    for name in ("teacher", "plain"):
        student = tmp_path / f"student of {name}"
        given = {"init": tmp_path / name, "teacher_weights": True, **options}
        train_student(dataset, tmp_path / "cache.zarr", student, **given)
        found, expected = (load_classifier(run)[1].preprocessing for run in (student, tmp_path / name))
        assert found == expected
        assert (expected is None) == (name == "plain")
    assert found is None
    train_student(dataset, tmp_path / "cache.zarr", tmp_path / "mean", mean=(0.3,), **given)
    assert load_classifier(tmp_path / "mean")[1].preprocessing.mean == (0.3,) * 3


def test_a_student_of_its_bias_free_teachers_weights_starts_as_the_teacher(dataset, tmp_path):
    """Also its norms: their statistics had been lost, so that its first steps led away from the teacher."""
    _torchvision_checkpoint(tmp_path / "w.pth")
    options = {"weights": tmp_path / "w.pth", "bias_free": True, "input_size": 32, "arch": "resnet18"}
    train_teacher(dataset, tmp_path / "teacher", **options, **STEPS)
    teacher, config = load_classifier(tmp_path / "teacher")
    student = build_classifier(config, to_train=True, weights=read_weights(tmp_path / "teacher"))
    images = torch.rand(8, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(images), teacher.eval()(images))
    assert teacher(images).abs().max() > 0


def test_a_training_reads_the_weights_that_it_starts_from_once(dataset, cache, tmp_path, monkeypatch):
    _torchvision_checkpoint(tmp_path / "w.pth")
    files: list[Path] = []
    monkeypatch.setattr(checkpoints, "_read", lambda path, read=checkpoints._read: files.append(path) or read(path))
    result = train_student(
        dataset, cache, tmp_path / "run", arch="resnet18", init=tmp_path / "w.pth", input_size=32, **STEPS
    )
    assert files == [tmp_path / "w.pth"]
    assert result["start"]["sha256"] == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()


def test_messages_of_a_command_name_options_that_it_has(dataset, tmp_path, own_module):
    from click.testing import CliRunner

    for command, *rest in (
        ("train-teacher", "--arch", "mine:plain"),
        ("train-student", "--method", "erm", "--arch", "mine:plain"),
    ):
        arguments = [command, "--data", str(dataset), *rest, "--out", str(tmp_path / "run"), "--steps", "2"]
        output = CliRunner().invoke(main, arguments).output
        flag = "--teacher-factory" if command == "train-teacher" else "--student-factory"
        assert f"give {flag} mine:plain" in output
        of_command = main.get_command(None, command)
        assert flag in {name for parameter in of_command.params for name in parameter.opts}


def test_a_training_with_a_teacher_factory_is_cached_with_it(dataset, tmp_path, runner, own_module):
    run, cache = tmp_path / "run", tmp_path / "cache.zarr"
    small = ["--steps", 2, "--batch-size", 16]
    runner("train-teacher", "--data", dataset, "--teacher-factory", "mine:plain", *small, "--out", run)
    runner(
        "cache-explanations",
        "--data",
        dataset,
        "--teacher",
        run,
        "--teacher-factory",
        "mine:plain",
        "--draws",
        1,
        "--out",
        cache,
    )
