"""What the relevance engine promises."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import oracles
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.core import Composite
from zennit.rules import Epsilon, Norm, Pass

from pipeline import RelevanceError, ScaleNorm, Trace, bias_free, explain, rule_for, stop_relevance
from pipeline.rules import RULES


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def plain_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 5),
    )


def vgg11_bn() -> nn.Module:
    """With batch norms that do something."""
    model = torchvision.models.vgg11_bn(num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model


def zennit_epsilon(model: nn.Module, images: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """LRP-ε by zennit: no stabiliser at the explained logit, batch norms folded beforehand, Norm on pooling."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

    def rule(ctx: dict, name: str, module: nn.Module) -> object:
        if isinstance(module, nn.Conv2d | nn.Linear):
            return Epsilon(epsilon=1e-30 if module is last else epsilon)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return Norm(stabilizer=1e-30)
        return Pass() if isinstance(module, nn.ReLU) else None

    with Gradient(model, Composite(module_map=rule)) as attributor:
        logits = model(images).detach()
        output = F.one_hot(targets, logits.shape[1]).to(logits) * logits
        return attributor(images, output)[1].detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("epsilon", [0.01, 0.5])
@pytest.mark.parametrize("network", ["plain", "vgg11_bn"])
def test_heatmap_equals_zennits_lrp_epsilon(network, epsilon, dtype, tolerance):
    torch.manual_seed(0)
    model = (plain_cnn() if network == "plain" else vgg11_bn()).to(dtype)
    peer = model if network == "plain" else oracles.folded(model)
    images = torch.rand(2, 3, 8, 8, dtype=dtype) if network == "plain" else torch.rand(2, 3, 64, 64, dtype=dtype)
    targets = torch.tensor([3, 1])
    _, heatmaps = explain(model, images, targets, epsilon)
    assert relative_error(heatmaps, zennit_epsilon(peer, images, targets, epsilon)) < tolerance


@pytest.mark.parametrize("epsilon", [0.001, 0.1, 2.0])
def test_heatmap_equals_the_rule_written_out_slowly(epsilon):
    torch.manual_seed(1)
    model = plain_cnn().double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    _, heatmaps = explain(model, images, torch.tensor([0, 4]), epsilon)
    head = nn.Sequential(model[4], model[5])
    for image, heatmap, target in zip(images, heatmaps, (0, 4), strict=True):
        expected = oracles.lrp_epsilon([model[0], model[2], head], image, target, epsilon)
        assert relative_error(heatmap, expected) < 1e-12


def test_epsilon_and_class_belong_to_each_image():
    torch.manual_seed(0)
    model, images = plain_cnn(), torch.rand(3, 3, 8, 8)
    targets, epsilons = torch.tensor([0, 3, 1]), torch.tensor([0.01, 0.3, 0.0])
    _, together = explain(model, images, targets, epsilons)
    for i in range(3):
        _, alone = explain(model, images[i : i + 1], targets[i : i + 1], float(epsilons[i]))
        torch.testing.assert_close(together[i], alone[0])


MODELS = ["resnet18", "vgg11", "vgg11_bn", "densenet121", "alexnet", "googlenet", "squeezenet1_1"]
MODELS += ["shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf", "resnext50_32x4d"]


@pytest.mark.parametrize("name", MODELS)
def test_unmodified_torchvision_models_work_and_epsilon_zero_is_gradient_times_input(name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=10, **options).eval()
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([3, 7])
    logits, heatmaps = explain(model, images, targets, 0.0)
    leaf = images.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[0, 3] + output[1, 7], leaf)
    torch.testing.assert_close(logits, output.detach())
    assert relative_error(heatmaps, images * gradient) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121"])
def test_a_student_of_every_family_gets_a_gradient_for_every_weight(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).train()
    _, heatmaps = explain(model, torch.rand(2, 3, 64, 64), torch.tensor([3, 7]), 0.05, create_graph=True)
    heatmaps.abs().mean().backward()
    last = [n for n, _ in model.named_parameters() if n.endswith("bias")][-1]  # adds the same to every heatmap: nothing
    for parameter_name, parameter in model.named_parameters():
        if parameter_name != last:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name


def test_relevance_is_conserved_without_additive_terms():
    torch.manual_seed(0)
    model, _ = bias_free(torchvision.models.resnet18(num_classes=10))
    model.double().eval()
    images, targets = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5, 9])
    logits, heatmaps = explain(model, images, targets, 0.0)
    torch.testing.assert_close(heatmaps.sum((1, 2, 3)), logits[range(3), targets])


