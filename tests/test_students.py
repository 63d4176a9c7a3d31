"""What any network promises as a student: the teacher's head, an adapter, options, and code that is the user's own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cli import main
from data import open_dataset
from pipeline import ModelConfig, ModelError, build_network, explain, homogeneity_error, load_classifier
from pipeline.networks.classifier import Classifier, build_classifier, save_weights
from pipeline.networks.heads import HeadSpec, attach_head, copy_head, head_arrays
from pipeline.networks.layers import last_layer
from pipeline.networks.models import architectures, small_cnn
from trainer.results.evaluation import evaluate

SHAPE = (3, 28, 28)


def config(**changes) -> ModelConfig:
    values = {"arch": "small-cnn", "bias_free": True, "head": None, **changes}
    names = tuple(f"c{i}" for i in range(10))
    return ModelConfig(
        "student", debias="none", class_names=names, image_shape=SHAPE, dataset={}, training={}, **values
    )


def student(head: HeadSpec | None = None, factory: str | None = None, **changes) -> Classifier:
    return build_classifier(config(head=head, **changes), factory).eval()


def save(path: Path, saved: ModelConfig, factory: str | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(saved.to_dict()))
    save_weights(path, build_classifier(saved, factory))
    return path


# the last layer


class FunctionalCNN(nn.Module):
    """As users write them: what flattens is a function, and the last layer is not the last that is registered."""

    def __init__(self, num_classes: int, after: str = "", channels: int = 12):
        super().__init__()
        self.head = nn.Linear(channels * 4, num_classes)
        self.conv = nn.Conv2d(3, channels, 3)
        self.after = after

    def forward(self, x):
        x = F.adaptive_max_pool2d(F.relu(self.conv(x)), 2)
        x = torch.flatten(input=x, start_dim=1) if self.after == "by name" else x.reshape(len(x), -1)
        x = F.dropout(x, 0.5, self.training)
        if self.after == "weight":
            return F.linear(x, self.head.weight)
        return self.head(x - 1 if self.after == "changed" else x)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (small_cnn(10), "head"),
        (nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "0"),
        (nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 4)), "0"),
        (nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None),
        (nn.Sequential(nn.Conv2d(10, 10, 1, groups=10), nn.Conv2d(3, 10, 1, stride=2)), None),
        (nn.Sequential(nn.Linear(4, 9)), None),
    ],
)
def test_the_last_layer_is_the_last_linear_one_or_1x1_convolution_of_as_many_outputs_as_classes(network, expected):
    assert last_layer(network, 10) == expected


@pytest.mark.parametrize(("arch", "features"), [("squeezenet1_1", 512), ("small-cnn", 1152)])
@pytest.mark.parametrize("bias_free", [True, False])
def test_a_teachers_head_is_stored_as_classes_by_features_whatever_layer_it_is(arch, features, bias_free):
    teacher = student(arch=arch, bias_free=bias_free)
    head = head_arrays(teacher.network, 10)
    layer = teacher.network.get_submodule(last_layer(teacher.network, 10))
    assert {key: value.shape for key, value in head.items()} == {
        "weight": (10, features),
        **({} if bias_free else {"bias": (10,)}),
    }
    assert np.array_equal(head["weight"].ravel(), layer.weight.detach().numpy().ravel())


def test_a_teacher_that_ends_otherwise_has_no_head():
    assert head_arrays(nn.Sequential(nn.Flatten(), nn.Linear(4, 12)), 10) == {}


def teachers_head(features: int, bias: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    head = {"weight": random.normal(size=(10, features)).astype("f4")}
    return head | ({"bias": random.normal(size=10).astype("f4")} if bias else {})


ADAPTERS = [
    # architecture, the teacher's width, what stands in front of its layer
    ("small-cnn", 1152, None),
    ("small-cnn", 90, "positions"),
    ("small-cnn", 512, nn.Linear),
    ("resnet18", 512, None),
    ("resnet18", 1152, nn.Linear),
    ("squeezenet1_1", 512, None),
    ("squeezenet1_1", 90, nn.Conv2d),
]


@pytest.mark.parametrize(("arch", "features", "adapter"), ADAPTERS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_student_takes_the_head_frozen_behind_the_adapter_that_fits_it(arch, features, adapter, bias):
    model = student(HeadSpec(features, bias), arch=arch, bias_free=not bias)
    own = student(arch=arch, bias_free=not bias)
    head = teachers_head(features, bias)
    copy_head(model.network, head)
    place = last_layer(own.network, 10)
    stack = model.network.get_submodule(place)
    frozen = stack if adapter is None else stack[1]
    assert type(frozen) is type(own.network.get_submodule(place))
    assert {name: parameter.requires_grad for name, parameter in frozen.named_parameters()} == dict.fromkeys(
        head, False
    )
    assert all(np.array_equal(p.detach().numpy().reshape(head[n].shape), head[n]) for n, p in frozen.named_parameters())
    if adapter is not None:
        learnt = stack[0][1] if adapter == "positions" else stack[0]
        assert isinstance(learnt, nn.Conv2d if adapter == "positions" else adapter)
        assert all(parameter.requires_grad for parameter in learnt.parameters())
        assert (learnt.bias is not None) == bias
    assert model.train()(torch.rand(2, *SHAPE)).shape == (2, 10)


def test_the_convolution_on_positions_is_what_it_says():
    """Against matrix products, position by position: the teacher's layer sees its own map of 10 channels by 3×3."""
    model = student(HeadSpec(90, False))
    copy_head(model.network, teachers_head(90, False))
    images = torch.rand(4, *SHAPE)
    maps = model.network[: list(dict(model.network.named_children())).index("flatten")](images)  # (4, 128, 3, 3)
    weight = model.network.head[0][1].weight[:, :, 0, 0]  # (10, 128)
    seen = torch.stack([maps[:, :, y, x] @ weight.T for y in range(3) for x in range(3)], dim=2)  # (4, 10, 9)
    expected = seen.flatten(1) @ torch.from_numpy(teachers_head(90, False)["weight"]).T
    torch.testing.assert_close(model(images), expected)


