"""Claims on a store: one process writes at a time, or several divide the shards between them.

In a folder, a claim is a kernel lock on bytes of the group's metadata file, one byte for each shard. It ends with its
process. Elsewhere a claim is a lease, a small object that expires unless it is renewed. Claims only save work: readers
are safe without them, because a shard with parts of two writers does not match the checksums of its commit record.
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
from options import Message, Option
from teacher_cache.errors import CacheError
from teacher_cache.store import CONTINUE, Cache

LEASE_SECONDS, RENEWED_EVERY, SETTLING = 60.0, 15.0, 1.0
HERE = 2**62  # every sharing process locks this byte, so that no process can claim the whole store beside it
ABANDONED = 3600.0  # age in seconds from which on a partial file is not being written any more


class Claims(Protocol):
    """The claims of one process on a store."""

    def take(self, shard: int) -> bool:
        """Claim a shard.

        Returns:
            False if another process has claimed it.

        Raises:
            CacheError: This process has lost its claim on the whole store.
        """

    def drop(self, shard: int) -> None:
        """Release the claim on a shard."""

    def close(self) -> None:
        """Release all claims."""


@contextlib.contextmanager
def claim_writing(cache: Cache, *, share: bool = False) -> Iterator[Claims]:
    """Claim a store for writing, and release it at the end of the context.

    Args:
        cache: The store, opened writable.
        share: Claim each shard separately, so that several processes divide the shards between them.

    Yields:
        The claims of this process.

    Raises:
        CacheError: Another process is writing the store.
    """
    claims = _locks(cache, share) or Leases(cache.store, cache.path, share)
    try:
        yield claims
    finally:
        claims.close()


def _refusal(path: str, detail: str = "") -> CacheError:
    return CacheError(
        Message(
            f"another process is writing {path}{detail}: let it finish, or start both with ",
            Option("share", True),
            ", so that they divide the shards between them",
        )
    )


def _locks(cache: Cache, share: bool) -> Locks | None:
    """Claim by locks; None if the store is no folder, or the system has no such locks."""
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
        """Lock a byte range, to the end for a length of 0. Return False if another process holds part of it."""
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def take(self, shard: int) -> bool:
        try:
            is_same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise CacheError(
                Message(f"the store {self._path.parent} was removed while it was being written: ", CONTINUE)
            )
        return not self._share or self.lock(fcntl.F_WRLCK, shard, 1)

    def drop(self, shard: int) -> None:
        if self._share:
            self.lock(fcntl.F_UNLCK, shard, 1)

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Lease:
    """The owner of a claim, and the time of its last renewal in seconds since 1970."""

    owner: str
    host: str
    pid: int
    renewed: float


class Leases:
    """Claims by objects ``claims/…`` in the store.

    A lease expires a minute after its last renewal, or when its process on this machine ends. A lease that is a minute
    ahead of our clock is void too, because nobody could tell when it expires.
    """

    def __init__(self, store: Storage, path: str, share: bool):
        self._store, self._path, self._share = store, path, share
        self._me = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._renewer = threading.Thread(target=self._renew_all, name="leases", daemon=True)
        try:
            if other := self._other_writer():
                raise _refusal(path, _owner(self._read(other)))
        except BaseException:
            self.close()
            raise
        self._renewer.start()

    def take(self, shard: int) -> bool:
        if not self._share:
            lease = self._read(WRITER)
            if lease is not None and lease.owner != self._me:
                raise _refusal(self._path, f"{_owner(lease)}, because this process did not renew its claim in time")
            return True
        name = f"shard-{shard}"
        if not self._take(name):
            return False
        if self._alive(WRITER):  # check after taking: the other writer checks ours after taking its own
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
            with contextlib.suppress(OSError):  # the lease expires in a minute
                self._drop(name)

    def renew(self) -> None:
        """Renew the claims. A claim that another process has taken meanwhile is lost."""
        for name in list(self._held):
            with self._lock, contextlib.suppress(OSError):  # the next round tries again
                if name not in self._held:
                    continue
                lease = self._read(name)
                if lease is not None and lease.owner != self._me:
                    self._held.discard(name)
                else:
                    self._store.write(f"{CLAIMS}/{name}", self._lease())

    def _renew_all(self) -> None:
        while not self._closed.wait(RENEWED_EVERY):
            self.renew()

    def _other_writer(self) -> str | None:
        """Claim the whole store unless it is shared. Return the name of another process's conflicting claim, if any."""
        if self._share:
            return WRITER if self._alive(WRITER) else None
        if not self._take(WRITER):
            return WRITER
        return next((name for name in self._store.names(CLAIMS) if name != WRITER and self._alive(name)), None)

    def _take(self, name: str) -> bool:
        own_lease = self._lease()
        if not self._store.write(f"{CLAIMS}/{name}", own_lease, exclusive=True):
            if self._alive(name):
                return False
            self._store.write(f"{CLAIMS}/{name}", own_lease)
            self._closed.wait(SETTLING)  # of several that take over a lease at the same time, the last one keeps it
        lease = self._read(name)
        if lease is None or lease.owner != self._me:
            return False
        with self._lock:
            self._held.add(name)
        return True

    def _drop(self, name: str) -> None:
        with self._lock:
            if name in self._held:
                self._held.discard(name)
                lease = self._read(name)
                if lease is not None and lease.owner == self._me:
                    self._store.remove(f"{CLAIMS}/{name}")

    def _lease(self) -> bytes:
        lease = Lease(self._me, socket.gethostname(), os.getpid(), time.time())
        return json.dumps(dataclasses.asdict(lease)).encode()

    def _read(self, name: str) -> Lease | None:
        """Read a lease; None if it does not exist or is malformed."""
        try:
            lease = Lease(**json.loads(self._store.read(f"{CLAIMS}/{name}") or b""))
        except (ValueError, TypeError):
            return None
        kinds: tuple[Any, ...] = (str, str, int, (int, float))
        if not all(isinstance(value, kind) for value, kind in zip(dataclasses.astuple(lease), kinds, strict=True)):
            return None
        return lease if math.isfinite(lease.renewed) else None

    def _alive(self, name: str) -> bool:
        lease = self._read(name)
        if lease is None or abs(time.time() - lease.renewed) > LEASE_SECONDS:
            return False
        return lease.host != socket.gethostname() or process_runs(lease.pid)


def _owner(lease: Lease | None) -> str:
    if lease is None:
        return ""
    return f" (seen {max(0, time.time() - lease.renewed):.0f} s ago on {lease.host}, process {lease.pid})"


CLAIMS, WRITER = "claims", "writer"
