"""Every storage back-end has the same methods, with the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zarr.storage import LocalStore, MemoryStore

from data.storage import Adapter, Folder, Location, Remote, Storage, open_store


@pytest.fixture(params=["folder", "url", "memory", "zarr's own folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    locations: dict[str, tuple[Location, type[Storage]]] = {
        "folder": (tmp_path / "store", Folder),
        "url": (f"memory://{tmp_path}", Remote),
        "memory": (MemoryStore(), Adapter),
        "zarr's own folder": (LocalStore(tmp_path / "store"), Adapter),
    }
    location, kind = locations[request.param]
    opened = open_store(location, writable=True)
    assert type(opened) is kind
    assert open_store(opened) is opened
    opened.make()
    return opened


def test_what_is_written_is_read_listed_and_removed(store):
    assert store.read("a/b") is None
    assert store.write("a/b", b"12345678")
    assert store.write("a/c", memoryview(b"123"))
    assert store.write("zarr.json", b"{}")
    assert store.read("a/b") == b"12345678"
    assert store.read("a/b", 2, 5) == b"345"
    assert [bytes(piece) for piece in store.read_pieces("a/b", 1, [2, 3])] == [b"23", b"456"]
    assert [len(piece) for piece in store.read_pieces("a/b", 6, [1, 5])] == [1, 1]
    assert all(piece.dtype == np.uint8 for piece in store.read_pieces("a/b", 0, [8]))
    assert store.read_many(["a/c", "a/d", "a/b"]) == [b"123", None, b"12345678"]
    assert (sorted(store.names()), sorted(store.names("a")), store.names("d")) == (["a", "zarr.json"], ["b", "c"], [])
    assert sorted(store.all_keys()) == ["a/b", "a/c", "zarr.json"]
    assert store.size() == 13
    store.remove("a/c")
    store.remove("a/c")
    assert sorted(store.all_keys()) == ["a/b", "zarr.json"]
    store.sweep()
    store.remove_all()
    assert store.names() == store.all_keys() == []


def test_an_exclusive_write_keeps_what_is_there(store):
    assert store.write("key", b"first", exclusive=True)
    assert not store.write("key", b"second", exclusive=True)
    assert store.read("key") == b"first"
    assert store.write("key", b"third")
    assert store.read("key") == b"third"


def test_only_a_folder_is_made_and_removed(tmp_path):
    folder = open_store(tmp_path / "new", writable=True)
    assert [folder.make(), folder.make()] == [True, False]
    folder.remove_root()
    assert folder.folder == tmp_path / "new"
    assert not folder.folder.exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        open_store(tmp_path / "file", writable=True).make()
    memory = open_store(MemoryStore())
    assert (memory.make(), memory.folder) == (False, None)
