"""What shows a training to its user and changes nothing of it: metrics, TensorBoard, the progress bar, a profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from trainer.run_dir import RunDir

log = logging.getLogger(__name__)

PROFILED = {"wait": 1, "warmup": 1, "active": 3}  # steps


@contextmanager
def display(run: RunDir | None, start: int, steps: int) -> Iterator[Callable[..., None]]:
    """Show the numbers of steps in ``metrics.jsonl``, in TensorBoard where it is installed, and in a progress bar.

    Args:
        run: the folder of the run; None in a process that shows nothing.
        start: the number of steps that were made before.
        steps: the length of the training.

    Yields:
        ``show(step=…, **metrics)``, to be called with the numbers of a step.
    """
    if run is None:
        yield lambda **metrics: None
        return
    with ExitStack() as cleanup:
        writer = _event_writer(run, start)
        if writer is not None:
            cleanup.enter_context(writer)
        bar = cleanup.enter_context(
            tqdm(total=steps, initial=start, unit="step", desc=f"training {run.path.name}", disable=None)
        )

        def show(step: int, **metrics: float) -> None:
            run.log(step=step, **metrics)
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)
            bar.update(step - bar.n)
            if "samples_per_second" in metrics:
                rate, waiting = metrics["samples_per_second"], 100 * metrics["waiting"]
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, {rate:.0f} samples/s, {waiting:.1f} % waiting for data"
                )

        yield show


def _event_writer(run: RunDir, start: int) -> Any:
    """Return a writer of TensorBoard's events of the steps after ``start``; None without the package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import
    except ImportError:
        _note_no_tensorboard()
        return None
    return SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)


@cache
def _note_no_tensorboard() -> None:
    """Log once in a process that it writes no events, however many models it trains."""
    log.info("no TensorBoard events are written, because the package tensorboard is not installed")


@contextmanager
def profiler(run: RunDir | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Write a trace of the first steps, for Perfetto and chrome://tracing.

    Args:
        run: the folder of the run; None where there is no profile.
        device: where the network is.

    Yields:
        A function to be called after each step.
    """
    if run is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    path = run.path / "profile" / "trace.json"
    path.parent.mkdir(exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(path))
        log.info(f"{path}: a trace of {PROFILED['active']} steps, for ui.perfetto.dev")

    with profile(activities=activities, schedule=schedule(**PROFILED, repeat=1), on_trace_ready=write) as recorder:
        yield recorder.step
