"""What docs/cache-layout.md promises: a store can be read from that page alone, without Zarr and without this program.

`PageReader` uses nothing but json, struct, NumPy, numcodecs and a CRC-32C.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import pytest
from stores import filled, info

from teacher_cache import open_cache

MISSING = 2**64 - 1


class PageReader:
    """A reader of stores, written from docs/cache-layout.md and from no other source."""

    def __init__(self, path: Path):
        self.path = path
        self.attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        assert self.attributes["kind"] == "explanation-distillation cache"
        assert self.attributes["format_version"] == 3
        storage = self.attributes["storage"]
        self.precision = storage["precision"]
        self.shard_samples, self.chunk_samples = storage["shard_samples"], storage["chunk_samples"]
        self.samples, self.draws, _, height, width = self.document("heatmaps")["shape"]
        channels, full_height, full_width = self.attributes["explainer"]["map_shape"]
        resolution = storage["resolution"]
        assert (height, width) == (full_height // resolution, full_width // resolution)
        self.map_shape = (channels, height, width)
        self.shards = math.ceil(self.samples / self.shard_samples)
        self.small = ["scale", "target_class", "epsilon", "teacher_logits", *["features"] * bool(storage["features"])]

    def document(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name / "zarr.json").read_text())

    def count(self, shard: int) -> int:
        """The samples of a shard."""
        return min(self.shard_samples, self.samples - shard * self.shard_samples)

    def record(self, shard: int) -> np.ndarray:
        payload, _ = self.checked((self.path / f"commits/c.{shard}.0").read_bytes())
        return np.frombuffer(payload, "<u4")

    def rows(self, name: str, shard: int) -> tuple[np.ndarray, int]:
        """A shard's rows of a small array, the padded ones too, and the CRC-32C of its chunk."""
        document = self.document(name)
        payload, checksum = self.checked((self.path / name / f"c.{shard}.0").read_bytes())
        dtype = np.dtype(document["data_type"]).newbyteorder("<")
        return np.frombuffer(payload, dtype).reshape(self.shard_samples, *document["shape"][1:]), checksum

    def maps(self, shard: int) -> tuple[np.ndarray, list[int]]:
        """A shard's heatmaps (samples, draws, C, h, w), and the CRC-32C of each chunk, draw by draw."""
        file = (self.path / "heatmaps" / f"c.{shard}.0.0.0.0").read_bytes()
        chunks = self.shard_samples // self.chunk_samples
        size = chunks * self.draws * 16
        index, _ = self.checked(file[: size + 4])
        places = [struct.unpack_from("<QQ", index, 16 * i) for i in range(chunks * self.draws)]
        stored = np.zeros(
            (self.shard_samples, self.draws, *self.map_shape),
            {"float16": "<f2", "bfloat16": "<u2", "int8": "i1"}[self.precision],
        )
        checksums, end = [], size + 4
        for draw in range(self.draws):
            for chunk in range(chunks):
                position, length = places[chunk * self.draws + draw]
                if position == MISSING:
                    assert length == MISSING
                    assert chunk * self.chunk_samples >= self.count(shard)
                    checksums.append(0)
                    continue
                assert position == end  # draw by draw, one after the other
                end += length
                payload, checksum = self.checked(file[position : position + length])
                values = np.frombuffer(numcodecs.blosc.decompress(payload), stored.dtype)
                first = chunk * self.chunk_samples
                stored[first : first + self.chunk_samples, draw] = values.reshape(self.chunk_samples, *self.map_shape)
                checksums.append(checksum)
        assert end == len(file)
        assert not stored[self.count(shard) :].any()
        scale, _ = self.rows("scale", shard)
        return (self.relative(stored) * scale[:, :, None, None, None])[: self.count(shard)], checksums

    def relative(self, stored: np.ndarray) -> np.ndarray:
        """The maps over their scale, float32."""
        if self.precision == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        values = stored.astype(np.float32)
        return values * np.abs(values) / np.float32(127**2) if self.precision == "int8" else values

    def identity(self, shard: int) -> int:
        """The first number of a commit record."""
        sections = {name: dict(self.attributes[name]) for name in ("explainer", "teacher", "dataset", "storage")}
        del sections["dataset"]["name"]
        return google_crc32c.value(json.dumps([sections, shard], sort_keys=True).encode())

    def head(self, name: str) -> np.ndarray:
        shape = self.document(f"head/{name}")["shape"]
        payload, _ = self.checked((self.path / "head" / name / "c" / "/".join("0" * len(shape))).read_bytes())
        return np.frombuffer(payload, "<f4").reshape(shape)

    @staticmethod
    def checked(chunk: bytes) -> tuple[bytes, int]:
        """The content of a chunk, and its CRC-32C."""
        (checksum,) = struct.unpack("<I", chunk[-4:])
        assert google_crc32c.value(chunk[:-4]) == checksum
        return chunk[:-4], checksum


@pytest.fixture(params=["float16", "bfloat16", "int8"])
def path(request, tmp_path) -> Path:
    """Shards of 4, 4 and 1 samples in chunks of 2, three draws, class names that JSON escapes, coarser maps."""
    of = info(samples=9, draws=3, precision=request.param, resolution=2)
    filled(tmp_path / "c.zarr", replace(of, teacher=replace(of.teacher, class_names=("Äpfel", "犬", "🐈"))))
    return tmp_path / "c.zarr"


def test_a_reader_written_from_the_page_alone_gets_our_values(path):
    page, ours = PageReader(path), open_cache(path)
    assert [page.count(shard) for shard in range(page.shards)] == [4, 4, 1]
    for shard in range(page.shards):
        expected = ours.read_shard(shard)
        heatmaps, _ = page.maps(shard)
        assert heatmaps.shape == expected.heatmaps.shape
        assert heatmaps.any()
        # two products of float32, perhaps in another order
        np.testing.assert_allclose(heatmaps, expected.heatmaps, rtol=2**-22, atol=0)
        for name in page.small[1:]:
            rows, _ = page.rows(name, shard)
            assert np.array_equal(rows[: page.count(shard)], getattr(expected, name)), name
            assert not rows[page.count(shard) :].any(), name
    for name, values in ours.head.items():
        assert np.array_equal(page.head(name), values), name


def test_a_commit_record_can_be_computed_from_the_page_alone(path):
    page = PageReader(path)
    assert page.document("commits")["shape"] == [page.shards, 1 + len(page.small) + 2 * page.draws]
    for shard in range(page.shards):
        small = [page.rows(name, shard)[1] for name in page.small]
        _, maps = page.maps(shard)
        assert page.record(shard).tolist() == [page.identity(shard), *small, *maps]
        assert maps.count(0) == (3 if shard == 2 else 0)
