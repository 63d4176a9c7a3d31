"""Storage back-ends: a local folder, an fsspec URL, or any other Zarr store, behind one set of methods.

Each back-end is also a Zarr store, so that Zarr itself reads and writes through it. A failed operation raises an
OSError that names the location. This module knows nothing about the layout of datasets and heatmap stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
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
from zarr.storage import FsspecStore, LocalStore, StorePath, WrapperStore

Location = str | Path | Store  # a path, an fsspec URL (s3://bucket/name), or a Zarr store
T = TypeVar("T")
PARTIAL = ".partial"
VANISHED = "the folder being written to has vanished"
AT_ONCE = 64  # concurrent requests to a remote store
ROOT = "zarr.json"  # key of the root group's metadata
WRITABLE = "give a folder, or a URL that takes writes, such as s3://bucket/name"
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # the errors that mean "no such key"


class Storage(Store):
    """A Zarr store with the synchronous methods that this project reads and writes through.

    The defaults use Zarr's asynchronous methods, so they work on every store. A back-end overrides those that it can
    do faster or more safely.
    """

    folder: Path | None = None  # the local folder, where the back-end is one

    def make(self) -> bool:
        """Create the location if it is a folder that does not exist, and sync what a killed writer left there.

        Returns:
            True if the folder is new; False if it exists, or if the back-end needs none.

        Raises:
            NotADirectoryError: The location exists and is not a folder.
        """
        return False

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """Read the bytes of a key, or its byte range [start, stop).

        Returns:
            The bytes; None if the key does not exist.
        """
        byte_range = None if stop is None else RangeByteRequest(start, stop)
        value = sync(self.get(key, default_buffer_prototype(), byte_range))
        return None if value is None else value.to_bytes()

    def read_pieces(self, key: str, start: int, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        """Read consecutive byte ranges of an existing key. A remote store is asked once for all of them.

        Args:
            key: The key.
            start: Position of the first piece.
            lengths: Number of bytes of each piece.

        Yields:
            Each piece, uint8 (length,), shorter if the key ends before. It is valid until the next one is read.
        """
        raw = np.frombuffer(self.read(key, start, start + sum(lengths)) or b"", np.uint8)
        stops = np.cumsum(lengths)
        yield from (raw[stop - length : stop] for stop, length in zip(stops, lengths, strict=True))

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Read several keys. A remote store gets many requests at once.

        Returns:
            For each key, the result of `read`.
        """

        async def get(key: str) -> bytes | None:
            value = await self.get(key, default_buffer_prototype())
            return None if value is None else value.to_bytes()

        return sync(concurrent_map([(key,) for key in keys], get, limit=AT_ONCE))

    def write(self, key: str, value: Any, *, exclusive: bool = False) -> bool:
        """Write one key, whole or not at all.

        Args:
            key: The key.
            value: Any contiguous buffer.
            exclusive: Keep the value of a key that exists already.

        Returns:
            False if ``exclusive`` is set and the key existed. A remote key that already holds this value counts as
            written, because a client that retries may meet its own first attempt.
        """
        content = default_buffer_prototype().buffer.from_bytes(bytes(value))
        if not exclusive:
            sync(self.set(key, content))
            return True
        sync(self.set_if_not_exists(key, content))
        return self.read(key) == content.to_bytes()

    def remove(self, key: str) -> None:
        """Remove a key, if it exists."""
        sync(self.delete(key))

    def remove_all(self) -> None:
        """Remove every key. The root's metadata goes last: while it exists, the location is known to be ours."""
        self.sweep()
        for name in sorted(self.names(), key=lambda name: name == ROOT):
            if name != ROOT:
                sync(self.delete_dir(name))
            self.remove(name)

    def remove_root(self) -> None:
        """Remove the empty folder that `make` created."""

    def sweep(self, older_than: float = 0.0) -> None:
        """Remove the partial files of killed writers.

        Args:
            older_than: Keep files that are younger than this, in seconds. With 0, no other process may be writing.
        """

    def names(self, prefix: str = "") -> list[str]:
        """List the names directly under a prefix, without the prefix; empty if there are none."""
        paths = sync(_collect(self.list_dir(prefix)))
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
        return [name for name in names if name and not name.endswith(PARTIAL)]

    def all_keys(self) -> list[str]:
        """List every key."""
        return sync(_collect(self.list()))

    def size(self) -> int:
        """Count the stored bytes of all keys. Others may be writing meanwhile."""
        return int(sync(self.getsize_prefix("")))


def absolute(location: Location) -> Location:
    """Resolve a location so that it means the same in every process and working directory.

    Args:
        location: A path, an fsspec URL, or a Zarr store.

    Returns:
        URLs and stores unchanged; paths as absolute strings.

    Raises:
        OSError: The location is a `pathlib.Path` made from a URL, or the working directory has vanished.
    """
    if isinstance(location, Store):
        return location
    text = str(location).removeprefix("file://")
    if "://" in text:
        return text
    if isinstance(location, Path) and re.match(r"\w+:/", text):  # "s3://bucket" is "s3:/bucket" as a Path
        raise OSError(f"{text} was a URL before it became a pathlib.Path: pass it as a str")
    try:
        return str(Path(text).absolute())  # keeps "link/..", which may not exist here
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "the working directory has vanished", text) from None


