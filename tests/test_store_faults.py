"""Crash safety: whatever goes wrong at whatever moment, a reader sees committed shards only, and the same work done
again gives the store that it would have given undisturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from faulty import Disk, Fault, FaultyStore, PowerError, in_memory, watching
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import HEAD, arrays, content, expected, files, filled, info, refusal, same
from zarr.storage import MemoryStore

import cli
import teacher_cache.claims as claims
import teacher_cache.store
from data.storage import Location
from teacher_cache import Cache, CacheError, CacheInfo, check_complete, claim_writing, create_cache, open_cache

ROOT = Path(__file__).parent.parent
INFO = info(samples=6)
RIGHT = {0: [expected(INFO, 0)], 1: [expected(INFO, 1), expected(INFO, 1, seed=1)]}


def work(location: Location) -> None:
    """Make a store, continue it where it was begun, and write one committed shard again, with other content."""
    cache = create_cache(location, INFO, HEAD)
    with claim_writing(cache) as claim:
        for shard in np.flatnonzero(~cache.committed()).tolist():
            assert claim.take(shard)
            cache.write_shard(shard, content(INFO, shard))
        cache.write_shard(1, content(INFO, 1, seed=1))


def undisturbed() -> dict[str, bytes]:
    store = MemoryStore()
    work(store)
    return files(store)


UNDISTURBED = undisturbed()


@pytest.fixture(autouse=True, scope="module")
def _metadata_is_made_once():
    """The same metadata is wanted thousands of times here, and Zarr takes its time to make it."""
    made, make = {}, teacher_cache.store._files

    def remembered(of: CacheInfo, head: dict[str, np.ndarray]) -> dict[str, bytes]:
        key = json.dumps([of.to_dict(), bool(head)])
        if key not in made:
            made[key] = make(of, head)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache.store, "_files", remembered)
        yield


@pytest.fixture(autouse=True)
def _killed_processes_are_gone(monkeypatch):
    """Their leases are this process's, which lives on."""
    monkeypatch.setattr(claims, "process_runs", lambda pid: False)
    monkeypatch.setattr(claims, "SETTLING", 0)


def assert_only_what_is_right_can_be_read(location: Location) -> None:
    said = refusal(lambda: open_cache(location))
    if said is not None:
        assert any(words in said for words in ("no heatmap store at", "not finished", "last layer"))
        return
    cache = open_cache(location)
    for shard in range(INFO.shards):
        assert cache.is_committed(shard) == cache.committed()[shard]
        if cache.committed()[shard]:
            assert any(same(cache.read_shard(shard), right) for right in RIGHT[shard])
        else:
            assert "is not there yet" in (refusal(lambda shard=shard: cache.read_shard(shard)) or "")


def assert_the_same_work_finishes(location: Location) -> None:
    work(location)
    found = files(location)
    assert {key: raw for key, raw in found.items() if not key.startswith("claims/")} == UNDISTURBED


@pytest.mark.parametrize(
    ("mode", "passing"), [("before", False), ("before", True), ("after", False), ("torn", False)], ids=str
)
def test_a_store_that_fails_at_any_call_is_continued_to_the_same_bytes(mode, passing):
    for at in range(10_000):
        store, fault = MemoryStore(), Fault(at, mode, passing)
        try:
            work(FaultyStore(store, fault))
        except OSError:
            assert fault.struck
        assert_only_what_is_right_can_be_read(store)
        assert_the_same_work_finishes(store)
        if not fault.struck:
            break
    assert at > 30


