"""Encode heatmaps as bytes and decode them: precisions, compression, and Zarr shards. No files, no models.

A shard's file follows Zarr's sharding codec, so any Zarr reader reads it. We write its chunks draw by draw, so that one
draw is one range of bytes. We read it ourselves because Zarr 3.1.6 takes longer for one draw of a shard: 7.0 times as
long for COLOURED MNIST, 1.9 times for dense 64×64 maps (docs/results/streaming.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from options import Lazy, Message, Option, Registry, did_you_mean
from teacher_cache.errors import CacheError

if TYPE_CHECKING:
    import google_crc32c
    import numcodecs
    import numpy as np
    import torch
    from numcodecs import Blosc
    from torch import Tensor
else:  # the names below are known without them; PyTorch is imported when maps are decoded on a device
    np, torch, numcodecs, google_crc32c = Lazy("numpy"), Lazy("torch"), Lazy("numcodecs"), Lazy("google_crc32c")

SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
MISSING = 2**64 - 1  # marks a chunk in an index that does not exist


class DamageError(ValueError):
    """Bytes do not match their checksum or their format."""


@dataclass(frozen=True)
class Compressor:
    """A compressor of Blosc, entered by Blosc's own name for it.

    Attributes:
        level: Level that is used where none is given, 0 to 9.
        note: What it is good for, in a word, for the help.
    """

    level: int
    note: str


COMPRESSORS: Registry[Compressor] = Registry("codec", CacheError)
COMPRESSORS["lz4"] = Compressor(level=5, note="fast")
COMPRESSORS["zstd"] = Compressor(level=3, note="small")


@dataclass(frozen=True)
class Precision:
    """A way to store maps that were divided by their scale.

    All functions keep the shape. ``quantise`` followed by ``dequantise`` must keep zeros and signs.

    Attributes:
        dtype: Dtype of the stored maps in Zarr.
        compressor: Name of the compressor that ``auto`` takes.
        quantise: Converts maps, float32 in [-1, 1], to stored values, which are cast to ``dtype`` afterwards. The first
            sentence of its docstring is in docs/cache-layout.md: how to decode the values, and the error.
        dequantise: Converts stored values back to float32, as the inverse of ``quantise``.
        dequantise_tensor: The same for a tensor, on its device. None decodes with ``dequantise`` on the CPU, and moves
            float32 to the device.
    """

    dtype: str
    compressor: str
    quantise: Callable[[np.ndarray], np.ndarray]
    dequantise: Callable[[np.ndarray], np.ndarray]
    dequantise_tensor: Callable[[Tensor], Tensor] | None = None


PRECISIONS: Registry[Precision] = Registry("precision", CacheError)


def _to_float16(relative: np.ndarray) -> np.ndarray:
    """Return the map r, rounded to 9 bits of mantissa; heatmap = stored · scale, with an error of at most 2⁻¹⁰ · |map|
    + 2⁻²⁵ · scale.
    """
    # round once, not to float16 first: two roundings are worse than one
    stored = (_round_off(relative.view(np.uint32), 14) & np.uint32(0xFFFFC000)).view(np.float32).astype(np.float16)
    return _without_negative_zeros(stored.view(np.uint16)).view(np.float16)


def _to_bfloat16(relative: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of r in float32, rounded; heatmap = (stored · 2¹⁶ as bits of a float32) · scale, with an
    error of at most 2⁻⁸ · |map|.
    """
    return _without_negative_zeros((_round_off(relative.view(np.uint32), 16) >> 16).astype(np.uint16))


def _to_int8(relative: np.ndarray) -> np.ndarray:
    """Return the steps q = round(127 · sign(r) · √|r|); heatmap = q · |q| / 127² · scale, with an error of at most
    (√|r| / 127 + 127⁻² / 4) · scale.
    """
    return np.rint(np.copysign(np.sqrt(np.abs(relative)), relative) * 127)


def _from_int8(stored: np.ndarray) -> np.ndarray:
    steps = stored.astype(np.float32)
    steps *= np.abs(steps) / np.float32(127**2)
    return steps


