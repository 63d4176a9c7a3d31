"""What explainers promise: the maps of the papers, their exact second order, and the last feature maps."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_gradients_are_finite_differences
from torch import Tensor, nn

from pipeline import EXPLAINERS, Forward, ModelError, RelevanceError, build_network, explain, resize
from pipeline.networks.classifier import Classifier
from pipeline.networks.heads import HeadSpec, attach_head
from pipeline.networks.homogeneous import bias_free
from pipeline.networks.preprocessing import PreprocessSpec
from terminal.spelling import text_of

COARSE = [name for name, explainer in EXPLAINERS.items() if explainer.coarse and explainer.stride is None]
STRIDED = [name for name, explainer in EXPLAINERS.items() if explainer.stride is not None]
TARGETS = torch.tensor([2, 0, 1])


class Residual(nn.Module):
    """A block whose last activation with positions may be in a branch of it, as a ResNet-50's can be."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.widen, self.conv = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, stride, 1)
        self.skip = nn.Conv2d(4, 4, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(torch.tanh(self.widen(x))) + self.skip(x))


class Pooled(nn.Module):
    """Nothing but functions behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 5, 3, 1, 1))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x), inplace=True).mean((2, 3)))


def plain() -> nn.Sequential:
    """Convolutions, a smooth and a kinked activation, three classes, no norm."""
    layers = {
        "conv1": nn.Conv2d(3, 4, 3, padding=1),
        "tanh": nn.Tanh(),
        "conv2": nn.Conv2d(4, 5, 3, stride=2, padding=1),
        "relu": nn.ReLU(inplace=True),
        "pool": nn.AvgPool2d(2),
        "flatten": nn.Flatten(),
        "last": nn.Linear(5 * 4, 3),
    }
    return nn.Sequential(OrderedDict(layers)).double()


def images(samples: int = 3, side: int = 8) -> Tensor:
    return torch.rand(samples, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def slow_map(name: str, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Maps of ``after(before(x))``, with the last feature maps in between, by loops and PyTorch's gradients."""
    rows = []
    for image, target in zip(x, TARGETS, strict=True):
        image = image[None].clone().requires_grad_()
        maps = before(image)
        logit = after(maps)[0, target]
        if name in ("input-gradient", "gradient-x-input"):
            (gradient,) = torch.autograd.grad(logit, image, create_graph=True)
            rows.append(gradient[0] if name == "input-gradient" else (image * gradient)[0])
            continue
        (gradient,) = torch.autograd.grad(logit, maps, create_graph=True)
        total = torch.zeros_like(maps[0, :1])
        for channel in range(maps.shape[1]):
            a = maps[0, channel]
            total = total + (a**2 if name == "attention" else gradient[0, channel].mean() * a)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["input-gradient", "gradient-x-input", "grad-cam", "attention"])
@pytest.mark.parametrize("parts", ["sequential", "residual", "functions"])
def test_maps_and_their_parameter_gradients_are_those_of_plain_double_backward(name, parts):
    if parts == "sequential":
        model = plain()
        before, after = model[:5], model[5:]
    elif parts == "residual":  # the second block has one position left, so the first one's output is meant
        front, tail = [nn.Conv2d(3, 4, 3, 4, 1), nn.Tanh(), Residual()], [Residual(stride=2), nn.Flatten()]
        model = nn.Sequential(*front, *tail, nn.Linear(4, 3)).double()
        before, after = model[:3], model[3:]
    else:
        model = Pooled().double()
        before, after = nn.Sequential(model.body, nn.ReLU()), nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), model.head)
    x = images()
    actual = Forward(model, x, name).maps(TARGETS, 0.3, create_graph=True)
    expected = slow_map(name, before, after, x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weight, parameters = torch.randn(actual.shape, dtype=torch.float64), dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(
            (maps * weight).sum() + maps.square().sum(), list(parameters.values()), materialize_grads=True
        )
        for maps in (actual, expected)
    ]
    for parameter, mine, theirs in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=lambda text, of=parameter: f"{of}: {text}")
    assert sum(bool(theirs.any()) for theirs in gradients[1]) >= 4


@pytest.mark.parametrize("name", ["grad-cam", "input-gradient", "attention"])
def test_parameter_gradients_of_a_loss_on_maps_are_finite_differences(name):
    model, x = plain(), images()
    parameters = dict(model.named_parameters())
    moving = {name for name in parameters if name.endswith("weight")} - (
        {"last.weight"} if name == "attention" else set()
    )

    def loss() -> Tensor:
        forward = Forward(model, x, name)
        return (forward.maps(TARGETS, 0.1, create_graph=True).tanh() * torch.arange(3)[:, None, None, None]).sum()

    assert_gradients_are_finite_differences(loss, parameters, moving)


