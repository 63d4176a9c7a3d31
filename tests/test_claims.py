"""Who may write: one process at a time, or several that divide the shards; locks in a folder, leases elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import HEAD, content, files, filled, info
from zarr.storage import MemoryStore

import teacher_cache.claims as claims
from data.storage import Storage, open_store
from teacher_cache import CacheError, check_complete, claim_writing, create_cache, open_cache
from teacher_cache.claims import CLAIMS, WRITER, Leases

ROOT = Path(__file__).parent.parent
INFO = info(samples=40, shard_samples=2)

WRITER_SCRIPT = """
import sys
from stores import content
from teacher_cache import CacheError, claim_writing, open_cache

def say(*words):
    print(*words, flush=True)

path, share = sys.argv[1], sys.argv[2] == "share"
cache = open_cache(path, writable=True)
try:
    with claim_writing(cache, share=share) as claim:
        say("claimed")
        sys.stdin.readline()
        for shard in range(cache.info.shards):
            if cache.is_committed(shard) or not claim.take(shard):
                continue
            if not cache.is_committed(shard):
                cache.write_shard(shard, content(cache.info, shard))
                say("wrote", shard)
                sys.stdin.readline()
            claim.drop(shard)
except CacheError as error:
    say("refused", error)
"""


class Process:
    """A real second writer, which goes on by one step for every line that it is given."""

    def __init__(self, path: Path, mode: str):
        places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER_SCRIPT, str(path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": places}, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout

    def says(self) -> str:
        return self.stdout.readline().strip()

    def go_on(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(file=self.stdin, flush=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def writer(path: Path, mode: str = "alone") -> Iterator[Process]:
    process = Process(path, mode)
    try:
        yield process
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def path(tmp_path) -> Path:
    create_cache(tmp_path / "c.zarr", INFO, HEAD)
    return tmp_path / "c.zarr"


def test_a_second_process_is_refused_and_after_kill_9_of_the_first_gets_it_at_once(path):
    with writer(path) as first:
        assert first.says() == "claimed"
        for mode in ("alone", "share"):
            with writer(path, mode) as second:
                assert second.says() == (
                    f"refused another process is writing {path}: let it finish, or start both with share=True, so that "
                    "they divide the shards between them"
                )
        first.kill()
        with writer(path) as second:
            assert second.says() == "claimed"


def test_a_claim_is_given_back_at_the_end(path):
    for share in (False, True, False):
        with claim_writing(open_cache(path, writable=True), share=share) as claim:
            assert claim.take(0)


def test_a_second_claim_in_the_same_process_is_refused_too(path):
    with claim_writing(open_cache(path, writable=True)) as claim:
        for share in (False, True):
            with (
                pytest.raises(CacheError, match="another process is writing"),
                claim_writing(open_cache(path, writable=True), share=share),
            ):
                pass
        assert claim.take(3)  # losing against it has not cost the first anything


def test_nobody_writes_alone_beside_one_that_shares_even_between_two_shards(path):
    with (
        claim_writing(open_cache(path, writable=True), share=True),
        pytest.raises(CacheError, match="another process is writing"),
        claim_writing(open_cache(path, writable=True)),
    ):
        pass


def test_two_processes_divide_the_shards_and_no_shard_is_written_twice(path):
    """In turns, one step each, and once the first is killed in the middle of a shard, the second takes that too."""
    with writer(path, "share") as first, writer(path, "share") as second:
        wrote: list[int] = []
        for each in (first, second):
            assert each.says() == "claimed"
        for _ in range(6):
            for each in (first, second):
                each.go_on()
                wrote.append(int(each.says().removeprefix("wrote ")))
        first.kill()
        while (said := (second.go_on(), second.says())[1]).startswith("wrote"):
            wrote.append(int(said.removeprefix("wrote ")))
        assert said == ""
        assert sorted(wrote) == list(range(INFO.shards))
    check_complete(open_cache(path))
    whole = filled(MemoryStore(), INFO)
    assert files(path) == files(whole.store)


def test_two_processes_at_full_speed_write_every_shard_once(path):
    processes = [Process(path, "share") for _ in range(2)]
    for each in processes:
        assert each.says() == "claimed"
    for each in processes:
        each.stdin.write("\n" * 100)
        each.stdin.flush()
    said = [each.process.communicate()[0].split("\n") for each in processes]
    wrote = [line for lines in said for line in lines if line.startswith("wrote")]
    assert sorted(wrote) == sorted(f"wrote {shard}" for shard in range(INFO.shards))
    assert files(path) == files(filled(MemoryStore(), INFO).store)


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next_one(path):
    litter = path / "heatmaps" / f".c.0.0.0.0.0.{'0f' * 16}.partial"
    litter.write_bytes(b"half")
    with claim_writing(open_cache(path, writable=True), share=True):
        assert litter.exists()  # perhaps somebody who shares is just writing it
    os.utime(litter, (0, 0))
    with claim_writing(open_cache(path, writable=True), share=True):
        assert not litter.exists()
    litter.write_bytes(b"half")
    with claim_writing(open_cache(path, writable=True)):
        assert not litter.exists()


# Leases: where the store is no local folder


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch):
    monkeypatch.setattr(claims, "SETTLING", 0)


@pytest.fixture
def store() -> Storage:
    return create_cache(MemoryStore(), INFO, HEAD).store


@contextlib.contextmanager
def leases(store: Storage, share: bool = False) -> Iterator[Leases]:
    found = Leases(store, "memory", share)
    try:
        yield found
    finally:
        found.close()


def rewrite(store: Storage, name: str, **changes: object) -> None:
    lease = json.loads(store.read(f"{CLAIMS}/{name}") or b"")
    store.write(f"{CLAIMS}/{name}", json.dumps({**lease, **changes}).encode())


def test_a_store_that_is_no_folder_is_claimed_by_a_lease_and_given_back(store):
    with claim_writing(open_cache(store)) as claim:
        assert isinstance(claim, Leases)
        with (
            pytest.raises(CacheError, match=r"is writing .* \(seen 0 s ago on .*, process \d+\): let it finish"),
            claim_writing(open_cache(store)),
        ):
            pass
        assert claim.take(0)
    assert store.names(CLAIMS) == []
    with claim_writing(open_cache(store)):
        pass


def test_a_lease_that_was_not_renewed_is_taken_over_and_its_owner_notices(store):
    with leases(store) as first:
        rewrite(store, WRITER, renewed=time.time() - claims.LEASE_SECONDS - 1)
        with leases(store) as second:
            assert second.take(0)
            with pytest.raises(CacheError, match="because this process did not renew its claim in time"):
                first.take(1)
            first.renew()  # does not take it back
            assert second.take(2)
            first.close()  # nor give it away
            assert store.names(CLAIMS) == [WRITER]


def test_a_lease_that_is_renewed_is_kept(store):
    with leases(store) as first:
        rewrite(store, WRITER, renewed=time.time() - claims.LEASE_SECONDS - 1)
        first.renew()
        with pytest.raises(CacheError, match="another process is writing"), leases(store):
            pass
        store.remove(f"{CLAIMS}/{WRITER}")
        first.renew()
        with pytest.raises(CacheError, match="another process is writing"), leases(store):
            pass


def test_the_lease_of_a_process_that_is_gone_is_taken_at_once(store):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with leases(store):
        rewrite(store, WRITER, pid=gone.pid)
        with leases(store) as second:
            assert second.take(0)


def test_the_lease_of_another_machine_lasts_until_its_time_is_over(store):
    with leases(store):
        rewrite(store, WRITER, host="elsewhere", pid=2**22 + 1)
        with pytest.raises(CacheError, match="on elsewhere"), leases(store):
            pass
        rewrite(store, WRITER, host="elsewhere", renewed=time.time() - claims.LEASE_SECONDS - 1)
        with leases(store) as second:
            assert second.take(0)


@pytest.mark.parametrize("ahead", [30, 90, 1e9])
def test_a_clock_that_runs_backwards_blocks_nobody_for_ever(store, ahead):
    """Within a minute clocks may differ; a lease from farther ahead would be valid nobody knows how long."""
    with leases(store):
        rewrite(store, WRITER, renewed=time.time() + ahead)
        with contextlib.ExitStack() as stack:
            if ahead < claims.LEASE_SECONDS:
                stack.enter_context(pytest.raises(CacheError, match="seen 0 s ago"))
            stack.enter_context(leases(store))


@given(
    garbage=st.one_of(
        st.binary(max_size=20),
        st.recursive(
            st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3)),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ).map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({
            name: st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.booleans())
            for name in ("owner", "host", "pid", "renewed")
        }).map(lambda value: json.dumps({**value, "host": value["host"] or ""}).encode()),
    )
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_garbage_in_the_place_of_a_lease_stops_nobody(garbage):
    store = open_store(MemoryStore())
    create_cache(store, info(samples=1), HEAD)
    store.write(f"{CLAIMS}/{WRITER}", garbage)
    store.write(f"{CLAIMS}/shard-0", garbage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "SETTLING", 0)
        with leases(store) as claim:
            assert claim.take(0)


def test_two_that_share_take_different_shards_by_lease(store):
    with leases(store, share=True) as first, leases(store, share=True) as second:
        assert [first.take(shard) for shard in range(3)] == [True] * 3
        assert [second.take(shard) for shard in range(5)] == [False] * 3 + [True] * 2
        first.drop(1)
        assert second.take(1)
        rewrite(store, "shard-2", renewed=0)
        assert second.take(2)
        first.drop(2)  # is no longer its own
        assert sorted(store.names(CLAIMS)) == [f"shard-{shard}" for shard in range(5)]
        with pytest.raises(CacheError, match="another process is writing"), leases(store):
            pass
        assert WRITER not in store.names(CLAIMS)
        first.drop(0)
    assert store.names(CLAIMS) == []


def test_one_that_shares_is_refused_where_another_one_writes_alone(store):
    with leases(store), pytest.raises(CacheError, match="another process is writing"), leases(store, share=True):
        pass
    with leases(store, share=True) as shares:
        lease = claims.Lease("other", "elsewhere", 1, time.time())
        store.write(f"{CLAIMS}/{WRITER}", json.dumps(dataclasses.asdict(lease)).encode())
        assert not shares.take(0)
        assert store.names(CLAIMS) == [WRITER]


def test_a_store_that_cannot_be_reached_leaves_no_thread_behind(store, monkeypatch):
    import threading

    def fail(*_: object, **__: object) -> bool:
        raise OSError("unreachable")

    monkeypatch.setattr(store, "write", fail)
    before = threading.active_count()
    with pytest.raises(OSError, match="unreachable"), leases(store):
        pass
    assert threading.active_count() == before


def test_a_folder_without_locks_uses_leases(path, monkeypatch):
    def unsupported(*_: object) -> bool:
        raise OSError(37, "no locks available")

    monkeypatch.setattr(claims.Locks, "lock", unsupported)
    with claim_writing(open_cache(path, writable=True)) as claim:
        assert isinstance(claim, Leases)
        with pytest.raises(CacheError, match="another process"), claim_writing(open_cache(path, writable=True)):
            pass
        cache = open_cache(path, writable=True)
        cache.write_shard(0, content(INFO, 0))
    assert open_cache(path).committed().tolist() == (np.arange(INFO.shards) == 0).tolist()