class Residual(nn.Module):
    """All kinds of layers that matter for the second order, small enough for finite differences."""

    def __init__(self, norm: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm1 = norm(4)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2)
        self.norm2 = norm(4)
        self.same = nn.Conv2d(4, 4, (2, 3), padding="same", bias=False)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(x, 2)
        y = F.relu(self.norm2(self.strided(x)), inplace=True)
        y = self.up(y)[:, :, : x.shape[2], : x.shape[3]]
        x = (x + self.same(y)).relu_()
        x = F.avg_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ScaleNorm])
def test_gradient_of_the_heatmap_loss_equals_finite_differences(norm, mode):
    from trainer import heatmap_loss

    torch.manual_seed(3)
    model = Residual(norm).double().train(mode == "train")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(*((-0.1, 0.1) if name.endswith("mean") else (0.5, 1.5)))
    images, teacher = torch.rand(3, 2, 10, 10).double(), torch.randn(3, 2, 10, 10).double()
    targets, epsilon = torch.tensor([0, 2, 1]), torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())

    def loss() -> Tensor:
        model.load_state_dict({**model.state_dict(), **{k: v for k, v in state.items() if k not in parameters}})
        _, heatmaps = explain(model, images, targets, epsilon, create_graph=True)
        return heatmap_loss(heatmaps, teacher).sum()

    parameters = dict(model.named_parameters())
    weights = [name for name in parameters if name.endswith("weight")]
    oracles.assert_gradients_are_finite_differences(loss, parameters, moving=weights)


def test_gradient_at_the_images_is_there_for_those_who_ask():
    torch.manual_seed(0)
    model, images = plain_cnn().double(), torch.rand(2, 3, 8, 8).double().requires_grad_()
    targets = torch.tensor([1, 2])
    assert torch.autograd.gradcheck(lambda x: explain(model, x, targets, 0.1, create_graph=True)[1], images)


def test_a_third_derivative_is_refused_rather_than_wrong():
    model, images = plain_cnn(), torch.rand(2, 3, 8, 8)
    _, heatmaps = explain(model, images, torch.tensor([1, 2]), 0.1, create_graph=True)
    (gradient,) = torch.autograd.grad(heatmaps.square().sum(), model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        gradient.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        torch.autograd.grad(gradient.sum(), model[2].weight)


def test_a_relu_in_place_on_a_view_is_explained_like_any_other():
    torch.manual_seed(0)
    first, last = nn.Linear(12, 8), nn.Linear(8, 3)

    def model(x: Tensor) -> Tensor:
        hidden = first(x.flatten(1)).view(-1, 2, 4)
        return last(F.relu(hidden, inplace=True).flatten(1))

    images = torch.randn(3, 3, 2, 2)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(explain(model, images, torch.tensor([1, 1, 1]), 0.0)[1], images * gradient)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["compiled", "compiled and warm", "a part compiled"])
def test_a_compiled_model_has_the_heatmap_of_the_model(how):
    torch.manual_seed(0)
    model, images, targets = plain_cnn(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    expected = explain(model, images, targets, 0.5)[1]
    if how == "a part compiled":
        model[0].compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    if how == "compiled and warm":
        compiled(images)
    torch.testing.assert_close(explain(compiled, images, targets, 0.5)[1], expected)


def test_a_model_that_changes_its_input_in_place_is_explained_and_the_images_stay():
    torch.manual_seed(0)
    body, images, targets = plain_cnn(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])

    def centre(x: Tensor) -> Tensor:
        x -= 0.5
        return body(F.relu(x, inplace=True))

    expected = explain(lambda x: body(F.relu(x - 0.5)), images, targets, 0.1)[1]
    for given in (images, images.clone().requires_grad_() * 1):
        before = given.detach().clone()
        assert torch.equal(explain(centre, given, targets, 0.1)[1], expected)
        assert torch.equal(given.detach(), before)


class TimeFirst(nn.Module):
    """Its ReLU sees (T, N, 6), back and forth by different operations."""

    def __init__(self, forth, back):
        super().__init__()
        self.first, self.last, self.forth, self.back = nn.Linear(8, 6), nn.Linear(18, 4), forth, back

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.back(F.relu(self.first(self.forth(x)))).flatten(1))