@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name not in ("input-gradient", *COARSE, *STRIDED)])
def test_a_rule_set_gives_the_heatmaps_of_explain(name):
    model, x, epsilon = plain(), images(), torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    forward = Forward(model, x, name)
    logits, expected = explain(model, x, TARGETS, epsilon, rules=name)
    assert torch.equal(forward.maps(TARGETS, epsilon), expected)
    assert torch.equal(forward.logits.detach(), logits)


def test_an_input_gradient_needs_no_light():
    """As the gradient at an image, it has values where the image is black, unlike image times gradient."""
    model, x = plain(), images()
    x[:, :, :4] = 0
    gradient, product = (Forward(model, x, name).maps(TARGETS, 0.1) for name in ("input-gradient", "gradient-x-input"))
    assert torch.equal(x * gradient, product)
    assert (gradient[:, :, :4] != 0).any()


@given(seed=st.integers(0, 2**32 - 1), positive=st.booleans())
@settings(deadline=None, max_examples=20)
def test_grad_cam_behind_average_pooling_sums_to_the_logit(seed, positive):
    """Class activation mapping (Zhou et al., CVPR 2016), of which Grad-CAM is the generalisation; of either sign."""
    torch.manual_seed(seed)
    model = Pooled().double()
    model.head.register_parameter("bias", None)
    model.head.weight.data.abs_().mul_(1 if positive else -1)
    forward = Forward(model, images(), "grad-cam")
    maps = forward.maps(TARGETS, 1.0)
    logits = forward.logits.detach().gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(maps.sum((1, 2, 3)), logits)
    assert ((maps >= 0) if positive else (maps <= 0)).all()


def test_epsilon_and_class_change_just_what_knows_them():
    model, x = plain(), images()
    other = (TARGETS + 1) % 3
    for name in (name for name in EXPLAINERS if name not in STRIDED):
        forward = Forward(model, x, name)
        maps = forward.maps(TARGETS, 0.1, keep_graph=True)
        same_epsilon = torch.equal(maps, forward.maps(TARGETS, 0.9, keep_graph=True))
        same_class = torch.equal(maps, forward.maps(other, 0.1))
        assert same_epsilon == (name in ("gradient-x-input", "input-gradient", "grad-cam", "attention")), name
        assert same_class == (EXPLAINERS[name].rules is None) == (name == "attention"), name


# The last feature maps


class Tokens(nn.Module):
    """Patches as tokens, first axis the sequence, through an encoder of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, 8, 0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0))


class Aside(nn.Module):
    """The last activation is beside the way to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x).mean((2, 3)))
        self.side(x)
        return y


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 1, 1, 8, 8, num_classes=3)


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=3)


def small_convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(8, 12, 1), setting(12, 16, 1), setting(16, None, 1)], num_classes=3)


def small_resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 3)


@pytest.mark.parametrize(
    ("make", "side", "module"),
    [
        (lambda: build_network("small-cnn", 3, (3, 28, 28), free_of_biases=True)[0], 28, "pool"),
        (lambda: build_network("resnet18", 3, (3, 28, 28), free_of_biases=False)[0], 28, "layer3"),
        (small_resnet, 64, "layer4"),
        (small_resnet, 32, "layer3"),  # in layer4 a branch still has four positions
        (lambda: torchvision.models.vgg11(num_classes=3), 32, "features.19"),  # the pooling repeats one position
        (lambda: torchvision.models.squeezenet1_1(num_classes=3), 48, "classifier.2"),
        (small_swin, 16, "permute"),
        (small_convnext, 32, "features.5"),
        (small_convnext, 16, "features.4.0"),  # channels last within a block of one position
    ],
)
def test_the_last_feature_maps_are_those_that_all_is_explained_through(make, side, module):
    model, x = make().eval(), images(side=side).float()
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda module, inputs, output: seen.append(output))
    for name in COARSE:
        forward = Forward(model, x, name)
        assert forward.feature_maps is seen.pop()
        maps = forward.maps(TARGETS, 0.1)
        assert maps.shape == (3, 1, *forward.feature_maps.shape[2:])
        assert maps.shape[2:] != (1, 1)
        assert maps.any()
    hook.remove()


@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        small_vit,
        Tokens,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, 3)),
    ],
    ids=["vit", "tokens first", "linear", "one position"],
)
def test_a_network_that_ends_in_no_feature_maps_is_refused_with_what_else_there_is(make, samples, name):
    with pytest.raises(
        ModelError, match=f"the explainer '{name}' needs .* choose another explainer, such as flex"
    ) as e:
        Forward(make(), images(samples, 16).float(), name)
    assert "choose another --explainer, such as flex" in text_of(e.value)


def test_swin_of_one_position_at_its_end_is_refused_as_its_other_maps_lie_otherwise():
    with pytest.raises(ModelError, match="with more than one position"):
        Forward(small_swin().eval(), images(side=8).float(), "attention")


