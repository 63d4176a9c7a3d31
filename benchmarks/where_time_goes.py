"""Where does the time of a student's step go: into which kernels of which rules?

    pip install -e ".[benchmarks]" && python benchmarks/where_time_goes.py --models mobilenet_v2

Every operation with numbers that PyTorch runs in a step is timed on the CPU, and counted by the kind of its kernel and
the rule that called it. The unit is one forward pass. The arithmetic of convolutions and matrix products asks for six.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from report import processor, table
from second_order import CASES, CLASSES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline.rules
from pipeline import build_network, explain
from pipeline.device import place
from trainer import heatmap_loss

CPU = torch.device("cpu")
RULES = str(Path(pipeline.rules.__file__).parent)
KINDS = {
    "convolutions": ("convolution",),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "batch norms": ("native_batch_norm", "batch_norm"),
    "layer norms": ("native_layer_norm", "var"),
    "softmax": ("_softmax",),
}
OTHERS = ("activations", "copies", "other elementwise", "all else")
NO_NUMBERS = ("detach", "empty", "new_empty", "empty_like", "_unsafe_view")
COPIES = ("clone", "copy", "cat", "_to_copy")
ACTIVATIONS = ("hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "threshold", "relu")
RULES_OF_ACTIVATIONS = ("relu.py", "activations.py", "elementwise.py")


class Times(TorchDispatchMode):
    """Add up the seconds of the operations by kind while this context is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NO_NUMBERS:
            self.seconds[_kind(func)] += time.perf_counter() - began
        return result


def _kind(func: Any) -> str:
    name = func.overloadpacket.__name__.removesuffix("_")
    for kind, names in KINDS.items():
        if name.removesuffix("_backward") in names:
            return kind
    if _rule() in RULES_OF_ACTIVATIONS or name.removesuffix("_backward") in ACTIVATIONS:
        return "activations"
    return "copies" if name in COPIES else "other elementwise"


def _rule() -> str | None:
    """Return the file of the rule that called the operation."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(RULES):
            return Path(frame.f_code.co_filename).name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _best(run: Callable[[], object], rounds: int) -> float:
    """Return the shortest of several times, in seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(model: nn.Module, side: int, samples: int, rounds: int) -> Mapping[str, float]:
    """Return the forward passes that each kind takes in a step, and those of the whole step."""
    images = torch.rand(samples, 3, side, side).contiguous(memory_format=torch.channels_last)
    targets, teacher = torch.randint(CLASSES, (samples,)), torch.randn_like(images)
    epsilon = torch.full((samples,), 0.1)

    def step() -> None:
        _, student = explain(model, images, targets, epsilon, create_graph=True)
        heatmap_loss(student, teacher).mean().backward()

    step()
    forward, whole = _best(lambda: model(images), rounds), _best(step, rounds)
    best: Mapping[str, float] | None = None
    for _ in range(rounds):
        with Times() as times:
            step()
        if best is None or sum(times.seconds.values()) < sum(best.values()):
            best = times.seconds
    assert best is not None
    found = {kind: seconds / forward for kind, seconds in best.items()}
    return {**found, "all else": max(0.0, whole / forward - sum(found.values())), "step": whole / forward}


@click.command()
@click.option("--models", multiple=True, type=click.Choice(list(CASES)), help="Which; all unless given. Repeatable.")
@click.option("--batch-size", type=click.IntRange(2), help="In place of each model's own.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="The fastest counts.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(models: tuple[str, ...], batch_size: int | None, rounds: int, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    print(f"PyTorch {torch.__version__}, {processor(CPU)}, {threads} threads")
    kinds = [*KINDS, *OTHERS]
    lines = []
    for name in models or CASES:
        case = CASES[name]
        torch.manual_seed(0)
        model, _ = build_network(case.arch, CLASSES, (3, case.side, case.side), free_of_biases=False)
        place(model, CPU)
        found = measure(model.train(), case.side, batch_size or case.batch_size, rounds)
        lines.append([name, f"{found['step']:.1f}", *(f"{found.get(kind, 0):.2f}" for kind in kinds)])
        print(*lines[-1], flush=True)
    print(table(["forward passes", "step", *kinds], lines))


if __name__ == "__main__":
    main()
