"""What a batch that is too large for the memory may change: its size, and nothing that is stored but its rounding."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import teacher_cache.layout
from cli import main
from pipeline import RelevanceError, batch, cache_explanations
from pipeline.caching.batches import Batches, out_of_memory
from pipeline.forward import Forward
from teacher_cache import check_complete, open_cache

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Memory:
    """Puts a `Forward` in place that runs out of memory, or whose last maps do, with more than ``holds`` samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int, *, in_maps: bool = False):
        self.seen: list[int] = []  # the size of each batch
        failed: list[weakref.ref[Any]] = []

        class Limited(Forward):
            def __init__(forward, model: Any, images: torch.Tensor, *arguments: Any):
                assert all(graph() is None for graph in failed), "the batch that failed is still in memory"
                self.seen.append(len(images))
                forward.itself = forward  # as nodes of a graph may hold each other
                super().__init__(model, images, *arguments)
                if not in_maps:
                    forward.fill(images)

            def maps(forward, target_class: torch.Tensor, *arguments: Any, **graph: Any) -> torch.Tensor:
                if in_maps and not graph["keep_graph"]:  # the last draw, when the others have been written
                    forward.fill(target_class)
                return super().maps(target_class, *arguments, **graph)

            def fill(forward, batch: torch.Tensor) -> None:
                if len(batch) > holds:
                    failed.append(weakref.ref(forward))
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

        monkeypatch.setattr(batch, "Forward", Limited)


SMALL = (3, 28, 28)


def test_given_sizes_are_kept_and_auto_is_a_power_of_two_in_what_a_shard_holds():
    for device in (CUDA, CPU):
        for size in (100, np.int64(100)):
            batches = Batches.of(size, 512, (3, 900, 900), device)
            assert (batches.size, batches.given) == (100, True)
    assert [Batches.of("auto", most, (3, 224, 224), CUDA).size for most in (1024, 300, 1)] == [1024, 256, 1]
    assert [Batches.of(None, most, (3, 224, 224), CUDA).size for most in (1024, 300, 1)] == [128, 128, 1]


@pytest.mark.parametrize("batch_size", [None, "auto"])
def test_on_a_cpu_fewer_large_images_are_explained_at_once(batch_size):
    """128 photographs of 224×224 took more than 14 GB with a MobileNet's activations."""
    assert [Batches.of(batch_size, most, SMALL, CPU).size for most in (1024, 300, 16)] == [128, 128, 16]
    sizes = [Batches.of(batch_size, 1024, (3, side, side), CPU).size for side in (64, 65, 128, 224, 300, 2000)]
    assert sizes == [128, 64, 32, 8, 4, 1]


@pytest.mark.parametrize(
    ("samples", "holds", "size"), [(1024, 1024, 1024), (1024, 100, 64), (300, 200, 128), (7, 1, 1)]
)
def test_auto_finds_the_largest_power_of_two_that_fits_and_covers_every_sample_once(samples, holds, size):
    batches, done = Batches.of("auto", 1024, SMALL, CUDA), []

    def work(rows: slice) -> int:
        if rows.stop - rows.start > holds:
            raise torch.OutOfMemoryError
        done.extend(range(rows.start, rows.stop))
        return rows.start

    assert batches.run(samples, work) == list(range(0, samples, batches.size))
    assert done == list(range(samples))
    assert batches.size == size
    assert batches.run(samples, work) == list(range(0, samples, size))  # and keeps it


def test_what_is_no_lack_of_memory_is_raised_as_it_was():
    def work(rows: slice) -> None:
        raise RuntimeError("a kernel of ours is wrong")

    with pytest.raises(RuntimeError, match="a kernel of ours is wrong"):
        Batches.of("auto", 1024, SMALL, CUDA).run(4, work)


def test_the_c_librarys_lack_of_memory_is_known_by_its_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@pytest.mark.usefixtures("without_a_look")
@pytest.mark.parametrize("in_maps", [False, True], ids=["forward", "last draw"])
def test_out_of_memory_halves_the_batch_and_changes_no_draw(dataset, teacher, cache, tmp_path, monkeypatch, in_maps):
    memory = Memory(monkeypatch, holds=40, in_maps=in_maps)
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, batch_size="auto")
    assert memory.seen[:4] == [16, 128, 64, 32]
    assert memory.seen[4:] == [32] * 8 + [12]
    mine, theirs = open_cache(tmp_path / "c.zarr").read_shard(0), open_cache(cache).read_shard(0)
    assert np.array_equal(mine.target_class, theirs.target_class)
    assert np.array_equal(mine.epsilon, theirs.epsilon)
    scale = np.abs(theirs.heatmaps).max((2, 3, 4), keepdims=True)
    assert (np.abs(mine.heatmaps - theirs.heatmaps) <= 2e-3 * scale).all()
    np.testing.assert_allclose(mine.teacher_logits, theirs.teacher_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_a_look")
def test_a_size_that_was_too_large_is_not_tried_again_in_the_next_shard(dataset, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 64)
    memory = Memory(monkeypatch, holds=20)
    done = cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1, features=True, batch_size="auto")
    assert done.computed_shards == 5
    too_large = [size for size in memory.seen if size > 20]
    assert too_large in ([64, 32], [44, 32])  # the last shard has 44 samples, and may be the first of two threads
    assert {size for size in memory.seen if size not in too_large} == {16, 12}
    check_complete(open_cache(tmp_path / "c.zarr"))


def test_the_default_and_auto_are_the_same_on_a_cpu_bit_for_bit(dataset, teacher, cache, tmp_path):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, batch_size="auto", device="cpu")
    mine, theirs = open_cache(tmp_path / "c.zarr").read_shard(0), open_cache(cache).read_shard(0)
    assert mine.heatmaps.tobytes() == theirs.heatmaps.tobytes()


@pytest.mark.usefixtures("without_a_look")
def test_a_given_size_that_does_not_fit_is_named_and_the_store_can_be_continued(
    dataset, teacher, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        Memory(patch, holds=40)
        said = run(dataset, teacher, tmp_path / "c.zarr", "100")
        assert said == (
            "Error: the memory does not hold a batch of --batch-size 100 (CUDA out of memory. Tried to allocate 20.00 "
            "GiB.): give --batch-size auto, which finds the largest that fits, or a smaller number; the same command "
            "resumes the store"
        )
    assert run(dataset, teacher, tmp_path / "c.zarr", "auto").endswith("300 samples in 1 shards")


def test_one_sample_that_does_not_fit_is_an_error_with_what_to_do(dataset, teacher, tmp_path, monkeypatch):
    memory = Memory(monkeypatch, holds=0)
    with pytest.raises(RelevanceError, match=r"does not hold a batch of one image.*choose another device"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", batch_size="auto")
    assert memory.seen == [16, 8, 4, 2, 1]
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("size", ["0", "-4", "lots", "1.5"])
def test_sizes_that_there_are_not_are_refused(dataset, teacher, tmp_path, size):
    said = run(dataset, teacher, tmp_path / "c.zarr", size)
    assert f"'{size}' is no size of a batch: give a number of samples, at least 1, or auto" in said
    with pytest.raises(RelevanceError, match="batch_size must be at least 1, or auto, got most"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", batch_size="most")  # type: ignore[arg-type]
    assert not (tmp_path / "c.zarr").exists()


def run(dataset: Path, teacher: Path, out: Path, size: str) -> str:
    """What the command says."""
    paths = ["--data", str(dataset), "--teacher", str(teacher), "--out", str(out)]
    result = CliRunner().invoke(main, ["cache-explanations", *paths, "--draws", "1", "--batch-size", size])
    return " ".join(result.output.split())