@pytest.mark.parametrize(
    "axes",
    [
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
        (lambda x: x.permute(1, 0, 2), lambda x: torch.permute(x, (1, 0, 2))),
        (lambda x: x.permute(2, 1, 0).transpose(-3, -1).swapaxes(0, 1), lambda x: x.transpose(1, 0)),
    ],
)
def test_each_image_has_its_own_epsilon_where_the_batch_is_not_the_first_axis(axes):
    torch.manual_seed(0)
    model, images = TimeFirst(*axes), torch.randn(3, 3, 8)  # as many steps as images: shapes tell nothing
    targets, epsilons = torch.tensor([0, 1, 3]), torch.tensor([0.0, 0.1, 1.0])
    together = explain(model, images, targets, epsilons)[1]
    for i in range(3):
        torch.testing.assert_close(together[i], explain(model, images, targets, float(epsilons[i]))[1][i])


def test_an_epsilon_for_each_image_is_refused_where_the_batch_axis_is_lost():
    model = TimeFirst(lambda x: x.transpose(0, 1).flatten(0, 1), lambda x: x.unflatten(0, (3, 3)).transpose(0, 1))
    images, targets = torch.randn(3, 3, 8), torch.tensor([0, 1, 3])
    with pytest.raises(RelevanceError, match="epsilon cannot differ between images: give one for all"):
        explain(model, images, targets, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.isfinite(explain(model, images, targets, 0.1)[1]).all()
    assert torch.isfinite(explain(model, images, targets, torch.tensor([0.1, 0.1, 0.1]))[1]).all()


def test_half_precision_neither_overflows_nor_vanishes_where_the_map_does_not():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).half()
    for first, last, x in ((300.0, [300.0, -299.0], 1.0), (1.0, [0.01, 0.02], 1e-3)):
        model[0].weight.data.fill_(first)
        model[2].weight.data.copy_(torch.tensor([last]))
        images = torch.full((1, 1), x).half()
        for epsilon in (0.0, 0.01):
            found = explain(model, images, torch.tensor([0]), epsilon)[1].float()
            expected = explain(copy.deepcopy(model).float(), images.float(), torch.tensor([0]), epsilon)[1]
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("create_graph", [False, True])
def test_no_images_have_no_heatmaps(create_graph):
    model, images = vgg11_bn().float(), torch.rand(0, 3, 32, 32)
    for epsilon in (0.1, torch.rand(0)):
        logits, heatmaps = explain(model, images, torch.zeros(0, dtype=torch.long), epsilon, create_graph)
        assert heatmaps.shape == images.shape
        assert len(logits) == 0
    if create_graph:
        (heatmaps.sum() + logits.sum()).backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_batch_of_one_value_does_not_poison_a_batch_norm():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        explain(model, torch.randn(1, 4), torch.tensor([0]), 0.1)
    assert torch.isfinite(model[1].running_var).all()


def test_shapes_and_types_may_be_taken_from_an_activation():
    torch.manual_seed(0)
    body, weight = plain_cnn(), nn.Parameter(torch.rand(3, 1, 1))
    images, targets = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    expected = explain(lambda x: body(x * weight / 2), images, targets, 0.1)[1]
    found = explain(lambda x: body(torch.div(input=x * weight.expand_as(x).to(x), other=2)), images, targets, 0.1)[1]
    torch.testing.assert_close(found, expected)


