"""Where bytes lie: a folder, written durably, or any fsspec URL, both as stores of Zarr. Knows no layout.

What is written to a folder is on the disk, whole, before the call returns, or was never written. The stores of
Zarr below raise OSError, which names the place, for everything that can go wrong between here and there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

Location = str | Path | Store  # a path, a URL of fsspec (s3://bucket/name), or a store of Zarr
T = TypeVar("T")
PARTIAL = ".partial"
VANISHED = "the folder that is being written to has vanished"
AT_ONCE = 64  # requests to a remote store
ROOT = "zarr.json"  # the metadata of the root
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # what says that there is no such key


def absolute(location: Location) -> Location:
    """What means the same in every process and working directory: URLs and stores as they are, paths made absolute."""
    if isinstance(location, Store):
        return location
    text = str(location).removeprefix("file://")
    if "://" in text:
        return text
    if isinstance(location, Path) and re.match(r"\w+:/", text):  # "s3://bucket" is "s3:/bucket" as a Path
        raise OSError(f"{text} was a URL before it became a pathlib.Path: give it as a str")
    try:
        return str(Path(text).absolute())  # "link/.." stays, as it is not always here
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "the working directory has vanished", text) from None


def open_store(location: Location, *, writable: bool = False) -> Store:
    """The Zarr store at a location, which need not exist. Raises OSError for a URL that nothing here can open."""
    location = absolute(location)
    if isinstance(location, Store):
        return location
    if "://" in (text := str(location)):
        return _remote(text, writable)
    return Folder(Path(text), read_only=not writable)


def _remote(url: str, writable: bool) -> Store:
    # Other processes write too, so no listing may come from memory; options of a protocol, such as the address of an
    # S3 server, are fsspec's own configuration (its files, or FSSPEC_S3_ENDPOINT_URL and the like)
    try:
        found = FsspecStore.from_url(url, storage_options={"use_listings_cache": False})
    except ImportError as error:
        raise OSError(
            f"{url} needs a package that is not installed ({error}): pip install 'explanation-distillation[remote]', "
            "or the fsspec implementation of that protocol"
        ) from None
    except (ValueError, TypeError) as error:
        raise OSError(f"{url} cannot be opened ({error}): give a folder, or a URL such as s3://bucket/name") from None
    if not found.path.strip("/"):
        raise OSError(f"{url} names no place: give a folder, or a URL such as s3://bucket/name")
    return Remote(found.fs, url, found.path, read_only=not writable)


class Folder(LocalStore):
    """A local folder whose writes are atomic and durable: written aside, synced, renamed, and the folder synced.

    Zarr's own store makes missing folders again; here a root that has vanished is an error, as nothing that was
    committed there is there any more.
    """

    async def _open(self, *, mode: Any = None) -> None:
        self._is_open = True

    def _ensure_open_sync(self) -> None:
        self._is_open = True

    def make(self) -> None:
        """Create the folder itself; what a writer that was killed made in it, and did not sync, is synced."""
        _make_folder(self.root)
        _sync_folder(self.root.parent)
        for folder, _, _ in os.walk(self.root):
            _sync_folder(Path(folder))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with self._reading(key, start) as file:
                if stop is None:
                    return file.read()
                found = file.read(stop - start)
                while len(found) < stop - start and (more := file.read(stop - start - len(found))):
                    found += more  # some file systems answer in parts
                return found
        except MISSING:
            return None

    def read_pieces(self, key: str, start: int, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        """See the function of this name. All go through one buffer, small enough to stay in the processor's cache."""
        buffer = np.empty(max(lengths, default=0), np.uint8)
        with self._reading(key, start) as file:
            for length in lengths:
                filled = 0
                while filled < length and (more := file.readinto(buffer.data[filled:length])):
                    filled += more
                yield buffer[:filled]

    @contextlib.contextmanager
    def _reading(self, key: str, start: int) -> Iterator[FileIO]:
        try:
            with (self.root / key).open("rb", buffering=0) as file:
                if start:
                    file.seek(start)
                yield file
        except MISSING:
            raise
        except OSError as error:  # what a read says names no file
            raise OSError(error.errno, error.strerror, str(self.root / key)) from error

    def write(self, key: str, value: Any, *, exclusive: bool = False) -> bool:
        """False where ``exclusive`` and there is one already."""
        self._check_writable()
        path = self._place(key)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            _make_folder(path.parent, below=self.root)
            try:
                with partial.open("xb", buffering=0) as file:
                    rest = memoryview(value).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                if not exclusive:
                    os.replace(partial, path)
                elif not _link(partial, path):
                    return False
                _sync_folder(path.parent)
            finally:
                with contextlib.suppress(OSError):  # that it could not be removed is not what went wrong
                    partial.unlink()
        except OSError as error:
            if not self.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, VANISHED, str(self.root)) from error
            raise OSError(error.errno, error.strerror, str(path)) from error
        return True

    def sweep(self, older_than: float = 0.0) -> None:
        """Remove what writers that were killed left half-written, some seconds ago; nobody may be writing that."""
        for path in self.root.rglob(f".*.{'[0-9a-f]' * 32}{PARTIAL}"):  # as `write` names them
            with contextlib.suppress(FileNotFoundError):
                if not older_than or time.time() - path.stat().st_mtime > older_than:
                    path.unlink()

    def delete_sync(self, key: str) -> None:
        path = self._place(key)
        super().delete_sync(key)
        if path.parent.is_dir():
            _sync_folder(path.parent)

    async def delete_dir(self, prefix: str) -> None:
        await asyncio.to_thread(self.delete_sync, prefix)

    def _place(self, key: str) -> Path:
        """Where a key lies, to write or to delete: below the folder, never the folder itself or a place outside it."""
        parts = Path(key).parts
        if not parts or ".." in parts or Path(key).is_absolute():
            raise ValueError(f"'{key}' is no key of {self.root}")
        return self.root / key

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.write, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.write, key, value.as_buffer_like(), exclusive=True)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.write(key, value.as_buffer_like())


