"""What a heatmap and a student's step cost, beside the same by PyTorch alone, zennit and captum, in one process.

    pip install -e ".[benchmarks]" && python benchmarks/second_order.py --models resnet18 --out raw.json

The unit is one forward pass. Ratios are taken within a round, in which each row is timed once, in random order.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import copy
import gc
import json
import operator
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from report import processor, spread, table, verdict
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from pipeline import Trace, build_network, explain
from pipeline.device import pick_device, place
from trainer import heatmap_loss

CLASSES = 10
PEER_EPSILON = 0.1  # the peers take one for all images
FORWARD, INPUT_GRADIENT, IN_EVAL = "forward", "forward + input gradient", "forward + input gradient (eval)"
SUPERVISED, PLAIN, ENGINE = "supervised step", "student step, plain double backward", "student step, engine"
BFLOAT16, CHECKPOINTED = "student step, engine, bfloat16 autocast", "student step, engine, checkpointed blocks"
MEMORY_TARGET = 2.5  # × the supervised step's peak

Heatmaps = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One model, its input, and the targets that depend on it: student step in forward passes, gain over plain."""

    arch: str
    side: int
    batch_size: int
    step_target: float
    gain_target: float | None = None
    channels_last: bool = True


DEPLOYED = (
    "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "mnasnet1_0", "shufflenet_v2_x1_0",
    "convnext_tiny", "regnet_y_400mf", "vit_b_16", "swin_t",
)  # fmt: skip
CASES = {
    "small-cnn": Case("small-cnn", 28, 128, 8, 2.5),
    "small-cnn-nchw": Case("small-cnn", 28, 128, 8, channels_last=False),
    "resnet18": Case("resnet18", 28, 128, 6.3, 1.7),
    "resnet50": Case("resnet50", 64, 32, 6.3),
    "vgg16_bn": Case("vgg16_bn", 64, 32, 6.3),
    "densenet121": Case("densenet121", 64, 32, 7),
    **{arch: Case(arch, 64, 32, 7) for arch in DEPLOYED},
}


@dataclass(frozen=True)
class Row:
    """Something to time. Its ratio is its time by that of the row ``to``: a target of at most, or of at least."""

    name: str
    run: Callable[[], object] | None  # None: not supported
    to: str | None = None
    target: float | None = None
    at_least: bool = False
    training: bool = True


# --- what is timed ------------------------------------------------------------------------------------


def product_rows(model: nn.Module, images: Tensor, draws: int, case: Case) -> list[Row]:
    """The engine's rows, and their limits and rivals by PyTorch alone."""
    samples, device = len(images), images.device
    targets = torch.randint(CLASSES, (draws, samples), device=device)
    epsilons = torch.empty(draws, samples, device=device).uniform_(-2, 0).mul_(np.log(10)).exp_()  # in [0.01, 1]
    teacher = torch.randn_like(images)

    def input_gradients(count: int) -> None:
        leaf = images.detach().requires_grad_()
        logits = model(leaf)
        for d in range(count):
            torch.autograd.grad(logits.gather(1, targets[d, :, None]).sum(), leaf, retain_graph=d + 1 < count)

    def heatmaps() -> None:
        explain(model, images, targets[0], epsilons[0])

    def heatmaps_of_all_draws() -> None:
        trace = Trace(model, images)
        for d in range(draws):
            trace.heatmaps(targets[d], epsilons[d], keep_graph=d + 1 < draws)

    def supervised_step() -> None:
        F.cross_entropy(model(images), targets[0]).backward()

    def plain_step() -> None:
        leaf = images.detach().requires_grad_()
        logit = model(leaf).gather(1, targets[0, :, None]).sum()
        (gradient,) = torch.autograd.grad(logit, leaf, create_graph=True)
        heatmap_loss(images * gradient, teacher).mean().backward()

    def engine_step() -> None:
        _, student = explain(model, images, targets[0], epsilons[0], create_graph=True)
        heatmap_loss(student, teacher).mean().backward()

    def bfloat16_step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            _, student = explain(model, images, targets[0], epsilons[0], create_graph=True)
        heatmap_loss(student, teacher).mean().backward()

    def checkpointed_step() -> None:
        with checkpointed(model):
            engine_step()

    limit_of_draws = f"forward + {draws} input gradients"
    return [
        Row(FORWARD, lambda: model(images)),
        Row(INPUT_GRADIENT, lambda: input_gradients(1)),
        Row("explain", heatmaps, INPUT_GRADIENT, 1.1),
        Row(limit_of_draws, lambda: input_gradients(draws)),
        Row(f"explain, {draws} draws", heatmaps_of_all_draws, limit_of_draws, 1.1),
        Row(IN_EVAL, lambda: input_gradients(1), training=False),
        Row("explain (eval)", heatmaps, IN_EVAL, 1.1, training=False),
        Row(SUPERVISED, supervised_step),
        Row(ENGINE, engine_step, FORWARD, case.step_target),
        Row(PLAIN, plain_step if _runs(plain_step) else None, ENGINE, case.gain_target, at_least=True),
        Row(BFLOAT16, bfloat16_step, FORWARD),
        Row(CHECKPOINTED, checkpointed_step if blocks(model) else None, FORWARD),
    ]