def _from_int8_tensor(stored: Tensor) -> Tensor:
    steps = stored.float()
    # It rounds once, `_from_int8` twice. Both stay, because earlier students and reports depend on the bits.
    return steps * steps.abs() / 127**2


PRECISIONS["float16"] = Precision(
    dtype="float16",
    compressor="lz4",
    quantise=_to_float16,
    dequantise=lambda stored: stored.astype(np.float32),
    dequantise_tensor=lambda stored: stored.float(),
)
PRECISIONS["bfloat16"] = Precision(
    dtype="uint16",
    compressor="lz4",
    quantise=_to_bfloat16,
    dequantise=lambda stored: (stored.astype(np.uint32) << 16).view(np.float32),
    dequantise_tensor=lambda stored: stored.view(torch.bfloat16).float(),
)
PRECISIONS["int8"] = Precision(
    dtype="int8",
    compressor="zstd",
    quantise=_to_int8,
    dequantise=_from_int8,
    dequantise_tensor=_from_int8_tensor,
)


def quantise(maps: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Convert maps to their stored form.

    Each map is divided by its scale, r = map / scale, and stored in a precision. These are ours:

    - ``float16``: r, rounded to 9 bits of mantissa, because the tenth is noise that does not compress. The error is at
      most 2⁻¹⁰ · |map|, and 2⁻²⁵ · scale where float16 is subnormal.
    - ``bfloat16``: the bits of r as uint16. The error is at most 2⁻⁸ · |map|.
    - ``int8``: √|r| in 127 steps, with its sign. This companding curve suits relevance, which is heavy-tailed. The
      error is at most (√|r| / 127 + 127⁻² / 4) · scale.

    Float32 adds its own rounding, a few parts in 2²⁴, or 2⁻¹⁴⁹ if that is more. Zeros stay zeros. Negative zeros become
    positive: both mean the same, and a mixture does not compress.

    Args:
        maps: float32 (…, C, H, W).
        precision: A name in `PRECISIONS`.

    Returns:
        The stored maps (…, C, H, W), with the precision's dtype, and their ``scale``, float32 (…): the largest absolute
        value of each map.

    Raises:
        CacheError: There is no such precision.
    """
    kind = PRECISIONS.find(precision)
    maps = np.asarray(maps, np.float32)
    scale = np.abs(maps).max(axis=(-3, -2, -1), initial=0)
    relative = maps / np.where(scale > 0, scale, 1)[..., None, None, None]
    return np.asarray(kind.quantise(relative), kind.dtype), scale


def _round_off(bits: np.ndarray, last: int) -> np.ndarray:
    """Round uint32 to nearest even before the caller cuts off the ``last`` bits."""
    return bits + np.uint32((1 << last - 1) - 1) + (bits >> np.uint32(last) & np.uint32(1))


def _without_negative_zeros(bits: np.ndarray) -> np.ndarray:
    """Replace negative zeros of 16-bit floats, given as uint16, in place."""
    bits[bits == 0x8000] = 0
    return bits


def dequantise(stored: np.ndarray, scale: np.ndarray, precision: str) -> np.ndarray:
    """Decode stored maps, as the inverse of `quantise`.

    Args:
        stored: The stored maps (…, C, H, W).
        scale: float32 (…), the scale of each map.
        precision: The precision that they were stored with.

    Returns:
        float32 (…, C, H, W).

    Raises:
        CacheError: There is no such precision.
    """
    relative = np.asarray(PRECISIONS.find(precision).dequantise(stored), np.float32)
    in_place = None if np.may_share_memory(relative, stored) else relative
    return np.multiply(relative, scale[..., None, None, None], out=in_place)


def average_pool(maps: np.ndarray, factor: int) -> np.ndarray:
    """Average maps over squares of pixels.

    Args:
        maps: (…, H, W).
        factor: Side of a square in pixels.

    Returns:
        float32 (…, H // factor, W // factor), or the maps themselves for a factor of 1. Rows and columns that do not
        fill a square are left out.
    """
    if factor == 1:
        return maps
    height, width = maps.shape[-2] // factor, maps.shape[-1] // factor
    cut = maps[..., : height * factor, : width * factor]
    means = cut.reshape(*maps.shape[:-2], height, factor, width, factor).mean((-3, -1), dtype=np.float64)
    return means.astype(np.float32)  # a sum in float32 could overflow


@dataclass(frozen=True)
class Compression:
    """The parameters of Blosc: a compressor, its level, and the shuffle, which reorders bytes before compression."""

    compressor: str
    level: int
    shuffle: str

    def __str__(self) -> str:
        return f"blosc-{self.compressor}-{self.level}-{self.shuffle}"

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Parse the name of a codec, such as ``blosc-lz4-5-bitshuffle``.

        Raises:
            CacheError: There is no such codec.
        """
        parts = re.fullmatch(r"blosc-(.+)-([0-9])-(.+)", text)
        if parts is None or parts[1] not in COMPRESSORS or parts[3] not in SHUFFLES:
            raise CacheError(unknown_codec(text))
        return cls(parts[1], int(parts[2]), parts[3])

    def blosc(self) -> Blosc:
        """Make the codec."""
        shuffle = getattr(numcodecs.Blosc, self.shuffle.upper())
        return numcodecs.Blosc(self.compressor, self.level, shuffle, blocksize=0)


def unknown_codec(text: str, names: Iterable[str] = ()) -> Message:
    """Return the text of the error for a codec that does not exist.

    Args:
        text: The codec that was asked for.
        names: Other names that the option takes, beside codecs in full.
    """
    in_full = [
        str(Compression(compressor, level, shuffle))
        for compressor in COMPRESSORS
        for level in range(10)
        for shuffle in SHUFFLES
    ]
    choices = f"one of {', '.join(names)}, or " if names else ""
    return Message(
        "unknown ",
        Option("codec"),
        f" '{text}': choose {choices}blosc-COMPRESSOR-LEVEL-SHUFFLE with one of {', '.join(COMPRESSORS)}, a level "
        f"from 0 to 9, and one of {', '.join(SHUFFLES)}.{did_you_mean(text, [*names, *in_full])}",
    )


def choose_compression(maps: np.ndarray, precision: str, compressor: str | None = None) -> Compression:
    """Choose the shuffle with which these maps are smallest.

    In our measurements (docs/results/storage.md), sparse maps are smallest without a shuffle, and dense maps with
    ``bitshuffle``.

    Args:
        maps: float32 (n, C, H, W).
        precision: A name in `PRECISIONS`.
        compressor: A name in `COMPRESSORS`. None takes the precision's own: LZ4 for 16-bit maps, which decodes several
            times faster, and zstd for 8-bit maps, which is smaller.

    Returns:
        The compression.

    Raises:
        CacheError: There is no such precision or compressor.
    """
    compressor = compressor or PRECISIONS.find(precision).compressor
    level = COMPRESSORS.find(compressor).level
    stored, _ = quantise(maps, precision)
    candidates = [Compression(compressor, level, shuffle) for shuffle in SHUFFLES]
    return min(candidates, key=lambda candidate: len(candidate.blosc().encode(stored)))


def seal(payload: bytes) -> bytes:
    """Append the CRC-32C, as Zarr's crc32c codec does."""
    return payload + checksum(payload).to_bytes(4, "little")


def unseal(sealed: bytes | np.ndarray, expected: int | None = None) -> np.ndarray:
    """Check and remove the CRC-32C.

    Args:
        sealed: The payload and its checksum.
        expected: The checksum that was committed, if it is known.

    Returns:
        The payload, uint8 (n,).

    Raises:
        DamageError: The checksum is wrong, or is not the expected one.
    """
    view = np.frombuffer(sealed, np.uint8)
    stored = int.from_bytes(view[-4:].tobytes(), "little")
    if len(view) < 4 or checksum(view[:-4]) != stored:
        raise DamageError("a checksum is wrong")
    if expected is not None and stored != expected:
        raise DamageError("it is not the one that was committed")
    return view[:-4]


def checksum(payload: bytes | np.ndarray) -> int:
    """Compute the CRC-32C."""
    return int(google_crc32c.value(payload))


def pack(
    stored: np.ndarray, compression: Compression, shard_samples: int, chunk_samples: int
) -> tuple[bytes, list[int]]:
    """Encode the file of one shard.

    Args:
        stored: The stored maps (n, D, C, H, W) of the shard.
        compression: The compression of a chunk.
        shard_samples: Samples of a full shard. The last shard may have fewer.
        chunk_samples: Samples of a chunk.

    Returns:
        The file, and the checksum of every chunk, draw by draw: 0 for chunks that the last shard lacks.
    """
    samples, draws = stored.shape[:2]
    chunks = shard_samples // chunk_samples
    index = np.full((chunks, draws, 2), MISSING, "<u8")
    blosc, parts, checksums = compression.blosc(), [], []
    position = index_bytes(chunks, draws)
    for draw in range(draws):
        for chunk in range(chunks):
            maps = stored[chunk * chunk_samples : min((chunk + 1) * chunk_samples, samples), draw]
            if not len(maps):
                checksums.append(0)
                continue
            whole = np.zeros((chunk_samples, *maps.shape[1:]), stored.dtype)
            whole[: len(maps)] = maps
            sealed = seal(blosc.encode(whole))
            checksums.append(int.from_bytes(sealed[-4:], "little"))
            index[chunk, draw] = position, len(sealed)
            position += len(sealed)
            parts.append(sealed)
    return b"".join([seal(index.tobytes()), *parts]), checksums


def index_bytes(chunks: int, draws: int) -> int:
    """Compute the length of the index at the start of a shard's file, with its checksum."""
    return chunks * draws * 16 + 4


def draw_range(index: bytes, chunks: int, draws: int, draw: int, present: int) -> tuple[int, list[int]]:
    """Find one draw in a shard's file.

    Args:
        index: The index at the start of the file, with its checksum.
        chunks: Chunks of one draw of a full shard.
        draws: Number of draws.
        draw: The draw to find.
        present: Chunks of one draw that this shard has, fewer than ``chunks`` in a last shard that is not full.

    Returns:
        The position of the draw, and the lengths of its chunks, which follow one another.

    Raises:
        DamageError: The index is damaged.
    """
    if len(index) != index_bytes(chunks, draws):
        raise DamageError("its index is cut off")
    places = unseal(index).view("<u8").reshape(chunks, draws, 2)[:present, draw]
    if (places == MISSING).any():
        raise DamageError("a chunk is missing")
    positions, lengths = places.astype(np.int64).T
    if positions[0] < 0 or (lengths < 0).any() or (positions != positions[0] + np.cumsum(lengths) - lengths).any():
        raise DamageError("its chunks do not lie one after the other")
    return int(positions[0]), lengths.tolist()


def unpack(sealed: np.ndarray, checksum: int, blosc: Blosc, chunk_samples: int, out: np.ndarray) -> None:
    """Check and decode one chunk.

    Args:
        sealed: The chunk with its checksum.
        checksum: The checksum that was committed.
        blosc: The codec.
        chunk_samples: Samples of the chunk.
        out: (n, C, H, W), filled with the first n of its samples.

    Raises:
        DamageError: The chunk is not the one that was committed.
    """
    encoded = unseal(sealed, checksum)
    whole = out if len(out) == chunk_samples else np.empty((chunk_samples, *out.shape[1:]), out.dtype)
    if int.from_bytes(encoded[4:8].tobytes(), "little") != whole.nbytes:  # the size in Blosc's header
        raise DamageError("a chunk has another size")
    try:
        blosc.decode(encoded, out=whole)
    except (RuntimeError, ValueError) as error:
        raise DamageError(str(error)) from None
    if whole is not out:
        out[:] = whole[: len(out)]
