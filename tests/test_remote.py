"""What is promised of datasets and stores at URLs: the same bytes as in a folder, whatever the network does."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import boto3
import fsspec
import numpy as np
import pytest
import s3fs
import zarr
from click.testing import CliRunner, Result
from s3_faults import S3, Request, serve
from zarr.storage import MemoryStore

from cli import main
from data import DatasetError, DatasetWriter, make_coloured_mnist, open_dataset
from data.storage import Location, open_store
from pipeline import cache_explanations
from teacher_cache import CacheError, check_complete, claims, damaged_shards, inspect_cache, open_cache
from trainer import train_student, train_teacher

ROOT = Path(__file__).parent.parent
SAMPLES, SHARD = 100, 32  # so that a store has four shards


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serve() as s3:
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3:
    """The server as the only one that fsspec knows, with credentials that are none, and quick to try again."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retryhandler.random", types.SimpleNamespace(random=lambda: 0.02))  # its delays
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 3)
    connect(monkeypatch, server)
    other_client(server.url).create_bucket(Bucket="bucket")
    return server


def connect(monkeypatch: pytest.MonkeyPatch, server: S3, **options: object) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url, **options})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.layout.MAX_SHARD_SAMPLES", SHARD)


@pytest.fixture
def url(s3: S3, tmp_path: Path) -> str:
    """A place in the bucket for one test."""
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every story is compared with: dataset, teacher and store in folders."""
    path = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("teacher_cache.layout.MAX_SHARD_SAMPLES", SHARD)
        make_coloured_mnist(path / "data.zarr", limit=SAMPLES)
        train_teacher(path / "data.zarr", path / "teacher", steps=2, batch_size=32)
        cache_explanations(path / "data.zarr", path / "teacher", path / "cache.zarr", draws=2, features=True)
    return path


def put(server: S3, path: str, content: bytes = b"") -> None:
    """Write past fsspec's caches, as another process would."""
    bucket, key = path.split("/", 1)
    other_client(server.url).put_object(Bucket=bucket, Key=key, Body=content)


@functools.cache
def other_client(url: str) -> Any:
    return boto3.client("s3", endpoint_url=url, aws_access_key_id="other", aws_secret_access_key="other")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def contents(location: Location) -> dict[str, bytes | None]:
    """Every key with its bytes, but for what says who is writing."""
    store = open_store(location)
    return {key: store.read(key) for key in sorted(store.all_keys()) if not key.startswith("claims/")}


def make_small(location: Location) -> None:
    """A dataset of two splits, with fewer requests than those of COLOURED MNIST take."""
    rng = np.random.default_rng(0)
    with DatasetWriter(location) as writer:
        for split in ("train", "ood"):
            images = rng.integers(0, 256, (600, 3, 8, 8), np.uint8)
            writer.write_split(split, images=images, labels=rng.integers(0, 3, 600))
        writer.finish(name="small", class_names=["a", "b", "c"])


