"""The heatmap store: create it, write it shard by shard, read it. This module knows arrays and no models.

A shard without its commit record does not exist for a reader, so an interrupted writer leaves only whole shards.
One writer writes one shard (`teacher_cache.claims`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from data.storage import AT_ONCE, ROOT, Location, Storage, open_store
from options import Call, Message, Option
from teacher_cache import codec
from teacher_cache.codec import Compression, DamageError
from teacher_cache.errors import CacheError
from teacher_cache.layout import FORMAT_VERSION, KIND, CacheInfo, plan_arrays

MAKE = Call("cache_explanations")
REMEDY = Message("make one with ", MAKE)
CONTINUE = Message("run ", MAKE, " again with the same options: it resumes where it stopped")
ANOTHER = Message("choose another ", Option("out"))


@dataclass(frozen=True)
class Shard:
    """The content of one shard: n samples, D draws, K classes, F features.

    Attributes:
        heatmaps: float32 (n, D, C, H, W) to write; (n, D, C, h, w), pooled by the resolution, after reading.
        target_class: int64 (n, D), the explained class.
        epsilon: float32 (n, D), the ε of the explanation.
        teacher_logits: float32 (n, K).
        features: float32 (n, F), the input of the teacher's last layer; None if the store has none.
    """

    heatmaps: np.ndarray
    target_class: np.ndarray
    epsilon: np.ndarray
    teacher_logits: np.ndarray
    features: np.ndarray | None = None


class Cache:
    """An opened store.

    Attributes:
        path: The location that it was opened from.
        store: The storage back-end.
        info: The store's attributes.
        head: The arrays of the teacher's last layer by name, float32: ``weight`` (K, F), ``bias`` (K,) if it has one.
        draw_fields: The arrays that `read_draw` fills: name → (shape of one sample, dtype).
        sample_fields: The arrays that `read_samples` fills, which are the same in all draws, in the same form.
    """

    def __init__(self, path: str, store: Storage, info: CacheInfo, head: Mapping[str, np.ndarray]):
        self.path, self.store, self.info, self.head = path, store, info, head
        self._plan = plan_arrays(info)
        self._compression = Compression.parse(info.storage.codec)
        stored = np.dtype(self._plan["heatmaps"].dtype)
        self.draw_fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "heatmaps": (info.map_shape, stored),
            "scale": ((), np.dtype(np.float32)),
            "target_class": ((), np.dtype(np.int64)),
            "epsilon": ((), np.dtype(np.float32)),
        }
        self.sample_fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: (self._plan[name].shape[1:], np.dtype(np.float32))
            for name in ("teacher_logits", "features")
            if name in info.rows
        }

    def committed(self) -> np.ndarray:
        """Find the shards that have a whole commit record.

        Returns:
            bool (number of shards,).
        """
        committed = np.zeros(self.info.shards, bool)
        names = set(self.store.names("commits"))
        listed = [shard for shard in range(len(committed)) if self._key("commits", shard).split("/")[1] in names]
        records = self.store.read_many([self._key("commits", shard) for shard in listed])
        committed[listed] = [self._record(record) is not None for record in records]
        return committed

    def is_committed(self, shard: int) -> bool:
        """Check whether a shard has a whole commit record."""
        return self._record(self.store.read(self._key("commits", shard))) is not None

    def _record(self, raw: bytes | None) -> np.ndarray | None:
        """Decode a commit record, uint32. None if it is missing, or cut off because a write was not atomic."""
        try:
            record = codec.unseal(raw or b"")
        except DamageError:
            return None
        return record.view("<u4") if len(record) == 4 * self._plan["commits"].shape[1] else None

    def uncommit(self, shard: int) -> None:
        """Remove the commit record of a shard, so that the shard no longer exists for readers."""
        self.store.remove(self._key("commits", shard))

    def write_shard(self, shard: int, content: Shard) -> None:
        """Write one whole shard, then its commit record. Other processes may write other shards meanwhile.

        Args:
            shard: Number of the shard.
            content: Its arrays.

        Raises:
            ValueError: The arrays have wrong shapes, or a class does not exist.
            CacheError: The arrays are not finite.
            OSError: The store cannot be written.
        """
        start, stop = self.info.shard_range(shard)
        draws, classes = (stop - start, self.info.explainer.draws), len(self.info.teacher.class_names)
        expected = {
            "heatmaps": (*draws, *self.info.explainer.map_shape),
            "target_class": draws,
            "epsilon": draws,
            **{name: (stop - start, *shape) for name, (shape, _) in self.sample_fields.items()},
        }
        fields = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
        arrays = {name: np.asarray(values) for name, values in fields.items() if values is not None}
        shapes = {name: values.shape for name, values in arrays.items()}
        if shapes != expected:
            raise ValueError(f"shard {shard} holds arrays of shapes {expected}, got {shapes}")
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise CacheError(
                Message(
                    f"the maps, ε, logits or features of shard {shard} (samples {start} to {stop - 1}) are not finite: "
                    "the teacher overflows on some of these images; train it with a smaller ",
                    Option("lr"),
                    ", or look for damaged images",
                )
            )
        if np.any(content.target_class < 0) or np.any(content.target_class >= classes):
            raise ValueError(f"shard {shard} explains classes that there are not: there are {classes}, from 0")
        storage = self.info.storage
        maps, scale = codec.quantise(codec.average_pool(content.heatmaps, storage.resolution), storage.precision)
        file, checksums = codec.pack(maps, self._compression, storage.shard_samples, storage.chunk_samples)
        rows = arrays | {"scale": scale}
        sealed = {name: codec.seal(self._whole_chunk(name, rows[name])) for name in self.info.rows}
        rows_checksums = [int.from_bytes(raw[-4:], "little") for raw in sealed.values()]
        record = np.array([self.info.identity(shard), *rows_checksums, *checksums], "<u4")
        self.uncommit(shard)
        for name, raw in sealed.items():
            self.store.write(self._key(name, shard), raw)
        self.store.write(self._key("heatmaps", shard), file)
        self.store.write(self._key("commits", shard), codec.seal(record.tobytes()))

    def read_draw(self, shard: int, draw: int, out: Mapping[str, np.ndarray] | None = None) -> Mapping[str, np.ndarray]:
        """Read and check one draw of a committed shard, in the stored form. No other draw is read.

        Args:
            shard: Number of the shard.
            draw: Number of the draw.
            out: Arrays to fill in place, by name, with the shapes and dtypes of the result; None makes new ones.

        Returns:
            The arrays of ``draw_fields`` for n samples: ``heatmaps`` (n, C, h, w) as `teacher_cache.codec.quantise`
            made them; ``scale``, ``target_class`` and ``epsilon`` (n,).

        Raises:
            CacheError: The shard is not committed, or its content differs from what was committed.
            IndexError: There is no such shard or draw.
            ValueError: ``out`` has other shapes or dtypes.
        """
        start, stop = self.info.shard_range(shard)
        if not 0 <= draw < self.info.explainer.draws:
            raise IndexError(f"there is no draw {draw}: the store has {self.info.explainer.draws}, counted from 0")
        if out is None:
            out = {name: np.empty((stop - start, *shape), dtype) for name, (shape, dtype) in self.draw_fields.items()}
        maps, expected = out["heatmaps"], (stop - start, *self.info.map_shape)
        if maps.shape != expected or maps.dtype != self._plan["heatmaps"].dtype or not maps.flags.c_contiguous:
            raise ValueError(
                f"draws of shard {shard} are read into C-contiguous {self._plan['heatmaps'].dtype} {expected}, "
                f"not {maps.dtype} {maps.shape}"
            )
        with self._reading(shard) as record:
            for name in ("scale", "target_class", "epsilon"):
                out[name][:] = self._rows(name, shard, record)[:, draw]
            self._maps(shard, draw, record, maps)
        return out

    def read_samples(self, shard: int, out: Mapping[str, np.ndarray]) -> None:
        """Read and check arrays that a committed shard holds once for each sample.

        Args:
            shard: Number of the shard.
            out: Arrays of n samples to fill in place, as in ``sample_fields``. Only these are read.

        Raises:
            CacheError: As for `read_draw`.
            ValueError: ``out`` has unknown names, or other shapes or dtypes.
        """
        start, stop = self.info.shard_range(shard)
        fields = {name: ((stop - start, *shape), dtype) for name, (shape, dtype) in self.sample_fields.items()}
        for name, values in out.items():
            if (values.shape, values.dtype) != fields.get(name):
                raise ValueError(
                    f"samples of shard {shard} are read into arrays of {fields}, not '{name}' {values.dtype} "
                    f"{values.shape}"
                )
        with self._reading(shard) as record:
            for name, values in out.items():
                values[:] = self._rows(name, shard, record)

    def read_shard(self, shard: int) -> Shard:
        """Read, check and decode one committed shard with all its draws.

        Raises:
            CacheError: As for `read_draw`.
            IndexError: There is no such shard.
        """
        start, stop = self.info.shard_range(shard)
        draws = self.info.explainer.draws
        stored = np.empty((draws, stop - start, *self.info.map_shape), self._plan["heatmaps"].dtype)
        with self._reading(shard) as record:
            rows = {name: self._rows(name, shard, record) for name in self.info.rows}
            for draw in range(draws):
                self._maps(shard, draw, record, stored[draw])
        maps = codec.dequantise(stored.swapaxes(0, 1), rows["scale"], self.info.storage.precision)
        copies = {name: rows[name].copy() for name in ("epsilon", *self.sample_fields)}
        return Shard(maps, rows["target_class"].astype(np.int64), **copies)

    def scales(self) -> Iterator[np.ndarray]:
        """Read and check the ``scale`` of every shard in order, without its maps. A scale of zero is a map of zeros.

        Yields:
            float32 (n, D) of each shard.

        Raises:
            CacheError: As for `read_draw`.
        """
        for first in range(0, self.info.shards, AT_ONCE):
            shards = range(first, min(first + AT_ONCE, self.info.shards))
            records = self.store.read_many([self._key("commits", shard) for shard in shards])
            files = self.store.read_many([self._key("scale", shard) for shard in shards])
            for shard, raw_record, raw in zip(shards, records, files, strict=True):
                with self._checking(shard, raw_record) as record:
                    scale = self._decode_rows("scale", shard, record, raw)
                yield scale

    def _reading(self, shard: int) -> AbstractContextManager[np.ndarray]:
        """Read the commit record of a shard. The rest is as for `_checking`."""
        return self._checking(shard, self.store.read(self._key("commits", shard)))

    @contextmanager
    def _checking(self, shard: int, raw_record: bytes | None) -> Iterator[np.ndarray]:
        """Yield the checksums of the commit record, uint32, and turn damage found inside into a CacheError."""
        start, stop = self.info.shard_range(shard)
        where = f"shard {shard} of {self.path} (samples {start} to {stop - 1})"
        try:
            record = self._record(raw_record)
            if record is None:
                raise CacheError(Message(f"{where} is not there yet: ", CONTINUE))
            if record[0] != self.info.identity(shard):
                raise DamageError("its commit record is that of another shard or store")
            yield record[1:]
        except DamageError as error:
            raise CacheError(
                Message(
                    f"{where} is damaged: its content is not what was committed ({error}); run ",
                    Call("repair", command="inspect-cache", switches=("repair",)),
                    " on the store, then ",
                    MAKE,
                    " again with the same options: it computes the damaged shards again",
                )
            ) from None

    def _rows(self, name: str, shard: int, record: np.ndarray) -> np.ndarray:
        """Read and check one of the ``rows`` of a shard, (n, columns)."""
        return self._decode_rows(name, shard, record, self.store.read(self._key(name, shard)))

    def _decode_rows(self, name: str, shard: int, record: np.ndarray, raw: bytes | None) -> np.ndarray:
        """Check the file of one of the ``rows`` of a shard and decode it, (n, columns)."""
        start, stop = self.info.shard_range(shard)
        if raw is None:
            raise DamageError(f"its '{name}' is missing")
        values = codec.unseal(raw, int(record[self.info.rows.index(name)])).view(self._dtype(name))
        return values.reshape(self.info.storage.shard_samples, -1)[: stop - start]

    def _maps(self, shard: int, draw: int, record: np.ndarray, out: np.ndarray) -> None:
        """Read and check the heatmaps of one draw into ``out`` (n, C, h, w)."""
        chunks, draws, size = self.info.chunks, self.info.explainer.draws, self.info.storage.chunk_samples
        key = self._key("heatmaps", shard)
        index = self.store.read(key, 0, codec.index_bytes(chunks, draws))
        if index is None:
            raise DamageError("its heatmaps are missing")
        start, lengths = codec.draw_range(index, chunks, draws, draw, -(-len(out) // size))
        blosc, first = self._compression.blosc(), len(self.info.rows) + draw * chunks
        for chunk, sealed in enumerate(self.store.read_pieces(key, start, lengths)):
            codec.unpack(sealed, int(record[first + chunk]), blosc, size, out[chunk * size : (chunk + 1) * size])

    def _whole_chunk(self, name: str, values: np.ndarray) -> bytes:
        """Encode the rows of a shard as Zarr stores them: always a whole chunk, in the last shard too."""
        whole = np.zeros((self.info.storage.shard_samples, *self._plan[name].shape[1:]), self._dtype(name))
        whole[: len(values)] = values
        return whole.tobytes()

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(self._plan[name].dtype).newbyteorder("<")

    def _key(self, name: str, shard: int) -> str:
        return f"{name}/c.{shard}" + ".0" * (len(self._plan[name].shape) - 1)


def head_sha256(head: Mapping[str, np.ndarray]) -> str | None:
    """Compute the SHA-256 of a last layer's arrays.

    Args:
        head: The arrays by name, which are converted to float32.

    Returns:
        The digest in hexadecimal; None without arrays.
    """
    digest = hashlib.sha256()
    for name, values in sorted(head.items()):
        digest.update(f"{name} {values.shape};".encode() + np.asarray(values, "<f4").tobytes())
    return digest.hexdigest() if head else None


def create_cache(location: Location, info: CacheInfo, head: Mapping[str, np.ndarray] | None = None) -> Cache:
    """Create the store with every shard uncommitted, or open the one that the same settings made.

    The attributes are written first and in one piece: they claim the location. An interrupted creation is completed.
    Metadata that is no JSON, because only half of it was written, is written again.

    Args:
        location: A folder, an fsspec URL, or a Zarr store.
        info: The attributes of the store.
        head: The arrays of the teacher's last layer by name, if it has one.

    Returns:
        The store, writable.

    Raises:
        CacheError: A store made with other settings is there.
        FileExistsError: The location holds anything else.
        OSError: The location cannot be written.
    """
    store = open_store(location, writable=True)
    path = str(location)
    try:
        store.make()
    except NotADirectoryError:
        raise FileExistsError(Message(f"{path} exists and is not a folder: ", ANOTHER)) from None
    files = _files(info, head or {})
    group = store.read(ROOT)
    if group is None:
        if set(store.names()) - {key.split("/")[0] for key in files}:
            raise FileExistsError(Message(f"{path} is not empty and holds no store of ours: ", ANOTHER))
        store.write(ROOT, files[ROOT], exclusive=True)
    elif len(group) < len(files[ROOT]) and files[ROOT].startswith(group):
        store.write(ROOT, files[ROOT])  # a write that is not atomic stopped half-way
    attributes = _attributes(store) or {}
    if attributes.get("kind") != KIND:
        raise FileExistsError(Message(f"{path} is not empty and holds no store of ours: ", ANOTHER))
    if differences := _info(path, attributes).differences(info):
        raise CacheError(
            Message(
                f"{path} was made with other settings ({'; '.join(differences)}; the store's first, this command's "
                "second): give the same ones to resume it, or ",
                ANOTHER,
            )
        )
    head_is_whole = head_sha256(_read_head(store)) == info.teacher.head_sha256
    for key, value in files.items():
        is_whole = _json(store.read(key)) is not None if key.endswith(ROOT) else head_is_whole
        if not is_whole or (key.startswith("head/") and not head_is_whole):
            store.write(key, value)
    return open_cache(location, writable=True)


def open_cache(location: Location, *, writable: bool = False) -> Cache:
    """Open a store, complete or not. Only its attributes and its head are read.

    Args:
        location: A folder, an fsspec URL, or a Zarr store.
        writable: Allow writing.

    Returns:
        The store.

    Raises:
        CacheError: There is no store, it has another format version, or it contradicts its attributes.
        OSError: The location cannot be read.
    """
    path, store = str(location), open_store(location, writable=writable)
    attributes = _attributes(store)
    if attributes is None or attributes.get("kind") != KIND:
        group = store.read(ROOT)
        problem = f"its 'kind' is {attributes.get('kind')!r}" if attributes else f"its {ROOT} has no attributes"
        if group is None:
            problem = "there is no Zarr group"
        elif _json(group) is None:
            problem = f"its {ROOT} is cut off or damaged"
        raise CacheError(Message(f"no heatmap store at {path}: {problem}; ", REMEDY))
    info = _info(path, attributes)
    for key, value in _files(info, {}).items():
        if not key.endswith("/" + ROOT):
            continue
        raw = store.read(key)
        if _json(raw) is None:
            problem = "missing" if raw is None else "cut off or damaged"
            raise CacheError(Message(f"the store {path} is not finished, or damaged: {key} is {problem}; ", CONTINUE))
        layout, expected = _layout(raw), _layout(value)
        if layout != expected:
            raise CacheError(
                f"the store {path} is damaged: {key} says {layout}, its attributes promise {expected}; make it again"
            )
    head = _read_head(store)
    if head_sha256(head) != info.teacher.head_sha256:
        raise CacheError(Message(f"the teacher's last layer in the store {path} is damaged or missing: ", CONTINUE))
    return Cache(path, store, info, head)


def check_complete(cache: Cache) -> None:
    """Check that every shard is committed.

    Raises:
        CacheError: Shards are missing. The text counts them.
    """
    committed = cache.committed()
    if not committed.all():
        raise CacheError(
            Message(
                f"the store {cache.path} is incomplete: {committed.sum()} of {len(committed)} shards are there; ",
                CONTINUE,
            )
        )


def _files(info: CacheInfo, head: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Make every key of a store without shards, with its bytes as Zarr itself writes them."""
    memory = open_store(MemoryStore())
    attributes = {"kind": KIND, "format_version": FORMAT_VERSION, **info.to_dict()}
    root = zarr.create_group(memory, zarr_format=3, attributes=attributes)
    storage = info.storage
    compression = Compression.parse(storage.codec)
    for name, plan in plan_arrays(info).items():
        layout: dict[str, Any]
        if name == "heatmaps":
            typesize = np.dtype(plan.dtype).itemsize
            blosc_options: dict[str, Any] = {
                "cname": compression.compressor,
                "clevel": compression.level,
                "shuffle": compression.shuffle,
            }
            blosc = BloscCodec(**blosc_options, typesize=typesize)
            layout = {
                "chunks": (storage.chunk_samples, 1, *plan.shape[2:]),
                "shards": {"shape": (storage.shard_samples, *plan.shape[1:]), "index_location": "start"},
                "compressors": (blosc, Crc32cCodec()),
            }
        else:
            rows = 1 if name == "commits" else storage.shard_samples
            layout = {"chunks": (rows, *plan.shape[1:]), "compressors": Crc32cCodec()}
        root.create_array(
            name, shape=plan.shape, dtype=plan.dtype, dimension_names=plan.dimensions, fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."}, **layout,
        )  # fmt: skip
    if head:
        group = root.create_group("head")
        for name, values in head.items():
            group.create_array(name, data=np.asarray(values, np.float32), compressors=Crc32cCodec())
    return {key: raw for key in memory.all_keys() if (raw := memory.read(key)) is not None}


