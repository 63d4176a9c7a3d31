"""Read the metadata of Zarr groups and arrays one document at a time, so that an error names the document at fault."""

from __future__ import annotations

import json
from typing import Any

import zarr
from zarr.storage import StorePath

from data.storage import ROOT, Storage
from options import first_line

ARRAY_FIELDS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
MIGRATE = "zarr migrate v3"  # a command of Zarr's own, which writes metadata beside the old one and copies no chunk


class MetadataError(ValueError):
    """A document of metadata cannot be read. The text begins with its key."""


def no_group(store: Storage) -> str:
    """Tell what is at a location that has no metadata of a Zarr format 3 group."""
    if any(store.read(key) is not None for key in (".zgroup", ".zarray", ".zmetadata")):
        return (
            f"it is of Zarr format 2, so convert it with `{MIGRATE} {store.folder or store}` (pip install 'zarr[cli]')"
        )
    if store.folder is not None and store.folder.is_file():
        return "it is a file, so unpack it, or give Python's zarr.storage.ZipStore if it is a ZIP file"
    return "there is no Zarr group"


def refuse_format_2(store: Storage, path: str) -> None:
    """Raise MetadataError if there is an array of Zarr format 2 at a path of a store."""
    if store.read(f"{path}/.zarray") is not None:
        raise MetadataError(
            f"{path} is of Zarr format 2, so convert it with `{MIGRATE} {store.folder or store}/{path}`"
        )


def read_group(key: str, raw: bytes) -> dict[str, Any]:
    """Decode and check the metadata of a group.

    Args:
        key: Key of the document, for errors.
        raw: The document.

    Returns:
        The document, with a dictionary ``attributes``.

    Raises:
        MetadataError: It is not that of a Zarr format 3 group.
    """
    metadata = _decode(key, raw)
    if metadata.get("node_type") != "group":
        raise MetadataError(f"{key} describes an {metadata.get('node_type')}, expected a group")
    attributes = metadata.get("attributes", {})
    if not isinstance(attributes, dict):
        raise MetadataError(f"{key} has attributes {attributes!r}, expected an object")
    return {**metadata, "attributes": attributes}


def open_array(store: Storage, path: str, raw: bytes) -> zarr.Array:
    """Open an array by its metadata. No chunk is read.

    Args:
        store: The store that has the array's chunks.
        path: Path of the array in the store.
        raw: The array's metadata.

    Returns:
        The array, with the store's own mode.

    Raises:
        MetadataError: It is not that of a Zarr format 3 array, or Zarr does not know a part of it.
    """
    key = f"{path}/{ROOT}"
    metadata = _decode(key, raw)
    if metadata.get("node_type") != "array":
        raise MetadataError(f"{key} describes a {metadata.get('node_type')}, expected an array")
    if missing := [field for field in ARRAY_FIELDS if field not in metadata]:
        raise MetadataError(f"{key} lacks {', '.join(missing)}")
    if metadata["fill_value"] is None:
        raise MetadataError(f"{key} has the fill_value null, and Zarr format 3 requires a value: write 0")
    if not metadata["codecs"]:
        raise MetadataError(f'{key} has no codecs, and Zarr format 3 requires one: write [{{"name": "bytes"}}]')
    try:
        return zarr.Array.from_dict(StorePath(store, path), metadata)
    except Exception as error:  # Zarr raises errors of every kind for metadata that it does not know
        raise MetadataError(f"{key} cannot be read by Zarr {zarr.__version__} ({_reason(error)})") from error


def _decode(key: str, raw: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise MetadataError(f"{key} is no JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise MetadataError(f"{key} is no JSON object")
    if metadata.get("zarr_format") != 3:
        raise MetadataError(f"{key} has zarr_format {metadata.get('zarr_format')!r}, expected 3")
    return metadata


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
