"""Blocks as papers and repositories write them: docs/results/networks-tried.md tells what became of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import RelevanceError, explain

PAGE = Path(__file__).parents[1] / "docs" / "results" / "networks-tried.md"
C = 8


class Block(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, side: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False, **options)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.1)


def simple_gate() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.mix(x).chunk(2, dim=1)
        return first * second

    return Block(forward, mix=conv(C, 2 * C, 1))


def cbam() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        pooled = [self.out(F.relu(self.inner(pool(x, 1)))) for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)]
        x = x * torch.sigmoid(pooled[0] + pooled[1])
        return x * torch.sigmoid(self.place(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)))

    return Block(forward, inner=conv(C, 4, 1), out=conv(4, C, 1), place=conv(2, 1, 7))


def dynamic_relu() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        slopes = 2 * torch.sigmoid(self.slopes(x.mean((2, 3)))) - 1
        return (x.unsqueeze(-1) * (slopes.view(-1, C, 2) + self.base)[:, :, None, None]).max(-1)[0]

    return Block(forward, slopes=nn.Linear(C, 2 * C, bias=False), base=weight(2))


def involution() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.kernels(x).view(n, 2, 9, h, w).unsqueeze(2)
        return (kernels * F.unfold(x, 3, padding=1).view(n, 2, c // 2, 9, h, w)).sum(3).view(n, c, h, w)

    return Block(forward, kernels=conv(C, 18, 1))


def shifted_windows() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2)).view(n, h // 4, 4, w // 4, 4, c)
        windows = windows.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, c)
        mask = torch.zeros(16, 16).masked_fill(torch.arange(16)[:, None] > 12, -100.0)
        q, k, v = self.qkv(windows).chunk(3, -1)
        out = ((q @ k.transpose(-2, -1)).view(n, -1, 16, 16) + mask).view(-1, 16, 16).softmax(-1) @ v
        out = out.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, h, w, c)
        return torch.roll(out, (1, 1), (1, 2)).permute(0, 3, 1, 2)

    return Block(forward, qkv=nn.Linear(C, 3 * C, bias=False))


def shift_net() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :2, :, :-1] = x[:, :2, :, 1:]
        out[:, 2:4, :, 1:] = x[:, 2:4, :, :-1]
        out[:, 4:6, :-1] = x[:, 4:6, 1:]
        out[:, 6:, 1:] = x[:, 6:, :-1]
        return F.relu(out)

    return Block(forward)


def slices_in_place() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.mix(x)
        x[:, :2] *= 2
        x[:, 2:4].mul_(self.scale)
        x[:, 4:].relu_()
        return x

    return Block(forward, mix=conv(C, C), scale=weight(2, 1, 1))


def token_selection() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        best = self.score(tokens)[..., 0].topk(16, 1).indices
        return F.relu(tokens.gather(1, best[..., None].expand(-1, -1, C))).transpose(1, 2)

    return Block(forward, score=nn.Linear(C, 1, bias=False))


def unpooling() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return F.relu(F.max_unpool2d(self.mix(pooled), places, 2))

    return Block(forward, mix=conv(C, C))


def standardised() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.mix.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), None, 1, 1)

    return Block(forward, mix=conv(C, C))


def group_norm_by_hand() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.view(len(x), 2, -1), dim=-1, keepdim=True, unbiased=False)
        return F.relu(((x.view(len(x), 2, -1) - mean) / (var + 1e-5).sqrt()).view(x.shape))

    return Block(forward)


def fold_by_median(self: Any, x: Tensor) -> Tensor:
    return F.relu(F.unfold(x, 3, padding=1).view(len(x), C, 9, *x.shape[2:]).median(2).values)


EXPLAINED: dict[str, Callable[[], nn.Module]] = {
    "GLU": lambda: Block(lambda s, x: F.glu(s.mix(x), 1), mix=conv(C, 2 * C)),
    "SwiGLU": lambda: Block(lambda s, x: F.silu(s.a(x)) * s.b(x), a=conv(C, C, 1), b=conv(C, C, 1)),
    "SimpleGate": simple_gate,
    "CBAM": cbam,
    "FReLU": lambda: Block(lambda s, x: torch.max(x, s.mix(x)), mix=conv(C, C, groups=C)),
    "Maxout": lambda: Block(lambda s, x: s.mix(x).unflatten(1, (C, 2)).max(2)[0], mix=conv(C, 2 * C)),
    "CReLU": lambda: Block(lambda s, x: s.mix(F.relu(torch.cat([x, -x], 1))), mix=conv(2 * C, C)),
    "PReLU by where": lambda: Block(lambda s, x: torch.where(x >= 0, x, s.slope * x), slope=weight(C, 1, 1)),
    "PReLU by |x|": lambda: Block(lambda s, x: F.relu(x) + s.slope * (x - abs(x)) * 0.5, slope=weight(C, 1, 1)),
    "ISRLU": lambda: Block(lambda s, x: torch.where(x > 0, x, x / torch.sqrt(1 + x * x))),
    "soft thresholding": lambda: Block(lambda s, x: torch.sign(x) * F.relu(x.abs() - 0.1)),
    "TLU": lambda: Block(lambda s, x: torch.max(x, s.threshold), threshold=weight(1, C, 1, 1)),
    "Dynamic ReLU": dynamic_relu,
    "involution": involution,
    "shifted windows": shifted_windows,
    "shifted channels": shift_net,
    "slices in place": slices_in_place,
    "selection of tokens": token_selection,
    "unpooling": unpooling,
    "weight standardisation": standardised,
    "group norm by hand": group_norm_by_hand,
    "GeM pooling": lambda: Block(lambda s, x: F.avg_pool2d(x.clamp(min=1e-6) ** s.p, 2) ** (1 / s.p), p=weight(1)),
    "Lp pooling": lambda: nn.Sequential(nn.LPPool2d(2, 2), nn.ReLU()),
    "median pooling": lambda: Block(fold_by_median),
    "summed-area table": lambda: Block(lambda s, x: F.relu(x.cumsum(2).cumsum(3) / 64)),
    "tensordot": lambda: Block(lambda s, x: F.relu(torch.tensordot(s.w, x, ([1], [1])).movedim(0, 1)), w=weight(C, C)),
    "einsum with an ellipsis": lambda: Block(lambda s, x: F.relu(torch.einsum("...chw,dc", x, s.w)), w=weight(C, C)),
    "permuted channels": lambda: Block(lambda s, x: F.relu(x[:, [3, 1, 2, 0, 7, 5, 6, 4]])),
    "AlphaDropout": lambda: nn.Sequential(nn.SELU(), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)),
    "RReLU": nn.RReLU,
    "fixed grid": lambda: Block(
        lambda s, x: F.grid_sample(
            x,
            F.affine_grid(x.new_tensor([[[0.9, 0.1, 0], [0, 1, 0]]] * len(x)), list(x.shape), align_corners=False),
            align_corners=False,
        )
    ),
    "ReLU of a double": lambda: Block(lambda s, x: F.relu(x.double()).float()),
}
PIECEWISE_LINEAR = {
    *("FReLU", "Maxout", "CReLU", "PReLU by where", "PReLU by |x|", "RReLU", "shifted channels", "slices in place"),
    *("selection of tokens", "unpooling", "weight standardisation", "median pooling", "summed-area table"),
    *("tensordot", "einsum with an ellipsis", "permuted channels", "fixed grid"),
}
CONSERVING = PIECEWISE_LINEAR | {
    *("GLU", "SwiGLU", "SimpleGate", "CBAM", "ISRLU", "TLU", "involution", "group norm by hand", "Lp pooling"),
    *("soft thresholding", "GeM pooling"),
}


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def hard_routing() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        chosen, out = self.router(x.mean((2, 3))).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate((self.first, self.second)):
            out[chosen == number] = expert(x[chosen == number])
        return out

    return Block(forward, router=nn.Linear(C, 2), first=conv(C, C), second=conv(C, C))


def shrinkage() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        threshold = x.abs().mean((2, 3), keepdim=True)
        return torch.sign(x) * F.relu(x.abs() - threshold)

    return Block(forward)


def winners(self: Any, x: Tensor) -> Tensor:
    smallest = x.flatten(1).topk(20, 1).values[:, -1]
    return x * (x >= smallest[:, None, None, None])


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FFT": (lambda: Block(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x))), "torch.fft.rfft2"),
    "LSTM": (lambda: Block(lambda s, x: s.rnn(x.flatten(2).mT)[0].mT, rnn=nn.LSTM(C, C, batch_first=True)), "lstm"),
    "scripted function": (lambda: Block(lambda s, x: scripted(x)), "hides from the tracer"),
    "dynamic convolution": (lambda: Block(lambda s, x: F.conv2d(x, x[:C, :, :3, :3])), "weights that depend on the"),
    "hard routing": (hard_routing, "__getitem__ with a step function of the image"),
    "deep residual shrinkage": (shrinkage, "mul with a step function of the image"),
    "k winners": (lambda: Block(winners), "mul with a step function of the image"),
    "padding from pixels": (
        lambda: Block(lambda s, x: x.masked_fill(x.abs().sum(1, keepdim=True) < 1, 0.0)),
        "masked_fill with a step function of the image",
    ),
    "spatial transformer": (
        lambda: Block(lambda s, x: F.grid_sample(x, s.grid(x).movedim(1, -1), align_corners=False), grid=conv(C, 2)),
        "grid_sample with weights that depend on the image",
    ),
    "GELU by erf": (lambda: Block(lambda s, x: x * 0.5 * (1 + torch.erf(x / 2**0.5))), "torch.erf"),
    "ELU by exp": (lambda: Block(lambda s, x: torch.where(x > 0, x, torch.exp(x) - 1)), "torch.exp"),
    "output argument": (lambda: Block(lambda s, x: torch.mul(x, 2, out=torch.empty(0))), "argument 'out'"),
}


class Net(nn.Module):
    def __init__(self, build: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = conv(3, C), build()
        self.head = nn.Linear(C, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.stem(x))
        return self.head(out.flatten(2).mean(2))


@pytest.mark.parametrize("name", EXPLAINED)
def test_blocks_of_papers_are_explained_each_image_with_its_own_epsilon(name):
    model = Net(EXPLAINED[name])
    images, targets, epsilon = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 1]), torch.tensor([0.05, 0.5, 0.1])
    _, maps = explain(model.train(), images, targets, epsilon, create_graph=True)
    try:
        maps.abs().mean().backward()
    except RuntimeError as error:
        if "grid_sampler_2d_backward is not implemented" in str(error):
            pytest.skip("this PyTorch has no second derivative of grid_sample")
        raise
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.stem.weight.grad.any()
    logits, maps = explain(model.eval(), images, targets, epsilon)
    torch.testing.assert_close(logits, model(images).detach())
    for i in range(3):
        alone = explain(model, images[i : i + 1], targets[i : i + 1], float(epsilon[i]))[1]
        torch.testing.assert_close(maps[i], alone[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CONSERVING))
def test_blocks_of_papers_conserve_relevance(name):
    model = Net(EXPLAINED[name]).double().eval()
    images, targets = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 3, 1])
    logits, maps = explain(model, images, targets, 1e-12)
    torch.testing.assert_close(maps.sum((1, 2, 3)), logits[range(3), targets], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(PIECEWISE_LINEAR))
def test_at_epsilon_zero_blocks_that_are_piecewise_linear_have_the_map_of_gradient_times_input(name):
    model = Net(EXPLAINED[name]).double().eval()
    images, targets = torch.randn(3, 3, 8, 8).double().requires_grad_(), torch.tensor([0, 3, 1])
    (gradient,) = torch.autograd.grad(model(images)[range(3), targets].sum(), images)
    maps = explain(model, images.detach(), targets, 0.0)[1]
    torch.testing.assert_close(maps, images.detach() * gradient)


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_without_a_right_map_are_refused_by_name(name):
    build, text = REFUSED[name]
    with pytest.raises(RelevanceError, match=r"no relevance rule for .*the heatmap would be wrong") as error:
        explain(Net(build), torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 1]), 0.1)
    assert text in str(error.value)


def test_the_page_lists_every_block():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in (*EXPLAINED, *REFUSED) if f"| {name.replace('|', chr(92) + '|')} |" not in page] == []
