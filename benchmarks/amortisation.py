"""What a store saves: many students from one store beside as many that run the teacher at each step.

    pip install -e ".[benchmarks]" && python benchmarks/amortisation.py --work FOLDER

*Online* is the published way: at each step the teacher's LRP-Flex heatmap of the batch is made anew, ReLUs multiply
what comes back by a / (a + ε) in full backward hooks, and PyTorch's double backward differentiates the student's.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from report import processor, spread, table, verdict
from torch import Tensor, nn

from data import make_coloured_mnist, open_dataset
from pipeline import build_network, cache_explanations, load_classifier
from pipeline.device import as_input, pick_device, place
from teacher_cache import open_cache
from trainer import heatmap_loss, train_student, train_teacher
from trainer.loop.optim import make_optimizer
from trainer.loop.step import losses_of, on_device
from trainer.settings import Settings
from trainer.stream.stream import Batch, explained_source, labelled_source, stream

STORE, ONLINE = "student step, from the store", "online step: teacher, and plain double backward"
STUDENT_ALONE, TEACHER_ALONE = "of it the student", "of it the teacher"
LAYOUTS = {"channels last": torch.channels_last, "NCHW": torch.contiguous_format}
STEP_TARGET, TOTAL_TARGET = 2.0, 1.8
EPSILON = 0.05


class HookedReLUs:
    """LRP-Flex by full backward hooks on a network's ReLUs, which are made out of place, as the published code has it.

    An output is kept for each call, as torchvision's blocks call one ReLU twice. ``epsilon`` None leaves gradients be.
    """

    def __init__(self, model: nn.Module):
        self.epsilon: float | None = None
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
                self._hook(module)

    def _hook(self, relu: nn.ReLU) -> None:
        outputs: list[Tensor] = []

        def forward(module: nn.Module, inputs: object, output: Tensor) -> None:
            if self.epsilon is not None:
                outputs.append(output)

        def backward(module: nn.Module, at_input: object, at_output: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            if self.epsilon is None:
                return None
            output = outputs.pop()
            return (output / (output + self.epsilon) * at_output[0],)

        relu.register_forward_hook(forward)
        relu.register_full_backward_hook(backward)

    def heatmaps(self, model: nn.Module, images: Tensor, classes: Tensor, *, create_graph: bool) -> Tensor:
        """x · G of one class for each image: (N, C, H, W)."""
        leaf = images.detach().requires_grad_()
        self.epsilon = EPSILON
        try:
            chosen = model(leaf).gather(1, classes[:, None]).sum()
            maps = leaf * torch.autograd.grad(chosen, leaf, create_graph=create_graph)[0]
        finally:
            self.epsilon = None
        return maps if create_graph else maps.detach()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Online:
    """A student and its live teacher, in one layout of memory."""

    def __init__(self, teacher: Path, arch: str, layout: torch.memory_format, device: torch.device):
        self.layout, self.device = layout, device
        self.teacher, config = load_classifier(teacher)
        self.student, _ = build_network(arch, len(config.class_names), config.image_shape, free_of_biases=False)
        self.classes = len(config.class_names)
        for model in (self.teacher, self.student):
            model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.hooks = {model: HookedReLUs(model) for model in (self.teacher, self.student)}
        self.optimizer = torch.optim.Adam(self.student.parameters(), 4e-3)

    def images(self, batch: Batch) -> Tensor:
        return as_input(batch["images"], self.device).contiguous(memory_format=self.layout)

    def teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.randint(self.classes, (len(images),), device=self.device)
        return classes, self.hooks[self.teacher].heatmaps(self.teacher, images, classes, create_graph=False)

    def learn(self, images: Tensor, classes: Tensor, maps: Tensor) -> None:
        ours = self.hooks[self.student].heatmaps(self.student, images, classes, create_graph=True)
        learn(self.student, self.optimizer, heatmap_loss(ours, maps).mean())

    def step(self, batch: Batch) -> None:
        images = self.images(batch)
        self.learn(images, *self.teach(images))


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def step_table(data: Path, cache: Path, teacher: Path, arch: str, rounds: int, device: torch.device) -> tuple[str, str]:
    """The table of one step each way, and the layout in which the online one is faster."""
    split, store = open_dataset(data).split("train"), open_cache(cache)
    ours = stream(explained_source(split, store), batch_size=128, seed=0)
    theirs = stream(labelled_source(split), batch_size=128, seed=0)
    network, _ = build_network(arch, len(store.info.teacher.class_names), split.image_shape, free_of_biases=False)
    from pipeline import Classifier

    model = Classifier(network).train()
    place(model, device)
    optimizer = make_optimizer(model, "adam", 4e-3)
    settings = Settings(loss={"lrp": 1.0}, steps=1)

    def from_the_store() -> None:
        loss = losses_of(model, on_device(next(ours), store.info, settings, device), store.info, settings)["lrp"].mean()
        learn(model, optimizer, loss)

    rows: dict[str, Callable[[], object]] = {STORE: from_the_store}
    for name, layout in LAYOUTS.items():
        online = Online(teacher, arch, layout, device)
        images = online.images(next(theirs))
        taught = online.teach(images)
        rows |= {
            f"{ONLINE}, {name}": lambda online=online: online.step(next(theirs)),  # type: ignore[misc]
            f"{TEACHER_ALONE}, {name}": lambda online=online, images=images: online.teach(images),  # type: ignore[misc]
            f"{STUDENT_ALONE}, {name}": lambda online=online, images=images, taught=taught: online.learn(  # type: ignore[misc]
                images, *taught
            ),
        }
    for run in [*rows.values()] * 2:
        run()
    times: dict[str, list[float]] = {name: [] for name in rows}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(rows), len(rows)):
            times[name].append(timed(rows[name], device))
    faster = min(LAYOUTS, key=lambda name: np.median(times[f"{ONLINE}, {name}"]))
    lines = []
    for name, values in times.items():
        ratio = np.array(values) / times[STORE]
        target = STEP_TARGET if name == f"{ONLINE}, {faster}" else None
        lines.append(
            [name, f"{1e3 * np.median(values):.0f}", spread(ratio), *verdict(float(np.median(ratio)), target, True)]
        )
    ours.close()
    theirs.close()
    return table(["", "median ms", f"× the {STORE}", "target", "met"], lines), faster


def totals(
    work: Path, data: Path, cache_seconds: float, cache: Path, teacher: Path,
    arch: str, students: int, epochs: int, layout: str, device: torch.device,
) -> str:  # fmt: skip
    """Every student trained in full both ways, in turn, so that both see the same machine."""
    split = open_dataset(data).split("train")
    steps = epochs * (len(split) // 128)
    ours, theirs = [], []
    for seed in range(students):
        out = work / f"student-{seed}"
        shutil.rmtree(out, ignore_errors=True)

        def store(seed: int = seed, out: Path = out) -> None:
            train_student(
                data, cache, out, arch=arch, head="free", bias_free=False, optimizer="adam", steps=steps, seed=seed
            )

        def online(seed: int = seed) -> None:
            torch.manual_seed(seed)
            run = Online(teacher, arch, LAYOUTS[layout], device)
            batches: Iterator[Batch] = stream(labelled_source(split), batch_size=128, seed=seed)
            for batch in islice(batches, steps):
                run.step(batch)

        ours.append(timed(store, device))
        theirs.append(timed(online, device))
        print(f"student {seed}: {ours[-1]:.1f} s from the store, {theirs[-1]:.1f} s online", flush=True)
    own, other = np.array(ours), np.array(theirs)
    ratio = other.sum() / (cache_seconds + own.sum())
    saved = float(np.median(other - own))
    even = math.inf if saved <= 0 else cache_seconds / saved
    lines = [
        ["stage one", f"{cache_seconds:.1f}", "–", "", ""],
        ["a student, median", f"{np.median(own):.1f}", f"{np.median(other):.1f}", "", ""],
        [f"{students} students of {epochs} epochs", f"{cache_seconds + own.sum():.1f}", f"{other.sum():.1f}", "", ""],
        ["online, × from the store", f"{ratio:.2f}", f"by student: {spread(other / own)}",
         *verdict(ratio, TOTAL_TARGET, True)],
        ["break-even after students", f"{even:.2f}", f"that is {epochs * even:.1f} epochs", "", ""],
    ]  # fmt: skip
    return table(["seconds of wall time", "from the store", "online", "target", "met"], lines)


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where to put it all.")
@click.option("--arch", default="resnet18", show_default=True, help="Of teacher and students.")
@click.option("--samples", default=2560, show_default=True, type=click.IntRange(128))
@click.option("--students", default=5, show_default=True, type=click.IntRange(1))
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Times each step is timed.")
@click.option("--device", default="auto", show_default=True)
def main(work: Path, arch: str, samples: int, students: int, epochs: int, rounds: int, device: str) -> None:
    """Time students of one store beside students that run the teacher at each step."""
    torch_device = pick_device(device)
    work.mkdir(parents=True, exist_ok=True)
    data, teacher, cache = work / "data.zarr", work / "teacher", work / "cache.zarr"
    if not data.exists():
        make_coloured_mnist(data, limit=samples)
    if not (teacher / "result.json").exists():
        train_teacher(data, teacher, arch=arch, debias="grayscale", steps=60, device=device)
    shutil.rmtree(cache, ignore_errors=True)
    stage_one = timed(lambda: cache_explanations(data, teacher, cache, device=device), torch_device)
    print(
        f"PyTorch {torch.__version__}, {processor(torch_device)}, {torch.get_num_threads()} threads; {arch} as teacher "
        f"and student, COLOURED MNIST, {samples:,} samples, batch 128, {rounds} rounds; median [quartiles]\n"
    )
    steps, layout = step_table(data, cache, teacher, arch, rounds, torch_device)
    print(steps, end="\n\n", flush=True)
    print(totals(work, data, stage_one, cache, teacher, arch, students, epochs, layout, torch_device))


if __name__ == "__main__":
    main()