def _link(partial: Path, path: Path) -> bool:
    """Give a file its name unless that is taken; False where it is."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():  # no hard links on this file system: look, then write
            return False
        os.replace(partial, path)
    return True


def _make_folder(path: Path, below: Path | None = None) -> None:
    """Create a folder with its parents (only those ``below`` another), so that they survive a loss of power."""
    if path.is_dir():
        return
    if path == below or path == path.parent:  # the second where the working directory is no more
        raise FileNotFoundError(errno.ENOENT, VANISHED, str(path))
    _make_folder(path.parent, below)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be entered and not read, above ours, can only be trusted
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


class Remote(FsspecStore):
    """A store behind a URL, whose every failure is an OSError that names it and says what to do.

    What is transient is tried again by the protocol's own client: S3's does so after every kind of interruption.
    """

    def __init__(self, fs: Any, url: str, path: str, read_only: bool = False):
        super().__init__(fs, read_only, path, allowed_exceptions=())
        self.url = url

    def with_read_only(self, read_only: bool = False) -> Remote:
        return type(self)(self.fs, self.url, self.path, read_only)

    def __str__(self) -> str:
        return self.url

    async def get(self, key: str, prototype: Any = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        # s3fs asks for the size of a whole object before it asks for its bytes, but not for that of a range
        wanted = byte_range or OffsetByteRequest(0)
        try:
            return await self._try(super().get(key, prototype or default_buffer_prototype(), wanted))
        except MISSING:
            return None

    async def exists(self, key: str) -> bool:
        return await self._try(super().exists(key))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        await self._try(super().set(key, value, byte_range), writes=True)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Atomic where the protocol has conditional writes (S3, GCS); else it looks, then writes."""
        try:
            content = value.to_bytes()
            await self._try(self.fs._pipe_file(f"{self.path}/{key}", content, mode="create"), writes=True)
        except FileExistsError:
            pass
        except (TypeError, NotImplementedError):
            if not await self.exists(key):
                await self.set(key, value)

    async def delete(self, key: str) -> None:
        self._check_writable()
        with contextlib.suppress(*MISSING):
            await self._try(self.fs._rm_file(f"{self.path}/{key}"))

    async def delete_dir(self, prefix: str) -> None:
        with contextlib.suppress(*MISSING):
            await self._try(super().delete_dir(prefix))
        if left := [key async for key in self.list_prefix(f"{prefix}/")]:  # S3 removes many at once, or says nothing
            raise OSError(f"{self.url}: {left[0]} could not be removed: check whether the credentials permit it")

    async def list(self) -> AsyncIterator[str]:
        for name in await self._find(""):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in await self._find(prefix):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        with contextlib.suppress(*MISSING):
            for name in await self._try(_collect(super().list_dir(prefix))):
                yield name

    async def getsize_prefix(self, prefix: str) -> int:
        return sum((await self._find(prefix)).values())

    async def _find(self, prefix: str) -> dict[str, int]:
        """The keys under a prefix, with their sizes, in one listing."""
        try:
            found = await self._try(self.fs._find(f"{self.path}/{prefix}".rstrip("/"), detail=True))
        except MISSING:
            return {}
        return {path.removeprefix(f"{self.path}/"): int(info["size"] or 0) for path, info in found.items()}

    async def _try(self, operation: Awaitable[T], *, writes: bool = False) -> T:
        try:
            return await operation
        except MISSING as error:
            if writes or _code(error) == "NoSuchBucket":
                raise OSError(f"{self.url}: there is no such bucket: create it, or correct the URL") from error
            raise
        except (TypeError, NotImplementedError, FileExistsError):
            raise
        except Exception as error:  # each protocol's client has exceptions of its own
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise FileExistsError(f"{self.url}: {error}") from error
            what = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise OSError(f"{self.url}: {' '.join(what.split())}; {_remedy(error)}") from error