def _runs(step: Callable[[], object]) -> bool:
    """Return whether a step runs; some activations and attentions have no second derivative in PyTorch."""
    try:
        step()
    except RuntimeError:
        return False
    return True


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a torchvision ResNet or the layers of its DenseNet, if it is one."""
    return [
        module for module in model.modules() if type(module).__name__ in ("BasicBlock", "Bottleneck", "_DenseLayer")
    ]


def _checkpoint(forward: Callable[..., Tensor], given: Tensor | list[Tensor]) -> Tensor:
    given = list(given) if isinstance(given, list) else given  # DenseNet's list of features grows
    return checkpoint(forward, given, use_reentrant=False)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Blocks keep their input alone and are computed again on the way back."""
    chosen = blocks(model)
    for block in chosen:
        block.forward = partial(_checkpoint, block.forward)
    yield
    for block in chosen:
        del block.forward  # back to that of its class


def peer_rows(model: nn.Module, images: Tensor) -> tuple[list[Row], list[str]]:
    """A row for each peer, and a note: how alike its heatmaps are, or why it cannot explain this model."""
    model.eval()
    targets = torch.randint(CLASSES, (len(images),), device=images.device)
    expected = explain(model, images, targets, PEER_EPSILON)[1].flatten(1)
    rows, notes = [], []
    for name, peer in (("zennit", zennit_lrp), ("captum", captum_lrp)):
        heatmaps = None
        try:
            heatmaps = peer(copy.deepcopy(model), images, targets)
            alike = F.cosine_similarity(heatmaps().flatten(1), expected).mean().item()
            notes.append(f"{name}: cosine similarity of its heatmaps to explain's, mean over the images: {alike:.4f}")
        except Exception as error:  # whatever stops a peer is a result of the benchmark
            heatmaps = None
            notes.append(f"{name}: not supported: {' '.join(str(error).split())[:200] or type(error).__name__}")
        rows.append(Row(f"{name}, LRP-ε (eval)", heatmaps, IN_EVAL, training=False))
    return rows, notes


# --- the peers ----------------------------------------------------------------------------------------


def zennit_lrp(model: nn.Module, images: Tensor, targets: Tensor) -> Heatmaps:
    """Epsilon on convolutions and linear layers, Pass on ReLUs, Norm on average pooling; batch norms merged.

    A DenseNet, for which zennit has no canonizer, has its functions turned into modules, those batch norms merged
    that follow a convolution, and Epsilon on the others.
    """
    from zennit.attribution import Gradient
    from zennit.canonizers import NamedMergeBatchNorm, SequentialMergeBatchNorm
    from zennit.core import Composite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    unmerged: list[str] = []
    if isinstance(model, torchvision.models.DenseNet):
        model = as_modules(model)
        before = {"norm0": "conv0", "norm2": "conv1"}
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        unmerged = [name for name in norms if name[-5:] not in before]
        canonizer = NamedMergeBatchNorm([((n[:-5] + before[n[-5:]],), n) for n in norms if n not in unmerged])
    elif isinstance(model, torchvision.models.ResNet):
        canonizer = ResNetCanonizer()
    else:
        canonizer = VGGCanonizer() if isinstance(model, torchvision.models.VGG) else SequentialMergeBatchNorm()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

    def rule(ctx: dict[str, Any], name: str, module: nn.Module) -> object:
        if isinstance(module, nn.Conv2d | nn.Linear) or name in unmerged:
            return Epsilon(epsilon=1e-9 if module is last else PEER_EPSILON)
        if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d | Sum):
            return Norm(stabilizer=1e-9)
        return Pass() if isinstance(module, nn.ReLU | nn.BatchNorm2d) else None

    attributor = Gradient(model, Composite(module_map=rule, canonizers=[canonizer]))
    attributor.__enter__()  # once for all: zennit's preparations are not timed
    one_hot = F.one_hot(targets, CLASSES)
    return lambda: attributor(images.detach(), lambda logits: one_hot * logits)[1]