def refused(result: Result, *words: str) -> None:
    """One paragraph with these words, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.output.startswith("Error: ")
    assert len(result.output.strip().splitlines()) == 1
    assert all(word in result.output for word in words), result.output


def test_the_whole_story_at_urls_equals_the_one_in_folders(s3, url, local, tmp_path):
    data, cache, teacher = f"{url}/data.zarr", f"{url}/cache.zarr", tmp_path / "teacher"
    short = ["--steps", 2, "--batch-size", 32]
    story = [
        ["make-data", "coloured-mnist", "--out", data, "--limit", SAMPLES],
        ["train-teacher", "--data", data, "--out", teacher, *short],
        ["cache-explanations", "--data", data, "--teacher", teacher, "--out", cache, "--draws", 2, "--features"],
        ["train-student", "--data", data, "--cache", cache, "--out", tmp_path / "student", *short],
        ["evaluate", "--data", data, "--model", tmp_path / "student"],
    ]
    for line in story:
        assert (result := run(*line)).exit_code == 0, result.output
    assert contents(data) == contents(local / "data.zarr")
    assert contents(cache) == contents(local / "cache.zarr")

    there, here = inspect_cache(open_cache(cache)), inspect_cache(open_cache(local / "cache.zarr"))
    assert there == {**here, "path": cache}
    expected = train_student(local / "data.zarr", local / "cache.zarr", tmp_path / "local", steps=2, batch_size=32)
    found = json.loads((tmp_path / "student" / "result.json").read_text())
    assert found["loss"] == expected["loss"]


def now_and_then(request: Request) -> int | str | float | None:
    """A seventh of all requests goes wrong, in every way."""
    kinds = (500, 503, "cut", "lose", 0.01)
    return kinds[request.number // 7 % len(kinds)] if request.number % 7 == 0 else None


def test_passing_errors_are_survived_and_change_nothing(s3, url, local, tmp_path):
    with s3.failing(now_and_then):
        make_small(f"{url}/data.zarr")
        for split in open_dataset(f"{url}/data.zarr").splits.values():
            split.verify()
        cache_explanations(local / "data.zarr", local / "teacher", f"{url}/cache.zarr", draws=2, features=True)
        train_student(local / "data.zarr", f"{url}/cache.zarr", tmp_path / "student", steps=2, batch_size=32)
        assert s3.faults > 20
    make_small(tmp_path / "data.zarr")
    assert contents(f"{url}/data.zarr") == contents(tmp_path / "data.zarr")
    assert contents(f"{url}/cache.zarr") == contents(local / "cache.zarr")


@pytest.mark.parametrize("fault", [500, 503, "cut", "lose"])
def test_every_kind_of_request_survives_every_fault(s3, url, fault):
    store = open_store(url, writable=True)
    store.write("a/old", b"x" * 1000)
    once = {
        "write": lambda: store.write("a/new", b"y" * 1000),
        "read": lambda: store.read("a/old"),
        "range": lambda: store.read("a/old", 10, 500),
        "new": lambda: store.write("a/claimed", b"mine", exclusive=True),
        "taken": lambda: store.write("a/claimed", b"yours", exclusive=True),
        "names": lambda: store.names("a"),
        "keys": lambda: store.all_keys(),
    }
    expected = {"write": True, "read": b"x" * 1000, "range": b"x" * 490, "new": True, "taken": False}
    listed = ["claimed", "new", "old"]
    for name, action in once.items():
        with s3.failing(lambda request: fault if request.number == 1 else None):
            found = action()
            assert s3.faults == 1
        assert found == expected.get(name, [f"a/{key}" for key in listed] if name == "keys" else listed), name


@pytest.mark.usefixtures("without_a_look")
@pytest.mark.parametrize("fault", [403, 500, "lose"])
def test_lasting_errors_stop_with_a_reason_and_the_same_command_goes_on(s3, url, local, fault):
    cache = f"{url}/cache.zarr"
    command = [
        "cache-explanations",
        "--data",
        local / "data.zarr",
        "--teacher",
        local / "teacher",
        "--draws",
        2,
        "--features",
    ]
    written: set[str] = set()

    def after_two_shards(request: Request) -> int | str | None:
        if request.method != "PUT" or "/heatmaps/c." not in request.path:
            return None
        written.add(request.path)
        return fault if len(written) > 2 else None

    with s3.failing(after_two_shards):
        refused(run(*command, "--out", cache), cache)
    reader = open_cache(cache)
    assert reader.committed().sum() == 2
    assert damaged_shards(reader) == {}
    with pytest.raises(CacheError, match="is not there yet"):
        reader.read_shard(int(reader.committed().argmin()))
    with pytest.raises(CacheError, match="incomplete: 2 of 4"):
        check_complete(reader)
    assert (result := run(*command, "--out", cache)).exit_code == 0, result.output
    assert "from an earlier run" in result.output
    assert contents(cache) == contents(local / "cache.zarr")


def test_a_dataset_that_could_not_be_written_is_removed_or_marked_and_made_anew(s3, url, tmp_path):
    data = f"{url}/data.zarr"
    refusal = pytest.raises(OSError, match=f"{data}: injected AccessDenied; check the credentials")
    with (
        s3.failing(lambda request: 403 if request.method == "PUT" and "/ood/images" in request.path else None),
        refusal,
    ):
        make_small(data)
    assert contents(data) == {}
    with s3.failing(lambda request: 403 if request.number > 30 else None), refusal:
        make_small(data)
    with pytest.raises(DatasetError, match="was not finished, or is still being written: build it again"):
        open_dataset(data)
    make_small(data)
    make_small(tmp_path / "data.zarr")
    expected = contents(tmp_path / "data.zarr")
    assert contents(data) == expected
    for taken in (data, url):
        with pytest.raises(FileExistsError, match="exists and is not empty: choose another out"):
            make_small(taken)
    assert contents(data) == expected


def test_a_removal_that_the_server_only_pretends_is_noticed(s3, url, monkeypatch):
    store = open_store(url, writable=True)
    store.write("train/images", b"x")

    async def pretend(*arguments: object, **options: object) -> list[str]:
        return []

    monkeypatch.setattr(s3fs.S3FileSystem, "_bulk_delete", pretend)
    with pytest.raises(OSError, match="could not be removed"):
        zarr.core.sync.sync(store.delete_dir("train"))


class TestClaims:
    """Leases, where there are no locks."""

    @pytest.fixture
    def cache(self, url: str, local: Path) -> str:
        cache_explanations(local / "data.zarr", local / "teacher", f"{url}/cache.zarr", draws=2, features=True)
        return f"{url}/cache.zarr"

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claims, "SETTLING", 0.05)
        monkeypatch.setattr(claims, "RENEWED_EVERY", 0.2)

    def test_of_two_writers_the_second_is_refused(self, cache):
        opened = [open_cache(cache, writable=True) for _ in range(2)]
        with claims.claim_writing(opened[0]):
            with pytest.raises(CacheError, match="another process is writing"), claims.claim_writing(opened[1]):
                pass
            with contextlib.suppress(CacheError), claims.claim_writing(opened[1], share=True) as second:
                assert not second.take(0)
        with claims.claim_writing(opened[1]) as second:
            assert second.take(0)

    def test_those_who_share_divide_the_shards(self, cache):
        opened = [open_cache(cache, writable=True) for _ in range(2)]
        with claims.claim_writing(opened[0], share=True) as first, claims.claim_writing(opened[1], share=True) as other:
            assert [first.take(0), other.take(0), other.take(1), first.take(1)] == [True, False, True, False]
            first.drop(0)
            assert other.take(0)

    def test_one_that_was_killed_blocks_nobody(self, s3, cache):
        code = (
            f"import time, teacher_cache as t; c = t.open_cache({cache!r}, writable=True)\n"
            "with t.claim_writing(c): print('claimed', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment(s3))
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"claimed\n"
            opened = open_cache(cache, writable=True)
            with pytest.raises(CacheError, match=f"process {process.pid}"), claims.claim_writing(opened):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        with claims.claim_writing(opened) as ours:
            assert ours.take(0)

    def test_one_of_another_host_that_fell_silent_is_void(self, s3, cache):
        lease = {"owner": "other", "host": "elsewhere", "pid": 1, "renewed": time.time()}
        path = cache.removeprefix("s3://") + "/claims/writer"
        put(s3, path, json.dumps(lease).encode())
        opened = open_cache(cache, writable=True)
        with pytest.raises(CacheError, match="on elsewhere"), claims.claim_writing(opened):
            pass
        put(s3, path, json.dumps({**lease, "renewed": time.time() - 3600}).encode())
        with claims.claim_writing(opened) as ours:
            assert ours.take(0)


def environment(s3: S3, **changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "FSSPEC_S3_ENDPOINT_URL": s3.url, **changes}


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"])
def test_the_servers_address_comes_from_the_clients_own_settings(s3, url, name):
    variables = {key: value for key, value in environment(s3).items() if not key.startswith("FSSPEC_")}
    command = [sys.executable, "cli.py", "make-data", "coloured-mnist", "--limit", "5", "--out", url]
    done = subprocess.run(command, cwd=ROOT, env={**variables, name: s3.url}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(open_dataset(url).split("ood")) == 5


def test_no_listing_comes_from_memory(s3, url, local):
    cache = f"{url}/cache.zarr"
    cache_explanations(local / "data.zarr", local / "teacher", cache, draws=2, features=True)
    ours, key = open_cache(cache, writable=True), "commits/c.1.0"
    record = ours.store.read(key)
    ours.uncommit(1)
    assert ours.committed().tolist() == [True, False, True, True]
    put(s3, f"{cache.removeprefix('s3://')}/{key}", record)
    assert ours.committed().all()
    assert key in ours.store.all_keys()

    with pytest.raises(DatasetError, match="no dataset at"):
        open_dataset(f"{url}/data.zarr")
    for name, content in contents(local / "data.zarr").items():
        put(s3, f"{url.removeprefix('s3://')}/data.zarr/{name}", content)
    assert len(open_dataset(f"{url}/data.zarr").splits) == 5


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_protocols_hold_the_same(scheme, local, tmp_path):
    place = f"{scheme}://{tmp_path}"
    data, cache = f"{place}/data.zarr", f"{place}/cache.zarr"
    make_coloured_mnist(data, limit=SAMPLES)
    cache_explanations(data, local / "teacher", cache, draws=2, features=True)
    train_student(data, cache, tmp_path / "student", steps=1, batch_size=32)
    assert contents(data) == contents(local / "data.zarr")
    assert contents(cache) == contents(local / "cache.zarr")
    with pytest.raises(FileExistsError, match="choose another out"):
        make_coloured_mnist(data, limit=SAMPLES)
    if scheme == "file":
        assert contents(tmp_path / "cache.zarr") == contents(cache)


def test_a_store_of_zarr_is_a_location_too():
    store = MemoryStore()
    with DatasetWriter(store) as writer:
        writer.write_split("train", images=np.ones((4, 3, 8, 8), np.uint8), labels=np.arange(4))
        writer.finish(name="mine", class_names=list("abcd"))
    assert open_dataset(store).split("train").labels[:].tolist() == [0, 1, 2, 3]


class TestWhatIsWrong:
    """Errors of the place reach the user as one paragraph that names it and the remedy."""

    @pytest.fixture
    def evaluate(self, local: Path) -> list[object]:
        return ["evaluate", "--model", local / "teacher", "--data"]

    @pytest.mark.parametrize("place", ["s3://nobucket/x", "s3://nobucket"])
    def test_no_such_bucket(self, s3, evaluate, place):
        refused(run(*evaluate, place), f"{place}: there is no such bucket: create it, or correct the URL")
        refused(run("make-data", "coloured-mnist", "--out", place), f"{place}: there is no such bucket")

    def test_nothing_there(self, s3, url, evaluate):
        refused(run(*evaluate, url), f"no dataset at {url}", "build one with")
        store = ["train-student", "--data", url, "--cache", url, "--out", "nowhere"]
        refused(run(*store), f"no dataset at {url}")

    def test_wrong_credentials(self, s3, url, evaluate):
        address = urlparse(s3.url)

        def authorise_from(request: str) -> None:
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            connection.request("POST", "/moto-api/reset-auth", request, {"Content-Type": "text/plain"})
            assert connection.getresponse().status == 200
            connection.close()

        authorise_from("0")
        try:
            for command in (evaluate, ["make-data", "coloured-mnist", "--out"]):
                refused(run(*command, url), f"{url}: The AWS Access Key Id you provided", "check the credentials")
        finally:
            authorise_from("inf")

    def test_no_credentials(self, s3, url, evaluate, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        connect(monkeypatch, s3, default_block_size=2**20)  # a client that was not asked before
        refused(run(*evaluate, url), f"{url}: NoCredentialsError", "check the credentials")

    def test_nobody_listens(self, s3, url, evaluate, monkeypatch):
        connect(monkeypatch, S3(port=9))
        refused(run(*evaluate, url), f"{url}: EndpointConnectionError", "check the network", "AWS_ENDPOINT_URL")

    def test_nobody_answers(self, s3, url, evaluate, monkeypatch):
        connect(monkeypatch, s3, config_kwargs={"read_timeout": 0.1, "retries": {"max_attempts": 0}})
        with s3.failing(lambda request: 0.5):
            refused(run(*evaluate, url), f"{url}: Read timeout", "check the network")

    def test_a_package_is_missing(self, s3, url, evaluate, monkeypatch):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
        refused(run(*evaluate, url), f"{url} needs a package", "pip install 'explanation-distillation[remote]'")

    @pytest.mark.parametrize("place", ["s3://", "s4://bucket/x", "memory://"])
    def test_what_is_no_place(self, s3, evaluate, place):
        refused(run(*evaluate, place), place, "give a folder, or a URL such as s3://bucket/name")

    def test_models_live_in_folders(self, url):
        for command in (["train-teacher", "--data", url, "--out", url], ["evaluate", "--data", url, "--model", url]):
            result = run(*command)
            assert result.exit_code == 2
            assert "Only datasets and stores can have a URL: give a local folder" in " ".join(result.output.split())


# --- fingerprints ----------------------------------------------------------------------------------------------------


def write_foreign(location: str) -> None:
    """A dataset of another program: through Zarr, without a fingerprint."""
    root = zarr.create_group(location, zarr_format=3)
    train = root.create_group("train")
    train.create_array("images", data=np.full((8, 3, 16, 16), 200, np.uint8))
    train.create_array("labels", data=np.arange(8) % 2)
    root.attrs.put({"kind": "explanation-distillation dataset", "format_version": 1, "class_names": ["a", "b"]})


def test_a_foreign_dataset_at_a_url_is_given_its_fingerprint(url):
    write_foreign(url)
    before = open_store(url).all_keys()
    result = CliRunner().invoke(main, ["add-fingerprints", "--data", url])
    assert result.exit_code == 0, result.output
    written = json.loads(open_store(url).read("train/zarr.json") or b"")["attributes"]["fingerprint"]
    assert result.output == f"{url}: train {written[:12]}…\n"
    assert open_store(url).all_keys() == before
    open_dataset(url).split("train").verify()


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_web_server_that_takes_no_writes_is_named_with_the_remedy(tmp_path):
    write_foreign(str(tmp_path / "d.zarr"))
    zarr.consolidate_metadata(str(tmp_path / "d.zarr"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}/d.zarr"
            result = CliRunner().invoke(main, ["add-fingerprints", "--data", address])
        finally:
            server.shutdown()
    assert result.exit_code == 1
    assert address in result.output
    assert "give a folder, or a URL that takes writes, such as s3://bucket/name" in result.output
