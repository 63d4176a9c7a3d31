"""Who writes a store: one process at a time, or several that share the work shard by shard.

In a folder, claims are locks of the kernel on byte ranges of the group's metadata file, a byte a shard: they end with
the process, however it ends. Elsewhere they are leases, small objects that are renewed, and void when they are not.
A claim keeps work from being done twice. That nothing wrong is ever read does not hang on it: a shard whose parts are
from two writers does not have the checksums of its commit record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.storage import ROOT, Storage, process_runs
from teacher_cache.layout import CacheError
from teacher_cache.store import CONTINUE, Cache

LEASE_SECONDS, RENEWED_EVERY, SETTLING = 60.0, 15.0, 1.0
HERE = 2**62  # the byte that every process that shares holds, so that none begins alone beside it
ABANDONED = 3600.0  # seconds after which what is half-written is nobody's


class Claims(Protocol):
    """What one process may write."""

    def take(self, shard: int) -> bool:
        """Whether the shard is this process's to write. Raises CacheError where the whole store no longer is."""

    def drop(self, shard: int) -> None:
        """Give a shard back."""

    def close(self) -> None:
        """Give everything back."""


@contextlib.contextmanager
def claim_writing(cache: Cache, *, share: bool = False) -> Iterator[Claims]:
    """Claim a store for writing; with ``share``, each shard by itself. Raises CacheError where another one writes."""
    claims = _locks(cache, share) or Leases(cache.store, cache.path, share)
    try:
        yield claims
    finally:
        claims.close()


def _refusal(path: str, detail: str = "") -> CacheError:
    return CacheError(
        f"another process is writing {path}{detail}: let it finish, or start both with --share, so that they divide "
        "the shards between them"
    )


def _locks(cache: Cache, share: bool) -> Locks | None:
    """Locks, where the store is a folder on a system that has them."""
    if cache.store.folder is None or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    locks = Locks(cache.store.folder, share)
    try:
        held = locks.lock(fcntl.F_RDLCK, HERE, 1) if share else locks.lock(fcntl.F_WRLCK, 0, 0)
    except OSError as error:
        locks.close()
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    if not held:
        locks.close()
        raise _refusal(cache.path)
    cache.store.sweep(ABANDONED if share else 0)
    return locks


class Locks:
    """Claims by open-file-description locks (Linux)."""

    def __init__(self, folder: Path, share: bool):
        self._share, self._path = share, folder / ROOT
        self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def lock(self, kind: int, start: int, length: int) -> bool:
        """Lock a byte range; a length of 0 is to the end. False where another one holds some of it."""
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def take(self, shard: int) -> bool:
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            same = False
        if not same:
            raise CacheError(f"the store {self._path.parent} was removed while it was being written: {CONTINUE}")
        return not self._share or self.lock(fcntl.F_WRLCK, shard, 1)

    def drop(self, shard: int) -> None:
        if self._share:
            self.lock(fcntl.F_UNLCK, shard, 1)

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Lease:
    """Whose a claim is, and when it was last renewed, in seconds since 1970."""

    owner: str
    host: str
    pid: int
    renewed: float


class Leases:
    """Claims by objects ``claims/…`` in the store. A lease that was not renewed for a minute, or whose process on this
    machine is gone, is void; so is one that is a minute ahead of our clock, as nobody could say when it ends."""

    def __init__(self, store: Storage, path: str, share: bool):
        self._store, self._path, self._share = store, path, share
        self._me = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._renewer = threading.Thread(target=self._renew_all, name="leases", daemon=True)
        try:
            if other := self._other_writer():
                raise _refusal(path, _who(self._read(other)))
        except BaseException:
            self.close()
            raise
        self._renewer.start()

    def take(self, shard: int) -> bool:
        if not self._share:
            seen = self._read(WRITER)
            if seen is not None and seen.owner != self._me:
                raise _refusal(self._path, f"{_who(seen)}, as this one had not been heard of for a while")
            return True
        name = f"shard-{shard}"
        if not self._take(name):
            return False
        if self._alive(WRITER):  # looked at after taking, as the other looks at ours after taking its own
            self._drop(name)
            return False
        return True

    def drop(self, shard: int) -> None:
        if self._share:
            self._drop(f"shard-{shard}")

    def close(self) -> None:
        self._closed.set()
        if self._renewer.ident is not None:
            self._renewer.join()
        for name in list(self._held):
            with contextlib.suppress(OSError):  # it is void in a minute
                self._drop(name)

    def renew(self) -> None:
        """Say that the claims are still held; one that somebody else has taken meanwhile no longer is."""
        for name in list(self._held):
            with self._lock, contextlib.suppress(OSError):  # the next round tries again
                if name not in self._held:
                    continue
                seen = self._read(name)
                if seen is not None and seen.owner != self._me:
                    self._held.discard(name)
                else:
                    self._store.write(f"{CLAIMS}/{name}", self._lease())

    def _renew_all(self) -> None:
        while not self._closed.wait(RENEWED_EVERY):
            self.renew()

    def _other_writer(self) -> str | None:
        """The claim of somebody else that this one cannot be beside; claims the whole store unless it is shared."""
        if self._share:
            return WRITER if self._alive(WRITER) else None
        if not self._take(WRITER):
            return WRITER
        return next((name for name in self._store.names(CLAIMS) if name != WRITER and self._alive(name)), None)

    def _take(self, name: str) -> bool:
        mine = self._lease()
        if not self._store.write(f"{CLAIMS}/{name}", mine, exclusive=True):
            if self._alive(name):
                return False
            self._store.write(f"{CLAIMS}/{name}", mine)
            self._closed.wait(SETTLING)  # whoever takes over the same lease at the same moment: the last one has it
        seen = self._read(name)
        if seen is None or seen.owner != self._me:
            return False
        with self._lock:
            self._held.add(name)
        return True

    def _drop(self, name: str) -> None:
        with self._lock:
            if name in self._held:
                self._held.discard(name)
                seen = self._read(name)
                if seen is not None and seen.owner == self._me:
                    self._store.remove(f"{CLAIMS}/{name}")

    def _lease(self) -> bytes:
        lease = Lease(self._me, socket.gethostname(), os.getpid(), time.time())
        return json.dumps(dataclasses.asdict(lease)).encode()

    def _read(self, name: str) -> Lease | None:
        """None for no lease, and for what is none."""
        try:
            found = Lease(**json.loads(self._store.read(f"{CLAIMS}/{name}") or b""))
        except (ValueError, TypeError):
            return None
        kinds: tuple[Any, ...] = (str, str, int, (int, float))
        if not all(isinstance(value, kind) for value, kind in zip(dataclasses.astuple(found), kinds, strict=True)):
            return None
        return found if math.isfinite(found.renewed) else None

    def _alive(self, name: str) -> bool:
        lease = self._read(name)
        if lease is None or abs(time.time() - lease.renewed) > LEASE_SECONDS:
            return False
        return lease.host != socket.gethostname() or process_runs(lease.pid)


def _who(lease: Lease | None) -> str:
    if lease is None:
        return ""
    return f" (seen {max(0, time.time() - lease.renewed):.0f} s ago on {lease.host}, process {lease.pid})"


CLAIMS, WRITER = "claims", "writer"