def _code(error: BaseException) -> str | None:
    """The code that an S3 server gave, where there is one."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _remedy(error: Exception) -> str:
    kind = type(error).__name__
    if isinstance(error, PermissionError) or "Credentials" in kind or "Token" in kind:
        return (
            "check the credentials (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role) and what "
            "they permit"
        )
    if isinstance(error, TimeoutError | ConnectionError) or any(word in kind for word in ("Connect", "Timeout")):
        return "check the network and the server's address (for S3 AWS_ENDPOINT_URL), then run the command again"
    return "where the fault was a passing one, run the same command again: it continues"


async def _collect(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


def read(store: Store, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """The bytes of a key, or [start, stop) of them; None where there is no such key."""
    if isinstance(store, Folder):
        return store.read(key, start, stop)
    wanted = None if stop is None else RangeByteRequest(start, stop)
    found = sync(store.get(key, default_buffer_prototype(), wanted))
    return None if found is None else found.to_bytes()


def read_pieces(store: Store, key: str, start: int, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Pieces of a key's bytes, uint8 (length,), that lie one after the other; shorter where the key ends before.

    Each is there until the next one is asked for. From a remote store all of them are one request.
    """
    if isinstance(store, Folder):
        yield from store.read_pieces(key, start, lengths)
    else:
        raw = np.frombuffer(read(store, key, start, start + sum(lengths)) or b"", np.uint8)
        stops = np.cumsum(lengths)
        yield from (raw[stop - length : stop] for stop, length in zip(stops, lengths, strict=True))


def read_all(store: Store, wanted: Iterable[str]) -> list[bytes | None]:
    """What `read` says of each key; from a remote store, many at once."""
    if isinstance(store, Folder):
        return [store.read(key) for key in wanted]

    async def get(key: str) -> bytes | None:
        found = await store.get(key, default_buffer_prototype())
        return None if found is None else found.to_bytes()

    return sync(concurrent_map([(key,) for key in wanted], get, limit=AT_ONCE))


def write(store: Store, key: str, value: Any) -> None:
    """Write one key, whole or not at all; ``value`` is any contiguous buffer."""
    if isinstance(store, Folder):
        store.write(key, value)
    else:
        sync(store.set(key, default_buffer_prototype().buffer.from_bytes(bytes(value))))


def write_new(store: Store, key: str, value: bytes) -> bool:
    """Write a key unless there is one already; whether what is there now is ``value``."""
    if isinstance(store, Folder):
        return store.write(key, value, exclusive=True)
    sync(store.set_if_not_exists(key, default_buffer_prototype().buffer.from_bytes(value)))
    return read(store, key) == value


def delete(store: Store, key: str) -> None:
    """Remove a key; none is fine."""
    sync(store.delete(key))


def names(store: Store, prefix: str = "") -> list[str]:
    """What lies directly under a prefix, without it; empty where there is nothing."""

    async def collect() -> list[str]:
        return [name.rstrip("/").rsplit("/", 1)[-1] async for name in store.list_dir(prefix)]

    return [name for name in sync(collect()) if name and not name.endswith(PARTIAL)]


def keys(store: Store) -> list[str]:
    """Every key there is."""
    return sync(_collect(store.list()))


def clear(store: Store) -> None:
    """Remove everything. The metadata of the root goes last: while it is there, the place is known to be ours."""
    if isinstance(store, Folder):
        store.sweep()
    for name in sorted(names(store), key=lambda name: name == ROOT):
        if not isinstance(store, Folder) and name != ROOT:
            sync(store.delete_dir(name))
        delete(store, name)


def process_runs(pid: int) -> bool:
    """Whether a process of this machine runs, for those who find its mark where they want to write."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return pid > 0


def size(store: Store) -> int:
    """Bytes of everything in it, as stored; somebody may be writing."""
    if isinstance(store, Folder):
        total = 0
        for path in store.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total
    return int(sync(store.getsize_prefix("")))