def test_the_true_gradient_is_untouched():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().train()
    images, labels = torch.rand(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 3])
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(images), labels).backward()
    logits, _ = explain(model, images, labels, 0.3, create_graph=True)
    F.cross_entropy(logits, labels).backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_model_is_left_as_it_was():
    model = torchvision.models.resnet18(num_classes=10).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    explain(model, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == types
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_draws_of_one_trace_share_the_forward_pass_and_equal_separate_explanations():
    torch.manual_seed(0)
    model, images = plain_cnn(), torch.rand(2, 3, 8, 8)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    trace = Trace(model, images)
    maps = [trace.heatmaps(torch.tensor([c, c]), e, keep_graph=True) for c, e in ((0, 0.1), (3, 0.5), (0, 0.1))]
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(maps[1], explain(model, images, torch.tensor([3, 3]), 0.5)[1])


def test_passes_in_many_threads_do_not_disturb_each_other():
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=10).eval(), torch.rand(2, 3, 32, 32)
    epsilons = [0.0, 0.01, 0.1, 1.0]
    expected = [explain(model, images, torch.tensor([1, 2]), e)[1] for e in epsilons]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(explain(model, images, torch.tensor([1, 2]), epsilons[i])[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for heatmaps in found[i]:
            assert relative_error(heatmaps, expected[i]) < 1e-5


def test_a_model_may_explain_another_on_its_way():
    torch.manual_seed(0)
    inner, outer, images = plain_cnn(), plain_cnn(), torch.rand(2, 3, 8, 8)
    targets = torch.tensor([0, 1])
    alone = explain(outer, images, targets, 0.1)[1]
    inner_maps = []
    outer[1].register_forward_hook(lambda *_: inner_maps.append(explain(inner, images, targets, 0.5)[1]))
    assert torch.equal(explain(outer, images, targets, 0.1)[1], alone)
    assert torch.equal(inner_maps[0], explain(inner, images, targets, 0.5)[1])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_explaining_works_where_gradients_are_off(context):
    torch.manual_seed(0)
    model, images = plain_cnn(), torch.rand(2, 3, 8, 8)
    expected = explain(model, images, torch.tensor([0, 1]), 0.1)[1]
    with context():
        found = explain(model, images.clone(), torch.tensor([0, 1]), 0.1)[1]
        connected = explain(model, images.clone(), torch.tensor([0, 1]), 0.1, create_graph=True)[1]
    assert torch.equal(found, expected)
    assert connected.requires_grad


def test_nothing_of_a_pass_stays_in_memory():
    model, images = plain_cnn(), torch.rand(2, 3, 8, 8)
    gc.disable()
    try:
        logits, heatmaps = explain(model, images, torch.tensor([0, 1]), 0.1, create_graph=True)
        heatmaps.sum().backward()
        seen = [weakref.ref(logits), weakref.ref(heatmaps)]
        del logits, heatmaps
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


class Unsupported(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.body = plain_cnn()
        self.block = nn.Identity()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.operation(x))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g


UNKNOWN = {
    "exponential": (torch.exp, "torch.exp"),
    "in-place": (lambda x: (x + 0).exp_(), "torch.Tensor.exp_"),
    "power of an activation": (lambda x: x ** x.mean(), "with the exponent a tensor"),
    "logarithm of the softmax": (lambda x: F.log_softmax(x, 1), "torch.nn.functional.log_softmax"),
    "layer norm by the image": (lambda x: F.layer_norm(x, x.shape[3:], x[0, 0, 0]), "with weights that depend"),
    "dynamic weights": (lambda x: F.conv2d(x, x[:3, :, :1, :1]), "with weights that depend on the image"),
    "conditional batch norm": (lambda x: F.batch_norm(x, None, None, x.mean((0, 2, 3)), training=True), "with weights"),
    "rounded quotient": (lambda x: torch.div(x, 0.1, rounding_mode="floor"), "with rounding_mode='floor'"),
    "custom autograd function": (lambda x: x + Cube.apply(x), "hides from the tracer"),
    "written into a buffer": (lambda x: x + torch.zeros_like(x.detach()).copy_(x), "torch.Tensor.copy_"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_operation_without_a_rule_is_named_and_never_passed_over(case):
    operation, name = UNKNOWN[case]
    with pytest.raises(RelevanceError, match="no relevance rule") as error:
        explain(Unsupported(operation), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2]), 0.1)
    assert name in str(error.value)
    assert "Unsupported" in str(error.value)


@pytest.mark.parametrize("case", ["custom autograd function", "written into a buffer"])
def test_what_hides_is_seen_with_images_that_have_a_history_too(case):
    images = torch.rand(3, 3, 8, 8).requires_grad_() * 1
    with pytest.raises(RelevanceError, match="no relevance rule"):
        explain(Unsupported(UNKNOWN[case][0]), images, torch.tensor([0, 1, 2]), 0.1)


def test_what_is_written_into_a_slice_has_its_relevance():
    def shifted(x: Tensor) -> Tensor:
        canvas = torch.zeros(x.shape)
        canvas[:, :, 1:] = x[:, :, :-1]
        canvas[:, 0] = canvas[:, 1] + F.relu(x[:, 2])
        return canvas

    def written_out(x: Tensor) -> Tensor:
        canvas = F.pad(x[:, :, :-1], (0, 0, 1, 0))
        return torch.cat([canvas[:, 1:2] + F.relu(x[:, 2:]), canvas[:, 1:]], dim=1)

    torch.manual_seed(0)
    body, images, targets = plain_cnn(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    maps = [explain(lambda x: body(f(x)), images, targets, 0.1)[1] for f in (shifted, written_out)]  # noqa: B023
    torch.testing.assert_close(*maps)


def test_what_is_written_into_a_view_is_not_passed_over():
    def operation(x: Tensor) -> Tensor:
        canvas = torch.zeros(x.shape)
        canvas[:, :1][:, :, 1:] = x[:, :1, 1:]
        return canvas

    with pytest.raises(RelevanceError):
        explain(Unsupported(operation), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 0.1)


def test_an_unknown_activation_is_named_with_its_module():
    model = torchvision.models.efficientnet_b0(num_classes=10).eval()
    model.features[0][2] = nn.LogSigmoid()
    with pytest.raises(RelevanceError, match=r"logsigmoid, in module 'features.0.2' \(LogSigmoid\)"):
        explain(model, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), 0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_code_which_cannot_be_seen_is_refused():
    model = nn.Sequential(torch.jit.trace(plain_cnn(), torch.rand(2, 3, 8, 8)))
    with pytest.raises(RelevanceError):
        explain(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 0.1)


def test_a_rule_can_be_added_for_an_operation():
    def double(x: Tensor) -> Tensor:
        return torch.exp2(torch.log2(x.clamp_min(1e-9)) + 1)

    @rule_for(torch.exp2)
    def exp2(trace, func, x):
        return 3 * x

    try:
        with pytest.raises(RelevanceError, match="log2"):
            explain(Unsupported(double), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 0.1)
        model, images = plain_cnn(), torch.rand(2, 3, 8, 8)
        mine = explain(nn.Sequential(Unsupported(torch.exp2)), images, torch.tensor([0, 1]), 0.1)
        assert mine[1].shape == model(images).shape[:1] + images.shape[1:]
    finally:
        del RULES[torch.exp2]


def test_shapes_comparisons_and_weight_arithmetic_need_no_rule():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain_cnn()
            self.weight = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 3
            assert bool((x >= 0).all())
            scale = torch.sigmoid(self.weight).exp() + x.detach().square().mean()
            return self.body(x * scale)

    model, images = Careful(), torch.rand(2, 3, 8, 8)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    found = explain(model, images, torch.tensor([0, 0]), 0.0)[1]
    torch.testing.assert_close(found, images * gradient)


def test_stopped_relevance_is_a_constant_in_the_map_and_connected_in_the_outer_gradient():
    torch.manual_seed(0)
    weight = torch.rand(3, 1, 1, dtype=torch.float64, requires_grad=True)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        x = x * weight
        return (x / stop_relevance(x).amax((1, 2, 3), keepdim=True)).mean((2, 3))

    _, heatmaps = explain(model, images, torch.tensor([0, 2]), 0.0, create_graph=True)
    largest = (images * weight).amax((1, 2, 3))
    expected = images[0, 0] * weight[0] / largest[0] / 16
    torch.testing.assert_close(heatmaps[0, 0], expected)
    (found,) = torch.autograd.grad(heatmaps[0, 0].sum(), weight)
    (wanted,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(stop_relevance(images), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_class": torch.tensor([0, 5])}, "target_class 5 is outside the model's 5 classes"),
        ({"target_class": torch.tensor([0, -1])}, "target_class -1"),
        ({"target_class": torch.tensor([0.0, 1.0])}, "one integer for each of the 2 images"),
        ({"target_class": torch.tensor([0])}, "one integer for each of the 2 images"),
        ({"epsilon": -0.1}, "epsilon must be 0 or more, and finite, got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be 0 or more"),
        ({"epsilon": torch.tensor([0.1, float("inf")])}, "epsilon must be 0 or more, and finite, got inf"),
        ({"epsilon": torch.rand(3)}, r"epsilon must be a number or have shape \(2,\)"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "divide uint8 images by 255"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(change, message):
    arguments = {"images": torch.rand(2, 3, 8, 8), "target_class": torch.tensor([0, 1]), "epsilon": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        explain(plain_cnn(), **arguments)


def test_a_model_that_returns_no_logits_is_refused():
    with pytest.raises(ValueError, match="must return logits of shape"):
        explain(nn.Conv2d(3, 3, 1), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 0.1)


def test_a_heatmap_is_the_same_on_every_device(device):
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=10).eval().double(), torch.rand(2, 3, 32, 32).double()
    targets, epsilon = torch.tensor([1, 2]), torch.tensor([0.01, 0.2])
    expected = explain(model, images, targets, epsilon)[1]
    found = explain(model.to(device), images.to(device), targets, epsilon)[1]
    assert relative_error(found.cpu(), expected) < 1e-8
