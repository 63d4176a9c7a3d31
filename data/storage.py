"""Where bytes lie: a folder, written durably, or any fsspec URL, both as stores of Zarr. Knows no layout.

What is written to a folder is on the disk, whole, before the call returns, or was never written. The stores of
Zarr below raise OSError, which names the place, for everything that can go wrong between here and there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, WrapperStore

Location = str | Path | Store  # a path, a URL of fsspec (s3://bucket/name), or a store of Zarr
T = TypeVar("T")
PARTIAL = ".partial"
VANISHED = "the folder that is being written to has vanished"
AT_ONCE = 64  # requests to a remote store


def open_store(location: Location, *, writable: bool = False) -> Store:
    """The Zarr store at a location, which need not exist. Raises OSError for a URL that nothing here can open."""
    if isinstance(location, Store):
        return location
    text = str(location)
    if text.startswith("file://"):
        location = text.removeprefix("file://")
    elif "://" in text:
        return _remote(text, writable)
    return Folder(Path(location), read_only=not writable)


def _remote(url: str, writable: bool) -> Store:
    # Other processes write too, so no listing may come from memory; options of a protocol, such as the address of an
    # S3 server, are fsspec's own configuration (its files, or FSSPEC_S3_ENDPOINT_URL and the like)
    options = {"use_listings_cache": False}
    try:
        return Remote(FsspecStore.from_url(url, storage_options=options, read_only=not writable), url)
    except ImportError as error:
        raise OSError(
            f"{url} needs a package that is not installed ({error}): pip install 'explanation-distillation[remote]', "
            "or the fsspec implementation of that protocol"
        ) from None
    except (ValueError, TypeError) as error:
        raise OSError(f"{url} cannot be opened: {error}") from None


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
        _sync_folder(self.root)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with (self.root / key).open("rb", buffering=0) as file:
                if start:
                    file.seek(start)
                if stop is None:
                    return file.read()
                found = file.read(stop - start)
                while len(found) < stop - start and (more := file.read(stop - start - len(found))):
                    found += more  # some file systems answer in parts
                return found
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except OSError as error:  # what a read says names no file
            raise OSError(error.errno, error.strerror, str(self.root / key)) from error

    def write(self, key: str, value: Any, *, exclusive: bool = False) -> bool:
        """False where ``exclusive`` and there is one already."""
        self._check_writable()
        path = self.root / key
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
        for path in self.root.rglob(f".*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):
                if not older_than or time.time() - path.stat().st_mtime > older_than:
                    path.unlink()

    def delete_sync(self, key: str) -> None:
        super().delete_sync(key)
        if (self.root / key).parent.is_dir():
            _sync_folder((self.root / key).parent)

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


class Remote(WrapperStore[FsspecStore]):
    """A store behind a URL, whose every failure is an OSError that names it."""

    def __init__(self, store: FsspecStore, url: str):
        super().__init__(store)
        self.url = url

    def _with_store(self, store: FsspecStore) -> Remote:
        return type(self)(store, self.url)

    def __str__(self) -> str:
        return self.url

    async def get(self, key: str, prototype: Any = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await self._try(self._store.get(key, prototype or default_buffer_prototype(), byte_range))

    async def exists(self, key: str) -> bool:
        return await self._try(self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        await self._try(self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Atomic where the protocol has conditional writes (S3, GCS); else it looks, then writes."""
        try:
            await self._try(self._store.fs._pipe_file(f"{self._store.path}/{key}", value.to_bytes(), mode="create"))
        except FileExistsError:
            pass
        except (TypeError, NotImplementedError):
            if not await self.exists(key):
                await self.set(key, value)

    async def delete(self, key: str) -> None:
        await self._try(self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._try(self._store.delete_dir(prefix))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in await self._try(_collect(self._store.list_dir(prefix))):
            yield name

    async def _try(self, operation: Awaitable[T]) -> T:
        try:
            return await operation
        except (OSError, TypeError, NotImplementedError, KeyboardInterrupt):
            raise
        except Exception as error:  # each protocol's client has exceptions of its own
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error


async def _collect(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


def read(store: Store, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """The bytes of a key, or [start, stop) of them; None where there is no such key."""
    if isinstance(store, Folder):
        return store.read(key, start, stop)
    wanted = None if stop is None else RangeByteRequest(start, stop)
    found = sync(store.get(key, default_buffer_prototype(), wanted))
    return None if found is None else found.to_bytes()


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
    """Remove everything."""
    for name in names(store):
        if not isinstance(store, Folder):
            sync(store.delete_dir(name))
        delete(store, name)


def size(store: Store) -> int:
    """Bytes of everything in it, as stored; somebody may be writing."""
    if isinstance(store, Folder):
        total = 0
        for path in store.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total
    return int(sync(store.getsize_prefix("")))
