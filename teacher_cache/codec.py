"""Heatmaps as bytes and back: precisions, compression, and the shard of Zarr that holds them. No files, no models.

A shard's file is a shard of Zarr's sharding codec, so that any reader of Zarr reads it: first the index, then the
chunks, all of the first draw, then all of the second, so that one draw is one range of bytes. We write and read it
here, and not through Zarr, because a stream wants one draw decoded into place at the speed of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np
from numcodecs import Blosc

PRECISIONS = {"float16": "float16", "bfloat16": "uint16", "int8": "int8"}  # the type that each has in Zarr
SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
LEVELS = {"lz4": 5, "zstd": 3}
COMPRESSORS = tuple(LEVELS)
DEFAULT_COMPRESSOR = {"float16": "lz4", "bfloat16": "lz4", "int8": "zstd"}  # fast, but small where small was asked for
MISSING = np.iinfo(np.uint64).max  # in an index: no such chunk


class DamageError(ValueError):
    """Bytes that are not what they should be."""


def quantise(maps: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 (…, C, H, W) as stored, and their ``scale`` float32 (…): each map's largest absolute value.

    - ``float16``: r = map / scale, rounded to 9 bits of mantissa: the tenth is noise that does not compress;
      error at most 2⁻¹⁰ · |map|, and 2⁻²⁵ · scale where float16 is subnormal;
    - ``bfloat16``: r, its bits as uint16, error at most 2⁻⁸ · |map|;
    - ``int8``: √|r| in 127 steps, with its sign: a companding curve, as relevance is heavy-tailed; error at most
      (√|r| / 127 + 127⁻² / 4) · scale.

    Float32 adds its own rounding, a few parts in 2²⁴, or 2⁻¹⁴⁹ where that is more. Zeros stay zeros; negative ones
    become positive, as both mean the same and a mixture does not compress.
    """
    maps = np.asarray(maps, np.float32)
    scale = np.abs(maps).max(axis=(-3, -2, -1), initial=0)
    relative = maps / np.where(scale > 0, scale, 1)[..., None, None, None]
    if precision == "float16":  # rounded once, and not to float16 first: two roundings are worse than either
        stored = (_round_off(relative.view(np.uint32), 14) & np.uint32(0xFFFFC000)).view(np.float32).astype(np.float16)
        return _without_negative_zeros(stored.view(np.uint16)).view(np.float16), scale
    if precision == "bfloat16":
        return _without_negative_zeros((_round_off(relative.view(np.uint32), 16) >> 16).astype(np.uint16)), scale
    if precision == "int8":
        return np.rint(np.copysign(np.sqrt(np.abs(relative)), relative) * 127).astype(np.int8), scale
    raise ValueError(f"no precision is called '{precision}': choose one of {', '.join(PRECISIONS)}")


def _round_off(bits: np.ndarray, last: int) -> np.ndarray:
    """Round uint32 to nearest even before ``last`` bits are cut off."""
    return bits + np.uint32((1 << last - 1) - 1) + (bits >> np.uint32(last) & np.uint32(1))


def _without_negative_zeros(bits: np.ndarray) -> np.ndarray:
    """Of 16-bit floats as uint16, in place."""
    bits[bits == 0x8000] = 0
    return bits


def dequantise(stored: np.ndarray, scale: np.ndarray, precision: str) -> np.ndarray:
    """The inverse of `quantise`: float32 (…, C, H, W)."""
    bits = precision == "bfloat16"
    maps = (stored.astype(np.uint32) << 16).view(np.float32) if bits else stored.astype(np.float32)
    if precision == "int8":
        maps *= np.abs(maps) / np.float32(127**2)
    maps *= scale[..., None, None, None]
    return maps


def average_pool(maps: np.ndarray, factor: int) -> np.ndarray:
    """Mean over factor × factor pixels of (…, H, W); rows and columns that do not fill one are left out."""
    if factor == 1:
        return maps
    height, width = maps.shape[-2] // factor, maps.shape[-1] // factor
    cut = maps[..., : height * factor, : width * factor]
    means = cut.reshape(*maps.shape[:-2], height, factor, width, factor).mean((-3, -1), dtype=np.float64)
    return means.astype(np.float32)  # a sum in float32 could overflow


