"""Stage one of vision-language teachers: images a second beside forward + input gradient, in one process.

    pip install -e ".[benchmarks,clip]" && python benchmarks/clip.py

Random weights, as speed does not depend on them: the image towers of open_clip at their own size, behind their own
preprocessing, told ten classes. A round times each row once, in random order, on the same batch; ratios are within
it. *Stage one* is one pass and D heatmaps; the peers need a pass, and a backward pass for each class.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from report import processor, spread, table
from torch import Tensor, nn

from pipeline import Trace
from pipeline.device import pick_device, place, small_numbers_are_zero
from pipeline.networks.zero_shot import zero_shot_network

CLASSES = 10
FORWARD, GRADIENT, GRADIENTS, HEATMAP, STAGE_ONE = "forward", "+ input gradient", "+ {}", "one heatmap", "stage one, {}"


def rows(network: nn.Module, images: Tensor, draws: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    targets = torch.randint(CLASSES, (draws, len(images)), device=images.device)
    epsilons = torch.empty(draws, len(images), device=images.device).uniform_(-2, 0).mul_(np.log(10)).exp_()

    @torch.no_grad()
    def forward() -> object:
        return network(images)

    def gradients(count: int) -> None:
        leaf = images.detach().requires_grad_()
        logits = network(leaf)
        for d in range(count):
            torch.autograd.grad(logits.gather(1, targets[d, :, None]).sum(), leaf, retain_graph=d + 1 < count)

    def heatmaps(count: int) -> None:
        trace = Trace(network, images)
        for d in range(count):
            trace.heatmaps(targets[d], epsilons[d], keep_graph=d + 1 < count)

    return {
        FORWARD: forward,
        GRADIENT: lambda: gradients(1),
        GRADIENTS.format(f"{draws} input gradients"): lambda: gradients(draws),
        HEATMAP: lambda: heatmaps(1),
        STAGE_ONE.format(f"{draws} heatmaps"): lambda: heatmaps(draws),
    }


def measure(timed: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each row; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name in random.sample(list(timed), len(timed)):
            started = _now(device)
            timed[name]()
            if number:
                seconds[name].append(_now(device) - started)
    return {name: np.array(values) for name, values in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", default="RN50,ViT-B-32", show_default=True, help="Of open_clip, separated by commas.")
@click.option("--side", default=224, show_default=True, type=click.IntRange(8), help="Of the images, in pixels.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--draws", default=4, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True)
@small_numbers_are_zero()
def main(models: str, side: int, batch_size: int, draws: int, rounds: int, device: str) -> None:
    import open_clip

    chosen = pick_device(device)
    lines = []
    for name in models.split(","):
        model = open_clip.create_model(name.strip(), pretrained_text=False)
        network = zero_shot_network(
            model, open_clip.get_tokenizer(name.strip()), [[f"class {number}"] for number in range(CLASSES)]
        )
        place(network, chosen)
        images = torch.rand(batch_size, 3, side, side, device=chosen)
        images = images.contiguous(memory_format=torch.channels_last)
        seconds = measure(rows(network, images, draws), rounds, chosen)
        for row, values in seconds.items():
            peer = GRADIENTS.format(f"{draws} input gradients") if row.startswith("stage") else GRADIENT
            ratio = spread(values / seconds[peer]) if row not in (FORWARD, GRADIENT, peer) else ""
            rate = spread(batch_size / values)
            lines.append([name.strip(), row, rate, ratio])
    click.echo(table(["image tower", "", "images/s", "seconds × those of as many input gradients"], lines))
    click.echo(f"\n{processor(chosen)}; batches of {batch_size}, {side}×{side}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