def test_the_continued_store_is_the_same_for_plain_zarr():
    store = MemoryStore()
    with pytest.raises(OSError, match="power"):
        work(FaultyStore(store, Fault(20, "torn")))
    work(store)
    one, other = arrays(store), arrays(in_memory(UNDISTURBED))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_every_metadata_that_was_cut_is_refused_by_readers_and_mended_by_the_writer():
    for key in [key for key in UNDISTURBED if key.endswith("zarr.json")]:
        for length in (0, 1, len(UNDISTURBED[key]) // 2, len(UNDISTURBED[key]) - 1):
            store = in_memory(UNDISTURBED | {key: UNDISTURBED[key][:length]})
            said = refusal(lambda store=store: open_cache(store))
            if key == "head/zarr.json":  # for plain Zarr alone
                assert said is None
            elif key.startswith("head/"):
                assert "the teacher's last layer in the store" in said
            else:
                assert f"{key} is cut off or damaged" in said
            assert_the_same_work_finishes(store)


def test_attributes_that_are_not_half_of_ours_are_left_alone():
    for foreign in (b"{", b'{"mine": 1', b"[]", b"notes", UNDISTURBED["zarr.json"] + b"x"):
        if UNDISTURBED["zarr.json"].startswith(foreign):
            continue
        store = in_memory({"zarr.json": foreign})
        with pytest.raises(FileExistsError, match="holds no store of ours: choose another out"):
            create_cache(store, INFO, HEAD)
        assert files(store) == {"zarr.json": foreign}


# The file system


def steps(tmp_path: Path) -> int:
    """How many operations on files the work takes."""
    count = []
    with watching(tmp_path / "counted", lambda operation, path: count.append(operation)):
        work(tmp_path / "counted")
    return len(count)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_any_step_is_an_error_that_names_the_place(tmp_path, number):
    for at in range(0, steps(tmp_path), 1 if number == errno.ENOSPC else 7):
        out, count = tmp_path / f"{number}-{at}", []

        def fail(operation: str, path: Path, at: int = at, count: list = count) -> None:
            count.append(operation)
            if len(count) > at and operation != "unlink":  # a full disk lets files be removed
                raise OSError(number, os.strerror(number), str(path) if operation != "write" else None)

        with watching(out, fail):
            error = run(lambda out=out: work(out))
        if len(count) <= at + 1 and error.exit_code == 0:
            continue  # what failed was the last thing, removing what was not there
        assert error.exit_code == 1
        assert error.output.startswith("Error: ")
        assert os.strerror(number) in error.output
        assert str(out) in error.output or str(out.parent) in error.output
        assert ".partial" not in error.output
        assert error.output.count("\n") == 1
        assert_only_what_is_right_can_be_read(out)
        assert not list(out.rglob("*.partial")) or number != errno.ENOSPC
        if at % 5 == 0:
            with watching(out, lambda operation, path: None):
                assert_the_same_work_finishes(out)
            assert not list(out.rglob("*.partial"))


def run(what: Callable[[], None]):
    """As a command of the program runs it."""

    @click.group(cls=cli.Commands)
    def group() -> None:
        pass

    group.command("it")(what)
    result = CliRunner().invoke(group, ["it"])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def test_killed_at_any_step_it_is_continued_to_the_same_bytes_without_litter(tmp_path):
    for at in range(steps(tmp_path)):
        out, count = tmp_path / str(at), []

        def kill(operation: str, path: Path, at: int = at, count: list = count) -> None:
            count.append(operation)
            if len(count) > at:
                raise PowerError  # nothing more is done, not even to clean up

        with watching(out, kill), pytest.raises(PowerError):
            work(out)
        with watching(out, lambda operation, path: None):
            assert_only_what_is_right_can_be_read(out)
            if at % 3 == 0:
                assert_the_same_work_finishes(out)
                assert not list(out.rglob("*.partial"))


def test_a_folder_that_vanishes_at_any_step_is_not_made_again(tmp_path):
    for at in range(2, steps(tmp_path)):  # after it was made
        out, count = tmp_path / str(at), []

        def vanish(operation: str, path: Path, at: int = at, count: list = count, out: Path = out) -> None:
            count.append(operation)
            if len(count) == at + 1:
                shutil.rmtree(out)  # the store and nothing computed from the path at hand

        with watching(out, vanish):
            result = run(lambda out=out: work(out))
        assert not out.exists()
        if len(count) > at + 2:  # else it was done, and syncing and tidying were left
            assert result.exit_code == 1
            assert str(out) in result.output
            assert result.output.count("\n") == 1


def test_a_store_that_was_removed_and_made_again_is_not_written_by_who_knew_the_first(tmp_path):
    out = tmp_path / "c.zarr"
    with claim_writing(create_cache(out, INFO, HEAD)) as claim:
        assert claim.take(0)
        shutil.rmtree(out)
        with pytest.raises(CacheError, match=r"the store .*c\.zarr was removed while it was being written"):
            claim.take(1)
        create_cache(out, INFO, HEAD)
        with pytest.raises(CacheError, match="was removed while it was being written"):
            claim.take(1)


@pytest.mark.parametrize(("trusts_files", "trusts_folders"), [(True, True), (False, True), (True, False)])
def test_after_a_loss_of_power_at_any_step_all_that_is_committed_is_right(tmp_path, trusts_files, trusts_folders):
    """Where syncing does nothing, the same test must fail, or it would prove nothing."""
    out, rng = tmp_path / "c.zarr", random.Random(0)
    disk, images = Disk(out, trusts_files, trusts_folders), []

    def after(operation: str, path: Path) -> None:
        disk.after(operation, path)
        for image in (disk.certain(), disk.possible(rng), disk.possible(rng), disk.possible(rng)):
            if image not in images[-6:]:
                images.append(image)

    with watching(out, disk.before, after):
        work(out)
    assert len(images) > 25  # each a state of its own: as all is synced at once, there are few

    def check() -> None:
        for number, image in enumerate(images):
            assert_only_what_is_right_can_be_read(in_memory(image))
            if number % 5 == 0:
                assert_the_same_work_finishes(in_memory(without_litter(image)))

    if trusts_files and trusts_folders:
        check()
        assert without_litter(disk.certain()) == UNDISTURBED
    else:
        with pytest.raises((AssertionError, CacheError)):
            check()


def without_litter(image: dict[str, bytes]) -> dict[str, bytes]:
    return {key: raw for key, raw in image.items() if not key.endswith(".partial")}


@example(killed=85, seed=0)  # between giving the last layer its name and syncing the folder
@example(killed=106, seed=0)
@given(killed=st.integers(0, 150), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_killed_continued_and_then_without_power_all_that_is_committed_is_right(tmp_path_factory, killed, seed):
    out, rng, count = tmp_path_factory.mktemp("disk") / "c.zarr", random.Random(seed), []
    disk = Disk(out)

    def kill(operation: str, path: Path) -> None:
        disk.before(operation, path)
        count.append(operation)
        if len(count) > killed:
            raise PowerError

    def look(operation: str, path: Path) -> None:
        disk.after(operation, path)
        if rng.random() < 0.2:
            assert_only_what_is_right_can_be_read(in_memory(disk.possible(rng)))
            assert_only_what_is_right_can_be_read(in_memory(disk.certain()))

    try:
        with watching(out, kill, disk.after):
            work(out)
    except PowerError:
        with watching(out, disk.before, look):
            work(out)
    assert without_litter(disk.certain()) == UNDISTURBED


# For real


WRITER = """
import os, resource, signal, sys
import click, cli, tqdm  # before becoming somebody else, who may not be allowed to read them
from stores import HEAD, content, filled, info
from teacher_cache import claim_writing, create_cache
OF = info(samples=40, image_shape=(3, 20, 20), shard_samples=16)

@click.group(cls=cli.Commands)
def group(): pass

@group.command("write")
@click.argument("out")
def write(out):
    cache = create_cache(out, OF, HEAD)
    with claim_writing(cache):
        for shard, there in enumerate(cache.committed()):
            if not there:
                cache.write_shard(shard, content(OF, shard))

"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", WRITER + code, *arguments],
        env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_a_full_disk_is_one_sentence_and_the_same_command_continues(tmp_path):
    """The system itself refuses to write past a size, in the middle of a file of heatmaps."""
    out = str(tmp_path / "c.zarr")
    full = python("resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY)); group()", "write", out)
    assert full.returncode == 1
    assert full.stderr == f"Error: {out}/heatmaps/c.0.0.0.0.0: {os.strerror(errno.EFBIG)}\n"
    assert not open_cache(out).committed().any()
    assert not list(Path(out).rglob("*.partial"))
    again = python("group()", "write", out)
    assert again.returncode == 0, again.stderr
    whole = filled(tmp_path / "whole.zarr", open_cache(out).info)
    check_complete(open_cache(out))
    assert files(out) == files(whole.store)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_one_sentence(request):
    """As another user: nothing can be created beside the store, or written in it; reading is fine."""
    # a folder of its own, as those of pytest are for its own user alone
    request.addfinalizer((folder := tempfile.TemporaryDirectory()).cleanup)
    place = Path(folder.name)
    place.chmod(0o755)
    if not all(os.stat(above).st_mode & 0o001 for above in place.parents):
        pytest.skip("others cannot reach the folder for temporary files")
    out = place / "c.zarr"
    filled(out)
    before = files(out)
    dropped = python("os.setuid(65534); group()", "write", str(place / "new.zarr"))
    assert dropped.returncode == 1
    assert dropped.stderr == f"Error: {place}/new.zarr: {os.strerror(errno.EACCES)}\n"
    repaired = python("os.setuid(65534); sys.argv[0] = 'cli.py'; cli.main()", "inspect-cache", str(out), "--repair")
    assert repaired.returncode == 1
    assert repaired.stderr == f"Error: {out}/zarr.json: {os.strerror(errno.EACCES)}\n"
    shown = python("os.setuid(65534); sys.argv[0] = 'cli.py'; cli.main()", "inspect-cache", str(out), "--verify")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert files(out) == before


@pytest.mark.parametrize("place", ["file/c.zarr", "file", "/proc/nowhere/c.zarr", "/dev/null", "/dev/null/c.zarr"])
def test_a_place_that_can_be_no_folder_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    result = run(lambda: work(out))
    assert result.exit_code == 1
    assert place.split("/c.zarr")[0] in result.output
    assert result.output.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CacheError, match="no heatmap store at"):
        open_cache(out)


def test_a_working_directory_that_is_gone_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(lambda: work("c.zarr")).exit_code == 1


def test_a_store_interrupted_while_it_is_read_by_others_shows_them_whole_shards_only(tmp_path):
    """A reader that opened the store earlier sees shards come and go, and never a mixture."""
    writer, reader = filled(tmp_path / "c.zarr", INFO), open_cache(tmp_path / "c.zarr")
    assert same(reader.read_shard(1), RIGHT[1][0])
    seen = []

    def look(operation: str, path: Path) -> None:
        try:
            seen.append(reader.read_shard(1))
        except CacheError:
            seen.append(None)

    with watching(tmp_path / "c.zarr", look):
        writer.write_shard(1, content(INFO, 1, seed=1))
    assert None in seen
    assert all(shard is None or any(same(shard, right) for right in RIGHT[1]) for shard in seen)
    assert same(reader.read_shard(1), RIGHT[1][1])


def test_a_cache_is_a_zarr_store_to_whoever_opens_it(tmp_path):
    cache: Cache = filled(tmp_path / "c.zarr", INFO)
    tree = zarr.open_group(str(tmp_path / "c.zarr"), mode="r")
    assert {name for name, _ in tree.members()} == {*cache._plan, "head"}
