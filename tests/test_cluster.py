"""What stage one promises on a Dask cluster of real processes: the same store, whatever happens to its workers."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
import torch
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster, Worker
from test_stage_one import assert_equal_bit_for_bit

import pipeline.caching.cluster
import pipeline.caching.stage_one as stage_one
import teacher_cache.layout
from cli import main
from data import DatasetError, make_coloured_mnist
from pipeline import Forward, ModelError, batch, cache_explanations
from teacher_cache import CacheError, open_cache
from terminal.spelling import text_of
from trainer import train_teacher

ROOT = Path(__file__).parent.parent
EXPLAIN_SHARD, LOAD_TEACHER = stage_one.explain_shard, stage_one.load_teacher
loads: list[str] = []
sizes: list[int] = []  # of batches


# These run in the workers.


def restore() -> None:
    stage_one.explain_shard, stage_one.load_teacher, batch.Forward = EXPLAIN_SHARD, LOAD_TEACHER, Forward
    loads.clear()
    sizes.clear()


def count_loads() -> None:
    def counting(teacher, *dataset, **options):
        loads.append(teacher)
        return LOAD_TEACHER(teacher, *dataset, **options)

    stage_one.load_teacher = counting


def killed_while_it_computes_its_second_shard() -> None:
    calls: list[int] = []

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return EXPLAIN_SHARD(*args)

    stage_one.explain_shard = dying


def compute_slowly() -> None:
    def slow(*args):
        time.sleep(0.3)
        return EXPLAIN_SHARD(*args)

    stage_one.explain_shard = slow


def still_computing(dask_worker: Worker) -> bool:
    """Whether a thread of the worker is at a shard, cancelled or not."""
    return bool(dask_worker.active_threads)


def compute_nothing() -> None:
    def zero(*args):
        content = EXPLAIN_SHARD(*args)
        raise CacheError(f"{content.heatmaps.shape[0]} maps, and none is any good")

    stage_one.explain_shard = zero


def hold_twenty_images() -> None:
    def limited(model, images, *args):
        sizes.append(len(images))
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Forward(model, images, *args)

    batch.Forward = limited


def sizes_of_batches() -> list[int]:
    return sizes


def count_of_loads() -> int:
    return len(loads)


def kept_models() -> int:
    return len(stage_one._opened)


# These run here.


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        yield cluster
        with Client(cluster.scheduler_address) as client:
            pids = client.run(os.getpid).values()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture
def client(cluster) -> Iterator[Client]:
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client
        client.wait_for_workers(2, timeout=60)
        client.run(restore)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 64)


@pytest.fixture(scope="module")
def local(dataset, teacher, tmp_path_factory) -> Path:
    """The store that threads of this process make, with as many threads for PyTorch as a worker has."""
    path, threads = tmp_path_factory.mktemp("local") / "c.zarr", torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache.layout, "MAX_SHARD_SAMPLES", 64)
        cache_explanations(dataset, teacher, path, draws=2)
    torch.set_num_threads(threads)
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["cache-explanations", *map(str, arguments)])


def assert_one_paragraph(result: Result, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert words in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert "\n\n" not in result.output[result.output.index("Error:") :].strip()


def test_the_store_equals_that_of_a_local_run_bit_for_bit(dataset, teacher, local, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    paths = [os.path.relpath(path) for path in (dataset, teacher)]
    result = command(
        "--data", paths[0], "--teacher", paths[1], "--out", "c.zarr", "--draws", 2,
        "--scheduler", client.scheduler.address,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "300 samples in 5 shards" in result.output
    assert_equal_bit_for_bit(tmp_path / "c.zarr", local)


def test_coarse_maps_and_features_are_those_of_a_local_run_too(dataset, teacher, client, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, scheduler in (("here", None), ("there", client.scheduler.address)):
        cache_explanations(
            dataset, teacher, tmp_path / name, explainer="grad-cam", features=True, draws=2, scheduler=scheduler
        )
    torch.set_num_threads(threads)
    assert_equal_bit_for_bit(tmp_path / "there", tmp_path / "here")


def test_a_worker_loads_the_model_once_and_lets_go_of_it_in_the_end(dataset, teacher, client, tmp_path):
    client.run(count_loads)
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, scheduler=client.scheduler.address)
    counts = client.run(count_of_loads).values()
    assert max(counts) == 1
    assert set(client.run(kept_models).values()) == {0}


def test_a_worker_killed_while_it_computes_costs_nothing(dataset, teacher, local, client, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.caching.cluster, "IN_FLIGHT", 2)
    (victim, _), *others = client.run(os.getpid).items()
    pids = set(client.run(os.getpid).values())
    client.run(killed_while_it_computes_its_second_shard, workers=[victim])
    client.run(compute_slowly, workers=[address for address, _ in others])  # lest they leave it one shard alone
    done = cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=2, scheduler=client.scheduler.address)
    assert done.computed_shards == 5
    assert_equal_bit_for_bit(tmp_path / "c.zarr", local)
    client.wait_for_workers(2, timeout=60)
    assert set(client.run(os.getpid).values()) != pids


def test_a_shard_that_kills_every_worker_is_named(dataset, teacher, cluster, client, tmp_path, monkeypatch):
    client.run(killed_while_it_computes_its_second_shard)
    paths = ["--data", dataset, "--teacher", teacher, "--out", tmp_path / "c.zarr"]
    with monkeypatch.context() as patch:
        patch.setattr(cluster.scheduler, "allowed_failures", 0)
        result = command(*paths, "--scheduler", client.scheduler.address)
    assert_one_paragraph(result, "while they computed shard ")
    assert "look in the workers' logs" in result.output
    client.run(restore, on_error="ignore")  # the other worker may die just now, and its successor needs no restoring
    assert command(*paths, "--scheduler", client.scheduler.address).exit_code == 0


def test_interrupted_it_leaves_no_task_and_the_same_command_continues(dataset, teacher, local, client, tmp_path):
    client.run(compute_slowly)
    out = tmp_path / "c.zarr"
    program = "import teacher_cache.layout as layout; layout.MAX_SHARD_SAMPLES = 64; import cli; cli.main()"
    paths = ["--data", str(dataset), "--teacher", str(teacher), "--out", str(out), "--draws", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "cache-explanations", *paths, "--scheduler", client.scheduler.address],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(out.glob("commits/c.*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (1, False), errors
    assert errors.endswith("Aborted!\n")
    while any(client.run(still_computing).values()):  # a worker ends the shard that it is at, and commits it
        time.sleep(0.01)
    assert not client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
    there = open_cache(out).committed().sum()
    assert 0 < there < 5
    client.run(restore)
    done = cache_explanations(dataset, teacher, out, draws=2, scheduler=client.scheduler.address)
    assert done.computed_shards == 5 - there
    assert_equal_bit_for_bit(out, local)


@pytest.fixture
def silent_address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["silent_address", "free_address", "localhost", "htp://127.0.0.1:80", ""])
def test_an_address_where_no_scheduler_answers_is_said_and_nothing_written(
    address, dataset, teacher, tmp_path, request
):
    address = request.getfixturevalue(address) if address.endswith("_address") else address
    with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
        result = command("--data", dataset, "--teacher", teacher, "--out", tmp_path / "c.zarr", "--scheduler", address)
    assert_one_paragraph(result, f"no Dask scheduler answers at {address!r} (")
    assert not (tmp_path / "c.zarr").exists()


def test_without_the_package_distributed_its_extra_is_named(dataset, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    paths = ["--data", dataset, "--teacher", teacher, "--out", tmp_path / "c.zarr"]
    assert_one_paragraph(
        command(*paths, "--scheduler", "tcp://127.0.0.1:1"), "pip install 'explanation-distillation[distributed]'"
    )


def test_a_scheduler_that_is_lost_is_said(dataset, teacher, tmp_path, free_address):
    host, port = free_address.split(":")
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", host, "--port", port, "--no-dashboard"]
    scheduler = subprocess.Popen(program, stderr=subprocess.DEVNULL, cwd=tmp_path)
    paths = ["--data", str(dataset), "--teacher", str(teacher), "--out", str(tmp_path / "c.zarr")]
    process = subprocess.Popen(
        [sys.executable, "cli.py", "cache-explanations", *paths, "--scheduler", free_address],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "30s"},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    scheduler.kill()
    scheduler.wait()
    assert "has no worker yet: waiting for one" in line, line + process.stderr.read()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "Traceback" not in errors, errors
    assert "was lost" in errors, errors


def test_what_is_wrong_with_a_task_reaches_the_user_as_in_a_local_run(dataset, teacher, client, tmp_path):
    client.run(compute_nothing)
    paths = ["--data", dataset, "--teacher", teacher, "--out", tmp_path / "c.zarr"]
    result = command(*paths, "--scheduler", client.scheduler.address)
    assert_one_paragraph(result, "64 maps, and none is any good")


@pytest.mark.usefixtures("without_a_look")
def test_each_worker_finds_the_batch_that_its_own_memory_holds(dataset, teacher, client, tmp_path):
    client.run(hold_twenty_images)
    options = {"draws": 2, "batch_size": "auto", "scheduler": client.scheduler.address}
    assert cache_explanations(dataset, teacher, tmp_path / "c.zarr", **options).computed_shards == 5
    for found in client.run(sizes_of_batches).values():
        tried = [size for size in found if size > 20]
        assert tried == ([64, 32] if 64 in tried else [44, 32] if found else [])
        assert set(found) - set(tried) <= {16, 12}


def swap_after_the_store_is_created(monkeypatch, first: Path, second: Path | None) -> None:
    """From then on the workers find another thing, or none, at a path than this process did."""
    create = stage_one.create_cache

    def creating(*args):
        cache = create(*args)
        shutil.rmtree(first)
        if second is not None:
            shutil.copytree(second, first)
        return cache

    monkeypatch.setattr(stage_one, "create_cache", creating)


@pytest.mark.parametrize("what", ["teacher", "dataset", "nothing"])
def test_a_worker_that_sees_another_disk_is_refused(what, dataset, teacher, client, tmp_path, monkeypatch):
    data, model, out = tmp_path / "data.zarr", tmp_path / "teacher", tmp_path / "c.zarr"
    shutil.copytree(dataset, data)
    shutil.copytree(teacher, model)
    error: type[Exception]
    if what == "teacher":
        train_teacher(dataset, tmp_path / "other", steps=1, batch_size=32, seed=1)
        swap_after_the_store_is_created(monkeypatch, model, tmp_path / "other")
        error, words = ModelError, f"the teacher {model}, as .* sees it, is another one: the SHA-256 of its weights is"
    elif what == "dataset":
        make_coloured_mnist(tmp_path / "other", seed=1, limit=300)
        swap_after_the_store_is_created(monkeypatch, data, tmp_path / "other")
        error, words = DatasetError, f"the dataset {data}, as .* sees it, is another one: the fingerprint of its split"
    else:
        swap_after_the_store_is_created(monkeypatch, data, None)
        error, words = DatasetError, f"no dataset at {data}: .*as {platform.node()} sees it; every machine must see"
    with pytest.raises(error, match=words) as refused:
        cache_explanations(data, model, out, draws=2, scheduler=client.scheduler.address)
    assert ("python cli.py make-data" in text_of(refused.value)) == (what == "nothing")
    assert not open_cache(out).committed().any()


def test_shards_that_this_machine_does_not_see_in_the_end_are_missed(dataset, teacher, client, tmp_path, monkeypatch):
    create = stage_one.create_cache

    def creating(out, *args):  # the workers write to another folder, as if it were another disk under the same path
        create(tmp_path / "elsewhere", *args)
        return create(out, *args)

    monkeypatch.setattr(stage_one, "create_cache", creating)
    monkeypatch.setattr(stage_one, "absolute", lambda path: str(path).replace("c.zarr", "elsewhere"))
    monkeypatch.setattr(stage_one, "PAUSES_BEFORE_MISSED", (0, 0.01))
    with pytest.raises(CacheError, match=r"5 of them, shard 0 first, are not in the store .*c\.zarr as this machine"):
        cache_explanations(dataset, teacher, tmp_path / "c.zarr", scheduler=client.scheduler.address)


def test_locations_reach_other_processes_as_urls_or_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage_one.absolute("s3://bucket/x.zarr") == "s3://bucket/x.zarr"
    for here in ("c.zarr", Path("c.zarr/"), "./c.zarr", "file://c.zarr", f"file://{tmp_path}/c.zarr"):
        assert stage_one.absolute(here) == str(tmp_path / "c.zarr")