def captum_lrp(model: nn.Module, images: Tensor, targets: Tensor) -> Heatmaps:
    """captum's EpsilonRule on every layer, with ε where it counts: at the batch norms, which all ReLUs here follow.

    Each ReLU, each sum and each pooling is made a module of its own, as captum needs.
    """
    from captum.attr import LRP
    from captum.attr._utils.custom_modules import Addition_Module
    from captum.attr._utils.lrp_rules import EpsilonRule

    model = as_modules(model, Addition_Module)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.BatchNorm2d)][:-1]

    def heatmaps() -> Tensor:
        for layer in layers:
            layer.rule = EpsilonRule(PEER_EPSILON)  # type: ignore  # captum forgets the rules at every call
        return LRP(model).attribute(images.detach().requires_grad_(), target=targets).detach()

    return heatmaps


def as_modules(model: nn.Module, addition: Callable[[], nn.Module] | None = None) -> fx.GraphModule:
    """The model with a module of its own for each ReLU, each adaptive pooling and, where given, each sum."""
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    for number, node in enumerate(traced.graph.nodes):
        called = modules[node.target] if node.op == "call_module" else node.target
        new: nn.Module
        if called is F.relu or isinstance(called, nn.ReLU):
            new, inputs = nn.ReLU(), node.args[:1]
        elif called is F.adaptive_avg_pool2d:
            new, inputs = nn.AdaptiveAvgPool2d(node.args[1]), node.args[:1]
        elif called in (operator.add, operator.iadd) and addition is not None:
            new, inputs = addition(), node.args
        elif isinstance(called, nn.Flatten):
            node.op, node.target, node.args = "call_function", torch.flatten, (*node.args, 1)
            continue
        else:
            continue
        traced.add_module(f"own{number}", new)
        node.op, node.target, node.args, node.kwargs = "call_module", f"own{number}", inputs, {}
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


# --- measuring ----------------------------------------------------------------------------------------