def test_behind_global_average_pooling_a_linear_adapter_is_the_convolution_in_front_of_it():
    maps, weight = torch.rand(4, 6, 5, 5), torch.rand(8, 6)
    torch.testing.assert_close(
        F.linear(maps.mean((2, 3)), weight), F.conv2d(maps, weight[:, :, None, None]).mean((2, 3))
    )


@pytest.mark.parametrize(("after", "on_positions"), [("", True), ("by name", True), ("changed", False)])
def test_a_map_is_found_that_a_function_flattens_and_not_one_that_was_changed_on_the_way(after, on_positions):
    network = FunctionalCNN(10, after).train()
    network.conv.eval()
    seed = torch.random.get_rng_state()
    attach_head(network, HeadSpec(20, True), 10, SHAPE, adapter_bias=True)
    assert isinstance(network.head[0], nn.Sequential if on_positions else nn.Linear)
    assert network.training
    assert not network.conv.training
    torch.random.set_rng_state(seed)  # finding the map takes no draw from the seed of the training
    nn.Linear(20, 10)
    adapter = nn.Conv2d(12, 5, 1) if on_positions else nn.Linear(48, 20)
    assert any(torch.equal(adapter.weight, parameter) for parameter in network.head[0].parameters())


def test_a_student_that_ends_otherwise_is_refused_with_what_to_do():
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ModelError, match=r"neither a linear layer nor a 1×1 convolution with 10 outputs.*head='free'"):
        attach_head(network, HeadSpec(4, False), 10, SHAPE, adapter_bias=False)


def test_a_student_that_looks_into_its_last_layer_is_refused_before_it_is_trained():
    with pytest.raises(ModelError, match=r"in place of its own 'head' \(AttributeError: .*its forward must only call"):
        attach_head(FunctionalCNN(10, "weight"), HeadSpec(20, True), 10, SHAPE, adapter_bias=True)


def test_without_a_head_the_student_learns_its_own_last_layer():
    model = student()
    assert isinstance(model.network.head, nn.Linear)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("arch", "features", "adapter"), [a for a in ADAPTERS if a[2] is not None])
def test_a_bias_free_student_stays_homogeneous_behind_its_adapter_and_explains_its_whole_logit(arch, features, adapter):
    torch.manual_seed(0)
    model = student(HeadSpec(features, False), arch=arch)
    images, classes = torch.rand(3, *SHAPE), torch.tensor([0, 4, 9])
    assert homogeneity_error(model.network, images) < 1e-4
    logits, heatmaps = explain(model, images, classes, 0.0)
    torch.testing.assert_close(heatmaps.sum((1, 2, 3)), logits[range(3), classes], rtol=1e-3, atol=1e-5)


# options of the architecture