@pytest.mark.parametrize("name", [*COARSE, STRIDED[1]])
def test_the_feature_maps_behind_a_preprocessing_that_resizes_are_the_networks(name):
    network = small_resnet().eval()
    model, x = Classifier(network, preprocessing=PreprocessSpec((0.5,), (0.5,), size=(64, 64))), images(side=48).float()
    expected = Forward(network, F.interpolate(x, (64, 64)), name).feature_maps
    assert Forward(model, x, name).feature_maps.shape == expected.shape


def test_feature_maps_beside_the_way_to_the_logits_are_refused():
    forward = Forward(Aside(), images().float(), "grad-cam")
    with pytest.raises(RelevanceError, match="it lies on no path from the image to them"):
        forward.maps(TARGETS, 0.1)


# Feature maps of a stride


def bias_free_resnet() -> nn.Module:
    torch.manual_seed(0)
    return bias_free(torchvision.models.resnet18(num_classes=3))[0].double().eval()


@pytest.mark.parametrize(("stride", "module"), [(4, "layer1"), (8, "layer2"), (16, "layer3"), (32, "layer4")])
def test_relevance_at_a_stride_is_that_of_the_layers_behind_it_alone(stride, module):
    """As plain autograd pulls it back to the last activation of that size, and the sum of a bias-free network's is the
    logit at any depth.
    """
    model, x = bias_free_resnet(), images(side=64)
    activations: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda m, i, output: activations.append(output))
    forward = Forward(model, x, f"flex-stride{stride}")
    maps = forward.maps(TARGETS, 0.0, keep_graph=True)
    assert maps.shape == (3, 1, 64 // stride, 64 // stride)
    activations.clear()
    logits = model(x).gather(1, TARGETS[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logits.sum(), activations[0])
    torch.testing.assert_close(maps, (activations[0] * gradient).sum(1, keepdim=True).detach())
    torch.testing.assert_close(maps.sum((1, 2, 3)), logits.detach())
    assert stride == 32 or not torch.allclose(forward.maps(TARGETS, 0.5), maps)  # no ReLU stands behind the last
    hook.remove()


def test_the_second_order_of_relevance_at_a_stride_is_that_of_finite_differences():
    model, x = plain(), images()
    parameters = dict(model.named_parameters())
    assert_gradients_are_finite_differences(
        lambda: Forward(model, x, "flex-stride4").maps(TARGETS, 0.3, create_graph=True).square().sum(),
        parameters,
        moving=[name for name in parameters if name != "last.bias"],
    )


class Padded(nn.Module):
    """A block that pads its maps to the size of an earlier layer's, as EfficientNet's 5×5 convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.block = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2), PaddedBlock()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.two(self.one(x).relu())).mean((2, 3)))


class PaddedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad, self.conv = nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


def test_maps_within_a_block_do_not_hide_those_of_the_same_size_in_front_of_it():
    model, x = Padded(), images(side=16).float()  # 4×4, 2×2, and 4×4 again by padding
    forward = Forward(model, x, "flex-stride4")
    assert forward.maps(TARGETS, 0.1).shape == (3, 1, 4, 4)
    torch.testing.assert_close(forward.feature_maps, model.one(x).relu())


def test_a_stride_that_a_network_lacks_is_one_clear_error_with_those_that_it_has():
    with pytest.raises(ModelError, match=r"32 times smaller than the 28×28 pixels .* of stride 1, 2, 4") as error:
        Forward(
            build_network("small-cnn", 3, (3, 28, 28), free_of_biases=True)[0], images(side=28).float(), STRIDED[-1]
        )
    assert "choose another --explainer" in text_of(error.value)
    with pytest.raises(ModelError, match="has none"):
        Forward(nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 3)), images(side=16).float(), STRIDED[0])


# Features


class Sequence(nn.Module):
    """Its last layer sees every position."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.patches(x).flatten(2).mT).mean(1)


class Idle(nn.Module):
    """Its last layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.idle = nn.Linear(3 * 64, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(1))


@pytest.mark.parametrize("explainer", [None, "flex", "attention"])
@pytest.mark.parametrize("width", [20, 7], ids=["own width", "behind an adapter"])
def test_features_are_what_enters_the_last_layer_and_are_learnt(explainer, width):
    model = plain().float()
    attach_head(model, HeadSpec(width, bias=True), 3, tuple(images().shape[1:]), adapter_bias=False)
    model.double()
    head = model.last if width == 20 else model.last[1]
    forward = Forward(model, images(), explainer)
    assert forward.features.shape == (3, width)
    torch.testing.assert_close(head(forward.features), forward.logits)
    forward.features.square().sum().backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_features_of_positions_are_their_mean():
    model = Sequence()
    forward = Forward(model, images().float())
    torch.testing.assert_close(model.head(forward.features), forward.logits)


def test_features_of_a_convolution_at_the_end_are_the_mean_over_its_positions():
    model = torchvision.models.squeezenet1_1(num_classes=3, dropout=0)
    forward = Forward(model, images(side=64).float())
    model.classifier[2] = nn.Identity()  # the ReLU behind it, without which the mean could be taken first
    torch.testing.assert_close(
        model.classifier[1](forward.features[..., None, None]).flatten(1), model(images(side=64).float())
    )


class Bare(nn.Module):
    """It has no last layer but a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 64, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("make", [Bare, Idle])
def test_without_a_last_layer_there_are_no_features_but_all_else(make):
    forward = Forward(make(), images().float(), "gradient-x-input")
    with pytest.raises(ModelError, match="no features to match, as it does not end in a layer that they could enter"):
        _ = forward.features
    assert forward.maps(TARGETS, 0.1).any()


# The pass


def test_the_model_is_left_as_it_was_whatever_happens():
    model, _ = build_network("small-cnn", 3, (3, 16, 16), free_of_biases=False)
    model.eval()
    before = copy.deepcopy(model.state_dict())

    def fail(module: nn.Module, inputs: object) -> None:
        raise OSError("in the middle")

    for name in (None, *(name for name in EXPLAINERS if name not in STRIDED[1:])):
        forward = Forward(model, images(side=16).float(), name)
        if name is not None:
            forward.maps(TARGETS, 0.1)
        with pytest.raises(OSError, match="in the middle"), model.relu2.register_forward_pre_hook(fail):
            Forward(model, images(side=16).float(), name)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name not in STRIDED[1:]])  # small-cnn ends there