def open_store(location: Location, *, writable: bool = False) -> Storage:
    """Open the back-end of a location, which need not exist.

    Args:
        location: A path, an fsspec URL, or a Zarr store.
        writable: Allow writing. A Zarr store keeps its own mode.

    Returns:
        A `Folder` for a path, a `Remote` for a URL, an `Adapter` around any other Zarr store.

    Raises:
        OSError: No installed package can open the URL.
    """
    location = absolute(location)
    if isinstance(location, Store):
        if isinstance(location, Storage):
            return location
        sync(StorePath.open(location, ""))  # a ZipStore reads nothing before it is opened
        return Adapter(location)
    if "://" in (text := str(location)):
        return _remote(text, writable)
    return Folder(Path(text), read_only=not writable)


def _remote(url: str, writable: bool) -> Remote:
    # Other processes write too, so listings must not be cached. A protocol's options, such as the address of an S3
    # server, come from fsspec's own configuration (its files, or FSSPEC_S3_ENDPOINT_URL and the like).
    try:
        store = FsspecStore.from_url(url, storage_options={"use_listings_cache": False})
    except ImportError as error:
        raise OSError(
            f"{url} needs a package that is not installed ({error}): pip install 'explanation-distillation[remote]', "
            "or the fsspec implementation of that protocol"
        ) from None
    except (ValueError, TypeError) as error:
        raise OSError(f"{url} cannot be opened ({error}): give a folder, or a URL such as s3://bucket/name") from None
    if not store.path.strip("/"):
        raise OSError(f"{url} names no place: give a folder, or a URL such as s3://bucket/name")
    return Remote(store.fs, url, store.path, read_only=not writable)


class Adapter(Storage, WrapperStore[Store]):
    """Any other Zarr store, such as a `zarr.storage.MemoryStore`."""

    def __str__(self) -> str:
        return str(self._store)

    def with_read_only(self, read_only: bool = False) -> Adapter:
        """Wrap a read-only copy of the store, or the store itself, as Zarr's wrappers up to 3.1.5 make no such copy."""
        try:
            return type(self)(self._store.with_read_only(read_only))
        except NotImplementedError:
            return type(self)(self._store)

    async def getsize_prefix(self, prefix: str) -> int:
        return await self._store.getsize_prefix(prefix)


class Folder(Storage, LocalStore):
    """A local folder with atomic, durable writes: write a partial file, sync it, rename it, sync its folder.

    Zarr's own store creates missing folders again. Here a vanished root is an error, because everything that was
    committed there has vanished with it.
    """

    @property
    def folder(self) -> Path:  # type: ignore[override]
        return self.root

    async def _open(self, *, mode: Any = None) -> None:
        self._is_open = True

    def _ensure_open_sync(self) -> None:
        self._is_open = True

    def make(self) -> bool:
        is_new = not self.root.exists()
        if not is_new and not self.root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.root))
        _make_folder(self.root)
        _sync_folder(self.root.parent)
        for folder, _, _ in os.walk(self.root):
            _sync_folder(Path(folder))
        return is_new

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with self._reading(key, start) as file:
                if stop is None:
                    return file.read()
                content = file.read(stop - start)
                while len(content) < stop - start and (more := file.read(stop - start - len(content))):
                    content += more  # some file systems return less than was asked for
                return content
        except MISSING:
            return None

    def read_pieces(self, key: str, start: int, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        # All pieces go through one buffer, which is small enough to stay in the processor's cache.
        buffer = np.empty(max(lengths, default=0), np.uint8)
        with self._reading(key, start) as file:
            for length in lengths:
                filled = 0
                while filled < length and (more := file.readinto(buffer.data[filled:length])):
                    filled += more
                yield buffer[:filled]

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        return [self.read(key) for key in keys]

    @contextlib.contextmanager
    def _reading(self, key: str, start: int) -> Iterator[FileIO]:
        try:
            with (self.root / key).open("rb", buffering=0) as file:
                if start:
                    file.seek(start)
                yield file
        except MISSING:
            raise
        except OSError as error:  # an error of read() does not name the file
            raise OSError(error.errno, error.strerror, str(self.root / key)) from error

    def write(self, key: str, value: Any, *, exclusive: bool = False) -> bool:
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
                with contextlib.suppress(OSError):  # a failed clean-up must not hide the first error
                    partial.unlink()
        except OSError as error:
            if not self.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, VANISHED, str(self.root)) from error
            raise OSError(error.errno, error.strerror, str(path)) from error
        return True

    def remove(self, key: str) -> None:
        """Remove a key, if it exists, or everything below it."""
        self._check_writable()
        path = self._place(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            _sync_folder(path.parent)

    def remove_root(self) -> None:
        self.root.rmdir()

    def sweep(self, older_than: float = 0.0) -> None:
        for path in self.root.rglob(f".*.{'[0-9a-f]' * 32}{PARTIAL}"):  # the names that `write` gives
            with contextlib.suppress(FileNotFoundError):
                if not older_than or time.time() - path.stat().st_mtime > older_than:
                    path.unlink()

    def size(self) -> int:
        total = 0
        for path in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def _place(self, key: str) -> Path:
        """Resolve the path of a key to write or to delete. It must be below the folder."""
        parts = Path(key).parts
        if not parts or ".." in parts or Path(key).is_absolute():
            raise ValueError(f"'{key}' is no key of {self.root}")
        return self.root / key

    # Zarr's own reads and writes take the same safe way.

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.write, key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self.write, key, value.as_buffer_like(), exclusive=True)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.remove, key)

    async def delete_dir(self, prefix: str) -> None:
        await asyncio.to_thread(self.remove, prefix)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.write(key, value.as_buffer_like())

    def delete_sync(self, key: str) -> None:
        self.remove(key)


