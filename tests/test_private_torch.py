"""Each private or undocumented part of PyTorch still does what we rely on."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline import private_torch
from pipeline.private_torch import (
    NODES_THAT_RETURN_THEIR_INPUT,
    ONE_VALUE_PER_CHANNEL_MESSAGE,
    OUT_OF_MEMORY_MESSAGES,
    BatchNormBase,
    aten_convolution,
    base_of,
    batch_norm_update_stats,
    collate,
    compiler_is_loaded,
    convolution_backward,
    current_backward_pass,
    default_collate_fn_map,
    gelu_backward,
    hardswish_backward,
    hardtanh_backward,
    has_gradient_hooks,
    is_view,
    native_batch_norm,
    native_batch_norm_backward,
    native_layer_norm,
    running_checkpoint,
    saved_tensors_go_elsewhere,
    silu_backward,
    threshold_backward,
    unsafe_view,
)

ROOT = Path(__file__).parents[1]


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_no_other_module_uses_private_parts():
    private = re.compile(
        r"torch\._(?!_)|\bnn\.modules\b|torch\.ops\b|\b_C\.|\b_is_view\b|\b_backward_hooks\b|\b_ConvNd\b"
    )
    modules = [path for folder in ("pipeline", "trainer") for path in (ROOT / folder).rglob("*.py")]
    assert len(modules) > 50
    users = {path.name for path in modules if private.search(path.read_text(encoding="utf-8"))}
    assert users == {"private_torch.py"}


def test_every_part_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    parts = [
        name
        for name, part in vars(private_torch).items()
        if name[0] != "_" and not inspect.ismodule(part) and name not in ("annotations", "Any", "FrameType", "Tensor")
    ]
    assert len(parts) == 25
    assert [name for name in parts if len(re.findall(rf"\b{name}\b", source)) < 2] == []


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_and_its_backward(transposed):
    x, weight = _values(2, 4, 7, 7).requires_grad_(), _values(4, 4, 3, 3, seed=1).requires_grad_()
    options = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], 1)
    output = aten_convolution(x, weight, None, *options)
    function = F.conv_transpose2d if transposed else F.conv2d
    expected = function(x, weight, None, 2, 1)
    torch.testing.assert_close(output, expected)
    g = _values(*expected.shape, seed=2)
    gradients = convolution_backward(g, x, weight, None, *options, [True, True, False])
    torch.testing.assert_close(gradients[:2], torch.autograd.grad(expected, (x, weight), g))
    assert gradients[2] is None


def test_threshold_backward_is_the_gradient_of_a_relu():
    x, g = _values(5, 5), _values(5, 5, seed=1)
    x[0] = 0
    torch.testing.assert_close(threshold_backward(g, x.relu(), 0), g * (x > 0))


@pytest.mark.parametrize(
    ("function", "backward"),
    [
        (F.silu, silu_backward),
        (F.hardswish, hardswish_backward),
        (partial(F.hardtanh, min_val=0.0, max_val=0.7), partial(hardtanh_backward, min_val=0, max_val=0.7)),
        (F.gelu, gelu_backward),
        (partial(F.gelu, approximate="tanh"), partial(gelu_backward, approximate="tanh")),
    ],
)
def test_backward_operators_of_activations(function, backward):
    x, g = _values(4, 3, 2).requires_grad_(), _values(4, 3, 2, seed=1)
    torch.testing.assert_close(backward(g, x.detach()), torch.autograd.grad(function(x), x, g)[0])


@pytest.mark.parametrize("training", [True, False])
def test_native_batch_norm_and_its_backward(training):
    z, gamma, beta = (_values(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(4, 3, 2), (3,), (3,)]))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    running, expected_running = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    output, batch_mean, inverse = native_batch_norm(z, gamma, beta, *running, training, 0.1, 1e-5)
    expected = F.batch_norm(z, *expected_running, gamma, beta, training, 0.1, 1e-5)
    torch.testing.assert_close((output, *running), (expected, *expected_running))
    if training:
        torch.testing.assert_close(batch_mean, z.mean((0, 2)))
        torch.testing.assert_close(inverse, torch.rsqrt(z.var((0, 2), correction=0) + 1e-5))
    g = _values(4, 3, 2, seed=3)
    statistics = (None, None, batch_mean, inverse) if training else (mean, var, None, None)
    gradients = native_batch_norm_backward(g, z, gamma, *statistics, training, 1e-5, [True, True, True])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (z, gamma, beta), g))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_have_the_dtype_of_the_running_ones(dtype):
    z = _values(4, 3, 2).to(dtype)
    running_mean, running_var = (torch.zeros(3, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    mean, var = batch_norm_update_stats(z, running_mean, running_var, 0.5)
    assert mean.dtype == var.dtype == running_mean.dtype
    torch.testing.assert_close(mean, z.to(mean.dtype).mean((0, 2)))
    torch.testing.assert_close(var, z.to(var.dtype).var((0, 2), correction=0))
    torch.testing.assert_close(running_mean, 0.5 * mean)


def test_unsafe_view_is_no_view_so_that_it_may_be_changed_in_place():
    class Reshaped(Function):
        @staticmethod
        def forward(ctx, x):
            return unsafe_view(x * 2, [6])

        @staticmethod
        def backward(ctx, g):
            return 2 * g.view(2, 3)

    x = torch.ones(2, 3, requires_grad=True)
    output = Reshaped.apply(x)
    output.mul_(3)
    output.sum().backward()
    assert output.tolist() == [6] * 6
    assert x.grad.tolist() == [[6] * 3] * 2


def test_current_backward_pass_numbers_the_backward_passes():
    numbers: list[int] = []

    class Noted(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            numbers.append(current_backward_pass())
            return g

    output = Noted.apply(Noted.apply(torch.ones(1, requires_grad=True)))
    output.backward(retain_graph=True)
    output.backward()
    first, same, second, same_again = numbers
    assert first == same
    assert second == same_again
    assert len({-1, first, second}) == 3
    assert current_backward_pass() == -1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_batch_norm_base_is_that_of_all_norms_over_the_batch(norm):
    assert issubclass(norm, BatchNormBase)
    assert not any(issubclass(other, BatchNormBase) for other in (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d))


def test_batch_norm_base_asks_a_derived_class_to_check_the_input():
    class Norm(BatchNormBase):
        def _check_input_dim(self, input):
            if input.dim() != 5:
                raise ValueError("this is the check")

    with pytest.raises(ValueError, match="this is the check"):
        Norm(3)(torch.ones(2, 3))
    assert Norm(3).eval()(torch.ones(2, 3, 1, 1, 1)).shape == (2, 3, 1, 1, 1)


def test_nodes_that_return_their_input_are_those_of_distributed_data_parallel():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 2)
        output = DistributedDataParallel(layer, find_unused_parameters=True)(torch.ones(1, 2))
    finally:
        dist.destroy_process_group()
    assert output.grad_fn.name() in NODES_THAT_RETURN_THEIR_INPUT
    assert torch.equal(output, layer(torch.ones(1, 2)))
    parents = [parent.name() for parent, _ in output.grad_fn.next_functions if parent is not None]
    assert parents == ["AddmmBackward0"]


def test_out_of_memory_messages_have_that_of_the_c_library():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    assert any(part in str(error.value) for part in OUT_OF_MEMORY_MESSAGES)
    assert not isinstance(error.value, torch.OutOfMemoryError)


def test_one_value_per_channel_message_is_that_of_a_batch_norm():
    with pytest.raises(ValueError, match=ONE_VALUE_PER_CHANNEL_MESSAGE) as error:
        nn.BatchNorm1d(3)(torch.ones(1, 3))
    assert str(error.value).startswith(ONE_VALUE_PER_CHANNEL_MESSAGE)


def test_collate_asks_the_function_of_a_type_in_the_table_of_the_default():
    class Item(dict):
        pass

    items = [Item(number=1), Item(number=2)]
    default_collate_fn_map[Item] = lambda batch, *, collate_fn_map: [len(batch), collate_fn_map is not None]
    try:
        assert torch.utils.data.default_collate(items) == [2, True]
    finally:
        del default_collate_fn_map[Item]
    assert collate([{"number": 1}], collate_fn_map=default_collate_fn_map)["number"].tolist() == [1]


def test_has_gradient_hooks_tells_of_hooks_while_they_are_there():
    tensor = torch.ones(2, requires_grad=True) * 2
    assert not has_gradient_hooks(tensor)
    tensor.retain_grad()
    assert not has_gradient_hooks(tensor)
    hook = tensor.register_hook(lambda gradient: gradient)
    assert has_gradient_hooks(tensor)
    hook.remove()
    assert not has_gradient_hooks(tensor)


def test_compiler_is_loaded_once_a_function_is_compiled():
    code = "from pipeline import private_torch; assert not private_torch.compiler_is_loaded()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert compiler_is_loaded()


def test_base_of_is_the_tensor_at_the_root_whose_node_an_operation_in_place_on_a_view_replaces():
    base = torch.rand(4, requires_grad=True) * 1
    view, node = base[:2][1:], base.grad_fn
    assert base_of(view) is base
    assert base_of(base) is None
    view.mul_(2)
    assert base.grad_fn is not node
    assert view.grad_fn.next_functions[0][0] is base.grad_fn


def test_is_view_tells_views_from_other_tensors():
    tensor = torch.ones(4)
    assert not is_view(tensor)
    assert is_view(tensor.view(2, 2))
    assert not is_view(unsafe_view(tensor, [2, 2]))


def test_native_layer_norm_returns_the_statistics_too():
    x, gamma, beta = _values(2, 3, 4, 5), _values(4, 5, seed=1), _values(4, 5, seed=2)
    output, mean, inverse = native_layer_norm(x, [4, 5], gamma, beta, 1e-5)
    torch.testing.assert_close(output, F.layer_norm(x, [4, 5], gamma, beta, 1e-5))
    torch.testing.assert_close(mean, x.mean((2, 3), keepdim=True))
    variance = x.var((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(inverse, torch.rsqrt(variance + 1e-5))


def test_it_is_known_whether_saved_tensors_go_elsewhere():
    seen = []

    def function(x):
        seen.append(saved_tensors_go_elsewhere())
        return x * 2

    x = torch.ones(1, requires_grad=True)
    function(x)
    checkpoint(function, x, use_reentrant=False)
    function(x)
    assert seen == [False, True, False]


class TestRunningCheckpoint:
    def test_it_is_none_outside_of_a_block_and_in_a_reentrant_one(self):
        blocks = []

        def function(x):
            blocks.append(running_checkpoint())
            return x * 2

        x = torch.ones(1, requires_grad=True)
        function(x)
        checkpoint(function, x, use_reentrant=True)
        checkpoint(lambda x: x * 2, x, use_reentrant=False)
        function(x)
        assert blocks == [None, None, None]

    def test_it_is_the_innermost_block(self):
        blocks = []

        def inner(x):
            blocks.append(running_checkpoint())
            return x.sin()

        def outer(x):
            blocks.append(running_checkpoint())
            x = checkpoint(inner, x.sin(), use_reentrant=False)
            blocks.append(running_checkpoint())
            return x.sin()

        checkpoint(outer, torch.ones(1, requires_grad=True), use_reentrant=False)
        assert None not in blocks
        first, within, last = blocks
        assert first is last
        assert first is not within

    def test_the_backward_pass_calls_what_recomputes_it_which_may_be_replaced(self):
        calls = []

        def function(x):
            block = running_checkpoint()
            if block is not None and not hasattr(block, "noted"):
                block.noted = True
                block.recompute_fn = lambda *args, original=block.recompute_fn: (calls.append("again"), original(*args))
            return x.sin()

        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        output = checkpoint(function, x, use_reentrant=False)
        assert calls == []
        output.backward()
        assert calls == ["again"]
        torch.testing.assert_close(x.grad, torch.cos(torch.ones_like(x)))
