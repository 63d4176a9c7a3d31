"""What the codecs promise: error bounds of every precision, and that our bytes are Zarr's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stores import CLASSES, HEAD, content, filled, info
from zarr.storage import MemoryStore

from options import Option
from teacher_cache import (
    COMPRESSORS,
    PRECISIONS,
    Cache,
    CacheError,
    CacheInfo,
    Compressor,
    Precision,
    choose_compression,
    create_cache,
    open_cache,
    plan_storage,
)
from teacher_cache.codec import (
    MISSING,
    Compression,
    DamageError,
    average_pool,
    dequantise,
    index_bytes,
    quantise,
    seal,
    unpack,
    unseal,
)
from trainer.stream.stream import stored_heatmaps

FLOAT_ROUNDING, SMALLEST = 2.0**-22, 2.0**-148  # of a division and a product in float32, and of subnormal results
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
ANY_MAPS = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
LIKELY_MAPS = st.builds(
    lambda seed, size, exponent: (
        np.random.default_rng(seed).standard_cauchy((2, 3, size, size)).clip(-1e3, 1e3) * 10.0**exponent
    ).astype(np.float32),
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(-44, 35),
)


def error_bound(maps: np.ndarray, scale: np.ndarray, precision: str) -> np.ndarray:
    """What `quantise` says of its error, in float64."""
    size = np.abs(maps.astype(np.float64))
    largest = scale.astype(np.float64)[..., None, None, None]
    if precision == "float16":
        bound = size * 2.0**-10 + largest * 2.0**-25
    elif precision == "bfloat16":
        bound = size * 2.0**-8
    else:
        relative = size / np.where(largest > 0, largest, 1)
        bound = (np.sqrt(relative) / 127 + 127.0**-2 / 4) * largest
    return bound * (1 + FLOAT_ROUNDING) + size * FLOAT_ROUNDING + largest * 2.0**-133 + SMALLEST


@pytest.mark.parametrize("precision", PRECISIONS)
@given(maps=st.one_of(ANY_MAPS, LIKELY_MAPS))
@settings(deadline=None, max_examples=200)
def test_every_precision_keeps_its_error_bound_at_every_magnitude(precision, maps):
    stored, scale = quantise(maps, precision)
    found = dequantise(stored, scale, precision)
    assert found.dtype == scale.dtype == np.float32
    assert np.isfinite(found).all()
    assert (np.abs(found.astype(np.float64) - maps) <= error_bound(maps, scale, precision)).all()
    assert np.array_equal(scale, np.abs(maps).max((-3, -2, -1)))
    assert (found[maps == 0] == 0).all()
    assert (found * np.sign(maps) >= 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_value_of_a_map_is_kept_and_a_single_pixel_is_exact(precision):
    for value in (1.0, -3.7, 1e-38, 1e38, -1e-45, 0.0):
        maps = np.full((1, 1, 1, 1), value, np.float32)
        assert dequantise(*quantise(maps, precision), precision) == pytest.approx(maps, rel=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_negative_zeros_are_stored_as_zeros(precision):
    maps = np.array([-0.0, 0.0, 1.0, -1e-30, 1e-30, -1.0], np.float32).reshape(1, 1, 2, 3)
    stored, _ = quantise(maps, precision)
    assert not stored.view(np.uint8).reshape(6, -1)[:2].any()
    assert not quantise(maps * 0 * -1, precision)[0].view(np.uint8).any()


def test_float16_is_rounded_once():
    """1 + 2⁻¹⁰ + 2⁻¹² rounds to 1 + 2⁻⁹ in 9 bits; by way of float16 it would be a tie, and go to 1."""
    maps = np.array([2.0, 1 + 2**-10 + 2**-12], np.float32).reshape(1, 1, 1, 2)
    assert dequantise(*quantise(maps, "float16"), "float16").ravel()[1] == 1 + 2**-9


def test_an_unknown_precision_and_codec_are_refused():
    zeros, scale = np.zeros((1, 1, 1), np.float32), np.zeros((), np.float32)
    message = "unknown precision 'float8': choose one of float16, bfloat16, int8. Did you mean float16"
    for refused in (
        lambda: quantise(zeros, "float8"),
        lambda: dequantise(zeros, scale, "float8"),
        lambda: choose_compression(zeros, "float8"),
        lambda: plan_storage(1, (3, 8, 8), "float8"),
    ):
        with pytest.raises(CacheError, match=message) as error:
            refused()
        assert error.value.args[0].options == (Option("precision"),)
    for text in (
        "", "blosc", "auto", "lz4", "blosc-lz4-10-shuffle", "blosc-lz4-05-shuffle", "blosc-lz4--1-shuffle",
        "blosc-snappy-1-shuffle", "blosc-lz4-1-turn", "blosc-lz4-1-shuffle-", "blosc-lz4-1-shuffle\n", "gzip-1",
    ):  # fmt: skip
        for refused in (
            lambda text=text: Compression.parse(text),
            lambda text=text: plan_storage(1, (3, 8, 8), codec=text),
        ):
            with pytest.raises(
                CacheError, match=f"unknown codec '{text}': choose blosc-COMPRESSOR-LEVEL-SHUFFLE with"
            ) as error:
                refused()
            assert error.value.args[0].options == (Option("codec"),)
    with pytest.raises(CacheError, match=r"Did you mean .*\bblosc-zstd-3-bitshuffle\b"):
        Compression.parse("blosc-zsdt-3-bitshuffle")
    with pytest.raises(CacheError, match=r"unknown codec 'zstdd': choose one of lz4, zstd\. Did you mean zstd"):
        choose_compression(np.zeros((1, 1, 1, 1), np.float32), "int8", "zstdd")


POOLED_SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(4, 9), st.integers(4, 9))
# Float64 sums of 16 of these values are exact in any order: HALVES are multiples of 2⁻²⁴ less than 2¹⁶, MANTISSAS are
# multiplied by 2¹⁰⁴, up to the largest float32.
HALVES = hnp.arrays(np.float16, POOLED_SHAPES, elements=st.floats(width=16, allow_nan=False, allow_infinity=False))
MANTISSAS = hnp.arrays(np.int32, POOLED_SHAPES, elements=st.integers(1 - 2**24, 2**24 - 1))


@given(
    maps=st.one_of(
        HALVES.map(lambda maps: maps.astype(np.float32)),
        MANTISSAS.map(lambda maps: maps.astype(np.float32) * np.float32(2.0**104)),
    ),
    factor=st.sampled_from([1, 2, 3, 4]),
)
@settings(deadline=None, max_examples=100)
def test_average_pooling_is_pytorchs(maps, factor):
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(maps).double(), factor).float().numpy()
    pooled = average_pool(maps, factor)
    assert pooled.dtype == np.float32
    assert np.isfinite(pooled).all()
    assert np.array_equal(pooled, expected)


def test_average_pooling_keeps_what_float32_sums_would_lose():
    maps = np.array([65504, 2**-24, -65504, 2**-24], np.float32).reshape(1, 2, 2)
    assert average_pool(maps, 2) == np.float32(2**-25)


def test_pooling_the_largest_of_numbers_does_not_overflow():
    assert (average_pool(np.full((1, 4, 4), 3e38, np.float32), 2) == np.float32(3e38)).all()


@given(
    precision=st.sampled_from(sorted(PRECISIONS)),
    compressor=st.sampled_from([None, "lz4", "zstd"]),
    sparse=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_the_chosen_compression_is_the_smallest_and_one_that_can_be_parsed(precision, compressor, sparse):
    maps = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    maps[:, :, 1:] *= not sparse
    chosen = choose_compression(maps, precision, compressor)
    assert Compression.parse(str(chosen)) == chosen
    assert compressor in (None, chosen.compressor)
    stored = quantise(maps, precision)[0]
    sizes = {
        shuffle: len(dataclasses.replace(chosen, shuffle=shuffle).blosc().encode(stored))
        for shuffle in ("noshuffle", "shuffle", "bitshuffle")
    }
    assert sizes[chosen.shuffle] == min(sizes.values())


@pytest.mark.parametrize(
    "precision",
    [
        Precision("int16", "zstd", lambda r: np.rint(r * 32767), lambda stored: stored / np.float32(32767)),
        Precision("float32", "zstd", lambda r: r, lambda stored: stored),
        Precision(
            "uint8", "lz4", lambda r: np.rint(r * 127) + 128, lambda s: (s - 128.0) / 127, lambda s: (s - 128.0) / 127
        ),
    ],
    ids=lambda precision: precision.dtype,
)
def test_a_precision_is_one_entry_from_which_stores_are_planned_written_and_decoded(monkeypatch, precision):
    monkeypatch.setitem(PRECISIONS, "mine", precision)
    maps = content(info(), 0).heatmaps
    stored, scale = quantise(maps, "mine")
    before = stored.copy()
    decoded = dequantise(stored, scale, "mine")
    assert (stored.dtype, decoded.dtype) == (precision.dtype, np.float32)
    assert np.array_equal(stored, before)
    assert (np.abs(decoded - maps) <= scale[..., None, None, None] / 250).all()
    assert choose_compression(maps[:, 0], "mine").compressor == precision.compressor
    size = 3 * 64 * 64 * max(2, stored.itemsize)
    assert plan_storage(1, (3, 64, 64), "mine").shard_samples * size <= 2**25
    cache = filled(MemoryStore(), info(precision="mine"))
    assert zarr.open_group(cache.store, mode="r")["heatmaps"].dtype == precision.dtype
    assert np.array_equal(cache.read_shard(0).heatmaps, decoded)
    drawn = cache.read_draw(0, 1)
    tensors = [torch.from_numpy(drawn[name]) for name in ("heatmaps", "scale")]
    assert np.array_equal(stored_heatmaps(*tensors, "mine", torch.device("cpu")).numpy(), decoded[:, 1])
    monkeypatch.undo()
    with pytest.raises(CacheError, match="its precision is 'mine', this program knows float16, bfloat16, int8"):
        open_cache(cache.store)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_device_decodes_every_stored_value_as_the_documentation_says(precision):
    """docs/cache-layout.md, in float64 and rounded once. The scale is 1."""
    numbers = np.arange(-127, 128) if precision == "int8" else np.linspace(-1, 1, 65537)
    stored = (
        numbers.astype(np.int8)[None, None, None]
        if precision == "int8"
        else quantise(numbers[None, None, None].astype(np.float32), precision)[0]
    )
    ones = torch.ones(1)
    decoded = stored_heatmaps(torch.from_numpy(stored), ones, precision, torch.device("cpu")).numpy()
    wide = stored.astype(np.float64)
    expected = {
        "float16": lambda: wide,
        "bfloat16": lambda: (stored.astype(np.uint32) << 16).view(np.float32),
        "int8": lambda: wide * np.abs(wide) / 127**2,
    }[precision]()
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, expected.astype(np.float32))


def test_a_compressor_is_one_entry_that_has_its_level(monkeypatch):
    maps = content(info(), 0).heatmaps[:, 0]
    monkeypatch.setitem(COMPRESSORS, "lz4hc", Compressor(level=7, note="fast to read"))
    chosen = choose_compression(maps, "float16", "lz4hc")
    assert str(chosen).startswith("blosc-lz4hc-7-")
    assert Compression.parse(str(chosen)) == chosen
    cache = filled(MemoryStore(), info(codec=str(chosen)))
    assert np.array_equal(zarr.open_group(cache.store, mode="r")["heatmaps"][0:4, 0], quantise(maps, "float16")[0])
    monkeypatch.undo()
    with pytest.raises(CacheError, match="is no store that this program can read: unknown codec 'blosc-lz4hc-7-"):
        open_cache(cache.store)


@st.composite
def stores(draw) -> CacheInfo:
    """Every kind of store: precision, compression, resolution, sizes of shards and chunks, a last one not full, with
    and without features, maps of the images' shape and others."""
    chunk = draw(st.integers(1, 3))
    shapes = st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9))
    return info(
        samples=draw(st.integers(1, 11)),
        draws=draw(st.integers(1, 3)),
        image_shape=draw(shapes),
        explainer=draw(st.one_of(st.just({}), st.fixed_dictionaries({"map_shape": shapes}))),
        features=draw(st.sampled_from([0, 1, 7])),
        precision=draw(st.sampled_from(sorted(PRECISIONS))),
        codec=f"blosc-{draw(st.sampled_from(['lz4-5', 'zstd-3', 'lz4-0']))}"
        f"-{draw(st.sampled_from(['shuffle', 'bitshuffle', 'noshuffle']))}",
        resolution=draw(st.sampled_from([1, 2, 4])),
        chunk_samples=chunk,
        shard_samples=chunk * draw(st.integers(1, 3)),
    )