@dataclass(frozen=True)
class Compression:
    """Blosc: a compressor, its level, and how bytes are reordered before it."""

    compressor: str
    level: int
    shuffle: str

    def __str__(self) -> str:
        return f"blosc-{self.compressor}-{self.level}-{self.shuffle}"

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Raises ValueError for what is none."""
        kind, compressor, level, shuffle = (text.split("-") + [""] * 4)[:4]
        compression = cls(compressor, int(level) if level.isdecimal() else -1, shuffle)
        known = kind == "blosc" and compressor in LEVELS and 0 <= compression.level <= 9 and shuffle in SHUFFLES
        if not known or str(compression) != text:
            raise ValueError(
                f"no codec is called '{text}': in full they are blosc-COMPRESSOR-LEVEL-SHUFFLE, one of "
                f"{', '.join(COMPRESSORS)}, 0 to 9, and one of {', '.join(SHUFFLES)}"
            )
        return compression

    def blosc(self) -> Blosc:
        return Blosc(self.compressor, self.level, SHUFFLES[self.shuffle], blocksize=0)


def choose_compression(maps: np.ndarray, precision: str, compressor: str | None = None) -> Compression:
    """The shuffle that makes these maps, float32 (n, C, H, W), smallest, with the compressor that is given.

    Measured (docs/results/storage.md): sparse maps are smallest as they are, dense ones bit-shuffled. Without a
    compressor: LZ4 for 16-bit maps, which decodes several times faster, zstd for 8-bit ones, which is smaller.
    """
    compressor = compressor or DEFAULT_COMPRESSOR[precision]
    stored, _ = quantise(maps, precision)
    candidates = [Compression(compressor, LEVELS[compressor], shuffle) for shuffle in SHUFFLES]
    return min(candidates, key=lambda candidate: len(candidate.blosc().encode(stored)))


def seal(payload: bytes) -> bytes:
    """With its CRC-32C behind it, as Zarr's crc32c codec has it."""
    return payload + checksum(payload).to_bytes(4, "little")


def unseal(sealed: bytes | np.ndarray, expected: int | None = None) -> np.ndarray:
    """The payload, uint8 (n,). Raises DamageError unless its checksum is right, and the ``expected`` one."""
    view = np.frombuffer(sealed, np.uint8)
    stored = int.from_bytes(view[-4:].tobytes(), "little")
    if len(view) < 4 or checksum(view[:-4]) != stored:
        raise DamageError("a checksum is wrong")
    if expected is not None and stored != expected:
        raise DamageError("it is not the one that was committed")
    return view[:-4]


def checksum(payload: bytes | np.ndarray) -> int:
    """CRC-32C."""
    return int(google_crc32c.value(payload))


def pack(
    stored: np.ndarray, compression: Compression, shard_samples: int, chunk_samples: int
) -> tuple[bytes, list[int]]:
    """The file of one shard from its maps (n, D, C, H, W), and the checksum of every chunk, draw by draw.

    Checksums of chunks that there are not, in a last shard that is not full, are 0.
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
    """Length of the index at the beginning of a shard's file, with its checksum."""
    return chunks * draws * 16 + 4


def draw_range(index: bytes, chunks: int, draws: int, draw: int, there: int) -> tuple[int, list[int]]:
    """Where in a shard's file a draw begins, and how long its chunks are, one after the other.

    ``there`` chunks are there, fewer than ``chunks`` in a last shard that is not full. Raises DamageError for an index
    that is none.
    """
    if len(index) != index_bytes(chunks, draws):
        raise DamageError("its index is cut off")
    places = unseal(index).view("<u8").reshape(chunks, draws, 2)[:there, draw]
    if (places == MISSING).any():
        raise DamageError("a chunk is missing")
    positions, lengths = places.astype(np.int64).T
    if positions[0] < 0 or (lengths < 0).any() or (positions != positions[0] + np.cumsum(lengths) - lengths).any():
        raise DamageError("its chunks do not lie one after the other")
    return int(positions[0]), lengths.tolist()


def unpack(sealed: np.ndarray, checksum: int, blosc: Blosc, chunk_samples: int, out: np.ndarray) -> None:
    """Decode a chunk into ``out`` (n, C, H, W), of its samples the first n. Raises DamageError where it is not the one
    that was committed."""
    encoded = unseal(sealed, checksum)
    whole = out if len(out) == chunk_samples else np.empty((chunk_samples, *out.shape[1:]), out.dtype)
    if int.from_bytes(encoded[4:8].tobytes(), "little") != whole.nbytes:  # as Blosc's header has it
        raise DamageError("a chunk has another size")
    try:
        blosc.decode(encoded, out=whole)
    except (RuntimeError, ValueError) as error:
        raise DamageError(str(error)) from None
    if whole is not out:
        out[:] = whole[: len(out)]
