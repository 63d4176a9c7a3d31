"""Read the metadata of Zarr groups and arrays one document at a time, so that an error names the document at fault."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from data.storage import ROOT, Storage
from options import first_line

ARRAY_FIELDS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
MIGRATE = "zarr migrate v3"  # a command of Zarr's own, which writes metadata beside the old one and copies no chunk
UNSCALED = 1.0, 1 / 255  # scales of images that mean what the layout means: values 0 to 255, or 0 to 1 after decoding


class MetadataError(ValueError):
    """A document of metadata cannot be read. The text begins with its key."""


def no_group(store: Storage) -> str | None:
    """Tell what is at a location that has no metadata of a Zarr format 3 group, with the remedy; None for nothing."""
    if any(store.read(key) is not None for key in (".zgroup", ".zarray", ".zmetadata")):
        return f"it is {_format_2(store)}"
    if store.folder is not None and store.folder.is_file():
        return "it is a file, so unpack it, or give Python's zarr.storage.ZipStore if it is a ZIP file"
    return None


def refuse_format_2(store: Storage, paths: Iterable[str]) -> None:
    """Raise MetadataError if there is a group or an array of Zarr format 2 at one of these paths of a store."""
    places = [(path, f"{path}/{document}") for path in paths for document in (".zgroup", ".zarray")]
    for (path, _), raw in zip(places, store.read_many([key for _, key in places]), strict=True):
        if raw is not None:
            raise MetadataError(f"{path} is {_format_2(store, path)}")


def _format_2(store: Storage, path: str = "") -> str:
    """Tell how to convert a group or an array of Zarr format 2. Zarr's command ends in a traceback of two of them."""
    first = "remove its .zmetadata, and " if store.read(f"{path}/.zmetadata".lstrip("/")) is not None else ""
    return (
        f"of Zarr format 2, so convert it with `{MIGRATE} {store.folder or store}{path and '/'}{path}` (pip install "
        f"'zarr[cli]'). Before that, {first}write 0 for each fill_value that is null in its .zarray files"
    )


def refuse_lost(store: Storage, name: str, arrays: Iterable[str]) -> None:
    """Raise MetadataError if a name in the root that is no group of Zarr format 3 holds what was meant as a split.

    Args:
        store: The store.
        name: The name.
        arrays: The names of the arrays of a split that are there.
    """
    for array in arrays:
        raise MetadataError(
            f'{name}/{ROOT} is missing beside {name}/{array}: write {{"zarr_format": 3, "node_type": "group"}} to it'
        )
    refuse_format_2(store, [name])
    place = store.folder and store.folder / name
    if place and place.is_symlink() and not place.exists():
        raise MetadataError(f"{name} is a link to {place.readlink()}, which does not exist: mend or remove the link")


def refuse_encoded(name: str, array: Any) -> None:
    """Raise MetadataError if attributes of the CF conventions say that the values are others than those stored.

    xarray and netCDF tools write them, and decode the values when they read. Nothing here does.

    Args:
        name: Name of the array, in the layout.
        array: The array. Those without ``attrs`` have no such attributes.
    """
    attributes, dtype = getattr(array, "attrs", {}), getattr(array, "dtype", None)
    encoded = {key: attributes[key] for key in ("scale_factor", "add_offset", "_Unsigned") if key in attributes}
    scale, offset = _number(encoded.get("scale_factor", 1)), _number(encoded.get("add_offset", 0))
    scales = UNSCALED if name == "images" else UNSCALED[:1]
    is_scaled = offset != 0 or not any(math.isclose(scale, unit, rel_tol=1e-6) for unit in scales)
    is_unsigned = {"true": True, "false": False}.get(str(encoded.get("_Unsigned")).strip("b'\"").lower())
    if is_scaled or (is_unsigned is not None and is_unsigned != (np.dtype(dtype).kind == "u")):
        raise MetadataError(
            f"'{name}' is {dtype} with the attributes {encoded}, by which other values are meant than are stored: "
            "write these values, without the attributes"
        )


def _number(value: Any) -> float:
    """Convert the value of an attribute, which may be a list of one; NaN if it is no number."""
    with contextlib.suppress(TypeError, ValueError):
        return float(np.asarray(value).item())
    return math.nan


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