@given(of=stores())
@settings(deadline=None, max_examples=60)
def test_what_we_write_plain_zarr_reads(of):
    cache = filled(MemoryStore(), of)
    root = zarr.open_group(cache.store, mode="r")
    for shard in range(of.shards):
        rows, given_content = slice(*of.shard_range(shard)), content(of, shard)
        whole = cache.read_shard(shard)
        maps, scale = np.asarray(root["heatmaps"][rows]), np.asarray(root["scale"][rows])
        pooled = average_pool(given_content.heatmaps, of.storage.resolution)
        assert np.array_equal(maps, quantise(pooled, of.storage.precision)[0])
        assert np.array_equal(dequantise(maps, scale, of.storage.precision), whole.heatmaps)
        for name in of.rows[1:]:
            assert np.array_equal(np.asarray(root[name][rows]), getattr(given_content, name).astype(root[name].dtype))
            assert np.array_equal(getattr(whole, name), getattr(given_content, name))
        for draw in range(of.explainer.draws):
            one = cache.read_draw(shard, draw)
            assert {name: (values.shape[1:], values.dtype) for name, values in one.items()} == cache.draw_fields
            for name, values in one.items():
                assert np.array_equal(values, np.asarray(root[name][rows, draw]))
        out = sample_buffers(cache, shard)
        cache.read_samples(shard, out)
        assert list(out) == ["teacher_logits", "features"][: 1 + (of.storage.features > 0)]
        for name, values in out.items():
            assert np.array_equal(values, getattr(given_content, name))
    assert ("features" in root) == (of.storage.features > 0)