def prepare(model: nn.Module, row: Row, device: torch.device) -> None:
    model.train(row.training)
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(model: nn.Module, row: Row, device: torch.device) -> float:
    assert row.run is not None
    prepare(model, row, device)
    start = time.perf_counter()
    row.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def time_rows(model: nn.Module, rows: list[Row], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each row in each round, after a warm-up."""
    rows = [row for row in rows if row.run is not None]
    for row in rows * 2:
        milliseconds(model, row, device)
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    order = random.Random(0)
    for _ in range(rounds):
        for row in order.sample(rows, len(rows)):
            times[row.name].append(milliseconds(model, row, device))
    return times


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a step holds at once, above what was there before.

    On the CPU from the profiler's record of every allocation and release; scratch memory that a kernel takes
    from elsewhere than PyTorch's allocator is not in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


# --- printing -----------------------------------------------------------------------------------------


def timing_table(rows: list[Row], times: dict[str, list[float]]) -> str:
    lines = []
    for row in rows:
        if row.run is None:
            lines.append([row.name, *["–"] * 4, "", ""])
            continue
        own = np.array(times[row.name])
        ratio = own / times[row.to] if row.to else None
        cells = [row.name, f"{np.median(own):.1f}", spread(own / times[FORWARD])]
        cells += ["", ""] if ratio is None else [row.to or "", spread(ratio)]
        lines.append(cells + verdict(0 if ratio is None else float(np.median(ratio)), row.target, row.at_least))
    return table(["", "median ms", "forward passes", "compared with", "ratio", "target", "met"], lines)


def memory_table(peaks: dict[str, int]) -> str:
    lines = []
    for name, peak in peaks.items():
        ratio, target = peak / peaks[SUPERVISED], MEMORY_TARGET if name == ENGINE else None
        lines.append([name, f"{peak / 2**20:.1f}", f"{ratio:.2f}", *verdict(ratio, target)])
    return table(["peak memory", "MiB", f"ratio to the {SUPERVISED}", "target", "met"], lines)


def summary_table(results: dict[str, dict[str, Any]]) -> str:
    """Write a line for each model: a student's step in forward passes, and beside its rivals."""
    lines = []
    for name, result in results.items():
        times = {row: np.array(values) for row, values in result["milliseconds"].items()}
        step, target = times[ENGINE] / times[FORWARD], CASES[name].step_target
        peaks = result["peak_bytes"]
        lines.append(
            [
                name,
                spread(step),
                *verdict(float(np.median(step)), target),
                spread(times[PLAIN] / times[ENGINE]) if PLAIN in times else "–",
                spread(times[BFLOAT16] / times[FORWARD]),
                spread(times["explain"] / times[INPUT_GRADIENT]),
                f"{peaks[ENGINE] / peaks[SUPERVISED]:.2f}",
            ]
        )
    header = [
        "model", "student step, in forward passes", "target", "met", "plain double backward, in steps",
        "step with bfloat16, in forward passes in float32", "explain, in forward + input gradient",
        "peak memory, in supervised steps",
    ]  # fmt: skip
    return table(header, lines)


@click.command()
@click.option("--models", multiple=True, type=click.Choice(list(CASES)), help="Which; all unless given. Repeatable.")
@click.option("--batch-size", type=click.IntRange(2), help="In place of each model's own.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Times each row is timed.")
@click.option("--draws", default=4, show_default=True, type=click.IntRange(2), help="Heatmaps of one forward pass.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the raw timings here, as JSON.")
def main(
    models: tuple[str, ...], batch_size: int | None, rounds: int, draws: int, device: str, out: Path | None
) -> None:
    """Time the relevance engine beside its limits and its peers."""
    torch_device = pick_device(device)
    threads = torch.get_num_threads()
    machine = f"PyTorch {torch.__version__}, {processor(torch_device)}, {threads} threads, {rounds} rounds"
    print(f"{machine}; median [quartiles]. On a CPU freed memory is kept (pipeline.device), as in the product.")
    print("The plain double backward has ordinary ReLUs, that is ε = 0, which is cheaper: this favours it.")
    print("LRP-ε has an ε at every layer, explain at every ReLU: one map where each layer feeds a ReLU, else two.")
    results = {}
    for name in models or CASES:
        case = replace(CASES[name], batch_size=batch_size or CASES[name].batch_size)
        torch.manual_seed(0)
        model, _ = build_network(case.arch, CLASSES, (3, case.side, case.side), free_of_biases=False)
        images = torch.rand(case.batch_size, 3, case.side, case.side).to(torch_device)
        if case.channels_last:
            place(model, torch_device)
            images = images.contiguous(memory_format=torch.channels_last)
        else:
            model.to(torch_device)
        rows = product_rows(model, images, draws, case)
        peers, notes = peer_rows(model, images)
        times = time_rows(model, rows + peers, torch_device, rounds)
        peaks = {}
        for row in rows:
            if row.run is not None and row.name in (SUPERVISED, ENGINE, PLAIN, BFLOAT16, CHECKPOINTED):
                prepare(model, row, torch_device)
                peaks[row.name] = peak_memory(row.run, torch_device)
        layout = "channels-last" if case.channels_last else "NCHW"
        print(f"\n### {case.arch}, {case.side}×{case.side}, batch {case.batch_size}, {layout}\n")
        print(timing_table(rows + peers, times), memory_table(peaks), sep="\n\n", end="\n\n")
        print(*(f"- {note}" for note in notes), sep="\n", flush=True)
        results[name] = {"case": asdict(case), "milliseconds": times, "peak_bytes": peaks, "notes": notes}
    print(f"\n### One line for each model\n\n{summary_table(results)}", flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
