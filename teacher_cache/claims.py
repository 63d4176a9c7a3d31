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
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from zarr.abc.store import Store

from data.storage import Folder, delete, names, read, write, write_new
from teacher_cache.layout import CacheError
from teacher_cache.store import GROUP, Cache

LEASE_SECONDS, RENEWED_EVERY, SETTLING = 60.0, 15.0, 1.0


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
    if not isinstance(cache.store, Folder) or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    locks = Locks(cache, share)
    try:
        held = share or locks.lock(fcntl.F_WRLCK, 0, 0)
    except OSError as error:
        locks.close()
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    if not held:
        locks.close()
        raise _refusal(cache.path)
    if not share:
        cache.store.sweep()
    return locks


class Locks:
    """Claims by open-file-description locks (Linux)."""

    def __init__(self, cache: Cache, share: bool):
        assert isinstance(cache.store, Folder)
        self._share, self._file = share, os.open(cache.store.root / GROUP, os.O_RDWR | os.O_CLOEXEC)

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
    machine is gone, is void."""

    def __init__(self, store: Store, path: str, share: bool):
        self._store, self._path, self._share = store, path, share
        self._me = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._renewer.start()
        if not share:
            other = None if self._take(WRITER) else WRITER
            other = other or next((name for name in names(store, CLAIMS) if name != WRITER and self._alive(name)), None)
            if other:
                seen = self._read(other)
                self.close()
                age = "" if seen is None else f" (seen {max(0, time.time() - seen.renewed):.0f} s ago"
                by = "" if seen is None else f" on {seen.host}, process {seen.pid})"
                raise _refusal(path, age + by)

    def take(self, shard: int) -> bool:
        if not self._share:
            if WRITER in self._lost:
                raise _refusal(self._path, ", as this one had not been heard of for a while")
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
        self._renewer.join()
        for name in list(self._held):
            with contextlib.suppress(OSError):  # it is void in a minute
                self._drop(name)

    def _take(self, name: str) -> bool:
        mine = self._lease()
        if not write_new(self._store, f"{CLAIMS}/{name}", mine):
            if self._alive(name):
                return False
            write(self._store, f"{CLAIMS}/{name}", mine)
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
                delete(self._store, f"{CLAIMS}/{name}")

    def _lease(self) -> bytes:
        lease = Lease(self._me, socket.gethostname(), os.getpid(), time.time())
        return json.dumps(dataclasses.asdict(lease)).encode()

    def _read(self, name: str) -> Lease | None:
        try:
            return Lease(**json.loads(read(self._store, f"{CLAIMS}/{name}") or b""))
        except (ValueError, TypeError):
            return None

    def _alive(self, name: str) -> bool:
        lease = self._read(name)
        if lease is None or time.time() - lease.renewed > LEASE_SECONDS:
            return False
        return lease.host != socket.gethostname() or _runs(lease.pid)

    def _renew(self) -> None:
        while not self._closed.wait(RENEWED_EVERY):
            for name in list(self._held):
                with self._lock, contextlib.suppress(OSError):  # the next round tries again
                    if name not in self._held:
                        continue
                    seen = self._read(name)
                    if seen is not None and seen.owner != self._me:
                        self._held.discard(name)
                        self._lost.add(name)
                    else:
                        write(self._store, f"{CLAIMS}/{name}", self._lease())


CLAIMS, WRITER = "claims", "writer"


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