@settings(max_examples=8, deadline=None)
@given(width=st.integers(1, 40), features=st.integers(1, 60))
def test_a_student_of_any_width_takes_a_head_of_any_width(width, features):
    model = student(HeadSpec(features, False), arch_options={"width": width})
    assert model.network.conv1.out_channels == width
    assert model(torch.rand(2, *SHAPE)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("small-cnn", {"widht": 3}, "'small-cnn' takes no option 'widht': it takes depth, width$"),
        ("small-cnn", {"channels": 3}, "takes no option 'channels': it takes depth, width$"),
        ("small-cnn", {"width": -3}, r"with width=-3 cannot be built for 10 classes and images of shape \(3, 28, 28\)"),
        ("small-cnn", {"width": "wide"}, "with width='wide' cannot be built"),
        ("resnet50", {"with": 1}, "takes no option 'with': it takes groups, width_per_group, zero_init_residual"),
        ("resnet18", {"weights": "DEFAULT"}, "takes no option 'weights'"),
        ("resnet18", {"width_per_group": 128}, "with width_per_group=128 cannot be built.*only supports"),
        ("mobilenet_v3_small", {"withd_mult": 0.5}, "takes no option 'withd_mult': it takes .*width_mult"),
        ("vit_b_32", {"image_size": 32}, "takes no option 'image_size': it takes attention_dropout"),
    ],
)
def test_an_option_that_the_architecture_does_not_take_is_named_with_those_it_takes(arch, options, message):
    with pytest.raises(ModelError, match=message):
        build_network(arch, 10, SHAPE, free_of_biases=False, options=options)


@pytest.mark.parametrize("arch", [name for name in architectures() if not name.startswith("small-")])
def test_no_builder_of_torchvisions_ignores_a_misspelt_option(arch):
    with pytest.raises(ModelError, match=f"'{arch}' takes no option 'widht': it takes .*"):
        build_network(arch, 10, (3, 224, 224), free_of_biases=False, options={"widht": 3})


def test_options_reach_torchvisions_builders():
    def size(arch: str, **options) -> int:
        network, _ = build_network(arch, 10, (3, 32, 32), free_of_biases=False, options=options)
        return sum(parameter.numel() for parameter in network.parameters())

    assert size("mobilenet_v3_small", width_mult=0.5) < size("mobilenet_v3_small")
    assert size("efficientnet_b0", dropout=0.1) == size("efficientnet_b0")
    assert size("resnet50", groups=32, width_per_group=4) < size("resnet50")


def test_options_are_kept_with_the_model_and_models_from_before_there_were_any_load(tmp_path):
    path = save(tmp_path / "s", config(arch_options={"width": 5}))
    model, loaded = load_classifier(path)
    assert model.network.conv1.out_channels == 5
    assert loaded.arch_options == {"width": 5}
    path = save(tmp_path / "old", config())
    values = json.loads((path / "config.json").read_text())
    del values["arch_options"]
    (path / "config.json").write_text(json.dumps(values))
    assert load_classifier(path)[1].arch_options == {}


@pytest.mark.parametrize("options", [[1], {"width": [3]}, {"width": None}, "width=3"])
def test_options_in_a_file_that_are_none_are_said(tmp_path, options):
    path = save(tmp_path / "s", config())
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "arch_options": options}))
    with pytest.raises(ModelError, match="its arch_options are"):
        load_classifier(path)


# networks of the user's own

