"""Places to write to that fail at a chosen call: a store of Zarr, a file system, a disk that loses what is not synced.

A fault is chosen by its number, so that a test can try every one until the work runs through without it.
"""

from __future__ import annotations

import io
import itertools
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore, WrapperStore


class PowerError(Exception):
    """The process ends here: nothing in the program may catch this."""


@dataclass
class Fault:
    """Strikes at the n-th call, counted from 0, and at every one after it unless it is a passing one.

    ``before`` the operation, ``after`` it was done, or ``torn``: half of the bytes are there. The latter two count
    only what changes something.
    """

    at: int
    mode: str = "before"
    passing: bool = False
    error: Callable[[], BaseException] = lambda: OSError(5, "the power is gone")
    calls: int = 0

    @property
    def struck(self) -> bool:
        return self.calls > self.at

    def strikes(self, changes: bool) -> bool:
        if self.mode != "before" and not changes:
            return self.struck and not self.passing
        self.calls += 1
        return self.calls == self.at + 1 or (self.struck and not self.passing)


class FaultyStore(WrapperStore[Store]):
    """A store of Zarr with a fault."""

    def __init__(self, store: Store, fault: Fault):
        super().__init__(store)
        self.fault = fault

    def _with_store(self, store: Store) -> FaultyStore:
        return FaultyStore(store, self.fault)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        self._look()
        return await self._store.get(key, prototype or default_buffer_prototype(), byte_range)

    async def exists(self, key: str) -> bool:
        self._look()
        return await self._store.exists(key)

    async def set(self, key: str, value: Any) -> None:
        await self._change(self._store.set, key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        await self._change(self._store.set_if_not_exists, key, value)

    async def delete(self, key: str) -> None:
        await self._change(self._store.delete, key)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        self._look()
        async for name in self._store.list_dir(prefix):
            yield name

    def _look(self) -> None:
        if self.fault.strikes(changes=False):
            raise self.fault.error()

    async def _change(self, operation: Any, key: str, *value: Any) -> None:
        first = not self.fault.struck
        if not self.fault.strikes(changes=True):
            await operation(key, *value)
            return
        if first and self.fault.mode == "after":
            await operation(key, *value)
        elif first and self.fault.mode == "torn" and value:
            await operation(key, value[0][: len(value[0]) // 2])
        raise self.fault.error()


Hook = Callable[[str, Path], None]


@contextmanager
def watching(root: Path, before: Hook, after: Hook = lambda operation, path: None) -> Iterator[None]:
    """Call hooks around every change under ``root``: mkdir, create, write, fsync, replace, link, unlink.

    Nothing is really synced, so it is fast. What raises in the middle of a write leaves half of it.
    """

    def ours(path: Any) -> Path | None:
        found = Path(os.fspath(path))
        return found if found.is_relative_to(root) or found == root.parent else None

    with pytest.MonkeyPatch.context() as patch:

        def hook(name: str, which: int = 0) -> None:
            real = getattr(os, name)

            def hooked(*args: Any, **kwargs: Any) -> Any:
                target = Path(os.readlink(f"/proc/self/fd/{args[0]}")) if name == "fsync" else ours(args[which])
                if target is None or ours(target) is None:
                    return real(*args, **kwargs)
                before(name, target)
                result = None if name == "fsync" else real(*args, **kwargs)
                after(name, target)
                return result

            patch.setattr(os, name, hooked)

        for name in ("mkdir", "fsync", "unlink"):
            hook(name)
        for name in ("replace", "link"):
            hook(name, 1)
        real_open = Path.open

        def hooked_open(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "xb" or ours(self) is None:
                return real_open(self, mode, *args, **kwargs)
            before("create", self)
            return _Written(real_open(self, mode, *args, **kwargs), self, before)

        patch.setattr(Path, "open", hooked_open)
        yield


class _Written:
    """A file whose writes can fail half-way."""

    def __init__(self, file: io.FileIO, path: Path, before: Hook):
        self._file, self._path, self._before = file, path, before

    def write(self, value: memoryview) -> int:
        half = len(value) // 2
        written = self._file.write(value[:half])
        self._before("write", self._path)
        return written + self._file.write(value[half:])

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


@dataclass
class Disk:
    """What of a folder is certain to survive a loss of power, and what may or may not.

    A file's content is certain once it was synced, its name once its folder was, in this and in no other way. Of
    names that changed since, any that they had meanwhile may be there; of content that was not synced, any part.
    """

    root: Path
    trusts_files: bool = True  # False: as if files were not synced, to see whether that is noticed
    trusts_folders: bool = True
    gone: int = -1  # the inode of the file that the operation at hand removes
    next_number: Iterator[int] = field(default_factory=itertools.count)
    numbers: dict[int, int] = field(default_factory=dict)  # of files, by inode, as inodes are used again
    synced: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)
    names: dict[Path, dict[str, int | str]] = field(default_factory=dict)  # certain: a file's number, or "folder"
    changed: dict[Path, dict[str, list[int | str | None]]] = field(default_factory=dict)

    def before(self, operation: str, path: Path) -> None:
        if operation in ("replace", "unlink") and path.exists() and path.stat().st_nlink == 1:
            self.gone = path.stat().st_ino
        else:
            self.gone = -1

    def after(self, operation: str, path: Path) -> None:
        self.numbers.pop(self.gone, None)
        if operation == "fsync" and path.is_dir():
            if self.trusts_folders:
                self.names[path] = {entry.name: self._what(entry) for entry in path.iterdir()}
                self.changed.pop(path, None)
        elif operation == "fsync":
            if self.trusts_files:
                self.synced[self._number(path)] = path.read_bytes()
        else:
            now = self._what(path) if path.exists() else None
            if isinstance(now, int):
                self.written[now] = path.read_bytes()
            self.changed.setdefault(path.parent, {}).setdefault(path.name, []).append(now)

    def certain(self) -> dict[str, bytes]:
        """What survives at least: every key with its bytes."""
        return self._image(lambda name, old, new: old, lambda whole: b"")

    def possible(self, rng: random.Random) -> dict[str, bytes]:
        """One of the many that may survive: nearly all of it, or nearly nothing."""
        late = rng.choice([0, 0.9, 0.97])
        return self._image(
            lambda name, old, new: new[-1] if new and rng.random() < late else rng.choice([old, *new]),
            lambda whole: whole[: rng.choice([0, len(whole) // 2, None])],
        )

    def _image(self, choose: Callable[..., Any], cut: Callable[[bytes], bytes]) -> dict[str, bytes]:
        image: dict[str, bytes] = {}

        def walk(folder: Path) -> None:
            names, changed = self.names.get(folder, {}), self.changed.get(folder, {})
            for name in {*names, *changed}:
                what = choose(name, names.get(name), changed.get(name, []))
                if what == "folder":
                    walk(folder / name)
                elif what is not None:
                    key = (folder / name).relative_to(self.root).as_posix()
                    image[key] = self.synced[what] if what in self.synced else cut(self.written.get(what, b""))

        above, name = self.root.parent, self.root.name
        if choose(name, self.names.get(above, {}).get(name), self.changed.get(above, {}).get(name, [])):
            walk(self.root)
        return image

    def _what(self, path: Path) -> int | str:
        return "folder" if path.is_dir() else self._number(path)

    def _number(self, path: Path) -> int:
        return self.numbers.setdefault(path.stat().st_ino, next(self.next_number))


def in_memory(image: dict[str, bytes]) -> MemoryStore:
    buffer = default_buffer_prototype().buffer
    return MemoryStore({key: buffer.from_bytes(raw) for key, raw in image.items()})