def _link(partial: Path, path: Path) -> bool:
    """Rename a partial file unless the name is taken; False if it is."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():  # this file system has no hard links: look, then rename
            return False
        os.replace(partial, path)
    return True


def _make_folder(path: Path, below: Path | None = None) -> None:
    """Create a folder and its missing parents (only those ``below`` another), so that they survive a power cut."""
    if path.is_dir():
        return
    if path == below or path == path.parent:  # the latter if the working directory has vanished
        raise FileNotFoundError(errno.ENOENT, VANISHED, str(path))
    _make_folder(path.parent, below)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a parent folder that we may enter but not read; it cannot be synced from here
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


class Remote(Storage, FsspecStore):
    """A store behind a URL. Every failure is an OSError that names the URL and says what to do.

    The protocol's own client retries after transient errors. S3's client does so for every kind of interruption.
    """

    def __init__(self, fs: Any, url: str, path: str, read_only: bool = False):
        super().__init__(fs, read_only, path, allowed_exceptions=())
        self.url = url

    def with_read_only(self, read_only: bool = False) -> Remote:
        return type(self)(self.fs, self.url, self.path, read_only)

    def __str__(self) -> str:
        return self.url

    async def get(self, key: str, prototype: Any = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        # Before it reads a whole object, s3fs makes a request for its size. For a range it makes none.
        byte_range = byte_range or OffsetByteRequest(0)
        try:
            return await self._try(super().get(key, prototype or default_buffer_prototype(), byte_range))
        except MISSING:
            return None

    async def exists(self, key: str) -> bool:
        return await self._try(super().exists(key))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        try:
            await self._try(super().set(key, value, byte_range), writes=True)
        except NotImplementedError:
            raise OSError(f"{self.url}: its protocol does not write; {WRITABLE}") from None

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key unless it exists.

        This is atomic if the protocol has conditional writes (S3, GCS). Otherwise it looks first, then writes.
        """
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
        # S3 removes many keys at once, and may report nothing for those that it kept
        if left := [key async for key in self.list_prefix(f"{prefix}/")]:
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
        """List the keys under a prefix with their sizes, in one request."""
        try:
            files = await self._try(self.fs._find(f"{self.path}/{prefix}".rstrip("/"), detail=True))
        except MISSING:
            return {}
        return {path.removeprefix(f"{self.path}/"): int(info["size"] or 0) for path, info in files.items()}

    async def _try(self, operation: Awaitable[T], *, writes: bool = False) -> T:
        """Await an operation of the client and turn its own exceptions into OSError."""
        try:
            return await operation
        except MISSING as error:
            if writes or _code(error) == "NoSuchBucket":
                raise OSError(f"{self.url}: there is no such bucket: create it, or correct the URL") from error
            raise
        except (TypeError, NotImplementedError, FileExistsError):
            raise
        except Exception as error:  # each protocol's client has its own exceptions
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise FileExistsError(f"{self.url}: {error}") from error
            raise OSError(f"{self.url}: {_reason(error)}; {_remedy(error)}") from error


def _code(error: BaseException) -> str | None:
    """Read the error code of an S3 server; None if there is none."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _reason(error: Exception) -> str:
    """Tell an exception in one line."""
    text = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _remedy(error: Exception) -> str:
    kind = type(error).__name__
    if getattr(error, "status", None) in (405, 501):  # of a web server that knows no PUT
        return WRITABLE
    if isinstance(error, PermissionError) or "Credentials" in kind or "Token" in kind:
        return (
            "check the credentials (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role) and "
            "their permissions"
        )
    if isinstance(error, TimeoutError | ConnectionError) or any(word in kind for word in ("Connect", "Timeout")):
        return "check the network and the server's address (for S3 AWS_ENDPOINT_URL), then run the command again"
    return "if the failure was temporary, run the same command again: it resumes"


async def _collect(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


def process_runs(pid: int) -> bool:
    """Check whether a process of this machine is running.

    A writer uses it to tell whether another writer, whose mark it finds, is still alive.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return pid > 0