def _layout(metadata: bytes | None) -> dict[str, Any]:
    """Select the parts of an array's metadata that decide where its bytes lie."""
    values = _json(metadata) or {}
    return {key: values.get(key) for key in ("shape", "data_type", "chunk_grid", "chunk_key_encoding")}


def _json(metadata: bytes | None) -> dict[str, Any] | None:
    """Decode a JSON object; None if it is missing, cut off or damaged."""
    try:
        values = json.loads(metadata or b"")
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _read_head(store: Storage) -> dict[str, np.ndarray]:
    """Read the arrays of the teacher's last layer; empty if there are none, or one is damaged."""
    head = {}
    for name in sorted(store.names("head")):
        if store.read(f"head/{name}/{ROOT}") is not None:
            try:
                head[name] = np.asarray(zarr.open_array(store, path=f"head/{name}", mode="r")[...])
            except Exception as error:  # Zarr raises errors of every kind for broken metadata and chunks
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise
                return {}
    return head


def _attributes(store: Storage) -> dict[str, Any] | None:
    """Read the group's attributes; empty if it has none, None if there is no group or it cannot be read."""
    group = _json(store.read(ROOT))
    if group is None:
        return None
    attributes = group.get("attributes")
    return attributes if isinstance(attributes, dict) else {}


def _info(path: str, attributes: dict[str, Any]) -> CacheInfo:
    """Decode the attributes, and name the store in the error."""
    if attributes.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"{path} has store format version {attributes.get('format_version')!r}, this program reads version "
            f"{FORMAT_VERSION}: use the program that wrote it, or make the store again"
        )
    try:
        return CacheInfo.from_dict(attributes)
    except CacheError as error:
        raise CacheError(f"{path} is no store that this program can read: {error}; make it again") from None
