"""A heatmap store read in JavaScript, by a program that was written from docs/cache-layout.md alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from stores import HEAD, filled, info

from teacher_cache import Cache, open_cache

READER = Path(__file__).with_name("read_store.mjs")
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed (https://nodejs.org)")


def javascript(path: Path, array: str) -> subprocess.CompletedProcess[bytes]:
    assert NODE
    return subprocess.run([NODE, READER, path, array], capture_output=True)


def node_has_zstd() -> bool:
    assert NODE
    words = "process.exit(require('node:zlib').zstdDecompressSync ? 0 : 1)"
    return subprocess.run([NODE, "-e", words]).returncode == 0


def values(cache: Cache, array: str) -> bytes:
    """The values of an array that our own reader gives, with the dtype of the store."""
    shards = [getattr(cache.read_shard(shard), array) for shard in range(cache.info.shards)]
    return np.concatenate(shards).astype(np.int32 if array == "target_class" else np.float32).tobytes()


@pytest.mark.parametrize("compressor", ["lz4-5", "zstd-3"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("shuffle", ["noshuffle", "shuffle", "bitshuffle"])
def test_javascript_reads_the_bits_that_our_reader_gives(tmp_path, precision, compressor, shuffle):
    if compressor == "zstd-3" and not node_has_zstd():
        pytest.skip("this Node has no zstd (22.15, 23.8 or later have it)")
    codec = f"blosc-{compressor}-{shuffle}"
    for name, shape, resolution in (("small", (3, 6, 5), 1), ("large", (3, 64, 48), 1), ("pooled", (1, 17, 24), 2)):
        of = info(10, 2, shape, precision=precision, codec=codec, resolution=resolution, shard_samples=4)
        filled(tmp_path / name, of)
        done = javascript(tmp_path / name, "heatmaps")
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == values(open_cache(tmp_path / name), "heatmaps")


def test_javascript_reads_every_array_beside_the_maps(tmp_path):
    cache = filled(tmp_path / "c.zarr")
    for array in ("target_class", "epsilon", "teacher_logits", "features"):
        assert javascript(tmp_path / "c.zarr", array).stdout == values(cache, array)
    for name, expected in HEAD.items():
        assert javascript(tmp_path / "c.zarr", f"head/{name}").stdout == expected.tobytes()


@pytest.mark.parametrize("key", ["heatmaps/c.1.0.0.0.0", "scale/c.1.0", "commits/c.1.0"])
def test_the_checksums_reveal_a_changed_byte_to_javascript_too(tmp_path, key):
    filled(tmp_path / "c.zarr")
    file = tmp_path / "c.zarr" / key
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    done = javascript(tmp_path / "c.zarr", "heatmaps")
    assert (done.returncode, b"a checksum is wrong" in done.stderr) == (1, True)