def sample_buffers(cache: Cache, shard: int) -> dict[str, np.ndarray]:
    start, stop = cache.info.shard_range(shard)
    return {name: np.empty((stop - start, *shape), dtype) for name, (shape, dtype) in cache.sample_fields.items()}


@given(of=stores())
@settings(deadline=None, max_examples=40)
def test_what_zarr_writes_we_decode(of):
    """Shards that Zarr itself encoded, chunk by chunk through our codec; Zarr has its own order of chunks."""
    written = filled(MemoryStore(), of)
    values = np.asarray(zarr.open_group(written.store, mode="r")["heatmaps"][...])
    empty = create_cache(MemoryStore(), of, HEAD)
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_group(empty.store, mode="r+")["heatmaps"][...] = values
    storage, compression = of.storage, Compression.parse(of.storage.codec)
    for shard in range(of.shards):
        start, stop = of.shard_range(shard)
        raw = empty.store.read(f"heatmaps/c.{shard}.0.0.0.0")
        assert raw is not None
        index = unseal(raw[: index_bytes(of.chunks, of.explainer.draws)]).view("<u8").reshape(of.chunks, -1, 2)
        for first in range(start, stop, storage.chunk_samples):
            for draw in range(of.explainer.draws):
                position, length = index[(first - start) // storage.chunk_samples, draw].tolist()
                assert position != MISSING
                chunk = raw[position : position + length]
                expected = values[first : min(first + storage.chunk_samples, stop), draw]
                out = np.empty_like(expected)
                checksum = int.from_bytes(chunk[-4:], "little")
                unpack(chunk, checksum, compression.blosc(), storage.chunk_samples, out)
                assert np.array_equal(out, expected)


def test_rows_that_zarr_writes_have_our_bytes():
    """Without Blosc there is one way to write a chunk, so everything but heatmaps is equal to the byte."""
    ours = filled(MemoryStore())
    theirs = create_cache(MemoryStore(), info(), HEAD)
    source, target = zarr.open_group(ours.store, mode="r"), zarr.open_group(theirs.store, mode="r+")
    for name in (*info().rows, "commits"):
        target[name][...] = source[name][...]
    compared = [key for key in ours.store.all_keys() if not key.startswith("heatmaps/c")]
    assert len(compared) > 6 * 3
    assert all(ours.store.read(key) == theirs.store.read(key) for key in compared)


def test_a_draw_is_read_into_place_as_one_range_of_the_file():
    of = info(samples=9, draws=3)
    cache = filled(MemoryStore(), of)
    buffers = {name: np.empty((20, *shape), dtype) for name, (shape, dtype) in cache.draw_fields.items()}
    out = {name: values[5:9] for name, values in buffers.items()}
    cache.read_draw(1, 2, out)
    for name, values in cache.read_draw(1, 2).items():
        assert np.array_equal(buffers[name][5:9], values)
    for wrong in (
        np.empty((3, 3, 6, 5), np.float16),
        np.empty((4, 3, 6, 5), np.float32),
        np.empty((4, 3, 5, 6), "f2").swapaxes(-1, -2),
    ):
        with pytest.raises(ValueError, match="draws of shard 1 are read into C-contiguous float16"):
            cache.read_draw(1, 2, {**out, "heatmaps": wrong})
    for draw in (-1, 3):
        with pytest.raises(IndexError, match=f"there is no draw {draw}: the store has 3"):
            cache.read_draw(1, draw)


def test_samples_are_read_into_place_and_nothing_else_is_read(monkeypatch):
    cache, bare = filled(MemoryStore(), info(samples=9)), filled(MemoryStore(), info(features=0))
    buffers = {name: np.full((20, *shape), 7, dtype) for name, (shape, dtype) in cache.sample_fields.items()}
    seen = []
    read = cache.store.read
    monkeypatch.setattr(cache.store, "read", lambda key, *part: seen.append(key) or read(key, *part))
    cache.read_samples(1, {"features": buffers["features"][5:9]})
    assert seen == ["commits/c.1.0", "features/c.1.0"]
    assert np.array_equal(buffers["features"][5:9], content(cache.info, 1).features)
    assert (buffers["features"][[4, 9]] == 7).all()
    assert (buffers["teacher_logits"] == 7).all()
    for name, wrong in (
        ("features", np.empty((3, 5), np.float32)),
        ("features", np.empty((4, 5), np.float64)),
        ("teacher_logits", np.empty((4, 5), np.float32)),
        ("heatmaps", np.empty((4, 2, 3, 6, 5), np.float16)),
    ):
        with pytest.raises(ValueError, match=f"samples of shard 1 are read into arrays of .*, not '{name}'"):
            cache.read_samples(1, {name: wrong})
    with pytest.raises(ValueError, match="not 'features'"):
        bare.read_samples(0, {"features": buffers["features"][:4]})


def test_a_store_with_features_equals_one_without_in_all_else():
    with_features, without = (filled(MemoryStore(), info(features=width)) for width in (5, 0))
    mine, theirs = (zarr.open_group(cache.store, mode="r") for cache in (with_features, without))
    assert set(mine.array_keys()) - set(theirs.array_keys()) == {"features"}
    for name in set(theirs.array_keys()) - {"commits"}:
        assert np.asarray(mine[name][...]).tobytes() == np.asarray(theirs[name][...]).tobytes()
    assert without.read_shard(0).features is None
    for cache, other in ((with_features, without), (without, with_features)):
        with pytest.raises(ValueError, match="shard 0 holds arrays of shapes"):
            cache.write_shard(0, content(other.info, 0))


def test_unsealing_notices_every_flipped_bit():
    sealed = seal(b"some bytes")
    assert unseal(sealed).tobytes() == b"some bytes"
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamageError):
            unseal(bytes(flipped))
    for length in range(len(sealed)):
        with pytest.raises(DamageError):
            unseal(sealed[:length])