def test_every_explainer_teaches_in_training_mode_and_needs_no_gradient_to_explain(name, device):
    """A student with norms over the batch, and a teacher under no_grad and inference mode."""
    network, _ = build_network("small-cnn", 3, (3, 16, 16), free_of_biases=False)
    model, x = Classifier(network).to(device).train(), images(side=16).float().to(device)
    Forward(model, x, name).maps(TARGETS, 0.1, create_graph=True).square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients["network.conv1.weight"].any()
    assert gradients["network.norm2.weight"].any()
    model.eval()
    expected = Forward(model, x, name).maps(TARGETS, 0.1)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            forward = Forward(model, x, name)
            torch.testing.assert_close(forward.maps(TARGETS, 0.1), expected)
            assert forward.features.shape == (3, 9 * 128)
    assert not expected.requires_grad


@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name not in STRIDED[1:]])
def test_masks_reach_the_model(name):
    model = Classifier(plain(), debias="mask")
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    masks[:, :, 2:6, 2:6] = 1
    forward = Forward(model, images(), name, masks)
    torch.testing.assert_close(forward.logits, model.network(images() * masks))
    maps = forward.maps(TARGETS, 0.1)
    if not EXPLAINERS[name].coarse:
        assert not (maps * (1 - masks)).any()
    with pytest.raises(ModelError, match="needs the dataset's 'masks'"):
        Forward(model, images(), name)


def test_what_is_no_explainer_is_said_with_all_that_are():
    with pytest.raises(RelevanceError, match=r"unknown explainer 'lrp': choose one of flex, .*, attention"):
        Forward(plain(), images(), "lrp")
    with pytest.raises(ValueError, match="a pass without an explainer has no maps"):
        Forward(plain(), images()).maps(TARGETS, 0.1)


# Maps of two networks


@given(
    have=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    want=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_resized_maps_are_means_along_sides_that_shrink_and_bilinear_along_those_that_grow(have, want, seed):
    maps = torch.rand(2, 3, *have, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = maps
    for axis in (2, 3):
        rows = torch.stack(lines(rows.movedim(axis, 0), want[axis - 2]), axis)
    torch.testing.assert_close(resize(maps, want), rows)


def lines(values: Tensor, size: int) -> list[Tensor]:
    """One axis, the first, in ``size`` positions."""
    have, resized = len(values), []
    for position in range(size):
        if size <= have:
            resized.append(values[position * have // size : -(-(position + 1) * have // size)].mean(0))
        else:
            at = min(max((position + 0.5) * have / size - 0.5, 0), have - 1)
            below = int(at)
            resized.append(values[below] * (1 - at + below) + values[min(below + 1, have - 1)] * (at - below))
    return resized


def test_resizing_is_differentiable_and_leaves_what_fits():
    maps = images()[:, :1].requires_grad_()
    assert torch.equal(resize(maps, (8, 8)), maps)
    for size in ((3, 5), (12, 3)):
        assert torch.autograd.gradcheck(lambda m, size=size: resize(m, size), maps)