TINY = """
import pathlib
from torch import nn

pathlib.Path("was-run").touch()
SEEN = {}


class Tiny(nn.Module):
    def __init__(self, num_classes, width=6):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def build(num_classes, image_shape, width=6):
    SEEN.update(num_classes=num_classes, image_shape=image_shape)
    return Tiny(num_classes, width)


def anything(num_classes, **options):
    SEEN.update(options)
    return Tiny(num_classes)


def hands_on(num_classes, **options):
    return Tiny(num_classes, **options)


def conv(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_student.py").write_text(TINY)
    (tmp_path / "broken_student.py").write_text("def build(:\n")
    (tmp_path / "leaving_student.py").write_text("raise SystemExit(3)\n")
    yield "tiny_student:build"
    for name in ("tiny_student", "broken_student", "leaving_student"):
        sys.modules.pop(name, None)


def test_a_function_of_the_users_own_builds_the_student_with_head_and_adapter_in_bias_free_form(tiny):
    before = list(sys.path)
    model = student(HeadSpec(20, False), tiny, arch=tiny, arch_options={"width": 8})
    assert sys.path == before
    assert sys.modules["tiny_student"].SEEN == {"num_classes": 10, "image_shape": SHAPE}
    adapter, frozen = model.network.classifier
    assert adapter.weight.shape == (20, 8)
    assert not frozen.weight.requires_grad
    assert len(model.bias_free_report.changed) == 3
    assert homogeneity_error(model.network, torch.rand(2, *SHAPE)) < 1e-5


def test_the_image_shape_goes_to_functions_that_ask_for_it_and_options_to_those_that_take_any(tiny):
    student(factory="tiny_student:anything", arch="tiny_student:anything", arch_options={"depth": 3})
    assert sys.modules["tiny_student"].SEEN == {"depth": 3}
    model = student(HeadSpec(7, True), "tiny_student:conv", arch="tiny_student:conv", bias_free=False)
    assert [type(layer) for layer in model.network[0]] == [nn.Conv2d, nn.Conv2d]


def test_an_option_that_the_users_function_does_not_take_is_named(tiny):
    with pytest.raises(ModelError, match=r"'tiny_student:build' takes no option 'depth': it takes width$"):
        student(factory=tiny, arch=tiny, arch_options={"depth": 3})
    hands_on, place = "tiny_student:hands_on", r"Tiny.__init__\(\) got an .*tiny_student.py, line \d+\)"
    with pytest.raises(ModelError, match=f"'{hands_on}' takes no option 'depth': TypeError: {place}; leave the option"):
        student(factory=hands_on, arch=hands_on, arch_options={"depth": 3})


def test_a_model_of_others_runs_no_code_unless_the_user_names_it(tiny, tmp_path):
    path = save(tmp_path / "s", config(arch=tiny), tiny)
    sys.modules.pop("tiny_student")
    (tmp_path / "was-run").unlink()
    for factory, message in (
        (None, f"{path} was not loaded.*student_factory='{tiny}' "),
        ("tiny_student:anything", f"the model is built by '{tiny}': give student_factory='{tiny}' if you trust it"),
        ("tiny_student", "student_factory must be package.module:function, got 'tiny_student'"),
        ("tiny_student.build", r"got 'tiny_student.build'\. Did you mean tiny_student:build\?"),
    ):
        with pytest.raises(ModelError, match=message):
            load_classifier(path, factory)
        assert not (tmp_path / "was-run").exists()
    model, loaded = load_classifier(path, tiny)
    assert (tmp_path / "was-run").exists()
    assert loaded.arch == tiny
    saved = torch.load(path / "weights.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_factory_for_a_model_that_none_built_is_refused(tiny, tmp_path):
    path = save(tmp_path / "s", config())
    with pytest.raises(ModelError, match="the model is built by 'small-cnn': leave the option out"):
        load_classifier(path, tiny)
    assert not (tmp_path / "was-run").exists()


def test_a_factory_that_has_changed_since_is_said(tiny, tmp_path):
    path = save(tmp_path / "s", config(arch=tiny), tiny)
    changed = dataclasses.replace(config(arch=tiny), arch_options={"width": 9})
    (path / "config.json").write_text(json.dumps(changed.to_dict()))
    with pytest.raises(ModelError, match=f"do not load .*or give the {tiny} that it was made with"):
        load_classifier(path, tiny)


def test_a_student_of_the_users_own_is_evaluated_by_name(tiny, tmp_path, dataset):
    opened = open_dataset(dataset)
    saved = dataclasses.replace(config(arch=tiny), class_names=opened.class_names)
    path = save(tmp_path / "s", saved, tiny)
    arguments = ["evaluate", "--data", str(dataset), "--model", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"--student-factory {tiny}" in result.output
    result = CliRunner().invoke(main, [*arguments, "--student-factory", tiny, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["arch"] == tiny
    assert evaluate(dataset, path, student_factory=tiny) == json.loads(result.stdout)


def test_a_file_of_a_models_folder_is_told_to_be_no_folder(tmp_path):
    path = save(tmp_path / "s", config())
    with pytest.raises(ModelError, match=rf"weights.pt: it is a file; give its folder, {path}$"):
        load_classifier(path / "weights.pt")


class Crossed(nn.Module):
    """Another layer with as many outputs as classes comes after its last one, by registration."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.inner = nn.Linear(10, 10), nn.Conv2d(3, 10, 1)

    def forward(self, x):
        return self.last(self.inner(x).mean((2, 3)))


def test_a_head_is_never_put_in_the_place_of_a_layer_that_is_not_the_last():
    with pytest.raises(ModelError, match=r"not clear that 'inner' is its last: register the last one last"):
        attach_head(Crossed(), HeadSpec(20, True), 10, SHAPE, adapter_bias=True)