@pytest.mark.parametrize("field", ["heatmaps", "epsilon", "teacher_logits", "features"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(field, value):
    cache = create_cache(MemoryStore(), info(), HEAD)
    shard = content(info(), 0)
    getattr(shard, field).flat[3] = value
    with pytest.raises(CacheError, match=r"shard 0 \(samples 0 to 3\) are not finite"):
        cache.write_shard(0, shard)
    assert not cache.committed().any()


@pytest.mark.parametrize("value", [-1, len(CLASSES)])
def test_classes_that_there_are_not_are_refused(value):
    cache = create_cache(MemoryStore(), info(), HEAD)
    shard = content(info(), 0)
    shard.target_class[1, 1] = value
    with pytest.raises(ValueError, match="shard 0 explains classes that there are not: there are 3, from 0"):
        cache.write_shard(0, shard)


@given(
    draws=st.integers(1, 64),
    channels=st.integers(1, 4),
    side=st.integers(1, 512),
    coarse=st.one_of(st.none(), st.integers(1, 64)),
    features=st.sampled_from([0, 1, 10**6]),
)
@settings(deadline=None)
def test_planned_shards_are_bounded_and_made_of_whole_chunks(draws, channels, side, coarse, features):
    maps = None if coarse is None else (1, coarse, coarse)
    plan = plan_storage(draws, (channels, side, side), map_shape=maps, features=features)
    assert 1 <= plan.chunk_samples <= plan.shard_samples <= 1024
    assert plan.shard_samples % plan.chunk_samples == 0
    values = math.prod(maps or (channels, side, side))
    for size in (draws * values * 2, channels * side * side):  # of stored maps, and of images
        assert plan.shard_samples == 1 or plan.shard_samples * size <= 2**25
    assert plan == dataclasses.replace(plan_storage(draws, (channels, side, side), map_shape=maps), features=features)


@pytest.mark.parametrize(
    ("side", "resolution", "message"),
    [
        (28, 0, "resolution=0 leaves nothing of maps of 28×28: choose 1 or 2 or 4"),
        (28, 40, "resolution=40 leaves nothing of maps of 28×28: choose 1 or 2 or 4"),
        (7, 4, "resolution=4 leaves a single number of maps of 7×7: choose 1 or 2$"),
        (3, 2, "resolution=2 leaves a single number of maps of 3×3: choose 1$"),
        (3, 4, "resolution=4 leaves nothing of maps of 3×3: choose 1$"),
    ],
)
def test_a_resolution_that_leaves_no_positions_is_refused(side, resolution, message):
    with pytest.raises(CacheError, match=message):
        plan_storage(1, (3, 32, 32), resolution=resolution, map_shape=(1, side, side))
    assert plan_storage(1, (3, 32, 32), map_shape=(1, side, side)).resolution == 1
    assert plan_storage(1, (3, 1, 1)).resolution == 1
