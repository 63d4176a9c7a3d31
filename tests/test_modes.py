"""The engine under PyTorch's other machinery: memory formats, autocast, distributed training, checkpointing."""

from __future__ import annotations

import copy
import functools
import gc
import socket
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline import Trace, explain
from trainer import heatmap_loss


def batch(samples: int = 4, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(samples, 3, side, side), torch.arange(samples) % 10, torch.linspace(0.05, 0.5, samples)


def step(model: nn.Module, images: Tensor, target_class: Tensor, epsilon: Tensor) -> Tensor:
    """One student step without the optimiser; returns the heatmaps."""
    torch.manual_seed(2)  # for dropout
    _, heatmaps = explain(model, images, target_class, epsilon, create_graph=True)
    teacher = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).to(images)
    heatmap_loss(heatmaps.to(images), teacher).mean().backward()
    return heatmaps.detach()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_channels_last_gives_the_same_maps_and_gradients(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).double().train()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images, target_class, epsilon = batch()
    images = images.double()
    expected = step(model, images, target_class, epsilon)
    found = step(twin, images.contiguous(memory_format=torch.channels_last), target_class, epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(twin), gradients(model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "alike"), [("resnet18", 0.9), ("vit_b_32", 0.99)])
def test_autocast_runs_the_layers_in_bfloat16_and_stays_close(name, alike):
    torch.manual_seed(0)
    options = {"image_size": 64} if name == "vit_b_32" else {}
    model = torchvision.models.get_model(name, num_classes=10, **options).train()
    nn.init.normal_(list(model.modules())[-1].weight, std=0.02)  # that of the ViT starts at zero
    twin = copy.deepcopy(model)
    images, target_class, epsilon = batch(8, side=64)
    seen = []
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = step(model, images, target_class, epsilon)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(twin, images, target_class, epsilon)
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in twin.parameters())
    assert cosine(found, expected) > alike
    assert cosine(gradients(twin), gradients(model)) > alike - 0.2


def test_autocast_leaves_grouped_convolutions_on_a_cpu_in_float32():
    torch.manual_seed(0)
    groups = (1, 8, 2)
    layers = [nn.Conv2d(3 if number == 0 else 8, 8, 3, groups=of) for number, of in enumerate(groups)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten(), nn.Linear(32, 4))
    images, target_class, epsilon = batch(side=8)
    expected = explain(model, images, target_class % 4, epsilon)[1]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _, found = explain(model, images, target_class % 4, epsilon, create_graph=True)
    found.square().sum().backward()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert cosine(found.detach(), expected) > 0.99
    assert all(layer.weight.grad.dtype == torch.float32 for layer in layers)


def test_autocast_leaves_double_precision_alone():
    images, target_class, epsilon = batch(side=8)
    model = _network()
    expected = explain(model, images.double(), target_class, epsilon)
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(model, images.double(), target_class, epsilon)
    torch.testing.assert_close(found, expected)


def _two_in_parallel(rank: int, directory: str, port: int, find_unused: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(_network(), find_unused_parameters=find_unused)
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # a second step fails where the first left a parameter waiting
        model.zero_grad()
        step_of_squares(model, mine)
    torch.save(gradients(model), Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 36, 10)]
    return nn.Sequential(*layers).double().eval()


def step_of_squares(model: nn.Module, mine: slice) -> None:
    images, target_class, epsilon = (values[mine] for values in batch(side=8))
    explain(model, images.double(), target_class, epsilon, create_graph=True)[1].square().mean().backward()


@pytest.mark.parametrize("find_unused", [False, True])
def test_distributed_data_parallel_has_the_gradients_of_the_whole_batch(tmp_path, find_unused):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_two_in_parallel, (str(tmp_path), port, find_unused), nprocs=2)
    whole = _network()
    step_of_squares(whole, slice(None))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][: len(gradients(whole))], gradients(whole))


def _checkpointed_resnet(model: nn.Module) -> nn.Module:
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _checkpointed_densenet(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = True
    return model


def _checkpointed_vit(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize(
    ("make", "checkpointed"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), _checkpointed_resnet),
        (lambda: torchvision.models.densenet121(num_classes=10), _checkpointed_densenet),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10), _checkpointed_vit),
    ],
    ids=["blocks of a resnet", "torchvision's memory-efficient densenet", "timm's checkpointing"],
)
def test_checkpointed_blocks_are_recomputed_with_the_rules(make, checkpointed):
    torch.manual_seed(0)
    model = make().double().train()
    twin = checkpointed(copy.deepcopy(model))
    images, target_class, epsilon = batch()
    expected = step(model, images.double(), target_class, epsilon)
    found = step(twin, images.double(), target_class, epsilon)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(twin), gradients(model))


def test_a_checkpointed_pass_leaves_nothing_in_memory():
    model = _checkpointed_resnet(torchvision.models.resnet18(num_classes=10)).eval()
    images, target_class, epsilon = batch(2)
    gc.collect()
    gc.disable()
    try:
        trace = Trace(model, images)
        trace.heatmaps(target_class, epsilon, keep_graph=True)
        seen = weakref.ref(trace.logits)
        del trace
        assert seen() is None
    finally:
        gc.enable()
